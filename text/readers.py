"""Readers of gzip, text, JSON, tables and parquet. Every command reads its data through them.

Files are streamed, so memory use does not grow with their length. The one exception is a .json file
that holds a single document: it is read into memory whole.

The first SAMPLE characters decide a table's delimiter. The first SAMPLE characters after a cell
that begins with a quote decide whether quotes hold cells together. Neither depends on where reading
begins.

A row that cannot be read becomes one record that says what is wrong with it. The rows around it are
still read.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import re
import shlex
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from base.errors import reason
from config import UserError, nearest
from text.row import Record

SEPARATOR = "<|endoftext|>"  # the line between two documents of a text file
MAX_SHOWN = 5  # broken rows that are printed; the others are only counted
SAMPLE = 1 << 22  # characters from which a table's delimiter and quoting are inferred
HEAD = 1 << 16  # bytes from which a file's kind is inferred
GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
LAYERS = 3  # most gzip layers that are unpacked: a file can be crafted that unpacks to itself


class NotUtf8(str):
    """A text with bytes that are not UTF-8. Each is a lone surrogate, as by surrogateescape."""


BAD_BYTE = re.compile(r"[\udc80-\udcff]")  # a byte that is not UTF-8, as surrogateescape decodes it


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


# ---- bytes


def is_gzip(path: Path) -> bool:
    """Whether the file begins with gzip's magic bytes. False for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(GZIP)) == GZIP
    except OSError:
        return False


@contextlib.contextmanager
def open_decompressed(path: Path) -> Generator[tuple[IO[bytes], io.BufferedReader]]:
    """Open a file and yield it twice: as it is, and as a stream of its uncompressed bytes.

    Gzip is detected by the file's first bytes, not by its name. Raises UserError for a file that
    cannot be read or is damaged, on opening and also while the `with` block reads.
    """
    try:
        with path.open("rb", buffering=HEAD) as file, contextlib.ExitStack() as stack:
            assert isinstance(file, io.BufferedReader)
            stream = file
            for layer in itertools.count():
                head = stream.peek(HEAD)[:HEAD]
                if head[:2] != GZIP:
                    break
                if layer == LAYERS:
                    raise UserError(
                        f"{path} is gzip inside gzip, more than {LAYERS} times; unpack it first"
                    )
                unpacked: Any = stack.enter_context(gzip.GzipFile(mode="rb", fileobj=stream))
                stream = io.BufferedReader(unpacked, HEAD)
            if (
                stream is file
                and path.name.lower().endswith(".gz")
                and head
                and not _is_plain(head)
            ):
                raise UserError(
                    f"{path} is not a sound gzip file: it lacks gzip's first bytes; copy or make "
                    "it again"
                )
            yield file, stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a sound gzip file: {error}; copy or make it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_plain(head: bytes) -> bool:
    """Whether a file named .gz is not compressed: many downloads unpack it and keep the name."""
    return head[:4] == b"PAR1" or (b"\0" not in head and _decodes(head, "utf-8") is not None)


# ---- encodings


def _decodes(data: bytes, encoding: str) -> str | None:
    """The decoded text, or None if the bytes are not in this encoding.

    The last character may be incomplete.
    """
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data)
    except UnicodeDecodeError:
        return None


