"""The files and output of the tools around fine-tuning: mine, backtranslate, ensemble and
compare."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from base.cli import entry_point
from finetune.paraphrase import TASK as PARAPHRASE
from text.rows import read_rows
from tools.mine import overlap

LABELS = ("bad", "fair", "good")


class Done(NamedTuple):
    code: Any
    out: str
    err: str


Tool = Callable[..., Done]


@pytest.fixture
def tool(monkeypatch, capsys) -> Tool:
    """`tool(NAME, *words)` runs a command in this process, which saves its start-up time."""

    def tool(name: str, *words: object) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry_point(importlib.import_module(f"tools.{name}").main)
        return Done(stop.value.code, *capsys.readouterr())

    return tool


def refused(done: Done, *said: str) -> None:
    """Assert one line of error and exit code 2."""
    assert done.code == 2 and not done.out
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert all(text in done.err for text in said), done.err


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- predictions


def draw(n: int, seed: int, sure: float = 1.0) -> np.ndarray:
    """Probabilities (n, K)."""
    return np.random.default_rng(seed).dirichlet([sure] * len(LABELS), n)


def records(
    p: np.ndarray, true: Sequence[str | None], labels: Sequence[str] = LABELS
) -> list[dict[str, Any]]:
    """Lines of a prediction file, as a run writes them."""
    said = [
        {"prediction": labels[of.argmax()], "probabilities": dict(zip(labels, of.tolist()))}
        for of in p
    ]
    known = [{} if label is None else {"label": label} for label in true]
    return [
        {"id": str(n), "text": f"row {n}"} | of | about
        for n, (of, about) in enumerate(zip(known, said, strict=True))
    ]


@pytest.fixture
def runs(tmp_path) -> tuple[list[Path], list[np.ndarray], list[str]]:
    """Three prediction files of 60 rows, their probabilities, and the true labels."""
    true = [LABELS[k] for k in np.random.default_rng(0).integers(0, 3, 60)]
    drawn = [draw(60, seed) for seed in (1, 2, 3)]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", records(p, true)) for name, p in zip("abc", drawn)
    ]
    return files, drawn, true


def by_hand(how: str, members: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The scores of one prediction."""
    total = sum(weights)
    if how == "mean":
        return [sum(w * p[k] for w, p in zip(weights, members)) / total for k in range(3)]
    if how == "geometric":
        products = [
            math.prod(p[k] ** (w / total) for w, p in zip(weights, members)) for k in range(3)
        ]
        return [value / sum(products) for value in products]
    return [sum(w for w, p in zip(weights, members) if max(p) == p[k]) / total for k in range(3)]


@pytest.mark.parametrize("weights", [(), (0.5, 2, 1)])
@pytest.mark.parametrize("how", ["mean", "geometric", "vote"])
def test_an_ensemble_combines_its_members(tool, runs, tmp_path, how, weights) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    files, drawn, true = runs
    words = ["--weights", *weights] if weights else []
    done = tool("ensemble", *files, "--how", how, "--out", tmp_path / "out.jsonl", *words)
    assert done.code == 0, done.err
    found = read_jsonl(tmp_path / "out.jsonl")
    for n, row in enumerate(found):
        expected = by_hand(how, [p[n].tolist() for p in drawn], weights or (1, 1, 1))
        assert [row["probabilities"][label] for label in LABELS] == pytest.approx(
            expected, rel=1e-9
        )
        assert row["probabilities"][row["prediction"]] == pytest.approx(max(expected), rel=1e-9)
        assert (row["id"], row["text"], row["label"]) == (str(n), f"row {n}", true[n])
    for file, line in zip([*files, tmp_path / "out.jsonl"], done.out.splitlines()[1:], strict=True):
        predicted = [row["prediction"] for row in read_jsonl(file)]
        scores = accuracy_score(true, predicted), f1_score(true, predicted, average="macro")
        assert str(file) in line and line.split()[-2:] == [f"{score:.4f}" for score in scores]


