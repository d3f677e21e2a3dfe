"""Compares the pairs of --predict with a finished model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from tasks.finetuning import EVAL_PRECISION
from tasks.preferences.description import Pair
from tasks.preferences.pairs import PairEncoder, PairSplit
from tasks.preferences.reference import log_probs
from tasks.preferences.scoring import Preference
from text.overlap import Overlap, with_clean
from text.preferences import messages_of
from text.row import Row


@dataclass(frozen=True)
class PairPredictor:
    """A finished model, its reference, and the rows of --predict that they compare."""

    model: GPT
    reference: GPT
    encoder: PairEncoder
    pair: Callable[[Row], Pair]
    preference: Preference
    rows: list[Row]
    overlap: Overlap | None  # of the rows with the training rows

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Write one JSON object a line: the fields of a row, both rewards, the margin, and which
        answer the model prefers. Returns the metrics of the rows that could be compared.

        For the other rows these are null, and "unreadable" is the reason.
        """
        split, known = PairSplit([], [], "", []), list[int]()
        faults = {i: row.fault for i, row in enumerate(self.rows) if row.fault}
        for i, row in enumerate(self.rows):
            if i in faults:
                continue
            if empty := [name for name in ("chosen", "rejected") if not row[name]]:
                faults[i] = f"has nothing in column '{empty[0]}'"
                continue
            sequences, _ = self.encoder.sequences(self.pair(row), row.where)
            if not sequences:
                faults[i] = f"does not fit into {self.encoder.encoder.seq_len} tokens"
                continue
            known.append(i)
            for tokens, scored in sequences:
                split.tokens.append(tokens)
                split.scored.append(scored)
        rewards = self._rewards(split, say)
        by_row = dict(zip(known, rewards.tolist(), strict=True))
        with path.open("w", encoding="utf-8") as file:
            for i, row in enumerate(self.rows):
                answer = _answer(*by_row[i]) if i in by_row else EMPTY | {"unreadable": faults[i]}
                file.write(json.dumps(_fields(row) | answer, ensure_ascii=False) + "\n")
        if faults:
            say(
                f"{len(faults):,} of {len(self.rows):,} rows could not be compared, and are not counted"
            )
        scores = self.preference.metrics(rewards)
        if self.overlap is None or not scores:
            return scores
        overlap = self.overlap.part(np.array(known))
        clean = self.preference.metrics(rewards[torch.from_numpy(~overlap.shared)])
        return with_clean(scores, clean) | {"clean": overlap.counts}

    def _rewards(self, split: PairSplit, say: Callable[[str], None]) -> Tensor:
        """(pairs, 2) float64: the rewards of the chosen and the rejected answers."""
        own, other = (
            torch.from_numpy(log_probs(model, split, EVAL_PRECISION, say)).double()
            for model in (self.model, self.reference)
        )
        return self.preference.beta * (own - other).view(len(own) // 2, 2)


EMPTY = dict.fromkeys(("preferred", "reward_margin", "reward_chosen", "reward_rejected"))


def _answer(chosen: float, rejected: float) -> dict[str, Any]:
    preferred = "chosen" if chosen > rejected else "rejected"
    return dict(zip(EMPTY, (preferred, chosen - rejected, chosen, rejected), strict=True))


def _fields(row: Row) -> dict[str, Any]:
    """The fields of a row, with conversations as lists of messages."""
    return {name: messages_of(text) or text for name, text in row.fields.items()}
