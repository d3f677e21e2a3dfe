"""Causal attention on a CPU, made of batched matrix products: a group of heads, a block of queries
at a time.

PyTorch's flash attention walks small tiles and, on a CPU without AMX, multiplies them at a fifth of
the rate that its batched product of bf16 matrices reaches (on Zen 4: 35 of 200 GFLOP/s a thread).
Here one call multiplies a block of queries of a whole group of heads with all the keys that they
may see. The scores of one block are held, never all of them, and only q, k and v are kept for the
backward pass, which makes the scores and their softmax again. The gradient comes back packed:
autograd's way through scaled_dot_product_attention gives dq, dk and dv apart and then joins them.
The reference is `kernels.attention.attention_reference`.

Scores, softmax and the gradient of the probabilities are fp32: bf16 has 8 bits, which would put a
score of 10 off by 2% of its probability. Probabilities and the gradient of the scores are rounded
to the inputs' dtype for the other products, as flash attention rounds them; sums over blocks of
queries are fp32 again.

The trade-off: products at fp32's half rate are one of two forward and two of five backward; and a
block of queries meets the last of its keys above the diagonal too, (T + rows) / 2T of the square in
place of half of it.

Dropout falls on the probabilities. For each block of queries some heads draw together, from a
generator that begins with a number of theirs, and in the backward pass draw the same again: nothing
is kept of it.

Threads take whole groups and each product runs within one, so the number of threads changes no bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import dropout

# Larger groups share the cost of a call among more heads, until what is in use, 3 KB for each token
# of a head at head_dim 64, no longer stays in the caches: here 18 MB a thread.
GROUP_TOKENS = 6144  # times heads, in a group
# Probabilities that are drawn together, whatever the groups. With fewer, the calls are what takes
# the time.
DRAWN_TOGETHER = 1 << 16


def _rows(T: int) -> int:
    """Queries in a block: with more, products are larger and so is the waste above the diagonal.
    Measured."""
    return min(T, 64 if T <= 512 else 128)


def is_faster(dtype: torch.dtype) -> bool:
    """Whether this is faster here than scaled_dot_product_attention: asked of the CPU and torch's
    build alone, never of a measurement, so that a run that is resumed on a like machine computes
    the same bits.

    Measured on Zen 4, so true for bf16 and fp32 where the CPU has avx512_bf16. With AMX PyTorch's
    flash attention runs its bf16 products in tiles; there, and on other CPUs, nobody has compared
    the two.
    """
    # fp32's products, bf16's
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    cpu = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return libraries and cpu and dtype in (torch.bfloat16, torch.float32)


class DropoutSeed(NamedTuple):
    """Of a group's dropout. A group's heads follow one another: some of a sequence's, or all of
    several's."""

    seed: int
    head: int  # the group's first, counted over all sequences


