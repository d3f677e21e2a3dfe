"""Options of every fine-tuning run."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.options import MethodConfig
from config import Count, CountOrNone, RunConfig, Where, Wheres


@dataclass(frozen=True)
class FinetuneConfig(MethodConfig, RunConfig):
    """Options of a fine-tuning run. None means: what suits the machine (the banner says what was
    chosen)."""

    init: Where = "gpt2"
    """Start from: a hub id, a folder in the hub's GPT-2 layout or written by a run, or scratch."""
    data: Wheres | None = None
    """Files of rows, comma-separated or globs, a hub dataset id, or toy: the task's own few rows
    (the default)."""
    val_data: Wheres | None = None
    """Validation rows, in the same forms. Default: a fixed tenth of the rows."""
    seq_len: Count | None = None
    """Longest row in tokens. Default: what the model has room for (from scratch 256)."""
    epochs: CountOrNone = 3
    """Passes over the rows; --steps sets the length of the run in place of it."""
    batch_size: Count = 16
    """Rows in an optimizer step, over all ranks."""
    keep: Count = 1
    """Newest checkpoints to keep, beside the best."""
    keep_best: Count = 3
    """Best checkpoints to keep, by the metric that also chooses the final model."""
    strict: bool = False
    """End at a row that cannot be read or does not fit, in place of counting and leaving it out."""
    show_rows: CountOrNone = 2
    """Rows of the first batch to print, what is learned marked."""
    predict: Wheres | None = None
    """When trained, answer the rows of this file; scores too, where it holds the true answers."""
    answers: Where | None = None
    """File to write those answers to. Default: predictions.* in the run's folder."""

    @property
    def trains(self) -> bool:
        return bool(self.epochs or self.steps)

    def training_files(self) -> tuple[str | None, ...]:
        """What is read to train and to validate."""
        return self.data, self.val_data
