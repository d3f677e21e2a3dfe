"""A row of a file, and the functions that make rows: what a task's description needs to name.

It imports no numpy and no reader, so that a task's `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# One row: its place in the file ("line 12"), then its cells by column, or what is wrong with it.
Record = tuple[str, dict[str, Any] | str]
# Takes the text of a file and the name to use in messages. Raises UserError for a bad file.
Reader = Callable[[str, str], Iterator[Record]]
# Turns one record into several, for example a paragraph with several questions.
Expand = Callable[[Record], Iterator[Record]]


@dataclass(frozen=True)
class Unreadable:
    """A cell that an Expand cannot read. The row is broken if a field of the task comes from it."""

    reason: str  # goes before "in column ..."


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: a text for each field of the task.

    An optional field without a column is "".
    """

    fields: dict[str, str]
    where: str  # file and place, such as "songs.csv line 12"
    fault: str = ""  # why it cannot be answered; only set with `keep_broken`

    def __getitem__(self, field: str) -> str:
        return self.fields[field]
