"""Toy tasks that are not language models: a tagger and a ranker on one trunk, with ragged rows and
two loss terms. And a task for whole runs whose evaluations return given scores.

TwoHeads: row i has `lengths[i]` tokens. Some tokens have a target for the tagger, and some rows
have one for the ranker. So every micro-batch has a different number of targets for each term. A
batch or a step may lack the targets of one term or of both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from config import GPTConfig, TrainConfig
from engine.loader import Loader
from engine.optim import Group
from engine.processes import World
from engine.step import StepResult, TrainStep
from engine.task import Batch, Cost, Facts, Sums, Task, Tensors

ROWS = 64
STEPS = 12
BATCH = 10  # rows in a step, in groups of GROUP
GROUP = 2


class Network(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.trunk = nn.Linear(3, 5)
        self.dropout = nn.Dropout(dropout)
        self.tagger = nn.Linear(5, 1)
        self.ranker = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.trunk(x)))


class TwoHeads(Task):
    name = "two-heads"
    terms = {"tag": 1.0, "rank": 0.3}
    best = ("tag", "min")

    def __init__(self, unfreeze_at: int = 0, dropout: float = 0.0, batch: int = BATCH):
        draw = np.random.default_rng(0)
        self.lengths = draw.integers(1, 7, ROWS)
        self.x = draw.normal(size=(ROWS, 7, 3)).astype(np.float32)
        self.y = draw.normal(size=(ROWS, 7)).astype(np.float32)
        self.tagged = draw.random((ROWS, 7)) < 0.6
        self.ranked = draw.random(ROWS) < 0.5
        self.unfreeze_at, self.dropout, self.size = unfreeze_at, dropout, batch
        # step: what the loss of its second group is multiplied by
        self.poison: dict[int, float] = {}
        # the middle group of step 0 has rows for the ranker alone, that of step 2 for neither
        middle = batch // GROUP // 2
        self.tagged[self.rows("train", 0)[middle]] = False
        self.ranked[self.rows("train", 0)[middle]] = True
        self.tagged[self.rows("train", 2)[middle]] = False
        # step 1 has no row for the ranker, step 2 a single one
        self.ranked[self.rows("train", 1)] = False
        self.ranked[self.rows("train", 2)] = False
        self.ranked[self.rows("train", 2)[-1, 0]] = True

    def build_model(self, cfg: TrainConfig) -> nn.Module:
        return Network(self.dropout)

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        named = dict(model.named_parameters())
        if step < self.unfreeze_at:
            named = {name: p for name, p in named.items() if not name.startswith("trunk")}
        return [Group(named, weight_decay=0.1)]

    def rows(self, split: str, step: int) -> np.ndarray:
        if split == "val":
            return np.arange(ROWS - 13, ROWS)[:, None]
        return (np.arange(self.size) + step * self.size).reshape(-1, GROUP) % (ROWS - 14)

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        width = self.lengths[ids].max()
        there = np.arange(width) < self.lengths[ids][:, None]
        arrays = {
            "ids": ids,
            "x": self.x[ids, :width],
            "y": self.y[ids, :width],
            "there": there,
            "tagged": self.tagged[ids, :width] & there,
            "ranked": self.ranked[ids],
        }
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()
        }
        counts = {"tag": float(tensors["tagged"].sum()), "rank": float(tensors["ranked"].sum())}
        weights = {name: count for name, count in counts.items() if count}
        return Batch(tensors, weights, {"tokens": float(there.sum()), "rows": len(ids)})

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        x = batch["x"].to(model.trunk.weight.dtype)
        hidden, terms = model(x), {}
        if batch["tagged"].any():  # else this head is not even used
            tags = model.tagger(hidden).squeeze(-1).to(x.dtype)
            terms["tag"] = ((tags - batch["y"]) ** 2)[batch["tagged"]].sum() * self._poison(batch)
        if batch["ranked"].any():
            summary = (hidden * batch["there"].unsqueeze(-1)).sum(1)
            score = model.ranker(summary).squeeze(-1).to(x.dtype)
            terms["rank"] = ((score - batch["y"][:, 0]) ** 2)[batch["ranked"]].sum()
        return terms

    def _poison(self, batch: dict[str, Tensor]) -> float:
        for step, value in self.poison.items():
            # on rank 1, where there is one
            if set(self.rows("train", step)[1].tolist()) & set(batch["ids"].tolist()):
                return value
        return 1.0

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        sums: Sums = {
            "tag": self.loss(model, batch).get("tag", 0.0),
            "targets": batch["tagged"].sum(),
            "rows": len(batch["ids"]),
        }
        tokens = batch["there"].sum(1)
        return sums, {int(i): float(n) for i, n in zip(batch["ids"], tokens, strict=True)}

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        return {
            "tag": sums["tag"] / sums["targets"],
            "rows": sums["rows"],
            "records": len(records),
            "longest": max(records.values()),
        }

    def expected_metrics(self, model: nn.Module) -> dict[str, float]:
        """The metrics of all validation rows at once, in fp64."""
        ids = self.rows("val", 0).reshape(-1)
        batch = self.batch("val", ids).tensors
        with torch.no_grad():
            loss = self.loss(copy.deepcopy(model).double().eval(), batch)["tag"]
        tag = float(loss / batch["tagged"].sum())
        return {
            "tag": tag,
            "rows": len(ids),
            "records": len(ids),
            "longest": self.lengths[ids].max(),
        }


SMALLEST = GPTConfig(vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=1)


class Counter(nn.Module):
    """One weight, and the number of steps that it was trained."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


