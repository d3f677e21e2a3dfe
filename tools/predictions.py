"""Reads the prediction files of classification runs, prints tables, and checks --out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.files import writable_file
from config import UserError
from tasks.classification.confusion import accuracy, confusion_matrix, macro_f1
from tasks.classification.labels import is_unknown, label_name, nfc
from text.corpus import records_of

PREDICTION_KEYS = ("prediction", "probabilities")  # keys that a run adds to a row's own fields
UNKNOWN = -1  # an unknown label, or the prediction for a row that the run could not read


@dataclass(frozen=True)
class Predictions:
    """One run's predictions for n rows. Labels are indices from 0 to K - 1."""

    where: str
    labels: tuple[str, ...]
    fields: list[dict[str, Any]]  # the fields of each row in the data
    true: np.ndarray  # (n,) int64, UNKNOWN for a row without a known label
    predicted: np.ndarray  # (n,) int64, UNKNOWN for a row that the run could not read
    probabilities: np.ndarray  # (n, K) float64, nan for such a row

    @property
    def known(self) -> np.ndarray:
        """The rows that can be scored, (n,) bool: they have a known label and a prediction."""
        return (self.true != UNKNOWN) & (self.predicted != UNKNOWN)

    def scores(self, predicted: np.ndarray | None = None) -> tuple[float, float]:
        """Accuracy and macro-F1, 0 to 1, over the known rows. predicted: other predictions to score
        instead, (n,) int64."""
        known = self.known
        predicted = self.predicted if predicted is None else predicted
        matrix = confusion_matrix(self.true[known], predicted[known], len(self.labels))
        return accuracy(matrix), macro_f1(matrix)


def read_predictions(files: Sequence[str]) -> list[Predictions]:
    """The predictions of several runs, for the same rows in the same order with the same labels.

    The first file sets the order of the labels. Raises UserError for a file that has no
    predictions, and for files that disagree on rows or labels.
    """
    first = _read(files[0])
    return [first, *(_same_rows(first, _read(file, first)) for file in files[1:])]


def _read(file: str, first: Predictions | None = None) -> Predictions:
    records = [
        _record(f"{file} {place}", cells) for place, cells in list(records_of(Path(file), ".jsonl"))
    ]
    if not records:
        raise UserError(
            f"{file} has no predictions; name a validation.jsonl or predictions.jsonl of a run"
        )
    answered = [record for record in records if record["prediction"] is not None]
    if not answered:
        raise UserError(
            f"{file} has no row with a prediction; name a validation.jsonl or predictions.jsonl of "
            "a run"
        )
    labels = first.labels if first else tuple(answered[0]["probabilities"])
    for record in answered:
        if set(record["probabilities"]) != set(labels):
            other = f"{first.where} has" if first else "its first row has"
            raise UserError(
                f"{file} has the labels {', '.join(record['probabilities'])}, but {other} "
                f"{', '.join(labels)}; give predictions with the same labels"
            )
    number = {label: n for n, label in enumerate(labels)}
    return Predictions(
        file,
        labels,
        [
            {name: value for name, value in record.items() if name not in PREDICTION_KEYS}
            for record in records
        ],
        np.array([_true(file, record, number) for record in records]),
        np.array([number.get(record["prediction"], UNKNOWN) for record in records]),
        np.array([_shares(record, labels) for record in records], dtype=np.float64),
    )


def _record(where: str, cells: dict[str, Any] | str) -> dict[str, Any]:
    """A line of a prediction file. Raises UserError for a line without a prediction."""
    if isinstance(cells, str):
        raise UserError(f"{where} {cells}; name the predictions of a run")
    given = cells.get("probabilities")
    if cells.get("unreadable") and cells.get("prediction") is given is None:
        return cells | {"prediction": None}
    if (
        not isinstance(given, dict)
        or cells.get("prediction") not in given
        or not all(map(_is_share, given.values()))
    ):
        raise UserError(
            f'{where} has no "prediction" with the "probabilities" of all labels; name the '
            "predictions of a run"
        )
    shares = {nfc(label): share for label, share in given.items()}
    return cells | {"prediction": nfc(cells["prediction"]), "probabilities": shares}


def _shares(record: dict[str, Any], labels: Sequence[str]) -> list[float]:
    """The labels' probabilities, or nan without a prediction."""
    return [
        math.nan if record["prediction"] is None else record["probabilities"][label]
        for label in labels
    ]


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _true(file: str, record: dict[str, Any], number: dict[str, int]) -> int:
    label = record.get("label")
    name = "" if label is None or is_unknown(str(label)) else label_name(str(label))
    if name and name not in number:
        raise UserError(
            f"{file} has a row with the label {name[:60]!r}, but predictions only for "
            f"{', '.join(number)}; give predictions of a run on these labels"
        )
    return number.get(name, UNKNOWN)


def _same_rows(first: Predictions, other: Predictions) -> Predictions:
    if len(first.fields) != len(other.fields):
        counts = f"{len(other.fields):,} rows, but {first.where} has {len(first.fields):,}"
        raise UserError(f"{other.where} has {counts}; give predictions of the same file")
    for number, (ours, theirs) in enumerate(zip(first.fields, other.fields, strict=True), 1):
        if ours != theirs:
            raise UserError(
                f"row {number} of {other.where} differs from that of {first.where}; give "
                "predictions of the same file"
            )
    return other


def check_out(out: str, read: Sequence[str], option: str = "--out") -> Path:
    """The file to write. Raises UserError if none is named, if it cannot be written, or if it is a
    file that is read."""
    if not out:
        raise UserError(f"{option} FILE is missing; name the file to write")
    return writable_file(option, out, read)


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print(
            "  ".join(
                [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:]))]
            )
        )
