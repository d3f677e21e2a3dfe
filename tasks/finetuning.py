"""Fine-tuning: what all tasks on rows of a file share, whether their answers are texts
(tasks/generation/task.py) or labels (tasks/classification/task.py): reading rows, the base and its
vocabulary, the method, the order, what a checkpoint holds.

A row becomes a sequence of tokens, padded at the right, where causal attention sees nothing of it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from config import GPTConfig, RunConfig
from engine.optim import Group
from engine.task import Cost, Facts, Task
from model import GPT
from tasks import methods
from tasks.options import FinetuneConfig
from tasks.order import Order, padded_lengths, padding_share
from tasks.trunk import Trunk
from text.rows import Expand, Reader, Row, hold_out, overlap, read_rows


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


class Finetuning(Task):
    """A family fills in `setup`, `batch`, the loss and the metrics; a task says what its rows
    are."""

    config: ClassVar[Any] = FinetuneConfig  # its kind of options
    cfg: Any  # of that kind
    # fields and the columns they may come from
    columns: ClassVar[dict[str, tuple[str, ...]]] = {"text": ("text",)}
    optional: ClassVar[tuple[str, ...]] = ()  # fields that a row may lack
    truth: ClassVar[tuple[str, ...]] = ()  # fields that a row of --predict may lack
    readers: ClassVar[dict[str, Reader]] = {}  # of files that only this task knows, by suffix
    expand: ClassVar[Expand | None] = None  # what a task makes of each row of any file
    predictions: ClassVar[str] = "predictions.jsonl"  # the file of answers
    special: tuple[str, ...] = ()  # tokens that the task adds to the vocabulary
    # what loads final/, and its pipeline
    hub_class: tuple[str, str] = Facts.hub_class
    warnings: tuple[str, ...] = ()  # what the rows and the vocabulary gave cause for
    to_answer: list[Row] | None = None  # the rows of --predict, once they are read
    pads: ClassVar[bool] = (
        False  # whether the hub's class for such models must know what fills a batch
    )
    toy: ClassVar[Sequence[dict[str, str]]]  # a few rows to try the task with
    # options of the family that a resumed run must have in common
    choices: ClassVar[tuple[str, ...]] = ()

    train: Any  # Split of the family's kind
    val: Any

    # --- what a task says

    def content(self, row: Row) -> str:
        """Equal for rows that are the same."""
        return "".join(row.fields.values())

    def kin(self, row: Row) -> str:
        """Equal for rows that are held out together."""
        return self.content(row)

    # --- rows

    def begin(self, say: Callable[[str], None], dry: bool) -> Callable[[str], None]:
        """Forget what an earlier call of `setup` found. Returns what it is to speak by."""
        self.warnings = ()
        return (lambda text: None) if dry else say

    def read(self, spec: str, split: str, say: Callable[[str], None]) -> list[Row]:
        """Rows of `--data` ("train"), `--val-data` ("validation") or `--predict` ("test")."""
        if spec == "toy":
            return [
                Row(dict.fromkeys(self.columns, "") | row, f"toy row {n}")
                for n, row in enumerate(self.toy, 1)
            ]
        # `--FIELD-column` names the column of a field, `--lines` makes a row of each line of a text
        # file.
        columns = {
            field: getattr(self.cfg, f"{field}_column", None) or names
            for field, names in self.columns.items()
        }
        optional = self.optional + (self.truth if split == "test" else ())
        found = read_rows(
            spec,
            columns,
            optional=optional,
            strict=self.cfg.strict,
            split=split,
            lines=getattr(self.cfg, "lines", False),
            readers=self.readers,
            expand=self.expand,
            say=say,
            every=split == "test",
        )
        if found.skipped:
            what = "their answers are empty" if split == "test" else "are left out"
            self.warnings += (f"{spec}: {found.skipped:,} rows could not be read and {what}",)
        return found.rows

    def rows_to_answer(self, cfg: Any, say: Callable[[str], None]) -> list[Row]:
        """Every row of --predict, in order. Read once: by `setup`, so that what is wrong with them
        costs no training."""
        if self.to_answer is None:
            self.to_answer = self.read(cfg.predict, "test", say)
        return self.to_answer

    def _training_and_validation(self, say: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
        cfg = self.cfg
        train = self.read(cfg.data, "train", say)
        if cfg.val_data:
            return train, self.read(cfg.val_data, "validation", say)
        if cfg.data == "toy":
            return train, train
        parts = hold_out([self.kin(row) for row in train])
        train, val = ([train[i] for i in ids] for ids in parts)
        return train, val

    def known_rows(self, train: Sequence[Row], val: Sequence[Row]) -> int:
        """Training rows that also stand among the validation rows that the user named."""
        return (
            overlap(*([self.content(row) for row in rows] for rows in (train, val)))
            if self.cfg.val_data
            else 0
        )

    # --- vocabulary and shape

    def open_trunk(self) -> None:
        """Open the base or the shape, and the tokenizer."""
        self.trunk = Trunk(self.cfg, self.special, self.add_heads)
        self.tokenizer = self.trunk.tokenizer
        self.seq_len = self.trunk.longest_row()

    def add_heads(self, model: GPT) -> None:
        """Put the task's heads on the model; a task that writes text has the model's own."""

    @property
    def shape(self) -> GPTConfig:
        return self.trunk.shape

    def _set_order(self, group: int = 1) -> None:
        """The batches of each step, and the lengths they are padded to."""
        self.padded = padded_lengths(
            np.concatenate((self.train.lengths, self.val.lengths)), self.seq_len
        )
        self.order = Order(self.train.lengths, self.cfg.batch_size, self.cfg.seed, group)

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    # --- the run

    def facts(self) -> Facts:
        """What the loop must know, once rows and order are read."""
        self._stored = self.trunk.stored()
        epoch, size = self.steps_per_epoch, self.cfg.batch_size
        return Facts(
            identity=self.identity(),
            banner=self.describe(),
            rows_per_rank=lambda world_size: -(-size // world_size),
            tokens_per_step=float(self.train.lengths.mean()) * min(size, len(self.train.rows)),
            cost=self.cost(),
            length=(self.cfg.steps or self.cfg.epochs * epoch, epoch),
            longest=np.argsort(-self.train.lengths, kind="stable"),
            exact_evaluation=True,  # as --predict, whose figures are to be the same
            hub_class=self.hub_class,
            warnings=self.warnings,
        )

    def cost(self) -> Cost:
        """What a step takes."""
        with torch.device("meta"):
            flops = GPT(self.shape).flops_per_token(int(self.train.lengths.max()))
        return Cost(self.shape, int(self.padded[-1]), flops, self.trunk.added)

    def identity(self) -> dict[str, Any]:
        names = ["batch_size", "method", "llrd", *self.choices]
        names += [name for name, owners in methods.OPTIONS.items() if self.cfg.method in owners]
        config = {name: getattr(self.cfg, name) for name in names}
        config = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in config.items()
        }
        return config | {
            "seq_len": self.seq_len,
            "n_layer": self.shape.n_layer,
            "n_head": self.shape.n_head,
            "n_embd": self.shape.n_embd,
            "vocabulary": self.shape.vocab_size,
            "tied_head": self.shape.tied_head,
            "padded_vocabulary": self.shape.padded_vocab_size,
            "base": self.trunk.base_sha256,
            "data": hashlib.sha256(f"{self.train.sha256} {self.val.sha256}".encode()).hexdigest(),
            "val_data": self.val.sha256,
            "tokenizer": self.tokenizer.sha256,
        }

    def describe(self) -> dict[str, str]:
        shape, train = self.shape, self.train
        model = self.trunk.without_weights
        trained, total = methods.counts(model, self.groups(model, 0))
        padding = padding_share(
            self.order.epoch(0), train.lengths, self.padded, self.cfg.batch_size
        )
        return {
            "task": f"{self.name}, {self.cfg.method}: {trained:,} of {total:,} parameters train "
            f"({trained / total:.2%})",
            "model": f"{shape.n_layer} layers x {shape.n_embd} wide, {shape.n_head} heads, context "
            f"{self.seq_len}, "
            f"start: {self.cfg.init}",
            "tokenizer": f"{self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids"
            + (f", of them {' '.join(self.special)}" if self.special else ""),
            "data": f"{self.cfg.data}: {len(train.rows):,} rows to train on "
            f"({train.lengths.sum():,} tokens, "
            f"padding {padding:.0%} of a step), {len(self.val.rows):,} to validate on",
        }

    # --- the model

    def build_model(self, cfg: RunConfig) -> GPT:
        self.cfg = cfg
        return self.trunk.build()

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        assert isinstance(model, GPT)
        return self.trunk.groups(model, step, self.steps_per_epoch)

    def stored(self, name: str) -> bool:
        return name in self._stored

    def amounts(self, split: Split, ids: np.ndarray, idx: Tensor) -> dict[str, float]:
        """What a batch of these rows, padded to idx (B, T), holds."""
        tokens = float(split.lengths[ids].sum())
        return {"tokens": tokens, "padded_tokens": idx.numel(), "rows": len(ids)}

    # --- what a finished model says

    def conclude(self, cfg: Any, run: str, say: Callable[[str], None]) -> None:
        """Write into the folder of a finished run what is to be known of its model; rank 0
        alone."""

    def ready(self, cfg: Any, where: str, say: Callable[[str], None]) -> tuple[GPT, list[Row]]:
        """The model of a checkpoint and the rows of `--predict`. Raises UserError for what is wrong
        with either."""
        raise NotImplementedError

    def predict(
        self, cfg: Any, where: str, path: Path, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Write the answers that the model of a checkpoint gives to the rows of `--predict`.

        Returns their scores where the file has the true ones.
        """
        raise NotImplementedError

    # --- what is written

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        assert isinstance(model, GPT)
        self.trunk.export(model, folder, stored_only, self.pads)
