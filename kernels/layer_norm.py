"""The residual stream's addition and the layer norm that reads it, in one pass each way (Ba et al.
2016).

A block adds what a branch made to the stream and at once normalises the sum. By PyTorch's
operations the sum is written, then read again by the norm; in the backward pass the norm reads its
inputs once for its own gradient and once for the gain's and the bias's, and what it wrote is read
to be added to the stream's gradient. Here a row is read once and stays in registers until all that
depends on it is written. Bytes an element, in bf16: 8 forward and 8 backward, in place of 10 and
16; with a fp32 stream and a bf16 branch: 14 and 18, in place of 18 and 38. The trade-off: two
outputs of one operation that no compiler looks into, so what stands before or after is never fused
with it.

Nothing is added atomically: each program sums its rows' share of the gain's and the bias's
gradients in fp32 and a second sum, over the programs, completes them, so the same inputs give the
same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._triton import device_of, jit, multiprocessors, tl, triton

# Enough bytes must be under way to cover the memory's latency: at 4.8 TB/s and 0.8 us they are 29
# KB on each of an H200's 132 multiprocessors. 16 warps with two rows each, of 768 in bf16, ask for
# 25 KB (two tensors, forward) to 37 KB (three, backward) at once, and leave a thread 128 registers;
# compiled for sm_90 the kernels need 114 at most.
WARPS = 16  # on a multiprocessor, over all of its programs
COLUMNS = 256  # of a row for each warp: 16 bytes of bf16 for each of its threads
ROWS = 2  # of a program at once, more where they are short


class _NormOnCPU(torch.autograd.Function):
    """Layer norm of bf16 by PyTorch's fp32 kernels: its bf16 ones add up the gain's gradient in
    bf16, and lose 8% of it over 8,192 rows. Saved is x as it came, half the bytes of what they
    would save."""

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
    """(total, normed): x + branch (..., C) and its layer norm times weight (C,) plus bias (C,),
    both of x's dtype."""
    total = x if branch is None else (x + branch).to(x.dtype)
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", enabled=False):
            return total, _NormOnCPU.apply(total, weight, bias, eps)
    # On CUDA layer_norm takes one dtype only, and under autocast gives fp32. Where dtypes agree no
    # conversion costs.
    normed = F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return total, normed.to(x.dtype)


@jit
def _forward_kernel(
    x, branch, weight, bias, total, normed, mean, rstd, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE rows of each tensor (rows, WIDTH) at a time. Without a branch, x is the total."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    # Two stages: the next tile is on its way into shared memory while this one is reduced.
    for start in tl.range(tl.program_id(0) * TILE, rows, tl.num_programs(0) * TILE, num_stages=2):
        row = start + tl.arange(0, TILE)
        offsets = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if branch is not None:
            value += tl.load(branch + offsets, mask=mask, other=0.0).to(tl.float32)
            # Rounded before the statistics: they are those of the stream as the next block and the
            # backward read it.
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + offsets, rounded, mask=mask)
            value = rounded.to(tl.float32)
        center = tl.sum(value, 1) / WIDTH
        # The variance of what is left without the mean: E[x^2] - E[x]^2 cancels where the mean is
        # large.
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
    """dx (rows, WIDTH), dbranch: the same in another dtype, sums (2, programs, WIDTH); each None
    where unwanted."""
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
        if dtotal is not None:  # read here, to be under way with the others
            residual = tl.load(dtotal + offsets, mask=mask, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        value = (value - center) * scale
        if sums is not None:
            dgain += tl.sum(d * value, 0)  # d is 0 past the edges
            dshift += tl.sum(d, 0)
        if dx is not None:
            # The norm does not see a row's mean and scale: the gradient along them is taken out.
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
    """Rows of x, programs (all at work at once, each on every so-many-th tile of rows), settings of
    the kernels."""
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
    """(total, normed, mean, rstd); an empty total without a branch: it would be x, which no output
    may be."""
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
    """(dx if `stream`, the same in dtype `branch` if any, (2, C) fp32 of weight and bias if
    `affine`), else empty."""
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
    ctx.set_materialize_grads(False)  # an output that nobody uses has no gradient, not one of zeros
    ctx.save_for_backward(x if branch is None else total, weight, mean, rstd)
    ctx.branch_dtype = None if branch is None else branch.dtype


def _gradients(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    """Of x, branch, weight, bias and eps; autograd itself takes each to its input's dtype."""
    dtotal, dnormed, *_ = grads
    if dnormed is None:  # then total was used, and there is a branch
        return dtotal, dtotal, None, None, None
    total, weight, mean, rstd = ctx.saved_tensors
    for_x, for_branch, for_weight, for_bias, _ = ctx.needs_input_grad
    stream, affine = for_x or for_branch, for_weight or for_bias
    # One gradient serves x and branch. In two dtypes it is written twice, still from one reading.
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
    """(total, normed): the stream x (..., C) plus what a branch adds to it, and the layer norm of
    that sum.

    branch (..., C) has x's shape, or is None: then total is x itself. weight and bias are (C,). All
    may be of different floating dtypes; both results have x's, autocast or not, and statistics are
    fp32. Raises ValueError where shapes differ.
    """
    if not triton:
        return add_layer_norm_reference(x, branch, weight, bias, eps)
    if (
        branch is not None and branch.shape != x.shape
    ) or not weight.shape == bias.shape == x.shape[-1:]:
        shapes = [None if t is None else tuple(t.shape) for t in (x, branch, weight, bias)]
        raise ValueError(f"x, branch, weight and bias do not fit together: {shapes}")
    total, normed, *_ = _forward(x, branch, weight, bias, eps)
    return x if branch is None else total, normed
