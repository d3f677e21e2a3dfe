"""Reads the rows that a fine-tuning task trains on, validates on and predicts.

All rows are in memory, because the data of a fine-tuning run fits into it. text/readers.py reads
the files themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from config import UserError, nearest
from text.corpus import HubDataset
from text.encodings import HEAD, NotUtf8, open_decompressed, read_text, text_stream
from text.files import file_id, is_hub_id, named_files, suffix_of, unknown_kind, words_in_name
from text.readers import MAX_SHOWN, read_records, split_documents, with_advice
from text.row import Expand, Reader, Record, Row, Unreadable
from text.tables import RaggedRow

Columns = Mapping[str, str | tuple[str, ...]]

# A lone surrogate, such as surrogateescape makes of each byte that is not UTF-8.
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class EmptyField(str):
    """The fault of a row in which a field is empty."""


@dataclass(frozen=True)
class Rows:
    """The rows that could be read, in the order of the files."""

    rows: list[Row]
    skipped: int = 0  # broken rows: left out, or with `keep_broken` kept with a fault
    empty: int = 0  # those of them in which a field is empty

    @cached_property
    def sha256(self) -> str:
        """Hash of the content: the rows' fields in their order, whichever files they came from."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row.fields, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def read_rows(  # noqa: PLR0913 (all but two have defaults)
    spec: str,
    columns: Columns,
    *,
    optional: Collection[str] = (),
    strict: bool = False,
    split: str = "train",
    lines: bool = False,
    readers: Mapping[str, Reader] | None = None,
    expand: Expand | None = None,
    say: Callable[[str], None] = print,
    keep_broken: bool = False,
    nameable: Collection[str] | None = None,
) -> Rows:
    """Read the rows of comma-separated files, globs, folders or hub ids.

    Files are .csv .tsv .txt .json .jsonl .parquet, gzipped or not. A row is broken if cells are
    missing, a field is empty, or it is not JSON or not UTF-8. Broken rows are counted and left out,
    and the first few are named through `say`.

    columns: for each field of the task, the column that the user named, or a tuple of usual names.
        The first of these names that the file has is taken.
    optional: fields that may be empty. They need no column unless the user named one.
    strict: a broken row ends the run.
    split: which split of a hub dataset to read. In a folder, the names of the files tell it.
    lines: a row is a line of a text file, not a document. Its column is "text".
    readers: readers by suffix, which replace the built-in ones.
    expand: turns each record of any kind of file into those that the task uses.
    keep_broken: keep every row in its order, because each one gets an answer. An empty field is no
        fault then. A broken row is kept with what can be read of it: see `_salvage`.
    nameable: fields whose column the user can name with --FIELD-column. None: all of them.

    Raises UserError, which names the file and the line or column, for a missing column, for a
    broken row if `strict`, and if no row can be read.
    """
    rows: list[Row] = []
    broken: list[str] = []
    empty = 0
    needed = [
        (names,) if isinstance(names, str) else names
        for field, names in columns.items()
        if field not in optional
    ]
    for name, records in _sources(spec, split, _RowFormat(needed, lines, readers or {}, expand)):
        chosen: dict[str, str | None] = {}
        found = dict.fromkeys(
            column for _, cells in records if isinstance(cells, dict) for column in cells
        )
        if found:
            chosen = {
                field: _choose(name, field, columns[field], list(found), optional, nameable)
                for field in columns
            }
        for place, cells in records:
            fields = (
                _fields(cells, chosen, columns if keep_broken else optional)
                if isinstance(cells, dict)
                else cells
            )
            where = f"{name} {place}"
            empty += isinstance(fields, EmptyField)
            if isinstance(fields, str) and (strict or len(broken) < MAX_SHOWN):
                fields = with_advice(fields, cells, name)
            if isinstance(fields, dict):
                rows.append(Row(fields, where))
            elif strict:
                raise UserError(f"--strict ends the run at a broken row: {where} {fields}")
            else:
                broken.append(f"{where} {fields}")
                if keep_broken:
                    wanted = [field for field in columns if field not in optional]
                    rows.append(
                        _salvage(cells, chosen or dict.fromkeys(columns), wanted, where, fields)
                    )
    # If no row is UTF-8, the file is in another encoding, and its texts were not read as written.
    all_undecodable = len(rows) > 1 and sum("is not UTF-8 text" in b for b in broken) == len(rows)
    if all_undecodable or all(row.fault for row in rows):
        raise UserError(
            f"{spec} holds no row that can be read"
            + (f": {broken[0]}" if broken else "; give other data")
        )
    label = "damaged" if keep_broken else "left out"
    for line in broken[:MAX_SHOWN]:
        say(f"{label}: {line}")
    if len(broken) > MAX_SHOWN:
        say(f"{label}: {len(broken) - MAX_SHOWN:,} more broken rows of {spec}")
    if keep_broken:
        return Rows(rows, sum(bool(row.fault) for row in rows))
    return Rows(rows, len(broken), empty)


