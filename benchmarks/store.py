"""Finished runs in a folder, for benchmarks that run whole commands.

A cell is a command and the place of its run. A cell is done when its note exists: a file with its
command, its seconds and its figures. The note is written after the process has ended, so an
interrupted run does not count as finished. Another command or other options make another cell in
another place. Therefore repeating a command makes only the cells that the folder lacks. A failed
cell keeps its error for the report, and the next command tries it again. The trade-off: a process
for each cell costs some ten seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.commands import Failed, TimeUp, execute
from base.console import time_text
from base.files import read_json, write_json
from benchmarks.runs import say, write_report

Figures = dict[str, Any]
WRITING = 6.0  # seconds kept for the tables and the chart


def deadline(began: float, minutes: float | None) -> float:
    """The time of time.monotonic when runs must end. None: no limit."""
    return began + 60 * (minutes or math.inf) - WRITING


@dataclass(frozen=True)
class Cell:
    """A command, and the place that it writes to."""

    name: str
    number: int  # round or seed
    path: Path  # a run's folder, or a file
    words: tuple[str, ...] = field(compare=False)
    label: str = field(compare=False)  # its name in messages
    work: float = field(default=1.0, compare=False)  # the expected seconds are proportional to this
    cores: int | None = field(default=None, compare=False)  # that it may use; None: all

    @property
    def note(self) -> Path:
        """The file whose presence says that the cell is done."""
        return self.path.with_name(f"{self.path.stem}.cell.json")

    def figures(self) -> Figures | None:
        """The figures and the command. None if the cell is not done."""
        note = read_json(self.note) or {}
        return note["figures"] | {"command": note["command"]} if "figures" in note else None


def place(folder: Path, name: str, number: int, options: Mapping[str, Any]) -> Path:
    """The path of the cell with these options."""
    text = json.dumps(options, sort_keys=True, default=str)
    return folder / f"{name}-{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def option_words(options: Mapping[str, Any]) -> list[str]:
    """The words of a command's options. True is an option without a value, None and False are none.
    NUL separates several words of one option."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}", *(() if value is True else str(value).split("\0"))]
    return words


@dataclass
class Store:
    """Runs cells until a time, and records the result of each."""

    # reads the figures of a finished run; it may delete files there
    measure: Callable[[Path], Figures]
    until: float = math.inf  # a time of time.monotonic
    grace: float = 0.0  # seconds that a run gets to save its work
    restart: bool = False  # delete an interrupted run; else its command resumes it
    done: dict[Cell, float] = field(default_factory=dict)  # seconds of each
    failed: dict[Cell, str] = field(default_factory=dict)  # the line that names the error
    left_out: dict[Cell, None] = field(default_factory=dict)  # cells that there was no time for

    def complete(
        self,
        stem: Path,
        cells: Callable[[], Iterable[Cell]],
        show: Callable[[Figures], str],
        result_of: Callable[[], dict[str, Any]],
        text_of: Callable[[dict[str, Any]], str],
        draw: Callable[[dict[str, Any], Path], None],
    ) -> int:
        """Run the cells that are missing. Write the result and its text to STEM.json and STEM.md
        after each, and the chart to STEM.png at the end, even of an interrupted run. Returns the
        exit code."""

        def write() -> dict[str, Any]:
            result = result_of()
            write_report(stem.with_suffix(".json"), result, text_of(result))
            return result

        try:
            self.run(cells, show, write)
        finally:
            result = write()
            if importlib.util.find_spec("matplotlib"):
                draw(result, stem.with_suffix(".png"))
            else:
                say("no chart: matplotlib is not installed; install it and repeat the command")
        print(text_of(result))
        return self.end()

    def run(
        self,
        cells: Callable[[], Iterable[Cell]],
        show: Callable[[Figures], str],
        write: Callable[[], object],
    ) -> None:
        """Run the cells that are missing. After each, call `write` and say what came.

        `cells` is called again after each cell, because later cells may depend on earlier ones.
        """
        for cell in cells():
            how = self.attempt(cell)
            if cell in self.left_out:
                continue
            write()
            every, figures = list(cells()), cell.figures()
            settled = f"[{sum(map(self.settled, every))}/{len(every)}]"
            came = f"{show(figures)}, {how}" if figures else how
            left = time_text(self.rest(every))
            say(f"{settled} {cell.label:<28} {came}; about {left} left")

    def end(self) -> int:
        """Say which cells failed or were left out. Returns the exit code."""
        for cell, reason in self.failed.items():
            say(f"{cell.label} failed: {reason}")
        if self.left_out:
            labels = ", ".join(cell.label for cell in self.left_out)
            say(f"the time was up; repeat the command to run what is left out: {labels}")
        return 1 if self.failed else 0

    def attempt(self, cell: Cell) -> str:
        """Run a cell that is not done, if there is time for it. Returns a text that says how it
        went."""
        if cell.figures():
            self.done[cell] = read_json(cell.note)["wall_seconds"]
            return "found in the folder"
        if time.monotonic() + self.usual(cell) > self.until:
            self.left_out[cell] = None
            return "left out"
        cell.path.parent.mkdir(parents=True, exist_ok=True)
        if self.restart:
            shutil.rmtree(cell.path, ignore_errors=True)
        began = time.monotonic()
        output = cell.note.with_suffix(".txt")
        try:
            execute(cell.words, output, self.until, cores=cell.cores, grace=self.grace)
        except Failed as error:
            self.failed[cell] = str(error)
            return f"failed: {error}"
        except TimeUp:
            self.left_out[cell] = None
            return "cut off: the time is up"
        seconds = time.monotonic() - began
        note = {"command": shlex.join(cell.words), "wall_seconds": seconds}
        write_json(cell.note, note | {"figures": self.measure(cell.path)})
        self.done[cell] = seconds
        return f"{seconds:.0f} s"

    def settled(self, cell: Cell) -> bool:
        """Whether a cell is done, failed or left out."""
        return cell in self.failed or cell in self.left_out or cell in self.done

    def usual(self, cell: Cell) -> float:
        """The expected seconds of a cell: the median of done cells with the same name, else of done
        cells in the same folder."""
        like = {
            other: cell.work * seconds / other.work
            for other, seconds in self.done.items()
            if other.path.parent == cell.path.parent
        }
        same = [seconds for other, seconds in like.items() if other.name == cell.name]
        return statistics.median(same or like.values() or [0.0])

    def rest(self, cells: Iterable[Cell]) -> float:
        """The seconds until the last cell is done, or until the time is over."""
        left = sum(self.usual(cell) for cell in cells if not self.settled(cell))
        return min(left, self.until - time.monotonic())
