"""What the heads of a classifier make of hidden states: the log-probabilities of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model import GPT, pick
from tasks.classification.predictions import probabilities
from tasks.encoder import pad_rows

PREDICTED_AT_ONCE = 32  # rows in a forward pass of a finished model


@dataclass(frozen=True)
class Scorer:
    """The heads of a model, by their names in model.heads; or its language model's own head, where
    that answers with a label's word."""

    head_names: Sequence[str]  # the task's own first
    reads_last: bool  # whether of a row's states only the last token's is read
    word_ids: Sequence[
        int
    ] = ()  # the first tokens of the labels' words; empty where there is a head

    def log_p(self, model: GPT, hidden: Tensor, lengths: Tensor, head: int) -> Tensor:
        """Hidden states (B, T, n_embd) to log-probabilities of the labels of a head (B, K), fp32.

        Those of words are their shares of the whole vocabulary, so that they add up to less than 1.
        """
        if not self.word_ids:
            return model.heads[self.head_names[head]](hidden, lengths).log_softmax(-1)
        last = pick(hidden, lengths - 1)[:, 0]
        return model.logits(last).float().log_softmax(-1)[:, list(self.word_ids)]

    def states(self, model: GPT, idx: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads read of rows idx (B, T) of `lengths` (B,) tokens: hidden states, and how
        many of each row.

        Where they read the last token, its state (B, 1, n_embd); else those of all positions
        (B, T, n_embd).
        """
        if self.reads_last:
            return model.hidden(idx, at=lengths - 1), torch.ones_like(lengths)
        return model.hidden(idx), lengths

    def pooled(self, model: GPT, hidden: Tensor, lengths: Tensor, head: int) -> Tensor:
        """What SimCSE compares (B, width), fp32: what the head reads, or the state of the last
        token."""
        if not self.word_ids:
            return model.heads[self.head_names[head]].pool(hidden, lengths)
        return pick(hidden, lengths - 1)[:, 0].float()

    @torch.inference_mode()
    def probabilities(self, model: GPT, tokens: Sequence[np.ndarray], filler: int) -> np.ndarray:
        """Probabilities of the task's own labels (n, K) float64, of rows of like length together;
        `filler` is the token that pads them."""
        if not tokens:
            return np.zeros((0, 0))
        device = model.transformer.wte.weight.device
        order = np.argsort([len(row) for row in tokens], kind="stable")
        found: list[np.ndarray] = [np.empty(0)] * len(tokens)
        for begin in range(0, len(order), PREDICTED_AT_ONCE):
            some = order[begin : begin + PREDICTED_AT_ONCE]
            batch = pad_rows([tokens[i] for i in some], filler)
            idx, lengths = batch["idx"].to(device), batch["lengths"].to(device)
            log_p = self.log_p(model, *self.states(model, idx, lengths), 0)
            for i, p in zip(some, probabilities(log_p.double().cpu().numpy()), strict=True):
                found[i] = p
        return np.stack(found)
