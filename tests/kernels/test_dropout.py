"""Dropout on the CPU: what is kept, how often, divided by what, and the same in the backward
pass."""

from __future__ import annotations

import pytest
import torch

from kernels.dropout import Dropout, dropout_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_numbers_are_dropped_or_divided_by_what_is_kept(dtype, p):
    torch.manual_seed(0)
    x = torch.randn(37, 1001).to(dtype)  # no multiple of four
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, 1e4])
    y = Dropout(p)(x)
    kept = y != 0
    torch.testing.assert_close(
        y[kept], (x * (1 / (1 - p)))[kept], rtol=1e-2 if dtype.itemsize == 2 else 1e-4, atol=0
    )
    share = kept[x != 0].double().mean().item()
    # four standard deviations
    assert share == pytest.approx(1 - p, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)
    assert y.dtype == dtype and not torch.isnan(y).any()


def test_each_place_is_drawn_by_itself():
    """Neighbours share a draw of 64 bits, and nothing else: no place is likelier, none follows
    another."""
    torch.manual_seed(1)
    kept = (Dropout(0.3)(torch.ones(20_000, 8)) != 0).double()
    assert (kept.mean(0) - 0.7).abs().max() < 0.02
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 0.03


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 5, 7)])
def test_gradients_follow_what_was_kept(shape):
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.4)(x)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    torch.testing.assert_close(grad, torch.where(y != 0, 2 * y / x, 0.0))


def test_seeds_and_strides():
    x = torch.randn(6, 40)
    torch.manual_seed(3)
    first = Dropout(0.5)(x)
    torch.manual_seed(3)
    assert torch.equal(first, Dropout(0.5)(x.t().contiguous().t()))
    assert not torch.equal(first, Dropout(0.5)(x))


def test_nothing_is_drawn_where_nothing_is_dropped():
    x, state = torch.randn(5, 5), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_compiled_and_reference_are_pytorchs():
    x = torch.ones(100, 100)
    for drop in (
        torch.compile(Dropout(0.25), backend="eager"),
        lambda x: dropout_reference(x, 0.25),
    ):
        y = drop(x)
        assert (
            y.unique().tolist() == pytest.approx([0, 4 / 3])
            and 0.7 < (y != 0).double().mean() < 0.8
        )
