"""The product of q, k and v, split into heads, and in the backward pass their three gradients joined
again while the bias's gradient is summed.

Attention's backward pass returns dq, dk and dv as three tensors, and the two products before them
read one. Whoever joins them has each element in a register, so the column sums for the bias cost
nothing there. Without this file the bias's gradient is another pass over the joined tensor. Bytes
per element in bf16, backward: 4 instead of 6. The forward pass only makes views. The trade-off:
the compiler cannot look into the join.

No atomics: each program sums the gradient of its columns over its rows in fp32, and a second sum
runs over the programs. The same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from config import GPTConfig
from kernels._kernel import Example, Kernel, masks_documents
from kernels._triton import device_of, jit, multiprocessors, tl, triton

# As in kernels/bias_gelu.py: one warp per program, with its columns' sums in its own threads.
PROGRAMS = 16  # per multiprocessor
COLUMNS = 256  # 16 bytes of bf16 per thread; divides the n_embd of every GPT-2
TILE = 1024  # elements of a program at a time

Product = Callable[[Tensor, Tensor | None], Tensor]
Heads = tuple[Tensor, Tensor, Tensor]


def split_heads_reference(product: Product, x: Tensor, bias: Tensor, n_head: int) -> Heads:
    """q, k and v (B, n_head, T, head_dim) each, as views of product(x, bias), which is (B, T,
    3 n_embd) for x (B, T, n_embd) and bias (3 n_embd,)."""
    B, T, _ = x.shape
    q, k, v = product(x, bias).view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@jit
def _join_kernel(
    dq, dk, dv, joined, sums, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """joined (rows, 3 WIDTH) of dq, dk and dv (rows, WIDTH), and the sums of its columns per program
    (programs over rows, 3 WIDTH) or None."""
    part = tl.program_id(2)
    source = dq if part == 0 else (dk if part == 1 else dv)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS, num_stages=2):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        value = tl.load(source + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        to = row[:, None] * (3 * WIDTH) + part * WIDTH + column[None, :]
        tl.store(joined + to, value, mask=mask)
        if sums is not None:
            total += tl.sum(value.to(tl.float32), 0)
    if sums is not None:
        tl.store(sums + (tl.program_id(1) * 3 + part) * WIDTH + column, total, mask=inside)


def _rows_of(heads: Tensor) -> Tensor:
    """(B, n_head, T, head_dim) as contiguous (B, T, n_embd). Fused attention returns its gradients
    with that order in memory, so nothing is copied there."""
    return heads.transpose(1, 2).flatten(2).contiguous()


@torch.library.custom_op("gpt2::join_heads", mutates_args=())
def _join(dq: Tensor, dk: Tensor, dv: Tensor, for_bias: bool) -> tuple[Tensor, Tensor]:
    """The gradient of qkv (B, T, 3 n_embd), and the bias's (3 n_embd,) in fp32 (zeros unless
    `for_bias`)."""
    joined, bias = _join_like(dq, dk, dv, for_bias)
    grads = [_rows_of(grad) for grad in (dq, dk, dv)]
    width, programs_at_once = bias.numel() // 3, multiprocessors(dq.device) * PROGRAMS
    rows = joined.numel() // (3 * width)
    block = min(triton.next_power_of_2(width), COLUMNS)
    blocks, tile = triton.cdiv(width, block), TILE // block
    programs = min(triton.cdiv(rows, tile), max(programs_at_once // (3 * blocks), 1))
    sums = bias.new_empty(programs if for_bias else 0, 3 * width)
    with device_of(dq):
        _join_kernel[(blocks, programs, 3)](
            *grads, joined, sums if for_bias else None, rows,
            WIDTH=width, BLOCK=block, ROWS=tile, num_warps=1,
        )  # fmt: skip
    return joined, sums.sum(0)


@_join.register_fake
def _join_like(dq: Tensor, dk: Tensor, dv: Tensor, for_bias: bool) -> tuple[Tensor, Tensor]:
    B, H, T, D = dq.shape
    return dq.new_empty(B, T, 3 * H * D), dq.new_empty(3 * H * D, dtype=torch.float32)


class _Split(torch.autograd.Function):
    """The views, with the bias that was added before as an input, so that it gets its gradient
    here."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, n_head: int) -> Heads:
        ctx.bias_dtype = bias.dtype
        return split_heads_reference(lambda qkv, _: qkv, qkv, bias, n_head)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dqkv, dbias = _join(*grads, ctx.needs_input_grad[1])
        return dqkv, dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None, None


def split_heads(product: Product, x: Tensor, bias: Tensor, n_head: int) -> Heads:
    """`split_heads_reference` whose backward pass joins in Triton."""
    return _Split.apply(product(x, bias.detach()), bias, n_head)


def _add(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    """Reads and writes each element once each way. Forward that is the example's product, which only
    adds the bias."""
    T, C = config.block_size, 3 * config.n_embd
    x, bias = torch.randn(-(-rows // T), T, C, **place), torch.randn(C, **place)
    reference, kernel = (
        functools.partial(function, _add, n_head=config.n_head)
        for function in (split_heads_reference, split_heads)
    )
    return Example((x, bias), reference, kernel, moved=4.0 * x.nbytes)


KERNEL = Kernel(
    "q, k and v's gradients joined and summed in one pass",
    _example,
    lambda config: {"split_heads": split_heads},
    automatic=lambda cfg: (
        not masks_documents(cfg)
    ),  # else attention itself reads the packed product
)
