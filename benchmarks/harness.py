"""What all comparisons share: contenders take turns, ratios are of the same turn, and a result file
is written after each case.

A benchmark says what is compared: its cases, its contenders (functions that take a turn each), the
check that they agree, and the columns of its table. The trade-off of turns: each contender finds
the caches as another left them, which is also what an interrupted machine does to all alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.files import write_json
from benchmarks.runs import now, read_json, say, write_report

OURS = "this engine"
MACHINE = ("device", "hardware", "driver", "versions", "settings")  # facts that --resume compares

Result = TypeVar("Result")


# --- turns


@dataclass(frozen=True)
class Turns:
    """How many turns each contender takes: at least, at most, and the seconds to go on between the
    two."""

    least: int
    most: int
    seconds: float = 0.0

    def __iter__(self) -> Iterator[int]:
        until = time.monotonic() + self.seconds
        for number in range(self.most):
            if number >= self.least and time.monotonic() > until:
                return
            yield number


class Budget:
    """Seconds that `parts` of equal size share; what one part leaves goes to those after it."""

    def __init__(self, seconds: float, parts: int, least: int, most: int):
        self.deadline, self.parts = time.monotonic() + seconds, parts
        self.least, self.most = least, most

    def turns(self, parts: int = 1) -> Turns:
        """The turns of the next `parts` of them."""
        share = max(0.0, self.deadline - time.monotonic()) * parts / self.parts
        self.parts -= parts
        return Turns(self.least, self.most, share)


def alternate(
    contenders: Mapping[str, Callable[[], Result]],
    turns: Iterable[int],
    limits: Mapping[str, int] | None = None,
    dropped: tuple[type[Exception], ...] = (),
) -> dict[str, list[Result]]:
    """What each contender returned in its turns, A B A B: what else the machine does falls on all
    alike.

    `limits` are the turns of those that are too slow for more. A contender that raises an error in
    `dropped` is left out, with the turns that it took.
    """
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    for turn in turns:
        for name in list(results):
            if limits and turn >= limits.get(name, turn + 1):
                continue
            try:
                results[name].append(contenders[name]())
            except dropped:
                del results[name]
    return results


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """A turn that returns the seconds of `work`, which waits for its device itself."""

    def turn() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return turn


# --- figures


def spread(values: Iterable[float]) -> list[float]:
    """Median, least and most."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[0], ordered[-1]]


def ratio(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """The spread of quotients of the same turn: a slow minute of the machine counts against
    neither. The turns that only one of them took are left out."""
    return spread(a / b for a, b in zip(over, under))


def cells(figure: Sequence[float], form: str = ".2f") -> list[str]:
    """A spread in two columns of a table."""
    median, least, most = figure
    return [f"{median:{form}}", f"{least:{form}}-{most:{form}}"]


# --- what is written


class Results:
    """Facts, options and cases: a JSON file with all of it and, beside it, Markdown for people."""

    def __init__(
        self,
        path: Path | None,
        facts: dict[str, Any],
        options: Any,
        report: Callable[[dict[str, Any]], str],
    ):
        self.path, self.report = path, report
        self.cases: list[dict[str, Any]] = []
        self.record: dict[str, Any] = facts | {
            "date": now(),
            "options": dataclasses.asdict(options),
            "cases": self.cases,
        }

    def resume(self) -> None:
        """Keep the cases that the file has of this machine with these versions; another one's file
        is kept beside."""
        before = read_json(self.path) if self.path else None
        if not before or not self.path:
            return
        if "options" in before and all(before.get(k) == self.record.get(k) for k in MACHINE):
            self.cases += before["cases"]
            return
        aside = self.path.with_stem(f"{self.path.stem}-{before.get('date', '')[:10]}-before")
        write_json(aside, before)
        say(
            f"{self.path} is of another machine, other versions or an older layout; it is kept as "
            f"{aside.name}"
        )

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The case that has all of `key`."""
        return next((case for case in self.cases if key.items() <= case.items()), None)

    def put(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Add a case, or replace the one of the same key, and write the files: an interrupted run
        leaves what it has."""
        before = self.find(key)
        if before is None:
            self.cases.append(key | figures)
        else:
            self.cases[self.cases.index(before)] = key | figures
        self.write()

    def write(self) -> None:
        if self.path:
            write_report(self.path, self.record, self.text())

    def text(self) -> str:
        return f"{title(self.record)}\n\n{self.report(self.record)}\n"


def title(record: dict[str, Any]) -> str:
    """Where, when and with which versions it was measured."""
    hardware = record["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    return f"Measured on {where}, {record['date'][:10]}: {versions}."
