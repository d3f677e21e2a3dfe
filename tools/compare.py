"""Compares runs: their options, data, curves and metrics, and whether one is better than another or
only luckier.

python -m tools.compare runs/a runs/b ... [--plot FILE.png] [--json FILE]
python -m tools.compare runs/a/validation.jsonl runs/b/validation.jsonl

Two files of predictions get a paired test alone. Nothing is written into the runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from base.cli import entry_point, parse
from base.files import writable_file, write_json
from config import PathOrName, Positional, Seed, UserError, Weight
from tasks.classification.confusion import paired_test
from tools.comparison import compare_runs
from tools.predictions import check_out, read_predictions, show_table
from tools.runs import RunFolder, read_run, run_names


@dataclass(frozen=True)
class CompareConfig:
    """Compare runs, finished or not, or the predictions of runs for the same rows."""

    files: Annotated[tuple[PathOrName, ...], Positional("A B")] = ()
    """Two or more folders of runs, or files of predictions for rows with known labels: a run's
    validation.jsonl, or its predictions.jsonl where the labels are known."""
    seed: Seed = 1337
    """Seed of the resamples for the confidence intervals."""
    json: PathOrName | None = None
    """Also write the figures to this file."""
    plot: PathOrName | None = None
    """Also draw the runs' losses over steps, tokens and time, as a PNG file."""
    loss: Weight | None = None
    """The loss to which time and tokens are given. Default: the worst of the final losses, which
    every run has reached."""


def main() -> None:
    """Run the command."""
    cfg = parse(CompareConfig, sys.argv[1:])
    paths = [Path(file) for file in cfg.files]
    if len(paths) < 2:
        raise UserError(
            f"{len(paths)} runs are named, not 2 or more; type python -m tools.compare runs/A "
            "runs/B, or A.jsonl B.jsonl"
        )
    out = check_out(cfg.json, cfg.files, "--json") if cfg.json else None
    plot = picture(cfg.plot) if cfg.plot else None
    for path in (out, plot):
        if path and any(path.resolve().is_relative_to(p.resolve()) for p in paths if p.is_dir()):
            raise UserError(f"{path} is in the folder of a run; name a file elsewhere")
    if len(paths) == 2 and not any(path.is_dir() for path in paths):
        if plot:
            raise UserError("--plot draws the logs of runs; name folders of runs, not predictions")
        compare_predictions(cfg, out)
    else:
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError("a run is named twice; name each once")
        runs = [
            read_run(path, name) if path.is_dir() else RunFolder(name, path, predictions=path)
            for path, name in zip(paths, run_names(paths))
        ]
        compare_runs(runs, out, plot, cfg.loss, cfg.seed)


def picture(where: str) -> Path:
    """The PNG file to draw. Raises UserError if it cannot be written or has another ending."""
    if Path(where).suffix.lower() != ".png":
        raise UserError(f"--plot {where} must end in .png; the picture is a PNG")
    return writable_file("--plot", where)


def compare_predictions(cfg: CompareConfig, out: Path | None) -> None:
    """Test the predictions of two runs. Raises UserError if no row has a known label."""
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
