"""The kernel against PyTorch's cross-entropy in float64, values and gradients, at awkward
shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._triton import INTERPRETED, no_triton_reason
from kernels.cross_entropy import (
    IGNORE,
    cross_entropy,
    cross_entropy_in_place,
    cross_entropy_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The exponent x log2(e) of a term e^-x is off by up to 6e-8 x, and x stays under 30 where the term
# counts; sums and the logarithm add less: 1e-5 of the gradient's largest value, and of losses that
# are not below 1.
FP32 = 1e-5
# The gradient is rounded once as it is stored; the interpreter cuts where a GPU rounds to nearest.
ROUNDED = {
    torch.float32: FP32,
    torch.float16: 2**-10 + FP32,
    torch.bfloat16: (2**-8 if INTERPRETED else 2**-9) + FP32,
}

pytestmark = pytest.mark.skipif(no_triton_reason(DEVICE) is not None, reason="needs Triton")


def inputs(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows + width)
    logits = (3 * torch.randn(rows, width, device=DEVICE)).to(dtype)
    return logits.requires_grad_(), torch.randint(vocab, (rows,), device=DEVICE)


def exact(logits: Tensor, targets: Tensor, vocab: int, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the logits' gradient for the incoming `grad`, in float64."""
    logits64 = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(logits64[:, :vocab], targets, ignore_index=IGNORE, reduction="none")
    return losses.detach(), torch.autograd.grad(losses, logits64, grad.double())[0]


def check(logits: Tensor, targets: Tensor, vocab: int, grad: Tensor | None = None) -> None:
    grad = torch.ones(len(targets), device=DEVICE) if grad is None else grad
    losses = cross_entropy(logits, targets, vocab)
    gradient = torch.autograd.grad(losses, logits, grad)[0]
    losses64, gradient64 = exact(logits, targets, vocab, grad)
    assert losses.dtype == torch.float32 and gradient.dtype == logits.dtype
    assert ((losses - losses64).abs() <= FP32 * losses64.abs().clamp(min=1)).all()
    assert (gradient - gradient64).abs().max() <= ROUNDED[logits.dtype] * gradient64.abs().max()
    assert not gradient[:, vocab:].any()  # exactly zero: the padding must never move


SHAPES = [
    (1, 384, 331),
    (5, 48, 48),
    (31, 64, 37),
    (2, 2500, 2100),  # a whole block of columns, then masked ones, the last of only padding
    (3, 50304, 50257),
    (2, 50257, 50257),
    (2, 8193, 8192),
    (3, 1, 1),
]


@pytest.mark.parametrize(("rows", "width", "vocab"), SHAPES)
def test_agrees_with_float64(rows, width, vocab):
    check(*inputs(rows, width, vocab), vocab)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(31, 384, 331), (2, 50304, 50257)])
def test_half_precision_has_fp32_statistics(rows, width, vocab, dtype):
    check(*inputs(rows, width, vocab, dtype), vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(1, 48, 37), (33, 384, 331), (2, 50304, 50257)]
)
def test_in_place_gives_the_same(rows, width, vocab, dtype):
    logits, targets = inputs(rows, width, vocab, dtype)
    targets[1::3] = IGNORE
    losses = cross_entropy(logits, targets, vocab)
    expected = torch.autograd.grad(losses.sum(), logits)[0]
    own = logits.detach().clone()
    torch.testing.assert_close(
        cross_entropy_in_place(own, targets, vocab), losses.detach(), rtol=FP32, atol=FP32
    )
    assert (own - expected).abs().max() <= ROUNDED[dtype]
    assert not own[1::3].any() and not own[:, vocab:].any()


def test_in_place_within_wider_rows():
    logits, targets = inputs(5, 384, 331)
    whole = torch.full((5, 400), 7.0, device=DEVICE)
    whole[:, :384] = logits.detach()
    losses = cross_entropy_in_place(whole[:, :384], targets, 331)
    losses64, gradient64 = exact(logits, targets, 331, torch.ones(5, device=DEVICE))
    assert (losses - losses64).abs().max() <= FP32 * losses64.abs().max()
    assert (whole[:, :384] - gradient64).abs().max() <= FP32 and (whole[:, 384:] == 7).all()