def test_a_tie_of_votes_goes_to_the_likelier_label(tool, tmp_path) -> None:
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", records(np.array([p]), [None]))
        for n, p in enumerate([(0.5, 0.1, 0.4), (0.0, 0.2, 0.8)])
    ]
    done = tool("ensemble", *files, "--how", "vote", "--out", tmp_path / "out.jsonl")
    assert done.code == 0 and "without known labels" in done.out
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert row["prediction"] == "good" and row["probabilities"] == {
        "bad": 0.5,
        "fair": 0,
        "good": 0.5,
    }
    assert "label" not in row


@pytest.mark.parametrize("how", ["mean", "geometric", "vote"])
def test_a_member_of_weight_0_changes_nothing(tool, runs, tmp_path, how) -> None:
    files, drawn, true = runs
    # This member even gives a label the probability 0, whose logarithm is not finite.
    drawn[2][:, 0], drawn[2][:, 1] = (0, 1)
    write_jsonl(files[2], records(drawn[2], true))
    assert tool("ensemble", *files[:2], "--how", how, "--out", tmp_path / "two.jsonl").code == 0
    assert (
        tool(
            "ensemble",
            *files,
            "--how",
            how,
            "--weights",
            1,
            1,
            0,
            "--out",
            tmp_path / "three.jsonl",
        ).code
        == 0
    )
    assert read_jsonl(tmp_path / "two.jsonl") == read_jsonl(tmp_path / "three.jsonl")


def test_the_order_of_labels_may_differ_between_runs(tool, runs, tmp_path) -> None:
    files, drawn, true = runs
    turned = write_jsonl(tmp_path / "turned.jsonl", records(drawn[1][:, ::-1], true, LABELS[::-1]))
    assert tool("ensemble", files[0], files[1], "--out", tmp_path / "one.jsonl").code == 0
    assert tool("ensemble", files[0], turned, "--out", tmp_path / "other.jsonl").code == 0
    assert read_jsonl(tmp_path / "one.jsonl") == read_jsonl(tmp_path / "other.jsonl")
    assert tool("compare", files[1], turned, "--json", tmp_path / "same.json").code == 0
    assert json.loads((tmp_path / "same.json").read_text())["accuracy"]["difference"] == 0


def test_compare_prints_the_paired_test(tool, runs, tmp_path) -> None:
    from tasks.classification.confusion import paired_test

    (a, b, _), drawn, true = runs
    numbers = np.array([LABELS.index(label) for label in true])
    drawn[0][np.arange(30), numbers[:30]] += 1  # The first half of a's predictions is correct now.
    write_jsonl(a, records(drawn[0] / drawn[0].sum(1, keepdims=True), true))
    done = tool("compare", a, b, "--seed", 5, "--json", tmp_path / "out.json")
    assert done.code == 0, done.err
    expected = paired_test(numbers, drawn[0].argmax(1), drawn[1].argmax(1), seed=5)
    written = json.loads((tmp_path / "out.json").read_text())
    assert {name: written[name] for name in expected} == expected
    right = (
        float((drawn[0].argmax(1) == numbers).mean()),
        float((drawn[1].argmax(1) == numbers).mean()),
    )
    assert [of["accuracy"] for of in written["scores"]] == pytest.approx(right)
    for figure in (*right, written["scores"][1]["macro_f1"]):
        assert f"{figure:.4f}" in done.out
    assert (
        f"{expected['accuracy']['difference']:+.4f}" in done.out
        and f"p is {expected['mcnemar_p']:.4g}" in done.out
    )
    assert f"only A is right on {expected['wins']}, only B on {expected['losses']}" in done.out


def test_compare_ignores_rows_without_a_label(tool, tmp_path) -> None:
    p, true = draw(40, 1), [LABELS[n % 3] for n in range(40)]
    all_known, some, none = (
        write_jsonl(tmp_path / name, records(p[:n], of))
        for name, n, of in (
            ("20.jsonl", 20, true[:20]),
            ("40.jsonl", 40, [*true[:20], *[""] * 20]),
            ("none.jsonl", 40, [None] * 40),
        )
    )
    for file in (all_known, some):
        assert tool("compare", file, file, "--json", file.with_suffix(".json")).code == 0
    figures = [json.loads(file.with_suffix(".json").read_text()) for file in (all_known, some)]
    assert figures[0]["scores"] == figures[1]["scores"] and figures[1]["rows"] == 20
    refused(tool("compare", none, none), "no row with a known label")


