"""Weights that are cast once a step: results match fp32 up to bf16's rounding, and the parameters
stay fp32."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn

from config import GPTConfig
from engine.precision import Cast, set_products
from random_tokens import make_step
from toy import run_step

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=2, n_head=2, n_embd=64)


@functools.cache
def losses(steps: int = 4, **options) -> list[float]:
    step, loader = make_step(shape=SMALL, **options)
    results = [step(s, loader(s)) for s in range(steps)]
    loader.close()
    return [float(result.loss) for result in results if result is not None]


@pytest.mark.parametrize("without", [(), ("cast-once",), ("cast-once", "chunked-head")])
def test_mixed_precision_losses_are_close_to_fp32(without):
    # Each rounding keeps 8 bits. In a mean over hundreds of targets the errors cancel to less than
    # 2e-3 of the loss.
    assert losses(precision="bf16", without=without) == pytest.approx(
        losses(precision="fp32"), rel=2e-3
    )


@pytest.mark.parametrize(
    "without",
    [
        ("chunked-head",),
        ("flash-attention",),
        ("padded-vocab",),
        ("fused-adamw",),
        ("cpu-products",),
    ],
)
def test_leaving_an_optimization_out_changes_no_loss(without):
    assert losses(precision="fp32", without=without) == pytest.approx(
        losses(precision="fp32"), rel=2e-5
    )


def test_fp32_products_on_a_cpu_are_exact():
    """Every layout of a product's operands, at a model's shapes, against fp64."""
    torch.manual_seed(0)
    by_onednn = set_products("fp32", torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == ("medium" if by_onednn else "highest")
    for n, k, m in ((1024, 384, 1536), (333, 1000, 65), (1, 768, 96), (64, 64, 64)):
        a, b = torch.randn(n, k), torch.randn(k, m)
        exact = a.double() @ b.double()
        batched = torch.bmm(torch.stack((a, a)), torch.stack((b, b)))
        for found in (
            a @ b,
            (b.t() @ a.t()).t(),
            a.t().contiguous().t() @ b.t().contiguous().t(),
            *batched,
        ):
            # Sums of k numbers, each rounded to 2^-24. With bf16's 2^-9 the error would be
            # thousands of times larger.
            assert (found - exact).norm() <= 1e-6 * exact.norm()
    assert not set_products("fp32", torch.device("cpu"), ("cpu-products",))
    assert (
        not set_products("fp32", torch.device("meta"))
        and torch.get_float32_matmul_precision() == "highest"
    )


def test_onednn_is_not_used_if_its_products_round(monkeypatch):
    """As on a CPU with AMX that does not report it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("engine.precision._products_are_exact", lambda: False)
    assert (
        not set_products("fp32", torch.device("cpu"))
        and torch.get_float32_matmul_precision() == "highest"
    )
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not set_products("fp32", torch.device("cpu"))


def test_recompute_uses_the_cast_copies():
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


def test_a_loaded_state_refreshes_the_copies():
    step, loader = make_step(shape=SMALL, precision="bf16")
    step(0, loader(0))
    other, _ = make_step(shape=SMALL, precision="bf16", seed=7)
    other.load_state({name: tensor.clone() for name, tensor in step.state().items()}, 1)
    assert float(run_step(step, 1, loader).loss) == float(run_step(other, 1, loader).loss)
    loader.close()


def test_small_updates_are_not_lost_in_the_copies_rounding():
    """A thousand updates of a millionth each, which pure bf16 would round away at 1."""
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


def test_gradients_added_in_place_have_the_same_bits():
    grads = []
    for in_place in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        cast = Cast(module, torch.bfloat16, in_place)
        for _ in range(3):  # micro-batches
            cast(torch.randn(4, 5, dtype=torch.bfloat16)).square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    assert all(map(torch.equal, *grads)) and grads[1][0].dtype == torch.float32


def test_frozen_parameters_have_no_gradient():
    module = nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    Cast(module, torch.bfloat16)(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert (
        module.weight.grad is None
        and module.bias.grad is not None
        and module.bias.grad.dtype == torch.float32
    )
