"""Reader of tables: comma, tab, semicolon or bar between cells, with quotes or without.

The first SAMPLE characters decide a table's delimiter. The first SAMPLE characters after a cell
that begins with a quote decide whether quotes hold cells together. Neither depends on where reading
begins. The trade-off: many files are read right without an option, and an unusual one may need to
be written again by Python's csv module.

A row that cannot be read becomes one record that says what is wrong with it. The rows around it are
still read.
"""

from __future__ import annotations

import io
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from config import UserError
from text.encodings import BAD_BYTE, NotUtf8, not_utf8
from text.lines import Lines, without_end
from text.row import Record

SAMPLE = 1 << 22  # characters from which a table's delimiter and quoting are inferred
DELIMITERS = "\t,;|"
# The delimiter of a table with one column: a noncharacter, which no text holds.
_NO_DELIMITER = "\U0010ffff"
# When the lines inside one quoted cell each look like a row and share a column of numbers, or of
# single words, they are taken for rows from this many lines on.
_MIN_NUMBER_LINES, _MIN_WORD_LINES = 5, 10
_NUMBER, _WORD = re.compile(r"[-+]?[\d.]+"), re.compile(r"\S{1,30}")
_SCORED_ROWS = 200  # rows of the sample that are split to compare delimiters
_MAX_VOTES = 2000  # rows with quotes that vote on whether quotes hold cells together
# The rest of a quoted cell, and the quote that ends it.
_INSIDE = re.compile(r'[^"]*+(?:""[^"]*+)*+(")?')

UNCLOSED = "has a quote that is not closed where its cell ends"


class RaggedRow(str):
    """The error of a table's row with too few or too many cells. It also keeps these cells."""

    header: list[str]
    cells: list[str]

    def __new__(cls, header: list[str], cells: list[str]) -> RaggedRow:
        """header: the names of the columns. cells: the cells of the row."""
        error = f"has {len(cells)} cells where the first line names {len(header)} columns"
        ragged = super().__new__(cls, error)
        ragged.header, ragged.cells = header, cells
        return ragged


def read_table(
    stream: io.BufferedReader,
    path: Path | str,
    needed: Sequence[Sequence[str]] = (),
    check: Callable[[list[str]], None] | None = None,
) -> Iterator[Record]:
    """Rows of a table whose first line names the columns.

    needed: for each wanted column, the names that it may have. Of the delimiters that split the
    first line, one that yields these names wins, then the one by which most rows have as many cells
    as the first line. check: is called with the names of the columns, and may raise. Raises
    UserError if the first line names no columns, or names a wanted column twice.
    """
    lines = Lines(stream, path)
    if lines.is_done():
        return
    if isinstance(lines.following(1)[0], NotUtf8):
        raise not_utf8(f"{path} line 1", path)
    table = _Table(lines, *_dialect(lines, needed))
    header = table.header()
    if isinstance(header, str):
        raise UserError(f"{path} line 1 should name the columns, but {header}")
    names = list(map(str.strip, header))
    wanted = set(itertools.chain.from_iterable(needed))
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise UserError(f"{path} line 1 names the column {twice[0][:60]!r} twice; rename one")
    if check:
        check(names)
    # the first column of each name, in the order of the table
    indices = {name: index for index, name in reversed(list(enumerate(names)))}
    indices = {name: indices[name] for name in names}
    for line, cells in table.rows(names):
        if isinstance(cells, str):
            yield f"line {line}", cells
        else:
            yield f"line {line}", {name: cells[index] for name, index in indices.items()}


