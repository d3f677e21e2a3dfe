"""Loads the batches of coming steps while the current step is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from engine import processes
from engine.digest import BATCH, batch_checksum
from engine.processes import World
from engine.task import Task


def partition(
    groups: np.ndarray, rank: int, size: int, micro_batch: int
) -> list[np.ndarray | None]:
    """Row ids of this rank's micro-batches, micro_batch rows in each: a strided slice of the groups
    (n, rows in a group).

    Every rank gets the same number of micro-batches. A rank without rows left gets None.
    """
    n_groups = max(1, micro_batch // groups.shape[1])  # in a micro-batch
    mine = groups[rank::size]
    count = math.ceil(math.ceil(len(groups) / size) / n_groups)
    parts = [mine[i * n_groups : (i + 1) * n_groups].reshape(-1) for i in range(count)]
    return [part if len(part) else None for part in parts]


@dataclass
class StepBatches:
    """The batches of one rank in one optimizer step."""

    batches: list[Any]  # None: this rank has no rows left
    weights: dict[str, float]  # of this rank only
    amounts: dict[str, float]  # of this rank only
    spare: Any  # a batch to compute, with weight zero, in place of a None


class Loader:
    """Builds the batches of coming steps in a thread, and copies them to the GPU while it computes
    the current step.

    It has no state to save: the step number determines its batches.
    """

    def __init__(self, task: Task, world: World, micro_batch: int, steps: int, ahead: int = 2):
        self.task, self.world, self.micro_batch, self.steps, self.ahead = (
            task,
            world,
            micro_batch,
            steps,
            ahead,
        )
        # A new thread uses GPU 0 by default, where its first operation would create a context of
        # half a gigabyte.
        self.pool = ThreadPoolExecutor(1, "loader", processes.use_device, (world.device,))
        self.futures: dict[int, Future[StepBatches]] = {}
        self.stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None

    def __call__(self, step: int) -> StepBatches:
        """Wait for the batches of this step, and start to load those of the next `ahead` steps."""
        for s in range(step, min(step + 1 + self.ahead, self.steps)):
            if s not in self.futures:
                self.futures[s] = self.pool.submit(self._load, s)
        return self.futures.pop(step).result()

    def _load(self, step: int) -> StepBatches:
        groups = self.task.rows("train", step)
        parts = partition(groups, self.world.rank, self.world.size, self.micro_batch)
        found = [None if ids is None else self.task.batch("train", ids) for ids in parts]
        live = [batch for batch in found if batch is not None]
        batches = [None if batch is None else batch.tensors for batch in found]
        spare = (live[0] if live else self.task.batch("train", groups[0])).tensors
        checksum = batch_checksum(batches, self.world.rank)
        if self.stream:
            batches, spare = self._copied((batches, spare))
        weights = sum_by_name(batch.weights for batch in live)
        amounts = sum_by_name(batch.amounts for batch in live)
        amounts[BATCH] = checksum
        return StepBatches(batches, weights, amounts, spare)

    def _copied(self, batches: Any) -> Any:
        """Copy to the GPU on a stream of its own; only this thread waits for it."""
        assert self.stream
        computing = torch.cuda.default_stream(self.world.device)

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.pin_memory().to(self.world.device, non_blocking=True)
            # Keeps the allocator from reusing this memory before the computing stream is done.
            value.record_stream(computing)
            return value

        with torch.cuda.stream(self.stream):
            batches = tree_map(copied, batches)
        self.stream.synchronize()
        return batches

    def close(self) -> None:
        """Drop the batches that are loaded or being loaded."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.futures.clear()


def sum_by_name(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Add up numbers of the same name. A name may be missing in some of the dicts."""
    total: dict[str, float] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0.0) + number
    return total
