"""The preference task: its loss beside a plain one, what is scored, the reference and its cache, the
layouts of rows, and whole runs."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.layers import add_rows, add_tokens, merge
from adapters.options import Method
from config import GPTConfig, UserError
from engine.evaluation import evaluate
from engine.loader import Loader
from engine.memory import estimate
from launch import die, log_of, trace
from model import GPT
from tasks.description import EarlierAnswer
from tasks.preferences import reference, scoring
from tasks.preferences.description import Pair
from tasks.preferences.pairs import pair_encoder
from tasks.preferences.predictions import PairPredictor
from tasks.preferences.task import Preferences
from text.chat import END, ROLES, has_template
from text.preferences import messages_of
from text.tokenizer import load_tokenizer
from tools import verify
from toy import capture_gradients
from toy_runs import (
    ALONE,
    check_same_second_half,
    description_of,
    run_task,
    run_well,
    set_up_task,
    source_of,
    train_step,
)

METHODS = get_args(Method)
LONG = "so long a line of words that it does not fit " * 3
PAIRS = [
    {"prompt": "Who waits?", "chosen": " The snow.", "rejected": " A kettle, at seven."},
    {"prompt": LONG, "chosen": " Yes.", "rejected": " No, it is not so."},
    {"prompt": "a", "chosen": " The ferry leaves at half past nine.", "rejected": "!"},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_rows(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def set_up(inputs: Path, rows: Any = PAIRS, **options: Any) -> Any:
    file = write_rows(inputs / "pairs.jsonl", rows)
    fixed: dict[str, Any] = dict(data=file, val_data=file, batch_size=3, clip=0.0, seq_len=40)
    return set_up_task("preferences", inputs, **fixed | options)


def moved(model: GPT, by: float = 0.05) -> GPT:
    """The model with noise on its weights, so that it differs from the reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn_like(parameter)
    return model


# --- the loss


def plain_log_p(model: GPT, tokens: np.ndarray, scored: np.ndarray) -> Tensor:
    """The log-probability of the scored tokens of one sequence, alone and token by token."""
    log_p = model(torch.from_numpy(tokens[None, :-1]))[0].log_softmax(-1)
    return torch.stack([log_p[t - 1, tokens[t]] for t in scored.nonzero()[0]]).sum()


