"""The options and the cells of benchmarks.methods: their commands, their order, and the figures of
a finished run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from base.files import read_json
from benchmarks.methods_report import epochs_text, merit
from benchmarks.store import Cell, Figures, Store, option_words, place
from config import (
    Count,
    PathOrName,
    PathsOrNames,
    Positive,
    Rate,
    Seed,
    SmallCount,
    UserError,
    known_names,
)
from engine.log import records

RATES = (1.0, 0.3, 3.0)  # rates of a search, in multiples of a method's own
# options that --extra may not give, because this command sets them
SET_HERE = ("init", "data", "val-data", "epochs", "batch-size", "lr", "device", "seed", "out")
# a run has no output that nobody reads
QUIET = {"sample-every": 0, "log-every": 0, "show-rows": 0, "keep": 1, "keep-best": 1}
# A base with fewer parameters than SMALL gets SMALL_RATE times GPT-2's learning rate.
SMALL, SMALL_RATE = (50_000_000, 3)
NO_METRICS = ("kind", "time", "step", "seconds")  # other keys of an evaluation's record
COSTS = ("seconds", "rows_per_second", "trained_parameters", "parameters", "memory_bytes")


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    task: str = "sonnets"
    """A module of finetune/."""
    init: PathOrName = "gpt2"
    """The base model: a hub id, or a folder as in the task's own --init."""
    data: PathsOrNames | None = None
    """Training rows, as in the task. Default: the task's toy rows."""
    val_data: PathsOrNames | None = None
    """Validation rows, which choose the epoch and give the scores. The decodings answer them."""
    out: PathOrName | None = None
    """Folder for methods.json, methods.md, methods.png and the runs. Default: runs/methods-TASK."""
    budget_minutes: Positive | None = None
    """Time for everything. Repeating the command adds what is left out. Default: no limit."""
    seeds: tuple[Seed, ...] = (11711, 11712, 11713)
    """Seeds. All methods use the first, the best methods use the others too."""
    best: SmallCount = 5
    """Number of methods that run with every seed."""
    only: str = ""
    """Methods and decodings to run, comma-separated. Default: all."""
    epochs: Count | None = None
    """Passes over the training rows. Default: the task's."""
    batch_size: Count | None = None
    """Rows in a batch. Default: the task's."""
    lr: Rate | None = None
    """Peak learning rate of full fine-tuning. Each method uses a multiple of it. Default: the
    task's, or three times that for a small base."""
    search: bool = False
    """Try each method with the first seed at several rates and epochs. The tables hold the best
    setting of each."""
    search_rates: tuple[Positive, ...] = RATES
    """Learning rates to try, in multiples of a method's own."""
    search_epochs: tuple[Count, ...] = ()
    """Numbers of epochs to try. Default: only --epochs."""
    augment: PathsOrNames | None = None
    """More training rows, for the method full+augment of tasks with labels."""
    also: tuple[str, ...] = ()
    """Other tasks, each as TASK:WEIGHT, for the method full+also of tasks with labels."""
    also_data: tuple[PathsOrNames, ...] = ()
    """Training rows of the tasks in --also. Default: their toy rows."""
    words: tuple[str, ...] = ()
    """The word for each label, for methods whose language model answers with a word. Default: the
    task's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The device to run on."""
    extra: str = ""
    """More options for every run, as one word: --extra="--precision fp32 --eval-rows 4"."""


