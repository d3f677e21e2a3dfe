"""Causal attention on packed q, k, v. The gradient is packed too, and documents need no mask.

Autograd through scaled_dot_product_attention computes dq, dk and dv separately and then joins them.
At 65,536 tokens of GPT-2's 2304 columns in bf16, joining reads and writes 0.6 GB more in every
layer. Here the backward pass writes directly where the next product reads. Documents are two
indices per token. Blocks of keys that no query of a block may see are skipped, forward and
backward, so smaller documents take less work.

The algorithm is flash attention 2 (Dao 2023): the (T, T) scores are computed block by block and
never stored. Memory traffic is q, k, v and the output, once each way, and the time goes into the
products and exponentials. The trade-off: the backward pass computes the scores twice, once for dq
and once for dk and dv. Summing dq across blocks of keys would need atomics, whose order, and with
it the last bits, changes from run to run. This costs 7 products where atomics need 5.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from config import ATTENTION_WIDTH, GPTConfig, RunConfig, head_dim
from kernels import _card
from kernels._card import CARDS, Card
from kernels._kernel import Example, Kernel, masks_documents
from kernels._triton import INTERPRETED, device_of, jit, tl, triton


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v with an explicit matrix of scores, as the baseline for the
    kernels.

    q is (B, n_head, T, head_dim), k and v are (B, n_head, keys, head_dim). Returns (B, n_head, T,
    head_dim). mask (..., T, keys) is True where a query may attend. Without a mask, a query attends
    to the keys up to its own position.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """PyTorch's fused attention, which never stores the scores; shapes as in
    `explicit_attention`."""
    # One new token sees all keys. The comparison comes first because the compiler makes it symbolic
    # for varying lengths, and the operation accepts only a bool.
    causal = q.shape[2] > 1 and mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
    )


def attention_backends(
    device: torch.device, dtype: torch.dtype, deterministic: bool = False, by_hardware: bool = True
) -> list[SDPBackend]:
    """PyTorch's attention backends in the order to try. `dtype` is the dtype of the products.

    With `by_hardware` the fastest backend for this device comes first, else flash attention.
    """
    if device.type == "cpu":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return [SDPBackend.MATH]
    half = dtype in (torch.bfloat16, torch.float16)
    major = torch.cuda.get_device_capability(device)[0]
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if half and major >= 8:
        backends.insert(0, SDPBackend.FLASH_ATTENTION)
    # Data-centre Hopper and Blackwell (9.0, 10.x). Elsewhere cuDNN's has not been shown to be
    # faster.
    if half and major in (9, 10) and by_hardware and not deterministic:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return backends


def attention_reference(qkv: Tensor, segments: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(head_dim)) v with an explicit (T, T) mask; shapes as in `attention`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_dim)
    mask = None
    if segments is not None:
        T = qkv.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=qkv.device).tril()
        mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]  # (B, 1, T, T)
    return explicit_attention(q, k, v, mask).transpose(1, 2).contiguous()


# Kernels. In all of them D is head_dim and WIDTH is the power of two that holds it. A block has M
# queries and N keys. Scores are in units of log 2, so that the exponential is the hardware's exp2.
# Masks are computed only in blocks where some query may not see some key, by a branch in a single
# loop. A separate loop for each kind of block would take 153 registers per thread for dq instead of
# 115, and one program would fit a multiprocessor instead of two.


@jit
def _load(base, first, stride, T, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Rows first to first + ROWS of a (T, D) matrix, as (ROWS, WIDTH), with zeros past its
    edges."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    # int64: 500,000 tokens of 4,800 columns overflow an int32
    block = base + tl.cast(first, tl.int64) * stride
    return tl.load(block + row * stride + column, mask=(first + row < T) & (column < D), other=0.0)


@jit
def _store(value, base, first, stride, T, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Write the (ROWS, WIDTH) block that `_load` reads, rounded to the memory's dtype."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    block = base + tl.cast(first, tl.int64) * stride
    value = value.to(base.dtype.element_ty)
    tl.store(block + row * stride + column, value, mask=(first + row < T) & (column < D))


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b, fp32. WIDEN is for the interpreter, whose bf16 product takes the bits for
    integers."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _forward_kernel(
    qkv,
    out,
    lse,
    starts,
    stride_b,
    stride_t,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """For one block of M queries of one head: the output, and log2(sum(exp2(score))) per query."""
    blocks = tl.cdiv(T, M)
    # The blocks with the most keys start first, so that none of them ends last.
    first = (blocks - 1 - tl.program_id(0) % blocks) * M
    b = tl.cast(tl.program_id(0) // blocks // H, tl.int64)
    h = tl.program_id(0) // blocks % H
    head = qkv + b * stride_b + h * D
    rows = first + tl.arange(0, M)
    begin = 0
    end = tl.minimum(first + M, T)
    if starts is not None:
        starts += b * T
        start = tl.load(starts + rows, mask=rows < T, other=0)
        begin = tl.load(starts + first) // N * N
        last_start = tl.load(starts + end - 1)

    q = _load(head, first, stride_t, T, D, WIDTH, M)
    acc = tl.zeros((M, WIDTH), tl.float32)
    top = tl.full((M,), -float("inf"), tl.float32)  # largest score so far
    total = tl.zeros((M,), tl.float32)  # sum of exponentials relative to top
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    for key in tl.range(begin, end, N):
        k = _load(head + H * D, key, stride_t, T, D, WIDTH, N)
        scores = _dot(q, tl.trans(k), None, PRECISION, WIDEN)  # (M, N)
        masked = key + N - 1 > first
        if starts is not None:
            masked = masked | (key < last_start)
        if masked:
            keys = key + tl.arange(0, N)
            seen = keys[None, :] <= rows[:, None]
            if starts is not None:
                seen = seen & (keys[None, :] >= start[:, None])
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        shift = new_top
        if starts is not None:  # before a query's document starts, -inf - -inf would be NaN
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(top - shift)
        top = new_top
        total = total * decay + tl.sum(p, 1)
        v = _load(head + 2 * H * D, key, stride_t, T, D, WIDTH, N)
        acc = _dot(p.to(v.dtype), v, acc * decay[:, None], PRECISION, WIDEN)
    _store(acc / total[:, None], out + (b * T * H + h) * D, first, H * D, T, D, WIDTH, M)
    tl.store(lse + (b * H + h) * T + rows, top + tl.log2(total), mask=rows < T)


@jit
def _dq_kernel(
    qkv,
    out,
    grad,
    lse,
    delta,
    dqkv,
    starts,
    stride_b,
    stride_t,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """For one block of M queries of one head: dq, and delta = rowsum(grad * out), which dk and dv
    also need."""
    blocks = tl.cdiv(T, M)
    first = (blocks - 1 - tl.program_id(0) % blocks) * M
    b = tl.cast(tl.program_id(0) // blocks // H, tl.int64)
    h = tl.program_id(0) // blocks % H
    head = qkv + b * stride_b + h * D
    rows = first + tl.arange(0, M)
    begin = 0
    end = tl.minimum(first + M, T)
    if starts is not None:
        starts += b * T
        start = tl.load(starts + rows, mask=rows < T, other=0)
        begin = tl.load(starts + first) // N * N
        last_start = tl.load(starts + end - 1)

    q = _load(head, first, stride_t, T, D, WIDTH, M)
    do = _load(grad + (b * T * H + h) * D, first, H * D, T, D, WIDTH, M)
    o = _load(out + (b * T * H + h) * D, first, H * D, T, D, WIDTH, M)
    row_delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + (b * H + h) * T + rows, row_delta, mask=rows < T)
    row_lse = tl.load(lse + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    dq = tl.zeros((M, WIDTH), tl.float32)
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    for key in tl.range(begin, end, N):
        k = _load(head + H * D, key, stride_t, T, D, WIDTH, N)
        v = _load(head + 2 * H * D, key, stride_t, T, D, WIDTH, N)
        # (M, N)
        p = tl.exp2(_dot(q, tl.trans(k), None, PRECISION, WIDEN) * scale - row_lse[:, None])
        masked = key + N - 1 > first
        if starts is not None:
            masked = masked | (key < last_start)
        if masked:
            keys = key + tl.arange(0, N)
            seen = keys[None, :] <= rows[:, None]
            if starts is not None:
                seen = seen & (keys[None, :] >= start[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (_dot(do, tl.trans(v), None, PRECISION, WIDEN) - row_delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq, PRECISION, WIDEN)
    _store(dq * D**-0.5, dqkv + (b * T * 3 * H + h) * D, first, 3 * H * D, T, D, WIDTH, M)


@jit
def _dk_dv_kernel(
    qkv,
    grad,
    lse,
    delta,
    dqkv,
    stops,
    stride_b,
    stride_t,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """For one block of N keys of one head: dk and dv. Scores are transposed, (N, M), because both
    products read them so."""
    blocks = tl.cdiv(T, N)
    first = tl.program_id(0) % blocks * N
    b = tl.cast(tl.program_id(0) // blocks // H, tl.int64)
    h = tl.program_id(0) // blocks % H
    head = qkv + b * stride_b + h * D
    grad += (b * T * H + h) * D
    lse += (b * H + h) * T
    delta += (b * H + h) * T
    keys = first + tl.arange(0, N)
    end = T
    if stops is not None:
        stops += b * T
        stop = tl.load(stops + keys, mask=keys < T, other=0)
        first_stop = tl.load(stops + first)
        end = tl.load(stops + tl.minimum(first + N, T) - 1)

    k = _load(head + H * D, first, stride_t, T, D, WIDTH, N)
    v = _load(head + 2 * H * D, first, stride_t, T, D, WIDTH, N)
    dk = tl.zeros((N, WIDTH), tl.float32)
    dv = tl.zeros((N, WIDTH), tl.float32)
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5
    for query in tl.range(first // M * M, end, M):
        rows = query + tl.arange(0, M)
        q = _load(head, query, stride_t, T, D, WIDTH, M)
        row_lse = tl.load(lse + rows, mask=rows < T, other=0.0)
        # (N, M)
        p = tl.exp2(_dot(k, tl.trans(q), None, PRECISION, WIDEN) * scale - row_lse[None, :])
        masked = query < first + N - 1
        if stops is not None:
            masked = masked | (query + M > first_stop)
        if masked:
            seen = keys[:, None] <= rows[None, :]
            if stops is not None:
                seen = seen & (rows[None, :] < stop[:, None])
            p = tl.where(seen, p, 0.0)
        # Queries past T need no mask: they load as zeros and add zeros to both products.
        do = _load(grad, query, H * D, T, D, WIDTH, M)
        dv = _dot(p.to(do.dtype), do, dv, PRECISION, WIDEN)
        row_delta = tl.load(delta + rows, mask=rows < T, other=0.0)
        ds = p * (_dot(v, tl.trans(do), None, PRECISION, WIDEN) - row_delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk, PRECISION, WIDEN)
    dqkv += (b * T * 3 * H + h) * D
    _store(dk * D**-0.5, dqkv + H * D, first, 3 * H * D, T, D, WIDTH, N)
    _store(dv, dqkv + 2 * H * D, first, 3 * H * D, T, D, WIDTH, N)


class Tile(NamedTuple):
    """The rows of the block that a program keeps, the rows of each block that it loops over, its
    warps, and the stages of the load pipeline."""

    kept: int
    walked: int
    warps: int
    stages: int


class KernelTiles(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dk_dv: Tile
    shared: int  # bytes of shared memory of the kernel that needs most


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Triton's matrix instruction, by major compute capability
TENSOR_CORES = {8: "mma.sync", 9: "wgmma", 10: "tcgen05", 12: "mma.sync"}

# The tiles to try, best first, by instruction, kind of product and largest head_dim.
# benchmarks/gpu_proof.py compiles them and proves that none spills more than 64 bytes per thread or
# takes more shared memory than stated here. A formula would have to guess which buffers Triton's
# allocator keeps at the same time.
# Hopper, half precision: four warps multiply 64 rows at a time and eight multiply 128, and a loop
# reads memory once for every 128 rows. At 64 columns two programs of the forward pass or of dq fit
# a multiprocessor (at most 121 registers per thread, 80 KB), so that one multiplies while the other
# takes exponentials. dk and dv are two sums, so only one program fits. With three stages, ptxas
# makes each product of the plain forward kernel wait for the one before it (its note C7515).
# tf32 tiles take twice the shared memory. Exact fp32 uses no matrix units. dk and dv loop over
# shorter blocks where longer ones spill: mma.sync holds operands in registers, and at 128 columns
# the two sums alone take half of Hopper's registers.
_LARGE = Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)
_TF32 = Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
_TF32_SHORT = Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)
_EXACT = Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)
_EXACT_WIDE = Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 8, 2)
TILES: dict[tuple[str, str, int], tuple[KernelTiles, ...]] = {
    ("wgmma", "half", 64): (KernelTiles(*_LARGE, 82_944),),
    ("wgmma", "half", 128): (
        KernelTiles(Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), 163_840),
    ),
    ("wgmma", "tf32", 64): (KernelTiles(*_TF32, 98_816),),
    ("wgmma", "tf32", 128): (KernelTiles(*_TF32, 196_608),),
    ("tcgen05", "half", 64): (KernelTiles(*_LARGE, 99_392),),
    ("tcgen05", "half", 128): (KernelTiles(*_LARGE, 197_696),),
    ("tcgen05", "tf32", 64): (KernelTiles(*_TF32, 131_624),),
    ("tcgen05", "tf32", 128): (KernelTiles(*_TF32_SHORT, 164_384),),
    ("mma.sync", "half", 64): (
        KernelTiles(Tile(128, 64, 8, 4), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), 81_920),
    ),
    ("mma.sync", "half", 128): (
        KernelTiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), 82_432),
    ),
    ("mma.sync", "tf32", 64): (KernelTiles(*_TF32_SHORT, 66_560),),
    ("mma.sync", "tf32", 128): (
        KernelTiles(*_TF32_SHORT, 123_136),
        KernelTiles(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), 86_272),
    ),
    **{(cores, "fp32", 64): (KernelTiles(*_EXACT, 37_120),) for cores in TENSOR_CORES.values()},
    **{
        (cores, "fp32", 128): (KernelTiles(*_EXACT_WIDE, 69_632),)
        for cores in TENSOR_CORES.values()
    },
}


def choose_tiles(card: Card | None, precision: str, head_dim: int) -> KernelTiles | str:
    """The tiles that fit `card`, or the reason why none fit, as the end of a sentence that begins
    with "attention". Launches and `kernels.choose` both ask here.

    `precision` is fp32 for exact products, tf32, or anything else for 16 bits. Without a card (in
    the interpreter) the tiles are an H100's.
    """
    if not 1 <= head_dim <= ATTENTION_WIDTH:
        return f"takes heads of width {ATTENTION_WIDTH} at most, and these are {head_dim} wide"
    card = card or CARDS["H100"]
    if card.capability < (8, 0):
        return (
            f"needs a GPU of compute capability 8.0 (Ampere) or newer, and {card.name} has "
            f"{card.version}"
        )
    if card.capability[0] not in TENSOR_CORES:
        return f"has no tiles for the compute capability of {card.name}, {card.version}"
    kind = precision if precision in ("fp32", "tf32") else "half"
    candidates = TILES[TENSOR_CORES[card.capability[0]], kind, 64 if head_dim <= 64 else 128]
    for candidate in candidates:
        if candidate.shared <= card.shared_memory:
            return candidate
    least = min(candidate.shared for candidate in candidates)
    return (
        f"needs {math.ceil(least / 1024)} KiB of shared memory for heads of {head_dim} in "
        f"{precision}, and {card.name} has {card.shared_memory // 1024}"
    )


def _tiles_for(qkv: Tensor, precision: str) -> KernelTiles:
    """The tiles for the GPU that holds qkv. Raises ValueError if the kernel cannot run there."""
    chosen = choose_tiles(_card.card(qkv.device), precision, qkv.shape[4])
    if isinstance(chosen, str):
        raise ValueError(f"attention {chosen}")
    return chosen


def _launch(kernel: Any, tile: str, kept_axis: str, qkv: Tensor, *tensors: Tensor | None) -> None:
    """Run a kernel with the field `tile` of KernelTiles. `kept_axis` is "M" if each program keeps a
    block of queries, and "N" if it keeps a block of keys."""
    B, T, _, H, D = qkv.shape
    exact = torch.get_float32_matmul_precision() == "highest"
    precision = NAMES.get(qkv.dtype, "fp32" if exact else "tf32")
    kept, walked, warps, stages = getattr(_tiles_for(qkv, precision), tile)
    with device_of(qkv):
        kernel[(B * H * triton.cdiv(T, kept),)](
            qkv,
            *tensors,
            qkv.stride(0),
            qkv.stride(1),
            T,
            H=H,
            D=D,
            WIDTH=max(16, triton.next_power_of_2(D)),  # a product's sides are at least 16
            M=kept if kept_axis == "M" else walked,
            N=kept if kept_axis == "N" else walked,
            PRECISION="ieee" if exact else "tf32",
            WIDEN=INTERPRETED and qkv.dtype == torch.bfloat16,
            num_warps=warps,
            num_stages=stages,
        )


def _packed(qkv: Tensor) -> Tensor:
    """qkv, copied unless each token's q, k and v are contiguous. The tokens themselves may have any
    stride."""
    H, D = qkv.shape[3:]
    return qkv if qkv.stride()[2:] == (H * D, D, 1) else qkv.contiguous()


@torch.library.custom_op("gpt2::attention", mutates_args=())
def _attention(qkv: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """out (B, T, n_head, head_dim), and log2(sum(exp2(score))) of each query, (B, n_head, T)
    fp32."""
    B, T, _, H, D = qkv.shape
    out = qkv.new_empty(B, T, H, D)
    lse = qkv.new_empty((B, H, T), dtype=torch.float32)
    starts = None if bounds is None else bounds[0]
    _launch(_forward_kernel, "forward", "M", _packed(qkv), out, lse, starts)
    return out, lse


@_attention.register_fake
def _(qkv: Tensor, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("gpt2::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, bounds: Tensor | None
) -> Tensor:
    """The gradient of qkv, packed like it: (B, T, 3, n_head, head_dim), contiguous."""
    qkv, grad = _packed(qkv), grad.contiguous()
    dqkv = qkv.new_empty(qkv.shape)
    delta = torch.empty_like(lse)
    starts, stops = (None, None) if bounds is None else bounds.unbind(0)
    _launch(_dq_kernel, "dq", "M", qkv, out, grad, lse, delta, dqkv, starts)
    _launch(_dk_dv_kernel, "dk_dv", "N", qkv, grad, lse, delta, dqkv, stops)
    return dqkv


@_attention_backward.register_fake
def _(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, bounds: Tensor | None) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    qkv, bounds = inputs
    ctx.save_for_backward(qkv, *output, bounds)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # allocates no zeros for the statistics' gradient


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None]:
    qkv, out, lse, bounds = ctx.saved_tensors
    return _attention_backward(grad, qkv, out, lse, bounds), None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _bounds(segments: Tensor) -> Tensor:
    """The first token, and one past the last, of each token's segment: (2, B, T) int32. The host
    does not wait for the device."""
    segments = segments.contiguous()
    return torch.stack(
        [
            torch.searchsorted(segments, segments, right=right, out_int32=True)
            for right in (False, True)
        ]
    )


def attention(qkv: Tensor, segments: Tensor | None = None) -> Tensor:
    """Causal softmax(q k' / sqrt(head_dim)) v of qkv (B, T, 3, n_head, head_dim), bf16, fp16 or
    fp32 with head_dim up to 128. Returns (B, T, n_head, head_dim), contiguous.

    With `segments` (B, T), integers that never decrease along T, a query attends only to keys of
    its own number. Under autocast it computes in autocast's dtype, like
    scaled_dot_product_attention. Sums and statistics are fp32. Products of fp32 are exact unless
    torch.set_float32_matmul_precision allows tf32. Raises ValueError for other widths, and for a
    GPU that no tiles fit.
    """
    if not 1 <= qkv.shape[4] <= ATTENTION_WIDTH:
        raise ValueError(
            f"head_dim is {qkv.shape[4]}; this kernel supports 1 to {ATTENTION_WIDTH}, use "
            "--kernels torch"
        )
    device = qkv.device.type
    if torch.is_autocast_enabled(device):
        qkv = qkv.to(torch.get_autocast_dtype(device))
    return _attention(qkv, None if segments is None else _bounds(segments))[0]


def _without_dropout(qkv: Tensor, segments: Tensor | None, dropout: float) -> Tensor:
    """Ignores the dropout, because a run with dropout is refused this kernel."""
    return attention(qkv, segments)


def _refusal(cfg: RunConfig, card: Card | None) -> str | None:
    if cfg.dropout:
        return "does not support dropout"
    chosen = choose_tiles(card or _card.card(), cfg.precision, head_dim(cfg))
    return chosen if isinstance(chosen, str) else None


def packed_example(rows: int, config: GPTConfig, **place: Any) -> Tensor:
    """qkv (B, T, 3, n_head, head_dim) of at least that many tokens, in whole sequences."""
    T, heads = config.block_size, config.n_head
    return torch.randn(-(-rows // T), T, 3, heads, config.n_embd // heads, **place)


def _example(rows: int, config: GPTConfig, **place: Any) -> Example:
    """Reads q, k and v and writes one tensor forward. Reads those four and the gradient and writes
    three backward."""
    qkv = packed_example(rows, config, **place)
    return Example((qkv,), attention_reference, attention, moved=4.0 * qkv.nbytes)


KERNEL = Kernel(
    "attention on packed q, k and v",
    _example,
    lambda config: {"packed_attention": _without_dropout, "masks_segments": True},
    automatic=masks_documents,  # PyTorch's own is faster where no document needs a mask
    refusal=_refusal,
    without="flash-attention",
)