def test_numeric_labels_match_in_any_spelling(tool, tmp_path) -> None:
    """CS224N's files write 1.0 for the label 1."""
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    file = write_jsonl(tmp_path / "a.jsonl", records(p, ["0.0", "1.0"], ("0", "1")))
    assert tool("compare", file, file, "--json", tmp_path / "out.json").code == 0
    assert json.loads((tmp_path / "out.json").read_text())["scores"][0]["accuracy"] == 1


def change(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    """Predictions that do not match the other runs."""
    first = dict(rows[0])
    if how == "fewer":
        return rows[1:]
    if how == "other row":
        return [*rows[:7], rows[7] | {"text": "another"}, *rows[8:]]
    if how == "other truth":
        return [
            rows[0] | {"label": next(label for label in LABELS if label != rows[0]["label"])},
            *rows[1:],
        ]
    if how == "other labels":
        return records(draw(60, 1), [row["label"] for row in rows], ("bad", "fair", "best"))
    if how == "unknown truth":
        return [first | {"label": "superb"}, *rows[1:]]
    if how == "no number":
        return [first | {"probabilities": {"bad": "0.5", "fair": 0.5, "good": 0}}, *rows[1:]]
    if how == "not predictions":
        return [{"text": "a", "label": "bad"}]
    return []


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fewer", "59 rows"),
        ("other row", "row 8"),
        ("other truth", "row 1"),
        ("other labels", "best"),
        ("unknown truth", "superb"),
        ("no number", "line 1"),
        ("not predictions", '"probabilities"'),
        ("empty", "no predictions"),
    ],
)
@pytest.mark.parametrize("name", ["compare", "ensemble"])
def test_files_that_disagree_are_refused(tool, runs, tmp_path, name, how, said) -> None:
    (a, b, _), _, _ = runs
    write_jsonl(b, change(read_jsonl(b), how))
    out = ["--out", tmp_path / "out.jsonl"] if name == "ensemble" else []
    refused(tool(name, a, b, *out), said, "b.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_mistyped_predictions_are_refused(tool, runs, tmp_path) -> None:
    (a, b, c), _, _ = runs
    out = ["--out", tmp_path / "out.jsonl"]
    refused(tool("compare", a), "A.jsonl B.jsonl")
    refused(tool("compare", a, b, c, "--plot", tmp_path / "runs.png"), "no run has logged")
    refused(tool("compare", a, tmp_path / "none.jsonl"), "none.jsonl", "No such file")
    refused(tool("compare", a, b, "--json", a), "also an input file")
    refused(tool("ensemble", a, *out), "two runs or more")
    refused(tool("ensemble", a, b), "--out")
    refused(tool("ensemble", a, b, "--out", b), "also an input file")
    refused(tool("ensemble", a, b, "--out", tmp_path / "no" / "out.jsonl"), "no folder")
    refused(tool("ensemble", a, b, *out, "--weights", 1, 2, 3), "2 numbers")
    refused(tool("ensemble", a, b, *out, "--weights", 1, -1), "at least 0")
    refused(tool("ensemble", a, b, *out, "--weights", 0, 0), "not all 0")
    refused(tool("ensemble", a, b, *out, "--how", "median"), "median")
    assert len(read_jsonl(b)) == 60


# ---- hard examples


PAIRS = [
    ("How do I boil an egg?", "How do I boil an egg, please?", "1.0"),
    ("How do I boil an egg?", 'What is "the way" to cook eggs,\nexactly?', "1.0"),
    ("Who wrote this song?", "Who is this song by?", "1.0"),
    ("Is it far?", "How many miles are left?", "1.0"),
    ("Who wrote this song?", "Who sang this song?", "0.0"),
    ("Is it far?", "Is it late?", "0.0"),
    ("Where can I swim?", "What do herons eat?", "0.0"),
    ("나는 집에 간다", "나는 집에 온다", "0.0"),
]


def write_pairs(path: Path, pairs: Sequence[tuple[str, str, str]] = PAIRS) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(
            [("id", "question1", "question2", "is_duplicate")]
        )
        csv.writer(file, delimiter="\t").writerows((n, *pair) for n, pair in enumerate(pairs))
    return path


@pytest.mark.parametrize(("share", "each"), [(0.5, 2), (0.25, 1), (0.01, 1), (1, 4)])
def test_mine_finds_pairs_with_misleading_overlap(tool, tmp_path, share, each) -> None:
    out = tmp_path / "hard.csv"
    done = tool(
        "mine", "--data", write_pairs(tmp_path / "pairs.csv"), "--out", out, "--share", share
    )
    assert done.code == 0, done.err
    # as --augment reads it
    rows = read_rows(str(out), PARAPHRASE.columns, optional=PARAPHRASE.optional).rows
    mined = [(row["first"], row["second"], row["label"]) for row in rows]
    assert set(mined) <= set(PAIRS) and [pair for pair in PAIRS if pair in mined] == mined
    for label, worst in (("1.0", max), ("0.0", min)):
        taken = [overlap(*pair[:2]) for pair in mined if pair[2] == label]
        left = [overlap(*pair[:2]) for pair in PAIRS if pair[2] == label and pair not in mined]
        assert len(taken) == each
        assert all(worst(worst(taken), other) == other for other in left)
        assert f"{sum(taken) / each:.3f}" in done.out
    assert f"{2 * each} of 8 rows" in done.out


def test_overlap_ignores_the_order_of_words() -> None:
    assert overlap("A b, c!", "c B a") == 1
    assert overlap("a b c", "b c d") == 2 / 4
    assert overlap("a", "b") == 0
    assert overlap("a a a b", "a b b") == 1
    assert overlap("?", "!") == 1  # Texts without words have overlap 1.


def test_mine_prints_the_hardest_pairs(tool, tmp_path) -> None:
    """Each text is printed on one line, whatever it contains."""
    data, out = write_pairs(tmp_path / "pairs.csv"), tmp_path / "hard.csv"
    done = tool("mine", "--data", data, "--out", out, "--share", 0.5)
    alike, others = done.out.split("\nnot alike, many in common:\n")
    assert (
        'What is "the way" to cook eggs, exactly?' in alike and "How many miles are left?" in alike
    )
    assert "Who sang this song?" in others and "Where can I swim?" not in others


def test_alike_names_the_labels_of_similar_pairs(tool, tmp_path) -> None:
    """RTE's 0 means entailment. The low overlap of rows with label 1 shows that 1 does not."""
    data, usual = write_pairs(tmp_path / "pairs.csv"), tmp_path / "usual.csv"
    assert "name the right labels?" in tool("mine", "--data", data, "--out", usual).out
    done = tool(
        "mine", "--data", data, "--out", tmp_path / "turned.csv", "--alike", 0, "--share", 0.25
    )
    assert done.code == 0 and "name the right labels?" not in done.out
    assert "Where can I swim?" in (tmp_path / "turned.csv").read_text()
    assert "an egg, please?" in (tmp_path / "turned.csv").read_text()


def test_mistyped_mining_is_refused(tool, tmp_path) -> None:
    data = write_pairs(tmp_path / "pairs.csv")
    base = ["--data", data, "--out", tmp_path / "hard.csv"]
    refused(tool("mine", "--out", tmp_path / "hard.csv"), "--data")
    refused(tool("mine", "--data", data), "--out")
    refused(tool("mine", "--data", data, "--out", data), "also an input file")
    refused(tool("mine", *base, "--share", 0), "--share")
    refused(tool("mine", *base, "--share", 1.5), "--share")
    refused(
        tool("mine", *base, "--first-column", "question_1"),
        "'question_1'",
        "did you mean question1",
    )
    refused(tool("mine", *base, "--alike", "yes"), "no row", "0, 1")
    refused(tool("mine", *base, "--alike", 0, 1), "every row")
    assert not (tmp_path / "hard.csv").exists()


# ---- back-translation

GERMAN = {
    "the cat sleeps": "die katze schläft", "dogs bark": "hunde bellen", "it rains": "es regnet",
    "we sing a song": "wir singen ein lied", "on and on": "und und und und und und und und und",
}  # fmt: skip
ENGLISH = {
    "die katze schläft": "a cat is asleep", "hunde bellen": "dogs bark", "es regnet": "rain falls",
    "wir singen ein lied": "we are singing",
}  # fmt: skip


def save_translator(folder: Path, dictionary: dict[str, str]) -> None:
    """A translation model that has memorised these texts."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    words = dict.fromkeys(
        word for text in (*dictionary, *dictionary.values()) for word in text.split()
    )
    vocabulary = {word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), 2
    )
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(vocabulary),
            d_model=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=16,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            decoder_start_token_id=0,
            forced_eos_token_id=1,
            **sizes,
        )
    )
    source = tokenizer(list(dictionary), padding=True, return_tensors="pt")
    labels = tokenizer(list(dictionary.values()), padding=True, return_tensors="pt").input_ids
    labels[labels == 0] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(
            input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels
        ).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """--to and --back, from English to German and back."""
    folder = tmp_path_factory.mktemp("models")
    save_translator(folder / "to", GERMAN)
    save_translator(folder / "back", ENGLISH)
    return ["--to", str(folder / "to"), "--back", str(folder / "back"), "--device", "cpu"]


ROWS = [
    {"id": "1", "sentence1": "the cat sleeps", "sentence2": "dogs bark", "is_duplicate": "0.0"},
    {"id": "2", "sentence1": "dogs bark", "sentence2": "dogs  bark", "is_duplicate": "1.0"},
    {"id": "3", "sentence1": "it rains", "sentence2": "on and on", "is_duplicate": "0.0"},
    {"id": "4", "sentence1": "we sing a song", "sentence2": "it rains", "is_duplicate": "0.0"},
]
BACK = [
    {"id": "1", "sentence1": "a cat is asleep", "sentence2": "dogs bark", "is_duplicate": "0.0"},
    {"id": "4", "sentence1": "we are singing", "sentence2": "rain falls", "is_duplicate": "0.0"},
]


def write_table(path: Path, rows: Sequence[dict[str, str]] = ROWS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_backtranslation_changes_only_the_texts(tool, tmp_path, models) -> None:
    """Row 2 comes back unchanged. Row 3 has a translation that does not end within 8 tokens."""
    out = tmp_path / "back.jsonl"
    done = tool(
        "backtranslate",
        "--data",
        write_table(tmp_path / "rows.csv"),
        "--out",
        out,
        "--max-tokens",
        8,
        *models,
    )
    assert done.code == 0, done.err
    assert read_jsonl(out) == BACK
    assert (
        "2 rows" in done.out and "1 that came back unchanged, 1 with more than 8 tokens" in done.out
    )
    assert "6 of 6 texts" in done.err and "0.0 min left" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.jsonl", "rows.csv"]
    again = tool(
        "backtranslate", "--data", tmp_path / "rows.csv", "--out", out, "--max-tokens", 8, *models
    )
    assert again.code == 0 and "already" in again.out and read_jsonl(out) == BACK


@pytest.mark.parametrize("beams", [1, 3])
def test_translations_do_not_depend_on_the_batch(tool, tmp_path, models, beams) -> None:
    data, words = write_table(tmp_path / "rows.csv"), ["--max-tokens", 8, "--beams", beams, *models]
    for name, size in (("one", 1), ("all", 4096)):
        done = tool(
            "backtranslate",
            "--data",
            data,
            "--out",
            tmp_path / f"{name}.jsonl",
            "--batch-tokens",
            size,
            *words,
        )
        assert done.code == 0, done.err
    assert read_jsonl(tmp_path / "one.jsonl") == read_jsonl(tmp_path / "all.jsonl") == BACK


def test_a_row_with_a_text_that_is_too_long_is_left_out(tool, tmp_path, models) -> None:
    """3 words and the end are 4 tokens. The lyrics have 4 words."""
    out = tmp_path / "back.jsonl"
    done = tool(
        "backtranslate",
        "--data",
        write_table(tmp_path / "rows.csv"),
        "--out",
        out,
        "--max-tokens",
        6,
        "--columns",
        "sentence1",
        *models,
    )
    assert done.code == 0, done.err
    assert [row["id"] for row in read_jsonl(out)] == ["1", "3", "4"]
    long = tmp_path / "long.jsonl"
    done = tool("backtranslate", "--data", tmp_path / "rows.csv", "--out", long, "--max-tokens", 4,
                "--columns", "sentence1", *models)  # fmt: skip
    assert [row["id"] for row in read_jsonl(long)] == [
        "3"
    ] and "2 with more than 4 tokens" in done.out


def test_other_columns_keep_their_values(tool, tmp_path, models) -> None:
    """JSON's numbers and lists are kept, and an empty text is not translated."""
    rows = [
        {"text": "it rains", "title": "", "label": 1, "tags": ["a", 2], "note": None, "score": 0.5}
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert (
        tool("backtranslate", "--data", data, "--out", tmp_path / "back.jsonl", *models).code == 0
    )
    assert read_jsonl(tmp_path / "back.jsonl") == [rows[0] | {"text": "rain falls"}]


@pytest.mark.parametrize("cut", [0, 5])
def test_a_stopped_backtranslation_continues(tool, tmp_path, models, monkeypatch, cut) -> None:
    """Stopped after three texts. `cut`: bytes of the last line that did not reach the disk."""
    data, out = write_table(tmp_path / "rows.csv"), tmp_path / "back.jsonl"
    words = ["--data", data, "--out", out, "--max-tokens", 8, "--batch-tokens", 1, *models]
    batches, sync = 0, os.fsync

    def stop_after_three(descriptor: int) -> None:
        nonlocal batches
        sync(descriptor)
        batches += 1
        if batches == 1 + 3:  # the first line of the journal, then one text per batch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stop_after_three)
        assert tool("backtranslate", *words).code == 130
    assert not out.exists()
    part = tmp_path / "back.jsonl.part"
    part.write_bytes(part.read_bytes()[: -cut or None])
    refused(tool("backtranslate", *words, "--beams", 2), "other models or options")
    done = tool("backtranslate", *words)
    assert done.code == 0, done.err
    assert f"continuing: {3 - bool(cut)} of 6 texts are done" in done.err
    assert read_jsonl(out) == BACK and not part.exists()


def test_mistyped_translations_are_refused(tool, tmp_path, models, monkeypatch) -> None:
    data = write_table(tmp_path / "rows.csv")
    out = ["--out", tmp_path / "back.jsonl"]
    refused(tool("backtranslate", *out), "--data")
    refused(tool("backtranslate", "--data", data), "--out")
    refused(tool("backtranslate", "--data", data, "--out", tmp_path / "back.csv"), ".jsonl")
    refused(tool("backtranslate", "--data", tmp_path / "rows.pdf", *out), ".csv")
    refused(tool("backtranslate", "--data", tmp_path / "none.csv", *out), "No such file")
    refused(
        tool("backtranslate", "--data", data, *out, "--columns", "sentence_1"),
        "did you mean sentence1",
    )
    refused(tool("backtranslate", "--data", data, *out, "--beams", 0), "--beams")
    refused(
        tool("backtranslate", "--data", data, *out, *models, "--to", tmp_path / "no-model"),
        "--to",
        "no-model",
    )
    plain = write_table(tmp_path / "plain.csv", [{"a": "x", "b": "y"}])
    refused(tool("backtranslate", "--data", plain, *out), "--columns", "a, b")
    monkeypatch.setitem(sys.modules, "transformers", None)  # transformers is not installed
    refused(tool("backtranslate", "--data", data, *out, *models), "pip install transformers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.csv", "rows.csv"]


# ---- as commands

COMMANDS = ["tools.mine", "tools.ensemble", "tools.compare", "tools.backtranslate"]
COMMANDS.append("finetune.tools.compare")  # the name of earlier versions
ONE_AFTER_ANOTHER = """
import runpy, sys

for name in sys.argv[1:]:
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        assert stop.code == 2, name
"""


def test_every_tool_is_a_command(run) -> None:
    """Words that no tool takes are a mistake of one line for each. One process runs all, because
    importing torch takes most of the time."""
    done = run("-c", ONE_AFTER_ANOTHER, *COMMANDS)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == len(COMMANDS) and all(line.startswith("error: ") for line in errors)
