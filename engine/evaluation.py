"""Evaluation over the whole validation split, exact on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine import processes
from engine.loader import partition
from engine.step import TrainStep


@torch.no_grad()
def evaluate(
    step: TrainStep, micro_batch: int, stop: Callable[[], int] = lambda: 0
) -> dict[str, float] | None:
    """The metrics of the current model, on every rank. None if `stop()`, which is asked before each
    micro-batch, returned true."""
    task, model, world = step.task, step.model, step.world
    was_training = model.training
    model.eval()
    parts = [
        (split, ids)
        for split in task.evaluated
        for rows in [micro_batch if split.startswith("val") else 1]
        for ids in partition(task.rows(split, 0), world.rank, world.size, rows)
    ]
    sums: dict[str, Tensor] = {}
    records: dict[int, Any] = {}
    try:
        for split, ids in parts:
            if stop():
                return None
            if ids is None:
                continue
            counts, found = step.evaluate(task.batch(split, ids).tensors)
            records |= found
            # MPS has no fp64, so its sums are kept on the host.
            device = torch.device("cpu") if world.device.type == "mps" else world.device
            for key, value in counts.items():
                key = key if split == "val" else f"{split} {key}"
                count = torch.as_tensor(value, device=device)
                sums[key] = sums.get(key, 0) + count.double()
    finally:
        model.train(was_training)
    total = processes.sum_over_ranks(world, {key: float(value) for key, value in sums.items()})
    gathered = {
        row: record for part in processes.gather(world, records) for row, record in part.items()
    }
    return task.metrics(total, gathered)
