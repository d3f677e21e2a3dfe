"""The addition to the residual stream and the layer norm of the sum, in one pass each way (Ba et
al. 2016).

A block adds a branch's output to the residual stream and then normalises the sum. With PyTorch's
operations the sum is written and the norm reads it again. In the backward pass the norm reads its
inputs once for dx and once for the gradients of gain and bias, and another operation reads dx again
to add it to the stream's gradient. Here a row is read once and stays in registers until every
result is written. Bytes per element in bf16: 8 forward and 8 backward, instead of 10 and 16. With
an fp32 stream and a bf16 branch: 14 and 18, instead of 18 and 38. The trade-off: the compiler
cannot look into this operation, so it fuses nothing before or after with it.

No atomics: each program sums its rows' share of the gradients of gain and bias in fp32, and a
second sum runs over the programs. The same inputs give the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig
from kernels._kernel import Example, Kernel
from kernels._triton import device_of, jit, multiprocessors, tl, triton

# Enough bytes must be in flight to cover the memory's latency: at 4.8 TB/s and 0.8 us these are 29
# KB on each of an H200's 132 multiprocessors. 16 warps with two bf16 rows of 768 each have 25 KB
# (two tensors, forward) to 37 KB (three, backward) in flight, and each thread has 128 registers.
# Compiled for sm_90 the kernels need at most 114.
WARPS = 16  # per multiprocessor, over all of its programs
COLUMNS = 256  # of a row per warp: 16 bytes of bf16 per thread
ROWS = 2  # of a program at a time; more if they are short


class _NormOnCPU(torch.autograd.Function):
    """Layer norm of bf16 tensors by PyTorch's fp32 kernels. PyTorch's bf16 kernels sum the gain's
    gradient in bf16 and lose 8% of it over 8,192 rows. This saves x in bf16 for the backward pass,
    half the bytes of the fp32 copy that the fp32 kernels would save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = x.float(), weight.shape, weight.float(), bias.float()
        normed, mean, rstd = torch.native_layer_norm(*wide, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide = dnormed.float(), x.float(), weight.shape, mean, rstd, weight.float(), bias.float()
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.aten.native_layer_norm_backward(*wide, wanted)
        like = (x, weight, bias)
        return *(
            grad.to(t.dtype) if want else None for grad, t, want in zip(grads, like, wanted)
        ), None


def add_layer_norm_reference(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(total, normed): x + branch (..., C), and the layer norm of that with weight (C,) and bias
    (C,). Both have x's dtype. Without a branch, total is x."""
    total = x if branch is None else (x + branch).to(x.dtype)
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return total, _NormOnCPU.apply(total, weight, bias, eps)
    # On CUDA layer_norm takes only one dtype, and under autocast it returns fp32. Conversions
    # between equal dtypes cost nothing.
    normed = F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return total, normed.to(x.dtype)


@jit
def _forward_kernel(
    x, branch, weight, bias, total, normed, mean, rstd, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """total, normed, mean and rstd of x + branch, TILE rows (rows, WIDTH) at a time. Without a
    branch, x is the total."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    # Two stages: the next tile is loaded into shared memory while this one is reduced.
    for start in tl.range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE, num_stages=2):
        row = start + tl.arange(0, TILE)
        offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if branch is not None:
            value += tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)
            # Round before the statistics: the next block and the backward pass read the rounded
            # stream.
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + offsets, rounded, mask=mask)
            value = rounded.to(tl.float32)
        center = tl.sum(value, 1) / WIDTH
        # The variance is computed after subtracting the mean: E[x^2] - E[x]^2 would cancel if the
        # mean is large.
        value = tl.where(mask, value - center[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(value * value, 1) / WIDTH + eps)
        value = value * scale[:, None] * gain[None, :] + shift[None, :]
        tl.store(normed + offsets, value.to(normed.dtype.element_ty), mask=mask)
        tl.store(mean + row, center, mask=row < rows)
        tl.store(rstd + row, scale, mask=row < rows)


@jit
def _backward_kernel(
    dnormed, dtotal, total, weight, mean, rstd, dx, dbranch, sums, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx (rows, WIDTH), dbranch, which is dx in another dtype, and sums (2, programs, WIDTH) of the
    gradients of gain and bias. Each is None if it is not needed."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE, num_stages=2):
        row = start + tl.arange(0, TILE)
        offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(total + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(dnormed + offsets, mask=mask, other=0.0).to(tl.float32)
        residual = 0.0
        if dtotal is not None:  # loaded here, to be in flight with the others
            residual = tl.load(dtotal + offsets, mask=mask, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        value = (value - center) * scale
        if sums is not None:
            dgain += tl.sum(d * value, 0)  # d is 0 past the edges
            dshift += tl.sum(d, 0)
        if dx is not None:
            # The norm does not depend on a row's mean and scale, so the gradient along them is
            # removed.
            d *= gain[None, :]
            along_mean = tl.sum(d, 1) / WIDTH
            along_scale = tl.sum(d * value, 1) / WIDTH
            d = (d - along_mean[:, None] - value * along_scale[:, None]) * scale + residual
            tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask=mask)
            if dbranch is not None:
                tl.store(dbranch + offsets, d.to(dbranch.dtype.element_ty), mask=mask)
    if sums is not None:
        mine = sums + tl.program_id(0) * WIDTH + column
        tl.store(mine, dgain, mask=inside)
        tl.store(mine + tl.num_programs(0) * WIDTH, dshift, mask=inside)


def _launch(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """The number of rows of x, the number of programs, and the kernels' settings. All programs run
    at the same time and stride over the tiles of rows."""
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    warps = min(max(block // COLUMNS, 1), WARPS)
    tile = max(ROWS * COLUMNS * warps // block, 1)
    programs = min(triton.cdiv(rows, tile), multiprocessors(x.device) * (WARPS // warps))
    return rows, programs, {"WIDTH": width, "BLOCK": block, "TILE": tile, "num_warps": warps}


@torch.library.custom_op("gpt2::add_layer_norm", mutates_args=())
def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total, normed, mean, rstd). Without a branch, total is empty: it would be x, and an output
    of a custom operation must not be an input."""
    outputs = _forward_like(x, branch, weight, bias, eps)
    rows, programs, settings = _launch(x)
    branch = None if branch is None else branch.contiguous()
    with device_of(x):
        _forward_kernel[(programs,)](
            x.contiguous(),
            branch,
            weight.contiguous(),
            bias.contiguous(),
            *outputs,
            rows,
            eps,
            **settings,
        )
    return outputs


@_forward.register_fake
def _forward_like(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if branch is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return total, x.new_empty(x.shape), mean, rstd


@torch.library.custom_op("gpt2::add_layer_norm_backward", mutates_args=())
def _backward(
    dnormed: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stream: bool,
    branch: torch.dtype | None,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx if `stream`, dx in the dtype `branch` if that is given, and the gradients of weight and
    bias, (2, C) fp32, if `affine`. Otherwise dx and its copy are empty, and the gradients zeros."""
    dx, dbranch = _streams_like(total, stream, branch)
    rows, programs, settings = _launch(total)
    sums = mean.new_empty(2, programs if affine else 0, weight.numel())
    dtotal = None if dtotal is None else dtotal.contiguous()
    with device_of(total):
        _backward_kernel[(programs,)](
            dnormed.contiguous(),
            dtotal,
            total.contiguous(),
            weight.contiguous(),
            mean,
            rstd,
            dx if stream else None,
            dbranch if branch else None,
            sums if affine else None,
            rows,
            **settings,
        )
    return dx, dbranch, sums.sum(1)


def _streams_like(total: Tensor, stream: bool, branch: torch.dtype | None) -> tuple[Tensor, Tensor]:
    dx = total.new_empty(total.shape if stream else 0)
    return dx, total.new_empty(total.shape if branch else 0, dtype=branch)


@_backward.register_fake
def _(dnormed, dtotal, total, weight, mean, rstd, stream, branch, affine):
    return *_streams_like(total, stream, branch), mean.new_empty(2, weight.numel())


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, *_ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *(() if branch is not None else (total,)))
    ctx.set_materialize_grads(False)  # the gradient of an unused output is None, not zeros
    ctx.save_for_backward(x if branch is None else total, weight, mean, rstd)
    ctx.branch_dtype = None if branch is None else branch.dtype


def _gradients(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    """Gradients of x, branch, weight, bias and eps. Autograd casts each to its input's dtype."""
    dtotal, dnormed, *_ = grads
    if dnormed is None:  # then only total was used, and there is a branch
        return dtotal, dtotal, None, None, None
    total, weight, mean, rstd = ctx.saved_tensors
    for_x, for_branch, for_weight, for_bias, _ = ctx.needs_input_grad
    stream, affine = for_x or for_branch, for_weight or for_bias
    # x and branch have the same gradient. For two dtypes it is written twice but computed once.
    other = ctx.branch_dtype if for_branch and ctx.branch_dtype != total.dtype else None
    dx, dbranch, sums = _backward(dnormed, dtotal, total, weight, mean, rstd, stream, other, affine)
    return (
        dx if for_x else None,
        (dbranch if other else dx) if for_branch else None,
        sums[0] if for_weight else None,
        sums[1] if for_bias else None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup)


def add_layer_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """(total, normed): the residual stream x (..., C) plus a branch's output, and the layer norm of
    that sum.

    branch (..., C) has x's shape. If it is None, total is x itself. weight and bias are (C,). The
    floating dtypes may all differ. Both results have x's dtype, autocast or not, and statistics are
    fp32. Raises ValueError if shapes do not fit.
    """
    if not triton:
        return add_layer_norm_reference(x, branch, weight, bias, eps)
    if (
        branch is not None and branch.shape != x.shape
    ) or not weight.shape == bias.shape == x.shape[-1:]:
        shapes = [None if t is None else tuple(t.shape) for t in (x, branch, weight, bias)]
        raise ValueError(
            f"shapes {shapes} of x, branch, weight and bias do not fit; the first two must be "
            f"equal, and the others {tuple(x.shape[-1:])}"
        )
    total, normed, *_ = _forward(x, branch, weight, bias, eps)
    return x if branch is None else total, normed


_add_layer_norm_in_triton = functools.partial(add_layer_norm, triton=True)


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    """Reads two tensors and writes two forward. Reads three and writes one backward, where it also
    reads the norm's input."""
    C, eps = config.n_embd, config.layer_norm_epsilon
    x, branch, weight, bias = (
        torch.randn(shape, **place) for shape in ((rows, C), (rows, C), (C,), (C,))
    )
    reference, kernel = (
        functools.partial(function, eps=eps)
        for function in (add_layer_norm_reference, _add_layer_norm_in_triton)
    )
    return Example((x, branch, weight, bias), reference, kernel, moved=8.0 * x.nbytes)


KERNEL = Kernel(
    "residual addition and norm in one pass",
    _example,
    lambda config: {"add_norm": _add_layer_norm_in_triton},
    automatic=lambda cfg: not cfg.compile,  # torch.compile fuses it by itself, in as many bytes
)
