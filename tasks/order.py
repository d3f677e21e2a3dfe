"""Rows to the batches of each step: rows of like length together, padded to few fixed lengths.

The order is pure in (seed, step); that rows of like length meet costs some of its randomness, and
saves padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from config import UserError
from dataset import window_order

POOL = 64  # batches whose rows are sorted together


class Order:
    """Which rows each training step sees; every row once in an epoch.

    An epoch is a random permutation of the rows. Pools of it are sorted by length and cut into
    batches, and the batches of all pools are shuffled. The last n mod batch_size rows of the
    permutation make a smaller batch, the epoch's last: none is left out and none comes twice.

    Rows come in groups that are never split. Where n is not divisible by `group`, the last n mod
    group rows of the permutation are one shorter group, in a batch of its own at the end.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, group: int = 1):
        """lengths: (n,) tokens of each row. Raises UserError where a batch is no whole number of
        groups."""
        if batch_size % group:
            more = math.ceil(batch_size / group) * group
            raise UserError(
                f"--batch-size {batch_size} is no multiple of groups of {group} rows; use {more}"
            )
        self.lengths, self.batch_size, self.seed, self.group = (
            np.asarray(lengths),
            batch_size,
            seed,
            group,
        )
        n = len(self.lengths)
        # rows in whole batches, in whole groups
        self._even, self._grouped = (n - n % batch_size, n - n % group)
        self.steps_per_epoch = math.ceil(self._grouped / batch_size) + (self._grouped < n)
        self._known: tuple[int, list[np.ndarray]] = -1, []

    def __call__(self, step: int) -> np.ndarray:
        """Ids of the global batch of a 0-based step, (groups, rows of a group) int64."""
        epoch, at = divmod(step, self.steps_per_epoch)
        number, batches = self._known
        if number != epoch:
            batches = self.epoch(epoch)
            self._known = epoch, batches
        return batches[at]

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of a 0-based epoch."""
        n, size = len(self.lengths), self.batch_size
        shuffled = window_order(epoch * n + np.arange(n), n, self.seed)
        batches = []
        for begin in range(0, self._even, POOL * size):
            pool = self._sorted(shuffled[begin : min(begin + POOL * size, self._even)])
            batches += list(pool.reshape(-1, size // self.group, self.group))
        if batches:
            places = window_order(
                epoch * len(batches) + np.arange(len(batches)), len(batches), self.seed + 1
            )
            batches = [batches[place] for place in places]
        if self._even < self._grouped:
            batches.append(
                self._sorted(shuffled[self._even : self._grouped]).reshape(-1, self.group)
            )
        if self._grouped < n:
            batches.append(shuffled[None, self._grouped :])
        return batches

    def _sorted(self, ids: np.ndarray) -> np.ndarray:
        return ids[np.argsort(self.lengths[ids], kind="stable")]


class InterleavedOrder:
    """Which rows each step sees where several tasks train at once, each step those of one task.

    In an epoch the first task gives all of its batches; each of the others as many as it has, and
    never more than that, goes on in the next where it ended, and has its places by the seed.
    """

    def __init__(
        self, lengths: np.ndarray, tasks: np.ndarray, batch_size: int, seed: int, group: int = 1
    ):
        """lengths, tasks: (n,) tokens of each row and the number of its task, the rows of a task
        one after another."""
        self.seed = seed
        self.orders: list[Order] = []
        self.offsets: list[int] = []
        for task in range(int(tasks.max()) + 1):
            ids = np.flatnonzero(tasks == task)
            self.offsets.append(int(ids[0]))
            self.orders.append(Order(lengths[ids], batch_size, seed + task, group))
        own = self.orders[0].steps_per_epoch
        self.shares = [min(own, order.steps_per_epoch) for order in self.orders]
        self._known: tuple[int, list[int], list[int]] = -1, [], []

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.shares)

    def __call__(self, step: int) -> np.ndarray:
        """Ids of the global batch of a 0-based step, (groups, rows of a group) int64."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._known[0] != epoch:
            self._known = epoch, *self._turns(epoch)
        _, tasks, numbers = self._known
        task = tasks[at]
        order = self.orders[task]
        return order(epoch * self.shares[task] + numbers[at]) + self.offsets[task]

    def epoch(self, epoch: int) -> Iterator[np.ndarray]:
        """The batches of a 0-based epoch."""
        first = epoch * self.steps_per_epoch
        return map(self, range(first, first + self.steps_per_epoch))

    def _turns(self, epoch: int) -> tuple[list[int], list[int]]:
        """The task of each step of an epoch, and how many steps of that task come before it."""
        tasks = np.repeat(np.arange(len(self.shares)), self.shares)
        if len(self.shares) > 1:
            tasks = np.random.default_rng([self.seed, epoch]).permutation(tasks)
        numbers = np.empty_like(tasks)
        for task, share in enumerate(self.shares):
            numbers[tasks == task] = np.arange(share)
        return tasks.tolist(), numbers.tolist()


def bucket_lengths(
    lengths: np.ndarray, limit: int, n_buckets: int = 6, multiple: int = 8
) -> np.ndarray:
    """The few lengths to pad batches to, ascending, (at most n_buckets,) int64; the last holds the
    longest row.

    Multiples of `multiple`, at most `limit`, such that rows, each padded to the nearest, have the
    fewest tokens: best[k, j], the fewest of the rows up to size j with k lengths of which j is the
    last, by dynamic programming. lengths: (n,) tokens of each row, 1 to limit.
    """
    units = -(-np.asarray(lengths, np.int64) // multiple)
    below = np.cumsum(np.bincount(units))  # rows of at most j units
    j = np.arange(len(below))
    # of the rows between i and j, padded to j
    cost = np.where(j[:, None] < j, (below - below[:, None]) * j, np.inf)
    best, came_from = [cost[0]], []
    for _ in range(min(n_buckets, len(np.unique(units))) - 1):
        total = best[-1][:, None] + cost
        came_from.append(total.argmin(0))
        best.append(total.min(0))
    chosen = [len(below) - 1]
    for before in reversed(came_from):
        chosen.append(int(before[chosen[-1]]))
    return np.minimum(np.array(chosen[::-1], np.int64) * multiple, limit)


def bucket_for(length: int, sizes: np.ndarray) -> int:
    """The least of `sizes` (of `bucket_lengths`) that holds `length` tokens. Raises ValueError
    beyond the last."""
    if length > sizes[-1]:
        raise ValueError(f"{length} tokens, where the longest size is {sizes[-1]}")
    return int(sizes[np.searchsorted(sizes, length)])


def padding_share(
    batches: Sequence[np.ndarray], lengths: np.ndarray, sizes: np.ndarray, micro_batch: int
) -> float:
    """How much of what is computed over these batches is padding, each micro-batch being padded on
    its own."""
    computed = real = 0
    for ids in (batch.reshape(-1) for batch in batches):
        for begin in range(0, len(ids), micro_batch):
            part = lengths[ids[begin : begin + micro_batch]]
            computed += len(part) * bucket_for(int(part.max()), sizes)
            real += int(part.sum())
    return 1 - real / computed


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first (what does not fit in memory fails at once), padded to at most
    batch_tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]
