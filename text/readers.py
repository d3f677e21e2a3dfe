"""The one reader of text files: bytes, encodings, tables and JSON, for every command that takes
data.

Everything is read as a stream, so memory stays flat however long a file is; only a .json file that
is one whole document is held in memory. What a table's cells lie between is decided from the first
SAMPLE characters (for quotes, from the first SAMPLE characters after a cell that begins with one),
so it never depends on where reading begins. A row that cannot be read is one record that says what
is wrong with it; it never takes another row with it.
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

SEPARATOR = "<|endoftext|>"  # a line of its own between the documents of a text file
SHOWN = 5  # broken rows that are printed; the others are counted
SAMPLE = 1 << 22  # characters that tell a table's dialect
HEAD = 1 << 16  # bytes that tell what a file is
GZIP = b"\x1f\x8b"  # begins such a file
LAYERS = 3  # of gzip around each other: a file may be made that unpacks to itself


class NotUtf8(str):
    """A text with bytes that are not UTF-8, each as surrogateescape leaves it."""


BAD_BYTE = re.compile(r"[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


class Torn(str):
    """What is wrong with a table's row whose cells do not match its columns, and the cells that it
    has."""

    header: list[str]
    cells: list[str]

    def __new__(cls, header: list[str], cells: list[str]) -> Torn:
        said = f"has {len(cells)} cells where the first line names {len(header)} columns"
        torn = super().__new__(cls, said)
        torn.header, torn.cells = header, cells
        return torn


class LeftOut:
    """Counts the rows that cannot be read; the first few are for the user to see."""

    def __init__(self) -> None:
        self.count = 0
        self.shown: list[str] = []

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.shown.append(line)

    def more(self, what: str) -> str:
        """A line about those that were not printed; "" where there are none."""
        hidden = self.count - SHOWN
        return f"left out: {hidden:,} more broken rows of {what}" if hidden > 0 else ""


# ---- bytes


def is_gzip(path: Path) -> bool:
    """Whether a file that can be read begins as gzip does."""
    try:
        with path.open("rb") as file:
            return file.read(len(GZIP)) == GZIP
    except OSError:
        return False


@contextlib.contextmanager
def opened(path: Path) -> Generator[tuple[IO[bytes], io.BufferedReader]]:
    """The file, and its bytes uncompressed: gzip is known by its first bytes, not by the file's
    name.

    Raises UserError, on opening or while it is read inside the `with`, where the file cannot be
    read or is damaged.
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
                    f"{path} is not a sound gzip file: it does not begin as one; copy or make it "
                    "again"
                )
            yield file, stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a sound gzip file: {error}; copy or make it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_plain(head: bytes) -> bool:
    """Whether a file named .gz was unpacked on its way here, as downloads often are."""
    return head[:4] == b"PAR1" or (b"\0" not in head and _decodes(head, "utf-8") is not None)


# ---- encodings


def _decodes(data: bytes, encoding: str) -> str | None:
    """The text of some bytes, of which the last character may be cut; None where it is not this
    encoding."""
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data)
    except UnicodeDecodeError:
        return None


def wide_encoding(head: bytes) -> str | None:
    """iconv's name of an encoding in units of two or four bytes, by its mark or by its zero bytes;
    else None."""
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
            # Read the wrong way round, the ASCII of a text (its spaces at least) is something rare.
            share = sum(character < "\x7f" for character in text) / len(text)
            best, most = (name, share) if share > most else (best, most)
    return best


def _is_of_text(character: str) -> bool:
    return character.isprintable() or character in "\t\n\r\ufeff"


# Encodings of several bytes a letter, and of another alphabet: iconv's name, a pattern of the
# script, and the least share of the letters beyond ASCII that are of it. Decoding alone proves
# little, since most bytes mean something.
_SCRIPTS = (
    ("CP949", re.compile("[가-힣ㄱ-ㆎ]"), 0.85),
    ("EUC-JP", re.compile("[ぁ-ヿ]"), 0.3),
    ("SHIFT_JIS", re.compile("[ぁ-ヿ]"), 0.3),
    ("GB18030", re.compile("[一-鿿\u3000-\u303f\uff00-\uffef]"), 0.95),
    ("WINDOWS-1251", re.compile("[а-яё]"), 0.7),
    ("KOI8-R", re.compile("[а-яё]"), 0.7),
)


