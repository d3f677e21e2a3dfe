"""Reads the rows that a task's options name: training, validation and --predict rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.description import Description
from text.overlap import Overlap, kept_overlap, overlap
from text.rows import Row, count_duplicates, hold_out, read_rows


class Source:
    """Reads the files of --data, --val-data and --predict for a task.

    `warnings` collects what the user should know about the files. The log records them at the
    start of the run.
    """

    def __init__(self, task: Description, cfg: Any, say: Callable[[str], None]):
        self.task, self.cfg, self.say = task, cfg, say
        self.warnings: list[str] = []

    def read(self, spec: str, split: str) -> list[Row]:
        """The rows of a file.

        split: "train", "validation" or "test". "test" means --predict: no row is dropped, and a
        row that cannot be read has a fault instead. Raises UserError for data that cannot be used.
        """
        task, cfg = self.task, self.cfg
        if spec == "toy":
            return task.toy_rows()
        # The option --FIELD-column names the column of a field.
        columns = {
            name: getattr(cfg, f"{name}_column", None) or usual
            for name, usual in task.columns.items()
        }
        answered = split == "test"
        found = read_rows(
            spec,
            columns,
            optional=task.optional + (task.answer_fields if answered else ()),
            strict=cfg.strict,
            split=split,
            lines=getattr(cfg, "lines", False),
            readers=task.readers,
            expand=task.expand,
            say=self.say,
            keep_broken=answered,
            nameable=[name for name in task.columns if hasattr(cfg, f"{name}_column")],
        )
        what = "their answers are empty" if answered else "are left out"
        if unread := found.skipped - found.empty:
            self.warnings.append(f"{spec}: {unread:,} rows could not be read and {what}")
        if found.empty:
            self.warnings.append(f"{spec}: {found.empty:,} rows have an empty field and {what}")
        if task.preprocess is None:
            return found.rows
        return task.preprocess(self, found.rows, spec, split)

    @functools.cached_property
    def predict_rows(self) -> list[Row]:
        """Every row of --predict, in order. Tasks read it before training, so that a mistake in the
        file does not waste a training run."""
        return self.read(self.cfg.predict, "test")

    def training_and_validation(self) -> tuple[list[Row], list[Row]]:
        """The training and validation rows. Without --val-data, a tenth of --data is held out."""
        cfg, group = self.cfg, self.task.group or self.task.content
        train = self.read(cfg.data, "train")
        if cfg.val_data:
            return train, self.read(cfg.val_data, "validation")
        if cfg.data == "toy":
            return train, train
        kept, held = hold_out([group(row) for row in train])
        return [train[i] for i in kept], [train[i] for i in held]

    def count_overlap(self, train: Sequence[Row], val: Sequence[Row]) -> int:
        """How many training rows are also in --val-data (0 without --val-data)."""
        if not self.cfg.val_data:
            return 0
        return count_duplicates(
            *([self.task.content(row) for row in rows] for rows in (train, val))
        )

    def find_shared(self, rows: Sequence[str], training: Sequence[str]) -> Overlap:
        """Which texts `rows` share an n-gram with a `training` text. A dry run writes no cache."""
        if self.cfg.dry_run:
            return overlap(rows, training)
        return kept_overlap(rows, training, Path(self.cfg.cache), self.say)
