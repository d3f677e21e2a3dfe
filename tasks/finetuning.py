"""What both families of fine-tuning hand to the loop: a model that is the trunk with what its
method adds, batches of rows of like length, and the facts of a run.

A row becomes a sequence of tokens, padded at the right, where causal attention sees nothing of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from adapters.options import METHODS
from config import RunConfig
from engine.optim import Group
from engine.task import Cost, Facts, Task
from model import GPT
from tasks import methods
from tasks.description import Description
from tasks.order import InterleavedOrder, bucket_lengths, padding_share
from tasks.source import Source
from tasks.trunk import Trunk
from text.rows import Row

# of everything that is scored: in bf16 near ties fall otherwise with every other batch
EVAL_PRECISION = "fp32"


@dataclass
class Split:
    """Sequences of a split, by row id."""

    rows: list[Row]
    tokens: list[np.ndarray]  # int64
    sha256: str

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model reads of each."""
        return np.array([len(tokens) for tokens in self.tokens])


class Predictor(Protocol):
    """A finished model and the rows of --predict that it is to answer."""

    @property
    def rows(self) -> list[Row]: ...

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, float]:
        """Write the answers to all rows; returns their scores where the file has the true ones."""
        ...


class Finetuning(Task):
    """A task of the loop that follows a description. A family reads the rows in `setup` and says
    what a batch, its loss and its metrics are."""

    description: Any  # of the family's kind
    cfg: Any  # of the description's kind of options
    source: Source
    predict_rows: list[Row] | None = None  # the rows of --predict, where `setup` has read them
    trunk: Trunk
    order: InterleavedOrder
    train: Any  # Split of the family's kind
    val: Any
    # options of the family that all starts of a run must have in common
    choices: tuple[str, ...] = ()

    def __init__(self, description: Description):
        self.description = description
        self.name, self.config = description.name, description.config
        self.defaults, self.best = description.defaults, description.best

    def build_model(self, cfg: RunConfig) -> GPT:
        self.cfg = cfg
        return self.trunk.build()

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        assert isinstance(model, GPT)
        return methods.groups(model, self.cfg, step, self.order.steps_per_epoch)

    def stored(self, name: str) -> bool:
        return name in self.trunk.stored

    def set_order(self, heads: np.ndarray, group: int = 1) -> None:
        """The batches of each step, and the lengths that they are padded to; heads: (n,) the task
        that each training row is of."""
        cfg, lengths = self.cfg, self.train.lengths
        self.order = InterleavedOrder(lengths, heads, cfg.batch_size, cfg.seed, group)
        both = np.concatenate((lengths, self.val.lengths))
        self.buckets = bucket_lengths(both, self.trunk.seq_len)

    def amounts(self, split: Split, ids: np.ndarray, idx: Tensor) -> dict[str, float]:
        """What a batch of these rows, padded to idx (B, T), holds."""
        tokens = float(split.lengths[ids].sum())
        return {"tokens": tokens, "padded_tokens": idx.numel(), "rows": len(ids)}

    # --- what a finished model says

    def write_reports(self, run: str, say: Callable[[str], None]) -> None:
        """Write into the folder of a finished run what is to be known of its model; rank 0
        alone."""

    def open_predictor(self, cfg: Any, where: str, say: Callable[[str], None]) -> Predictor:
        """The model of a checkpoint, ready to answer the rows of --predict. Raises UserError for
        what is wrong with either."""
        raise NotImplementedError

    def read_predict_rows(self, cfg: Any, say: Callable[[str], None]) -> list[Row]:
        """The rows of --predict."""
        if self.predict_rows is None:
            self.predict_rows = Source(self.description, cfg, say).predict_rows
        return self.predict_rows

    # --- what the loop must know

    def facts(self, hub_class: tuple[str, str] = Facts.hub_class) -> Facts:
        """Once trunk, rows and order are there."""
        epoch, size = self.order.steps_per_epoch, self.cfg.batch_size
        return Facts(
            identity=self.identity(),
            banner=self.banner(),
            rows_per_rank=lambda world_size: -(-size // world_size),
            tokens_per_step=float(self.train.lengths.mean()) * min(size, len(self.train.rows)),
            cost=self.cost(),
            length=(self.cfg.steps or self.cfg.epochs * epoch, epoch),
            longest=np.argsort(-self.train.lengths, kind="stable"),
            exact_evaluation=True,  # as --predict, whose figures are to be the same
            hub_class=hub_class,
            warnings=tuple(self.source.warnings),
        )

    def cost(self) -> Cost:
        """What a step takes."""
        shape = self.trunk.shape
        with torch.device("meta"):
            flops = GPT(shape).flops_per_token(int(self.train.lengths.max()))
        return Cost(shape, int(self.buckets[-1]), flops, self.trunk.with_adapter)

    def identity(self) -> dict[str, Any]:
        """What all starts of a run must have in common."""
        names = ["batch_size", "method", "llrd", *self.choices]
        names += METHODS[self.cfg.method].options
        config = {name: getattr(self.cfg, name) for name in names}
        config = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.items()
        }
        shape = self.trunk.shape
        return config | {
            "seq_len": self.trunk.seq_len,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.n_embd,
            "vocabulary": shape.vocab_size,
            "tied_head": shape.tied_head,
            "padded_vocabulary": shape.padded_vocab_size,
            "base": self.trunk.base_sha256,
            "data": hashlib.sha256(f"{self.train.sha256} {self.val.sha256}".encode()).hexdigest(),
            "val_data": self.val.sha256,
            "tokenizer": self.trunk.tokenizer.sha256,
        }

    def banner(self) -> dict[str, str]:
        """What a start tells of the task, the model, the tokenizer and the data."""
        shape, tokenizer, train = self.trunk.shape, self.trunk.tokenizer, self.train
        model = self.trunk.meta_model
        trained, total = methods.count_parameters(model, self.groups(model, 0))
        padding = padding_share(
            list(self.order.epoch(0)), train.lengths, self.buckets, self.cfg.batch_size
        )
        special = " ".join(self.trunk.special)
        return {
            "task": f"{self.name}, {self.cfg.method}: {trained:,} of {total:,} parameters train "
            f"({trained / total:.2%})",
            "model": f"{shape.n_layer} layers x {shape.n_embd} wide, {shape.n_head} heads, context "
            f"{self.trunk.seq_len}, "
            f"start: {self.cfg.init}",
            "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
            + (f", of them {special}" if special else ""),
            "data": f"{self.cfg.data}: {len(train.rows):,} rows to train on "
            f"({train.lengths.sum():,} tokens, "
            f"padding {padding:.0%} of a step), {len(self.val.rows):,} to validate on",
        }
