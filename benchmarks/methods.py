"""Ways of fine-tuning and of decoding, side by side:

python -m benchmarks.methods --task sonnets --init FOLDER --data FILE --val-data FILE --out FOLDER --budget-minutes N
python -m benchmarks.methods --task paraphrase --init FOLDER --data FILE --val-data FILE --search

A cell of the tables is a run of `python -m finetune.TASK` in a process of its own, so that a
failure loses one cell. One seed for all methods comes first, then all decodings of what that seed
trained, then more seeds for the methods that did best. The trade-off: rates are set by rule (--lr
times a factor a method); --search tries others too, as many for each method.
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
from base.console import outlive, time_text
from benchmarks.machine import facts, in_own_process
from benchmarks.methods_cells import DECODINGS, METHODS, Bench, Decoding, Method, compared, measured
from benchmarks.methods_chart import draw
from benchmarks.methods_report import rows_of, text_of
from benchmarks.runs import REPO, at_least, make_folders, now, say, write_report
from benchmarks.store import Figures, Store
from config import (
    Count,
    CountOrNone,
    Few,
    Positive,
    Rate,
    Seed,
    UserError,
    Where,
    Wheres,
    known_names,
)

GIVEN = ("augment", "also", "also-data", "words")  # options that go to some methods alone
SET_HERE = ("init", "data", "val-data", "epochs", "batch-size", "lr", "device", "seed", "out")
WRITING = 6.0  # seconds kept for tables and chart
# parameters below which a base takes so many times the rate of GPT-2
SMALL, SMALL_RATE = (50_000_000, 3)
RATES = (1.0, 0.3, 3.0)  # of a search
GRACE = 60.0  # seconds that a run has to save its last step in, once it is told to end


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    task: str = "sonnets"
    """A module of finetune/."""
    init: Where = "gpt2"
    """The base: a hub id, or a folder as in the task's own --init."""
    data: Wheres | None = None
    """Rows to train on, as in the task. Default: the task's toy rows."""
    val_data: Wheres | None = None
    """Rows to choose and score by, as in the task; decodings answer these."""
    out: Where | None = None
    """Folder for methods.json, methods.md, methods.png and the runs. Default: runs/methods-TASK."""
    budget_minutes: Positive | None = None
    """Time for all of it; what it leaves out, the same command adds. Default: no limit."""
    seeds: tuple[Seed, ...] = (11711, 11712, 11713)
    """The first for all methods, the others for the best."""
    best: Few = 5
    """Methods that are run with every seed."""
    only: str = ""
    """Methods and decodings to run, by name, comma-separated."""
    epochs: CountOrNone | None = None
    """Passes over the rows. Default: the task's."""
    batch_size: Count | None = None
    """Rows in a step. Default: the task's."""
    lr: Rate | None = None
    """Peak rate of full fine-tuning, of which each method has its multiple. Default: the task's,
    thrice for small bases."""
    search: bool = False
    """Try each method with the first seed at several rates and lengths; the tables hold the best of
    each."""
    search_rates: tuple[Positive, ...] = RATES
    """Rates to try, in multiples of a method's own."""
    search_epochs: tuple[CountOrNone, ...] = ()
    """Lengths to try, in passes over the rows. Default: that of --epochs alone."""
    augment: Wheres | None = None
    """More training rows for the method full+augment, of tasks with labels."""
    also: tuple[str, ...] = ()
    """Other tasks, each TASK:WEIGHT, for the method full+also, of tasks with labels."""
    also_data: tuple[Wheres, ...] = ()
    """Their training rows. Default: their toy rows."""
    words: tuple[str, ...] = ()
    """The labels' words, for methods whose language model answers with them. Default: the
    task's."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    extra: str = ""
    """More options for every run, in one word: --extra="--precision fp32 --eval-rows 4"."""


# --- what is asked of a process that has torch


def look(task: str, init: str, device: str) -> dict[str, Any]:
    """Of task, base and machine. Raises UserError for a base that there is not."""
    return {"of_task": task_facts(task), "base": base_facts(init), "machine": facts(device)}


def task_facts(name: str) -> dict[str, Any]:
    """Of the task in finetune/NAME.py: its family, its metric, its options' defaults, and its file
    of answers if these are texts that have scores."""
    from tasks.classification.description import ClassificationDescription
    from tasks.generation.description import GenerationDescription, no_scores

    task = importlib.import_module(f"finetune.{name}").TASK
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
    """Where a base's weights lie, its shape, and what the run that made it says of it."""
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
    """Make what the folder lacks, and `write()` what there is after each cell."""
    for cell, how in bench.store.make(bench.cells()):
        write()
        score = bench.score(cell)
        found = "" if score is None else f"{bench.best[0]} {score:.4g}, "
        left = time_text(bench.store.rest(bench.cells()))
        say(f"{cell.label:<32} {found}{how}; about {left} left")