class _Table:
    """Splits lines into rows of cells. The format is what Python's csv module writes.

    quoted: whether quotes hold cells together; None until a cell begins with a quote.
    """

    def __init__(self, lines: Lines, delimiter: str, quoted: bool | None):
        self.lines, self.delimiter, self.quoted = lines, delimiter, quoted
        self.n: int | None = None  # number of columns
        self.taken: list[str] = []  # the lines of the current row
        self.has_stray_quote = False  # whether the current row has a quote inside an unquoted cell

    def opens(self, line: str) -> bool:
        """Whether a cell of this line begins with a quote."""
        return '"' in line and (line[0] == '"' or self.delimiter + '"' in line)

    def header(self) -> list[str] | str:
        """The first row that is not blank, or what is wrong with the table."""
        while (row := self.next()) is not None:
            if row:
                self.n = len(row)
                return row
        return "has nothing"

    def rows(self, names: list[str]) -> Iterator[tuple[int, list[str] | str]]:
        """Each row as the number of its first line, and its cells or what is wrong with it.

        After a broken row, reading continues in its second line. The same holds for a row whose
        quoted cell contains whole rows. In both cases a stray quote has run on to some later quote,
        across rows that are fine.
        """
        n = len(names)
        # a row of several lines, which is held back until the next row has been checked
        held: tuple[int, list[str], list[str]] | None = None
        while (cells := self.next()) is not None:
            line = self.lines.number - len(self.taken) + 1
            if not cells:
                continue  # a blank line
            if isinstance(cells, list) and len(cells) != n:
                cells = RaggedRow(names, cells)
            elif isinstance(cells, list) and len(self.taken) > 1 and self.swallows_rows(n):
                cells = UNCLOSED
            if held:
                ahead = (
                    [*held[2], *self.taken, *self.lines.following(_SCORED_ROWS)]
                    if isinstance(cells, str)
                    else []
                )
                yield held[:2]
                if ahead and _is_inside_row(ahead, len(held[2]), self.delimiter, n):
                    # One of the two rows is broken. Nothing shows which one, so both are kept.
                    self.lines.give_back([*held[2][1:], *self.taken])
                    held = None
                    continue
                held = None
            if isinstance(cells, str):
                self.lines.give_back(self.taken[1:])
                cells = self._unquoted(n) or cells
            elif len(self.taken) > 1:
                held = line, cells, self.taken
                continue
            yield line, cells
        if held:
            yield held[:2]

    def _unquoted(self, n: int) -> list[str] | None:
        """The cells of a tab-separated line that is a row only if its quotes mean nothing.

        None for any other line. Other delimiters are left out, because only files with tabs are
        mostly written without quoting. The next line must look like a row too. Otherwise the cell
        may continue there.
        """
        line, following = self.taken[0], self.lines.following(1)
        if self.delimiter != "\t" or not _looks_like_rows([line, *following], "\t", n):
            return None
        return self._mark_cells(without_end(line).split("\t"))

    def next(self) -> list[str] | str | None:
        """The cells of the next row or what is wrong with it; [] for a blank line, None at the end.

        The row's lines are in `taken` afterwards.
        """
        line = self.lines.take()
        if line is None:
            return None
        self.taken, self.has_stray_quote = [line], False
        if self.quoted is None and self.opens(line):
            self.quoted = _is_quoted([line, *self.lines.peek(SAMPLE)], self.delimiter, self.n)
        if self.quoted is False or '"' not in line:
            body = without_end(line)
            return self._mark_cells(body.split(self.delimiter)) if body else []
        cells = self._split(line)
        return cells if isinstance(cells, str) else self._mark_cells(cells)

    def _mark_cells(self, cells: list[str]) -> list[str]:
        if not self.lines.has_bad_bytes or not any(
            isinstance(line, NotUtf8) for line in self.taken
        ):
            return cells
        return [NotUtf8(cell) if BAD_BYTE.search(cell) else cell for cell in cells]

    def _split(self, line: str) -> list[str] | str:
        """The cells of the row that begins with `line`, or what is wrong with it.

        Some of its cells may be quoted. A quoted cell may span several lines.
        """
        cells: list[str] = []
        start, held, take, taken = 0, len(line), self.lines.take, self.taken
        while True:
            if line.startswith('"', start):
                parts, begin = [], start + 1
                while not (end := _end_of_quoted_cell(line, begin) if '"' in line else 0):
                    parts.append(line[begin:] if begin else line)
                    following = take()
                    if following is None:
                        return UNCLOSED
                    taken.append(following)
                    line, begin, held = following, 0, held + len(following)
                    if held > SAMPLE * 4:
                        return UNCLOSED  # no real cell is so long, and memory use is bounded
                body = without_end(line)
                if end < len(body) and line[end] != self.delimiter:
                    return UNCLOSED
                cells.append("".join([*parts, line[begin : end - 1]]).replace('""', '"'))
            else:
                body = without_end(line)
                end = body.find(self.delimiter, start)
                end = len(body) if end < 0 else end
                cells.append(body[start:end])
                self.has_stray_quote |= '"' in cells[-1]
            if end >= len(body):
                return cells
            start = end + 1

    def swallows_rows(self, n: int) -> bool:
        """Whether a row of several lines is really one line with a stray quote, then other rows."""
        inside = self.taken[1:]
        if (
            len(inside) >= _MIN_NUMBER_LINES
            and n > 1
            and _looks_like_rows(inside, self.delimiter, n)
            and self._share_a_kind_of_cell(inside)
        ):
            return True
        return (
            self.has_stray_quote
            and _share_of_rows(inside, self.delimiter, n, no_stray_quotes=True) == 1
        )

    def _share_a_kind_of_cell(self, inside: Sequence[str]) -> bool:
        """Whether the lines inside a cell share a kind of column with the row around them.

        A column counts if the row and all lines have a number in it, or all have a single word.
        Single words may be chance, so they need more lines. The cell that holds the lines is left
        out.
        """
        first, last = (
            without_end(line).split(self.delimiter) for line in (self.taken[0], self.taken[-1])
        )
        opening = max((i for i, cell in enumerate(first) if cell.startswith('"')), default=0)
        around = dict(enumerate(first[:opening])) | dict(list(enumerate(last))[opening + 1 :])
        rows = [without_end(line).split(self.delimiter) for line in inside]
        return any(
            len(inside) >= least and all(kind.fullmatch(cells[i]) for cells in [around, *rows])
            for i in around
            for kind, least in ((_NUMBER, _MIN_NUMBER_LINES), (_WORD, _MIN_WORD_LINES))
        )