def wide_encoding(head: bytes) -> str | None:
    """iconv's name of the UTF-16 or UTF-32 encoding of some bytes, or None for any other encoding.

    The byte order mark decides, or else the share of zero bytes.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = 0.02 if _decodes(head, "utf-8") is None else 0.4
    if head.count(0) < max(1, zeros * len(head)):
        return None
    best, most = None, 0.0
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        text = _decodes(head, name)
        if text and sum(map(_is_of_text, text)) >= 0.95 * len(text):
            # Every text has ASCII, if only its spaces. The wrong byte order turns it into rare
            # characters.
            share = sum(character < "\x7f" for character in text) / len(text)
            best, most = (name, share) if share > most else (best, most)
    return best


def _is_of_text(character: str) -> bool:
    return character.isprintable() or character in "\t\n\r\ufeff"


# Multi-byte and non-Latin encodings: iconv's name, a pattern of the script, and the smallest share
# of the non-ASCII letters that must match it. Decoding without an error proves little, because most
# byte sequences are valid in these encodings.
_SCRIPTS = (
    ("CP949", re.compile("[가-힣ㄱ-ㆎ]"), 0.85),
    ("EUC-JP", re.compile("[ぁ-ヿ]"), 0.3),
    ("SHIFT_JIS", re.compile("[ぁ-ヿ]"), 0.3),
    ("GB18030", re.compile("[一-鿿\u3000-\u303f\uff00-\uffef]"), 0.95),
    ("WINDOWS-1251", re.compile("[а-яё]"), 0.7),
    ("KOI8-R", re.compile("[а-яё]"), 0.7),
)


def encoding_of(sample: bytes) -> str | None:
    """iconv's name of the encoding of bytes that are not UTF-8, or None if it is unclear."""
    if wide := wide_encoding(sample):
        return wide
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample)
    bad = len(BAD_BYTE.findall(text))
    utf8 = sum(character > "\x7f" for character in text) - bad
    if not bad or 2 * utf8 > bad or any(byte < 32 and byte not in b"\t\n\r\f" for byte in sample):
        return None  # UTF-8 with a few damaged bytes, or no text at all
    high = [byte > 0x7F for byte in sample]
    runs = sum(1 for pair in itertools.pairwise(high) if all(pair))
    if 2 * runs >= sum(high):
        for name, script, share in _SCRIPTS:
            found = _decodes(sample, name)
            letters = [character for character in found or "" if character > "\x7f"]
            if letters and len(script.findall("".join(letters))) >= share * len(letters):
                return name
    latin = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in sample) else "ISO-8859-1"
    # In Latin text an accented letter has ASCII neighbours and rarely follows another one.
    found = _decodes(sample, latin) or ""
    letters = sum(character.isalpha() for character in found if character > "\x7f")
    return latin if 3 * runs <= sum(high) and 2 * letters >= sum(high) else None


def conversion_advice(path: Path | str, sample: bytes) -> str:
    """What to type for a file that is not UTF-8. A command comes last, ready to be pasted."""
    encoding = encoding_of(sample)
    if encoding is None:
        return "repair it, or save the file as UTF-8 (its encoding was not recognized)"
    path = Path(path)
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    new = str(path.with_name(f"{name.removesuffix(suffix)}.utf8{suffix}"))
    old, new = (
        shlex.quote(f"./{name}" if name.startswith("-") else name) for name in (str(path), new)
    )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return (
                f"it seems to be {encoding}; convert it: gzip -dc < {old} | iconv -f "
                f"{encoding} -t UTF-8 > {new}"
            )
    return f"it seems to be {encoding}; convert it: iconv -f {encoding} -t UTF-8 {old} > {new}"


def encoding_sample(path: Path | str) -> bytes:
    """The beginning of a file and the bytes around the first one that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with open_decompressed(Path(path)) as (_, stream):
        head = stream.read(HEAD)
        block = head
        while block:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                start = max(0, error.start - HEAD)
                return head if block is head else head + error.object[start : error.start + HEAD]
            block = stream.read(1 << 20)
    return head


_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"%PDF": "a PDF; extract its text first",
    b"PAR1": "a parquet file; rename it to .parquet",
}


def check_text(head: bytes, where: Path | str) -> None:
    """Raises UserError if a file's first bytes show that it is not UTF-8 text."""
    binary = b"\0" in head or _decodes(head, "utf-8") is None
    if binary and (kind := other_kind(head)):
        raise UserError(f"{where} is not text, but {kind}")
    if wide_encoding(head):
        raise UserError(f"{where} is not UTF-8 text; {conversion_advice(where, head)}")


def other_kind(head: bytes) -> str:
    """What kind of unsupported file begins so, with what to do about it; "" for any other file."""
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if head.startswith(mark)), "")
    return kind if ";" in kind or not kind else f"{kind}; unpack it first"


def not_utf8(where: str, path: Path | str) -> UserError:
    """The error for text of `path` that is not UTF-8, with the command that converts the file."""
    return UserError(f"{where} is not UTF-8 text; {conversion_advice(path, encoding_sample(path))}")


