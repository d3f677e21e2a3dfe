"""The description of a classification task, which a file in finetune/ fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.options import Form
from tasks.classification.labels import drop_unknown_labels, label_words
from tasks.description import Description, Parts, Preprocess, special_tokens
from text.row import Row


def text_of(row: Row) -> tuple[str, ...]:
    """The text of a row that has a single text."""
    return (row["text"].strip(),)


@dataclass(frozen=True, kw_only=True)
class ClassificationDescription(Description):
    """Describes a task whose rows have one or two texts, and a label in the field "label"."""

    best: tuple[str, str] = ("accuracy", "max")
    answer_fields: tuple[str, ...] = ("label",)
    preprocess: Preprocess | None = drop_unknown_labels
    texts: Callable[[Row], tuple[str, ...]] = text_of  # the one or two texts of a row
    # the parts of a row under --form prompt and --form word; under word the label's word follows
    prompt: Callable[[Row, Form], Parts]
    # the labels' words under --form word; () if the task has no words for these labels
    words: Callable[[Sequence[str]], Sequence[str]] = label_words
    answer_kinds: tuple[str, ...] = (".jsonl", ".csv")
    csv_header: str = "Predicted_Label"  # of the second column in the csv of predictions

    def content(self, row: Row) -> str:
        """The texts of a row without its label, to find rows in both splits."""
        return "\n".join(self.texts(row))

    def special_tokens(self, form: Form) -> tuple[str, ...]:
        """Tokens that the prompts add to the vocabulary, read off the prompts of the toy rows."""
        if form == "plain":
            return ()
        return special_tokens(self.prompt(row, form) for row in self.toy_rows())
