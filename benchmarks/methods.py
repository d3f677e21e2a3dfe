"""Compare methods of fine-tuning and of decoding:

python -m benchmarks.methods --task sonnets --init FOLDER --data FILE --val-data FILE --out FOLDER
python -m benchmarks.methods --task paraphrase --init FOLDER --data FILE --val-data FILE --search

A cell of the tables is a run of `python -m finetune.TASK` in its own process, so a failure loses
only one cell. All methods first run with one seed. Then all decodings use what that seed trained.
Then the best methods run with more seeds. The trade-off: learning rates follow a rule (--lr times a
factor per method). --search tries other rates too, the same number for each method.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.cli import entry_point, parse
from base.commands import REPO
from base.console import outlive, time_text
from benchmarks.machine import facts, in_own_process
from benchmarks.methods_cells import DECODINGS, METHODS, Bench, Decoding, Method, compared, measured
from benchmarks.methods_chart import draw
from benchmarks.methods_report import rows_of, text_of
from benchmarks.runs import at_least, make_folders, now, say, write_report
from benchmarks.store import Figures, Store
from config import (
    Count,
    CountOrNone,
    PathOrName,
    PathsOrNames,
    Positive,
    Rate,
    Seed,
    SmallCount,
    UserError,
    known_names,
)

GIVEN = ("augment", "also", "also-data", "words")  # options that only some methods get
SET_HERE = ("init", "data", "val-data", "epochs", "batch-size", "lr", "device", "seed", "out")
WRITING = 6.0  # seconds kept for tables and chart
# A base with fewer parameters than SMALL gets SMALL_RATE times GPT-2's learning rate.
SMALL, SMALL_RATE = (50_000_000, 3)
RATES = (1.0, 0.3, 3.0)  # rates of a search, in multiples of a method's own
GRACE = 60.0  # seconds that a run gets to save its last step when it must end


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
    epochs: CountOrNone | None = None
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
    search_epochs: tuple[CountOrNone, ...] = ()
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


# --- facts, from a process that loads torch


def look(task: str, init: str, device: str) -> dict[str, Any]:
    """Facts of the task, the base and the machine. Raises UserError for a base that does not
    exist."""
    return {"of_task": task_facts(task), "base": base_facts(init), "machine": facts(device)}


def task_facts(name: str) -> dict[str, Any]:
    """The family, the metric, the default options and the file of answers of the task in
    finetune/NAME.py. The file is None unless the answers are texts with scores."""
    from tasks.classification.description import ClassificationDescription
    from tasks.generation.description import GenerationDescription, no_scores
    from tasks.preferences.description import PreferenceDescription

    task = importlib.import_module(f"finetune.{name}").TASK
    if isinstance(task, PreferenceDescription):
        raise UserError(
            f"--task {name}: the methods are compared on tasks with labels or texts; name one of "
            "these, such as sentiment or sonnets"
        )
    defaults = {
        f.name: f.default
        for f in dataclasses.fields(task.config)
        if f.default is not dataclasses.MISSING
    }
    scored = isinstance(task, GenerationDescription) and task.scores is not no_scores
    return {
        "family": "classification" if isinstance(task, ClassificationDescription) else "generation",
        "best": list(task.best),
        "defaults": defaults | task.defaults,
        "answers": f"predictions{task.answer_kinds[0]}" if scored else None,
    }


def base_facts(init: str) -> dict[str, Any]:
    """The folder of a base's weights, its shape, and what the run that made it recorded."""
    from model import GPT
    from storage.checkpoint import locate

    folder = Path(locate(init))
    model = GPT.from_pretrained(folder)
    shape = {
        name: getattr(model.config, name)
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    }
    base = (
        {"init": init, "folder": str(folder.resolve())} | shape | {"parameters": model.n_params()}
    )
    card, results = folder / "README.md", folder.resolve().parent / "metrics.json"
    if card.is_file():
        base["card"] = dict(
            re.findall(r"^- (\w+): (.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
        )
    if folder.name == "final" and results.is_file():
        base["results"] = json.loads(results.read_text(encoding="utf-8"))
    return base


# --- running


def compare(bench: Bench, write: Callable[[], object]) -> None:
    """Run the cells that the folder lacks, and call `write()` after each."""
    for cell, how in bench.store.make(bench.cells()):
        write()
        score = bench.score(cell)
        found = "" if score is None else f"{bench.best[0]} {score:.4g}, "
        left = time_text(bench.store.rest(bench.cells()))
        say(f"{cell.label:<32} {found}{how}; about {left} left")


# --- the command


def fits(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a task has all of these options."""
    return all(name.replace("-", "_") in defaults for name in options)


def methods_of(options: Options, task: Mapping[str, Any]) -> list[Method]:
    """The methods that fit the task and the user's options. Raises UserError for an option that no
    method takes."""
    given = {name: getattr(options, name.replace("-", "_")) for name in GIVEN}
    given = {
        name: "\0".join((value,) if isinstance(value, str) else value)
        for name, value in given.items()
        if value
    }
    for name in given:
        if name.replace("-", "_") not in task["defaults"]:
            raise UserError(
                f"--{name} is for tasks with labels, and {options.task} has none; leave it out"
            )
    found = []
    for method in METHODS:
        if method.family in ("", task["family"]) and fits(method.options, task["defaults"]):
            named = {name: given[name] for name in method.needs if name in given}
            named |= (
                {"words": given["words"]}
                if method.options.get("form") == "word" and "words" in given
                else {}
            )
            if set(method.needs[:1]) <= named.keys():
                found.append(dataclasses.replace(method, options={**method.options, **named}))
    return found


def names_to_run(
    options: Options, methods: Sequence[Method], decodings: Sequence[Decoding]
) -> list[str]:
    """The names in --only, or else all methods and decodings of the task. Raises UserError for an
    unknown name."""
    known = [*(method.name for method in methods), *(decoding.name for decoding in decodings)]
    names = known_names("--only", options.only, known)
    other = {method.name for method in methods if method.tasks and options.task not in method.tasks}
    return names or [name for name in known if name not in other]


def make_bench(
    options: Options, task: Mapping[str, Any], base: Mapping[str, Any], until: float
) -> Bench:
    """The comparison of a task from a base. Raises UserError for an unknown name in --only."""
    defaults, more = task["defaults"], extra_options(options.extra)
    given = {"data": options.data, "val-data": options.val_data, "batch-size": options.batch_size}
    common = {"init": options.init} | {
        name: value for name, value in given.items() if value is not None
    }
    epochs = options.epochs or defaults["epochs"]
    common |= {"epochs": epochs, "device": options.device}
    common |= {"sample-every": 0, "log-every": 0, "show-rows": 0, "keep": 1, "keep-best": 1} | more
    shape = {
        name: base[key]
        for name, key in (("n-layer", "n_layer"), ("n-head", "n_head"), ("n-embd", "n_embd"))
    }
    methods = methods_of(options, task)
    decodings = [decoding for decoding in DECODINGS if fits(decoding.options, defaults)]
    predict = options.val_data or (None if options.data else "toy")
    search = [
        (rate, n) for n in options.search_epochs or (epochs,) for rate in options.search_rates
    ]
    return Bench(
        Path(options.out or f"runs/methods-{options.task}"),
        (sys.executable, "-m", f"finetune.{options.task}"),
        tuple(task["best"]),
        options.lr or usual_rate(defaults["lr"], base["parameters"]),
        common,
        {"tokenizer": options.init, "seq-len": base["block_size"]} | shape,
        predict if task["answers"] else None,
        Store(measured, until, GRACE),
        Path(task["answers"] or "").suffix,
        methods,
        decodings,
        names_to_run(options, methods, decodings),
        options.seeds,
        search if options.search else (),
        options.best,
    )


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
    if own := found.keys() & {*SET_HERE, *GIVEN}:
        raise UserError(
            f"--extra names --{min(own)}, which this command sets; type it outside of --extra, if "
            "this command has it"
        )
    return {name: "\0".join(values) if values else True for name, values in found.items()}


def result_of(bench: Bench, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of methods.json."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for seed in bench.seeds:
        cells = [bench.run_of(bench.chosen(method), seed) for method in bench.methods]
        decodings = bench.decodings if bench.predict else ()
        cells += [bench.decoding_of(decoding, seed) for decoding in decodings]
        for cell in cells:
            if figures := cell.figures():
                found[cell.name].append(figures | {"seed": seed})
    methods, decodings = (
        rows_of([each.name for each in of_kind], found, bench.best)
        for of_kind in (bench.methods, bench.decodings)
    )
    runs = {
        method.name: bench.run_of(bench.chosen(method), bench.seeds[0]) for method in bench.methods
    }
    full = runs.get("full")
    for row in methods:
        run = runs[row["name"]]
        both = full and run != full and run.figures() and full.figures()
        row["against_full"] = compared(run.path, full.path) if full and both else None
    return dict(about) | {
        "date": now(),
        "best": list(bench.best),
        "seeds": list(bench.seeds),
        "methods": methods,
        "decodings": decodings,
        "trials": trials_of(bench),
        "failed": {cell.label: reason for cell, reason in bench.store.failed.items()},
        "left_out": [cell.label for cell in bench.store.left_out],
    }


def trials_of(bench: Bench) -> list[dict[str, Any]]:
    """The settings of a search, each with its score, which is None if it has not run."""
    found = []
    for method in bench.methods:
        if method.rate is None or not bench.wanted(method.name):
            continue
        chosen = bench.chosen(method)
        for (rate, epochs), trial in zip(bench.search, bench.trials(method)):
            row = {
                "name": method.name,
                "rate": rate,
                "lr": bench.options_of(trial, bench.seeds[0])["lr"],
                "epochs": epochs,
                "score": bench.score(bench.run_of(trial, bench.seeds[0])),
                "chosen": trial == chosen,
            }
            found.append(row)
    return found


def report(bench: Bench, about: Mapping[str, Any]) -> str:
    """Write methods.json and methods.md from the finished cells. Returns the text of methods.md."""
    result = result_of(bench, about)
    text = text_of(result)
    write_report(bench.folder / "methods.json", result, text)
    return text


def check(options: Options) -> None:
    """Raise UserError for an unknown task or a number out of its range."""
    tasks = sorted(path.stem for path in (REPO / "finetune").glob("[!_]*.py"))
    known_names("--task", [options.task], tasks)
    at_least(options, budget_minutes=0.1, epochs=1)
    if not options.search and (options.search_rates != RATES or options.search_epochs):
        raise UserError(
            "--search-rates and --search-epochs belong to --search; add it, or leave them out"
        )
    if not options.search_rates or min(options.search_epochs, default=1) < 1:
        raise UserError(
            "--search-rates takes one or more numbers above 0, --search-epochs whole numbers of at "
            "least 1"
        )
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds takes one or more numbers, each once")


def main() -> int:
    """Run the cells within the time, write tables and chart, and return 1 if a cell failed."""
    began = time.monotonic()
    options = parse(Options, sys.argv[1:])
    outlive()
    check(options)
    seen = in_own_process(look, options.task, options.init, options.device)
    until = began + 60 * (options.budget_minutes or math.inf) - WRITING
    bench = make_bench(options, seen["of_task"], seen["base"], until)
    about = {
        "task": options.task,
        "family": seen["of_task"]["family"],
        "base": seen["base"],
        "machine": seen["machine"],
        "data": [options.data or "its toy rows", options.val_data or "a part held out"],
        "command": shlex.join(["python", "-m", "benchmarks.methods", *sys.argv[1:]]),
    }
    make_folders(bench.folder, ("runs", "decodings"))
    # exit by SystemExit, so that the current run is ended too
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        compare(bench, lambda: report(bench, about))
    finally:  # an interrupted comparison reports what it has
        text = report(bench, about)
        draw(
            json.loads((bench.folder / "methods.json").read_text(encoding="utf-8")),
            bench.folder / "methods.png",
        )
    print(text)
    for cell, reason in bench.store.failed.items():
        say(f"{cell.label} failed: {reason}")
    if bench.store.left_out:
        labels = ", ".join(cell.label for cell in bench.store.left_out)
        say(f"left out: {labels}; repeat the command to run them")
    return 1 if bench.store.failed else 0


if __name__ == "__main__":
    entry_point(main)
