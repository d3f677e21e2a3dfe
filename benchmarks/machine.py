"""The machine that a benchmark runs on, and the memory that its processes take."""

from __future__ import annotations

import hashlib
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from base.commands import REPO
from base.machine import total_bytes

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "litgpt",
    "liger-kernel",
    "cut-cross-entropy",
    "nvmath-python",
)
# beginnings of the environment variables that can change figures
SETTINGS = ("MALLOC_", "GLIBC_", "PYTORCH_", "LD_PRE", "OMP_", "THP_")


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function` in a new process and return its result. The caller then does not load torch,
    whose memory its child processes would inherit."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def facts(device: str) -> dict[str, Any]:
    """The device to use, the precision native to it, the hardware and the versions. Raises
    UserError if there is no such device."""
    import torch

    from engine import processes
    from engine.precision import choose_precision

    found = processes.start(device).device
    gpu = torch.cuda.get_device_properties(found) if found.type == "cuda" else None
    return {
        "device": found.type,
        "native": choose_precision("auto", found)[0],
        "hardware": {
            "gpu": gpu and gpu.name,
            "gpu_memory_bytes": gpu and gpu.total_memory,
            "cpu": processes.device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "memory_bytes": total_bytes(),
        },
        "driver": driver(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | versions(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def versions() -> dict[str, str]:
    """The versions of the installed packages that can change figures."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def engine_hash() -> str:
    """A short hash of the source that a run of the engine executes."""
    packages = ("base", "storage", "kernels", "text", "decoding", "engine")
    files = [file for name in packages for file in (REPO / name).glob("*.py")]
    files = sorted([*REPO.glob("*.py"), *files])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def driver() -> str | None:
    """The version of the GPU's driver, or None without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.partition("\n")[0].strip() or None


def forget_peak(device: str) -> bool:
    """Reset the peak memory to what is in use now. Returns False if the system cannot."""
    import torch

    from engine.memory import trim

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    trim()  # return freed memory to the system, so that using it again counts
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
