"""The shape of the model to train, from the options or from the checkpoint of --init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernels
from config import GPTConfig, RunConfig, UserError, preset_shape
from model import GPT
from storage.checkpoint import locate
from storage.hub import adapter_base, is_adapter


def model_config(cfg: RunConfig, vocab_size: int, block_size: int) -> GPTConfig:
    """The shape to train, from the preset with its overrides, or from the checkpoint of --init."""
    if cfg.init != "scratch":
        return open_pretrained(cfg).config
    shape: dict[str, Any] = preset_shape(cfg) | dict(
        tied_head="tied-head" not in cfg.without, scaled_init="scaled-init" not in cfg.without
    )
    return GPTConfig(vocab_size=vocab_size, block_size=block_size, **shape, **runtime_fields(cfg))


def runtime_fields(cfg: RunConfig) -> dict[str, Any]:
    """The fields of GPTConfig that say how a model runs, and that no weights determine."""
    return {
        "dropout": cfg.dropout,
        "recompute": cfg.recompute,
        "padded_vocab": "padded-vocab" not in cfg.without,
        "attention": "explicit" if "flash-attention" in cfg.without else "sdpa",
        "chunked_head": "chunked-head" not in cfg.without,
        "kernels": kernels.named(cfg.kernels),
        "fp8": cfg.precision == "fp8",
    }


def _whole_model(adapter: str) -> str:
    """Advice on which whole model to name in place of an adapter's folder."""
    base = adapter_base(adapter)[0] or "the model that it was trained on"
    run = Path(adapter).absolute().parent.parent
    if (run / "checkpoints").is_dir():
        final, made = run / "final", (run / "final").is_dir() and not is_adapter(run / "final")
        both = f"{final}, which holds both" if made else "its run's final/ once the run has ended"
    else:
        both = "a folder into which PEFT's merge_and_unload() was saved"
    return f"name {base} to start without the adapter, or {both}"


def open_pretrained(cfg: RunConfig) -> GPT:
    """The model of --init. Raises UserError if other options contradict its shape."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("n_layer", "n_head", "n_embd", "preset")
        if getattr(cfg, name)
    ]
    if given:
        raise UserError(
            f"--init {cfg.init} already determines the shape of the model; leave out "
            f"{' and '.join(given)}"
        )
    where = locate(cfg.init)
    if is_adapter(where):
        raise UserError(
            f"--init {cfg.init} is an adapter, not a whole model; {_whole_model(where)}"
        )
    model = GPT.from_pretrained(where, **runtime_fields(cfg))
    if cfg.seq_len and cfg.seq_len > model.config.block_size:
        raise UserError(
            f"--seq-len {cfg.seq_len} is longer than the {model.config.block_size} positions of "
            f"--init {cfg.init}; use --seq-len {model.config.block_size} or less"
        )
    return model
