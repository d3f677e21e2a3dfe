"""Lyrics: each song is one document. With --with-title, "Title, by Artist" and a blank line come
first.

python -m finetune.lyrics --init gpt2 --data songs.csv --with-title
python generate.py runs/lyrics "My Title, by An Artist"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from base.cli import entry_point
from config import UserError
from finetune import generate
from tasks import metrics
from tasks.description import PreprocessContext
from tasks.generation.description import Answer, Example, GenerationDescription
from tasks.generation.options import GenerationConfig
from text.row import Row


@dataclass(frozen=True)
class LyricsConfig(GenerationConfig):
    """Options of the lyrics task."""

    with_title: bool = False
    """Begin each song with a line of its title and artist, so that such a line can be a prompt."""
    text_column: str | None = None
    """Column of the lyrics. Default: text or lyrics."""
    song_column: str | None = None
    """Column of the title. Default: song or title, if the file has one."""
    artist_column: str | None = None
    """Column of the artist. Default: artist, if the file has one."""


def check_titles(source: PreprocessContext, rows: list[Row], spec: str, split: str) -> list[Row]:
    """Raise UserError for --with-title and a file without titles."""
    if source.cfg.with_title and not any(row["song"] for row in rows):
        raise UserError(
            f"--with-title: {spec} has no title in a column song or title; name the column with "
            "--song-column NAME"
        )
    return rows


def title(row: Row, cfg: LyricsConfig) -> str:
    """The title line of a song, without a newline. Empty for a song without a title."""
    if not cfg.with_title or not row["song"].strip():
        return ""
    return ", by ".join(filter(None, (row["song"].strip(), row["artist"].strip())))


def example(row: Row, cfg: LyricsConfig) -> Example:
    """The whole song is learned, without a prompt."""
    song = eval_example(row, cfg)
    return Example(prompt=(), answer=(*song.prompt, *song.answer))


def eval_example(row: Row, cfg: LyricsConfig) -> Example:
    """The prompt is the title line, or the first line of a song without one."""
    text = row["text"].strip()
    if named := title(row, cfg):
        return Example(prompt=(named,), answer=(f"\n\n{text}",))
    first, newline, rest = text.partition("\n")
    return Example(prompt=(first,), answer=(newline + rest,))


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """Diversity, repetition, and the longest run of words copied from the training songs."""
    texts = [a.text for a in answers]
    return {
        "distinct_1": metrics.distinct(texts, 1),
        "distinct_2": metrics.distinct(texts, 2),
        "repetition": metrics.repetition_rate(texts),
        **metrics.copied(texts, [row["text"] for row in train_rows]),
    }


TASK = GenerationDescription(
    name="lyrics",
    config=LyricsConfig,
    defaults={"epochs": 5, "lr": 1e-4, "eval_rows": 16, "top_p": 0.95, "max_new_tokens": 300},
    columns={"text": ("text", "lyrics"), "song": ("song", "title"), "artist": ("artist",)},
    optional=("song", "artist"),
    answer_fields=("text",),
    preprocess=check_titles,
    example=example,
    eval_example=eval_example,
    scores=scores,
    toy=(
        {
            "song": "Ferry",
            "artist": "The Low Tides",
            "text": "The ferry leaves at half past nine,\nI have no ticket and no time.\n\n"
            "Wave to me, wave to me.",
        },
        {
            "song": "Kitchen Light",
            "artist": "Ada Reed",
            "text": "You left the kitchen light on low,\nA kettle and a radio.\n\n"
            "Play it slow, play it slow.",
        },
        {
            "song": "Seven Bridges",
            "artist": "The Low Tides",
            "text": "Seven bridges, seven tolls,\nA pocket full of paper holes.\n\n"
            "Home again, home again.",
        },
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
