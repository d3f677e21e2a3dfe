"""The contract of every task of finetune/. The tests find the tasks by themselves."""

from __future__ import annotations

import dataclasses
import importlib
import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from adapters.options import Form
from decoding.options import Decode
from engine.evaluation import evaluate
from engine.loader import Loader
from support import REPO
from tasks.generation.description import Answer
from toy import capture_gradients, expected_gradients
from toy_runs import (
    ALONE,
    CLASSIFICATION,
    GENERATION,
    TASKS,
    description_of,
    set_up_task,
    train_step,
)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_one_thin_file(name: str) -> None:
    task, file = description_of(name), REPO / "finetune" / f"{name}.py"
    assert task.name == name and task.toy
    assert len(file.read_text().splitlines()) <= 120
    assert f"python -m finetune.{name} " in (
        importlib.import_module(f"finetune.{name}").__doc__ or ""
    )
    options = {field.name for field in dataclasses.fields(task.config)}
    assert task.defaults.keys() <= options
    assert all(row.keys() <= task.columns.keys() for row in task.toy)


@pytest.mark.parametrize("name", TASKS)
def test_gradients_do_not_depend_on_the_micro_batch(name: str, inputs: Path) -> None:
    """Loss and gradients equal those of one fp64 batch, at any micro-batch."""
    task = set_up_task(name, inputs, clip=0.0)
    train = train_step(task)
    loss, _, expected = expected_gradients(task, train.model, 0)
    for micro_batch in (1, 3, 4):
        found = capture_gradients(train)
        result = train(0, Loader(task, ALONE, micro_batch, 1, ahead=0)(0))
        assert result is not None and result.loss.item() == pytest.approx(loss, rel=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key].double(), gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", GENERATION)
def test_batched_decoding_equals_decoding_row_by_row(name: str, inputs: Path) -> None:
    task = set_up_task(
        name, inputs, eval_rows=2, max_new_tokens=3, beams=2, candidates=4, seq_len=128
    )
    model = train_step(task).model.eval()
    prompts = [task.prompt(i) for i in task.decoded]
    for decode in get_args(Decode):
        task.cfg = dataclasses.replace(task.cfg, decode=decode)
        together = task.answerer(model, prompts, task.decoded)
        alone = [
            task.answerer(model, [p], [i])[0] for p, i in zip(prompts, task.decoded, strict=True)
        ]
        assert together == alone, decode
        assert all(
            prompt == task.trunk.tokenizer.decode(ids, skip_special=True)
            for (prompt, _), ids in zip(together, prompts)
        )


@pytest.mark.parametrize("name", GENERATION)
def test_show_rows_marks_the_learned_text(name: str, inputs: Path) -> None:
    said: list[str] = []
    task = set_up_task(name, inputs, said.append, show_rows=2)
    assert len(said) == 2
    for text, i in zip(said, task.order(0).reshape(-1), strict=False):
        tokens, learned = task.train.tokens[i].tolist(), task.train.learned[i]
        decode, start = task.trunk.tokenizer.decode, len(learned) - learned[::-1].argmin()
        answer = decode(tokens[start:])  # the last of a conversation
        assert text.endswith(f"⟦{answer}⟧\n")
        assert answer.endswith(task.description.end or "<|endoftext|>")
        assert text.partition(":\n")[2].replace("⟦", "").replace("⟧", "") == decode(tokens) + "\n"
        assert text.startswith(f"row {i} ({len(tokens)} tokens, {learned.sum()} of them learned)")
        assert all(str(token) in text for token in task.trunk.special)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_show_rows_marks_the_label_or_its_word(name: str, inputs: Path) -> None:
    for form in get_args(Form):
        said: list[str] = []
        other = {"words": ("alpha", "beta", "gamma")} if (name, form) == ("topics", "word") else {}
        task = set_up_task(name, inputs, said.append, show_rows=2, form=form, **other)
        names = (
            (other.get("words") or task.description.words(task.info.labels))
            if form == "word"
            else task.info.labels
        )
        assert len(said) == 2 and len(set(names)) == len(task.info.labels)
        for text, i in zip(said, task.rows("train", 0).reshape(-1), strict=False):
            ids, row = task.train.tokens[i].tolist(), task.train.rows[i]
            read, answer = (
                task.trunk.tokenizer.decode(ids),
                names[task.info.labels.index(row["label"])],
            )
            assert text == f"row {i} ({len(ids)} tokens):\n{read}⟦{answer}⟧\n"
            assert all(part in read for part in task.description.texts(row))
            assert form != "plain" or "".join(
                task.description.texts(row)
            ) == task.trunk.tokenizer.decode(ids, skip_special=True)
            assert all(str(token) in text for token in task.trunk.special)
    assert bool(task.trunk.special) == (name == "nli")


