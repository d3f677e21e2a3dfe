"""The cells of benchmarks.methods: the methods, the decodings, where each run lies, and what a finished one measured."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.plot import records

NO_METRICS = ("kind", "time", "step", "seconds")  # of an evaluation's record


@dataclass(frozen=True)
class Method:
    """A way of training: its options of `python -m finetune.TASK`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0  # its peak learning rate, over that of full fine-tuning


@dataclass(frozen=True)
class Decoding:
    """A way of decoding what the method `of` trained."""

    name: str
    options: Mapping[str, Any]
    of: str = "full"


SCRATCH = {"init": "scratch"}
UNLIKELIHOOD = {"objective": "unlikelihood"}
METHODS = (
    Method("scratch", SCRATCH, 10),
    Method("full"),
    Method("full+unlikelihood", UNLIKELIHOOD),
    Method("full+llrd", {"llrd": 0.8}),
    Method("ulmfit", {"method": "ulmfit", "schedule": "slanted-triangular"}, 3),
    Method("last-2", {"method": "last-k", "last-k": 2}, 3),
    Method("last-layer", {"method": "last-layer"}, 3),
    Method("lora-attention-8", {"method": "lora", "lora-rank": 8, "lora-alpha": 16}, 10),
    Method("lora-attention-16", {"method": "lora", "lora-rank": 16, "lora-alpha": 32}, 10),
    Method("lora-feed-forward-8", {"method": "lora", "lora-rank": 8, "lora-alpha": 16, "lora-on": "feed-forward"}, 10),
    Method("dora-attention-8", {"method": "dora", "lora-rank": 8, "lora-alpha": 16}, 10),
    Method("prefix", {"method": "prefix"}, 10),
    Method("prefix+unlikelihood", {"method": "prefix"} | UNLIKELIHOOD, 10),
    Method("soft-prompt", {"method": "soft-prompt"}, 100),
)
CONTRASTIVE = {"decode": "contrastive", "contrastive-k": 4, "contrastive-alpha": 0.6}
GROWTH, MEAN = {"contrastive-growth": True}, {"contrastive-similarity": "mean"}
BEAMS = {"decode": "beam", "beams": 5, "length-penalty": 0.6, "no-repeat-ngram": 3}
DECODINGS = (  # sampling is the task's own
    Decoding("sample", {"decode": "sample"}),
    Decoding("sample-hot", {"decode": "sample", "temperature": 1.2, "top-p": 0.9}),
    Decoding("sample-of-prefix", {"decode": "sample"}, of="prefix"),
    Decoding("greedy", {"decode": "greedy"}),
    Decoding("contrastive", CONTRASTIVE),
    Decoding("contrastive-growing", CONTRASTIVE | GROWTH),
    Decoding("contrastive-mean", CONTRASTIVE | MEAN),
    Decoding("contrastive-growing-mean", CONTRASTIVE | GROWTH | MEAN),
    Decoding("contrastive-penalty", CONTRASTIVE | {"repetition-penalty": 1.2}),
    Decoding("beam", BEAMS),
    Decoding("mbr-beams", BEAMS | {"decode": "mbr", "candidates-by": "beam", "candidates": 16}),
    Decoding("mbr-samples", {"decode": "mbr", "candidates": 16}),
    Decoding("ensemble", BEAMS | {"decode": "ensemble", "candidates": 16}),
)


# --- cells


@dataclass(frozen=True)
class Cell:
    """A run, or a decoding of one. Told anything else it is another cell, of another path."""

    kind: Literal["methods", "decodings"]
    name: str
    seed: int
    options: Mapping[str, Any] = field(compare=False)
    path: Path  # a run's folder, or a file of answers

    @property
    def label(self) -> str:
        return f"{self.name} ({self.seed})"

    @property
    def result(self) -> Path:
        """The file whose presence says that the cell is done."""
        return self.path / "metrics.json" if self.kind == "methods" else self.path.with_suffix(".scores.json")

    @property
    def words(self) -> list[str]:
        """The options as command-line words."""
        where = {"out": self.path} if self.kind == "methods" else {"answers": self.path}
        found: list[str] = []
        for name, value in (dict(self.options) | where).items():
            found += [f"--{name}"] if value is True else [f"--{name}", *str(value).split("\0")]
        return found

    def figures(self) -> dict[str, Any] | None:
        """What was measured, or None where the cell is not done."""
        if not self.result.exists():
            return None
        return figures_of(self.path) if self.kind == "methods" else {"metrics": json.loads(self.result.read_text())}


@functools.cache
def figures_of(run: Path) -> dict[str, Any]:
    """Of a finished run: the metrics of the step that final/ is of, the lowest validation loss, and the cost."""
    results, config = (json.loads((run / name).read_text()) for name in ("metrics.json", "config.json"))
    log = records(run)
    evals = [line for line in log if line["kind"] == "eval"]
    chosen = next((line for line in evals if line["step"] == results["final_is_step"]), {})
    epoch = results["steps"] / config["epochs"]
    losses = [(line["val_loss"], line["step"]) for line in evals if line.get("val_loss") is not None]
    lowest = min(losses, default=None)
    return {
        "metrics": {name: value for name, value in chosen.items() if name not in NO_METRICS},
        "lowest_val_loss": lowest and lowest[0],
        "lowest_epoch": lowest and lowest[1] / epoch,
        "best_epoch": results["final_is_step"] / epoch,
        "epochs": config["epochs"],
        "lr": config["lr"],
        "seconds": results["seconds"],
        "seconds_per_epoch": results["seconds"] / config["epochs"],
        **{name: results[name] for name in ("trained_parameters", "parameters", "memory_bytes")},
        "warnings": [line["text"] for line in log if line["kind"] == "warning"],
    }


