"""Weights cast once a step: the numbers are those of fp32 up to bf16's rounding, and what is kept stays fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from random_tokens import make_step
from toy import run_step

from config import GPTConfig
from precision import Cast

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=2, n_head=2, n_embd=64)


def losses(steps: int = 6, **options) -> list[float]:
    step, loader = make_step(shape=SMALL, **options)
    results = [step(s, loader(s)) for s in range(steps)]
    loader.close()
    return [float(result.loss) for result in results if result is not None]


@pytest.mark.parametrize("without", [(), ("cast-once",), ("chunked-head",), ("cast-once", "chunked-head")])
def test_losses_are_those_of_fp32(without):
    # 8 bits of mantissa a rounding; over a mean of hundreds of targets errors cancel to under 2e-3 of the loss.
    assert losses(precision="bf16", without=without) == pytest.approx(losses(precision="fp32"), rel=2e-3)


@pytest.mark.parametrize(
    "without",
    [
        ("chunked-head",),
        ("flash-attention",),
        ("padded-vocab",),
        ("fused-adamw",),
    ],
)
def test_leaving_an_optimization_out_changes_no_loss(without):
    assert losses(precision="fp32", without=without) == pytest.approx(losses(precision="fp32"), rel=2e-5)


def test_recomputed_activations_are_those_of_the_copies():
    assert losses(precision="bf16", recompute=True) == losses(precision="bf16")


def test_parameters_gradients_and_moments_stay_fp32():
    step, loader = make_step(shape=SMALL, precision="bf16")
    step(0, loader(0))
    loader.close()
    assert all(tensor.dtype == torch.float32 for tensor in step.state().values())


def test_every_copy_follows_its_parameter():
    step, loader = make_step(shape=SMALL, precision="bf16")
    for s in range(3):
        step(s, loader(s))
    loader.close()
    copies = step.module.copies
    assert len(copies) == 2 * 4 * SMALL.n_layer  # weight and bias of four products a block
    named = dict(step.module.module.named_parameters())
    for name, copy in copies.items():
        assert torch.equal(copy, named[name].bfloat16()), name


def test_a_loaded_state_is_computed_with_at_once():
    step, loader = make_step(shape=SMALL, precision="bf16")
    step(0, loader(0))
    other, _ = make_step(shape=SMALL, precision="bf16", seed=7)
    other.load_state({name: tensor.clone() for name, tensor in step.state().items()}, 1)
    assert float(run_step(step, 1, loader).loss) == float(run_step(other, 1, loader).loss)
    loader.close()


def test_small_updates_are_not_lost_in_the_copies_rounding():
    """A thousand steps of a millionth each: bf16 alone would stand still at 1."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    cast = Cast(module, torch.bfloat16)
    for _ in range(1000):
        cast(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        with torch.no_grad():
            assert module.weight.grad is not None
            module.weight -= 2e-5 * module.weight.grad
        module.weight.grad = None
        cast.refresh()
    assert module.weight.item() == pytest.approx(0.98, abs=1e-4)
    assert cast.copies["weight"].item() == pytest.approx(0.98, abs=2**-8)


def test_frozen_parameters_have_no_gradient():
    module = nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    Cast(module, torch.bfloat16)(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert module.weight.grad is None and module.bias.grad is not None and module.bias.grad.dtype == torch.float32
