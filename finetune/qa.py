"""Questions on a passage: the passage, <question>, a question, <answer>, its answer; the answer
alone is learned.

python -m finetune.qa --init gpt2 --data squad_train.json --val-data squad_dev.json --predict questions.csv
SQuAD is read as its own files have it and as the hub has it; a question without an answer (SQuAD 2)
is not learned from, but is answered. A passage that is too long for the model is cut at its end;
where that takes the answer away, the row is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from base.cli import entry_point
from finetune import generate
from tasks import metrics
from tasks.description import SpecialToken, Truncatable
from tasks.generation.description import Answer, Example, GenerationDescription
from tasks.generation.options import GenerationConfig
from tasks.generation.squad import expand
from text.rows import Row

QUESTION, ANSWER = SpecialToken("<question>"), SpecialToken("<answer>")


@dataclass(frozen=True)
class QaConfig(GenerationConfig):
    """Options of the task of questions."""

    context_column: str | None = None
    """Column of the passage. Default: context or passage."""
    question_column: str | None = None
    """Column of the question. Default: question."""
    answer_column: str | None = None
    """Column of the answer that is learned. Default: answer."""
    answers_column: str | None = None
    """Column of all answers that are right, one a line. Default: answers, where there is one."""


def example(row: Row, cfg: QaConfig) -> Example:
    passage, question = Truncatable(row["context"].strip()), row["question"].strip()
    return Example(
        prompt=(passage, QUESTION, question, ANSWER),
        answer=(row["answer"].strip(),),
        reference=row["answers"] or row["answer"],  # all right answers, one a line
    )


def passage(row: Row) -> str:
    """All questions on a passage are held out together: no passage is known from training."""
    return row["context"]


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    return metrics.squad([a.text for a in answers], [a.reference.split("\n") for a in answers])


TASK = GenerationDescription(
    name="qa",
    config=QaConfig,
    defaults={"decode": "greedy", "max_new_tokens": 40},
    columns={
        "context": ("context", "passage"),
        "question": ("question",),
        "answer": ("answer",),
        "answers": ("answers",),
        "id": ("id",),
    },
    optional=("answers", "id"),
    answer_fields=("answer",),
    expand=expand,
    group=passage,
    example=example,
    scores=scores,
    best=("f1", "max"),
    toy=(
        {
            "context": "The mill at Orrin was built in 1871 by two sisters, Ruth and Clara Voss.",
            "question": "When was the mill built?",
            "answer": "1871",
            "answers": "1871\nin 1871",
        },
        {
            "context": "The mill at Orrin was built in 1871 by two sisters, Ruth and Clara Voss.",
            "question": "Who built the mill?",
            "answer": "Ruth and Clara Voss",
            "answers": "Ruth and Clara Voss\ntwo sisters",
        },
        {
            "context": "Grey herons nest in tall trees and hunt frogs at dusk.",
            "question": "What do herons hunt?",
            "answer": "frogs",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
