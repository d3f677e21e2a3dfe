"""Heads of a classifier: each pooling against a loop, what padding may do to it, and the files of a
head."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import heads
from adapters.heads import ClassifierInfo, Head
from adapters.options import Pooling
from config import GPTConfig, UserError
from model import GPT

POOLINGS = get_args(Pooling)
WIDTH, LABELS = 6, ("no", "maybe", "yes")
quick = settings(deadline=None, max_examples=15)
lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """An LSTM that takes no time."""
    with mock.patch.object(heads, "LSTM_WIDTH", 4):
        yield


def head_of(pooling: Any, width: int = WIDTH, dropout: float = 0.0) -> Head:
    """With values that no initialisation has: a query of zeros would pool as the mean does."""
    torch.manual_seed(0)
    head = Head(width, len(LABELS), pooling, dropout)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return head.double()


def states(of: list[int], filler: float = 0.0) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, WIDTH) fp64 of rows of these lengths, `filler` in their padding, of
    which all have some."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(of), max(of) + 2, WIDTH, generator=draw, dtype=torch.float64)
    for row, n in enumerate(of):
        hidden[row, n:] = filler
    return hidden, torch.tensor(of)


def pooled_by_a_loop(head: Head, row: Tensor) -> Tensor:
    """Of one row's states (T, WIDTH) without padding."""
    if head.pooling == "last":
        return row[-1]
    if head.pooling == "mean":
        return sum(row, torch.zeros(WIDTH).double()) / len(row)
    if head.pooling == "attention":
        shares = [math.exp(float(state @ head.query.detach()) / math.sqrt(WIDTH)) for state in row]
        return torch.stack(
            [share / sum(shares) * state for share, state in zip(shares, row, strict=True)]
        ).sum(0)
    h = c = torch.zeros(heads.LSTM_WIDTH).double()
    lstm = head.lstm
    for state in row:
        gates = (
            lstm.weight_ih_l0 @ state + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        )
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


