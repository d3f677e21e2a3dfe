"""Options of generation tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from config import CountOrNone, Weight
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
    eval_rows: CountOrNone = 64
    """Number of validation rows to decode in an evaluation, from the first row on. The validation
    loss always uses all rows."""

    def check(self) -> None:
        """Raise UserError for options that cannot be combined, including those of decoding."""
        super().check()
        check_decode(self)
