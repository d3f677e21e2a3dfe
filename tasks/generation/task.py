"""Fine-tuning for generation: the language model's own head writes an answer after a prompt.

A row becomes a sequence: end-of-text, the prompt, the answer, end-of-text. Only the answer and the
final end-of-text are learned. The prompt of a conversation has earlier answers, which are learned
too. Sequences are padded at the right, where causal attention never reads, or packed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from decoding.loading import open_model
from decoding.scoring import perplexity
from engine.processes import choose_device
from engine.task import Batch, Cost, Facts, Sums, Task, Tensors
from kernels.linear_cross_entropy import IGNORE
from model import GPT
from tasks import methods
from tasks.description import SpecialToken
from tasks.finetuning import Finetuning
from tasks.generation.answers import Answerer, TextPredictor
from tasks.generation.description import Answer, GenerationDescription
from tasks.generation.options import GenerationConfig
from tasks.generation.packing import PackedPast, pack
from tasks.generation.sequences import SequenceEncoder, SequenceSplit
from tasks.objectives import nll_and_unlikelihood
from tasks.order import bucket_for
from tasks.source import Source
from tasks.trunk import Trunk
from text.overlap import with_clean
from text.row import Row


class Generation(Finetuning):
    """Learns to write the answers to a task's rows."""

    cfg: GenerationConfig
    choices = ("unlikelihood", "objective")
    train_rows: Sequence[Row] = ()  # one for each training sequence, once `setup` has read them
    train: SequenceSplit
    val: SequenceSplit
    encoder: SequenceEncoder
    answerer: Answerer
    shown: list[int]  # ids of the validation sequences whose answers are printed as samples
    shared: np.ndarray  # whether the row of each validation sequence is shared with training rows
    decoded: list[int]  # ids of the validation sequences whose answers an evaluation decodes

    def __init__(self, description: GenerationDescription):
        super().__init__(description)
        self.description = description

    def setup(self, cfg: GenerationConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        """Read tokenizer and rows, and encode the rows as sequences."""
        self.cfg, say = cfg, (lambda text: None) if dry else say
        methods.check_method(cfg)
        # Without decoded rows, the loss is the only metric.
        self.best = self.description.best if cfg.eval_rows else Task.best
        if "unlikelihood" in cfg.objective:
            self.terms = {"nll": 1.0, "unlikelihood": cfg.unlikelihood}
        self.source = source = Source(self.description, cfg, say)
        self.trunk = trunk = Trunk(cfg, self.description.special_tokens(cfg))
        self.answerer = Answerer(self.description, cfg, trunk.tokenizer)
        self.encoder = self.answerer.encoder(trunk.seq_len)
        train, val = source.training_and_validation()
        self.train = self._sequences(train, "training")
        self.train_rows = self.train.rows
        self.val = self._sequences(val, "validation")
        if both := source.count_overlap(train, val):
            source.warnings.append(f"{both} of {len(train)} training rows are also validation rows")
        # Only the first sequence of a row begins with the end-of-text token.
        eot = trunk.tokenizer.eot
        begins = [i for i, tokens in enumerate(self.val.tokens) if tokens[0] == eot]
        self.shown, self.decoded = begins[:2], begins[: cfg.eval_rows]
        texts = [self.read_text(self.val.rows[i], cfg) for i in begins]
        self.overlap = source.find_shared(texts, [self.read_text(row, cfg) for row in train])
        row_of = np.searchsorted(begins, np.arange(len(self.val.rows)), side="right") - 1
        self.shared = self.overlap.shared[row_of]
        self.set_order(np.zeros(len(self.train.rows), np.int64))
        if cfg.predict:  # encode the prompts now, so that --strict raises before training
            self.predict_rows = source.predict_rows
            self.encoder.prompts(
                self.predict_rows,
                lambda row: self.description.as_predict_example(row, cfg).prompt,
                trunk.seq_len,
                lambda text: None,
            )
        for text in self._first_rows():
            say(text)
        return self.facts()

    def _sequences(self, rows: Sequence[Row], what: str) -> SequenceSplit:
        task, cfg = self.description, self.cfg
        example = task.example if what == "training" else task.as_eval_example
        found, warnings = self.encoder.split(rows, lambda row: example(row, cfg), what)
        self.source.warnings += warnings
        return found

    def training_texts(self) -> list[str]:
        """The texts of the training rows."""
        return [self.read_text(row, self.cfg) for row in self.train_rows]

    def read_text(self, row: Row, cfg: Any) -> str:
        """The text of a row that is compared with other rows: what training shows as its prompt, or
        the whole text of a task without prompts."""
        example = self.description.example(row, cfg)
        parts = [part for part in example.prompt if not isinstance(part, SpecialToken)]
        return "\n".join(parts or example.answer)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch for --show-rows, with the learned text between ⟦ and
        ⟧."""
        texts, decode = [], self.trunk.tokenizer.decode
        for i in self.order(0).reshape(-1)[: self.cfg.show_rows]:
            tokens, learned = self.train.tokens[i], self.train.learned[i]
            pairs = zip(learned, tokens.tolist(), strict=True)
            spans = [
                (on, decode([token for _, token in span]))
                for on, span in itertools.groupby(pairs, key=lambda pair: pair[0])
            ]
            text = "".join(f"⟦{text}⟧" if on else text for on, text in spans)
            count = f"{len(tokens)} tokens, {learned.sum()} of them learned"
            texts.append(f"row {i} ({count}):\n{text}\n")
        return texts

    def prompt(self, i: int) -> list[int]:
        """The prompt of validation sequence `i`, as token ids."""
        parts = self.description.as_eval_example(self.val.rows[i], self.cfg).prompt
        return self.encoder.prompt(parts, self.trunk.seq_len)

    def _asked(self, text: str) -> list[int]:
        row = Row(dict.fromkeys(self.description.columns, text), "--prompts")
        example = self.description.as_predict_example(row, self.cfg)
        return self.encoder.prompt(example.prompt, self.trunk.seq_len)

    def cost(self) -> Cost:
        """The cost of the longest row. The unlikelihood objective needs all logits at once."""
        chunked = self.trunk.shape.chunked_head and not self.cfg.objective
        shape = dataclasses.replace(self.trunk.shape, chunked_head=chunked)
        return dataclasses.replace(super().cost(), shape=shape)

    # --- a step

    def rows(self, split: str, step: int) -> np.ndarray:
        """Row ids of a step, (rows, 1) int64. Validation rows are sorted by length, and those to
        decode come first, so that they share batches."""
        if split == "train":
            return self.order(step)
        others = ~np.isin(np.arange(len(self.val.rows)), self.decoded)
        return np.lexsort((self.val.lengths, others))[:, None]

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """Rows as "idx" and "targets" (B, T) int64, and "ids" (rows,). A target is -100 where
        nothing is learned. Packed rows also have "segments" and "positions" (B, T) int64."""
        data = self.train if split == "train" else self.val
        length = bucket_for(int(data.lengths[ids].max()), self.buckets)
        packs = [[n] for n in range(len(ids))]
        if self.cfg.pack and split == "train":
            packs, length = pack(data.lengths[ids], self.trunk.seq_len, length)
        idx = torch.full((len(packs), length), self.trunk.tokenizer.eot)
        targets = torch.full_like(idx, IGNORE)
        # Segments are numbered in their order, because a kernel searches them. The padding is last.
        segments, positions = torch.full_like(idx, len(ids)), torch.zeros_like(idx)
        for row, members in enumerate(packs):
            end = 0
            for number, i in enumerate(ids[members]):
                tokens, learned = (
                    torch.from_numpy(data.tokens[i]),
                    torch.from_numpy(data.learned[i]),
                )
                place = row, slice(end, end := end + len(tokens) - 1)
                idx[place] = tokens[:-1]
                targets[place] = tokens[1:].where(learned[1:], IGNORE)
                segments[place], positions[place] = number, torch.arange(len(tokens) - 1)
        tensors = {"idx": idx, "targets": targets, "ids": torch.from_numpy(np.asarray(ids))}
        if len(packs) < len(ids):
            tensors |= {"segments": segments, "positions": positions}
        weights = dict.fromkeys(self.terms, float((targets != IGNORE).sum()))
        return Batch(tensors, weights, self.amounts(data, ids, idx))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The sum of each term over the batch, fp32 scalars."""
        if "unlikelihood" not in self.terms:
            more: dict[str, Any] = {}
            if "segments" in batch:
                past = PackedPast(model, batch["positions"])
                more = {"segments": batch["segments"], "past": past}
            return {"nll": model(batch["idx"], batch["targets"], reduction="sum", **more)}
        nll, unlikelihood = nll_and_unlikelihood(
            model(batch["idx"]), batch["idx"], batch["targets"]
        )
        return {"nll": nll, "unlikelihood": unlikelihood}

    # --- evaluation

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """The sums of loss and tokens, those of shared rows too, and an Answer for each row that is
        decoded."""
        assert isinstance(model, GPT)
        targets = batch["targets"]
        sums: Sums = {"nll": model(batch["idx"], targets, reduction="sum")}
        sums |= {"tokens": (targets != IGNORE).sum(), "shared_nll": 0.0, "shared_tokens": 0.0}
        shared = torch.from_numpy(self.shared[batch["ids"].cpu().numpy()])
        if shared.all():
            sums |= {"shared_nll": sums["nll"], "shared_tokens": sums["tokens"]}
        elif shared.any():
            rows = shared.nonzero()[:, 0].to(targets.device)
            sums["shared_nll"] = model(batch["idx"][rows], targets[rows], reduction="sum")
            sums["shared_tokens"] = (targets[rows] != IGNORE).sum()
        ids = [i for i in batch["ids"].tolist() if i in self.decoded]
        answers = self.answerer(model, [self.prompt(i) for i in ids], ids)
        records = {
            i: Answer(*texts, self.val.references[i]) for i, texts in zip(ids, answers, strict=True)
        }
        return sums, records

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """Loss and perplexity, and the task's scores of the decoded answers; each also of the clean
        rows alone."""
        clean = [i for i in sorted(records) if not self.shared[i]]
        nll, tokens = sums["nll"], sums["tokens"]
        return with_clean(
            self._figures(nll, tokens, [records[i] for i in sorted(records)]),
            self._figures(
                nll - sums["shared_nll"],
                tokens - sums["shared_tokens"],
                [records[i] for i in clean],
            ),
        )

    def _figures(self, nll: float, tokens: float, answers: Sequence[Answer]) -> dict[str, float]:
        loss = (
            {"val_loss": nll / tokens, "val_perplexity": perplexity(nll, tokens)} if tokens else {}
        )
        return loss | (self.description.scores(answers, self.train.rows) if answers else {})

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """Answers to --prompts, or to the first two validation rows."""
        assert isinstance(model, GPT)
        tokenizer = self.trunk.tokenizer
        if self.cfg.prompts and self.description.end:  # each is a message by the user
            prompts = [self._asked(text) for text in self.cfg.prompts]
        elif self.cfg.prompts:
            prompts = [[tokenizer.eot, *tokenizer.encode(text)] for text in self.cfg.prompts]
        else:
            prompts = [self.prompt(i) for i in self.shown]
        answers = self.answerer(model, prompts, range(len(prompts)))
        # The printed prompt spells out its special tokens, unlike an answer that is scored.
        return [
            (tokenizer.decode(p[1:]), text) for p, (_, text) in zip(prompts, answers, strict=True)
        ]

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model and its tokenizer, or under `stored_only` what a checkpoint stores."""
        assert isinstance(model, GPT)
        self.trunk.export(model, folder, stored_only, pads=False)
        self.encoder.write_ends(folder)

    # --- the finished model

    def open_predictor(
        self, cfg: GenerationConfig, where: str, say: Callable[[str], None]
    ) -> TextPredictor:
        """The model of checkpoint `where`, ready to answer the rows of --predict.

        Raises UserError if the checkpoint or the rows cannot be used.
        """
        rows = self.read_predict_rows(cfg, say)
        model, tokenizer = open_model(where, None, choose_device(cfg.device), torch.float32)
        answerer = Answerer(self.description, cfg, tokenizer)
        example = self.description.as_predict_example
        known = any(example(row, cfg).true_answer.strip() for row in rows if not row.fault)
        overlap = self.predict_overlap(cfg, rows, say) if known else None
        return TextPredictor(model, answerer, rows, self.train_rows, overlap)
