"""Says in about ten seconds what this machine will do with this engine, without training.

python -m tools.doctor

It gathers the facts of the machine, finds what they mean (tools/findings.py), times the operations
of the default run, and predicts its speed.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from base.cli import entry_point, parse
from base.console import bytes_text, time_text
from base.errors import reason
from base.machine import cores
from config import PathOrName, Preset, ResolvedTrain, TrainConfig, resolved
from tools.findings import INTERNAL, Finding, Gpu, Machine, check, disk, findings

if TYPE_CHECKING:
    from engine.processes import World

HUB_SECONDS = 3.0
SMI_SECONDS = 10.0
FIELDS = (
    "uuid",
    "driver_version",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "power.limit",
    "power.default_limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks_throttle_reasons.active",
)


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine will do with this engine, without training. Exit code 0: nothing is
    broken; 1: something is."""

    preset: Preset | None = None
    """Shape of the run whose speed is predicted. Default: the one that train_gpt2.py takes here."""
    out: PathOrName | None = None
    """Folder that the run would write. Default: the one that train_gpt2.py takes."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the run."""


def main() -> int:
    """Run the command. Returns the exit code."""
    cfg = parse(DoctorConfig, sys.argv[1:])
    from engine import processes

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with warnings.catch_warnings():  # PyTorch warns of what is found below
        warnings.simplefilter("ignore")
        world = processes.start(cfg.device)
        machine = gather(world.device.type, load, ask_driver=cfg.device != "cpu")
    found = findings(machine)
    show(found)
    if broken(found):
        print("\nno speed is predicted before that is repaired")
        return 1
    return int(broken(examine(cfg, world)))


def show(found: Sequence[Finding]) -> None:
    """Print a line for each finding, and below it what to type."""
    for finding in found:
        print(f"{finding.state:<7} {finding.subject:<14} {finding.text}")
        if finding.type:
            print(f"{'':<22} type: {finding.type}")


def broken(found: Sequence[Finding]) -> bool:
    """Whether one of the findings is that something is broken."""
    return any(finding.state == "broken" for finding in found)


# --- the run


def examine(cfg: DoctorConfig, world: World) -> list[Finding]:
    """Print findings about the run that would start here, and its speed. Returns the findings."""
    from engine import plan
    from engine.fit import estimate_fits, largest_divisor, peak_memory
    from engine.pretraining import LanguageModelling

    task = LanguageModelling()
    options = TrainConfig(preset=cfg.preset, out=cfg.out, device=cfg.device)
    options, choices = plan.resolve_for_machine(options, world)
    facts = task.setup(options, lambda text: None, dry=True)
    run = resolved(options, ResolvedTrain)
    batch = largest_divisor(facts.rows_per_rank(1), estimate_fits(facts, run, world))
    memory = peak_memory(facts, run, batch or 1, world)
    needed = plan.disk_of(task, facts, run, memory.weights).needed()
    refused = choices.fallback, "slow", f"{choices.fallback}", "add --kernels torch"
    little = f"one sequence takes {bytes_text(memory.total)}"
    advice = "add --recompute, or --preset micro"
    found = [
        *check("precision", f"{run.precision} ({choices.precision})"),
        *check("attention", choices.attention),
        *check("kernels", run.kernels, refused),
        *check(
            "memory",
            f"a run takes {bytes_text(memory.total)}",
            (not batch, "broken", little, advice),
        ),
        *folder("--out", run.out, needed),
        *folder("--cache", run.cache),
    ]
    show(found)
    if not batch:
        return found
    print(f"\ntiming this machine's operations for about {plan.TIMED:.0f} seconds", flush=True)
    speed, ceilings = plan.expected_speed(facts, run, world, batch)
    took = time_text(run.steps * facts.tokens_per_step / speed.tokens_per_second)
    print(
        f"measured: products {ceilings.flops / 1e9:,.0f} GFLOP/s, memory "
        f"{ceilings.bandwidth / 1e9:,.1f} GB/s\n"
        f"expect {speed.tokens_per_second:,.0f} tokens/s, give or take {speed.share:.0%}\n"
        f"(from {ceilings.source})\n"
        f"({run.preset}, {run.steps:,} steps in {took}; a step: "
        f"{plan.describe_step(facts, batch, 1)})"
    )
    return found


