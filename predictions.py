"""What a classifier says of rows, as files: predictions with probabilities, a report where the labels are known, pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import confusion
import confusion_chart
from files import write_json
from rows import Row
from runlog import finite

VALIDATION = "validation"  # begins the names of the files about those rows


def probabilities(log_p: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, K), of which some may be elsewhere, to probabilities that add up to 1."""
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def write_predictions(path: Path, rows: Sequence[Row], found: np.ndarray, labels: Sequence[str], course: str) -> None:
    """Predictions of rows with probabilities (n, K): `path` as jsonl, and beside it the course's csv."""
    predicted = [labels[i] for i in found.argmax(1)]
    with path.open("w", encoding="utf-8") as file:
        for row, label, p in zip(rows, predicted, found.tolist(), strict=True):
            record = row.fields | {"prediction": label, "probabilities": dict(zip(labels, p, strict=True))}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        file.write(f"id \t {course} \n")
        for n, (row, label) in enumerate(zip(rows, predicted, strict=True)):
            file.write(f"{row.fields.get('id') or n} , {label} \n")


def write_report(
    path: Path,
    true: Sequence[int],
    found: np.ndarray,
    labels: Sequence[str],
    task: str,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Beside the predictions of `path` all that can be said of rows whose labels (n,) are known; returns the figures.

    The pictures of the validation rows are confusion.png and reliability.png; those of others begin with their name.
    """
    report = confusion.report(true, found, labels, seed)
    write_json(path.with_suffix(".report.json"), finite(report))
    before = "" if path.stem == VALIDATION else f"{path.stem}."
    pictures = confusion_chart.draw(report, path.parent, f"{task}: {path.stem}", before)
    say(summary(report, path, pictures))
    return {name: report[name] for name in ("accuracy", "macro_f1", "calibration_error")}


def summary(report: dict[str, Any], path: Path, pictures: Sequence[Path]) -> str:
    """What a report comes to, in a few lines."""
    low, high = report["intervals"]["accuracy"]
    lines = [f"{path.stem}: accuracy {report['accuracy']:.4f} (95% {low:.4f} to {high:.4f}), macro-F1 "
             f"{report['macro_f1']:.4f}, calibration error {report['calibration_error']:.4f}, {report['rows']:,} rows"]  # fmt: skip
    for name, figures in report["per_class"].items():
        lines.append(f"  {name:<20} precision {figures['precision']:.3f}  recall {figures['recall']:.3f}  F1 "
                     f"{figures['f1']:.3f}  rows {figures['rows']:,}")  # fmt: skip
    lines.append(", ".join(str(file) for file in pictures) or "no pictures: pip install matplotlib")
    return "\n".join(lines)
