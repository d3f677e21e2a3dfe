"""Labelled and text files to rows: what a fine-tuning task trains on, validates on and predicts.

A file is read whole, since the rows of fine-tuning fit into memory; so what it is can be told from all of its content
where a name misleads: tables of tabs named .csv, quotes that mean nothing, JSON lines named .json.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError, nearest
from corpus import HubDataset, is_hub_id, named_files, suffix_of

SEPARATOR = "<|endoftext|>"  # a line of its own between the documents of a text file
SHOWN = 5  # broken rows that are printed; the others are counted

Columns = Mapping[str, str | tuple[str, ...]]
# Of one row: the place in its file ("line 12"), and its cells by column or what is wrong with it.
Record = tuple[str, dict[str, Any] | str]
# Takes the text of a file and its name for messages. Raises UserError where the file as a whole is not right.
Reader = Callable[[str, str], Iterator[Record]]

_NO_UTF8 = re.compile(r"[\ud800-\udfff]")  # what bytes that are not UTF-8 become when decoded to be looked at


@dataclass(frozen=True, slots=True)
class Row:
    """What a file says in one row, by the task's names for it; "" for an optional field without a column."""

    fields: dict[str, str]
    where: str  # "songs.csv line 12"
    fault: str = ""  # why it cannot be answered: only a row that is read with `every` has one

    def __getitem__(self, field: str) -> str:
        return self.fields[field]


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


class Torn(str):
    """What is wrong with a table's row whose cells do not match its columns, and the cells that it has."""

    header: list[str]
    cells: list[str]

    def __new__(cls, header: list[str], cells: list[str]) -> Torn:
        said = f"has {len(cells)} cells where the first line names {len(header)} columns"
        torn = super().__new__(cls, said)
        torn.header, torn.cells = header, cells
        return torn


def read_rows(
    spec: str,
    columns: Columns,
    *,
    optional: Collection[str] = (),
    strict: bool = False,
    split: str = "train",
    lines: bool = False,
    readers: Mapping[str, Reader] | None = None,
    say: Callable[[str], None] = print,
    every: bool = False,
) -> Rows:
    """Rows of files (.csv .tsv .txt .json .jsonl .parquet, gzipped or not), globs, folders or hub ids, comma-separated.

    columns: per field of the task, the column that the user named, or a tuple of usual names, the first of them that
    is there being taken. Fields that are `optional` may be empty, and lack a column unless the user named it. split:
    which part of a hub dataset; and of a folder, where its files' names tell. lines: each line of a text file is a row
    with the column "text", rather than each document. readers: by suffix, in place of those here.

    A row that is broken (cells missing, a field empty, not JSON, not UTF-8) is told to `say`, counted and left out;
    under `strict` it ends the run. Raises UserError naming file and line or column; also where no row is left.

    every: all rows are wanted, in their order, since each is to be answered. An empty field is no fault then, and a
    broken row is told and kept with what can be read of it: see `_kept`.
    """
    rows: list[Row] = []
    broken: list[str] = []
    for name, records in _sources(spec, split, _readers(columns, optional, lines) | dict(readers or {})):
        chosen: dict[str, str | None] = {}
        found = dict.fromkeys(column for _, cells in records if isinstance(cells, dict) for column in cells)
        if found:
            chosen = {field: _choose(name, field, columns[field], list(found), optional) for field in columns}
        for place, cells in records:
            fields = _fields(cells, chosen, columns if every else optional) if isinstance(cells, dict) else cells
            where = f"{name} {place}"
            if isinstance(fields, dict):
                rows.append(Row(fields, where))
            elif strict:
                raise UserError(f"{where} {fields}; mend or remove it, or leave --strict out")
            else:
                broken.append(f"{where} {fields}")
                if every:
                    needed = [field for field in columns if field not in optional]
                    rows.append(_kept(cells, chosen or dict.fromkeys(columns), needed, where, fields))
    if all(row.fault for row in rows):
        raise UserError(f"{spec} holds no row that can be read" + (f": {broken[0]}" if broken else "; give other data"))
    said = "damaged" if every else "left out"
    for line in broken[:SHOWN]:
        say(f"{said}: {line}")
    if len(broken) > SHOWN:
        say(f"{said}: {len(broken) - SHOWN:,} more broken rows of {spec}")
    return Rows(rows, sum(bool(row.fault) for row in rows) if every else len(broken))


