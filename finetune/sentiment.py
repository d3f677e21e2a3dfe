"""Sentiment of a text. It reads SST-5 and CFIMDB in CS224N's format, NSMC, and any file with a
column of texts and a column of labels.

python -m finetune.sentiment --init gpt2 --data ids-sst-train.csv --val-data ids-sst-dev.csv --predict ids-sst-test-student.csv
With --form prompt the head reads "Review: ... Sentiment:". With --form word the language model
continues it with the label's word.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from adapters.options import Form
from base.cli import entry_point
from finetune import classify
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import label_words
from tasks.classification.options import ClassificationConfig
from tasks.description import Parts, Truncatable
from text.row import Row

WORDS = {  # for numeric labels, by the number of labels
    2: ("negative", "positive"),
    3: ("negative", "neutral", "positive"),
    5: ("terrible", "bad", "okay", "good", "great"),
}


@dataclass(frozen=True)
class SentimentConfig(ClassificationConfig):
    """Options of the sentiment task."""

    text_column: str | None = None
    """Column of the text. Default: sentence, text, document, review or content."""
    label_column: str | None = None
    """Column of the label. Default: sentiment, label or stars."""


def prompt(row: Row, form: Form) -> Parts:
    """The review, followed by the word that asks for its sentiment."""
    return "Review: ", Truncatable(row["text"].strip()), "\nSentiment:"


TASK = ClassificationDescription(
    name="sentiment",
    config=SentimentConfig,
    columns={
        "text": ("sentence", "text", "document", "review", "content"),
        "label": ("sentiment", "label", "stars"),
        "id": ("id", "idx"),
    },
    optional=("id",),
    prompt=prompt,
    words=functools.partial(label_words, words_by_count=WORDS),
    csv_header="Predicted_Sentiment",
    toy=(
        {"text": "A warm, funny film that I would gladly see again.", "label": "1"},
        {"text": "Two hours of my life that nobody gives back.", "label": "0"},
        {"text": "The cast is splendid and the music stays with you.", "label": "1"},
        {"text": "Dull from the first scene, and it never wakes up.", "label": "0"},
        {"text": "A quiet, beautiful story, told with great care.", "label": "1"},
        {"text": "The jokes are old and the plot makes no sense.", "label": "0"},
        {"text": "진짜 재미있어요, 또 보고 싶습니다.", "label": "1"},
        {"text": "시간이 아까운 영화였다.", "label": "0"},
    ),
)

if __name__ == "__main__":
    entry_point(lambda: classify(TASK))