@pytest.mark.parametrize("pooling", POOLINGS)
@given(of=lengths)
@quick
def test_scores_are_those_of_a_loop_over_rows_and_positions(pooling, of):
    head, (hidden, n) = head_of(pooling), states(of)
    found = head(hidden, n)
    assert found.shape == (len(of), len(LABELS)) and found.dtype == torch.float64
    for row, length in enumerate(of):
        expected = head.weight @ pooled_by_a_loop(head, hidden[row, :length])
        torch.testing.assert_close(found[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
@given(of=lengths)
@quick
def test_padding_of_anything_changes_no_score_and_no_gradient(pooling, of):
    head = head_of(pooling)

    def scores_and_gradients(filler: float) -> list[Tensor]:
        hidden, n = states(of, filler)
        hidden.requires_grad_()
        head.zero_grad()
        scores = head(hidden, n)
        (scores * torch.arange(scores.numel()).view_as(scores)).sum().backward()
        assert hidden.grad is not None
        return [scores, hidden.grad, *(p.grad.clone() for p in head.parameters())]

    for one, other in zip(scores_and_gradients(0.0), scores_and_gradients(math.nan), strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_those_of_finite_differences(pooling):
    head, (hidden, n) = head_of(pooling), states([3, 1, 4])
    names, values = zip(*head.named_parameters(), strict=True)

    def scores(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (x, n))

    assert torch.autograd.gradcheck(scores, (hidden.requires_grad_(), *values))


def test_attention_begins_as_the_mean():
    hidden, n = states([2, 5])
    new, mean = (Head(WIDTH, len(LABELS), pooling).double() for pooling in ("attention", "mean"))
    torch.testing.assert_close(new.pool(hidden, n), mean.pool(hidden, n))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_computed_in_fp32_whatever_the_states_are(pooling):
    head, (hidden, n) = head_of(pooling).float(), states([3, 2])
    rounded = hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = head(rounded, n)
    assert found.dtype == torch.float32
    assert torch.equal(found, head(rounded.float(), n))


def test_dropout_is_on_what_is_pooled_and_in_training_alone():
    head = head_of("last", width=1000, dropout=0.25)
    hidden = torch.ones(1, 2, 1000).double()
    head.weight.data = torch.eye(1000).double()
    scores = head(hidden, torch.tensor([2]))
    assert (
        scores.unique().tolist() == pytest.approx([0, 1 / 0.75])
        and 0.2 < (scores == 0).double().mean() < 0.3
    )
    assert torch.equal(head.eval()(hidden, torch.tensor([2])), torch.ones(1, 1000).double())


# --- files


def classifier(pooling: Any) -> GPT:
    model = GPT(GPTConfig(vocab_size=10, block_size=8, n_layer=1, n_head=1, n_embd=WIDTH))
    model.heads["own"], model.heads["other"] = head_of(pooling).float(), head_of("last").float()
    return model


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_head_is_found_as_it_was_saved(pooling, tmp_path):
    model, info = classifier(pooling), ClassifierInfo("own", LABELS, "prompt", pooling)
    heads.save(model, tmp_path, info)
    found = heads.find(tmp_path)
    assert found is not None and found[0] == info == heads.read_info(tmp_path)
    again = Head(WIDTH, len(LABELS), pooling)
    again.load_state_dict(found[1])
    hidden, n = states([3, 1])
    assert torch.equal(again(hidden, n), model.heads["own"](hidden, n))


def test_what_answers_by_words_has_words_and_no_head(tmp_path):
    info = ClassifierInfo("own", LABELS, "word", "last", ("아니", "몰라", "그래"))
    model = classifier("last")
    model.heads.clear()
    heads.save(model, tmp_path, info)
    assert heads.find(tmp_path) is None and heads.read_info(tmp_path) == info
    assert not (tmp_path / heads.WEIGHTS).exists() and "그래" in (tmp_path / heads.INFO).read_text(
        encoding="utf-8"
    )


def test_folders_without_a_classifier(tmp_path):
    assert heads.find(tmp_path) is None and heads.read_info(tmp_path) is None
    model = classifier("last")
    model.save_pretrained(tmp_path)
    assert heads.find(tmp_path) is None


@pytest.mark.parametrize("named", [True, False])
def test_the_head_of_a_hub_s_classifier(named, tmp_path):
    model = classifier("last")
    score = model.heads["own"].weight.detach()
    model.save_pretrained(tmp_path, 0, score, LABELS)
    if not named:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if k != "id2label"})
        )
    found = heads.find(tmp_path)
    assert found is not None
    assert found[0] == ClassifierInfo(
        "", LABELS if named else ("LABEL_0", "LABEL_1", "LABEL_2"), "plain", "last"
    )
    assert found[1].keys() == {"weight"} and torch.equal(found[1]["weight"], score)


def test_broken_files_of_a_head_are_named(tmp_path):
    heads.save(classifier("last"), tmp_path, ClassifierInfo("own", LABELS, "plain", "last"))
    with pytest.raises(UserError, match=r"heads.safetensors holds no head named third"):
        rewrite(tmp_path, task="third")
        heads.find(tmp_path)
    for text in ("{", "[]", "{}", json.dumps({"labels": 3, "words": []})):
        (tmp_path / heads.INFO).write_text(text)
        with pytest.raises(UserError, match=r"classifier.json [^\n]+$"):
            heads.read_info(tmp_path)
    heads.save(classifier("last"), tmp_path, ClassifierInfo("own", LABELS, "plain", "last"))
    (tmp_path / heads.WEIGHTS).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"heads.safetensors cannot be read: [^\n]+$"):
        heads.find(tmp_path)
    (tmp_path / heads.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"heads.safetensors"):
        heads.find(tmp_path)


def rewrite(folder: Path, **changes: Any) -> None:
    said = json.loads((folder / heads.INFO).read_text())
    (folder / heads.INFO).write_text(json.dumps(said | changes))