def encoding_of(sample: bytes) -> str | None:
    """iconv's name of the encoding of bytes that are not UTF-8; None where it cannot be told."""
    if wide := wide_encoding(sample):
        return wide
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample)
    bad = len(BAD_BYTE.findall(text))
    utf8 = sum(character > "\x7f" for character in text) - bad
    if not bad or 2 * utf8 > bad or any(byte < 32 and byte not in b"\t\n\r\f" for byte in sample):
        return None  # UTF-8 in which some bytes are spoilt, or no text at all
    high = [byte > 0x7F for byte in sample]
    runs = sum(1 for pair in itertools.pairwise(high) if all(pair))
    if 2 * runs >= sum(high):
        for name, script, share in _SCRIPTS:
            found = _decodes(sample, name)
            letters = [character for character in found or "" if character > "\x7f"]
            if letters and len(script.findall("".join(letters))) >= share * len(letters):
                return name
    latin = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in sample) else "ISO-8859-1"
    # An accented letter stands among others of ASCII, seldom beside another.
    found = _decodes(sample, latin) or ""
    letters = sum(character.isalpha() for character in found if character > "\x7f")
    return latin if 3 * runs <= sum(high) and 2 * letters >= sum(high) else None


def convert(path: Path | str, sample: bytes) -> str:
    """What to type for a file that is not UTF-8; the command stands at the end and works as it
    is."""
    encoding = encoding_of(sample)
    if encoding is None:
        return "mend it, or save the file as UTF-8 (its encoding cannot be told)"
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


def sample_of(path: Path | str) -> bytes:
    """The beginning of a file and what is around its first bytes that are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with opened(Path(path)) as (_, stream):
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
    b"%PDF": "a PDF",
    b"PAR1": "a parquet file; rename it to .parquet",
}


def check_text(head: bytes, where: Path | str) -> None:
    """Raises UserError where a file's first bytes tell that it is no UTF-8 text."""
    binary = b"\0" in head or _decodes(head, "utf-8") is None
    if binary and (kind := other_kind(head)):
        raise UserError(f"{where} is not text, but {kind}")
    if wide_encoding(head):
        raise UserError(f"{where} is not UTF-8 text; {convert(where, head)}")


def other_kind(head: bytes) -> str:
    """What a file is that no reader takes, by its first bytes, and what to do; "" for any other."""
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if head.startswith(mark)), "")
    return kind if ";" in kind or not kind else f"{kind}; unpack it first"


def not_utf8(where: str, path: Path | str) -> UserError:
    return UserError(f"{where} is not UTF-8 text; {convert(path, sample_of(path))}")


