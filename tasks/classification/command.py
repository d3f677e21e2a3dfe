"""Runs a classification task: fine-tunes GPT-2, or fits a baseline on the same rows."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from base.files import sibling, writable_file, write_json, writing_to
from base.signals import ends_promptly
from config import UserError
from engine.processes import memory_bytes
from storage.checkpoint import RECORD, RESULTS
from tasks.classification.baselines import BaselineKind, fit_text_model
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import label_index, true_labels
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import Answered, probabilities, write_answers
from tasks.classification.rows import find_overlap, read_labelled_rows, training_texts
from tasks.classification.task import AuxiliaryTask, Classification
from tasks.command import answers_path, run_task
from tasks.source import Source
from text.overlap import Overlap
from text.row import Row

LSTM_EMBEDDING = 256  # width of the embeddings that --model lstm learns


def run_classification(
    task: ClassificationDescription,
    cfg: ClassificationConfig,
    typed: Collection[str],
    find: Callable[[str], ClassificationDescription],
) -> int:
    """Run a task and return the exit code. find: returns the task that an item of --also names."""
    if cfg.model == "naive-bayes" or cfg.model == "tf-idf":
        return run_baseline(task, cfg, cfg.model)
    if cfg.model == "lstm" and cfg.trains:
        cfg = lstm_config(cfg)
    return run_task(Classification(task, auxiliary_tasks(cfg, find)), cfg, typed)


def lstm_config(cfg: ClassificationConfig) -> ClassificationConfig:
    """The options for `--model lstm`: train from scratch, with the tokenizer of --init."""
    tokenizer = cfg.tokenizer or (None if cfg.init == "scratch" else cfg.init)
    width = cfg.n_embd or LSTM_EMBEDDING
    return dataclasses.replace(
        cfg, init="scratch", tokenizer=tokenizer, n_embd=width, n_head=1, pooling="lstm"
    )


def auxiliary_tasks(
    cfg: ClassificationConfig, find: Callable[[str], ClassificationDescription]
) -> list[AuxiliaryTask]:
    """The tasks of --also TASK:WEIGHT with their data and default options. Raises UserError for a
    task or weight that cannot be used."""
    if cfg.also_data and len(cfg.also_data) != len(cfg.also):
        raise UserError(
            f"--also names {len(cfg.also)} tasks and --also-data {len(cfg.also_data)} files; give "
            "one file for each task"
        )
    found = []
    for asked, data in zip(cfg.also, cfg.also_data or ("toy",) * len(cfg.also), strict=True):
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
        options: Any = task.config
        options = options(**{**task.defaults, "data": data})
        found.append(AuxiliaryTask(task, value, options))
    return found


def run_baseline(
    task: ClassificationDescription, cfg: ClassificationConfig, kind: BaselineKind
) -> int:
    """Fit `--model naive-bayes` or `tf-idf` with scikit-learn and write the same files as a
    training run. Returns the exit code."""
    if os.environ.get("RANK", "0") != "0":
        return 0  # one process fits the model
    cfg.check()
    answers, about = answers_path(task, cfg), {"eval_precision": "fp64", "step": 1}
    folder = Path(str(cfg.out))
    if (folder / RECORD).exists():  # this would overwrite its config.json, log and metrics
        raise UserError(f"{folder} already holds a run of another model; choose another --out")
    writable_file("--out", str(folder / RESULTS), make_folder=True)
    source = Source(task, dataclasses.replace(cfg, data=cfg.data or "toy"), print)
    rows = read_labelled_rows(source)
    labels, train, val = rows.labels, rows.train, rows.val
    if cfg.predict:  # raises for a new label before the work is done
        true_labels(source.predict_rows, labels)
    if cfg.dry_run:
        print(
            f"dry run: nothing is started or written ({kind} on {len(train):,} rows, {len(val):,} "
            "to validate on)"
        )
        return 0
    with writing_to("--out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    print(f"fitting {kind} on {len(train):,} rows; with many rows this takes minutes", flush=True)
    began = time.perf_counter()
    with ends_promptly():
        numbers = np.array([label_index(row, labels) for row in train])
        texts = [task.texts(row) for row in train]
        model = fit_text_model(kind, texts, numbers, len(labels), cfg.seed, rows.weights)
    seconds = time.perf_counter() - began

    def answer(rows: Sequence[Row], path: Path, shared: Overlap) -> dict[str, Any]:
        found = probabilities(model.log_probs([task.texts(row) for row in rows]))
        answered = Answered(rows, found, shared)
        return write_answers(path, answered, task, labels, cfg.seed, print, about)

    for warning in source.warnings:
        print(f"warning: {warning}")
    with writing_to("--out", folder):
        shared = find_overlap([rows])
        figures = answer(val, folder / "validation.jsonl", shared)
        print(f"clean: {shared.summary}")
        write_json(folder / "config.json", dataclasses.asdict(cfg))
        costs = {
            "steps": 1,
            "final_is_step": 1,
            "seconds": seconds,
            "memory_bytes": memory_bytes(torch.device("cpu")),
            "rows_per_second": len(train) / seconds,
            "parameters": model.n_parameters,
            "trained_parameters": model.n_parameters,
            "warnings": source.warnings,
        }
        without_counts = {name: value for name, value in figures.items() if name != "clean"}
        write_json(folder / RESULTS, figures | {"eval_precision": about["eval_precision"]} | costs)
        (folder / "log.jsonl").write_text(
            json.dumps({"kind": "eval", "step": 1} | without_counts) + "\n", encoding="utf-8"
        )
    if cfg.predict:
        with writing_to("--answers" if cfg.answers else "--out", answers.parent):
            answers.parent.mkdir(parents=True, exist_ok=True)
            asked = [task.content(row) for row in source.predict_rows]
            shared = source.find_shared(asked, training_texts([rows]))
            if scores := answer(source.predict_rows, answers, shared):
                write_json(
                    sibling(answers, ".scores.json"),
                    scores | {"eval_precision": about["eval_precision"]},
                )
    return 0
