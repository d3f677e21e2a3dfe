"""The cells of benchmarks.methods: the methods, the decodings, their order, and the figures of a
finished run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.files import read_json
from benchmarks.methods_report import epochs_text
from benchmarks.store import Cell, Figures, Store, place
from engine.log import records
from text.corpus import records_of

NO_METRICS = ("kind", "time", "step", "seconds")  # other keys of an evaluation's record
COSTS = ("seconds", "rows_per_second", "trained_parameters", "parameters", "memory_bytes")


@dataclass(frozen=True)
class Method:
    """A method of training: its options for `python -m finetune.TASK`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # peak learning rate over that of full fine-tuning; None: no steps and no randomness
    rate: float | None = 1.0
    family: str = ""  # the family of tasks that has it; empty: every task that has its options
    tasks: tuple[str, ...] = ()  # only these run it unless --only names it; empty: all
    # options that come from the user; without the first the method does not run
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoding:
    """A way to decode with the weights that the method `of` trained."""

    name: str
    options: Mapping[str, Any]
    of: str = "full"


SCRATCH = {"init": "scratch"}
UNLIKELIHOOD = {"objective": "unlikelihood"}
LORA = {"method": "lora", "lora-rank": 8, "lora-alpha": 16}
LAST_LAYER = {"method": "last-layer"}  # for a classifier this trains only the new head
TEXTS, LABELS = "generation", "classification"
METHODS = (
    Method("scratch", SCRATCH, 10),
    Method("naive-bayes", {"model": "naive-bayes"}, None, tasks=("topics",)),
    Method("tf-idf", {"model": "tf-idf"}, None),
    Method("lstm", {"model": "lstm"}, 10, tasks=("topics",)),
    Method("lstm-gpt2", LAST_LAYER | {"pooling": "lstm"}, 10, tasks=("topics",)),
    Method("full"),
    Method("full+prompt", {"form": "prompt"}),
    Method("full+word", {"form": "word"}),
    Method("full+mean", {"pooling": "mean"}),
    Method("full+attention", {"pooling": "attention"}),
    Method("full+unlikelihood", UNLIKELIHOOD, family=TEXTS),
    Method("full+rdrop", {"objective": "rdrop"}, family=LABELS),
    Method("full+simcse", {"objective": "simcse"}, family=LABELS),
    Method("full+augment", needs=("augment",)),
    Method("full+also", needs=("also", "also-data")),
    Method("full+llrd", {"llrd": 0.8}),
    Method("ulmfit", {"method": "ulmfit", "schedule": "slanted-triangular"}, 3),
    Method("last-2", {"method": "last-k", "last-k": 2}, 3),
    Method("last-layer", LAST_LAYER, 3, family=TEXTS),
    Method("last-layer", LAST_LAYER, 30, family=LABELS),
    Method("lora-attention-8", LORA, 10),
    Method("lora-attention-16", LORA | {"lora-rank": 16, "lora-alpha": 32}, 10),
    Method("lora-feed-forward-8", LORA | {"lora-on": "feed-forward"}, 10),
    Method("dora-attention-8", LORA | {"method": "dora"}, 10),
    Method("lora+prompt", LORA | {"form": "prompt"}, 10),
    Method("lora+llrd", LORA | {"llrd": 0.8}, 10, family=LABELS),
    Method("prefix", {"method": "prefix"}, 10),
    Method("prefix+unlikelihood", {"method": "prefix"} | UNLIKELIHOOD, 10, family=TEXTS),
    Method("soft-prompt", {"method": "soft-prompt"}, 100),
)
CONTRASTIVE = {"decode": "contrastive", "contrastive-k": 4, "contrastive-alpha": 0.6}
GROWTH, MEAN = {"contrastive-growth": True}, {"contrastive-similarity": "mean"}
BEAMS = {"decode": "beam", "beams": 5, "length-penalty": 0.6, "no-repeat-ngram": 3}
DECODINGS = (  # `sample` uses the task's own settings
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


# --- all cells


@dataclass
class Bench:
    """All cells of a comparison, their places and their order."""

    folder: Path
    program: Sequence[str]  # the command of the task, without options
    best: tuple[str, str]  # the metric that ranks, and max or min
    rate: float  # peak learning rate of full fine-tuning
    common: Mapping[str, Any]  # options that every run gets
    scratch: Mapping[str, Any]  # options that give a model from scratch the base's shape
    predict: str | None  # the rows that decodings answer; None: no decodings
    store: Store
    answers: str = ".txt"  # suffix of the file of answers
    methods: Sequence[Method] = METHODS
    decodings: Sequence[Decoding] = DECODINGS
    only: Sequence[str] | None = None
    seeds: Sequence[int] = (11711,)
    # settings to try with the first seed: multiple of a method's rate, and epochs
    search: Sequence[tuple[float, int]] = ()
    keep: int = 5  # number of methods that run with every seed

    def options_of(self, method: Method, seed: int) -> dict[str, Any]:
        """The task's options for a method and a seed."""
        lr = {} if method.rate is None else {"lr": float(f"{method.rate * self.rate:.3g}")}
        options = dict(self.common) | lr | {"seed": seed} | dict(method.options)
        return {**options, **(self.scratch if options["init"] == "scratch" else {})}

    def run_of(self, method: Method, seed: int) -> Cell:
        """The cell that trains a method with a seed."""
        options = self.options_of(method, seed)
        path = place(self.folder / "runs", method.name, seed, options)
        searched = self.search and method.rate is not None
        setting = f", rate {options['lr']:g}, {epochs_text(options['epochs'])}" if searched else ""
        return self._cell(method.name + setting, method.name, seed, options, path, {"out": path})

    def decoding_of(self, decoding: Decoding, seed: int) -> Cell:
        """The cell that decodes with the weights of the decoding's method and that seed."""
        method = self.chosen(self.method_of(decoding))
        options = self.options_of(method, seed) | {"predict": self.predict, **decoding.options}
        path = place(self.folder / "decodings", decoding.name, seed, options)
        path = path.with_suffix(self.answers)
        where = {"out": self.run_of(method, seed).path, "answers": path}
        return self._cell(decoding.name, decoding.name, seed, options, path, where)

    def _cell(
        self,
        label: str,
        name: str,
        seed: int,
        options: Mapping[str, Any],
        path: Path,
        where: Mapping[str, Path],
    ) -> Cell:
        words = list(self.program)
        for option, value in {**options, **where}.items():
            words += [f"--{option}"] if value is True else [f"--{option}", *str(value).split("\0")]
        return Cell(name, seed, path, tuple(words), f"{label} ({seed})", work=options["epochs"])

    def wanted(self, name: str) -> bool:
        """Whether --only allows this name."""
        return self.only is None or name in self.only

    def method_of(self, decoding: Decoding) -> Method:
        """The method whose weights a decoding uses."""
        return next(method for method in self.methods if method.name == decoding.of)

    def trials(self, method: Method) -> list[Method]:
        """The method with each setting that the first seed tries. Without a search only the method
        itself."""
        if method.rate is None or not self.search:
            return [method]
        return [
            dataclasses.replace(
                method, rate=method.rate * rate, options={**method.options, "epochs": epochs}
            )
            for rate, epochs in self.search
        ]

    def chosen(self, method: Method) -> Method:
        """The best trial of a method so far. If trials are equal, the first."""
        return max(
            self.trials(method), key=lambda trial: self.merit(self.run_of(trial, self.seeds[0]))
        )

    def score(self, cell: Cell) -> float | None:
        """The value of the ranking metric for a finished cell, else None."""
        figures = cell.figures()
        return figures["metrics"].get(self.best[0]) if figures else None

    def merit(self, cell: Cell) -> float:
        """The score with its sign changed if less is better. Minus infinity if there is no
        score."""
        score = self.score(cell)
        return -math.inf if score is None else score if self.best[1] == "max" else -score

    def ranking(self) -> list[Method]:
        """The methods by their score with the first seed, best first, then the methods that are
        still to run. Methods without randomness are left out, because more seeds do not change
        them."""
        ranked, waiting = [], []
        for method in self.methods:
            if not self.wanted(method.name) or method.rate is None:
                continue
            cells = [self.run_of(trial, self.seeds[0]) for trial in self.trials(method)]
            merit = max(map(self.merit, cells))
            if merit > -math.inf:
                ranked.append((-merit, method))
            elif not all(map(self.store.settled, cells)):
                waiting.append(method)
        return [method for _, method in sorted(ranked, key=lambda pair: pair[0])] + waiting

    def cells(self) -> Iterator[Cell]:
        """All cells in order. Which cells come later depends on the results of the earlier ones."""
        first = [method for method in self.methods if self.wanted(method.name)]
        # The first trial of each method, then the second of each, so that all have had about as
        # many when time runs out.
        for of_all in itertools.zip_longest(*map(self.trials, first)):
            yield from (self.run_of(trial, self.seeds[0]) for trial in of_all if trial)
        for number, seed in enumerate(self.seeds):
            methods = self.ranking()[: self.keep] if number else first
            yield from (self.run_of(self.chosen(method), seed) for method in methods if number)
            for decoding in self.decodings if self.predict else ():
                method = self.method_of(decoding)
                run = self.run_of(self.chosen(method), seed)
                to_come = method in methods and not self.store.settled(run)
                if self.wanted(decoding.name) and (to_come or run.figures()):
                    yield self.decoding_of(decoding, seed)


# --- the figures of a finished run


def measured(path: Path) -> Figures:
    """The figures of a run's folder or of a file of answers. Deletes a run's checkpoints, because
    only its final/ is still needed."""
    if path.suffix:
        scores = json.loads(path.with_suffix(".scores.json").read_text(encoding="utf-8"))
        about = ("eval_precision", "clean")
        return {"metrics": {name: of for name, of in scores.items() if name not in about}}
    figures = figures_of(path)
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return figures


def figures_of(run: Path) -> Figures:
    """The figures of a finished run: the metrics at the step of final/, how much they vary, and the
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
        "between_epochs": spread_over_evals(
            [line for line in evals if 2 * line["step"] > results["steps"]]
        ),
        # confidence intervals over the validation rows, for tasks with labels
        "intervals": (read_json(run / "validation.report.json") or {}).get("intervals", {}),
        **(
            training_figures(results, config, log, evals)
            if config["steps"]
            else {"seconds_to_best": results["seconds"]}
        ),
        **{name: results.get(name) for name in COSTS},
        "warnings": [*warnings, *results.get("warnings", ())],
    }


def spread_over_evals(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The standard deviation of each metric over the evaluations, if there are at least two."""
    found = {}
    for name in [name for name in evals[0] if name not in NO_METRICS] if len(evals) > 1 else ():
        values = [line[name] for line in evals if line.get(name) is not None]
        if len(values) == len(evals):
            found[name] = statistics.stdev(values)
    return found


def training_figures(
    results: Mapping[str, Any],
    config: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """When a run of steps was best, and how long that took."""
    epoch = config["steps"] / config["epochs"]  # planned steps, because a run may end early
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
    }


# --- predictions of labels


@functools.cache
def compared(run: Path, other: Path) -> dict[str, Any] | None:
    """`confusion.paired_test` of two runs on the same validation rows. None if a run has no
    predictions or other rows."""
    from tasks.classification.confusion import paired_test

    one, two = labels_of(run), labels_of(other)
    if one is None or two is None or one[0] != two[0]:
        return None
    return paired_test(one[0], one[1], two[1], seed=0)


@functools.cache
def labels_of(run: Path) -> tuple[list[int], list[int]] | None:
    """The true and the predicted labels of a run's validation rows, as indices."""
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
    """Whether a cell of a file names this label. As numbers, 1.0 and 1 are the same label."""
    try:
        return float(label) == float(cell)
    except ValueError:
        return label == cell.strip()
