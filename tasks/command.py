"""What a task's command does: train it, then answer the rows of --predict."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.cli import parse, typed_options
from base.console import outlive
from base.files import writable_file, write_json, writing_to
from base.signals import ends_promptly, stopped_by
from config import UserError
from engine.log import finite
from engine.processes import memory_bytes, recorded
from engine.resume import own_options
from engine.trainer import train
from storage.checkpoint import RECORD, RESULTS, locate
from tasks.classification.baselines import Kind, fit_text_model
from tasks.classification.labels import label_of, true_labels
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import VALIDATION, beside, probabilities
from tasks.classification.task import EXACT, Classification, as_lstm
from tasks.finetuning import Finetuning
from tasks.options import FinetuneConfig
from text.rows import Row, check_there

# begin the names of files that a run writes by itself
OWN = (VALIDATION, "config", "log", "metrics", "run")


def command(task: Finetuning, find: Callable[[str], Classification]) -> int:
    """Train `task` as the command line says, then answer the rows of --predict; returns the exit
    code.

    `find` gives the task that an item of --also names.
    """
    typed = typed_options(task.config, sys.argv[1:])
    defaults = {"out": f"runs/{task.name}"} | task.defaults
    cfg: FinetuneConfig = parse(task.config, sys.argv[1:], defaults)
    cfg = own_options(cfg, typed)
    if not cfg.dry_run:
        outlive()
    trains = cfg.trains
    if isinstance(task, Classification) and isinstance(cfg, ClassificationConfig):
        if cfg.model == "naive-bayes" or cfg.model == "tf-idf":
            return fit_words(task, cfg, cfg.model)
        cfg = as_lstm(cfg) if cfg.model == "lstm" and trains else cfg
        task.others = [
            other_task(find, *words) for words in zip(cfg.also, _data_of_others(cfg), strict=True)
        ]
    if not trains and not cfg.predict:
        raise UserError("--epochs 0 trains nothing: add --predict FILE to have its rows answered")
    check_answers(task, cfg)
    _check_named(task, cfg)
    if cfg.dry_run and not trains:
        return rehearse(task, cfg)
    is_main = os.environ.get("RANK", "0") == "0"
    if trains and cfg.data is None and is_main:
        print(f"no --data: training on the {len(task.toy)} toy rows of the task")
    code = recorded(train, task, cfg, typed) if trains else 0
    if code == 0 and not cfg.dry_run and is_main:
        if trains:
            task.conclude(cfg, str(cfg.out), print)
        if cfg.predict and trains and (number := stopped_by()):
            return 128 + number  # it came too late for the run, which is finished, but not for this
        if cfg.predict:
            predict(task, cfg, str(cfg.out) if trains else cfg.init)
    return code


def _check_named(task: Finetuning, cfg: Any) -> None:
    """Data that is not there is told before the model of --init, which a download may need."""
    read = (cfg.data, cfg.val_data, getattr(cfg, "augment", None)) if cfg.trains else ()
    for spec in (*read, cfg.predict):
        if spec and spec != "toy":
            check_there(spec, task.readers)


def rehearse(task: Finetuning, cfg: Any) -> int:
    """`--dry-run` of answering alone: open the model of --init and read the rows; nothing is
    written."""
    cfg.check()
    if os.environ.get("RANK", "0") == "0":
        _, rows = task.ready(cfg, locate(cfg.init), print)
        print(
            f"dry run: nothing is written ({len(rows):,} rows of {cfg.predict} would be answered "
            f"by {cfg.init})"
        )
    return 0


def predict(task: Finetuning, cfg: Any, where: str) -> None:
    """Answer the rows of --predict with the model of `where`; scores, if there are any, are printed
    and written beside the answers, with the seconds that opening the model and answering took."""
    cfg.check()
    path = check_answers(task, cfg)
    model = locate(where)
    began = time.perf_counter()
    with writing_to("--answers" if cfg.answers else "--out", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = task.predict(cfg, model, path, print)
        about = {"seconds": time.perf_counter() - began, "eval_precision": EXACT}
        if scores:
            write_json(beside(path, ".scores.json"), finite(scores) | about)
    figures = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"answers to {cfg.predict}: {path}" + (f"\n{figures}" if figures else ""))


def check_answers(task: Finetuning, cfg: Any) -> Path:
    """The file that the answers to --predict go to. Raises UserError where it cannot be written, or
    should not be."""
    if cfg.answers and not cfg.predict:
        raise UserError(
            f"--answers {cfg.answers} belongs to --predict FILE; add it, or leave --answers out"
        )
    path = Path(cfg.answers or f"{cfg.out}/{task.predictions}")
    if not cfg.predict:
        return path
    kinds = (
        (".jsonl", ".csv") if isinstance(task, Classification) else (Path(task.predictions).suffix,)
    )
    if path.suffix not in kinds and not (path.suffix in (".json", ".txt", "") and cfg.answers):
        raise UserError(
            f"--answers {path}: answers are written as {' and '.join(kinds)}; name such a file"
        )
    if path.parent.resolve() == Path(cfg.out).resolve() and beside(path, "").name in OWN:
        raise UserError(f"--answers {path} is a file of the run itself; name another file")
    specs = (
        cfg.predict,
        cfg.data,
        cfg.val_data,
        *getattr(cfg, "also_data", ()),
        getattr(cfg, "augment", None),
    )
    read = [
        file
        for spec in specs
        if spec
        for item in spec.split(",")
        for file in (glob(item) or [item])
    ]
    files = [path, beside(path, ".jsonl"), beside(path, ".csv")] if ".csv" in kinds else [path]
    for file in dict.fromkeys(files):
        writable_file("--answers" if cfg.answers else "--out", str(file), read, make_folder=True)
    return path


def _data_of_others(cfg: ClassificationConfig) -> tuple[str, ...]:
    if cfg.also_data and len(cfg.also_data) != len(cfg.also):
        raise UserError(
            f"--also names {len(cfg.also)} tasks and --also-data {len(cfg.also_data)} files; give "
            "one for each"
        )
    return cfg.also_data or ("toy",) * len(cfg.also)


def other_task(
    find: Callable[[str], Classification], asked: str, data: str
) -> tuple[Classification, float]:
    """A task of --also TASK:WEIGHT, set to read `data`, and the weight."""
    task = find(asked)
    name, _, weight = asked.partition(":")
    try:
        value = float(weight or 1)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UserError(
            f"--also {asked}: the weight must be a number above 0, as in --also {name}:0.5"
        )
    cfg: Any = dataclasses.replace(task.config(**task.defaults), data=data)
    task.cfg = cfg
    return task, value


def fit_words(task: Classification, cfg: ClassificationConfig, kind: Kind) -> int:
    """`--model naive-bayes` and `tf-idf`: scikit-learn's classifiers on the same rows, with the
    same files about them."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # there is nothing to divide
    cfg.check()
    task.cfg, task.warnings = dataclasses.replace(cfg, data=cfg.data or "toy"), ()
    answers, about = check_answers(task, cfg), {"eval_precision": "fp64", "step": 1}
    folder = Path(str(cfg.out))
    if (folder / RECORD).exists():  # its config.json, log.jsonl and metrics.json would be replaced
        raise UserError(f"{folder} already holds a run of another model; choose another --out")
    writable_file("--out", str(folder / RESULTS), make_folder=True)
    train, val = task.read_labelled(print)
    if cfg.predict:  # a label that is unknown ends the run before the work is done
        true_labels(task.rows_to_answer(cfg, print), task.labels)
    labels = np.array([label_of(row, task.labels) for row in train])
    weights = task.row_weights(train)
    if cfg.dry_run:
        print(
            f"dry run: nothing is started or written ({kind} on {len(train):,} rows, {len(val):,} "
            "to validate on)"
        )
        return 0
    with writing_to("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with ends_promptly():
        model = fit_text_model(
            kind, [task.texts(row) for row in train], labels, len(task.labels), cfg.seed, weights
        )
    seconds = time.perf_counter() - began

    def answer(rows: list[Row], path: Path) -> dict[str, float]:
        found = model.log_probs([task.texts(row) for row in rows])
        return task.write_answers(path, rows, probabilities(found), print, about)

    for warning in task.warnings:
        print(f"warning: {warning}")
    with writing_to("--out", folder):
        figures = answer(val, folder / "validation.jsonl")
        write_json(folder / "config.json", dataclasses.asdict(cfg))
        costs = {
            "steps": 1,
            "final_is_step": 1,
            "seconds": seconds,
            "memory_bytes": memory_bytes(torch.device("cpu")),
            "rows_per_second": len(train) / seconds,
            "parameters": model.n_parameters,
            "trained_parameters": model.n_parameters,
            "warnings": task.warnings,
        }
        write_json(folder / RESULTS, figures | {"eval_precision": about["eval_precision"]} | costs)
        (folder / "log.jsonl").write_text(
            json.dumps({"kind": "eval", "step": 1} | figures) + "\n", encoding="utf-8"
        )
    if cfg.predict:
        with writing_to("--answers" if cfg.answers else "--out", answers.parent):
            answers.parent.mkdir(parents=True, exist_ok=True)
            if scores := answer(task.rows_to_answer(cfg, print), answers):
                write_json(
                    beside(answers, ".scores.json"),
                    scores | {"eval_precision": about["eval_precision"]},
                )
    return 0