def text_stream(stream: io.BufferedReader, path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """The text of a file without its byte order mark, with its own line ends."""
    check_text(stream.peek(HEAD)[:HEAD], path)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")


def read_text(path: Path | str) -> str:
    """The whole text of a file, gzipped or not. Raises UserError for one that is not UTF-8."""
    with opened(Path(path)) as (_, stream):
        try:
            return text_stream(stream, Path(path)).read()
        except UnicodeDecodeError:
            raise not_utf8(str(path), path) from None


def decode_input(raw: bytes, what: str) -> str:
    """The text of standard input, without a byte order mark. Raises UserError where it is not
    UTF-8."""
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


# A line of its own. The newline before it belongs to it, not to the document.
_SEPARATOR = re.compile(r"<\|endoftext\|>(?<![^\n]<\|endoftext\|>)(?:\r?\n|\Z)")
# GPT-2's pre-tokenizer never joins the end of a line to the start of the next, nor a word to a
# single space behind it, so tokenizing on both sides of such a place gives the ids of the whole.
# `<` may begin a separator.
SEAM = re.compile(r"\S(?:\n(?=[^\s<])|(?= \S))")


def documents(stream: IO[str], size: int) -> Iterator[tuple[str, bool, bool]]:
    """Documents between separator lines; whether the text begins a document, and whether a
    separator follows it.

    The newline before a separator is still there. A document longer than `size` characters comes in
    pieces, cut at seams.
    """
    buffer, starts = "", True
    while True:
        block = stream.read(size)
        buffer += block
        begin = 0
        while found := _SEPARATOR.search(buffer, begin):
            if block and found.end() == len(buffer):
                break  # the next block decides whether this is a whole line
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
    """Where the last seam is; 0 if there is none."""
    for begin in (max(0, len(text) - 4096), 0):
        ends = [found.end() for found in SEAM.finditer(text, begin)]
        if ends:
            return ends[-1]
    return 0


# ---- lines


class Lines:
    """The lines of a file with their ends, those ahead of the reader too."""

    def __init__(self, stream: io.BufferedReader, path: Path | str):
        head = stream.peek(HEAD)[:HEAD]
        check_text(head, path)
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        self._lines = _classic_lines(stream) if _is_classic(head) else _unix_lines(stream)
        self._ahead: deque[str] = deque()
        self.number = 0  # of the last line that was taken
        self.marked = False  # whether any so far was not UTF-8

    def take(self) -> str | None:
        """The next line; None at the end."""
        line = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if line is not None:
            self.number += 1
            self.marked = self.marked or line.__class__ is NotUtf8
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Lines that were taken last, to be taken again."""
        self._ahead.extendleft(reversed(lines))
        self.number -= len(lines)

    def following(self, n: int) -> list[str]:
        """The next n lines; fewer at the end of the file."""
        self._ahead.extend(itertools.islice(self._lines, max(0, n - len(self._ahead))))
        return list(itertools.islice(self._ahead, n))

    def is_done(self) -> bool:
        return not self.following(1)

    def peek(self, characters: int) -> list[str]:
        """So much of what comes next, in whole lines; less at the end of the file."""
        held = sum(map(len, self._ahead))
        while held < characters and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
            held += len(line)
        return list(self._ahead)


def _unix_lines(stream: io.BufferedReader) -> Iterator[str]:
    """Lines that end with a newline, decoded many at a time, which is quicker."""

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


def _is_classic(head: bytes) -> bool:
    """Whether lines end as on the classic Mac, with a carriage return alone; quoted cells may hold
    other ends."""
    first = re.match(rb'(?:[^"\r\n]++|"[^"]*+")*+', head)
    assert first
    end = head[first.end() : first.end() + 2]
    return (len(end) == 2 and end[:1] == b"\r" and end != b"\r\n") or (
        b"\r" in head and b"\n" not in head
    )


def _classic_lines(stream: io.BufferedReader) -> Iterator[str]:
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
    """An object a line; or a list of objects, alone or as {"data": [...]}, which is held in memory
    whole.

    Raises UserError for a list that is not valid JSON.
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
                f"{path} is not valid JSON: {_said(error)}; mend it, or write one object a line"
            ) from None
        yield from ((f"line {n}", _object(line)) for n, line in enumerate(taken, 1) if line.strip())
        return
    if isinstance(items, dict):
        items = items["data"] if isinstance(items.get("data"), list) else [items]
    marked = any(isinstance(line, NotUtf8) for line in taken)
    for number, item in enumerate(items if isinstance(items, list) else [items], 1):
        cells = _marked(item) if marked and isinstance(item, dict) else item
        yield f"row {number}", cells if isinstance(cells, dict) else "is not a JSON object"


