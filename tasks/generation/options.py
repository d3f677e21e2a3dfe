"""Options of tasks whose answers are texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from config import CountOrNone, Weight
from decoding.options import DecodeConfig, check_decode
from tasks.options import FinetuneConfig

Objective = Literal["unlikelihood"]


@dataclass(frozen=True)
class GenerationConfig(DecodeConfig, FinetuneConfig):
    """Options of a task whose answers are texts."""

    objective: tuple[Objective, ...] = ()
    """Loss terms besides the likelihood: unlikelihood."""
    unlikelihood: Weight = 1.0
    """Weight of the unlikelihood term."""
    eval_rows: CountOrNone = 64
    """Validation rows to decode in an evaluation, from the first on; 0: none (the loss is always of
    all)."""

    def check(self) -> None:
        super().check()
        check_decode(self)