def text_stream(stream: io.BufferedReader, path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """Decode UTF-8 without the byte order mark. Line ends stay as they are in the file."""
    check_text(stream.peek(HEAD)[:HEAD], path)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")


def read_text(path: Path | str) -> str:
    """The whole text of a file, gzipped or not. Raises UserError for one that is not UTF-8."""
    with open_decompressed(Path(path)) as (_, stream):
        try:
            return text_stream(stream, Path(path)).read()
        except UnicodeDecodeError:
            raise not_utf8(str(path), path) from None


def decode_input(raw: bytes, what: str) -> str:
    """The text of standard input, without a byte order mark. Raises UserError if it is not UTF-8.

    what: the name of the input in the message.
    """
    try:
        if wide_encoding(raw[:HEAD]):
            raise ValueError
        return raw.decode("utf-8-sig")
    except ValueError:
        name = encoding_of(raw[:HEAD])
        advice = f"pipe it through iconv -f {name} -t UTF-8" if name else "convert it"
        packed = raw[:2] == b"\x1f\x8b"
        raise UserError(
            f"{what} is not UTF-8 text; {'unpack it: gzip -dc' if packed else advice}"
        ) from None


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


# ---- lines


class Lines:
    """The lines of a file, with their ends. Lines can be looked at ahead, and given back."""

    def __init__(self, stream: io.BufferedReader, path: Path | str):
        head = stream.peek(HEAD)[:HEAD]
        check_text(head, path)
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        self._lines = _mac_lines(stream) if _has_mac_line_ends(head) else _unix_lines(stream)
        self._ahead: deque[str] = deque()
        self.number = 0  # number of the last line that was taken, from 1
        self.has_bad_bytes = False  # whether any line so far was not UTF-8

    def take(self) -> str | None:
        """The next line; None at the end of the file."""
        line = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if line is not None:
            self.number += 1
            self.has_bad_bytes = self.has_bad_bytes or line.__class__ is NotUtf8
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Put back the lines that were taken last, so that they are taken again."""
        self._ahead.extendleft(reversed(lines))
        self.number -= len(lines)

    def following(self, n: int) -> list[str]:
        """Look at the next n lines without taking them; fewer at the end of the file."""
        self._ahead.extend(itertools.islice(self._lines, max(0, n - len(self._ahead))))
        return list(itertools.islice(self._ahead, n))

    def is_done(self) -> bool:
        """Whether no line is left."""
        return not self.following(1)

    def peek(self, characters: int) -> list[str]:
        """Look at the next lines, at least `characters` in all; fewer at the end of the file."""
        held = sum(map(len, self._ahead))
        while held < characters and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
            held += len(line)
        return list(self._ahead)


def _unix_lines(stream: io.BufferedReader) -> Iterator[str]:
    """Lines that end with a newline. A block of lines is decoded at once, which is faster."""

    def blocks() -> Iterator[Iterable[str]]:
        while data := stream.read(1 << 18):
            data += stream.readline()
            try:
                yield io.StringIO(data.decode(), newline="\n")
            except UnicodeDecodeError:
                yield map(_decode_line, io.BytesIO(data))

    return itertools.chain.from_iterable(blocks())


def _decode_line(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return NotUtf8(line.decode("utf-8", "surrogateescape"))


def _has_mac_line_ends(head: bytes) -> bool:
    """Whether lines end with a carriage return alone, as on the classic Mac.

    Quoted cells are ignored, because they may hold other line ends.
    """
    first = re.match(rb'(?:[^"\r\n]++|"[^"]*+")*+', head)
    assert first
    end = head[first.end() : first.end() + 2]
    return (len(end) == 2 and end[:1] == b"\r" and end != b"\r\n") or (
        b"\r" in head and b"\n" not in head
    )


def _mac_lines(stream: io.BufferedReader) -> Iterator[str]:
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    return (NotUtf8(line) if BAD_BYTE.search(line) else line for line in text)


def _without_end(line: str) -> str:
    for end in ("\r\n", "\n", "\r"):
        if line.endswith(end):
            return line[: -len(end)]
    return line


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


# ---- tables

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
        return self._mark_cells(_without_end(line).split("\t"))

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
            body = _without_end(line)
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
                body = _without_end(line)
                if end < len(body) and line[end] != self.delimiter:
                    return UNCLOSED
                cells.append("".join([*parts, line[begin : end - 1]]).replace('""', '"'))
            else:
                body = _without_end(line)
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
            _without_end(line).split(self.delimiter) for line in (self.taken[0], self.taken[-1])
        )
        opening = max((i for i, cell in enumerate(first) if cell.startswith('"')), default=0)
        around = dict(enumerate(first[:opening])) | dict(list(enumerate(last))[opening + 1 :])
        rows = [_without_end(line).split(self.delimiter) for line in inside]
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
    first = next((line for line in sample if _without_end(line)), "")
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
        n = (
            len(header)
            if isinstance(header, list)
            else _without_end(sample[0]).count(delimiter) + 1
        )
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
