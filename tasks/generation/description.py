"""The description of a generation task, which a file in finetune/ fills in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.description import Description, Parts, plain, special_tokens
from text.row import Row


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: the prompt that it reads, and the answer that it learns."""

    prompt: Parts
    answer: Parts
    reference: str | None = None  # the text to score against, if it differs from `answer`

    @property
    def true_answer(self) -> str:
        """The text that answers are scored against."""
        return plain(self.answer) if self.reference is None else self.reference


@dataclass(frozen=True)
class Answer:
    """The text that the model wrote after a prompt, and the true answer."""

    prompt: str
    text: str
    reference: str


def no_scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """No metrics, for tasks whose texts have no single right continuation."""
    return {}


def fields_of(row: Row) -> dict[str, Any]:
    """The row's fields."""
    return dict(row.fields)


def write_jsonl(
    path: Path,
    rows: Sequence[Row],
    answers: Sequence[Answer],
    fields: Callable[[Row], dict[str, Any]] = fields_of,
) -> None:
    """Write one JSON object a line: the fields of a row and the answer as "prediction". For a row
    that cannot be read, "prediction" is null and "unreadable" is the reason."""
    with path.open("w", encoding="utf-8") as file:
        for row, answer in zip(rows, answers, strict=True):
            result: dict[str, Any] = {"prediction": answer.text}
            if row.fault:
                result = {"prediction": None, "unreadable": row.fault}
            file.write(json.dumps(fields(row) | result, ensure_ascii=False) + "\n")


@dataclass(frozen=True, kw_only=True)
class GenerationDescription(Description):
    """Describes a task whose rows become a prompt and an answer. The three example functions take a
    row and the options."""

    example: Callable[[Row, Any], Example]  # of a training row
    # of a validation row; None: as a training row
    eval_example: Callable[[Row, Any], Example] | None = None
    # of a row of --predict; None: as a validation row
    predict_example: Callable[[Row, Any], Example] | None = None
    # metrics of the decoded answers; the second argument is the training rows, or () if unknown
    scores: Callable[[Sequence[Answer], Sequence[Row]], dict[str, float]] = no_scores
    end: str | None = None  # the special token that ends an answer; None: the end-of-text token
    stop_lines: int = 0  # lines after which an answer ends, unless --stop-lines says otherwise
    write: Callable[[Path, Sequence[Row], Sequence[Answer]], None] = write_jsonl

    def as_eval_example(self, row: Row, cfg: Any) -> Example:
        """The example of a validation row."""
        return (self.eval_example or self.example)(row, cfg)

    def as_predict_example(self, row: Row, cfg: Any) -> Example:
        """The example of a row of --predict."""
        return (self.predict_example or self.as_eval_example)(row, cfg)

    def special_tokens(self, cfg: Any) -> tuple[str, ...]:
        """Tokens that the rows add to the vocabulary, read off the toy rows."""
        examples = [self.example(row, cfg) for row in self.toy_rows()]
        return special_tokens(example.prompt + example.answer for example in examples)
