"""The machine below PyTorch: its cores and its memory, on Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

UNKNOWN_MEMORY = 8 << 30  # bytes that a machine is taken to have where the system does not say


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
    """Memory that this process occupies now (where the system does not say, the most it has
    occupied)."""
    return _statm(1) or _max_rss()


def peak_resident_bytes() -> int:
    """The most memory that this process has occupied."""
    # Linux's getrusage may give the peak of the process that started this one, so its status file
    # is asked first.
    return _kilobytes("/proc/self/status", "VmHWM") or _max_rss()


def available_bytes() -> int:
    """Memory of the machine that is free, or can be freed at once."""
    return _kilobytes("/proc/meminfo", "MemAvailable") or total_bytes() // 2


def total_bytes() -> int:
    """Memory of the machine."""
    if not hasattr(os, "sysconf"):  # Windows
        return UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def address_space_left() -> int | None:
    """Bytes that this process may still map under its limit (ulimit -v); None where it has no
    limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else max(0, soft - _statm(0))


def _statm(field: int) -> int:
    """Bytes of a field of /proc/self/statm: 0, the address space; 1, what is resident. 0 where
    there is none."""
    try:
        return int(
            Path("/proc/self/statm").read_text(encoding="utf-8").split()[field]
        ) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _kilobytes(file: str, key: str) -> int:
    """Bytes that a line `key: N kB` of a file under /proc says; 0 where there is none."""
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
