"""Log-probabilities of answers and the rewards that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.task import Tensors
from model import GPT

CHUNK_BYTES = 256 << 20  # fp32 logits that are held at once; larger batches compute them again


def answer_log_probs(model: GPT, batch: Tensors) -> Tensor:
    """The sum of log p over the scored tokens of each sequence, (B,) fp32 (fp64 for fp64 models).

    batch: as from `PairSplit.tensors`. The head computes the logits of scored tokens alone. If they
    take more than CHUNK_BYTES, the backward pass computes them a second time, chunk by chunk.
    """
    places, weight = batch["scored"], model.head_weight
    states = model.hidden(batch["idx"]).flatten(0, 1)[places]
    targets = batch["targets"].flatten()[places]
    vocab_size = model.config.vocab_size

    def log_p(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(states, weight.to(states.dtype))[:, :vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(logits, targets, reduction="none")

    rows = max(1, CHUNK_BYTES // (4 * vocab_size))
    if len(places) <= rows:
        found = log_p(states, weight, targets)
    else:
        # The weight is an argument, because in the backward pass the model may have another one.
        chunks = zip(states.split(rows), targets.split(rows), strict=True)
        parts = [
            checkpoint(log_p, part, weight, its, use_reentrant=False, preserve_rng_state=False)
            for part, its in chunks
        ]
        found = torch.cat(parts)
    table = found.new_zeros(batch["targets"].numel()).index_copy(0, places, found)
    return table.view_as(batch["targets"]).sum(1)


class AnswerScorer(nn.Module):
    """A module whose forward pass is `answer_log_probs`."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, batch: Tensors) -> Tensor:
        """(B,): see `answer_log_probs`."""
        return answer_log_probs(self.model, batch)


@dataclass(frozen=True)
class Preference:
    """The loss of reward margins: direct preference optimization (Rafailov et al. 2023).

    The reward of an answer is beta x (its log-probability under the model - that under the
    reference). The margin of a pair is the reward of its chosen answer - that of the rejected one.
    """

    beta: float
    label_smoothing: float = 0.0

    def losses(self, margins: Tensor) -> Tensor:
        """The loss of each margin, in the shape and format of `margins`: -log sigmoid(margin). With
        label smoothing e it is (1 - e) x that of the margin + e x that of its negative (Mitchell
        2023)."""
        e = self.label_smoothing
        return -(1 - e) * F.logsigmoid(margins) - e * F.logsigmoid(-margins)

    def metrics(self, rewards: Tensor) -> dict[str, float]:
        """Figures of the rewards (n, 2) of n pairs: chosen, rejected. {} for no pair."""
        if not len(rewards):
            return {}
        chosen, rejected = rewards.double().unbind(1)
        margins = chosen - rejected
        return {
            "val_loss": float(self.losses(margins).mean()),
            "reward_accuracy": float((margins > 0).double().mean()),
            "reward_margin": float(margins.mean()),
            "reward_chosen": float(chosen.mean()),
            "reward_rejected": float(rejected.mean()),
        }
