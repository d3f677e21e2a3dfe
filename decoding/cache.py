"""The KV cache: keys and values of all tokens that the model has read of a batch of texts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from config import GPTConfig
from model import GPT, Extend, causal_mask


class KVCache:
    """Keys and values of every layer for up to `capacity` positions, filled as the model reads
    tokens. It is the Past of the next tokens.

    `pad` (B,) counts the padding tokens at the left of each row. No token attends to them, and
    positions are counted after them. The `prefix` positions come before the padding.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        pad: Tensor | None = None,
        prefix: int = 0,
        layers: Sequence[tuple[Tensor, Tensor]] = (),
    ):
        self.shape = (batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.capacity = capacity
        self.length = 0  # positions filled
        self.pad = pad
        self.prefix = prefix
        # memory of each layer, taken when the layer first extends it unless it is given
        self.layers = list(layers)

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions of the next T tokens: (T,) or, with padding, (B, T)."""
        after = torch.arange(self.length, self.length + T, device=device)
        return after if self.pad is None else (after - self.pad[:, None]).clamp(min=self.prefix)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """The keys that each of T new tokens may attend to: (B, 1, T, length + T) bool, or None
        for plain causal attention."""
        if segments is None and self.pad is None and (self.length == 0 or T == 1):
            return None
        return self.without_padding(causal_mask(T, segments, device, self.length))

    def without_padding(self, mask: Tensor) -> Tensor:
        """`mask` (..., T, keys), with False where a key is padding."""
        if self.pad is None:
            return mask
        T, keys = mask.shape[-2:]
        key = torch.arange(keys, device=mask.device)
        query = key[keys - T :, None]
        real = (key < self.prefix) | (key >= self.prefix + self.pad[:, None])
        # A padding query attends to itself: the softmax of an empty row would be NaN.
        return mask & (real[:, None] | (key == query))[:, None]

    def extension(self, layer: int) -> Extend:
        """The function that one layer calls with its new keys and values: `extend`, bound to the
        layer."""
        return functools.partial(self.extend, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_head, T, head_dim) to a layer. Returns all of the layer's keys and
        values so far, (B, n_head, length + T, head_dim) each."""
        if layer == len(self.layers):
            self.layers.append((k.new_empty(self.shape), v.new_empty(self.shape)))
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        """Count T more positions as filled, after every layer has called `extend`."""
        self.length += T

    def keep(self, chosen: Tensor) -> None:
        """Keep one of the alternatives read for the next position of each row, `chosen` (B,), and
        count that position as filled."""
        rows = torch.arange(len(chosen), device=chosen.device)
        for t in (t for pair in self.layers for t in pair):
            t[:, :, self.length] = t[rows, :, self.length + chosen]
        self.length += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch; an index may appear more than once. If the number of rows
        does not change, only the rows that differ are copied."""
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
    """The Past of several candidates for a cache's next position: each attends to the cache and to
    itself. The cache counts the position only when `keep` chooses one of them."""

    def __init__(self, cache: KVCache):
        self.cache = cache

    @property
    def length(self) -> int:
        """Positions filled in the cache."""
        return self.cache.length

    def positions(self, T: int, device: torch.device) -> Tensor:
        """The one position of all candidates: (1,) or, with padding, (B, 1)."""
        return self.cache.positions(1, device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """The cache's keys and the candidate itself: (B or 1, 1, T, length + T) bool, or None for
        a single candidate without padding."""
        if self.cache.pad is None and T == 1:
            return None
        key = torch.arange(self.length + T, device=device)
        mask = (key < self.length) | (key == key[self.length :, None])
        return self.cache.without_padding(mask[None, None])

    def extension(self, layer: int) -> Extend:
        """As `KVCache.extension`: the candidates are written past the filled positions."""
        return self.cache.extension(layer)

    def advance(self, T: int) -> None:
        """Do nothing: `KVCache.keep` counts the position."""


def new_cache(
    model: GPT, batch: int, tokens: int, pad: Tensor | None = None, alternatives: int = 1
) -> KVCache:
    """A cache for up to `tokens` (at most `model.context`) of each row of a batch. It holds the
    model's prefix, if there is one, and nothing else.

    `alternatives` is the number of tokens that may be read for one position.
    """
    capacity = min(model.context, tokens) + alternatives - 1
    if model.prefix is None:
        return KVCache(model.config, batch, capacity, pad)
    prefix = model.prefix.length
    cache = KVCache(model.config, batch, prefix + capacity, pad, prefix)
    fill_prefix(cache, model)
    return cache


def fill_prefix(cache: KVCache, model: GPT) -> None:
    """Write the model's prefix, if there is one, into an empty cache."""
    if model.prefix is None:
        return
    for layer, (k, v) in enumerate(model.prefix.layers(model)):
        rows = (t.expand(cache.shape[0], -1, -1, -1).to(model.dtype) for t in (k, v))
        cache.extend(layer, *rows)
    cache.advance(model.prefix.length)
