"""The style that all charts share, and the one way to save them.

matplotlib is imported only in functions that draw, because most commands draw nothing.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, without their yellow, which is
# hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
DARK, GREY, PALE = "#222222", "#6a6a6a", "#b0b0b0"
STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "savefig.dpi": 130,
}
PALETTE = 256  # colours in a PNG: with a palette the file has half as many bytes
LINES = ("-", "--", ":", "-.")  # the next kind of line when the colours are used up
# Benchmarks' accuracies in a run's log that are drawn: name, marker, and accuracy by chance.
ACCURACIES = {"hellaswag_acc_norm": ("o", 0.25), "lambada_accuracy": ("s", 0.0)}


Series = list[tuple[float, float]]


@contextlib.contextmanager
def chart(
    out: Path, width: float, height: float, look: Mapping[str, Any] | None = None, **layout: Any
) -> Generator[Figure]:
    """Yields a figure of `width` x `height` inches, and saves it as a PNG at the end."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which looks for a window system
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    style: Any = STYLE | dict(look or {})  # rc_context's type hint demands every key
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(**layout))
        yield figure
        save(figure, out)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with a palette."""
    from PIL import Image  # matplotlib depends on it

    whole = io.BytesIO()
    figure.savefig(whole, format="png")
    image = Image.open(whole).convert("RGB")
    image.quantize(PALETTE, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def short_numbers(axis: Axis) -> None:
    """Label an axis with short numbers such as 1.5M, with as many digits as tell them apart."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _: int | None) -> str:
        ticks = {float(tick) for tick in axis.get_majorticklocs()}
        apart = (n for n in range(3, 9) if len({short_number(x, n) for x in ticks}) == len(ticks))
        return short_number(value, next(apart, 9))

    axis.set_major_formatter(FuncFormatter(label))


def short_number(value: float, digits: int = 3) -> str:
    """The number as text: 1500000 as 1.5M. Empty if it is not finite."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}" if math.isfinite(value) else ""


def smooth(series: Series) -> Series:
    """The centred running median over a fortieth of the points, at least five, and then the running
    mean over as many. The median takes out spikes, and the mean the steps of the median."""
    import numpy as np

    if len(series) < 5:
        return series
    half = max(2, len(series) // 80)
    y = np.array([y for _, y in series])
    for average in (np.median, np.mean):
        padded = np.pad(y, half, mode="reflect")
        y = average(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
    return [(x, float(m)) for (x, _), m in zip(series, y, strict=True)]


def limits(all_series: Sequence[Series], from_zero: bool = False) -> tuple[float, float] | None:
    """The limits of the y axis. They ignore the first twentieth of each series and rare spikes."""
    import numpy as np

    settled = [y for series in all_series for _, y in series[len(series) // 20 :]]
    if not settled:
        return None
    low, high = np.percentile(settled, [0.5, 99.5])
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (0.0 if from_zero else low - margin), high + margin


def draw_accuracies(axes: Axes, runs: Sequence[tuple[str, Mapping[str, Series]]]) -> None:
    """Draw the accuracies of runs: (colour, series by a name in ACCURACIES). Each benchmark has a
    kind of line of its own, and a thin line where chance is."""
    names = [name for name in ACCURACIES if any(name in found for _, found in runs)]
    for name, line in zip(names, LINES):
        marker, chance = ACCURACIES[name]
        look: Any = {"linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.8}
        for colour, found in runs:
            if name in found:
                axes.plot(*zip(*found[name]), color=colour, **look)
        axes.plot([], [], color=GREY, label=name, **look)
        if chance:
            axes.axhline(chance, color=PALE, linewidth=1.0, zorder=1)