def plain_loss(h: Tensor, cfg: Any) -> Tensor:
    """The formula of the paper, of a difference h of log-ratios."""
    p = 1 / (1 + torch.exp(-cfg.beta * h))
    return -(1 - cfg.label_smoothing) * p.log() - cfg.label_smoothing * (1 - p).log()


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.7, "label_smoothing": 0.2}], ids=["plain", "smoothed"]
)
@pytest.mark.parametrize("chunk", [1 << 30, 12_000], ids=["whole", "in chunks"])
def test_loss_and_gradients_equal_plain_float64(
    options: Any, chunk: int, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair has a truncated prompt, and lengths are odd. The reference is the model before it
    was moved."""
    task = set_up(inputs, **options)
    step = train_step(task, seed=task.cfg.seed)
    before = copy.deepcopy(step.model).double()
    exact = copy.deepcopy(moved(step.model)).double()
    losses = []
    for n in range(3):
        h = torch.zeros(())
        for sign, i in ((1, 2 * n), (-1, 2 * n + 1)):
            sequence = task.train.tokens[i], task.train.scored[i]
            h = h + sign * (plain_log_p(exact, *sequence) - plain_log_p(before, *sequence).detach())
        losses.append(plain_loss(h, task.cfg))
    expected = torch.stack(losses).mean()
    expected.backward()
    monkeypatch.setattr(scoring, "CHUNK_BYTES", chunk)
    for micro_batch in (1, 2, 3):
        found = capture_gradients(step)
        result = step(0, Loader(task, ALONE, micro_batch, 1, ahead=0)(0))
        assert result is not None and result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, p in exact.named_parameters():
            assert p.grad is not None
            atol = 1e-6 * max(1.0, float(p.grad.abs().max()))
            torch.testing.assert_close(found[name].double(), p.grad, rtol=1e-4, atol=atol, msg=name)
    figures = evaluate(step, 2)
    assert figures is not None and figures["val_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_only_answers_have_gradients(inputs: Path) -> None:
    """The gradient of the model's state is zero wherever no token of an answer follows. A turn by
    the user between two answers is read, not scored."""
    rest = [assistant("Five."), user("And 4?"), assistant("Nine.")]
    rows = [
        {"prompt": [user("Hi"), assistant("Yes?"), user("2 + 3?")], "chosen": rest, "rejected": a}
        for a in ([assistant("Six, or so.")], [*rest[:2], assistant("Ten.")])
    ]
    task = set_up(inputs, rows, seq_len=120)
    model, states = train_step(task).model, []

    def keep(module: Any, given: Any, out: tuple[Tensor, Tensor]) -> None:
        out[1].retain_grad()
        states.append(out[1])

    model.transformer.ln_f.register_forward_hook(keep)
    task.loss(moved(model), task.batch("train", np.arange(2)).tensors)["dpo"].backward()
    decode = task.trunk.tokenizer.decode
    texts = []
    for row, i in enumerate((0, 2, 1, 3)):
        tokens = task.train.tokens[i]
        live = (states[0].grad[row].abs().sum(-1) > 0)[: len(tokens) - 1].numpy()
        texts.append(decode(tokens[1:][live].tolist()))
    assert texts == [
        "Five.<|end|>Nine.<|end|>",
        "Nine.<|end|>",
        "Six, or so.<|end|>",
        "Ten.<|end|>",
    ]
    last = task.train.tokens[3].tolist()
    assert decode(last).endswith(
        "<|assistant|>Five.<|end|><|user|>And 4?<|end|><|assistant|>Ten.<|end|>"
    )


def test_a_prompt_token_changes_only_what_follows(inputs: Path) -> None:
    """Padding and the other answers of a batch change nothing."""
    task = set_up(inputs)
    model = train_step(task).model
    batch = task.batch("train", np.arange(3)).tensors
    found = scoring.answer_log_probs(model, batch)
    padded = {**batch, "idx": batch["idx"].clone()}
    for row, i in enumerate((0, 2, 4, 1, 3, 5)):
        padded["idx"][row, len(task.train.tokens[i]) - 1 :] = 7
    padded["idx"][0, 2] += 1
    other = scoring.answer_log_probs(model, padded)
    assert (other[1:] == found[1:]).all() and other[0] != found[0]


def test_the_estimated_memory_holds_both_sequences(inputs: Path) -> None:
    """A pair takes about what two rows of a language model do, and less for the head, which reads
    the answers alone."""
    task = set_up(inputs)
    cost = task.cost()
    pair = estimate(cost, task.cfg, 2, "cpu")
    rows = estimate(dataclasses.replace(cost, loss=None), task.cfg, 4, "cpu")
    assert 0.9 * rows.activations < pair.activations < 1.3 * rows.activations
    assert 0 < pair.logits < rows.logits


# --- rows that are too long


def sequences(inputs: Path, pair: Pair, seq_len: int) -> Any:
    """The prompt and the answer of both sequences as texts, and how the pair was made to fit."""
    tokenizer = load_tokenizer(str(inputs / "tokenizer")).with_special((*ROLES.values(), END))
    cfg = description_of("preferences").config()
    found, how = pair_encoder(tokenizer, seq_len, cfg, pair.end).sequences(pair, "row 1")
    assert all(len(tokens) <= seq_len + 1 for tokens, _ in found)
    return [
        tuple(tokenizer.decode(tokens[scored == on].tolist()) for on in (False, True))
        for tokens, scored in found
    ], how


def test_a_long_prompt_loses_its_beginning_alike_for_both(inputs: Path) -> None:
    pair = Pair((f"{LONG}Now?",), (EarlierAnswer(" Yes."),), (EarlierAnswer(" No, not at all."),))
    (first, second), how = sequences(inputs, pair, 30)
    assert how == ["truncated"] and first[0] == second[0]
    start, _, kept = first[0].partition("<|endoftext|>")
    assert not start and f"{LONG}Now?".endswith(kept) and 0 < len(kept) < len(LONG)
    assert (first[1], second[1]) == (" Yes.<|endoftext|>", " No, not at all.<|endoftext|>")
    whole, how = sequences(inputs, pair, 400)
    assert how == [] and whole[0][0] == f"<|endoftext|>{LONG}Now?"
    assert sequences(inputs, pair, 8) == ([], ["dropped"])


def test_a_long_conversation_loses_its_oldest_turns(inputs: Path) -> None:
    turns = [message for n in range(9) for message in (user(f"Say {n}"), assistant(f"It is {n}"))]
    row = {"chosen": [*turns, user("Now?"), assistant("Yes.")]}
    row["rejected"] = [*row["chosen"][:-1], assistant("No, not at all.")]
    (found,) = source_of("preferences").read(write_rows(inputs / "long.jsonl", [row]), "train")
    pair = description_of("preferences").pair(found)
    (first, second), how = sequences(inputs, pair, 60)
    assert how == ["shortened"] and first[0] == second[0] and first[1] == "Yes.<|end|>"
    assert re.fullmatch(
        r"<\|endoftext\|>(<\|user\|>Say \d<\|end\|><\|assistant\|>It is \d<\|end\|>)+"
        r"<\|user\|>Now\?<\|end\|><\|assistant\|>",
        first[0],
    )


def test_strict_names_a_pair_that_is_too_long(inputs: Path) -> None:
    with pytest.raises(UserError, match=r"jsonl line 2: \d+ tokens too long for --seq-len 40"):
        set_up(inputs, strict=True)
    task = set_up(inputs)
    assert "1 of 3 training pairs are longer than 40 tokens and lose a part of their prompt" in (
        task.source.warnings
    )


# --- the reference


def counted_scoring(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of the calls that compute log-probabilities."""
    calls: list[str] = []
    original = reference.log_probs

    def count(model: GPT, split: Any, precision: str, *more: Any) -> np.ndarray:
        calls.append(precision)
        return original(model, split, precision, *more)

    monkeypatch.setattr(reference, "log_probs", count)
    return calls


def test_the_reference_is_computed_once(inputs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Other weights, rows, prompts that are cut elsewhere, or another precision are computed anew;
    another beta, order or method is not."""
    calls = counted_scoring(monkeypatch)
    start = dict(cache=str(tmp_path), init=str(inputs / "base"), preset=None, tokenizer=None)
    first = set_up(inputs, **start)
    assert calls == ["fp32"]  # the validation rows are the training rows, in the same precision
    again = set_up(inputs, **start, beta=0.5, method="lora", batch_size=2)
    assert calls == ["fp32"]
    for name in ("train", "val"):
        assert (first.reference[name] == again.reference[name]).all()
    GPT.from_pretrained(inputs / "base").save_pretrained(tmp_path / "copy")
    load_tokenizer(str(inputs / "base")).save(tmp_path / "copy")
    set_up(inputs, **start | dict(init=str(tmp_path / "copy")))
    assert calls == ["fp32"]
    moved(GPT.from_pretrained(inputs / "base")).save_pretrained(tmp_path / "copy")
    other = set_up(inputs, **start | dict(init=str(tmp_path / "copy")))
    assert len(calls) == 2 and (other.reference["train"] != first.reference["train"]).all()
    set_up(inputs, PAIRS[:2], **start)
    set_up(inputs, **start, **{"seq_len": 30})
    assert len(calls) == 4
    set_up(inputs, **start, precision="bf16")
    assert calls[4:] == ["bf16"]
    set_up(inputs, **start, reference=str(tmp_path / "copy"))
    assert len(calls) == 5  # those of `other`


def test_margins_start_at_zero_in_any_precision(inputs: Path) -> None:
    base = dict(init=str(inputs / "base"), preset=None, tokenizer=None)
    for precision in ("fp32", "bf16"):
        task = set_up(inputs, **base, precision=precision)
        step = train_step(task)
        result = step(0, Loader(task, ALONE, 3, 1, ahead=0)(0))
        figures = evaluate(step, 3)
        assert result is not None and figures is not None
        assert result.terms["reward_margin"].item() == pytest.approx(0, abs=1e-5)
        assert result.loss.item() == pytest.approx(np.log(2), abs=1e-5)


def test_a_cache_that_cannot_be_written_is_named(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache"):
        set_up(inputs, cache=str(tmp_path / "file"))


def test_a_full_disk_is_named(inputs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def full(file: Path, found: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reference.np, "save", full)
    with pytest.raises(UserError, match=r"cannot write to --cache .*: No space left on device"):
        set_up(inputs, cache=str(tmp_path))
    monkeypatch.undo()
    set_up(inputs, cache=str(tmp_path))  # nothing is left of the attempt


def test_a_damaged_file_of_the_reference_is_named(inputs: Path, tmp_path: Path) -> None:
    first = set_up(inputs, cache=str(tmp_path)).reference["train"]
    (file,) = tmp_path.glob("*/log_probs.npy")
    whole = file.read_bytes()
    np.save(file, first[:-1])
    for damaged in (file.read_bytes(), whole[:-3], whole[:90], b"", None):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{file} is damaged or missing; remove the folder"):
            set_up(inputs, cache=str(tmp_path))
    shutil.rmtree(file.parent)
    assert (set_up(inputs, cache=str(tmp_path)).reference["train"] == first).all()


# --- layouts

PLAIN = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
TALK = {
    "prompt": [user("Which colour?")],
    "chosen": [assistant("Blue.")],
    "rejected": [assistant("Green.")],
}
WHOLE = {name: TALK["prompt"] + TALK[name] for name in ("chosen", "rejected")}
HUMAN = "\n\nHuman: Which colour?\n\nAssistant: This?\n\nHuman: The sky\n\nAssistant:"
LAYOUTS: dict[str, tuple[Any, Any]] = {  # a row, and its prompt, chosen and rejected
    "texts": (PLAIN, PLAIN),
    "conversations": (TALK, TALK),
    "whole conversations": (WHOLE, TALK),
    "a text beside whole conversations": ({"prompt": "Which colour?"} | WHOLE, TALK),
    "a prompt that is repeated": ({"prompt": TALK["prompt"]} | WHOLE, TALK),
    "a text and messages": (TALK | {"prompt": "Which colour?"}, TALK),
    "messages and texts": (TALK | {"chosen": "Blue.", "rejected": "Green."}, TALK),
    "JSON in texts": ({name: json.dumps(value) for name, value in TALK.items()}, TALK),
    "ShareGPT": (
        {k: [{"from": "gpt", "value": m["content"]} for m in TALK[k]] for k in WHOLE}
        | {"prompt": [{"from": "human", "value": "Which colour?"}]},
        TALK,
    ),
    "texts with a shared beginning": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        PLAIN | {"rejected": " black."},
    ),
    "HH": (
        {"chosen": f"{HUMAN} It is blue.", "rejected": f"{HUMAN} It is green.\n\nHuman: No"},
        {"prompt": HUMAN, "chosen": " It is blue.", "rejected": " It is green.\n\nHuman: No"},
    ),
    "numbers": (PLAIN | {"chosen": 4, "rejected": 5.5}, PLAIN | {"chosen": "4", "rejected": "5.5"}),
    "a later difference": (
        {k: [*WHOLE["chosen"], user("Why?"), assistant(k)] for k in WHOLE},
        {"prompt": [*WHOLE["chosen"], user("Why?")]} | {k: [assistant(k)] for k in WHOLE},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    given, expected = LAYOUTS[layout]
    files = [write_rows(tmp_path / "rows.jsonl", [given])]
    parquet.write_table(pyarrow.Table.from_pylist([given]), tmp_path / "rows.parquet")
    files.append(str(tmp_path / "rows.parquet"))
    if all(isinstance(value, str) for value in given.values()):
        cells = ['"' + value.replace('"', '""') + '"' for value in given.values()]
        (tmp_path / "rows.csv").write_text(f"{','.join(given)}\n{','.join(cells)}\n")
        files.append(str(tmp_path / "rows.csv"))
    for file in files:
        for split in ("train", "test"):
            (row,) = source_of("preferences").read(file, split)
            assert {k: messages_of(v) or v for k, v in row.fields.items()} == expected, file


BROKEN: dict[str, Any] = {  # what is said of a row, and the row
    "is the same as 'chosen' in column 'rejected'": PLAIN | {"rejected": " blue."},
    "has nothing in column 'rejected'": {k: TALK[k] for k in ("prompt", "chosen")},
    "has nothing in column 'chosen'": PLAIN | {"chosen": ""},
    "begins unlike 'chosen', and there is no prompt": {"chosen": "a b", "rejected": "c b"},
    "has no answer after what both texts share": {"chosen": HUMAN, "rejected": f"{HUMAN} a"},
    "is not of the kind of 'chosen'": PLAIN | {"chosen": TALK["chosen"]},
    "has the role 'tool'": TALK | {"chosen": [{"role": "tool", "content": "a"}]},
    "has no object as message 1 in column 'prompt'": TALK | {"prompt": [3]},
    "has no message in common": {k: TALK[k] for k in WHOLE},
    "does not end with an answer by the assistant": TALK | {"rejected": [user("a")]},
    "differs from the other before an answer": {
        k: [user("a"), user(k), assistant("b")] for k in WHOLE
    },
    "is not UTF-8 text in column 'prompt'": PLAIN | {"prompt": "\udcff"},
    "has a dict in column 'chosen', not text": PLAIN | {"chosen": {"a": 1}},
}


def test_broken_rows_are_named_and_left_out(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*BROKEN.values(), PLAIN])
    (row,) = source_of("preferences", lambda text: None).read(file, "train")
    assert row.fields == PLAIN
    *broken, sound = source_of("preferences", lambda text: None).read(file, "test")
    assert not sound.fault
    for number, (text, row) in enumerate(zip(BROKEN, broken, strict=True), 1):
        # An empty or a badly encoded field is kept for --predict.
        assert text in row.fault or text.startswith(("has nothing", "is not UTF-8")), text
        one = write_rows(tmp_path / "one.jsonl", [PLAIN] * number + [BROKEN[text]])
        with pytest.raises(UserError, match=f"one.jsonl line {number + 1} .*{re.escape(text)}"):
            source_of("preferences", strict=True).read(one, "train")


def test_a_mistake_is_one_line_and_exit_code_2(folder: Path) -> None:
    write_rows(folder / "same.jsonl", [PLAIN | {"rejected": " blue."}] * 2)
    (end,) = run_task("preferences", folder, "--data same.jsonl")
    assert end.code == 2 and end.err.count("\n") == 1, end
    assert "same.jsonl line 1 is the same as 'chosen' in column 'rejected'" in end.err


def test_rows_and_references_of_another_kind_are_refused(inputs: Path) -> None:
    with pytest.raises(UserError, match=r"line 2 is a conversation and .*line 1 is not"):
        set_up(inputs, [PLAIN, TALK])
    load_tokenizer(str(inputs / "base")).with_special(("<else>",)).save(inputs / "else")
    model = GPT.from_pretrained(inputs / "base")
    add_tokens(model, range(model.config.vocab_size, model.config.vocab_size + 1))
    model.save_pretrained(inputs / "else")
    with pytest.raises(UserError, match=r"--reference .*else has another tokenizer"):
        set_up(inputs, reference=str(inputs / "else"))
    with pytest.raises(UserError, match="name the model that its training started from with --ref"):
        set_up(inputs, epochs=0, steps=None, predict="toy")


# --- every method

TRAINED = {"last-layer": r"transformer\.ln_f\..*", "last-k": r"transformer\.(h\.1|ln_f)\..*"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_the_preferences(method: Method, inputs: Path) -> None:
    """The rows are conversations, whose tokens the base lacks."""
    options: dict[str, Any] = dict(last_k=1) if method == "last-k" else {}
    options |= dict(prefix_width=0) if method == "prefix" else {}
    rows = [TALK, TALK | {"prompt": [user("And the sea?")]}]
    base = dict(init=str(inputs / "base"), preset=None, tokenizer=None)
    task = set_up(inputs, rows, **base, method=method, lr=2e-2, steps=6, seq_len=None, **options)
    step = train_step(task)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    first = evaluate(step, 2)
    for n in range(6):
        step(n, Loader(task, ALONE, 2, 6, ahead=0)(n))
    last = evaluate(step, 2)
    assert first is not None and last is not None
    assert last["val_loss"] < first["val_loss"] - 0.05 and last["reward_accuracy"] == 1
    changed = {
        name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed and changed <= {name for g in task.groups(step.model, 9) for name in g.params}


# --- whole runs


def test_a_run_resumes_and_predicts(folder: Path) -> None:
    more = "--init base --steps 8 --save-every 4 --eval-every 4 --lr 2e-3 --dropout 0.1"
    end = run_well("preferences", folder, more, "--predict toy --sample-every 8 --max-new-tokens 3")
    assert end.out.count("pairs with the reference") == 1
    run = folder / "run"
    losses = [line["loss"] for line in log_of(run, "train")]
    assert losses[0] == pytest.approx(np.log(2), abs=0.1) and losses[-1] < losses[0] - 0.1
    assert {"dpo", "reward_margin", "reward_accuracy"} <= log_of(run, "train")[0].keys()
    figures = json.loads((run / "metrics.json").read_text())
    card = (run / "final" / "README.md").read_text()
    for name in ("val_loss", "reward_accuracy", "reward_margin", "reward_chosen"):
        assert f"- {name}: {figures[name]:.4f}" in card
        assert log_of(run, "eval")[-1][name] == pytest.approx(figures[name])
    assert len(log_of(run, "sample")) == 2
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for row in description_of("preferences").toy
    ]
    assert {row["preferred"] for row in rows} == {"chosen"}
    margins = [row["reward_margin"] for row in rows]
    assert np.mean(margins) == pytest.approx(figures["reward_margin"], abs=1e-5)
    again = "--init run --reference base --epochs 0 --predict toy --answers again.jsonl"
    run_well("preferences", folder, again)
    assert (folder / "again.jsonl").read_bytes() == (run / "predictions.jsonl").read_bytes()
    middle = run / "checkpoints" / "step-00000004"
    end = run_well("preferences", folder, more, f"--resume {middle} --out branch")
    assert "pairs with the reference" not in end.out
    check_same_second_half(run, folder / "branch", 4)
    record = json.loads((run / "run.json").read_text())
    assert isinstance(verify.task_of(record), Preferences)


@pytest.mark.parametrize("sound", [[PLAIN], []])
def test_predicted_rows_without_an_answer_do_not_count(
    sound: list[Any], inputs: Path, tmp_path: Path
) -> None:
    """A missing answer is not an empty one, whose log-probability is no opinion on it."""
    lacking = [PLAIN | {"rejected": ""}, {"prompt": "a", "chosen": " b"}, PLAIN | {"chosen": None}]
    file = write_rows(tmp_path / "rows.jsonl", [*lacking, PLAIN | {"rejected": " blue."}, *sound])
    rows = list(source_of("preferences", lambda text: None).read(file, "test"))
    task = set_up(inputs)
    model = GPT.from_pretrained(inputs / "base")
    pair, said = task.description.pair, list[str]()
    predictor = PairPredictor(model, model, task.encoder, pair, task.preference, rows, None)
    figures = predictor.write(tmp_path / "out.jsonl", said.append)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["preferred"] for line in lines] == [None] * 4 + ["rejected"] * len(sound)
    assert bool(figures) == bool(sound) and said[0].startswith(f"4 of {len(rows)} rows")
    for line, name in zip(lines, ("rejected", "rejected", "chosen")):
        assert line["unreadable"] == f"has nothing in column '{name}'"


def test_two_ranks_and_kills_change_no_figure(folder: Path) -> None:
    """One run is killed between the reference's training and validation pairs, and in a step."""
    write_rows(folder / "pairs.jsonl", [*PAIRS, PLAIN, PLAIN | {"prompt": "The sea is"}])
    write_rows(folder / "held.jsonl", PAIRS)
    more = "--data pairs.jsonl --val-data held.jsonl --seq-len 40 --steps 4 --save-every 2"
    more += " --batch-size 3 --micro-batch 1 --eval-every 2 --lr 1e-3"
    run_well("preferences", folder, more)
    run_well("preferences", folder, more, "--out on2", ranks=2)
    one, two = log_of(folder / "run", "train"), log_of(folder / "on2", "train")
    for key in ("loss", "grad_norm", "tokens", "reward_margin", "reward_accuracy"):
        expected = pytest.approx([x[key] for x in one], rel=1e-4, abs=1e-6)
        assert [x[key] for x in two] == expected, key
    more += " --cache another"
    for where, nth in (("batch of the reference", 2), ("micro-batch", 8)):
        killed = functools.partial(die, where, nth)
        (end,) = run_task("preferences", folder, more, "--out killed", patch=killed)
        assert end.code == -signal.SIGKILL
    run_well("preferences", folder, more, "--out killed")
    assert trace(folder / "killed") == trace(folder / "run")


def test_a_tuned_model_holds_a_conversation(folder: Path) -> None:
    """New tokens train beside a frozen table, and checkpoints are written in between."""
    rows = [TALK, TALK | {"prompt": [user("And the sea?")]}]
    write_rows(folder / "talk.jsonl", rows)
    more = "--data talk.jsonl --val-data talk.jsonl --method bitfit --steps 3 --save-every 1"
    same = TALK | {"rejected": TALK["chosen"]}
    long = TALK | {"chosen": [assistant(LONG * 4)]}
    write_rows(folder / "asked.jsonl", [same, TALK, long])
    more += " --predict asked.jsonl --answers compared.jsonl"
    end = run_well("preferences", folder, "--init base", more, "--eval-every 1 --lr 1e-2")
    assert "2 of 3 rows could not be compared, and are not counted" in end.out
    lines = map(json.loads, (folder / "compared.jsonl").read_text().splitlines())
    broken, sound, dropped = lines
    assert broken["preferred"] is None and "is the same as 'chosen'" in broken["unreadable"]
    assert dropped["preferred"] is None and "does not fit into 160 tokens" in dropped["unreadable"]
    assert {k: sound[k] for k in TALK} == TALK and sound["preferred"] == "chosen"
    scores = json.loads((folder / "compared.scores.json").read_text())
    assert scores["reward_margin"] == sound["reward_margin"] > 0
    ends = json.loads((folder / "run" / "final" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(str(folder / "run" / "final"))
    assert ends["eos_token_id"] == [tokenizer.special_id(END), tokenizer.eot]
    assert has_template(tokenizer.special_ids)  # so generate.py --chat talks with it


def test_merging_a_copy_leaves_the_model_as_it_was() -> None:
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=1, n_embd=8))
    add_rows(model, "transformer.wte", torch.tensor([18, 19]))
    idx = torch.arange(8)[None]
    before = model(idx)
    other = copy.deepcopy(model)
    merge(other)
    assert torch.equal(model(idx), before) and torch.equal(other(idx), before)


def test_samples_answer_prompts(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def decode(model: Any, prompts: Any, cfg: Any, end: int, **more: Any) -> list[list[int]]:
        asked.append((end, prompts))
        return [[] for _ in prompts]

    monkeypatch.setattr("tasks.preferences.task.generate", decode)
    task = set_up(inputs)
    assert task.samples(train_step(task).model)[0][0] == "Who waits?"
    task = set_up(inputs, [TALK], prompts=("Hello!",), seq_len=80)
    assert task.samples(train_step(task).model) == [("<|user|>Hello!<|end|><|assistant|>", "")]
    special = task.trunk.tokenizer.special_ids
    assert [end for end, _ in asked] == [task.trunk.tokenizer.eot, special[END]]