def _is_one_document(lines: Lines, named_lines: bool) -> bool:
    """Whether a file is one JSON document rather than an object a line, by its first two lines that
    hold something."""
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
        return True  # a list over several lines
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
    """The object of a line, or what is wrong with it."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        if isinstance(line, NotUtf8):
            return "is not UTF-8 text"
        return f"is not valid JSON: {_said(error)}"
    if not isinstance(item, dict):
        return "is not a JSON object"
    return _marked(item) if isinstance(line, NotUtf8) else item


def _marked(cells: dict[str, Any]) -> dict[str, Any]:
    """The cells, those with bytes that are not UTF-8 marked."""
    bad = {
        name for name, value in cells.items() if isinstance(value, str) and BAD_BYTE.search(value)
    }
    return (
        {name: NotUtf8(value) if name in bad else value for name, value in cells.items()}
        if bad
        else cells
    )


def _said(error: Exception) -> str:
    return (
        "it is nested too deep"
        if isinstance(error, RecursionError)
        else " ".join(str(error).split())
    )


# ---- tables

DELIMITERS = "\t,;|"
_NONE = "\U0010ffff"  # a character that stands in no text: the delimiter of a table of one column
_FEW, _MANY = 5, 10  # lines inside one cell that each look like a row, from which on they are rows
_NUMBER, _WORD = re.compile(r"[-+]?[\d.]+"), re.compile(r"\S{1,30}")
_JUDGED = 200  # rows of the sample that are split to choose between delimiters
_VOTES = 2000  # rows with quotes that tell whether these hold cells together
# the rest of a quoted cell and the quote that ends it
_INSIDE = re.compile(r'[^"]*+(?:""[^"]*+)*+(")?')

UNCLOSED = "has a quote that is not closed where its cell ends"


def read_table(
    stream: io.BufferedReader,
    path: Path | str,
    needed: Sequence[Sequence[str]] = (),
    check: Callable[[list[str]], None] | None = None,
) -> Iterator[Record]:
    """Rows of cells between the delimiter that the first line, the names of the columns, has most
    of.

    needed: for each column that is wanted, the names that it may have; they decide between two
    delimiters. check: is called with the names of the columns, and may raise. Raises UserError
    where the first line does not name columns.
    """
    lines = Lines(stream, path)
    if lines.is_done():
        return
    if isinstance(lines.following(1)[0], NotUtf8):
        raise not_utf8(f"{path} line 1", path)
    table = _Table(lines, *_dialect(lines, needed))
    header = table.header()
    if isinstance(header, str):
        raise UserError(f"{path} line 1 should name the columns, and {header}")
    names = list(map(str.strip, header))
    wanted = set(itertools.chain.from_iterable(needed))
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise UserError(f"{path} line 1 names the column {twice[0][:60]!r} twice; rename one")
    if check:
        check(names)
    places = {name: at for at, name in reversed(list(enumerate(names)))}
    places = {name: places[name] for name in names}
    for line, cells in table.rows(names):
        if isinstance(cells, str):
            yield f"line {line}", cells
        else:
            yield f"line {line}", {name: cells[at] for name, at in places.items()}


class _Table:
    """Splits lines into the cells of rows, as Python's csv module writes them."""

    def __init__(self, lines: Lines, delimiter: str, quoted: bool | None):
        self.lines, self.delimiter, self.quoted = lines, delimiter, quoted
        self.n: int | None = None  # cells of the header
        self.taken: list[str] = []  # the lines of the row
        self.odd = False  # whether the row has a quote inside a cell that is not quoted

    def opens(self, line: str) -> bool:
        """Whether a cell of this line begins with a quote."""
        return '"' in line and (line[0] == '"' or self.delimiter + '"' in line)

    def header(self) -> list[str] | str:
        """The first row that is not blank."""
        while (row := self.next()) is not None:
            if row:
                self.n = len(row)
                return row
        return "has nothing"

    def rows(self, names: list[str]) -> Iterator[tuple[int, list[str] | str]]:
        """The number of the first line of each row, and its cells, one a column, or what is wrong
        with it.

        After a row that is broken, or that runs over lines which are rows themselves, reading goes
        on in its second line: its quote has run on to some later one by then, over rows that are
        whole.
        """
        n = len(names)
        held: tuple[int, list[str], list[str]] | None = (
            None  # a row of several lines, until the next one is sound
        )
        while (cells := self.next()) is not None:
            line = self.lines.number - len(self.taken) + 1
            if not cells:
                continue  # a blank line
            if isinstance(cells, list) and len(cells) != n:
                cells = Torn(names, cells)
            elif isinstance(cells, list) and len(self.taken) > 1 and self.swallowed(n):
                cells = UNCLOSED
            if held:
                ahead = (
                    [*held[2], *self.taken, *self.lines.following(_JUDGED)]
                    if isinstance(cells, str)
                    else []
                )
                yield held[:2]
                if ahead and _reads_on(ahead, len(held[2]), self.delimiter, n):
                    # One of the two is broken and nothing tells which, so both readings are kept.
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
        """The cells of a line between tabs that is no row under quoting and is one without it; None
        for others.

        Only between tabs, since such files are mostly written without quoting; and only where the
        next line could be a row too, else the cell may go on there.
        """
        line, following = self.taken[0], self.lines.following(1)
        if self.delimiter != "\t" or not _looks_like_rows([line, *following], "\t", n):
            return None
        return self._mark(_without_end(line).split("\t"))

    def next(self) -> list[str] | str | None:
        line = self.lines.take()
        if line is None:
            return None
        self.taken, self.odd = [line], False
        if self.quoted is None and self.opens(line):
            self.quoted = _is_quoted([line, *self.lines.peek(SAMPLE)], self.delimiter, self.n)
        if self.quoted is False or '"' not in line:
            body = _without_end(line)
            return self._mark(body.split(self.delimiter)) if body else []
        cells = self._split(line)
        return cells if isinstance(cells, str) else self._mark(cells)

    def _mark(self, cells: list[str]) -> list[str]:
        if not self.lines.marked or not any(isinstance(line, NotUtf8) for line in self.taken):
            return cells
        return [NotUtf8(cell) if BAD_BYTE.search(cell) else cell for cell in cells]

    def _split(self, line: str) -> list[str] | str:
        """The cells of the row that begins with `line`, some of which are quoted; or what is wrong
        with it."""
        cells: list[str] = []
        at, held, take, taken = 0, len(line), self.lines.take, self.taken
        while True:
            if line.startswith('"', at):
                parts, begin = [], at + 1
                while not (end := _closed_at(line, begin) if '"' in line else 0):
                    parts.append(line[begin:] if begin else line)
                    following = take()
                    if following is None:
                        return UNCLOSED
                    taken.append(following)
                    line, begin, held = following, 0, held + len(following)
                    if held > SAMPLE * 4:
                        return UNCLOSED  # no cell is so long, and memory must stay flat
                body = _without_end(line)
                if end < len(body) and line[end] != self.delimiter:
                    return UNCLOSED
                cells.append("".join([*parts, line[begin : end - 1]]).replace('""', '"'))
            else:
                body = _without_end(line)
                end = body.find(self.delimiter, at)
                end = len(body) if end < 0 else end
                cells.append(body[at:end])
                self.odd |= '"' in cells[-1]
            if end >= len(body):
                return cells
            at = end + 1

    def swallowed(self, n: int) -> bool:
        """Whether a row of several lines is one line with a quote that means nothing, and then rows
        of their own."""
        inside = self.taken[1:]
        if (
            len(inside) >= _FEW
            and n > 1
            and _looks_like_rows(inside, self.delimiter, n)
            and self._alike(inside)
        ):
            return True
        return self.odd and _rows_of(inside, self.delimiter, n, even=True) == 1

    def _alike(self, inside: Sequence[str]) -> bool:
        """Whether some column of these lines has what the row has in it, beside the cell that holds
        the lines: numbers alone, or (which may be chance, so of many lines) single words."""
        first, last = (
            _without_end(line).split(self.delimiter) for line in (self.taken[0], self.taken[-1])
        )
        opened = max((at for at, cell in enumerate(first) if cell.startswith('"')), default=0)
        beside = dict(enumerate(first[:opened])) | dict(list(enumerate(last))[opened + 1 :])
        rows = [_without_end(line).split(self.delimiter) for line in inside]
        return any(
            len(inside) >= least and all(kind.fullmatch(cells[at]) for cells in [beside, *rows])
            for at in beside
            for kind, least in ((_NUMBER, _FEW), (_WORD, _MANY))
        )


