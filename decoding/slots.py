"""A KV cache whose rows have lengths of their own, so that a text may join a batch or leave it at
any step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.cache import KVCache, fill_prefix
from model import GPT, Extend


class Slots:
    """Keys and values of up to `rows` texts, in the first slots of one batch. It is the Past of
    the next token of each text.

    A slot has room for the model's whole context. The memory is taken at once. On a CPU the
    system provides its pages when they are first written.
    """

    def __init__(self, model: GPT, rows: int):
        self.model = model
        config = model.config
        self.prefix = model.prefix.length if model.prefix is not None else 0
        self.capacity = config.block_size
        shape = (rows, config.n_head, self.capacity, config.n_embd // config.n_head)
        device = model.head_weight.device
        # Zeros: attention multiplies the masked values by 0, and 0 times NaN would be NaN.
        self.layers = [
            tuple(torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
            for _ in range(config.n_layer)
        ]
        self.lengths: list[int] = []  # positions filled of each text, the prefix included
        self._at = torch.empty(0)  # (rows,) the same on the device, while the model reads a token

    @property
    def length(self) -> int:
        """Positions filled of the longest text."""
        return max(self.lengths)

    def read(self, slot: int, tokens: Sequence[int]) -> None:
        """Make a slot hold these tokens (at most the context), and nothing else. A slot after the
        last one is added."""
        views = [(k[slot : slot + 1], v[slot : slot + 1]) for k, v in self.layers]
        cache = KVCache(self.model.config, 1, self.capacity, prefix=self.prefix, layers=views)
        fill_prefix(cache, self.model)
        if tokens:
            idx = torch.tensor([list(tokens)], device=self.model.head_weight.device)
            self.model.hidden(idx, past=cache)
        self.lengths[slot : slot + 1] = [cache.length]

    def copy(self, source: int, to: int) -> None:
        """Make the slot `to` hold what `source` holds."""
        length = self.lengths[source]
        for pair in self.layers:
            for t in pair:
                t[to, :, :length] = t[source, :, :length]
        self.lengths[to : to + 1] = [length]

    def remove(self, slot: int) -> None:
        """Remove a text. The text of the last slot moves to its place."""
        last = len(self.lengths) - 1
        if slot != last:
            self.copy(last, slot)
        self.lengths.pop()

    def next_states(self, tokens: Sequence[int]) -> Tensor:
        """Hidden states (B, n_embd) after the next token of each text, which the slots then
        hold."""
        device = self.model.head_weight.device
        self._at = torch.tensor(self.lengths, device=device)
        idx = torch.tensor(tokens, device=device)[:, None]
        return self.model.hidden(idx, past=self)[:, -1]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions (B, 1) of the next token of each text."""
        return self._at[:, None]

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """(B, 1, 1, length + 1) bool: each token attends to its own text and to itself. None if
        all texts are of one length."""
        if min(self.lengths) == self.length:
            return None
        key = torch.arange(self.length + 1, device=device)
        return (key <= self._at[:, None])[:, None, None]

    def extension(self, layer: int) -> Extend:
        """The function that one layer calls with its new keys and values."""
        return functools.partial(self.extend, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_head, 1, head_dim) to a layer. Returns the keys and values of all
        texts up to the longest one's end."""
        rows, end = len(self.lengths), self.length + 1
        index = torch.arange(rows, device=k.device)
        for t, new in zip(self.layers[layer], (k, v), strict=True):
            t[index, :, self._at] = new[:, :, 0]
        keys, values = self.layers[layer]
        return keys[:rows, :, :end], values[:rows, :, :end]

    def advance(self, T: int) -> None:
        """Count one more position of each text."""
        self.lengths = [length + 1 for length in self.lengths]
