"""The description of a fine-tuning task: which columns its rows have, and how a row reads.

A description is data and plain functions. The families tasks/classification, tasks/generation and
tasks/preferences train and answer from it. Nothing here imports torch, so `--help` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks.options import FinetuneConfig
from text.row import Expand, Reader, Row


class SpecialToken(str):
    """A text that is encoded as one token, added to the vocabulary."""


class Turn(SpecialToken):
    """A special token that begins a turn. A row that is too long loses its oldest turns."""


class EarlierAnswer(str):
    """An answer before the last one in a conversation. It is learned too, with an end token."""


class Truncatable(str):
    """A text that may be truncated when its row is longer than the context."""


Parts = tuple[str, ...]  # plain, truncatable and special-token texts, in order


def plain(parts: Parts) -> str:
    """The parts as one text, without the special tokens."""
    return "".join(part for part in parts if not isinstance(part, SpecialToken))


def special_tokens(rows: Iterable[Parts]) -> tuple[str, ...]:
    """The distinct special tokens in the parts of rows, in order of first appearance."""
    return tuple(
        dict.fromkeys(part for parts in rows for part in parts if isinstance(part, SpecialToken))
    )


class PreprocessContext(Protocol):
    """The attributes of a Source that `Description.preprocess` may use."""

    cfg: Any
    say: Callable[[str], None]
    warnings: list[str]


# Checks, splits or drops the rows of a file. It receives the context, the rows, the name of the
# file, and the split: "train", "validation" or "test" (rows of --predict).
Preprocess = Callable[[PreprocessContext, list[Row], str, str], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields that every task needs, whatever its family."""

    name: str
    config: type[FinetuneConfig]  # the class of the task's options
    defaults: Mapping[str, Any] = field(default_factory=dict)  # replace the defaults of `config`
    best: tuple[str, str] = ("val_loss", "min")  # the metric that chooses the best checkpoint
    columns: Mapping[str, tuple[str, ...]]  # fields of a row, each with its usual column names
    optional: tuple[str, ...] = ()  # fields that any row may lack
    answer_fields: tuple[str, ...] = ()  # fields that a row of --predict may lack
    toy: Sequence[Mapping[str, str]]  # a few rows to try the task with
    readers: Mapping[str, Reader] = field(default_factory=dict)  # of the task's own file formats
    expand: Expand | None = None  # turns one record of a file into several rows
    preprocess: Preprocess | None = None
    answer_kinds: tuple[str, ...] = (".jsonl",)  # suffixes of the files that hold answers
    group: Callable[[Row], str] | None = None  # rows with an equal value are held out together

    def content(self, row: Row) -> str:
        """A text that is equal for duplicate rows, to find rows in both splits."""
        return "".join(row.fields.values())

    def toy_rows(self) -> list[Row]:
        """The toy rows. A field that a toy row lacks is empty."""
        empty = dict.fromkeys(self.columns, "")
        return [Row({**empty, **row}, f"toy row {n}") for n, row in enumerate(self.toy, 1)]
