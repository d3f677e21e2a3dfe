"""Run commands in sessions of their own, with time limits and side by side, and end them cleanly."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

REPO = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds that interrupted commands get, because pytest must end its programs
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows ends a process in one way only
REAPED = 10.0  # seconds to wait for a killed command, which a driver may hold forever

Item = TypeVar("Item")


class Failed(Exception):
    """A command failed. Holds the line that names its error, and its exit code."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class TimeUp(Exception):
    """A command was stopped, or not started, because the time was over."""


_running: set[subprocess.Popen[bytes]] = set()  # commands that any thread of this process runs


def start(
    words: Sequence[str],
    output: Path,
    *,
    cores: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, on `cores` cores (None: all), with its output in a
    file. With an environment it runs in REPO."""
    with output.open("w", encoding="utf-8") as file, on_cores(cores):
        return subprocess.Popen(
            words,
            cwd=REPO if environment else None,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def why_it_failed(code: int, output: Path) -> str:
    """The signal that killed a command, or the line of its output that names its error."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return last_error(output.read_text(errors="replace", encoding="utf-8"), code)


def execute(
    words: Sequence[str],
    output: Path,
    until: float,
    *,
    cores: int | None = None,
    environment: Mapping[str, str] | None = None,
    first: signal.Signals = signal.SIGTERM,
    grace: float = 0.0,
) -> None:
    """Run a command and write its output to a file.

    The command has a session of its own and runs on `cores` cores (None: all). With an environment
    it runs in REPO. Raises Failed, or TimeUp at `until` (of time.monotonic). In the latter case the
    command gets the signal `first` and then `grace` seconds to save its work.
    """
    process = start(words, output, cores=cores, environment=environment)
    _running.add(process)
    try:
        code = process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeUp from None
    finally:
        end([process], first, grace)
        _running.discard(process)
    if code:
        raise Failed(why_it_failed(code, output), code)


def end(processes: Sequence[subprocess.Popen[bytes]], first: signal.Signals, grace: float) -> None:
    """End all processes of commands' sessions, such as torchrun's workers. With `grace` they get
    the signal `first` and that many seconds. Then they get SIGKILL, also if this is interrupted."""
    try:
        if grace:
            _signal_and_wait(processes, first, grace)
    finally:
        _signal_and_wait(processes, KILL, REAPED)


def _signal_and_wait(
    processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals, seconds: float
) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Windows has no sessions: there the process itself is ended, and it saves nothing.
            os.killpg(process.pid, number) if hasattr(os, "killpg") else process.kill()
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))


def side_by_side(work: Callable[[Item], object], items: Sequence[Item], at_once: int) -> None:
    """Process the items in threads, `at_once` at a time.

    When this process is interrupted, no further item starts and the running commands are ended.
    Without that the pool would wait for them before it raises.
    """
    with ThreadPoolExecutor(at_once) as pool:
        try:
            list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end(list(_running), signal.SIGINT, GRACE)
            raise


@contextlib.contextmanager
def on_cores(count: int | None) -> Generator[None]:
    """Inside, this process and its new children use only the first `count` cores (None: all)."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def last_error(output: str, code: int) -> str:
    """The line of a command's output that names its error. torchrun prints many lines after it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [
        line
        for line in lines
        if re.match(r"(\[\w+\]:?\s*)?(error|[\w.]*(Error|Exception)): ", line)
    ]
    named = [line for line in named if "ChildFailedError" not in line] or lines[-1:]
    return named[-1] if named else f"it ended with code {code}"
