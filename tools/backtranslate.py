"""Back-translation for `--augment`: translates the texts of a file into another language and back,
and keeps their labels.

python -m tools.backtranslate --data quora-train.csv --out back.jsonl
    --to Helsinki-NLP/opus-mt-en-de --back Helsinki-NLP/opus-mt-de-en
Each batch of translations is flushed to OUT.part. A run that was killed continues from that file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from base.cli import entry_point, parse
from base.console import outlive
from base.files import replace_text
from config import Count, PathOrName, SmallCount, UserError, nearest
from decoding.scoring import group_by_length
from text.corpus import records_of
from text.encodings import NotUtf8
from text.readers import MAX_SHOWN, SkippedRows, with_advice
from tools.predictions import check_out

if TYPE_CHECKING:  # the module loads torch
    from tools.translator import Translator

TEXT_COLUMNS = (  # usual names of columns that hold texts
    "sentence",
    "text",
    "document",
    "review",
    "content",
    "article",
    "title",
    "headline",
    "description",
    "short_description",
    "sentence1",
    "question1",
    "premise",
    "text1",
    "#1 String",
    "sentence_A",
    "sentence2",
    "question2",
    "hypothesis",
    "text2",
    "#2 String",
    "sentence_B",
)
EVERY = 5  # seconds between lines of progress

# Gives None for a text that is too long to be translated completely.
Translate = Callable[[Sequence[str]], list[str | None]]


@dataclass(frozen=True)
class BacktranslateConfig:
    """Translate the texts of --data with the model --to, and the translations with the model
    --back."""

    data: PathOrName = ""
    """File of rows: .csv .tsv .txt .json .jsonl .parquet, gzipped or not."""
    to: PathOrName = "Helsinki-NLP/opus-mt-en-de"
    """Translation model from the texts' language into one other language: a hub id or a folder."""
    back: PathOrName = "Helsinki-NLP/opus-mt-de-en"
    """Translation model back into the texts' language: a hub id or a folder."""
    out: PathOrName = ""
    """File to write: .jsonl, with the columns of --data."""
    columns: tuple[str, ...] = ()
    """Columns to translate. Default: those with a usual name for a text."""
    beams: SmallCount = 1
    """Beams in beam search. 1 is greedy decoding."""
    max_tokens: Count = 256
    """Longest text and longest translation, in tokens. Rows with a longer one are left out, because
    a truncated text may have another label."""
    batch_tokens: Count = 4096
    """Tokens in a batch. Fewer tokens need less memory."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""


# --- the rows


def read_cells(file: str) -> list[dict[str, Any]]:
    """The rows of a file with all their columns. Broken rows are reported and left out. Raises
    UserError if no row can be read."""
    rows, left_out = [], SkippedRows()
    for place, cells in list(records_of(Path(file))):
        fault = cells if isinstance(cells, str) else ""
        if isinstance(cells, dict):
            fault = next(
                (
                    f"is not UTF-8 text in column {n!r}"
                    for n, v in cells.items()
                    if isinstance(v, NotUtf8)
                ),
                "",
            )
        if not fault:
            rows.append(cells)
            continue
        if left_out.count < MAX_SHOWN:
            fault = with_advice(fault, cells, file)
            say(f"left out: {file} {place} {fault}")
        left_out.add(f"{place} {fault}")
    if more := left_out.more(file):
        say(more)
    if not rows:
        first = f": {left_out.shown[0]}" if left_out.count else "; give other data"
        raise UserError(f"{file} has no row that can be read{first}")
    return rows


def text_columns(rows: Sequence[dict[str, Any]], named: Sequence[str], file: str) -> list[str]:
    """The columns to translate: those `named` by --columns, or the usual ones. Raises UserError if
    there are none."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    if missing := [name for name in named if name not in found]:
        raise UserError(
            f"{file} has no column {missing[0]!r}{nearest(missing[0], found)}; it has "
            f"{', '.join(found)}"
        )
    columns = [name for name in found if name in (named or TEXT_COLUMNS)]
    if not columns:
        raise UserError(
            f"{file} has no column with a usual name for a text; name some of these with "
            f"--columns: {', '.join(found)}"
        )
    return columns


