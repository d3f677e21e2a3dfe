"""Whole runs learn, resume to the last bit, and do not depend on the number of ranks."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from decoding.loading import open_model
from launch import checkpoint_steps, die, log_of, trace
from storage import hub
from tasks.description import plain
from text.tokenizer import load_tokenizer
from toy_runs import (
    CLASSIFICATION,
    CPU,
    GENERATION,
    check_against_transformers,
    check_same_second_half,
    description_of,
    run_task,
    run_well,
    set_up_task,
)

# Whole runs of these tasks take no path that other tasks do not. Tests in this process cover what
# is their own.
COVERED_BY_OTHERS = ("lyrics", "paraphrase", "summarize", "text", "topics")


@pytest.mark.parametrize("name", [name for name in GENERATION if name not in COVERED_BY_OTHERS])
def test_a_generation_run_learns_answers_and_resumes(name: str, folder: Path) -> None:
    steps = "--steps 60 --lr 5e-3"
    more = "--eval-every 100 --save-every 30 --decode greedy --micro-batch auto"
    end = run_well(name, folder, steps, more, "--predict toy --answers answers")
    run = folder / "run"
    losses = [line["loss"] for line in log_of(run, "train")]
    assert len(losses) == 60 and losses[0] > 4 and losses[-1] < 0.1, (name, losses[-1])
    (evaluation,) = log_of(run, "eval")
    assert evaluation["step"] == 60 and evaluation["val_loss"] < 0.1
    check_run_files(run, [30, 60])
    check_against_transformers(
        run / "final", load_tokenizer(str(run / "final")).encode("the town council met")
    )
    check_toy_answers(set_up_task(name, folder, decode="greedy", max_new_tokens=150), run / "final")
    assert "answers to toy: answers" in end.out
    more += " --data toy"
    run_well(name, folder, "--init run --epochs 0", more, "--predict toy --answers again")
    assert (folder / "answers").read_bytes() == (folder / "again").read_bytes()
    middle = run / "checkpoints" / "step-00000030"
    run_well(name, folder, steps, more, f"--resume {middle} --out branch")
    check_same_second_half(run, folder / "branch", 30)


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION if name not in COVERED_BY_OTHERS])
def test_a_classification_run_learns_predicts_and_resumes(name: str, folder: Path) -> None:
    more = "--steps 40 --lr 5e-3 --eval-every 100 --save-every 20 --micro-batch 4"
    run_well(name, folder, more, "--predict toy --answers answers.jsonl")
    run = folder / "run"
    losses = [line["loss"] for line in log_of(run, "train")]
    (evaluation,) = log_of(run, "eval")
    assert len(losses) == 40 and losses[0] > 0.5 and losses[-1] < 0.1, (name, losses[-1])
    assert evaluation["step"] == 40 and evaluation["accuracy"] == evaluation["macro_f1"] == 1
    assert 0 < evaluation["val_loss"] < 0.1 and 0 < evaluation["calibration_error"] < 0.1
    check_run_files(run, [20, 40])
    task = set_up_task(name, folder)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["prediction"] for answer in answers] == [answer["label"] for answer in answers]
    assert [
        {k: answer[k] for k in row}
        for answer, row in zip(answers, task.description.toy, strict=True)
    ] == list(task.description.toy)
    for suffix in (".jsonl", ".csv"):  # The toy rows are the validation rows too.
        assert (folder / f"answers{suffix}").read_bytes() == (
            run / f"validation{suffix}"
        ).read_bytes()
    answered, validated = (
        json.loads((at / f"{what}.report.json").read_text())
        for at, what in ((folder, "answers"), (run, "validation"))
    )
    assert validated == answered | {"step": 40}
    assert validated["clean"]["clean_rows"] == 0  # the toy rows are the training rows too
    scores = json.loads((folder / "answers.scores.json").read_text())
    assert scores["accuracy"] == 1 and scores["calibration_error"] == pytest.approx(
        evaluation["calibration_error"], rel=1e-4
    )
    middle = run / "checkpoints" / "step-00000020"
    run_well(name, folder, more, f"--resume {middle} --out branch")
    check_same_second_half(run, folder / "branch", 20)


def check_run_files(run: Path, steps: list[int]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["batch_size"] == 4 and config["steps"] == steps[-1] and config["micro_batch"] == 4
    assert checkpoint_steps(run) == steps
    figures = json.loads((run / "metrics.json").read_text())
    assert (
        figures["steps"] == steps[-1]
        and figures["final_is_step"] in steps
        and "val_loss" in figures
    )
    assert (run / "final" / "README.md").exists() and (run / "final" / "tokenizer.json").exists()


def check_toy_answers(task: Any, final: Path) -> None:
    """Assert that greedy decoding gives the answer to each toy prompt, or one of them if several
    rows share a prompt."""
    model, _ = open_model(str(final), None, CPU, torch.float32)
    rows = range(len(task.description.toy))
    prompts = [task.prompt(i) for i in rows]
    true: dict[tuple[int, ...], set[str]] = {}
    for i in rows:
        true.setdefault(tuple(prompts[i]), set()).add(
            plain(task.description.as_eval_example(task.val.rows[i], task.cfg).answer)
        )
    for prompt, (_, text) in zip(prompts, task.answerer(model, prompts, rows), strict=True):
        assert text in true[tuple(prompt)], text


def test_two_ranks_and_a_kill_change_no_figure(folder: Path) -> None:
    """The rows are broken, truncated or left out. Two ranks give the same figures as one, a killed
    run the same as a whole run, and the log has all warnings."""
    rows = [{"context": f"{n} " * 5 * n, "question": "?", "answer": f"{n}"} for n in range(1, 9)]
    rows += [
        {"context": "", "question": "?", "answer": "."},
        {"context": "a", "question": "?", "answer": "so " * 60},
    ]
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "{not json"]))
    more = "--data rows.jsonl --val-data rows.jsonl --seq-len 48 --steps 6 --save-every 2"
    more += " --eval-every 3 --eval-rows 3 --max-new-tokens 4 --batch-size 5 --micro-batch 1"
    run_well("qa", folder, more)
    run_well("qa", folder, more, "--out", "on2", ranks=2)
    (end,) = run_task(
        "qa", folder, more, "--out", "killed", patch=functools.partial(die, "micro-batch", 17)
    )
    assert end.code == -signal.SIGKILL
    run_well("qa", folder, more, "--out", "killed")
    assert trace(folder / "killed") == trace(folder / "run")
    for what, keys in (("train", ("loss", "tokens")), ("eval", ("val_loss", "f1"))):
        one, two = log_of(folder / "run", what), log_of(folder / "on2", what)
        for key in keys:
            assert [x[key] for x in two] == pytest.approx([x[key] for x in one], rel=1e-5), key
    weights = [load_file(folder / name / "final" / "model.safetensors") for name in ("run", "on2")]
    for key in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-3, atol=1e-5)
    told = [line["text"] for line in log_of(folder / "on2", "warning")]
    for what in ("could not be read", "have an empty field"):
        assert told.count(f"rows.jsonl: 1 rows {what} and are left out") == 2
    for what in ("training", "validation"):
        assert (
            f"1 of 9 {what} rows are longer than 48 tokens and cannot be truncated enough "
            "and are left out" in told
        )
        assert any(
            f"{what} rows are longer than 48 tokens and are truncated at the end" in text
            for text in told
        )


TWO_RANKS_COMMON = "--steps 5 --eval-every 2 --save-every 0 --lr 1e-3 --micro-batch 2"


# Options by task. A dropout of 1e-12 allows two passes of a row, and both are the same.
ON_TWO_RANKS = {
    "sentiment": "--also topics:0.5 --objective rdrop simcse --simcse-group 2 --batch-size 6 "
    "--class-weights 1 2 --dropout 1e-12 --head-dropout 0",
    "nli": "--form word --batch-size 5 --label-smoothing 0.1 --dropout 0 --head-dropout 0",
}


COMPARED = {
    "train": ("loss", "tokens", "nll", "topics", "rdrop", "simcse"),
    "eval": (
        "val_loss",
        "accuracy",
        "macro_f1",
        "calibration_error",
        "topics_val_loss",
        "topics_accuracy",
    ),
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_train_a_classifier_like_one(name: str, folder: Path) -> None:
    for out, ranks in (("run", 1), ("on2", 2)):
        run_well(name, folder, TWO_RANKS_COMMON, ON_TWO_RANKS[name], "--out", out, ranks=ranks)
    one, two = folder / "run", folder / "on2"
    for what, keys in COMPARED.items():
        first, second = (
            [{k: v for k, v in line.items() if k in keys} for line in log_of(run, what)]
            for run in (one, two)
        )
        for expected, found in zip(first, second, strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert name != "sentiment" or {key for line in first for key in line} == set(keys)
    for file in (file.name for file in (one / "final").glob("*.safetensors")):
        expected = load_file(one / "final" / file)
        for key, tensor in load_file(two / "final" / file).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    predicted = [
        [json.loads(line)["prediction"] for line in (run / "validation.jsonl").open()]
        for run in (one, two)
    ]
    assert predicted[0] == predicted[1] and len(predicted[0]) == len(description_of(name).toy)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_an_adapter_with_a_head_resumes_and_predicts(method: str, folder: Path) -> None:
    more = f"--init base --method {method} --pooling attention --steps 4 --save-every 2 --lr 1e-2"
    more += " --eval-every 0 --micro-batch 4"
    run_well("topics", folder, more)
    run, newest = folder / "run", folder / "run" / "checkpoints" / "step-00000004"
    middle = run / "checkpoints" / "step-00000002"
    run_well("topics", folder, more, f"--resume {middle} --out branch")
    check_same_second_half(run, folder / "branch", 2)
    assert hub.is_adapter(newest) and not (newest / "model.safetensors").exists()
    state = load_file(newest / "training_state.safetensors")
    stored = {key for key in state if key.startswith("model.")}
    assert {"model.heads.topics.weight", "model.heads.topics.query"} < stored
    assert all(".lora_" in key or "prefix." in key for key in stored if "heads." not in key)
    (folder / "asked.csv").write_text(
        "title,text\n"
        + "".join(f"{row['title']},{row['text']}\n" for row in description_of("topics").toy)
    )
    end = run_well(
        "topics", folder, f"--init {newest} --epochs 0 --predict asked.csv --answers answers.jsonl"
    )
    assert end.out.endswith("answers to asked.csv: answers.jsonl\n"), "no scores without labels"
    files = (run / "validation.jsonl", folder / "answers.jsonl")
    expected, found = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in files
    )
    for one, other in zip(expected, found, strict=True):
        assert other["text"] == one["text"] and not other["label"]
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    assert not (folder / "answers.scores.json").exists()
