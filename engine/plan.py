"""What is decided before a run: what suits the machine, the micro-batch, and with --dry-run what it
would cost."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.attention import SDPBackend

from base.console import bytes_text, printable, time_text
from config import Run, RunConfig, UserError, resolve
from engine import processes
from engine.log import RunLog, numbers, read_log
from engine.memory import keeps_freed, set_allocator
from engine.precision import DTYPES, choose_precision, set_products
from engine.processes import World
from engine.roofline import peak_flops
from engine.step import TrainStep, compiler_lacks
from engine.task import Task
from kernels import choose, named
from kernels.attention import attention_backends
from storage.checkpoint import checkpoints


@dataclass
class Choices:
    """What was chosen for this machine, beyond what the configuration says."""

    precision: str  # why it is that
    backends: list[SDPBackend]  # of attention, in the order to try
    attention: str  # what computes it in training
    repeatability: str  # whether its gradients are the same bits in every run
    lost: str | None  # what `auto` had to do without


def settle(cfg: Run, world: World) -> tuple[Run, Choices]:
    """`cfg` resolved for this machine, and the process set up to run it. Raises UserError."""
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cfg = resolve(cfg, world.device.type)
    if cfg.compile:
        check_compiler(world)
    precision, why = choose_precision(cfg.precision, world.device)
    cfg = dataclasses.replace(cfg, precision=precision)
    kernels, lost = choose(cfg, world.device.type)
    cfg = dataclasses.replace(cfg, kernels=kernels)
    if set_products(precision, world.device, cfg.without):
        why += "; fp32 products by oneDNN"
    if world.device.type == "cuda":
        set_gpu_allocator(cfg)
    # else glibc is left alone
    if world.device.type == "cpu" and (keeps_freed(cfg) or cfg.recompute):
        set_allocator(keep_freed=keeps_freed(cfg))
    by_hardware = "attention-backend" not in cfg.without
    dtype = DTYPES.get(precision, torch.float32)
    backends = attention_backends(world.device, dtype, cfg.deterministic, by_hardware)
    written_out = "explicit" if "flash-attention" in cfg.without else backends[0].name.lower()
    attention = next(
        (f"{name} kernel" for name in named(kernels) if "attention" in name), written_out
    )
    return cfg, Choices(why, backends, attention, repeatability(attention, cfg, world.device), lost)


def check_compiler(world: World) -> None:
    """Raise UserError on every rank where one of them has no compiler for torch.compile."""
    reasons = processes.gather(world, compiler_lacks(world.device.type))
    if reason := next(filter(None, reasons), None):
        raise UserError(f"--compile {reason}; or type --no-compile")


def repeatability(attention: str, cfg: RunConfig, device: torch.device) -> str:
    """Whether attention's gradients are the same bits in every run, in words; `attention` as the
    banner names it.

    On CUDA, cuDNN's and PyTorch's fused kernels add up dq in whatever order their blocks end.
    PyTorch's keep an order under --deterministic, which leaves cuDNN's out.
    """
    ordered = attention in ("attention kernel", "explicit", "math")
    if device.type != "cuda" or ordered or cfg.deterministic:
        return "repeatable bit for bit"
    return "not repeatable bit for bit (with --deterministic it is)"


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the user's own settings


def set_gpu_allocator(cfg: RunConfig) -> None:
    """Let the GPU's allocator grow its segments, so that memory freed in pieces serves a larger
    tensor later.

    A micro-batch that fitted in a trial then also fits in the run, whose allocations come in
    another order. CUDA graphs keep addresses, which such segments may not. Settings in the
    environment are the user's and stand.
    """
    chosen_by_user = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if sys.platform == "linux" and not (cfg.cuda_graphs or chosen_by_user):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def largest_micro_batch(
    task: Task, model: nn.Module, cfg: RunConfig, world: World, rows: int
) -> int:
    """The largest divisor of `rows` that fits on every rank, 0 if none does: tried on a GPU,
    estimated elsewhere."""
    fits = (
        _gpu_fits(task, model, cfg, world)
        if world.device.type == "cuda"
        else estimate_fits(task, cfg, world)
    )
    return min(processes.gather(world, largest_divisor(rows, fits)))


def largest_divisor(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` that fits, 0 if none does; whatever is smaller than one that
    fits does too."""
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = sorted({*small, *(rows // n for n in small)})
    low, high = 0, len(divisors)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(divisors[middle]) else (low, middle)
    return divisors[low - 1] if low else 0


def estimate_fits(task: Task, cfg: RunConfig, world: World) -> Callable[[int], bool]:
    room = 0.8 * processes.available_memory(world.device, world.local_size)
    held = processes.memory_bytes(world.device)  # already taken, and counted in the estimate
    return lambda n: task.estimate(cfg, n, world.device.type, world.size).total - held <= room


def _gpu_fits(task: Task, model: nn.Module, cfg: RunConfig, world: World) -> Callable[[int], bool]:
    """One real forward and backward pass and one evaluation batch, with room kept for the
    optimizer's moments."""
    device = world.device
    step = TrainStep(task, model, cfg, dataclasses.replace(world, size=1))
    kept = 2 * sum(p.numel() * p.element_size() for p in step.optimizers.params)  # moments
    kept += kept // 2 if world.size > 1 else 0  # DDP's buckets
    room = processes.available_memory(device, 1) + torch.cuda.memory_allocated(device)

    def fits(n: int) -> bool:
        batch = task.collate("train", task.longest_rows(n))
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step._backward(
                batch,
                True,
                dict.fromkeys(task.terms, 1.0),
                {k: torch.zeros((), device=device) for k in task.terms},
            )
            with torch.no_grad():
                step.evaluate(batch)
            peak = torch.cuda.max_memory_allocated(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            peak = math.inf
        step.zero_grad()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the run's own peak is not to be this one
        return peak + kept <= 0.94 * room

    return fits


# PyTorch's allocators and CUDA's; and cuBLAS and cuDNN, which allocate past PyTorch's.
OUT_OF_MEMORY = re.compile(
    r"out[ _]of[ _]memory|allocate memory|_ALLOC(ATION)?_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, also where the compiler has wrapped the error that said so."""
    return any(
        isinstance(inner, torch.OutOfMemoryError | MemoryError) or OUT_OF_MEMORY.search(str(inner))
        for inner in causes(error)
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from or in the handling of, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# inductor's for C++; Triton's for the C that launches a kernel, which ends without the compiler's
# own words.
COMPILER_FAILED = re.compile(
    r"InvalidCxxCompiler|No working C\+\+ compiler|C\+\+ compile error|Failed to find C compiler"
    r"|Command '\[.*\.c'.*-shared.* returned non-zero exit status"
)


def compiler_error(error: BaseException) -> UserError | None:
    """The line to show where the machine's C or C++ compiler failed under torch.compile; None for
    any other error."""
    text = next((str(inner) for inner in causes(error) if COMPILER_FAILED.search(str(inner))), None)
    if text is None:
        return None
    lines = [line.strip() for line in text.splitlines()]
    said = next((line for line in lines if "error: " in line), None)
    said = said or next(line for line in lines if COMPILER_FAILED.search(line))
    return UserError(
        f"torch.compile's C or C++ compiler failed ({printable(said[:200])}); install it whole, "
        "with Python's headers (apt install g++ python3-dev), or type --no-compile",
        local=True,
    )


@dataclass(frozen=True)
class Disk:
    """What a run writes into --out."""

    kept: int  # checkpoints that stay
    size: int  # bytes of one
    final: int  # bytes of final/

    def needed(self, there: int = 0) -> int:
        """Bytes at most, one more checkpoint being written, where `there` are some already."""
        return (max(0, self.kept - there) + 1) * self.size * bool(self.kept) + self.final

    def shortage(self, folder: Path) -> str | None:
        """What to tell where `folder`, with the run's checkpoints so far, has too little room for
        the others."""
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


def disk_of(task: Task, cfg: RunConfig, final: int) -> Disk:
    """`final`: bytes of the whole model in fp32."""
    assert cfg.steps
    kept = (
        min(cfg.keep + cfg.keep_best, math.ceil(cfg.steps / cfg.save_every))
        if cfg.save_every
        else 0
    )
    return Disk(kept, task.checkpoint_bytes(), final)


def dry_run(task: Task, cfg: RunConfig, world: World, log: RunLog) -> None:
    """Print what the run would take of memory, time and disk."""
    assert cfg.steps
    rows, fits = task.rows_per_rank(cfg, world.size), estimate_fits(task, cfg, world)
    if cfg.micro_batch == "auto":
        cfg.micro_batch = largest_divisor(rows, fits) or 1
    memory = task.estimate(cfg, cfg.micro_batch, world.device.type, world.size)
    tokens, flops = cfg.steps * task.tokens_per_step(), task.flops_per_token()
    disk = disk_of(task, cfg, memory.weights)
    free = processes.available_memory(world.device, world.local_size)
    speed, source = known_speed(cfg, flops, world)
    log.say(
        "dry run: nothing is started or written "
        f"({task.describe_step(cfg.micro_batch, world.size)})\n"
    )
    log.banner(
        {
            f"memory, {f.name}": bytes_text(getattr(memory, f.name))
            for f in dataclasses.fields(memory)
        }
        | {"memory, peak of a rank": bytes_text(memory.total)}
        | {
            "free now for a rank": bytes_text(free)
            + ("" if fits(cfg.micro_batch) else ": too little")
        }
        | {"tokens": f"{tokens:,} in {cfg.steps:,} steps"}
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
    if shortage := disk.shortage(Path(cfg.out or "")):
        log.warn(shortage)


def known_speed(cfg: RunConfig, flops: int | None, world: World) -> tuple[float | None, str]:
    """Tokens per second of a run like this and how they are known."""
    try:
        text = (Path(cfg.out or "") / "log.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    speeds = numbers(
        [record for _, record in read_log(text) if record["kind"] == "train"], "tokens_per_second"
    )
    if speeds and (speed := statistics.median(speeds)) > 0:
        return speed, f"measured in {cfg.out}"
    peak = device_peak(world, cfg.precision)
    if peak and flops:
        return 0.4 * peak * world.size / flops, "assuming 40% of the data sheet's peak"
    return None, "no run in --out to take the speed from"


def device_peak(world: World, precision: str) -> float | None:
    return (
        peak_flops(processes.device_name(world.device), precision)
        if world.device.type == "cuda"
        else None
    )