@pytest.mark.parametrize("name", GENERATION)
def test_evaluation_matches_a_loop_over_positions(name: str, inputs: Path) -> None:
    """The loss comes from a loop over rows and positions, the scores from all answers at once."""
    task = set_up_task(name, inputs, decode="greedy", max_new_tokens=5, eval_rows=2)
    step = train_step(task)
    exact, nll, tokens = step.model.double().eval(), 0.0, 0
    for ids, learned in zip(task.val.tokens, task.val.learned, strict=True):
        log_p = torch.log_softmax(exact(torch.from_numpy(ids[None, :-1]))[0].double(), -1)
        nll -= sum(float(log_p[t - 1, ids[t]].detach()) for t in learned.nonzero()[0])
        tokens += learned.sum()
    model = step.model.float()
    answers = task.answerer(model, [task.prompt(i) for i in task.decoded], task.decoded)
    found = [Answer(*a, task.val.references[i]) for a, i in zip(answers, task.decoded, strict=True)]
    expected = {
        "val_loss": nll / tokens,
        "val_perplexity": math.exp(nll / tokens),
    } | task.description.scores(found, task.train.rows)
    for micro_batch in (1, 4):
        assert evaluate(step, micro_batch) == pytest.approx(expected, rel=1e-4)
    assert task.best[0] in expected


LINE = "and on the night the sun will stay"


HAND: dict[str, tuple[list[Answer], dict[str, float]]] = {
    "lyrics": (
        [Answer("p", "la la la la la", ""), Answer("p", "one two three", "")],
        {
            "distinct_1": (1 / 5 + 1) / 2,
            "distinct_2": (1 / 4 + 1) / 2,
            "repetition": (1 / 2 + 0) / 2,
        },
    ),
    "sonnets": (  # All eleven lines end in the same word, and a word does not rhyme with itself.
        [Answer(f"{LINE}\n" * 3, f"{LINE}\n" * 11, f"{LINE}\n" * 11)],
        {
            "chrf": 100,
            "chrf_poem": 100,
            "distinct_1": 7 / 88,
            "distinct_2": 8 / 87,
            "repetition": 77 / 85,
            "rhyming_accuracy": 0,
            "rhyming_coverage": 1,
            "lines_right": 1,
        },
    ),
    "summarize": (
        [Answer("p", "sat the cat", "the cat sat"), Answer("p", "", "a")],
        {"rouge_1": 100 / 2, "rouge_2": 50 / 2, "rouge_l": 200 / 3 / 2},
    ),
    "qa": (
        [Answer("p", "The red house.", "a house\nred house"), Answer("p", "in May 1871", "1871")],
        {"exact_match": 50, "f1": (100 + 50) / 2},
    ),
    "text": ([Answer("p", "any", "")], {}),
    "chat": (
        [Answer("p", "Paris.", "paris"), Answer("p", "4", "five")],
        {"exact_match": 50, "f1": 50},
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_scores_match_values_worked_out_by_hand(name: str) -> None:
    answers, expected = HAND[name]
    assert description_of(name).scores(answers, []) == pytest.approx(expected)