def folder(option: str, path: str, needed: int = 0) -> list[Finding]:
    """Findings about a folder, or about the nearest one above it that exists."""
    absolute = Path(path).absolute()
    there = next(part for part in (absolute, *absolute.parents) if part.is_dir())
    writable = os.access(there, os.W_OK | os.X_OK)
    return disk(option, path, writable, shutil.disk_usage(there).free, needed)


# --- the machine


def gather(device_type: str, load: float, ask_driver: bool) -> Machine:
    """The facts of this machine for a run on a kind of device."""
    import torch
    import torch.cuda.nccl
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    from engine.compiling import compiler_problem
    from kernels._triton import triton

    smi, rows = _smi() if ask_driver else ("not asked, by --device cpu", [])
    count = torch.cuda.device_count() if device_type == "cuda" else 0
    cudnn, cudnn_problem = "", ""
    try:
        cudnn = str(torch.backends.cudnn.version())
    except RuntimeError as error:  # another version than PyTorch was built with
        cudnn_problem = reason(error)
    return Machine(
        python=tuple(sys.version_info[:3]),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton and triton.__version__,
        triton_wanted=_wanted_triton(),
        driver=rows[0]["driver_version"] if rows else "",
        smi=smi,
        gpus=[_gpu(torch.cuda.get_device_properties(i), rows) for i in range(count)],
        archs=torch.cuda.get_arch_list(),
        cudnn=cudnn,
        cudnn_problem=cudnn_problem,
        shadows=_shadows(),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if count > 1 else "",
        interfaces=[name for _, name in socket.if_nameindex()],
        unlinked=sum(
            not torch.cuda.can_device_access_peer(a, b)
            for a, b in itertools.combinations(range(count), 2)
        ),
        environment=os.environ,
        compiler=compiler_problem(device_type),
        cores=cores(),
        threads=torch.get_num_threads(),
        load=load,
        vectors=torch.backends.cpu.get_cpu_capability(),
        best_vectors="AVX512" * torch.cpu._is_avx512_supported()
        or "AVX2" * torch.cpu._is_avx2_supported(),
        glibc="glibc" in platform.libc_ver(),
        hub=ENDPOINT,
        offline=HF_HUB_OFFLINE,
        hub_problem="" if HF_HUB_OFFLINE else _hub_problem(ENDPOINT),
    )


def _smi() -> tuple[str, list[dict[str, str]]]:
    """Why nvidia-smi tells nothing ("" if it does), and its fields for each card."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except FileNotFoundError:
        return "there is no nvidia-smi", []
    except (OSError, subprocess.TimeoutExpired) as error:
        return reason(error, whole=True), []
    lines = [line.split(", ") for line in done.stdout.splitlines()]
    rows = [dict(zip(FIELDS, line)) for line in lines if len(line) == len(FIELDS)]
    return ("", rows) if rows else ((done.stdout + done.stderr).strip().partition("\n")[0], [])


def _gpu(card: Any, rows: list[dict[str, str]]) -> Gpu:
    smi = next((row for row in rows if row["uuid"] == f"GPU-{card.uuid}"), {})
    return Gpu(card.name, (card.major, card.minor), smi)


def _shadows() -> Mapping[str, bool]:
    """Libraries in LD_LIBRARY_PATH that PyTorch brings along, and whether this process has loaded
    them from there."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        loaded = ""
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    files = [file for folder in folders for name in INTERNAL
             for file in sorted(Path(folder).glob(f"lib{name}.so*"))[:1]]  # fmt: skip
    return {str(file): str(file.resolve()) in loaded for file in files}


def _wanted_triton() -> str | None:
    """The version of Triton that this build of torch was made for."""
    needs = " ".join(importlib.metadata.requires("torch") or [])
    found = re.search(r"\btriton==([\d.]+)", needs)
    return found[1] if found else None


def _hub_problem(hub: str) -> str:
    """Why the hub does not answer within a few seconds; "" if it does."""
    found = [f"no answer in {HUB_SECONDS:.0f} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(hub, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            found.append("")
        except urllib.error.HTTPError as error:
            found.append(f"status {error.code}" if error.code >= 500 else "")
        except (OSError, ValueError) as error:
            found.append(reason(getattr(error, "reason", None) or error, whole=True))

    # A thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return found[-1]


if __name__ == "__main__":
    entry_point(main)
