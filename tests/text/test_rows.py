"""Rows are read from every kind of file, broken ones are named by file and line, some held out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from text.rows import Rows, count_duplicates, hold_out, read_rows

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SONGS = [
    {"artist": "A", "song": "One", "text": 'la, "la"\nlo'},
    {"artist": "B", "song": "Two", "text": "한국 -\ttab"},
]
COLUMNS = {"text": ("text", "lyrics"), "title": ("title", "song")}
FIELDS = [{"text": song["text"], "title": song["song"]} for song in SONGS]


def fields(rows: Rows) -> list[dict[str, str]]:
    return [row.fields for row in rows.rows]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def table(items: list[dict[str, str]], **how: Any) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(items[0]), **how)
    writer.writeheader()
    writer.writerows(items)
    return out.getvalue()


def parquet(items: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(items), out)
    return out.getvalue()


# ---- every kind of file


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", table(SONGS)),
        ("semicolons.csv", table(SONGS, delimiter=";")),
        ("tabs.csv", table(SONGS, delimiter="\t", lineterminator="\n")),
        ("a.tsv", "\ufeff" + table(SONGS, delimiter="\t")),
        ("table.txt", table(SONGS, delimiter="\t")),
        ("list.json", json.dumps(SONGS, indent=1)),
        ("data.json", json.dumps({"version": 1, "data": SONGS})),
        ("lines.json", "\n".join(map(json.dumps, SONGS))),
        ("a.jsonl", "\r\n".join(json.dumps(song, ensure_ascii=False) for song in SONGS) + "\n\n"),
        ("a.parquet", parquet(SONGS)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, content: str | bytes, gzipped: bool
) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    spec = write(tmp_path / (name + ".gz" * gzipped), gzip.compress(raw) if gzipped else raw)
    assert fields(read_rows(spec, COLUMNS)) == FIELDS


CELLS = st.text(st.sampled_from(list("ab'\"\t,; \n\r\\|é한\u2028\x1c\0")), max_size=8)


@given(
    items=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1), delimiter=st.sampled_from("\t,;|")
)
@settings(max_examples=150, deadline=None)
def test_a_quoted_table_keeps_its_cells(
    tmp_path_factory, items: list[tuple[str, ...]], delimiter: str
) -> None:
    file = tmp_path_factory.mktemp("table") / "a.csv"
    names = ("one", "two", "three")
    write(
        file,
        table([dict(zip(names, row)) for row in [("x", "y", "z"), *items]], delimiter=delimiter),
    )
    rows = read_rows(str(file), {name: (name,) for name in names}, optional=names)
    wanted = [tuple(cell.replace("\r\n", "\n") for cell in row) for row in items]
    assert [tuple(row.fields.values()) for row in rows.rows[1:]] == wanted


@given(seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_quotes_in_an_unquoted_table_are_text(tmp_path_factory, seed: int) -> None:
    """Text as in MRPC: some cells begin with a quotation, and most of these continue after it or
    never end it."""
    draw = random.Random(seed)
    kinds = [
        '"Yes," he said',
        'he said "no" twice',
        "plain",
        '"an open one',
        '"whole"',
        'the end "',
    ]
    items = [[draw.choice(kinds) for _ in range(3)] for _ in range(40)]
    items += [['"Yes," he said'] * 3] * 20
    file = tmp_path_factory.mktemp("table") / "a.tsv"
    write(file, "one\ttwo\tthree\n" + "".join("\t".join(row) + "\n" for row in items))
    rows = read_rows(str(file), {name: name for name in ("one", "two", "three")})
    assert [list(row.fields.values()) for row in rows.rows] == items


def test_a_text_file_gives_documents_or_lines(tmp_path: Path) -> None:
    text = "one\r\ntwo\r\n<|endoftext|>\r\nthree <|endoftext|>\r\n\r\nfour\r\n<|endoftext|>\r\n"
    spec = write(tmp_path / "a.txt", text)
    documents = read_rows(spec, {"text": ("text",)}).rows
    assert [row["text"].rstrip("\n") for row in documents] == [
        "one\ntwo",
        "three <|endoftext|>\n\nfour",
    ]
    assert [row.where.removeprefix(spec) for row in documents] == [" line 1", " line 4"]
    spec = write(tmp_path / "lines.txt", "one\n\n two \r\n")
    assert [row["text"] for row in read_rows(spec, {"text": ("text",)}, lines=True).rows] == [
        "one",
        " two ",
    ]


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    nan = {"text": float("nan"), "title": "x"}
    specs = (
        write(tmp_path / "a.jsonl", json.dumps(nan) + "\n"),
        write(tmp_path / "a.parquet", parquet([nan])),
    )
    for spec in specs:
        assert fields(read_rows(spec, COLUMNS, optional=("text",))) == [{"text": "", "title": "x"}]
        with pytest.raises(UserError, match="nothing in column 'text'"):
            read_rows(spec, COLUMNS)


def test_a_task_may_bring_its_own_reader(tmp_path: Path) -> None:
    def read(text: str, where: str):
        for number, poem in enumerate(text.split("\n\n"), 1):
            yield f"line {number}", {"poem": poem} if poem != "bad" else "is bad"

    said: list[str] = []
    spec = write(tmp_path / "a.txt", "x\ny\n\nbad\n\nz")
    rows = read_rows(spec, {"text": ("poem",)}, readers={".txt": read}, say=said.append)
    assert [row["text"] for row in rows.rows] == ["x\ny", "z"]
    assert said == [f"left out: {spec} line 2 is bad"]


def test_many_files_are_read_in_order_each_once(tmp_path: Path) -> None:
    for name in "cab":
        write(tmp_path / f"{name}.csv", f"text,n\n{name},1\n")
    spec = f"{tmp_path}/b.csv, {tmp_path}/*.csv,{tmp_path}"
    assert [row["text"] for row in read_rows(spec, {"text": ("text",)}).rows] == ["b", "a", "c"]


def test_a_folder_in_the_hubs_layout_is_read_by_split(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(
            tmp_path / "data" / f"{split}-00000-of-00001.parquet",
            parquet([{"text": split, "label": 1}]),
        )
    for split in ("train", "validation"):
        rows = read_rows(str(tmp_path), {"text": ("text",), "label": "label"}, split=split)
        assert fields(rows) == [{"text": split, "label": "1"}]
    write(tmp_path / "other" / "test.csv", "text,n\nx,1\n")
    with pytest.raises(UserError, match="none of the split 'train'"):
        read_rows(str(tmp_path / "other"), {"text": ("text",)})


def test_rows_of_a_hub_dataset_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    write(
        tmp_path / "validation.parquet",
        parquet([{"text": "x", "label": 0}, {"text": "", "label": 1}]),
    )
    real = datasets.load_dataset

    def load(name: str, config: str | None, revision: str, **how: Any) -> Any:
        assert (name, config, revision) == ("org/name", None, "abc")
        return real(str(tmp_path), cache_dir=str(tmp_path / "cache"), **how)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc")
    )
    said: list[str] = []
    columns = {"text": ("text",), "label": "label"}
    assert fields(read_rows("org/name", columns, split="validation", say=said.append)) == [
        {"text": "x", "label": "0"}
    ]
    assert said == ["left out: org/name row 2 has nothing in column 'text'"]
    with pytest.raises(UserError, match=r"cannot get org/name \(test\) from the hub"):
        read_rows("org/name", columns, split="test")


def test_sha256_depends_on_rows_only(tmp_path: Path) -> None:
    def sha256(items: list[dict[str, str]], name: str = "a.csv") -> str:
        return read_rows(write(tmp_path / name, table(items)), COLUMNS).sha256

    assert sha256(SONGS) == sha256(SONGS, "b.csv")
    assert (
        len(
            {
                sha256(SONGS),
                sha256(SONGS[::-1]),
                sha256(SONGS[:1]),
                sha256([SONGS[0] | {"song": "x"}]),
            }
        )
        == 4
    )
    # this column is not read
    assert sha256(SONGS) == sha256([song | {"artist": "other"} for song in SONGS])


def test_an_optional_field_may_be_missing(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.csv", "text,label\nx,\ny,1\n")
    columns = {"text": ("text",), "label": ("label",), "artist": ("artist",)}
    rows = read_rows(spec, columns, optional=("label", "artist"))
    assert fields(rows) == [
        dict(text="x", label="", artist=""),
        dict(text="y", label="1", artist=""),
    ]
    with pytest.raises(UserError, match="no column 'artst'"):  # named by the user: it must be there
        read_rows(spec, columns | {"artist": "artst"}, optional=("label", "artist"))


# ---- broken rows


@pytest.mark.parametrize(
    ("name", "content", "line", "wrong"),
    [
        (
            "a.csv",
            "text,title\n" + "x,y\n" * 3 + "x\nx,y\n",
            5,
            "has 1 cells where the first line names 2 columns",
        ),
        (
            "a.csv",
            'text,title\n"x\nz",y\n"x, and" more,y\n"x",y\n"x","y"\nx,y\n',
            4,
            "has a quote that is not closed",
        ),
        (
            "a.csv",
            'text,title\n"a","b"\n"never closed,y\nx,y\nx,y\nx,y\n',
            3,
            "has a quote that is not closed",
        ),
        (
            "a.tsv",
            b"text\ttitle\nx\ty\nx\xff\ty\nx\ty\nx\ty\nx\ty\n",
            3,
            "is not UTF-8 text in column 'text'",
        ),
        ("a.csv", "text,title\nx,y\nx,y\n  ,y\nx,y\nx,y\n", 4, "has nothing in column 'text'"),
        ("a.jsonl", '{"text": "x", "title": 1}\n' * 4 + '{"text": "x\n', 5, "is not valid JSON: "),
        (
            "a.jsonl",
            '{"text": "x", "ti\n' + '{"text": "x", "title": 1}\n' * 4,
            1,
            "is not valid JSON: ",
        ),
        ("a.jsonl", '{"text": "x", "title": 1}\n' * 4 + '["x"]\n', 5, "is not a JSON object"),
        (
            "a.jsonl",
            '{"text": "x", "title": 1}\n' * 4 + '{"text": "x"}\n',
            5,
            "has nothing in column 'title'",
        ),
        (
            "a.jsonl",
            '{"text": "x", "title": 1}\n' * 4 + '{"text": ["x"], "title": 1}',
            5,
            "has a list in column 'text'",
        ),
        (
            "a.jsonl",
            '{"text": "x", "title": 1}\n' * 4 + '{"text": "\\ud800", "title": 1}',
            5,
            "is not UTF-8 text",
        ),
    ],
)
def test_a_broken_row_is_named_and_left_out(
    tmp_path: Path, name: str, content: str | bytes, line: int, wrong: str
) -> None:
    spec, said = write(tmp_path / name, content), []
    rows = read_rows(spec, COLUMNS, say=said.append)
    assert rows.skipped == len(said) == 1 and len(rows.rows) == 4
    assert said[0].startswith(f"left out: {spec} line {line} {wrong}") and "\n" not in said[0]
    with pytest.raises(UserError, match=re.escape(f"{spec} line {line} {wrong}")):
        read_rows(spec, COLUMNS, strict=True)


def test_only_five_broken_rows_are_printed(tmp_path: Path) -> None:
    spec, said = write(tmp_path / "a.csv", "text,title\nx,y\n" + "x\n" * 1007), []
    assert read_rows(spec, COLUMNS, say=said.append).skipped == 1007
    assert len(said) == 6 and said[-1] == f"left out: 1,002 more broken rows of {spec}"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.csv", "artist,lyric\nx,y\n", r"no column 'text' or 'lyrics' \(did you mean "
                                         r"lyric\?\).*: artist, lyric\. Use --text-column"),
        ("a.csv", "text,name\nx,y\n", "no column 'title' or 'song'.*: text, name. Use "
                                      "--title-column NAME"),
        ("a.csv", "I love you,1\nx,2\n", ": I love you, 1\\. .*first line must name its columns"),
        ("a.csv", "text,title\n", "holds no row that can be read; give other data"),
        ("a.csv", "", "holds no row"),
        ("a.csv", "text,title\nx\n", "holds no row that can be read: .* line 2 has 1 cells"),
        ("a.csv", "text,text,title\nx,y,z\n", "line 1 names the column 'text' twice"),
        ("a.csv", 'text,"title\nx,"y"\n', "line 1 should name the columns, but has a quote"),
        ("a.csv", "text,title\nx,y\n".encode("utf-16"), "is not UTF-8 text; it seems to be UTF-16; "
                                                        "convert"),
        ("a.json", '[{"text": "x"},', "is not valid JSON"),
        ("a.json", '{"data": [{"paragraphs": [], "title": "x"}]}', "no column 'text' or "
                                                                   "'lyrics'.*: paragraphs, title"),
        ("a.json", "3", "row 1 is not a JSON object"),
        ("a.txt", "a poem\n", "no column 'title' or 'song'.*: text"),
        ("a.parquet", b"PAR1", "not a sound parquet file"),
        ("a.csv.gz", b"\x1f\x8b\x08 torn", "not a sound gzip file"),
        ("a.xlsx", "x", "has none of the suffixes .csv"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, name: str, content: str | bytes, error: str) -> None:
    with pytest.raises(UserError, match=error) as caught:
        read_rows(write(tmp_path / name, content), COLUMNS)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("spec", ["none.csv", "no/*.csv", "nowhere"])
def test_a_missing_file_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"no such data: {spec}; give files")):
        read_rows(spec, COLUMNS)


# ---- real files

# MRPC and the Korean files have no quoting. rte is quoted, although its README denies it.
UNQUOTED = ("korean/", "paraphrase/mrpc")
NAMES = (
    "sentence",
    "sentence1",
    "sentence_A",
    "#1 String",
    "document",
    "premise",
    "description",
    "text",
    "ctx",
)
NAMES += ("article", "dialogue", "source_path")


def listed() -> list[tuple[str, int]]:
    """The files of rows that the data's README lists, with their numbers of rows."""
    table = (DATA / "README.md").read_text() if DATA.is_dir() else ""
    return [
        (n, int(c.replace(",", "")))
        for n, c in re.findall(r"(?m)^\| `(\S+)` \|.*\| ([\d,]+) rows \|", table)
    ]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_real_files_are_read_as_pandas_reads_them() -> None:
    """Every row is read, and every cell equals that of pandas with the right delimiter and
    quoting."""
    import pandas

    assert len(listed()) > 40
    for name, count in listed():
        rows = read_rows(str(DATA / name), {"text": NAMES}, strict=True).rows
        assert len(rows) == count, name
        if not name.endswith("jsonl"):
            quoting: Any = csv.QUOTE_NONE if name.startswith(UNQUOTED) else csv.QUOTE_MINIMAL
            tabs = (
                "\t"
                if name.endswith((".tsv", ".txt")) or name.startswith(("cs224n", "paraphrase"))
                else ","
            )
            frame = pandas.read_csv(
                DATA / name, sep=tabs, quoting=quoting, dtype=str, keep_default_na=False
            )
            column = next(n for n in NAMES if n in frame)
            assert [row["text"] for row in rows] == frame[column].tolist(), name


