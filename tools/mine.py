"""Hard examples out of a training file of pairs, for `--augment`: where counting common words gives
the wrong answer.

python -m tools.mine --data quora-train.csv --out hard.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from base.cli import entry_point, parse
from base.console import outlive, printable
from config import Share, UserError, Where, Wheres
from tasks.classification.labels import is_unknown, label_name
from tasks.metrics import words
from text.rows import Row, read_rows
from tools.predictions import check_out, show_table

COLUMNS = {
    "first": ("sentence1", "question1", "premise", "text1", "#1 String", "sentence_A"),
    "second": ("sentence2", "question2", "hypothesis", "text2", "#2 String", "sentence_B"),
    "label": ("is_duplicate", "label", "Quality", "gold_label", "entailment_judgment"),
}
SHOWN = 3  # of the hardest of a kind


@dataclass(frozen=True)
class MineConfig:
    """Write the hardest rows of a file of pairs: those alike with few words in common, and the
    others with many."""

    data: Wheres = ""
    """Files of pairs with labels, as for training."""
    out: Where = ""
    """File to write: csv with the columns sentence1, sentence2 and label."""
    share: Share = 0.2
    """Share of the rows of each of the two kinds to take."""
    alike: tuple[str, ...] = ("1", "entailment")
    """Labels that say the two texts mean the same, or the second follows. 1 is 1.0 too; for RTE's
    numbers type 0."""
    first_column: str | None = None
    """Column of the first text. Default: sentence1, question1, premise, text1, #1 String or
    sentence_A."""
    second_column: str | None = None
    """Column of the second text. Default: sentence2, question2, hypothesis, text2, #2 String or
    sentence_B."""
    label_column: str | None = None
    """Column of the label. Default: is_duplicate, label, Quality, gold_label or
    entailment_judgment."""


@dataclass(frozen=True)
class PairGroup:
    """Rows whose labels say the same, and which of them are hard."""

    name: str
    overlaps: dict[int, float]  # by number of row, the hardest first
    hard: list[int]

    def mean(self, numbers: Collection[int]) -> float:
        return sum(self.overlaps[i] for i in numbers) / len(numbers)


def overlap(first: str, second: str) -> float:
    """Jaccard's index of two texts' words, 0 to 1: those in both over those in either; 1 where
    neither has any."""
    one, other = set(words(first)), set(words(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def hardest(
    name: str, rows: Sequence[Row], numbers: Sequence[int], alike: bool, share: float
) -> PairGroup:
    """Of the rows with these numbers the share with the least overlap if they are alike, else with
    the most."""
    overlaps = {i: overlap(rows[i]["first"], rows[i]["second"]) for i in numbers}
    order = sorted(numbers, key=lambda i: overlaps[i] if alike else -overlaps[i])
    return PairGroup(
        name, {i: overlaps[i] for i in order}, order[: max(1, round(share * len(order)))]
    )


def main() -> None:
    cfg = parse(MineConfig, sys.argv[1:])
    outlive()
    if not cfg.data:
        raise UserError("--data FILE is missing: the pairs to choose from")
    if not 0 < cfg.share <= 1:
        raise UserError(f"--share is {cfg.share}; it must be above 0 and at most 1")
    out = check_out(cfg.out, [cfg.data])
    columns = {field: getattr(cfg, f"{field}_column") or usual for field, usual in COLUMNS.items()}
    found = read_rows(cfg.data, columns).rows
    rows = [row for row in found if not is_unknown(row["label"])]
    if len(rows) < len(found):
        print(
            f"{len(found) - len(rows):,} of {len(found):,} rows have no known label and are left "
            "out"
        )
    kinds = split(rows, cfg)
    write(out, [rows[i] for i in sorted(i for kind in kinds for i in kind.hard)])
    show(kinds, rows)
    print(f"{out}: {sum(len(kind.hard) for kind in kinds):,} of {len(rows):,} rows")


def split(rows: Sequence[Row], cfg: MineConfig) -> list[PairGroup]:
    """The rows that are alike and the others. Raises UserError where one of the two is empty."""
    names = [label_name(row["label"]).lower() for row in rows]
    alike = {label_name(label).lower() for label in cfg.alike}
    numbers = {
        of: [i for i, name in enumerate(names) if (name in alike) == of] for of in (True, False)
    }
    if not numbers[True] or not numbers[False]:
        few = "no row" if not numbers[True] else "every row"
        raise UserError(
            f"{few} of {cfg.data} has a label of --alike {' '.join(cfg.alike)}; name some of "
            f"these: {', '.join(sorted(set(names))[:20])}"
        )
    return [
        hardest("alike, few words in common", rows, numbers[True], True, cfg.share),
        hardest("not alike, many in common", rows, numbers[False], False, cfg.share),
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sentence1", "sentence2", "label"])
        writer.writerows([row["first"], row["second"], row["label"]] for row in rows)


def show(kinds: Sequence[PairGroup], rows: Sequence[Row]) -> None:
    """How many of each kind, their mean overlap beside that of all, and the hardest."""
    table = [["", "rows", "mined", "overlap of all", "of mined"]]
    for kind in kinds:
        means = [f"{kind.mean(of):.3f}" for of in (kind.overlaps, kind.hard)]
        table.append([kind.name, f"{len(kind.overlaps):,}", f"{len(kind.hard):,}", *means])
    show_table(table)
    # as 1 does in RTE's numbers
    if kinds[0].mean(kinds[0].overlaps) < kinds[1].mean(kinds[1].overlaps):
        print(
            "those alike share fewer words than the others: do these labels say alike? Name those "
            "that do with --alike"
        )
    for kind in kinds:
        print(f"\n{kind.name}:")
        for i in kind.hard[:SHOWN]:
            first, second = (
                printable(" ".join(rows[i][field].split())) for field in ("first", "second")
            )
            print(f"  {kind.overlaps[i]:.2f}  {first}\n        {second}")
    print()


if __name__ == "__main__":
    entry_point(main)
