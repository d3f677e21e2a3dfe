"""The machine's CPU cores and memory, on Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows
    resource = None


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    # Linux's getrusage may return the peak of the parent process, so the status file is read first.
    return _peak_in_status() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def available_bytes() -> int:
    """Bytes of the machine's memory that are free or can be freed at once."""
    return psutil.virtual_memory().available


def total_bytes() -> int:
    """Bytes of memory that the machine has."""
    return psutil.virtual_memory().total


def address_space_left() -> int | None:
    """Bytes that this process may still map under its limit (ulimit -v); None without a limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    return max(0, soft - psutil.Process().memory_info().vms)


def _peak_in_status() -> int:
    """The peak resident memory in /proc/self/status, in bytes; 0 if there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