# ---- training rows and validation rows

TEXTS = st.lists(st.text("ab \n", max_size=4), min_size=2, max_size=40)


@given(texts=TEXTS, order=st.randoms(use_true_random=False))
def test_hold_out_ignores_order_and_repeats(texts: list[str], order: random.Random) -> None:
    same = {" ".join(text.split()) for text in texts}
    if len(same) == 1:
        with pytest.raises(UserError, match="same text; give --val-data"):
            hold_out(texts)
        return
    train, val = hold_out(texts)
    assert sorted([*train, *val]) == list(range(len(texts))) and len(train) and len(val)
    held = {" ".join(texts[id].split()) for id in val}
    assert not held & {" ".join(texts[id].split()) for id in train}
    assert len(held) == max(1, round(len(same) / 10))
    again = [text.upper() for text in [*texts, *texts[:3]]]
    order.shuffle(again)
    assert {" ".join(again[id].lower().split()) for id in hold_out(again)[1]} == held


@given(train=TEXTS, val=TEXTS)
def test_duplicates_ignore_space_and_case(train: list[str], val: list[str]) -> None:
    wanted = sum(any(a.split() == b.split() for b in val) for a in train)
    upper = [text.upper() for text in train]
    assert count_duplicates(train, val) == count_duplicates(upper, val) == wanted
    assert count_duplicates(train, []) == 0


def test_held_out_rows_are_a_fair_sample() -> None:
    train, val = hold_out([str(n) for n in range(10_000)])
    assert (
        len(val) == 1000
        and abs(val.mean() - 5000) < 300
        and np.all(np.diff(val) > 0)
        and np.all(np.diff(train) > 0)
    )
