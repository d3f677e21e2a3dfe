"""The tables that benchmarks print and write."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]  # the figures of one row of a table
Column = tuple[str, Callable[[Row], str]]  # its head, and the text of a row's cell


def table(columns: Sequence[Column], rows: Sequence[Row], words: Collection[str] = ()) -> str:
    """A Markdown table without the columns that are empty in all rows. `words` are the heads of the
    columns, besides the first, that hold no numbers."""
    cells = {head: [cell(row) for row in rows] for head, cell in columns}
    cells = {head: texts for head, texts in cells.items() if any(texts)}
    left = [n for n, head in enumerate(cells) if n == 0 or head in words]
    return markdown(list(cells), zip(*cells.values(), strict=True), left)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int]) -> str:
    """A Markdown table, aligned so that it reads as plain text too; `words`: the columns that are
    no numbers."""
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
