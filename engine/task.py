"""The seam between the training loop and what it trains.

A Task says where rows come from, what a batch is and what its loss is. The loop (engine/trainer.py)
makes optimizer steps of them and knows nothing else about a task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """What determines the memory and the compute of a step. The planner reads it."""

    shape: GPTConfig
    length: int  # tokens of the longest row, padding included
    flops_per_token: int | None = None  # forward and backward
    # changes the model before it trains: adds adapters, freezes parameters
    added: Callable[[GPT], object] | None = None
    # the loss (a scalar) of token ids (rows, length); None: the summed loss of the model's own
    # forward pass, each token predicting the next
    loss: Callable[[GPT, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Facts:
    """What the loop needs to know about a task after its set-up."""

    identity: dict[str, Any]  # must be the same at each start of a run; by option name
    banner: dict[str, str]  # lines about the model, the tokenizer and the data
    # rows of a step on one rank, given the number of ranks: the largest possible micro-batch
    rows_per_rank: Callable[[int], int]
    tokens_per_step: float  # over all ranks, without padding
    cost: Cost
    # (steps of the run, steps of an epoch); None: the options give the steps
    length: tuple[int, int] | None = None
    # ids of the training rows, those that need the most memory first; None: all need the same
    longest: np.ndarray | None = None
    exact_evaluation: bool = False  # evaluate in fp32, whatever the run's precision
    # the transformers class that loads final/, and the name of its pipeline
    hub_class: tuple[str, str] = ("AutoModelForCausalLM", "text-generation")
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Rows as CPU tensors, and what is known about them before the forward pass."""

    tensors: Tensors
    weights: dict[str, float]  # per loss term: how many targets (or rows) `loss` sums over
    amounts: dict[str, float]  # what the log counts per second: tokens without padding, rows


class Task:
    """What a run trains: its data, model, loss and metrics. Its only state is what `setup` read.

    An optimizer step is the same for every task. Let W[k] be the weight of loss term k, summed over
    all micro-batches and ranks, and L[k] the loss of that term, summed likewise. The objective is
    the sum over k of terms[k] * L[k] / W[k]. It does not depend on how the batch is divided into
    micro-batches and ranks. A term with W[k] = 0 is skipped.
    """

    name: str
    config: type[RunConfig]  # the class of its options
    defaults: Mapping[str, Any] = {}  # replace that class's defaults; the command line overrides
    terms: dict[str, float] = {"nll": 1.0}  # the loss terms and their factors in the objective
    best: tuple[str, str] = ("val_loss", "min")  # the metric that chooses the best checkpoint
    # The splits whose rows an evaluation takes. The groups of one that does not begin with val are
    # whole batches. Sums are named "SPLIT SUM", and those of val alone "SUM".
    evaluated: Sequence[str] = ("val",)
    cfg: Any  # its options, set by `setup`

    def setup(self, cfg: Any, say: Callable[[str], None], dry: bool = False) -> Facts:
        """Read the tokenizer and the rows, or with `dry` only what a dry run needs of them.

        `say` prints to the user. Raises UserError for whatever is wrong with the data.
        """
        raise NotImplementedError

    def build_model(self, cfg: Any) -> nn.Module:
        """The model, on the CPU, initialized from the global random state."""
        raise NotImplementedError

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        """The parameters that train at this step, with their rate scale and decay. The others are
        frozen. The result depends on nothing but the step."""
        return default_groups(model, self.cfg)

    def stored(self, name: str) -> bool:
        """Whether a checkpoint holds this parameter. `build_model` restores the others."""
        return True

    def rows(self, split: str, step: int) -> np.ndarray:
        """Row ids (groups, rows in a group) int64 of a step's global batch ("train") or of the
        whole evaluation ("val", or another split in `evaluated`).

        A group is never split across ranks or micro-batches. The result depends only on the seed
        and the step.
        """
        raise NotImplementedError

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """The rows with these ids (n,), as tensors with their weights and amounts."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The summed loss of each term, an fp32 scalar, for a batch's tensors on the device."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """Evaluate a batch's tensors on the device. Returns (sums, records).

        Sums are added over batches and ranks. Records, by row id, hold what cannot be added; they
        are gathered from all ranks, each row once.
        """
        raise NotImplementedError

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """The metrics of a whole evaluation, from its total sums and all its records."""
        raise NotImplementedError

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """Pairs of (prompt, continuation) to print during training."""
        return []

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model and its tokenizer in the hub's layout; with `stored_only`, only the
        parameters that a checkpoint stores."""
        raise NotImplementedError
