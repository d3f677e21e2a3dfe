"""Several rows in one sequence of a batch. No row reads another, and each has its own positions, so
the loss of a row is the same as alone. What is saved is the padding of short rows."""

from __future__ import annotations

import numpy as np
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


def pack(lengths: np.ndarray, room: int, alone: int) -> tuple[list[list[int]], int]:
    """Which rows of a batch share a sequence, as indices into `lengths` (n,), and the length of the
    sequences. The longest row comes first, each goes into the first sequence that has room for it.

    alone: the length that unpacked rows are padded to. They stay alone if that computes no more
    tokens, so packing never needs more memory.
    """
    packs: list[list[int]] = []
    used: list[int] = []
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        place = next((n for n, tokens in enumerate(used) if tokens + length <= room), len(used))
        if place == len(used):
            packs.append([])
            used.append(0)
        packs[place].append(i)
        used[place] += length
    longest = min(-(-max(used) // 8) * 8, room)
    if len(packs) * longest < len(lengths) * alone:
        return packs, longest
    return [[i] for i in range(len(lengths))], alone