def _salvage(
    cells: dict[str, Any] | str,
    chosen: dict[str, str | None],
    needed: Collection[str],
    where: str,
    wrong: str,
) -> Row:
    """A broken row with what can be read of it. It has a fault if a `needed` field is lost.

    Bytes that are not UTF-8 become U+FFFD. `_align_cells` handles a table's row with too few or too
    many cells.
    """
    if isinstance(cells, RaggedRow):
        cells = _align_cells(cells, [column for field in needed if (column := chosen[field])])
    known = cells if isinstance(cells, dict) else {}
    fields, lost = {}, not isinstance(cells, dict)
    for field, column in chosen.items():
        value = known.get(column) if column is not None else None
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        read = _fields({"": value}, {field: ""}, (field,))
        lost |= field in needed and (isinstance(read, str) or column not in known)
        fields[field] = read[field] if isinstance(read, dict) else ""
    return Row(fields, where, wrong if lost else "")


def _align_cells(ragged: RaggedRow, texts: Collection[str]) -> dict[str, str]:
    """The cells of a ragged row, by column, as far as their columns are certain.

    Missing cells at the end of a row are "". In a row with too many cells, a text contains the
    delimiter. So the columns before the first text are counted from the left, and those after the
    last text from the right.
    """
    header, cells = ragged.header, ragged.cells
    if len(cells) < len(header):
        return dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))
    indices = [header.index(column) for column in texts]
    first, last = min(indices, default=len(header)), max(indices, default=-1)
    sure = dict(zip(header[:first], cells))
    return sure | ({} if last < 0 else dict(zip(header[:last:-1], cells[::-1])))


def _choose(
    where: str,
    field: str,
    given: str | tuple[str, ...],
    found: list[str],
    optional: Collection[str],
    nameable: Collection[str] | None,
) -> str | None:
    """The column of a field, or None for an optional field without one.

    Raises UserError if a field that needs a column has none.
    """
    names = (given,) if isinstance(given, str) else given
    present = [name for name in names if name in found]
    if present or (field in optional and not isinstance(given, str)):
        return present[0] if present else None
    close = next(filter(None, (nearest(name, found) for name in names)), "")
    listed = ", ".join(map(_shown, filter(None, found[:20]))) or "none with a name"
    option = f"Use --{field.replace('_', '-')}-column NAME"
    advice = option if nameable is None or field in nameable else "Rename the column that is meant"
    raise UserError(
        f"{where} has no column {' or '.join(map(repr, names))}{close}; it has: {listed}. {advice} "
        "(a table's first line must name its columns)"
    )


def _shown(text: str) -> str:
    """Text of a file, shortened, with lone surrogates escaped so that it can be printed."""
    return text[:60].encode("utf-8", "backslashreplace").decode()


def _fields(
    cells: dict[str, Any], chosen: dict[str, str | None], optional: Collection[str]
) -> dict[str, str] | str:
    """The fields of a row, with Unix line ends, or what is wrong with the row."""
    fields = {}
    for field, column in chosen.items():
        value = cells.get(column) if column is not None else None
        if isinstance(value, Unreadable):
            return f"{value.reason} in column {column!r}"
        if isinstance(value, list | dict | bytes):
            return f"has a {type(value).__name__} in column {column!r}, not text"
        missing = value is None or value != value  # NaN, which pandas writes for a missing value
        text = "" if missing else str(value).replace("\r\n", "\n")
        if _SURROGATE.search(text):
            return f"is not UTF-8 text in column {column!r}"
        if not text.strip() and field not in optional:
            return EmptyField(f"has nothing in column {column!r}")
        fields[field] = text
    return fields


# ---- files and datasets


