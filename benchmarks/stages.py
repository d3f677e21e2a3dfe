"""Measure what each optimization gains on this machine:

python -m benchmarks.stages --preset gpt2 --out FOLDER [--quick]

Every stage is the stage before it plus one thing. Every figure comes from the log of a real run:
train_gpt2.py in its own process, with options that say what to leave out. A round runs the whole
ladder once, so that a slow minute of the machine affects all stages. The trade-off: starting a
process takes some ten seconds, so a run is only a few steps long.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.cli import entry_point, parse
from base.commands import REPO, side_by_side
from base.console import outlive, time_text
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
from benchmarks.runs import at_least, make_folders, now, say, write_report
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
from benchmarks.store import Cell, Figures, Store, place
from config import (
    PRESETS,
    Count,
    PathOrName,
    PathsOrNames,
    Positive,
    Preset,
    SmallCount,
    UserError,
    known_names,
)
from engine.log import records
from engine.roofline import peak_flops

BATCH_TOKENS = 524288  # tokens in a step with accumulation on a GPU, like GPT-3's smallest model
ACCUMULATION = 4  # micro-batches in a step on a CPU
# first steps that do not count: they compile, record graphs, and grow the heap
WARM_UP = {"cuda": 3, "cpu": 2}
TIMED = 4, 12  # least and most steps that count
# A stage's mean step over the baseline's. Later stages are faster but have more tokens in a step.
LIKELY_STEP = 1.5
SEED = 1337
LEARNING_RATE = 3e-4  # constant and small, because Adam's first steps amplify rounding differences
WRITING = 6.0  # seconds reserved for the table and the chart
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
    steps: Count | None = None
    """Optimizer steps of a run. Default: as many as there is time for."""
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
    }
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words.append(str(REPO / "train_gpt2.py"))
    words += [
        str(word)
        for name, value in options.items()
        if value is not None
        for word in (f"--{name}", value)
    ]
    words.append("--compile" if settings.compile else "--no-compile")
    words += ["--cuda-graphs"] * settings.cuda_graphs + ["--profile"] * settings.profile
    words += ["--without", *settings.without] if settings.without else []
    return tuple(words)


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


def store_of(until: float) -> Store:
    """A store that restarts interrupted runs, because every step of a run is timed."""
    return Store(figures_of, until, restart=True)


def cells_of(bench: Bench, only: Sequence[str] | None, number: int, most: int) -> Iterator[Cell]:
    """The cells of one round: the stages, none of them on a failed one, then the scaling points up
    to `most` ranks. Cells that failed in an earlier round are left out."""
    for stage in LADDER:
        # computed again for each stage, because an earlier stage may have failed just now
        rungs = ladder(bench.machine, only, bench.failed)
        rung = next((rung for rung in rungs if rung.stage == stage and not rung.skipped), None)
        if rung and is_due(bench, cell := bench.cell(stage.name, number, rung.settings)):
            yield cell
    for point in distinct_points(most):
        if is_due(bench, cell := point_cell(bench, point, number, most)):
            yield cell
    for point in distinct_points(most) if number == 1 else ():
        if point[0] > 1:
            yield point_cell(bench, point, TRACE, most)


def is_due(bench: Bench, cell: Cell) -> bool:
    """Whether the cell belongs to a round. A name that failed gets no further cells, but its failed
    cell still counts."""
    return cell.name not in bench.failed or cell in bench.store.failed


def measure(bench: Bench, only: Sequence[str] | None, rounds: int, most: int) -> None:
    """Run the cells that the folder lacks, round by round, and report each."""
    compile_ahead(bench, [rung for rung in ladder(bench.machine, only) if not rung.skipped])
    numbers = range(1, rounds + 1)
    for number in numbers:
        measure_ceilings(bench, number)
        for cell, how in bench.store.make(cells_of(bench, only, number, most)):
            every = [cell for n in numbers for cell in cells_of(bench, only, n, most)]
            figures = cell.figures()
            speed = f"{rate(figures):>10,.0f} tokens/s, " if figures else ""
            left = time_text(bench.store.rest(every))
            settled = sum(map(bench.store.settled, every))
            say(f"[{settled}/{len(every)}] {cell.name:<22} {speed}{how}; about {left} left")


def measure_ceilings(bench: Bench, number: int) -> None:
    """Measure the speed of large matrix products, again in each round."""
    path = bench.folder / "runs" / f"ceilings-{number}.json"
    if not path.exists() and time.monotonic() < bench.store.until:
        names = [name for name in ("fp32", "tf32", "bf16") if name not in bench.machine.lacks]
        write_json(path, in_own_process(product_ceilings, bench.machine.device, names))


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


def distinct_points(most: int) -> list[tuple[int, int]]:
    """The scaling points without duplicates. Weak and strong scaling share some, and one rank has
    none."""
    return list(
        dict.fromkeys(
            point for points in scaling_points(most).values() for point in points if most > 1
        )
    )


def point_of(bench: Bench, point: tuple[int, int], number: int) -> tuple[str, Settings]:
    """The name and the settings of a point's run: the engine's defaults on that many ranks."""
    ranks, each = point
    best = default_settings(bench.machine, bench.failed)
    trace = dict(steps=5, profile=True) if number == TRACE else {}
    return f"ranks-{ranks}-each-{each}", dataclasses.replace(
        best, ranks=ranks, accumulation=ranks * each, **trace
    )


def point_cell(bench: Bench, point: tuple[int, int], number: int, most: int) -> Cell:
    """A run of a point. On a CPU each rank gets the same number of cores at every point."""
    name, settings = point_of(bench, point, number)
    cores = bench.machine.cores // most * point[0] if bench.machine.device == "cpu" else None
    return bench.cell(name, number, settings, cores)


# --- the plan, which later calls in the same folder must share


def shape_of(options: Options, machine: Machine) -> dict[str, Any]:
    """The part of the plan that follows from the options and the machine."""
    cuda, names = machine.device == "cuda", list(PRESETS)
    preset = (
        names[min(names.index(options.preset), names.index("mini"))]
        if options.quick
        else options.preset
    )
    seq_len = options.seq_len or (
        (256 if options.quick else 1024) if cuda else 128 if options.quick else 256
    )
    micro_batch = options.micro_batch or (8 if options.quick else 4)
    if cuda and not options.micro_batch:
        micro_batch = in_own_process(fitting_micro_batch, preset, seq_len, machine.memory)
    accumulation = (
        max(1, BATCH_TOKENS // (micro_batch * seq_len))
        if cuda and not options.quick
        else ACCUMULATION
    )
    most = options.ranks or (machine.devices if cuda else min(2, machine.cores))
    # so that the stage ddp has the batch of the stage before it
    ranks = max(n for n in range(1, most + 1) if accumulation % n == 0)
    return dict(
        preset=preset,
        seq_len=seq_len,
        micro_batch=micro_batch,
        accumulation=accumulation,
        ranks=ranks,
        data=options.data,
    )


def identity_of(options: Options, machine: Machine, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be equal for all figures of a table, by name."""
    known = {
        "device": machine.device,
        "hardware": machine.name,
        "threads": machine.threads,
        "engine": engine_hash(),
    }
    asked = {"tokenizer": options.tokenizer, "steps": options.steps}
    return dict(shape) | asked | known | machine.facts["versions"]