class _Block:
    """Some queries of a group of heads and the keys that any of them may see, as views into the
    group's memory."""

    def __init__(self, group: _Group, first: int, end: int):
        g, self.length, D = group.out.shape
        rows, keys = slice(first, end), slice(0, end)

        def cut(inputs: Tensor) -> list[Tensor]:
            return [x[:, part] for x, part in zip(inputs, (rows, keys, keys, rows))]

        def shaped(memory: Tensor, *shape: int) -> Tensor:
            return memory[: math.prod(shape)].view(shape)

        self.scale, self.p = D**-0.5, group.p
        self.kept_scale = dropout.scale(self.p)
        # q, k, v and the output's gradient
        self.narrow, self.wide = (cut(group.inputs), cut(group.wide_inputs))
        self.out = group.out[:, rows]
        self.dk, self.dv = group.dkv[:, :, keys]
        self.scores, self.dscores = (shaped(memory, g, end - first, end) for memory in group.scores)
        self.diagonal = self.scores[:, :, first:]
        self.above = group.above[: end - first, : end - first]
        self.rounded, self.part = None, None
        if group.rounded is not None and group.part is not None:
            self.rounded, self.part = (
                shaped(group.rounded, g, end - first, end),
                shaped(group.part, g, end, D),
            )
        if self.p:
            self.first, self.draws, self.generator = first, group.draws, group.generator
            self.words = dropout.random_words((end - first) * end)  # of 64 bits, for one head
            self.heads_per_draw = max(1, DRAWN_TOGETHER // (4 * self.words))  # heads

    def forward(self, draw: DropoutSeed | None) -> None:
        p = self._round(self._probabilities())
        self._draw(draw)
        torch.baddbmm(
            self.out, self._drop(p), self.narrow[2], beta=0, alpha=self.kept_scale, out=self.out
        )

    def backward(self, draw: DropoutSeed | None) -> None:
        """Write dq where the output was; add to dk and dv."""
        q, k, _, grad = self.narrow
        _, _, wide_v, wide_grad = self.wide
        p = self._probabilities()
        self._draw(draw)
        # Before dropout they are needed once more: what drops is a copy of them.
        copy = self.dscores.copy_(p) if self.rounded is None and self.p else self._round(p)
        self._add_product(self.dv, self._drop(copy), grad, self.kept_scale)
        v = wide_v.transpose(1, 2)
        dp = self._drop(
            torch.baddbmm(
                self.dscores, wide_grad, v, beta=0, alpha=self.kept_scale, out=self.dscores
            )
        )
        # p (dp - rowsum(p dp)): the softmax's own gradient in one pass, and nothing of the forward
        # pass is needed.
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        ds = self._round(dp)
        torch.baddbmm(self.out, ds, k, beta=0, alpha=self.scale, out=self.out)
        self._add_product(self.dk, ds, q, self.scale)

    def _probabilities(self) -> Tensor:
        q, k, _, _ = self.wide
        torch.baddbmm(self.scores, q, k.transpose(1, 2), beta=0, alpha=self.scale, out=self.scores)
        self.diagonal.add_(self.above)
        return torch.softmax(self.scores, -1, out=self.scores)

    def _draw(self, draw: DropoutSeed | None) -> None:
        """Set what is kept in this block: some of what the heads that draw together with the
        group's first and last do."""
        if draw is None:
            return
        g, rows, keys = self.scores.shape
        before = draw.head % self.heads_per_draw
        parts = -(-(before + g) // self.heads_per_draw)
        draws = self.draws[: parts * self.heads_per_draw * self.words].view(parts, -1)
        for i, part in enumerate(draws, draw.head // self.heads_per_draw):
            dropout.fill_random_(
                part, self.generator.manual_seed(draw.seed + self.length * i + self.first)
            )
        own = draws.view(-1, self.words)[before : before + g]
        self.keep = dropout.keep_masks_(own, self.p)[:, : rows * keys].view(g, rows, keys)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout.apply_mask_(x, self.keep) if self.p else x

    def _round(self, x: Tensor) -> Tensor:
        return x if self.rounded is None else self.rounded.copy_(x)

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        """total += scale x a' b, the sum in total's dtype."""
        a = a.transpose(1, 2)
        if self.part is None:
            total.baddbmm_(a, b, alpha=scale)
        else:
            total.add_(torch.baddbmm(self.part, a, b, beta=0, alpha=scale, out=self.part))


class _Group:
    """The memory that g heads are computed in, used again by one group after the other: fresh pages
    cost time."""

    def __init__(self, g: int, T: int, D: int, dtype: torch.dtype, p: float):
        self.p = p
        wide = torch.promote_types(dtype, torch.float32)
        rows = _rows(T)
        self.inputs = torch.empty(4, g, T, D, dtype=dtype)  # q, k, v and the output's gradient
        self.wide_inputs = self.inputs if dtype == wide else torch.empty(4, g, T, D, dtype=wide)
        self.out = torch.empty(g, T, D, dtype=dtype)
        self.dkv = torch.empty(2, g, T, D, dtype=wide)
        self.scores = torch.empty(2, g * rows * T, dtype=wide)  # and their gradient
        self.rounded = None if dtype == wide else torch.empty(g * rows * T, dtype=dtype)
        self.part = None if dtype == wide else torch.empty(g * T * D, dtype=dtype)
        self.above = torch.full((rows, rows), -torch.inf, dtype=wide).triu_(1)  # the diagonal
        self.draws = torch.empty(
            g * dropout.random_words(rows * T) + DRAWN_TOGETHER // 2 if p else 0, dtype=torch.int64
        )
        self.generator = torch.Generator()
        self.blocks = [_Block(self, i, min(i + rows, T)) for i in range(0, T, rows)]

    def forward(self, qkv: Tensor, draw: DropoutSeed | None, out: Tensor) -> None:
        """qkv (b, T, 3, h, D) to out (b, T, h, D)."""
        self._load(qkv, slice(0, 3))
        for block in self.blocks:
            block.forward(draw)
        _store(self.out[None], out.unsqueeze(2))

    def backward(self, qkv: Tensor, draw: DropoutSeed | None, grad: Tensor, dqkv: Tensor) -> None:
        """qkv (b, T, 3, h, D) and the output's gradient (b, T, h, D) to dqkv, as qkv."""
        self._load(qkv, slice(0, 3))
        self._load(grad.unsqueeze(2), slice(3, 4))
        self.dkv.zero_()
        for block in self.blocks:
            block.backward(draw)
        _store(self.out[None], dqkv[:, :, :1])
        _store(self.dkv, dqkv[:, :, 1:])

    def _load(self, x: Tensor, which: slice) -> None:
        """x (b, T, n, h, D) into n of the inputs."""
        x = _heads_first(x)
        self.inputs[which].view(x.shape).copy_(x)
        if self.wide_inputs is not self.inputs:
            self.wide_inputs[which].copy_(self.inputs[which])


def _heads_first(x: Tensor) -> Tensor:
    """(b, T, n, h, D) seen as (n, b, h, T, D)."""
    return x.permute(2, 0, 3, 1, 4)


def _store(x: Tensor, out: Tensor) -> None:
    """x (n, b * h, T, D) into out (b, T, n, h, D), rounded to its dtype."""
    out = _heads_first(out)
    out.copy_(x.view(out.shape))


def _even_slices(n: int, most: int) -> list[slice]:
    """range(n) in parts as even as can be, of at most `most`."""
    size = math.ceil(n / math.ceil(n / most))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _groups(B: int, T: int, H: int, threads: int) -> list[tuple[slice, slice]]:
    """Sequences and heads that are computed together: some heads of one sequence, or all of
    several."""
    most = max(1, min(GROUP_TOKENS // T, B * H // threads))
    return list(itertools.product(_even_slices(B, max(1, most // H)), _even_slices(H, most)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which an operation of torch's takes one thread and not all."""
    all_here = threading.Barrier(threads)

    def start() -> None:
        # makes this thread's own setting, which would else be made later and undo the next line
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "cpu_attention", start)
    list(pool.map(lambda _: all_here.wait(), range(threads)))
    torch.set_num_threads(threads)  # what threads of the future begin with was set too
    return pool


_kept = threading.local()


def _group(*shape: Any) -> _Group:
    """A thread's memory for groups of a shape: one call has at most two, and the next is likely to
    have the same."""
    if not hasattr(_kept, "groups"):
        _kept.groups = functools.lru_cache(maxsize=2)(_Group)
    return _kept.groups(*shape)


def _for_each_group(
    qkv: Tensor,
    seed: Tensor | None,
    p: float,
    task: Callable[[_Group, slice, slice, DropoutSeed | None], None],
) -> None:
    """task(group, batch, heads, draw) for all sequences and heads of qkv, on as many threads as
    torch has been given."""
    B, T, _, H, D = qkv.shape
    threads = torch.get_num_threads()
    parts = iter(_groups(B, T, H, threads))
    first = None if seed is None else int(seed)

    def work(_: int) -> None:
        with torch.inference_mode():  # a thread begins with gradients on
            for batch, heads in parts:
                g = (batch.stop - batch.start) * (heads.stop - heads.start)
                draw = None if first is None else DropoutSeed(first, batch.start * H + heads.start)
                task(_group(g, T, D, qkv.dtype, p), batch, heads, draw)

    if threads == 1:
        work(0)
    else:
        list(_pool(threads).map(work, range(threads)))


@torch.library.custom_op("gpt2::cpu_attention", mutates_args=())
def _forward(qkv: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """out (B, T, n_head, head_dim); seed () int64, None where p is 0."""
    B, T, _, H, D = qkv.shape
    out = qkv.new_empty(B, T, H, D)
    _for_each_group(
        qkv, seed, p, lambda group, b, h, draw: group.forward(qkv[b, :, :, h], draw, out[b, :, h])
    )
    return out


@_forward.register_fake
def _(qkv: Tensor, seed: Tensor | None, p: float) -> Tensor:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D)


@torch.library.custom_op("gpt2::cpu_attention_backward", mutates_args=())
def _backward(qkv: Tensor, seed: Tensor | None, p: float, grad: Tensor) -> Tensor:
    """The gradient of qkv, packed like it (B, T, 3, n_head, head_dim)."""
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _for_each_group(
        qkv,
        seed,
        p,
        lambda group, b, h, draw: group.backward(
            qkv[b, :, :, h], draw, grad[b, :, h], dqkv[b, :, :, h]
        ),
    )
    return dqkv


@_backward.register_fake
def _(qkv: Tensor, seed: Tensor | None, p: float, grad: Tensor) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    qkv, seed, ctx.p = inputs
    ctx.save_for_backward(qkv, seed)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    qkv, seed = ctx.saved_tensors
    return _backward(qkv, seed, ctx.p, grad), None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


def cpu_attention(qkv: Tensor, p: float = 0.0) -> Tensor:
    """Causal softmax attention, scores times 1 / sqrt(head_dim): qkv (B, T, 3, n_head, head_dim)
    packed q, k and v to (B, T, n_head, head_dim), contiguous; any strides, any floating-point
    dtype.

    A probability is dropped with probability `p`, rounded to a multiple of 2^-15, as the global
    generator says; the others are divided by what is kept. Under autocast the work is done in
    autocast's dtype, as by scaled_dot_product_attention.
    """
    if torch.is_autocast_enabled("cpu"):
        qkv = qkv.to(torch.get_autocast_dtype("cpu"))
    return _forward(qkv, torch.randint(2**62, ()) if p else None, p)
