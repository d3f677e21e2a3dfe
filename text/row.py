"""A row of a file, and the functions that make rows: what a task's description needs to name.

It imports no numpy and no reader, so that a task's `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# One row as read: its place in the file ("line 12"), and its cells by column or what is wrong with
# it.
Record = tuple[str, dict[str, Any] | str]
# Takes the text of a file and its name for messages. Raises UserError where the file as a whole is
# not right.
Reader = Callable[[str, str], Iterator[Record]]
# Takes a record and gives those that a task makes of it: rows that hold several questions, say.
Expand = Callable[[Record], Iterator[Record]]


@dataclass(frozen=True, slots=True)
class Row:
    """What a file says in one row, by the task's names for it; "" for an optional field without a
    column."""

    fields: dict[str, str]
    where: str  # "songs.csv line 12"
    fault: str = ""  # why it cannot be answered: only a row that is read with `every` has one

    def __getitem__(self, field: str) -> str:
        return self.fields[field]
