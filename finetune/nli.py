"""Natural language inference: a premise entails a hypothesis, contradicts it, or neither. It reads
RTE, SICK, MultiNLI and XNLI, in any language.

python -m finetune.nli --init gpt2 --data sick_train.tsv --val-data sick_dev.tsv
With --form word a row reads premise, <separator>, hypothesis, <infer>, and the language model
answers with the label's word.
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
from tasks.description import Parts, SpecialToken, Truncatable
from text.row import Row

SEPARATOR, INFER = SpecialToken("<separator>"), SpecialToken("<infer>")
# words for GLUE's numeric labels, by the number of labels
WORDS = {2: ("entailment", "not entailment"), 3: ("entailment", "neutral", "contradiction")}


@dataclass(frozen=True)
class NliConfig(ClassificationConfig):
    """Options of the inference task."""

    premise_column: str | None = None
    """Column of the premise. Default: premise, sentence1 or sentence_A."""
    hypothesis_column: str | None = None
    """Column of the hypothesis. Default: hypothesis, sentence2 or sentence_B."""
    label_column: str | None = None
    """Column of the label. Default: label, gold_label or entailment_judgment."""


def texts(row: Row) -> tuple[str, ...]:
    """Premise and hypothesis."""
    return row["premise"].strip(), row["hypothesis"].strip()


def prompt(row: Row, form: Form) -> Parts:
    """The two texts, with special tokens between them under --form word and words under prompt."""
    premise, hypothesis = map(Truncatable, texts(row))
    if form == "word":
        return premise, SEPARATOR, hypothesis, INFER
    return "Premise: ", premise, "\nHypothesis: ", hypothesis, "\nDoes it follow?"


TASK = ClassificationDescription(
    name="nli",
    config=NliConfig,
    columns={
        "premise": ("premise", "sentence1", "sentence_A"),
        "hypothesis": ("hypothesis", "sentence2", "sentence_B"),
        "label": ("label", "gold_label", "entailment_judgment"),
        "id": ("id", "idx", "pair_ID", "pairID"),
    },
    optional=("id",),
    texts=texts,
    prompt=prompt,
    words=functools.partial(label_words, words_by_count=WORDS),
    toy=(
        {
            "premise": "Two dogs run over a field.",
            "hypothesis": "Animals are outdoors.",
            "label": "entailment",
        },
        {
            "premise": "Two dogs run over a field.",
            "hypothesis": "The dogs chase a hare.",
            "label": "neutral",
        },
        {
            "premise": "Two dogs run over a field.",
            "hypothesis": "The dogs are asleep.",
            "label": "contradiction",
        },
        {
            "premise": "A woman plays the cello.",
            "hypothesis": "Someone makes music.",
            "label": "entailment",
        },
        {
            "premise": "A woman plays the cello.",
            "hypothesis": "She plays in a hall.",
            "label": "neutral",
        },
        {
            "premise": "A woman plays the cello.",
            "hypothesis": "Nobody plays an instrument.",
            "label": "contradiction",
        },
        {"premise": "눈이 많이 왔다.", "hypothesis": "날씨가 추웠다.", "label": "neutral"},
        {"premise": "눈이 많이 왔다.", "hypothesis": "눈이 오지 않았다.", "label": "contradiction"},
    ),
)

if __name__ == "__main__":
    entry_point(lambda: classify(TASK))
