"""The seam between the loop and what it trains: a Task says where rows come from, what a batch is
and what its loss is; the loop (engine/trainer.py) says how an optimizer step is made of them, and
knows nothing else of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch.nn as nn
from torch import Tensor

from config import Resolved, RunConfig, resolved
from engine.memory import Memory
from engine.optim import Group, default_groups

Batch = dict[str, Tensor]


class Task:
    """What a training run is about. Subclasses are stateless but for what `setup` reads.

    One optimizer step, whatever the task: W[k] is the sum of `weights` over all micro-batches and
    ranks, and the objective is the sum over terms k of terms[k] x (sum of loss[k]) / W[k]; so it is
    exact at any accumulation and on any number of ranks. A term with W[k] = 0 is skipped.
    """

    name: ClassVar[str]
    config: ClassVar[type[RunConfig]]  # its options
    # of those, where they differ; the command line overrides
    defaults: ClassVar[dict[str, Any]] = {}
    terms: dict[str, float] = {"nll": 1.0}
    best: tuple[str, str] = ("val_loss", "min")  # the metric that chooses the best checkpoint
    ragged: ClassVar[bool] = False  # whether batches differ in length
    compiles_whole: ClassVar[bool] = True  # whether `loss` is the model's own forward pass
    exact_evaluation: ClassVar[bool] = (
        False  # whether figures are computed in fp32, whatever the run's precision
    )
    # what loads final/, and its pipeline
    hub_class: tuple[str, str] = ("AutoModelForCausalLM", "text-generation")
    warnings: tuple[str, ...] = ()  # what `setup` found that the run's log should hold

    cfg: Any  # of its kind of options

    def without_data(self, cfg: RunConfig) -> str:
        """What to tell a user who has named no data."""
        return ""

    def setup(self, cfg: RunConfig, say: Callable[[str], None]) -> None:
        """Read tokenizer and rows. Raises UserError for whatever is wrong with them."""
        raise NotImplementedError

    def plan(self, cfg: RunConfig) -> None:
        """As much of `setup` as a dry run needs."""
        self.setup(cfg, lambda text: None)

    def set_length(self, cfg: RunConfig) -> Resolved:
        """After `setup` or `plan`: the options with all that follows from the number of rows."""
        return resolved(cfg, Resolved)

    def rows_per_rank(self, cfg: RunConfig, world_size: int) -> int:
        """Rows of a step on one rank, the most that a micro-batch may have. Raises UserError where
        they do not divide."""
        raise NotImplementedError

    def tokens_per_step(self) -> float:
        """Over all ranks, padding not counted."""
        raise NotImplementedError

    def describe_step(self, micro_batch: int, world_size: int) -> str:
        """What a step consists of, for the banner."""
        raise NotImplementedError

    def longest_rows(self, n: int) -> np.ndarray:
        """Ids (n,) of training rows that need the most memory."""
        return np.resize(self.rows("train", 0).reshape(-1), n)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one to be resumed, by option
        name."""
        raise NotImplementedError

    def describe(self) -> dict[str, str]:
        """Lines of the banner: model, data, tokenizer."""
        raise NotImplementedError

    def estimate(
        self, cfg: Resolved, micro_batch: int, device_type: str, world_size: int
    ) -> Memory:
        """Peak memory of a rank, in bytes by part."""
        raise NotImplementedError

    def flops_per_token(self) -> int | None:
        """Of a forward and backward pass, where there is a formula for it."""
        return None

    def checkpoint_bytes(self) -> int:
        raise NotImplementedError

    def build_model(self, cfg: RunConfig) -> nn.Module:
        """The model on the CPU, initialised from the global random state."""
        raise NotImplementedError

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        """Which parameters train, their scale of the rate and decay. Pure in step; the others are
        frozen."""
        return default_groups(model, self.cfg)

    def is_stored(self, parameter: str) -> bool:
        """Whether a checkpoint holds this parameter; the others are what `build_model` makes
        them."""
        return True

    def rows(self, split: str, step: int) -> np.ndarray:
        """Ids of a global batch ("train") or of the whole evaluation ("val"), (groups, rows of a
        group) int64.

        A group is never split across ranks or micro-batches. Pure in (seed, step).
        """
        raise NotImplementedError

    def collate(self, split: str, ids: np.ndarray) -> Batch:
        """Rows as CPU tensors."""
        raise NotImplementedError

    def weights(self, batch: Batch) -> dict[str, float]:
        """Per term, how many targets (or rows) `loss` will sum over: known before the forward
        pass."""
        raise NotImplementedError

    def amounts(self, batch: Batch) -> dict[str, float]:
        """What a batch holds, for the log's rates: tokens without padding, and whatever else adds
        up: padded_tokens, rows."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Per term, the fp32 sum (a scalar)."""
        raise NotImplementedError

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | float]:
        """Evaluation counts that add up over batches and ranks."""
        raise NotImplementedError

    def outputs(self, model: nn.Module, batch: Batch) -> dict[int, Any]:
        """{row id: record} for what does not add up; gathered over ranks, each row once."""
        return {}

    def metrics(self, sums: dict[str, float], outputs: dict[int, Any]) -> dict[str, float]:
        raise NotImplementedError

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """(prompt, continuation) to print during training."""
        return []

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the model and its tokenizer in the hub's layout."""
        raise NotImplementedError

    def export_checkpoint(self, model: nn.Module, folder: Path) -> None:
        """The same of what a checkpoint holds: parameters that are not stored are not there."""
        self.export(model, folder)
