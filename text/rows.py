"""Labelled and text files to rows: what a fine-tuning task trains on, validates on and predicts.

The rows are held in memory: those of fine-tuning fit into it. How a file is read stands in
text/readers.py.
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
from text.corpus import (
    HubDataset,
    file_id,
    is_hub_id,
    named_files,
    suffix_of,
    unknown_kind,
    words_of,
)
from text.readers import (
    HEAD,
    SHOWN,
    NotUtf8,
    Torn,
    documents,
    opened,
    read_records,
    read_text,
    text_stream,
    with_advice,
)
from text.row import Expand, Reader, Record, Row

Columns = Mapping[str, str | tuple[str, ...]]

# what bytes that are not UTF-8 become when decoded to be looked at
_NO_UTF8 = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Rows:
    """The rows that could be read, in the order of the files."""

    rows: list[Row]
    skipped: int = 0  # broken ones: left out, or with `every` those that have a fault

    @cached_property
    def sha256(self) -> str:
        """Names the content: fields and their order, wherever they came from."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row.fields, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()


def read_rows(
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
    every: bool = False,
    nameable: Collection[str] | None = None,
) -> Rows:
    """Rows of files (.csv .tsv .txt .json .jsonl .parquet, gzipped or not), globs, folders or hub
    ids, comma-separated.

    columns: per field of the task, the column that the user named, or a tuple of usual names, the
    first of them that is there being taken. Fields that are `optional` may be empty, and lack a
    column unless the user named it. split: which part of a hub dataset; and of a folder, where its
    files' names tell. lines: each line of a text file is a row with the column "text", rather than
    each document. readers: by suffix, in place of those here. expand: what the rows of every kind
    of file are turned into.

    A row that is broken (cells missing, a field empty, not JSON, not UTF-8) is told to `say`,
    counted and left out; under `strict` it ends the run. Raises UserError naming file and line or
    column; also where no row is left.

    nameable: fields whose column the user can name with --FIELD-column; None: all.

    every: all rows are wanted, in their order, since each is to be answered. An empty field is no
    fault then, and a broken row is told and kept with what can be read of it: see `_kept`.
    """
    rows: list[Row] = []
    broken: list[str] = []
    needed = [
        (names,) if isinstance(names, str) else names
        for field, names in columns.items()
        if field not in optional
    ]
    for name, records in _sources(spec, split, _Kind(needed, lines, readers or {}, expand)):
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
                _fields(cells, chosen, columns if every else optional)
                if isinstance(cells, dict)
                else cells
            )
            where = f"{name} {place}"
            if isinstance(fields, str) and (strict or len(broken) < SHOWN):
                fields = with_advice(fields, cells, name)
            if isinstance(fields, dict):
                rows.append(Row(fields, where))
            elif strict:
                raise UserError(f"--strict ends the run at a broken row: {where} {fields}")
            else:
                broken.append(f"{where} {fields}")
                if every:
                    wanted = [field for field in columns if field not in optional]
                    rows.append(
                        _kept(cells, chosen or dict.fromkeys(columns), wanted, where, fields)
                    )
    # Where no row is UTF-8, the file is in another encoding, and its answers would be those of
    # other texts.
    elsewhere = len(rows) > 1 and sum("is not UTF-8 text" in line for line in broken) == len(rows)
    if elsewhere or all(row.fault for row in rows):
        raise UserError(
            f"{spec} holds no row that can be read"
            + (f": {broken[0]}" if broken else "; give other data")
        )
    said = "damaged" if every else "left out"
    for line in broken[:SHOWN]:
        say(f"{said}: {line}")
    if len(broken) > SHOWN:
        say(f"{said}: {len(broken) - SHOWN:,} more broken rows of {spec}")
    return Rows(rows, sum(bool(row.fault) for row in rows) if every else len(broken))


def _kept(
    cells: dict[str, Any] | str,
    chosen: dict[str, str | None],
    needed: Collection[str],
    where: str,
    wrong: str,
) -> Row:
    """A broken row with what can be read of it; it has a fault where that is not all that is
    `needed`.

    Cells that a table's row lacks at its end are empty. Where it has too many, the delimiter stands
    in a text: columns before the first text count from the left, and those after the last one from
    the right. Bytes that are not UTF-8 become U+FFFD.
    """
    if isinstance(cells, Torn):
        cells = _matched(cells, [column for field in needed if (column := chosen[field])])
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


def _matched(torn: Torn, texts: Collection[str]) -> dict[str, str]:
    """The cells of a torn row whose columns can be told."""
    header, cells = torn.header, torn.cells
    if len(cells) < len(header):
        return dict(zip(header, [*cells, *[""] * (len(header) - len(cells))], strict=True))
    at = [header.index(column) for column in texts]
    first, last = min(at, default=len(header)), max(at, default=-1)
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
    """The column of a field; None for an optional field without one."""
    names = (given,) if isinstance(given, str) else given
    there = [name for name in names if name in found]
    if there or (field in optional and not isinstance(given, str)):
        return there[0] if there else None
    close = next(filter(None, (nearest(name, found) for name in names)), "")
    listed = ", ".join(map(_shown, filter(None, found[:20]))) or "none with a name"
    option = f"Use --{field.replace('_', '-')}-column NAME"
    advice = option if nameable is None or field in nameable else "Rename the one that is meant"
    raise UserError(
        f"{where} has no column {' or '.join(map(repr, names))}{close}; it has (a table names them "
        f"in its first line): {listed}. {advice}"
    )


def _shown(text: str) -> str:
    """Text of a file, short and fit to print."""
    return text[:60].encode("utf-8", "backslashreplace").decode()


