"""Draws the losses of runs over steps, tokens and time, in one picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.charts import COLOURS, GREY, LINES, Series, chart, draw_accuracies, limits, short_numbers
from tools.runs import Point, RunFolder, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
DOTS: Any = {"markeredgecolor": "white", "markersize": 6}
MOST_POINTS = 2000  # of a line: a picture does not show more


def draw_curves(groups: Sequence[tuple[str, Sequence[RunFolder]]], out: Path) -> None:
    """Draw the curves of groups of runs, each with its label in the legend, as a PNG. Training
    losses are lines, smoothed, and validation losses are dots. A second row has the
    accuracies on benchmarks, if a run has scored them."""
    runs = [run for _, group in groups for run in group]
    longest = max(points[-1].seconds for run in runs if (points := run.train or run.val))
    unit, unit_name = next(unit for unit in UNITS if longest >= unit[0] or unit[0] == 1.0)
    axis = {"steps": ("step", 1.0), "tokens": ("tokens", 1.0), unit_name: ("seconds", unit)}
    rows = 2 if any(run.accuracies for run in runs) else 1
    with chart(out, 12, 4.6 + 2.8 * (rows - 1), {"font.size": 11}, w_pad=0.1, h_pad=0.08) as figure:
        grid = figure.subplots(rows, 3, sharey="row", squeeze=False)
        panels = grid[0]
        for column, (name, (spent, scale)) in zip(grid.T, axis.items()):
            _panel(column[0], groups, spent, scale)
            for axes in column[1:]:
                _accuracies(axes, groups, spent, scale)
            column[-1].set_xlabel(f"{unit_name} of training" if spent == "seconds" else name)
        panels[0].set_title("Loss")
        for axes in grid[1:, 0]:
            axes.set_title("Accuracy on benchmarks")
            axes.legend(fontsize=9)
        lines = [smoothed(run.train) for run in runs] + [run.val[1:] for run in runs]
        if between := limits([_series(points, "step", 1.0) for points in lines if points]):
            panels[0].set_ylim(*between)
        if any(run.val for run in runs):
            panels[-1].plot([], [], "o", color=GREY, label="validation", **DOTS)
        handles, labels = panels[-1].get_legend_handles_labels()
        columns = 4 if len(labels) > 3 else len(labels)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=10)


def _panel(
    axes: Axes, groups: Sequence[tuple[str, Sequence[RunFolder]]], spent: str, scale: float
) -> None:
    for number, (label, group) in enumerate(groups):
        turn, colour = divmod(number, len(COLOURS))
        look: Any = {"color": COLOURS[colour], "linestyle": LINES[turn % len(LINES)]}
        for run in group:
            line = _series(smoothed(run.train), spent, scale)
            shown = zip(*line[:: 1 + len(line) // MOST_POINTS])
            axes.plot(*shown, linewidth=1.6, **look)
            if run.val:
                dots = zip(*_series(run.val, spent, scale))
                axes.plot(*dots, "o", color=COLOURS[colour], **DOTS)
        axes.plot([], [], linewidth=2.0, label=label, **look)
    _finish(axes)


def _accuracies(
    axes: Axes, groups: Sequence[tuple[str, Sequence[RunFolder]]], spent: str, scale: float
) -> None:
    """The accuracies of all runs, in the colours of their losses."""
    drawn = [
        (colour, {name: _series(points, spent, scale) for name, points in run.accuracies.items()})
        for colour, (_, group) in zip(itertools.cycle(COLOURS), groups)
        for run in group
    ]
    draw_accuracies(axes, drawn)
    _finish(axes)


def _finish(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    short_numbers(axes.xaxis)
    short_numbers(axes.yaxis)


def _series(points: Sequence[Point], spent: str, scale: float) -> Series:
    return [(getattr(point, spent) / scale, point.loss) for point in points]
