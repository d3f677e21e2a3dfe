"""The output head fused with its cross-entropy: it computes the logits of one chunk of rows at a
time and never holds all of them.

With GPT-2's vocabulary the logits are the largest tensor of a training step (4 x 512 tokens: 412 MB
in fp32, and as much again for their gradient). Here the gradient overwrites each chunk's logits, so
the forward pass already computes the gradients of the hidden states and of the head. The backward
pass only scales them by the incoming gradient. The trade-off: a forward pass without a backward
pass must run under no_grad, or it computes gradients that nobody uses.

In Triton the logits of a chunk cross the memory bus five times: the head's product writes them,
`cross_entropy_in_place` reads and overwrites them, and the two products of the gradients read them.
At width 768 those products are 4,608 operations per element for 10 bytes in bf16, so they, and not
memory, set the time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_in_place

# Bytes of logits held at once on a CPU. Every chunk reads and writes the head's whole gradient.
CHUNK_BYTES = 256 << 20
GPU_CHUNK_BYTES = 1 << 30  # fewer launches, and large enough to fill the device
# fp32 bytes of a chunk that a CPU turns into gradients at a time, so that they stay in the caches
PIECE_BYTES = 16 << 20
TILE = 128  # rows of a tile in a GPU's products


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str = "sum"
) -> Tensor:
    """-log p(target) from hidden states x (N, C), head weight (V', C) with V' >= vocab_size, and
    targets (N,) int64.

    Columns from vocab_size on are padding and do not count. Targets of -100 give 0. Returns fp32:
    (N,) for reduction "none", a scalar for "sum".
    """
    logits = F.linear(x, weight.to(x.dtype))[:, :vocab_size].float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def loss_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, grad: bool) -> Tensor:
    """The sum of -log p(target), fp32 (). With `grad`, the gradient overwrites the logits (rows,
    V')."""
    logits[:, vocab_size:] = -torch.inf
    live = (targets != IGNORE).unsqueeze(1)
    column = targets.clamp(min=0).unsqueeze(1)
    at_target = logits.gather(1, column).float()
    if not grad:
        log_z = logits.float().logsumexp(1, keepdim=True)
        return torch.where(live, log_z - at_target, 0.0).sum()
    # The probability of the largest logit is at least 1/V, so its logarithm gives log Z without a
    # second pass of exp.
    p = logits.softmax(1, dtype=torch.float32)
    log_z = logits.amax(1, keepdim=True).float() - p.amax(1, keepdim=True).log()
    # d loss / d logits = softmax - one_hot(target), on live rows
    p.scatter_add_(1, column, torch.full_like(log_z, -1.0))
    logits.copy_(p.mul_(live))
    return torch.where(live, log_z - at_target, 0.0).sum()


def _with_torch(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    grad_x: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, its gradient of x in x's dtype, and its gradient of weight in fp32. A gradient that
    is not asked for is None. On a CPU, rows without a target are skipped."""
    # On a GPU, counting the rows would wait for the device. A compiler and fake tensors have no
    # values to count.
    if x.device.type == "cpu" and type(targets) is Tensor and not torch.compiler.is_compiling():
        live = (targets != IGNORE).nonzero()[:, 0]
        if len(live) < len(targets):
            total, dlive, dweight = _in_chunks(
                x[live], weight, targets[live], vocab_size, dtype, grad_x, grad_weight
            )
            return (
                total,
                None if dlive is None else torch.zeros_like(x).index_copy_(0, live, dlive),
                dweight,
            )
    return _in_chunks(x, weight, targets, vocab_size, dtype, grad_x, grad_weight)


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    grad_x: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `_with_torch`, but without skipping the rows that have no target."""
    head = weight.to(dtype)
    total = x.new_zeros((), dtype=torch.float32)
    dx = torch.empty_like(x) if grad_x else None
    dweight = torch.zeros_like(weight, dtype=torch.float32) if grad_weight else None
    grad = grad_x or grad_weight
    on_cpu = x.device.type == "cpu"
    rows = max(
        1, (CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES) // (dtype.itemsize * weight.shape[0])
    )
    piece = max(1, PIECE_BYTES // (4 * weight.shape[0])) if on_cpu else rows
    for start in range(0, x.shape[0], rows):
        chunk = x[start : start + rows].to(dtype)
        logits = chunk @ head.t()  # (rows, V')
        for part, target in zip(
            logits.split(piece), targets[start : start + rows].split(piece), strict=True
        ):
            # Not +=: torch 2.11 compiles a Function that returns a tensor changed in place to
            # gradients of zero.
            total = total + loss_and_gradient(part, target, vocab_size, grad)
        if dx is not None:
            dx[start : start + rows] = logits @ head
        if dweight is not None:
            dweight += logits.t() @ chunk
    return total, dx, dweight


@torch.library.custom_op("gpt2::linear_cross_entropy", mutates_args=())
def _with_triton(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    grad_x: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_with_torch`, as one node of a compiled graph. A gradient that is not asked for is
    empty."""
    head = weight.to(dtype)
    total = x.new_zeros((), dtype=torch.float32)
    dx = x.new_empty(x.shape if grad_x else 0)
    dweight = x.new_zeros(weight.shape if grad_weight else 0, dtype=torch.float32)
    loss = cross_entropy_in_place if grad_x or grad_weight else cross_entropy
    rows = _chunk_rows(x.shape[0], dtype.itemsize * weight.shape[0])
    # One buffer for all chunks: if the product allocated its output, two chunks would be alive at a
    # time.
    space = head.new_empty(min(rows, x.shape[0]), weight.shape[0])
    for start in range(0, x.shape[0], rows):
        chunk = x[start : start + rows].to(dtype)
        logits = torch.mm(chunk, head.t(), out=space[: chunk.shape[0]])
        total += loss(logits, targets[start : start + rows], vocab_size).sum()
        if grad_x:
            _product(logits, head, dx[start : start + rows], beta=0)
        if grad_weight:
            _product(logits.t(), chunk, dweight, beta=1)
    return total, dx, dweight


@_with_triton.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    dtype: torch.dtype,
    grad_x: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty((), dtype=torch.float32)
    dx = x.new_empty(x.shape if grad_x else 0)
    return total, dx, x.new_empty(weight.shape if grad_weight else 0, dtype=torch.float32)


def _chunk_rows(rows: int, row_bytes: int) -> int:
    """The rows of a chunk of at most GPU_CHUNK_BYTES. Chunks are whole tiles, and the last one is
    not much smaller than the others."""
    limit = max(1, GPU_CHUNK_BYTES // row_bytes)
    tile = min(limit, TILE)
    chunks = max(1, math.ceil(rows / (limit // tile * tile)))
    return max(1, math.ceil(rows / (chunks * tile))) * tile


def _product(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
    """out = beta x out + a @ b. If only `out` is fp32, a GPU does not round the product first."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:
        out.copy_(out + a @ b if beta else a @ b)


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        dtype: torch.dtype,
        grad_x: bool,
        grad_weight: bool,
        triton: bool,
    ) -> Tensor:
        run = _with_triton if triton else _with_torch
        total, dx, dweight = run(x, weight, targets, vocab_size, dtype, grad_x, grad_weight)
        ctx.save_for_backward(dx if grad_x else None, dweight if grad_weight else None)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else _scaled(dx, grad_output, dx.dtype)
        dweight = None if dweight is None else _scaled(dweight, grad_output, ctx.weight_dtype)
        return dx, dweight, None, None, None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient x scale, rounded once. Not in place, because a kept graph runs backward twice."""
    # As a vector the scale takes part in type promotion. A scalar would first be rounded to the
    # gradient's dtype.
    return torch.mul(gradient, scale.view(1), out=torch.empty_like(gradient, dtype=dtype))


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, triton: bool = False
) -> Tensor:
    """The sum of -log p(target) over rows, one fp32 scalar. Shapes are those of
    `linear_cross_entropy_reference`.

    The products run in autocast's dtype if it is on, else in x's dtype. Statistics are fp32, and so
    is the head's gradient until it is rounded to the head's dtype at the end. With `triton`, one
    kernel computes the loss and gradient of a chunk's logits.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    grad = torch.is_grad_enabled()
    grad_x, grad_weight = grad and x.requires_grad, grad and weight.requires_grad
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropySum.apply(
            x, weight, targets, vocab_size, dtype, grad_x, grad_weight, triton
        )
