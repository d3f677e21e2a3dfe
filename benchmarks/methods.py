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
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base.cli import entry_point, parse
from base.commands import REPO
from base.console import outlive
from base.files import read_json
from benchmarks.machine import facts, in_own_process
from benchmarks.methods_cells import RATES, Bench, Decoding, Method, Options, compared, measured
from benchmarks.methods_report import draw, rows_of, text_of
from benchmarks.runs import make_folders, now
from benchmarks.store import Figures, Store, deadline
from config import UserError, known_names

GIVEN = ("augment", "also", "also-data", "words")  # options that only some methods get
GRACE = 60.0  # seconds that a run gets to save its last step when it must end


# --- what is compared

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
    Method("full+word", {"form": "word"}, takes=("words",)),
    Method("full+mean", {"pooling": "mean"}),
    Method("full+attention", {"pooling": "attention"}),
    Method("full+unlikelihood", UNLIKELIHOOD, family=TEXTS),
    Method("full+rdrop", {"objective": "rdrop"}, family=LABELS),
    Method("full+simcse", {"objective": "simcse"}, family=LABELS),
    Method("full+augment", takes=("augment",), needs="augment"),
    Method("full+also", takes=("also", "also-data"), needs="also"),
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


def make_bench(
    options: Options, task: Mapping[str, Any], base: Mapping[str, Any], until: float
) -> Bench:
    """The comparison of a task from a base. Raises UserError for an unknown name in --only, and for
    an option that no method takes."""

    def has(names: Mapping[str, Any]) -> bool:
        return all(name.replace("-", "_") in task["defaults"] for name in names)

    given = {}
    for name in GIVEN:
        if value := getattr(options, name.replace("-", "_")):
            given[name] = "\0".join((value,) if isinstance(value, str) else value)
        if value and not has({name: value}):
            raise UserError(
                f"--{name} is for tasks with labels, and {options.task} has none; leave it out"
            )
    methods = []
    for method in METHODS:
        mine = {name: given[name] for name in method.takes if name in given}
        fits = method.family in ("", task["family"]) and has(method.options)
        if fits and method.needs in ("", *mine):
            methods.append(dataclasses.replace(method, options={**method.options, **mine}))
    decodings = [decoding for decoding in DECODINGS if has(decoding.options)]
    bench = Bench(options, task, base, Store(measured, until, GRACE), methods, decodings)
    assert bench.names and bench.common  # both raise UserError for a bad option
    return bench


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

    folder = Path(locate(init)).resolve()
    model = GPT.from_pretrained(folder)
    base: dict[str, Any] = {"init": init, "parameters": model.n_params()}
    base |= dataclasses.asdict(model.config)
    if (card := folder / "README.md").is_file():
        lines = re.findall(r"^- (\w+): (.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
        base["card"] = dict(lines)
    if results := read_json(folder.parent / "metrics.json") if folder.name == "final" else None:
        base["results"] = results
    return base


# --- the results


def result_of(bench: Bench, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of methods.json."""
    first, best = bench.options.seeds[0], bench.task["best"]
    found: dict[str, dict[int, Figures]] = defaultdict(dict)
    for seed in bench.options.seeds:
        cells = [bench.run_of(bench.chosen(method), seed) for method in bench.methods]
        if bench.predict:
            cells += [bench.decoding_of(decoding, seed) for decoding in bench.decodings]
        for cell in cells:
            if figures := cell.figures():
                found[cell.name][seed] = figures
    methods, decodings = (
        rows_of([each.name for each in of_kind], found, best)
        for of_kind in (bench.methods, bench.decodings)
    )
    runs = {method.name: bench.run_of(bench.chosen(method), first) for method in bench.methods}
    for row in methods:
        both = row["name"] != "full" and "full" in found
        row["against_full"] = compared(runs[row["name"]].path, runs["full"].path) if both else None
    return dict(about) | {
        "date": now(),
        "best": list(best),
        "methods": methods,
        "decodings": decodings,
        "trials": trials_of(bench),
        "failed": {cell.label: reason for cell, reason in bench.store.failed.items()},
        "left_out": [cell.label for cell in bench.store.left_out],
    }


def trials_of(bench: Bench) -> list[dict[str, Any]]:
    """The settings of a search, each with its score, which is None if it has not run."""
    return [
        {
            "name": method.name,
            "rate": rate,
            "epochs": epochs,
            "score": bench.score(trial),
            "chosen": trial == bench.chosen(method),
        }
        for method in bench.methods
        if method.rate is not None and method.name in bench.names
        for (rate, epochs), trial in zip(bench.search, bench.trials(method))
    ]


# --- the command


def check(options: Options) -> None:
    """Raise UserError for an unknown task or a number out of its range."""
    tasks = sorted(path.stem for path in (REPO / "finetune").glob("[!_]*.py"))
    known_names("--task", [options.task], tasks)
    if not options.search and (options.search_rates != RATES or options.search_epochs):
        raise UserError(
            "--search-rates and --search-epochs belong to --search; add it, or leave them out"
        )
    if not options.seeds or len({*options.seeds}) < len(options.seeds):
        raise UserError("--seeds takes one or more numbers, each once")


def main() -> int:
    """Run the cells within the time, write tables and chart, and return 1 if a cell failed."""
    options = parse(Options, sys.argv[1:])
    outlive()
    check(options)
    until = deadline(time.monotonic(), options.budget_minutes)
    seen = in_own_process(look, options.task, options.init, options.device)
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
    return bench.store.complete(
        bench.folder / "methods",
        bench.cells,
        bench.show,
        lambda: result_of(bench, about),
        text_of,
        draw,
    )


if __name__ == "__main__":
    entry_point(main)