def _kept(
    cells: dict[str, Any] | str, chosen: dict[str, str | None], needed: Collection[str], where: str, wrong: str
) -> Row:
    """A broken row with what can be read of it; it has a fault where that is not all that is `needed`.

    Cells that a table's row lacks at its end are empty. Where it has too many, the delimiter stands in a text: columns
    before the first text count from the left, and those after the last one from the right. Bytes that are not UTF-8
    become U+FFFD.
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
    where: str, field: str, given: str | tuple[str, ...], found: list[str], optional: Collection[str]
) -> str | None:
    """The column of a field; None for an optional field without one."""
    names = (given,) if isinstance(given, str) else given
    there = [name for name in names if name in found]
    if there or (field in optional and not isinstance(given, str)):
        return there[0] if there else None
    close = next(filter(None, (nearest(name, found) for name in names)), "")
    listed = ", ".join(map(_shown, filter(None, found[:20]))) or "none with a name"
    raise UserError(
        f"{where} has no column {' or '.join(map(repr, names))}{close}; it has (a table names them in its first line): "
        f"{listed}. Use --{field.replace('_', '-')}-column NAME"
    )


def _shown(text: str) -> str:
    """Text of a file, short and fit to print."""
    return text[:60].encode("utf-8", "backslashreplace").decode()


def _fields(cells: dict[str, Any], chosen: dict[str, str | None], optional: Collection[str]) -> dict[str, str] | str:
    """The fields of a row, with the line ends of Unix, or what is wrong with it."""
    fields = {}
    for field, column in chosen.items():
        value = cells.get(column) if column is not None else None
        if isinstance(value, list | dict | bytes):
            return f"has a {type(value).__name__} in column {column!r}, not text"
        text = "" if value is None else str(value).replace("\r\n", "\n")
        if _NO_UTF8.search(text):
            return f"is not UTF-8 text in column {column!r}; convert it: iconv -t UTF-8"
        if not text.strip() and field not in optional:
            return f"has nothing in column {column!r}"
        fields[field] = text
    return fields


# ---- files and datasets


def _readers(columns: Columns, optional: Collection[str], lines: bool) -> dict[str, Reader]:
    needed = [
        (given,) if isinstance(given, str) else given for field, given in columns.items() if field not in optional
    ]

    def read_txt(text: str, where: str) -> Iterator[Record]:
        """A table where the first line names all columns that are needed, else running text."""
        header = text.partition("\n")[0].rstrip("\r").split("\t")
        if len(header) > 1 and needed and all(set(names) & set(header) for names in needed):
            return read_table(text, where)
        return read_lines(text, where) if lines else read_documents(text, where)

    return {".csv": read_table, ".tsv": read_table, ".txt": read_txt, ".json": read_json, ".jsonl": read_json}


def _sources(spec: str, split: str, readers: dict[str, Reader]) -> Iterator[tuple[str, list[Record]]]:
    """The name and the records of each file or hub dataset that `spec` names."""
    known = (*readers, ".parquet")
    seen: set[Path] = set()
    for item, files in named_files(spec, known):
        if not files and is_hub_id(item):
            name, _, config = item.partition(":")
            dataset = HubDataset(name, config or None, split)
            yield item, [(f"row {n}", row) for n, row in enumerate(dataset.rows, 1)]
        elif not files:
            raise UserError(f"no such data: {item}; give files ({' '.join(known)}), a folder of them or a hub id")
        folder = Path(item).expanduser()
        for path in _of_split(files, folder, split) if folder.is_dir() else files:
            if suffix_of(path) not in known:
                raise UserError(f"{path} is none of {' '.join(known)} (or these with .gz)")
            if path not in seen:
                yield str(path), _read(path, readers)
            seen.add(path)


_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "test": "test"}


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Those of a folder's files whose names tell this split, as the hub names them; all where no name tells one."""
    words = [re.findall("[a-z]+", str(path.relative_to(folder)).lower()) for path in files]
    told = [next((_SPLITS[word] for word in of if word in _SPLITS), None) for of in words]
    if not any(told):
        return files
    if split not in told:
        raise UserError(f"{folder} has no file of the split {split!r}, and files of others; name the files instead")
    return [path for path, of in zip(files, told, strict=True) if of == split]


def _read(path: Path, readers: dict[str, Reader]) -> list[Record]:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is not a sound gzip file: {error}") from None
    if (suffix := suffix_of(path)) not in readers:
        return list(read_parquet(raw, str(path)))
    return list(readers[suffix](raw.decode("utf-8-sig", "surrogateescape"), str(path)))


