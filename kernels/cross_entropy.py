"""Cross-entropy of logits that lie in memory: the loss of each row, and the gradient, with one
program a row.

PyTorch's own operations move 36 bytes an element of bf16 logits: to fp32 (6), log-softmax (8), the
loss's gradient (4), log-softmax's (12), back to bf16 (6). Here:

  cross_entropy           forward reads the logits once (2); backward reads them again and writes the gradient (2 + 2)
  cross_entropy_in_place  one launch for both: reads the row twice and writes its gradient over it (2 + 2 + 2)

In place, the second reading comes from a cache and not from memory: 132 multiprocessors with two
rows each hold 26 MB of GPT-2's 100 KB rows, the L2 of an H100 or H200 is 50 MB, and the second loop
begins where the first ended. So 4 of the 6 bytes reach memory. The trade-off: a program holds no
row whole, because one of 50,304 columns would take all registers of a multiprocessor and leave
nothing to load while it computes.

All arithmetic is fp32, whatever the logits' dtype. Online softmax: Milakov and Gimelshein 2018.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._triton import device_of, jit, tl, triton

IGNORE = -100  # the target that has no loss


def cross_entropy_reference(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """-log p(target) of logits (N, V') with V' >= vocab_size, targets (N,) int64: (N,) fp32, 0
    where it is -100."""
    return F.cross_entropy(
        logits[:, :vocab_size].float(), targets, ignore_index=IGNORE, reduction="none"
    )


@jit
def _load(row, columns, width, vocab_size):
    # Masked by the row's width, a multiple of 16 where the vocabulary is padded: a mask that ends
    # at column 50,257 would split the loads of 16 bytes into single elements.
    x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < vocab_size, x, float("-inf"))


@jit
def _scan(row, width, vocab_size, BLOCK: tl.constexpr):
    """A row's largest logit, and the sum of exp(logit - largest)."""
    lanes = tl.arange(0, BLOCK)
    # finite: a block of nothing but -inf must not give inf - inf
    largest = tl.full((), -3.0e38, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)  # a sum for each lane: reduced once, after the loop
    for start in range(0, vocab_size, BLOCK):
        x = _load(row, start + lanes, width, vocab_size)
        new = tl.maximum(largest, tl.max(x, 0))
        sums = sums * tl.exp(largest - new) + tl.exp(x - new)
        largest = new
    return largest, tl.sum(sums, 0)


@jit
def _write_gradient(
    row, gradient, target, largest, total, scale, width, vocab_size, BLOCK: tl.constexpr
):
    """scale x (softmax - one_hot(target)) of one row; `gradient` may be the row itself."""
    lanes = tl.arange(0, BLOCK)
    target = target.to(tl.int32)
    inverse = 1.0 / total
    last = (width - 1) // BLOCK * BLOCK
    # from the end: the block read last is the one nearest in the caches
    for back in range(0, width, BLOCK):
        columns = last - back + lanes
        p = tl.exp(_load(row, columns, width, vocab_size) - largest) * inverse
        value = tl.where(columns == target, p - 1.0, p) * scale
        tl.store(gradient + columns, value.to(gradient.dtype.element_ty), mask=columns < width)


@jit
def _write_zeros(gradient, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
        tl.store(gradient + start + lanes, zeros, mask=start + lanes < width)


@jit
def _forward_kernel(
    logits, row_stride, targets, losses, largests, totals, width, vocab_size,
    IN_PLACE: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    # 49,152 rows of 50,304 are more than an int32 counts
    row = logits + index.to(tl.int64) * row_stride
    target = tl.load(targets + index)
    if target == IGNORE:
        tl.store(losses + index, 0.0)
        if IN_PLACE:
            _write_zeros(row, width, BLOCK)
    else:
        # Before the scan, whose barriers part this load from the gradient that is written over it.
        known = (target >= 0) & (target < vocab_size)
        at_target = tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)
        largest, total = _scan(row, width, vocab_size, BLOCK)
        tl.store(losses + index, tl.log(total) - (at_target - largest))
        if IN_PLACE:
            _write_gradient(row, row, target, largest, total, 1.0, width, vocab_size, BLOCK)
        else:
            tl.store(largests + index, largest)
            tl.store(totals + index, total)


@jit
def _backward_kernel(
    grad_losses, logits, row_stride, targets, largests, totals, gradients, width, vocab_size,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    gradient = gradients + index.to(tl.int64) * width
    target = tl.load(targets + index)
    if target == IGNORE:
        _write_zeros(gradient, width, BLOCK)
    else:
        largest, total = tl.load(largests + index), tl.load(totals + index)
        scale = tl.load(grad_losses + index)
        _write_gradient(row, gradient, target, largest, total, scale, width, vocab_size, BLOCK)


def _launch(width: int) -> dict[str, int]:
    """Sixteen elements a thread, so two loads of 16 bytes in bf16, and for long rows 512 threads.

    Compiled for an H200 it takes 64 registers a thread, so two programs fit a multiprocessor: they
    keep 32 KB of loads in flight, where 4.8 TB/s at 700 ns of latency asks for 25 KB. Four smaller
    ones would have more rows on the way than the L2 holds.
    """
    block = min(8192, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@torch.library.custom_op("gpt2::cross_entropy", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and for the backward pass each row's largest logit and sum of exponentials: (N,) fp32
    each."""
    rows, width = logits.shape
    logits, targets = _rows(logits), targets.contiguous()
    # The logarithm of Z alone would do, but at logits of 1e4 its rounding is 5e-4 of every
    # probability.
    losses, largests, totals = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    with device_of(logits):
        _forward_kernel[(rows,)](
            logits, logits.stride(0), targets, losses, largests, totals, width, vocab_size,
            IN_PLACE=False, IGNORE=IGNORE, **_launch(width),
        )  # fmt: skip
    return losses, largests, totals


@_forward.register_fake
def _(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    losses, largests, totals = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    return losses, largests, totals


@torch.library.custom_op("gpt2::cross_entropy_backward", mutates_args=())
def _backward(
    grad_losses: Tensor,
    logits: Tensor,
    targets: Tensor,
    largests: Tensor,
    totals: Tensor,
    vocab_size: int,
) -> Tensor:
    """Gradient of the logits (N, V'), in their dtype and contiguous."""
    rows, width = logits.shape
    gradients = logits.new_empty(rows, width)
    logits, targets, grad_losses = _rows(logits), targets.contiguous(), grad_losses.contiguous()
    with device_of(logits):
        _backward_kernel[(rows,)](
            grad_losses,
            logits,
            logits.stride(0),
            targets,
            largests,
            totals,
            gradients,
            width,
            vocab_size,
            IGNORE=IGNORE,
            **_launch(width),
        )
    return gradients


@_backward.register_fake
def _(
    grad_losses: Tensor,
    logits: Tensor,
    targets: Tensor,
    largests: Tensor,
    totals: Tensor,
    vocab_size: int,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, targets, ctx.vocab_size = inputs
    _, largests, totals = output
    ctx.mark_non_differentiable(largests, totals)
    ctx.save_for_backward(logits, targets, largests, totals)


def _differentiate(ctx: Any, grad_losses: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    return _backward(grad_losses, *ctx.saved_tensors, ctx.vocab_size), None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """As `cross_entropy_reference`, in Triton: logits (N, V') fp32, bf16 or fp16, (N,) fp32 out.

    Columns at and past vocab_size are padding: their values take no part and their gradient is 0. A
    target that is neither in the vocabulary nor -100 gives NaN (the reference stops the process on
    a GPU).
    """
    return _forward(logits, targets, vocab_size)[0]


def cross_entropy_in_place(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The same losses (N,); overwrites logits (N, V'), whose rows must be contiguous, with their
    sum's gradient.

    For use inside an operation that owns the logits: autograd sees nothing of it.
    """
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    with device_of(logits):
        _forward_kernel[(rows,)](
            logits,
            logits.stride(0),
            targets.contiguous(),
            losses,
            losses,
            losses,
            width,
            vocab_size,
            IN_PLACE=True,
            IGNORE=IGNORE,
            **_launch(width),
        )
    return losses
