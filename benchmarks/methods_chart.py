"""The chart of benchmarks.methods: a row per method with its quality and cost, most trained
parameters first, then the decodings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from base.charts import COLOURS, GREY, chart, short_number, short_numbers
from benchmarks.methods_report import label, number
from benchmarks.plot import ROWS, write
from benchmarks.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST = "lowest perplexity"  # over all epochs, not at the chosen one
# A second metric beside the one that ranks: its key, its name, and which way is better.
SECOND = {
    "generation": (LOWEST, "perplexity", "min"),
    "classification": ("macro_f1", "macro-F1", "max"),
}
HEAD = 1.15  # inches for the title and the legend
FAMILIES = {  # beginning of a method's name to its colour and what it trains
    "scratch": (COLOURS[6], "from scratch"),
    "full": (COLOURS[0], "everything"),
    "ulmfit": (COLOURS[0], "everything"),
    "last": (COLOURS[5], "part of the model"),
    "lstm-gpt2": (COLOURS[5], "part of the model"),
    "lora": (COLOURS[2], "LoRA, DoRA"),
    "dora": (COLOURS[2], "LoRA, DoRA"),
    "prefix": (COLOURS[3], "prefix, soft prompt"),
    "soft": (COLOURS[3], "prefix, soft prompt"),
}
OTHER = (COLOURS[1], "without GPT-2")


class Line(NamedTuple):
    """One value to draw: its mean and spread over seeds. The mean is None if there is no value."""

    name: str
    colour: str
    mean: float | None = None
    spread: float = 0.0


def family(name: str) -> tuple[str, str]:
    """The colour and the name of what a method trains."""
    return next((found for begin, found in FAMILIES.items() if name.startswith(begin)), OTHER)


def line(row: Row, figure: Mapping[str, float | None] | None) -> Line:
    """A figure of a row as a Line in the colour of its family."""
    colour = family(row["name"])[0]
    if figure is None or figure["mean"] is None:
        return Line(row["name"], colour)
    return Line(row["name"], colour, figure["mean"], figure["spread"] or 0.0)


def quality(row: Row, metric: str) -> Line:
    """A metric of a row. The lowest perplexity is computed from the lowest validation loss."""
    if metric != LOWEST:
        return line(row, row["metrics"].get(metric))
    found = line(row, row.get("lowest_val_loss"))
    if found.mean is None:
        return found
    perplexity = math.exp(found.mean)
    return found._replace(mean=perplexity, spread=perplexity * found.spread)


def draw(result: Row, out: Path) -> None:
    """Write the chart. Without methods there is no file."""
    metric = result["best"][0]
    methods = sorted(result["methods"], key=lambda row: -row["trained_parameters"]["mean"])
    decodings = [row for row in result["decodings"] if metric in row["metrics"]]
    if not methods:
        return
    heights = [0.9 + 0.34 * len(methods)] + [0.9 + 0.34 * len(decodings)] * bool(decodings)
    second = any(quality(row, SECOND[result["family"]][0]).mean is not None for row in methods)
    columns = ["best", *["second"] * second, "parameters", "seconds"]
    mosaic: list[Any] = [columns, ["decoding", "decoding", *["took"] * (len(columns) - 2)]][
        : len(heights)
    ]
    width, height = 3.5 * len(columns), sum(heights) + HEAD
    below = (0, 0, 1, 1 - HEAD / height)
    with chart(out, width, height, ROWS, w_pad=0.1, h_pad=0.12, rect=below) as figure:
        axes: Any = figure.subplot_mosaic(mosaic, height_ratios=heights)
        draw_methods(axes, methods, result["best"], SECOND[result["family"]])
        if decodings:
            draw_decodings(axes, decodings, result["best"])
        for name in axes.keys() - {"best", "decoding"}:
            axes[name].set_yticklabels([])
        draw_head(figure, result)


def draw_methods(
    axes: Mapping[str, Axes], rows: Sequence[Row], best: Sequence[str], second: tuple[str, str, str]
) -> None:
    """Draw the panels of the methods: metrics, trained parameters and seconds."""
    metric, way = best
    draw_points(
        axes["best"], f"{label(metric)} {better(way)}", [quality(row, metric) for row in rows]
    )
    if "second" in axes:
        metric, name, way = second
        draw_points(axes["second"], f"{name} {better(way)}", [quality(row, metric) for row in rows])
    parameters = [line(row, row["trained_parameters"]) for row in rows]
    draw_bars(axes["parameters"], "parameters trained", parameters, log=True)
    draw_bars(axes["seconds"], "training, s", [line(row, row["seconds"]) for row in rows])


def draw_decodings(axes: Mapping[str, Axes], rows: Sequence[Row], best: Sequence[str]) -> None:
    """Draw the panels of the decodings: metric and seconds."""
    metric, way = best
    points = [coloured(quality(row, metric)) for row in rows]
    draw_points(axes["decoding"], f"{label(metric)} {better(way)} by decoding", points)
    draw_bars(
        axes["took"],
        "all answers, s",
        [coloured(line(row, row["metrics"]["seconds"])) for row in rows],
    )


def better(way: str) -> str:
    """Which way is better, for a panel's title."""
    return "(more is better)" if way == "max" else "(less is better)"


