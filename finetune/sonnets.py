"""Sonnets: the model continues the first three lines with the other eleven.

python -m finetune.sonnets --init gpt2 --data sonnets.txt --val-data TRUE_sonnets_held_out_dev.txt --predict sonnets_held_out.txt
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.cli import entry_point
from config import UserError
from finetune import generate
from tasks import metrics
from tasks.generation.description import Answer, Example, GenerationDescription
from tasks.generation.options import GenerationConfig
from text.row import Record, Row

LINES = 14
GIVEN = 3  # lines in a prompt
NUMBER = re.compile(r"\s*(\d+)\s*")


def read_poems(text: str, where: str) -> Iterator[Record]:
    """The poems in a file of CS224N: a header, then each poem under a line with its number. Poems
    may have any length. Raises UserError for a file without poems."""
    number, begin, lines, found = "", 0, [""], False
    for n, line in enumerate([*text.replace("\r\n", "\n").split("\n"), "0"], 1):
        if not NUMBER.fullmatch(line):
            lines.append(line)
            continue
        if number:
            found = True
            yield f"line {begin}", {"number": number, "text": "\n".join(lines).strip("\n")}
        number, begin, lines = line.strip(), n, []
    if not found:
        raise UserError(f"{where} holds no poems; put each poem under a line with its number")


def example(row: Row, cfg: GenerationConfig) -> Example:
    """The whole poem is learned, without a prompt."""
    return Example(prompt=(), answer=(row["text"],))


def eval_example(row: Row, cfg: GenerationConfig) -> Example:
    """The prompt is the first three lines, and the rest is the answer."""
    lines = row["text"].splitlines(keepends=True)
    return Example(prompt=("".join(lines[:GIVEN]),), answer=("".join(lines[GIVEN:]),))


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """chrF, and how well the whole poems (prompt and answer) keep to the form of a sonnet."""
    texts, references = [a.text for a in answers], [a.reference for a in answers]
    poems = [a.prompt + a.text for a in answers]
    return {
        "chrf": metrics.chrf(texts, references),
        # CS224N scores the whole poem
        "chrf_poem": metrics.chrf(poems, [a.prompt + a.reference for a in answers]),
        "distinct_1": metrics.distinct(texts, 1),
        "distinct_2": metrics.distinct(texts, 2),
        **metrics.rhyming_accuracy(poems, given=GIVEN),
        "lines_right": metrics.line_count_accuracy(poems, LINES),
        "repetition": metrics.repetition_rate(texts),
        **metrics.copied(texts, [row["text"] for row in train_rows]),
    }


def write(path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
    """Write the poems, each with its prompt and number, in CS224N's format of predictions."""
    poems = [
        f"\n{row['number']}\n{a.prompt}{a.text}\n\n" for row, a in zip(rows, answers, strict=True)
    ]
    path.write_text("--Generated Sonnets-- \n\n" + "".join(poems), encoding="utf-8")


TASK = GenerationDescription(
    name="sonnets",
    config=GenerationConfig,
    defaults={
        "epochs": 10,
        "batch_size": 8,
        "lr": 1e-4,
        "temperature": 0.9,
        "top_p": 0.9,
        "max_new_tokens": 300,
    },
    columns={"number": ("number", "id"), "text": ("text", "sonnet", "poem")},
    optional=("number",),
    readers={".txt": read_poems},
    answer_kinds=(".txt",),
    example=example,
    eval_example=eval_example,
    stop_lines=LINES - GIVEN,
    scores=scores,
    best=("chrf", "max"),
    write=write,
    toy=(
        {
            "number": "1",
            "text": "The winter wood is white and still,\nNo bird will sing, no water run,\n"
            "The snow lies deep upon the hill\nAnd waits all morning for the sun.\n",
        },
        {
            "number": "2",
            "text": "I sold my boat, I sold my net,\nI walked the road that leaves the sea,\n"
            "But where the stones at night are wet\nI hear it turn and call to me.\n",
        },
        {
            "number": "3",
            "text": "A candle in a window set,\nA chair, a table and a key:\n"
            "The house remembers, we forget;\nIt keeps a place for you and me.\n",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
