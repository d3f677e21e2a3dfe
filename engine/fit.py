"""What fits in memory: the micro-batch of a run, and what to advise where none fits."""

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

MEMORY_ADVICE = "add --recompute or lower --seq-len or --preset"  # memory
HEAP_SLACK = 1.25  # resident bytes of a CPU run before its heap is trimmed, over its estimate


def choose_micro_batch(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, before: int | None
) -> int:
    """The one that was asked for, else the one from `before` an interruption, else the largest that
    fits. Raises UserError where none fits."""
    rows = facts.rows_per_rank(world.size)
    if cfg.micro_batch != "auto":
        # on a GPU the first step tries it
        if world.device.type != "cuda" and not estimate_fits(facts, cfg, world)(cfg.micro_batch):
            raise out_of_memory(task, facts, model, cfg, world, cfg.micro_batch)
        return cfg.micro_batch
    if before and rows % before == 0:
        return before
    found = largest_micro_batch(task, facts, model, cfg, world, rows)
    if not found:
        raise UserError(f"not even --micro-batch 1 fits in memory; {MEMORY_ADVICE}")
    return found


def out_of_memory(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, micro_batch: int
) -> UserError:
    """The error to raise where `micro_batch` did not fit; it names a smaller one that does."""
    rows = facts.rows_per_rank(world.size)
    alone = dataclasses.replace(world, size=1)  # the other ranks may be anywhere
    with torch.compiler.set_stance("force_eager"):
        fits = largest_micro_batch(task, facts, model, cfg, alone, rows)
    fits = largest_divisor(rows, lambda n: n <= min(fits, micro_batch - 1))
    return too_large(micro_batch, f"lower --micro-batch to {fits}" if fits else MEMORY_ADVICE)


def too_large(micro_batch: int, way: str = MEMORY_ADVICE) -> UserError:
    """The line to show where `micro_batch` did not fit; `way`: out of it."""
    return UserError(f"out of memory with --micro-batch {micro_batch}; {way}", local=True)


def heap_limit(facts: Facts, cfg: Resolved, world: World, micro_batch: int) -> float:
    """Resident bytes above which a CPU run trims its heap."""
    if facts.longest is None or world.device.type != "cpu" or not keeps_freed_memory(cfg):
        return math.inf
    return HEAP_SLACK * peak_memory(facts, cfg, micro_batch, world).total


def largest_micro_batch(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World, rows: int
) -> int:
    """The largest divisor of `rows` that fits on every rank, 0 if none does: tried on a GPU,
    estimated elsewhere."""
    fits = (
        _gpu_fits(task, facts, model, cfg, world)
        if world.device.type == "cuda"
        else estimate_fits(facts, cfg, world)
    )
    return min(processes.gather(world, largest_divisor(rows, fits)))


def largest_divisor(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that fits, 0 if none does; whatever is smaller than one that
    fits does too."""
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = sorted({*small, *(rows // n for n in small)})
    low, high = 0, len(divisors)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(divisors[middle]) else (low, middle)
    return divisors[low - 1] if low else 0


def peak_memory(facts: Facts, cfg: Resolved, micro_batch: int, world: World) -> Memory:
    """The estimate of a rank's peak."""
    accumulate = micro_batch < facts.rows_per_rank(world.size)
    return estimate(facts.cost, cfg, micro_batch, world.device.type, world.size, accumulate)


def estimate_fits(facts: Facts, cfg: Resolved, world: World) -> Callable[[int], bool]:
    room = 0.8 * processes.available_memory(world.device, world.local_size)
    held = processes.memory_bytes(world.device)  # already taken, and counted in the estimate
    return lambda n: peak_memory(facts, cfg, n, world).total - held <= room


def _gpu_fits(
    task: Task, facts: Facts, model: nn.Module, cfg: Resolved, world: World
) -> Callable[[int], bool]:
    """One real forward and backward pass and one evaluation batch, with room kept for the
    optimizer's moments."""
    device = world.device
    step = TrainStep(task, model, cfg, dataclasses.replace(world, size=1), facts.exact_evaluation)
    kept = 2 * sum(p.numel() * p.element_size() for p in step.optimizers.params)  # moments
    kept += kept // 2 if world.size > 1 else 0  # DDP's buckets
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
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is not to be this one
        return peak + kept <= 0.94 * room

    return fits
