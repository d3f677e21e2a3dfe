"""Readers of text, JSON, tables and parquet. Every command reads its data through them.

Files are streamed, so memory use does not grow with their length. The one exception is a .json file
that holds a single document: it is read into memory whole.

A row that cannot be read becomes one record that says what is wrong with it. The rows around it are
still read.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from base.errors import reason
from config import UserError, nearest
from text.encodings import BAD_BYTE, HEAD, NotUtf8, conversion_advice, open_decompressed
from text.lines import Lines
from text.row import Record
from text.tables import read_table

SEPARATOR = "<|endoftext|>"  # the line between two documents of a text file
MAX_SHOWN = 5  # broken rows that are printed; the others are only counted


class SkippedRows:
    """Counts the rows that cannot be read, and keeps the first few to print."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, line: str) -> None:
        """Count one row. `line` says what is wrong with it; only the first MAX_SHOWN are kept."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self.shown.append(line)

    def more(self, what: str) -> str:
        """A line that counts the rows which were not printed; "" if there are none."""
        hidden = self.count - MAX_SHOWN
        return f"left out: {hidden:,} more broken rows of {what}" if hidden > 0 else ""


# ---- documents of a text file


# Matches only a whole line. The newline before it belongs to the separator, not to the document.
_SEPARATOR = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)(?:\r?\n|\Z)")
# Places where a text can be cut without changing its ids. GPT-2's pre-tokenizer never joins the end
# of a line to the start of the next line, nor a word to a single space after it. A place before `<`
# does not count, because a separator may begin there.
SEAM = re.compile(r"\S(?:\n(?=[^\s<])|(?= \S))")


def split_documents(stream: IO[str], size: int) -> Iterator[tuple[str, bool, bool]]:
    """Split a text at its separator lines. Yields (text, begins, ends).

    begins: whether the text begins a document. ends: whether a separator follows it. The newline
    before a separator is not removed. A document longer than `size` characters comes in pieces,
    which are cut at seams.
    """
    buffer, starts = "", True
    while True:
        block = stream.read(size)
        buffer += block
        begin = 0
        while found := _SEPARATOR.search(buffer, begin):
            if block and found.end() == len(buffer):
                break  # only the next block shows whether this is a whole line
            yield buffer[begin : found.start()], starts, True
            begin, starts = found.end(), True
        buffer = buffer[begin:]
        if not block:
            yield buffer, starts, False
            return
        if len(buffer) >= size and (cut := _last_seam(buffer)):
            yield buffer[:cut], starts, False
            buffer, starts = buffer[cut:], False


def _last_seam(text: str) -> int:
    """The position of the last seam, or 0 if there is none."""
    for begin in (max(0, len(text) - 4096), 0):
        ends = [found.end() for found in SEAM.finditer(text, begin)]
        if ends:
            return ends[-1]
    return 0


# ---- JSON


def read_json(
    stream: io.BufferedReader, path: Path | str, suffix: str = ".json"
) -> Iterator[Record]:
    """Rows of JSON: one object a line, a list of objects, or a list as {"data": [...]}.

    A list is read into memory whole. Raises UserError for a list that is not valid JSON.
    """
    lines = Lines(stream, path)
    if not _is_one_document(lines, suffix == ".jsonl"):
        while (line := lines.take()) is not None:
            if line.strip():
                yield f"line {lines.number}", _object(line)
        return
    taken = list(iter(lines.take, None))
    text = "".join(taken)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(
                f"{path} is not valid JSON: {_json_error(error)}; repair it, or write one object "
                "a line"
            ) from None
        yield from ((f"line {n}", _object(line)) for n, line in enumerate(taken, 1) if line.strip())
        return
    if isinstance(items, dict):
        items = items["data"] if isinstance(items.get("data"), list) else [items]
    marked = any(isinstance(line, NotUtf8) for line in taken)
    for number, item in enumerate(items if isinstance(items, list) else [items], 1):
        cells = _mark_bad_cells(item) if marked and isinstance(item, dict) else item
        yield f"row {number}", cells if isinstance(cells, dict) else "is not a JSON object"


def _is_one_document(lines: Lines, named_lines: bool) -> bool:
    """Whether a file is one JSON document rather than one object a line.

    Its first two lines that are not blank decide. named_lines: the file's name ends with .jsonl.
    """
    size = 1 << 12
    first, second = "", ""
    while True:
        ahead = lines.peek(size)
        first, second, *_ = *[line for line in ahead if line.strip()][:2], "", ""
        if second or sum(map(len, ahead)) < size:
            break
        size *= 2
    if isinstance(_object(first), dict) or not second:
        return not second
    if first.lstrip().startswith("[") and not _is_json(first):
        return True  # a list that spans several lines
    if isinstance(_object(second), dict):
        return False
    return not named_lines or first.strip() == "{"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _object(line: str) -> dict[str, Any] | str:
    """The JSON object of a line, or what is wrong with the line."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        if isinstance(line, NotUtf8):
            return "is not UTF-8 text"
        return f"is not valid JSON: {_json_error(error)}"
    if not isinstance(item, dict):
        return "is not a JSON object"
    return _mark_bad_cells(item) if isinstance(line, NotUtf8) else item


