"""Classification heads: they turn a GPT's hidden states into one score per label. Also the files
that store them.

A head pools only the states of a row's own tokens, so padding at the right never changes a row's
scores. It computes in fp32 whatever the trunk's precision: it is small, and its scores are compared
with each other.
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
SCORE = "score.weight"  # the hub's name for a classifier's weights


class Head(nn.Module):
    """Pools a row's hidden states and scores each label.

    Pooling takes the state of the last token, the mean, a mean weighted by the softmax of a learned
    query (at first the plain mean), or the last state of an LSTM over the sequence. The weight is
    the head's own parameter and no nn.Linear, because engine/precision.py casts linear layers.
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
        """Scores (B, n_labels) in fp32 of hidden states (B, T, width). Row i has `lengths[i]`
        tokens."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(self.dropout(self.pool(hidden, lengths)), self.weight)

    def pool(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """The pooled states (B, width), or (B, LSTM_WIDTH) for an LSTM, in the head's dtype."""
        if self.pooling == "last":  # pick first, so that only one position is cast
            return pick(hidden, lengths - 1)[:, 0].to(self.weight.dtype)
        is_token = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
        # Filled, not multiplied by 0: the states of padding may be inf or NaN.
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
    """The description of a classifier that its folder stores beside the weights."""

    task: str
    labels: tuple[str, ...]
    form: Form
    pooling: Pooling
    words: tuple[str, ...] = ()  # one per label, if the language head answers
    seq_len: int | None = None  # rows are truncated to this many tokens; older folders have none
    cut: Cut = "end"  # the part of a long row that is cut away


def save(model: GPT, folder: Path, info: ClassifierInfo) -> None:
    """Write a classifier's heads (fp32) and its info into its folder."""
    tensors = {
        name: p.detach().float().cpu().contiguous() for name, p in model.heads.named_parameters()
    }
    if tensors:
        save_tensors(tensors, folder / WEIGHTS)
    (folder / INFO).write_text(
        json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def read_info(folder: str | Path) -> ClassifierInfo | None:
    """The info in a folder, or None if the folder holds no classifier of this project. Raises
    UserError for values that are not valid."""
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


def is_classifier(folder: str | Path) -> bool:
    """Whether a folder holds a classifier, of this project or of transformers."""
    return read_info(folder) is not None or find(folder) is not None


def find(folder: str | Path) -> tuple[ClassifierInfo, dict[str, Tensor]] | None:
    """The info and the head's tensors of a classifier's folder, written by this project or by
    transformers. None if the folder has no head. Raises UserError for missing weights."""
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
        raise UserError(
            f"{folder / WEIGHTS} holds no head named {info.task}; set task in {folder / INFO} to "
            "the name of one of its heads"
        )
    return info, {key.removeprefix(f"{info.task}."): tensor for key, tensor in own.items()}


def _from_hub(folder: Path) -> tuple[ClassifierInfo, dict[str, Tensor]] | None:
    """The head of a transformers GPT2ForSequenceClassification, in any layout of its weights."""
    if not (folder / "config.json").is_file():
        return None
    config = read_object(folder / "config.json")
    if "GPT2ForSequenceClassification" not in config.texts("architectures"):
        return None
    score = read_weights(folder, lambda name: name == SCORE).get(SCORE)
    if score is None or score.dim() != 2:
        raise UserError(
            f"{folder} is a GPT2ForSequenceClassification by its config.json, but its weights have "
            f"no two-dimensional {SCORE}; save the classifier again"
        )
    names = config.nested("id2label")
    labels = [names.text(str(i)) if names.values else f"LABEL_{i}" for i in range(len(score))]
    if None in labels:
        raise config.wrong("id2label", f"the names of all {len(score)} labels")
    return ClassifierInfo(
        "", tuple(label for label in labels if label is not None), "plain", "last"
    ), {"weight": score.float()}
