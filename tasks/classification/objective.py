"""What a classifier's step minimises, and what an evaluation of it counts."""

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
    """The terms of the loss: that of the task's labels, those of other tasks on heads of their own,
    R-Drop and SimCSE."""

    cfg: ClassificationConfig
    scorer: Scorer
    others: Mapping[str, float]  # weight of the loss of each other task, by the name of its head

    @property
    def passes(self) -> int:
        """Forward passes of a row, under different dropout."""
        return 2 if self.cfg.objective else 1

    @property
    def terms(self) -> dict[str, float]:
        """The weight of each term."""
        # half of R-Drop's objective: the mean nll, alpha/2 its divergence
        of = {"rdrop": self.cfg.rdrop / 2, "simcse": self.cfg.simcse}
        return {"nll": 1.0, **self.others} | {name: of[name] for name in self.cfg.objective}

    def term(self, head: int) -> str:
        """The term of the rows of a head."""
        return self.scorer.head_names[head] if head else "nll"

    def weights(self, batch: Tensors) -> dict[str, float]:
        """What each term's sum is of: the rows' weights, or their number."""
        total = float(batch["weights"].double().sum())
        found = {
            self.term(head): float(batch["weights"][batch["heads"] == head].double().sum())
            for head in batch["heads"].unique().tolist()
        }
        of = {"rdrop": total, "simcse": float(len(batch["ids"]))}
        return found | {name: of[name] for name in self.cfg.objective}

    def loss(self, model: GPT, batch: Tensors) -> Tensors:
        """Per term, the fp32 sum."""
        n, passes, scorer = len(batch["ids"]), self.passes, self.scorer
        hidden, lengths = scorer.states(
            model, batch["idx"].repeat(passes, 1), batch["lengths"].repeat(passes)
        )
        views = [hidden[n * i : n * (i + 1)] for i in range(passes)]
        lengths = lengths[:n]
        terms: dict[str, Tensor] = dict.fromkeys(
            map(str, self.cfg.objective), hidden.new_zeros((), dtype=torch.float32)
        )
        for head, mine in self._by_head(batch):
            log_ps = [scorer.log_p(model, view[mine], lengths[mine], head) for view in views]
            labels, weights = batch["labels"][mine], batch["weights"][mine]
            nlls = [label_nll(log_p, labels, weights, self.cfg.label_smoothing) for log_p in log_ps]
            terms[self.term(head)] = torch.stack(nlls).mean()
            if "rdrop" in terms:
                terms["rdrop"] = terms["rdrop"] + rdrop(*log_ps, weights)
        if "simcse" in terms:
            # a step's rows are of one task
            head = int(batch["heads"][0]) if self.others else 0
            pooled = [scorer.pooled(model, view, lengths, head) for view in views]
            terms["simcse"] = simcse(*pooled, self.cfg.simcse_group, self.cfg.simcse_temperature)
        return terms

    def memory_probe(self, model: GPT, idx: Tensor) -> Tensor:
        """What a step computes, for its memory: idx (B, T) to a loss."""
        idx = idx.repeat(self.passes, 1)
        lengths = torch.full((len(idx),), idx.shape[1])
        return -self.scorer.log_p(model, *self.scorer.states(model, idx, lengths), 0).sum()

    def evaluate(self, model: GPT, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """Head, label and log-probabilities of each row: F1 and calibration do not add up."""
        hidden, lengths = self.scorer.states(model, batch["idx"], batch["lengths"])
        found = {}
        for head, mine in self._by_head(batch):
            log_p = self.scorer.log_p(model, hidden[mine], lengths[mine], head)
            columns = (batch["ids"][mine].tolist(), batch["labels"][mine].tolist(), log_p.tolist())
            records = zip(*columns, strict=True)
            found |= {i: (head, label, values) for i, label, values in records}
        return {}, found

    def metrics(self, records: Mapping[int, Any]) -> dict[str, float]:
        """The figures of each head's rows; those of other tasks begin with their head's name."""
        found: dict[str, float] = {}
        for head, key in enumerate(self.scorer.head_names):
            mine = [records[i][1:] for i in sorted(records) if records[i][0] == head]
            labels, log_p = (np.array(column) for column in zip(*mine, strict=True))
            figures = {"val_loss": float(-log_p[np.arange(len(labels)), labels].mean())}
            figures |= confusion.figures(labels, probabilities(log_p))
            found |= {f"{key}_{name}" if head else name: value for name, value in figures.items()}
        return found

    def _by_head(self, batch: Tensors) -> Iterator[tuple[int, Any]]:
        """The heads that a batch has rows for, and which those are. With one head a GPU has nothing
        to wait for."""
        if not self.others:
            yield 0, slice(None)
            return
        for head in batch["heads"].unique().tolist():
            yield head, batch["heads"] == head
