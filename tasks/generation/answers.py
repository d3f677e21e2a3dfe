"""Decodes a model's answers: in evaluations, in samples, and for the rows of --predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decoding.batched import generate
from model import GPT
from tasks.generation.description import Answer, GenerationDescription
from tasks.generation.options import GenerationConfig
from tasks.generation.sequences import SequenceEncoder
from text.overlap import Overlap, with_clean
from text.row import Row
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answerer:
    """Decodes answers with the decoding options of a task."""

    task: GenerationDescription
    cfg: GenerationConfig
    tokenizer: Tokenizer

    def __call__(
        self, model: GPT, prompts: Sequence[list[int]], rows: Sequence[int]
    ) -> list[tuple[str, str]]:
        """Each prompt and the model's answer to it, as texts without special tokens.

        rows: the row numbers of the prompts. They seed the random draws, so that an answer does not
        depend on the batch.
        """
        outs = generate(
            model,
            prompts,
            self.cfg,
            self.encoder(model.context).end,
            seed=self.cfg.seed,
            rows=rows,
            tokenizer=self.tokenizer,
            stop_lines=[self.cfg.stop_lines or self.task.stop_lines] * len(prompts),
        )
        return [
            (self._text(prompt), self._text(out)) for prompt, out in zip(prompts, outs, strict=True)
        ]

    def encoder(self, context: int) -> SequenceEncoder:
        """The encoder of the task's rows for a model that reads `context` tokens."""
        return SequenceEncoder(self.tokenizer, context, self.cfg.strict, self.task.end)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)


@dataclass(frozen=True)
class TextPredictor:
    """A finished model and the rows of --predict that it will answer."""

    model: GPT
    answerer: Answerer
    rows: list[Row]
    train_rows: Sequence[Row]  # for scores; empty if they were not read
    overlap: Overlap | None  # of the rows with the training rows

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Write the answers to all rows, in the order of the file. Returns the scores of the rows
        with a true answer. A row that cannot be read has an empty answer and is not scored."""
        task, cfg, model, rows = self.answerer.task, self.answerer.cfg, self.model, self.rows
        encoder = self.answerer.encoder(model.context)
        prompts = encoder.prompts(
            rows, lambda row: task.as_predict_example(row, cfg).prompt, model.context, say
        )
        answers = dict.fromkeys(range(len(rows)), Answer("", "", ""))
        readable = list(prompts)
        for begin in range(0, len(readable), cfg.batch_size):
            ids = readable[begin : begin + cfg.batch_size]
            decoded = self.answerer(model, [prompts[i] for i in ids], ids)
            for i, texts in zip(ids, decoded, strict=True):
                answers[i] = Answer(*texts, task.as_predict_example(rows[i], cfg).true_answer)
        task.write(path, rows, [answers[i] for i in range(len(rows))])
        if unread := len(rows) - len(readable):
            say(
                f"{unread:,} of {len(rows):,} rows could not be read. Their answers are empty and "
                "are not scored"
            )
        known = [i for i in readable if answers[i].reference.strip()]
        scores = self._scores([answers[i] for i in known])
        if scores and len(known) < len(rows):
            say(f"{len(known):,} of {len(rows):,} rows have a true answer. Only these are scored")
        if self.overlap is None or not scores:
            return scores
        clean = self._scores([answers[i] for i in known if not self.overlap.shared[i]])
        counts = self.overlap.part(np.array(known)).counts
        return with_clean(scores, clean) | {"clean": counts}

    def _scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        return self.answerer.task.scores(answers, self.train_rows) if answers else {}
