"""--profile: writes a trace and a memory snapshot of three steps, after two steps of warm-up."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from engine.log import RunLog
from engine.rates import Rates

WAIT, WARM_UP, RECORDED = 1, 1, 3  # steps


@contextlib.contextmanager
def profiled(
    run: Path, device: torch.device, log: RunLog, rates: Rates
) -> Generator[Callable[[], None]]:
    """Profile the block and write the results into `run`/profile. The block must call the function
    that it gets after each step."""
    # Keeps the profiler's own messages off stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    folder = run / "profile"
    folder.mkdir(exist_ok=True)

    def write(profile: torch.profiler.profile) -> None:
        _write(profile, folder, device.type == "cuda", log)
        rates.restart_clock()

    if device.type == "cuda":
        torch.cuda.memory._record_memory_history()
    schedule = torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1)
    options: dict[str, Any] = dict(profile_memory=True, record_shapes=True, schedule=schedule)
    with torch.profiler.profile(on_trace_ready=write, **options) as profile:
        yield profile.step
    if profile.step_num < WAIT + WARM_UP + RECORDED:
        log.warn("--profile needs five steps: two to warm up and three to record")


def _write(profile: torch.profiler.profile, folder: Path, cuda: bool, log: RunLog) -> None:
    profile.export_chrome_trace(str(folder / "trace.json"))
    if cuda:
        torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)
    by_memory = "self_cuda_memory_usage" if cuda else "self_cpu_memory_usage"
    averages = profile.key_averages(group_by_input_shape=True)
    table = averages.table(sort_by=by_memory, row_limit=50)
    (folder / "memory.txt").write_text(table + "\n", encoding="utf-8")
    snapshot = "memory.pickle (pytorch.org/memory_viz)" if cuda else "memory.txt"
    log.say(f"profile of three steps: {folder}/trace.json (chrome://tracing), {folder}/{snapshot}")
