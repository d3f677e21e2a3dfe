"""Fine-tuning: each module is a task, `python -m finetune.TASK`; all run on the one loop."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from checkpoint import locate
from cli import parse
from config import GenerationConfig, UserError, check
from distributed import recorded
from files import write_json
from generation import Generation
from runlog import finite


def command(task: Generation) -> int:
    """Train `task` as the command line says, then answer the rows of --predict; returns the exit code."""
    from trainer import train

    cfg = parse(task.config, sys.argv[1:], {"out": f"runs/{task.name}"} | task.defaults)
    assert isinstance(cfg, GenerationConfig)
    trains = bool(cfg.epochs or cfg.steps)
    if not trains and not cfg.predict:
        raise UserError("--epochs 0 trains nothing: add --predict FILE to have its rows answered")
    code = recorded(train, task, cfg) if trains else 0
    if code == 0 and cfg.predict and not cfg.dry_run and os.environ.get("RANK", "0") == "0":
        predict(task, cfg, str(cfg.out) if trains else cfg.init)
    return code


def predict(task: Generation, cfg: GenerationConfig, where: str) -> None:
    """Answer the rows of --predict with the model of `where`; scores, if there are any, are printed and written beside
    the answers, with the seconds that opening the model and answering took."""
    check(cfg)
    path = Path(cfg.answers or f"{cfg.out}/{task.predictions}")
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    scores = task.predict(cfg, locate(where), path, print)
    seconds = time.perf_counter() - began
    if scores:
        write_json(path.with_suffix(".scores.json"), finite(scores) | {"seconds": seconds})
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"answers to {cfg.predict}: {path}" + (f"\n{figures}" if figures else ""))
