"""A task whose answers are texts, as its file in finetune/ describes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.description import Description, Parts, plain, special_tokens
from text.rows import Row


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: what it reads, and what it learns to write after that."""

    prompt: Parts
    answer: Parts
    reference: str | None = None  # the true answer as it is scored, where that is another text

    @property
    def true_answer(self) -> str:
        return plain(self.answer) if self.reference is None else self.reference


@dataclass(frozen=True)
class Answer:
    """What the model wrote after a prompt, and what is true."""

    prompt: str
    text: str
    reference: str


def no_scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """A text has no one right continuation."""
    return {}


def write_jsonl(path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
    """A line for each row: its fields, and the answer as "prediction"; of a row that could not be
    read, null, and under "unreadable" why."""
    with path.open("w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            found = {"prediction": answer.text}
            if row.fault:
                found = {"prediction": None, "unreadable": row.fault}
            file.write(json.dumps(row.fields | found, ensure_ascii=False) + "\n")


@dataclass(frozen=True, kw_only=True)
class GenerationDescription(Description):
    """Rows that become a prompt and an answer. The functions take a row and the options."""

    example: Callable[[Row, Any], Example]  # what is learned of a training row
    eval_example: Callable[[Row, Any], Example] | None = (
        None  # of a validation row, where it differs
    )
    predict_example: Callable[[Row, Any], Example] | None = (
        None  # of a row of --predict, where it differs
    )
    # metrics of answers to validation rows; the second argument are the training rows, none where
    # they were not read
    scores: Callable[[Sequence[Answer], Sequence[Row]], dict[str, float]] = no_scores
    stop_lines: int = 0  # lines after which an answer ends, where --stop-lines is not given
    write: Callable[[Path, Sequence[Row], Sequence[Answer]], None] = write_jsonl

    def as_eval_example(self, row: Row, cfg: Any) -> Example:
        """What is asked of a validation row."""
        return (self.eval_example or self.example)(row, cfg)

    def as_predict_example(self, row: Row, cfg: Any) -> Example:
        """What is asked of a row of --predict."""
        return (
            self.predict_example(row, cfg)
            if self.predict_example
            else self.as_eval_example(row, cfg)
        )

    def special_tokens(self, cfg: Any) -> tuple[str, ...]:
        """Tokens that the rows add to the vocabulary, as the toy rows show."""
        examples = [self.example(row, cfg) for row in self.toy_rows()]
        return special_tokens(example.prompt + example.answer for example in examples)
