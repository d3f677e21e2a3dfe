"""Preference tuning: the model learns to prefer the chosen of two answers to a prompt, by how much
its log-probability of each has changed from the reference's (Rafailov et al. 2023).

A row of the loop is a pair, so both answers of a pair are always in one batch. Only the answers are
scored. The reference's log-probabilities are known before the first step.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from adapters import peft
from config import UserError
from decoding.batched import generate
from decoding.loading import open_model
from engine.precision import set_products
from engine.processes import choose_device
from engine.task import Batch, Cost, Facts, Sums, Tensors
from model import GPT
from tasks import methods
from tasks.description import Parts, SpecialToken
from tasks.finetuning import EVAL_PRECISION, Finetuning
from tasks.generation import chat
from tasks.order import bucket_for
from tasks.preferences.description import PreferenceDescription
from tasks.preferences.options import PreferencesConfig
from tasks.preferences.pairs import PairEncoder, PairSplit, end_of, pair_encoder
from tasks.preferences.predictions import PairPredictor
from tasks.preferences.reference import kept_log_probs, open_reference
from tasks.preferences.scoring import Preference, answer_log_probs
from tasks.source import Source
from tasks.trunk import Trunk
from text.chat import END, ROLES, has_template
from text.overlap import with_clean
from text.row import Row

SPECIAL = (*ROLES.values(), END)  # the tokens that conversations add to the vocabulary


class Preferences(Finetuning):
    """Learns the preferences of a task's rows."""

    cfg: PreferencesConfig
    choices = ("beta", "label_smoothing")
    # The last two have no part in the objective. Their means are logged.
    terms = {"dpo": 1.0, "reward_margin": 0.0, "reward_accuracy": 0.0}
    train_rows: Sequence[Row] = ()  # of `train`, once `setup` has read them
    train: PairSplit
    val: PairSplit
    encoder: PairEncoder
    end: str | None  # the special token that ends an answer; None: the end-of-text token
    # log-probabilities of the answers under the reference, by split, (2n,) float32
    reference: dict[str, np.ndarray]
    reference_sha256 = ""  # of its weights

    def __init__(self, description: PreferenceDescription):
        super().__init__(description)
        self.description = description

    def setup(self, cfg: PreferencesConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        """Read tokenizer and rows, encode the pairs, and score them with the reference."""
        self.cfg, say = cfg, (lambda text: None) if dry else say
        methods.check_method(cfg)
        self.preference = preference_of(cfg)
        self.source = source = Source(self.description, cfg, say)
        train, val = source.training_and_validation()
        if cfg.predict:
            self.predict_rows = source.predict_rows
        self.end = end_of([*train, *val, *(self.predict_rows or ())], self.description)
        self.trunk = trunk = Trunk(cfg, SPECIAL if self.end else ())
        self.encoder = pair_encoder(trunk.tokenizer, trunk.seq_len, cfg, self.end)
        self.train, self.val = self._split(train, "training"), self._split(val, "validation")
        self.train_rows = self.train.rows
        if both := source.count_overlap(train, val):
            source.warnings.append(f"{both} of {len(train)} training rows are also validation rows")
        self.overlap = source.find_shared(
            [self.read_text(row, cfg) for row in self.val.rows], self.training_texts()
        )
        self.set_order(np.zeros(len(self.train.rows), np.int64))
        for row in self.predict_rows or ():  # now, so that --strict raises before training
            if not row.fault:
                self.encoder.sequences(self.description.pair(row), row.where)
        for text in self._first_rows():
            say(text)
        if not dry:
            self._score_with_reference(say)
        return self.facts()

    def _split(self, rows: Sequence[Row], what: str) -> PairSplit:
        found, warnings = self.encoder.split(rows, self.description.pair, what)
        self.source.warnings += warnings
        return found

    def _score_with_reference(self, say: Callable[[str], None]) -> None:
        """Training compares in the run's precision, so that rounding is the same on both sides, and
        evaluation in that of evaluations."""
        cfg = self.cfg
        device = choose_device(cfg.device, int(os.environ.get("LOCAL_RANK", "0")))
        model = open_reference(cfg, self.trunk.tokenizer, self.trunk.shape)
        self.reference_sha256 = peft.weights_sha256(model)
        self.reference = {
            name: kept_log_probs(model, self.reference_sha256, split, precision, device, cfg, say)
            for name, split, precision in (
                ("train", self.train, cfg.precision),
                ("val", self.val, EVAL_PRECISION),
            )
        }

    def training_texts(self) -> list[str]:
        """The texts of the training rows."""
        return [self.read_text(row, self.cfg) for row in self.train_rows]

    def read_text(self, row: Row, cfg: Any) -> str:
        """The prompt of a row, which is compared with other rows."""
        prompt = self.description.pair(row).prompt
        return "\n".join(part for part in prompt if not isinstance(part, SpecialToken))

    def _first_rows(self) -> list[str]:
        """The first pairs of the first batch for --show-rows, with the scored text between ⟦ and
        ⟧."""
        texts, decode = [], self.trunk.tokenizer.decode
        for i in self.order(0).reshape(-1)[: self.cfg.show_rows]:
            for name, n in (("chosen", 2 * i), ("rejected", 2 * i + 1)):
                tokens, scored = self.train.tokens[n].tolist(), self.train.scored[n]
                spans = itertools.groupby(zip(scored, tokens, strict=True), lambda pair: pair[0])
                parts = [(on, decode([token for _, token in span])) for on, span in spans]
                text = "".join(f"⟦{text}⟧" if on else text for on, text in parts)
                count = f"{len(tokens)} tokens, {scored.sum()} of them scored"
                texts.append(f"row {i}, {name} ({count}):\n{text}\n")
        return texts

    def cost(self) -> Cost:
        """The cost of the longest pair. The head computes no logits for prompts."""
        cost, shape, train = super().cost(), self.trunk.shape, self.train
        unscored = 1 - float(train.answer_lengths.sum() / train.read.sum())
        flops = (cost.flops_per_token or 0) - int(6 * shape.vocab_size * shape.n_embd * unscored)
        return dataclasses.replace(cost, flops_per_token=flops, loss=self._memory_probe)

    def _memory_probe(self, model: GPT, idx: Tensor) -> Tensor:
        """A scalar loss for idx (B, T) that takes as much memory as a step of B pairs."""
        idx = idx.repeat(2, 1)
        answers = -(-int(self.train.answer_lengths.max()) // 2)
        places = torch.arange(idx.numel()).view_as(idx)[:, -answers:].flatten()
        return answer_log_probs(model, {"idx": idx, "targets": idx, "scored": places}).sum()

    def identity(self) -> dict[str, Any]:
        """That of every task, and the weights of --reference."""
        given = self.reference_sha256 if self.cfg.reference else None
        return super().identity() | {"reference": given}

    def banner(self) -> dict[str, str]:
        """The lines of every task, and one on the objective."""
        cfg = self.cfg
        smoothing = f", label smoothing {cfg.label_smoothing:g}" if cfg.label_smoothing else ""
        about = f"beta {cfg.beta:g}{smoothing}, reference: "
        return super().banner() | {"preferences": about + (cfg.reference or cfg.init)}

    # --- a step

    def rows(self, split: str, step: int) -> np.ndarray:
        """Ids of the pairs of a step, (pairs, 1) int64. Validation pairs are sorted by length."""
        if split == "train":
            return self.order(step)
        return np.argsort(self.val.lengths, kind="stable")[:, None]

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """The 2B sequences of B pairs, all chosen ones first, as from `PairSplit.tensors`, with
        "reference" (2B,) float32 and "ids" (B,) int64."""
        data = self.train if split == "train" else self.val
        sequences = np.concatenate((2 * ids, 2 * ids + 1))
        length = bucket_for(int(data.lengths[ids].max()), self.buckets)
        tensors = data.tensors(sequences, length, self.trunk.tokenizer.eot)
        tensors |= {
            "reference": torch.from_numpy(self.reference[split][sequences]),
            "ids": torch.from_numpy(np.asarray(ids)),
        }
        weights = dict.fromkeys(self.terms, float(len(ids)))
        return Batch(tensors, weights, self.amounts(data, ids, tensors["idx"]))

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The sum of each term over the pairs of a batch, fp32 scalars."""
        chosen, rejected = self._rewards(model, batch).unbind(1)
        margins = chosen - rejected
        return {
            "dpo": self.preference.losses(margins).sum(),
            "reward_margin": margins.detach().sum(),
            "reward_accuracy": (margins.detach() > 0).to(margins.dtype).sum(),
        }

    def _rewards(self, model: nn.Module, batch: Tensors) -> Tensor:
        """(B, 2): the rewards of the chosen and of the rejected answer of each pair."""
        assert isinstance(model, GPT)
        changes = answer_log_probs(model, batch) - batch["reference"]
        return self.preference.beta * changes.view(2, -1).T

    # --- evaluation

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """No sums, and a record of both rewards of each pair."""
        rewards = self._rewards(model, batch).tolist()
        return {}, dict(zip(batch["ids"].tolist(), rewards, strict=True))

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """Loss, accuracy, margin and rewards of all pairs, and of the clean ones."""
        clean = [i for i in sorted(records) if not self.overlap.shared[i]]
        all_rewards, of_clean = (
            torch.tensor([records[i] for i in ids], dtype=torch.float64).view(-1, 2)
            for ids in (sorted(records), clean)
        )
        return with_clean(self.preference.metrics(all_rewards), self.preference.metrics(of_clean))

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """Answers to --prompts, or to the prompts of the first two validation rows."""
        assert isinstance(model, GPT)
        tokenizer, encoder = self.trunk.tokenizer, self.encoder.encoder
        asked = [self._asked(text) for text in self.cfg.prompts]
        asked = asked or [self.description.pair(row).prompt for row in self.val.rows[:2]]
        prompts = [encoder.prompt(parts, self.trunk.seq_len) for parts in asked]
        end, seed = encoder.end, self.cfg.seed
        answers = generate(model, prompts, self.cfg, end, seed=seed, tokenizer=tokenizer)
        return [
            (tokenizer.decode(prompt[1:]), tokenizer.decode(answer, skip_special=True))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _asked(self, text: str) -> Parts:
        return chat.prompt([{"role": "user", "content": text}]) if self.end else (text,)

    # --- the finished model

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model and its tokenizer, or under `stored_only` what a checkpoint stores."""
        assert isinstance(model, GPT)
        self.trunk.export(model, folder, stored_only, pads=False)
        self.encoder.encoder.write_ends(folder)

    def open_predictor(
        self, cfg: PreferencesConfig, where: str, say: Callable[[str], None]
    ) -> PairPredictor:
        """The model of checkpoint `where` and the reference, ready to compare the pairs of
        --predict. Raises UserError if they or the rows cannot be used."""
        rows = self.read_predict_rows(cfg, say)
        device = choose_device(cfg.device)
        set_products(EVAL_PRECISION, device)
        model, tokenizer = open_model(where, None, device, torch.float32)
        end = end_of(rows, self.description)
        if end and not has_template(tokenizer.special_ids):
            raise UserError(
                f"the rows of --predict are conversations, and {where} has no chat template; name a "
                "model that was trained on conversations"
            )
        shape = self.trunk.shape if cfg.trains else None
        reference = open_reference(cfg, tokenizer, shape).to(device)
        encoder = pair_encoder(
            tokenizer, min(cfg.seq_len or model.context, model.context), cfg, end
        )
        overlap = self.predict_overlap(cfg, rows, say)
        pair = self.description.pair
        return PairPredictor(model, reference, encoder, pair, preference_of(cfg), rows, overlap)


def preference_of(cfg: PreferencesConfig) -> Preference:
    """The loss that the options name."""
    return Preference(cfg.beta, cfg.label_smoothing)
