"""The stages of benchmarks.stages as data, and how a machine runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config import OPTIMIZATIONS
from kernels import KERNELS


@dataclass(frozen=True)
class Settings:
    """The engine's options that some stage changes, with the values of the baseline."""

    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False
    clip: float = 0.0
    without: tuple[str, ...] = tuple(OPTIMIZATIONS)
    kernels: tuple[str, ...] = ()
    cuda_graphs: bool = False
    # micro-batches in a step, over all ranks. None, here and below: the plan's value.
    accumulation: int | None = 1
    ranks: int | None = 1
    micro_batch: int | None = None
    steps: int | None = None
    profile: bool = False


@dataclass(frozen=True)
class Stage:
    """One optimization: what it changes, and what it needs."""

    name: str
    adds: str
    # new values of Settings; "with" removes names from `without`, "kernel" adds one to `kernels`
    change: dict[str, Any]
    needs: str = ""  # a key of Machine.lacks; a kernel needs the key of its name
    by_design: bool = False  # the stage changes the loss on purpose
    branch: bool = False  # never the engine's default, so the next stage does not build on it


LADDER = (
    Stage(
        "cpu", "the baseline on the CPU", dict(device="cpu", micro_batch=1, steps=4), "", True, True
    ),
    Stage("baseline", "fp32, operation by operation, without all that follows", {}, "", True),
    Stage("tied-head", "the output head is the token embedding", {"with": ["tied-head"]}, "", True),
    Stage(
        "scaled-init",
        "weights of 0.02, residual projections less",
        {"with": ["scaled-init"]},
        "",
        True,
    ),
    Stage(
        "cpu-products", "fp32 products by oneDNN on a CPU", {"with": ["cpu-products"]}, "products"
    ),
    Stage("tf32", "matrix products in TF32", dict(precision="tf32"), "tf32"),
    Stage("bf16", "autocast to bf16", dict(precision="bf16"), "bf16"),
    Stage("compile", "torch.compile", dict(compile=True), "compiler"),
    Stage("flash-attention", "no (T, T) matrix in memory", {"with": ["flash-attention"]}),
    Stage("padded-vocab", "rows of the embedding: a multiple of 128", {"with": ["padded-vocab"]}),
    Stage("clip", "gradients clipped at norm 1.0", dict(clip=1.0), "", True),
    Stage(
        "adamw",
        "no decay of vectors, fused AdamW",
        {"with": ["decay-groups", "fused-adamw"]},
        "",
        True,
    ),
    Stage("accumulation", "several micro-batches a step", dict(accumulation=None), "", True),
    Stage(
        "ddp", "DistributedDataParallel through torchrun", dict(ranks=None), "ranks", branch=True
    ),
    Stage(
        "attention-backend",
        "attention by hardware: cuDNN's",
        {"with": ["attention-backend"]},
        "backend",
    ),
    Stage("cpu-attention", KERNELS["cpu_attention"].about, dict(kernel="cpu_attention")),
    Stage(
        "cast-once",
        "weights cast once a step, a bf16 residual stream",
        {"with": ["cast-once"]},
        "bf16",
    ),
    Stage("chunked-head", "head and loss a chunk of rows at a time", {"with": ["chunked-head"]}),
    Stage(
        "kept-memory", "freed memory is kept for the next step", {"with": ["kept-memory"]}, "heap"
    ),
    *(
        Stage(f"triton-{name.replace('_', '-')}", kernel.about, dict(kernel=name))
        for name, kernel in KERNELS.items()
        if kernel.device == "cuda"
    ),
    Stage(
        "cuda-graphs",
        "the compiled step replayed from graphs",
        dict(cuda_graphs=True),
        "graphs",
        branch=True,
    ),
    Stage("fp8", "the blocks' products in FP8", dict(precision="fp8"), "fp8", branch=True),
)


