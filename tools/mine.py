"""Mines hard examples for `--augment` from a training file of pairs: rows for which counting common
words gives the wrong answer.

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
from config import PathOrName, PathsOrNames, Share, UserError
from tasks.classification.labels import is_unknown, label_name
from tasks.metrics import words
from text.rows import Row, read_rows
from tools.predictions import check_out, show_table

COLUMNS = {
    "first": ("sentence1", "question1", "premise", "text1", "#1 String", "sentence_A"),
    "second": ("sentence2", "question2", "hypothesis", "text2", "#2 String", "sentence_B"),
    "label": ("is_duplicate", "label", "Quality", "gold_label", "entailment_judgment"),
}
SHOWN = 3  # hardest rows of each kind to print


@dataclass(frozen=True)
class MineConfig:
    """Write the hardest rows of a file of pairs: similar pairs with few words in common, and other
    pairs with many."""

    data: PathsOrNames = ""
    """Files of labelled pairs, as for training."""
    out: PathOrName = ""
    """File to write: csv with the columns sentence1, sentence2 and label."""
    share: Share = 0.2
    """Fraction of the rows to take from each of the two kinds."""
    alike: tuple[str, ...] = ("1", "entailment")
    """Labels of pairs whose texts mean the same, or whose second text follows from the first. 1
    matches 1.0 too. For RTE's numbers type 0."""
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
    """The pairs of one kind, alike or not, and the hardest of them."""

    name: str
    overlaps: dict[int, float]  # by row number, the hardest row first
    hard: list[int]

    def mean(self, numbers: Collection[int]) -> float:
        """The mean overlap of the rows with these numbers."""
        return sum(self.overlaps[i] for i in numbers) / len(numbers)


def overlap(first: str, second: str) -> float:
    """The Jaccard index of two texts' words, 0 to 1. It is 1 if neither text has words."""
    one, other = set(words(first)), set(words(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def hardest(
    name: str, rows: Sequence[Row], numbers: Sequence[int], alike: bool, share: float
) -> PairGroup:
    """The rows with these numbers as a PairGroup. Its hardest fraction `share` has the least
    overlap for pairs that are alike, else the most."""
    overlaps = {i: overlap(rows[i]["first"], rows[i]["second"]) for i in numbers}
    order = sorted(numbers, key=lambda i: overlaps[i] if alike else -overlaps[i])
    return PairGroup(
        name, {i: overlaps[i] for i in order}, order[: max(1, round(share * len(order)))]
    )


def main() -> None:
    """Run the command."""
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
    """The pairs that are alike, and the others. Raises UserError if one of the two is empty."""
    names = [label_name(row["label"]).lower() for row in rows]
    alike = {label_name(label).lower() for label in cfg.alike}
    numbers = {
        kind: [i for i, name in enumerate(names) if (name in alike) == kind]
        for kind in (True, False)
    }
    if not numbers[True] or not numbers[False]:
        few = "no row" if not numbers[True] else "every row"
        raise UserError(
            f"{few} of {cfg.data} has a label of --alike {' '.join(cfg.alike)}; name some, but not "
            f"all, of these: {', '.join(sorted(set(names))[:20])}"
        )
    return [
        hardest("alike, few words in common", rows, numbers[True], True, cfg.share),
        hardest("not alike, many in common", rows, numbers[False], False, cfg.share),
    ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write the pairs as csv, with column names that finetune.paraphrase and finetune.nli read."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sentence1", "sentence2", "label"])
        writer.writerows([row["first"], row["second"], row["label"]] for row in rows)


def show(kinds: Sequence[PairGroup], rows: Sequence[Row]) -> None:
    """Print a table of the two kinds with their mean overlap, and the hardest rows of each."""
    table = [["", "rows", "mined", "overlap of all", "of mined"]]
    for kind in kinds:
        means = [f"{kind.mean(numbers):.3f}" for numbers in (kind.overlaps, kind.hard)]
        table.append([kind.name, f"{len(kind.overlaps):,}", f"{len(kind.hard):,}", *means])
    show_table(table)
    # In RTE's numbers, 1 means "not entailment".
    if kinds[0].mean(kinds[0].overlaps) < kinds[1].mean(kinds[1].overlaps):
        print(
            "the pairs that are alike share fewer words than the others. Does --alike name the "
            "right labels?"
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
