"""The files of a run: predictions, checkpoints, and what other programs read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters import heads
from adapters.options import ADAPTERS
from config import UserError
from model import GPT
from moods import LABELS, READS, ROWS, WORDS, Mood, exported, log_p_of, mood, quick, row
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import probabilities, write_predictions
from tasks.classification.rows import row_encoder
from tasks.encoder import pad_rows
from text.rows import Row


def test_predictions_are_written_as_jsonl_and_csv(tmp_path):
    found = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    rows = [Row({"text": "one", "id": "x9"}, ""), Row({"text": "둘", "id": ""}, "")]
    write_predictions(tmp_path / "answers.jsonl", rows, found, LABELS, "Predicted_Sentiment")
    assert (
        tmp_path / "answers.csv"
    ).read_bytes() == b"id \t Predicted_Sentiment \nx9 , good \n1 , bad \n"
    first, second = (
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert first == {
        "text": "one",
        "id": "x9",
        "prediction": "good",
        "probabilities": {"bad": 0.1, "good": 0.7, "so-so": 0.2},
    }
    assert second["text"] == "둘" and second["prediction"] == "bad"


@given(log_p=st.lists(st.lists(st.floats(-700, 0), min_size=2, max_size=4), min_size=1, max_size=1))
@quick
def test_probabilities_add_up_to_one(log_p):
    found = probabilities(np.array(log_p))
    assert found.sum(1) == pytest.approx([1.0]) and (found >= 0).all()
    assert (
        found.argmax() == np.array(log_p).argmax() or max(log_p[0]) - sorted(log_p[0])[-2] < 1e-12
    )


@pytest.mark.parametrize("reads", READS)
def test_predict_uses_the_settings_of_the_run(reads, tokenizer, tmp_path):
    asked = [row(" ".join(WORDS[n:][:7]), LABELS[n % 3] if n else "", WORDS[n]) for n in range(9)]
    task = mood(tokenizer, **READS[reads])
    model = exported(task, tmp_path / "model")
    # nothing about --form
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu", allow_overlap=True)
    other, said = Mood(asked), []
    scores = other.predict(cfg, str(tmp_path / "model"), tmp_path / "answers.jsonl", said.append)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [{k: answer[k] for k in row("")} for answer in answers] == asked
    p = np.array([[answer["probabilities"][label] for label in LABELS] for answer in answers])
    assert p.sum(1) == pytest.approx([1] * 9) and [answer["prediction"] for answer in answers] == [
        LABELS[i] for i in p.argmax(1)
    ]
    for answer, given_row in zip(p, asked, strict=True):
        tokens, _ = row_encoder(task.source, task.trunk)(Row(given_row, ""))
        np.testing.assert_allclose(
            answer,
            probabilities(log_p_of(task, model, tokens)[None].astype(np.float64))[0],
            atol=1e-5,
        )
    # The first row has no label.
    right = [answer["prediction"] == answer["label"] for answer in answers[1:]]
    assert scores.keys() == {"accuracy", "macro_f1", "calibration_error"} and scores[
        "accuracy"
    ] == pytest.approx(sum(right) / 8)
    report = json.loads((tmp_path / "answers.report.json").read_text())
    assert report["rows"] == 8 and (tmp_path / "answers.csv").read_text().startswith(
        "id \t Predicted_Mood \n0 , "
    )


def test_predict_rows_may_lack_a_label_or_be_too_long(tokenizer, tmp_path):
    exported(mood(tokenizer, seq_len=8), tmp_path / "model")
    asked, said = Mood([row(" ".join(WORDS), ""), row("stone", "")]), []
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu", cut="start")
    assert (
        asked.predict(cfg, str(tmp_path / "model"), tmp_path / "answers.jsonl", said.append) == {}
    )
    assert said == [
        "1 of 2 rows are longer than 8 tokens and are truncated at the start of their text"
    ]
    assert {file.name for file in tmp_path.glob("answers*")} == {"answers.jsonl", "answers.csv"}
    with pytest.raises(UserError, match="too long for --seq-len 8"):
        asked.predict(
            dataclasses.replace(cfg, strict=True),
            str(tmp_path / "model"),
            tmp_path / "no.jsonl",
            print,
        )
    unknown = Mood([row("stone", "awful")])
    with pytest.raises(
        UserError, match="rows row 0: the label 'awful' is none of the training rows' labels"
    ):
        unknown.predict(cfg, str(tmp_path / "model"), tmp_path / "no.jsonl", print)
    assert not list(tmp_path.glob("no*"))


def test_predict_refuses_a_model_without_a_classifier(tokenizer, tmp_path):
    GPT(mood(tokenizer).trunk.shape).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is not a classifier; train one first, or name a run of finetune.mood"
    ):
        Mood(ROWS).predict(
            ClassificationConfig(predict="rows"), str(tmp_path), tmp_path / "answers.jsonl", print
        )


def test_the_identity_names_what_changes_the_result(tokenizer):
    def identity(rows: Any = ROWS, val: Any = ROWS, **options: Any) -> dict[str, Any]:
        return mood(tokenizer, rows, val, **options).identity()

    first = identity()
    assert first == identity(lr=0.5, micro_batch=2, show_rows=0, keep_best=1)
    relabelled = [*ROWS[:-1], ROWS[-1] | {"label": "bad"}]
    changed = {
        "data": (
            identity(relabelled),
            identity(val=ROWS[1:]),
            identity(class_weights=("balanced",)),
        ),
        "pooling": (identity(pooling="mean"),),
        "form": (identity(form="prompt"),),
        "cut": (identity(cut="start"),),
        "label_smoothing": (identity(label_smoothing=0.1),),
        "head_dropout": (identity(head_dropout=0.1),),
        "objective": (identity(objective=("rdrop",), dropout=0.1),),
        "dropout": (identity(dropout=0.2),),
    }
    for name, others in changed.items():
        assert all(first[name] != other[name] for other in others), name


def test_init_keeps_the_head_if_its_labels_match(tokenizer, tmp_path):
    model = exported(mood(tokenizer), tmp_path)
    start: dict[str, Any] = dict(init=str(tmp_path), preset=None, tokenizer=None)
    other = [r | {"label": f"not {r['label']}"} for r in ROWS]  # the same number of labels
    for rows, options, taken in (
        (ROWS, {}, True),
        (other, {}, False),
        (ROWS, dict(pooling="mean"), False),
        (ROWS, dict(form="word"), None),
    ):
        task = mood(tokenizer, rows, **start | options)
        torch.manual_seed(3)
        found = dict(task.build_model(task.cfg).named_parameters())
        told = [text for text in task.source.warnings if "has a head for" in text]
        assert told == (
            []
            if taken is not False
            else [
                f"--init {tmp_path} has a head for bad, good, so-so (last), which does not fit; "
                "this run starts with a new head"
            ]
        )
        known = tokenizer.vocab_size  # The prompts of --form word add a token.
        for name, p in model.named_parameters():
            cut = slice(known if name == "transformer.wte.weight" else None)
            same = name in found and torch.equal(found[name][cut], p[cut])
            assert same == (bool(taken) if name.startswith("heads.") else True), name


def test_training_continues_from_a_hub_classifier(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    task = mood(tokenizer)
    names = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: n for n, label in enumerate(LABELS)},
    }
    shape = dict(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = GPT2ForSequenceClassification(
        GPT2Config(**shape, **names, pad_token_id=tokenizer.eot)
    ).eval()
    theirs.save_pretrained(tmp_path)
    task.trunk.tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    task = mood(tokenizer, init=str(tmp_path), preset=None, tokenizer=None)
    model = task.build_model(task.cfg).eval()
    assert not any("has a head for" in text for text in task.source.warnings)
    for tokens in task.train.tokens:
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)[None]).logits.log_softmax(-1)[0].numpy()
        np.testing.assert_allclose(log_p_of(task, model, tokens), expected, atol=1e-4)
    scores = Mood(ROWS).predict(
        ClassificationConfig(predict="rows", device="cpu"),
        str(tmp_path),
        tmp_path / "a.jsonl",
        print,
    )
    assert 0 <= scores["accuracy"] <= 1  # It also predicts without training.
    task = mood(
        tokenizer,
        [row("a", "no"), row("b", "yes")],
        init=str(tmp_path),
        preset=None,
        tokenizer=None,
    )
    task.build_model(task.cfg)
    assert any(
        "has a head for bad, good, so-so (last), which does not fit; this run starts with a new head"
        in text
        for text in task.source.warnings
    )


def test_transformers_gives_the_same_scores(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GPT2ForSequenceClassification, pipeline

    task = mood(tokenizer)
    model = exported(task, tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(LABELS)) and theirs.config.label2id["good"] == 1
    own = [log_p_of(task, model, tokens) for tokens in task.train.tokens]
    with torch.no_grad():
        for ids in ([0], [3], [1, 0, 3], [*range(7)]):
            batch = pad_rows([task.train.tokens[i] for i in ids], tokenizer.eot)
            found = theirs(batch["idx"]).logits
            hidden = model.hidden(batch["idx"])
            torch.testing.assert_close(
                found, model.heads["mood"](hidden, batch["lengths"]), rtol=1e-4, atol=1e-4
            )
            np.testing.assert_allclose(
                found.log_softmax(-1), np.stack([own[i] for i in ids]), atol=1e-4
            )
    singles = [n for n, r in enumerate(ROWS) if not r["second"]]
    classify = pipeline(
        "text-classification",
        model=str(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    for batch_size in (1, 3):
        answers = classify([ROWS[n]["first"] for n in singles], batch_size=batch_size)
        assert [answer["label"] for answer in answers] == [LABELS[own[n].argmax()] for n in singles]
        assert [answer["score"] for answer in answers] == pytest.approx(
            [float(np.exp(own[n].max())) for n in singles], abs=1e-4
        )


def test_final_names_its_padding_token(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "given")  # another filler would be taken for a row's last token
    file = tmp_path / "given" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "rain"}))
    exported(mood(tokenizer, tokenizer=str(tmp_path / "given")), tmp_path / "model")
    filler = AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id
    assert (
        filler
        == tokenizer.eot
        == json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"]
    )


@pytest.mark.parametrize("reads", ["mean", "attention", "lstm", "word"])
def test_other_poolings_export_a_language_model_and_a_head(reads, tokenizer, tmp_path):
    from transformers import GPT2LMHeadModel

    task = mood(tokenizer, **READS[reads])
    exported(task, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "id2label" not in config
    theirs, idx = (
        GPT2LMHeadModel.from_pretrained(tmp_path).eval(),
        torch.from_numpy(task.train.tokens[3])[None],
    )
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(idx).logits, GPT.from_pretrained(tmp_path).eval()(idx), rtol=1e-4, atol=1e-4
        )
    assert (heads.find(tmp_path) is None) == (reads == "word") and heads.read_info(
        tmp_path
    ) == task.info


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("reads", ["last", "attention", "word"])
def test_an_adapter_checkpoint_has_its_head_and_predicts(method, reads, tokenizer, tmp_path):
    GPT(mood(tokenizer).trunk.shape).save_pretrained(tmp_path / "base", eot=tokenizer.eot)
    tokenizer.save(tmp_path / "base")
    options: dict[str, Any] = dict(
        init=str(tmp_path / "base"), preset=None, tokenizer=None, method=method
    )
    task = mood(tokenizer, **options | READS[reads])
    torch.manual_seed(0)
    model = task.build_model(task.cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if task.stored(name):
                p += 0.3 * torch.randn_like(p)
    task.export(model, tmp_path / "checkpoint", stored_only=True)
    files = {file.name: file.stat().st_size for file in (tmp_path / "checkpoint").iterdir()}
    assert (
        "adapter_model.safetensors" in files
        and "model.safetensors" not in files
        and "classifier.json" in files
    )
    assert ("heads.safetensors" in files) == (reads != "word")
    base = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert sum(size for name, size in files.items() if name.endswith("safetensors")) < base / 2
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu")
    Mood(ROWS).predict(
        cfg, str(tmp_path / "checkpoint"), tmp_path / "answers.jsonl", lambda text: None
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for answer, tokens in zip(answers, task.train.tokens, strict=True):
        expected = probabilities(log_p_of(task, model.eval(), tokens)[None].astype(np.float64))[0]
        np.testing.assert_allclose([*answer["probabilities"].values()], expected, atol=1e-5)
