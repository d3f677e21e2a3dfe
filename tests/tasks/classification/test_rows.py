"""Rows to tokens, tokens to scores, and scores to metrics."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config import Resolved, UserError, resolved
from engine.evaluation import evaluate
from engine.precision import set_products
from engine.step import TrainStep
from model import GPT
from moods import (
    ALONE,
    ASK,
    LABELS,
    OTHERS,
    READS,
    ROWS,
    WORDS,
    Mood,
    log_p_of,
    model_of,
    mood,
    quick,
    row,
    set_up,
    texts,
)
from tasks.encoder import pad_rows
from text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=READS)
def scorer(request: Any, tokenizer: Tokenizer) -> tuple[Mood, GPT]:
    task = mood(tokenizer, **READS[request.param])
    return task, model_of(task)


@given(
    ids=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=8),
    more=st.integers(0, 30),
    filler=st.integers(0, 300),
)
@quick
def test_scores_do_not_depend_on_batch_or_padding(scorer, ids, more, filler):
    task, model = scorer
    set_products("fp32", ALONE.device)  # as in a run

    def scores(ids: list[int], filler: int, more: int) -> torch.Tensor:
        rows = [task.train.tokens[i] for i in ids]
        batch = pad_rows(rows, filler, np.array([max(map(len, rows)) + more]))
        return task.objective.scorer.log_p(
            model, *task.objective.scorer.states(model, batch["idx"], batch["lengths"]), 0
        )

    with torch.no_grad():
        together = scores(ids, filler, more)
        assert together.shape == (len(ids), len(LABELS)) and together.dtype == torch.float32
        for i, found in zip(ids, together, strict=True):
            torch.testing.assert_close(found, scores([i], 0, 0)[0], rtol=1e-5, atol=1e-5)
    assert task.cfg.form == "word" or together.exp().sum(1).tolist() == pytest.approx(
        [1] * len(ids)
    )
    assert task.cfg.form != "word" or (together.exp().sum(1) < 0.9).all()  # of the whole vocabulary


def test_a_batch_is_padded_to_the_smallest_bucket(tokenizer):
    task = mood(tokenizer)
    for ids in ([0], [4, 0], [3, 1], [5, 2, 0]):
        batch = task.batch("train", np.array(ids)).tensors
        longest = max(len(task.train.tokens[i]) for i in ids)
        assert batch["idx"].shape == (
            len(ids),
            min(size for size in task.buckets if size >= longest),
        )
        assert batch["lengths"].tolist() == [len(task.train.tokens[i]) for i in ids]
        for i, tokens, n in zip(ids, batch["idx"].tolist(), batch["lengths"], strict=True):
            assert tokens == [*task.train.tokens[i].tolist(), *[tokenizer.eot] * (len(tokens) - n)]
        assert [LABELS[i] for i in batch["labels"]] == [ROWS[i]["label"] for i in ids]


def test_tokens_of_a_row_under_each_form(tokenizer):
    plain, prompt = mood(tokenizer), mood(tokenizer, form="prompt")
    encode, ask = tokenizer.encode, prompt.trunk.tokenizer.special_id(ASK)
    for i, given_row in enumerate(ROWS):
        pair = [tokenizer.eot, *encode(given_row["second"])] if given_row["second"] else []
        assert plain.train.tokens[i].tolist() == [*encode(given_row["first"]), *pair]
        asked = [*encode(given_row["second"]), ask] if given_row["second"] else []
        expected = [*encode("of"), *encode(given_row["first"]), ask, *asked]
        assert prompt.train.tokens[i].tolist() == expected
    assert mood(tokenizer, [row(""), row("a", "bad")]).train.tokens[0].tolist() == [tokenizer.eot]


@given(
    first=texts,
    second=st.just("") | texts,
    seq_len=st.integers(6, 30),
    form=st.sampled_from(["plain", "prompt"]),
)
@quick
def test_truncation_shortens_the_longer_text(tokenizer, first, second, seq_len, form):
    whole = [tokenizer.encode(text) for text in (first, second) if text]
    fixed = len(whole) - 1 if form == "plain" else len(whole) + len(tokenizer.encode("of"))
    over = fixed + sum(map(len, whole)) - seq_len
    for cut in ("end", "start", "middle"):
        task = mood(
            tokenizer,
            [row(first, second=second), row("a", "bad")],
            seq_len=seq_len,
            cut=cut,
            form=form,
        )
        tokens = task.train.tokens[0].tolist()
        assert len(tokens) == min(seq_len, seq_len + over)
        what = f"1 of 2 {{}} rows are longer than {seq_len} tokens and are truncated at the {cut} of their text"
        told = [text for text in task.source.warnings if "longer than" in text]
        assert told == ([what.format("training"), what.format("validation")] if over > 0 else [])
        kept = parts_of(
            tokens if form == "plain" else tokens[len(tokenizer.encode("of")) : -1], task
        )
        lost = [len(text) - len(part) for text, part in zip(whole, kept, strict=True)]
        assert sum(lost) == max(0, over)
        if len(whole) > 1:  # No text that was truncated is shorter than the other.
            a, b = map(len, kept)
            assert (not lost[0] or a >= b - 1) and (not lost[1] or b >= a - 1)
        for part, text in zip(kept, whole, strict=True):
            n = len(part)
            head = {"end": n, "start": 0, "middle": n // 2}[cut]
            assert part == text[:head] + text[len(text) - (n - head) :]


def parts_of(tokens: list[int], task: Mood) -> list[list[int]]:
    """The tokens of a row as lists, split at its special tokens."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token in task.trunk.tokenizer.special_ids.values():
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_rows_that_cannot_be_truncated_are_refused(tokenizer):
    with pytest.raises(
        UserError, match=r"rows row 3: \d+ tokens too long for --seq-len 14 \(--strict\)"
    ):
        mood(tokenizer, seq_len=14, strict=True)
    with pytest.raises(
        UserError, match=r"rows row \d: nothing of its text fits into 2 tokens; raise --seq-len"
    ):
        mood(tokenizer, seq_len=2, form="prompt")


