"""Estimates the memory and disk space of a run before it starts, and controls the CPU's heap.

The estimate runs one micro-batch forward and backward on fake tensors, which have shapes but no
bytes, and adds up the storages that are alive. It thus follows every change of the model's code.
The trade-off: it sees neither the scratch memory inside an operation, such as a matrix product's,
nor what torch.compile saves.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from base.machine import resident_bytes
from config import GPTConfig, RunConfig
from engine.precision import DTYPES, Cast, casts_once
from engine.task import Cost
from model import GPT

# DDP's default bucket size. Gradients are views of the buckets, and one more is in flight.
BUCKET_BYTES = 25 << 20
# A heap that keeps freed tensors holds this share of activations and logits in addition (measured).
HEAP_OVERHEAD = 0.2
# Buffers of a CPU's matrix products, and code pages that the first step loads.
SCRATCH_BYTES = 32 << 20
MMAP_BYTES = 1 << 20  # larger allocations are mapped one by one, and unmapped when freed


@dataclass
class Memory:
    """Bytes that one rank holds at the peak of a training step."""

    weights: int
    # few if a step is one micro-batch and the peak is in its forward pass
    gradients: int
    optimizer: int
    activations: int
    # of the head and its loss: a chunk of logits, and gradients kept for the backward pass
    logits: int
    other: int  # the process itself, communication, the checkpoint being written

    @property
    def total(self) -> int:
        """All of these bytes."""
        return sum(dataclasses.astuple(self))


def estimate(
    cost: Cost,
    cfg: RunConfig,
    micro_batch: int,
    device_type: str,
    world_size: int = 1,
    accumulate: bool = True,
    base: int | None = None,
) -> Memory:
    """Peak memory of a rank that trains on micro-batches of (micro_batch, cost.length) tokens.

    `accumulate`: a step has several micro-batches, so all gradients exist during a forward pass.
    `base`: bytes of the process before it builds a model. By default those of this process on the
    CPU, and 0 on other devices, whose memory they do not use.
    """
    live = _peak_by_part(cost, cfg.precision, cfg.without, micro_batch, accumulate)
    on_cpu = device_type == "cpu"
    state = optimizer_bytes(cost, cfg.optimizer, padded=True)
    other = base if base is not None else resident_bytes() if on_cpu else 0
    if on_cpu:
        other += SCRATCH_BYTES
    if on_cpu and keeps_freed_memory(cfg):
        other += int(HEAP_OVERHEAD * (live["activations"] + live["logits"]))
    # Saving copies the state and transposes matrices for the hub. A GPU's copy is on the host.
    if on_cpu and cfg.save_every:
        other += live["weights"] + state + _matrix_bytes(_meta(cost.shape))
    if world_size > 1:
        other += min(BUCKET_BYTES, live["weights"])
    return Memory(optimizer=state, other=other, **live)


def optimizer_bytes(cost: Cost, optimizer: str, padded: bool = False) -> int:
    """Bytes of the fp32 moments: two for each parameter, but one for the blocks' matrices with
    Muon. `padded`: with the vocabulary's padding, as in memory; without it, as in a checkpoint."""
    shape = cost.shape
    shape = dataclasses.replace(shape, padded_vocab=padded and shape.padded_vocab)
    model = _meta(shape, cost.added)
    one = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 2 * one - (_matrix_bytes(model) if optimizer == "muon" else 0)


def checkpoint_bytes(cost: Cost, optimizer: str, stored: Callable[[str], bool]) -> int:
    """Bytes of one checkpoint on disk: stored parameters twice, in the hub's or PEFT's layout and
    as fp32 master weights, and the moments."""
    model = _meta(dataclasses.replace(cost.shape, padded_vocab=False), cost.added)
    weights = sum(p.numel() for name, p in model.named_parameters() if stored(name))
    return 2 * 4 * weights + optimizer_bytes(cost, optimizer)


def keeps_freed_memory(cfg: RunConfig) -> bool:
    """Whether a CPU run keeps freed memory for later steps. Not with --recompute, which asks for
    little memory."""
    return not cfg.recompute and "kept-memory" not in cfg.without


