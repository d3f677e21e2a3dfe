"""Reads documents from text files or a hub dataset, and tokenizes them with several processes.

Documents are read in a fixed order, and results come back in that order. The output therefore never
depends on the number of processes. The price is that one slow chunk delays those behind it. At most
CHUNKS_PER_WORKER chunks per process wait, so memory use is bounded.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
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
from base.files import sha256
from base.sources import specs_of
from config import UserError
from storage.shards import token_dtype
from text import encodings, readers
from text.readers import MAX_SHOWN, SkippedRows
from text.row import Record

CHUNK_CHARS = 1 << 20  # characters that one process tokenizes at a time
JOIN_TIMEOUT = 5.0  # seconds that a tokenizing process has to end after SIGTERM
CHUNKS_PER_WORKER = 4  # chunks in memory between reading and writing, for each process

# A text, and whether it begins a document. False: it continues the one before.
Segment = tuple[str, bool]


class Encoder(Protocol):
    """The part of a tokenizer that is used here."""

    vocab_size: int
    eot: int
    num_threads: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-text token."""
        ...


# ---- files to documents


def _read_txt(stream: io.BufferedReader, path: Path, errors: str = "strict") -> Iterator[Segment]:
    """Documents between separator lines. One that is longer than a chunk comes in pieces.

    The newline before a separator is removed. errors: "surrogateescape" keeps single bytes that are
    not UTF-8. A text that seems to be in another encoding raises UserError in any case.
    """
    checked = errors == "strict"
    try:
        with encodings.text_stream(stream, path, errors) as decoded:
            for text, starts, ends in readers.split_documents(decoded, CHUNK_CHARS):
                if not checked and encodings.BAD_BYTE.search(text):
                    if encodings.encoding_of(encodings.encoding_sample(path)):
                        raise encodings.not_utf8(str(path), path)
                    checked = True
                cut = ends and text.endswith("\n")
                yield (text[:-1].removesuffix("\r") if cut else text), starts
    except UnicodeDecodeError:
        raise encodings.not_utf8(str(path), path) from None


def _read_python(stream: io.BufferedReader, path: Path, errors: str) -> Iterator[Segment]:
    """A Python file as one document, decoded with the encoding that it declares."""
    data = stream.read()
    try:
        encoding, _ = python_source.detect_encoding(io.BytesIO(data).readline)
        yield data.decode(encoding), True
    except (UnicodeDecodeError, SyntaxError) as error:
        raise UserError(f"{path} is not Python in the encoding that it declares: {error}") from None


# By suffix. None: a file of rows, which text/readers.py reads.
_READERS: dict[str, Callable[..., Iterator[Segment]] | None] = {
    ".txt": _read_txt,
    ".py": _read_python,
} | dict.fromkeys(readers.ROW_SUFFIXES)
# Suffixes of the files that are picked from a folder.
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without .gz: `.jsonl` for both a.jsonl and a.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


# Names that systems and editors give to their own files: .ipynb_checkpoints, ._a.txt, #a.txt#,
# a.txt~.
_HIDDEN = re.compile(
    r"\..*|~\$.*|.*~|#.*#|__MACOSX|\$RECYCLE\.BIN|System Volume Information|lost\+found"
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped unless the user names it."""
    return bool(_HIDDEN.fullmatch(name))


def named_files(spec: str, suffixes: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    """Each item of a comma-separated `spec`, with the files that it names.

    An item is a file, a glob or a folder. A folder names all files in and below it that have one of
    the suffixes. Hidden files and folders are skipped unless the item names them. Raises UserError
    for a folder that cannot be listed, and for a broken link.
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
                    f"{file} is a link to a file that is not there; repair or remove the link"
                )
        yield item, [file for file in files if os.path.isfile(file)]


def _items(spec: str) -> list[str]:
    """The comma-separated items of `spec`. A path that exists is one item, even with commas."""
    whole = os.path.exists(os.path.expanduser(spec))
    return [spec] if whole else list(filter(None, map(str.strip, spec.split(","))))


