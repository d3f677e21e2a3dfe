"""Finished runs in a folder, for benchmarks that start whole commands.

A cell is a command and the place where its run lies. It is done when its note is there: the file
with its command, its seconds and its figures, which is written after its process has ended. Whoever
is told anything else is another cell, in another place. So the same command makes what a folder
lacks, and an interrupted run is not taken for a finished one. A cell that failed keeps its error for the report and
is tried again by the next command. The trade-off: a process for each cell costs some ten seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from base.files import write_json
from benchmarks.runs import Failed, TimeUp, execute, read_json

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A command, and where what it writes lies."""

    name: str
    number: int  # round or seed
    path: Path  # a run's folder, or a file
    words: tuple[str, ...] = field(compare=False)
    label: str = field(compare=False)  # for people
    work: float = field(default=1.0, compare=False)  # seconds of cells are in proportion to it
    cores: int | None = field(default=None, compare=False)  # that it may use; None: all

    @property
    def note(self) -> Path:
        """The file whose presence says that the cell is done."""
        return self.path.with_name(f"{self.path.stem}.cell.json")

    def figures(self) -> Figures | None:
        """What was measured, and the command; None where the cell is not done."""
        note = read_json(self.note) or {}
        return note["figures"] | {"command": note["command"]} if "figures" in note else None


def place(folder: Path, name: str, number: int, options: Mapping[str, Any]) -> Path:
    """Where a cell with these options lies."""
    text = json.dumps(options, sort_keys=True, default=str)
    return folder / f"{name}-{number}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass
class Store:
    """Makes cells within a time, and knows how each went."""

    measure: Callable[[Path], Figures]  # what the run at a place has measured; it may tidy up there
    until: float = math.inf  # of time.monotonic
    grace: float = 0.0  # seconds for a run to save what it has
    restart: bool = False  # an interrupted run begins anew; else its own command goes on with it
    done: dict[Cell, float] = field(default_factory=dict)  # seconds of each
    failed: dict[Cell, str] = field(default_factory=dict)  # the line that names the error
    left_out: dict[Cell, None] = field(default_factory=dict)  # for want of time

    def make(self, cells: Iterable[Cell]) -> Iterator[tuple[Cell, str]]:
        """Make what is missing; yields each cell that is done or failed, and how it went, in
        words."""
        for cell in cells:
            how = self.attempt(cell)
            if cell not in self.left_out:
                yield cell, how

    def attempt(self, cell: Cell) -> str:
        """Make a cell that is not done, if there is time for it; how it went, in words."""
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
        """Whether a cell has had its turn."""
        return cell in self.failed or cell in self.left_out or cell in self.done

    def usual(self, cell: Cell) -> float:
        """Seconds that a cell may take: as those of its name did, or else as its like did."""
        like = {
            other: cell.work * seconds / other.work
            for other, seconds in self.done.items()
            if other.path.parent == cell.path.parent
        }
        same = [seconds for other, seconds in like.items() if other.name == cell.name]
        return statistics.median(same or like.values() or [0.0])

    def rest(self, cells: Iterable[Cell]) -> float:
        """Seconds until the last cell is done, or the time is up."""
        left = sum(self.usual(cell) for cell in cells if not self.settled(cell))
        return min(left, self.until - time.monotonic())
