"""Charts with one row for each thing that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from base.charts import DARK, GREY, short_number, short_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = {"font.size": 11.5, "axes.spines.left": False}  # the style of such a chart


@dataclass(frozen=True)
class Bar:
    """A row of a panel: a value with its spread, or the reason why there is none."""

    name: str
    value: float | None
    least: float = 0.0
    most: float = 0.0
    text: str = ""  # default: the value
    colour: str = GREY
    hollow: bool = False
    bold: bool = False


def draw_bars(axes: Axes, title: str, bars: Sequence[Bar], point: bool = False) -> None:
    """Draw a panel. The axis of points need not start at zero, so that small differences show."""
    for y, bar in enumerate(bars):
        if bar.value is None:
            write(axes, bar.text, (0, y), style="italic", color=bar.colour)
            continue
        if point:
            axes.plot(bar.value, y, "o", color=bar.colour, markersize=9)
        else:
            face, hatch = ("white", "////") if bar.hollow else (bar.colour, None)
            axes.barh(y, bar.value, 0.62, facecolor=face, edgecolor=bar.colour, hatch=hatch)
        line = bar.colour if point else DARK
        axes.plot([bar.least, bar.most], [y, y], color=line, linewidth=1.5)
        weight = "bold" if bar.bold else "normal"
        write(axes, bar.text or short_number(bar.value), (bar.most, y), weight=weight)
    axes.margins(x=0.2)
    short_numbers(axes.xaxis)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_title(title, fontsize=11.5)


def write(axes: Axes, text: str, at: tuple[float, float], **look: Any) -> None:
    """Write text to the right of a position. A white background keeps lines from crossing it."""
    white = dict(facecolor="white", edgecolor="none", pad=0.8)
    axes.annotate(
        text, at, (8, 0), textcoords="offset points", va="center", bbox=white, fontsize=9.5, **look
    )


def add_head(figure: Figure, title: str, note: str, handles: list[Any]) -> None:
    """Write the title above a chart, and below it the legend and a note in small letters."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=16, fontweight="bold")
    look: dict[str, Any] = dict(ncols=6, fontsize=10.5, title_fontsize=9.5, alignment="left")
    legend = figure.legend(handles=handles, loc="outside lower left", title=note, **look)
    legend.get_title().set_color(GREY)