def make_plan(options: Options, machine: Machine, folder: Path, until: float) -> Plan:
    """The plan stored in the folder, or a new one. Raises UserError if the stored plan has another
    identity."""
    shape = shape_of(options, machine)
    identity = identity_of(options, machine, shape)
    file = folder / "plan.json"
    if file.exists():
        return stored_plan(file, identity)
    say("preparing the tokens ...")
    tokenizer, vocabulary, flops = in_own_process(
        prepare,
        shape["preset"],
        shape["seq_len"],
        options.data,
        options.tokenizer,
        folder / "cache",
    )
    steps = options.steps or WARM_UP[machine.device] + TIMED[0]
    plan = Plan(
        **shape, steps=steps, tokenizer=tokenizer, vocabulary=vocabulary, flops_per_token=flops
    )
    if options.steps is None and until < math.inf:
        plan = dataclasses.replace(
            plan, steps=affordable_steps(Bench(folder, machine, plan, store_of(until)))
        )
    write_json(file, {"identity": identity, "plan": dataclasses.asdict(plan)})
    return plan


def stored_plan(file: Path, identity: Mapping[str, Any]) -> Plan:
    """The plan in a file. Raises UserError if it has another identity."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        then, plan = stored["identity"], Plan(**stored["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not the plan of a ladder; choose another --out") from None
    differ = [
        f"{k} was {then.get(k)}, is {identity.get(k)}"
        for k in then | identity
        if then.get(k) != identity.get(k)
    ]
    if differ:
        raise UserError(
            f"{file.parent} holds another ladder ({'; '.join(differ)}); give the same options or "
            "another --out"
        )
    return plan


def affordable_steps(bench: Bench) -> int:
    """The number of steps in a run for which two rounds fit, estimated by a short run of the
    baseline."""
    warm_up = WARM_UP[bench.machine.device]
    say("a short run, to see how long steps take ...")
    probe = Settings(device=bench.machine.device, steps=warm_up + 1)
    cell = bench.cell("probe", 0, probe)
    bench.store.attempt(cell)
    record = bench.record("probe", 0, probe)
    if record is None:
        return warm_up + TIMED[0]  # the run of the baseline will report the error
    step = statistics.median(record["step_ms"]) / 1e3
    start_up = bench.store.done[cell] - (warm_up + 1) * step
    runs = 2 * sum(rung.skipped is None for rung in ladder(bench.machine))
    seconds = (bench.store.until - time.monotonic()) / runs
    return steps_for(seconds, start_up, LIKELY_STEP * step, warm_up)


def steps_for(seconds: float, start_up: float, step: float, warm_up: int) -> int:
    """The number of steps that fit into a run of `seconds` with its start-up. The steps that count
    are within TIMED."""
    fit = int((seconds - start_up) / step) - warm_up
    return warm_up + min(max(fit, TIMED[0]), TIMED[1])


# --- the command


def report(bench: Bench, only: Sequence[str] | None, most: int) -> str:
    """Write stages.json, stages.md and stages.png from the folder's runs. Returns the text of
    stages.md."""
    machine, plan = bench.machine, bench.plan
    records = {
        rung.stage.name: bench.records(rung.stage.name, rung.settings)
        for rung in ladder(machine, None, bench.failed)
    }
    known = [name for name, found in records.items() if found or only is None or name in only]
    rungs = ladder(machine, known, bench.failed)  # a stage is compared with one of these
    measured = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((bench.folder / "runs").glob("ceilings-*.json"))
    ]
    ceilings = {
        name: statistics.median(of[name] for of in measured)
        for name in (measured[0] if measured else ())
    }
    sheet = {
        name: peak_flops(machine.name, name) if machine.device == "cuda" else None
        for name in ceilings
    }
    points = {
        point: (bench.records(*point_of(bench, point, 1)), trace_of(bench, point))
        for point in distinct_points(most)
    }
    result = {
        "date": now(),
        "machine": dataclasses.asdict(machine),
        "plan": dataclasses.asdict(plan),
        "engine": engine_hash(),
        "warm_up": WARM_UP[machine.device],
        "tolerance": TOLERANCE,
        "ceilings": ceilings,
        "data_sheet": sheet,
        "stages": stage_rows(rungs, records, bench.failed, plan, machine, ceilings, sheet),
        "scaling": scaling_rows(points, most) if points else [],
    }
    text = text_of(result)
    write_report(bench.folder / "stages.json", result, text)
    if importlib.util.find_spec("matplotlib"):
        draw(result, bench.folder / "stages.png")
    else:
        say("matplotlib is not installed, so no chart was drawn; install it and repeat the command")
    return text


def trace_of(bench: Bench, point: tuple[int, int]) -> Figures | None:
    """The figures of a point's traced run, or None."""
    name, settings = point_of(bench, point, TRACE)
    return bench.record(name, TRACE, settings)


