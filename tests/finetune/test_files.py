"""Which rows each task reads from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config import UserError
from support import REPO
from tasks.classification.labels import find_labels
from tasks.generation.description import Answer
from toy_runs import CLASSIFICATION, description_of, set_up_task, source_of

SHARED = REPO.parent / "shared" / "data"


def rows_of(
    name: str, inputs: Path, file: Path, text: str, **options: Any
) -> tuple[Any, list[dict[str, str]]]:
    """A task that is set up on a file with this text, and all rows of the file."""
    file.write_text(text)
    task = set_up_task(name, inputs, data=str(file), **options)
    return task, [row.fields for row in task.source.read(str(file), "validation")]


def test_squad_files_are_read_nested_or_flat(inputs: Path, tmp_path: Path) -> None:
    answers = [{"text": text, "answer_start": 0} for text in ("two men", "men", "two men")]
    asked: list[dict[str, Any]] = [
        {"id": "a", "question": "who", "answers": answers},
        {"id": "b", "question": "why", "answers": answers[1:2]},
        {"id": "c", "question": "what", "answers": [], "is_impossible": True},
    ]
    data = {"data": [{"paragraphs": [{"context": f"{n} two men", "qas": asked} for n in range(5)]}]}
    task, rows = rows_of("qa", inputs, tmp_path / "squad.json", json.dumps(data))
    told = f"{tmp_path / 'squad.json'}: 5 rows have an empty field and are left out"
    first = {
        "context": "0 two men",
        "question": "who",
        "answer": "two men",
        "answers": "two men\nmen",
        "id": "a",
    }
    assert rows[0] == first and len(rows) == 10 and rows[1]["answers"] == "men"
    assert task.source.warnings[0] == told
    assert {row["context"] for row in task.train.rows}.isdisjoint(
        row["context"] for row in task.val.rows
    )
    assert task.val.references[0] == "two men\nmen"
    flat = "passage,question,answer\n" + "".join(f"p{n},q,a\n" for n in range(3))
    _, rows = rows_of("qa", inputs, tmp_path / "flat.csv", flat)
    assert rows[0] == {"context": "p0", "question": "q", "answer": "a", "answers": "", "id": ""}
    _, rows = rows_of(
        "qa", inputs, tmp_path / "list.json", json.dumps([first, first | {"context": "1"}])
    )
    assert rows[0] == first


def test_answers_lost_by_truncation_are_counted(inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"context": "far " * 40 + end, "question": "?", "answer": "here"}
        for end in ("here", "there", "")
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    for seq_len, lost in ((30, 2), (150, 0)):
        task, _ = rows_of(
            "qa", inputs, tmp_path / "cut.jsonl", text, val_data="toy", seq_len=seq_len
        )
        assert any(
            "rows lose their answer: truncation " in text for text in task.source.warnings
        ) == bool(lost)
        assert not lost or task.source.warnings[1].startswith("2 of 3 ")


def test_a_lyrics_prompt_is_the_title_or_the_first_line(inputs: Path, tmp_path: Path) -> None:
    songs = 'artist,song,text\nAda,Ferry,"\none\ntwo\n"\n,Tide,only\nBob,,three\n'
    parts = {
        False: [("one", "\ntwo"), ("only", ""), ("three", "")],
        True: [("Ferry, by Ada", "\n\none\ntwo"), ("Tide", "\n\nonly"), ("three", "")],
    }
    for with_title, expected in parts.items():
        task, _ = rows_of("lyrics", inputs, tmp_path / "songs.csv", songs, with_title=with_title)
        about, cfg = task.description, task.cfg
        rows = task.source.read(str(tmp_path / "songs.csv"), "train")
        found = [about.as_eval_example(row, cfg) for row in rows]
        assert [("".join(q.prompt), "".join(q.answer)) for q in found] == expected
        assert ["".join(about.example(row, cfg).answer) for row in rows] == [
            a + b for a, b in expected
        ]
    (tmp_path / "titles.csv").write_text("song,artist\nDawn,Cy\n")
    (row,) = task.source.read(str(tmp_path / "titles.csv"), "test")
    assert task.description.as_predict_example(row, task.cfg).prompt == ("Dawn, by Cy",)


def test_text_rows_are_documents_lines_or_parts(inputs: Path, tmp_path: Path) -> None:
    lines = [f"line {n} of it\n" for n in range(25)]
    task, (document,) = rows_of("text", inputs, tmp_path / "one.txt", "".join(lines))
    assert document == {"text": "".join(lines)}
    assert "".join(
        row["text"] for row in task.source.read(str(tmp_path / "one.txt"), "train")
    ) == "".join(lines)
    assert {row["text"] for row in task.val.rows}.isdisjoint(row["text"] for row in task.train.rows)
    _, rows = rows_of("text", inputs, tmp_path / "one.txt", "".join(lines), lines=True)
    assert [row["text"] + "\n" for row in rows] == lines
    _, rows = rows_of(
        "text", inputs, tmp_path / "reviews.tsv", "id\tdocument\tlabel\n1\t좋아요\t1\n2\t별로\t0\n"
    )
    assert [row["text"] for row in rows] == ["좋아요", "별로"]


def test_predict_rows_need_no_answer(inputs: Path, tmp_path: Path) -> None:
    for name, text in (("summarize", "article\nsome news\n"), ("qa", "context,question\na,b\n")):
        (tmp_path / "asked.csv").write_text(text)
        source, about = source_of(name), description_of(name)
        (row,) = source.read(str(tmp_path / "asked.csv"), "test")
        asked = about.as_predict_example(row, source.cfg)
        assert not asked.true_answer and asked.prompt == about.example(row, source.cfg).prompt
        with pytest.raises(UserError, match=r"has no column '(summary|answer)'"):
            source.read(str(tmp_path / "asked.csv"), "train")


def test_sonnets_round_trip_in_the_format_of_cs224n(inputs: Path, tmp_path: Path) -> None:
    poems = [
        [f"{n} the line {i}" for i in range(lines)] for n, lines in ((7, 14), (99, 15), (126, 12))
    ]
    text = "A header\r\nof an edition\r\n\r\n"
    text += "".join(
        f"\r\n{n}\r\n\r\n" + "\r\n".join(poem) + "\r\n\r\n"
        for n, poem in zip((7, 99, 126), poems, strict=True)
    )
    task, rows = rows_of("sonnets", inputs, tmp_path / "poems.txt", text)
    assert [row["number"] for row in rows] == ["7", "99", "126"]
    assert [row["text"].split("\n") for row in rows] == poems
    asked = task.source.read(str(tmp_path / "poems.txt"), "test")
    examples = [task.description.as_predict_example(row, task.cfg) for row in asked]
    assert ["".join(each.prompt) for each in examples] == [
        "\n".join(poem[:3]) + "\n" for poem in poems
    ]
    assert task.description.stop_lines == 11
    answers = [Answer("".join(each.prompt), each.true_answer, "") for each in examples]
    task.description.write(tmp_path / "written.txt", asked, answers)
    _, again = rows_of(
        "sonnets", inputs, tmp_path / "again.txt", (tmp_path / "written.txt").read_text()
    )
    assert again == rows


LABELLED_FILES = [  # task, file, its content, and the row that is read: texts, label, id
    (
        "sentiment",
        "sst.csv",
        "\tid\tsentence\tsentiment\n0\tf4a\t It 's a \"film .\t3\n",
        ("It 's a \"film .",),
        "3",
        "f4a",
    ),
    (
        "sentiment",
        "nsmc.txt",
        "id\tdocument\tlabel\n97\t좋아요, 또\t1\n",
        ("좋아요, 또",),
        "1",
        "97",
    ),
    ("sentiment", "stars.jsonl", '{"review": "fine", "stars": 4.0}\n', ("fine",), "4.0", ""),
    (
        "paraphrase",
        "quora.csv",
        '\tid\tsentence1\tsentence2\tis_duplicate\n1\ta\tWhy?\t"How, so?"\t1.0\n',
        ("Why?", "How, so?"),
        "1.0",
        "a",
    ),
    (
        "paraphrase",
        "mrpc.tsv",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\t"A" said so\tSo "A\n',
        ('"A" said so', 'So "A'),
        "0",
        "",
    ),
    (
        "nli",
        "rte.tsv",
        "sentence1\tsentence2\tlabel\tidx\nIt rained.\tIt is wet.\t1\t5\n",
        ("It rained.", "It is wet."),
        "1",
        "5",
    ),
    (
        "nli",
        "sick.tsv",
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n2\tA b\tA "
        "c\t3.6\tNEUTRAL\n",
        ("A b", "A c"),
        "NEUTRAL",
        "2",
    ),
    (
        "nli",
        "xnli.tsv",
        "sentence1\tsentence2\tgold_label\n눈이 왔다.\t춥다.\tneutral\n",
        ("눈이 왔다.", "춥다."),
        "neutral",
        "",
    ),
    (
        "topics",
        "ag.csv",
        'label,title,description\n3,"Cup, won","A ""late"" goal."\n',
        ('Cup, won\nA "late" goal.',),
        "3",
        "",
    ),
    (
        "topics",
        "news.json",
        '{"category": "WELLNESS", "headline": "Sleep", "short_description": "", "authors": "A"}\n',
        ("Sleep",),
        "WELLNESS",
        "",
    ),
]


@pytest.mark.parametrize("case", LABELLED_FILES, ids=lambda case: case[1])
def test_labelled_files_of_many_formats_are_read(case: Any, tmp_path: Path) -> None:
    name, file, text, texts, label, id = case
    (tmp_path / file).write_text(text)
    (row,) = source_of(name).read(str(tmp_path / file), "train")
    assert description_of(name).texts(row) == texts and (row["label"], row["id"]) == (label, id)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_rows_with_unknown_labels_are_left_out(name: str, tmp_path: Path) -> None:
    fields = {
        field: names[0] for field, names in description_of(name).columns.items() if field != "id"
    }
    cells = ["0", "1", "-1", " -1.0 ", "?", "-", "NaN", "1"]
    lines = ["\t".join(fields.values())]
    lines += [
        "\t".join(cell if field == "label" else f"{field} {n}" for field in fields)
        for n, cell in enumerate(cells)
    ]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    for split in ("train", "validation"):
        source = source_of(name)
        found = [row["label"] for row in source.read(str(tmp_path / "rows.tsv"), split)]
        assert found == ["0", "1", "1"]
        (warning,) = source.warnings
        assert warning.startswith(
            f"5 of 8 rows of {tmp_path}/rows.tsv have no known label ('-', '-1', '-1.0', '?', "
            "'NaN')"
        )
    asked = source_of(name).read(str(tmp_path / "rows.tsv"), "test")
    assert [row["label"] for row in asked] == ["0", "1", "", "", "", "", "", "1"]
    (tmp_path / "none.tsv").write_text("\n".join([lines[0], lines[3]]) + "\n")
    with pytest.raises(UserError, match=r"1 of 1 rows of .* have no known label"):
        source_of(name).read(str(tmp_path / "none.tsv"), "validation")


UNREADABLE = {  # files with broken rows: content, the ids of all rows, and which rows are readable
    "rows.csv": (
        "id,text\n7,good\n8,\n9\n9,dull, and long\n,fine\n",
        ["7", "8", "9", "9", ""],
        [1, 1, 1, 0, 1],
    ),
    "rows.tsv": ("text\tid\ngood\tx\na\tb\ty\n\tz\n", ["x", "y", "z"], [1, 0, 1]),
    "rows.jsonl": (
        '{"id": 1, "text": "a"}\n{"id": 2, "te\n{"id": 3, "text": ["a"]}\n{"id": 4, '
        '"text": null}\n{"id": 5}\n',
        ["1", "", "3", "4", "5"],
        [1, 0, 0, 1, 1],
    ),
    "rows.json": ('[{"text": "a"}, 3, {"text": ""}]', ["", "", ""], [1, 0, 1]),
}


@pytest.mark.parametrize("file", UNREADABLE)
def test_unreadable_predict_rows_keep_their_place(file: str, tmp_path: Path) -> None:
    text, ids, answered = UNREADABLE[file]
    (tmp_path / file).write_text(text)
    said: list[str] = []
    source = source_of("sentiment", said.append)
    rows = source.read(str(tmp_path / file), "test")
    assert [row["id"] for row in rows] == ids
    assert [int(not row.fault) for row in rows] == answered
    assert all(f"{tmp_path / file} " in line for line in said) and len(said) >= answered.count(0)
    assert source.warnings == [
        f"{tmp_path / file}: {answered.count(0)} rows could not be read and their answers are empty"
    ]


def test_invalid_utf8_does_not_lose_a_predict_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"id,text\n1,caf\xe9 good\n2,fine\n")
    first, second = source_of("sentiment").read(str(tmp_path / "rows.csv"), "test")
    assert first["text"] == "caf\ufffd good" and not first.fault and second["text"] == "fine"


def test_a_missing_column_names_an_option_only_if_it_exists(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,body\n1,a text\n")
    for name, advice in (("text", "Use --text-column NAME"), ("sonnets", "Rename the column that")):
        with pytest.raises(UserError, match=f"has no column .* {advice}"):
            source_of(name).read(str(tmp_path / "rows.csv"), "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_labelled_files_are_read_completely() -> None:
    three = ("contradiction", "entailment", "neutral")
    expected = {
        ("sentiment", "cs224n/ids-sst-dev.csv"): (881, ("0", "1", "2", "3", "4")),
        ("sentiment", "cs224n/ids-cfimdb-dev.csv"): (196, ("0", "1")),
        ("sentiment", "korean/nsmc_dev.txt"): (2000, ("0", "1")),
        ("paraphrase", "paraphrase/quora-dev.csv"): (2914, ("0", "1")),
        ("paraphrase", "paraphrase/mrpc_test.tsv"): (1380, ("0", "1")),
        ("nli", "nli/rte_dev.tsv"): (222, ("0", "1")),
        ("nli", "nli/sick_dev.tsv"): (500, tuple(word.upper() for word in three)),
        ("nli", "nli/mnli_sample_dev.csv"): (828, ("0", "1", "2")),
        ("nli", "korean/kornli_xnli_dev.tsv"): (2490, three),
        ("topics", "topic/ag_news_dev.csv"): (1000, ("1", "2", "3", "4")),
        ("topics", "topic/bbc_news_dev.jsonl"): (
            300,
            ("business", "entertainment", "politics", "sport", "tech"),
        ),
    }
    for (name, file), (count, labels) in expected.items():
        source = source_of(name)
        rows = source.read(str(SHARED / file), "validation")
        assert (len(rows), find_labels(rows)) == (count, labels) and not source.warnings, file
    student = SHARED / "cs224n/ids-sst-test-student.csv"
    (first, *_) = source_of("sentiment").read(str(student), "test")
    assert first.fields == {
        "text": " Effective but too-tepid biopic",
        "label": "",
        "id": "b7573736a6ddf7be102b7fee0",
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_text_files_are_read_completely() -> None:
    counts = {
        ("sonnets", "cs224n/sonnets.txt"): 131,
        ("sonnets", "cs224n/TRUE_sonnets_held_out_dev.txt"): 12,
        ("sonnets", "cs224n/sonnets_held_out.txt"): 12,
        ("qa", "qa/xquad_en.json"): 934,
        ("lyrics", "lyrics/sacred_harp.csv"): 468,
        ("lyrics", "lyrics/pop_lyrics.csv"): 867,
        ("summarize", "summarization/scitldr_dev.jsonl"): 619,
        ("summarize", "summarization/dialogsum_dev.jsonl"): 500,
        ("text", "korean/nsmc_dev.txt"): 2000,
    }
    for (name, file), count in counts.items():
        source = source_of(name)
        assert len(source.read(str(SHARED / file), "validation")) == count, file
        assert not source.warnings
