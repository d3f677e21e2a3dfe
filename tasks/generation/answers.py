"""A model's answers to prompts: in an evaluation, in samples, and to the rows of --predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from decoding.batched import generate
from model import GPT
from tasks.generation.description import Answer, GenerationDescription
from tasks.generation.options import GenerationConfig
from tasks.generation.sequences import SequenceEncoder
from text.rows import Row
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answerer:
    """Decodes a task's answers as its options say."""

    task: GenerationDescription
    cfg: GenerationConfig
    tokenizer: Tokenizer

    def __call__(
        self, model: GPT, prompts: Sequence[list[int]], rows: Sequence[int]
    ) -> list[tuple[str, str]]:
        """Each prompt and its decoded continuation; `rows` number them for their draws."""
        outs = generate(
            model,
            prompts,
            self.cfg,
            self.tokenizer.eot,
            seed=self.cfg.seed,
            rows=rows,
            tokenizer=self.tokenizer,
            stop_lines=[self.cfg.stop_lines or self.task.stop_lines] * len(prompts),
        )
        return [
            (self._text(prompt), self._text(out)) for prompt, out in zip(prompts, outs, strict=True)
        ]

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)


@dataclass(frozen=True)
class TextPredictor:
    """A finished model and the rows of --predict that it is to answer."""

    model: GPT
    answerer: Answerer
    rows: list[Row]
    train_rows: Sequence[Row]  # the training rows, where they are known

    def write(self, path: Path, say: Callable[[str], None]) -> dict[str, float]:
        """Write the answers to all rows, each in its place. Returns the scores of those whose true
        answers are known; a row that cannot be read is not scored."""
        task, cfg, model, rows = self.answerer.task, self.answerer.cfg, self.model, self.rows
        encoder = SequenceEncoder(self.answerer.tokenizer, model.context, cfg.strict)
        prompts = encoder.prompts(
            rows, lambda row: task.as_predict_example(row, cfg).prompt, model.context, say
        )
        answers = dict.fromkeys(range(len(rows)), Answer("", "", ""))
        readable = list(prompts)
        for begin in range(0, len(readable), cfg.batch_size):
            some = readable[begin : begin + cfg.batch_size]
            found = self.answerer(model, [prompts[i] for i in some], some)
            for i, texts in zip(some, found, strict=True):
                answers[i] = Answer(*texts, task.as_predict_example(rows[i], cfg).true_answer)
        task.write(path, rows, [answers[i] for i in range(len(rows))])
        if unread := len(rows) - len(readable):
            say(
                f"{unread:,} of {len(rows):,} rows could not be read: their answers are empty and "
                "not scored"
            )
        known = [answers[i] for i in readable if answers[i].reference.strip()]
        scores = task.scores(known, self.train_rows) if known else {}
        if scores and len(known) < len(rows):
            say(f"{len(known):,} of {len(rows):,} rows have a true answer; these are scored")
        return scores