@dataclass(frozen=True)
class _RowFormat:
    """How a task's rows are read from files. See `read_rows` for the fields."""

    needed: Sequence[Sequence[str]]  # for each needed column, the names that it may have
    lines: bool
    readers: Mapping[str, Reader]
    expand: Expand | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of the files that can be read."""
        return tuple(
            dict.fromkeys((".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", *self.readers))
        )

    def read(self, path: Path) -> list[Record]:
        """The records of one file. Raises UserError as the readers do."""
        suffix = suffix_of(path)
        if suffix in self.readers:
            return self.expanded(self.readers[suffix](read_text(path), str(path)))
        with open_decompressed(path) as (_, stream):
            if suffix != ".txt" or self._is_table(stream.peek(HEAD)[:HEAD]):
                return self.expanded(read_records(stream, path, suffix, self.needed))
            with text_stream(stream, path, "surrogateescape") as text:
                return self.expanded(read_lines(text) if self.lines else read_documents(text))

    def _is_table(self, head: bytes) -> bool:
        """Whether a text file is a table: its first line names all needed columns, with tabs."""
        first = head.decode("utf-8-sig", "replace").partition("\n")[0].rstrip("\r").split("\t")
        return (
            len(first) > 1
            and bool(self.needed)
            and all(set(names) & set(first) for names in self.needed)
        )

    def expanded(self, records: Iterable[Record]) -> list[Record]:
        """The records after `expand`."""
        if self.expand is None:
            return list(records)
        return list(itertools.chain.from_iterable(map(self.expand, records)))


def check_exists(spec: str, readers: Mapping[str, Reader] | None = None) -> None:
    """Raises UserError if `spec` names data that does not exist or that no reader accepts.

    The hub is not asked whether it has a dataset. See `read_rows` for the arguments.
    """
    for _ in _named(spec, _RowFormat((), False, readers or {}, None).suffixes):
        pass


def _named(spec: str, suffixes: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    """Each item of `spec` with its files. A hub dataset has none."""
    for item, files in named_files(spec, suffixes):
        if not files and not is_hub_id(item):
            raise UserError(
                f"no such data: {item}; give files ({' '.join(suffixes)}), a folder of them or a "
                "hub id"
            )
        for path in files:
            if suffix_of(path) not in suffixes:
                raise UserError(unknown_kind(path, suffixes))
        yield item, files


def _sources(spec: str, split: str, row_format: _RowFormat) -> Iterator[tuple[str, list[Record]]]:
    """The name and the records of each file or hub dataset that `spec` names, each file once."""
    seen: set[object] = set()
    for item, files in list(_named(spec, row_format.suffixes)):
        if not files:
            name, _, config = item.partition(":")
            yield item, row_format.expanded(HubDataset(name, config or None, split).records())
        folder = Path(item).expanduser()
        for path in _files_of_split(files, folder, split) if folder.is_dir() else files:
            if (file := file_id(path)) not in seen:
                yield str(path), row_format.read(path)
            seen.add(file)


_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "test": "test"}


def _files_of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of a folder whose names tell this split, as on the hub.

    All of its files if no name tells any split. Raises UserError if names tell only other splits.
    """
    splits = [_split_of(path.relative_to(folder)) for path in files]
    if not any(splits):
        return files
    if split not in splits:
        raise UserError(
            f"{folder} has files of other splits but none of the split {split!r}; name the files "
            "instead"
        )
    return [path for path, of_path in zip(files, splits, strict=True) if of_path == split]


def _split_of(path: Path) -> str | None:
    """The split that a whole word of a file's name tells, or else of the nearest folder's name."""
    for part in reversed(path.parts):
        for word in words_in_name(part):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def read_documents(text: IO[str]) -> Iterator[Record]:
    """The documents between separator lines, as the column "text".

    A file without separators is one document.
    """
    document, begin, line = "", 1, 1
    for piece, starts, ends in split_documents(text, 1 << 20):
        if starts:
            document, begin = "", line
        document += piece
        line += piece.count("\n") + ends
        if ends:
            yield from _document(document.removesuffix("\n").removesuffix("\r"), begin)
            document = ""
    yield from _document(document, begin)


def _document(text: str, begin: int) -> Iterator[Record]:
    if text.strip():
        yield f"line {begin}", {"text": _mark_bad_bytes(text)}


def read_lines(text: IO[str]) -> Iterator[Record]:
    """Each line that is not blank, as the column "text"."""
    for number, line in enumerate(text.read().split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"text": _mark_bad_bytes(line.rstrip("\r"))}


def _mark_bad_bytes(text: str) -> str:
    return NotUtf8(text) if _SURROGATE.search(text) else text


# ---- training rows and validation rows


def _normalized(text: str) -> str:
    """The text without differences in white space and case, to compare texts by."""
    return " ".join(text.split()).casefold()


def hold_out(texts: Sequence[str], share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rows to train on, and of the `share` that is held out; each (n,) int64, ascending.

    The hash of a text decides. So the same texts are held out when the rows are in another order or
    some occur twice, and no text is on both sides. Raises UserError if all texts are the same.
    """
    ids: dict[str, list[int]] = {}
    for id, text in enumerate(texts):
        ids.setdefault(_normalized(text), []).append(id)
    if len(ids) < 2:
        raise UserError(
            "nothing can be held out because all rows have the same text; give --val-data"
        )
    by_hash = sorted(ids, key=lambda text: hashlib.sha256(text.encode()).digest())
    n_held = min(max(1, round(share * len(ids))), len(ids) - 1)
    held, kept = (
        np.sort(np.array([*itertools.chain.from_iterable(ids[text] for text in part)], np.int64))
        for part in (by_hash[:n_held], by_hash[n_held:])
    )
    return kept, held


def count_duplicates(train: Sequence[str], val: Sequence[str]) -> int:
    """How many training texts are also validation texts. White space and case do not matter."""
    known = set(map(_normalized, val))
    return sum(_normalized(text) in known for text in train)