def _closed_at(line: str, begin: int) -> int:
    """Where the quoted cell ends whose text goes on at `begin`, its quote included; 0 where it does
    not."""
    found = _INSIDE.match(line, begin)
    return found.end() if found and found[1] else 0


class _Given(Lines):
    """Lines that are there already."""

    def __init__(self, lines: Iterable[str]):
        self._lines, self._ahead, self.number, self.marked = iter(lines), deque(), 0, False


def _rows_of(
    lines: Sequence[str], delimiter: str, n: int, even: bool = False, quoted: bool | None = True
) -> float:
    """The share of the rows in these lines that have n cells; under `even` also none with a quote
    out of place."""
    table = _Table(_Given(lines), delimiter, quoted)
    right = rows = 0
    while rows < _JUDGED and (cells := table.next()) is not None:
        rows += bool(cells)
        right += isinstance(cells, list) and len(cells) == n and not (even and table.odd)
        if isinstance(cells, str):
            table.lines.give_back(table.taken[1:])
    return right / max(1, rows)


def _reads_on(lines: Sequence[str], at: int, delimiter: str, n: int) -> bool:
    """Whether line `at`, which begins no sound row, belongs to one if reading begins in the second
    line."""
    given = _Given(lines[1:])
    table = _Table(given, delimiter, True)
    while (cells := table.next()) is not None:
        right = isinstance(cells, list) and len(cells) == n and not table.odd
        if given.number >= at and right:
            return given.number - len(table.taken) < at - 1  # it began before
        if given.number - len(table.taken) + 1 >= at:
            return False
        if not right:
            given.give_back(table.taken[1:])
    return False


