"""Run the commands of a benchmark, with time limits and side by side, and read and write its
files."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from base.files import replace_text, write_json
from config import UserError
from engine.log import read_log

REPO = Path(__file__).resolve().parent.parent
GRACE = 10.0  # seconds that interrupted commands get, because pytest must end its programs
REAPED = 10.0  # seconds to wait for a killed command, which a driver may hold forever

Item = TypeVar("Item")


class Failed(Exception):
    """A command failed. Holds the line that names its error, and its exit code."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class TimeUp(Exception):
    """A command was stopped, or not started, because the time was over."""


def say(text: str) -> None:
    """Report progress on standard error. Standard output is for the results."""
    print(text, file=sys.stderr, flush=True)


def now() -> str:
    """The local time with its offset, as ISO 8601 text."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def at_least(options: Any, **least: float) -> None:
    """Raise UserError for an option below its smallest allowed value. An option that is None was
    not given."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} is {given}; it must be at least {value:g}")


# --- commands

_running: set[subprocess.Popen[bytes]] = set()  # commands that any thread of this process runs


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
    with output.open("w", encoding="utf-8") as file, on_cores(cores):
        process = subprocess.Popen(
            words,
            cwd=REPO if environment else None,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    _running.add(process)
    try:
        code = process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeUp from None
    finally:
        end(process, first, grace)
        _running.discard(process)
    if code < 0:
        raise Failed(f"killed by {signal.Signals(-code).name}", code)
    if code:
        raise Failed(last_error(output.read_text(errors="replace", encoding="utf-8"), code), code)


def end(process: subprocess.Popen[bytes], first: signal.Signals, grace: float) -> None:
    """End all processes of a command's session, such as torchrun's workers. With `grace` they get
    the signal `first` and that many seconds. Then they get SIGKILL."""
    for number, patience in ((first, grace), (signal.SIGKILL, REAPED)):
        if patience:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


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
            for process in list(_running):
                end(process, signal.SIGINT, GRACE)
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


# --- files


def make_folders(folder: Path, parts: Sequence[str]) -> None:
    """Create the subfolders `parts`, which git ignores. Raises UserError."""
    try:
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file. None if the file is missing or incomplete, because its writer may
    have been killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def records(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log.jsonl. A last line cut off by a kill is skipped. Raises
    UserError if there is no log."""
    path = folder / "log.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise UserError(
            f"{folder} is not the folder of a run: it has no log.jsonl that can be read"
        ) from None
    return [record for _, record in read_log(text)]


def write_report(file: Path, result: Any, text: str) -> None:
    """Write a JSON file, and a Markdown file beside it for people."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    replace_text(file.with_suffix(".md"), text)
