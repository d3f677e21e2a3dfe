"""AdamW over all parameters in one pass, and the gradient norm for clipping in another.

With separate operations the end of a step moves 46 bytes per parameter. The norm reads the
gradients (4), clipping reads and writes them (8), and the update reads weight, gradient and two
moments and writes three of them (28). A bf16 copy of the weights costs 6 more. Here the update also
applies the clip factor and writes the copy: 4 + 30 bytes, and 2 + 28 with bf16 gradients.

One launch covers all tensors, because a launch for each would cost more than the work on most of
GPT-2's vectors. Each program looks up in tables on the device which 2048 elements of which tensor
it updates. A smaller launch before it, one program per 128 tensors, counts each tensor's steps,
because all blocks of the tensor depend on the count.

The trade-off: tensors are reached through raw addresses, so a `Table` is valid only while its
tensors stay where they are. No operator is registered with torch.library: this runs between
compiled graphs, never inside one, and a plain launch is simpler. Gradients are freed and allocated
again every step, so their addresses are uploaded every time: 16 bytes per tensor for the update
(2.4 kB for GPT-2 124M) and 24 for the norm. They go through pinned memory, which torch's allocator
does not reuse before the copy is done. Everything else is uploaded once: 64 bytes per tensor and 8
per program (0.5 MB).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._kernel import Kernel
from kernels._triton import device_of, jit, tl, triton

# 2048 elements per program are 16 per thread: four 16-byte loads of each of four tensors are in
# flight, 32 kB. At 123 registers (compiled for sm_90) four programs share a multiprocessor, so that
# some stream data while others look up addresses.
UPDATE_BLOCK, UPDATE_WARPS = 2048, 4
# The norm reads only one tensor: the same bytes in flight need larger blocks.
NORM_BLOCK, NORM_WARPS = 8192, 8
LANES = 128  # tensors per program of _prepare_kernel
GRADIENTS = (torch.float32, torch.bfloat16)


@dataclass(eq=False)
class Table:
    """Tensors that AdamW updates together. Entry i of every list belongs to parameter i.

    params, exp_avgs and exp_avg_sqs are fp32. copies are bf16 copies that the forward pass reads,
    or None. All four have one shape and one order of elements in memory, without gaps. steps are
    fp32 scalars. The moments and steps are the state of torch.optim.AdamW(fused=True), updated in
    place. Make a new table whenever a tensor is replaced. Raises ValueError if tensors do not fit.
    """

    params: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    copies: Sequence[Tensor | None]
    lr_scales: Sequence[float]
    weight_decays: Sequence[float]

    def __post_init__(self) -> None:
        lists = vars(self).values()
        if not self.params or {len(entries) for entries in lists} != {len(self.params)}:
            raise ValueError(
                f"lists have {[len(e) for e in lists]} entries; pass one entry per parameter in "
                "each"
            )
        for param, exp_avg, exp_avg_sq, step, copy in zip(
            self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, self.copies
        ):
            if not _is_dense(param):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is not dense: strides "
                    f"{param.stride()}; pass a contiguous one"
                )
            for tensor in (param, exp_avg, exp_avg_sq):
                _check(tensor, param, torch.float32)
            _check(step, self.params[0].new_empty(()), torch.float32)
            if copy is not None:
                _check(copy, param, torch.bfloat16)
        self.device = self.params[0].device
        tensors = self.params, self.exp_avgs, self.exp_avg_sqs, self.copies, self.steps
        rows = [[0 if t is None else t.data_ptr() for t in row] for row in tensors]
        self.addresses = rows[0]  # the parameters', to notice one that has moved
        self.sizes = tuple(p.numel() for p in self.params)
        # (6, n) int64: five rows of addresses, then the sizes
        self.columns = _upload([*rows, self.sizes], torch.int64, self.device)
        # (2, n) fp64: rate scales and weight decays
        self.scales = _upload([self.lr_scales, self.weight_decays], torch.float64, self.device)
        # (3, n) fp32, written by _prepare_kernel: decay, step size and the root's factor
        self.scalars = torch.empty(3, len(self.params), device=self.device)
        self.written = [*self.params, *(copy for copy in self.copies if copy is not None)]


def adamw_reference(
    table: Table,
    grads: Sequence[Tensor | None],
    lr: Tensor,
    factor: Tensor,
    ok: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) as torch defines it, with the gradients
    multiplied by `factor`. Arguments as for `adamw`."""
    beta1, beta2 = betas
    with torch.no_grad():
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            p, m, v, step = table.params[i], table.exp_avgs[i], table.exp_avg_sqs[i], table.steps[i]
            t = (step + 1).double()
            rate = lr.double() * table.lr_scales[i]
            g = grad.float() * factor
            m_new = beta1 * m + (1 - beta1) * g
            v_new = beta2 * v + (1 - beta2) * g * g
            denominator = v_new.sqrt() / (1 - beta2**t).sqrt() + eps
            p_new = (
                p - rate * table.weight_decays[i] * p - rate / (1 - beta1**t) * m_new / denominator
            )
            for old, new in ((p, p_new), (m, m_new), (v, v_new), (step, step + 1)):
                old.copy_(torch.where(ok, new, old))
            copy = table.copies[i]
            if copy is not None:
                copy.copy_(torch.where(ok, p, copy))


