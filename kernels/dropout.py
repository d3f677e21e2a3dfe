"""Dropout on a CPU (Srivastava et al. 2014) from 16 random bits an element.

There PyTorch draws a number of double precision for each element, which makes dropout a fifth of a
bf16 step of a small model, and more of one that trains little besides its head. Here four elements
share a draw of 64 bits, and a mask of ones or zeros in all bits is laid over the numbers: exact,
and nothing is converted. The trade-off: the probability is rounded to a multiple of 2^-15. Values
are divided by what is then kept, so their mean stays.
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
    """PyTorch's: other draws of the same distribution, but for the rounding of p."""
    return F.dropout(x, p)


class Dropout(nn.Dropout):
    """x (...) with each number dropped with probability p in training, the others divided by the
    share that is kept.

    On a CPU the draws are those of this file, from the global generator; elsewhere and compiled,
    PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
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
    """Draws of 64 bits for n elements."""
    return -(-n // 4)


def _dropped(p: float) -> int:
    """In so many of LEVELS cases an element is dropped, but never in all."""
    return min(round(p * LEVELS), LEVELS - 1)


def scale(p: float) -> float:
    """What is kept is multiplied by this."""
    return LEVELS / (LEVELS - _dropped(p))


def fill_random_(draws: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill int64 draws with random bits."""
    return draws.random_(-(2**63), None, generator=generator)


def keep_masks_(draws: Tensor, p: float) -> Tensor:
    """Random int64 (..., n), in place, to int16 (..., 4 n): all bits set where an element is kept,
    none where dropped."""
    level = draws.view(torch.int16).bitwise_right_shift_(1)  # -LEVELS / 2 to LEVELS / 2 - 1
    # The sign, in all bits: negative below the level from which on elements are kept.
    return level.sub_(_dropped(p) - LEVELS // 2).bitwise_right_shift_(15).bitwise_not_()


def apply_mask_(x: Tensor, keep: Tensor) -> Tensor:
    """x, in place, with zeros where `keep`, int16, has none of its bits set."""
    integers = INTEGERS[x.dtype]
    x.view(integers).bitwise_and_(keep.to(integers))
    return x
