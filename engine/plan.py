"""Decisions before a run that its banner reports: precision, kernels and attention for this
machine, and what --dry-run prints."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from base.console import bytes_text, counted, time_text
from config import Resolved, RunConfig, RunOptions, UserError, resolve
from engine import processes
from engine.compiling import compile_unit, compiler_problem
from engine.fit import estimate_fits, largest_divisor, peak_memory
from engine.log import RunLog, finite_values, read_log
from engine.memory import checkpoint_bytes, keeps_freed_memory, set_allocator
from engine.precision import DTYPES, choose_precision, set_products
from engine.processes import World
from engine.roofline import Ceilings, Prediction, peak_flops, predict
from engine.task import Facts, Task
from kernels import choose, operation_names
from kernels.attention import attention_backends
from storage.checkpoint import checkpoints

TIMED = 4.0  # seconds that a prediction of the speed measures


@dataclass
class Choices:
    """Choices for this machine that are not in the options."""

    precision: str  # why this precision was chosen
    backends: list[SDPBackend]  # attention backends in the order to try
    attention: str  # what computes attention in training
    repeatability: str  # whether its gradients are the same bits in every run
    fallback: str | None  # a warning: which kernels `auto` cannot use, and why


def resolve_for_machine(cfg: RunOptions, world: World) -> tuple[RunOptions, Choices]:
    """Resolve the options for this machine, and set this process up accordingly.

    Raises UserError for options that contradict each other or that the machine cannot fulfil.
    """
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cfg = resolve(cfg, world.device.type)
    if cfg.compile:
        check_compiler(world)
    precision, why = choose_precision(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision)
    kernels, fallback = choose(cfg, world.device.type)
    cfg = dataclasses.replace(cfg, kernels=kernels)
    if set_products(precision, world.device, cfg.without):
        why += "; fp32 products by oneDNN"
    if world.device.type == "cuda":
        set_gpu_allocator(cfg)
    # With --without kept-memory and no --recompute, glibc keeps its own defaults.
    if world.device.type == "cpu" and (keeps_freed_memory(cfg) or cfg.recompute):
        set_allocator(keep_freed=keeps_freed_memory(cfg))
    by_hardware = "attention-backend" not in cfg.without
    dtype = DTYPES.get(precision, torch.float32)
    backends = attention_backends(world.device, dtype, cfg.deterministic, by_hardware)
    written_out = "explicit" if "flash-attention" in cfg.without else backends[0].name.lower()
    attention = next(
        (f"{name} kernel" for name in operation_names(kernels) if "attention" in name), written_out
    )
    return cfg, Choices(
        why, backends, attention, repeatability(attention, cfg, world.device), fallback
    )


def check_compiler(world: World) -> None:
    """Raise UserError on every rank if torch.compile lacks a compiler on one of them."""
    reasons = processes.gather(world, compiler_problem(world.device.type))
    if reason := next(filter(None, reasons), None):
        raise UserError(f"--compile {reason}; or type --no-compile")


def repeatability(attention: str, cfg: RunConfig, device: torch.device) -> str:
    """Says whether attention's gradients are the same bits in every run. `attention` is its name in
    the banner.

    On CUDA the fused kernels of cuDNN and PyTorch add up dq in the order in which their blocks
    finish. With --deterministic PyTorch's use a fixed order, and cuDNN's are not used.
    """
    ordered = attention in ("attention kernel", "explicit", "math")
    if device.type != "cuda" or ordered or cfg.deterministic:
        return "repeatable bit for bit"
    return "not repeatable bit for bit (with --deterministic it is)"


def banner(
    task: Task,
    facts: Facts,
    cfg: Resolved,
    world: World,
    choices: Choices,
    micro_batch: int,
    done: int,
    resumed_from: Path | None,
) -> dict[str, str]:
    """The lines of the opening banner. `done`: how many steps are done already."""
    device, flops = processes.device_name(world.device), facts.cost.flops_per_token
    threads = f", threads a rank: {torch.get_num_threads()}" if world.device.type == "cpu" else ""
    compiled = "not compiled"
    if cfg.compile:
        compiled = f"compiled by the {compile_unit(cfg, world, facts.cost.loss is None)}"
    without = f", without {', '.join(cfg.without)}" if cfg.without else ""
    plan = f"steps {done} to {cfg.steps}, {cfg.optimizer}, {cfg.schedule} schedule"
    plan += f", peak lr {cfg.lr:g}"
    if cfg.patience:
        plan += f", ends after {cfg.patience} evaluations without a better {task.best[0]}"
    if flops:
        plan += f", {flops / 1e6:,.1f} MFLOP a token"
    return {
        "run": f"{Path(cfg.out)}" + (f", resumed from {resumed_from.name}" if resumed_from else ""),
        "device": f"{world.size} x {world.device.type} ({device}){threads}",
        "precision": f"{cfg.precision} ({choices.precision})",
        "attention": f"{choices.attention}, {choices.repeatability}",
        "kernels": f"{cfg.kernels.replace(',', ', ')}, {compiled}{without}",
        **facts.banner,
        "step": describe_step(facts, micro_batch, world.size),
        "plan": plan,
    }


def describe_step(facts: Facts, micro_batch: int, world_size: int) -> str:
    """Describes in words the rows or tokens that make up a step."""
    rows = facts.rows_per_rank(world_size)
    if facts.longest is not None:
        return (
            f"{facts.rows_per_rank(1)} rows, up to {micro_batch} in a forward pass, on "
            f"{counted(world_size, 'rank')}"
        )
    return (
        f"{int(facts.tokens_per_step):,} tokens = micro-batch {micro_batch} x length "
        f"{facts.cost.length} x accumulation {rows // micro_batch} x ranks {world_size}"
    )


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the user's own settings


def set_gpu_allocator(cfg: RunConfig) -> None:
    """Let the GPU allocator use expandable segments, which can join freed pieces for a larger
    tensor.

    A micro-batch that fits in the trial then also fits in the run, which allocates in another
    order. Not with CUDA graphs, which need addresses that stay. Settings in the environment are the
    user's and have precedence.
    """
    chosen_by_user = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if sys.platform == "linux" and not (cfg.cuda_graphs or chosen_by_user):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


@dataclass(frozen=True)
class Disk:
    """The disk space that a run takes in --out."""

    kept: int  # checkpoints that are kept
    size: int  # bytes of one checkpoint
    final: int  # bytes of final/

    def needed(self, there: int = 0) -> int:
        """Bytes that the run may still write if `there` checkpoints exist. One more than is kept
        exists while it is being written."""
        return (max(0, self.kept - there) + 1) * self.size * bool(self.kept) + self.final

    def shortage(self, folder: Path) -> str | None:
        """A warning if the disk of `folder`, which may hold checkpoints already, has too little
        space; else None."""
        there = next(
            path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path)
        )
        needed, free = self.needed(len(checkpoints(folder))), shutil.disk_usage(there).free
        if needed <= free:
            return None
        return (
            f"{folder} has {bytes_text(free)} free and the run may take {bytes_text(needed)} more "
            f"({self}); free some, lower --keep and --keep-best, or choose another --out"
        )

    def __str__(self) -> str:
        checkpoints = (
            f"{self.kept} checkpoints of {bytes_text(self.size)}, one more while it is "
            "written, and "
        )
        return f"{checkpoints if self.kept else ''}{bytes_text(self.final)} for final/"


def disk_of(task: Task, facts: Facts, cfg: Resolved, final: int) -> Disk:
    """The disk space that a run takes. `final`: bytes of the whole model in fp32."""
    kept = (
        min(cfg.keep + cfg.keep_best, math.ceil(cfg.steps / cfg.save_every))
        if cfg.save_every
        else 0
    )
    return Disk(kept, checkpoint_bytes(facts.cost, cfg.optimizer, task.stored), final)


def dry_run(task: Task, facts: Facts, cfg: Resolved, world: World, log: RunLog) -> None:
    """Print the memory, time and disk space that the run would take, and leave the process
    group."""
    rows, fits = facts.rows_per_rank(world.size), estimate_fits(facts, cfg, world)
    asked = cfg.micro_batch
    micro_batch = (largest_divisor(rows, fits) or 1) if asked == "auto" else asked
    memory = peak_memory(facts, cfg, micro_batch, world)
    tokens, flops = cfg.steps * facts.tokens_per_step, facts.cost.flops_per_token
    disk = disk_of(task, facts, cfg, memory.weights)
    free = processes.available_memory(world.device, world.local_size)
    speed, source = known_speed(cfg)
    if speed is None and fits(micro_batch):
        log.say(f"timing this machine's operations for about {TIMED:.0f} seconds")
        speed, source = estimated_speed(facts, cfg, world, micro_batch)
    log.say(
        "dry run: nothing is started or written "
        f"({describe_step(facts, micro_batch, world.size)})\n"
    )
    log.banner(
        {
            f"memory, {f.name}": bytes_text(getattr(memory, f.name))
            for f in dataclasses.fields(memory)
        }
        | {"memory, peak of a rank": bytes_text(memory.total)}
        | {"free now for a rank": bytes_text(free) + ("" if fits(micro_batch) else ": too little")}
        | {"tokens": f"{round(tokens):,} in {cfg.steps:,} steps"}
        | {
            "compute": f"{flops * tokens:.3g} FLOP ({flops / 1e6:,.1f} MFLOP a token)"
            if flops
            else "unknown"
        }
        | {"disk": f"{bytes_text(disk.needed())} at most ({disk})"}
        | {
            "time": f"{time_text(tokens / speed)} at {speed:,.0f} tokens/s ({source})"
            if speed
            else f"unknown: {source}"
        }
    )
    if shortage := disk.shortage(Path(cfg.out)):
        log.warn(shortage)
    processes.finish(world)


def known_speed(cfg: Resolved) -> tuple[float | None, str]:
    """Tokens per second of the run in --out, or None without one, and where the figure comes
    from."""
    try:
        text = (Path(cfg.out) / "log.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    speeds = finite_values(
        [record for _, record in read_log(text) if record["kind"] == "train"], "tokens_per_second"
    )
    if speeds and (speed := statistics.median(speeds)) > 0:
        return speed, f"measured in {cfg.out}"
    return None, "no run in --out to take the speed from"


def estimated_speed(
    facts: Facts, cfg: Resolved, world: World, micro_batch: int
) -> tuple[float | None, str]:
    """Tokens per second of a run that has not begun, estimated from its operations, and where the
    figure comes from. None for what the ledger does not count."""
    cost = facts.cost
    uncounted = {
        "of other tasks than pretraining": cost.added or cost.loss or facts.longest is not None,
        "with --optimizer muon": cfg.optimizer != "adamw",
        "with --dropout": cfg.dropout,
    }
    if reasons := [reason for reason, applies in uncounted.items() if applies]:
        return None, f"no run in --out to take the speed from, and none is estimated {reasons[0]}"
    expected, ceilings = expected_speed(facts, cfg, world, micro_batch)
    source = f"estimated from {ceilings.source}, give or take {expected.share:.0%}"
    return expected.tokens_per_second, source


def expected_speed(
    facts: Facts, cfg: Resolved, world: World, micro_batch: int
) -> tuple[Prediction, Ceilings]:
    """The speed that a pretraining run with AdamW will have, from its operations, which are timed
    now, and their ceilings."""
    from engine.calibration import calibrate  # most runs do not measure

    cost, rows = facts.cost, facts.rows_per_rank(world.size)
    ceilings = calibrate(
        cost.shape, micro_batch, cost.length, cfg.precision, world.device, TIMED, cfg.without
    )
    accumulation = rows // micro_batch
    shape = cost.shape, rows, cost.length, cfg.precision
    return predict(*shape, ceilings, world.size, accumulation), ceilings


def device_peak(world: World, precision: str) -> float | None:
    """Peak FLOP/s of this rank's GPU; None on other devices, or if it is unknown."""
    return (
        peak_flops(processes.device_name(world.device), precision)
        if world.device.type == "cuda"
        else None
    )
