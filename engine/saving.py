"""Checkpoints of a run. A thread writes the loop's state and prunes older checkpoints, and the log
tells whether that succeeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from base.console import bytes_text
from config import Resolved
from engine.log import RunLog
from engine.step import load_weights
from engine.task import Task
from storage import checkpoint
from storage.checkpoint import Saver


class Checkpoints:
    """Writes and prunes the checkpoints of a run, on rank 0."""

    def __init__(
        self,
        run: Path,
        task: Task,
        export_model: nn.Module,
        cfg: Resolved,
        log: RunLog,
        saved: int | None,
    ):
        """`export_model`: a copy of the model without weights, for the writer. `saved`: the
        step of the newest checkpoint, if there is one."""
        self.run, self.task, self.export_model, self.cfg, self.log = (
            run,
            task,
            export_model,
            cfg,
            log,
        )
        self.saved = saved
        self.saver = Saver(run, self._export, self._report, log.say)

    def save(self, state: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write the checkpoint of step facts["step"] in the background. Returns when `state` has
        been copied."""

        def prune() -> None:
            cfg, mode = self.cfg, self.task.best[1]
            checkpoint.prune(self.run, facts["step"], cfg.keep, mode, cfg.keep_best, self.log.say)

        self.saver.save(state, facts, prune)

    def join(self) -> None:
        """Wait until the current checkpoint is written."""
        self.saver.join()

    @property
    def error(self) -> BaseException | None:
        """Why the newest checkpoint could not be written, or None."""
        return self.saver.error

    def _export(self, weights: dict[str, Tensor], folder: Path) -> None:
        load_weights(self.export_model, weights, self.task.stored, assign=True)
        self.task.export(self.export_model, folder, stored_only=True)

    def _report(self, step: int, folder: str, error: str | None = None, **facts: float) -> None:
        """Log that a checkpoint was written or has failed. The writer's thread calls this."""
        if error:
            self.log.warn(
                f"the checkpoint of step {step} could not be written ({error}); older ones remain",
                step,
            )
            return
        self.saved = step
        self.log.record("checkpoint", {"step": step, "folder": folder, **facts})
        size, blocked, write = bytes_text(facts["bytes"]), facts["blocked_ms"], facts["write_ms"]
        self.log.say(
            f"saved {folder}: {size}, training blocked {blocked:.0f} ms, written in {write:.0f} ms"
        )
