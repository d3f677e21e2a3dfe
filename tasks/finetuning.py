"""The part of the task seam that the families of tasks share: the model with its adapter,
the order of rows, and the facts of a run.

A row becomes a sequence of tokens, padded at the right. Causal attention never reads that padding.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from adapters.options import METHODS
from base.console import counted
from base.files import write_json
from config import RunConfig, UserError
from engine.optim import Group
from engine.task import Cost, Facts, Task
from model import GPT
from storage.checkpoint import RESULTS
from tasks import methods
from tasks.description import Description
from tasks.order import InterleavedOrder, bucket_lengths, padding_share
from tasks.source import Source
from tasks.trunk import Trunk
from text.overlap import Overlap
from text.row import Row

# Scores are computed in fp32. In bf16, near ties change with the batch that a row is in.
EVAL_PRECISION = "fp32"


@dataclass
class Split:
    """The token sequences of a split. The index into the lists is the row id."""

    rows: list[Row]
    tokens: list[np.ndarray]  # int64
    sha256: str  # of everything that training depends on, to refuse a resume on other rows

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens that the model reads of each sequence, (n,) int64."""
        return np.array([len(tokens) for tokens in self.tokens])

    @property
    def read(self) -> np.ndarray:
        """Number of tokens that the model reads for each row, (n,) int64."""
        return self.lengths


