"""Fine-tuning for classification: a head reads a GPT's hidden states and chooses a label.

A row becomes the tokens of its text and nothing else. Whoever loads the classifier elsewhere can
pass it the text and gets the same scores. Under `--form word` there is no such head: the language
model's own head answers with a label's word.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from adapters import heads
from adapters.heads import ClassifierInfo, Head
from config import RunConfig, UserError
from engine.log import json_safe
from engine.task import Batch, Cost, Facts, Sums, Tensors
from model import GPT
from storage.checkpoint import RESULTS, locate
from tasks import methods
from tasks.classification.description import ClassificationDescription
from tasks.classification.finished import LabelPredictor, open_classifier, scorer_of
from tasks.classification.labels import nfc, true_labels, word_ids
from tasks.classification.objective import Objective
from tasks.classification.options import ClassificationConfig, check_classification
from tasks.classification.predictions import VALIDATION, Answered, write_answers
from tasks.classification.rows import (
    LabelledRows,
    LabelledSplit,
    encode_rows,
    find_overlap,
    join,
    read_labelled_rows,
    row_encoder,
    training_texts,
)
from tasks.encoder import pad_rows
from tasks.finetuning import EVAL_PRECISION, Finetuning
from tasks.source import Source
from tasks.trunk import Trunk
from text.overlap import with_clean
from text.row import Row

CLASSIFIER = ("AutoModelForSequenceClassification", "text-classification")


@dataclass(frozen=True)
class AuxiliaryTask:
    """A task of --also, which trains at the same time on its own head."""

    task: ClassificationDescription
    weight: float  # of the task's loss
    cfg: ClassificationConfig  # the task's own options


class Classification(Finetuning):
    """Learns the labels of a task's rows, and of auxiliary tasks' rows."""

    cfg: ClassificationConfig
    choices = (
        "form",
        "words",
        "pooling",
        "cut",
        "dropout",
        "head_dropout",
        "class_weights",
        "label_smoothing",
        "objective",
        "rdrop",
        "simcse",
        "simcse_temperature",
        "simcse_group",
        "also",
        "augment_weight",
    )
    rows_of: Sequence[LabelledRows] = ()  # of each task, once `setup` has read them
    train: LabelledSplit
    val: LabelledSplit
    info: ClassifierInfo  # the classifier's settings, which each checkpoint stores
    head: dict[str, Tensor]  # the trained head of --init; empty for a new head

    def __init__(
        self, description: ClassificationDescription, auxiliary: Sequence[AuxiliaryTask] = ()
    ):
        super().__init__(description)
        self.auxiliary = tuple(auxiliary)

    def setup(
        self, cfg: ClassificationConfig, say: Callable[[str], None], dry: bool = False
    ) -> Facts:
        """Read tokenizer and rows, encode the rows, and prepare model and loss."""
        self.cfg, say = cfg, (lambda text: None) if dry else say
        check_classification(cfg)
        methods.check_method(cfg)
        self.source = source = Source(self.description, cfg, say)
        sources = [source, *(Source(each.task, each.cfg, say) for each in self.auxiliary)]
        self.rows_of = [read_labelled_rows(each) for each in sources]
        self.head_names = _distinct([each.task.name for each in sources])
        special = self.description.special_tokens(cfg.form)
        n_layer = 0 if cfg.model == "lstm" else None  # an LSTM head directly on the embeddings
        self.trunk = Trunk(cfg, special, self._add_heads, n_layer)
        self.info = self._info()
        splits = [encode_rows(rows, self.trunk) for rows in self.rows_of]
        self.train, self.val = (join(parts) for parts in zip(*splits, strict=True))
        self.overlap = find_overlap(self.rows_of)
        self.set_order(self.train.heads, cfg.simcse_group if "simcse" in cfg.objective else 1)
        pairs = zip(self.head_names[1:], self.auxiliary, strict=True)
        weights = {name: task.weight for name, task in pairs}
        scorer = scorer_of(self.info, self.head_names, self.trunk.tokenizer)
        self.objective = Objective(cfg, scorer, weights)
        self.terms = self.objective.terms
        source.warnings += [text for other in sources[1:] for text in other.warnings]
        if cfg.predict:
            self.predict_rows = source.predict_rows
            self._check_predict_rows(self.predict_rows)
        for text in self._first_rows():
            say(text)
        self.head = self._trained_head()
        last = cfg.form != "word" and cfg.pooling == "last"
        return self.facts(CLASSIFIER if last else Facts.hub_class)

    def _info(self) -> ClassifierInfo:
        """The settings of the classifier. Raises UserError if --form word lacks a distinct word for
        each label."""
        cfg, labels = self.cfg, self.rows_of[0].labels
        words: tuple[str, ...] = ()
        if cfg.form == "word":
            words = tuple(map(nfc, cfg.words)) or tuple(self.description.words(labels))
            if len(words) != len(labels):
                raise UserError(
                    f"--form word: name {len(labels)} words with --words, one for each of "
                    f"{', '.join(labels)}"
                )
            if len(set(word_ids(self.trunk.tokenizer, words))) < len(words):
                raise UserError(
                    f"two of the words {', '.join(words)} begin with the same token; name others "
                    "with --words"
                )
        seq_len = self.trunk.seq_len
        return ClassifierInfo(self.name, labels, cfg.form, cfg.pooling, words, seq_len, cfg.cut)

    def _check_predict_rows(self, rows: Sequence[Row]) -> None:
        """Raise UserError now for rows that would stop --predict after training: rows with a new
        label, and under --strict rows that are too long."""
        true_labels(rows, self.info.labels)
        if self.cfg.strict:
            encode = row_encoder(self.source, self.trunk)
            for row in rows:
                encode(row)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch for --show-rows, with the label between ⟦ and ⟧."""
        texts, train = [], self.train
        for i in self.order(0).reshape(-1)[: self.cfg.show_rows]:
            head = train.heads[i]
            answers = (not head and self.info.words) or self.rows_of[head].labels
            tokens = train.tokens[i].tolist()
            texts.append(
                f"row {i} ({len(tokens)} tokens):\n{self.trunk.tokenizer.decode(tokens)}"
                f"⟦{answers[train.labels[i]]}⟧\n"
            )
        return texts

    def _trained_head(self) -> dict[str, Tensor]:
        """The head of --init if it is for the same labels. {} and a warning if it is not."""
        cfg = self.cfg
        new = cfg.init == "scratch" or cfg.form == "word"
        found = None if new else heads.find(locate(cfg.init))
        if found is None:
            return {}
        info, state = found
        if info.labels == self.info.labels and info.pooling == self.info.pooling:
            return state
        self.source.warnings.append(
            f"--init {cfg.init} has a head for {', '.join(info.labels)} ({info.pooling}), which "
            "does not fit; this run starts with a new head"
        )
        return {}

    # --- a step

    def rows(self, split: str, step: int) -> np.ndarray:
        """Row ids of a step, (groups, rows of a group). Validation rows are sorted by length."""
        if split == "val":
            return np.lexsort((self.val.lengths, self.val.heads))[:, None]
        return self.order(step)

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """Rows as "idx" (B, T) and "lengths", "labels", "weights", "heads" and "ids", each (B,)."""
        data = self.train if split == "train" else self.val
        tokens = [data.tokens[i] for i in ids]
        tensors = pad_rows(tokens, self.trunk.tokenizer.eot, self.buckets)
        tensors |= {
            "labels": torch.from_numpy(data.labels[ids]),
            "weights": torch.from_numpy(data.weights[ids]).float(),
            "heads": torch.from_numpy(data.heads[ids]),
            "ids": torch.from_numpy(np.asarray(ids)),
        }
        weights = self.objective.weights(tensors)
        return Batch(tensors, weights, self.amounts(data, ids, tensors["idx"]))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The sum of each term over the batch, fp32 scalars."""
        assert isinstance(model, GPT)
        return self.objective.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """A record of head, label and log-probabilities for each row."""
        assert isinstance(model, GPT)
        return self.objective.evaluate(model, batch)

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """Loss, accuracy, macro-F1 and calibration error of all rows and of clean rows."""
        clean = {i: record for i, record in records.items() if not self.overlap.shared[i]}
        return with_clean(self.objective.metrics(records), self.objective.metrics(clean))

    # --- the model

    def _add_heads(self, model: GPT) -> None:
        cfg = self.cfg
        for key, rows in zip(self.head_names, self.rows_of, strict=True):
            if rows.source.cfg.form != "word":
                n_embd, n_labels = model.config.n_embd, len(rows.labels)
                model.heads[key] = Head(n_embd, n_labels, cfg.pooling, cfg.head_dropout)

    def build_model(self, cfg: RunConfig) -> GPT:
        """The base of --init with heads and adapter. A trained head of --init is loaded."""
        model = super().build_model(cfg)
        if self.head:
            model.heads[self.name].load_state_dict(self.head)
        return model

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model, its head and the settings of the classifier."""
        assert isinstance(model, GPT)
        # The hub's classifier class only knows heads that read the last token.
        by_last = self.info.form != "word" and self.info.pooling == "last"
        score = model.heads[self.name].weight if by_last else None
        self.trunk.export(model, folder, stored_only, True, score, self.info.labels)
        heads.save(model, folder, self.info)

    # --- facts for the loop

    def cost(self) -> Cost:
        """The cost of the longest row. A classifier skips some of a language model's work."""
        cost = super().cost()
        flops = (cost.flops_per_token or 0) - self._flops_left_out()
        return dataclasses.replace(cost, flops_per_token=flops, loss=self.objective.memory_probe)

    def _flops_left_out(self) -> int:
        """FLOPs per token that are not computed: the language model's head, and if only the last
        token is read, most of the last block (9 of 12 n_embd^2 weights, and attention)."""
        shape = self.trunk.shape
        left_out = 6 * shape.vocab_size * shape.n_embd
        if self.objective.scorer.reads_last and shape.n_layer:
            left_out += 6 * 9 * shape.n_embd**2
            left_out += 12 * shape.n_embd * int(self.train.lengths.max())
        return left_out

    def banner(self) -> dict[str, str]:
        """The lines of every task, and one on the labels."""
        info = self.info
        counts = np.bincount(self.train.labels[self.train.heads == 0], minlength=len(info.labels))
        shares = [
            f"{name} {count / counts.sum():.0%}"
            for name, count in zip(info.labels, counts, strict=True)
        ]
        read = ", ".join(info.words) or f"{info.pooling} pooling"
        others = [f", {key} x {weight:g}" for key, weight in self.objective.auxiliary.items()]
        labels = f"{', '.join(shares)}; --form {info.form}, {read}{''.join(others)}"
        return super().banner() | {"labels": labels}

    # --- the finished model

    def write_reports(self, run: str, say: Callable[[str], None]) -> None:
        """Score the validation rows with final/. Write predictions, a report and charts.

        metrics.json takes these figures, so that it agrees with the report. The loop's figures are
        in fp32 too, but from other batches, and may differ in their last digits.
        """
        folder, own = Path(run), np.flatnonzero(self.val.heads == 0)
        task, shared = self.description, self.overlap.part(own)
        classifier = open_classifier(locate(run), task, self.cfg)
        found = classifier.probabilities([self.val.tokens[i] for i in own])
        answered = Answered([self.val.rows[i] for i in own], found, shared)
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        about = {"eval_precision": EVAL_PRECISION, "step": results["final_is_step"]}
        path, labels = folder / f"{VALIDATION}.jsonl", classifier.labels
        figures = write_answers(path, answered, task, labels, self.cfg.seed, say, about)
        self.write_clean(run, shared, json_safe(figures) | {"eval_precision": EVAL_PRECISION}, say)

    def open_predictor(
        self, cfg: ClassificationConfig, where: str, say: Callable[[str], None]
    ) -> LabelPredictor:
        """The classifier of checkpoint `where`. Raises UserError if it or the rows do not suit."""
        rows = self.read_predict_rows(cfg, say)
        classifier = open_classifier(where, self.description, cfg)
        known = true_labels(rows, classifier.labels)  # raises for a new label before the work
        overlap = self.predict_overlap(cfg, rows, say) if known else None
        return LabelPredictor(classifier, rows, overlap, cfg.seed)

    def training_texts(self) -> list[str]:
        """The texts of the training rows of all tasks."""
        return training_texts(self.rows_of)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number after those that are repeated."""
    return [name if name not in names[:n] else f"{name}-{n + 1}" for n, name in enumerate(names)]
