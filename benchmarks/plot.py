"""Plot runs:

python -m benchmarks.plot runs/A [runs/B ...] [--out FILE.png]

Draws loss, tokens per second and gradient norm from each run's log.jsonl, and the accuracy on
HellaSwag and LAMBADA if a run has scored them. A run need not have ended. Thin lines are the logged
steps. Thick lines are running medians over a fortieth of the run.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from base.charts import (
    ACCURACIES,
    COLOURS,
    DARK,
    GREY,
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
    from matplotlib.figure import Figure

# Style of a chart with one row for each thing that is compared.
ROWS = {"font.size": 11.5, "axes.spines.left": False}


@dataclass(frozen=True)
class Options:
    """Options of the picture."""

    runs: Annotated[tuple[PathOrName, ...], Positional("RUN ...")] = ()
    """Folders of runs, each with a log.jsonl."""
    out: PathOrName = "runs.png"
    """The PNG to write."""
    x: Literal["tokens", "steps"] = "tokens"
    """The quantity on the x axis."""


@dataclass
class Curves:
    """The curves of one run. x is tokens or steps."""

    name: str
    loss: Series
    val_loss: Series
    speed: Series
    grad_norm: Series
    accuracies: dict[str, Series]  # of benchmarks, by the name in the log


def curves(folder: Path, x: str, name: str) -> Curves:
    """The curves of a run's log. Raises UserError if no step has been logged yet."""
    log = records(folder)
    steps = [
        r for r in log if r["kind"] == "train" and r.get("step") and finite_values([r], "tokens")
    ]
    if not steps:
        raise UserError(f"{folder}/log.jsonl has no training step yet")
    at = {r["step"]: r["tokens" if x == "tokens" else "step"] for r in steps} | {0: 0}
    evals = [r for r in log if r.get("kind") == "eval"]

    def series(rows: list[dict[str, Any]], key: str) -> Series:
        # values that are not finite are null in the log and are left out
        return [
            (at[r["step"]], r[key]) for r in rows if finite_values([r], key) and r.get("step") in at
        ]

    return Curves(
        name, series(steps, "loss"), series(evals, "val_loss"), series(steps, "tokens_per_second"),
        series(steps, "grad_norm"),
        {name: found for name in ACCURACIES if (found := series(evals, name))},
    )  # fmt: skip


def write(
    axes: Axes, text: str, at: tuple[float, float], points: tuple[float, float], **look: Any
) -> None:
    """Write text at an offset in points from a position. A white background keeps lines from
    crossing it."""
    white = dict(facecolor="white", edgecolor="none", pad=0.8)
    usual: dict[str, Any] = dict(
        textcoords="offset points", va="center", color=DARK, zorder=5, bbox=white
    )
    usual |= look
    axes.annotate(text, at, points, **usual)


def add_head(figure: Figure, title: str, note: str, handles: list[Any]) -> None:
    """Write the title above a chart of rows, and below it the legend and a note in small letters."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    look: dict[str, Any] = dict(ncols=6, fontsize=10.5, title_fontsize=9.5, alignment="left")
    legend = figure.legend(handles=handles, loc="outside lower left", title=note, **look)
    legend.get_title().set_color(GREY)


def draw(runs: Sequence[Curves], x: str, out: Path) -> None:
    """Draw the panels and save the chart."""
    scored = any(run.accuracies for run in runs)
    layout: list[list[Any]] = [["loss", "speed"], ["accuracy" if scored else "loss", "norm"]]
    with chart(out, 12, 7.4 if scored else 6.2, w_pad=0.15, h_pad=0.15) as figure:
        panels = figure.subplot_mosaic(layout, width_ratios=[1.55, 1])
        draw_loss(panels["loss"], runs)
        if scored:
            panels["accuracy"].set_title("Accuracy on benchmarks")
            coloured = zip(itertools.cycle(COLOURS), runs)
            draw_accuracies(panels["accuracy"], [(c, run.accuracies) for c, run in coloured])
            panels["accuracy"].legend(loc="best", fontsize=11)
        draw_panel(
            panels["speed"], "Tokens per second", [run.speed for run in runs], from_zero=True
        )
        draw_panel(panels["norm"], "Gradient norm", [run.grad_norm for run in runs])
        for axes in panels.values():
            finish(axes, x)


def draw_loss(axes: Axes, runs: Sequence[Curves]) -> None:
    """Draw training losses as lines and validation losses as dots."""
    axes.set_title("Loss (nats per token)")
    for i, run in enumerate(runs):
        draw_line(axes, run.loss, COLOURS[i % len(COLOURS)], run.name)
        if run.val_loss:
            axes.plot(
                *zip(*run.val_loss),
                "o",
                color=COLOURS[i % len(COLOURS)],
                markeredgecolor="white",
                markersize=8,
                zorder=4,
            )
    if any(run.val_loss for run in runs):
        axes.plot(
            [], [], "o", color="#666666", markeredgecolor="white", markersize=8, label="validation"
        )
    between = limits([run.loss for run in runs] + [run.val_loss[1:] for run in runs])
    if between:
        axes.set_ylim(*between)
    axes.legend(loc="upper right", fontsize=12)


def draw_panel(
    axes: Axes, title: str, all_series: Sequence[Series], from_zero: bool = False
) -> None:
    """Draw one series per run."""
    axes.set_title(title)
    for i, series in enumerate(all_series):
        draw_line(axes, series, COLOURS[i % len(COLOURS)])
    between = limits(all_series, from_zero)
    if between:
        axes.set_ylim(*between)


def draw_line(axes: Axes, series: Series, colour: str, name: str | None = None) -> None:
    """Draw the logged values thin and pale, and the smoothed ones thick. `name` is for the
    legend."""
    if series:
        axes.plot(*zip(*series), color=colour, alpha=0.28, linewidth=0.9, zorder=2)
        axes.plot(*zip(*smooth(series)), color=colour, linewidth=2.0, label=name, zorder=3)


def finish(axes: Axes, x: str) -> None:
    """Set the x axis and short numbers on both axes."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(left=0)
    axes.set_xlabel(x)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    short_numbers(axes.xaxis)
    short_numbers(axes.yaxis)


def main() -> None:
    """Draw the runs. Raises UserError for a missing log or a file that cannot be written."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if not options.runs:
        raise UserError("no run is named; type python -m benchmarks.plot runs/A [runs/B ...]")
    folders, out = [Path(run) for run in options.runs], Path(options.out)
    runs = [
        curves(folder, options.x, name)
        for folder, name in zip(folders, run_names(folders), strict=True)
    ]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draw(runs, options.x, out)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    entry_point(main)
