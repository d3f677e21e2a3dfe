"""Two charts of a classification report: the confusion matrix and the reliability diagram.

They need matplotlib. Without it the charts are left out, and nothing else changes.
"""

from __future__ import annotations

import importlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Report = Mapping[str, Any]  # from confusion.report

# Okabe and Ito's colours, which colour-blind readers can distinguish, and a tint
BLUE, ORANGE, LIGHT = ("#0072B2", "#D55E00", "#a6cbe3")
DARK, GREY, PALE = "#222222", "#6a6a6a", "#b0b0b0"
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE = {
    "font.size": 11,
    "text.parse_math": False,  # a $ in a label is a dollar sign
    "axes.edgecolor": "#999999",
    "axes.labelcolor": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",  # the image grows with the labels around its axes
    "savefig.pad_inches": 0.2,
}
LONGEST = 24  # characters to which a label is shortened
FEW = 12  # up to this many labels, cells with 0 show their number too
SMALLEST = 5.0  # points; counts that would be smaller are left out
NUMBERED = "numbers from 0, because no font of this machine has the labels' letters"


def draw(report: Report, folder: Path, title: str, before: str = "") -> list[Path]:
    """Write confusion.png and reliability.png into the folder, with the prefix `before`. Returns
    their paths, or [] without matplotlib."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        return []
    paths = [folder / f"{before}confusion.png", folder / f"{before}reliability.png"]
    draw_confusion(report, paths[0], title)
    draw_reliability(report, paths[1], title)
    return paths


# --- the confusion matrix


def draw_confusion(report: Report, path: Path, title: str) -> None:
    """Draw the confusion matrix. Rows are true labels and columns are predicted labels. The colour
    is the fraction of the true label's rows."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which looks for a window system

    counts, names = report["confusion"], [shortened(label) for label in report["labels"]]
    side = max(3.4, min(0.8 * len(names), 3.4 + 0.2 * len(names)))  # inches
    fonts, glyphs = fonts_for(names)
    style: Any = STYLE | {"font.family": fonts}  # matplotlib types it as a Literal of all keys
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(side, side))
        axes = figure.add_axes((0, 0, 1, 1))
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        write_counts(axes, counts, shares, side)
        name_labels(axes, names, glyphs, side)
        draw_scale(figure, image, side)
        write_title(axes, title, below_title(report))
        figure.savefig(path, format="png")


def draw_scale(figure: Figure, image: AxesImage, side: float) -> None:
    """Draw the colour scale, at the right of the matrix."""
    scale = figure.colorbar(image, cax=figure.add_axes((1 + 0.15 / side, 0, 0.13 / side, 1)))
    scale.set_label("share of the true label's rows", color=GREY)
    scale.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    scale.ax.tick_params(length=0, labelcolor=GREY)
    scale.outline.set_visible(False)


def write_counts(
    axes: Axes, counts: Sequence[Sequence[int]], shares: Sequence[Sequence[float]], side: float
) -> None:
    """Write each count into its cell, as large as the cell and the longest count allow."""
    cell = 72 * side / len(counts)  # points
    digits = len(str(max(max(row) for row in counts)))
    size = min(15.0, 0.45 * cell, 0.85 * cell / (0.65 * digits))
    if size < SMALLEST:
        return
    for y, row in enumerate(counts):
        for x, count in enumerate(row):
            if count or len(counts) <= FEW:
                colour = "white" if shares[y][x] > 0.5 else DARK if count else PALE
                axes.text(x, y, str(count), ha="center", va="center", fontsize=size, color=colour)


def name_labels(axes: Axes, names: Sequence[str], glyphs: set[int], side: float) -> None:
    """Write the labels along both axes, horizontally below if they fit. Labels that no font can
    write become numbers."""
    written = [name if known(name, glyphs) else f"#{number}" for number, name in enumerate(names)]
    cell = 72 * side / len(names)
    size = max(7.0, min(11.0, 0.6 * cell))
    fits = max(map(width, written)) * size < cell
    places = range(len(names))
    axes.set_xticks(places, written, fontsize=size, rotation=0 if fits else 90)
    axes.set_yticks(places, written, fontsize=size)
    axes.tick_params(length=0, pad=5)
    axes.set_xticks([at - 0.5 for at in places[1:]], minor=True)
    axes.set_yticks([at - 0.5 for at in places[1:]], minor=True)
    axes.grid(which="minor", color="white", linewidth=min(2.0, cell / 20))
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        "predicted" if written == list(names) else f"predicted ({NUMBERED})", labelpad=8
    )
    axes.set_ylabel("true", labelpad=8)


def below_title(report: Report) -> str:
    """The lines under the title of the confusion matrix."""
    figures = [
        with_interval(report, "accuracy", "accuracy"),
        with_interval(report, "macro_f1", "macro-F1"),
    ]
    return "\n".join([*figures, f"{report['rows']:,} rows; brackets: 95 %"])


def with_interval(report: Report, name: str, label: str) -> str:
    """A metric with its 95 % interval in brackets."""
    low, high = report["intervals"][name]
    return f"{label} {report[name]:.3f} [{low:.3f}, {high:.3f}]"


# --- the reliability diagram


