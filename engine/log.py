"""The output of a run: banner, step lines, log.jsonl, progress bar, and other loggers.

Only rank 0 prints and writes. The other ranks have a RunLog that does nothing.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from base import console
from base.console import bytes_text, time_text
from base.files import replace_text
from config import UserError
from engine.loggers import Logger


class RunLog:
    """Console and log.jsonl of one run. Records are written from `open` on, and only if
    `enabled`."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.file: Any = None
        self.unwritten = b""  # lines that could not be written yet, on a full disk
        self.failed = False
        self.warned_lost_output = False
        self.loggers: dict[str, Logger] = {}
        self.bar: Any = None
        self.lock = threading.RLock()  # the checkpoint writer logs from its own thread

    # --- the console

    def say(self, text: str = "") -> None:
        """Print a line, above the progress bar if there is one."""
        if not self.enabled:
            return
        with self.lock:
            if self.bar is not None:
                self.bar.console.print(
                    text, markup=False, emoji=False, highlight=False, soft_wrap=True
                )
            else:
                print(text, flush=True)
        self._note_lost()

    def _note_lost(self) -> None:
        """Log, once, that standard output cannot be written."""
        reason = console.output_error()
        if reason and not self.warned_lost_output and self.file is not None:
            self.warned_lost_output = True
            text = f"standard output cannot be written ({reason}); training goes on without it"
            self.record("warning", {"step": None, "text": text})

    def banner(self, rows: Mapping[str, str]) -> None:
        """Print names and values in two aligned columns."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.say(f"  {name:<{width}}  {value}")
        self.say()

    def start_progress(self, steps: int, done: int) -> None:
        """Show a progress bar, if standard output is a terminal."""
        if not self.enabled or not sys.stdout.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            transient=True,
        )
        self.bar.add_task("steps", total=steps, completed=done, eta="-")
        self.bar.start()

    def step(self, record: dict[str, Any], steps: int, eta: float, every: int | None) -> None:
        """Log one optimizer step, and print the line of each `every`-th (0: none; None: each at a
        terminal, elsewhere about a hundred in all). `eta` is in seconds."""
        self.record("train", record)
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=record["step"], eta=time_text(eta))
        if every is None:
            every = 1 if self.bar is not None else max(1, steps // 100)
        if every and (record["step"] % every == 0 or record["step"] == steps):
            self.say(step_line(record, steps, eta))

    # --- the files

    def open(self, folder: Path, keep_until: int | None, done: tuple[str, ...] = ()) -> None:
        """Start folder/log.jsonl, or continue it after its lines up to step `keep_until`, that of
        the checkpoint (see `kept_lines`). None: delete all old lines."""
        if not self.enabled:
            return
        path = folder / "log.jsonl"
        if path.exists():
            lines = (
                []
                if keep_until is None
                else kept_lines(
                    path.read_text(encoding="utf-8", errors="replace"), keep_until, done
                )
            )
            replace_text(path, "".join(lines))
        self.file = path.open("ab", buffering=0)

    def record(self, kind: str, fields: dict[str, Any]) -> None:
        """Write one line of log.jsonl. Numbers that JSON cannot hold become null."""
        if self.file is None:
            return
        line = {"kind": kind, "time": round(time.time(), 3)} | fields
        with self.lock:
            self.unwritten += json.dumps(json_safe(line)).encode() + b"\n"
            full = self._write()
            self._to_loggers(line)
        if full:
            self.say(
                f"warning: log.jsonl cannot be written ({full}); its lines are kept until it can be"
            )

    def _write(self) -> OSError | None:
        """Write the pending lines. A full disk must not end a run, so an error is returned, and
        only the first in a row."""
        failed, self.failed = self.failed, False
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            self.failed = True
            return None if failed else error
        return None

    def warn(self, text: str, step: int | None = None) -> None:
        """Print and log a warning, such as a fallback or a skipped update."""
        self.say(f"warning: {text}")
        self.record("warning", {"step": step, "text": text})

    def stop_progress(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def close(self) -> None:
        """Finish the bar, the loggers and log.jsonl. Warn if lines of it could not be written."""
        self.stop_progress()
        for name, logger in list(self.loggers.items()):
            self._guard(name, logger.close)
        if self.file is not None:
            self._write()
            if self.unwritten:
                self.say("warning: the last lines of log.jsonl could not be written")
            self.file.close()
            self.file = None

    # --- other services, whose errors must never stop a run

    def start_logger(self, name: str, start: Callable[[], Logger]) -> None:
        """Log to another service too."""
        if self.enabled:
            self._guard(name, lambda: self.loggers.__setitem__(name, start()))

    def _to_loggers(self, line: dict[str, Any]) -> None:
        step = line.get("step")
        if not self.loggers or step is None:
            return
        numbers = {
            f"{line['kind']}/{k}": float(v)
            for k, v in line.items()
            if isinstance(v, int | float) and k not in ("step", "time")
        }
        for name, logger in list(self.loggers.items()):
            self._guard(name, lambda logger=logger: logger.log(numbers, step))

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # any error of the service's
            self.loggers.pop(name, None)
            self.warn(
                f"{name} stopped ({type(error).__name__}: {error}); training goes on without it"
            )


def step_line(record: Mapping[str, Any], steps: int, eta: float) -> str:
    """The printed line of a step's record, with `eta` in seconds."""
    step, mfu = record["step"], record["mfu"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps} {100 * step / steps:5.1f}%",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:.3f}",
        f"{record['step_ms']:,.0f} ms",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{record['rows_per_second']:,.1f} rows/s" if "rows_per_second" in record else "",
        f"mfu {100 * mfu:.1f}%" if mfu is not None else "",
        bytes_text(record["memory_bytes"]),
        f"eta {time_text(eta)}",
    ]
    return " | ".join(part for part in parts if part)


def read_log(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The lines of a log.jsonl with their records. Leaves out lines that a kill cut short or that
    this project did not write."""
    found = []
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(record, dict)
            and isinstance(record.get("kind"), str)
            and _is_step(record.get("step"))
        ):
            found.append((line, record))
    return found


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


def _is_step(value: Any) -> bool:
    return value is None or (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
    )


def finite_values(records: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The values of one field in all records that have a finite number there."""
    values = (record.get(name) for record in records)
    return [float(v) for v in values if _is_number(v)]


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # False for NaN, and for an integer that is too large for a float.
    return abs(value) < 1e300


def kept_lines(text: str, until: int, done: tuple[str, ...]) -> list[str]:
    """The lines of a log up to step `until`. Its evaluation and sample after that step are kept
    only if `done` names them, for otherwise they are repeated."""
    kept = []
    for line, record in read_log(text):
        step = record.get("step") or 0
        act = {"stopped_early": "eval"}.get(record.get("kind"), record.get("kind"))
        redone = act in ("eval", "sample") and act not in done
        if step < until or (step == until and not redone):
            kept.append(line + "\n")
    return kept


def json_safe(value: Any) -> Any:
    """Replace infinities and NaN by None, also inside dicts, lists and tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    return [json_safe(v) for v in value] if isinstance(value, list | tuple) else value
