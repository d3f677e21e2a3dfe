"""Fine-tuning on rows whose answers are labels: the family of tasks that a head over a GPT's hidden
states can do.

A row becomes the tokens of its text and nothing else, so that whoever loads the classifier
elsewhere gives it the text and gets the same scores. Under `--form word` there is no head: the
language model's own answers with a label's word.
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
from base.files import write_json
from config import RunConfig, UserError
from engine.log import finite
from engine.task import Batch, Cost, Facts, Sums, Tensors
from model import GPT
from storage.checkpoint import RESULTS, locate
from tasks import methods
from tasks.classification.description import Labels
from tasks.classification.finished import AnswersOfClassifier, open_classifier, scorer_of
from tasks.classification.labels import composed, true_labels, word_ids
from tasks.classification.objective import Objective
from tasks.classification.options import ClassificationConfig, check
from tasks.classification.predictions import VALIDATION, write_answers
from tasks.classification.rows import Labelled, encode_rows, join, read_labelled, row_encoder
from tasks.encoder import padded
from tasks.finetuning import EXACT, Finetuning
from tasks.source import Source
from tasks.trunk import Trunk
from text.rows import Row

CLASSIFIER = ("AutoModelForSequenceClassification", "text-classification")


@dataclass(frozen=True)
class Also:
    """A task of --also, which trains along on a head of its own."""

    task: Labels
    weight: float  # of its loss
    cfg: ClassificationConfig  # its own options


class Classification(Finetuning):
    """Learns the labels of the rows of a task, and of those that train along."""

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
    train: Labelled
    val: Labelled
    info: ClassifierInfo  # what a checkpoint says of itself
    head: dict[str, Tensor]  # the trained head of --init; empty where the head is new

    def __init__(self, description: Labels, also: Sequence[Also] = ()):
        super().__init__(description)
        self.also = tuple(also)

    def setup(
        self, cfg: ClassificationConfig, say: Callable[[str], None], dry: bool = False
    ) -> Facts:
        self.cfg, say = cfg, (lambda text: None) if dry else say
        check(cfg)
        methods.check(cfg)
        self.source = source = Source(self.description, cfg, say)
        others = [Source(also.task, also.cfg, say) for also in self.also]
        self.rows_of = [read_labelled(each) for each in (source, *others)]
        self.keys = _distinct([each.task.name for each in (source, *others)])
        special = self.description.special(cfg.form)
        n_layer = 0 if cfg.model == "lstm" else None  # its embeddings, then the head
        self.trunk = Trunk(cfg, special, self._add_heads, n_layer)
        self.info = self._info()
        splits = [encode_rows(rows, self.trunk) for rows in self.rows_of]
        self.train, self.val = (join(parts) for parts in zip(*splits, strict=True))
        self.set_order(self.train.heads, cfg.simcse_group if "simcse" in cfg.objective else 1)
        weights = {key: also.weight for key, also in zip(self.keys[1:], self.also, strict=True)}
        scorer = scorer_of(self.info, self.keys, self.trunk.tokenizer)
        self.objective = Objective(cfg, scorer, weights)
        self.terms = self.objective.terms
        source.warnings += [text for other in others for text in other.warnings]
        if cfg.predict:
            self.to_answer = source.to_answer
            self._check_rows_to_answer(self.to_answer)
        for text in self._first_rows():
            say(text)
        self.head = self._trained_head()
        last = cfg.form != "word" and cfg.pooling == "last"
        return self.facts(CLASSIFIER if last else Facts.hub_class)

    def _info(self) -> ClassifierInfo:
        """Raises UserError where --form word has no word for each label."""
        cfg, labels = self.cfg, self.rows_of[0].labels
        words: tuple[str, ...] = ()
        if cfg.form == "word":
            words = tuple(map(composed, cfg.words)) or tuple(self.description.words(labels))
            if len(words) != len(labels):
                raise UserError(
                    f"--form word: name {len(labels)} words with --words, for {', '.join(labels)}"
                )
            if len(set(word_ids(self.trunk.tokenizer, words))) < len(words):
                raise UserError(
                    f"of the words {', '.join(words)} two begin with the same token; name others "
                    "with --words"
                )
        seq_len = self.trunk.seq_len
        return ClassifierInfo(self.name, labels, cfg.form, cfg.pooling, words, seq_len, cfg.cut)

    def _check_rows_to_answer(self, rows: Sequence[Row]) -> None:
        """Raise UserError for what would end --predict after training: unknown labels, and under
        --strict long rows."""
        true_labels(rows, self.info.labels)
        if self.cfg.strict:
            encode = row_encoder(self.source, self.trunk)
            for row in rows:
                encode(row)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch, what is learned between the marks."""
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
        """The head of --init where it is for the same labels; a warning where it is not."""
        cfg = self.cfg
        if cfg.init == "scratch" or cfg.form == "word":
            return {}
        found = heads.find(locate(cfg.init))
        if found is None:
            return {}
        info, state = found
        if info.labels == self.info.labels and info.pooling == self.info.pooling:
            return state
        self.source.warnings.append(
            f"--init {cfg.init} has a head for {', '.join(info.labels)} ({info.pooling}): this "
            "run's is new"
        )
        return {}

    # --- a step

    def rows(self, split: str, step: int) -> np.ndarray:
        if split == "val":
            return np.lexsort((self.val.lengths, self.val.heads))[:, None]
        return self.order(step)

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        data = self.train if split == "train" else self.val
        tokens = [data.tokens[i] for i in ids]
        tensors = padded(tokens, self.trunk.tokenizer.eot, self.padded)
        tensors |= {
            "labels": torch.from_numpy(data.labels[ids]),
            "weights": torch.from_numpy(data.weights[ids]).float(),
            "heads": torch.from_numpy(data.heads[ids]),
            "ids": torch.from_numpy(np.asarray(ids)),
        }
        weights = self.objective.weights(tensors)
        return Batch(tensors, weights, self.amounts(data, ids, tensors["idx"]))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        assert isinstance(model, GPT)
        return self.objective.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        assert isinstance(model, GPT)
        return self.objective.evaluate(model, batch)

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        return self.objective.metrics(records)

    # --- the model

    def _add_heads(self, model: GPT) -> None:
        cfg = self.cfg
        for key, rows in zip(self.keys, self.rows_of, strict=True):
            if rows.source.cfg.form != "word":
                model.heads[key] = Head(
                    model.config.n_embd, len(rows.labels), cfg.pooling, cfg.head_dropout
                )

    def build_model(self, cfg: RunConfig) -> GPT:
        model = super().build_model(cfg)
        if self.head:
            model.heads[self.name].load_state_dict(self.head)
        return model

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        assert isinstance(model, GPT)
        # the hub's classifiers have a head by the last token
        by_last = self.info.form != "word" and self.info.pooling == "last"
        score = model.heads[self.name].weight if by_last else None
        self.trunk.export(model, folder, stored_only, True, score, self.info.labels)
        heads.save(model, folder, self.info)

    # --- what the loop must know

    def cost(self) -> Cost:
        cost = super().cost()
        flops = (cost.flops_per_token or 0) - self._flops_left_out()
        return dataclasses.replace(cost, flops_per_token=flops, loss=self.objective.of_tokens)

    def _flops_left_out(self) -> int:
        """Of a token: those of the language model's head, and where only the last token is read,
        those of the last block but its keys and values and queries (9 of 12 n_embd^2 weights, and
        attention)."""
        shape = self.trunk.shape
        left_out = 6 * shape.vocab_size * shape.n_embd
        if self.objective.scorer.reads_last and shape.n_layer:
            left_out += 6 * 9 * shape.n_embd**2
            left_out += 12 * shape.n_embd * int(self.train.lengths.max())
        return left_out

    def banner(self) -> dict[str, str]:
        info = self.info
        counts = np.bincount(self.train.labels[self.train.heads == 0], minlength=len(info.labels))
        shares = [
            f"{name} {count / counts.sum():.0%}"
            for name, count in zip(info.labels, counts, strict=True)
        ]
        read = ", ".join(info.words) or f"{info.pooling} pooling"
        others = [f", {key} x {weight:g}" for key, weight in self.objective.others.items()]
        labels = f"{', '.join(shares)}; --form {info.form}, {read}{''.join(others)}"
        return super().banner() | {"labels": labels}

    # --- what a finished model says

    def conclude(self, run: str, say: Callable[[str], None]) -> None:
        """Score the validation rows with final/, and write what that shows into the run's folder.

        metrics.json takes these figures: those of the loop are of the same step and in fp32 too,
        but of other batches, and may differ in their last digits.
        """
        folder, own = Path(run), np.flatnonzero(self.val.heads == 0)
        classifier = open_classifier(locate(run), self.description, self.cfg)
        found = classifier.probabilities([self.val.tokens[i] for i in own])
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        about = {"eval_precision": EXACT, "step": results["final_is_step"]}
        rows, path = [self.val.rows[i] for i in own], folder / f"{VALIDATION}.jsonl"
        labels, seed = classifier.labels, self.cfg.seed
        figures = write_answers(path, rows, found, self.description, labels, seed, say, about)
        write_json(folder / RESULTS, results | finite(figures) | {"eval_precision": EXACT})

    def answering(
        self, cfg: ClassificationConfig, where: str, say: Callable[[str], None]
    ) -> AnswersOfClassifier:
        """The classifier of a checkpoint, ready to answer the rows of --predict. Raises UserError
        for what is wrong with either."""
        rows = self.rows_to_answer(cfg, say)
        classifier = open_classifier(where, self.description, cfg)
        true_labels(rows, classifier.labels)  # an unknown one ends the run before the work is done
        return AnswersOfClassifier(classifier, rows, cfg.seed)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, those that came before with a number."""
    return [name if name not in names[:n] else f"{name}-{n + 1}" for n, name in enumerate(names)]
