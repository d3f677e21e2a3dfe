"""Where a run stands: step, tokens, metrics and losses so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LAST_LOSSES = 10  # steps over which a run's training loss is the mean


@dataclass
class Progress:
    """A checkpoint's JSON holds it, beside the tensors; a resumed run goes on from there."""

    step: int = 0  # optimizer steps done
    tokens: float = 0
    skipped: int = 0  # updates that were not finite
    skipped_in_a_row: int = 0
    done: list[str] = field(default_factory=list)  # of this step's evaluation and sample
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best_metric: float | None = None  # of this very step, where it was evaluated
    best_so_far: float | None = None  # of the metrics of all evaluations
    not_better: int = 0  # evaluations since that one, none of them better
    # of the last steps, whose mean is the run's result
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # spent in optimizer steps

    def completed(self) -> None:
        """One more step is done, and nothing of what is due after it."""
        self.step += 1
        self.done, self.best_metric = [], None

    def measured(self, loss: float, tokens: float, seconds: float) -> None:
        """Add the figures of a step."""
        self.tokens += tokens
        self.seconds += seconds
        self.losses = [*self.losses, loss][-LAST_LOSSES:]

    def updated(self, ok: bool) -> None:
        """Count the step's update; `ok` False: it was not finite and so was skipped."""
        self.skipped += not ok
        self.skipped_in_a_row = 0 if ok else self.skipped_in_a_row + 1

    def evaluated(self, metrics: dict[str, float], name: str, mode: str) -> None:
        """Note this step's metrics, and whether the one of that name is the best so far ("min" or
        "max")."""
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
    """Of two figures of a metric whose best is its "min" or its "max"."""
    return value < than if mode == "min" else value > than
