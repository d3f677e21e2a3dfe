"""The tables that benchmarks print and write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # the figures of one row of a table
# the head, and a function from a row to the text of its cell
Column = tuple[str, Callable[[Row], str]]


def table(columns: Sequence[Column], rows: Sequence[Row], words: Collection[str] = ()) -> str:
    """A Markdown table without the columns that are empty in all rows. The first column and those
    whose heads are in `words` hold text and are aligned left; the others hold numbers."""
    cells = {head: [cell(row) for row in rows] for head, cell in columns}
    cells = {head: texts for head, texts in cells.items() if any(texts)}
    left = [n for n, head in enumerate(cells) if n == 0 or head in words]
    return markdown(list(cells), zip(*cells.values(), strict=True), left)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int]) -> str:
    """A Markdown table, padded so that it can be read as plain text too. `words` are the indices of
    the columns that hold text, not numbers."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def written(line: Sequence[str]) -> str:
        cells = (
            f"{c:<{w}}" if i in words else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))
        )
        return "| " + " | ".join(cells) + " |"

    rule = "|".join(
        "-" * (w + 2) if i in words else "-" * (w + 1) + ":" for i, w in enumerate(widths)
    )
    return "\n".join([written(lines[0]), f"|{rule}|", *map(written, lines[1:])])