def coloured(found: Line) -> Line:
    """A decoding in the colour of the method whose weights it uses."""
    return found._replace(colour=family(found.name.partition("-of-")[2] or "full")[0])


def draw_points(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    """Draw a point per row with its spread. The axis need not start at zero, so that small
    differences show. A dashed line marks the value of `full`."""
    for found in lines:
        if found.name == "full" and found.mean is not None:
            axes.axvline(
                found.mean,
                color=found.colour,
                alpha=0.5,
                linewidth=1,
                linestyle=(0, (4, 4)),
                zorder=1,
            )
    for y, (name, colour, mean, spread) in enumerate(lines):
        if mean is None:
            continue
        axes.plot([mean - spread, mean + spread], [y, y], color=colour, linewidth=2.2, zorder=2)
        hollow = name == "scratch"
        axes.plot(
            mean,
            y,
            "o",
            color="white" if hollow else colour,
            markeredgecolor=colour,
            markeredgewidth=1.8,
            markersize=9,
            zorder=3,
        )
        text = f"{mean:#.3g}".rstrip(".") if abs(mean) < 1000 else number(mean)
        write(axes, text, (mean + spread, y), (8, 0), fontsize=9.5)
    finish(axes, title, lines, log=False)


def draw_bars(axes: Axes, title: str, lines: Sequence[Line], log: bool = False) -> None:
    """Draw a bar per row with its value."""
    for y, (_, colour, mean, _) in enumerate(lines):
        if mean is not None:
            axes.barh(y, mean, height=0.6, color=colour, zorder=2)
            write(axes, short_number(mean), (mean, y), (8, 0), fontsize=9.5)
    finish(axes, title, lines, log)


def finish(axes: Axes, title: str, lines: Sequence[Line], log: bool) -> None:
    """Set the scale, the rows' names and the title of a panel."""
    if log:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.margins(x=0.2)
    axes.set_yticks(range(len(lines)), [found.name for found in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    short_numbers(axes.xaxis)
    axes.set_title(title, fontsize=11.5)


def draw_head(figure: Figure, result: Row) -> None:
    """Draw the title, the line below it, and the legend of colours."""
    from matplotlib.lines import Line2D

    left, inch = 0.012, 1 / figure.get_figheight()
    title = f"{result['task']}: what each way of fine-tuning gives, and what it costs"
    figure.text(left, 1 - 0.3 * inch, title, fontsize=16, fontweight="bold", va="center")
    figure.text(left, 1 - 0.62 * inch, below_title(result), color=GREY, fontsize=10.5, va="center")
    families = dict.fromkeys(family(row["name"]) for row in result["methods"])
    dot: dict[str, Any] = dict(marker="o", linestyle="", markersize=8)
    handles = [
        Line2D(
            [],
            [],
            markeredgecolor=colour,
            color="white" if name == "from scratch" else colour,
            **dot,
        )
        for colour, name in families
    ]
    figure.legend(
        handles,
        [name for _, name in families],
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.76 * inch),
        ncols=6,
        fontsize=10.5,
        handletextpad=0.1,
        columnspacing=1.2,
    )


def below_title(result: Row) -> str:
    """The line below the title: base, machine and date."""
    base, machine = result["base"], result["machine"]
    name = Path(base["folder"]).parent.name if "results" in base else base["init"]
    seen = (
        f" trained on {short_number(base['results']['tokens'])} tokens" if "results" in base else ""
    )
    where = machine["hardware"]["gpu" if machine["device"] == "cuda" else "cpu"]
    size = short_number(base["parameters"])
    return (
        f"base: {name}, {size} parameters{seen}; {where}; {result['date'][:10]}; lines: spread "
        "over seeds"
    )
