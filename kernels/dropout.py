"""Dropout on a CPU (Srivastava et al. 2014) from 16 random bits per element.

On a CPU, PyTorch draws a double-precision number for each element. Dropout then takes a fifth of a
bf16 step of a small model, and more if little besides the head trains. Here four elements share one
64-bit draw, and each element is ANDed with a mask of all ones or all zeros. This is exact and
converts nothing. The trade-off: the probability is rounded to a multiple of 2^-15. The kept values
are divided by the rounded share that is kept, so the mean does not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 15
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def dropout_reference(x: Tensor, p: float) -> Tensor:
    """PyTorch's dropout: the same distribution but for the rounding of p, from other draws."""
    return F.dropout(x, p)


class Dropout(nn.Dropout):
    """Dropout by this file's draws on a CPU, from the global generator. On other devices, and in
    compiled code, it is PyTorch's."""

    def forward(self, x: Tensor) -> Tensor:
        """x (...) with each element zeroed with probability p in training. The others are divided
        by the share that is kept. Same shape and dtype."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return dropout_reference(x, self.p)
        return _Dropout.apply(x.contiguous(), self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.scale = scale(p)
        n = x.numel()
        draws = torch.empty(random_words(n), dtype=torch.int64)
        keep = keep_masks_(fill_random_(draws), p)[:n].view(x.shape)
        ctx.save_for_backward(keep)
        return apply_mask_(x * ctx.scale, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return apply_mask_(grad.contiguous() * ctx.scale, *ctx.saved_tensors), None


def random_words(n: int) -> int:
    """Number of 64-bit draws that n elements need."""
    return -(-n // 4)


def _dropped(p: float) -> int:
    """Of LEVELS equally likely levels, the number that drop an element; never all of them."""
    return min(round(p * LEVELS), LEVELS - 1)


def scale(p: float) -> float:
    """The factor of the kept elements, 1 / (1 - p) for the rounded p."""
    return LEVELS / (LEVELS - _dropped(p))


def fill_random_(draws: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill int64 draws (...) with random bits, in place."""
    return draws.random_(-(2**63), None, generator=generator)


def keep_masks_(draws: Tensor, p: float) -> Tensor:
    """Turn random int64 (..., n) into int16 masks (..., 4 n), in place. A mask has all bits set
    for an element that is kept and none for one that is dropped."""
    level = draws.view(torch.int16).bitwise_right_shift_(1)  # -LEVELS / 2 to LEVELS / 2 - 1
    # Elements below a threshold are dropped: there the difference is negative, and the arithmetic
    # shift copies its sign into all bits.
    return level.sub_(_dropped(p) - LEVELS // 2).bitwise_right_shift_(15).bitwise_not_()


def apply_mask_(x: Tensor, keep: Tensor) -> Tensor:
    """Set x to zero, in place, where the int16 mask `keep` has no bit set."""
    integers = INTEGERS[x.dtype]
    x.view(integers).bitwise_and_(keep.to(integers))
    return x
