"""Inference: does a premise entail a hypothesis, contradict it, or neither? RTE, SICK, MultiNLI,
XNLI in any language.

python -m finetune.nli --init gpt2 --data sick_train.tsv --val-data sick_dev.tsv
--form word: premise, <separator>, hypothesis, <infer>, and the language model answers with the
label's word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from base.cli import entry_point
from engine.task import Facts
from finetune import command
from tasks.classification.options import ClassificationConfig
from tasks.classification.task import Classification
from tasks.encoder import Long, Parts, Special
from text.rows import Row

SEPARATOR, INFER = Special("<separator>"), Special("<infer>")
# of GLUE's numbers
WORDS = {2: ("entailment", "not entailment"), 3: ("entailment", "neutral", "contradiction")}


@dataclass(frozen=True)
class NliConfig(ClassificationConfig):
    """Options of the task of inference."""

    premise_column: str | None = None
    """Column of the premise. Default: premise, sentence1 or sentence_A."""
    hypothesis_column: str | None = None
    """Column of the hypothesis. Default: hypothesis, sentence2 or sentence_B."""
    label_column: str | None = None
    """Column of the label. Default: label, gold_label or entailment_judgment."""


class Nli(Classification):
    name = "nli"
    config = NliConfig
    columns = {
        "premise": ("premise", "sentence1", "sentence_A"),
        "hypothesis": ("hypothesis", "sentence2", "sentence_B"),
    }
    columns |= {
        "label": ("label", "gold_label", "entailment_judgment"),
        "id": ("id", "idx", "pair_ID", "pairID"),
    }
    optional = ("id",)
    toy = (
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
    )

    def setup(self, cfg: NliConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        self.special = (SEPARATOR, INFER) if cfg.form == "word" else ()
        return super().setup(cfg, say, dry)

    def texts(self, row: Row) -> tuple[str, ...]:
        return row["premise"].strip(), row["hypothesis"].strip()

    def prompt(self, row: Row) -> Parts:
        premise, hypothesis = map(Long, self.texts(row))
        if self.cfg.form == "word":
            return premise, SEPARATOR, hypothesis, INFER
        return "Premise: ", premise, "\nHypothesis: ", hypothesis, "\nDoes it follow?"

    def label_words(self, labels: Sequence[str]) -> Sequence[str]:
        return super().label_words(labels) or WORDS.get(len(labels), ())


if __name__ == "__main__":
    entry_point(lambda: command(Nli()))
