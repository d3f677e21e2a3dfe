"""Summaries: a row reads article, <generate>, summary. Only the summary is learned.

python -m finetune.summarize --init gpt2 --data scitldr_train.jsonl --val-data scitldr_dev.jsonl --predict scitldr_test.jsonl
An article that is too long for the model is truncated at its end.
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
from text.row import Row

GENERATE = SpecialToken("<generate>")


@dataclass(frozen=True)
class SummarizeConfig(GenerationConfig):
    """Options of the summarization task."""

    article_column: str | None = None
    """Column of the text to summarize. Default: article, document, dialogue or text."""
    summary_column: str | None = None
    """Column of the summary. Default: summary, highlights, headline or title."""


def example(row: Row, cfg: SummarizeConfig) -> Example:
    """The article is the prompt, and may be truncated. The summary is the answer."""
    article, summary = Truncatable(row["article"].strip()), row["summary"].strip()
    return Example(prompt=(article, GENERATE), answer=(summary,))


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """ROUGE-1, -2 and -L."""
    rouge = metrics.rouge([a.text for a in answers], [a.reference for a in answers])
    return {"rouge_1": rouge["rouge1"], "rouge_2": rouge["rouge2"], "rouge_l": rouge["rougeL"]}


TASK = GenerationDescription(
    name="summarize",
    config=SummarizeConfig,
    defaults={"decode": "greedy", "max_new_tokens": 100},
    columns={
        "article": ("article", "document", "dialogue", "text"),
        "summary": ("summary", "highlights", "headline", "title"),
    },
    answer_fields=("summary",),
    example=example,
    scores=scores,
    best=("rouge_l", "max"),
    toy=(
        {
            "article": "The town council met on Monday. After three hours of talk it voted to mend "
            "the old bridge before winter, and to close it to lorries until then.",
            "summary": "Council will mend the bridge.",
        },
        {
            "article": "A ship with forty tons of oranges ran aground off the cape in thick fog. "
            "The crew was taken off by helicopter; nobody was hurt.",
            "summary": "Orange ship aground, crew safe.",
        },
        {
            "article": "Anna: Did you feed the cat?\nBen: Twice. It pretends to be hungry.\nAnna: "
            "Then no more today.",
            "summary": "Ben has fed the cat twice.",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
