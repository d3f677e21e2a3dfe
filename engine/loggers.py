"""Services that show a run's figures beside log.jsonl: Weights & Biases and TensorBoard."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """What a run needs of a service. Any method may raise any error: the run goes on without it."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Record the numbers of one line of the log, named kind/field."""

    def close(self) -> None:
        """Write what is pending."""


class Wandb:
    """Weights & Biases: offline without a key, and the same wandb run after a resume."""

    def __init__(self, folder: Path, config: Mapping[str, Any], warn: Callable[[str], None]):
        import wandb

        offline = not (os.environ.get("WANDB_API_KEY") or _has_netrc_key())
        mode: Any = os.environ.get("WANDB_MODE") or ("offline" if offline else "online")
        if mode == "offline":
            warn(f"wandb logs offline under {folder}/wandb; upload later with: wandb sync")
        self.run = wandb.init(
            project="gpt2",
            name=folder.name,
            # The id depends on the folder, so that a resumed run continues its wandb run.
            id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12],
            resume="allow",
            dir=str(folder),
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(init_timeout=30, silent=True, console="off"),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See Logger."""
        self.run.log({**numbers, "step": step})

    def close(self) -> None:
        """See Logger."""
        self.run.finish()


class TensorBoard:
    """Event files under the run's folder, for `tensorboard --logdir`."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], warn: Callable[[str], None], step: int
    ):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides what an interrupted run logged after its checkpoint.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        rows = "".join(f"| {name} | {value} |\n" for name, value in config.items())
        self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", step)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See Logger."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Logger."""
        self.writer.close()


def _has_netrc_key() -> bool:
    path = Path.home() / ".netrc"
    return path.is_file() and "api.wandb.ai" in path.read_text(errors="replace", encoding="utf-8")
