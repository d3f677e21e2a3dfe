"""Measure what each optimization gains on this machine:

python -m benchmarks.stages --preset gpt2 --out FOLDER [--quick]

Every stage is the stage before it plus one thing. Every figure comes from the log of a real run:
train_gpt2.py in its own process, with options that say what to leave out. A round runs the whole
ladder once, so that a slow minute of the machine affects all stages. The trade-off: starting a
process takes some ten seconds, so a run is only a few steps long.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from base.cli import entry_point, parse
from base.commands import REPO, side_by_side
from base.console import outlive
from base.files import read_json, write_json
from benchmarks.ladder import (
    LADDER,
    Machine,
    Plan,
    Rung,
    Settings,
    default_settings,
    ladder,
    scaling_points,
)
from benchmarks.machine import engine_hash, in_own_process
from benchmarks.runs import make_folders, now, say
from benchmarks.stages_report import (
    TOLERANCE,
    describe,
    draw,
    rate,
    scaling_rows,
    stage_rows,
    text_of,
)
from benchmarks.stages_setup import fitting_micro_batch, look, prepare, product_ceilings
from benchmarks.store import Cell, Figures, Store, deadline, option_words, place
from config import (
    LARGEST,
    PRESETS,
    Count,
    PathOrName,
    PathsOrNames,
    Positive,
    Preset,
    Range,
    SmallCount,
    UserError,
    known_names,
)
from engine.log import records
from engine.roofline import peak_flops

BATCH_TOKENS = 524288  # tokens in a step with accumulation on a GPU, like GPT-3's smallest model
SEQ_LEN = {"cuda": (1024, 256), "cpu": (256, 128)}  # tokens in a sequence; the second: --quick
MICRO_BATCH = (4, 8)  # sequences in a forward pass on a CPU; the second: --quick
ACCUMULATION = 4  # micro-batches in a step on a CPU
# first steps that do not count: they compile, record graphs, and grow the heap
WARM_UP = {"cuda": 3, "cpu": 2}
TIMED = {"cuda": 8, "cpu": 4}  # steps that count
SEED = 1337
LEARNING_RATE = 3e-4  # constant and small, because Adam's first steps amplify rounding differences
# options that must be equal for all figures of a table
IDENTITY = ("preset", "quick", "steps", "seq_len", "micro_batch", "ranks", "data", "tokenizer")
SCALING = "scaling"  # its name in --only
TRACE = 0  # the number of a traced run, in place of a round


@dataclass(frozen=True)
class Options:
    """Options of the ladder."""

    preset: Preset = "gpt2"
    """Shape of the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on."""
    quick: bool = False
    """A small shape (mini, where the preset is larger) and short sequences."""
    minutes: Positive | None = None
    """Time for everything. Repeating the command adds what is left out. Default: 10 on a GPU or
    with --quick, else no limit."""
    rounds: Count = 3
    """Repetitions of the ladder, if there is time."""
    steps: Annotated[int, Range(4, LARGEST)] | None = None
    """Optimizer steps of a run, the first 2 (on CUDA 3) untimed. Default: 6, on CUDA 11."""
    seq_len: Count | None = None
    """Tokens in a sequence. Default: 1024 on CUDA, 256 elsewhere. With --quick: 256 and 128."""
    micro_batch: Count | None = None
    """Sequences in a forward pass. Default: on CUDA up to 32, as far as the baseline fits;
    elsewhere 4, with --quick 8."""
    ranks: SmallCount | None = None
    """Largest number of processes for the scaling. Default: all GPUs; on a CPU no scaling (and 2 in
    the stage ddp)."""
    only: str = ""
    """Stages to run, comma-separated. scaling is one of them. Default: all."""
    data: PathsOrNames = "stdlib"
    """Training tokens, as in train_gpt2.py, also folders of shards."""
    tokenizer: PathOrName | None = None
    """As in train_gpt2.py. Default: the data's own. For stdlib, one of GPT-2's size that is trained
    on this machine's Python source."""
    out: PathOrName = "runs/stages"
    """Folder for stages.json, stages.md, stages.png and the runs."""


# --- a run


