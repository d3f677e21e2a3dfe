"""Writes a classifier's files: predictions with probabilities, and for rows with known labels a
report and charts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.files import sibling, write_json
from engine.log import json_safe
from tasks.classification import chart, confusion
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import true_labels
from text.overlap import Overlap, with_clean
from text.row import Row

VALIDATION = "validation"  # stem of the files about the validation rows


def probabilities(log_p: np.ndarray) -> np.ndarray:
    """Probabilities (n, K) that add up to 1, from log-probabilities that may add up to less."""
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@dataclass(frozen=True)
class Answered:
    """Rows and what a classifier found for them."""

    rows: Sequence[Row]
    probabilities: np.ndarray  # (n, K)
    overlap: Overlap | None  # of the rows with the training rows, if these are known


def write_answers(
    path: Path,
    answered: Answered,
    task: ClassificationDescription,
    labels: Sequence[str],
    seed: int,
    say: Callable[[str], None],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write the predictions of rows, and a report on the rows with known labels. Returns the
    report's metrics, or {} if no label is known.

    about: entries for the report, such as the precision and the step of the model. If the overlap
    is known, the report and the result have the metrics of clean rows too, and the counts of rows
    as "clean".
    """
    rows, found, overlap = answered.rows, answered.probabilities, answered.overlap
    true = true_labels(rows, labels)
    write_predictions(path, rows, found, labels, task.csv_header)
    if unread := sum(bool(row.fault) for row in rows):
        say(
            f"{unread:,} of {len(rows):,} rows could not be read. Their answers are empty and are "
            "not scored"
        )
    if not true:
        return {}
    known, scored = list(true.values()), found[list(true)]
    if overlap is None:
        return write_report(path, known, scored, labels, task.name, seed, say, about)
    counts = overlap.part(np.array(list(true))).counts
    clean = {i: label for i, label in true.items() if not overlap.shared[i]}
    figures = confusion.figures(list(clean.values()), found[list(clean)]) if clean else {}
    about = about | {"clean": counts | figures}
    every = write_report(path, known, scored, labels, task.name, seed, say, about)
    return with_clean(every, figures) | {"clean": counts}


def write_predictions(
    path: Path, rows: Sequence[Row], found: np.ndarray, labels: Sequence[str], csv_header: str
) -> None:
    """Write a prediction for each row: a jsonl file with probabilities (n, K), and beside it a csv
    in CS224N's format.

    path: the name of one of the two files. For a row with a fault, the prediction is null and
    "unreadable" is the reason.
    """
    jsonl = sibling(path, ".jsonl") if path.suffix == ".csv" else path
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
    with sibling(path, ".csv").open("w", encoding="utf-8", newline="") as file:
        file.write(f"id \t {csv_header} \n")
        for id, label in zip(ids_of(rows), predicted, strict=True):
            file.write(f"{id} , {label or ''} \n")


def ids_of(rows: Sequence[Row]) -> list[str]:
    """The name of each row in CS224N's csv: its id, or its number from 0. A number that is another
    row's id is left empty."""
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
    """Write a report and charts beside the predictions of `path`. Returns the main metrics.

    true: the label indices (n,). found: probabilities (n, K). about: the report's first entries.
    The charts of the validation rows are confusion.png and reliability.png. Those of other rows
    have the stem of `path` in front.
    """
    report = about | confusion.report(true, found, labels, seed)
    write_json(sibling(path, ".report.json"), json_safe(report))
    name = sibling(path, "").name
    before = "" if name == VALIDATION else f"{name}."
    pictures = chart.draw(report, path.parent, f"{task}: {name}", before)
    say(summary(report, path, pictures))
    return {name: report[name] for name in ("accuracy", "macro_f1", "calibration_error")}


def summary(report: dict[str, Any], path: Path, pictures: Sequence[Path]) -> str:
    """A few lines that summarise a report."""
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
    lines.append(", ".join(str(file) for file in pictures) or "no charts: pip install matplotlib")
    return "\n".join(lines)
