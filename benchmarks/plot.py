"""Plot runs:

python -m benchmarks.plot runs/A [runs/B ...] [--out FILE.png]

Draws loss, tokens per second and gradient norm from each run's log.jsonl, and the accuracy on
HellaSwag and LAMBADA if a run has scored them. A run need not have ended. Thin lines are the logged
steps. Thick lines are running medians over a fortieth of the run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from base.charts import (
    ACCURACIES,
    COLOURS,
    Series,
    chart,
    draw_accuracies,
    limits,
    short_numbers,
    smooth,
)
from base.cli import entry_point, parse
from base.console import outlive
from config import PathOrName, Positional, UserError
from engine.log import finite_values, records
from tools.runs import run_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The curves of a run by their name in the log. Those of benchmarks may be empty.
Curves = Mapping[str, Series]
VALIDATION: dict[str, Any] = dict(
    marker="o", linestyle="", markeredgecolor="white", markersize=8, zorder=4
)


@dataclass(frozen=True)
class Options:
    """Options of the picture."""

    runs: Annotated[tuple[PathOrName, ...], Positional("RUN ...")] = ()
    """Folders of runs, each with a log.jsonl."""
    out: PathOrName = "runs.png"
    """The PNG to write."""
    x: Literal["tokens", "steps"] = "tokens"
    """The quantity on the x axis."""


def curves(folder: Path, x: str) -> Curves:
    """The curves of a run's log over tokens or steps. Raises UserError if no step has been logged
    yet."""
    log = records(folder)
    steps = [
        r for r in log if r["kind"] == "train" and r.get("step") and finite_values([r], "tokens")
    ]
    if not steps:
        raise UserError(f"{folder}/log.jsonl has no training step yet")
    at = {r["step"]: r["tokens" if x == "tokens" else "step"] for r in steps} | {0: 0}
    evals = [r for r in log if r["kind"] == "eval" and r.get("step") in at]

    def series(rows: list[dict[str, Any]], key: str) -> Series:
        # values that are not finite are null in the log and are left out
        return [(at[r["step"]], r[key]) for r in rows if finite_values([r], key)]

    found = {key: series(steps, key) for key in ("loss", "tokens_per_second", "grad_norm")}
    return found | {key: series(evals, key) for key in ("val_loss", *ACCURACIES)}


def draw(runs: Mapping[str, Curves], x: str, out: Path) -> None:
    """Draw the panels of runs, by name, and save the chart."""
    from matplotlib.ticker import MaxNLocator

    scores = [{name: run[name] for name in ACCURACIES if run[name]} for run in runs.values()]
    layout: Any = [["loss", "speed"], ["accuracy" if any(scores) else "loss", "norm"]]
    with chart(out, 12, 7.4 if any(scores) else 6.2, w_pad=0.15, h_pad=0.15) as figure:
        panels = figure.subplot_mosaic(layout, width_ratios=[1.55, 1])
        draw_panel(panels["loss"], "Loss (nats per token)", runs, "loss")
        draw_panel(panels["speed"], "Tokens per second", runs, "tokens_per_second")
        panels["speed"].set_ylim(limits([run["tokens_per_second"] for run in runs.values()], True))
        draw_panel(panels["norm"], "Gradient norm", runs, "grad_norm")
        draw_validation(panels["loss"], list(runs.values()))
        if any(scores):
            panels["accuracy"].set_title("Accuracy on benchmarks")
            draw_accuracies(panels["accuracy"], list(zip(itertools.cycle(COLOURS), scores)))
            panels["accuracy"].legend(loc="best", fontsize=11)
        for axes in panels.values():
            axes.set_xlim(left=0)
            axes.set_xlabel(x)
            axes.xaxis.set_major_locator(MaxNLocator(6))
            short_numbers(axes.xaxis)
            short_numbers(axes.yaxis)


def draw_panel(axes: Axes, title: str, runs: Mapping[str, Curves], curve: str) -> None:
    """Draw a curve of each run: the logged values thin and pale, the smoothed ones thick."""
    axes.set_title(title)
    for colour, (name, run) in zip(itertools.cycle(COLOURS), runs.items()):
        axes.plot(*zip(*run[curve]), color=colour, alpha=0.28, linewidth=0.9, zorder=2)
        axes.plot(*zip(*smooth(run[curve])), color=colour, linewidth=2.0, label=name, zorder=3)
    axes.set_ylim(limits([run[curve] for run in runs.values()]))


def draw_validation(axes: Axes, runs: Sequence[Curves]) -> None:
    """Add the validation losses, as dots, and the legend to the panel of losses."""
    for colour, run in zip(itertools.cycle(COLOURS), runs):
        axes.plot(*zip(*run["val_loss"]), color=colour, **VALIDATION)
    if any(run["val_loss"] for run in runs):
        axes.plot([], [], color="#666666", label="validation", **VALIDATION)
    axes.set_ylim(limits([run["loss"] for run in runs] + [run["val_loss"][1:] for run in runs]))
    axes.legend(loc="upper right", fontsize=12)


def main() -> None:
    """Draw the runs. Raises UserError for a missing log or a file that cannot be written."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if not options.runs:
        raise UserError("no run is named; type python -m benchmarks.plot runs/A [runs/B ...]")
    folders, out = [Path(run) for run in options.runs], Path(options.out)
    names = run_names(folders)
    runs = {name: curves(folder, options.x) for name, folder in zip(names, folders)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, options.x, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    entry_point(main)