def _dialect(lines: Lines, needed: Sequence[Sequence[str]]) -> tuple[str, bool | None]:
    """The delimiter of a table, and whether quotes hold its cells together (None: no cell began
    with one so far)."""
    sample = lines.peek(SAMPLE)
    first = next((line for line in sample if _without_end(line)), "")
    ranked = []
    for delimiter in sorted(DELIMITERS, key=first.count, reverse=True):
        if delimiter not in first:
            continue
        quoted = _is_quoted(sample, delimiter)
        header = _Table(_Given(sample), delimiter, quoted).header()
        if isinstance(header, str) or len(header) < 2:
            continue
        names = set(map(str.strip, header))
        ranked.append((all(names & set(of) for of in needed), delimiter, quoted, len(header)))
    if len(ranked) > 1:
        rest = sample[1 : 1 + 4 * _JUDGED]
        ranked.sort(
            key=lambda one: (one[0], _rows_of(rest, one[1], one[3], quoted=one[2])), reverse=True
        )
    if ranked:
        return ranked[0][1:3]
    # No delimiter splits the first line: one column, or a quote in it that is never closed.
    delimiter = max(DELIMITERS, key=first.count)
    whole = _Table(_Given(sample), _NONE, True).header()
    if delimiter in first and not (first.startswith('"') and isinstance(whole, list)):
        return delimiter, _is_quoted(sample, delimiter)
    return _NONE, _is_quoted(sample, _NONE)


def _is_quoted(sample: list[str], delimiter: str, n: int | None = None) -> bool | None:
    """Whether quotes hold a table's cells together (RFC 4180), judged by the rows in which a cell
    begins with one.

    They do where such a row is mostly one of n cells only if they do (n: those of the first row,
    unless given). Where they mean nothing, as in MRPC, a cell that opens with a quotation mostly
    goes on after its end, and the line has n cells as it is. None where no cell begins with a
    quote.
    """
    table = _Table(_Given(sample), delimiter, True)
    if n is None:
        header = table.header()
        n = (
            len(header)
            if isinstance(header, list)
            else _without_end(sample[0]).count(delimiter) + 1
        )
        if isinstance(header, str):
            table = _Table(_Given(sample), delimiter, True)
    cut = sum(map(len, sample)) >= SAMPLE
    whole = plain = met = 0
    while whole + plain < _VOTES and (cells := table.next()) is not None:
        line, more = table.taken[0], table.taken[1:]
        opens = table.opens(line)
        met += opens
        if isinstance(cells, list) and len(cells) in (0, n) and not (more and table.swallowed(n)):
            whole += opens
            continue
        if opens and _looks_like_rows([line], delimiter, n):
            # A cell that the sample ends in is no sign, unless rows follow its first line.
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
    """Rows from `skip` on, a few hundred in memory at a time; of all columns, or of those named.

    Raises UserError where the file is damaged, wherever that shows.
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
            # one group at a time: over several, the library reads far ahead
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
    """Python's values of a column; text that is not UTF-8 is marked, what Python has no value for
    becomes text."""
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
            return b""  # inside a list: no text in any case
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
    """The rows of an open file from the record `skip` on, by its suffix; see the reader of each
    kind."""
    if suffix == ".parquet":
        return read_parquet(stream, path, check, columns, skip)
    records = (
        read_json(stream, path, suffix)
        if suffix in (".json", ".jsonl")
        else read_table(stream, path, needed, check)
    )
    return itertools.islice(records, skip, None)


def text_of(cells: dict[str, Any] | str, column: str) -> str | None:
    """The text of a row; None where it has none that can be read: `fault_of` says why. A missing
    value is no text."""
    value = cells.get(column, cells.get(column.strip(), b"")) if isinstance(cells, dict) else b""
    if value is None:
        return ""
    return value if isinstance(value, str) and not isinstance(value, NotUtf8) else None


def fault_of(cells: dict[str, Any] | str, column: str, path: Path | str) -> str:
    """Why a row has no text in the column, and what to type."""
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
    """What is wrong with a row and, where its bytes are not UTF-8, what to type."""
    bad = (
        next((v for v in cells.values() if isinstance(v, NotUtf8)), "")
        if isinstance(cells, dict)
        else ""
    )
    if not fault.startswith("is not UTF-8 text") or not (bad or isinstance(cells, str)):
        return fault
    head = b""
    with contextlib.suppress(UserError), opened(Path(path)) as (_, stream):
        head = stream.peek(HEAD)[:HEAD]
    if head[:4] == b"PAR1":
        return f"{fault}; mend or remove it"
    return f"{fault}; {convert(path, head + b' ' + bad.encode('utf-8', 'surrogateescape'))}"


def no_column(where: str, column: str, found: Sequence[str]) -> str:
    """What is wrong with a row or a file that lacks a column, and what to type."""
    names = ", ".join(found) or "none"
    return (
        f"{where} has no column {column!r}{nearest(column, found)}; it has: {names}. Use "
        "--text-column NAME"
    )
