"""Reads documents in a fixed order from text files or a dataset on the hub, from any document on."""

from __future__ import annotations

import io
import itertools
import tokenize as python_source
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from base.errors import reason
from config import UserError
from text import encodings, readers
from text.files import files_of, suffix_of, unknown_kind
from text.readers import MAX_SHOWN, SkippedRows
from text.row import Record

CHUNK_CHARS = 1 << 20  # of a piece of a long document, and of what one process tokenizes at a time

# A text, and whether it begins a document. False: it continues the one before.
Segment = tuple[str, bool]


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


# By suffix. Files of other kinds have rows, which text/readers.py reads.
_READERS: dict[str, Callable[..., Iterator[Segment]]] = {".txt": _read_txt, ".py": _read_python}


def no_hub_data(what: str, error: Exception) -> UserError:
    """The error for a failed request to the hub: what was asked, the hub's answer, what to type."""
    return UserError(
        f"cannot get {what} from the hub: {reason(error, whole=True)}; check the name and the "
        "network, or use text files of your own"
    )


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
        with encodings.open_decompressed(path) as (self._raw, stream):
            if suffix not in readers.ROW_SUFFIXES:
                reader = _READERS.get(suffix, _read_txt)
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
