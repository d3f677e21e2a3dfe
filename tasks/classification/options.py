"""Options of tasks whose answers are labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from adapters.options import LORA, Cut, Form, Pooling
from config import LARGEST, Positive, Probability, Range, UserError, Weight, Wheres
from tasks.options import FinetuneConfig

Classifier = Literal["gpt2", "naive-bayes", "tf-idf", "lstm"]
AuxiliaryLoss = Literal["rdrop", "simcse"]


@dataclass(frozen=True)
class ClassificationConfig(FinetuneConfig):
    """Options of a task whose answers are labels."""

    model: Classifier = "gpt2"
    """What classifies: gpt2; or, beside it on the same rows, naive-bayes, tf-idf (a linear model on
    it), lstm (on embeddings of its own)."""
    form: Form = "plain"
    """plain: a head over the text; prompt: a head over a prompt with the text in it; word: the
    language model's own head answers the prompt with a label's word."""
    words: tuple[str, ...] = ()
    """Under --form word, the labels' words in the labels' order. Default: the task's, else the
    labels themselves."""
    pooling: Pooling = "last"
    """What a head reads: the state of the last token, the mean of all, a mean with learned weights,
    or an LSTM over them."""
    cut: Cut = "end"
    """Where a text that is too long is cut."""
    dropout: Probability = 0.1
    """Dropout on embeddings, attention and residual branches."""
    head_dropout: Probability = 0.1
    """Dropout on what a head has pooled."""
    class_weights: tuple[str, ...] = ()
    """Weight of the rows of each label, in the labels' order; or balanced: by how rare a label is.
    Default: all alike."""
    label_smoothing: Probability = 0.0
    """Share of a row's target that is spread over all labels."""
    objective: tuple[AuxiliaryLoss, ...] = ()
    """Loss terms besides the labels': rdrop, simcse. Both compare two passes of a row under
    different dropout."""
    rdrop: Weight = 1.0
    """Weight alpha of R-Drop's divergence."""
    simcse: Weight = 0.1
    """Weight of SimCSE's contrastive loss."""
    simcse_temperature: Positive = 0.05
    """Divides SimCSE's cosine similarities."""
    simcse_group: Annotated[int, Range(2, LARGEST)] = 8
    """Rows whose texts are each other's negatives in SimCSE: fixed groups, whatever the
    micro-batch."""
    also: tuple[str, ...] = ()
    """Other tasks to train at once, each with a head of its own: TASK:WEIGHT, the weight of its
    loss."""
    also_data: tuple[Wheres, ...] = ()
    """Their training rows, in the same order. Default: their toy rows."""
    augment: Wheres | None = None
    """More training rows, in the form of --data: back-translations, paraphrases, hard examples."""
    augment_weight: Weight = 1.0
    """Weight of each of those rows' losses."""
    allow_overlap: bool = False
    """Go on where more than a hundredth of the training rows also stand among the validation
    rows."""

    def training_files(self) -> tuple[str | None, ...]:
        return *super().training_files(), self.augment, *self.also_data


def check_classification(cfg: ClassificationConfig) -> None:
    """Raise UserError for options that do not go together."""
    # of the states, which SimCSE compares
    draws = cfg.dropout or (cfg.method in LORA and cfg.lora_dropout)
    of_head = cfg.head_dropout and cfg.form != "word"
    for objective in cfg.objective:
        if not draws and not (objective == "rdrop" and of_head):
            raise UserError(
                f"--objective {objective} compares two passes of a row under different dropout; "
                "set --dropout"
            )
    if cfg.compile_unit == "model":
        raise UserError(
            "--compile-unit model: a classifier is compiled block by block; leave it out"
        )
    if cfg.model == "lstm" and (cfg.form == "word" or cfg.method != "full"):
        raise UserError(
            "--model lstm has no language model's head and no blocks: leave out --form word and "
            "--method"
        )
    if cfg.form == "word" and cfg.pooling != "last":
        raise UserError(
            f"--pooling {cfg.pooling} is for a head, and under --form word there is none; leave it "
            "out"
        )
    if cfg.form == "word" and cfg.also:
        raise UserError(
            "--also trains heads, and --form word the language model's own: use another form, or "
            "leave --also out"
        )
    if cfg.words and cfg.form != "word":
        raise UserError("--words belongs to --form word; add it, or leave --words out")
    if cfg.augment_weight != 1 and not cfg.augment:
        raise UserError(
            "--augment-weight belongs to --augment FILE; add it, or leave the weight out"
        )
