"""What benchmarks that start commands share: a command within a limit, how it failed, and the
files of a report."""

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
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from base.files import write_json
from benchmarks.table import markdown
from config import UserError

REPO = Path(__file__).resolve().parent.parent
REAPED = 10.0  # seconds to wait for a killed command: a driver may hold it for good


class Failed(Exception):
    """A command failed: the line that names its error."""


class TimeUp(Exception):
    """A command was cut off, or not begun, because the time was over."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def at_least(options: Any, **least: float) -> None:
    """Raise UserError for an option below its least value; None is one that was not given."""
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} is {given}; it must be at least {value:g}")


# --- commands


def execute(
    words: Sequence[str], output: Path, until: float, cores: int | None = None, grace: float = 0.0
) -> None:
    """Run a command to its end, its output in a file.

    Raises Failed, or TimeUp at `until` (of time.monotonic), when it first gets SIGTERM and has
    `grace` seconds to save what it has.
    """
    process = start(words, output, cores)
    try:
        code = process.wait(None if until == math.inf else max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise TimeUp from None
    finally:
        end(process, signal.SIGTERM, grace)
    if code < 0:
        raise Failed(f"killed by {signal.Signals(-code).name}")
    if code:
        raise Failed(last_error(output.read_text(errors="replace", encoding="utf-8"), code))


def start(
    words: Sequence[str],
    output: Path,
    cores: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, on some of the cores or all, its output in a
    file."""
    with output.open("w", encoding="utf-8") as file, on_cores(cores):
        return subprocess.Popen(
            words,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes], first: signal.Signals, grace: float) -> None:
    """End what is left of a command's session, as torchrun's workers: by the signal `first`, and
    after `grace` seconds, if any, by SIGKILL."""
    for number, patience in ((first, grace), (signal.SIGKILL, REAPED)):
        if patience:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


@contextlib.contextmanager
def on_cores(count: int | None) -> Generator[None]:
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
    """The line that names the error: torchrun adds many after it."""
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
    """`folder` with these parts, which git passes over. Raises UserError."""
    try:
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """None for a file that is missing or torn: its writer may have been killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


Row = Mapping[str, Any]  # the figures of one row of a table
Column = tuple[str, Callable[[Row], str]]  # its head, and the text of a row's cell


def table(columns: Sequence[Column], rows: Sequence[Row], words: Collection[str] = ()) -> str:
    """A Markdown table without the columns that are empty in all rows. `words` are the heads of the
    columns, besides the first, that hold no numbers."""
    cells = {head: [cell(row) for row in rows] for head, cell in columns}
    cells = {head: texts for head, texts in cells.items() if any(texts)}
    left = [n for n, head in enumerate(cells) if n == 0 or head in words]
    return markdown(list(cells), zip(*cells.values(), strict=True), left)


def write_report(folder: Path, stem: str, result: Any, text: str) -> None:
    """Write stem.json and stem.md."""
    write_json(folder / f"{stem}.json", result)
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
