"""A linear layer whose three matrix products run in FP8, with scales computed from the tensors of
the same step.

x and the weight become e4m3 (3 bits of mantissa), the incoming gradient e5m2 (2 bits, and the range
that gradients need); each tensor has one scale, its largest magnitude over the format's largest
number (Micikevicius et al. 2022). The products accumulate in fp32. The trade-off: a scale is known
only after a pass over the whole tensor, where a scale kept from earlier steps would need none, but
a state that a checkpoint must carry and that a spike overruns. torch.compile joins that pass to
whatever made the tensor, and the operation is meant for it.

The weight's gradient is a product in FP8 too, as in Transformer Engine and torchao's per-tensor
recipe. It sums over rows, tens of thousands of them, whose rounding errors are independent and
average out, while its result leaves the fp32 accumulator in the weight's own dtype; the optimizer
then averages over steps. What a short accumulator would lose over so long a sum (DeepSeek-AI 2024,
section 3.3.2) is why the tensor cores' fast accumulation stays off.

Bytes moved by the conversions of a (M, K) tensor in bf16: 2MK for its scale, 3MK for its copy, and
in the backward pass 2MK for the transpose, since tensor cores read FP8 along the summed dimension
only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import FP8_MULTIPLE

# an amax below this counts as this: zeros stay zeros, and no reciprocal overflows fp32
SMALLEST_AMAX = 2.0**-100


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in FP8, contiguous, and its scale, a scalar in fp32: x is nearly their product.

    An inf or NaN in x is one in the scale, so that no product hides it.
    """
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp(min=SMALLEST_AMAX)
    return (x.float() * (largest / amax)).to(
        dtype, memory_format=torch.contiguous_format
    ), amax / largest


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the forward pass computes, in float64: the product of what x and weight become in FP8.
    Shapes as below."""
    x, weight = (dequantized(t, torch.float8_e4m3fn) for t in (x, weight))
    return x @ weight.t() if bias is None else x @ weight.t() + bias.bfloat16().double()


def dequantized(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as its FP8 form has it, in float64."""
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
    # a CPU's product is made of operations that it would round
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
    """x (..., K) times the transpose of weight (N, K), plus bias (N,): (..., N) in bf16, whatever
    the inputs' dtypes.

    K and N must be multiples of 16 (GPTConfig sees to it); any number of rows will do. The
    gradients have the dtypes of x, weight and bias. The bias is added to the fp32 sum and is itself
    rounded to bf16 first.
    """
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    missing = -rows.shape[0] % FP8_MULTIPLE
    if missing:  # the weight's gradient sums over rows: rows of zeros add nothing to it
        rows = F.pad(rows, (0, 0, 0, missing))
    y = _FP8Linear.apply(rows, weight, bias)
    if missing:
        y = y[:-missing]
    return y.view(*x.shape[:-1], weight.shape[0])
