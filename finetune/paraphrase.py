"""Paraphrases: whether two sentences mean the same. It reads Quora's question pairs, MRPC, and any
file with two columns of texts and a label.

python -m finetune.paraphrase --init gpt2 --data quora-train.csv --val-data quora-dev.csv
With --form plain a head reads the pair. With --form prompt it reads a question on the pair. With
--form word the language model answers that question with yes or no.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.options import Form
from base.cli import entry_point
from finetune import classify
from tasks.classification.description import ClassificationDescription
from tasks.classification.labels import label_words
from tasks.classification.options import ClassificationConfig
from tasks.description import Parts, Truncatable
from text.row import Row


@dataclass(frozen=True)
class ParaphraseConfig(ClassificationConfig):
    """Options of the paraphrase task."""

    first_column: str | None = None
    """Column of the first sentence. Default: sentence1, question1, text1 or #1 String."""
    second_column: str | None = None
    """Column of the second sentence. Default: sentence2, question2, text2 or #2 String."""
    label_column: str | None = None
    """Column of the label. Default: is_duplicate, label or Quality."""


def texts(row: Row) -> tuple[str, ...]:
    """The two sentences."""
    return row["first"].strip(), row["second"].strip()


def prompt(row: Row, form: Form) -> Parts:
    """A question on the two sentences."""
    first, second = map(Truncatable, texts(row))
    return "Sentence1: ", first, "\nSentence2: ", second, "\nAre they paraphrases?"


def words(labels: Sequence[str]) -> Sequence[str]:
    """no and yes for the labels 0 and 1, else the labels' names."""
    return ("no", "yes") if tuple(labels) == ("0", "1") else label_words(labels)


TASK = ClassificationDescription(
    name="paraphrase",
    config=ParaphraseConfig,
    columns={
        "first": ("sentence1", "question1", "text1", "#1 String"),
        "second": ("sentence2", "question2", "text2", "#2 String"),
        "label": ("is_duplicate", "label", "Quality"),
        "id": ("id", "idx"),
    },
    optional=("id",),
    texts=texts,
    prompt=prompt,
    words=words,
    csv_header="Predicted_Is_Paraphrase",
    toy=(
        {"first": "How do I boil an egg?", "second": "What is the way to boil eggs?", "label": "1"},
        {"first": "How do I boil an egg?", "second": "How do I fry an egg?", "label": "0"},
        {
            "first": "Where can I learn to swim?",
            "second": "What is a good place to learn swimming?",
            "label": "1",
        },
        {
            "first": "Where can I learn to swim?",
            "second": "Where can I learn to sing?",
            "label": "0",
        },
        {
            "first": "Is the moon moving away?",
            "second": "Does the moon drift away from us?",
            "label": "1",
        },
        {"first": "Is the moon moving away?", "second": "Is the moon made of rock?", "label": "0"},
        {
            "first": "Who wrote this song?",
            "second": "Who is the author of this song?",
            "label": "1",
        },
        {"first": "Who wrote this song?", "second": "Who sang this song first?", "label": "0"},
    ),
)

if __name__ == "__main__":
    entry_point(lambda: classify(TASK))
