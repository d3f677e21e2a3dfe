"""The options that every fine-tuning run has."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.options import MethodConfig
from config import Count, CountOrNone, PathOrName, PathsOrNames, RunConfig


@dataclass(frozen=True)
class FinetuneConfig(MethodConfig, RunConfig):
    """Options of a fine-tuning run. None means a value that suits the machine. The banner shows
    the value that was chosen."""

    init: PathOrName = "gpt2"
    """Where the weights come from: a hub id, a folder in the hub's GPT-2 layout, a run's folder, or
    scratch (random weights)."""
    data: PathsOrNames | None = None
    """Training rows: files (comma-separated or globs), a hub dataset id, or toy, a few rows that
    the task brings. Default: toy."""
    val_data: PathsOrNames | None = None
    """Validation rows, in the same forms as --data. Default: a fixed tenth of --data is held
    out."""
    seq_len: Count | None = None
    """Longest row in tokens. Default: what the model has room for (256 from scratch)."""
    epochs: CountOrNone = 3
    """Passes over the training rows. --steps overrides it. 0 trains nothing and only answers
    --predict. --data then names the training rows, for clean scores."""
    batch_size: Count = 16
    """Rows in an optimizer step, over all ranks."""
    keep: Count = 1
    """Newest checkpoints to keep, in addition to the best."""
    keep_best: Count = 3
    """Best checkpoints to keep, by the metric that also chooses the final model."""
    strict: bool = False
    """Stop with an error at a row that cannot be read or does not fit. Without it such rows are
    left out or truncated, and counted in a warning."""
    show_rows: CountOrNone = 2
    """Rows of the first batch to print. The text that the model learns is marked."""
    cache: PathOrName = "data/cache"
    """Folder that keeps which rows of a large data set are shared with the training rows."""
    predict: PathsOrNames | None = None
    """Answer the rows of this file after training. They are also scored if the file has the true
    answers."""
    answers: PathOrName | None = None
    """File for the answers to --predict. Default: predictions.* in the run's folder."""

    @property
    def trains(self) -> bool:
        """Whether the run trains at all. `--epochs 0` without --steps only answers --predict."""
        return bool(self.epochs or self.steps)

    def training_files(self) -> tuple[str | None, ...]:
        """The files that training and validation read, so that --answers overwrites none."""
        return self.data, self.val_data