def _mark_bad_cells(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells, where each text with bytes that are not UTF-8 has become a NotUtf8."""
    bad = {
        name for name, value in cells.items() if isinstance(value, str) and BAD_BYTE.search(value)
    }
    return (
        {name: NotUtf8(value) if name in bad else value for name, value in cells.items()}
        if bad
        else cells
    )


def _json_error(error: Exception) -> str:
    return (
        "it is nested too deep"
        if isinstance(error, RecursionError)
        else " ".join(str(error).split())
    )


# ---- parquet


def read_parquet(
    stream: io.BufferedReader,
    path: Path | str,
    check: Callable[[list[str]], None] | None = None,
    columns: Sequence[str] | None = None,
    skip: int = 0,
) -> Iterator[Record]:
    """Rows from number `skip` on, with all columns or only `columns`.

    A few hundred rows are in memory at a time. check: is called with the names of the columns, and
    may raise. Raises UserError for a damaged file, also when the damage shows only in later rows.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream)
        if check:
            check(file.schema_arrow.names)
        number = skip
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            # one group at a time, because pyarrow reads far ahead over several groups
            for batch in file.iter_batches(
                256, row_groups=[group], columns=columns, use_threads=False
            ):
                names, values = batch.schema.names, list(map(_values, batch.columns))
                for cells in itertools.islice(zip(*values, strict=True), skip, None):
                    number += 1
                    yield f"row {number}", dict(zip(names, cells, strict=True))
                skip = max(0, skip - batch.num_rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a sound parquet file: {reason(error)}; copy or make it again"
        ) from None


def _values(column: Any) -> list[Any]:
    """The values of a column. Text that is not UTF-8 becomes NotUtf8.

    A value without a Python equivalent becomes text.
    """
    import pyarrow

    try:
        return column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pyarrow.ArrowException):
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    import pyarrow

    try:
        return cell.as_py()
    except UnicodeDecodeError:
        try:
            return NotUtf8(cell.cast(pyarrow.binary()).as_py().decode("utf-8", "surrogateescape"))
        except pyarrow.ArrowException:
            return b""  # it is inside a list, which is no text anyway
    except (ValueError, OverflowError, pyarrow.ArrowException):
        with contextlib.suppress(pyarrow.ArrowException):
            return cell.cast(pyarrow.string()).as_py()
        return b""


# ---- any file of rows

ROW_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_records(
    stream: io.BufferedReader,
    path: Path | str,
    suffix: str,
    needed: Sequence[Sequence[str]] = (),
    check: Callable[[list[str]], None] | None = None,
    columns: Sequence[str] | None = None,
    skip: int = 0,
) -> Iterator[Record]:
    """The rows of an open file from number `skip` on.

    The suffix selects the reader. See each reader for the other arguments.
    """
    if suffix == ".parquet":
        return read_parquet(stream, path, check, columns, skip)
    records = (
        read_json(stream, path, suffix)
        if suffix in (".json", ".jsonl")
        else read_table(stream, path, needed, check)
    )
    return itertools.islice(records, skip, None)


def text_of(cells: dict[str, Any] | str, column: str) -> str | None:
    """The text of a row; "" for a missing value.

    None if the row has no text in this column that can be read. `fault_of` says why.
    """
    value = cells.get(column, cells.get(column.strip(), b"")) if isinstance(cells, dict) else b""
    if value is None:
        return ""
    return value if isinstance(value, str) and not isinstance(value, NotUtf8) else None


def fault_of(cells: dict[str, Any] | str, column: str, path: Path | str) -> str:
    """Why `text_of` found no text in a row, and what to type."""
    if isinstance(cells, str):
        return with_advice(cells, cells, path)
    if column not in cells and column.strip() not in cells:
        return no_column("", column, list(cells)).strip()
    value = cells.get(column, cells.get(column.strip()))
    if isinstance(value, NotUtf8):
        return with_advice(f"is not UTF-8 text in column {column!r}", cells, path)
    return (
        f"holds {type(value).__name__} in column {column!r}, not text; name another with "
        "--text-column"
    )


def with_advice(fault: str, cells: dict[str, Any] | str, path: Path | str) -> str:
    """`fault`, and what to type if the fault is bytes that are not UTF-8."""
    bad = (
        next((v for v in cells.values() if isinstance(v, NotUtf8)), "")
        if isinstance(cells, dict)
        else ""
    )
    if not fault.startswith("is not UTF-8 text") or not (bad or isinstance(cells, str)):
        return fault
    head = b""
    with contextlib.suppress(UserError), open_decompressed(Path(path)) as (_, stream):
        head = stream.peek(HEAD)[:HEAD]
    if head[:4] == b"PAR1":
        return f"{fault}; repair or remove it"
    return (
        f"{fault}; {conversion_advice(path, head + b' ' + bad.encode('utf-8', 'surrogateescape'))}"
    )


def no_column(where: str, column: str, found: Sequence[str]) -> str:
    """The error for a row or a file without the column, and what to type."""
    names = ", ".join(found) or "none"
    return (
        f"{where} has no column {column!r}{nearest(column, found)}; it has: {names}. Use "
        "--text-column NAME"
    )
