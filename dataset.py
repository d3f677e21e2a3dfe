"""Training windows cut from token shards, in an order that depends only on (seed, position).

Shards are memory-mapped, so a corpus may be larger than memory. A window copies one slice of the
token stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.cache import digest
from storage.shards import Shard


class TokenDataset:
    """One stream of tokens over several shards, or a part of it.

    Shards are mapped when they are first read, and a pickle holds only their file names.
    """

    def __init__(
        self, shards: Sequence[Shard], identity: str, manifest: dict[str, Any] | None = None
    ):
        """`identity`: a hash of the shards' content. `manifest`: their manifest.json, if any."""
        manifest = manifest or {}
        self.shards = list(shards)
        self._ends = np.cumsum([shard.n_tokens for shard in shards])
        self._start = 0
        self.n_tokens = int(self._ends[-1])
        self.sha256 = identity
        self.vocab_size: int | None = manifest.get("vocab_size")
        records = {record["name"]: record for record in manifest.get("shards", [])}
        sizes = [records.get(shard.path.name, {}).get("bytes") for shard in shards]
        self.n_bytes: int | None = None if None in sizes else sum(sizes)
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def part(self, begin: int, end: int, n_bytes: int | None) -> TokenDataset:
        """The tokens from `begin` to `end`, which encode `n_bytes` of text (None: unknown)."""
        part = object.__new__(TokenDataset)
        part.__dict__ |= self.__getstate__()
        part._start, part.n_tokens, part.n_bytes = self._start + begin, end - begin, n_bytes
        part.sha256 = digest(self.sha256, begin, end)
        return part

    def n_windows(self, seq_len: int) -> int:
        """How many windows of seq_len + 1 tokens there are. Neighbours share one token: the last
        target of a window is the next one's first input. A window may span several shards."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def order(self, positions: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The ids (P,) int64 of the windows at these positions (P,) of a run."""
        return window_order(positions, self.n_windows(seq_len), seed)

    def windows(self, ids: np.ndarray, seq_len: int) -> np.ndarray:
        """Window ids (B,) to tokens (B, seq_len + 1) int64; window i begins at token i * seq_len.

        Raises IndexError for an id outside [0, n_windows(seq_len)).
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.n_windows(seq_len):
            raise IndexError(f"window ids must lie in [0, {self.n_windows(seq_len)})")
        out = np.empty((len(ids), seq_len + 1), np.int64)
        for row, id in zip(out, ids, strict=True):
            self._read(int(id) * seq_len, row)
        return out

    def count_bytes(self, lengths: np.ndarray) -> int:
        """Bytes of text that all tokens encode. lengths (vocab_size,): the bytes of each id."""
        total, buffer = 0, np.empty(1 << 20, np.int64)
        for begin in range(0, self.n_tokens, len(buffer)):
            part = buffer[: self.n_tokens - begin]
            self._read(begin, part)
            total += int(lengths[part].sum())
        return total

    def _read(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens that start at `begin`."""
        first, filled = self._start + begin, 0  # in the stream of all shards
        index = int(np.searchsorted(self._ends, first, side="right"))
        while filled < len(out):
            tokens = self._map(index)
            offset = first + filled - (int(self._ends[index]) - len(tokens))
            part = tokens[offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            index += 1

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            self._maps[index] = self.shards[index].map()
        return self._maps[index]


# ---- the order


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, uint64 to uint64: each input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_order(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The id of the window at each position of an endless shuffled stream.

    Epoch e covers positions e*n to e*n + n - 1, which hold a permutation of range(n).

    positions: (P,) non-negative integers. Returns (P,) int64, which depend only on (position, n,
    seed), in O(P) time and memory. A Feistel network keyed by (seed, epoch) permutes range(4**k),
    the smallest that has n values. Values outside range(n) are fed back until they fall inside
    (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    positions = np.asarray(positions, np.uint64)
    half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))
    seeds = _mix(np.full(1, seed % 2**64, np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    keys = _mix(seeds + positions // np.uint64(n))
    values = _feistel(positions % np.uint64(n), keys, half)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _feistel(values[outside], keys[outside], half)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64, rounds: int = 8) -> np.ndarray:
    """Apply to each value, a number of 2 * half bits, the permutation that its key selects.
    Everything is uint64; values, keys and the result are (P,)."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for i in range(rounds):
        step = np.uint64((i + 1) * 0x9E3779B97F4A7C15 % 2**64)
        left, right = right, left ^ (_mix(_mix(right + step) ^ keys) & mask)
    return (left << half) | right
