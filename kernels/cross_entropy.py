"""Cross-entropy of logits in memory: the loss of each row and its gradient, with one program per
row.

PyTorch's own operations move 36 bytes per element of bf16 logits: conversion to fp32 (6),
log-softmax (8), the loss's gradient (4), log-softmax's gradient (12) and conversion back to bf16
(6). Here:

  cross_entropy           forward reads the logits (2); backward reads them again and writes the
                          gradient (2 + 2)
  cross_entropy_in_place  one launch for both: reads a row twice and overwrites it with its
                          gradient (2 + 2 + 2)

In place, the second read is served by the L2 cache and not by memory. 132 multiprocessors with two
rows each work on 26 MB of GPT-2's 100 KB rows, the L2 of an H100 or H200 is 50 MB, and the second
loop starts where the first ended. Only 4 of the 6 bytes reach memory. The trade-off: no program
keeps a whole row in registers. A row of 50,304 columns would take all registers of a
multiprocessor, and nothing could be loaded during the computation.

All arithmetic is fp32, whatever the logits' dtype. The softmax is computed online (Milakov and
Gimelshein 2018).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig
from kernels._kernel import Example, Kernel
from kernels._triton import device_of, jit, tl, triton

LOG2_E: Any = 1.4426950408889634 if triton is None else tl.constexpr(1.4426950408889634)
IGNORE = -100  # a row with this target has no loss


def cross_entropy_reference(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """-log p(target), (N,) fp32, of logits (N, V') with V' >= vocab_size and targets (N,) int64. It
    is 0 where the target is -100."""
    return F.cross_entropy(
        logits[:, :vocab_size].float(), targets, ignore_index=IGNORE, reduction="none"
    )


@jit
def _load(row, columns, width, vocab_size):
    # The mask ends at the row's width, a multiple of 16 for a padded vocabulary. A mask that ends
    # at column 50,257 would split the 16-byte loads into single elements.
    x = tl.load(row + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(columns < vocab_size, x, float("-inf"))


@jit
def _load_target(row, target, vocab_size):
    known = (target >= 0) & (target < vocab_size)
    return tl.load(row + target, mask=known, other=float("nan")).to(tl.float32)


@jit
def _exp(x):
    # tl.exp spends three more instructions on results below 2^-126, which are 0 here. Folding the
    # product into the subtraction of the largest logit would save one, but ties would not give 1.
    return tl.exp2(x * LOG2_E)


@jit
def _add_block(x, largest, sums, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Add a block of logits to each thread's largest logit and sum of exponentials.

    A thread loads VECTOR neighbours at a time, so the reductions below stay within a thread.
    """
    x = tl.reshape(x, (x.numel // (THREADS * VECTOR), THREADS, VECTOR))
    new = tl.maximum(largest, tl.max(tl.max(x, 2), 0))
    e = _exp(x - new[None, :, None])
    return new, sums * _exp(largest - new) + tl.sum(tl.sum(e, 2), 0)


@jit
def _scan(row, width, vocab_size, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    """A row's largest logit, and the sum of exp(logit - largest)."""
    VECTOR: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth  # 16 bytes
    # Only the end of a row is masked, in shorter blocks: 50,304 columns are 3.07 whole blocks.
    TAIL: tl.constexpr = 4 * THREADS
    # Every thread has its own, and they are reduced once, after the loops. The first maximum is
    # finite, so that a block of only -inf does not give inf - inf.
    largest = tl.full((THREADS,), -2.0e38, tl.float32)
    sums = tl.zeros((THREADS,), tl.float32)
    whole = vocab_size // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        x = tl.load(row + start + tl.arange(0, BLOCK)).to(tl.float32)
        largest, sums = _add_block(x, largest, sums, THREADS, VECTOR)
    for start in range(whole, vocab_size, TAIL):
        x = _load(row, start + tl.arange(0, TAIL), width, vocab_size)
        largest, sums = _add_block(x, largest, sums, THREADS, 4)
    top = tl.max(largest, 0)
    return top, tl.sum(sums * _exp(largest - top), 0)


@jit
def _write_gradient(
    row, gradient, target, at_target, largest, total, scale, width, vocab_size,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """scale x (softmax - one_hot(target)) of one row; `gradient` may be the row itself."""
    TAIL: tl.constexpr = 4 * THREADS
    dtype = gradient.dtype.element_ty
    factor = scale / total
    whole = vocab_size // BLOCK * BLOCK
    # from the end, because the block read last is most likely still cached
    for start in range(whole, width, TAIL):
        columns = start + tl.arange(0, TAIL)
        value = _exp(_load(row, columns, width, vocab_size) - largest) * factor
        tl.store(gradient + columns, value.to(dtype), mask=columns < width)
    for back in range(BLOCK, whole + BLOCK, BLOCK):
        columns = whole - back + tl.arange(0, BLOCK)
        value = _exp(tl.load(row + columns).to(tl.float32) - largest) * factor
        tl.store(gradient + columns, value.to(dtype))
    # One store afterwards costs less than a comparison per element. The barrier keeps it behind
    # the store above, which another thread may have done.
    tl.debug_barrier()
    value = _exp(at_target - largest) * factor - scale
    tl.store(gradient + target, value.to(dtype), mask=(target >= 0) & (target < vocab_size))


@jit
def _write_zeros(gradient, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        zeros = tl.zeros((BLOCK,), gradient.dtype.element_ty)
        tl.store(gradient + start + lanes, zeros, mask=start + lanes < width)


@jit
def _forward_kernel(
    logits, row_stride, targets, losses, largests, totals, width, vocab_size,
    IN_PLACE: tl.constexpr, IGNORE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    # int64: 49,152 rows of 50,304 columns overflow an int32
    row = logits + index.to(tl.int64) * row_stride
    target = tl.load(targets + index)
    if target == IGNORE:
        tl.store(losses + index, 0.0)
        if IN_PLACE:
            _write_zeros(row, width, BLOCK)
    else:
        # Load before the scan: its barriers order this load before the gradient's store.
        at_target = _load_target(row, target, vocab_size)
        largest, total = _scan(row, width, vocab_size, BLOCK, THREADS)
        tl.store(losses + index, tl.log(total) - (at_target - largest))
        if IN_PLACE:
            _write_gradient(
                row, row, target, at_target, largest, total, 1.0, width, vocab_size, BLOCK, THREADS
            )
        else:
            tl.store(largests + index, largest)
            tl.store(totals + index, total)


@jit
def _backward_kernel(
    grad_losses, logits, row_stride, targets, largests, totals, gradients, width, vocab_size,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
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
        at_target = _load_target(row, target, vocab_size)
        _write_gradient(
            row,
            gradient,
            target,
            at_target,
            largest,
            total,
            scale,
            width,
            vocab_size,
            BLOCK,
            THREADS,
        )


def _launch(logits: Tensor) -> dict[str, int]:
    """The block size and threads for these rows: 32 elements per thread (four 16-byte loads in
    bf16), and 512 threads for long rows.

    In place, compiled for an H200, this takes 46 to 64 registers per thread, so two programs fit
    a multiprocessor. They keep 64 KB of loads in flight; 4.8 TB/s at 700 ns of latency needs 25 KB.
    With few elements per thread more programs would fit, and their rows would not fit the L2.
    """
    whole = 1 << logits.shape[1].bit_length() - 1  # the largest power of 2 within a row
    threads = min(512, max(32, whole // 32))
    return {"BLOCK": 32 * threads, "THREADS": threads, "num_warps": threads // 32}


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@torch.library.custom_op("gpt2::cross_entropy", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and each row's largest logit and sum of exponentials for the backward pass: (N,) fp32
    each."""
    rows, width = logits.shape
    logits, targets = _rows(logits), targets.contiguous()
    # Storing log Z alone would suffice, but with logits of 1e4 its rounding changes every
    # probability by 5e-4 of itself.
    losses, largests, totals = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    with device_of(logits):
        _forward_kernel[(rows,)](
            logits, logits.stride(0), targets, losses, largests, totals, width, vocab_size,
            IN_PLACE=False, IGNORE=IGNORE, **_launch(logits),
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
            **_launch(logits),
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
    """`cross_entropy_reference` in Triton: losses (N,) fp32 of logits (N, V') in fp32, bf16 or
    fp16.

    Columns from vocab_size on are padding: they do not affect the loss, and their gradient is 0. A
    target that is neither in the vocabulary nor -100 gives NaN (on a GPU, the reference stops the
    process).
    """
    return _forward(logits, targets, vocab_size)[0]


def cross_entropy_in_place(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The losses (N,) of `cross_entropy`. It overwrites the logits (N, V') with the gradient of the
    losses' sum. The rows must be contiguous.

    Autograd does not see this, so only an operation that owns the logits may call it.
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
            **_launch(logits),
        )
    return losses


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    """Reads the logits once and writes their gradient once, which is enough where the gradient of
    the losses is known."""
    logits = torch.randn(rows, config.padded_vocab_size, **place)
    targets = torch.arange(rows, device=logits.device) * 5 % config.vocab_size
    reference, kernel = (
        functools.partial(function, targets=targets, vocab_size=config.vocab_size)
        for function in (cross_entropy_reference, cross_entropy)
    )
    return Example((logits,), reference, kernel, moved=2.0 * logits.nbytes)


KERNEL = Kernel("loss and its gradient in one pass", _example)
