"""The training loss of a classifier, and its evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.task import Sums, Tensors
from model import GPT
from tasks.classification import confusion
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import probabilities
from tasks.classification.scorer import Scorer
from tasks.objectives import label_nll, rdrop, simcse


@dataclass(frozen=True)
class Objective:
    """The terms of the loss: the task's labels, the labels of auxiliary tasks on their own heads,
    R-Drop and SimCSE."""

    cfg: ClassificationConfig
    scorer: Scorer
    auxiliary: Mapping[str, float]  # weight of each auxiliary task's loss, by the name of its head

    @property
    def passes(self) -> int:
        """Number of forward passes of a row, each under different dropout."""
        return 2 if self.cfg.objective else 1

    @property
    def terms(self) -> dict[str, float]:
        """The weight of each term."""
        # R-Drop's objective is halved: mean nll + alpha / 2 x divergence.
        weights = {"rdrop": self.cfg.rdrop / 2, "simcse": self.cfg.simcse}
        return {"nll": 1.0, **self.auxiliary} | {name: weights[name] for name in self.cfg.objective}

    def term(self, head: int) -> str:
        """The name of the term for rows of a head."""
        return self.scorer.head_names[head] if head else "nll"

    def weights(self, batch: Tensors) -> dict[str, float]:
        """The divisor of each term's sum: the total weight of its rows, or for SimCSE their
        number."""
        total = float(batch["weights"].double().sum())
        found = {
            self.term(head): float(batch["weights"][batch["heads"] == head].double().sum())
            for head in batch["heads"].unique().tolist()
        }
        extra = {"rdrop": total, "simcse": float(len(batch["ids"]))}
        return found | {name: extra[name] for name in self.cfg.objective}

    def loss(self, model: GPT, batch: Tensors) -> Tensors:
        """The sum of each term over the batch, fp32 scalars."""
        n, passes, scorer = len(batch["ids"]), self.passes, self.scorer
        hidden, lengths = scorer.states(
            model, batch["idx"].repeat(passes, 1), batch["lengths"].repeat(passes)
        )
        views = [hidden[n * i : n * (i + 1)] for i in range(passes)]
        lengths = lengths[:n]
        terms: dict[str, Tensor] = dict.fromkeys(
            map(str, self.cfg.objective), hidden.new_zeros((), dtype=torch.float32)
        )
        for head, rows in self._by_head(batch):
            log_ps = [scorer.log_p(model, view[rows], lengths[rows], head) for view in views]
            labels, weights = batch["labels"][rows], batch["weights"][rows]
            nlls = [label_nll(log_p, labels, weights, self.cfg.label_smoothing) for log_p in log_ps]
            terms[self.term(head)] = torch.stack(nlls).mean()
            if "rdrop" in terms:
                terms["rdrop"] = terms["rdrop"] + rdrop(*log_ps, weights)
        if "simcse" in terms:
            # All rows of a training step belong to one task.
            head = int(batch["heads"][0]) if self.auxiliary else 0
            pooled = [scorer.pooled(model, view, lengths, head) for view in views]
            terms["simcse"] = simcse(*pooled, self.cfg.simcse_group, self.cfg.simcse_temperature)
        return terms

    def memory_probe(self, model: GPT, idx: Tensor) -> Tensor:
        """A scalar loss for idx (B, T) that takes as much memory as a training step, for the
        planner."""
        idx = idx.repeat(self.passes, 1)
        lengths = torch.full((len(idx),), idx.shape[1])
        return -self.scorer.log_p(model, *self.scorer.states(model, idx, lengths), 0).sum()

    def evaluate(self, model: GPT, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """No sums, and a record (head, label, log-probabilities) of each row: F1 and calibration do
        not add up over batches."""
        hidden, lengths = self.scorer.states(model, batch["idx"], batch["lengths"])
        found = {}
        for head, rows in self._by_head(batch):
            log_p = self.scorer.log_p(model, hidden[rows], lengths[rows], head)
            columns = (batch["ids"][rows].tolist(), batch["labels"][rows].tolist(), log_p.tolist())
            records = zip(*columns, strict=True)
            found |= {i: (head, label, values) for i, label, values in records}
        return {}, found

    def metrics(self, records: Mapping[int, Any]) -> dict[str, float]:
        """The metrics of each head's rows. Those of auxiliary tasks start with their head's
        name."""
        found: dict[str, float] = {}
        for head, key in enumerate(self.scorer.head_names):
            rows = [records[i][1:] for i in sorted(records) if records[i][0] == head]
            if not rows:
                continue  # no row of this head is clean
            labels, log_p = (np.array(column) for column in zip(*rows, strict=True))
            figures = {"val_loss": float(-log_p[np.arange(len(labels)), labels].mean())}
            figures |= confusion.figures(labels, probabilities(log_p))
            found |= {f"{key}_{name}" if head else name: value for name, value in figures.items()}
        return found

    def _by_head(self, batch: Tensors) -> Iterator[tuple[int, Any]]:
        """Each head that the batch has rows for, with an index of these rows.

        A single head needs no look at the batch, which would wait for the GPU.
        """
        if not self.auxiliary:
            yield 0, slice(None)
            return
        for head in batch["heads"].unique().tolist():
            yield head, batch["heads"] == head
