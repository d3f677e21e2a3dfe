"""What a fine-tuning task says of itself: which columns its rows have, and how a row reads.

A description is data and plain functions; the families (tasks/classification, tasks/generation)
train and answer by it. Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks.options import FinetuneConfig
from text.readers import Reader
from text.rows import Expand, Row


class SpecialToken(str):
    """A token of its own between the texts of a sequence."""


class Truncatable(str):
    """A text that may be cut where its row is longer than the context."""


Parts = tuple[str, ...]  # texts, special tokens and long texts


def plain(parts: Parts) -> str:
    """The texts of some parts, special tokens left out."""
    return "".join(part for part in parts if not isinstance(part, SpecialToken))


def special_tokens(rows: Iterable[Parts]) -> tuple[str, ...]:
    """The special tokens among the parts of rows, in the order in which they first appear."""
    return tuple(
        dict.fromkeys(part for parts in rows for part in parts if isinstance(part, SpecialToken))
    )


class PreprocessContext(Protocol):
    """What `Description.preprocess` may use of the reader of a task's files."""

    cfg: Any
    say: Callable[[str], None]
    warnings: list[str]


# Makes of the rows of a file those of the task: it may check, split or leave out. Takes the reader,
# the rows, the name of the file and the split: "train", "validation" or "test".
Preprocess = Callable[[PreprocessContext, list[Row], str, str], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What all tasks on rows of a file have."""

    name: str
    config: type[FinetuneConfig]  # its kind of options
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of those, where they differ
    best: tuple[str, str] = ("val_loss", "min")  # the metric that chooses the best checkpoint
    columns: Mapping[str, tuple[str, ...]]  # fields of a row, and the columns they may come from
    optional: tuple[str, ...] = ()  # fields that a row may lack
    answer_fields: tuple[str, ...] = ()  # fields that a row of --predict may lack
    toy: Sequence[Mapping[str, str]]  # a few rows to try the task with
    readers: Mapping[str, Reader] = field(default_factory=dict)  # of files that only it knows
    expand: Expand | None = None  # makes several rows of a record
    preprocess: Preprocess | None = None
    answer_kinds: tuple[str, ...] = (".jsonl",)  # endings of the files of answers
    group: Callable[[Row], str] | None = None  # equal for rows that are held out together

    def content(self, row: Row) -> str:
        """Equal for rows that are the same."""
        return "".join(row.fields.values())

    def toy_rows(self) -> list[Row]:
        """The toy rows, fields that they lack empty."""
        empty = dict.fromkeys(self.columns, "")
        return [Row({**empty, **row}, f"toy row {n}") for n, row in enumerate(self.toy, 1)]
