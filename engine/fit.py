"""Finds the micro-batch that fits in memory, and advises the user if none does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn

from config import Resolved, UserError
from engine import processes
from engine.failures import is_out_of_memory
from engine.memory import Memory, estimate, keeps_freed_memory
from engine.processes import World
from engine.step import TrainStep
from engine.task import Facts, Task

MEMORY_ADVICE = "add --recompute or lower --seq-len or --preset"
HEAP_SLACK = 1.25  # a CPU run trims its heap above this multiple of its estimated memory


def choose_micro_batch(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, before: int | None
) -> int:
    """The micro-batch of --micro-batch. For `auto` it is the one from `before` an interruption, or
    else the largest that fits. Raises UserError if none fits."""
    rows = facts.rows_per_rank(world.size)
    if cfg.micro_batch != "auto":
        # No estimate on a GPU: the first step shows whether it fits.
        if world.device.type != "cuda" and not estimate_fits(facts, cfg, world)(cfg.micro_batch):
            raise out_of_memory(task, facts, model, cfg, world, cfg.micro_batch)
        return cfg.micro_batch
    if before and rows % before == 0:
        return before
    found = largest_micro_batch(task, facts, model, cfg, world, rows)
    if not found:
        raise UserError(f"even --micro-batch 1 does not fit in memory; {MEMORY_ADVICE}")
    return found


def out_of_memory(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, micro_batch: int
) -> UserError:
    """The error to raise because `micro_batch` did not fit. It names a smaller one that does."""
    rows = facts.rows_per_rank(world.size)
    one_rank = dataclasses.replace(world, size=1)  # the others may not be ready to communicate
    with torch.compiler.set_stance("force_eager"):
        fits = largest_micro_batch(task, facts, model, cfg, one_rank, rows)
    fits = largest_divisor(rows, lambda n: n <= min(fits, micro_batch - 1))
    return too_large(micro_batch, f"lower --micro-batch to {fits}" if fits else MEMORY_ADVICE)


def too_large(micro_batch: int, advice: str = MEMORY_ADVICE) -> UserError:
    """The error to show because `micro_batch` did not fit, with advice."""
    return UserError(f"out of memory with --micro-batch {micro_batch}; {advice}", local=True)


def heap_limit(facts: Facts, cfg: Resolved, world: World, micro_batch: int) -> float:
    """Resident bytes above which a CPU run trims its heap; inf: never."""
    if facts.longest is None or world.device.type != "cpu" or not keeps_freed_memory(cfg):
        return math.inf
    return HEAP_SLACK * peak_memory(facts, cfg, micro_batch, world).total


def largest_micro_batch(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, rows: int
) -> int:
    """The largest divisor of `rows` that fits on every rank, or 0. A GPU tries it; elsewhere it is
    estimated."""
    fits = (
        _gpu_fits(task, facts, model, cfg, world)
        if world.device.type == "cuda"
        else estimate_fits(facts, cfg, world)
    )
    return min(processes.gather(world, largest_divisor(rows, fits)))


def largest_divisor(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that fits, or 0. A binary search: if a number fits, so must all
    smaller ones."""
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = sorted({*small, *(rows // n for n in small)})
    low, high = 0, len(divisors)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(divisors[middle]) else (low, middle)
    return divisors[low - 1] if low else 0


def peak_memory(facts: Facts, cfg: Resolved, micro_batch: int, world: World) -> Memory:
    """The estimated peak memory of a rank."""
    accumulate = micro_batch < facts.rows_per_rank(world.size)
    return estimate(facts.cost, cfg, micro_batch, world.device.type, world.size, accumulate)


def estimate_fits(facts: Facts, cfg: Resolved, world: World) -> Callable[[int], bool]:
    """A function that estimates whether a micro-batch fits in 0.8 of the free memory."""
    room = 0.8 * processes.available_memory(world.device, world.local_size)
    used = processes.memory_bytes(world.device)  # the estimate counts what is already in use
    return lambda n: peak_memory(facts, cfg, n, world).total - used <= room


def _gpu_fits(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World
) -> Callable[[int], bool]:
    """A function that tries a micro-batch on the GPU: a forward and backward pass and an evaluation
    batch. It adds the memory that the optimizer's moments and DDP will need."""
    device = world.device
    step = TrainStep(task, model, cfg, dataclasses.replace(world, size=1), facts.exact_evaluation)
    reserved = 2 * sum(p.numel() * p.element_size() for p in step.optimizers.params)  # moments
    reserved += reserved // 2 if world.size > 1 else 0  # DDP's buckets
    room = processes.available_memory(device, 1) + torch.cuda.memory_allocated(device)

    def fits(n: int) -> bool:
        ids = facts.longest if facts.longest is not None else task.rows("train", 0).reshape(-1)
        batch = task.batch("train", np.resize(ids, n)).tensors
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step._backward(
                batch,
                True,
                dict.fromkeys(task.terms, 1.0),
                {k: torch.zeros((), device=device) for k in task.terms},
            )
            with torch.no_grad():
                step.evaluate(batch)
            peak = torch.cuda.max_memory_allocated(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            peak = math.inf
        step.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # keep the trial out of the run's own peak
        return peak + reserved <= 0.94 * room

    return fits
