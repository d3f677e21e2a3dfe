"""Fine-tuning tasks that get their rows from a test instead of files."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from unittest import mock

from tasks.classification.description import ClassificationDescription
from tasks.generation.description import GenerationDescription
from tasks.source import Source
from text.row import Row


@dataclass(frozen=True, kw_only=True)
class Given:
    given: Mapping[str, list[dict[str, str]]]  # rows by the name of their file, or by their split


@dataclass(frozen=True, kw_only=True)
class GivenLabels(Given, ClassificationDescription):
    """A classification task on given rows."""


@dataclass(frozen=True, kw_only=True)
class GivenTexts(Given, GenerationDescription):
    """A generation task on given rows."""


def read(source: Source, spec: str, split: str) -> list[Row]:
    assert isinstance(source.task, Given)
    rows = source.task.given.get(spec) or source.task.given[split]
    return [Row(fields, f"{spec} row {n}") for n, fields in enumerate(rows)]


@contextlib.contextmanager
def rows_are_given() -> Generator[None]:
    """Inside, no task reads a file."""
    with mock.patch.object(Source, "read", read):
        yield