def texts_of(row: dict[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """The texts of a row that are not empty, by column."""
    return {
        name: row[name] for name in columns if isinstance(row.get(name), str) and row[name].strip()
    }


def round_trip(to: Translate, back: Translate, texts: Sequence[str]) -> list[str | None]:
    """The back-translation of each text, or None for a text that is too long on either way."""
    there = to(texts)
    returned = iter(back([text for text in there if text is not None]))
    return [None if text is None else next(returned) for text in there]


# --- the translations


class Journal:
    """The translations so far, in a file with one JSON object a line. The first line has the
    settings."""

    def __init__(self, path: Path, how: dict[str, Any]):
        """how: the settings. Raises UserError if the file has translations with other settings."""
        written = path.read_bytes() if path.is_file() else b""
        whole = written[: written.rfind(b"\n") + 1]  # drops an incomplete last line
        first, *lines = whole.splitlines() or [json.dumps(how).encode()]
        if first != json.dumps(how).encode():
            raise UserError(
                f"{path} was written with other models or options; remove it, or give another --out"
            )
        records = map(json.loads, lines)
        self.done: dict[str, str | None] = {record["text"]: record["back"] for record in records}
        self.path, self.file = path, path.open("ab")
        self.file.truncate(len(whole))
        if not whole:
            self._append([how])

    def add(self, texts: Sequence[str], back: Sequence[str | None]) -> None:
        """Add the back-translations of texts. They are on the disk when this returns."""
        self._append([{"text": one, "back": other} for one, other in zip(texts, back, strict=True)])
        self.done |= zip(texts, back, strict=True)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _append(self, lines: Sequence[dict[str, Any]]) -> None:
        self.file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def say(text: str) -> None:
    """Report progress on stderr, so that stdout has only the result."""
    print(text, file=sys.stderr, flush=True)


def translate_all(
    texts: Sequence[str], to: Translator, back: Translator, journal: Journal, batch_tokens: int
) -> None:
    """Add the back-translation of every text to the journal. Reports progress, and the time left,
    estimated from the tokens left."""
    todo = [text for text in texts if text not in journal.done]
    if len(todo) < len(texts):
        say(f"continuing: {len(texts) - len(todo):,} of {len(texts):,} texts are done")
    lengths = dict(zip(todo, to.lengths(todo), strict=True))
    total, done, began, reported = sum(lengths.values()), 0, time.monotonic(), 0.0
    for chosen in group_by_length(list(lengths.values()), batch_tokens):
        batch = [todo[i] for i in chosen]
        journal.add(batch, round_trip(to, back, batch))
        done += sum(lengths[text] for text in batch)
        seconds = time.monotonic() - began
        if seconds - reported >= EVERY or done == total:
            reported, rate = seconds, done / max(1e-9, seconds)
            left = (total - done) / max(1e-9, rate) / 60
            say(
                f"{len(journal.done):,} of {len(texts):,} texts, {rate:,.0f} tokens/s, {left:.1f} "
                "min left"
            )


def replace_texts(
    rows: Sequence[dict[str, Any]], columns: Sequence[str], done: dict[str, str | None]
) -> tuple[list[dict], int, int]:
    """The rows with their new texts, the number of rows that came back unchanged, and the number of
    rows with a text that is too long. Only the first have changed texts and are kept."""
    kept, same, long = [], 0, 0
    for row in rows:
        texts = texts_of(row, columns)
        new = {name: done[text] for name, text in texts.items()}
        if None in new.values():
            long += 1
        elif all(str(new[name]).split() == text.split() for name, text in texts.items()):
            same += 1
        else:
            kept.append(row | new)
    return kept, same, long


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as jsonl, atomically."""
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    """Run the command."""
    cfg = parse(BacktranslateConfig, sys.argv[1:])
    outlive()
    if not cfg.data:
        raise UserError("--data FILE is missing: the rows to translate")
    out = check_out(cfg.out, [cfg.data])
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: name a .jsonl file")
    if out.exists():
        print(f"{out} already exists: there is nothing to do. Remove it to translate again")
        return
    rows = read_cells(cfg.data)
    columns = text_columns(rows, cfg.columns, cfg.data)
    texts = list(dict.fromkeys(text for row in rows for text in texts_of(row, columns).values()))
    # Imported late: torch would slow down --help and the error for a mistyped option.
    from tools.translator import Translator

    how = {"to": cfg.to, "back": cfg.back, "beams": cfg.beams, "max_tokens": cfg.max_tokens}
    to, back = (
        Translator(where, option, cfg.beams, cfg.max_tokens, cfg.device)
        for where, option in ((cfg.to, "--to"), (cfg.back, "--back"))
    )
    with contextlib.closing(Journal(out.with_name(out.name + ".part"), how)) as journal:
        translate_all(texts, to, back, journal, cfg.batch_tokens)
    kept, same, long = replace_texts(rows, columns, journal.done)
    write(out, kept)
    journal.path.unlink()
    print(
        f"{out}: {len(kept):,} rows, {' and '.join(columns)} back from {cfg.to}. Left out: "
        f"{same:,} that came back unchanged, {long:,} with more than "
        f"{min(to.max_tokens, back.max_tokens)} tokens or no end"
    )


if __name__ == "__main__":
    entry_point(main)
