"""Digests of parameters and batches in the log, by which `tools.verify` checks a run bit for bit.

A tensor's digest is the sum of its elements' bits times their positions, modulo 2**64. One flipped
bit changes it, and so does a swap of two different elements. It does not depend on the number of
ranks, which all hold every parameter, nor on padding rows, which are zero.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

BATCH = "batch"  # the amount of a step that holds the checksum of its batches
CHUNK = 1 << 22  # elements that are summed at once: bounds the memory for their int64 bits
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def position_sum(tensor: Tensor) -> Tensor:
    """The sum of an array's bits times their positions, counted from 1, an int64 scalar that
    wraps around. It is computed on the tensor's device."""
    flat = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), CHUNK):
        bits = flat[start : start + CHUNK].long()
        total += (bits * torch.arange(start + 1, start + len(bits) + 1, device=bits.device)).sum()
    return total


def start_digest(tensors: Mapping[str, Tensor]) -> Callable[[], str]:
    """Start to compute the digest of named tensors. The returned function waits for it: the first
    16 hex digits of a sha256 of the names and the tensors' sums."""
    named = sorted(tensors.items())
    sums = torch.stack([position_sum(tensor) for _, tensor in named])
    copied = None
    if sums.is_cuda:
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        host.copy_(sums, non_blocking=True)
        sums, copied = host, torch.cuda.Event()
        copied.record()

    def read() -> str:
        if copied is not None:
            copied.synchronize()
        pairs = zip((name for name, _ in named), sums.tolist(), strict=True)
        return hashlib.sha256(repr(list(pairs)).encode()).hexdigest()[:16]

    return read


def batch_checksum(batches: Iterable[Any], rank: int) -> float:
    """A checksum of one rank's batches of CPU tensors. Their sum over up to 2**20 / 2 ranks is
    exact in fp64, so it is exchanged together with the step's amounts."""
    checksum = 0
    for tensor in tree_leaves(list(batches)):
        if isinstance(tensor, Tensor):
            data = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1)
            checksum = zlib.crc32(data.numpy(), checksum)
    return float(checksum) * (rank + 1)