def test_reference_agrees_with_float64():
    logits, targets = inputs(31, 384, 331)
    targets[::3] = IGNORE
    losses64, _ = exact(logits, targets, 331, torch.ones(31, device=DEVICE))
    torch.testing.assert_close(
        cross_entropy_reference(logits, targets, 331).double(), losses64, rtol=FP32, atol=FP32
    )


def test_values_in_the_padding_take_no_part():
    logits, targets = inputs(4, 384, 331)
    clean = cross_entropy(logits, targets, 331)
    dirty = logits.detach().clone()
    dirty[:, 331:] = torch.tensor([torch.nan, torch.inf, 1e30, -torch.inf], device=DEVICE)[:, None]
    dirty.requires_grad_()
    losses = cross_entropy(dirty, targets, 331)
    assert torch.equal(losses, clean)
    assert torch.equal(
        torch.autograd.grad(losses.sum(), dirty)[0], torch.autograd.grad(clean.sum(), logits)[0]
    )


@pytest.mark.parametrize("ignored", [slice(None), slice(None, None, 2)], ids=["all", "some"])
def test_ignored_targets(ignored):
    logits, targets = inputs(9, 384, 331)
    targets[ignored] = IGNORE
    check(logits, targets, 331)
    with torch.no_grad():
        logits[ignored] = torch.nan  # an ignored row is not even read
    losses = cross_entropy(logits, targets, 331)
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    assert not losses[ignored].any() and not gradient[ignored].any() and gradient.isfinite().all()


def test_huge_logits():
    logits, targets = inputs(17, 384, 331)
    with torch.no_grad():
        logits.mul_(1e4)
        # ties at the top: as close to even as probabilities get
        logits[::2, 5] = logits[::2].amax(1)
    check(logits, targets, 331)


def test_impossible_tokens():
    """-inf, in a whole first block too, is a probability of 0 and not NaN."""
    logits, targets = inputs(2, 8300, 8300)
    with torch.no_grad():
        logits[:, :8192] = -torch.inf
    targets.copy_(torch.tensor([8195, 8299]))
    check(logits, targets, 8300)