def draw_reliability(report: Report, path: Path, title: str) -> None:
    """Draw the accuracy and the number of rows for each bin of confidence."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = STYLE | {"font.family": FONT}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 6.6))
        accuracy = figure.add_axes((0, 0.27, 1, 0.73))
        rows = figure.add_axes((0, 0, 1, 0.22), sharex=accuracy)
        draw_bins(accuracy, report["reliability"])
        draw_rows(rows, report["reliability"])
        for axes in (accuracy, rows):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0, pad=6)
            axes.set_axisbelow(True)
            axes.grid(color="#e6e6e6")
        accuracy.tick_params(labelbottom=False)
        confidence = sum(one["rows"] * one["confidence"] for one in report["reliability"]) / max(
            1, report["rows"]
        )
        below = (
            f"accuracy {report['accuracy']:.3f}, mean confidence {confidence:.3f}, "
            f"{report['rows']:,} rows"
        )
        name = f"{title}: calibration error {report['calibration_error']:.3f}"
        write_title(accuracy, name, below)
        figure.savefig(path, format="png")


def draw_bins(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    """Draw a bar of accuracy for each bin, and the gap to the bin's mean confidence in a colour for
    its direction."""
    over = [max(0.0, one["confidence"] - one["accuracy"]) for one in bins]
    under = [max(0.0, one["accuracy"] - one["confidence"]) for one in bins]
    draw_bars(axes, bins, [one["accuracy"] for one in bins], color=LIGHT, label="accuracy")
    draw_bars(
        axes,
        bins,
        over,
        bottom=[one["accuracy"] for one in bins],
        color=ORANGE,
        label="too confident by",
    )
    draw_bars(
        axes,
        bins,
        under,
        bottom=[one["confidence"] for one in bins],
        color=BLUE,
        label="too cautious by",
    )
    axes.plot([0, 1], [0, 1], "--", color=DARK, linewidth=1.2, label="as accurate as confident")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy")
    axes.legend(loc="upper left", edgecolor="none", framealpha=0.9)


def draw_rows(axes: Axes, bins: Sequence[Mapping[str, float]]) -> None:
    """Draw the number of rows in each bin."""
    from matplotlib.ticker import MaxNLocator

    draw_bars(axes, bins, [one["rows"] for one in bins], color=PALE)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylabel("rows")
    axes.set_xlabel("confidence: probability of the predicted label")


def draw_bars(
    axes: Axes, bins: Sequence[Mapping[str, float]], heights: Sequence[float], **more: Any
) -> None:
    """Draw one bar for each bin, as wide as the bin."""
    widths = [one["high"] - one["low"] for one in bins]
    axes.bar(
        [one["low"] for one in bins],
        heights,
        widths,
        align="edge",
        edgecolor="white",
        linewidth=1,
        **more,
    )


# --- text


def write_title(axes: Axes, title: str, below: str) -> None:
    """Write the title in bold, and the lines `below` under it."""
    glyphs, lines = glyphs_of(FONT), below.count("\n") + 1
    title = "".join(c if known(c, glyphs) else "□" for c in title)
    position: dict[str, Any] = dict(
        xy=(0, 1), xycoords="axes fraction", textcoords="offset points", va="bottom"
    )
    axes.annotate(below, xytext=(0, 8), color=GREY, fontsize=10, **position)
    axes.annotate(
        title,
        xytext=(0, 13 + 12 * lines),
        color=DARK,
        fontsize=13,
        fontfamily=FONT,
        fontweight="bold",
        **position,
    )


def shortened(label: str) -> str:
    """A label on one line. A long label keeps its beginning and its end, where labels tend to
    differ."""
    label = " ".join(label.split())
    half = LONGEST // 2
    return label if len(label) <= LONGEST else f"{label[:half]}…{label[-half + 1 :]}"


def width(text: str) -> float:
    """The approximate width of a text, in font sizes."""
    return sum(1.0 if unicodedata.east_asian_width(c) in "WF" else 0.62 for c in text)


def known(text: str, glyphs: set[int]) -> bool:
    """Whether a font with these glyphs can write the text."""
    return all(ord(c) in glyphs for c in text)


def fonts_for(names: Sequence[str]) -> tuple[list[str], set[int]]:
    """The names of the fonts to use, and the code points that they draw.

    matplotlib's own font comes first. If it lacks characters of the names, the second font is the
    first one of this machine that has all of these characters.
    """
    from matplotlib.font_manager import fontManager

    glyphs = glyphs_of(FONT)
    missing = {ord(c) for name in names for c in name} - glyphs
    upright = (
        font for font in fontManager.ttflist if font.weight == 400 and font.style == "normal"
    )
    for font in upright if missing else ():
        # The font Last Resort draws one box for a whole script.
        if "Last Resort" not in font.name and missing <= (more := glyphs_of(font.name)):
            return [FONT, font.name], glyphs | more
    return [FONT], glyphs


def glyphs_of(font: str) -> set[int]:
    """The code points that a font draws."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    # A list makes it a name. A plain string would be a pattern, in which a hyphen has a meaning.
    return set(get_font(findfont(FontProperties(family=[font]))).get_charmap())
