"""A linear layer whose three matrix products run in FP8, with scales from the tensors of the same
step.

x and the weight become e4m3 (3 bits of mantissa). The incoming gradient becomes e5m2 (2 bits, but
the range that gradients need). Each tensor has one scale: its largest magnitude over the format's
largest number (Micikevicius et al. 2022). The products accumulate in fp32. The trade-off: each
scale needs a pass over its whole tensor. A scale from earlier steps would need none, but a
checkpoint would have to store it and a spike would overflow it. torch.compile fuses the pass into
the operation that produced the tensor, and this layer is meant to be compiled.

The weight's gradient is an FP8 product too, as in Transformer Engine and torchao's per-tensor
recipe. It sums tens of thousands of rows, whose rounding errors are independent and average out.
The result leaves the fp32 accumulator in the weight's own dtype, and the optimizer averages over
steps. A short accumulator would lose precision over so long a sum (DeepSeek-AI 2024, section
3.3.2), so the tensor cores' fast accumulation stays off.

Bytes moved to convert a (M, K) tensor in bf16: 2MK for its scale, 3MK for its copy, and 2MK for the
transpose in the backward pass, because tensor cores read FP8 only along the summed dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import FP8_MULTIPLE

# The least amax for a scale: zeros stay zeros, and no reciprocal overflows fp32.
SMALLEST_AMAX = 2.0**-100


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in FP8, contiguous, and its fp32 scale (). Their product is x up to rounding.

    An inf or NaN in x makes the scale inf or NaN, so that no product hides it.
    """
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp(min=SMALLEST_AMAX)
    return (x.float() * (largest / amax)).to(
        dtype, memory_format=torch.contiguous_format
    ), amax / largest


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The forward pass in float64: the product of x and weight after rounding to FP8. Shapes as in
    `fp8_linear`."""
    x, weight = (dequantized(t, torch.float8_e4m3fn) for t in (x, weight))
    return x @ weight.t() if bias is None else x @ weight.t() + bias.bfloat16().double()


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in float64, after rounding to FP8."""
    x8, scale = quantize(x, dtype)
    return x8.double() * scale.double()


def _product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both contiguous: (M, N) in `dtype`."""
    # On a CPU the product consists of operations that autocast would round.
    with torch.autocast(a.device.type, enabled=False):
        return torch._scaled_mm(
            a, b.t(), a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=False
        )


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8, x_scale = quantize(x, torch.float8_e4m3fn)  # (M, K)
        weight8, weight_scale = quantize(weight, torch.float8_e4m3fn)  # (N, K)
        grad_x, grad_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            *((x8, x_scale) if grad_weight else (None, None)),
            *((weight8, weight_scale) if grad_x else (None, None)),
        )
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        bias = None if bias is None else bias.bfloat16()
        return _product(x8, weight8, x_scale, weight_scale, torch.bfloat16, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ctx.needs_input_grad
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dweight = None
        if grad_x or grad_weight:
            dy8, dy_scale = quantize(dy, torch.float8_e5m2)  # (M, N)
            if grad_x:
                dx = _product(dy8, weight8.t().contiguous(), dy_scale, weight_scale, x_dtype)
            if grad_weight:
                dweight = _product(
                    dy8.t().contiguous(), x8.t().contiguous(), dy_scale, x_scale, weight_dtype
                )
        dbias = dy.sum(0, dtype=torch.float32).to(bias_dtype) if grad_bias else None
        return dx, dweight, dbias


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the transpose of weight (N, K), plus bias (N,). Returns (..., N) in bf16,
    whatever the inputs' dtypes.

    K and N must be multiples of 16, which GPTConfig checks. The number of rows is free. The
    gradients have the dtypes of x, weight and bias. The bias is rounded to bf16 and then added to
    the fp32 sum.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    missing = -rows.shape[0] % FP8_MULTIPLE
    if missing:  # rows of zeros add nothing to the weight's gradient, which sums over rows
        rows = F.pad(rows, (0, 0, 0, missing))
    y = _FP8Linear.apply(rows, weight, bias)
    if missing:
        y = y[:-missing]
    return y.view(*x.shape[:-1], weight.shape[0])
