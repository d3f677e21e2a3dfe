"""Options of preference tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from config import PathOrName, PathsOrNames, Positive, Range, UserError
from decoding.options import DecodeConfig, check_decode
from tasks.options import FinetuneConfig


@dataclass(frozen=True)
class PreferencesConfig(DecodeConfig, FinetuneConfig):
    """Options of a preference task."""

    beta: Positive = 0.1
    """How strongly training holds the model to the reference: a reward is this times the change of
    an answer's log-probability. Small values allow large changes."""
    label_smoothing: Annotated[float, Range(0, 0.4999)] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round."""
    reference: PathOrName | None = None
    """The model that rewards compare with: a hub id, a folder in the hub's layout or a run's folder.
    Default: --init, from which training starts. --epochs 0 needs it."""
    cache: PathOrName = "data/cache"
    """Folder that keeps the reference's log-probabilities, and which rows of a large data set are
    shared with the training rows."""
    predict: PathsOrNames | None = None
    """After training, write the rewards of this file's pairs, and which answer the model
    prefers."""

    def check(self) -> None:
        """Raise UserError for options that cannot be combined, including those of decoding."""
        super().check()
        check_decode(self)
        if self.predict and not self.trains and not self.reference:
            raise UserError(
                "--epochs 0 answers --predict with --init alone, and rewards compare it with another "
                "model; name the model that its training started from with --reference"
            )
