"""Questions on a passage: a row reads passage, <question>, question, <answer>, answer. Only the
answer is learned.

python -m finetune.qa --init gpt2 --data squad_train.json --val-data squad_dev.json --predict questions.csv
SQuAD can be in its own files' layout or in the hub's. A question without an answer (SQuAD 2) is
left out of training, but --predict answers it. A passage that is too long for the model is
truncated at its end. A warning counts the rows that lose their answer by that.
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
from text.row import Row

QUESTION, ANSWER = SpecialToken("<question>"), SpecialToken("<answer>")


@dataclass(frozen=True)
class QaConfig(GenerationConfig):
    """Options of the question-answering task."""

    context_column: str | None = None
    """Column of the passage. Default: context or passage."""
    question_column: str | None = None
    """Column of the question. Default: question."""
    answer_column: str | None = None
    """Column of the answer to learn. Default: answer."""
    answers_column: str | None = None
    """Column of all accepted answers, one a line. Default: answers, if the file has it."""


def example(row: Row, cfg: QaConfig) -> Example:
    """Passage and question are the prompt. The passage may be truncated."""
    passage, question = Truncatable(row["context"].strip()), row["question"].strip()
    return Example(
        prompt=(passage, QUESTION, question, ANSWER),
        answer=(row["answer"].strip(),),
        reference=row["answers"] or row["answer"],  # all accepted answers, one a line
    )


def passage(row: Row) -> str:
    """The passage of a row. All questions on a passage are held out together, so that training
    never shows a validation passage."""
    return row["context"]


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """Exact match and F1, against the best of the accepted answers."""
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
