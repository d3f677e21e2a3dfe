"""Options of generation tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from config import CountOrNone, UserError, Weight
from decoding.options import DecodeConfig, check_decode
from tasks.options import FinetuneConfig

Objective = Literal["unlikelihood"]


@dataclass(frozen=True)
class GenerationConfig(DecodeConfig, FinetuneConfig):
    """Options of a generation task."""

    objective: tuple[Objective, ...] = ()
    """Loss terms in addition to the likelihood: unlikelihood."""
    unlikelihood: Weight = 1.0
    """Weight of the unlikelihood term."""
    pack: bool = False
    """Put several rows into one sequence of a training batch, if fewer tokens are computed then. No
    row reads another, and positions begin anew, so the loss is the same."""
    eval_rows: CountOrNone = 64
    """Number of validation rows to decode in an evaluation, from the first row on. The validation
    loss always uses all rows."""

    def check(self) -> None:
        """Raise UserError for options that cannot be combined, including those of decoding."""
        super().check()
        check_decode(self)
        if self.pack and (self.objective or self.method in ("prefix", "soft-prompt")):
            raise UserError(
                "--pack keeps rows apart for the likelihood of a model's own positions alone; leave "
                "out --pack, or --objective and the methods prefix and soft-prompt"
            )