def _walk(folder: str, pattern: Sequence[str] = ()) -> Iterator[Path]:
    """All files in and below a folder. Links are followed, and each folder is visited once.

    Hidden names are skipped unless a hidden part of the `pattern` matches them.
    """
    top, seen = os.path.realpath(folder), set[str]()
    waiting, links = [folder], list[str]()
    while waiting or links:
        # links come last, so that a folder is found under its own name rather than a link's
        current = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(current)
        if real in seen or _is_below(top, real):
            continue  # a link to a folder that was visited, or to one above
        seen.add(real)
        try:
            names = sorted(os.listdir(current), reverse=True)
        except OSError as error:
            raise UserError(
                f"{current} cannot be listed: {error.strerror}; name its files, or leave it out"
            ) from None
        for path in (os.path.join(current, name) for name in names if _is_included(name, pattern)):
            if os.path.isdir(path):
                (links if os.path.islink(path) else waiting).append(path)
            else:
                yield Path(path)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_included(name: str, pattern: Sequence[str]) -> bool:
    named = any(fnmatch.fnmatchcase(name, part) for part in pattern if is_hidden(part))
    return named or not is_hidden(name)


def _glob(pattern: str) -> Iterator[Path]:
    """The files that match a glob. `**` is expanded here because glob's own follows link cycles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        for path in map(Path, glob.iglob(pattern)):
            if all(_is_included(part, parts) for part in path.parts):
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
    """The error for a file whose suffix is not one of `known`, and what to type."""
    if encodings.is_gzip(path):
        return (
            f"{path} is gzip, and its name does not say what is in it; rename it, for example to "
            f"{path.name.removesuffix('.gz')}{known[0]}.gz"
        )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if kind := encodings.other_kind(file.read(encodings.HEAD)):
            return f"{path} is {kind}"
    return (
        f"{path} has none of the suffixes {' '.join(known)} (or these with .gz); convert or rename "
        "it"
    )


def file_id(path: Path) -> object:
    """A value that is equal for two names of one file: links, hard links, spellings of its path."""
    stat = path.stat()
    linked = stat.st_nlink > 1 and stat.st_ino  # some file systems have no inode numbers
    return (stat.st_dev, stat.st_ino) if linked else os.path.realpath(path)


def words_in_name(name: str) -> list[str]:
    """The words in a file's name, in lower case: fineweb and val in fineweb_val_000000.bin.

    medieval.npy has the one word medieval, and so does not count as validation.
    """
    return re.findall(r"[^\W\d_]+", name.lower())


def find_files(spec: str) -> list[Path]:
    """The text files that a comma-separated `spec` names, in order, each file once.

    Items are files, folders and globs. Raises UserError for an item without text, for token shards,
    and for a file of an unknown kind.
    """
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
    """The error for an item of --data that does not exist or holds no data, and what to type."""
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
    """The error for a failed request to the hub: what was asked, the hub's answer, what to type."""
    return UserError(
        f"cannot get {what} from the hub: {reason(error, whole=True)}; check the name and the "
        "network, or use text files of your own"
    )


def is_hub_id(spec: str) -> bool:
    """Whether a name that is no path looks like `org/name` or `org/name:config` on the hub.

    A name that looks like a missing file does not count: one in data/ or in a folder that exists,
    or one with the suffix of a data file.
    """
    owner = spec.partition("/")[0]
    lost = (
        owner == "data"
        or os.path.isdir(owner)
        or suffix_of(Path(spec)) in (*_READERS, ".bin", ".npy")
    )
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", spec)) and not lost


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, about 10 MB.

    Two machines with the same version of Python have the same files. Three kinds are skipped:
    site-packages, the library's tests, which some distributions do not ship, and its tables of
    characters, which are no useful text.
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
            f"the source of Python's standard library is not in {root}; give text files with "
            "--data instead"
        )
    return sorted(found)


# ---- sources, which can resume at any document


class Source(Protocol):
    """Documents in a fixed order, which can be read from any of them on."""

    total: int | None  # size in bytes, or None if it is not known

    @property
    def position(self) -> int:
        """Bytes read so far."""
        ...

    def segments(self, state: Any = None) -> Iterator[Segment]:
        """The documents from `state` on, in pieces. None: from the first one on."""
        ...

    def state(self) -> Any:
        """The current place, as JSON. `segments` takes it to resume reading there."""
        ...


