"""Ways to compute a block's MLP that a GPU must measure before the engine may take one of them.

benchmarks.operations has them as forms of `mlp`, beside PyTorch, torch.compile and this engine. Each
takes x (M, C), the weights (4C, C) and (C, 4C) and the biases (4C,) and (C,), and returns (M, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bias_gelu import bias_gelu
from kernels.fp8_linear import quantize

Weight8 = tuple[Tensor, Tensor, Tensor]  # (N, K), its transpose, and their scale
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> list[Tensor]:
    """The MLP by PyTorch's operations."""
    return [F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)]


def mlp_triton(
    x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
) -> list[Tensor]:
    """The MLP with this engine's kernel for bias and GELU."""
    return [F.linear(bias_gelu(F.linear(x, up), up_bias, triton=True), down, down_bias)]


# --- cuBLASLt's epilogues: bias and GELU, and their gradients, in the products themselves


def _product(a: Tensor, b: Tensor, epilogue: str, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """a (M, K) times b (K, N) with an epilogue by nvmath-python. Returns the result and the
    epilogue's own output: the input of GELU, or a bias's gradient.

    cuBLASLt's epilogues want column order, so operands come transposed.
    """
    from nvmath.linalg.advanced import MatmulEpilog, matmul

    result, extra = matmul(a, b, epilog=getattr(MatmulEpilog, epilogue), epilog_inputs=inputs)
    return result, next(iter(extra.values()))


class _EpilogueMLP(torch.autograd.Function):
    """The MLP whose products add the bias, apply GELU, and in the backward pass apply its
    derivative and sum the bias's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor) -> Tensor:
        h, before = _product(up, x.t(), "GELU_AUX_BIAS", bias=b)  # (4C, M)
        ctx.save_for_backward(x, up, down, h, before)
        return torch.addmm(c, h.t(), down.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, up, down, h, before = ctx.saved_tensors
        du, db = _product(down.t(), dy.t(), "DGELU_BGRAD", gelu_aux=before)  # (4C, M), (4C, 1)
        dc = dy.sum(0, dtype=torch.float32).to(dy.dtype)
        return du.t() @ up, du @ x, db.flatten(), dy.t() @ h.t(), dc


def mlp_epilogue(*tensors: Tensor) -> list[Tensor]:
    """The MLP by products with epilogues. Needs nvmath-python and a GPU."""
    return [_EpilogueMLP.apply(*tensors)]


# --- FP8 with scales from earlier steps


class _DelayedMLP(torch.autograd.Function):
    """The MLP whose forward products and dx run in FP8, and whose dW run in bf16: `mlp_delayed`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor, *prepared: Any
    ) -> Tensor:
        scales, up8, down8 = prepared
        u = _scaled(_convert(x, scales[0], E4M3), up8[0], scales[0], up8[2], b)
        h = F.gelu(u, approximate="tanh")
        ctx.save_for_backward(x, u)
        ctx.prepared = prepared
        return _scaled(_convert(h, scales[1], E4M3), down8[0], scales[1], down8[2], c)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, u = ctx.saved_tensors
        scales, up8, down8 = ctx.prepared
        dh = _scaled(_convert(dy, scales[2], E5M2), down8[1], scales[2], down8[2])
        h = F.gelu(u, approximate="tanh")
        du = torch.ops.aten.gelu_backward(dh, u, approximate="tanh")
        dx = _scaled(_convert(du, scales[3], E5M2), up8[1], scales[3], up8[2])
        db, dc = (d.sum(0, dtype=torch.float32).to(d.dtype) for d in (du, dy))
        return dx, du.t() @ x, db, dy.t() @ h, dc, None, None, None


def mlp_delayed(tensors: Sequence[Tensor], scales: Tensor, *weights: Weight8) -> list[Tensor]:
    """The MLP in FP8, with bf16 for dW.

    `scales` (4,) are those of an earlier step: of x, of GELU's output, of the incoming gradient and
    of the gradient of GELU's input. Each conversion is then one pass, which a compiler fuses into
    the operation before it. `weights` is what `quantized` made of both weights, once a step for all
    micro-batches.
    """
    return [_DelayedMLP.apply(*tensors, scales, *weights)]


def quantized(weight: Tensor) -> Weight8:
    """A weight (N, K) in FP8, its transpose (K, N), both contiguous, and their scale ()."""
    weight8, scale = quantize(weight, E4M3)
    return weight8, weight8.t().contiguous(), scale


def delayed_scales(x: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor) -> Tensor:
    """The scales (4,) of `mlp_delayed` from a step with these tensors and normal gradients."""
    u = F.linear(x, up, b)
    dy = torch.randn_like(x)
    du = torch.ops.aten.gelu_backward(dy @ down, u, approximate="tanh")
    tensors = ((x, E4M3), (F.gelu(u, approximate="tanh"), E4M3), (dy, E5M2), (du, E5M2))
    return torch.stack([quantize(tensor, dtype)[1] for tensor, dtype in tensors])


def _convert(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x over `scale` in FP8. What is too large becomes the largest number."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


def _scaled(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both FP8, in bf16."""
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, bias=bias, out_dtype=torch.bfloat16)
