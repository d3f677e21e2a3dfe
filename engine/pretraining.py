"""Pretraining: predict every next token of packed text, from scratch or from a checkpoint."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from base.console import counted
from config import ResolvedTrain, RunConfig, TrainConfig, UserError, resolved
from decoding.options import DecodeConfig
from decoding.sampling import sample
from engine import benchmarked, mixture
from engine.data import Data, check_data, check_files, open_data
from engine.shape import model_config, runtime_fields
from engine.task import Batch, Cost, Facts, Sums, Task, Tensors
from kernels.linear_cross_entropy import IGNORE
from model import GPT
from storage.checkpoint import locate
from text.prepare import CHARACTERS
from text.tokenizer_files import has_tokenizer

STDLIB_NOTE = (
    "training on Python's own standard library (--data stdlib). For FineWeb first run:\n"
    "  python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out "
    "data/fineweb\n"
)


class LanguageModelling(Task):
    """The task of pretraining. Rows are windows of one token stream, so none needs padding."""

    name = "pretrain"
    config = TrainConfig
    cfg: ResolvedTrain
    data: Data

    def setup(self, cfg: TrainConfig, say: Callable[[str], None], dry: bool = False) -> Facts:
        """Open the data, or with `dry` only look up the vocabulary's size. See Task.setup."""
        self.cfg = cfg = resolved(cfg, ResolvedTrain)
        # Reading the data may take long, so check first whether the batch divides.
        rows_per_rank(cfg, int(os.environ.get("WORLD_SIZE", "1")))
        if cfg.data == "stdlib" and not Path(cfg.out, "config.json").exists():  # not on a resume
            say(STDLIB_NOTE)
        _check_data_exists(cfg)
        self.benchmarks = benchmarked.BenchmarksOfRun(cfg)
        tokenizer, cache = _tokenizer_named(cfg), Path(cfg.cache)
        if dry:
            size = check_data(cfg.data, cfg.val_data, tokenizer, cfg.text_column, cache)
            self.shape = model_config(cfg, size, cfg.seq_len)
        else:
            self.data = open_data(
                cfg.data,
                cfg.val_data,
                tokenizer,
                cfg.text_column,
                cache,
                cfg.seq_len,
                say,
                cfg.decontaminate,
            )
            self.val = mixture.Validation(self.data.val)
            self.evaluated = (*self.val.splits, benchmarked.SPLIT)
            self.shape = model_config(cfg, self.data.vocabulary.size, cfg.seq_len)
            self._check_vocabulary(cfg)
            self.benchmarks.prepare(self.data.vocabulary, self.shape.block_size)
        with torch.device("meta"):
            flops = GPT(self.shape).flops_per_token(cfg.seq_len)
        return Facts(
            identity={} if dry else self._identity(),
            banner={} if dry else self._banner(),
            rows_per_rank=functools.partial(rows_per_rank, cfg),
            tokens_per_step=cfg.batch_tokens,
            cost=Cost(self.shape, cfg.seq_len, flops),
            warnings=() if dry else self._warnings(),
        )

    def _check_vocabulary(self, cfg: TrainConfig) -> None:
        vocabulary = self.data.vocabulary
        if cfg.document_mask and vocabulary.eot is None:
            raise UserError(
                "--document-mask needs the end-of-text id, and these shards do not name it; give "
                "their --tokenizer"
            )
        if self.shape.vocab_size < vocabulary.rows:
            raise UserError(
                f"the tokenizer has {vocabulary.size} ids, but the model of --init {cfg.init} has "
                f"only {self.shape.vocab_size}; leave --tokenizer out or name the model's own"
            )

    def _warnings(self) -> tuple[str, ...]:
        found = mixture.repeated(self.data.train, self.cfg.steps * self.cfg.batch_tokens)
        if self.data.vocabulary.tokenizer:
            return found
        return (
            *found,
            f"training without the shards' tokenizer ({self.data.vocabulary.missing}): no samples "
            "are printed, and the model is saved without a tokenizer",
        )

    def _identity(self) -> dict[str, Any]:
        config = self.shape
        return {
            "batch_tokens": self.cfg.batch_tokens,
            "seq_len": self.cfg.seq_len,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "vocabulary": config.vocab_size,
            "tied_head": config.tied_head,
            "padded_vocabulary": config.padded_vocab_size,
            "data": self.data.train.sha256,
            "val_data": self.data.val.sha256,
            "weights": mixture.weights_of(self.data.train),
            "val_weights": mixture.weights_of(self.data.val),
            "decontaminate": self.data.excluded,
            "tokenizer": self.data.vocabulary.sha256,
        }

    def _banner(self) -> dict[str, str]:
        config, data = self.shape, self.data
        with torch.device("meta"):
            model = GPT(config)
        shape = (
            f"{counted(config.n_layer, 'layer')} x {config.n_embd} wide, "
            f"{counted(config.n_head, 'head')}, context "
            f"{config.block_size}"
        )
        padded = (
            f" (padded to {config.padded_vocab_size})"
            if config.padded_vocab_size > config.vocab_size
            else ""
        )
        tokens = self.cfg.steps * self.cfg.batch_tokens
        return {
            "model": f"{model.n_params():,} parameters: {shape}, start: {self.cfg.init}",
            "tokenizer": f"{data.vocabulary.name}, {data.vocabulary.size:,} ids{padded}"
            + ("" if data.vocabulary.tokenizer else ", not on this machine"),
            **mixture.banner(self.cfg.data, data.train, data.val, data.left_out, tokens),
            **self.benchmarks.banner,
        }

    def build_model(self, cfg: TrainConfig) -> nn.Module:
        """A GPT from scratch, or the one that --init names."""
        if cfg.init == "scratch":
            return GPT(self.shape)
        return GPT.from_pretrained(locate(cfg.init), **runtime_fields(cfg))

    def rows(self, split: str, step: int) -> np.ndarray:
        """Window ids (n, 1): each window is a group of its own."""
        seq_len, batch = self.cfg.seq_len, self.cfg.batch_tokens // self.cfg.seq_len
        if split == "train":
            positions = np.arange(step * batch, (step + 1) * batch)
            return self.data.train.order(positions, seq_len, self.cfg.seed)[:, None]
        if split == benchmarked.SPLIT:
            return self.benchmarks.rows()
        return self.val.rows(split, seq_len, self.cfg.eval_tokens)

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        """idx and targets (B, T) int64, and with --document-mask also segments (B, T); or the
        numbers of a benchmark's batches."""
        if split == benchmarked.SPLIT:
            return Batch({split: torch.from_numpy(ids)}, {}, {})
        data = self.data.train if split == "train" else self.val.splits[split]
        tokens = torch.from_numpy(data.windows(ids, self.cfg.seq_len))  # (B, T + 1)
        tensors = {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
        if self.cfg.document_mask:
            # Every document begins with the end-of-text token, so the number of these tokens so far
            # identifies the document.
            eot = self.data.vocabulary.eot
            assert eot is not None  # `setup` has checked
            tensors["segments"] = (tensors["idx"] == eot).cumsum(1)
        return packed(tensors)

    def loss(self, model: nn.Module, batch: Tensors) -> Tensors:
        """The summed cross-entropy in nats."""
        return {"nll": model(**batch, reduction="sum")}

    def evaluate(self, model: nn.Module, batch: Tensors) -> tuple[Sums, dict[int, Any]]:
        """The summed cross-entropy in nats and the number of targets. The records are scores of
        benchmarks."""
        if benchmarked.SPLIT in batch:
            assert isinstance(model, GPT)
            return {}, self.benchmarks.score(model, batch[benchmarked.SPLIT])
        nll = model(**batch, reduction="sum")
        return {"nll": nll, "tokens": (batch["targets"] != IGNORE).sum()}, {}

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        """See Validation.metrics, and the figures of benchmarks."""
        return self.val.metrics(sums) | self.benchmarks.metrics(records)

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        """Sampled continuations (top-k 50) of --prompts; none if there is no tokenizer here."""
        assert isinstance(model, GPT)
        tokenizer = self.data.vocabulary.tokenizer
        if tokenizer is None:
            return []
        prompts = self.cfg.prompts or (
            ("def", "class") if self.cfg.data == "stdlib" else ("The", "Once upon a time")
        )
        ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]
        options = DecodeConfig(max_new_tokens=min(100, self.shape.block_size // 2), top_k=50)
        outs = sample(model, ids, options, tokenizer.eot, seed=self.cfg.seed, tokenizer=tokenizer)
        texts = [tokenizer.decode(out) for out in outs]
        return list(zip(prompts, texts, strict=True))

    def export(self, model: nn.Module, folder: Path, stored_only: bool = False) -> None:
        """Write the model, and the tokenizer if it is here. Every parameter is stored."""
        assert isinstance(model, GPT)
        vocabulary = self.data.vocabulary
        model.save_pretrained(folder, eot=vocabulary.eot)
        if vocabulary.tokenizer:
            vocabulary.tokenizer.save(folder)


def packed(tensors: Tensors) -> Batch:
    """A batch of whole windows, from idx and targets (B, T) and perhaps segments (B, T)."""
    targets = tensors["targets"]
    n_targets = float((targets != IGNORE).sum())
    return Batch(tensors, {"nll": n_targets}, {"tokens": targets.numel()})


def rows_per_rank(cfg: ResolvedTrain, world_size: int) -> int:
    """Windows in a step on one rank. Raises UserError unless --batch-tokens divides evenly into
    them, and they into micro-batches."""
    unit = cfg.seq_len * world_size
    if cfg.batch_tokens % unit:
        nearest = max(1, round(cfg.batch_tokens / unit)) * unit
        raise UserError(
            f"--batch-tokens {cfg.batch_tokens} is not divisible by {world_size} ranks x "
            f"{cfg.seq_len} tokens; use --batch-tokens {nearest}"
        )
    rows = cfg.batch_tokens // unit
    if cfg.micro_batch != "auto" and rows % cfg.micro_batch:
        divisor = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= cfg.micro_batch)
        raise UserError(
            f"--micro-batch {cfg.micro_batch} does not divide the {rows} rows of a rank; use "
            f"{divisor}"
        )
    return rows


def _check_data_exists(cfg: TrainConfig) -> None:
    """Raise UserError for missing data, before a model or a tokenizer is downloaded."""
    for spec in filter(None, (cfg.data, cfg.val_data, cfg.decontaminate)):
        check_files(spec)


def _tokenizer_named(cfg: RunConfig) -> str | None:
    """The argument of load_tokenizer for --tokenizer, or else for the checkpoint of --init. None:
    the data determines the tokenizer."""
    if cfg.tokenizer:
        return cfg.tokenizer if cfg.tokenizer in ("gpt2", CHARACTERS) else locate(cfg.tokenizer)
    if cfg.init == "scratch":
        return None
    where = locate(cfg.init)
    return where if has_tokenizer(where) else None
