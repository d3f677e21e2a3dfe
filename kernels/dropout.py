"""Dropout on a CPU (Srivastava et al. 2014) from 16 random bits an element.

There PyTorch draws a number of double precision for each element, which makes dropout a fifth of a bf16 step of a small
model, and more of one that trains little besides its head. Here four elements share a draw of 64 bits, and a mask of
ones or zeros in all bits is laid over the numbers: exact, and nothing is converted. The trade-off: the probability is
rounded to a multiple of 2^-15. Values are divided by what is then kept, so their mean stays.
"""

from __future__ import annotations

import math
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
    """x (...) with each number dropped with probability p in training, the others divided by the share that is kept.

    On a CPU the draws are those of this file, from the global generator; elsewhere and compiled, PyTorch's.
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
        dropped = round(p * LEVELS)
        ctx.scale = LEVELS / (LEVELS - dropped)
        keep = _kept(x.shape, dropped)
        ctx.save_for_backward(keep)
        return _mask(x * ctx.scale, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _mask(grad.contiguous() * ctx.scale, *ctx.saved_tensors), None


def _kept(shape: torch.Size, dropped: int) -> Tensor:
    """A mask of `shape`, int16: all bits set where a number is kept, none in `dropped` of LEVELS cases."""
    n = math.prod(shape)
    draws = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    level = draws.view(torch.int16)[:n].view(shape).bitwise_right_shift_(1)  # -LEVELS / 2 to LEVELS / 2 - 1
    # The sign, in all bits: negative below the level from which on numbers are kept.
    return level.sub_(dropped - LEVELS // 2).bitwise_right_shift_(15).bitwise_not_()


def _mask(x: Tensor, keep: Tensor) -> Tensor:
    """x, in place, with zeros where `keep` has none of its bits set."""
    integers = INTEGERS[x.dtype]
    x.view(integers).bitwise_and_(keep.to(integers))
    return x
