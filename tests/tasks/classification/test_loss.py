"""The loss terms and their gradients, against plain loops; graphs and FLOPs of a step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import Resolved, resolved
from engine.compiling import compile_model
from engine.evaluation import evaluate
from engine.loader import Loader, partition
from engine.step import TrainStep
from model import GPT
from moods import ALONE, LABELS, WORDS, Mood, model_of, mood, of_two, row
from text.tokenizer import Tokenizer
from toy import capture_gradients, expected_gradients


class Passes(nn.Module):
    """Replaces dropout: it changes the second pass of each row, and always in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, pattern = len(x) // 2, torch.arange(x.shape[-1], dtype=x.dtype) % 3
        return torch.cat([x[:n], x[n:] * (1 + 0.2 * pattern)])


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights and smoothing": dict(class_weights=("1", "2", "0.5"), label_smoothing=0.1),
    "word": dict(form="word", label_smoothing=0.2),
    "attention": dict(pooling="attention"),
    "lstm": dict(pooling="lstm"),
    "rdrop": dict(objective=("rdrop",), rdrop=0.7, class_weights=("balanced",)),
    "simcse": dict(objective=("simcse",), simcse=0.3, simcse_group=2, simcse_temperature=0.5),
    "both, mean": dict(
        objective=("simcse", "rdrop"),
        simcse_group=2,
        class_weights=("1", "0.5", "3"),
        pooling="mean",
    ),
    "both, word": dict(objective=("simcse", "rdrop"), simcse_group=2, form="word"),
}


@pytest.fixture(params=LOSSES)
def learner(request: Any, tokenizer: Tokenizer) -> tuple[Mood, GPT]:
    """A task and its model, with an auxiliary task unless under --form word. The two passes of a
    row differ without random draws."""
    options: dict[str, Any] = LOSSES[request.param] | (
        dict(dropout=0.1) if "objective" in LOSSES[request.param] else {}
    )
    task = (mood if options.get("form") == "word" else of_two)(tokenizer, **options)
    task.trunk.shape = dataclasses.replace(task.trunk.shape, dropout=0.0)
    model = model_of(task)
    if task.objective.passes == 2:
        model.transformer.drop = Passes()
    return task, model.train()


