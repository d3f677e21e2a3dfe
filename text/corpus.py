"""Documents to tokens: text files or a hub dataset, read in a fixed order, tokenized by several
processes.

Results come back in the order of the input, so what is written never depends on the number of
processes; the price is that one slow chunk holds back those behind it, up to a small bound that
keeps memory flat.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import io
import itertools
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import tokenize as python_source
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from base.errors import reason
from config import UserError
from storage.shards import token_dtype
from text import readers
from text.readers import SHOWN, LeftOut
from text.row import Record

CHUNK_CHARS = 1 << 20  # what one process tokenizes at a time
PATIENCE = 5.0  # seconds for a tokenizing process to end
IN_FLIGHT = 4  # chunks between reading and writing, for each process

# text, and whether it begins a document (or goes on with the one before)
Segment = tuple[str, bool]


class Encoder(Protocol):
    """What of a tokenizer is needed here."""

    vocab_size: int
    eot: int
    num_threads: int | None

    def encode(self, text: str) -> list[int]: ...


# ---- files to documents


def _read_txt(stream: io.BufferedReader, path: Path, errors: str = "strict") -> Iterator[Segment]:
    """Documents between separator lines; one longer than a chunk comes in pieces. The last newline
    is the separator's.

    errors: "surrogateescape" lets single bytes pass that are not UTF-8, but no text of another
    encoding.
    """
    sound = errors == "strict"
    try:
        for text, starts, ends in readers.documents(
            readers.text_stream(stream, path, errors), CHUNK_CHARS
        ):
            if not sound and readers.BAD_BYTE.search(text):
                if readers.encoding_of(readers.sample_of(path)):
                    raise readers.not_utf8(str(path), path)
                sound = True
            yield (text[:-1].removesuffix("\r") if ends and text.endswith("\n") else text), starts
    except UnicodeDecodeError:
        raise readers.not_utf8(str(path), path) from None


def _read_python(stream: io.BufferedReader, path: Path, errors: str) -> Iterator[Segment]:
    """A source file is one document, in the encoding that it declares."""
    data = stream.read()
    try:
        encoding, _ = python_source.detect_encoding(io.BytesIO(data).readline)
        yield data.decode(encoding), True
    except (UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{path} is not Python in the encoding that it declares: {error}") from None


# None: a file of rows
_READERS: dict[str, Callable[..., Iterator[Segment]] | None] = {
    ".txt": _read_txt,
    ".py": _read_python,
} | dict.fromkeys(readers.ROW_SUFFIXES)
# of the files that a folder is searched for
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


def suffix_of(path: Path) -> str:
    """`.jsonl` for both a.jsonl and a.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