class TextFiles:
    """Documents of text files, in the given order.

    Its state is [index of the file, records read of it]. Broken records count too.
    """

    def __init__(
        self,
        files: Sequence[Path],
        column: str = "text",
        say: Callable[[str], None] = print,
        errors: str = "strict",
    ):
        """say: is called with a line for each row that is left out because it cannot be read.

        errors: how a .txt file is decoded, "strict" or "surrogateescape".
        """
        self.files, self.column, self.say, self.errors = list(files), column, say, errors
        self.sizes = [path.stat().st_size for path in self.files]
        self.total: int | None = sum(self.sizes)
        self._state = [0, 0]
        self._raw: IO[bytes] | None = None

    @property
    def position(self) -> int:
        """Bytes read so far, compressed ones for a file that is compressed."""
        inside = self._raw.tell() if self._raw and not self._raw.closed else 0
        return sum(self.sizes[: self._state[0]]) + inside

    def state(self) -> list[int]:
        """The current place: [index of the file, records read of it]."""
        return list(self._state)

    def segments(self, state: Any = None) -> Iterator[Segment]:
        """The documents from `state` on.

        Raises UserError for a file that is damaged, is not UTF-8 or has no such column, and if all
        rows are broken.
        """
        first, skip = state or (0, 0)
        rows = _RowDocuments(self.column, self.say)
        rows.found = bool(first or skip)
        for index in range(first, len(self.files)):
            self._state = [index, skip]
            for segment in self._read(self.files[index], skip, rows):
                self._state[1] += 1
                if segment:
                    yield segment
            rows.tell()
            skip = 0
        self._state = [len(self.files), 0]
        rows.close(", ".join(map(str, self.files[:2])) + (", ..." if len(self.files) > 2 else ""))

    def _read(self, path: Path, skip: int, rows: _RowDocuments) -> Iterator[Segment | None]:
        suffix = suffix_of(path)
        reader = _READERS.get(suffix, _read_txt)
        with encodings.open_decompressed(path) as (self._raw, stream):
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


class _RowDocuments:
    """Turns rows into documents. Rows that cannot be read are named, counted and left out."""

    # After this many broken rows at the beginning, the file is given up.
    MAX_BROKEN_START = 10_000

    def __init__(self, column: str, say: Callable[[str], None]):
        self.column, self.say = column, say
        self.found = False  # whether any row could be read
        # Whether the broken rows are named only at the end of the file: a compressed file may turn
        # out to be damaged, and that error explains them better.
        self.waits = False
        self.left_out = SkippedRows()
        self._named = 0  # rows of left_out.shown that were printed

    def segment(self, where: str, cells: dict[str, Any] | str, name: Path | str) -> Segment | None:
        """The document of a row; None for a broken row."""
        text = readers.text_of(cells, self.column)
        if text is not None:
            self.found = True
            return text, True
        shown = self.left_out.count < MAX_SHOWN
        self.left_out.add(f"{where} {readers.fault_of(cells, self.column, name)}" if shown else "")
        if not self.waits:
            self.tell()
        if not self.found and self.left_out.count == self.MAX_BROKEN_START:
            self.close(str(name))
        return None

    def tell(self) -> None:
        """Print the broken rows that were not printed yet, once any row could be read.

        Until then they wait, because `close` may raise one error for all of them.
        """
        for line in self.left_out.shown[self._named :] if self.found else ():
            self.say(f"left out: {line}")
            self._named += 1

    def close(self, what: str) -> None:
        """Print how many more were left out. Raises UserError if no row could be read."""
        if self.left_out.count and not self.found:
            raise UserError(f"{what} holds no row that can be read: {self.left_out.shown[0]}")
        self.tell()
        if more := self.left_out.more(what):
            self.say(more)


def records_of(path: Path, otherwise: str = "") -> Iterator[Record]:
    """The rows of a file, with all columns. A .txt file is read as a table.

    otherwise: the suffix to assume for a file with an unknown one. Raises UserError for an unknown
    kind of file, and as the readers do.
    """
    suffix = suffix_of(path)
    if otherwise and suffix not in readers.ROW_SUFFIXES:
        suffix = otherwise
    if suffix not in (*readers.ROW_SUFFIXES, ".txt"):
        raise UserError(unknown_kind(path, readers.ROW_SUFFIXES))
    with encodings.open_decompressed(path) as (_, stream):
        yield from readers.read_records(stream, path, suffix)


