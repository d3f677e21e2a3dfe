"""Fine-tuning: each module is a task, `python -m finetune.TASK`; all run on the one loop."""

from __future__ import annotations

import importlib
from pathlib import Path

from config import UserError, nearest
from tasks.classification.task import Classification
from tasks.command import command as run_task
from tasks.finetuning import Finetuning


def command(task: Finetuning) -> int:
    """Run a task as its command line says; returns the exit code."""
    return run_task(task, label_task)


def label_task(asked: str) -> Classification:
    """The task that --also TASK:WEIGHT names. Raises UserError where this package has none that
    answers with labels."""
    name = asked.partition(":")[0]
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    module = importlib.import_module(f"finetune.{name}") if name in names else None
    for kind in vars(module).values() if module else ():
        if (
            isinstance(kind, type)
            and issubclass(kind, Classification)
            and kind.__module__ == f"finetune.{name}"
        ):
            return kind()
    raise UserError(f"--also {asked}: {name} is no task with labels{nearest(name, names)}")
