"""How a run takes its folder: it keeps other processes out, finds the checkpoint to resume from,
and tells what has changed since its last start."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Resolved
from engine import processes
from engine.lengths import Extension
from engine.processes import World
from engine.resume import PreviousStart, changes, previous_start
from engine.start import Start, claim_folder, open_run
from engine.task import Facts, Task
from storage import checkpoint


@dataclass
class OpenedRun:
    """A run's folder, taken."""

    start: Start
    facts: dict[str, Any]  # of this start, as run.json holds them
    previous: PreviousStart | None  # the run's last start

    def changes(self, options: dict[str, Any]) -> list[str]:
        """`NAME OLD -> NEW` for each option and fact that has changed since the last start."""
        return (
            list(changes(options, self.facts, self.previous, self.start)) if self.previous else []
        )


def identity(task: Task, facts: Facts, cfg: Resolved) -> dict[str, Any]:
    """What every start of a run must have in common, by option name."""
    names = ("seed", "optimizer", "schedule", "steps")
    own = {name: getattr(cfg, name) for name in names}
    return {"task": task.name} | own | facts.identity


def open_folder(
    task: Task,
    facts: Facts,
    cfg: Resolved,
    world: World,
    asked: dict[str, Any],
    held: contextlib.ExitStack,
    say: Callable[[str], None],
) -> OpenedRun:
    """Take --out until `held` ends, and find where the run begins. Raises UserError where it may
    not.

    `asked`: options that are chosen for the machine, as they were before that.
    """
    folder = Path(cfg.out)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "command": sys.argv,
        "world_size": world.size,
        "device": world.device.type,
        "launcher": processes.launcher(),
        "asked": asked,
    }
    held.enter_context(claim_folder(folder))
    previous = previous_start(cfg)
    resume = "auto" if _is_restart(cfg, folder, previous) else cfg.resume
    start = open_run(folder, resume, identity(task, facts, cfg), record, say, _extension(cfg))
    if start.finished:
        results = json.loads((folder / checkpoint.RESULTS).read_text(encoding="utf-8"))
        say(f"{folder} is finished ({results['steps']} steps): its model is {folder}/final")
    return OpenedRun(start, record, previous)


def _extension(cfg: Resolved) -> Extension | None:
    if not cfg.extend_to:
        return None
    return Extension(
        cfg.extend_to, cfg.reschedule, cfg.schedule, cfg.warmup_steps, cfg.min_lr, cfg.patience
    )


def _is_restart(cfg: Resolved, folder: Path, previous: PreviousStart | None) -> bool:
    """Whether torchrun starts this run again, which it began itself: then --resume has been
    obeyed."""
    launcher = processes.launcher()
    if previous is None or launcher is None or previous.record.get("launcher") != launcher:
        return False
    return cfg.resume == "never" or bool(checkpoint.checkpoints(folder))