# Names that a system or an editor gives to files of its own: .ipynb_checkpoints, ._a.txt, #a.txt#,
# a.txt~.
_HIDDEN = re.compile(
    r"\..*|~\$.*|.*~|#.*#|__MACOSX|\$RECYCLE\.BIN|System Volume Information|lost\+found"
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is left out wherever nobody named it."""
    return bool(_HIDDEN.fullmatch(name))


def named_files(spec: str, suffixes: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    """Each item of a comma-separated `spec` with the files it names: a file, a glob's, or those in
    and below a folder with one of the suffixes.

    Hidden files and folders count only where the item names them. Raises UserError for a folder
    that cannot be listed, and for a link in it that leads nowhere.
    """
    for item in _items(spec):
        path = os.path.expanduser(item)
        if os.path.isdir(path):
            files = sorted(p for p in _walk(path) if suffix_of(p) in suffixes)
        else:
            files = [Path(path)] if os.path.isfile(path) else sorted(_glob(path))
        for file in files:
            if file.is_symlink() and not os.path.exists(file):
                raise UserError(
                    f"{file} is a link to a file that is not there; mend or remove the link"
                )
        yield item, [file for file in files if os.path.isfile(file)]


def _items(spec: str) -> list[str]:
    """The items of `spec`; a path that exists is one item, commas or not."""
    whole = os.path.exists(os.path.expanduser(spec))
    return [spec] if whole else list(filter(None, map(str.strip, spec.split(","))))


def _walk(folder: str, pattern: Sequence[str] = ()) -> Iterator[Path]:
    """All in and below a folder but its folders, links followed, each folder once. Hidden names are
    left out unless a hidden part of the `pattern` matches them."""
    top, seen = os.path.realpath(folder), set[str]()
    waiting, links = [folder], list[str]()
    while waiting or links:
        # a folder counts under its own name rather than a link's
        at = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(at)
        if real in seen or _is_below(top, real):
            continue  # a link that leads back, or up
        seen.add(real)
        try:
            names = sorted(os.listdir(at), reverse=True)
        except OSError as error:
            raise UserError(
                f"{at} cannot be listed: {error.strerror}; name its files, or leave it out"
            ) from None
        for path in (os.path.join(at, name) for name in names if _is_meant(name, pattern)):
            if os.path.isdir(path):
                (links if os.path.islink(path) else waiting).append(path)
            else:
                yield Path(path)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_meant(name: str, pattern: Sequence[str]) -> bool:
    named = any(fnmatch.fnmatchcase(name, part) for part in pattern if is_hidden(part))
    return named or not is_hidden(name)


def _glob(pattern: str) -> Iterator[Path]:
    """What matches a pattern. glob's own ** would follow links in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        for path in map(Path, glob.iglob(pattern)):
            if all(_is_meant(part, parts) for part in path.parts):
                yield path
        return
    head, tail = parts[: parts.index("**")], parts[parts.index("**") :]
    for folder in _glob(str(Path(*head))) if head else [Path()]:
        if folder.is_dir():
            below = _walk(str(folder), tail)
            yield from (path for path in below if _matches(path.relative_to(folder).parts, tail))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def unknown_kind(path: Path, known: Sequence[str]) -> str:
    """What is wrong with a file whose name does not say how to read it, and what to type."""
    if readers.is_gzip(path):
        return (
            f"{path} is gzip, and its name does not say what is in it; give it a name that does, "
            f"such as {path.name.removesuffix('.gz')}{known[0]}.gz"
        )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if kind := readers.other_kind(file.read(readers.HEAD)):
            return f"{path} is {kind}"
    return f"{path} is none of {' '.join(known)} (or these with .gz)"


def file_id(path: Path) -> object:
    """Equal for two names of one file: links, hard links, other spellings of its path."""
    stat = path.stat()
    linked = stat.st_nlink > 1 and stat.st_ino  # some file systems number no files
    return (stat.st_dev, stat.st_ino) if linked else os.path.realpath(path)


def words_of(name: str) -> list[str]:
    """The words of a file's name in lower case: val and fineweb of fineweb_val_000000.bin, medieval
    of medieval.npy."""
    return re.findall(r"[^\W\d_]+", name.lower())


def find_files(spec: str) -> list[Path]:
    """The text files that `spec` names: files, folders and globs, separated by commas; in order,
    each once."""
    found: dict[object, Path] = {}
    for item, matches in named_files(spec, TEXT_SUFFIXES):
        if not matches:
            raise UserError(no_such_data(item))
        for path in matches:
            if suffix_of(path) in (".bin", ".npy"):
                raise UserError(f"{path} is a token shard: give its folder, or this file alone")
            if suffix_of(path) not in _READERS:
                raise UserError(unknown_kind(path, TEXT_SUFFIXES))
            found.setdefault(file_id(path), path)
    if not found:
        raise UserError(
            f"no data is named in {spec!r}; give text files or a folder of token shards"
        )
    return list(found.values())


def no_such_data(item: str) -> str:
    """What is wrong and what to type where `item` does not exist."""
    path = Path(item).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):
        return f"{item} is neither a file nor a folder; give text files or a folder of token shards"
    if path.suffix or any(sign in item for sign in "*?["):
        return (
            f"no such data: {item}; give text files or a folder of token shards, or type "
            "--data stdlib"
        )
    holds = f"{item} holds no token shards (.bin .npy) and no text"
    found = holds if os.path.isdir(path) else f"no such data: {item}"
    command = f"python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --out {item}"
    return f"{found}; prepare it with `{command}`, or type --data stdlib"


def no_hub_data(what: str, error: Exception) -> UserError:
    """What was asked of the hub, what it said, and what to type."""
    return UserError(
        f"cannot get {what} from the hub: {reason(error, whole=True)}; check the name and the "
        "network, or use text files of your own"
    )


def is_hub_id(spec: str) -> bool:
    """Whether a name that is no path looks like `org/name` or `org/name:config` on the hub, not
    like a lost file."""
    owner = spec.partition("/")[0]
    lost = (
        owner == "data"
        or os.path.isdir(owner)
        or suffix_of(Path(spec)) in (*_READERS, ".bin", ".npy")
    )
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", spec)) and not lost


