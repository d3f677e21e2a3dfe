"""The optimizer step against the same objective written out in fp64, for a task that is nothing like a GPT."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import TwoHeads, capture_gradients, expected_gradients, loader, run_step, step_of

from distributed import World
from optim import LossScale
from step import check_replicas, partition, seed_draws
from trainer import evaluate

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=2e-5, atol=1e-7, msg=name)


# --- how a global batch is cut


@pytest.mark.parametrize(
    "n, width, size, micro", [(8, 1, 1, 3), (8, 1, 3, 2), (7, 2, 2, 4), (3, 4, 4, 1), (1, 1, 4, 8)]
)
def test_ranks_and_micro_batches_share_the_rows_and_split_no_group(n, width, size, micro):
    groups = np.arange(n * width).reshape(n, width)
    cuts = [partition(groups, rank, size, micro) for rank in range(size)]
    assert len({len(cut) for cut in cuts}) == 1  # DDP: as many passes on every rank
    parts = [part for cut in cuts for part in cut if part is not None]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n * width))
    for part in parts:
        assert len(part) <= max(micro, width)
        assert (part.reshape(-1, width) // width == part.reshape(-1, width)[:, :1] // width).all()


# --- exactness


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 16])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_gradients_are_those_of_the_whole_batch_however_it_is_cut(micro_batch, step):
    # step 1 lacks the second term, step 2 has it in one row only; steps 0 and 2 have a group without the first
    task = TwoHeads()
    train = step_of(task, ALONE, clip=0)
    found = capture_gradients(train)
    result = run_step(train, step, loader(task, ALONE, micro_batch))
    loss, terms, gradients = expected_gradients(task, train.model, step)
    close(found, gradients)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert {name: value.item() for name, value in result.terms.items()} == pytest.approx(terms, rel=1e-5)
    assert result.grad_norm.item() == pytest.approx(norm(gradients), rel=1e-5)
    ids = task.rows("train", step).reshape(-1)
    assert result.amounts == {"tokens": task.lengths[ids].sum(), "rows": len(ids)}
    assert bool(result.ok)


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients.values()))


def test_clipping_scales_to_the_limit_and_logs_the_norm_before():
    task = TwoHeads()
    train = step_of(task, ALONE, clip=0.01)
    found = capture_gradients(train)
    result = run_step(train, 0, loader(task, ALONE, 4))
    _, _, gradients = expected_gradients(task, train.model, 0)
    assert result.grad_norm.item() == pytest.approx(norm(gradients), rel=1e-5)
    assert norm(found) == pytest.approx(0.01, rel=1e-3)  # a millionth is added to the norm it is divided by
    factor = 0.01 / (norm(gradients) + 1e-6)
    close(found, {name: factor * g for name, g in gradients.items()})
    loose = step_of(task, ALONE, clip=1e3)
    found = capture_gradients(loose)
    run_step(loose, 0, loader(task, ALONE, 4))
    close(found, gradients)


def test_a_term_that_no_row_has_moves_its_head_by_decay_alone():
    task = TwoHeads()
    train = step_of(task, ALONE)
    before = copy.deepcopy(train.model.state_dict())
    result = run_step(train, 1, loader(task, ALONE, 4))
    assert "rank" not in result.terms
    kept = 1 - train.lr(1) * train.cfg.weight_decay
    torch.testing.assert_close(train.model.ranker.weight.detach(), kept * before["ranker.weight"], rtol=1e-6, atol=0)
    assert not torch.equal(train.model.tagger.weight, before["tagger.weight"])


def test_a_batch_without_any_target_changes_nothing():
    task = TwoHeads()
    train = step_of(task, ALONE)
    before = copy.deepcopy(train.model.state_dict())
    task.tagged[:] = False
    task.ranked[:] = False
    result = run_step(train, 0, loader(task, ALONE, 4))
    assert not bool(result.ok)
    assert all(torch.equal(value, before[name]) for name, value in train.model.state_dict().items())


# --- what trains may change at a step


def test_groups_that_change_keep_the_state_of_what_goes_on_training():
    task = TwoHeads(unfreeze_at=2)
    train = step_of(task, ALONE)
    data = loader(task, ALONE, 4)
    head, trunk = train.model.tagger.weight, train.model.trunk.weight
    untouched = trunk.detach().clone()
    run_step(train, 0, data)
    optimizers = train.optimizers
    run_step(train, 1, data)
    assert train.optimizers is optimizers  # rebuilt where the groups change and nowhere else
    assert torch.equal(trunk, untouched) and not trunk.requires_grad
    moments = train.optimizers.state()["tagger.weight.exp_avg"].clone()
    train.assemble(2)
    assert train.optimizers is not optimizers and trunk.requires_grad
    assert torch.equal(train.optimizers.state()["tagger.weight.exp_avg"], moments)
    run_step(train, 2, data)
    assert train.optimizers.optimizers[0].state[head]["step"].item() == 3
    assert train.optimizers.optimizers[0].state[trunk]["step"].item() == 1
    assert not torch.equal(trunk, untouched)


def test_state_taken_over_in_the_middle_continues_to_the_bit():
    task = TwoHeads(unfreeze_at=2)
    whole = step_of(task, ALONE)
    data = loader(task, ALONE, 3)
    for step in range(2):
        run_step(whole, step, data)
    saved = {name: value.clone() for name, value in whole.state().items()}
    resumed = step_of(task, ALONE, seed=5)
    resumed.load_state(saved, 2)
    again = loader(task, ALONE, 3)
    for step in (2, 3):
        run_step(whole, step, data)
        run_step(resumed, step, again)
    assert all(map(torch.equal, whole.state().values(), resumed.state().values()))


# --- what may go wrong


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_to_the_bit(value):
    task = TwoHeads()
    train = step_of(task, ALONE)
    data = loader(task, ALONE, 4)
    run_step(train, 0, data)
    before = {name: tensor.clone() for name, tensor in train.state().items()}
    task.poison = {1: value}
    assert not bool(run_step(train, 1, data).ok)
    assert all(torch.equal(tensor, before[name]) for name, tensor in train.state().items())
    assert bool(run_step(train, 2, data).ok)
    assert train.state()["optimizer.tagger.weight.step"].item() == 2


def test_a_step_stopped_half_way_changes_nothing():
    task = TwoHeads()
    train, untroubled = step_of(task, ALONE), step_of(task, ALONE)
    data = loader(task, ALONE, 2)
    calls = iter([0, 0, 15])
    assert train(0, data(0), lambda: next(calls)) is None
    assert all(p.grad is None for p in train.model.parameters())
    for each in (train, untroubled):
        run_step(each, 0, loader(task, ALONE, 2))
    assert all(map(torch.equal, train.model.parameters(), untroubled.model.parameters()))


def test_fp16_overflow_halves_the_scale_and_gradients_are_unscaled(monkeypatch):
    monkeypatch.setattr(LossScale, "interval", 2)
    task = TwoHeads()
    train = step_of(task, ALONE, precision="fp16", clip=0)
    data = loader(task, ALONE, 4)
    first = train.scale.scale.item()
    task.poison = {0: 1e36}  # finite, until it is scaled
    assert not bool(run_step(train, 0, data).ok)
    assert train.scale.scale.item() == first / 2
    task.poison = {}
    found = capture_gradients(train)
    run_step(train, 1, data)
    _, _, gradients = expected_gradients(task, train.model, 1)
    for name, expected in gradients.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0.02, atol=1e-3)  # fp16 has 11 bits
    run_step(train, 2, data)
    assert train.scale.scale.item() == first  # two good ones


def test_draws_depend_on_seed_step_micro_batch_and_rank_only():
    def draw(*numbers: int) -> float:
        seed_draws(*numbers)
        return torch.rand(()).item()

    base = draw(1, 2, 3, 4)
    torch.rand(100)
    assert draw(1, 2, 3, 4) == base
    assert len({base, draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5)}) == 5


def test_dropout_repeats_from_its_seed_wherever_a_run_begins():
    task = TwoHeads(dropout=0.5)
    once, again = step_of(task, ALONE), step_of(task, ALONE)
    torch.rand(17)
    found, repeated = capture_gradients(once), capture_gradients(again)
    run_step(once, 3, loader(task, ALONE, 2))
    torch.rand(5)
    run_step(again, 3, loader(task, ALONE, 2))
    assert all(torch.equal(found[name], repeated[name]) for name in found)


# --- evaluation


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_evaluation_counts_every_row_once_and_leaves_the_model_training(micro_batch):
    task = TwoHeads(dropout=0.5)
    train = step_of(task, ALONE)
    train.cfg.micro_batch = micro_batch
    train.model.train()
    metrics = evaluate(train)
    assert metrics == pytest.approx(task.expected_metrics(train.model), rel=1e-5)
    assert train.model.training
    assert evaluate(train, stop=lambda: 15) is None
    assert train.model.training


def test_one_rank_has_nobody_to_differ_from():
    check_replicas(step_of(TwoHeads(), ALONE).model, ALONE)
