"""Tiny runs of the tasks of finetune/ on their toy rows, in this process or as commands."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config import resolve, resolve_steps
from engine.processes import World
from engine.step import TrainStep
from finetune import find_classification_task
from launch import Ended, launch, log_of
from model import GPT
from support import REPO
from tasks.classification.command import auxiliary_tasks, lstm_config
from tasks.classification.description import ClassificationDescription
from tasks.classification.options import ClassificationConfig
from tasks.classification.task import Classification
from tasks.finetuning import Finetuning
from tasks.generation.description import GenerationDescription
from tasks.generation.task import Generation
from tasks.preferences.description import PreferenceDescription
from tasks.preferences.task import Preferences
from tasks.source import Source

CPU = torch.device("cpu")
ALONE = World(0, 0, 1, 1, CPU)
OPTIONS = {  # defaults of a tiny run
    "preset": "micro",
    "init": "scratch",
    "tokenizer": "tokenizer",
    "precision": "fp32",
    "device": "cpu",
    "out": "run",
    "batch-size": 4,
    "micro-batch": 4,
    "schedule": "linear",
    "warmup-steps": 0,
    "weight-decay": 0,
    "sample-every": 0,
    "show-rows": 0,
    "log-every": 1000,
    "keep": 5,
}


def description_of(name: str) -> Any:
    """The description of a module's task."""
    return importlib.import_module(f"finetune.{name}").TASK


FAMILIES: dict[type, Any] = {
    ClassificationDescription: Classification,
    GenerationDescription: Generation,
    PreferenceDescription: Preferences,
}


def task_of(name: str) -> Any:
    """The Task that trains on the description of a module."""
    task = description_of(name)
    return FAMILIES[type(task)](task)


TASKS = sorted(file.stem for file in (REPO / "finetune").glob("*.py") if file.stem != "__init__")
GENERATION = [name for name in TASKS if isinstance(description_of(name), GenerationDescription)]
CLASSIFICATION = [
    name for name in TASKS if isinstance(description_of(name), ClassificationDescription)
]


def task_options(name: str, *more: Any) -> list[str]:
    """The command line of a tiny run: the task's defaults, then `more`, split at spaces. The last
    value of a repeated option counts."""
    typed = " ".join(map(str, more)).split()
    defaults = {k: v for k, v in OPTIONS.items() if k != "preset" or "--init" not in typed}
    defaults |= {"eval-rows": 0} if name in GENERATION else {}
    return [*(str(word) for k, v in defaults.items() for word in (f"--{k}", v)), *typed]


def run_task(name: str, folder: Path, *more: Any, **how: Any) -> list[Ended]:
    """Run a task as a command with the options of task_options. Returns how each rank ended."""
    return launch(folder, task_options(name, *more), program=f"finetune.{name}", **how)


def run_well(name: str, folder: Path, *more: Any, **how: Any) -> Ended:
    """Run a task that must end with exit code 0. Returns how rank 0 ended."""
    ends = run_task(name, folder, *more, **how)
    assert [end.code for end in ends] == [0] * len(ends), ends
    return ends[0]


def set_up_task(
    name: str, inputs: Path, say: Callable[[str], None] = lambda text: None, **options: Any
) -> Any:
    """Set up a task on its toy rows in this process, by default without dropout."""
    task = description_of(name)
    fixed: dict[str, Any] = dict(
        init="scratch", preset="micro", tokenizer=str(inputs / "tokenizer"), precision="fp32"
    )
    fixed["cache"] = str(inputs / "cache")
    fixed |= task.defaults | dict(
        data="toy", warmup_steps=0, lr=1e-3, steps=3, batch_size=4, dropout=0.0
    )
    fixed |= {"head_dropout": 0.0} if name in CLASSIFICATION else {}
    cfg = task.config(**fixed | options)
    trained = task_of(name)
    if isinstance(cfg, ClassificationConfig):
        cfg = lstm_config(cfg) if cfg.model == "lstm" else cfg
        trained = Classification(task, auxiliary_tasks(cfg, find_classification_task))
    cfg = resolve(cfg, "cpu")
    facts = trained.setup(cfg, say)
    assert facts.length
    trained.cfg = resolve_steps(cfg, *facts.length)
    return trained


def train_step(task: Finetuning, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    return TrainStep(task, task.build_model(task.cfg), task.cfg, ALONE)


def source_of(name: str, say: Any = print, **options: Any) -> Source:
    """The Source that reads the files of a task."""
    task = description_of(name)
    return Source(task, task.config(init="scratch", **options), say)


def check_against_transformers(final: Path, ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(
            GPT.from_pretrained(final).eval()(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4
        )
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert (
        tokenizer.encode(tokenizer.decode(ids)) == ids
        and len(tokenizer) == theirs.config.vocab_size
    )


def check_same_second_half(run: Path, branch: Path, step: int) -> None:
    """Assert that a resumed run equals the whole run after `step`: every logged figure, and the
    bits of the last checkpoint and of final/."""
    whole, second = log_of(run, "train"), log_of(branch, "train")
    for key in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert [line[key] for line in second] == [
            line[key] for line in whole if line["step"] > step
        ]
    last = max((run / "checkpoints").glob("step-*")) / "training_state.safetensors"
    files = [file.relative_to(run) for file in (last, *(run / "final").glob("*.safetensors"))]
    assert len(files) > 1
    for file in files:
        assert (branch / file).read_bytes() == (run / file).read_bytes(), file