def stdlib_files() -> list[Path]:
    """The source of the running Python's standard library: about 10 MB, the same for one version of
    Python.

    Left out: what is not the library (site-packages), its tests, which not every Python is shipped
    with, and tables of characters, which are no text to learn from.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
        "encodings",
    }
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [
            name
            for name in names
            if name not in outside and not name.startswith("config-") and not is_hidden(name)
        ]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not is_hidden(name)
        ]
    if not found:
        raise UserError(
            f"the source of Python's standard library is not in {root}; give --data text files "
            "instead"
        )
    return sorted(found)


# ---- sources: what can be read from any place on


class Source(Protocol):
    """Documents in a fixed order. `state` is JSON: given to `segments`, reading goes on from
    there."""

    total: int | None  # bytes, where known

    @property
    def position(self) -> int: ...  # bytes read so far

    def segments(self, state: Any = None) -> Iterator[Segment]: ...

    def state(self) -> Any: ...


class TextFiles:
    """Documents of text files, in the order given. Its state is [file, records read of it, broken
    ones too]."""

    def __init__(
        self,
        files: Sequence[Path],
        column: str = "text",
        say: Callable[[str], None] = print,
        errors: str = "strict",
    ):
        """say: is told of the rows that cannot be read and are left out. errors: of the bytes of a
        .txt file."""
        self.files, self.column, self.say, self.errors = list(files), column, say, errors
        self.sizes = [path.stat().st_size for path in self.files]
        self.total: int | None = sum(self.sizes)
        self._at = [0, 0]
        self._raw: IO[bytes] | None = None

    @property
    def position(self) -> int:
        inside = self._raw.tell() if self._raw and not self._raw.closed else 0
        return sum(self.sizes[: self._at[0]]) + inside

    def state(self) -> list[int]:
        return list(self._at)

    def segments(self, state: Any = None) -> Iterator[Segment]:
        """Raises UserError for a file that is damaged, is not UTF-8 or lacks the column; and where
        all rows are broken."""
        first, skip = state or (0, 0)
        rows = _Rows(self.column, self.say)
        rows.found = bool(first or skip)
        for index in range(first, len(self.files)):
            self._at = [index, skip]
            for segment in self._read(self.files[index], skip, rows):
                self._at[1] += 1
                if segment:
                    yield segment
            rows.tell()
            skip = 0
        self._at = [len(self.files), 0]
        rows.close(", ".join(map(str, self.files[:2])) + (", ..." if len(self.files) > 2 else ""))

    def _read(self, path: Path, skip: int, rows: _Rows) -> Iterator[Segment | None]:
        suffix = suffix_of(path)
        reader = _READERS.get(suffix, _read_txt)
        with readers.opened(path) as (self._raw, stream):
            if reader:
                yield from itertools.islice(reader(stream, path, self.errors), skip, None)
                return

            def check(names: list[str]) -> None:
                if self.column not in names and self.column.strip() not in names:
                    raise UserError(readers.no_column(str(path), self.column, names))

            rows.waits = stream is not self._raw
            records = readers.read_records(
                stream, path, suffix, [(self.column,)], check, [self.column], skip
            )
            for place, cells in records:
                yield rows.segment(f"{path} {place}", cells, path)


class _Rows:
    """Rows to documents: those that cannot be read are named, counted and left out."""

    GIVE_UP = 10_000  # broken rows at the beginning, after which no sound one is looked for

    def __init__(self, column: str, say: Callable[[str], None]):
        self.column, self.say = column, say
        self.found = False  # whether there was any sound one
        self.waits = (
            False  # whether damage may show later in the file, which would explain the broken rows
        )
        self.left_out = LeftOut()
        self._told = 0

    def segment(self, where: str, cells: dict[str, Any] | str, name: Path | str) -> Segment | None:
        """The document of a row; None for a broken one."""
        text = readers.text_of(cells, self.column)
        if text is not None:
            self.found = True
            return text, True
        shown = self.left_out.count < SHOWN
        self.left_out.add(f"{where} {readers.fault_of(cells, self.column, name)}" if shown else "")
        if not self.waits:
            self.tell()
        if not self.found and self.left_out.count == self.GIVE_UP:
            self.close(str(name))
        return None

    def tell(self) -> None:
        """Name those that were not named yet, once there is a sound row beside them."""
        for line in self.left_out.shown[self._told :] if self.found else ():
            self.say(f"left out: {line}")
            self._told += 1

    def close(self, what: str) -> None:
        """Tell how many were left out. Raises UserError where there was nothing else."""
        if self.left_out.count and not self.found:
            raise UserError(f"{what} holds no row that can be read: {self.left_out.shown[0]}")
        self.tell()
        if more := self.left_out.more(what):
            self.say(more)


def records_of(path: Path, otherwise: str = "") -> Iterator[Record]:
    """The rows of a file, with all of their columns; a .txt file is a table.

    otherwise: the suffix of a file whose own tells nothing. Raises UserError as the readers do.
    """
    suffix = suffix_of(path)
    if otherwise and suffix not in readers.ROW_SUFFIXES:
        suffix = otherwise
    if suffix not in (*readers.ROW_SUFFIXES, ".txt"):
        raise UserError(unknown_kind(path, readers.ROW_SUFFIXES))
    with readers.opened(path) as (_, stream):
        yield from readers.read_records(stream, path, suffix)


class HubDataset:
    """Rows of a dataset on the hub, streamed. Its state is that of the `datasets` library."""

    total: int | None = None

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        say: Callable[[str], None] = print,
    ):
        """Raises UserError where the hub has no such dataset, or is out of reach."""
        import datasets
        import huggingface_hub

        self.name, self.column, self.say = name, column, say
        self.position = 0
        self.what = f"{name}{f':{config}' if config else ''} ({split})"
        try:
            # asked first because the library below retries for half a minute before it gives up
            self.revision = revision or huggingface_hub.dataset_info(name, timeout=10).sha
            self.rows: Any = datasets.load_dataset(
                name, config, split=split, revision=self.revision, streaming=True
            )
        except Exception as error:
            # whatever HTTP client the library has today; the line says what it said
            raise no_hub_data(self.what, error) from None

    def state(self) -> Any:
        return self.rows.state_dict()

    def records(self) -> Iterator[Record]:
        """Rows from the state on. Raises UserError where the hub, or the network, gives no more."""
        try:
            for number, row in enumerate(self.rows, 1):
                yield f"row {number}", row
        except Exception as error:
            # as above, and whatever a damaged file on the hub makes the library raise
            raise no_hub_data(self.what, error) from None

    def segments(self, state: Any = None) -> Iterator[Segment]:
        if state is not None:
            self.rows.load_state_dict(state)
        rows = _Rows(self.column, self.say)
        rows.found = state is not None
        for place, row in self.records():
            if segment := rows.segment(f"{self.name} {place}", row, self.name):
                self.position += len(segment[0])
                yield segment
        rows.close(self.name)


def open_text(
    spec: str, column: str = "text", say: Callable[[str], None] = print, config: str | None = None
) -> Source:
    """Whatever text `spec` names: files, folders and globs, a dataset on the hub, or `stdlib`."""
    path = Path(spec).expanduser()
    if spec == "stdlib" and not path.exists():
        return TextFiles(stdlib_files(), column, say)
    if not path.exists() and is_hub_id(spec):
        name, _, config = spec.partition(":")
        return HubDataset(name, config or None, column=column, say=say)
    return TextFiles(find_files(spec), column, say)


# ---- documents to tokens


@dataclass(frozen=True)
class Chunk:
    """Some segments to tokenize together."""

    texts: list[str]
    starts: list[bool]
    empty: int  # documents without text, left out
    state: Any  # of the source, before the first of these
    position: int  # of the source, after the last of these


def chunks(source: Source, state: Any = None) -> Iterator[Chunk]:
    """Group what `source` holds from `state` on; documents without text are left out and
    counted."""
    texts, starts, empty, size, at = [], [], 0, 0, state if state is not None else source.state()
    for text, start in source.segments(state):
        if text.strip():
            texts.append(text)
            starts.append(start)
            size += len(text)
        else:
            empty += start
        if size >= CHUNK_CHARS:
            yield Chunk(texts, starts, empty, at, source.position)
            texts, starts, empty, size, at = [], [], 0, 0, source.state()
    if texts or empty:
        yield Chunk(texts, starts, empty, at, source.position)


def encode(
    tokenizer: Encoder, texts: list[str], starts: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts in one array, with end-of-text before each that begins a document; and
    the length of each."""
    # not encode_batch, whose threads the processes stand for
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) + start for row, start in zip(ids, starts, strict=True)], np.int64)
    tokens = np.full(lengths.sum(), tokenizer.eot, token_dtype(tokenizer.vocab_size))
    for row, end in zip(ids, np.cumsum(lengths), strict=True):
        tokens[end - len(row) : end] = row
    return tokens, lengths


