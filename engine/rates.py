"""The speed of a run, its remaining time, and its share of the hardware's peak."""

from __future__ import annotations

import statistics
import time

WINDOW = 50  # the remaining time is estimated from so many of the newest steps


class Rates:
    """Amounts per second (tokens, padded_tokens, rows) of each step since this start."""

    def __init__(self, flops: int | None, peak: float | None):
        """`flops`: FLOPs per token. `peak`: FLOP/s of all ranks together. None: unknown."""
        self.flops, self.peak = flops, peak
        self.by_amount: dict[str, list[float]] = {}
        self.clock = time.perf_counter()  # when the last step ended

    def restart_clock(self) -> None:
        """Exclude the time since the last step, which was spent on something else."""
        self.clock = time.perf_counter()

    def step(self, amounts: dict[str, float]) -> tuple[float, dict[str, float]]:
        """Seconds that the step took, which ends now, and its amounts per second."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        rates = {name: amount / seconds for name, amount in amounts.items()}
        for name, rate in rates.items():
            self.by_amount.setdefault(name, []).append(rate)
        return seconds, rates

    def eta(self, steps: int, tokens: float) -> float:
        """Seconds that `steps` more steps of `tokens` tokens each will take."""
        a_token = statistics.median(1 / rate for rate in self.by_amount["tokens"][-WINDOW:])
        return steps * a_token * tokens

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilization: the model's FLOP/s as a share of the peak. None: unknown."""
        return tokens_per_second * self.flops / self.peak if self.flops and self.peak else None

    def medians(self) -> dict[str, float]:
        """The median of each rate over all steps since this start."""
        return {name: statistics.median(rates) for name, rates in self.by_amount.items()}


def per_second(rates: dict[str, float]) -> dict[str, float]:
    """The rates under their names in the log, such as tokens_per_second."""
    return {f"{name}_per_second": rate for name, rate in rates.items()}
