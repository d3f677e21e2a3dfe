"""Turns hidden states into the log-probabilities of labels, with a classifier's heads or with the
language model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import GPT, pick
from tasks.classification.predictions import probabilities
from tasks.encoder import pad_rows

PREDICT_BATCH = 32  # rows in a forward pass of a finished model


@dataclass(frozen=True)
class Scorer:
    """Scores labels with the heads in model.heads, or under --form word with the language model's
    own head."""

    head_names: Sequence[str]  # in model.heads; the main task's head comes first
    reads_last: bool  # whether only the state of a row's last token is read
    word_ids: Sequence[int] = ()  # first tokens of the labels' words; () with heads

    def log_p(self, model: GPT, hidden: Tensor, lengths: Tensor, head: int) -> Tensor:
        """Log-probabilities (B, K) fp32 of the labels of a head, from hidden states (B, T, n_embd).

        The probabilities of words are those under the whole vocabulary. They add up to less than 1.
        """
        if not self.word_ids:
            return model.heads[self.head_names[head]](hidden, lengths).log_softmax(-1)
        last = pick(hidden, lengths - 1)[:, 0]
        return model.logits(last).float().log_softmax(-1)[:, list(self.word_ids)]

    def states(self, model: GPT, idx: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states that the heads read, and how many of them each row has (B,).

        idx (B, T) int64 has rows of `lengths` (B,) tokens. The states are (B, 1, n_embd) if only
        the last token is read, else (B, T, n_embd).
        """
        if self.reads_last:
            return model.hidden(idx, query_index=lengths - 1), torch.ones_like(lengths)
        return model.hidden(idx), lengths

    def pooled(self, model: GPT, hidden: Tensor, lengths: Tensor, head: int) -> Tensor:
        """The vectors that SimCSE compares (B, width), fp32: the pooled states that the head reads,
        or without heads the state of the last token."""
        if not self.word_ids:
            return model.heads[self.head_names[head]].pool(hidden, lengths)
        return pick(hidden, lengths - 1)[:, 0].float()

    @torch.inference_mode()
    def probabilities(self, model: GPT, tokens: Sequence[np.ndarray], filler: int) -> np.ndarray:
        """Probabilities of the main task's labels (n, K) float64. Rows of similar length share a
        batch, which `filler` pads."""
        if not tokens:
            return np.zeros((0, 0))
        device = model.transformer.wte.weight.device
        order = np.argsort([len(row) for row in tokens], kind="stable")
        found: list[np.ndarray] = [np.empty(0)] * len(tokens)
        for begin in range(0, len(order), PREDICT_BATCH):
            some = order[begin : begin + PREDICT_BATCH]
            batch = pad_rows([tokens[i] for i in some], filler)
            idx, lengths = batch["idx"].to(device), batch["lengths"].to(device)
            log_p = self.log_p(model, *self.states(model, idx, lengths), 0)
            for i, p in zip(some, probabilities(log_p.cpu().double().numpy()), strict=True):
                found[i] = p
        return np.stack(found)
