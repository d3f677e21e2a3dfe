"""The shape of the model that a run trains: that of the options, or of the checkpoint of --init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernels
from config import GPTConfig, RunConfig, UserError, preset_shape
from model import GPT
from storage.checkpoint import locate
from storage.hub import base_of, is_adapter


def model_config(cfg: RunConfig, vocab_size: int, block_size: int) -> GPTConfig:
    """The shape to train: of the preset and its overrides, or of the checkpoint that --init
    names."""
    if cfg.init != "scratch":
        return open_pretrained(cfg).config
    shape: dict[str, Any] = preset_shape(cfg) | dict(
        tied_head="tied-head" not in cfg.without, scaled_init="scaled-init" not in cfg.without
    )
    return GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape, **how_it_runs(cfg))


def how_it_runs(cfg: RunConfig) -> dict[str, Any]:
    """Fields of GPTConfig that no weight fixes."""
    return {
        "dropout": cfg.dropout,
        "recompute": cfg.recompute,
        "padded_vocab": "padded-vocab" not in cfg.without,
        "attention": "explicit" if "flash-attention" in cfg.without else "sdpa",
        "chunked_head": "chunked-head" not in cfg.without,
        "kernels": kernels.operation_names(cfg.kernels),
        "fp8": cfg.precision == "fp8",
    }


def _whole_model(adapter: str) -> str:
    """What to name in the place of an adapter's folder."""
    base = base_of(adapter)[0] or "the model that it was made for"
    run = Path(adapter).absolute().parent.parent
    if (run / "checkpoints").is_dir():
        final, made = run / "final", (run / "final").is_dir() and not is_adapter(run / "final")
        both = f"{final}, where both are" if made else "its run's final/, once that has ended"
    else:
        both = "a folder where PEFT's merge_and_unload() has put both"
    return f"name {base} to begin without the adapter, or {both}"


def open_pretrained(cfg: RunConfig) -> GPT:
    """The model of --init. Raises UserError where other options contradict its shape."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("n_layer", "n_head", "n_embd", "preset")
        if getattr(cfg, name)
    ]
    if given:
        raise UserError(
            f"{' and '.join(given)} cannot go with --init {cfg.init}: the weights fix the shape"
        )
    where = locate(cfg.init)
    if is_adapter(where):
        raise UserError(
            f"--init {cfg.init} is an adapter, not a whole model; {_whole_model(where)}"
        )
    model = GPT.from_pretrained(where, **how_it_runs(cfg))
    if cfg.seq_len and cfg.seq_len > model.config.block_size:
        raise UserError(
            f"--seq-len {cfg.seq_len} is longer than the {model.config.block_size} positions of "
            f"--init {cfg.init}; use --seq-len {model.config.block_size} or less"
        )
    return model