def asked_stages(only: str) -> list[str] | None:
    """The names in --only, or None for all. Raises UserError for an unknown name."""
    return known_names("--only", only, [*(stage.name for stage in LADDER), SCALING]) or None


def make_folder(folder: Path) -> None:
    """Create the folder with subfolders for runs and caches. Compilers keep their caches there
    too."""
    make_folders(folder, ("cache", "runs"))
    for name in ("TORCHINDUCTOR", "TRITON"):
        os.environ.setdefault(f"{name}_CACHE_DIR", str(folder / "cache" / name.lower()))


def report_failures(bench: Bench) -> int:
    """Say what failed or was left out. Returns the exit code."""
    store = bench.store
    for name, line in bench.failed.items():
        say(f"{name} failed: {line}")
    if store.left_out:
        made = len(store.done) + len(store.failed)
        say(
            f"the time was up after {made} of {made + len(store.left_out)} runs; repeat the "
            "command for the others"
        )
    return 1 if store.failed else 0


def main() -> int:
    """Measure the ladder and print its table. The exit code is 1 if a stage failed."""
    began = time.monotonic()
    options = parse(Options, sys.argv[1:])
    outlive()
    at_least(options, steps=max(WARM_UP.values()) + 1, minutes=1)
    only = asked_stages(options.only)
    machine = in_own_process(look, options.device, options.ranks)
    most = options.ranks or (machine.devices if machine.device == "cuda" else 1)
    if only and SCALING in only and most == 1:
        raise UserError(f"--only {SCALING} needs a number of ranks; add --ranks N")
    minutes = options.minutes or (10.0 if machine.device == "cuda" or options.quick else math.inf)
    folder = Path(options.out).resolve()
    make_folder(folder)
    until = began + 60 * minutes - WRITING
    plan = make_plan(options, machine, folder, until)
    limit = (
        f"{minutes:g} minutes"
        if minutes < math.inf
        else "no time limit: the first run shows how long the others take"
    )
    say(
        f"{describe(plan, machine)}\nup to {options.rounds} rounds of runs of {plan.steps} steps; "
        f"{limit}"
    )
    bench = Bench(folder, machine, plan, store_of(until))
    most = most if only is None or SCALING in only else 1
    try:
        measure(bench, only, options.rounds, most)
    finally:  # an interrupted ladder reports what it has
        text = report(bench, only, most)
    print(text)
    return report_failures(bench)


if __name__ == "__main__":
    entry_point(main)
