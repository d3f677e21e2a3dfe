"""How a run begins: whose its folder is, and which checkpoint it goes on from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base import files
from base.locks import locked_folder
from config import UserError
from engine.lengths import Extension, Length, as_json, extend, lengths_of
from storage.checkpoint import (
    MANIFEST,
    META,
    RECORD,
    RESULTS,
    WRITTEN,
    checkpoints,
    find_damage,
    newest_sound,
    remove_leftovers,
)


@dataclass
class Start:
    """How a run begins: afresh (no folder), from a checkpoint, or not at all."""

    folder: Path | None = None
    finished: bool = False
    micro_batch: int | None = None  # of the interrupted run: the same one gives the same bits
    # how long it is planned to be
    lengths: list[Length] = field(default_factory=list, compare=False)
    extended: bool = field(default=False, compare=False)  # whether this start made it longer
    notes: list[str] = field(default_factory=list, compare=False)  # what the log should hold of it


@contextlib.contextmanager
def claimed(run: Path) -> Generator[None]:
    """Make a run's folder and keep other processes out of it, the ranks that a killed torchrun left
    behind too."""
    with contextlib.ExitStack() as held:
        try:
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_folder(run))
        except BlockingIOError:
            raise UserError(
                f"{run} is in use by a run that still goes on; end it, or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to --out {run}: {error.strerror}") from None
        yield


def open_run(
    run: Path,
    resume: str,
    identity: dict[str, Any],
    facts: dict[str, Any],
    say: Callable[[str], None],
    extension: Extension | None = None,
) -> Start:
    """Find where a run begins and say whose its folder is. Raises UserError where that would lose
    or mix anything.

    `identity` holds, by option name, what a resumed run must have in common with the checkpoint;
    `facts` (options, versions) are stored beside it in run.json. Under an `extension` its steps may
    be more than they were.
    """
    start = Start()
    before = _record_of(run)
    if before is not None:
        if resume == "never":
            raise UserError(
                f"{run} already holds a run; choose another --out, or continue it with --resume "
                "auto"
            )
        start.lengths = lengths_of(before)
        start.notes += _same_run(identity, before["identity"], run, start.lengths, extension)
    if resume not in ("auto", "never"):
        start.folder = _resume_from(Path(resume), run, say)
    if before is not None:
        longer = extension and extension.to != start.lengths[-1].steps
        if _is_finished(run, start.lengths) and not longer:
            return Start(finished=True)
        remove_leftovers(run, say)
        start.micro_batch = _micro_batch_of(run)
    if start.folder is None:
        start.folder = _newest_sound(run, say)
    meta: dict[str, Any] | None = None
    if start.folder is not None:
        meta = json.loads((start.folder / META).read_text(encoding="utf-8"))
        start.lengths = start.lengths or lengths_of(meta)
        lacking = _same_run(identity, meta["identity"], start.folder, start.lengths, extension)
        start.notes += lacking if before is None else []
        start.micro_batch = meta["micro_batch"]
    if extension:
        _extend(start, run, meta, extension, say)
    start.lengths = start.lengths or [Length(0, identity.get("steps", 0))]
    record = {"identity": identity, "lengths": as_json(start.lengths)} | facts
    try:
        files.write_json(run / RECORD, record)
    except OSError as error:
        raise UserError(f"cannot write to --out {run}: {error.strerror}") from None
    return start


def _newest_sound(run: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, None where there is none yet. Raises UserError where all are
    damaged."""
    folder = newest_sound(run, say)
    if folder is None and checkpoints(run):
        raise UserError(f"no checkpoint of {run} is sound; begin again with another --out")
    return folder