def command(settings: Settings, plan: Plan, cache: Path, out: Path) -> tuple[str, ...]:
    """The command of train_gpt2.py for a stage, through torchrun if there are several ranks."""
    ranks = settings.ranks or plan.ranks
    micro_batch = settings.micro_batch or plan.micro_batch
    options: dict[str, Any] = {
        "preset": plan.preset,
        "data": plan.data,
        "tokenizer": plan.tokenizer,
        "cache": cache,
        "seed": SEED,
        "device": settings.device,
        "seq-len": plan.seq_len,
        "micro-batch": micro_batch,
        "batch-tokens": micro_batch * plan.seq_len * (settings.accumulation or plan.accumulation),
        "steps": settings.steps or plan.steps,
        "lr": LEARNING_RATE,
        "schedule": "constant",
        "warmup-steps": 0,
        "clip": settings.clip,
        "precision": settings.precision,
        "kernels": ",".join(settings.kernels) or "torch",
        "eval-every": 0,
        "save-every": 0,
        "sample-every": 0,
        "log-every": 0,
        "resume": "never",
        "out": out,
        "compile": settings.compile,
        "no-compile": not settings.compile,
        "cuda-graphs": settings.cuda_graphs,
        "profile": settings.profile,
        "without": "\0".join(settings.without) or None,
    }
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
    launcher = (sys.executable, *(torchrun if ranks > 1 else ()))
    return (*launcher, str(REPO / "train_gpt2.py"), *option_words(options))


def figures_of(run: Path) -> Figures:
    """The figures of a finished run, from its log and its trace if it has one. Deletes the model
    and the trace, which are large."""
    log = records(run)
    steps = [line for line in log if line["kind"] == "train"]
    figures: Figures = {
        "step_ms": [step["step_ms"] for step in steps],
        "tokens_per_step": steps[0]["tokens"],
        "memory_bytes": steps[-1]["memory_bytes"],
        "loss": steps[-1]["loss"],
        "warnings": [line["text"] for line in log if line["kind"] == "warning"],
    }
    if trace := read_json(run / "profile" / "trace.json"):
        figures["communication"] = communication_share(trace["traceEvents"])
    for large in ("final", "profile"):
        shutil.rmtree(run / large, ignore_errors=True)
    return figures


