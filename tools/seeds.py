"""Runs that differ in their seed only: their mean, and whether the difference of two groups is more
than chance.

The intervals and tests are Student's, which take the spread between seeds to be normal, and for
two groups of the same size in both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from tools.runs import RunFolder

LEVEL = 0.95  # of intervals; tests are two-sided at 1 - LEVEL
POWER = 0.8  # probability that `seeds_needed` seeds show a difference that is there
MOST_SEEDS = 1_000_000


def groups(runs: Sequence[RunFolder]) -> list[list[RunFolder]]:
    """The runs with the same configuration but for the seed, in the order of the runs.

    A run that did not record its options is alone. A run that repeats a seed is in another group,
    because it says nothing about the spread between seeds.
    """
    found: list[tuple[dict[str, Any], list[RunFolder]]] = []
    for run in runs:
        same, seed = run.configuration(), run.options.get("seed")
        for configuration, group in found:
            repeated = any(other.options.get("seed") == seed for other in group)
            if seed is not None and configuration == same and not repeated:
                group.append(run)
                break
        else:
            found.append((same, [run]))
    return [group for _, group in found]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """The mean of a figure over seeds, its standard deviation, and the 95 % t-interval of the mean.
    With one seed the last two are None."""
    from scipy import stats

    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return {"seeds": n, "mean": mean, "sd": None, "interval": None}
    sd = statistics.stdev(values)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return {"seeds": n, "mean": mean, "sd": sd, "interval": [mean - margin, mean + margin]}


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """The difference of two groups' means (first minus second), its 95 % interval and its p by the
    t-test with a pooled variance, and the seeds in each group that would show it, see
    `seeds_needed`. All but the difference are None if no group has two seeds."""
    from scipy import stats

    between = statistics.fmean(first) - statistics.fmean(second)
    freedom = len(first) + len(second) - 2
    if not freedom:
        return {"difference": between, "interval": None, "p": None, "seeds_needed": None}
    squares = sum((len(each) - 1) * statistics.variance(each) for each in _repeated(first, second))
    sd = math.sqrt(squares / freedom)
    error = sd * math.sqrt(1 / len(first) + 1 / len(second))
    margin = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(between) / error, freedom)) if error else float(between == 0)
    return {
        "difference": between,
        "interval": [between - margin, between + margin],
        "p": p,
        "seeds_needed": seeds_needed(between, sd),
    }


def _repeated(*groups: Sequence[float]) -> list[Sequence[float]]:
    return [group for group in groups if len(group) > 1]


def seeds_needed(difference: float, sd: float) -> int | None:
    """The seeds in each of two groups with which a t-test (two-sided, 5 %) finds a true difference
    of this size with a probability of 80 %. sd: the standard deviation between seeds. None if more
    than a million would be needed."""
    low, high = 1, 2
    while power(difference, sd, high) < POWER:
        low, high = high, 2 * high
        if high > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, sd, middle) >= POWER else (middle, high)
    return high


def power(difference: float, sd: float, n: int) -> float:
    """The probability that a t-test of two groups of n seeds finds a true difference."""
    from scipy import stats

    shift = abs(difference) / sd * math.sqrt(n / 2) if sd else math.inf * abs(difference or 0.0)
    if math.isnan(shift):  # no spread and no difference
        return 0.0
    freedom = 2 * n - 2
    limit = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    if shift > 30 + limit:  # scipy's tail of so large a shift is not reliable
        return 1.0
    return float(stats.nct.sf(limit, freedom, shift))
