"""Decides how a run starts: whether its folder is free, and which checkpoint it resumes from."""

from __future__ import annotations

import contextlib
import json
import re
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
    """How a run starts: from scratch, from a checkpoint, or not at all because it is finished."""

    folder: Path | None = None  # the checkpoint to resume from
    finished: bool = False
    micro_batch: int | None = None  # the interrupted run's; only the same one gives the same bits
    # the plans of the run, oldest first
    lengths: list[Length] = field(default_factory=list, compare=False)
    extended: bool = field(default=False, compare=False)  # whether --extend-to made the run longer
    notes: list[str] = field(default_factory=list, compare=False)  # warnings to print and log


@contextlib.contextmanager
def claim_folder(run: Path) -> Generator[None]:
    """Create a run's folder and lock it against other processes, including ranks that a killed
    torchrun left behind."""
    with contextlib.ExitStack() as held:
        try:
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked_folder(run))
        except BlockingIOError:
            raise UserError(
                f"{run} is in use by a run that is still going; stop it, or choose another --out"
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
    """Find where a run starts, and write run.json, which makes the folder this run's.

    `identity`: what a resumed run must have in common with the checkpoint, by option name. `facts`
    (versions, the command and so on) are stored with it in run.json. With an `extension` the steps
    may be more than before. Raises UserError if files would be lost or two runs mixed.
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
        if is_finished(run, start.lengths) and not longer:
            return Start(finished=True)
        remove_leftovers(run, say)
        start.micro_batch = _micro_batch_of(run)
    if start.folder is None:
        start.folder = _newest_sound(run, say)
    meta: dict[str, Any] | None = None
    if start.folder is not None:
        meta = json.loads((start.folder / META).read_text(encoding="utf-8"))
        start.lengths = start.lengths or lengths_of(meta)
        unrecorded = _same_run(identity, meta["identity"], start.folder, start.lengths, extension)
        start.notes += unrecorded if before is None else []
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
    """The checkpoint to resume from, or None if there is none yet. Raises UserError if all are
    damaged."""
    folder = newest_sound(run, say)
    if folder is None and checkpoints(run):
        raise UserError(f"every checkpoint of {run} is damaged; start again with another --out")
    return folder


def _extend(
    start: Start,
    run: Path,
    meta: dict[str, Any] | None,
    extension: Extension,
    say: Callable[[str], None],
) -> None:
    """Extend a run from its checkpoint. Raises UserError if that is not possible."""
    if not start.lengths:
        raise UserError(
            f"--extend-to {extension.to}: {run} holds no run to extend; start one with --steps"
        )
    planned, results = start.lengths[-1].steps, _results_of(run)
    if extension.to == planned:
        return
    if meta is None and results is not None:
        raise UserError(
            f"--extend-to {extension.to}: {run} has no checkpoint to resume from (its --save-every "
            "was 0, or they were removed); start a longer run with --out ANOTHER --steps "
            f"{extension.to}"
        )
    step = meta["step"] if meta else 0
    if meta and 0 < extension.patience <= meta.get("not_better", 0):
        raise UserError(
            f"--extend-to {extension.to}: the run stopped early, after {meta['not_better']} "
            "evaluations without a better one; add --patience "
            f"{meta['not_better'] + extension.patience}, or --patience 0 to never stop early"
        )
    start.lengths, start.extended = extend(start.lengths, step, extension), True
    if results and step < results["steps"]:
        say(f"the checkpoint of step {results['steps']} is gone: the run resumes from step {step}")
    restarted = (
        f"; the decay of the {extension.schedule} schedule restarts there"
        if start.lengths[-1].rescheduled
        else ""
    )
    start.notes.append(f"extended from {planned} to {extension.to} steps at step {step}{restarted}")


def _results_of(run: Path) -> dict[str, Any] | None:
    """metrics.json of a finished run. None if the run is not finished. Raises UserError if it is
    damaged."""
    if not (run / "final" / MANIFEST).exists():
        return None
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        results = None
    if not isinstance(results, dict) or "steps" not in results:
        raise UserError(
            f"{run / RESULTS} is damaged; remove it: the same command then continues from the last "
            "checkpoint and writes it again"
        )
    return results


def is_finished(run: Path, lengths: Sequence[Length]) -> bool:
    """Whether a run has ended and has not been extended since. An older version wrote no
    planned_steps."""
    results = _results_of(run)
    return (
        results is not None and results.get("planned_steps", lengths[0].steps) == lengths[-1].steps
    )


def _record_of(run: Path) -> dict[str, Any] | None:
    """run.json of a run's folder. None if the folder holds no run. Raises UserError if it holds
    something else."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        record = None
    except OSError:
        foreign = [name for name in WRITTEN if (run / name).exists()]
        if foreign:
            raise UserError(
                f"{run} holds a {foreign[0]} that does not belong to a run; choose another --out"
            ) from None
        return None
    if not is_of_a_run(record):
        raise UserError(f"{run / RECORD} does not belong to a run; choose another --out")
    return record


def is_of_a_run(record: Any) -> bool:
    """Whether a value has what a run writes into run.json."""
    try:
        record["identity"].get("steps")
        return bool(lengths_of(record))
    except (KeyError, TypeError, AttributeError):
        return False


def _micro_batch_of(run: Path) -> int | None:
    """The micro-batch in config.json, for a run that had started but has no checkpoint."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["micro_batch"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _resume_from(where: Path, run: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint that --resume FOLDER means: the folder itself, or the newest one of a run."""
    folder = newest_sound(where, say) if (where / "checkpoints").is_dir() else where
    if folder is None or not folder.is_dir():
        raise UserError(f"--resume {where}: there is no undamaged checkpoint; check the path")
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
    """Raise UserError if two identities differ. Returns notes on what an older version did not
    record and so cannot be compared.

    A checkpoint may have been written under any of the run's `lengths`.
    """
    # None is an option that is not used: the older version did not have it either.
    unrecorded = sorted(name for name in set(now) - set(then) if now[name] is not None)
    differ = [
        name for name in now | then if name not in unrecorded and now.get(name) != then.get(name)
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
    if not unrecorded:
        return []
    return [
        "the run was started by an older version, which did not record "
        f"{', '.join(unrecorded)}: not compared"
    ]


def _advice(differ: list[str], now: dict[str, Any], lengths: Sequence[Length]) -> str:
    if differ != ["steps"] or not lengths:
        return "give the same options or another --out"
    planned = lengths[-1].steps
    if now["steps"] < planned:
        return f"leave --steps out, or give --steps {planned} or another --out"
    return (
        f"to continue it past its planned end give --extend-to {now['steps']} in place of the "
        "longer --steps or --epochs (with --reschedule if the schedule has begun to decay), or "
        "another --out"
    )


def _short(value: Any) -> str:
    """The value as text, in which sha256 hashes are shortened."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", str(value))
