"""What a run's folder says about the run: its options, versions, data, curves and final metrics.

A folder is only read. A run that is unfinished, was resumed, or lost some of its files still has
its log, and that is enough.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from base.charts import ACCURACIES, smooth
from base.files import read_json
from config import UserError
from engine.log import finite_values, records
from engine.progress import LAST_LOSSES

# What a log's evaluation holds besides the metrics.
BESIDE_METRICS = ("kind", "time", "step", "seconds")
VERSIONS = ("python", "torch", "machine", "device", "world_size")
# Hashes in run.json. Options of these names are paths, and two paths may lead to the same data.
HASHES = ("data", "val_data", "tokenizer", "base")
# Options that say where things are, and the micro-batch, which only changes rounding.
NOT_CONFIGURATION = ("out", "resume", "cache", "predict", "answers", "micro_batch")


class Point(NamedTuple):
    """A loss, and what had been spent until then."""

    step: float
    tokens: float
    seconds: float  # of training, without evaluations and pauses
    loss: float


@dataclass(frozen=True)
class RunFolder:
    """A run, or a file of predictions, of which only name, path and predictions are known."""

    name: str
    path: Path
    options: dict[str, Any] = field(default_factory=dict)  # config.json
    versions: dict[str, Any] = field(default_factory=dict)  # and hardware
    identity: dict[str, Any] = field(default_factory=dict)  # task, hashes of data, shape
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    # accuracies on benchmarks, as the `loss` of points, by the name in the log
    accuracies: dict[str, list[Point]] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)  # those of metrics.json, or of the log
    finished: bool = True
    predictions: Path | None = None  # of its validation rows

    @property
    def planned_steps(self) -> int | None:
        """The steps that the run was to take, or None if that is unknown."""
        steps = self.options.get("steps")
        return steps if isinstance(steps, int) else None

    def configuration(self) -> dict[str, Any]:
        """What determines the run's results, but for its seed and the machine."""
        options = {
            name: value for name, value in self.options.items() if name not in NOT_CONFIGURATION
        }
        hashes = {name: self.identity[name] for name in HASHES if name in self.identity}
        if "base" in hashes:
            options.pop("init", None)
        return options | hashes | {"task": self.identity.get("task"), "seed": None}


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or the paths as typed if two of these are equal."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def read_run(folder: Path, name: str) -> RunFolder:
    """Read a run. Raises UserError if it has no log, or a log without any figure."""
    log = records(folder)
    spent, train = _training(log)
    evals = [record for record in log if record["kind"] == "eval" and record.get("step")]
    if not spent and not evals:
        raise UserError(f"{folder}/log.jsonl has no training step and no evaluation yet")

    def curve(metric: str) -> list[Point]:
        return [
            spent[record["step"]]._replace(loss=record[metric])
            for record in evals
            if record["step"] in spent and finite_values([record], metric)
        ]

    options, record = _object(folder / "config.json"), _object(folder / "run.json")
    results = _object(folder / "metrics.json")
    finished = _is_finished(results, record)
    predictions = folder / "validation.jsonl"
    return RunFolder(
        name,
        folder,
        options,
        {key: record[key] for key in VERSIONS if key in record},
        record["identity"] if isinstance(record.get("identity"), dict) else {},
        train,
        curve("val_loss"),
        {name: found for name in ACCURACIES if (found := curve(name))},
        results if finished else _metrics_of_log(spent, train, evals),
        finished,
        predictions if predictions.is_file() else None,
    )


def _training(log: Sequence[dict[str, Any]]) -> tuple[dict[int, Point], list[Point]]:
    """What had been spent after each step, and the steps with a finite loss."""
    steps = {
        record["step"]: record
        for record in log
        if record["kind"] == "train" and record.get("step") and finite_values([record], "tokens")
    }
    times = itertools.accumulate(
        sum(finite_values([record], "step_ms")) / 1e3 for record in steps.values()
    )
    spent = {
        step: Point(step, record["tokens"], seconds, 0.0)
        for (step, record), seconds in zip(steps.items(), times)
    }
    train = [
        spent[step]._replace(loss=record["loss"])
        for step, record in steps.items()
        if finite_values([record], "loss")
    ]
    return spent, train


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if the file is missing or broken."""
    value = read_json(path)
    return value if isinstance(value, dict) else {}


def _is_finished(results: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether these metrics are of the run's end. A run that has been extended since goes on."""
    lengths = record.get("lengths")
    planned = [length.get("steps") for length in lengths] if isinstance(lengths, list) else []
    if not results or not planned:
        return bool(results)
    return results.get("planned_steps", planned[0]) == planned[-1]  # older versions wrote none


def _metrics_of_log(
    spent: Mapping[int, Point], train: Sequence[Point], evals: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The figures that metrics.json would have if the run had ended here."""
    last = list(spent.values())[-1] if spent else None
    figures: dict[str, Any] = {"steps": last.step, "tokens": last.tokens} if last else {}
    if train:
        figures["train_loss"] = statistics.fmean(point.loss for point in train[-LAST_LOSSES:])
    for record in evals[-1:]:
        figures |= {name: v for name, v in record.items() if name not in BESIDE_METRICS}
    return figures | ({"seconds": last.seconds} if last else {})


# --- differences and losses


def common_names(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that all mappings have, in the order of the first."""
    return [name for name in values[0] if all(name in each for each in values)] if values else []


def differing(values: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> list[str]:
    """The names that all mappings have, but with other values. names: only among these."""
    among = common_names(values) if names is None else names
    return [name for name in among if any(each[name] != values[0][name] for each in values)]


def same_losses(runs: Sequence[RunFolder]) -> bool:
    """Whether losses of the runs can be compared: same task, validation data and tokenizer, as far
    as the runs recorded them."""
    names = ("task", "val_data", "val_weights", "tokenizer")
    known = [[run.identity[name] for run in runs if name in run.identity] for name in names]
    return all(len(set(map(str, values))) <= 1 for values in known)


def loss_curves(runs: Sequence[RunFolder]) -> tuple[str, list[list[Point]]]:
    """The name of a loss that every run has, and its curves: validation loss, or else training loss
    smoothed."""
    if all(run.val for run in runs):
        return "val_loss", [run.val for run in runs]
    return "train_loss", [smoothed(run.train) for run in runs]


def smoothed(curve: Sequence[Point]) -> list[Point]:
    """The curve with its loss smoothed as in pictures."""
    smooth_losses = smooth([(point.step, point.loss) for point in curve])
    return [point._replace(loss=loss) for point, (_, loss) in zip(curve, smooth_losses)]


def reached(curve: Sequence[Point], loss: float) -> Point | None:
    """Where a curve first reaches a loss, by linear interpolation between its points. None if it
    does not. A curve that begins below reaches it at its first point."""
    for before, after in zip([None, *curve], curve):
        if after.loss <= loss:
            if before is None:
                return after
            share = (before.loss - loss) / (before.loss - after.loss)
            return Point(*(a + share * (b - a) for a, b in zip(before, after)))
    return None
