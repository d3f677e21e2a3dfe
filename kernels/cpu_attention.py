"""Causal attention on a CPU by batched matrix products, for a group of heads and a block of queries
at a time.

PyTorch's flash attention loops over small tiles. On a CPU without AMX it multiplies them at a fifth
of the rate of PyTorch's batched bf16 product (on Zen 4: 35 of 200 GFLOP/s per thread). Here one
call multiplies a block of queries, for a whole group of heads, with all keys that the block may
see. Only the scores of one block are in memory at a time. Only q, k and v are saved for the
backward pass, which computes the scores and their softmax again. The gradient is packed; autograd
through scaled_dot_product_attention would compute dq, dk and dv separately and then join them. The
reference is `kernels.attention.attention_reference`.

Scores, softmax and the gradient of the probabilities are fp32: with the 8 bits of bf16, the
probability of a score of 10 would be off by 2%. Probabilities and the gradient of the scores are
rounded to the inputs' dtype for the other products, as in flash attention. Sums over blocks of
queries are fp32.

The trade-off: one of two products forward and two of five backward run at fp32's half rate. A block
of queries also computes scores above the diagonal, (T + rows) / 2T of the square instead of half.

Dropout acts on the probabilities. For each block of queries, several heads share one draw from a
generator with their own seed. The backward pass draws the same numbers again, so no mask is saved.

Each thread takes whole groups, and each product runs within one thread, so the number of threads
changes no bit of the result.
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

from config import GPTConfig, RunConfig
from kernels import dropout
from kernels._card import Card
from kernels._kernel import Example, Kernel, masks_documents
from kernels.attention import attention_reference, packed_example

# Tokens times heads in a group. Larger groups share the cost of a call among more heads, until the
# memory in use, 3 KB per token and head at head_dim 64, no longer fits the caches: here 18 MB per
# thread.
GROUP_TOKENS = 6144
# Probabilities that share one draw, whatever the groups. With fewer, calls take most of the time.
DRAWN_TOGETHER = 1 << 16


def _rows(T: int) -> int:
    """The number of queries in a block, as measured. More queries make products larger, but also
    the waste above the diagonal."""
    return min(T, 64 if T <= 512 else 128)


def is_faster(dtype: torch.dtype) -> bool:
    """Whether this is known to be faster on this CPU than scaled_dot_product_attention.

    The answer depends only on the CPU and on torch's build, and on no measurement at run time, so
    that a run resumed on a similar machine computes the same bits. It was measured on Zen 4, so it
    is True for bf16 and fp32 on a CPU with avx512_bf16. It is False with AMX, where flash attention
    multiplies bf16 in tiles, and on all other CPUs: nobody has compared the two there.
    """
    # MKL multiplies fp32 and oneDNN multiplies bf16.
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    cpu = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return libraries and cpu and dtype in (torch.bfloat16, torch.float32)


class DropoutSeed(NamedTuple):
    """Determines the dropout of a group. The heads of a group are consecutive: some heads of one
    sequence, or all heads of several."""

    seed: int
    head: int  # the group's first head, counted over all sequences


class _Block:
    """One block of queries of a group of heads, with the keys that any of them may see. All tensors
    are views into the group's memory."""

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
        """Write the block's rows of the group's output."""
        p = self._round(self._probabilities())
        self._draw(draw)
        torch.baddbmm(
            self.out, self._drop(p), self.narrow[2], beta=0, alpha=self.kept_scale, out=self.out
        )

    def backward(self, draw: DropoutSeed | None) -> None:
        """Overwrite the block's rows of the output with dq, and add the block's share to dk and
        dv."""
        q, k, _, grad = self.narrow
        _, _, wide_v, wide_grad = self.wide
        p = self._probabilities()
        self._draw(draw)
        # p is needed again without dropout, so dropout works on a copy.
        copy = self.dscores.copy_(p) if self.rounded is None and self.p else self._round(p)
        self._add_product(self.dv, self._drop(copy), grad, self.kept_scale)
        v = wide_v.transpose(1, 2)
        dp = self._drop(
            torch.baddbmm(
                self.dscores, wide_grad, v, beta=0, alpha=self.kept_scale, out=self.dscores
            )
        )
        # The softmax's gradient p (dp - rowsum(p dp)), in one pass. The forward pass need not save
        # the output's row sums for it.
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
        """Set `keep`, the mask of this block. The heads that share draws with the group's first and
        last head are drawn too, and left out of the mask."""
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
        """total += scale x a' b, summed in total's dtype."""
        a = a.transpose(1, 2)
        if self.part is None:
            total.baddbmm_(a, b, alpha=scale)
        else:
            total.add_(torch.baddbmm(self.part, a, b, beta=0, alpha=scale, out=self.part))


