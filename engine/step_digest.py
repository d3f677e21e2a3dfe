"""What the log says of a step's bits, for `tools.verify`."""

from __future__ import annotations

from collections.abc import Callable

from engine.digest import BATCH, start_digest
from engine.step import StepResult, TrainStep
from storage import checkpoint


def start_digests(step: TrainStep, result: StepResult, due: bool) -> Callable[[], dict[str, str]]:
    """Start to compute what the log says of a step's bits: the checksum of its batches, taken out
    of the amounts, and the digest of the parameters if something is `due` or --digest-every says
    so."""
    batch = {"batch": f"{int(result.amounts.pop(BATCH)):08x}"}
    every, done = step.cfg.digest_every, step.weights_step or 0
    if not (step.world.main and every and (due or done % every == 0)):
        return lambda: batch
    digest = start_digest(checkpoint.without_prefix(step.state(), "model"))
    return lambda: batch | {"parameters": digest()}