def communication_share(events: Sequence[Mapping[str, Any]]) -> float:
    """The share of the traced steps in which ranks communicate and this one does not compute.

    On a GPU that is the time of NCCL's kernels without other kernels beside them. On a CPU it is
    the time of gloo's collectives without PyTorch's operations.
    """
    talk, work, steps = [], [], []
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    for event in events:
        if event.get("ph") != "X":
            continue
        name, kind = event["name"].lower(), event.get("cat")
        span = event["ts"], event["ts"] + event["dur"]
        if kind == "user_annotation" and name.startswith("profilerstep"):
            steps.append(span)
        elif name.startswith("nccl") and kind == "kernel" if on_gpu else name.startswith("gloo:"):
            talk.append(span)
        elif kind == "kernel" if on_gpu else name.startswith("aten::"):
            work.append(span)
    return (covered(talk + work) - covered(work)) / covered(steps)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (begin, end)."""
    total, reached = 0.0, -math.inf
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, reached))
        reached = max(reached, finish)
    return total


# --- one call of the command


@dataclass
class Bench:
    """The runs of a ladder by stage and round, and their figures."""

    folder: Path
    machine: Machine
    plan: Plan
    store: Store
    only: Sequence[str] | None = None  # stages to run; None: all
    ranks: int = 1  # the largest number for the scaling; 1: no scaling

    def cell(self, name: str, number: int, settings: Settings, cores: int | None = None) -> Cell:
        """The run of a stage in a round, on `cores` cores (None: all)."""
        path = place(self.folder / "runs", name, number, dataclasses.asdict(settings))
        words = command(settings, self.plan, self.folder / "cache", path)
        return Cell(name, number, path, words, name, cores=cores)

    def record(self, name: str, number: int, settings: Settings) -> Figures | None:
        """The figures of a run without its warm-up steps. None if the run is not done."""
        figures = self.cell(name, number, settings).figures()
        warm_up = WARM_UP[self.machine.device] if settings.steps is None else 1
        return figures and figures | {"step_ms": figures["step_ms"][warm_up:]}

    def records(self, name: str, settings: Settings) -> list[Figures]:
        """The figures of rounds 1, 2, ... up to the first that is missing."""
        found = (self.record(name, number, settings) for number in itertools.count(1))
        return [record for record in itertools.takewhile(bool, found) if record]

    @property
    def failed(self) -> dict[str, str]:
        """The error of each stage or point that failed. Later rounds leave it out."""
        return {cell.name: error for cell, error in self.store.failed.items()}

    def points(self) -> list[tuple[int, int]]:
        """The scaling points without duplicates, which weak and strong scaling share."""
        points = itertools.chain(*scaling_points(self.ranks).values())
        return list(dict.fromkeys(points)) if self.ranks > 1 else []

    def point(self, ranks: int, each: int, number: int) -> tuple[str, int, Settings]:
        """The name, number and settings of a point's run: the engine's defaults on that many
        ranks."""
        best = default_settings(self.machine, self.failed)
        trace = dict(steps=5, profile=True) if number == TRACE else {}
        return (
            f"ranks-{ranks}-each-{each}",
            number,
            dataclasses.replace(best, ranks=ranks, accumulation=ranks * each, **trace),
        )

    def cells(self, rounds: int) -> Iterator[Cell]:
        """The cells of all rounds. A name that failed gets no further cells, but its failed cell
        still counts."""
        for number in range(1, rounds + 1):
            for cell in self.round(number):
                if cell.name not in self.failed or cell in self.store.failed:
                    yield cell

    def round(self, number: int) -> Iterator[Cell]:
        """The cells of a round: the stages, none of them on a failed one, then the scaling points.
        On a CPU each rank gets the same number of cores at every point."""
        for stage in LADDER:
            # computed again for each stage, because an earlier stage may have failed just now
            for rung in ladder(self.machine, self.only, self.failed):
                if rung.stage == stage and not rung.skipped:
                    yield self.cell(stage.name, number, rung.settings)
        each_rank = self.machine.cores // self.ranks if self.machine.device == "cpu" else None
        for ranks, each in self.points():
            cores = each_rank and each_rank * ranks
            yield self.cell(*self.point(ranks, each, number), cores)
            if ranks > 1 and number == 1:
                yield self.cell(*self.point(ranks, each, TRACE), cores)


def store_of(until: float) -> Store:
    """A store that restarts interrupted runs, because every step of a run is timed."""
    return Store(figures_of, until, restart=True)


def compile_ahead(bench: Bench, rungs: Sequence[Rung]) -> None:
    """Fill the compiler's caches with several stages at a time, so that the timed runs do not
    compile one after another.

    A failure here occurs again in the stage's own run, which reports it.
    """
    machine = bench.machine
    at_once = min(4, machine.cores // 4, machine.memory // (32 << 30))
    if machine.device != "cuda" or at_once < 2:
        return
    distinct: dict[Settings, str] = {}
    for rung in rungs:
        if rung.settings.compile and rung.settings.ranks == 1:
            distinct.setdefault(compiled_part(rung.settings), rung.stage.name)
    cells = [bench.cell(f"compile-{name}", 0, settings) for settings, name in distinct.items()]
    missing = [cell for cell in cells if not cell.figures()]
    if missing:
        say(f"compiling {len(missing)} stages, {at_once} at a time ...")
        side_by_side(store_of(bench.store.until).attempt, missing, at_once)


def compiled_part(settings: Settings) -> Settings:
    """The settings that affect compiled code, with one step. Stages for which they are equal share
    their compiled code."""
    unseen = ("decay-groups", "fused-adamw", "kept-memory")
    return dataclasses.replace(
        settings,
        steps=1,
        accumulation=1,
        clip=0.0,
        without=tuple(n for n in settings.without if n not in unseen),
        kernels=tuple(n for n in settings.kernels if n != "adamw"),
    )


# --- the plan, which later calls in the same folder must share


def new_plan(options: Options, machine: Machine, cache: Path) -> Plan:
    """The plan that follows from the options and the machine. Prepares the tokens."""
    cuda, quick, presets = machine.device == "cuda", options.quick, list(PRESETS)
    preset = min(options.preset, "mini", key=presets.index) if quick else options.preset
    seq_len = options.seq_len or SEQ_LEN[machine.device][quick]
    micro_batch = options.micro_batch or MICRO_BATCH[quick]
    if cuda and not options.micro_batch:
        micro_batch = in_own_process(fitting_micro_batch, preset, seq_len, machine.memory)
    accumulation = ACCUMULATION
    if cuda and not quick:
        accumulation = max(1, BATCH_TOKENS // (micro_batch * seq_len))
    most = options.ranks or (machine.devices if cuda else min(2, machine.cores))
    say("preparing the tokens ...")
    tokenizer, vocabulary, flops = in_own_process(
        prepare, preset, seq_len, options.data, options.tokenizer, cache
    )
    return Plan(
        preset=preset,
        seq_len=seq_len,
        micro_batch=micro_batch,
        accumulation=accumulation,
        # so that the stage ddp has the batch of the stage before it
        ranks=max(n for n in range(1, most + 1) if accumulation % n == 0),
        steps=options.steps or WARM_UP[machine.device] + TIMED[machine.device],
        data=options.data,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        flops_per_token=flops,
    )


def make_plan(options: Options, machine: Machine, folder: Path) -> tuple[Plan, dict[str, float]]:
    """The plan and the measured FLOP/s of large matrix products, by precision. Both are stored in
    the folder. Raises UserError if the folder holds a ladder with other options, or of another
    machine or engine."""
    file = folder / "plan.json"
    identity = {
        **{name: getattr(options, name) for name in IDENTITY},
        "layout": 2,  # of the file
        "device": machine.device,
        "hardware": machine.name,
        "threads": machine.threads,
        "engine": engine_hash(),
        **machine.facts["versions"],
    }
    stored: dict[str, Any] | None = read_json(file)
    if not stored:
        plan = new_plan(options, machine, folder / "cache")
        names = [name for name in ("fp32", "tf32", "bf16") if name not in machine.lacks]
        ceilings = in_own_process(product_ceilings, machine.device, names)
        stored = {"identity": identity, "plan": dataclasses.asdict(plan), "ceilings": ceilings}
        write_json(file, stored)
    then = stored.get("identity", {})
    differ = [
        f"{k} was {then.get(k)}, is {identity.get(k)}"
        for k in then | identity
        if then.get(k) != identity.get(k)
    ]
    if differ:
        raise UserError(
            f"{folder} holds another ladder ({'; '.join(differ)}); give the same options or "
            "another --out"
        )
    return Plan(**stored["plan"]), stored["ceilings"]


# --- the command


def result_of(bench: Bench, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The content of stages.json, from the folder's runs."""
    machine, only = bench.machine, bench.only
    records = {
        rung.stage.name: bench.records(rung.stage.name, rung.settings)
        for rung in ladder(machine, None, bench.failed)
    }
    known = [name for name, found in records.items() if found or only is None or name in only]
    rungs = ladder(machine, known, bench.failed)  # a stage is compared with one of these
    cuda = machine.device == "cuda"
    sheet = {name: peak_flops(machine.name, name) if cuda else None for name in ceilings}
    points: dict[tuple[int, int], Any] = {}
    for point in bench.points():
        name, _, settings = bench.point(*point, 1)
        trace = bench.record(*bench.point(*point, TRACE))
        points[point] = bench.records(name, settings), trace and trace["communication"]
    return {
        "date": now(),
        "machine": dataclasses.asdict(machine),
        "plan": dataclasses.asdict(bench.plan),
        "engine": engine_hash(),
        "warm_up": WARM_UP[machine.device],
        "tolerance": TOLERANCE,
        "ceilings": ceilings,
        "data_sheet": sheet,
        "stages": stage_rows(rungs, records, bench.failed, bench.plan, machine, ceilings, sheet),
        "scaling": scaling_rows(points, bench.ranks) if points else [],
    }


