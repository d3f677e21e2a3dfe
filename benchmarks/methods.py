"""Ways of fine-tuning and of decoding, side by side:

python -m benchmarks.methods --task sonnets --init FOLDER --data FILE --val-data FILE --out FOLDER --budget-minutes N

A cell of the tables is a run of `python -m finetune.TASK` in a process of its own, so that a failure loses one cell.
One seed for all methods comes first, then all decodings of what that seed trained, then more seeds for the methods
that did best. The trade-off: rates are set by rule (--lr times a factor a method), not searched for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.machine import elsewhere, facts
from benchmarks.methods_cells import DECODINGS, METHODS, Bench, Cell, noted
from benchmarks.methods_chart import draw
from benchmarks.methods_report import rows_of, text_of
from benchmarks.plot import records
from benchmarks.stages_run import ENGINE, Failed, TimeUp, end, last_error, say, start
from cli import entry_point, parse
from config import UserError, nearest
from files import write_json
from runlog import time_text

if TYPE_CHECKING:
    from rich.table import Table

WRITING = 6.0  # seconds kept for tables and chart
SMALL, SMALL_RATE = 50_000_000, 3  # parameters below which a base takes so many times the rate of GPT-2
GRACE = 60.0  # seconds that a run has to save its last step in, once it is told to end


@dataclass
class Options:
    """Options of the comparison."""

    task: str = "sonnets"
    """A module of finetune/."""
    init: str = "gpt2"
    """The base: a hub id, or a folder as in the task's own --init."""
    data: str | None = None
    """Rows to train on, as in the task. Default: the task's toy rows."""
    val_data: str | None = None
    """Rows to choose and score by, as in the task; decodings answer these."""
    out: str | None = None
    """Folder for methods.json, methods.md, methods.png and the runs. Default: runs/methods-TASK."""
    budget_minutes: float | None = None
    """Time for all of it; what it leaves out, the same command adds. Default: no limit."""
    seeds: tuple[int, ...] = (11711, 11712, 11713)
    """The first for all methods, the others for the best."""
    best: int = 5
    """Methods that are run with every seed."""
    only: str = ""
    """Methods and decodings to run, by name, comma-separated."""
    epochs: int | None = None
    """Passes over the rows. Default: the task's."""
    batch_size: int | None = None
    """Rows in a step. Default: the task's."""
    lr: float | None = None
    """Peak rate of full fine-tuning, of which each method has its multiple. Default: the task's, thrice for small bases."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    extra: str = ""
    """More options for every run, in one word: --extra="--precision fp32 --eval-rows 4"."""


# --- what is asked of a process that has torch


def look(task: str, init: str, device: str) -> dict[str, Any]:
    """Of task, base and machine. Raises UserError for a base that there is not."""
    return {"of_task": task_facts(task), "base": base_facts(init), "machine": facts(device)}


def task_facts(name: str) -> dict[str, Any]:
    """Of the task in finetune/NAME.py: its metric, its options' defaults, and its file of answers if these have scores."""
    from generation import Generation
    from task import Task

    module = importlib.import_module(f"finetune.{name}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Task)]
    kind: Any = next(kind for kind in kinds if kind.__module__ == module.__name__)
    defaults = {f.name: f.default for f in dataclasses.fields(kind.config) if f.default is not dataclasses.MISSING}
    scored = issubclass(kind, Generation) and kind.scores is not Generation.scores
    return {"best": list(kind.best), "defaults": defaults | kind.defaults, "answers": scored and kind.predictions}


def base_facts(init: str) -> dict[str, Any]:
    """Where a base's weights lie, its shape, and what the run that made it says of it."""
    from checkpoint import locate
    from model import GPT

    folder = Path(locate(init))
    model = GPT.from_pretrained(folder)
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    base = {"init": init, "folder": str(folder.resolve())} | shape | {"parameters": model.n_params()}
    card, results = folder / "README.md", folder.resolve().parent / "metrics.json"
    if card.is_file():
        base["card"] = dict(re.findall(r"^- (\w+): (.*)$", card.read_text(encoding="utf-8"), re.MULTILINE))
    if folder.name == "final" and results.is_file():
        base["results"] = json.loads(results.read_text())
    return base


# --- running


def execute(words: Sequence[str], output: Path, until: float) -> None:
    """Run a command to its end. Raises Failed, or TimeUp at `until`; a run that trains has saved its last step then."""
    process = start(words, output)
    try:
        code = process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeUp from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(GRACE)
        end(process)
    if code:
        raise Failed(last_error(output.read_text(errors="replace"), code))


def attempt(bench: Bench, cell: Cell) -> str:
    """Make a cell that the folder lacks, if there is time for it; returns how it went, in words."""
    if cell.result.exists():
        bench.done.append(cell)
        return "found in the folder"
    if time.monotonic() + bench.usual(cell) > bench.until:
        bench.left_out[cell] = None
        return "left out"
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    words, began = [*bench.program, *cell.words], time.monotonic()
    bench.running = cell
    try:
        execute(words, noted(cell).with_suffix(".txt"), bench.until)
    except Failed as error:
        bench.failed[cell] = str(error)
        return f"failed: {error}"
    except TimeUp:
        bench.left_out[cell] = None
        return "cut off: the time is up"
    finally:
        bench.running = None
    seconds = time.monotonic() - began
    write_json(noted(cell), {"command": shlex.join(words), "wall_seconds": seconds})
    if cell.kind == "methods":
        shutil.rmtree(cell.path / "checkpoints", ignore_errors=True)  # final/ is all that is needed from here on
    bench.done.append(cell)
    return f"{seconds:.0f} s"


def compare(bench: Bench, write: Callable[[], object]) -> None:
    """Make what the folder lacks, and `write()` what there is after each cell."""
    with watched(bench):
        for cell in bench.cells():
            how = attempt(bench, cell)
            if cell in bench.left_out:
                continue
            write()
            say(f"{cell.label:<32} {score(bench, cell)}{how}; about {time_text(bench.rest())} left")


def score(bench: Bench, cell: Cell) -> str:
    """The metric that ranks, of a cell that is done."""
    value = (cell.figures() or {"metrics": {}})["metrics"].get(bench.best[0])
    return "" if value is None else f"{bench.best[0]} {value:.4g}, "


@contextlib.contextmanager
def watched(bench: Bench) -> Generator[None]:
    """A live table where someone watches; elsewhere the lines alone."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), get_renderable=lambda: board(bench), refresh_per_second=2, transient=True):
        yield


def board(bench: Bench) -> Table:
    """How far each cell is."""
    from rich.table import Table

    table = Table("cell", bench.best[0], "state", title=f"about {time_text(bench.rest())} left")
    states = {cell: "done" for cell in bench.done} | {cell: "failed" for cell in bench.failed}
    states |= dict.fromkeys(bench.left_out, "left out")
    for cell in list(bench.cells()):
        state = progress_of(cell.path) if cell == bench.running else states.get(cell, "")
        table.add_row(cell.label, score(bench, cell).rstrip(", ").rpartition(" ")[2], state)
    return table


def progress_of(run: Path) -> str:
    """Of a run that goes on: steps done and to do."""
    try:
        steps = json.loads((run / "config.json").read_text())["steps"]
        done = max(line["step"] for line in records(run) if line["kind"] == "train")
    except (OSError, ValueError, UserError):
        return "running"
    return f"step {done} of {steps}"


# --- the command


def fits(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a task has all these options."""
    return all(name.replace("-", "_") in defaults for name in options)


def make_bench(options: Options, task: Mapping[str, Any], base: Mapping[str, Any], until: float) -> Bench:
    """What is to be run of a task from a base. Raises UserError for a name in --only that is none."""
    defaults, more = task["defaults"], extra_options(options.extra)
    given = {"data": options.data, "val-data": options.val_data, "batch-size": options.batch_size}
    common = {"init": options.init} | {name: value for name, value in given.items() if value is not None}
    common |= {"epochs": options.epochs or defaults["epochs"], "device": options.device}
    common |= {"sample-every": 0, "log-every": 0, "show-rows": 0, "keep": 1, "keep-best": 1} | more
    shape = {name: base[key] for name, key in (("n-layer", "n_layer"), ("n-head", "n_head"), ("n-embd", "n_embd"))}
    methods = [method for method in METHODS if fits(method.options, defaults)]
    decodings = [decoding for decoding in DECODINGS if fits(decoding.options, defaults)]
    predict = options.val_data or (None if options.data else "toy")
    names = [name.strip() for name in options.only.split(",") if name.strip()]
    known = [*(method.name for method in methods), *(decoding.name for decoding in decodings)]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: no such method{nearest(name, known)}; there are {', '.join(known)}")
    return Bench(
        Path(options.out or f"runs/methods-{options.task}"), (sys.executable, "-m", f"finetune.{options.task}"),
        tuple(task["best"]), options.lr or usual_rate(defaults["lr"], base["parameters"]), common,
        {"tokenizer": options.init, "seq-len": base["block_size"]} | shape,
        predict if task["answers"] else None, Path(task["answers"] or "").suffix, methods, decodings, names or None,
        options.seeds, options.best, until,
    )  # fmt: skip


def usual_rate(lr: float | None, parameters: int) -> float:
    """A task's rate, which is meant for GPT-2's sizes; a small base takes more, as in pretraining."""
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
            raise UserError(f"--extra {text!r} begins with no option; write --extra='--name value ...'")
    return {name: "\0".join(values) if values else True for name, values in found.items()}


def result_of(bench: Bench, about: Mapping[str, Any]) -> dict[str, Any]:
    """What methods.json holds."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {"methods": {}, "decodings": {}}
    commands: dict[str, str] = {}
    for seed in bench.seeds:
        cells = [bench.run_of(method, seed) for method in bench.methods]
        cells += [bench.decoding_of(decoding, seed) for decoding in bench.decodings] if bench.predict else []
        for cell in cells:
            if figures := cell.figures():
                grouped[cell.kind].setdefault(cell.name, []).append(figures | {"seed": seed})
                commands.setdefault(cell.name, shlex.join([*bench.program, *cell.words]))
    order = {"methods": bench.methods, "decodings": bench.decodings}
    names = {kind: [each.name for each in of_kind] for kind, of_kind in order.items()}
    return dict(about) | {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "best": list(bench.best), "seeds": list(bench.seeds),
        "methods": rows_of(names["methods"], grouped["methods"], commands),
        "decodings": rows_of(names["decodings"], grouped["decodings"], commands),
        "failed": {cell.label: reason for cell, reason in bench.failed.items()},
        "left_out": [cell.label for cell in bench.left_out],
    }  # fmt: skip


def write_report(bench: Bench, about: Mapping[str, Any]) -> str:
    """Write methods.json and methods.md from the cells that are done; returns the text of the second."""
    result = result_of(bench, about)
    text = text_of(result)
    write_json(bench.folder / "methods.json", result)
    (bench.folder / "methods.md").write_text(text, encoding="utf-8")
    return text


def check(options: Options) -> None:
    """Raise UserError for a task that there is not, or a number out of its range."""
    tasks = sorted(path.stem for path in (ENGINE / "finetune").glob("[!_]*.py"))
    if options.task not in tasks:
        raise UserError(
            f"--task {options.task}: no such task{nearest(options.task, tasks)}; there are {', '.join(tasks)}"
        )
    at_least: dict[str, float] = dict(budget_minutes=0.1, best=0, epochs=1, batch_size=1, lr=0)
    for name, least in at_least.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least:g}")
    if not options.seeds or len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds takes one or more numbers, each once")


def main() -> int:
    began = time.monotonic()
    options = parse(Options, sys.argv[1:])
    check(options)
    seen = elsewhere(look, options.task, options.init, options.device)
    until = began + 60 * (options.budget_minutes or math.inf) - WRITING
    bench = make_bench(options, seen["of_task"], seen["base"], until)
    about = {
        "task": options.task, "base": seen["base"], "machine": seen["machine"],
        "data": [options.data or "its toy rows", options.val_data or "a part held out"],
        "command": shlex.join(["python", "-m", "benchmarks.methods", *sys.argv[1:]]),
    }  # fmt: skip
    make_folders(bench.folder)
    try:
        compare(bench, lambda: write_report(bench, about))
    finally:  # an interrupted comparison leaves what it has
        text = write_report(bench, about)
        draw(json.loads((bench.folder / "methods.json").read_text()), bench.folder / "methods.png")
    print(text)
    for cell, reason in bench.failed.items():
        say(f"{cell.label} failed: {reason}")
    if bench.left_out:
        say(f"left out: {', '.join(cell.label for cell in bench.left_out)}; the same command makes them")
    return 1 if bench.failed else 0


def make_folders(folder: Path) -> None:
    """`folder` with places for runs and answers, which git passes over."""
    try:
        for part in ("runs", "decodings"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / ".gitignore").write_text("*\n")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


if __name__ == "__main__":
    entry_point(main)