def test_metrics_match_scikit_learn_at_any_micro_batch(tokenizer):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    draw = np.random.default_rng(0)
    val = [
        row(" ".join(draw.choice(WORDS, draw.integers(1, 20))), LABELS[n % 5 % 3])
        for n in range(40)
    ]
    task = set_up(Mood(ROWS, val, [(OTHERS, 1.0)]), tokenizer)
    model = model_of(task)
    expected: dict[str, float] = {}
    for head, (prefix, rows) in enumerate((("", val), ("mood-2_", OTHERS))):
        labels = [task.rows_of[head].labels.index(r["label"]) for r in rows]
        ids = np.flatnonzero(task.val.heads == head)
        alone = [
            log_p_of(task, copy.deepcopy(model).double(), task.val.tokens[i], head) for i in ids
        ]
        p = np.exp(alone)
        predicted = p.argmax(1)
        assert len(set(predicted)) > 1, "a figure of one label says little"
        expected |= {
            f"{prefix}val_loss": log_loss(labels, p, labels=range(p.shape[1])),
            f"{prefix}accuracy": accuracy_score(labels, predicted),
            f"{prefix}macro_f1": f1_score(labels, predicted, average="macro"),
            f"{prefix}calibration_error": calibration_by_hand(labels, p),
        }
    step = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE)
    for micro_batch in (1, 7, 64):
        found = evaluate(step, micro_batch) or {}
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def calibration_by_hand(labels: list[int], p: np.ndarray, bins: int = 15) -> float:
    error = 0.0
    for low in range(bins):
        inside = [n for n in range(len(labels)) if low / bins < p[n].max() <= (low + 1) / bins]
        if inside:
            right = sum(p[n].argmax() == labels[n] for n in inside) / len(inside)
            error += (
                len(inside)
                / len(labels)
                * abs(right - float(np.mean([p[n].max() for n in inside])))
            )
    return error
