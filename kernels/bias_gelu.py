"""The bias of a linear layer and the GELU after it, in one pass each way, with the bias's gradient
(Hendrycks & Gimpel 2016).

The linear layer's product x comes without its bias. GELU's gradient needs x in any case, so only x
is saved. Bytes per element in bf16: 4 forward, like PyTorch's GELU after a product that added the
bias, and 6 backward instead of 8, because the bias's gradient is summed while dx is written and is
not read again. The trade-off: the activation is a separate pass over the product's output, and no
epilogue inside the product, which stays the library's.

No atomics: each program sums the gradient of its columns over its rows in fp32, and a second sum
runs over the programs. The same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig
from kernels._kernel import Example, Kernel
from kernels._triton import device_of, jit, multiprocessors, tl, triton

# One warp per program: its threads hold whole columns, so it sums them without other warps. 16
# programs with one bf16 tile each keep 32 KB in flight per multiprocessor (64 KB backward). An
# H200's memory (4.8 TB/s, 0.8 us of latency) needs 29 KB. Each thread may then use 128 registers.
PROGRAMS = 16  # per multiprocessor
COLUMNS = 256  # 16 bytes of bf16 per thread; divides 4 x n_embd of every GPT-2
TILE = 1024  # elements of a program at a time


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) by the tanh form, (..., C) in x's dtype, of x (..., C) and bias (C,)."""
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def linear_gelu_reference(
    product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor
) -> Tensor:
    """The GELU of product(x, bias); the product itself adds the bias."""
    return F.gelu(product(x, bias), approximate="tanh")


@jit
def _gelu(x):
    """GELU of x and its derivative, by 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi)
    (x + 0.044715 x^3).

    This form keeps its relative precision where tanh u is nearly -1. No exponent is positive, so
    none overflows. An H200 computes this hardly faster than it reads x, so each instruction counts:
    exp2 and rsqrt are one instruction each, exp and a division are five. That makes 17 instructions
    per element forward and 25 backward, instead of 23 and 32.
    """
    square = x * x
    twice_u = x * (2.302208198144325 + 0.1029432395800235 * square)  # in powers of 2
    e = tl.exp2(-tl.abs(twice_u))
    root = tl.rsqrt(1.0 + e)
    inverse = root * root
    gate = tl.where(twice_u < 0, e * inverse, inverse)
    slope = x * (1.5957691216057308 + 0.21406444881780076 * square)  # x times the derivative of 2u
    return x * gate, gate + slope * (e * inverse * inverse)


@jit
def _forward_kernel(x, bias, y, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """BLOCK columns of x and y (rows, WIDTH), ROWS rows at a time."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        value, _ = _gelu(value + shift[None, :])
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    dy, x, bias, dx, sums, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """dx (rows, WIDTH), and the sums of its columns per program (programs over rows, WIDTH). Either
    is None if it is not needed."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=2):
        row = start + tl.arange(0, ROWS)
        offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)  # 0 past the edges
        _, slope = _gelu(value + shift[None, :])
        d *= slope
        if dx is not None:
            tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)
        if sums is not None:
            dshift += tl.sum(d, 0)
    if sums is not None:
        tl.store(sums + tl.program_id(1) * WIDTH + column, dshift, mask=inside)


def _launch(x: Tensor) -> tuple[int, tuple[int, int], dict[str, int]]:
    """The number of rows of x, the grid (blocks of columns, programs over rows) and the kernels'
    settings. All programs of the grid run at the same time."""
    width = x.shape[-1]
    rows = x.numel() // width
    block = min(triton.next_power_of_2(width), COLUMNS)
    tile = TILE // block
    blocks = triton.cdiv(width, block)
    programs = min(triton.cdiv(rows, tile), max(multiprocessors(x.device) * PROGRAMS // blocks, 1))
    return rows, (blocks, programs), {"WIDTH": width, "BLOCK": block, "ROWS": tile, "num_warps": 1}


@torch.library.custom_op("gpt2::bias_gelu", mutates_args=())
def _forward(x: Tensor, bias: Tensor) -> Tensor:
    y = _forward_like(x, bias)
    rows, grid, settings = _launch(x)
    with device_of(x):
        _forward_kernel[grid](x.contiguous(), bias.contiguous(), y, rows, **settings)
    return y


@_forward.register_fake
def _forward_like(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("gpt2::bias_gelu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx (empty unless `for_x`) and the bias's gradient (C,) in fp32 (zeros unless `for_bias`)."""
    dx, _ = _backward_like(dy, x, bias, for_x, for_bias)
    rows, grid, settings = _launch(x)
    sums = x.new_empty(grid[1] if for_bias else 0, bias.numel(), dtype=torch.float32)
    with device_of(x):
        _backward_kernel[grid](
            dy.contiguous(), x.contiguous(), bias.contiguous(),
            dx if for_x else None, sums if for_bias else None, rows, **settings,
        )  # fmt: skip
    return dx, sums.sum(0)


@_backward.register_fake
def _backward_like(
    dy: Tensor, x: Tensor, bias: Tensor, for_x: bool, for_bias: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if for_x else 0), x.new_empty(bias.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    for_x, for_bias = ctx.needs_input_grad
    dx, dbias = _backward(dy, x, bias, for_x, for_bias)
    # autograd casts dbias to the bias's dtype
    return (dx if for_x else None, dbias if for_bias else None)


_forward.register_autograd(_gradients, setup_context=_setup)


def bias_gelu(x: Tensor, bias: Tensor, triton: bool = False) -> Tensor:
    """gelu(x + bias) by the tanh form, (..., C). x (..., C) is a linear layer's output without its
    bias (C,).

    The result has x's dtype, whatever the bias's dtype and autocast. Raises ValueError if the
    widths differ.
    """
    if not triton:
        return bias_gelu_reference(x, bias)
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"x {tuple(x.shape)} and bias {tuple(bias.shape)} do not fit; the bias must have "
            f"{x.shape[-1]} elements"
        )
    return _forward(x, bias)


def _linear_then_bias_gelu(
    product: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, bias: Tensor
) -> Tensor:
    return bias_gelu(product(x, None), bias, triton=True)


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    """Reads one tensor and writes one forward, and reads two and writes one backward."""
    x, bias = (torch.randn(*shape, 4 * config.n_embd, **place) for shape in ((rows,), ()))
    kernel = functools.partial(bias_gelu, triton=True)
    return Example((x, bias), bias_gelu_reference, kernel, moved=5.0 * x.nbytes)


KERNEL = Kernel(
    "bias and GELU in one pass", _example, lambda config: {"linear_gelu": _linear_then_bias_gelu}
)
