"""What a finished run of benchmarks.methods measured, out of its folder, and how two runs' labels
compare."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import records
from text.corpus import records_of

NO_METRICS = ("kind", "time", "step", "seconds")  # of an evaluation's record
COSTS = ("seconds", "rows_per_second", "trained_parameters", "parameters", "memory_bytes")


@functools.cache
def figures_of(run: Path) -> dict[str, Any]:
    """Of a finished run: the metrics of the step that final/ is of, how steady they were, and the
    cost."""
    results, config = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("metrics.json", "config.json")
    )
    log = records(run)
    evals = [line for line in log if line["kind"] == "eval"]
    chosen = next((line for line in evals if line["step"] == results["final_is_step"]), {})
    warnings = [line["text"] for line in log if line["kind"] == "warning"]
    return {
        "metrics": {name: value for name, value in chosen.items() if name not in NO_METRICS},
        "between_epochs": unrest([line for line in evals if 2 * line["step"] > results["steps"]]),
        "intervals": report_of(run).get("intervals", {}),
        **(
            course(results, config, log, evals)
            if config["steps"]
            else {"seconds_to_best": results["seconds"]}
        ),
        **{name: results.get(name) for name in COSTS},
        "warnings": [*warnings, *results.get("warnings", ())],
    }


def unrest(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard deviation of each metric over evaluations, where there are at least two."""
    found = {}
    for name in [name for name in evals[0] if name not in NO_METRICS] if len(evals) > 1 else ():
        values = [line[name] for line in evals if line.get(name) is not None]
        if len(values) == len(evals):
            found[name] = statistics.stdev(values)
    return found


def course(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Of a run of steps: where it was best, and how long it took to be there."""
    epoch = config["steps"] / config["epochs"]  # steps that are planned: a run may end sooner
    losses = [
        (line["val_loss"], line["step"]) for line in evals if line.get("val_loss") is not None
    ]
    lowest = min(losses, default=None)
    best = [
        line["step_ms"]
        for line in log
        if line["kind"] == "train" and line["step"] <= results["final_is_step"]
    ]
    return {
        "lowest_val_loss": lowest and lowest[0],
        "lowest_epoch": lowest and lowest[1] / epoch,
        "best_epoch": results["final_is_step"] / epoch,
        "epochs": results["steps"] / epoch,
        "lr": config["lr"],
        "seconds_to_best": sum(best) / 1e3,
        "seconds_per_epoch": results["seconds"] / results["steps"] * epoch,
    }


# --- predictions of labels


def report_of(run: Path) -> dict[str, Any]:
    """What the predictions of the validation rows come to; nothing where the answers are texts."""
    file = run / "validation.report.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


@functools.cache
def compared(run: Path, other: Path) -> dict[str, Any] | None:
    """`confusion.paired_test` of two runs' predictions of the same validation rows; None where
    there are none."""
    from tasks.classification.confusion import paired_test

    one, two = labels_of(run), labels_of(other)
    if one is None or two is None or one[0] != two[0]:
        return None
    return paired_test(one[0], one[1], two[1], seed=0)


@functools.cache
def labels_of(run: Path) -> tuple[list[int], list[int]] | None:
    """True and predicted labels of the validation rows, as numbers."""
    file = run / "validation.jsonl"
    if not file.exists():
        return None
    rows = [cells for _, cells in records_of(file) if isinstance(cells, dict)]
    labels = list(rows[0]["probabilities"])
    true = [
        next(n for n, label in enumerate(labels) if is_name(label, row["label"])) for row in rows
    ]
    return true, [labels.index(row["prediction"]) for row in rows]


def is_name(label: str, cell: str) -> bool:
    """Whether a cell of a file names this label: 1.0 is 1."""
    try:
        return float(label) == float(cell)
    except ValueError:
        return label == cell.strip()
