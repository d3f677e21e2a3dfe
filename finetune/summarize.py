"""Summaries: an article, <generate>, its summary; the summary alone is learned.

python -m finetune.summarize --init gpt2 --data scitldr_train.jsonl --val-data scitldr_dev.jsonl --predict scitldr_test.jsonl
An article that is too long for the model is cut at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from base.cli import entry_point
from finetune import command
from tasks import metrics
from tasks.generation.options import GenerationConfig
from tasks.generation.task import Answer, Example, Generation, Long, Special
from text.rows import Row

GENERATE = Special("<generate>")


@dataclass(frozen=True)
class SummarizeConfig(GenerationConfig):
    """Options of the task of summaries."""

    article_column: str | None = None
    """Column of what is summarised. Default: article, document, dialogue or text."""
    summary_column: str | None = None
    """Column of the summary. Default: summary, highlights, headline or title."""


class Summarize(Generation):
    name = "summarize"
    config = SummarizeConfig
    best = ("rouge_l", "max")
    defaults = {"decode": "greedy", "max_new_tokens": 100}
    columns = {
        "article": ("article", "document", "dialogue", "text"),
        "summary": ("summary", "highlights", "headline", "title"),
    }
    truth = ("summary",)
    special = (GENERATE,)
    toy = (
        {
            "article": "The town council met on Monday. After three hours of talk it voted to mend "
            "the old bridge "
            "before winter, and to close it to lorries until then.",
            "summary": "Council will mend the bridge.",
        },
        {
            "article": "A ship with forty tons of oranges ran aground off the cape in thick fog. "
            "The "
            "crew was taken off "
            "by helicopter; nobody was hurt.",
            "summary": "Orange ship aground, crew safe.",
        },
        {
            "article": "Anna: Did you feed the cat?\nBen: Twice. It pretends to be hungry.\nAnna: "
            "Then no more today.",
            "summary": "Ben has fed the cat twice.",
        },
    )

    def example(self, row: Row) -> Example:
        return Example(
            prompt=(Long(row["article"].strip()), GENERATE), answer=(row["summary"].strip(),)
        )

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        rouge = metrics.rouge([a.text for a in answers], [a.reference for a in answers])
        return {"rouge_1": rouge["rouge1"], "rouge_2": rouge["rouge2"], "rouge_l": rouge["rougeL"]}


if __name__ == "__main__":
    entry_point(lambda: command(Summarize()))