def make_folder(folder: Path) -> None:
    """Create the folder with subfolders for runs and caches. Compilers keep their caches there
    too."""
    make_folders(folder, ("cache", "runs"))
    for name in ("TORCHINDUCTOR", "TRITON"):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(folder / "cache" / name.lower()))


def main() -> int:
    """Measure the ladder and print its table. The exit code is 1 if a stage failed."""
    began = time.monotonic()
    options = parse(Options, sys.argv[1:])
    outlive()
    stages = [*(stage.name for stage in LADDER), SCALING]
    only = known_names("--only", options.only, stages) or None
    machine = in_own_process(look, options.device, options.ranks)
    most = options.ranks or (machine.devices if machine.device == "cuda" else 1)
    if only and SCALING in only and most == 1:
        raise UserError(f"--only {SCALING} needs a number of ranks; add --ranks N")
    usual = 10.0 if machine.device == "cuda" or options.quick else None
    store = store_of(deadline(began, options.minutes or usual))
    folder = Path(options.out).resolve()
    make_folder(folder)
    plan, ceilings = make_plan(options, machine, folder)
    say(f"{describe(plan)}, on {machine.name}\n{options.rounds} rounds of {plan.steps} steps")
    bench = Bench(folder, machine, plan, store, only, most if not only or SCALING in only else 1)
    compile_ahead(bench, [rung for rung in ladder(machine, only) if not rung.skipped])
    return store.complete(
        folder / "stages",
        lambda: bench.cells(options.rounds),
        lambda figures: f"{rate(figures):,.0f} tokens/s",
        lambda: result_of(bench, ceilings),
        text_of,
        draw,
    )


if __name__ == "__main__":
    entry_point(main)
