"""Tests whether one run is better than another or only luckier: a paired test of the two runs'
predictions for the same rows.

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
    """Compare the predictions of two runs, A and B, for the same rows with known labels."""

    files: Annotated[tuple[Where, ...], Positional("A B")] = ()
    """Two files of predictions: a run's validation.jsonl, or its predictions.jsonl where the labels
    are known."""
    seed: Seed = 1337
    """Seed of the resamples for the confidence intervals."""
    json: Where | None = None
    """Also write the figures to this file."""


def main() -> None:
    """Run the command."""
    cfg = parse(CompareConfig, sys.argv[1:])
    if len(cfg.files) != 2:
        raise UserError(
            f"{len(cfg.files)} files are named, not 2; type python -m tools.compare A.jsonl B.jsonl"
        )
    out = check_out(cfg.json, cfg.files, "--json") if cfg.json else None
    first, second = read_predictions(cfg.files)
    known = first.known & second.known
    if not known.any():
        raise UserError(
            f"{first.where} has no row with a known label; give predictions of rows with labels"
        )
    found = paired_test(
        first.true[known], first.predicted[known], second.predicted[known], cfg.seed
    )
    if out:
        scores = [dict(zip(("accuracy", "macro_f1"), run.scores())) for run in (first, second)]
        write_json(out, {"files": cfg.files, "scores": scores, "seed": cfg.seed} | found)
    show(cfg.files, (first.scores(), second.scores()), found)


def show(files: tuple[str, ...], scores: tuple[tuple[float, float], ...], found: dict) -> None:
    """Print a table of both runs, their difference, and McNemar's test."""
    figures = [found["accuracy"], found["macro_f1"]]
    lines = [
        [f"{name}  {file}", *(f"{value:.4f}" for value in values)]
        for name, file, values in zip("AB", files, scores)
    ]
    differences = ["A - B", *(f"{figure['difference']:+.4f}" for figure in figures)]
    intervals = [
        "95% interval",
        *("{:+.4f} to {:+.4f}".format(*figure["interval"]) for figure in figures),
    ]
    show_table([["", "accuracy", "macro-F1"], *lines, differences, intervals])
    print(
        f"{found['rows']:,} rows: only A is right on {found['wins']:,}, only B on "
        f"{found['losses']:,}. McNemar's exact p is {found['mcnemar_p']:.4g}"
    )


if __name__ == "__main__":
    entry_point(main)
