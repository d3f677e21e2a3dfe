"""Questions on a passage: the passage, <question>, a question, <answer>, its answer; the answer
alone is learned.

python -m finetune.qa --init gpt2 --data squad_train.json --val-data squad_dev.json --predict questions.csv
SQuAD is read as its own files have it and as the hub has it; a question without an answer (SQuAD 2)
is not learned from, but is answered. A passage that is too long for the model is cut at its end;
where that takes the answer away, the row is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from base.cli import entry_point
from engine.task import Facts
from finetune import command
from tasks import metrics
from tasks.generation.options import GenerationConfig
from tasks.generation.squad import expand
from tasks.generation.task import Answer, Example, Generation, Long, Special
from text.rows import Row

QUESTION, ANSWER = Special("<question>"), Special("<answer>")


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


class Qa(Generation):
    name = "qa"
    config = QaConfig
    best = ("f1", "max")
    defaults = {"decode": "greedy", "max_new_tokens": 40}
    columns = {"context": ("context", "passage"), "question": ("question",), "answer": ("answer",)}
    columns |= {"answers": ("answers",), "id": ("id",)}
    optional = ("answers", "id")
    truth = ("answer",)
    expand = staticmethod(expand)
    special = (QUESTION, ANSWER)
    toy = (
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
    )

    def setup(self, cfg: QaConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        facts = super().setup(cfg, say, dry)
        lost = sum(
            self._is_lost(*one) for one in zip(self.train.rows, self.train.tokens, strict=True)
        )
        if not lost:
            return facts
        text = (
            f"{lost} of {len(self.train.rows)} training rows lose their answer where it is cut off"
        )
        self.warnings += (text,)
        return dataclasses.replace(facts, warnings=self.warnings)

    def _is_lost(self, row: Row, tokens: np.ndarray) -> bool:
        """Whether the answer stood in the passage and does not in what is read of it."""
        end = int((tokens == self.tokenizer.special_id(QUESTION)).argmax())
        return row["answer"] in row["context"] and row["answer"] not in self.tokenizer.decode(
            tokens[1:end].tolist()
        )

    def kin(self, row: Row) -> str:
        """All questions on a passage, that no passage is known from training."""
        return row["context"]

    def example(self, row: Row) -> Example:
        prompt = (Long(row["context"].strip()), QUESTION, row["question"].strip(), ANSWER)
        return Example(prompt, answer=(row["answer"].strip(),))

    def reference(self, row: Row) -> str:
        """All right answers, one a line."""
        return row["answers"] or row["answer"]

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        return metrics.squad([a.text for a in answers], [a.reference.split("\n") for a in answers])


if __name__ == "__main__":
    entry_point(lambda: command(Qa()))
