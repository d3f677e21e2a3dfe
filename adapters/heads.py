"""What turns a GPT into a classifier: heads that read its hidden states, one score a label, and the
files they are in.

A head pools the states of a row's own tokens, so padding at the right never changes a row's scores.
It computes in fp32 whatever the trunk computes in: it is small, and its scores are compared with
each other.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from adapters.options import Cut, Form, Pooling
from config import UserError
from model import GPT, pick
from storage.foreign import read_object
from storage.weights import read_tensors, read_weights, save_tensors

LSTM_WIDTH = 512
INFO, WEIGHTS = "classifier.json", "heads.safetensors"
SCORE = "score.weight"  # the hub's name of a classifier's weights


class Head(nn.Module):
    """Hidden states (B, T, width) of rows of `lengths` (B,) tokens to scores (B, n_labels), fp32.

    Pooling: the state of the last token; the mean; a mean weighted by a learned query's softmax,
    which begins as the mean; or the last state of an LSTM over the sequence. Its own parameters and
    not a linear layer's: those are cast.
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
            return pick(hidden, lengths - 1)[:, 0].to(self.weight.dtype)
        is_token = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
        # Not a product with 0: what is computed of padding may be anything.
        hidden = hidden.to(self.weight.dtype).masked_fill(~is_token[:, :, None], 0)
        if self.pooling == "lstm":
            states, _ = self.lstm(hidden)
            return pick(states, lengths - 1)[:, 0]
        if self.pooling == "mean":
            return hidden.sum(1) / lengths[:, None]
        scores = hidden @ self.query / math.sqrt(hidden.shape[2])
        weights = scores.masked_fill(~is_token, -torch.inf).softmax(1)
        return (weights[:, :, None] * hidden).sum(1)


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier's folder says of itself beside its weights."""

    task: str
    labels: tuple[str, ...]
    form: Form
    pooling: Pooling
    words: tuple[str, ...] = ()  # of the labels, where the language head answers
    seq_len: int | None = (
        None  # tokens of a row, past which it is cut; None where older versions wrote
    )
    cut: Cut = "end"  # where


def save(model: GPT, folder: Path, info: ClassifierInfo) -> None:
    """Write the heads of a classifier, and what they mean, beside its other files."""
    tensors = {
        name: p.detach().float().cpu().contiguous() for name, p in model.heads.named_parameters()
    }
    if tensors:
        save_tensors(tensors, folder / WEIGHTS)
    (folder / INFO).write_text(
        json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_info(folder: str | Path) -> ClassifierInfo | None:
    """None of a folder that holds no classifier of this project."""
    file = Path(folder) / INFO
    if not file.is_file():
        return None
    entries = read_object(file)
    form, pooling = (
        entries.one_of("form", get_args(Form)),
        entries.one_of("pooling", get_args(Pooling)),
    )
    seq_len = entries.whole("seq_len", least=1) if entries.given("seq_len") else None
    cut = entries.one_of("cut", get_args(Cut)) if entries.given("cut") else "end"
    labels, words = tuple(entries.texts("labels")), tuple(entries.texts("words"))
    return ClassifierInfo(entries.text("task") or "", labels, form, pooling, words, seq_len, cut)


def find(folder: str | Path) -> tuple[ClassifierInfo, dict[str, Tensor]] | None:
    """The head of a classifier's folder, written here or by transformers, and what it is for; None
    where there is none."""
    folder = Path(folder)
    info = read_info(folder)
    if info is None:
        return _from_hub(folder)
    if info.form == "word":
        return None
    own = {
        key: t
        for key, t in read_tensors(folder / WEIGHTS).items()
        if key.startswith(f"{info.task}.")
    }
    if not own:
        raise UserError(f"{folder / WEIGHTS} holds no head of the name {info.task}")
    return info, {key.removeprefix(f"{info.task}."): tensor for key, tensor in own.items()}


def _from_hub(folder: Path) -> tuple[ClassifierInfo, dict[str, Tensor]] | None:
    """Of a GPT2ForSequenceClassification, its weights in any layout."""
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    if "GPT2ForSequenceClassification" not in config.texts("architectures"):
        return None
    score = read_weights(folder, lambda name: name == SCORE).get(SCORE)
    if score is None or score.dim() != 2:
        raise UserError(f"{folder} says that it is a classifier, and its weights have no {SCORE}")
    names = config.nested("id2label")
    labels = [names.text(str(i)) if names.values else f"LABEL_{i}" for i in range(len(score))]
    if None in labels:
        raise config.wrong("id2label", f"the names of all {len(score)} labels")
    return ClassifierInfo(
        "", tuple(label for label in labels if label is not None), "plain", "last"
    ), {"weight": score.float()}
