"""Is one method better than another, or was it luck? The paired test of two runs' predictions of
the same rows.

python -m tools.compare runs/a/validation.jsonl runs/b/validation.jsonl
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from base.cli import entry_point, parse
from base.files import write_json
from config import Positional, Seed, UserError, Where
from tasks.classification.confusion import paired_test
from tools.predictions import check_out, read_predictions, show_table


@dataclass(frozen=True)
class CompareConfig:
    """Compare the predictions of two runs, A and B, of the same rows with their true labels."""

    files: Annotated[tuple[Where, ...], Positional("A B")] = ()
    """Two files of predictions: a run's validation.jsonl, or its predictions.jsonl where the labels
    are known."""
    seed: Seed = 1337
    """Of the resamples that the intervals come from."""
    json: Where | None = None
    """Write the figures to this file too."""


def main() -> None:
    cfg = parse(CompareConfig, sys.argv[1:])
    if len(cfg.files) != 2:
        raise UserError(
            f"{len(cfg.files)} files are named; type python -m tools.compare A.jsonl B.jsonl"
        )
    out = check_out(cfg.json, cfg.files, "--json") if cfg.json else None
    first, second = read_predictions(cfg.files)
    known = first.known & second.known
    if not known.any():
        raise UserError(
            f"{first.where} has no row with its true label; there is nothing to compare by"
        )
    found = paired_test(
        first.true[known], first.predicted[known], second.predicted[known], cfg.seed
    )
    if out:
        scores = [dict(zip(("accuracy", "macro_f1"), run.scores())) for run in (first, second)]
        write_json(out, {"files": cfg.files, "scores": scores, "seed": cfg.seed} | found)
    show(cfg.files, (first.scores(), second.scores()), found)


def show(files: tuple[str, ...], scores: tuple[tuple[float, float], ...], found: dict) -> None:
    """One table, and what McNemar's test says."""
    figures = [found["accuracy"], found["macro_f1"]]
    lines = [
        [f"{name}  {file}", *(f"{value:.4f}" for value in of)]
        for name, file, of in zip("AB", files, scores)
    ]
    differences = ["A - B", *(f"{figure['difference']:+.4f}" for figure in figures)]
    intervals = [
        "95% interval",
        *("{:+.4f} to {:+.4f}".format(*figure["interval"]) for figure in figures),
    ]
    show_table([["", "accuracy", "macro-F1"], *lines, differences, intervals])
    print(
        f"of {found['rows']:,} rows A alone has {found['wins']:,} right and B alone "
        f"{found['losses']:,}: McNemar's exact p {found['mcnemar_p']:.4g}"
    )


if __name__ == "__main__":
    entry_point(main)