@pytest.mark.parametrize("target", [-1, 331, 383, 10**6])
def test_target_outside_the_vocabulary_is_not_a_number(target):
    logits, targets = inputs(3, 384, 331)
    targets[1] = target
    assert cross_entropy(logits, targets, 331).isnan().tolist() == [False, True, False]
    own = logits.detach().clone()
    assert cross_entropy_in_place(own, targets, 331).isnan().tolist() == [False, True, False]
    _, gradient64 = exact(logits[::2], targets[::2], 331, torch.ones(2, device=DEVICE))
    # nothing is written beside the row
    assert (own[::2] - gradient64).abs().max() <= FP32 and not own[:, 331:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_target_beside_the_end_of_the_whole_blocks(dtype):
    logits, _ = inputs(5, 2500, 2100, dtype)
    targets = torch.tensor([0, 2047, 2048, 2099, IGNORE], device=DEVICE)
    check(logits, targets, 2100)
    _, gradient64 = exact(logits, targets, 2100, torch.ones(5, device=DEVICE))
    own = logits.detach().clone()
    cross_entropy_in_place(own, targets, 2100)
    assert (own - gradient64).abs().max() <= ROUNDED[dtype] * gradient64.abs().max()


def test_incoming_gradient():
    logits, targets = inputs(9, 384, 331)
    check(
        logits,
        targets,
        331,
        torch.tensor([0.0, -2.0, 1 / 3, 1e-6, 1.0, -1e3, 0.0, 1.0, 5.0], device=DEVICE),
    )
    zero = torch.autograd.grad(
        cross_entropy(logits, targets, 331), logits, torch.zeros(9, device=DEVICE)
    )[0]
    assert not zero.any()
    check(logits, targets, 331, torch.full((1,), -0.5, device=DEVICE).expand(9))


def test_logits_have_another_use():
    """A z-loss on the same logits, and the loss twice: what the user holds is never overwritten."""
    logits, targets = inputs(5, 384, 331)
    before = logits.detach().clone()
    losses = cross_entropy(logits, targets, 331) + cross_entropy(logits, targets.roll(1), 331)
    (losses.sum() + logits.square().sum()).backward()
    ones = torch.ones(5, device=DEVICE)
    expected = (
        sum(exact(logits, t, 331, ones)[1] for t in (targets, targets.roll(1)))
        + 2 * before.double()
    )
    assert torch.equal(logits, before) and logits.grad is not None
    assert (logits.grad - expected).abs().max() <= FP32 * expected.abs().max()


def test_without_rows():
    logits, targets = inputs(0, 384, 331)
    losses = cross_entropy(logits, targets, 331)
    assert losses.shape == (0,) and torch.autograd.grad(losses.sum(), logits)[0].shape == (0, 384)


def test_behind_a_product_under_autocast():
    torch.manual_seed(0)
    x, weight = (
        torch.randn(9, 16, device=DEVICE),
        torch.randn(384, 16, device=DEVICE, requires_grad=True),
    )
    targets = torch.randint(331, (9,), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = F.linear(x, weight)
        losses = cross_entropy(logits, targets, 331)
        gradient = torch.autograd.grad(losses.sum(), (logits, weight))
    assert logits.dtype == torch.bfloat16 and losses.dtype == torch.float32
    losses64, logits64 = exact(logits, targets, 331, torch.ones(9, device=DEVICE))
    assert (losses - losses64).abs().max() <= FP32 * losses64.abs().max()
    assert (gradient[0] - logits64).abs().max() <= ROUNDED[torch.bfloat16] * logits64.abs().max()
    assert gradient[1].dtype == torch.float32


def test_operators_keep_their_contracts():
    logits, targets = inputs(3, 48, 37)
    torch.library.opcheck(torch.ops.gpt2.cross_entropy.default, (logits, targets, 37))
    torch.library.opcheck(
        torch.ops.gpt2.cross_entropy.default, (logits.detach()[:, ::2], targets % 19, 19)
    )
    grad, ones = torch.randn(3, device=DEVICE), torch.ones(3, device=DEVICE)
    backward = torch.ops.gpt2.cross_entropy_backward.default
    torch.library.opcheck(backward, (grad, logits.detach(), targets, ones, ones, 37))


@pytest.mark.gpu
def test_more_logits_than_an_int32_counts():
    rows, width, vocab = 49152, 50304, 50257
    torch.manual_seed(0)
    logits = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocab, (rows,), device="cuda")
    losses = cross_entropy(logits, targets, vocab)
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    # 2^31 lies in row 42,690
    some = torch.tensor([0, 1, 42690, 42691, rows - 2, rows - 1], device="cuda")
    losses64, gradient64 = exact(
        logits[some], targets[some], vocab, torch.ones(len(some), device="cuda")
    )
    assert (losses[some] - losses64).abs().max() <= FP32 * losses64.abs().max()
    assert (gradient[some] - gradient64).abs().max() <= ROUNDED[
        torch.bfloat16
    ] * gradient64.abs().max()
    own = logits.detach()
    torch.testing.assert_close(
        cross_entropy_in_place(own, targets, vocab), losses.detach(), rtol=FP32, atol=FP32
    )
    assert (own[some] - gradient64).abs().max() <= ROUNDED[torch.bfloat16] * gradient64.abs().max()


@pytest.mark.gpu
def test_never_waits_for_the_gpu():
    logits, targets = inputs(64, 50304, 50257, torch.bfloat16)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(logits, targets, 50257).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
