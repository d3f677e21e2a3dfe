"""The model that a task fine-tunes: loads the base and its tokenizer, adds heads and adapter, and
writes checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adapters import layers, peft
from adapters.options import ADAPTERS
from config import GPTConfig, UserError
from engine.shape import model_config, open_pretrained
from model import GPT
from storage.checkpoint import locate
from tasks import methods
from tasks.options import FinetuneConfig
from text.tokenizer import load_tokenizer

SCRATCH_CONTEXT = 256  # tokens: the context of a model from scratch without --seq-len


class Trunk:
    """The base model of --init (or the shape of a model from scratch) with its tokenizer."""

    def __init__(
        self,
        cfg: FinetuneConfig,
        special: Sequence[str],
        add_heads: Callable[[GPT], object] = lambda model: None,
        n_layer: int | None = None,
    ):
        """Loads the base and the tokenizer.

        special: tokens that the task adds to the vocabulary. add_heads: puts the task's heads on a
        model. n_layer: replaces the number of blocks of the shape. Raises UserError if tokenizer
        and model do not fit together.
        """
        self.cfg, self.special, self.add_heads = cfg, tuple(special), add_heads
        where = cfg.init if cfg.init == "scratch" else locate(cfg.init)
        given = cfg.tokenizer or ("gpt2" if cfg.init == "scratch" else where)
        base = load_tokenizer(given if given == "gpt2" else locate(given))
        self.tokenizer = base.with_special(self.special) if special else base
        # `build` takes the base and sets this to None.
        self.base: GPT | None = None if cfg.init == "scratch" else open_pretrained(cfg)
        self.base_sha256 = peft.weights_sha256(self.base) if self.base else ""
        # Ids are new to the base if its own tokenizer or its embedding lacks them.
        known = self.tokenizer.vocab_size
        if self.base:
            known = min(base.vocab_size, self.base.config.vocab_size)
        self.new_tokens = range(known, self.tokenizer.vocab_size)
        shape = (
            self.base.config
            if self.base
            else model_config(cfg, self.tokenizer.vocab_size, cfg.seq_len or SCRATCH_CONTEXT)
        )
        if base.rows > shape.vocab_size:
            raise UserError(
                f"the tokenizer has {base.vocab_size} ids, but the model of --init {cfg.init} has "
                f"only {shape.vocab_size}; leave --tokenizer out or name the model's own"
            )
        size = max(shape.vocab_size, self.tokenizer.vocab_size)
        blocks = shape.n_layer if n_layer is None else n_layer
        self.shape: GPTConfig = dataclasses.replace(shape, vocab_size=size, n_layer=blocks)
        self.seq_len = self._longest_row()

    def _longest_row(self) -> int:
        """Tokens of the longest row: --seq-len, or all positions that the prefix leaves free.
        Raises UserError if the model has too few positions."""
        cfg = self.cfg
        before = cfg.prefix_tokens if cfg.method in ("prefix", "soft-prompt") else 0
        limit = self.shape.block_size - before
        if limit < 1:
            raise UserError(
                f"--prefix-tokens {cfg.prefix_tokens} leaves no room for text in the model's "
                f"{self.shape.block_size} positions; use fewer"
            )
        if cfg.seq_len and cfg.seq_len > limit:
            raise UserError(
                f"--seq-len {cfg.seq_len} is longer than the {limit} tokens that the model has "
                f"room for; use at most {limit}"
            )
        return cfg.seq_len or limit

    def build(self) -> GPT:
        """The model to train. Draws heads and adapter from the global random state."""
        scratch = self.cfg.init == "scratch"
        # Without room for its first step, the loop builds the model a second time.
        model = self.base or (GPT(self.shape) if scratch else open_pretrained(self.cfg))
        self.base = None
        if self.new_tokens:
            layers.add_tokens(model, self.new_tokens)
        return self.with_adapter(model)

    def with_adapter(self, model: GPT) -> GPT:
        """Adds the task's heads and the method's adapter to `model`, in place, and returns it."""
        self.add_heads(model)
        methods.add_adapter(model, self.cfg, self.new_tokens)
        return model

    @functools.cached_property
    def meta_model(self) -> GPT:
        """The same model on the meta device, which has shapes but no weights."""
        with torch.device("meta"):
            return self.with_adapter(GPT(self.shape))

    @functools.cached_property
    def stored(self) -> set[str]:
        """Names of the parameters that a checkpoint stores."""
        return methods.stored(self.meta_model, self.cfg)

    def export(
        self,
        model: GPT,
        folder: Path,
        stored_only: bool,
        pads: bool,
        score: Tensor | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        """Write the model in the hub's layout, or only the adapter in PEFT's layout, and the
        tokenizer.

        stored_only: write what a checkpoint stores, which for an adapter leaves out its base.
        pads: whether the hub's class must know the padding token. score: the head (n_labels,
        n_embd) of a classifier that reads the last token.
        """
        adapter_only = self.cfg.method in ADAPTERS if stored_only else not layers.can_merge(model)
        if adapter_only:
            init = self.cfg.init  # a path or a hub id
            base = str(Path(locate(init)).resolve()) if Path(init).exists() else init
            peft.save_adapter(model, folder, base, self.base_sha256, score)
        else:
            if layers.adapter_parameters(model):
                model = copy.deepcopy(model)  # the loop keeps training the original
                layers.merge(model)
            model.save_pretrained(folder, self.tokenizer.eot, score, labels)
        self.tokenizer.save(folder, pads)
