"""What a classifier says of rows, as files: predictions with probabilities, a report where the
labels are known, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from base.files import beside, write_json
from engine.log import finite
from tasks.classification import chart, confusion
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import true_labels
from text.rows import Row

VALIDATION = "validation"  # begins the names of the files about those rows


def probabilities(log_p: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, K), of which some may be elsewhere, to probabilities that add up to
    1."""
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def write_answers(
    path: Path,
    rows: Sequence[Row],
    found: np.ndarray,
    task: ClassificationDescription,
    labels: Sequence[str],
    seed: int,
    say: Callable[[str], None],
    about: dict[str, Any],
) -> dict[str, float]:
    """The predictions of rows, probabilities (n, K), and the report on those whose labels are
    known; returns its figures.

    `about` goes into the report: what the probabilities were computed in, and of which step's
    model.
    """
    true = true_labels(rows, labels)
    write_predictions(path, rows, found, labels, task.csv_header)
    if unread := sum(bool(row.fault) for row in rows):
        say(
            f"{unread:,} of {len(rows):,} rows could not be read: their answers are empty and not "
            "scored"
        )
    if not true:
        return {}
    known, scored = list(true.values()), found[list(true)]
    return write_report(path, known, scored, labels, task.name, seed, say, about)


def write_predictions(
    path: Path, rows: Sequence[Row], found: np.ndarray, labels: Sequence[str], csv_header: str
) -> None:
    """A prediction for each of the rows, with probabilities (n, K): jsonl, and beside it the
    course's csv.

    `path` names one of the two. A row with a fault has an empty prediction: null, and "unreadable"
    says why.
    """
    jsonl = beside(path, ".jsonl") if path.suffix == ".csv" else path
    predicted = [
        None if row.fault else labels[i] for row, i in zip(rows, found.argmax(1), strict=True)
    ]
    with jsonl.open("w", encoding="utf-8") as file:
        for row, label, p in zip(rows, predicted, found.tolist(), strict=True):
            record = row.fields | {
                "prediction": label,
                "probabilities": dict(zip(labels, p, strict=True)),
            }
            if row.fault:
                record |= {"probabilities": None, "unreadable": row.fault}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with beside(path, ".csv").open("w", encoding="utf-8", newline="") as file:
        file.write(f"id \t {csv_header} \n")
        for id, label in zip(ids_of(rows), predicted, strict=True):
            file.write(f"{id} , {label or ''} \n")


def ids_of(rows: Sequence[Row]) -> list[str]:
    """What names each row in the course's csv: its id; without one its number from 0, unless
    another row's id is that."""
    ids = [row.fields.get("id", "").strip() for row in rows]
    taken = set(ids)
    return [id or ("" if str(n) in taken else str(n)) for n, id in enumerate(ids)]


def write_report(
    path: Path,
    true: Sequence[int],
    found: np.ndarray,
    labels: Sequence[str],
    task: str,
    seed: int,
    say: Callable[[str], None],
    about: dict[str, Any],
) -> dict[str, float]:
    """Beside the predictions of `path` all that can be said of rows whose labels (n,) are known;
    returns the figures.

    `about`: how the probabilities came about, which the report names first. The pictures of the
    validation rows are confusion.png and reliability.png; those of others begin with their name.
    """
    report = about | confusion.report(true, found, labels, seed)
    write_json(beside(path, ".report.json"), finite(report))
    name = beside(path, "").name
    before = "" if name == VALIDATION else f"{name}."
    pictures = chart.draw(report, path.parent, f"{task}: {name}", before)
    say(summary(report, path, pictures))
    return {name: report[name] for name in ("accuracy", "macro_f1", "calibration_error")}


def summary(report: dict[str, Any], path: Path, pictures: Sequence[Path]) -> str:
    """What a report comes to, in a few lines."""
    low, high = report["intervals"]["accuracy"]
    lines = [
        f"{path.stem}: accuracy {report['accuracy']:.4f} (95% {low:.4f} to {high:.4f}), macro-F1 "
        f"{report['macro_f1']:.4f}, calibration error {report['calibration_error']:.4f}, "
        f"{report['rows']:,} rows"
    ]
    for name, figures in report["per_class"].items():
        lines.append(
            f"  {name:<20} precision {figures['precision']:.3f}  recall {figures['recall']:.3f}  "
            f"F1 {figures['f1']:.3f}  rows {figures['rows']:,}"
        )
    lines.append(", ".join(str(file) for file in pictures) or "no pictures: pip install matplotlib")
    return "\n".join(lines)