class HubDataset:
    """Rows of a dataset on the hub, streamed. The `datasets` library defines its state."""

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
        """Raises UserError if the hub has no such dataset or cannot be reached."""
        import datasets
        import huggingface_hub

        self.name, self.column, self.say = name, column, say
        self.position = 0
        self.what = f"{name}{f':{config}' if config else ''} ({split})"
        try:
            # asked first, because load_dataset retries for half a minute before it gives up
            self.revision = revision or huggingface_hub.dataset_info(name, timeout=10).sha
            self.rows: Any = datasets.load_dataset(
                name, config, split=split, revision=self.revision, streaming=True
            )
        except Exception as error:
            # The kind of error depends on the library's HTTP client, which changes.
            raise no_hub_data(self.what, error) from None

    def state(self) -> Any:
        """The current place, as the `datasets` library gives it."""
        return self.rows.state_dict()

    def records(self) -> Iterator[Record]:
        """Rows from the current state on. Raises UserError if the hub or the network fails."""
        try:
            for number, row in enumerate(self.rows, 1):
                yield f"row {number}", row
        except Exception as error:
            # as above, and a damaged file on the hub makes the library raise other kinds
            raise no_hub_data(self.what, error) from None

    def segments(self, state: Any = None) -> Iterator[Segment]:
        """The documents from `state` on; None: from the first one on. Raises UserError as `records`
        does, and if all rows are broken."""
        if state is not None:
            self.rows.load_state_dict(state)
        rows = _RowDocuments(self.column, self.say)
        rows.found = state is not None
        for place, row in self.records():
            if segment := rows.segment(f"{self.name} {place}", row, self.name):
                self.position += len(segment[0])
                yield segment
        rows.close(self.name)


def files_of(spec: str) -> list[Path] | None:
    """The text files that `spec` names, or that `stdlib` stands for; of several weighted sources
    those of all. None for a dataset on the hub.

    Raises UserError if there are no such files.
    """
    specs = [source.spec for source in specs_of(spec)]
    if specs != [spec]:
        parts = list(map(files_of, specs))
        return None if None in parts else [path for part in parts if part for path in part]
    path = Path(spec).expanduser()
    if spec == "stdlib" and not path.exists():
        return stdlib_files()
    return None if not path.exists() and is_hub_id(spec) else find_files(spec)


def files_sha256(spec: str) -> str | None:
    """A hash of the content of the text files that `spec` names. None if it names none, or more
    than 1 GiB, which would take seconds at each start."""
    try:
        files = files_of(spec)
    except UserError:
        return None
    if files is None or sum(file.stat().st_size for file in files) > 1 << 30:
        return None
    content = "".join(map(sha256, files))
    return hashlib.sha256(content.encode()).hexdigest()


def open_text(
    spec: str, column: str = "text", say: Callable[[str], None] = print, config: str | None = None
) -> Source:
    """The source of the text that `spec` names: files, folders and globs, a hub id, or `stdlib`.

    Raises UserError if there is no such text.
    """
    files = files_of(spec)
    if files is None:
        name, _, config = spec.partition(":")
        return HubDataset(name, config or None, column=column, say=say)
    return TextFiles(files, column, say)


# ---- documents to tokens


@dataclass(frozen=True)
class Chunk:
    """Some segments that one process tokenizes together."""

    texts: list[str]
    starts: list[bool]  # whether each text begins a document
    empty: int  # documents without text, which are left out
    state: Any  # state of the source before the first segment
    position: int  # position of the source after the last segment


def chunks(source: Source, state: Any = None) -> Iterator[Chunk]:
    """Group the segments of `source` from `state` on into chunks of about CHUNK_CHARS characters.

    Documents without text are left out and counted.
    """
    texts, starts, empty, size = [], [], 0, 0
    before = state if state is not None else source.state()
    for text, start in source.segments(state):
        if text.strip():
            texts.append(text)
            starts.append(start)
            size += len(text)
        else:
            empty += start
        if size >= CHUNK_CHARS:
            yield Chunk(texts, starts, empty, before, source.position)
            texts, starts, empty, size, before = [], [], 0, 0, source.state()
    if texts or empty:
        yield Chunk(texts, starts, empty, before, source.position)