@dataclass(frozen=True)
class Method:
    """A method of training: its options for `python -m finetune.TASK`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    # peak learning rate over that of full fine-tuning; None: no steps and no randomness
    rate: float | None = 1.0
    family: str = ""  # the family of tasks that has it; empty: every task that has its options
    tasks: tuple[str, ...] = ()  # only these run it unless --only names it; empty: all
    takes: tuple[str, ...] = ()  # options that it gets if the user gives them
    needs: str = ""  # one of them, without which the method does not run


@dataclass(frozen=True)
class Decoding:
    """A way to decode with the weights that the method `of` trained."""

    name: str
    options: Mapping[str, Any]
    of: str = "full"


@dataclass
class Bench:
    """All cells of a comparison, their places and their order."""

    options: Options
    task: Mapping[str, Any]  # see methods.task_facts
    base: Mapping[str, Any]  # see methods.base_facts
    store: Store
    methods: Sequence[Method]
    decodings: Sequence[Decoding]

    def show(self, figures: Figures) -> str:
        """The ranking metric, for progress."""
        metric = self.task["best"][0]
        return f"{metric} {figures['metrics'].get(metric)!s:.6}"

    @property
    def folder(self) -> Path:
        """The folder of the runs and the results."""
        return Path(self.options.out or f"runs/methods-{self.options.task}")

    @functools.cached_property
    def names(self) -> list[str]:
        """The names in --only, or else all methods and decodings of the task. Raises UserError for
        an unknown name."""
        each = [*self.methods, *self.decodings]
        names = known_names("--only", self.options.only, [one.name for one in each])
        other = [m.name for m in self.methods if m.tasks and self.options.task not in m.tasks]
        return names or [one.name for one in each if one.name not in other]

    @functools.cached_property
    def common(self) -> dict[str, Any]:
        """Options that every run gets."""
        options, more = self.options, extra_options(self.options.extra)
        given = {
            "init": options.init,
            "data": options.data,
            "val-data": options.val_data,
            "batch-size": options.batch_size,
            "epochs": options.epochs or self.task["defaults"]["epochs"],
            "device": options.device,
        }
        return {name: value for name, value in given.items() if value is not None} | QUIET | more

    @functools.cached_property
    def search(self) -> list[tuple[float, int]]:
        """Settings to try with the first seed: multiples of a method's rate, and epochs."""
        options = self.options
        if not options.search:
            return []
        every = options.search_epochs or (self.common["epochs"],)
        return [(rate, epochs) for epochs in every for rate in options.search_rates]

    @property
    def predict(self) -> str | None:
        """The rows that decodings answer. None if there are no decodings."""
        rows = self.options.val_data or (None if self.options.data else "toy")
        return rows if self.task["answers"] else None

    def options_of(self, method: Method, seed: int) -> dict[str, Any]:
        """The task's options for a method and a seed."""
        base, options = self.base, {**self.common}
        if method.rate is not None:
            full = self.options.lr or usual_rate(self.task["defaults"]["lr"], base["parameters"])
            options["lr"] = float(f"{method.rate * full:.3g}")
        options |= {"seed": seed, **method.options}
        if options["init"] == "scratch":  # with the base's shape
            shape = {f"n-{key}": base[f"n_{key}"] for key in ("layer", "head", "embd")}
            options |= {"tokenizer": base["init"], "seq-len": base["block_size"]} | shape
        return options

    def run_of(self, method: Method, seed: int) -> Cell:
        """The cell that trains a method with a seed."""
        options, label = self.options_of(method, seed), method.name
        if self.search and method.rate is not None:
            label += f", rate {options['lr']:g}, {epochs_text(options['epochs'])}"
        path = place(self.folder / "runs", method.name, seed, options)
        return self._cell(method.name, label, path, options, {"out": path})

    def decoding_of(self, decoding: Decoding, seed: int) -> Cell:
        """The cell that decodes with the weights of the decoding's method and that seed."""
        name, method = decoding.name, self.chosen(self.method_of(decoding))
        options = self.options_of(method, seed) | {"predict": self.predict, **decoding.options}
        path = place(self.folder / "decodings", name, seed, options)
        path = path.with_suffix(Path(self.task["answers"]).suffix)
        where = {"out": self.run_of(method, seed).path, "answers": path}
        return self._cell(name, name, path, options, where)

    def _cell(
        self, name: str, label: str, path: Path, options: dict[str, Any], where: dict[str, Path]
    ) -> Cell:
        program = (sys.executable, "-m", f"finetune.{self.options.task}")
        words = (*program, *option_words(options | where))
        seed = options["seed"]
        return Cell(name, seed, path, words, f"{label} ({seed})", work=options["epochs"])

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
        return max(self.trials(method), key=self.merit)

    def score(self, method: Method) -> float | None:
        """The value of the ranking metric with the first seed, or None."""
        figures = self.run_of(method, self.options.seeds[0]).figures()
        return figures["metrics"].get(self.task["best"][0]) if figures else None

    def merit(self, method: Method) -> float:
        """The score, of which more is better. See `methods_report.merit`."""
        return merit(self.score(method), self.task["best"][1])

    def ranking(self) -> list[Method]:
        """The methods that may run with more seeds, by their score with the first, best first.
        Methods without randomness are left out, because more seeds do not change them."""
        first = self.options.seeds[0]
        methods = [
            method
            for method in self.methods
            if method.name in self.names
            and method.rate is not None
            and self.run_of(self.chosen(method), first) not in self.store.failed
        ]
        return sorted(methods, key=lambda method: -self.merit(self.chosen(method)))

    def cells(self) -> Iterator[Cell]:
        """All cells in order. Which cells come later depends on the results of the earlier ones."""
        first, *more = self.options.seeds
        methods = [method for method in self.methods if method.name in self.names]
        # The first trial of each method, then the second of each, so that all have had about as
        # many when time runs out.
        for of_all in itertools.zip_longest(*map(self.trials, methods)):
            yield from (self.run_of(trial, first) for trial in of_all if trial)
        yield from self.decodings_of(methods, first)
        for seed in more:
            methods = self.ranking()[: self.options.best]
            yield from (self.run_of(self.chosen(method), seed) for method in methods)
            yield from self.decodings_of(methods, seed)

    def decodings_of(self, methods: Sequence[Method], seed: int) -> Iterator[Cell]:
        """The decodings with a seed whose weights exist, or will exist because `methods` train
        them."""
        for decoding in self.decodings if self.predict else ():
            method = self.method_of(decoding)
            run = self.run_of(self.chosen(method), seed)
            to_come = method in methods and not self.store.settled(run)
            if decoding.name in self.names and (to_come or run.figures()):
                yield self.decoding_of(decoding, seed)


