"""Fine-tuning on rows whose answers are labels: the family of tasks that a head over a GPT's hidden
states can do.

A row becomes the tokens of its text and nothing else, so that whoever loads the classifier
elsewhere gives it the text and gets the same scores. Under `--form word` there is no head: the
language model's own answers with a label's word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from adapters import heads, layers
from adapters.heads import Head
from base.files import write_json
from config import RunConfig, UserError
from engine.log import finite
from engine.task import Batch, Cost, Facts, Sums, Tensors
from model import GPT
from storage.checkpoint import RESULTS, locate
from tasks import methods
from tasks.classification.finished import open_classifier
from tasks.classification.labels import (
    class_weights,
    composed,
    find_labels,
    is_number,
    is_unknown,
    label_of,
    true_labels,
    word_ids,
)
from tasks.classification.objective import Objective
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import VALIDATION, Whose, write_answers
from tasks.classification.scorer import Scorer
from tasks.encoder import Encoder, Long, Parts, padded
from tasks.finetuning import Finetuning, Split
from tasks.order import Turns
from text.rows import Row, Rows

ALLOWED_OVERLAP = 0.01  # of the training rows may stand among the validation rows
LSTM_EMBEDDING = 256  # width of the embeddings that --model lstm learns
EXACT = (
    "fp32"  # of everything that is scored: in bf16 near ties fall otherwise with every other batch
)


@dataclass
class Labelled(Split):
    """Rows with what is learned of them."""

    labels: np.ndarray  # (n,) int64: the number of each row's label
    weights: np.ndarray  # (n,) float64: of each row's loss
    heads: np.ndarray  # (n,) int64: the head that each belongs to, 0 the task's own


class Classification(Finetuning):
    """Fill in `columns`, `texts` and, for the forms that need them, `prompt` and `label_words`."""

    config = ClassificationConfig
    cfg: ClassificationConfig
    best = ("accuracy", "max")
    pads: ClassVar[bool] = True
    truth: ClassVar[tuple[str, ...]] = ("label",)
    choices: ClassVar[tuple[str, ...]] = (
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
    course: ClassVar[str] = "Predicted_Label"  # heads the second column of the csv of predictions
    # of --also, with the weights of their losses
    others: Sequence[tuple[Classification, float]] = ()

    labels: tuple[str, ...]
    train: Labelled
    val: Labelled

    # --- what a task says

    def texts(self, row: Row) -> tuple[str, ...]:
        """The one text of a row, or the two."""
        return (row["text"].strip(),)

    def prompt(self, row: Row) -> Parts:
        """A row under the forms `prompt` and `word`; after it stands the label's word."""
        raise NotImplementedError

    def label_words(self, labels: Sequence[str]) -> Sequence[str]:
        """What the language model answers with, label by label; empty where the task knows none."""
        return (
            []
            if all(map(is_number, labels))
            else [label.replace("_", " ").lower() for label in labels]
        )

    def content(self, row: Row) -> str:
        return "\n".join(self.texts(row))

    # --- rows

    def read(self, spec: str, split: str, say: Callable[[str], None]) -> list[Row]:
        """As everywhere; a label that says it is unknown is none. A row to learn from or to score
        by must have one."""
        rows = super().read(spec, split, say)
        known = [row for row in rows if not is_unknown(row["label"])]
        if split == "test":
            return [_without_unknown(row) for row in rows]
        if len(known) < len(rows):
            told = ", ".join(
                sorted({repr(row["label"].strip()) for row in rows if is_unknown(row["label"])})
            )
            text = (
                f"{len(rows) - len(known):,} of {len(rows):,} rows of {spec} have no known "
                f"label ({told})"
            )
            if not known:
                raise UserError(
                    f"{text}; name rows with labels, and a class that is really called so by "
                    "another name"
                )
            self.warnings += (
                f"{text} and are left out; if that is a class of yours, give it another name",
            )
        return known

    def open_trunk(self) -> None:
        super().open_trunk()
        if self.cfg.model == "lstm":  # its embeddings, then the head
            self.trunk.shape = dataclasses.replace(self.shape, n_layer=0)

    def setup(
        self, cfg: ClassificationConfig, say: Callable[[str], None], dry: bool = False
    ) -> Facts:
        self.cfg = cfg
        say = self.begin(say, dry)
        check(cfg)
        methods.check(cfg)
        train, val = self.read_labelled(say)
        self.open_trunk()
        self.words = self._words()
        if cfg.form != "word" and cfg.pooling == "last":
            self.hub_class = ("AutoModelForSequenceClassification", "text-classification")
        self.parts: list[Classification] = [self, *(other for other, _ in self.others)]
        self.keys = _distinct([part.name for part in self.parts])
        self._compose()
        splits = [self._splits(train, val)]
        for other, _ in self.others:
            splits.append(other.beside(self, say))
            self.warnings += other.warnings
        self.train, self.val = (_joined(parts) for parts in zip(*splits, strict=True))
        self._set_order(cfg.simcse_group if "simcse" in cfg.objective else 1)
        weights = [weight for _, weight in self.others]
        others = dict(zip(self.keys[1:], weights, strict=True))
        self.objective = Objective(cfg, self.scorer, others)
        self.terms = self.objective.terms
        if cfg.predict:
            self.check_rows_to_answer(say)
        for text in self._first_rows():
            say(text)
        self._find_head()
        return self.facts()

    def read_labelled(self, say: Callable[[str], None]) -> tuple[list[Row], list[Row]]:
        """Training rows, those of --augment last, and validation rows; finds the labels, and checks
        all of them."""
        train, val = self._training_and_validation(say)
        # a rare one may be held out
        self.labels = find_labels(train if self.cfg.val_data else [*train, *val])
        self.augmented = self.read(self.cfg.augment, "train", say) if self.cfg.augment else []
        for row in (*self.augmented, *val):
            label_of(row, self.labels)
        train = [*train, *self.augmented]
        known = self.known_rows(train, val)
        if known:
            text = (
                f"{known} of {len(train)} training rows ({known / len(train):.1%}) also stand "
                "among the validation rows"
            )
            if known > ALLOWED_OVERLAP * len(train) and not self.cfg.allow_overlap:
                raise UserError(f"{text}; take them out, or go on with --allow-overlap")
            self.warnings += (text,)
        return train, val

    def check_rows_to_answer(self, say: Callable[[str], None]) -> None:
        """Raise UserError for what would end --predict after training: unknown labels, and under
        --strict long rows."""
        rows = self.rows_to_answer(self.cfg, say)
        true_labels(rows, self.labels)
        if self.cfg.strict:
            for row in rows:
                self.tokens_of(row)

    def beside(self, main: Classification, say: Callable[[str], None]) -> tuple[Labelled, Labelled]:
        """The splits of a task that trains along with `main`, read with its tokenizer, for a head
        of its own."""
        self.warnings = ()
        train, val = self.read_labelled(say)
        self.tokenizer, self.seq_len, self.words = main.tokenizer, main.seq_len, ()
        self.keys = main.keys
        self._compose()
        return self._splits(train, val)

    def row_weights(self, train: Sequence[Row]) -> np.ndarray:
        """Of the loss of each training row, (n,)."""
        numbers = [label_of(row, self.labels) for row in train]
        of_class = class_weights(self.cfg.class_weights, Counter(numbers), self.labels)
        weights = np.array([of_class[n] for n in numbers])
        weights[len(train) - len(self.augmented) :] *= self.cfg.augment_weight
        if not weights.any():
            raise UserError(
                "all training rows have the weight 0; raise --class-weights or --augment-weight"
            )
        return weights

    def _splits(self, train: Sequence[Row], val: Sequence[Row]) -> tuple[Labelled, Labelled]:
        return self._split(train, self.row_weights(train), "training"), self._split(
            val, np.ones(len(val)), "validation"
        )

    def _split(self, rows: Sequence[Row], weights: np.ndarray, what: str) -> Labelled:
        kept, cut = [], 0
        for row, weight in zip(rows, weights, strict=True):
            tokens, was_cut = self.tokens_of(row)
            cut += was_cut
            kept.append((row, tokens, label_of(row, self.labels), weight))
        if cut:
            self.warnings += (
                f"{cut} of {len(rows)} {what} rows are longer than {self.seq_len} tokens and cut "
                f"at the {self.cfg.cut} of their text",
            )
        texts, tokens, labels, losses = zip(*kept, strict=True)
        digest = hashlib.sha256(
            f"{Rows(list(texts)).sha256} {self.labels} {np.array(losses).tolist()}".encode()
        )
        return Labelled(
            list(texts),
            list(tokens),
            digest.hexdigest(),
            np.array(labels),
            np.array(losses),
            np.zeros(len(texts), np.int64),
        )

    def tokens_of(self, row: Row) -> tuple[np.ndarray, bool]:
        """The tokens of a row, and whether it had to be cut."""
        if self.cfg.form == "plain":
            return self.encoder.tokens(list(map(Long, self.texts(row))), row.where, separated=True)
        return self.encoder.tokens(self.prompt(row), row.where)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch, what is learned between the marks."""
        texts = []
        for i in self.rows("train", 0).reshape(-1)[: self.cfg.show_rows]:
            part = self.parts[self.train.heads[i]]
            answer = (
                part.words[self.train.labels[i]]
                if part.words
                else part.labels[self.train.labels[i]]
            )
            tokens = self.train.tokens[i].tolist()
            texts.append(
                f"row {i} ({len(tokens)} tokens):\n{self.tokenizer.decode(tokens)}⟦{answer}⟧\n"
            )
        return texts

    # --- labels' words

    def _words(self) -> tuple[str, ...]:
        """The labels' words under --form word, else none."""
        if self.cfg.form != "word":
            return ()
        words = tuple(map(composed, self.cfg.words)) or tuple(self.label_words(self.labels))
        if len(words) != len(self.labels):
            raise UserError(
                f"--form word: name {len(self.labels)} words with --words, for "
                f"{', '.join(self.labels)}"
            )
        if len(set(word_ids(self.tokenizer, words))) < len(words):
            raise UserError(
                f"of the words {', '.join(words)} two begin with the same token; name others with "
                "--words"
            )
        return tuple(words)

    # --- order

    def _set_order(self, group: int = 1) -> None:
        super()._set_order(group)
        cfg, train = self.cfg, self.train
        self.turns = Turns(train.lengths, train.heads, cfg.batch_size, cfg.seed, group)

    @property
    def steps_per_epoch(self) -> int:
        return self.turns.steps_per_epoch

    def rows(self, split: str, step: int) -> np.ndarray:
        if split == "val":
            return np.lexsort((self.val.lengths, self.val.heads))[:, None]
        return self.turns(step)

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        data = self.train if split == "train" else self.val
        tensors = padded([data.tokens[i] for i in ids], self.tokenizer.eot, self.padded)
        tensors |= {
            "labels": torch.from_numpy(data.labels[ids]),
            "weights": torch.from_numpy(data.weights[ids]).float(),
            "heads": torch.from_numpy(data.heads[ids]),
            "ids": torch.from_numpy(np.asarray(ids)),
        }
        return Batch(
            tensors, self.objective.weights(tensors), self.amounts(data, ids, tensors["idx"])
        )

    # --- the model

    def add_heads(self, model: GPT) -> None:
        for key, part in zip(self.keys, self.parts, strict=True):
            if part.cfg.form != "word":
                model.heads[key] = Head(
                    model.config.n_embd, len(part.labels), self.cfg.pooling, self.cfg.head_dropout
                )

    def build_model(self, cfg: RunConfig) -> GPT:
        model = super().build_model(cfg)
        if self.head:
            model.heads[self.keys[0]].load_state_dict(self.head)
        return model

    def _find_head(self) -> None:
        """Go on with the head of --init where it is for the same labels; warn where it is not."""
        self.head: dict[str, Tensor] = {}
        if self.cfg.init == "scratch" or self.cfg.form == "word":
            return
        found = heads.find(locate(self.cfg.init))
        if found is None:
            return
        info, state = found
        if info.labels == self.labels and info.pooling == self.cfg.pooling:
            self.head = state
        else:
            self.warnings += (
                f"--init {self.cfg.init} has a head for {', '.join(info.labels)} "
                f"({info.pooling}): this run's is new",
            )

    def cost(self) -> Cost:
        cost = super().cost()
        flops = (cost.flops_per_token or 0) - self._flops_left_out()
        return dataclasses.replace(cost, flops_per_token=flops, loss=self.objective.of_tokens)

    def _flops_left_out(self) -> int:
        """Of a token: those of the language model's head, and where only the last token is read,
        those of the last block but its keys and values and queries (9 of 12 n_embd^2 weights, and
        attention)."""
        width = self.shape.n_embd
        left_out = 6 * self.shape.vocab_size * width
        if self.scorer.reads_last and self.shape.n_layer:
            left_out += 6 * 9 * width**2 + 12 * width * int(self.train.lengths.max())
        return left_out

    def describe(self) -> dict[str, str]:
        counts = np.bincount(self.train.labels[self.train.heads == 0], minlength=len(self.labels))
        shares = [
            f"{name} {count / counts.sum():.0%}"
            for name, count in zip(self.labels, counts, strict=True)
        ]
        read = f"--form {self.cfg.form}, " + (
            ", ".join(self.words) or f"{self.cfg.pooling} pooling"
        )
        also = "".join(
            f", {key} x {weight:g}"
            for key, (_, weight) in zip(self.keys[1:], self.others, strict=True)
        )
        return super().describe() | {"labels": f"{', '.join(shares)}; {read}{also}"}

    # --- the loss

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        assert isinstance(model, GPT)
        return self.objective.loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        assert isinstance(model, GPT)
        return self.objective.evaluate(model, batch)

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        return self.objective.metrics(records)

    # --- what a finished model says

    def conclude(self, cfg: ClassificationConfig, run: str, say: Callable[[str], None]) -> None:
        """Score the validation rows with final/, and write what that shows into the run's folder.

        metrics.json takes these figures: those of the loop are of the same step and in fp32 too,
        but of other batches, and may differ in their last digits.
        """
        folder, own = Path(run), self.val.heads == 0
        rows, tokens = (
            [of[i] for i in np.flatnonzero(own)] for of in (self.val.rows, self.val.tokens)
        )
        model = self._open(locate(run), cfg)
        found = self.scorer.probabilities(model, tokens, self.tokenizer.eot)
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        about = {"eval_precision": EXACT, "step": results["final_is_step"]}
        figures = self.write_answers(folder / f"{VALIDATION}.jsonl", rows, found, say, about)
        write_json(folder / RESULTS, results | finite(figures) | {"eval_precision": EXACT})

    def ready(
        self, cfg: ClassificationConfig, where: str, say: Callable[[str], None]
    ) -> tuple[GPT, list[Row]]:
        self.cfg, self.warnings = cfg, ()
        rows = self.rows_to_answer(cfg, say)
        model = self._open(where, cfg)
        true_labels(rows, self.labels)  # an unknown one ends the run before the work is done
        return model, rows

    def predict(
        self, cfg: ClassificationConfig, where: str, path: Path, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Write the labels that the classifier of a checkpoint gives to the rows of `--predict`, as
        jsonl with probabilities and as the course's csv. Returns their scores where the file has
        the true ones."""
        model, rows = self.ready(cfg, where, say)
        tokens, was_cut = zip(*map(self.tokens_of, rows), strict=True) if rows else ((), ())
        if cut := sum(was_cut):
            say(
                f"{cut} of {len(rows)} rows are longer than {self.seq_len} tokens and cut at the "
                f"{self.cfg.cut} of their text"
            )
        found = self.scorer.probabilities(model, tokens, self.tokenizer.eot)
        return self.write_answers(path, rows, found, say)

    def _open(self, where: str, cfg: ClassificationConfig) -> GPT:
        """The model of a classifier's checkpoint; takes its tokenizer, labels, form and words for
        this task's."""
        model, self.tokenizer, info = open_classifier(where, self.name, cfg.device)
        # A row is cut as in the run, unless the user says otherwise: else its scores were others.
        self.seq_len = min(cfg.seq_len or info.seq_len or model.context, model.context)
        cut = cfg.cut if cfg.cut != ClassificationConfig.cut else info.cut
        self.cfg = dataclasses.replace(cfg, form=info.form, pooling=info.pooling, cut=cut)
        self.labels, self.words, self.keys = info.labels, info.words, [self.name]
        self._compose()
        return model

    def _compose(self) -> None:
        """What encodes and scores the rows of this task, once tokenizer, labels and words are
        known."""
        cfg = self.cfg
        ids = word_ids(self.tokenizer, self.words) if self.words else []
        self.encoder = Encoder(self.tokenizer, self.seq_len, cfg.cut, cfg.strict)
        self.scorer = Scorer(self.keys, cfg.pooling == "last", ids)

    def write_answers(
        self,
        path: Path,
        rows: Sequence[Row],
        found: np.ndarray,
        say: Callable[[str], None],
        about: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        """The predictions of rows, probabilities (n, K), with all that can be said of them where
        their labels are known; `about` goes into the report."""
        whose = Whose(self.name, self.labels, self.course, self.cfg.seed)
        return write_answers(path, rows, found, whose, say, about or {"eval_precision": EXACT})

    # --- what is written

    @property
    def info(self) -> heads.Info:
        cfg = self.cfg
        return heads.Info(
            self.name, self.labels, cfg.form, cfg.pooling, self.words, self.seq_len, cfg.cut
        )

    def _score(self, model: GPT) -> Tensor | None:
        """The weights of the task's own head where the hub's classifiers have such a one: by the
        last token."""
        with_head = self.cfg.form != "word" and self.cfg.pooling == "last"
        return model.heads[self.keys[0]].weight if with_head else None

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        assert isinstance(model, GPT)
        score = self._score(model)
        self.trunk.export(model, folder, stored_only, self.pads, score, self.labels)
        heads.save(model, folder, self.info)


# --- options


def as_lstm(cfg: ClassificationConfig) -> ClassificationConfig:
    """The options of `--model lstm`: from scratch, with the tokenizer that --init would have."""
    tokenizer = cfg.tokenizer or (None if cfg.init == "scratch" else cfg.init)
    width = cfg.n_embd or LSTM_EMBEDDING
    return dataclasses.replace(
        cfg, init="scratch", tokenizer=tokenizer, n_embd=width, n_head=1, pooling="lstm"
    )


def check(cfg: ClassificationConfig) -> None:
    """Raise UserError for options that do not go together."""
    # of the states, which SimCSE compares
    draws = cfg.dropout or (cfg.method in layers.LORA and cfg.lora_dropout)
    of_head = cfg.head_dropout and cfg.form != "word"
    for objective in cfg.objective:
        if not draws and not (objective == "rdrop" and of_head):
            raise UserError(
                f"--objective {objective} compares two passes of a row under different dropout; "
                "set --dropout"
            )
    if cfg.compile_unit == "model":
        raise UserError(
            "--compile-unit model: a classifier is compiled block by block; leave it out"
        )
    if cfg.model == "lstm" and (cfg.form == "word" or cfg.method != "full"):
        raise UserError(
            "--model lstm has no language model's head and no blocks: leave out --form word and "
            "--method"
        )
    if cfg.form == "word" and cfg.pooling != "last":
        raise UserError(
            f"--pooling {cfg.pooling} is for a head, and under --form word there is none; leave it "
            "out"
        )
    if cfg.form == "word" and cfg.also:
        raise UserError(
            "--also trains heads, and --form word the language model's own: use another form, or "
            "leave --also out"
        )
    if cfg.words and cfg.form != "word":
        raise UserError("--words belongs to --form word; add it, or leave --words out")
    if cfg.augment_weight != 1 and not cfg.augment:
        raise UserError(
            "--augment-weight belongs to --augment FILE; add it, or leave the weight out"
        )


# --- rows


def _without_unknown(row: Row) -> Row:
    """The row; its label is empty where it says that nobody knows it."""
    return (
        dataclasses.replace(row, fields=row.fields | {"label": ""})
        if is_unknown(row["label"])
        else row
    )


# --- several tasks


def _joined(parts: Sequence[Labelled]) -> Labelled:
    """The rows of several tasks as one split, each with the number of its task's head."""
    digest = hashlib.sha256(" ".join(part.sha256 for part in parts).encode()).hexdigest()
    return Labelled(
        [row for part in parts for row in part.rows],
        [row for part in parts for row in part.tokens],
        parts[0].sha256 if len(parts) == 1 else digest,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts]),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, those that came before with a number."""
    return [name if name not in names[:n] else f"{name}-{n + 1}" for n, name in enumerate(names)]
