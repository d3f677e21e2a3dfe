"""Tiny runs of the tasks of finetune/ on their toy rows, in this process and as a user starts
them."""

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
from tasks.source import Source

CPU = torch.device("cpu")


ALONE = World(0, 0, 1, 1, CPU)


OPTIONS = {  # of a run on the toy rows, all of them in each step
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


def kind(name: str) -> Any:
    """The description of a module's task."""
    return importlib.import_module(f"finetune.{name}").TASK


def family(name: str) -> Any:
    """What trains it."""
    task = kind(name)
    return Classification(task) if isinstance(task, ClassificationDescription) else Generation(task)


TASKS = sorted(file.stem for file in (REPO / "finetune").glob("*.py") if file.stem != "__init__")


GENERATION = [name for name in TASKS if isinstance(kind(name), GenerationDescription)]


CLASSIFICATION = [name for name in TASKS if isinstance(kind(name), ClassificationDescription)]


def words(name: str, *more: Any) -> list[str]:
    """The options of a tiny run of a task, then `more`; of an option that is there twice the later
    one counts."""
    chosen = {
        name: value for name, value in OPTIONS.items() if name != "preset" or "--init" not in more
    }
    chosen |= {"eval-rows": 0} if name in GENERATION else {}
    return [
        *(str(word) for name, value in chosen.items() for word in (f"--{name}", value)),
        *map(str, more),
    ]


def run_task(name: str, folder: Path, *more: Any, **how: Any) -> list[Ended]:
    return launch(folder, words(name, *more), program=f"finetune.{name}", **how)


def finished(name: str, folder: Path, *more: Any, **how: Any) -> Ended:
    """The first rank of a run that ends well."""
    ends = run_task(name, folder, *more, **how)
    assert [end.code for end in ends] == [0] * len(ends), ends
    return ends[0]


def set_up(
    name: str, inputs: Path, say: Callable[[str], None] = lambda text: None, **options: Any
) -> Any:
    """A task on its toy rows, in this process; without dropout, unless the test says so."""
    task = kind(name)
    fixed: dict[str, Any] = dict(
        init="scratch", preset="micro", tokenizer=str(inputs / "tokenizer"), precision="fp32"
    )
    fixed |= task.defaults | dict(
        data="toy", warmup_steps=0, lr=1e-3, steps=3, batch_size=4, dropout=0.0
    )
    fixed |= {"head_dropout": 0.0} if name in CLASSIFICATION else {}
    cfg = task.config(**fixed | options)
    trained = family(name)
    if isinstance(cfg, ClassificationConfig):
        cfg = lstm_config(cfg) if cfg.model == "lstm" else cfg
        trained = Classification(task, auxiliary_tasks(cfg, find_classification_task))
    cfg = resolve(cfg, "cpu")
    facts = trained.setup(cfg, say)
    assert facts.length
    trained.cfg = resolve_steps(cfg, *facts.length)
    return trained


def step_of(task: Finetuning, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    return TrainStep(task, task.build_model(task.cfg), task.cfg, ALONE)


def reader(name: str, say: Any = print, **options: Any) -> Source:
    """Reads the files of a task."""
    task = kind(name)
    return Source(task, task.config(init="scratch", **options), say)


def agrees_with_transformers(final: Path, ids: list[int]) -> None:
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


def same_second_half(run: Path, branch: Path, step: int) -> None:
    """Every figure after `step`, and the bits of the last checkpoint and of final/."""
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
