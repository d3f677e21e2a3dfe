"""A task whose answers are labels, as its file in finetune/ describes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from adapters.options import Form
from tasks.classification.labels import drop_unknown_labels, label_words
from tasks.description import Description, Parts, Preprocess, special_tokens
from text.rows import Row


def text_of(row: Row) -> tuple[str, ...]:
    """The one text of a row."""
    return (row["text"].strip(),)


@dataclass(frozen=True, kw_only=True)
class ClassificationDescription(Description):
    """Rows with a text or two, and a label in the field "label"."""

    best: tuple[str, str] = ("accuracy", "max")
    answer_fields: tuple[str, ...] = ("label",)
    preprocess: Preprocess | None = drop_unknown_labels
    texts: Callable[[Row], tuple[str, ...]] = text_of  # the text of a row, or its two
    # the parts of a row under --form prompt and --form word; the label's word stands after them
    prompt: Callable[[Row, Form], Parts]
    # the labels' words under --form word; none where the task knows none
    words: Callable[[Sequence[str]], Sequence[str]] = label_words
    answer_kinds: tuple[str, ...] = (".jsonl", ".csv")
    csv_header: str = "Predicted_Label"  # of the second column of the csv of predictions

    def content(self, row: Row) -> str:
        return "\n".join(self.texts(row))

    def special_tokens(self, form: Form) -> tuple[str, ...]:
        """Tokens that the prompts add to the vocabulary, as those of the toy rows show."""
        if form == "plain":
            return ()
        return special_tokens(self.prompt(row, form) for row in self.toy_rows())