@jit
def _prepare_kernel(
    columns, gradients, scales, scalars, lr, ok, n,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Count the step of every tensor that has a gradient, and compute in fp64 the scalars that its
    blocks share."""
    i = tl.program_id(0) * LANES + tl.arange(0, LANES)
    real = i < n
    live = real & (tl.load(gradients + n + i, real, other=0) > 0)
    address = tl.load(columns + 4 * n + i, live, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(address, live, other=0.0) + 1
    tl.store(address, step, live & tl.load(ok))
    t = step.to(tl.float64)
    rate = tl.load(lr).to(tl.float64) * tl.load(scales + i, real, other=0.0)
    decay = rate * tl.load(scales + n + i, real, other=0.0)
    tl.store(scalars + i, decay.to(tl.float32), real)
    tl.store(scalars + n + i, (rate / (1 - tl.exp2(t * LOG_BETA1))).to(tl.float32), real)
    tl.store(scalars + 2 * n + i, (1 / tl.sqrt(1 - tl.exp2(t * LOG_BETA2))).to(tl.float32), real)


@jit
def _pointers(address, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements at `offsets`. With `ALIGNED` the address is promised to be a multiple of
    16, so that Triton moves four elements at once.

    bf16 also moves four, though eight would fit. All tensors are then spread over the threads in
    the same way, and no value has to pass between threads through shared memory.
    """
    first = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        first = tl.multiple_of(first, 4 * DTYPE.primitive_bitwidth // 8)
    return first + offsets


@jit
def _load(address, mask, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return tl.load(_pointers(address, offsets, DTYPE, ALIGNED), mask, other=0)


@jit
def _store(address, values, mask, offsets, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    tl.store(_pointers(address, offsets, DTYPE, ALIGNED), values, mask)


@jit
def _load_gradient(address, itemsize, mask, offsets, ALIGNED: tl.constexpr):
    """fp32 values of an fp32 or bf16 tensor. A bf16 number is the upper half of an fp32 number."""
    if itemsize == 2:
        bits = _load(address, mask, offsets, tl.int16, ALIGNED).to(tl.int32) << 16
        values = bits.to(tl.float32, bitcast=True)
    else:
        values = _load(address, mask, offsets, tl.float32, ALIGNED)
    return values


@jit
def _bf16_bits(x):
    """The bits of x rounded to the nearest bf16, ties to even, as torch rounds. Triton's
    interpreter would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # NaN apart: the carry could turn its bits into -0
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@jit
def _update_block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    itemsize,
    count,
    decay,
    step_size,
    root,
    factor,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Update the first `count` elements at these addresses, at most BLOCK."""
    offsets = tl.arange(0, BLOCK)
    mask = offsets < count
    g = _load_gradient(grad, itemsize, mask, offsets, ALIGNED) * factor
    p = _load(param, mask, offsets, tl.float32, ALIGNED)
    m = BETA1 * _load(exp_avg, mask, offsets, tl.float32, ALIGNED) + (1 - BETA1) * g
    v = BETA2 * _load(exp_avg_sq, mask, offsets, tl.float32, ALIGNED) + (1 - BETA2) * g * g
    # Not p * (1 - decay): a small decay would lose its digits in 1 - decay.
    p -= decay * p
    p -= step_size * m / (tl.sqrt(v) * root + EPS)
    _store(param, p, mask, offsets, tl.float32, ALIGNED)
    _store(exp_avg, m, mask, offsets, tl.float32, ALIGNED)
    _store(exp_avg_sq, v, mask, offsets, tl.float32, ALIGNED)
    if copy != 0:
        _store(copy, _bf16_bits(p), mask, offsets, tl.int16, ALIGNED)


@jit
def _update_kernel(
    columns, gradients, scalars, blocks, factor, ok, n,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.load(blocks + 2 * tl.program_id(0))
    start = tl.load(blocks + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    itemsize = tl.load(gradients + n + i)
    if (itemsize > 0) & tl.load(ok):
        param = tl.load(columns + i) + 4 * start
        exp_avg = tl.load(columns + n + i) + 4 * start
        exp_avg_sq = tl.load(columns + 2 * n + i) + 4 * start
        copy = tl.load(columns + 3 * n + i)
        copy += tl.where(copy != 0, 2 * start, 0)
        grad = tl.load(gradients + i) + itemsize * start
        left = tl.load(columns + 5 * n + i) - start
        decay, step_size, root = (
            tl.load(scalars + i),
            tl.load(scalars + n + i),
            tl.load(scalars + 2 * n + i),
        )
        f = tl.load(factor)
        if (left >= BLOCK) & ((param | grad | exp_avg | exp_avg_sq | copy) % 16 == 0):
            _update_block(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                copy,
                itemsize,
                BLOCK,
                decay,
                step_size,
                root,
                f,
                BETA1,
                BETA2,
                EPS,
                BLOCK,
                ALIGNED=True,
            )
        else:
            _update_block(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                copy,
                itemsize,
                left,
                decay,
                step_size,
                root,
                f,
                BETA1,
                BETA2,
                EPS,
                BLOCK,
                ALIGNED=False,
            )


@jit
def _squares_kernel(tensors, blocks, partial, n, BLOCK: tl.constexpr):
    """partial[program] = the sum of squares of one block. tensors (3, n) holds addresses, bytes per
    element and sizes."""
    program = tl.program_id(0)
    i = tl.load(blocks + 2 * program)
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    itemsize = tl.load(tensors + n + i)
    address = tl.load(tensors + i) + itemsize * start
    left = tl.load(tensors + 2 * n + i) - start
    offsets = tl.arange(0, BLOCK)
    if (left >= BLOCK) & (address % 16 == 0):
        x = _load_gradient(address, itemsize, offsets < BLOCK, offsets, ALIGNED=True)
    else:
        x = _load_gradient(address, itemsize, offsets < left, offsets, ALIGNED=False)
    tl.store(partial + program, tl.sum(x * x))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps, in any order."""
    return (
        tensor.is_contiguous()
        or torch.empty_like(tensor, device="meta").stride() == tensor.stride()
    )


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors of one shape store their elements in the same order. Two contiguous
    ones do, even if the strides of a dimension of size 1 differ."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _check(tensor: Tensor, like: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless a kernel that visits both tensors in memory order would pair their
    elements."""
    if tensor.shape != like.shape or not _same_order(tensor, like):
        raise ValueError(
            f"shapes {list(tensor.shape)} and {list(like.shape)} or their strides differ; they "
            "must be equal"
        )
    if tensor.device != like.device or tensor.dtype not in dtypes:
        raise ValueError(
            f"a tensor is {tensor.dtype} on {tensor.device}; it must be {dtypes[0]} on "
            f"{like.device}"
        )


def _laid_out_like(grad: Tensor, param: Tensor) -> Tensor:
    if grad.shape == param.shape and not _same_order(grad, param):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad.detach())
    _check(grad, param, *GRADIENTS)
    return grad


def _upload(values: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on the device. The host does not wait for the copy."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )


@functools.lru_cache(maxsize=16)
def _blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """The tensor and the block of it for each program: (programs, 2) int32, or (0,) without
    programs."""
    pairs = [(i, b) for i, size in enumerate(sizes) for b in range(triton.cdiv(size, block))]
    return _upload(pairs, torch.int32, device)


def adamw(
    table: Table,
    grads: Sequence[Tensor | None],
    lr: Tensor,
    factor: Tensor,
    ok: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One step of torch.optim.AdamW on every parameter of `table` that has a gradient, and on its
    bf16 copy.

    grads are fp32 or bf16 in their parameter's shape, or None. A gradient with another order of
    elements is copied first. lr (), fp32, factor (), fp32, and ok (), bool, are on the device.
    factor multiplies the gradients. If ok is False, nothing changes, not even the steps. The host
    does not wait for the device. Raises ValueError if tensors do not fit or a parameter has moved.
    """
    if [p.data_ptr() for p in table.params] != table.addresses:
        raise ValueError("a parameter has moved since its table was made; make a new Table")
    laid = [
        None if g is None else _laid_out_like(g, p)
        for g, p in zip(grads, table.params, strict=True)
    ]
    blocks = _blocks(table.sizes, UPDATE_BLOCK, table.device)
    n = len(laid)
    logs = [math.log2(beta or sys.float_info.min) for beta in betas]
    rows = [
        [0 if g is None else g.data_ptr() for g in laid],
        [0 if g is None else g.itemsize for g in laid],
    ]
    gradients = _upload(rows, torch.int64, table.device)
    with device_of(lr):
        _prepare_kernel[(triton.cdiv(n, LANES),)](
            table.columns,
            gradients,
            table.scales,
            table.scalars,
            lr,
            ok,
            n,
            *logs,
            LANES,
            num_warps=LANES // 32,
        )
        _update_kernel[(len(blocks),)](
            table.columns, gradients, table.scalars, blocks, factor, ok, n,
            *betas, eps, UPDATE_BLOCK, num_warps=UPDATE_WARPS
        )  # fmt: skip
    # Autograd then refuses a backward pass through a graph that saved the old values.
    torch.autograd.graph.increment_version(table.written)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The l2 norm of all elements of fp32 and bf16 tensors together, () fp32; 0 without tensors.

    Squares are summed in fp32, so the result is inf from about 1.8e19 on, as with
    torch.nn.utils.get_total_norm. It repeats bit for bit. Raises ValueError for other dtypes or
    several devices.
    """
    if not tensors:
        return torch.zeros(())
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device or tensor.dtype not in GRADIENTS:
            raise ValueError(
                f"a tensor is {tensor.dtype} on {tensor.device}; all must be fp32 or bf16 on "
                f"{device}"
            )
    dense = [t if _is_dense(t) else t.contiguous() for t in tensors]
    rows = [[t.data_ptr() for t in dense], [t.itemsize for t in dense], [t.numel() for t in dense]]
    table = _upload(rows, torch.int64, device)
    blocks = _blocks(tuple(rows[2]), NORM_BLOCK, device)
    partial = torch.empty(len(blocks), device=device)
    with device_of(table):
        _squares_kernel[(len(blocks),)](
            table, blocks, partial, len(dense), NORM_BLOCK, num_warps=NORM_WARPS
        )
    return partial.sum().sqrt()


KERNEL = Kernel("all of AdamW in one launch", without="fused-adamw")
