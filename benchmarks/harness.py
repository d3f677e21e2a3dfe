"""The parts that all comparisons share: turns, ratios, tables, and result files.

A benchmark names its cases, its contenders (functions that take one turn each), the check that the
contenders agree, and the columns of its table. Contenders take turns, ratios compare runs of the
same turn, and the files are written after each case. The trade-off of turns: each contender finds
the caches as the one before left them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from base.files import read_json, write_json
from benchmarks.runs import now, say, write_report
from benchmarks.table import Column, Row, table

OURS = "this engine"
# facts that must be equal to resume a file
MACHINE = ("device", "hardware", "driver", "versions", "settings")

Result = TypeVar("Result")
Cases = Iterable[tuple[dict[str, Any], dict[str, Any]]]  # the key and the figures of each


# --- turns


@dataclass(frozen=True)
class Turns:
    """How many turns each contender takes: from `least` to `most`. After `least` turns they stop
    when `seconds` are over."""

    least: int
    most: int
    seconds: float = 0.0

    def __iter__(self) -> Iterator[int]:
        until = time.monotonic() + self.seconds
        for number in range(self.most):
            if number >= self.least and time.monotonic() > until:
                return
            yield number


def alternate(
    contenders: Mapping[str, Callable[[], Result]],
    turns: Iterable[int],
    limits: Mapping[str, int] | None = None,
    dropped: tuple[type[Exception], ...] = (),
) -> dict[str, list[Result]]:
    """Let the contenders take turns, in the order A B A B, and return each one's results. A slow
    minute of the machine then affects all of them.

    `limits` gives a smaller number of turns to contenders that are slow. A contender that raises an
    error in `dropped` is removed, with all of its results.
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


def race(
    contenders: Mapping[str, Callable[[], object]],
    turns: Iterable[int],
    limits: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """The seconds of each contender's turns. Each first takes a turn that does not count, but not
    the slow ones in `limits`. Each must itself wait for its device."""
    for name, work in contenders.items():
        if name not in (limits or {}):
            work()
    return alternate({name: timed(work) for name, work in contenders.items()}, turns, limits)


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Make a turn that returns the seconds of `work`. `work` itself must wait for its device."""

    def turn() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return turn


# --- figures


def spread(values: Iterable[float]) -> list[float]:
    """The median, the least and the largest value."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[0], ordered[-1]]


def ratio(over: Iterable[float], under: Iterable[float]) -> list[float]:
    """The spread of the quotients `over / under` of the same turn, so that a slow minute of the
    machine affects both. Turns that only one of them took are left out."""
    return spread(a / b for a, b in zip(over, under))


def spread_columns(
    head: str, of: Callable[[Row], Sequence[float] | None], form: str = ".2f"
) -> list[Column]:
    """A spread as two columns of `table`. `of` returns None for a row without it."""

    def text(row: Row, n: int) -> str:
        figure = of(row)
        return cells(figure, form)[n] if figure else ""

    return [(head, lambda row: text(row, 0)), (f"{head}, least-most", lambda row: text(row, 1))]


def race_table(
    cases: Sequence[Row], keys: Sequence[str], unit: str, amount: str = "", form: str = ",.0f"
) -> str:
    """A table of cases with the "seconds" of races: a case's `keys`, and for each contender its
    rate (`amount` names what a turn makes; default: one) and its speed over the first one's."""
    rows = [
        {**case, "contender": name, "turns": turns, "first": next(iter(case["seconds"].values()))}
        for case in cases
        for name, turns in case["seconds"].items()
    ]
    names = (*keys, "contender")

    def rate(row: Row) -> list[float]:
        return spread(row.get(amount, 1) / seconds for seconds in row["turns"])

    columns: list[Column] = [
        *((name, lambda row, name=name: str(row[name])) for name in names),
        *spread_columns(unit, rate, form),
        *spread_columns("speed x", lambda row: ratio(row["first"], row["turns"])),
    ]
    return table(columns, rows, names)


def cells(figure: Sequence[float], form: str = ".2f") -> list[str]:
    """A spread as two cells of a table: the median, and the range."""
    median, least, most = figure
    return [f"{median:{form}}", f"{least:{form}}-{most:{form}}"]


# --- what is written


class Results:
    """Facts, options and cases. A JSON file holds all of them, and a Markdown file beside it is for
    people."""

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
        """Load the cases of the file if it is from this machine with these versions. Keep any other
        file under another name."""
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
        """The case that contains all items of `key`, or None."""
        return next((case for case in self.cases if key.items() <= case.items()), None)

    def put(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Add a case, or replace the one with the same key, and write the files. An interrupted run
        then keeps its cases."""
        before = self.find(key)
        if before is None:
            self.cases.append(key | figures)
        else:
            self.cases[self.cases.index(before)] = key | figures
        self.write()

    def write(self) -> None:
        """Write the JSON and the Markdown file, if there is a path."""
        if self.path:
            write_report(self.path, self.record, self.text())

    def text(self) -> str:
        """The report as Markdown: where and when it was measured, then the tables."""
        return f"{title(self.record)}\n\n{self.report(self.record)}\n"


def run_cases(
    options: Any,
    name: str,
    device: str,
    measure: Callable[[Any, str], Cases],
    report: Callable[[dict[str, Any]], str],
) -> None:
    """Write the key and the figures of each case that `measure(options, device)` yields into NAME's
    files in --out, and print the report. In `name`, DEVICE stands for the device that is found."""
    from benchmarks.machine import facts  # gpu_check, which uses Results, runs without psutil

    known = facts(device)
    path = Path(options.out) / f"{name.replace('DEVICE', known['device'])}.json"
    results = Results(path, known, options, report)
    for key, figures in measure(options, known["device"]):
        results.put(key, figures)
    print(results.text())


def title(record: dict[str, Any]) -> str:
    """The machine, the date and the versions of a measurement, as one sentence."""
    hardware = record["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(f"{name} {v}" for name, v in record["versions"].items() if v)
    return f"Measured on {where}, {record['date'][:10]}: {versions}."