def tokenize(
    source: Iterator[Chunk], tokenizer: Encoder, workers: int
) -> Generator[tuple[Chunk, np.ndarray, np.ndarray]]:
    """Chunks in their order, each with what `encode` makes of it, from `workers` processes (1: in
    this one).

    At most IN_FLIGHT * workers chunks are held at any time.
    """
    if workers <= 1:
        for chunk in source:
            yield chunk, *encode(tokenizer, chunk.texts, chunk.starts)
        return
    with _Encoders(tokenizer, workers) as encoders:
        numbered = enumerate(source)
        held: dict[int, Chunk] = {}  # read and not yet given back
        unsent: deque[tuple[int, Chunk]] = deque()
        done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number in itertools.count():
            while number not in done:
                # one chunk for each process is read ahead, so that none waits for the disk
                room = len(held) < IN_FLIGHT * workers and len(unsent) < workers
                if read := next(numbered, None) if room else None:
                    unsent.append(read)
                    held[read[0]] = read[1]
                elif not held:
                    return
                done.update(encoders.receive(block=read is None))
                while encoders.idle and unsent:
                    encoders.send(*unsent.popleft())
            yield held.pop(number), *done.pop(number)


class _Encoders:
    """Processes that tokenize, each with one chunk at a time. They end when this one does, however
    it ends."""

    def __init__(self, tokenizer: Encoder, n: int):
        # Forking is quick, but unsafe beside other threads; elsewhere a fresh interpreter imports
        # the tokenizer.
        fork = sys.platform == "linux" and threading.active_count() == 1
        context = (
            multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
        )
        self.idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        self._processes = []
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, ours, tokenizer), daemon=True)
            process.start()
            theirs.close()  # so that the death of either side is the end of the other's file
            self._processes.append(process)
            self.idle.append(ours)

    def __enter__(self) -> _Encoders:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(PATIENCE)
            if process.is_alive():  # it was forked in a state in which it handles no signal
                process.kill()
                process.join()
        for connection in [*self.idle, *self._busy]:
            connection.close()

    def send(self, number: int, chunk: Chunk) -> None:
        connection = self.idle.pop()
        self._busy[connection] = number
        try:
            connection.send((chunk.texts, chunk.starts))
        except OSError:
            raise _died() from None

    def receive(self, block: bool) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """The results that are there; with `block`, at least one. Raises RuntimeError where a
        process failed."""
        for connection in wait(list(self._busy), None if block else 0):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError):
                raise _died() from None
            if isinstance(result, str):
                raise RuntimeError(f"a tokenizing process failed:\n{result}")
            number = self._busy.pop(connection)
            self.idle.append(connection)
            yield number, result