def own_steps(task: Mood) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of each step of an epoch."""
    for step in range(task.order.steps_per_epoch):
        yield step, task.rows("train", step)


def by_hand(task: Mood, model: GPT, groups: np.ndarray) -> dict[str, float]:
    """The loss terms of a step's rows, by plain loops in fp64."""
    exact, cfg = copy.deepcopy(model).double(), task.cfg
    sums: dict[str, float] = defaultdict(float)
    for group in groups:
        seen = [passes_of(task, exact, i) for i in group]
        for i, (log_ps, _) in zip(group, seen, strict=True):
            label, weight = task.train.labels[i], task.train.weights[i]
            term = task.head_names[1] if task.train.heads[i] else "nll"
            for log_p in log_ps:
                nll = -(1 - cfg.label_smoothing) * log_p[label] - cfg.label_smoothing * sum(
                    log_p
                ) / len(log_p)
                sums[term] += weight * nll / len(log_ps)
            if "rdrop" in cfg.objective:
                p, q = (
                    [math.exp(x) / sum(map(math.exp, log_p)) for x in log_p] for log_p in log_ps
                )
                sums["rdrop"] += (
                    weight
                    * sum((a - b) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
                    / 2
                )
        if "simcse" in cfg.objective:
            for n, (_, (first, _)) in enumerate(seen):
                alike = [
                    float(F.cosine_similarity(first, second, dim=0)) / cfg.simcse_temperature
                    for _, (_, second) in seen
                ]
                sums["simcse"] -= alike[n] - math.log(sum(map(math.exp, alike)))
    return dict(sums)


@torch.no_grad()
def passes_of(task: Mood, exact: GPT, i: int) -> tuple[list[list[float]], list[torch.Tensor]]:
    """The log-probabilities and the pooled states of one unpadded row, in each pass."""
    tokens, head = torch.from_numpy(task.train.tokens[i])[None], int(task.train.heads[i])
    hidden, n = (
        exact.hidden(tokens.repeat(task.objective.passes, 1)),
        torch.tensor([len(tokens[0])] * task.objective.passes),
    )
    if task.cfg.form == "word":
        log_p, pooled = (
            F.log_softmax(exact.logits(hidden[:, -1]), -1)[:, task.objective.scorer.word_ids],
            hidden[:, -1],
        )
    else:
        pooled = exact.heads[task.head_names[head]].pool(hidden, n)
        log_p = F.log_softmax(pooled @ exact.heads[task.head_names[head]].weight.T, -1)
    return log_p.tolist(), list(pooled)


def test_loss_terms_match_a_loop_over_rows(learner):
    task, model = learner
    assert task.objective.passes == (2 if task.cfg.objective else 1)
    for _, groups in own_steps(task):
        batch = task.batch("train", groups.reshape(-1))
        terms = task.loss(model, batch.tensors)
        found = {name: float(value.detach()) for name, value in terms.items()}
        assert found == pytest.approx(by_hand(task, model, groups), rel=1e-4, abs=1e-6)
        ids = groups.reshape(-1)
        weight = float(task.train.weights[ids].sum())
        of = {"simcse": len(ids), "rdrop": weight}
        expected = {task.head_names[1] if task.train.heads[ids[0]] else "nll": weight}
        assert batch.weights == pytest.approx(
            expected | {name: of[name] for name in task.cfg.objective}
        )


def test_a_block_compiles_few_graphs_for_all_lengths(tokenizer, monkeypatch):
    """Training and evaluation compile nothing more once they have seen two lengths, and graphs do
    not break."""
    # Everything but code generation, which takes long and is not tested here.
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **options: compile(m, backend="eager", fullgraph=True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = [row(" ".join((WORDS * 8)[: 1 + 7 * n % 120]), LABELS[n % 3]) for n in range(60)]
    options: dict[str, Any] = dict(precision="bf16", dropout=0.1, micro_batch=4, seq_len=128)
    task = mood(tokenizer, rows, rows[:12], n_layer=3, compile=True, **options)
    model = model_of(task).train()
    compile_model(model, task.cfg, ALONE, task.cost().loss is None)
    step = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE, True)
    loader = Loader(task, ALONE, 4, 40)
    for s in range(12):
        step(s, loader(s))
    evaluate(step, 4)
    # There are three kinds of blocks: the first, those after it, and the last, which computes one
    # position. Each is compiled for one length, for any length, and for evaluation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    assert len({loader(s).batches[0]["idx"].shape[1] for s in range(12, 30)}) > 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in range(30, 40):
            step(s, loader(s))
        evaluate(step, 4)
    loader.close()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_flops_match_the_matrix_products(tokenizer, pooling):
    """torch counts FLOPs, including those of attention in plain form: forward, and twice as many
    backward."""
    rows = [row(" ".join(WORDS * 8), label) for label in LABELS]
    task = mood(
        tokenizer,
        rows,
        pooling=pooling,
        n_layer=2,
        n_head=2,
        n_embd=128,
        seq_len=96,
        without=("flash-attention",),
    )
    model, length = model_of(task), int(task.train.lengths.max())
    batch = task.batch("train", np.array([0])).tensors
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.objective.scorer.states(model, batch["idx"][:, :length], batch["lengths"])
    # The formula counts biases and norms as weights, and leaves out the few products of the one
    # position.
    flops = task.cost().flops_per_token
    assert flops == pytest.approx(3 * counter.get_total_flops() / length, rel=0.03)


def test_the_weights_of_the_terms(learner):
    task, _ = learner
    cfg = task.cfg
    of = {"rdrop": cfg.rdrop / 2, "simcse": cfg.simcse}
    others = {"mood-2": 0.5} if task.auxiliary else {}
    assert task.terms == {"nll": 1.0} | others | {name: of[name] for name in cfg.objective}


def test_gradients_do_not_depend_on_the_micro_batch(learner):
    """Steps are split into micro-batches, groups stay whole, and the replaced dropout does not
    draw."""
    task, model = learner
    train = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE)
    for step, groups in own_steps(task):
        loss, terms, expected = expected_gradients(task, model, step)
        for micro_batch in (1, 3, groups.size):
            found = capture_gradients(train)
            result = train(step, Loader(task, ALONE, micro_batch, step + 1, ahead=0)(step))
            assert result is not None and result.loss.item() == pytest.approx(loss, rel=1e-5)
            assert {k: v.item() for k, v in result.terms.items()} == pytest.approx(
                terms, rel=1e-4, abs=1e-6
            )
            for name, gradient in expected.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(
                    found[name].double(), gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=name
                )


def test_two_ranks_have_the_same_terms_as_one(learner):
    task, model = learner
    for _, groups in own_steps(task):
        whole = task.batch("train", groups.reshape(-1))
        for micro_batch in (1, 3):
            parts = [
                part
                for rank in (0, 1)
                for part in partition(groups, rank, 2, micro_batch)
                if part is not None
            ]
            assert sorted(np.concatenate(parts)) == sorted(groups.reshape(-1))
            for of in (
                lambda batch: batch.weights,
                lambda batch: {k: v.detach() for k, v in task.loss(model, batch.tensors).items()},
            ):
                total: dict[str, float] = defaultdict(float)
                for part in parts:
                    for k, v in of(task.batch("train", part)).items():
                        total[k] += float(v)
                assert dict(total) == pytest.approx(
                    {k: float(v) for k, v in of(whole).items()}, rel=1e-5, abs=1e-6
                )
