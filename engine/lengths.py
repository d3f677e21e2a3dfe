"""The planned length of a run, and how --extend-to and --reschedule change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config import UserError
from engine.optim import Span, lr_multiplier, span_at


@dataclass(frozen=True)
class Length:
    """A plan for a run, made at step `at`: it will have `steps` steps in total."""

    at: int
    steps: int
    rescheduled: bool = False  # whether the decay of the learning rate restarts at step `at`


@dataclass(frozen=True)
class Extension:
    """The value of --extend-to, and the options that decide whether the run may be extended so."""

    to: int
    reschedule: bool
    schedule: str
    warmup: int
    min_lr: float
    patience: int = 0


def lengths_of(record: dict[str, Any]) -> list[Length]:
    """The plans of a run, oldest first, from run.json or a checkpoint's JSON."""
    stored: list[dict[str, Any]] = record.get("lengths") or [
        {"at": 0, "steps": record["identity"].get("steps", 0)}
    ]
    return [Length(**length) for length in stored]


def as_json(lengths: Sequence[Length]) -> list[dict[str, Any]]:
    """The plans as `lengths_of` reads them."""
    return [dataclasses.asdict(length) for length in lengths]


def spans(lengths: Sequence[Length]) -> list[Span]:
    """The spans of the learning-rate schedule: one, and one more for each restart of the decay."""
    found: list[Span] = []
    for length in lengths:
        if not found or length.rescheduled:
            found.append(Span(length.at, length.steps))
        else:
            found[-1] = Span(found[-1].begin, length.steps)
    return found


def extend(lengths: Sequence[Length], step: int, wanted: Extension) -> list[Length]:
    """Add a plan of `wanted.to` steps to the plans of a run that has made `step` steps.

    Raises UserError if that would shorten the run, or change the learning rate of steps that are
    done.
    """
    planned = lengths[-1].steps
    if wanted.to < planned:
        raise UserError(
            f"--extend-to {wanted.to}: the run is planned for {planned} steps already; give a "
            "larger number"
        )
    if wanted.to == planned:
        return list(lengths)
    if wanted.reschedule and wanted.schedule != "constant":
        return [*lengths, Length(step, wanted.to, rescheduled=True)]
    longer = [*lengths, Length(step, wanted.to)]
    if wanted.schedule == "constant" or (
        wanted.schedule == "wsd" and _same_rates(lengths, longer, step, wanted)
    ):
        return longer
    other = (
        ", or resume from a checkpoint before the decay: --resume FOLDER --out ANOTHER"
        if wanted.schedule == "wsd"
        else ""
    )
    raise UserError(
        f"--extend-to {wanted.to}: the {wanted.schedule} schedule decays towards step {planned}, "
        f"and at step {step} the decay has begun; add --reschedule to restart it there{other}"
    )


def _same_rates(
    before: Sequence[Length], after: Sequence[Length], step: int, wanted: Extension
) -> bool:
    """Whether the first `step` steps have the same learning rates under both plans."""

    def rates(lengths: Sequence[Length]) -> list[float]:
        over = spans(lengths)
        return [
            lr_multiplier(s, span_at(s, over), wanted.warmup, wanted.schedule, wanted.min_lr)
            for s in range(step)
        ]

    return rates(before) == rates(after)