def encode(
    tokenizer: Encoder, texts: list[str], starts: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts in one array, and each text's number of tokens, (n_texts,) int64.

    An end-of-text token precedes each text that begins a document, and counts as a token of it. The
    dtype is that of `token_dtype`.
    """
    # one by one: the worker processes already provide the parallelism of encode_batch
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) + start for row, start in zip(ids, starts, strict=True)], np.int64)
    tokens = np.full(lengths.sum(), tokenizer.eot, token_dtype(tokenizer.vocab_size))
    for row, end in zip(ids, np.cumsum(lengths), strict=True):
        tokens[end - len(row) : end] = row
    return tokens, lengths


def tokenize(
    source: Iterator[Chunk], tokenizer: Encoder, workers: int
) -> Generator[tuple[Chunk, np.ndarray, np.ndarray]]:
    """Each chunk with its tokens and lengths as `encode` returns them, in the order of the source.

    workers: number of processes; 1 tokenizes in this process. At most CHUNKS_PER_WORKER * workers
    chunks are in memory at any time.
    """
    if workers <= 1:
        for chunk in source:
            yield chunk, *encode(tokenizer, chunk.texts, chunk.starts)
        return
    with _WorkerPool(tokenizer, workers) as encoders:
        numbered = enumerate(source)
        held: dict[int, Chunk] = {}  # chunks that were read and not yet yielded
        unsent: deque[tuple[int, Chunk]] = deque()
        done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number in itertools.count():
            while number not in done:
                # one chunk is read ahead for each process, so that none waits for the disk
                room = len(held) < CHUNKS_PER_WORKER * workers and len(unsent) < workers
                if read := next(numbered, None) if room else None:
                    unsent.append(read)
                    held[read[0]] = read[1]
                elif not held:
                    return
                done.update(encoders.receive(block=read is None))
                while encoders.idle and unsent:
                    encoders.send(*unsent.popleft())
            yield held.pop(number), *done.pop(number)


class _WorkerPool:
    """Processes that tokenize one chunk at a time each. They also end if this process is killed."""

    def __init__(self, tokenizer: Encoder, n: int):
        # Forking is fast, but unsafe in a process with other threads. A spawned interpreter has to
        # import the tokenizer first.
        fork = sys.platform == "linux" and threading.active_count() == 1
        context = (
            multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
        )
        self.idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        self._processes = []
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_worker, args=(theirs, ours, tokenizer), daemon=True
            )
            process.start()
            theirs.close()  # so that either side sees the end of file when the other one dies
            self._processes.append(process)
            self.idle.append(ours)

    def __enter__(self) -> _WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(JOIN_TIMEOUT)
            if process.is_alive():  # forked in a state in which it does not handle signals
                process.kill()
                process.join()
        for connection in [*self.idle, *self._busy]:
            connection.close()

    def send(self, number: int, chunk: Chunk) -> None:
        """Give chunk `number` to an idle process. Raises RuntimeError if that process has died."""
        connection = self.idle.pop()
        self._busy[connection] = number
        try:
            connection.send((chunk.texts, chunk.starts))
        except OSError:
            raise _worker_died() from None

    def receive(self, block: bool) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """The results that are ready, each as (number, (tokens, lengths)).

        block: wait for at least one. Raises RuntimeError if a process failed.
        """
        for connection in wait(list(self._busy), None if block else 0):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError):
                raise _worker_died() from None
            if isinstance(result, str):
                raise RuntimeError(f"a tokenizing process failed:\n{result}")
            number = self._busy.pop(connection)
            self.idle.append(connection)
            yield number, result


def _worker_died() -> RuntimeError:
    return RuntimeError("a tokenizing process died; did the machine run out of memory?")


def _run_worker(connection: Connection, parents: Connection, tokenizer: Encoder) -> None:
    """The main loop of a tokenizing process.

    Ctrl-C reaches the whole process group. Only the parent acts on it.
    """
    parents.close()  # a fork inherits the other end too, and would never see it close
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.num_threads = 1
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            texts, starts = connection.recv()
            try:
                result: Any = encode(tokenizer, texts, starts)
            except Exception:
                result = traceback.format_exc()
            connection.send(result)


class Progress:
    """Shows MB/s and the time left: as a bar on a terminal, else as a line every few seconds."""

    EVERY = 5.0  # seconds between lines

    def __init__(self, label: str, total: int | None, say: Callable[[str], None]):
        """total: bytes of input, or None if unknown."""
        self.label, self.total, self.say = label, total, say
        self._last_line = time.monotonic()
        # Position and time of the first update. The rate counts from there, because a resumed run
        # begins in the middle of the input.
        self._first: tuple[int, float] | None = None
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
            # auto_refresh would start a thread, and then the worker processes could not be forked
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
        """position: bytes of input done. tokens: tokens written so far."""
        figures = self._figures(position, tokens)
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=position, figures=figures, refresh=True
            )
        elif time.monotonic() - self._last_line >= self.EVERY:
            self._last_line = time.monotonic()
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
