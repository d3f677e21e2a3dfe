"""The seam between the loop and what it trains: a Task says where rows come from, what a batch is
and what its loss is; the loop (engine/trainer.py) says how an optimizer step is made of them, and
knows nothing else of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn as nn
from torch import Tensor

from config import GPTConfig, RunConfig
from engine.optim import Group, default_groups
from model import GPT

Tensors = dict[str, Tensor]
Sums = dict[str, Tensor | float]


@dataclass(frozen=True)
class Cost:
    """What a step of a GPT takes, for the planner."""

    shape: GPTConfig
    length: int  # tokens of the longest row, padded
    flops_per_token: int | None = None  # of a forward and backward pass
    # what is done to the model before it trains: adapters are added, parameters frozen
    added: Callable[[GPT], object] | None = None
    # of token ids (rows, length), to a scalar; None: the summed loss of their language, by the
    # model's own forward pass
    loss: Callable[[GPT, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Facts:
    """What the loop must know of a task that has been set up."""

    identity: dict[str, Any]  # what all starts of a run must have in common, by option name
    banner: dict[str, str]  # its lines on the model, the tokenizer and the data
    # of a step, on one of so many ranks: the most that a micro-batch may have
    rows_per_rank: Callable[[int], int]
    tokens_per_step: float  # over all ranks, padding not counted
    cost: Cost
    # steps of the run and of one pass over the rows; None: the options say how long the run is
    length: tuple[int, int] | None = None
    # ids of the training rows, first those that need the most memory; None: all rows are alike
    longest: np.ndarray | None = None
    exact_evaluation: bool = False  # in fp32, whatever the run's precision
    # the class that loads final/, and its pipeline
    hub_class: tuple[str, str] = ("AutoModelForCausalLM", "text-generation")
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows as CPU tensors, and what is known of them before the forward pass."""

    tensors: Tensors
    weights: dict[str, float]  # per term, the targets (or rows) that `loss` sums over
    amounts: dict[str, float]  # for the log's rates: tokens without padding, and what else adds up


class Task:
    """What a training run is about. It holds nothing but what `setup` has read.

    One optimizer step, whatever the task: W[k] is the sum of a batch's weights over all
    micro-batches and ranks, and the objective is the sum over terms k of terms[k] x (sum of
    loss[k]) / W[k]; so it is exact at any accumulation and on any number of ranks. A term with
    W[k] = 0 is skipped.
    """

    name: str
    config: type[RunConfig]  # its options
    defaults: Mapping[str, Any] = {}  # of those, where they differ; the command line overrides
    terms: dict[str, float] = {"nll": 1.0}
    best: tuple[str, str] = ("val_loss", "min")  # the metric that chooses the best checkpoint
    cfg: Any  # of its kind of options

    def setup(self, cfg: Any, say: Callable[[str], None], dry: bool = False) -> Facts:
        """Read tokenizer and rows; `dry`: as much of them as a dry run needs. Raises UserError for
        whatever is wrong with them."""
        raise NotImplementedError

    def build_model(self, cfg: Any) -> nn.Module:
        """The model on the CPU, initialised from the global random state."""
        raise NotImplementedError

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        """Which parameters train, their scale of the rate and decay. Pure in step; the others are
        frozen."""
        return default_groups(model, self.cfg)

    def stored(self, name: str) -> bool:
        """Whether a checkpoint holds this parameter; the others are what `build_model` makes
        them."""
        return True

    def rows(self, split: str, step: int) -> np.ndarray:
        """Ids of a global batch ("train") or of the whole evaluation ("val"), (groups, rows of a
        group) int64.

        A group is never split across ranks or micro-batches. Pure in (seed, step).
        """
        raise NotImplementedError

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """These rows of a split."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """Per term, the fp32 sum (a scalar), of a batch's tensors on the device."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """Of a batch's tensors on the device: counts that add up over batches and ranks, and by row
        id a record of what does not, gathered over ranks with each row once."""
        raise NotImplementedError

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """The figures of a whole evaluation."""
        raise NotImplementedError

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """(prompt, continuation) to print during training."""
        return []

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model and its tokenizer in the hub's layout; `stored_only`: only the parameters
        that a checkpoint stores."""
        raise NotImplementedError
