"""Each operation against its reference in float64, values and gradients, at awkward shapes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

import kernels.linear_cross_entropy as lce
from kernels.linear_cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference

# fp32 sums of up to a few thousand terms, whose rounding errors (6e-8 each) mostly cancel: 1e-5 of the largest value.
FP32 = 1e-5
# bf16 keeps 8 bits (2^-9 relative when rounded): the logits are rounded once as they leave the product, their gradient
# once before the next two, and dx once more, each on top of inputs that are rounded alike on both sides.
BF16 = 4 * 2**-9


def inputs(rows: int, width: int, vocab: int, padded: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + padded)
    x = torch.randn(rows, width) * scale
    weight = torch.randn(padded, width) / width**0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (rows,))


def check(x: Tensor, weight: Tensor, targets: Tensor, vocab: int, tolerance: float = FP32, times: float = 1.0) -> None:
    """The sum and both gradients agree with float64's to `tolerance` of their own largest value."""
    (linear_cross_entropy(x, weight, targets, vocab) * times).backward()
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    # The reference's own .float() would round: its two lines in float64.
    logits = (x64 @ weight64.t())[:, :vocab]
    (torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") * times).backward()
    ours = linear_cross_entropy(x.detach(), weight.detach(), targets, vocab)
    rows = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert (ours - rows.sum()).abs() <= tolerance * rows.abs().sum() + 1e-30
    for ours, exact in ((x.grad, x64.grad), (weight.grad, weight64.grad)):
        assert ours is not None and exact is not None and ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


SHAPES = [(1, 48, 331, 384), (3, 48, 331, 331), (1023, 48, 331, 384), (3, 16, 50257, 50304), (257, 8, 50257, 50257)]


@pytest.mark.parametrize(("rows", "width", "vocab", "padded"), SHAPES)
def test_agrees_with_float64(rows, width, vocab, padded):
    x, weight, targets = inputs(rows, width, vocab, padded)
    check(x, weight, targets, vocab)
    assert weight.grad is not None
    assert not weight.grad[vocab:].any()  # exactly zero: the padding must never move


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reference_agrees_with_float64(reduction):
    x, weight, targets = inputs(31, 16, 331, 384)
    targets[::3] = IGNORE
    exact = torch.nn.functional.cross_entropy(
        (x.double() @ weight.double().t())[:, :331], targets, ignore_index=IGNORE, reduction=reduction
    )
    torch.testing.assert_close(linear_cross_entropy_reference(x, weight, targets, 331, reduction).double(), exact)


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 1000])
def test_any_number_of_chunks(monkeypatch, chunk_rows):
    x, weight, targets = inputs(33, 24, 331, 384)
    targets[5:16] = IGNORE  # whole chunks without a target
    monkeypatch.setattr(lce, "CHUNK_BYTES", 4 * 384 * chunk_rows)
    check(x, weight, targets, 331)


def test_some_targets_ignored():
    x, weight, targets = inputs(65, 24, 331, 384)
    targets[::2] = IGNORE
    check(x, weight, targets, 331)
    assert x.grad is not None and not x.grad[::2].any()


def test_all_targets_ignored():
    x, weight, targets = inputs(5, 24, 331, 384)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE), 331)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and not dx.any() and not dweight.any()


def test_huge_logits():
    x, weight, targets = inputs(17, 24, 331, 384, scale=1e4)
    assert (x @ weight.t()).abs().max() > 1e4
    # The logits' own rounding, 1e4 x 6e-8 each, moves the softmax between near ties.
    check(x, weight, targets, 331, tolerance=1e-2)


@pytest.mark.parametrize("times", [0.0, 1 / 3, -2.0, 1e-6])
def test_incoming_gradient(times):
    check(*inputs(9, 24, 331, 384), 331, times=times)


def test_backward_twice():
    x, weight, targets = inputs(9, 24, 331, 384)
    loss = linear_cross_entropy(x, weight, targets, 331)
    first = torch.autograd.grad(loss * 2.0, (x, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 2.0, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_inputs_that_are_not_contiguous():
    x, weight, targets = inputs(20, 24, 331, 384)
    loss = linear_cross_entropy(x[::2], weight, targets[::2], 331)
    grad = torch.autograd.grad(loss, x)[0]
    apart = x[::2].detach().contiguous().requires_grad_()
    torch.testing.assert_close(
        grad[::2], torch.autograd.grad(linear_cross_entropy(apart, weight, targets[::2], 331), apart)[0]
    )
    columns = torch.randn(24, 20).t().requires_grad_()  # transposed: a leaf with strides (1, 20)
    check(columns, weight.detach().t().contiguous().t().requires_grad_(), targets, 331)
    row = torch.randn(1, 24).requires_grad_()
    check_expanded = torch.autograd.grad(linear_cross_entropy(row.expand(20, 24), weight, targets, 331), row)[0]
    repeated = torch.autograd.grad(linear_cross_entropy(row.repeat(20, 1), weight, targets, 331), row)[0]
    torch.testing.assert_close(check_expanded, repeated)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_input_frozen(frozen):
    x, weight, targets = inputs(9, 24, 331, 384)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 331), (x, weight))
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    live, expected = (weight, both[1]) if frozen == "x" else (x, both[0])
    loss = linear_cross_entropy(x, weight, targets, 331)
    saved = loss.grad_fn.saved_tensors  # ty: ignore[missing-attribute]
    assert sum(t is not None for t in saved) == 1  # no work for what is frozen
    assert torch.equal(torch.autograd.grad(loss, live)[0], expected)


def test_no_grad_keeps_no_graph():
    x, weight, targets = inputs(9, 24, 331, 384)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, 331)
    assert not loss.requires_grad
    assert torch.equal(loss, linear_cross_entropy(x, weight, targets, 331))


@pytest.mark.parametrize("rows", [1, 1023])
def test_bf16_under_autocast(rows):
    x, weight, targets = inputs(rows, 48, 331, 384)
    targets[1::5] = IGNORE
    with torch.no_grad():  # both sides begin with the inputs that autocast's products see
        x.copy_(x.bfloat16())
        weight.copy_(weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        check(x, weight, targets, 331, tolerance=BF16)


def test_bf16_hidden_states_and_fp32_head():
    """What the model hands over under autocast when its last operation ran in bf16."""
    x, weight, targets = inputs(33, 48, 331, 384)
    x = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        dx, dweight = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 331), (x, weight))
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs C++")
def test_compiles_without_a_break():
    x, weight, targets = inputs(9, 16, 331, 384)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    ours = torch.autograd.grad(compiled(x, weight, targets, 331) * 3.0, (x, weight))
    eager = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 331) * 3.0, (x, weight))
    torch.testing.assert_close(ours, eager)
