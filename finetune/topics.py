"""The topic of a document. It reads AG News, BBC News, the News Category Dataset, and any file with
a column of texts and a column of labels.

python -m finetune.topics --init gpt2 --data ag_news_train.csv --val-data ag_news_dev.csv
Baselines on the same rows are --model naive-bayes, tf-idf and lstm. With --method last-layer
--pooling lstm, an LSTM reads GPT-2's frozen states.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapters.options import Form
from base.cli import entry_point
from finetune import classify
from tasks.classification.description import ClassificationDescription
from tasks.classification.options import ClassificationConfig
from tasks.description import Parts, Truncatable
from text.row import Row


@dataclass(frozen=True)
class TopicsConfig(ClassificationConfig):
    """Options of the topic task."""

    title_column: str | None = None
    """Column of the title, which is read before the text. Default: title or headline, if the file
    has one."""
    text_column: str | None = None
    """Column of the text. Default: text, description, short_description, article or content."""
    label_column: str | None = None
    """Column of the topic. Default: label, category, topic or class."""


def texts(row: Row) -> tuple[str, ...]:
    """Title and text as one text."""
    return ("\n".join(part for part in (row["title"].strip(), row["text"].strip()) if part),)


def prompt(row: Row, form: Form) -> Parts:
    """The document, followed by the word that asks for its topic."""
    return "Article: ", Truncatable(texts(row)[0]), "\nTopic:"


TASK = ClassificationDescription(
    name="topics",
    config=TopicsConfig,
    columns={
        "title": ("title", "headline"),
        "label": ("label", "category", "topic", "class"),
        "text": ("text", "description", "short_description", "article", "content"),
        "id": ("id", "idx"),
    },
    optional=("title", "text", "id"),  # the News Category Dataset has headlines without text
    texts=texts,
    prompt=prompt,
    toy=(
        {
            "title": "Rovers win late",
            "text": "A goal in the last minute gave Rovers the cup.",
            "label": "sport",
        },
        {
            "title": "Marathon record falls",
            "text": "She ran the race in two hours and nine minutes.",
            "label": "sport",
        },
        {
            "title": "Bank raises rates",
            "text": "The central bank lifted its rate by a quarter point.",
            "label": "business",
        },
        {
            "title": "Shares slip",
            "text": "Markets closed lower after a weak report on jobs.",
            "label": "business",
        },
        {
            "title": "New telescope",
            "text": "Astronomers saw water in the air of a far planet.",
            "label": "science",
        },
        {
            "title": "Old bones",
            "text": "The fossil is of a bird that could not fly.",
            "label": "science",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: classify(TASK))
