"""The labelled rows of a run: reads, weights, encodes and joins them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.options import Form
from config import UserError
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import class_weights, find_labels, label_index
from tasks.classification.options import ClassificationConfig
from tasks.description import Truncatable
from tasks.encoder import Encoder
from tasks.finetuning import Split
from tasks.source import Source
from tasks.trunk import Trunk
from text.overlap import Overlap
from text.rows import Row, Rows

ALLOWED_OVERLAP = 0.01  # fraction of the training rows that may be validation rows too


@dataclass(frozen=True)
class LabelledRows:
    """The rows of a task, with its labels."""

    source: Source
    labels: tuple[str, ...]
    train: list[Row]  # the rows of --augment come last
    val: list[Row]
    weights: np.ndarray  # (len(train),) float64: weight of each training row's loss


@dataclass
class LabelledSplit(Split):
    """Rows as tokens, with their labels."""

    labels: np.ndarray  # (n,) int64: index of each row's label
    weights: np.ndarray  # (n,) float64: weight of each row's loss
    heads: np.ndarray  # (n,) int64: the head of each row's task, 0 for the main task


@dataclass(frozen=True)
class RowEncoder:
    """Encodes the rows of a task under one --form."""

    task: ClassificationDescription
    form: Form
    encoder: Encoder

    def __call__(self, row: Row) -> tuple[np.ndarray, bool]:
        """The tokens of a row (n,) int64, and whether it was truncated."""
        if self.form == "plain":
            return self.encoder.tokens(
                list(map(Truncatable, self.task.texts(row))), row.where, separated=True
            )
        return self.encoder.tokens(self.task.prompt(row, self.form), row.where)


def read_labelled_rows(source: Source) -> LabelledRows:
    """The labelled rows that the options name.

    Raises UserError if the labels are no classes, if a row has a label that no training row has, or
    if too many training rows are validation rows too.
    """
    cfg: ClassificationConfig = source.cfg
    train, val = source.training_and_validation()
    # All rows of a rare label may be held out, so held-out rows count too.
    labels = find_labels(train if cfg.val_data else [*train, *val])
    augmented = source.read(cfg.augment, "train") if cfg.augment else []
    for row in (*augmented, *val):
        label_index(row, labels)
    train = [*train, *augmented]
    if both := source.count_overlap(train, val):
        text = (
            f"{both} of {len(train)} training rows ({both / len(train):.1%}) are also "
            "validation rows"
        )
        if both > ALLOWED_OVERLAP * len(train) and not cfg.allow_overlap:
            raise UserError(f"{text}; remove them, or allow it with --allow-overlap")
        source.warnings.append(text)
    weights = row_weights(train, labels, cfg, len(augmented))
    return LabelledRows(source, labels, train, val, weights)


def row_weights(
    rows: Sequence[Row], labels: Sequence[str], cfg: ClassificationConfig, augmented: int
) -> np.ndarray:
    """Weight of the loss of each training row, (n,) float64. The last `augmented` rows are from
    --augment."""
    numbers = [label_index(row, labels) for row in rows]
    by_label = class_weights(cfg.class_weights, Counter(numbers), labels)
    weights = np.array([by_label[n] for n in numbers])
    weights[len(rows) - augmented :] *= cfg.augment_weight
    if not weights.any():
        raise UserError(
            "all training rows have the weight 0; raise --class-weights or --augment-weight"
        )
    return weights


def find_overlap(tasks: Sequence[LabelledRows]) -> Overlap:
    """Which validation rows of the tasks share an n-gram with a training row of any task."""
    texts = [each.source.task.content(row) for each in tasks for row in each.val]
    return tasks[0].source.find_shared(texts, training_texts(tasks))


def training_texts(tasks: Sequence[LabelledRows]) -> list[str]:
    """The texts of the tasks' training rows."""
    return [each.source.task.content(row) for each in tasks for row in each.train]


def encode_rows(rows: LabelledRows, trunk: Trunk) -> tuple[LabelledSplit, LabelledSplit]:
    """The training and the validation split, encoded."""
    encode = row_encoder(rows.source, trunk)
    ones = np.ones(len(rows.val))
    return (
        _encoded(rows, rows.train, rows.weights, "training", encode),
        _encoded(rows, rows.val, ones, "validation", encode),
    )


def row_encoder(source: Source, trunk: Trunk) -> RowEncoder:
    """The encoder for a task's rows, from its options and the model of the run."""
    cfg: ClassificationConfig = source.cfg
    encoder = Encoder(trunk.tokenizer, trunk.seq_len, cfg.cut, cfg.strict)
    task = source.task
    assert isinstance(task, ClassificationDescription)
    return RowEncoder(task, cfg.form, encoder)


def _encoded(
    labelled: LabelledRows, rows: list[Row], weights: np.ndarray, what: str, encode: RowEncoder
) -> LabelledSplit:
    labels = labelled.labels
    tokens, was_cut = zip(*map(encode, rows), strict=True)
    if cut := sum(was_cut):
        encoder = encode.encoder
        labelled.source.warnings.append(
            f"{cut} of {len(rows)} {what} rows are longer than {encoder.seq_len} tokens and are "
            f"truncated at the {encoder.cut} of their text"
        )
    digest = hashlib.sha256(f"{Rows(rows).sha256} {labels} {weights.tolist()}".encode())
    numbers = np.array([label_index(row, labels) for row in rows])
    heads = np.zeros(len(rows), np.int64)
    return LabelledSplit(rows, list(tokens), digest.hexdigest(), numbers, weights, heads)


def join(splits: Sequence[LabelledSplit]) -> LabelledSplit:
    """The splits of several tasks as one split. Each row keeps the number of its task's head."""
    digest = hashlib.sha256(" ".join(split.sha256 for split in splits).encode()).hexdigest()
    return LabelledSplit(
        [row for split in splits for row in split.rows],
        [row for split in splits for row in split.tokens],
        splits[0].sha256 if len(splits) == 1 else digest,
        np.concatenate([split.labels for split in splits]),
        np.concatenate([split.weights for split in splits]),
        np.repeat(np.arange(len(splits)), [len(split.rows) for split in splits]),
    )