def usual_rate(lr: float | None, parameters: int) -> float:
    """A task's learning rate, which is meant for GPT-2's sizes. A small base gets a higher one, as
    in pretraining."""
    return (lr or 5e-5) * (SMALL_RATE if parameters < SMALL else 1)


def extra_options(text: str) -> dict[str, Any]:
    """The options in --extra by name. Several words of one option are joined by NUL."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            found[word[2:]] = []
        elif found:
            found[list(found)[-1]].append(word)
        else:
            raise UserError(
                f"--extra {text!r} does not begin with an option; write --extra='--name value ...'"
            )
    if own := found.keys() & SET_HERE:
        raise UserError(
            f"--extra names --{min(own)}, which this command sets; type it outside of --extra, if "
            "this command has it"
        )
    return {name: "\0".join(values) if values else True for name, values in found.items()}


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
    log, best = records(run), results["final_is_step"]
    evals = [line for line in log if line["kind"] == "eval"]
    metrics = {line["step"]: metrics_of(line) for line in evals}
    figures = {
        "metrics": metrics.get(best, {}),
        "between_epochs": deviations(
            [of for step, of in metrics.items() if 2 * step > results["steps"]]
        ),
        # confidence intervals over the validation rows, for tasks with labels
        "intervals": (read_json(run / "validation.report.json") or {}).get("intervals", {}),
        "seconds_to_best": results["seconds"],
        **{name: results.get(name) for name in COSTS},
    }
    if not config["steps"]:  # a model that takes no steps
        return figures
    epoch = config["steps"] / config["epochs"]  # planned steps, because a run may end early
    losses = [(of["val_loss"], step) for step, of in metrics.items() if of.get("val_loss")]
    if losses:
        loss, step = min(losses)
        figures |= {"lowest_val_loss": loss, "lowest_epoch": step / epoch}
    steps = [line for line in log if line["kind"] == "train" and line["step"] <= best]
    return figures | {
        "best_epoch": best / epoch,
        "epochs": results["steps"] / epoch,
        "lr": config["lr"],
        "seconds_to_best": sum(line["step_ms"] for line in steps) / 1e3,
    }


def metrics_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics in an evaluation's record."""
    return {name: value for name, value in line.items() if name not in NO_METRICS}


def deviations(evals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The standard deviation of each metric over the evaluations, if there are at least two."""
    if len(evals) < 2:
        return {}
    columns: dict[str, list[Any]] = {name: [of.get(name) for of in evals] for name in evals[0]}
    return {name: statistics.stdev(of) for name, of in columns.items() if None not in of}


@functools.cache
def compared(run: Path, other: Path) -> dict[str, Any] | None:
    """`confusion.paired_test` of two runs on the same validation rows. None if a run has no
    predictions, or none of these rows."""
    from tasks.classification.confusion import paired_test
    from tools.predictions import read_predictions

    files = [run / "validation.jsonl", other / "validation.jsonl"]
    if not all(file.exists() for file in files):
        return None
    try:
        one, two = read_predictions(list(map(str, files)))
    except UserError:
        return None
    known = one.known & two.known
    return paired_test(one.true[known], one.predicted[known], two.predicted[known], seed=0)
