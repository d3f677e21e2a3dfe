"""Schedules, parameter groups, AdamW, Muon and loss scaling, against torch.optim and hand-written
rules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from config import GPTConfig, TrainConfig
from engine.optim import Group, Optimizers, Span, default_groups, lr_multiplier
from engine.precision import LossScale
from model import GPT

YES, NO = torch.tensor(True), torch.tensor(False)
SCHEDULES = ("cosine", "linear", "wsd", "constant", "slanted-triangular")


# --- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "steps, warmup", [(1, 0), (7, 0), (10, 3), (100, 10), (50, 50), (20, 100), (1000, 1)]
)
def test_the_rate_is_between_zero_and_the_peak(schedule, steps, warmup):
    rates = [lr_multiplier(s, steps, warmup, schedule, 0.1) for s in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    # It depends on nothing else.
    assert (
        rates
        == [lr_multiplier(s, steps, warmup, schedule, 0.1) for s in reversed(range(steps))][::-1]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    rates = [lr_multiplier(s, 100, 10, schedule) for s in range(11)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, rates[10]])
    assert rates[10] == 1


@pytest.mark.parametrize(
    "schedule, end", [("cosine", 0.05), ("linear", 0.05), ("wsd", 0.05), ("constant", 1.0)]
)
def test_after_the_peak_the_rate_falls_to_its_end(schedule, end):
    rates = [lr_multiplier(s, 200, 20, schedule, 0.05) for s in range(20, 201)]
    assert all(a >= b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] == pytest.approx(end)


def test_cosine_and_linear_are_half_way_down_at_half_way():
    assert lr_multiplier(60, 100, 20, "cosine", 0.2) == pytest.approx(0.6)
    assert lr_multiplier(60, 100, 20, "linear", 0.2) == pytest.approx(0.6)
    assert lr_multiplier(40, 100, 20, "cosine", 0) == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )


def test_wsd_is_flat_until_its_last_fifth():
    rates = [lr_multiplier(s, 120, 20, "wsd", 0.0) for s in range(20, 121)]
    assert rates[:81] == [1.0] * 81
    assert rates[90] == pytest.approx(0.5)


def test_slanted_triangular_peaks_at_a_tenth():
    rates = [lr_multiplier(s, 200, 77, "slanted-triangular") for s in range(201)]
    assert rates[0] == rates[200] == 1 / 32
    assert max(rates) == rates[20] == 1
    assert rates[10] == pytest.approx((1 + 31 / 2) / 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_restarted_decay_goes_from_the_peak_to_the_end(schedule):
    rates = [lr_multiplier(s, Span(40, 240), 20, schedule, 0.05) for s in range(40, 241)]
    first = [lr_multiplier(s, 200, 0, schedule, 0.05) for s in range(201)]
    assert rates == pytest.approx(first)


def test_a_decay_restarted_in_the_warm_up_lets_it_finish():
    rates = [lr_multiplier(s, Span(5, 100), 20, "cosine") for s in range(5, 100)]
    assert rates == [lr_multiplier(s, 100, 20, "cosine") for s in range(5, 100)]


# --- groups


def micro() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=70, block_size=8, n_layer=2, n_head=2, n_embd=16))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(optimizer):
    model = micro()
    groups = default_groups(model, TrainConfig(optimizer=optimizer, weight_decay=0.3))
    names = [name for group in groups for name in group.params]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    for group in groups:
        for name, p in group.params.items():
            assert group.weight_decay == (0.3 if p.dim() == 2 else 0)
            hidden = p.dim() == 2 and ".h." in name
            assert group.optimizer == ("muon" if optimizer == "muon" and hidden else "adamw")


# --- AdamW and Muon


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (seed % 3 - 2)


def test_fused_adamw_equals_torchs_unfused():
    cfg = TrainConfig(weight_decay=0.2, beta1=0.8, beta2=0.97)
    ours, theirs = micro(), micro()
    groups = default_groups(ours, cfg)
    groups[1].lr_scale = 0.5
    optimizers = Optimizers(groups, cfg)
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.8, 0.97), eps=1e-8, foreach=False, fused=False,
    )  # fmt: skip
    for seed in range(6):
        lr = 1e-2 / (1 + seed)
        gradients(ours, seed), gradients(theirs, seed)
        optimizers.step(lr, None, YES)
        for group, scale in zip(reference.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = lr * scale
        reference.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # The fused kernel rounds in another order.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_muon_equals_torchs():
    cfg = TrainConfig(optimizer="muon", weight_decay=0.1)
    ours, theirs = micro(), micro()
    optimizers = Optimizers(default_groups(ours, cfg), cfg)
    hidden = [p for name, p in theirs.named_parameters() if ".h." in name and p.dim() == 2]
    reference = torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in hidden]
    for seed in range(3):
        gradients(ours, seed), gradients(theirs, seed)
        optimizers.step(1e-2, None, YES)
        reference.step()
    mine = [p for name, p in ours.named_parameters() if ".h." in name and p.dim() == 2]
    assert all(map(torch.equal, mine, hidden))
    # An update of AdamW moves an entry by about lr. Muon's must do the same, for every shape.
    moves = [
        ((p - q) / 3).pow(2).mean().sqrt().item() / 1e-2 for p, q in zip(mine, before, strict=True)
    ]
    assert all(0.1 < move < 0.5 for move in moves)


def test_zero_gradients_only_decay_matrices():
    cfg = TrainConfig(weight_decay=0.5)
    model = micro()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = Optimizers(default_groups(model, cfg), cfg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(0.1, None, YES)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.detach(), before[name] * (0.95 if p.dim() == 2 else 1), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_update_changes_no_bit_of_the_state(optimizer, steps_before):
    cfg = TrainConfig(optimizer=optimizer)
    model = micro()
    optimizers = Optimizers(default_groups(model, cfg), cfg)
    for seed in range(steps_before):
        gradients(model, seed)
        optimizers.step(1e-2, None, YES)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in optimizers.state().items()}
    gradients(model, 9)
    for p in model.parameters():
        p.grad[0] = torch.nan  # one entry of each
    optimizers.step(1e-2, None, NO)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    after = optimizers.state()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    # The first call creates it.
    assert all(not value.any() for name, value in after.items() if name not in state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loaded_optimizer_state_continues_bit_for_bit(optimizer):
    cfg = TrainConfig(optimizer=optimizer)
    model, other = micro(), micro()
    first = Optimizers(default_groups(model, cfg), cfg)
    for seed in range(3):
        gradients(model, seed)
        first.step(1e-2, None, YES)
    other.load_state_dict(model.state_dict())
    second = Optimizers(default_groups(other, cfg), cfg)
    second.load_state(first.state() | {"not.trained.here.exp_avg": torch.ones(2)})
    for network, optimizers in ((model, first), (other, second)):
        gradients(network, 7)
        optimizers.step(1e-2, None, YES)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert second.state().keys() == first.state().keys()


def test_a_groups_scale_multiplies_the_rate():
    p, q = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    optimizers = Optimizers([Group({"p": p}), Group({"q": q}, lr_scale=0.25)], TrainConfig())
    for parameter in (p, q):
        parameter.grad = torch.ones(3, 3)
    optimizers.step(0.1, None, YES)
    torch.testing.assert_close(q, 0.25 * p)
    assert p[0, 0].item() == pytest.approx(-0.1)


# --- loss scaling


def factor(scale: LossScale, *oks: Tensor) -> float:
    for ok in oks:
        scale.update(ok)
    return scale.scale.item()


def test_the_loss_scale_halves_at_once_and_doubles_later(monkeypatch):
    monkeypatch.setattr(LossScale, "interval", 3)
    scale = LossScale(True, torch.device("cpu"))
    first = scale.scale.item()
    assert factor(scale, NO, NO) == first / 4
    assert factor(scale, YES, YES) == first / 4
    assert factor(scale, NO) == first / 8  # a skip starts the count afresh
    assert factor(scale, YES, YES) == first / 8
    assert factor(scale, YES) == first / 4
    other = LossScale(True, torch.device("cpu"))
    other.load_state({name: value.clone() for name, value in scale.state().items()})
    assert factor(other, YES, YES, YES) == factor(scale, YES, YES, YES) == first / 2


def test_without_fp16_there_is_no_scale():
    assert factor(LossScale(False, torch.device("cpu")), NO, YES) == 1


def test_the_loss_scale_of_another_precision_is_ignored():
    cpu = torch.device("cpu")
    fp32, fp16 = LossScale(False, cpu), LossScale(True, cpu)
    fp16.update(NO)
    fp32.load_state(fp16.state())
    assert fp32.scale.item() == 1, "fp32 gradients are not scaled"
    resumed = LossScale(True, cpu)
    resumed.load_state(fp32.state())
    assert resumed.scale.item() == 2.0**16, (
        "1 would let fp16 gradients vanish for thousands of steps"
    )
    resumed.load_state(fp16.state())
    assert resumed.scale.item() == 2.0**15