class Predictor(Protocol):
    """A finished model and the rows of --predict that it will answer."""

    @property
    def rows(self) -> list[Row]:
        """The rows of --predict, in the order of the file."""
        ...

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Write the answers to all rows. Returns the scores of all rows and of clean rows, with the
        counts of both as "clean". {} if no true answer is known."""
        ...


class Finetuning(Task):
    """A Task that follows a description.

    Each family (Classification, Generation, Preferences) implements `setup`, `batch`, `loss` and the metrics.
    """

    description: Any  # the family's subclass of Description
    cfg: Any  # an instance of description.config
    is_set_up = False  # a finished run whose data is gone is not
    source: Source
    predict_rows: list[Row] | None = None  # the rows of --predict, once they are read
    trunk: Trunk
    order: InterleavedOrder
    train: Any  # the family's subclass of Split
    val: Any
    overlap: Overlap  # of the validation rows with the training rows
    # options of the family that must not change when a run is resumed
    choices: tuple[str, ...] = ()

    def __init__(self, description: Description):
        self.description = description
        self.name, self.config = description.name, description.config
        self.defaults, self.best = description.defaults, description.best

    def build_model(self, cfg: RunConfig) -> GPT:
        """The base of --init with heads and adapter, on the CPU."""
        self.cfg = cfg
        return self.trunk.build()

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        """The parameters that --method trains in this step, with their rates."""
        assert isinstance(model, GPT)
        return methods.groups(model, self.cfg, step, self.order.steps_per_epoch)

    def stored(self, name: str) -> bool:
        """Whether a checkpoint stores this parameter. An adapter's frozen base is not stored."""
        return name in self.trunk.stored

    def set_order(self, heads: np.ndarray, group: int = 1) -> None:
        """Set the order of the training rows and the lengths that batches are padded to.

        heads: (n,) int64, the number of each training row's task. group: rows that stay together.
        """
        cfg, lengths = self.cfg, self.train.lengths
        self.order = InterleavedOrder(lengths, heads, cfg.batch_size, cfg.seed, group)
        both = np.concatenate((lengths, self.val.lengths))
        self.buckets = bucket_lengths(both, self.trunk.seq_len)

    def amounts(self, split: Split, ids: np.ndarray, idx: Tensor) -> dict[str, float]:
        """The amounts that the log counts for the rows `ids` of a split, padded to idx (B, T)."""
        tokens = float(split.read[ids].sum())
        return {"tokens": tokens, "padded_tokens": idx.numel(), "rows": len(ids)}

    # --- the finished model

    def write_reports(self, run: str, say: Callable[[str], None]) -> None:
        """Write reports on the final model into the folder of a finished run. Rank 0 only."""
        self.write_clean(run, self.overlap, {}, say)

    def write_clean(
        self, run: str, overlap: Overlap, figures: dict[str, Any], say: Callable[[str], None]
    ) -> None:
        """Write `figures` and the counts of clean and shared validation rows into metrics.json."""
        file = Path(run) / RESULTS
        results = json.loads(file.read_text(encoding="utf-8"))
        write_json(file, results | figures | {"clean": overlap.counts})
        say(f"clean: {overlap.summary}")

    def open_predictor(self, cfg: Any, where: str, say: Callable[[str], None]) -> Predictor:
        """The model of checkpoint `where`, ready to answer the rows of --predict.

        Raises UserError if the checkpoint or the rows cannot be used.
        """
        raise NotImplementedError

    def read_text(self, row: Row, cfg: Any) -> str:
        """The text of a row that is compared with the texts of training rows."""
        return self.description.content(row)

    def training_texts(self) -> list[str]:
        """The texts of the training rows that `setup` has read."""
        return []

    def predict_overlap(
        self, cfg: Any, rows: Sequence[Row], say: Callable[[str], None]
    ) -> Overlap | None:
        """Which rows of --predict share an n-gram with a training row. If nothing is trained, the
        training rows are those of --data. None if they are not known."""
        source, training = Source(self.description, cfg, say), self.training_texts()
        if not cfg.trains and cfg.data:
            try:
                train, _ = source.training_and_validation()
            except UserError as error:
                say(f"the training rows cannot be read: {error}")
                return None
            training = [self.read_text(row, cfg) for row in train]
        if not training:
            return None
        texts = ["" if row.fault else self.read_text(row, cfg) for row in rows]
        return source.find_shared(texts, training)

    def read_predict_rows(self, cfg: Any, say: Callable[[str], None]) -> list[Row]:
        """The rows of --predict. Reads the file only if `setup` has not read it."""
        if self.predict_rows is None:
            self.predict_rows = Source(self.description, cfg, say).predict_rows
        return self.predict_rows

    # --- facts for the loop

    def facts(self, hub_class: tuple[str, str] = Facts.hub_class) -> Facts:
        """The facts of the run. Call it at the end of `setup`, when trunk, rows and order are
        set."""
        epoch, size = self.order.steps_per_epoch, self.cfg.batch_size
        self.is_set_up = True
        return Facts(
            identity=self.identity(),
            banner=self.banner(),
            rows_per_rank=lambda world_size: -(-size // world_size),
            tokens_per_step=float(self.train.read.mean()) * min(size, len(self.train.rows)),
            cost=self.cost(),
            length=(self.cfg.steps or self.cfg.epochs * epoch, epoch),
            longest=np.argsort(-self.train.lengths, kind="stable"),
            exact_evaluation=True,  # so that evaluation and --predict report the same figures
            hub_class=hub_class,
            warnings=tuple(self.source.warnings),
        )

    def cost(self) -> Cost:
        """The cost of the longest row, for the planner."""
        shape = self.trunk.shape
        with torch.device("meta"):
            flops = GPT(shape).flops_per_token(int(self.train.lengths.max()))
        return Cost(shape, int(self.buckets[-1]), flops, self.trunk.with_adapter)

    def identity(self) -> dict[str, Any]:
        """Everything that must not change when a run is resumed, by option name."""
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
        """The lines on task, model, tokenizer and data that a run prints at its start."""
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
            "model": f"{counted(shape.n_layer, 'layer')} x {shape.n_embd} wide, "
            f"{counted(shape.n_head, 'head')}, context "
            f"{self.trunk.seq_len}, "
            f"start: {self.cfg.init}",
            "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"
            + (f", including {special}" if special else ""),
            "data": f"{self.cfg.data}: {len(train.rows):,} rows to train on "
            f"({train.read.sum():,} tokens, "
            f"padding {padding:.0%} of a step), {len(self.val.rows):,} to validate on",
            "clean": self.overlap.summary,
        }