def set_allocator(keep_freed: bool) -> None:
    """Tell glibc to keep freed tensors for the next step, or to return them to the system at once.

    By default glibc does something between: it returns tensors above 32 MiB, which are faulted in
    again in every step (a sixth of the time of a step at GPT-2's size), and keeps the others in a
    heap full of holes (a run with --recompute held 1.4 GB with 0.8 GB alive). Does nothing without
    glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h's numbers
    if keep_freed:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
    else:
        mallopt(mmap_threshold, MMAP_BYTES)


class Heap:
    """Returns free pages of a CPU process's heap to the system when it exceeds `limit` bytes.

    Keeping freed memory suits steps that all allocate the same sizes. If the lengths of batches
    differ, holes that no tensor fits into make the heap grow (to 5.0 GB after 700 steps of a model
    that needs 0.6).
    """

    every = 10  # steps between two checks

    def __init__(self, limit: float):
        self.limit = limit
        self.steps = 0

    def after_step(self) -> None:
        """Count a step, and at every tenth trim the heap if it is too large."""
        self.steps += 1
        if self.steps % self.every == 0 and resident_bytes() > self.limit:
            trim()


def trim() -> None:
    """Return all free pages of the heap to the system. Does nothing without glibc."""
    malloc_trim = (
        getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    )
    if malloc_trim is not None:
        malloc_trim(0)


def _matrix_bytes(model: GPT) -> int:
    """fp32 bytes of the blocks' matrices that train."""
    return 4 * sum(
        p.numel() for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad
    )


def _meta(config: GPTConfig, added: Callable[[GPT], object] | None = None) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
        if added:
            added(model)
    return model


class _Ledger(TorchDispatchMode):
    """Counts the bytes of live storages by part, and remembers the counts at the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "activations"  # where new storages are counted
        self.live = dict.fromkeys(("weights", "gradients", "activations", "logits"), 0)
        self.peak = dict(self.live)
        self.entries: dict[int, tuple[weakref.ref, str, int]] = {}  # by the storage's address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)
        return out

    def add(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage, or move it to `part` if it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.entries:
            if part is None:
                return
            self._drop(key)
        part, size = part or self.part, storage.nbytes()
        self.entries[key] = weakref.ref(storage, lambda _: self._drop(key)), part, size
        self.live[part] += size

    def _drop(self, key: int) -> None:
        _, part, size = self.entries.pop(key)
        self.live[part] -= size


def _peak_by_part(
    cost: Cost, precision: str, without: Collection[str], micro_batch: int, accumulate: bool
) -> dict[str, int]:
    """Bytes of each part at the peak of one micro-batch's forward and backward pass."""
    dtype, cast_once = DTYPES.get(precision), casts_once(precision, without)
    with FakeTensorMode(), _Ledger() as ledger:
        ledger.part = "weights"
        model = GPT(cost.shape)
        if cost.added:
            cost.added(model)
        run: nn.Module = _LossModule(model, cost.loss or _language_loss)
        run = Cast(run, dtype) if dtype and cast_once else run
        ledger.part = "gradients"
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if accumulate:
                parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.add(p.grad, "gradients"))
        ledger.part = "activations"
        idx = torch.zeros(micro_batch, cost.length, dtype=torch.int64)

        def at_head(*_: Any) -> None:
            ledger.part = "logits"

        model.transformer.ln_f.register_forward_hook(at_head)
        with torch.autocast("cpu", dtype, enabled=dtype is not None and not cast_once):
            objective = run(idx)
        ledger.part = "activations"
        objective.backward()
    return ledger.peak


class _LossModule(nn.Module):
    """A model with its loss as the forward pass."""

    def __init__(self, model: GPT, loss: Callable[[GPT, Tensor], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) to a scalar."""
        return self.loss(self.model, idx)


def _language_loss(model: GPT, idx: Tensor) -> Tensor:
    return model(idx, idx, reduction="sum")