class _Group:
    """The working memory for g heads. Groups reuse it one after another, because new pages cost
    time."""

    def __init__(self, g: int, T: int, D: int, dtype: torch.dtype, p: float):
        self.p = p
        wide = torch.promote_types(dtype, torch.float32)
        rows = _rows(T)
        self.inputs = torch.empty(4, g, T, D, dtype=dtype)  # q, k, v and the output's gradient
        self.wide_inputs = self.inputs if dtype == wide else torch.empty(4, g, T, D, dtype=wide)
        self.out = torch.empty(g, T, D, dtype=dtype)
        self.dkv = torch.empty(2, g, T, D, dtype=wide)
        self.scores = torch.empty(2, g * rows * T, dtype=wide)  # scores and their gradient
        self.rounded = None if dtype == wide else torch.empty(g * rows * T, dtype=dtype)
        self.part = None if dtype == wide else torch.empty(g * T * D, dtype=dtype)
        self.above = torch.full((rows, rows), -torch.inf, dtype=wide).triu_(1)  # causal mask
        self.draws = torch.empty(
            g * dropout.random_words(rows * T) + DRAWN_TOGETHER // 2 if p else 0, dtype=torch.int64
        )
        self.generator = torch.Generator()
        self.blocks = [_Block(self, i, min(i + rows, T)) for i in range(0, T, rows)]

    def forward(self, qkv: Tensor, draw: DropoutSeed | None, out: Tensor) -> None:
        """Compute out (b, T, h, D) from qkv (b, T, 3, h, D)."""
        self._load(qkv, slice(0, 3))
        for block in self.blocks:
            block.forward(draw)
        _store(self.out[None], out.unsqueeze(2))

    def backward(self, qkv: Tensor, draw: DropoutSeed | None, grad: Tensor, dqkv: Tensor) -> None:
        """Compute dqkv (b, T, 3, h, D) from qkv and the output's gradient (b, T, h, D)."""
        self._load(qkv, slice(0, 3))
        self._load(grad.unsqueeze(2), slice(3, 4))
        self.dkv.zero_()
        for block in self.blocks:
            block.backward(draw)
        _store(self.out[None], dqkv[:, :, :1])
        _store(self.dkv, dqkv[:, :, 1:])

    def _load(self, x: Tensor, which: slice) -> None:
        """Copy x (b, T, n, h, D) into the n inputs `which`."""
        x = _heads_first(x)
        self.inputs[which].view(x.shape).copy_(x)
        if self.wide_inputs is not self.inputs:
            self.wide_inputs[which].copy_(self.inputs[which])


def _heads_first(x: Tensor) -> Tensor:
    """A view of (b, T, n, h, D) as (n, b, h, T, D)."""
    return x.permute(2, 0, 3, 1, 4)


def _store(x: Tensor, out: Tensor) -> None:
    """Copy x (n, b * h, T, D) into out (b, T, n, h, D), rounded to out's dtype."""
    out = _heads_first(out)
    out.copy_(x.view(out.shape))


def _even_slices(n: int, most: int) -> list[slice]:
    """Split range(n) into the fewest parts of at most `most`, as even as possible."""
    size = math.ceil(n / math.ceil(n / most))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _groups(B: int, T: int, H: int, threads: int) -> list[tuple[slice, slice]]:
    """The slices of sequences and heads of each group: some heads of one sequence, or all heads of
    several."""
    most = max(1, min(GROUP_TOKENS // T, B * H // threads))
    return list(itertools.product(_even_slices(B, max(1, most // H)), _even_slices(H, most)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of threads in which each torch operation uses a single thread."""
    all_here = threading.Barrier(threads)

    def start() -> None:
        # Creates this thread's own setting. Otherwise it would be created later and undo the next
        # line.
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "cpu_attention", start)
    list(pool.map(lambda _: all_here.wait(), range(threads)))
    torch.set_num_threads(threads)  # the pool's threads also changed the default of later threads
    return pool


_kept = threading.local()


def _group(*shape: Any) -> _Group:
    """This thread's memory for groups of a shape. One call has at most two shapes, and the next
    call probably has the same ones."""
    if not hasattr(_kept, "groups"):
        _kept.groups = functools.lru_cache(maxsize=2)(_Group)
    return _kept.groups(*shape)


def _for_each_group(
    qkv: Tensor,
    seed: Tensor | None,
    p: float,
    task: Callable[[_Group, slice, slice, DropoutSeed | None], None],
) -> None:
    """Call task(group, batch, heads, draw) for all groups of qkv, on torch's number of threads."""
    B, T, _, H, D = qkv.shape
    threads = torch.get_num_threads()
    parts = iter(_groups(B, T, H, threads))
    first = None if seed is None else int(seed)

    def work(_: int) -> None:
        with torch.inference_mode():  # a new thread starts with gradients enabled
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
    """out (B, T, n_head, head_dim). seed is () int64, or None if p is 0."""
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
    """Causal softmax(q k' / sqrt(head_dim)) v of packed qkv (B, T, 3, n_head, head_dim), with any
    strides and floating dtype. Returns (B, T, n_head, head_dim), contiguous.

    Each probability is dropped with probability `p`, rounded to a multiple of 2^-15. The others are
    divided by the share that is kept. The draws come from the global generator. Under autocast it
    computes in autocast's dtype, like scaled_dot_product_attention.
    """
    if torch.is_autocast_enabled("cpu"):
        qkv = qkv.to(torch.get_autocast_dtype("cpu"))
    return _forward(qkv, torch.randint(2**62, ()) if p else None, p)


def _without_segments(qkv: Tensor, segments: Tensor | None, dropout: float) -> Tensor:
    """Ignores the segments: here documents need a mask, and packed attention is never called with
    one."""
    return cpu_attention(qkv, dropout)


def _is_automatic(cfg: RunConfig) -> bool:
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    allowed = "attention-backend" not in cfg.without and not masks_documents(cfg)
    return allowed and is_faster(dtype)


def _refusal(cfg: RunConfig, card: Card | None) -> str | None:
    return "does not support --document-mask" if masks_documents(cfg) else None


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    qkv = packed_example(rows, config, **place)
    return Example((qkv,), attention_reference, cpu_attention, moved=4.0 * qkv.nbytes)


KERNEL = Kernel(
    "attention by batched products on a CPU",
    _example,
    lambda config: {"packed_attention": _without_segments},
    automatic=_is_automatic,
    refusal=_refusal,
    without="flash-attention",
    device="cpu",
)
