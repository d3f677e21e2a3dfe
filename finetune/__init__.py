"""Fine-tuning: each module is a task, `python -m finetune.TASK`; all run on the one loop."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from base.cli import parse, typed_options
from base.console import outlive
from config import UserError, nearest
from tasks.classification.description import ClassificationDescription
from tasks.description import Description
from tasks.generation.description import GenerationDescription


def classify(task: ClassificationDescription) -> int:
    """Run a task whose answers are labels, as its command line says; returns the exit code."""
    cfg, typed = options(task)
    from tasks.classification.command import run_classification

    return run_classification(task, cfg, typed, find_classification_task)


def generate(task: GenerationDescription) -> int:
    """Run a task whose answers are texts, as its command line says; returns the exit code."""
    cfg, typed = options(task)
    from tasks.command import run_task
    from tasks.generation.task import Generation

    return run_task(Generation(task), cfg, typed)


def options(task: Description) -> tuple[Any, frozenset[str]]:
    """The options of a run, and the names of those that were typed; of the others, a run that goes
    on has its own."""
    words = sys.argv[1:]
    typed = typed_options(task.config, words)
    cfg = parse(task.config, words, {"out": f"runs/{task.name}", **task.defaults})
    from engine.resume import own_options  # with torch, which --help can do without

    cfg = own_options(cfg, typed)
    if not cfg.dry_run:
        outlive()
    return cfg, typed


def find_classification_task(asked: str) -> ClassificationDescription:
    """The task that --also TASK:WEIGHT names. Raises UserError where this package has none that
    answers with labels."""
    name = asked.partition(":")[0]
    names = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    module = importlib.import_module(f"finetune.{name}") if name in names else None
    task = getattr(module, "TASK", None)
    if not isinstance(task, ClassificationDescription):
        raise UserError(f"--also {asked}: {name} is no task with labels{nearest(name, names)}")
    return task