class Scripted(Task):
    """A task whose evaluation after s steps, in two batches, returns scores[s - 1]."""

    name = "scripted"
    config = TrainConfig

    def __init__(self, scores: list[float], mode: str = "min"):
        self.scores, self.best = scores, ("score", mode)
        # called at this point of a run
        self.during: Callable[[str, int], None] = lambda what, step: None

    def setup(self, cfg: TrainConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        self.cfg = cfg
        return Facts({}, {}, lambda world_size: 4 // world_size, 4, Cost(SMALLEST, 1))

    def build_model(self, cfg: TrainConfig) -> nn.Module:
        return Counter()

    def rows(self, split: str, step: int) -> np.ndarray:
        return np.arange(4 if split == "train" else 8)[:, None]

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        amounts = {"tokens": 3 * len(ids), "padded_tokens": 5 * len(ids), "rows": len(ids)}
        return Batch({"ids": torch.from_numpy(ids)}, {"nll": len(ids)}, amounts)

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        assert isinstance(model, Counter)
        model.steps += 1
        self.during("step", int(model.steps))
        return {"nll": (model.weight**2 * (1 + batch["ids"])).sum()}

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        assert isinstance(model, Counter)
        self.during("evaluation", int(model.steps))
        return {"steps": model.steps, "batches": 1}, {}

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        return {"score": self.scores[int(sums["steps"] / sums["batches"]) - 1]}

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        assert isinstance(model, Counter)
        self.during("sample", int(model.steps))
        return [("after", f"{int(model.steps)}")]

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        assert isinstance(model, Counter)
        (folder / "steps.txt").write_text(str(int(model.steps)))


def whole_run(out: Path, steps: int, **options: Any) -> TrainConfig:
    """Options for a run of Scripted with whole global batches. The run leaves this process
    unchanged."""
    fixed: dict[str, Any] = {
        "out": str(out),
        "micro_batch": "auto",
        "device": "cpu",
        "without": ("kept-memory",),
    }
    return config(steps=steps, **fixed | options)


def config(**options: Any) -> TrainConfig:
    fixed: dict[str, Any] = {
        "steps": STEPS,
        "lr": 1e-2,
        "warmup_steps": 0,
        "clip": 1.0,
        "precision": "fp32",
    }
    return TrainConfig(**fixed | options)


def step_of(task: Task, world: World, seed: int = 0, **options: Any) -> TrainStep:
    torch.manual_seed(seed)
    cfg: Any = config(**options)
    return TrainStep(task, task.build_model(cfg), cfg, world)


def loader(task: Task, world: World, micro_batch: int) -> Loader:
    return Loader(task, world, micro_batch, STEPS, ahead=0)


def run_step(train: TrainStep, step: int, data: Loader) -> StepResult:
    """Make one step, which must not be stopped."""
    result = train(step, data(step))
    assert result is not None
    return result


def capture_gradients(step: TrainStep) -> dict[str, Tensor]:
    """A dictionary that the next step fills with the gradients for its update. The update is
    skipped."""
    found: dict[str, Tensor] = {}

    def keep(lr: float, factor: Tensor | None, ok: Tensor) -> None:
        times = 1.0 if factor is None else factor
        found.update(
            {
                name: p.grad * times
                for name, p in step.model.named_parameters()
                if p.grad is not None
            }
        )

    step.optimizers.step = keep
    return found


def expected_gradients(
    task: TwoHeads, model: nn.Module, step: int
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    """The objective, the mean of each term and the gradients of a step's whole batch at once, in
    fp64."""
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    batch = task.batch("train", task.rows("train", step).reshape(-1))
    weights, sums = batch.weights, task.loss(exact, batch.tensors)
    terms = {name: sums[name] / weights[name] for name in weights}
    loss = torch.stack([task.terms[name] * terms[name] for name in weights]).sum()
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in exact.named_parameters()
        if p.requires_grad
    }
    return loss.item(), {name: value.item() for name, value in terms.items()}, gradients
