"""Runs a task after its options are parsed: trains, then answers the rows of --predict."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Collection
from glob import glob
from pathlib import Path
from typing import Any

from base.files import sibling, writable_file, write_json, writing_to
from base.signals import stopped_by
from config import UserError
from engine.log import json_safe
from engine.processes import record_failures
from engine.resume import is_finished_with
from engine.trainer import train
from storage.checkpoint import locate
from tasks.description import Description
from tasks.finetuning import EVAL_PRECISION, Finetuning
from text.overlap import summary
from text.rows import check_exists

# Stems of the files that a run writes itself. --answers must not overwrite them.
RESERVED_NAMES = ("validation", "config", "log", "metrics", "run")
NO_CLEAN = "no clean scores: the training rows are not known; name them with --data FILE"


def run_task(task: Finetuning, cfg: Any, typed: Collection[str]) -> int:
    """Train `task`, then answer the rows of --predict. Returns the exit code.

    typed: the names of the options on the command line.
    """
    description = task.description
    if not cfg.trains and not cfg.predict:
        raise UserError("--epochs 0 trains nothing; add --predict FILE to answer its rows")
    answers_path(description, cfg)
    if not (cfg.trains and is_finished_with(cfg)):  # whose data may be gone
        _check_files(description, cfg)
    is_main = os.environ.get("RANK", "0") == "0"
    if not cfg.trains:
        if cfg.dry_run:
            return dry_run_predict(task, cfg)
        if is_main:
            predict(task, cfg, cfg.init)
        return 0
    if cfg.data is None and is_main:
        print(f"no --data: training on the {len(description.toy)} toy rows of the task")
    code = record_failures(train, task, cfg, typed)
    if code or cfg.dry_run or not is_main:
        return code
    if task.is_set_up:
        task.write_reports(str(cfg.out), print)
    else:  # a finished run without its data, which can still answer
        cfg = dataclasses.replace(cfg, epochs=0, steps=None)
    if cfg.predict and (number := stopped_by()):
        return 128 + number  # a signal after the last step: the run is finished, --predict is not
    if cfg.predict:
        predict(task, cfg, str(cfg.out))
    return 0


def _check_files(task: Description, cfg: Any) -> None:
    """Raise UserError for missing data files before --init may start a download."""
    for spec in (*(cfg.training_files() if cfg.trains else ()), cfg.predict):
        if spec and spec != "toy":
            check_exists(spec, task.readers)


def dry_run_predict(task: Finetuning, cfg: Any) -> int:
    """The dry run of `--epochs 0 --predict`: open the model, read the rows, write nothing. Returns
    the exit code."""
    cfg.check()
    if os.environ.get("RANK", "0") == "0":
        rows = task.open_predictor(cfg, locate(cfg.init), print).rows
        print(
            f"dry run: nothing is written ({len(rows):,} rows of {cfg.predict} would be answered "
            f"by {cfg.init})"
        )
    return 0


def predict(task: Finetuning, cfg: Any, where: str) -> None:
    """Answer the rows of --predict with the model of checkpoint `where`.

    If the rows have true answers, the scores are printed and written to a .scores.json file beside
    the answers. That file also has the seconds for opening the model and answering.
    """
    cfg.check()
    path = answers_path(task.description, cfg)
    model = locate(where)
    began = time.perf_counter()
    with writing_to("--answers" if cfg.answers else "--out", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = task.open_predictor(cfg, model, print).write(path, print)
        about = {"seconds": time.perf_counter() - began, "eval_precision": EVAL_PRECISION}
        if scores:
            write_json(sibling(path, ".scores.json"), json_safe(scores) | about)
    clean = scores.pop("clean", None)
    print(f"answers to {cfg.predict}: {path}")
    if scores:
        print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        print(f"clean: {summary(clean)}" if clean else NO_CLEAN)


def answers_path(task: Description, cfg: Any) -> Path:
    """The file for the answers to --predict. Raises UserError if it cannot be written, or if it
    would overwrite a file that the run reads or writes."""
    if cfg.answers and not cfg.predict:
        raise UserError(
            f"--answers {cfg.answers} belongs to --predict FILE; add it, or leave --answers out"
        )
    kinds = task.answer_kinds
    path = Path(cfg.answers or f"{cfg.out}/predictions{kinds[0]}")
    if not cfg.predict:
        return path
    if path.suffix not in kinds and not (path.suffix in (".json", ".txt", "") and cfg.answers):
        raise UserError(
            f"--answers {path}: answers are written as {' and '.join(kinds)}; name a file with "
            f"{' or '.join(kinds)}"
        )
    if (
        path.parent.resolve() == Path(cfg.out).resolve()
        and sibling(path, "").name in RESERVED_NAMES
    ):
        raise UserError(f"--answers {path} is a file of the run itself; name another file")
    read = [
        file
        for spec in (cfg.predict, *cfg.training_files())
        if spec
        for item in spec.split(",")
        for file in (glob(item) or [item])
    ]
    files = [path, *(sibling(path, kind) for kind in kinds)] if len(kinds) > 1 else [path]
    for file in dict.fromkeys(files):
        writable_file("--answers" if cfg.answers else "--out", str(file), read, make_folder=True)
    return path