def _end_of_quoted_cell(line: str, begin: int) -> int:
    """The position after the closing quote of the cell whose text continues at `begin`.

    0 if the cell does not end in this line.
    """
    found = _INSIDE.match(line, begin)
    return found.end() if found and found[1] else 0


class _HeldLines(Lines):
    """Lines that are in memory already."""

    def __init__(self, lines: Iterable[str]):
        self._lines, self._ahead, self.number, self.has_bad_bytes = iter(lines), deque(), 0, False


def _share_of_rows(
    lines: Sequence[str],
    delimiter: str,
    n: int,
    no_stray_quotes: bool = False,
    quoted: bool | None = True,
) -> float:
    """The share of the rows in these lines that have n cells.

    no_stray_quotes: a row with a quote inside an unquoted cell does not count.
    """
    table = _Table(_HeldLines(lines), delimiter, quoted)
    right = rows = 0
    while rows < _SCORED_ROWS and (cells := table.next()) is not None:
        rows += bool(cells)
        right += (
            isinstance(cells, list)
            and len(cells) == n
            and not (no_stray_quotes and table.has_stray_quote)
        )
        if isinstance(cells, str):
            table.lines.give_back(table.taken[1:])
    return right / max(1, rows)


def _is_inside_row(lines: Sequence[str], i: int, delimiter: str, n: int) -> bool:
    """Whether lines[i], which begins no sound row, is in one if reading starts at lines[1]."""
    given = _HeldLines(lines[1:])
    table = _Table(given, delimiter, True)
    while (cells := table.next()) is not None:
        right = isinstance(cells, list) and len(cells) == n and not table.has_stray_quote
        if given.number >= i and right:
            return given.number - len(table.taken) < i - 1  # the row began before lines[i]
        if given.number - len(table.taken) + 1 >= i:
            return False
        if not right:
            given.give_back(table.taken[1:])
    return False


def _dialect(lines: Lines, needed: Sequence[Sequence[str]]) -> tuple[str, bool | None]:
    """The delimiter of a table, and whether quotes hold its cells together.

    The latter is None if no cell of the sample begins with a quote.
    """
    sample = lines.peek(SAMPLE)
    first = next((line for line in sample if without_end(line)), "")
    ranked = []
    for delimiter in sorted(DELIMITERS, key=first.count, reverse=True):
        if delimiter not in first:
            continue
        quoted = _is_quoted(sample, delimiter)
        header = _Table(_HeldLines(sample), delimiter, quoted).header()
        if isinstance(header, str) or len(header) < 2:
            continue
        names = set(map(str.strip, header))
        has_needed = all(names & set(usual) for usual in needed)
        ranked.append((has_needed, delimiter, quoted, len(header)))
    if len(ranked) > 1:
        rest = sample[1 : 1 + 4 * _SCORED_ROWS]
        ranked.sort(
            key=lambda c: (c[0], _share_of_rows(rest, c[1], c[3], quoted=c[2])), reverse=True
        )
    if ranked:
        return ranked[0][1:3]
    # No delimiter splits the first line. It is a single column, or has a quote that never closes.
    delimiter = max(DELIMITERS, key=first.count)
    whole = _Table(_HeldLines(sample), _NO_DELIMITER, True).header()
    if delimiter in first and not (first.startswith('"') and isinstance(whole, list)):
        return delimiter, _is_quoted(sample, delimiter)
    return _NO_DELIMITER, _is_quoted(sample, _NO_DELIMITER)


def _is_quoted(sample: list[str], delimiter: str, n: int | None = None) -> bool | None:
    """Whether quotes hold a table's cells together (RFC 4180). None if no cell begins with a quote.

    Each row in which a cell begins with a quote votes. It votes yes if it has n cells when its
    quotes hold cells together. It votes no if only the plain line has n cells. In tables such as
    MRPC quotes are ordinary characters: a cell that opens with a quotation mostly continues after
    it. n: the number of cells of the first row, unless given.
    """
    table = _Table(_HeldLines(sample), delimiter, True)
    if n is None:
        header = table.header()
        n = len(header) if isinstance(header, list) else without_end(sample[0]).count(delimiter) + 1
        if isinstance(header, str):
            table = _Table(_HeldLines(sample), delimiter, True)
    cut = sum(map(len, sample)) >= SAMPLE
    whole = plain = met = 0
    while whole + plain < _MAX_VOTES and (cells := table.next()) is not None:
        line, more = table.taken[0], table.taken[1:]
        opens = table.opens(line)
        met += opens
        if (
            isinstance(cells, list)
            and len(cells) in (0, n)
            and not (more and table.swallows_rows(n))
        ):
            whole += opens
            continue
        if opens and _looks_like_rows([line], delimiter, n):
            # The sample may end inside a cell. That is no vote unless rows follow its first line.
            plain += not (cut and table.lines.is_done()) or _looks_like_rows(more[:3], delimiter, n)
        table.lines.give_back(more)
    return whole >= plain if met else None


def _looks_like_rows(lines: Sequence[str], delimiter: str, n: int) -> bool:
    return all(line.count(delimiter) == n - 1 for line in lines)
