"""What turns a GPT into a classifier: heads that read its hidden states, one score a label, and the files they are in.

A head pools the states of a row's own tokens, so padding at the right never changes a row's scores. It computes in
fp32 whatever the trunk computes in: it is small, and its scores are compared with each other.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import Pooling, UserError
from model import GPT

LSTM_WIDTH = 512
INFO, WEIGHTS = "classifier.json", "heads.safetensors"


class Head(nn.Module):
    """Hidden states (B, T, width) of rows of `lengths` (B,) tokens to scores (B, n_labels), fp32.

    Pooling: the state of the last token; the mean; a mean weighted by a learned query's softmax, which begins as the
    mean; or the last state of an LSTM over the sequence. Its own parameters and not a linear layer's: those are cast.
    """

    def __init__(self, width: int, n_labels: int, pooling: Pooling, dropout: float = 0.0):
        super().__init__()
        self.pooling, self.dropout = pooling, nn.Dropout(dropout)
        if pooling == "attention":
            self.query = nn.Parameter(torch.zeros(width))
        if pooling == "lstm":
            self.lstm = nn.LSTM(width, LSTM_WIDTH, batch_first=True)
            width = LSTM_WIDTH
        self.weight = nn.Parameter(torch.empty(n_labels, width).normal_(std=0.02))

    def forward(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(self.dropout(self.pool(hidden, lengths)), self.weight)

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """(B, width) or (B, LSTM_WIDTH), fp32 (fp64 of fp64)."""
        if self.pooling == "last":  # before the cast: of one position in T
            hidden = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
            return hidden.to(self.weight.dtype)
        hidden = hidden.to(self.weight.dtype)
        if self.pooling == "lstm":
            states, _ = self.lstm(hidden)
            return states[torch.arange(len(lengths), device=hidden.device), lengths - 1]
        there = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
        if self.pooling == "mean":
            weights = there / lengths[:, None]
        else:
            scores = hidden @ self.query / math.sqrt(hidden.shape[2])
            weights = scores.masked_fill(~there, -torch.inf).softmax(1)
        # Not a product with 0: what is computed of padding may be anything.
        return (weights.to(hidden)[:, :, None] * hidden.masked_fill(~there[:, :, None], 0)).sum(1)


@dataclass(frozen=True)
class Info:
    """What a classifier's folder says of itself beside its weights."""

    task: str
    labels: tuple[str, ...]
    form: str
    pooling: Pooling
    words: tuple[str, ...] = ()  # of the labels, where the language head answers


def save(model: GPT, folder: Path, info: Info) -> None:
    """Write the heads of a classifier, and what they mean, beside its other files."""
    from safetensors.torch import save_file

    tensors = {name: p.detach().float().cpu().contiguous() for name, p in model.heads.named_parameters()}
    if tensors:
        save_file(tensors, folder / WEIGHTS)
    (folder / INFO).write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_info(folder: str | Path) -> Info | None:
    """None of a folder that holds no classifier of this project."""
    file = Path(folder) / INFO
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return Info(**said | {name: tuple(said[name]) for name in ("labels", "words")})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def load(head: Head, folder: str | Path, name: str) -> bool:
    """Give `head` the values that the head of this name has in a classifier's folder; False where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(folder) / WEIGHTS
    if not file.is_file():
        return False
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    if own.keys() != dict(head.named_parameters()).keys():
        return False
    head.load_state_dict(own)
    return True