@dataclass
class Bench:
    """What there is to run, where it lies, how long it may take, and how far it is."""

    folder: Path
    program: Sequence[str]  # the command of the task, without options
    best: tuple[str, str]  # the metric that ranks, and which way
    rate: float  # of full fine-tuning
    common: Mapping[str, Any]  # options of every run
    scratch: Mapping[str, Any]  # options that give a model from scratch the base's shape
    predict: str | None  # the rows that decodings answer
    answers: str = ".txt"  # suffix of a file of answers
    methods: Sequence[Method] = METHODS
    decodings: Sequence[Decoding] = DECODINGS
    only: Sequence[str] | None = None
    seeds: Sequence[int] = (11711,)
    keep: int = 5  # methods that are run with every seed
    until: float = math.inf  # of time.monotonic
    failed: dict[Cell, str] = field(default_factory=dict)  # the last line of each that did
    left_out: dict[Cell, None] = field(default_factory=dict)
    done: list[Cell] = field(default_factory=list)
    running: Cell | None = None

    def run_of(self, method: Method, seed: int) -> Cell:
        """The cell of a method and a seed."""
        options = (
            dict(self.common) | {"lr": float(f"{method.rate * self.rate:.3g}"), "seed": seed} | dict(method.options)
        )
        options |= self.scratch if options["init"] == "scratch" else {}
        return Cell("methods", method.name, seed, options, self._path("runs", method.name, seed, options))

    def decoding_of(self, decoding: Decoding, seed: int) -> Cell:
        """The cell of a decoding of the run of its method with that seed."""
        run = self.run_of(self.method_of(decoding), seed)
        options = dict(run.options) | {"predict": self.predict} | dict(decoding.options)
        path = self._path("decodings", decoding.name, seed, options).with_suffix(self.answers)
        return Cell("decodings", decoding.name, seed, options | {"out": run.path}, path)

    def _path(self, kind: str, name: str, seed: int, options: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:8]
        return self.folder / kind / f"{name}-{seed}-{key}"

    def wanted(self, name: str) -> bool:
        return self.only is None or name in self.only

    def method_of(self, decoding: Decoding) -> Method:
        return next(method for method in self.methods if method.name == decoding.of)

    def ranking(self) -> list[Method]:
        """Methods by the first seed, best first, then those whose turn is yet to come."""
        sign = -1 if self.best[1] == "max" else 1
        ranked, waiting = [], []
        for method in filter(lambda method: self.wanted(method.name), self.methods):
            cell = self.run_of(method, self.seeds[0])
            figures = cell.figures()
            value = figures["metrics"].get(self.best[0]) if figures else None
            if value is not None:
                ranked.append((sign * value, method))
            elif figures is None and not self.settled(cell):
                waiting.append(method)
        return [method for _, method in sorted(ranked, key=lambda pair: pair[0])] + waiting

    def cells(self) -> Iterator[Cell]:
        """All there is to do, in order; what comes later depends on what the earlier ones gave."""
        for number, seed in enumerate(self.seeds):
            methods = self.ranking()[: self.keep] if number else [m for m in self.methods if self.wanted(m.name)]
            yield from (self.run_of(method, seed) for method in methods)
            for decoding in self.decodings if self.predict else ():
                method = self.method_of(decoding)
                run = self.run_of(method, seed)
                to_come = method in methods and not self.settled(run)
                if self.wanted(decoding.name) and (to_come or run.result.exists()):
                    yield self.decoding_of(decoding, seed)

    def settled(self, cell: Cell) -> bool:
        """Whether a cell has had its turn."""
        return cell in self.failed or cell in self.left_out or cell in self.done

    # --- time

    def usual(self, cell: Cell) -> float:
        """Seconds that a cell may take: as long as it took with other seeds, or as its like did."""
        walls = [(other.name, wall) for other in self.done if other.kind == cell.kind and (wall := wall_of(other))]
        same = [wall for name, wall in walls if name == cell.name]
        return statistics.median(same or [wall for _, wall in walls] or [0.0])

    def rest(self) -> float:
        """Seconds until the last cell is done, or the time is up."""
        left = sum(self.usual(cell) for cell in self.cells() if not self.settled(cell))
        return min(left, self.until - time.monotonic())


def wall_of(cell: Cell) -> float | None:
    """Seconds that the process of a done cell took, where this command has noted them."""
    try:
        return json.loads(noted(cell).read_text())["wall_seconds"]
    except (OSError, ValueError, KeyError):
        return None


def noted(cell: Cell) -> Path:
    """The file for a cell's command and time."""
    return cell.path.with_name(cell.path.stem + ".cell.json")
