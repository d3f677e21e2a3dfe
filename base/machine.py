"""The machine's CPU cores and memory, on Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

UNKNOWN_MEMORY = 8 << 30  # bytes that are assumed if the system does not tell


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
    """Resident memory of this process in bytes. If the system does not tell it, the peak."""
    return _statm(1) or _max_rss()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    # Linux's getrusage may return the peak of the parent process, so the status file is read first.
    return _kilobytes("/proc/self/status", "VmHWM") or _max_rss()


def available_bytes() -> int:
    """Bytes of the machine's memory that are free or can be freed at once."""
    return _kilobytes("/proc/meminfo", "MemAvailable") or total_bytes() // 2


def total_bytes() -> int:
    """Bytes of memory that the machine has."""
    if not hasattr(os, "sysconf"):  # Windows
        return UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def address_space_left() -> int | None:
    """Bytes that this process may still map under its limit (ulimit -v); None without a limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else max(0, soft - _statm(0))


def _statm(field: int) -> int:
    """Bytes in a field of /proc/self/statm: 0 is the address space, 1 the resident memory.

    Returns 0 if there is no such file.
    """
    try:
        return int(
            Path("/proc/self/statm").read_text(encoding="utf-8").split()[field]
        ) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _kilobytes(file: str, key: str) -> int:
    """Bytes in the line `key: N kB` of a file under /proc; 0 if there is no such line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _max_rss() -> int:
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
