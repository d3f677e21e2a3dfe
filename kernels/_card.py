"""The properties of the GPU that decide which kernels fit. All code asks here, so that tests can
name any card."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Card(NamedTuple):
    """A GPU's name, compute capability, and the shared memory that one program may use.

    shared_memory is in bytes, with opt-in (CUDA C++ Programming Guide, technical specifications per
    compute capability).
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int

    @property
    def version(self) -> str:
        """The compute capability as NVIDIA writes it, such as 9.0."""
        return "{}.{}".format(*self.capability)


# Known cards, so that tests and the kernels' proof can ask about them without having one.
CARDS = {
    "T4": Card("Tesla T4", (7, 5), 64 << 10),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 163 << 10),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 99 << 10),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 99 << 10),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 227 << 10),
    "H200": Card("NVIDIA H200", (9, 0), 227 << 10),
    "B200": Card("NVIDIA B200", (10, 0), 227 << 10),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 99 << 10),
}


@functools.cache
def card(device: torch.device | str = "cuda") -> Card | None:
    """The card of a CUDA device (default: the current one), or None without a CUDA GPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_properties(device)
    return Card(gpu.name, (gpu.major, gpu.minor), gpu.shared_memory_per_block_optin)
