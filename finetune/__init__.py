"""Fine-tuning tasks. Each module describes one task for `python -m finetune.TASK`, and all of them
share the training loop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from base.cli import parse_typed
from base.console import outlive
from config import UserError, nearest
from tasks.classification.description import ClassificationDescription
from tasks.description import Description
from tasks.generation.description import GenerationDescription
from tasks.preferences.description import PreferenceDescription


def classify(task: ClassificationDescription) -> int:
    """Run a classification task with the options of the command line. Returns the exit code."""
    cfg, typed = options(task)
    from tasks.classification.command import run_classification

    return run_classification(task, cfg, typed, find_classification_task)


def generate(task: GenerationDescription) -> int:
    """Run a generation task with the options of the command line. Returns the exit code."""
    cfg, typed = options(task)
    from tasks.command import run_task
    from tasks.generation.task import Generation

    return run_task(Generation(task), cfg, typed)


def prefer(task: PreferenceDescription) -> int:
    """Run a preference task with the options of the command line. Returns the exit code."""
    cfg, typed = options(task)
    from tasks.command import run_task
    from tasks.preferences.task import Preferences

    return run_task(Preferences(task), cfg, typed)


def options(task: Description) -> tuple[Any, frozenset[str]]:
    """The options of a run, and the names of the options that were typed.

    A run that resumes keeps its own values for options that were not typed.
    """
    defaults = {"out": f"runs/{task.name}", **task.defaults}
    cfg, typed = parse_typed(task.config, sys.argv[1:], defaults)
    from engine.resume import restore_options  # imported late: it loads torch, which slows --help

    cfg = restore_options(cfg, typed)
    if not cfg.dry_run:
        outlive()
    return cfg, typed


def find_classification_task(item: str) -> ClassificationDescription:
    """The task that an item TASK:WEIGHT of --also names. Raises UserError if it is not a
    classification task of this package."""
    name = item.partition(":")[0]
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    module = importlib.import_module(f"finetune.{name}") if name in names else None
    task = getattr(module, "TASK", None)
    if not isinstance(task, ClassificationDescription):
        raise UserError(
            f"--also {item}: {name} is not a task with labels{nearest(name, names)}; use a task "
            "like topics"
        )
    return task
