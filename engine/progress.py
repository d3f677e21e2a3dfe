"""The progress of a run: its step, tokens, metrics and losses so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LAST_LOSSES = 10  # a run's training loss is the mean over this many last steps


@dataclass
class Progress:
    """Counts and figures that a checkpoint holds as JSON, and that a resumed run continues."""

    step: int = 0  # optimizer steps done
    tokens: float = 0
    skipped: int = 0  # updates that were skipped because they were not finite
    skipped_in_a_row: int = 0
    done: list[str] = field(default_factory=list)  # "eval" and "sample", if done after this step
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best_metric: float | None = None  # the task's metric after this step, if it was evaluated
    best_so_far: float | None = None  # the best value of that metric in all evaluations
    not_better: int = 0  # evaluations since the best one
    losses: list[float] = field(default_factory=list)  # of the last steps
    seconds: float = 0.0  # spent in optimizer steps

    def completed(self) -> None:
        """Count a completed step, after which nothing has been done yet."""
        self.step += 1
        self.done, self.best_metric = [], None

    def measured(self, loss: float, tokens: float, seconds: float) -> None:
        """Add the loss, tokens and seconds of a step."""
        self.tokens += tokens
        self.seconds += seconds
        self.losses = [*self.losses, loss][-LAST_LOSSES:]

    def updated(self, ok: bool) -> None:
        """Count whether the step's update was skipped (not `ok`)."""
        self.skipped += not ok
        self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1

    def evaluated(self, metrics: dict[str, float], name: str, mode: str) -> None:
        """Record this step's metrics, and whether metrics[name] is the best so far. `mode` is "min"
        or "max"."""
        self.metrics = metrics
        now = metrics[name]
        self.best_metric = now if math.isfinite(now) else None
        if self.best_metric is not None and (
            self.best_so_far is None or is_better(now, self.best_so_far, mode)
        ):
            self.best_so_far, self.not_better = now, 0
        else:
            self.not_better += 1


def is_better(value: float, than: float, mode: str) -> bool:
    """Whether a metric's value is better than another, by its mode "min" or "max"."""
    return value < than if mode == "min" else value > than
