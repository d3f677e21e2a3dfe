"""Which parameters a method of fine-tuning trains, and at what share of the rate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import torch
import torch.nn as nn

from adapters.layers import (
    LORA_ON,
    TABLES,
    add_lora,
    add_rows,
    always_trained,
    check_prefix_fits,
    freeze,
    new_prefix,
    used_tables,
)
from adapters.options import ADAPTERS, LORA, METHODS, MethodConfig, ParameterPlace
from config import UserError
from engine.optim import Group, default_groups
from model import GPT
from tasks.options import FinetuneConfig

ULMFIT_DECAY = 1 / 2.6  # of the rate, from each group of layers to the one below


def check(cfg: FinetuneConfig) -> None:
    """Raise UserError for options that do not go with cfg.method."""
    mine = METHODS[cfg.method]
    for field in dataclasses.fields(MethodConfig):
        owners = [method for method, of in METHODS.items() if field.name in of.options]
        if owners and cfg.method not in owners and getattr(cfg, field.name) != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} belongs to --method {' or '.join(owners)}, not "
                f"to {cfg.method}; leave it out"
            )
    if cfg.llrd != 1 and not mine.llrd:
        why = "sets them itself" if cfg.method == "ulmfit" else "does not train these"
        raise UserError(
            f"--llrd sets the rates of the model's blocks, and --method {cfg.method} {why}; leave "
            "it out"
        )
    if cfg.optimizer == "muon" and not mine.matrices:
        raise UserError(
            "--optimizer muon is for the matrices of the model's blocks, which --method "
            f"{cfg.method} does not train; use --optimizer adamw"
        )
    if cfg.init == "scratch" and cfg.method in ADAPTERS:
        raise UserError(
            f"--method {cfg.method} adds to trained weights; name some with --init, or use "
            "--method full"
        )


def groups(model: GPT, cfg: FinetuneConfig, step: int, steps_per_epoch: int) -> list[Group]:
    """The parameters that train in `step`, as optim.default_groups but with the rate of each layer.
    Pure in step.

    ulmfit (Howard and Ruder 2018) begins with the head, and each epoch thaws the layer below; a
    layer's rate is 1/2.6 of that of the layer above. Where there are heads of a classifier, they
    train under every method, and a language model's head of its own, which has no loss then, under
    none.
    """
    rates = _rates(model, cfg, step // steps_per_epoch)
    found = []
    for group in default_groups(model, cfg):
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in group.params.items():
            if name in rates:
                by_rate.setdefault(rates[name], {})[name] = parameter
        found += [
            dataclasses.replace(group, params=params, lr_scale=rate)
            for rate, params in by_rate.items()
        ]
    return found


def _rates(model: GPT, cfg: MethodConfig, epoch: int) -> dict[str, float]:
    """Names of the parameters that train in an epoch, with their share of the learning rate."""
    trains = METHODS[cfg.method].trains
    decay = ULMFIT_DECAY if cfg.method == "ulmfit" else cfg.llrd
    depths = _depths(model, from_head=cfg.method in ("last-layer", "ulmfit"))
    always = always_trained(model)
    return {
        name: decay**depth
        for name, depth in depths.items()
        if name in always or trains(ParameterPlace(name, depth, epoch), cfg)
    }


def _depths(model: GPT, from_head: bool) -> dict[str, int]:
    """Layers from the top to each parameter that can train: 0 the head and the last norm, then
    block by block, last the embeddings. What is added has the depth of its block, outside of blocks
    0.

    Where `from_head`, a table that is both embedding and head is the head; a classifier's heads are
    above the last norm, which goes with the last block.
    """
    n_layer, new, classifier = model.config.n_layer, always_trained(model), len(model.heads) > 0
    top_table = (
        "transformer.wte.weight"
        if from_head and model.config.tied_head and not classifier
        else None
    )
    depths = {}
    for name, _ in model.named_parameters():
        if block := re.match(r"transformer\.h\.(\d+)\.", name):
            depths[name] = n_layer - int(block[1])
        elif name in new or name == top_table:
            depths[name] = 0
        elif name.startswith(("transformer.wte.", "transformer.wpe.")):
            depths[name] = n_layer + 1
        elif name.startswith("transformer.ln_f."):
            depths[name] = int(from_head and classifier)
        elif not classifier:  # the language model's head
            depths[name] = 0
    return depths


def stored(model: GPT, cfg: MethodConfig) -> set[str]:
    """Names of the parameters that a checkpoint must hold: what is new to the model, where the base
    is elsewhere."""
    return (
        always_trained(model)
        if cfg.method in ADAPTERS
        else {name for name, _ in model.named_parameters()}
    )


def counts(model: GPT, trained: Sequence[Group]) -> tuple[int, int]:
    """Parameters that train, and all; the vocabulary's padding is not counted."""
    named = {name: p for group in trained for name, p in group.params.items()}
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    padded = sum(f"{name}.weight" in named for name in TABLES)
    return sum(p.numel() for p in named.values()) - padded * padding, model.n_params()


def add_adapter(model: GPT, cfg: MethodConfig, new_tokens: range = range(0)) -> None:
    """Add to `model`, in place, what cfg.method trains, drawn from the global random state; freeze
    the rest.

    `new_tokens` are ids that are new to a pretrained model: their rows train under every method,
    those that freeze the table too. Raises UserError where method and model do not fit.
    """
    if cfg.method == "last-k" and cfg.last_k > model.config.n_layer:
        raise UserError(
            f"--last-k {cfg.last_k}: the model has {model.config.n_layer} blocks; use --method full"
        )
    if cfg.method in LORA:
        names = [
            f"transformer.h.{i}.{name}"
            for i in range(model.config.n_layer)
            for name in LORA_ON[cfg.lora_on]
        ]
        add_lora(
            model, names, cfg.method == "dora", cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout
        )
    elif cfg.method in ADAPTERS:
        check_prefix_fits(model, cfg.prefix_tokens)
        model.prefix = new_prefix(model, cfg)
    trained = _rates(model, cfg, epoch=model.config.n_layer + 1)
    if new_tokens:
        for table in used_tables(model):
            if f"{table}.weight" not in trained:
                add_rows(model, table, torch.tensor(new_tokens))
    freeze(model, trained.keys() | always_trained(model))
