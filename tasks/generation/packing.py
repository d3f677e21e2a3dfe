"""Several rows in one sequence of a batch. No row reads another, and each has its own positions, so
the loss of a row is the same as alone. What is saved is the padding of short rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model import GPT, NoPast


class PackedPast(NoPast):
    """The Past of packed rows: `positions` (B, T) begin anew at each row."""

    def __init__(self, model: GPT, positions: Tensor):
        self.restarting, self.masks_segments = positions, model.ops.masks_segments

    def positions(self, T: int, device: torch.device) -> Tensor:
        """(B, T): the position of each token in its row."""
        return self.restarting

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """As NoPast. None if the attention kernel itself keeps segments apart."""
        return None if self.masks_segments else super().mask(T, segments, device)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which rows share a sequence of `room` tokens, as indices into `lengths`: the longest row
    first, each into the first sequence that has room for it."""
    packs: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((n for n, left in enumerate(free) if left >= lengths[i]), len(free))
        if place == len(free):
            packs.append([])
            free.append(room)
        packs[place].append(i)
        free[place] -= lengths[i]
    return packs
