"""The tables that benchmarks print and write."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


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
