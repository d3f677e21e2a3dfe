"""Any text in any language: each document, or with --lines each line of a file, is learned between
two end-of-text tokens.

python -m finetune.text --init gpt2 --data notes.txt
python -m finetune.text --init FOLDER --data nsmc_train.txt --text-column document
"""

from __future__ import annotations

from dataclasses import dataclass

from base.cli import entry_point
from config import CountOrNone
from finetune import generate
from tasks.description import PreprocessContext
from tasks.generation.description import Example, GenerationDescription
from tasks.generation.options import GenerationConfig
from text.row import Row

PARTS = 10  # parts that a single document is split into


@dataclass(frozen=True)
class TextConfig(GenerationConfig):
    """Options of the text task."""

    lines: bool = False
    """Read each line of a text file as a row, instead of each document."""
    text_column: str | None = None
    """Column of the text. Default: text, document, sentence or content."""
    eval_rows: CountOrNone = 0
    """Number of validation texts to decode in an evaluation. They have no score, so the default is
    0."""


def divide(source: PreprocessContext, rows: list[Row], spec: str, split: str) -> list[Row]:
    """Split a single training document into parts, so that some of them can be held out."""
    if len(rows) > 1 or split != "train" or source.cfg.val_data:
        return rows
    lines = rows[0]["text"].splitlines(keepends=True)
    bounds = [len(lines) * i // PARTS for i in range(PARTS + 1)]
    parts = ["".join(lines[a:b]) for a, b in zip(bounds, bounds[1:])]
    parts = [part for part in parts if part.strip()]
    source.say(
        f"{spec} is one document. It is split into {len(parts)}, so that one of them can be held "
        "out"
    )
    return [Row({"text": part}, rows[0].where) for part in parts]


def example(row: Row, cfg: TextConfig) -> Example:
    """The whole text is learned. It has no reference, because no continuation is the right one."""
    return Example(prompt=(), answer=(row["text"],), reference="")


def beginning(row: Row, cfg: TextConfig) -> Example:
    """A row of --predict is the beginning of a text, which the model continues."""
    return Example(prompt=(row["text"],), answer=(), reference="")


TASK = GenerationDescription(
    name="text",
    config=TextConfig,
    columns={"text": ("text", "document", "sentence", "content")},
    preprocess=divide,
    example=example,
    predict_example=beginning,
    toy=(
        {"text": "Rain is due in the north by noon; the south stays dry."},
        {"text": "The library opens at ten, and on Sundays not at all."},
        {"text": "오늘은 하늘이 맑고 바람이 붑니다."},
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
