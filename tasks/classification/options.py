"""Options of classification tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from adapters.options import LORA, Cut, Form, Pooling
from config import LARGEST, PathsOrNames, Positive, Probability, Range, UserError, Weight
from tasks.options import FinetuneConfig

Classifier = Literal["gpt2", "naive-bayes", "tf-idf", "lstm"]
AuxiliaryLoss = Literal["rdrop", "simcse"]


@dataclass(frozen=True)
class ClassificationConfig(FinetuneConfig):
    """Options of a classification task."""

    model: Classifier = "gpt2"
    """The classifier: gpt2, or a baseline on the same rows: naive-bayes, tf-idf (a linear model) or
    lstm (on embeddings that it learns itself)."""
    form: Form = "plain"
    """plain: a head reads the text. prompt: a head reads a prompt with the text in it. word: the
    language model's own head answers the prompt with a label's word."""
    words: tuple[str, ...] = ()
    """The labels' words under --form word, in the labels' order. Default: the task's words, or the
    labels themselves."""
    pooling: Pooling = "last"
    """What a head reads: the state of the last token, the mean of all states, a mean with learned
    weights, or an LSTM over all states."""
    cut: Cut = "end"
    """Where to truncate a text that is too long."""
    dropout: Probability = 0.1
    """Dropout on embeddings, attention and residual branches."""
    head_dropout: Probability = 0.1
    """Dropout on the pooled states that a head reads."""
    class_weights: tuple[str, ...] = ()
    """One weight for the rows of each label, in the labels' order, or balanced, which weights rare
    labels more. Default: 1 for all."""
    label_smoothing: Probability = 0.0
    """Fraction of a row's target that is spread over all labels."""
    objective: tuple[AuxiliaryLoss, ...] = ()
    """Loss terms in addition to the labels' loss: rdrop, simcse. Both compare two passes of a row
    under different dropout."""
    rdrop: Weight = 1.0
    """Weight alpha of R-Drop's divergence."""
    simcse: Weight = 0.1
    """Weight of SimCSE's contrastive loss."""
    simcse_temperature: Positive = 0.05
    """Temperature that divides SimCSE's cosine similarities."""
    simcse_group: Annotated[int, Range(2, LARGEST)] = 8
    """Rows in a group. In SimCSE, the rows of a group are each other's negatives. The micro-batch
    never splits a group."""
    also: tuple[str, ...] = ()
    """Auxiliary tasks to train at the same time, each on its own head: TASK:WEIGHT, where WEIGHT
    multiplies the task's loss."""
    also_data: tuple[PathsOrNames, ...] = ()
    """Training rows of the auxiliary tasks, in the order of --also. Default: their toy rows."""
    augment: PathsOrNames | None = None
    """Additional training rows, in the form of --data: back-translations, paraphrases, hard
    examples."""
    augment_weight: Weight = 1.0
    """Weight of the loss of each --augment row."""
    allow_overlap: bool = False
    """Allow more than 1 % of the training rows to be validation rows too."""

    def training_files(self) -> tuple[str | None, ...]:
        """As for every task, with the files of --augment and --also-data."""
        return *super().training_files(), self.augment, *self.also_data


def check_classification(cfg: ClassificationConfig) -> None:
    """Raise UserError for options that cannot be combined."""
    # SimCSE compares hidden states, so it needs dropout below the head. R-Drop compares the
    # outputs, so dropout in the head is enough.
    in_states = cfg.dropout or (cfg.method in LORA and cfg.lora_dropout)
    in_head = cfg.head_dropout and cfg.form != "word"
    for objective in cfg.objective:
        if not in_states and not (objective == "rdrop" and in_head):
            raise UserError(
                f"--objective {objective} compares two passes of a row under different dropout; "
                "set --dropout above 0"
            )
    if cfg.compile_unit == "model":
        raise UserError(
            "--compile-unit model: a classifier is compiled block by block; leave it out"
        )
    if cfg.model == "lstm" and (cfg.form == "word" or cfg.method != "full"):
        raise UserError(
            "--model lstm has no blocks and no language-model head; leave out --form word and "
            "--method"
        )
    if cfg.form == "word" and cfg.pooling != "last":
        raise UserError(
            f"--pooling {cfg.pooling} is for a classifier's head, and --form word has none; leave "
            "it out"
        )
    if cfg.form == "word" and cfg.also:
        raise UserError(
            "--also trains heads, but --form word answers with the language model's own head; use "
            "another form, or leave --also out"
        )
    if cfg.words and cfg.form != "word":
        raise UserError("--words belongs to --form word; add it, or leave --words out")
    if cfg.augment_weight != 1 and not cfg.augment:
        raise UserError(
            "--augment-weight belongs to --augment FILE; add it, or leave --augment-weight out"
        )
