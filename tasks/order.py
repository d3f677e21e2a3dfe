"""The order of training rows: batches of rows with similar lengths, padded to a few bucket sizes.

The order is pure in (seed, step). Sorting rows by length makes it less random and saves padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from config import UserError
from dataset import window_order

POOL = 64  # batches whose rows are sorted together


class Order:
    """The rows of each training step. Each epoch visits every row exactly once.

    An epoch is a random permutation of the rows. The permutation is split into pools, each pool is
    sorted by length and split into batches, and the batches of all pools are shuffled. The last
    n mod batch_size rows of the permutation form a smaller batch at the end of the epoch.

    Rows come in groups that are never split. If n is not divisible by `group`, the last n mod group
    rows of the permutation form one shorter group, alone in a batch at the end.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, group: int = 1):
        """lengths: (n,) tokens of each row. Raises UserError if batch_size is not a multiple of
        `group`."""
        if batch_size % group:
            more = math.ceil(batch_size / group) * group
            raise UserError(
                f"--batch-size {batch_size} is not a multiple of groups of {group} rows; use {more}"
            )
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.group = batch_size, seed, group
        n = len(self.lengths)
        self._in_batches = n - n % batch_size  # rows in full batches
        self._in_groups = n - n % group  # rows in full groups
        self.steps_per_epoch = math.ceil(self._in_groups / batch_size) + (self._in_groups < n)
        self._cached: tuple[int, list[np.ndarray]] = -1, []  # an epoch and its batches

    def __call__(self, step: int) -> np.ndarray:
        """Row ids of the global batch of a step (from 0), (groups, rows of a group) int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        cached, batches = self._cached
        if cached != epoch:
            batches = self.epoch(epoch)
            self._cached = epoch, batches
        return batches[index]

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch (from 0), each as from __call__."""
        n, size = len(self.lengths), self.batch_size
        shuffled = window_order(epoch * n + np.arange(n), n, self.seed)
        batches = []
        for begin in range(0, self._in_batches, POOL * size):
            pool = self._sorted(shuffled[begin : min(begin + POOL * size, self._in_batches)])
            batches += list(pool.reshape(-1, size // self.group, self.group))
        if batches:
            places = window_order(
                epoch * len(batches) + np.arange(len(batches)), len(batches), self.seed + 1
            )
            batches = [batches[place] for place in places]
        if self._in_batches < self._in_groups:
            rest = self._sorted(shuffled[self._in_batches : self._in_groups])
            batches.append(rest.reshape(-1, self.group))
        if self._in_groups < n:
            batches.append(shuffled[None, self._in_groups :])
        return batches

    def _sorted(self, ids: np.ndarray) -> np.ndarray:
        return ids[np.argsort(self.lengths[ids], kind="stable")]


class InterleavedOrder:
    """The rows of each step when several tasks train at once. Each step has rows of one task.

    An epoch has all batches of the first task. Each other task contributes all of its batches too,
    but at most as many as the first task, and continues in the next epoch where it stopped. The
    seed shuffles which task comes at which step.
    """

    def __init__(
        self, lengths: np.ndarray, tasks: np.ndarray, batch_size: int, seed: int, group: int = 1
    ):
        """lengths: (n,) tokens of each row. tasks: (n,) int64, the number of each row's task. The
        rows of a task are consecutive."""
        self.seed = seed
        self.orders: list[Order] = []
        self.offsets: list[int] = []
        for task in range(int(tasks.max()) + 1):
            ids = np.flatnonzero(tasks == task)
            self.offsets.append(int(ids[0]))
            self.orders.append(Order(lengths[ids], batch_size, seed + task, group))
        own = self.orders[0].steps_per_epoch
        self.shares = [min(own, order.steps_per_epoch) for order in self.orders]
        self._cached: tuple[int, list[int], list[int]] = -1, [], []  # an epoch and its schedule

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, over all tasks."""
        return sum(self.shares)

    def __call__(self, step: int) -> np.ndarray:
        """Row ids of the global batch of a step (from 0), (groups, rows of a group) int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = epoch, *self._schedule(epoch)
        _, tasks, numbers = self._cached
        task = tasks[index]
        order = self.orders[task]
        return order(epoch * self.shares[task] + numbers[index]) + self.offsets[task]

    def epoch(self, epoch: int) -> Iterator[np.ndarray]:
        """The batches of an epoch (from 0), each as from __call__."""
        first = epoch * self.steps_per_epoch
        return map(self, range(first, first + self.steps_per_epoch))

    def _schedule(self, epoch: int) -> tuple[list[int], list[int]]:
        """The task of each step of an epoch, and how many of the task's steps come before it."""
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
    """The bucket sizes to pad batches to: ascending, (at most n_buckets,) int64.

    lengths: (n,) tokens of each row, 1 to limit. The sizes are multiples of `multiple`, cut off at
    `limit`, and the last one holds the longest row. They minimise the tokens of all rows, each
    padded to the next size, by dynamic programming over the fewest tokens of the rows up to size j
    that k sizes can reach, j being the largest of them.
    """
    units = -(-np.asarray(lengths, np.int64) // multiple)
    below = np.cumsum(np.bincount(units))  # number of rows with at most j units
    j = np.arange(len(below))
    # cost[i, j]: units of the rows longer than i and at most j, each padded to j
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
    """The smallest of the bucket `sizes` that holds `length` tokens. Raises ValueError if none
    does."""
    if length > sizes[-1]:
        raise ValueError(f"{length} tokens do not fit into the largest bucket of {sizes[-1]}")
    return int(sizes[np.searchsorted(sizes, length)])


def padding_share(
    batches: Sequence[np.ndarray], lengths: np.ndarray, sizes: np.ndarray, micro_batch: int
) -> float:
    """The fraction of padding among all computed tokens, 0 to 1. Each micro-batch is padded by
    itself."""
    computed = real = 0
    for ids in (batch.reshape(-1) for batch in batches):
        for begin in range(0, len(ids), micro_batch):
            part = lengths[ids[begin : begin + micro_batch]]
            computed += len(part) * bucket_for(int(part.max()), sizes)
            real += int(part.sum())
    return 1 - real / computed
