"""What a run says: the banner, the step line, log.jsonl, the progress bar, Weights & Biases.

Only rank 0 speaks; the other ranks hold a RunLog that is silent.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from base import console
from base.console import bytes_text, time_text
from base.files import replace_text


class RunLog:
    """Console and log.jsonl of one run. `folder` is None on every rank but 0 (and before the run
    has one)."""

    def __init__(self, speaks: bool):
        self.speaks = speaks
        self.file: Any = None
        self.unwritten = b""  # lines that log.jsonl had no room for
        self.failed = False
        self.told_lost = False  # that standard output cannot be written
        self.wandb: Any = None
        self.progress: Any = None
        self.lock = threading.RLock()  # the checkpoint writer logs from its own thread

    # --- the console

    def say(self, text: str = "") -> None:
        if not self.speaks:
            return
        with self.lock:
            if self.progress is not None:
                self.progress.console.print(
                    text, markup=False, emoji=False, highlight=False, soft_wrap=True
                )
            else:
                print(text, flush=True)
        self._note_lost()

    def _note_lost(self) -> None:
        """Log, once, that nobody sees what is said."""
        reason = console.output_error()
        if reason and not self.told_lost and self.file is not None:
            self.told_lost = True
            text = f"standard output cannot be written ({reason}); training goes on without it"
            self.record("warning", {"step": None, "text": text})

    def banner(self, rows: Mapping[str, str]) -> None:
        """Names and values, aligned."""
        width = max(map(len, rows))
        for name, value in rows.items():
            self.say(f"  {name:<{width}}  {value}")
        self.say()

    def start_progress(self, steps: int, done: int) -> None:
        """A live bar where someone watches; elsewhere the step lines alone."""
        if not self.speaks or not sys.stdout.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            transient=True,
        )
        self.progress.add_task("steps", total=steps, completed=done, eta="-")
        self.progress.start()

    def step(self, record: dict[str, Any], steps: int, eta: float, show: bool) -> None:
        """Log one optimizer step; `show` prints its line, `eta` is in seconds."""
        self.record("train", record)
        if not self.speaks:
            return
        if self.progress is not None:
            self.progress.update(
                self.progress.task_ids[0], completed=record["step"], eta=time_text(eta)
            )
        if show:
            self.say(step_line(record, steps, eta))

    # --- the files

    def open(self, folder: Path, keep_until: int | None, done: tuple[str, ...] = ()) -> None:
        """Start or continue folder/log.jsonl, cutting what lies past the checkpoint of step
        `keep_until`."""
        if not self.speaks:
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
        """One line of log.jsonl; numbers that JSON cannot hold become null."""
        if self.file is None:
            return
        line = {"kind": kind, "time": round(time.time(), 3)} | fields
        with self.lock:
            self.unwritten += json.dumps(finite(line)).encode() + b"\n"
            full = self._write()
            self._to_wandb(line)
        if full:
            self.say(
                f"warning: log.jsonl cannot be written ({full}); its lines are kept until it can"
            )

    def _write(self) -> OSError | None:
        """Write what log.jsonl lacks; the error where that begins to fail (a full disk may not end
        a run)."""
        failed, self.failed = self.failed, False
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            self.failed = True
            return None if failed else error
        return None

    def warn(self, text: str, step: int | None = None) -> None:
        """A fallback, a skipped update, anything that the user should know: printed and logged."""
        self.say(f"warning: {text}")
        self.record("warning", {"step": step, "text": text})

    def stop_progress(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def close(self) -> None:
        self.stop_progress()
        if self.wandb is not None:
            self._guard(self.wandb.finish)
        if self.file is not None:
            self._write()
            if self.unwritten:
                self.say("warning: log.jsonl lacks its last lines")
            self.file.close()
            self.file = None

    # --- Weights & Biases, which may never stop a run

    def start_wandb(self, folder: Path, config: dict[str, Any]) -> None:
        if not self.speaks:
            return

        def start() -> None:
            import wandb

            offline = not (os.environ.get("WANDB_API_KEY") or _has_netrc_key())
            mode: Any = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
            if mode == "offline":
                self.warn(f"wandb logs offline under {folder}/wandb; upload later with: wandb sync")
            settings = wandb.Settings(init_timeout=30, silent=True, console="off")
            self.wandb = wandb.init(
                project="gpt2",
                name=folder.name,
                id=_wandb_id(folder),
                resume="allow",
                dir=str(folder),
                mode=mode,
                config=config,
                settings=settings,
            )

        self._guard(start)

    def _to_wandb(self, line: dict[str, Any]) -> None:
        if self.wandb is not None and line.get("step") is not None:
            numbers = {
                f"{line['kind']}/{k}": v
                for k, v in line.items()
                if isinstance(v, int | float) and k not in ("step", "time")
            }
            self._guard(lambda: self.wandb.log(numbers | {"step": line["step"]}))

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # whatever wandb does, training goes on without it
            self.wandb = None
            self.warn(
                f"wandb stopped ({type(error).__name__}: {error}); training goes on without it"
            )


def step_line(record: Mapping[str, Any], steps: int, eta: float) -> str:
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
    """Lines of a log.jsonl and the records in them, without what is torn by a kill or not of this
    project."""
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


def _is_step(value: Any) -> bool:
    return value is None or (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
    )


def numbers(records: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """The finite values of a field, of the records that have one."""
    values = (record.get(name) for record in records)
    return [float(v) for v in values if _is_number(v)]


def _is_number(value: Any) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # false for what is not a number too, and no integer too large to be a float passes
    return abs(value) < 1e300


def kept_lines(text: str, until: int, done: tuple[str, ...]) -> list[str]:
    """The whole lines of a log up to step `until`; of that step's evaluation and sample only what
    was `done`."""
    kept = []
    for line, record in read_log(text):
        step = record.get("step") or 0
        act = {"stopped_early": "eval"}.get(record.get("kind"), record.get("kind"))
        redone = act in ("eval", "sample") and act not in done
        if step < until or (step == until and not redone):
            kept.append(line + "\n")
    return kept


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: null where a number is infinite or none at all."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def _wandb_id(folder: Path) -> str:
    """The same run folder continues the same wandb run."""
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


def _has_netrc_key() -> bool:
    path = Path.home() / ".netrc"
    return path.is_file() and "api.wandb.ai" in path.read_text(errors="replace", encoding="utf-8")
