"""The KV cache: keys and values of what a batch of texts has shown the model so far."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from config import GPTConfig
from model import GPT, Extend, causal_mask


class KVCache:
    """Keys and values of every layer for up to `capacity` positions, filled as the model reads
    tokens. It is the Past of the tokens that come next.

    `pad` (B,) counts the padding tokens at the left of each row: they are never attended to, and
    positions begin after them. A prefix stands before the padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        pad: Tensor | None = None,
        prefix: int = 0,
    ):
        self.shape = (batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.capacity = capacity
        self.length = 0  # positions filled
        self.pad = pad
        self.prefix = prefix  # positions that come before the padding
        self.layers: list[tuple[Tensor, Tensor]] = []

    def positions(self, T: int, device: torch.device) -> Tensor:
        """(T,) or, with padding, (B, T)."""
        after = torch.arange(self.length, self.length + T, device=device)
        return after if self.pad is None else (after - self.pad[:, None]).clamp(min=self.prefix)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """Where each of T new tokens may look: (B, 1, T, length + T), or None for plain causal."""
        if segments is None and self.pad is None and (self.length == 0 or T == 1):
            return None
        return self.without_padding(causal_mask(T, segments, device, self.length))

    def without_padding(self, mask: Tensor) -> Tensor:
        """A mask (..., T, keys) with False for the keys that are padding."""
        if self.pad is None:
            return mask
        T, keys = mask.shape[-2:]
        key = torch.arange(keys, device=mask.device)
        query = key[keys - T :, None]
        real = (key < self.prefix) | (key >= self.prefix + self.pad[:, None])
        # A padding query looks at itself: a row of nothing would be NaN.
        return mask & (real[:, None] | (key == query))[:, None]

    def extension(self, layer: int) -> Extend:
        """`extend` of one layer."""
        return functools.partial(self.extend, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_head, T, head_dim) to a layer; returns all of its keys and values so
        far."""
        if layer == len(self.layers):
            self.layers.append((k.new_empty(self.shape), v.new_empty(self.shape)))
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        self.length += T

    def keep(self, chosen: Tensor) -> None:
        """Of the alternatives that were read, keep one of each row, `chosen` (B,): one position
        more is filled."""
        rows = torch.arange(len(chosen), device=chosen.device)
        for t in (t for pair in self.layers for t in pair):
            t[:, :, self.length] = t[rows, :, self.length + chosen]
        self.length += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows of the batch; where their number stays, only those that
        change are copied."""
        to = [i for i, row in enumerate(rows) if len(rows) != self.shape[0] or row != i]
        if not to:
            return
        self.shape = (len(rows), *self.shape[1:])
        index = torch.tensor([to, [rows[i] for i in to]], device=self.layers[0][0].device)
        self.layers = [(self._select(k, *index), self._select(v, *index)) for k, v in self.layers]
        if self.pad is not None:
            self.pad = self.pad[list(rows)]

    def _select(self, t: Tensor, to: Tensor, source: Tensor) -> Tensor:
        new = t if t.shape == self.shape else t.new_empty(self.shape)
        filled = slice(self.length)
        new[:, :, filled].index_copy_(0, to, t[:, :, filled].index_select(0, source))
        return new


class Alternatives:
    """The Past of tokens that all stand at a cache's one next position: each sees what the cache
    holds and itself. The cache then waits for `keep` to say which token it was."""

    def __init__(self, cache: KVCache):
        self.cache = cache

    @property
    def length(self) -> int:
        return self.cache.length

    def positions(self, T: int, device: torch.device) -> Tensor:
        """(1,) or, with padding, (B, 1)."""
        return self.cache.positions(1, device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, length + T)."""
        if self.cache.pad is None and T == 1:
            return None
        key = torch.arange(self.length + T, device=device)
        mask = (key < self.length) | (key == key[self.length :, None])
        return self.cache.without_padding(mask[None, None])

    def extension(self, layer: int) -> Extend:
        return self.cache.extension(layer)

    def advance(self, T: int) -> None:
        pass


def new_cache(
    model: GPT, batch: int, tokens: int, pad: Tensor | None = None, alternatives: int = 1
) -> KVCache:
    """An empty cache for up to `tokens` (at most `model.context`) of each row of a batch, after the
    prefix if any.

    `alternatives`: how many tokens may be read for one position.
    """
    capacity = min(model.context, tokens) + alternatives - 1
    if model.prefix is None:
        return KVCache(model.config, batch, capacity, pad)
    length = model.prefix.length
    cache = KVCache(model.config, batch, length + capacity, pad, length)
    for layer, (k, v) in enumerate(model.prefix.layers(model)):
        cache.extend(layer, *(t.expand(batch, -1, -1, -1).to(model.dtype) for t in (k, v)))
    cache.advance(length)
    return cache
