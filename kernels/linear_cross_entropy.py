"""The output head joined to its cross-entropy: the logits of a chunk of rows at a time, never all of them.

At GPT-2's vocabulary the logits are the largest tensor of a training step (4 x 512 tokens: 412 MB in fp32,
and as much again for their gradient). Here each chunk's logits become their own gradient in place, so the
forward pass already leaves the gradients of the hidden states and of the head; the backward pass only scales
them by the incoming gradient. The trade-off: a forward pass that will not be followed by a backward pass must
say so (no_grad), else it pays for gradients that nobody uses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # the target that has no loss
CHUNK_BYTES = 256 << 20  # of logits held at once; every chunk reads and writes the whole gradient of the head
GPU_CHUNK_BYTES = 1 << 30  # fewer launches, and large enough to fill the device
PIECE_BYTES = 16 << 20  # of a chunk, in fp32, that a CPU turns into gradients at once: it stays in the caches


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, reduction: str = "sum"
) -> Tensor:
    """-log p(target) from hidden states x (N, C), head weight (V', C) with V' >= vocab_size, targets (N,) int64.

    Columns at and past vocab_size are padding and take no part; targets of -100 give 0. Returns fp32:
    (N,) for reduction "none", a scalar for "sum".
    """
    logits = F.linear(x, weight)[:, :vocab_size].float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)


def _loss_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, grad: bool) -> Tensor:
    """Sum of -log p(target), fp32; with `grad` the logits (rows, V') are overwritten by their gradient."""
    logits[:, vocab_size:] = -torch.inf
    live = (targets != IGNORE).unsqueeze(1)
    column = targets.clamp(min=0).unsqueeze(1)
    at_target = logits.gather(1, column).float()
    if not grad:
        log_z = logits.float().logsumexp(1, keepdim=True)
        return torch.where(live, log_z - at_target, 0.0).sum()
    # The largest logit's probability is at least 1/V, so its logarithm gives log Z without a second pass of exp.
    top, where = logits.max(1, keepdim=True)
    p = logits.softmax(1, dtype=torch.float32)
    log_z = top.float() - p.gather(1, where).log()
    # d loss / d logits = softmax - one_hot(target), on live rows
    p.scatter_add_(1, column, torch.full_like(log_z, -1.0))
    logits.copy_(p.mul_(live))
    return torch.where(live, log_z - at_target, 0.0).sum()


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
    ) -> Tensor:
        head = weight.to(dtype)
        total = x.new_zeros((), dtype=torch.float32)
        dx = torch.empty_like(x) if grad_x else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if grad_weight else None
        grad = grad_x or grad_weight
        on_cpu = x.device.type == "cpu"
        rows = max(1, (CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES) // (dtype.itemsize * weight.shape[0]))
        piece = max(1, PIECE_BYTES // (4 * weight.shape[0])) if on_cpu else rows
        for start in range(0, x.shape[0], rows):
            chunk = x[start : start + rows].to(dtype)
            logits = chunk @ head.t()  # (rows, V')
            for part, target in zip(logits.split(piece), targets[start : start + rows].split(piece), strict=True):
                total += _loss_and_gradient(part, target, vocab_size, grad)
            if dx is not None:
                dx[start : start + rows] = logits @ head
            if dweight is not None:
                dweight += logits.t() @ chunk
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the graph may be kept and walked twice.
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else dx * grad_output.to(dx.dtype)
        dweight = None if dweight is None else dweight * grad_output
        return dx, dweight, None, None, None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Sum over rows of -log p(target), one fp32 scalar; shapes as in `linear_cross_entropy_reference`.

    The products run in autocast's dtype where it is on, else in x's; statistics and the head's gradient are fp32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    grad = torch.is_grad_enabled()
    grad_x, grad_weight = grad and x.requires_grad, grad and weight.requires_grad
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropySum.apply(x, weight, targets, vocab_size, dtype, grad_x, grad_weight)
