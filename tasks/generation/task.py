"""Fine-tuning on rows whose answers are texts: the family of tasks that a language model's own head
can do.

A row becomes one sequence: end-of-text, the prompt, the answer, end-of-text. Only the answer and
the end after it are learned. Sequences are padded at the right, where causal attention sees nothing
of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn

from config import UserError
from decoding.batched import generate
from decoding.loading import open_model
from engine.pretraining import perplexity
from engine.processes import choose_device
from engine.task import Batch, Cost, Facts, Sums, Task, Tensors
from kernels.linear_cross_entropy import IGNORE
from model import GPT
from tasks import methods
from tasks.encoder import Long, Parts, Special, plain
from tasks.finetuning import Finetuning
from tasks.generation.options import GenerationConfig
from tasks.generation.sequences import Example, Sequences, Writer
from tasks.metrics import longest_copied
from tasks.objectives import nll_and_unlikelihood
from tasks.order import pad_to
from text.rows import Row, Rows

__all__ = ["Answer", "Example", "Generation", "Long", "Parts", "Special", "plain"]


@dataclass(frozen=True)
class Answer:
    """What the model wrote after a prompt, and what is true."""

    prompt: str
    text: str
    reference: str


class Generation(Finetuning):
    """Fill in `columns`, `example` and, where answers are scored, `scores`."""

    config = GenerationConfig
    cfg: GenerationConfig
    choices: ClassVar[tuple[str, ...]] = ("unlikelihood", "objective")
    learned_rows: Sequence[Row] = ()  # where `setup` has read them
    train: Sequences
    val: Sequences

    # --- what a task says

    def example(self, row: Row) -> Example:
        """What is learned of a row."""
        raise NotImplementedError

    def question(self, row: Row) -> Example:
        """What is asked of a validation row, and its true answer."""
        return self.example(row)

    def asked(self, row: Row) -> Parts:
        """What a row of `--predict` gives the model to go on from."""
        return self.question(row).prompt

    def reference(self, row: Row) -> str:
        """The true answer to a row, as `scores` compares it."""
        return plain(self.question(row).answer)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Metrics of the decoded answers to validation rows."""
        return {}

    def copied(self, texts: Sequence[str], field: str = "text") -> dict[str, float]:
        """Most words in a row that a text has from the training rows; nothing where none were
        read."""
        if not self.learned_rows:
            return {}
        copied = longest_copied(texts, [row[field] for row in self.learned_rows])
        return {"longest_copied": float(copied.max(initial=0))}

    def stop_lines(self, prompt: str) -> int:
        """Lines after which the answer to a prompt ends; 0: as many as it has."""
        return self.cfg.stop_lines

    def write_answers(self, path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """The answers to the rows of `--predict`."""
        records = [row.fields | _answered(row, a) for row, a in zip(rows, answers, strict=True)]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # --- rows

    def setup(self, cfg: GenerationConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        self.cfg = cfg
        say = self.begin(say, dry)
        methods.check(cfg)
        self.warnings = ()
        if not cfg.eval_rows:
            self.best = Task.best  # nothing is decoded, so there is no other figure
        if "unlikelihood" in cfg.objective:
            self.terms = {"nll": 1.0, "unlikelihood": cfg.unlikelihood}
        self.open_trunk()
        self.writer = Writer(self.tokenizer, self.seq_len, cfg.strict)
        train, val = self._training_and_validation(say)
        self.train = self._split(train, self.example, "training")
        self.val = self._split(val, self.question, "validation")
        self.learned_rows = self.train.rows
        if known := self.known_rows(train, val):
            self.warnings += (
                f"{known} of {len(train)} training rows also stand among the validation rows",
            )
        # A sequence that goes on with a text does not begin with the end-of-text token.
        begins = [i for i, tokens in enumerate(self.val.tokens) if tokens[0] == self.tokenizer.eot]
        self.shown, self.decoded = begins[:2], begins[: cfg.eval_rows]
        self._set_order()
        if cfg.predict:
            rows = self.rows_to_answer(cfg, say)
            # what --strict does not allow ends here
            self.writer.prompts(rows, self.asked, self.seq_len, lambda text: None)
        for text in self._first_rows():
            say(text)
        return self.facts()

    def _split(
        self, rows: Sequence[Row], example: Callable[[Row], Example], what: str
    ) -> Sequences:
        split = Sequences([], [], Rows(list(rows)).sha256, [], [])
        counts = {"cut": 0, "dropped": 0, "continued": 0}
        for row in rows:
            sequences, happened = self.writer.sequences(example(row), row.where)
            if happened:
                counts[happened] += 1
            for tokens, learned in sequences:
                split.rows.append(row)
                split.tokens.append(np.array(tokens))
                split.learned.append(learned)
                split.references.append(self.reference(row))
        said = {
            "cut": "are cut at the end of their text",
            "dropped": "cannot be cut to fit and are left out",
            "continued": "go on in further sequences",
        }
        for name, count in counts.items():
            if count:
                text = (
                    f"{count} of {len(rows)} {what} rows are longer than {self.seq_len} tokens "
                    f"and {said[name]}"
                )
                self.warnings += (text,)
        if not split.rows:
            raise UserError(
                f"there is no {what} row that fits into {self.seq_len} tokens; raise --seq-len"
            )
        return split

    def prompt(self, i: int) -> list[int]:
        """What validation row `i` gives the model to go on from."""
        return self.writer.prompt(self.question(self.val.rows[i]).prompt, self.seq_len)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch, what is learned between the marks."""
        texts = []
        for i in self.order(0).reshape(-1)[: self.cfg.show_rows]:
            tokens, learned = self.train.tokens[i].tolist(), self.train.learned[i]
            read, answer = (
                self.tokenizer.decode(tokens[:learned]),
                self.tokenizer.decode(tokens[learned:]),
            )
            texts.append(
                f"row {i} ({len(tokens)} tokens, {len(tokens) - learned} of them "
                f"learned):\n{read}⟦{answer}⟧\n"
            )
        return texts

    def cost(self) -> Cost:
        # an objective looks at all logits
        chunked = self.shape.chunked_head and not self.cfg.objective
        shape = dataclasses.replace(self.shape, chunked_head=chunked)
        return dataclasses.replace(super().cost(), shape=shape)

    # --- a step

    def rows(self, split: str, step: int) -> np.ndarray:
        if split == "train":
            return self.order(step)
        # Rows of like length in a batch; those to decode first, that they are decoded together.
        others = ~np.isin(np.arange(len(self.val.rows)), self.decoded)
        return np.lexsort((self.val.lengths, others))[:, None]

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        data = self.train if split == "train" else self.val
        length = pad_to(int(data.lengths[ids].max()), self.padded)
        idx = torch.full((len(ids), length), self.tokenizer.eot)
        targets = torch.full_like(idx, IGNORE)
        for row, i in enumerate(ids):
            tokens, learned = torch.from_numpy(data.tokens[i]), data.learned[i]
            idx[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, learned - 1 : len(tokens) - 1] = tokens[learned:]
        tensors = {"idx": idx, "targets": targets, "ids": torch.from_numpy(np.asarray(ids))}
        weights = dict.fromkeys(self.terms, float((targets != IGNORE).sum()))
        return Batch(tensors, weights, self.amounts(data, ids, idx))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        if "unlikelihood" not in self.terms:
            return {"nll": model(batch["idx"], batch["targets"], reduction="sum")}
        nll, unlikelihood = nll_and_unlikelihood(
            model(batch["idx"]), batch["idx"], batch["targets"]
        )
        return {"nll": nll, "unlikelihood": unlikelihood}

    # --- evaluation

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """Loss and tokens, and the answers to the rows that are decoded."""
        targets = batch["targets"]
        nll = model(batch["idx"], targets, reduction="sum")
        ids = [i for i in batch["ids"].tolist() if i in self.decoded]
        answers = self.answers(model, [self.prompt(i) for i in ids], ids)
        records = {
            i: Answer(*texts, self.val.references[i]) for i, texts in zip(ids, answers, strict=True)
        }
        return {"nll": nll, "tokens": (targets != IGNORE).sum()}, records

    def answers(
        self, model: nn.Module, prompts: Sequence[list[int]], rows: Sequence[int]
    ) -> list[tuple[str, str]]:
        """Each prompt and its decoded continuation; `rows` number them for their draws."""
        assert isinstance(model, GPT)
        texts = [self.tokenizer.decode(prompt, skip_special=True) for prompt in prompts]
        outs = generate(
            model,
            prompts,
            self.cfg,
            self.tokenizer.eot,
            seed=self.cfg.seed,
            rows=rows,
            tokenizer=self.tokenizer,
            stop_lines=[self.stop_lines(text) for text in texts],
        )
        answers = [self.tokenizer.decode(out, skip_special=True) for out in outs]
        return list(zip(texts, answers, strict=True))

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        nll, tokens = sums["nll"], sums["tokens"]
        metrics = {"val_loss": nll / tokens, "val_perplexity": perplexity(nll, tokens)}
        if not records:
            return metrics
        return metrics | self.scores([records[i] for i in sorted(records)])

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        if self.cfg.prompts:
            prompts = [
                [self.tokenizer.eot, *self.tokenizer.encode(text)] for text in self.cfg.prompts
            ]
        else:
            prompts = [self.prompt(i) for i in self.shown]
        answers = self.answers(model, prompts, range(len(prompts)))
        # Special tokens spelled out, unlike in an answer that is scored.
        return [
            (self.tokenizer.decode(p[1:]), text)
            for p, (_, text) in zip(prompts, answers, strict=True)
        ]

    def ready(
        self, cfg: GenerationConfig, where: str, say: Callable[[str], None]
    ) -> tuple[GPT, list[Row]]:
        self.cfg = cfg
        rows = self.rows_to_answer(cfg, say)
        model, self.tokenizer = open_model(where, None, choose_device(cfg.device), torch.float32)
        self.writer = Writer(self.tokenizer, model.context, cfg.strict)
        return model, rows

    def predict(
        self, cfg: GenerationConfig, where: str, path: Path, say: Callable[[str], None]
    ) -> dict[str, float]:
        """Write the answers that the model of a checkpoint gives to the rows of `--predict`, every
        row in its place.

        Returns the scores of those of which the file has the true answers. A row that cannot be
        read is not scored.
        """
        model, rows = self.ready(cfg, where, say)
        prompts = self.writer.prompts(rows, self.asked, model.context, say)
        answers = dict.fromkeys(range(len(rows)), Answer("", "", ""))
        readable = list(prompts)
        for begin in range(0, len(readable), cfg.batch_size):
            some = readable[begin : begin + cfg.batch_size]
            for i, texts in zip(
                some, self.answers(model, [prompts[i] for i in some], some), strict=True
            ):
                answers[i] = Answer(*texts, self.reference(rows[i]))
        self.write_answers(path, rows, [answers[i] for i in range(len(rows))])
        if unread := len(rows) - len(readable):
            say(
                f"{unread:,} of {len(rows):,} rows could not be read: their answers are empty and "
                "not scored"
            )
        known = [answers[i] for i in readable if answers[i].reference.strip()]
        scores = self.scores(known) if known else {}
        if scores and len(known) < len(rows):
            say(f"{len(known):,} of {len(rows):,} rows have a true answer; these are scored")
        return scores


def _answered(row: Row, answer: Answer) -> dict[str, Any]:
    """What a file of answers adds to a row's fields; of a row that could not be read, why."""
    return (
        {"prediction": None, "unreadable": row.fault} if row.fault else {"prediction": answer.text}
    )
