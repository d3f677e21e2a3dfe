"""Opens a run's folder: keeps other processes out, finds the checkpoint to resume from, and
compares the options with those of the last start."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Resolved, RunConfig, UserError
from engine import processes
from engine.lengths import Extension
from engine.processes import World, on_main
from engine.resume import PreviousStart, changes, folder_of, is_finished_with, previous_start
from engine.start import Start, claim_folder, open_run
from engine.task import Facts, Task
from storage import checkpoint
from text.files import files_sha256


@dataclass
class OpenedRun:
    """A run whose folder this process has claimed."""

    start: Start
    facts: dict[str, Any]  # about this start, as run.json holds them
    previous: PreviousStart | None  # None: the run is new

    def changes(self, options: dict[str, Any]) -> list[str]:
        """`NAME OLD -> NEW` for each option and fact that has changed since the last start."""
        return (
            list(changes(options, self.facts, self.previous, self.start)) if self.previous else []
        )


def identity(task: Task, facts: Facts, cfg: Resolved) -> dict[str, Any]:
    """What must be the same at every start of a run, by option name."""
    names = ("seed", "optimizer", "schedule", "steps")
    own = {name: getattr(cfg, name) for name in names}
    return {"task": task.name} | own | facts.identity


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and the hardware that decide whether a step gives the same bits."""
    driver = Path("/proc/driver/nvidia/version")
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "hardware": processes.device_name(device),
        "cuda": torch.version.cuda if cuda else None,
        "driver": driver.read_text(encoding="utf-8").partition("\n")[0]
        if cuda and driver.is_file()
        else None,
        "threads": torch.get_num_threads(),
    }


def set_up(task: Task, cfg: RunConfig, world: World, say: Callable[[str], None]) -> Facts | None:
    """Set up the task, on rank 0 first. Every rank must call this.

    None if a file is missing, for example, but the run is finished with just these options: it
    needs no data any more. Rank 0 then says that it is finished, and the ranks part.
    """
    facts = error = None
    with contextlib.nullcontext() if cfg.dry_run else processes.main_first(world):
        try:
            facts = task.setup(cfg, say, dry=cfg.dry_run)
        except UserError as mistake:
            error = mistake
    failed = any(processes.gather(world, error is not None))
    if failed and on_main(world, functools.partial(is_finished_with, cfg)):
        if world.main:
            _say_finished(folder_of(cfg), say)
        processes.finish(world)
        return None
    if error:
        raise error
    return facts


def _say_finished(folder: Path, say: Callable[[str], None]) -> None:
    results = json.loads((folder / checkpoint.RESULTS).read_text(encoding="utf-8"))
    say(f"{folder} is finished ({results['steps']} steps): its model is {folder}/final")


def open_folder(
    task: Task,
    facts: Facts,
    cfg: Resolved,
    world: World,
    asked: dict[str, Any],
    held: contextlib.ExitStack,
    say: Callable[[str], None],
) -> OpenedRun:
    """Claim --out until `held` is closed, and find out where the run starts.

    `asked`: the options that depend on the machine, before they were resolved. Raises UserError if
    the run may not start there.
    """
    folder = Path(cfg.out)
    record = {
        "machine": platform.platform(),
        "command": sys.argv,
        "world_size": world.size,
        "device": world.device.type,
        **environment(world.device),
        "launcher": processes.launcher(),
        "asked": asked,
        "data_sha256": files_sha256(cfg.data),  # for evaluate.py, which reads the files again
    }
    held.enter_context(claim_folder(folder))
    previous = previous_start(cfg)
    resume = "auto" if _is_restart(cfg, folder, previous) else cfg.resume
    start = open_run(folder, resume, identity(task, facts, cfg), record, say, _extension(cfg))
    if start.finished:
        _say_finished(folder, say)
    return OpenedRun(start, record, previous)


def _extension(cfg: Resolved) -> Extension | None:
    if not cfg.extend_to:
        return None
    return Extension(
        cfg.extend_to, cfg.reschedule, cfg.schedule, cfg.warmup_steps, cfg.min_lr, cfg.patience
    )


def _is_restart(cfg: Resolved, folder: Path, previous: PreviousStart | None) -> bool:
    """Whether torchrun restarts a run that it started itself. That start has already done what
    --resume asks for, so the restart continues from the run's own checkpoint."""
    launcher = processes.launcher()
    if previous is None or launcher is None or previous.record.get("launcher") != launcher:
        return False
    return cfg.resume == "never" or bool(checkpoint.checkpoints(folder))