def _extend(
    start: Start,
    run: Path,
    meta: dict[str, Any] | None,
    extension: Extension,
    say: Callable[[str], None],
) -> None:
    """Make a run longer from its checkpoint on. Raises UserError where it cannot go on from
    there."""
    if not start.lengths:
        raise UserError(
            f"--extend-to {extension.to}: {run} holds no run to continue; begin one with --steps"
        )
    planned, results = start.lengths[-1].steps, _results_of(run)
    if extension.to == planned:
        return
    if meta is None and results is not None:
        raise UserError(
            f"--extend-to {extension.to}: {run} has no checkpoint to go on from (its --save-every "
            "was 0, or they were "
            f"removed); begin a longer run with --out ANOTHER --steps {extension.to}"
        )
    step = meta["step"] if meta else 0
    if meta and 0 < extension.patience <= meta.get("not_better", 0):
        raise UserError(
            f"--extend-to {extension.to}: the run stopped early, after {meta['not_better']} "
            "evaluations without a better "
            f"one; add --patience {meta['not_better'] + extension.patience}, or 0 for none"
        )
    start.lengths, start.extended = extend(start.lengths, step, extension), True
    if results and step < results.get("steps", 0):
        say(f"the checkpoint of step {results['steps']} is gone: the run goes on from step {step}")
    restarted = (
        f"; the decay of the {extension.schedule} schedule restarts there"
        if start.lengths[-1].rescheduled
        else ""
    )
    start.notes.append(f"extended from {planned} to {extension.to} steps at step {step}{restarted}")


def _results_of(run: Path) -> dict[str, Any] | None:
    """metrics.json of a run that has ended, or None."""
    if not (run / "final" / MANIFEST).exists():
        return None
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def _is_finished(run: Path, lengths: Sequence[Length]) -> bool:
    """Whether a run has ended, and has not been made longer since; an older version wrote no
    planned_steps."""
    results = _results_of(run)
    return (
        results is not None and results.get("planned_steps", lengths[0].steps) == lengths[-1].steps
    )


def _record_of(run: Path) -> dict[str, Any] | None:
    """run.json of the run in a folder; None where there is no run."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        record["identity"].get("steps")
        lengths_of(record)
        return record
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{run / RECORD} is not of a run; choose another --out") from None
    except OSError:
        foreign = [name for name in WRITTEN if (run / name).exists()]
        if foreign:
            raise UserError(
                f"{run} holds a {foreign[0]} that is not of a run; choose another --out"
            ) from None
        return None


def _micro_batch_of(run: Path) -> int | None:
    """The micro-batch that a run without a checkpoint had already settled on."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["micro_batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resume_from(where: Path, run: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint that --resume FOLDER means: itself, or the newest of a run."""
    folder = newest_sound(where, say) if (where / "checkpoints").is_dir() else where
    if folder is None or not folder.is_dir():
        raise UserError(f"--resume {where}: no sound checkpoint there")
    reason = find_damage(folder)
    if reason is not None:
        raise UserError(f"--resume {folder}: {reason}")
    if not (folder / META).exists():
        raise UserError(
            f"--resume {folder}: a model without training state; start from it with --init {folder}"
        )
    if any(later.name > folder.name for later in checkpoints(run)):
        raise UserError(
            f"{run} holds later checkpoints than {folder.name}; choose another --out to branch off "
            "there"
        )
    return folder


def _same_run(
    now: dict[str, Any],
    then: dict[str, Any],
    folder: Path,
    lengths: Sequence[Length],
    extension: Extension | None,
) -> list[str]:
    """Raise UserError where two identities differ. Returns a note on what an older version did not
    write.

    A checkpoint may have been written under any of the run's `lengths`.
    """
    lacking = sorted(set(now) - set(then))
    differ = [
        name for name in now | then if name not in lacking and now.get(name) != then.get(name)
    ]
    planned = {length.steps for length in lengths}
    if (
        "steps" in differ
        and then["steps"] in planned
        and (extension or now["steps"] == lengths[-1].steps)
    ):
        differ.remove("steps")
    if differ:
        listed = ", ".join(
            f"{name} (was {_short(then.get(name))}, is {_short(now.get(name))})" for name in differ
        )
        raise UserError(f"{folder} is of another run: {listed}; {_advice(differ, now, lengths)}")
    if not lacking:
        return []
    return [
        f"the run was begun by an older version, which did not record {', '.join(lacking)}: not "
        "compared"
    ]


def _advice(differ: list[str], now: dict[str, Any], lengths: Sequence[Length]) -> str:
    if differ != ["steps"] or not lengths:
        return "give the same options or another --out"
    planned = lengths[-1].steps
    if now["steps"] < planned:
        return f"leave --steps out, or give --steps {planned} or another --out"
    return (
        f"to continue it past its planned end give --extend-to {now['steps']} in place of the "
        "longer --steps or --epochs "
        f"(with --reschedule, where the schedule has begun to decay), or another --out"
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
