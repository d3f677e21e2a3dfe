"""Opens the checkpoint of a classifier to answer rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters import heads
from adapters.heads import ClassifierInfo, Head
from config import UserError
from decoding.loading import open_model
from engine.precision import set_products
from engine.processes import choose_device
from model import GPT
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import word_ids
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import Answered, write_answers
from tasks.classification.rows import RowEncoder
from tasks.classification.scorer import Scorer
from tasks.encoder import Encoder
from tasks.finetuning import EVAL_PRECISION
from text.overlap import Overlap
from text.row import Row
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Classifier:
    """A finished classifier for the rows of a task. It computes in fp32."""

    model: GPT
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    encode: RowEncoder
    scorer: Scorer

    def probabilities(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Probabilities of the labels for rows of tokens, (n, K) float64."""
        return self.scorer.probabilities(self.model, tokens, self.tokenizer.eot)

    def answers(self, rows: Sequence[Row], say: Callable[[str], None]) -> np.ndarray:
        """Probabilities (n, K) float64 of the labels of rows. Reports how many were truncated."""
        tokens, was_cut = zip(*map(self.encode, rows), strict=True) if rows else ((), ())
        if cut := sum(was_cut):
            encoder = self.encode.encoder
            say(
                f"{cut} of {len(rows)} rows are longer than {encoder.seq_len} tokens and are "
                f"truncated at the {encoder.cut} of their text"
            )
        return self.probabilities(tokens)


@dataclass(frozen=True)
class LabelPredictor:
    """A finished classifier and the rows of --predict that it will answer."""

    classifier: Classifier
    rows: list[Row]
    overlap: Overlap | None  # of the rows with the training rows
    seed: int  # of the resamples for confidence intervals

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Write the predictions as jsonl with probabilities and as CS224N's csv. Returns the scores
        of the rows with a known label."""
        found, task = self.classifier.answers(self.rows, say), self.classifier.encode.task
        answered = Answered(self.rows, found, self.overlap)
        labels, about = self.classifier.labels, {"eval_precision": EVAL_PRECISION}
        return write_answers(path, answered, task, labels, self.seed, say, about)


def open_classifier(
    where: str, task: ClassificationDescription, cfg: ClassificationConfig
) -> Classifier:
    """The classifier of checkpoint `where`, with the labels, form, words and lengths of its run.
    Raises UserError if the checkpoint is not a classifier."""
    found = heads.find(where)
    info = found[0] if found else heads.read_info(where)
    if info is None:
        raise UserError(
            f"{where} is not a classifier; train one first, or name a run of finetune.{task.name}"
        )
    device = choose_device(cfg.device)
    set_products("fp32", device)
    model, tokenizer = open_model(where, None, device, torch.float32)
    if found and info.form != "word":
        model.heads[task.name] = Head(model.config.n_embd, len(info.labels), info.pooling)
        model.heads[task.name].load_state_dict(found[1])
        model.heads.to(model.transformer.wte.weight.device)
    encode = RowEncoder(task, info.form, encoder_of(info, tokenizer, model.context, cfg))
    scorer = scorer_of(info, [task.name], tokenizer)
    return Classifier(model.eval(), tokenizer, info.labels, encode, scorer)


def encoder_of(
    info: ClassifierInfo, tokenizer: Tokenizer, context: int, cfg: ClassificationConfig
) -> Encoder:
    """An encoder that truncates like the run did, so that scores agree, unless the options say
    otherwise."""
    seq_len = min(cfg.seq_len or info.seq_len or context, context)
    cut = cfg.cut if cfg.cut != ClassificationConfig.cut else info.cut
    return Encoder(tokenizer, seq_len, cut, cfg.strict)


def scorer_of(info: ClassifierInfo, head_names: Sequence[str], tokenizer: Tokenizer) -> Scorer:
    """The scorer for the heads of these names, or for the words of the labels."""
    words = word_ids(tokenizer, info.words) if info.words else []
    return Scorer(head_names, info.pooling == "last", words)