@dataclass(frozen=True)
class Machine:
    """The machine that is measured."""

    device: str  # cpu or cuda
    name: str  # the name that the hardware reports
    threads: int
    cores: int
    devices: int  # GPUs, or 1
    memory: int  # bytes of a GPU, or of the machine
    lacks: dict[str, str]  # needs of stages that this machine lacks, with the reason
    kernels: tuple[str, ...]  # the engine's default kernels here
    facts: dict[str, Any]  # hardware and versions


@dataclass(frozen=True)
class Plan:
    """The settings that all stages share."""

    preset: str
    seq_len: int
    micro_batch: int
    accumulation: int  # micro-batches in a step, from the stage accumulation on
    ranks: int  # processes of the stage ddp
    steps: int
    data: str
    tokenizer: str | None
    vocabulary: int
    flops_per_token: int


@dataclass(frozen=True)
class Rung:
    """A stage with its settings on this machine."""

    stage: Stage
    settings: Settings
    before: str | None = None  # the stage that it is compared with
    kept: bool = False  # the next stage builds on it
    by_design: bool = False  # its loss may differ from that of `before`
    skipped: str | None = None  # the reason


def apply(change: Mapping[str, Any], settings: Settings) -> Settings:
    """`settings` with the changes of a stage."""
    change = dict(change)
    added, kernel = change.pop("with", ()), change.pop("kernel", None)
    without = tuple(name for name in settings.without if name not in added)
    kernels = (*settings.kernels, kernel) if kernel else settings.kernels
    return dataclasses.replace(settings, without=without, kernels=kernels, **change)


def stays(stage: Stage, machine: Machine) -> bool:
    """Whether the engine does this by default here. If not, the stage is a branch."""
    if "kernel" in stage.change:
        return stage.change["kernel"] in machine.kernels
    if "compile" in stage.change:
        return machine.device == "cuda"
    return not stage.branch


def ladder(
    machine: Machine, only: Sequence[str] | None = None, failed: Iterable[str] = ()
) -> list[Rung]:
    """The stages in `only` (None: all) for this machine, each on top of all kept stages before it.

    No stage builds on a failed one, and none is compared with one that is not in `only`.
    """
    rungs: list[Rung] = []
    # design: whether a kept stage since `before` changes the loss on purpose
    settings, before, design = (Settings(device=machine.device), None, False)
    for stage in LADDER:
        if stage.name == "cpu" and machine.device == "cpu":
            continue  # the baseline already runs on the CPU
        wanted = only is None or stage.name in only
        mine, kept = apply(stage.change, settings), stays(stage, machine)
        reason = machine.lacks.get(stage.change.get("kernel", stage.needs))
        if mine.cuda_graphs and not mine.compile:
            reason = reason or "needs compile"
        if wanted:
            rung = Rung(stage, mine, before, kept, design or stage.by_design)
            rungs.append(Rung(stage, settings, skipped=reason) if reason else rung)
        if reason or stage.name in failed:
            continue
        if kept:
            settings, design = mine, design or stage.by_design
        # the baseline is compared with the CPU but takes no settings from it
        if wanted and (kept or stage.name == "cpu"):
            before, design = stage.name, False
    return rungs


def default_settings(machine: Machine, failed: Iterable[str] = ()) -> Settings:
    """The settings of the last kept stage, which are the engine's defaults here."""
    return [
        rung
        for rung in ladder(machine, None, failed)
        if rung.kept and rung.stage.name not in failed
    ][-1].settings


# --- scaling over ranks


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def scaling_points(most: int) -> dict[str, list[tuple[int, int]]]:
    """The (ranks, micro-batches per rank) to measure, up to `most` ranks.

    Weak scaling gives each rank one micro-batch. Strong scaling divides `most` micro-batches among
    the ranks.
    """
    return {
        "weak": [(n, 1) for n in divisors(most)],
        "strong": [(n, most // n) for n in divisors(most)],
    }