def _died() -> RuntimeError:
    return RuntimeError("a tokenizing process died; was memory short?")


def _serve(connection: Connection, parents: Connection, tokenizer: Encoder) -> None:
    """The life of a tokenizing process. Ctrl-C reaches the whole group: the parent is the one to
    act on it."""
    parents.close()  # a fork holds the other end too, and would never see it close
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.num_threads = 1
    with contextlib.suppress(EOFError, OSError):  # the parent has gone
        while True:
            texts, starts = connection.recv()
            try:
                result: Any = encode(tokenizer, texts, starts)
            except Exception:
                result = traceback.format_exc()
            connection.send(result)


class Progress:
    """A bar with MB/s and the time left on a terminal; a plain line every few seconds elsewhere."""

    EVERY = 5.0  # seconds between plain lines

    def __init__(self, label: str, total: int | None, say: Callable[[str], None]):
        self.label, self.total, self.say = label, total, say
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = (
            None  # position and time of the first update: a resumed run's rate
        )
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            # no refreshing thread: it would forbid the quick fork of the tokenizing processes
            self._bar = Bar(
                *columns, console=Console(stderr=True), auto_refresh=False, transient=True
            )
            self._bar.start()
            self._bar.add_task(self.label, total=self.total, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, position: int, tokens: int) -> None:
        """`position`: bytes of input done; `tokens`: written so far."""
        figures = self._figures(position, tokens)
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=position, figures=figures, refresh=True
            )
        elif time.monotonic() - self._said >= self.EVERY:
            self._said = time.monotonic()
            share = f"{position / self.total:4.0%} " if self.total else ""
            self.say(f"{self.label}: {share}{figures}")

    def _figures(self, position: int, tokens: int) -> str:
        now = time.monotonic()
        self._first = self._first or (position, now)
        rate = (position - self._first[0]) / max(1e-9, now - self._first[1])
        figures = f"{position / 1e6:,.0f} MB, {tokens / 1e6:,.1f}M tokens"
        figures += f", {rate / 1e6:.1f} MB/s" if rate else ""
        if self.total and rate:
            minutes, seconds = divmod(round(max(0, self.total - position) / rate), 60)
            figures += f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        return figures