def _fields(
    cells: dict[str, Any], chosen: dict[str, str | None], optional: Collection[str]
) -> dict[str, str] | str:
    """The fields of a row, with the line ends of Unix, or what is wrong with it."""
    fields = {}
    for field, column in chosen.items():
        value = cells.get(column) if column is not None else None
        if isinstance(value, list | dict | bytes):
            return f"has a {type(value).__name__} in column {column!r}, not text"
        missing = value is None or value != value  # NaN, as pandas writes a missing value
        text = "" if missing else str(value).replace("\r\n", "\n")
        if _NO_UTF8.search(text):
            return f"is not UTF-8 text in column {column!r}"
        if not text.strip() and field not in optional:
            return f"has nothing in column {column!r}"
        fields[field] = text
    return fields


# ---- files and datasets


@dataclass(frozen=True)
class _Kind:
    """How the rows of a task are read."""

    needed: Sequence[Sequence[str]]  # the names that each column may have
    lines: bool  # each line of a text file is a row
    readers: Mapping[str, Reader]  # of the task's own, by suffix
    expand: Expand | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys((".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet", *self.readers))
        )

    def read(self, path: Path) -> list[Record]:
        suffix = suffix_of(path)
        if suffix in self.readers:
            return self.expanded(self.readers[suffix](read_text(path), str(path)))
        with opened(path) as (_, stream):
            if suffix != ".txt" or self._is_table(stream.peek(HEAD)[:HEAD]):
                return self.expanded(read_records(stream, path, suffix, self.needed))
            text = text_stream(stream, path, "surrogateescape")
            return self.expanded(read_lines(text) if self.lines else read_documents(text))

    def _is_table(self, head: bytes) -> bool:
        """Whether the first line of a text file names all columns that are needed."""
        first = head.decode("utf-8-sig", "replace").partition("\n")[0].rstrip("\r").split("\t")
        return (
            len(first) > 1
            and bool(self.needed)
            and all(set(names) & set(first) for names in self.needed)
        )

    def expanded(self, records: Iterable[Record]) -> list[Record]:
        if self.expand is None:
            return list(records)
        return list(itertools.chain.from_iterable(map(self.expand, records)))


def check_there(spec: str, readers: Mapping[str, Reader] | None = None) -> None:
    """Raises UserError where `spec` names data that is not there, or that no reader takes; whether
    the hub has a dataset is not asked. For arguments see `read_rows`."""
    for _ in _named(spec, _Kind((), False, readers or {}, None).suffixes):
        pass


def _named(spec: str, suffixes: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    """Each item of `spec` and its files; none for a dataset of the hub."""
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


def _sources(spec: str, split: str, kind: _Kind) -> Iterator[tuple[str, list[Record]]]:
    """The name and the records of each file or hub dataset that `spec` names."""
    seen: set[object] = set()
    for item, files in list(_named(spec, kind.suffixes)):
        if not files:
            name, _, config = item.partition(":")
            yield item, kind.expanded(HubDataset(name, config or None, split).records())
        folder = Path(item).expanduser()
        for path in _of_split(files, folder, split) if folder.is_dir() else files:
            if (file := file_id(path)) not in seen:
                yield str(path), kind.read(path)
            seen.add(file)


_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "test": "test"}


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Those of a folder's files whose names tell this split, as the hub names them; all where no
    name tells one."""
    told = [_split_of(path.relative_to(folder)) for path in files]
    if not any(told):
        return files
    if split not in told:
        raise UserError(
            f"{folder} has no file of the split {split!r}, and files of others; name the files "
            "instead"
        )
    return [path for path, of in zip(files, told, strict=True) if of == split]


def _split_of(path: Path) -> str | None:
    """The split that a whole word of a file's name tells, else that of the nearest folder's that
    tells one."""
    for part in reversed(path.parts):
        for word in words_of(part):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def read_documents(text: IO[str]) -> Iterator[Record]:
    """The documents between separator lines, as the column "text"; without any, the file is one
    document."""
    document, begin, line = "", 1, 1
    for piece, starts, ends in documents(text, 1 << 20):
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
        yield f"line {begin}", {"text": _marked(text)}


def read_lines(text: IO[str]) -> Iterator[Record]:
    """Each line that is not blank, as the column "text"."""
    for number, line in enumerate(text.read().split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"text": _marked(line.rstrip("\r"))}


def _marked(text: str) -> str:
    return NotUtf8(text) if _NO_UTF8.search(text) else text


# ---- training rows and validation rows


def _same(text: str) -> str:
    """Equal for texts that differ in nothing but white space and capitals."""
    return " ".join(text.split()).casefold()


def hold_out(texts: Sequence[str], share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rows to train on and of the `share` to validate on, each (n,) int64, ascending.

    Chosen by the hash of the texts: the same rows in another order, or with some of them twice, are
    divided alike, and no text stands on both sides. Raises UserError where all texts are the same.
    """
    ids: dict[str, list[int]] = {}
    for id, text in enumerate(texts):
        ids.setdefault(_same(text), []).append(id)
    if len(ids) < 2:
        raise UserError(
            "nothing can be held out where all rows have the same text; give --val-data"
        )
    by_hash = sorted(ids, key=lambda text: hashlib.sha256(text.encode()).digest())
    n_held = min(max(1, round(share * len(ids))), len(ids) - 1)
    held, kept = (
        np.sort(np.array([*itertools.chain.from_iterable(ids[text] for text in part)], np.int64))
        for part in (by_hash[:n_held], by_hash[n_held:])
    )
    return kept, held


def overlap(train: Sequence[str], val: Sequence[str]) -> int:
    """How many of the training texts are among the validation texts, but for white space and
    capitals."""
    known = set(map(_same, val))
    return sum(_same(text) in known for text in train)