# --- the command


def fits(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a task has all these options."""
    return all(name.replace("-", "_") in defaults for name in options)


def methods_of(options: Options, task: Mapping[str, Any]) -> list[Method]:
    """Those that fit the task and what the user gives. Raises UserError for what no method
    takes."""
    given = {name: getattr(options, name.replace("-", "_")) for name in GIVEN}
    given = {
        name: "\0".join((value,) if isinstance(value, str) else value)
        for name, value in given.items()
        if value
    }
    for name in given:
        if name.replace("-", "_") not in task["defaults"]:
            raise UserError(
                f"--{name} is for tasks with labels, and {options.task} is none; leave it out"
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
    """Of --only, else of all that the task is run with. Raises UserError for a name that is
    none."""
    known = [*(method.name for method in methods), *(decoding.name for decoding in decodings)]
    names = known_names("--only", options.only, known)
    other = {method.name for method in methods if method.tasks and options.task not in method.tasks}
    return names or [name for name in known if name not in other]


def make_bench(
    options: Options, task: Mapping[str, Any], base: Mapping[str, Any], until: float
) -> Bench:
    """What is to be run of a task from a base. Raises UserError for a name in --only that is
    none."""
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
    """A task's rate, which is meant for GPT-2's sizes; a small base takes more, as in
    pretraining."""
    return (lr or 5e-5) * (SMALL_RATE if parameters < SMALL else 1)


def extra_options(text: str) -> dict[str, Any]:
    """The options of --extra by name, several words of one joined by NUL."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(text):
        if word.startswith("--"):
            found[word[2:]] = []
        elif found:
            found[list(found)[-1]].append(word)
        else:
            raise UserError(
                f"--extra {text!r} begins with no option; write --extra='--name value ...'"
            )
    if own := found.keys() & {*SET_HERE, *GIVEN}:
        raise UserError(
            f"--extra names --{min(own)}, which this command sets; give it outside of --extra, if "
            "at all"
        )
    return {name: "\0".join(values) if values else True for name, values in found.items()}


def result_of(bench: Bench, about: Mapping[str, Any]) -> dict[str, Any]:
    """What methods.json holds."""
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
    """What a search tried, or would have, with the score of each."""
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
    """Write methods.json and methods.md from the cells that are done; returns the text of the
    second."""
    result = result_of(bench, about)
    text = text_of(result)
    write_report(bench.folder / "methods.json", result, text)
    return text


def check(options: Options) -> None:
    """Raise UserError for a task that there is not, or a number out of its range."""
    tasks = sorted(path.stem for path in (REPO / "finetune").glob("[!_]*.py"))
    known_names("--task", [options.task], tasks)
    at_least(options, budget_minutes=0.1, epochs=1)
    if not options.search and (options.search_rates != RATES or options.search_epochs):
        raise UserError(
            "--search-rates and --search-epochs belong to --search; add it, or leave them out"
        )
    if not options.search_rates or min(options.search_epochs, default=1) < 1:
        raise UserError(
            "--search-rates takes one or more numbers above 0, --search-epochs whole numbers from "
            "1 on"
        )
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds takes one or more numbers, each once")


def main() -> int:
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
    # the run under way ends with this one
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        compare(bench, lambda: report(bench, about))
    finally:  # an interrupted comparison leaves what it has
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
        say(f"left out: {labels}; the same command makes them")
    return 1 if bench.store.failed else 0


if __name__ == "__main__":
    entry_point(main)