def read_parquet(raw: bytes, where: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        items = parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not a sound parquet file: {str(error).splitlines()[0]}") from None
    for number, cells in enumerate(items, 1):
        yield f"row {number}", cells


def read_json(text: str, where: str) -> Iterator[Record]:
    """A list of objects, alone or as {"data": [...]}; or an object a line."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{where} is not valid JSON: {error}; mend it, or write one object a line") from None
        yield from _json_lines(text)
        return
    if isinstance(items, dict):
        items = items["data"] if isinstance(items.get("data"), list) else [items]
    for number, item in enumerate(items if isinstance(items, list) else [items], 1):
        yield f"row {number}", item if isinstance(item, dict) else "is not a JSON object"


def _json_lines(text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            item, wrong = None, f"is not valid JSON: {error}"
        else:
            wrong = "is not a JSON object"
        yield f"line {number}", item if isinstance(item, dict) else wrong


def read_documents(text: str, where: str) -> Iterator[Record]:
    """The documents between separator lines, as the column "text"; without any, the file is one document."""
    document: list[str] = []
    begin = 1
    for number, line in enumerate([*text.split("\n"), SEPARATOR], 1):
        if line.rstrip("\r") != SEPARATOR:
            document.append(line)
            continue
        if any(map(str.strip, document)):
            yield f"line {begin}", {"text": "\n".join(document)}
        document, begin = [], number + 1


def read_lines(text: str, where: str) -> Iterator[Record]:
    """Each line that is not blank, as the column "text"."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", {"text": line.rstrip("\r")}


def read_table(text: str, where: str) -> Iterator[Record]:
    """Rows of cells between the delimiter that the first line, the names of the columns, has most of."""
    table = list(io.StringIO(text, newline=""))  # with the line ends that the csv module wants to see
    if not table:
        return
    if _NO_UTF8.search(table[0]):
        raise UserError(f"{where} line 1 is not UTF-8 text; convert the file: iconv -t UTF-8")
    delimiter = max("\t,;|", key=table[0].count)
    records = _split_cells(table, delimiter, csv.QUOTE_MINIMAL if _is_quoted(text, delimiter) else csv.QUOTE_NONE)
    header = next(records)[1]
    if isinstance(header, str):
        raise UserError(f"{where} line 1 should name the columns, and {header}")
    header = [name.strip() for name in header]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{where} line 1 names the column {_shown(twice[0])!r} twice; rename one")
    for line, cells in records:
        if isinstance(cells, list) and cells and len(cells) != len(header):
            cells = Torn(header, cells)
        if cells:  # [] is a blank line
            yield f"line {line}", cells if isinstance(cells, str) else dict(zip(header, cells, strict=True))


def _is_quoted(text: str, delimiter: str) -> bool:
    """Whether quotes hold a table's cells together (RFC 4180): most cells that open with one close with one too.

    Where they mean nothing, as in MRPC, a cell that opens with a quotation mostly goes on after its end.
    """
    cell = rf'(?:^|{re.escape(delimiter)})"([^"]*+(?:""[^"]*+)*+"(?={re.escape(delimiter)}|[\r\n]|\Z))?'
    closed = [match[1] is not None for match in re.finditer(cell, text, re.MULTILINE)]
    return sum(closed) * 2 >= len(closed)


def _split_cells(table: list[str], delimiter: str, quoting: Any) -> Iterator[tuple[int, list[str] | str]]:
    """The number of the first line of each row, and its cells or what is wrong with it.

    After a quote that is never closed, or not where its cell ends, reading goes on in the next line: the csv module
    has run on to some later quote by then, over rows that are whole.
    """
    csv.field_size_limit(2**31 - 1)
    begin = 0
    while begin < len(table):
        first = begin
        reader = csv.reader(
            map(table.__getitem__, range(first, len(table))), delimiter=delimiter, quoting=quoting, strict=True
        )
        try:
            for cells in reader:
                yield begin + 1, cells
                begin = first + reader.line_num
        except csv.Error as error:
            yield begin + 1, f"has a quote that is not closed where its cell ends ({error})"
            begin += 1


# ---- training rows and validation rows


def _same(text: str) -> str:
    """Equal for texts that differ in nothing but white space and capitals."""
    return " ".join(text.split()).casefold()


def hold_out(texts: Sequence[str], share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the rows to train on and of the `share` to validate on, each (n,) int64, ascending.

    Chosen by the hash of the texts: the same rows in another order, or with some of them twice, are divided alike, and
    no text stands on both sides. Raises UserError where all texts are the same.
    """
    ids: dict[str, list[int]] = {}
    for id, text in enumerate(texts):
        ids.setdefault(_same(text), []).append(id)
    if len(ids) < 2:
        raise UserError("nothing can be held out where all rows have the same text; give --val-data")
    by_hash = sorted(ids, key=lambda text: hashlib.sha256(text.encode()).digest())
    n_held = min(max(1, round(share * len(ids))), len(ids) - 1)
    held, kept = (
        np.sort(np.array([*itertools.chain.from_iterable(ids[text] for text in part)], np.int64))
        for part in (by_hash[:n_held], by_hash[n_held:])
    )
    return kept, held


def overlap(train: Sequence[str], val: Sequence[str]) -> int:
    """How many of the training texts are among the validation texts, but for white space and capitals."""
    known = set(map(_same, val))
    return sum(_same(text) in known for text in train)
