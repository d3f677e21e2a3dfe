"""Tables, JSON, parquet and gzip are read as people write them, and also when they are damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from tasks.classification.labels import find_labels, label_name, nfc
from tasks.generation.squad import expand
from text import corpus, encodings, tables
from text.corpus import TextFiles, records_of
from text.rows import Row, read_rows
from text.tokenizer_training import open_input

TEXT = {"text": ("text",)}
DEEP = "[" * 100_000 + "]" * 100_000


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pretraining(path: Path, say: Callable[[str], None] = print) -> list[str]:
    return [text for text, _ in TextFiles([path], "text", say).segments()]


def fine_tuning(path: Path, say: Callable[[str], None] = print) -> list[str]:
    return [row["text"] for row in read_rows(str(path), TEXT, say=say).rows]


def tokenizer(path: Path, say: Callable[[str], None] = print) -> list[str]:
    return list(open_input([str(path)], "text", say))


def tools(path: Path, say: Callable[[str], None] = print) -> list[str]:
    return [cells.get("text", "") for _, cells in records_of(path) if isinstance(cells, dict)]


CONSUMERS = [pretraining, fine_tuning, tokenizer, tools]


def table(rows: Sequence[Sequence[str]], **how: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **how).writerows(rows)
    return out.getvalue()


def parquet(columns: dict[str, Any], **how: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out, **how)
    return out.getvalue()


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def rows_of(path: Path) -> list[tuple[str, ...] | str]:
    return [
        tuple(cells.values()) if isinstance(cells, dict) else cells for _, cells in records_of(path)
    ]


# ---- tables


CELL = st.text(st.sampled_from(list("ab'\"\t,; \n\r\\|é한\u2028\x85\x1c\0")), max_size=8)
DELIMITERS = st.sampled_from(tables.DELIMITERS)
QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])


@given(st.data(), st.integers(1, 4), DELIMITERS, QUOTING, st.sampled_from(["\n", "\r\n", "\r"]))
@settings(max_examples=200, deadline=None)
def test_tables_of_csv_are_read_back(tmp_path_factory, data, n, delimiter, quoting, end) -> None:
    rows = data.draw(st.lists(st.tuples(*[CELL] * n), min_size=1, max_size=6))
    # Python before 3.13 does not quote a cell with the other line end
    lost = {"\n": "\r", "\r": "\n", "\r\n": ""}[end]
    rows = [tuple(cell.replace(lost, "") if lost else cell for cell in row) for row in rows]
    header = ("text", "two", "three", "four")[:n]
    text = table([header, *rows], delimiter=delimiter, quoting=quoting, lineterminator=end)
    assert rows_of(write(tmp_path_factory.mktemp("t") / "a.csv", text)) == rows


PLAIN_TABS: dict[str, Any] = {
    "delimiter": "\t",
    "quoting": csv.QUOTE_NONE,
    "quotechar": None,
    "lineterminator": "\n",
}
PLAIN = st.text(st.sampled_from(list("ab',; \n|\té")), max_size=6)


@given(st.data(), st.integers(2, 3), DELIMITERS, QUOTING)
@settings(max_examples=100, deadline=None)
def test_a_stray_quote_breaks_only_its_row(tmp_path_factory, data, n, delimiter, quoting) -> None:
    drawn = data.draw(st.lists(st.tuples(*[PLAIN] * n), min_size=1, max_size=6))
    rows = [(f"r{i}{first}", *rest) for i, (first, *rest) in enumerate(drawn)]
    rows += [(f"p{i}", *[f"a{delimiter} b"] * (n - 1)) for i in range(12)]
    lines = [
        table([row], delimiter=delimiter, quoting=quoting, lineterminator="\n")
        for row in [tuple("xyz")[:n], *rows]
    ]
    struck = data.draw(st.integers(1, len(rows)))
    at = data.draw(st.integers(0, len(lines[struck]) - 1))
    lines[struck] = f'{lines[struck][:at]}"{lines[struck][at:]}'
    found = rows_of(write(tmp_path_factory.mktemp("t") / "a.csv", "".join(lines)))
    others = [row for i, row in enumerate(rows, 1) if i != struck]
    assert [row for row in found if row in others] == others


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_quote_never_swallows_later_rows(
    tmp_path: Path, consumer: Callable[..., list[str]]
) -> None:
    texts = ['"' * (i == 10) + f"the man was here {i}" for i in range(400)]
    lines = "".join(f"{i}\t{text}\n" for i, text in enumerate(texts))
    assert consumer(write(tmp_path / "q.tsv", f"id\ttext\n{lines}")) == texts


@pytest.mark.parametrize("consumer", [pretraining, fine_tuning, tokenizer])
def test_two_stray_quotes_do_not_join_the_rows_between(
    tmp_path: Path, consumer: Callable[..., list[str]]
) -> None:
    """Row 10 opens with a stray quote and row 300 ends with one. The others are quoted properly."""
    sound = ['"he said ""no"", twice"' if i % 7 == 0 else f"plain {i}" for i in range(400)]
    lines = [f"{i},{text}\n" for i, text in enumerate(sound)]
    lines[150:300] = [f"{i},plain {i}\n" for i in range(150, 300)]
    lines[160], lines[290] = '160,"open\n', '290,a screen of 19"\n'
    said: list[str] = []
    path = write(tmp_path / "a.csv", "id,text\n" + "".join(lines))
    found = consumer(path, said.append)
    assert len(found) == 399 and 'a screen of 19"' in found and 'he said "no", twice' in found
    assert said == [f"left out: {path} line 162 {tables.UNCLOSED}"]


@pytest.mark.parametrize(
    "odd",
    [
        ['"no" he said', "x"],
        ['"open', "x"],
        ["x", '"a" and "b"'],
        ['"a"b"', '"c"'],
        ["x", '"no "way" here"'],
        ['"a', 'b"c'],
    ],
)
def test_tabs_win_over_quotes_that_break_a_row(tmp_path: Path, odd: list[str]) -> None:
    """Most files with tabs have no quoting, even if most of their quotes look like it."""
    rows = [["one", "two"], *[[f'"{i}"', "y"] for i in range(9)], odd, ["z", "y"]]
    path = write(tmp_path / "a.tsv", "one\ttwo\n" + table(rows[1:], **PLAIN_TABS))
    found = [tuple(row) for row in [*[[f"{i}", "y"] for i in range(9)], odd, ["z", "y"]]]
    assert rows_of(path) == found


def test_a_broken_cell_of_several_lines_is_not_cut(tmp_path: Path) -> None:
    rows = table([("one", "two"), *[(f"{i}", "a\nb") for i in range(9)]], delimiter="\t")
    path = write(tmp_path / "a.tsv", rows.replace('5\t"a', '5\t"a "no" a'))
    found = rows_of(path)
    assert tables.UNCLOSED in found
    assert all(isinstance(row, str) or row[1] == "a\nb" for row in found)


def test_verses_with_a_delimiter_each_stay_one_cell(tmp_path: Path) -> None:
    verses = "".join(f'Of summer {i}, and of "rain"\n' for i in range(40))
    rows = [("id", "text"), ("1", verses), ("2", "x"), ("3", verses)]
    for end in ("\n", "\r\n"):
        path = write(tmp_path / "a.csv", table(rows, lineterminator=end))
        assert pretraining(path) == [verses, "x", verses]


def test_unreadable_rows_are_named_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,text\n" + "1,x\n" + "2\n" * 1007 + "3,y\n")
    said: list[str] = []
    assert pretraining(path, said.append) == ["x", "y"]
    assert said[0] == f"left out: {path} line 3 has 1 cells where the first line names 2 columns"
    assert len(said) == 6 and said[-1] == f"left out: 1,002 more broken rows of {path}"


def test_quotes_are_judged_where_the_first_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SAMPLE", 1000)
    plain = [f"row {i}" for i in range(1000)]
    for late in ('"Yes," he said', '"one, two"'):
        rows = "".join(
            f"{i},{text}\n" for i, text in enumerate([*plain, *[late.replace(",", "")] * 50])
        )
        found = pretraining(write(tmp_path / "a.csv", f"id,text\n{rows}"))
        assert found[:1000] == plain
        assert set(found[1000:]) == {late.replace(",", "") if "said" in late else "one two"}


def test_a_cell_longer_than_the_sample_is_one_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SAMPLE", 1000)
    long = "a line\n" * 400
    path = write(tmp_path / "a.csv", table([("id", "text"), ("1", long), ("2", "x")]))
    assert pretraining(path) == [long, "x"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("text\n", []),
        ("", []),
        ("text,n\n\n\nx,1\n\n", [("x", "1")]),
        ("text\nwith, a comma\n\tand a tab\n", [("with, a comma",), ("\tand a tab",)]),
        ('"text,n";b\nx;y\n', [("x", "y")]),
        ("text,n\ra,1\rb,2", [("a", "1"), ("b", "2")]),
        ("text\tn\na\rb\t1\n", [("a\rb", "1")]),
        ("text,n\na\0b,1\n", [("a\0b", "1")]),
    ],
)
def test_unusual_tables_are_read(tmp_path: Path, text: str, rows: list[tuple[str, ...]]) -> None:
    assert rows_of(write(tmp_path / "a.csv", text)) == rows


def test_the_wanted_column_decides_between_delimiters(tmp_path: Path) -> None:
    assert pretraining(write(tmp_path / "a.csv", "a|b|c,text\n1,x | y\n")) == ["x | y"]


# ---- JSON


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8)
)
@settings(max_examples=100, deadline=None)
def test_json_lines_are_read_back(tmp_path_factory, texts: list[str]) -> None:
    """U+2028, U+0085 and similar characters do not end a line."""
    path = write(tmp_path_factory.mktemp("j") / "a.jsonl", jsonl(["x\u2028y\x85z", *texts]))
    assert pretraining(path) == tools(path) == ["x\u2028y\x85z", *texts]


@pytest.mark.parametrize(
    "line", ['{"text": "x', "[1]", DEEP, f'{{"text": {"1" * 5000}}}', '{"text": 3}', "3", "\0"]
)
def test_a_broken_json_line_is_left_out(tmp_path: Path, line: str) -> None:
    lines = jsonl(["a"]) + line + "\n" + jsonl(["b"])
    for name in ("a.jsonl", "a.json"):
        said: list[str] = []
        path = write(tmp_path / name, lines)
        assert pretraining(path, said.append) == ["a", "b"]
        assert (
            len(said) == 1
            and said[0].startswith(f"left out: {path} line 2 ")
            and len(said[0]) < 400
        )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("indent", [None, 1])
def test_one_json_document_gives_its_rows(tmp_path: Path, name: str, indent: int | None) -> None:
    rows = [{"text": "a"}, {"text": "b\n"}]
    for content in (rows, {"version": 1, "data": rows}):
        path = write(tmp_path / name, json.dumps(content, indent=indent))
        assert pretraining(path) == tools(path) == ["a", "b\n"]
    listed = "[" + ",\n".join(map(json.dumps, rows)) + "]"
    assert tools(write(tmp_path / name, listed)) == ["a", "b\n"]


def test_a_text_with_a_lone_surrogate_is_kept(tmp_path: Path) -> None:
    assert pretraining(write(tmp_path / "a.jsonl", '{"text": "cut \\ud83d"}\n')) == ["cut \ud83d"]


# ---- consumers agree

DOCUMENT = st.text(st.sampled_from(list("ab \n\t,\"'é한\u2028")), min_size=1, max_size=12).filter(
    str.strip
)


@given(
    st.lists(DOCUMENT, min_size=1, max_size=8),
    st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_all_commands_read_the_same_rows(
    tmp_path_factory, texts: list[str], kind: str, packed: bool
) -> None:
    rows = [("id", "text"), *((str(i), text) for i, text in enumerate(texts))]
    content = {
        "csv": lambda: table(rows).encode(),
        "tsv": lambda: table(rows, delimiter="\t", lineterminator="\n").encode(),
        "jsonl": lambda: jsonl(texts).encode(),
        "json": lambda: json.dumps([{"text": text} for text in texts]).encode(),
        "parquet": lambda: parquet({"id": list(range(len(texts))), "text": texts}),
    }[kind]()
    path = write(
        tmp_path_factory.mktemp("c") / f"a.{kind}", gzip.compress(content) if packed else content
    )
    for consumer in CONSUMERS:
        assert consumer(path) == texts, consumer


def test_reading_resumes_at_any_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 40)
    files = [
        write(tmp_path / "a.csv", 'id,text\n1,a\n2\n3,"b\nc"\n4,d\n'),
        write(tmp_path / "b.jsonl", jsonl(["e"]) + "no\n" + jsonl(["f", "g"])),
        write(tmp_path / "c.parquet", parquet({"text": ["h", None, "i", "j"]}, row_group_size=2)),
        write(tmp_path / "d.txt", "word " * 30 + "\n<|endoftext|>\nk\n"),
    ]
    source = TextFiles(files)
    states, whole = [source.state()], []
    for segment in source.segments():
        whole.append(segment)
        states.append(source.state())
    assert len(whole) > 13
    for n, state in enumerate(states):
        assert list(TextFiles(files).segments(state)) == whole[n:]


# ---- parquet


def test_each_type_of_parquet_column_is_handled(tmp_path: Path) -> None:
    import pyarrow as pa

    texts = ["a", "b", "a"]
    columns = {
        "large": pa.array(texts, pa.large_string()),
        "dictionary": pa.array(texts).dictionary_encode(),
    }
    columns |= {
        "nothing": pa.nulls(3),
        "struct": pa.array([{"x": {"y": 1}}] * 3),
        "text": pa.array(texts),
    }
    columns |= {"far": pa.array([2**62] * 3, pa.timestamp("us"))}
    path = write(tmp_path / "a.parquet", parquet(columns))
    for column, expected in {
        "large": texts,
        "dictionary": texts,
        "nothing": [""] * 3,
        "text": texts,
    }.items():
        assert [text for text, _ in TextFiles([path], column).segments()] == expected
    with pytest.raises(UserError, match="row 1 holds dict in column 'struct', not text"):
        list(TextFiles([path], "struct").segments())
    assert fine_tuning(path) == texts


def test_bad_bytes_in_parquet_break_only_their_row(tmp_path: Path) -> None:
    import pyarrow as pa

    raw = pa.array([b"a", b"caf\xe9", b"b"])
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = write(tmp_path / "a.parquet", parquet({"text": text}))
    said: list[str] = []
    assert pretraining(path, said.append) == ["a", "b"] and "row 2 is not UTF-8 text" in said[0]
    assert fine_tuning(path) == ["a", "b"]


# ---- damage


def damaged_parquet() -> bytes:
    data = bytearray(
        parquet({"text": [f"some text {i}" for i in range(3000)]}, compression="snappy")
    )
    data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
    return bytes(data)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return (
        data[:middle]
        + bytes(byte ^ 0xFF for byte in data[middle : middle + 40])
        + data[middle + 40 :]
    )


SOUND = gzip.compress(jsonl([f"some text {i * i}" for i in range(3000)]).encode())
DAMAGED = {
    "flipped.jsonl.gz": flipped(SOUND),
    "flipped-without-ending.jsonl": flipped(SOUND),
    "torn.jsonl.gz": SOUND[:-9],
    "garbage.jsonl.gz": SOUND + b"garbage",
    "wrong.jsonl.gz": b"\x1f\x8c" + SOUND[2:],
    "page.parquet": damaged_parquet(),
    "end.parquet": parquet({"text": ["a"]})[:-9],
    "text.parquet": b"no parquet",
    "packed.parquet": flipped(gzip.compress(damaged_parquet())),
    "deep.json": DEEP.encode(),
    "archive.jsonl": b"PK\x03\x04\x14\0\0\0" + bytes(range(256)),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_gives_a_one_line_error(
    tmp_path: Path, name: str, consumer: Callable[..., list[str]]
) -> None:
    path = write(tmp_path / name, DAMAGED[name])
    with pytest.raises(UserError) as caught:
        consumer(path, lambda _: None)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 500


# ---- gzip and byte order marks


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_gzip_is_detected_by_its_bytes(tmp_path: Path, consumer: Callable[..., list[str]]) -> None:
    texts = ["one", "two", "three"]
    raw = jsonl(texts).encode()
    for packed in (
        gzip.compress(raw),
        gzip.compress(gzip.compress(raw)),
        gzip.compress(raw[:9]) + gzip.compress(raw[9:]),
        raw,
    ):
        for name in ("a.jsonl", "a.jsonl.gz"):
            assert consumer(write(tmp_path / name, packed)) == texts


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_removed(
    tmp_path: Path, name: str, consumer: Callable[..., list[str]]
) -> None:
    content = {
        "a.csv": "text,n\nx,1\n",
        "a.tsv": "text\tn\nx\t1\n",
        "a.json": '[{"text": "x"}]',
    }.get(name, jsonl(["x"]))
    if name == "a.txt":
        content = "text\tn\nx\t1\n" if consumer is tools else "x"
    raw = b"\xef\xbb\xbf" + content.encode()
    for packed in (raw, gzip.compress(raw)):
        assert consumer(write(tmp_path / name, packed)) == ["x"]


# ---- encodings

KOREAN = "어제 본 영화는 정말 재미있었고, 배우들의 연기도 훌륭했다."
FRENCH = "Le café était fermé, alors nous sommes allés à l'hôtel."
ENCODED = [
    ("utf-16", KOREAN, "UTF-16"),
    ("utf-16", "plain words", "UTF-16"),
    ("utf-16-le", "plain words", "UTF-16LE"),
    ("utf-16-be", FRENCH, "UTF-16BE"),
    ("utf-16-le", KOREAN, "UTF-16LE"),
    ("utf-32", FRENCH, "UTF-32"),
    ("cp949", KOREAN, "CP949"),
    ("latin-1", FRENCH, "ISO-8859-1"),
    ("cp1252", f"“{FRENCH}”", "WINDOWS-1252"),
    ("shift_jis", "これは日本語の文章です。", "SHIFT_JIS"),
    ("cp1251", "Это предложение написано по-русски.", "WINDOWS-1251"),
]


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("encoding", "text", "name"), ENCODED)
def test_the_suggested_command_converts_the_file(
    tmp_path: Path, encoding: str, text: str, name: str, packed: bool
) -> None:
    for file, content in (
        ("it's a text.txt", text),
        ("-a $b.csv", table([("id", "text"), ("1", text)])),
    ):
        raw = content.encode(encoding)
        path = write(tmp_path / file, gzip.compress(raw) if packed else raw)
        with pytest.raises(UserError) as caught:
            pretraining(path)
        line = str(caught.value)
        command = re.search(r"(?:gzip|iconv) .*$", line)
        assert command and f"iconv -f {name} -t UTF-8" in line
        done = subprocess.run(command[0], shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (made,) = tmp_path.glob("*.utf8.*")
        assert pretraining(made) == [text]
        made.unlink()


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_any_bytes_get_advice(data: bytes) -> None:
    assert encodings.conversion_advice("a.txt", data)


def test_utf8_with_a_bad_byte_is_not_called_latin(tmp_path: Path) -> None:
    assert encodings.encoding_of(f"{KOREAN} caf".encode() + b"\xe9") is None
    path = write(tmp_path / "a.csv", f'id,text\n1,"{KOREAN}"\n2,caf'.encode() + b"\xe9 x\n3,y\n")
    said: list[str] = []
    assert pretraining(path, said.append) == fine_tuning(path, said.append) == [KOREAN, "y"]
    assert all(
        "line 3 is not UTF-8 text in column 'text'" in line and "iconv" not in line for line in said
    )
    assert len(said) == 2


def test_a_row_in_another_encoding_gets_advice(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        b'{"text": "a"}\n{"text": "caf\xe9 noir"}\n{"id": "\xe9", "text": "b"}\n',
    )
    said: list[str] = []
    assert pretraining(path, said.append) == fine_tuning(path) == ["a", "b"]
    assert re.search(
        r"line 2 is not UTF-8 text .* iconv -f ISO-8859-1 -t UTF-8 \S+ > \S+$", said[0]
    )


# ---- tokenizer training


def test_tokenizer_training_reads_what_data_reads(tmp_path: Path) -> None:
    texts = ["one text", "another"]
    write(tmp_path / "a.txt.gz", gzip.compress(("\n<|endoftext|>\n".join(texts)).encode()))
    write(tmp_path / "b.csv", table([("id", "text"), ("1", "in a table")]))
    assert list(open_input([str(tmp_path)], "text", print)) == [*texts, "in a table"]
    write(tmp_path / "notes.md", "of any name")
    assert list(open_input([f"{tmp_path}/*.md", str(tmp_path / "a.txt.gz")], "text", print)) == [
        "of any name",
        *texts,
    ]
    for item, said in (
        ("c.bin", "holds tokens, not text"),
        ("d", "is a folder without text"),
        ("e.txt", "no such file"),
    ):
        (tmp_path / "d").mkdir(exist_ok=True)
        write(tmp_path / "c.bin", b"\0" * 8)
        with pytest.raises(UserError, match=said):
            open_input([str(tmp_path / item)], "text", print)


def test_standard_input_is_decoded_like_files() -> None:
    assert encodings.decode_input(b"\xef\xbb\xbfcaf\xc3\xa9", "standard input") == "café"
    for raw, said in (
        (FRENCH.encode("latin-1"), "iconv -f ISO-8859-1"),
        (gzip.compress(b"x"), "gzip -dc"),
        ("x y".encode("utf-16"), "-f UTF-16"),
    ):
        with pytest.raises(UserError, match=said):
            encodings.decode_input(raw, "standard input")


# ---- questions as SQuAD has them

QUESTIONS = {
    "context": ("context",),
    "question": ("question",),
    "answer": ("answer",),
    "answers": ("answers",),
}


def squad(answers: Any) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "title": "t", "context": f"c{i}", "question": "q?", "answers": answers}
        for i in range(3)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "nested"])
def test_squad_of_the_hub_is_read(tmp_path: Path, kind: str) -> None:
    found = {"text": ["rock", "a rock", "rock"], "answer_start": [20, 18, 20]}
    rows = [*squad(found), *squad({"text": [], "answer_start": []})]
    nested = [{"text": text, "answer_start": 0} for text in found["text"]]
    article = {
        "paragraphs": [
            {"context": f"c{i}", "qas": [{"id": "a", "question": "q?", "answers": given}]}
            for given in (nested, [])
            for i in range(3)
        ]
    }
    content = {
        "jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
        "json": lambda: json.dumps(rows),
        "parquet": lambda: parquet({name: [row[name] for row in rows] for name in rows[0]}),
        "nested": lambda: json.dumps({"data": [article]}),
    }[kind]()
    path = write(tmp_path / f"a.{kind.replace('nested', 'json')}", content)
    said: list[str] = []
    read = read_rows(str(path), QUESTIONS, optional=("answers",), expand=expand, say=said.append)
    assert [row.fields for row in read.rows] == [
        {"context": f"c{i}", "question": "q?", "answer": "rock", "answers": "rock\na rock"}
        for i in range(3)
    ]
    assert read.skipped == 3 and all("has nothing in column 'answer'" in line for line in said)
    asked = read_rows(str(path), QUESTIONS, optional=("answers", "answer"), expand=expand)
    assert len(asked.rows) == 6  # every row gets an answer


ANSWERS: list[
    tuple[dict[str, Any], str | None]
] = [  # the content of a row, and the answers that are read from it
    ({"answers": "rock"}, "rock"),
    ({"answers": "rock\na rock"}, "rock\na rock"),
    ({"answers": ["rock", "a rock", "rock"]}, "rock\na rock"),
    ({"answers": [{"text": "rock", "answer_start": 1}, "a rock"]}, "rock\na rock"),
    ({"answers": [{"text": ["rock", "a rock"]}]}, "rock\na rock"),
    ({"answers": {"text": "rock"}}, "rock"),
    ({"answers": ["", "rock"]}, "rock"),
    ({"answers": [1871, 18.5]}, "1871\n18.5"),
    ({"answers": 1871}, "1871"),
    ({"answer": {"text": "rock", "answer_start": 1}}, "rock"),
    ({"answer": {"text": ["rock", "a rock"], "answer_start": [1, 0]}}, "rock\na rock"),
    ({"answer": ["rock", "a rock"]}, "rock\na rock"),
    ({"answer": [{"text": "rock"}]}, "rock"),
    ({"answer": "rock", "answers": []}, "rock"),
    ({"answer": ["rock"], "answers": "rock\na rock"}, "rock\na rock"),
    ({"answer": None, "answers": ["rock"]}, "rock"),
    ({"answer": "rock"}, "rock"),
    ({"answer": "rock", "answers": "rock\na rock"}, "rock\na rock"),
    ({"answers": []}, None),
    ({"answers": None}, None),
    ({"answers": ""}, None),
    ({"answers": {"spans": ["rock"]}}, None),
    ({"answers": [["rock", {"span": 3}]]}, None),
    ({"answers": True}, None),
    ({}, None),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("given", "answers"), ANSWERS)
def test_answers_are_read_in_every_layout(
    tmp_path: Path, given: dict[str, Any], answers: str | None, nested: bool
) -> None:
    asked = {"question": "q?"} | given
    row = {"context": "c", "qas": [asked]} if nested else {"context": "c"} | asked
    sound = {"context": "s", "question": "q?", "answer": "x"}
    path = write(tmp_path / "a.jsonl", f"{json.dumps(row)}\n{json.dumps(sound)}\n")
    read = read_rows(
        str(path), QUESTIONS, optional=("answers",), expand=expand, say=lambda line: None
    )
    found = [row.fields for row in read.rows if row["context"] == "c"]
    assert read.skipped == (answers is None) and len(found) == (answers is not None)
    if answers is not None:
        assert found[0]["answer"] == answers.split("\n")[0]
        assert (found[0]["answers"] or found[0]["answer"]) == answers


# ---- labels


def test_labels_match_in_both_unicode_forms() -> None:
    one, other = "café", "cafe\u0301"
    rows = [Row({"label": label}, "") for label in (one, other, "Thé", " thé "[1:], other)]
    assert find_labels(rows) == ("Thé", "café", "thé")  # capitals still tell labels apart
    assert label_name(other) == nfc(other) == one


def test_labels_keep_the_order_of_their_spelling() -> None:
    """A run from before labels were normalized must find the rows of its head again."""
    for form in (("caf\u0301e", "cafz"), ("\u00e9", "z")):
        rows = [Row({"label": label}, "") for label in form]
        assert find_labels(rows) == tuple(map(nfc, sorted(form)))


def test_a_broken_question_breaks_no_other() -> None:
    asked = [{"id": "1", "question": "a"}, {"id": "2"}, "none", {"id": "3", "question": "c"}]
    found = list(
        expand(("row 1", {"paragraphs": [{"context": "x", "qas": asked}, {"qas": asked}]}))
    )
    kept = [cells if isinstance(cells, str) else cells["id"] for _, cells in found]
    assert [kept[0], kept[3]] == ["1", "3"]
    assert len(kept) == 5 and all("not in SQuAD" in kept[n] for n in (1, 2, 4))
