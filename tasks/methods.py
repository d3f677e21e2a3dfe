"""Which parameters a fine-tuning method trains, and at which fraction of the learning rate."""

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

ULMFIT_DECAY = 1 / 2.6  # ratio of a layer's rate to that of the layer above


def check_method(cfg: FinetuneConfig) -> None:
    """Raise UserError for options that cannot be combined with cfg.method."""
    traits = METHODS[cfg.method]
    for field in dataclasses.fields(MethodConfig):
        owners = [method for method, its in METHODS.items() if field.name in its.options]
        if owners and cfg.method not in owners and getattr(cfg, field.name) != field.default:
            raise UserError(
                f"--{field.name.replace('_', '-')} belongs to --method {' or '.join(owners)}, not "
                f"to {cfg.method}; leave it out"
            )
    if cfg.llrd != 1 and not traits.llrd:
        why = "sets them itself" if cfg.method == "ulmfit" else "does not train these"
        raise UserError(
            f"--llrd sets the rates of the model's blocks, and --method {cfg.method} {why}; leave "
            "it out"
        )
    if cfg.optimizer == "muon" and not traits.matrices:
        raise UserError(
            "--optimizer muon is for the matrices of the model's blocks, which --method "
            f"{cfg.method} does not train; use --optimizer adamw"
        )
    if cfg.init == "scratch" and cfg.method in ADAPTERS:
        raise UserError(
            f"--method {cfg.method} adds to trained weights, but there are none without --init; "
            "name a model with --init, or use --method full"
        )


def groups(model: GPT, cfg: FinetuneConfig, step: int, steps_per_epoch: int) -> list[Group]:
    """The parameters that train in `step`: optim.default_groups, split by the layers' rates. Pure
    in step.

    ulmfit (Howard and Ruder 2018) trains the head in the first epoch and unfreezes one more layer
    below in each epoch. A layer's rate is 1/2.6 of the rate of the layer above. The heads of a
    classifier train under every method. An untied language-model head has no loss in a classifier,
    so no method trains it there.
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
    """Names of the parameters that train in an epoch, each with its fraction of the learning
    rate."""
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
    """The depth of each parameter that can train, counted from the top: 0 for the head and the last
    norm, 1 for the last block, and n_layer + 1 for the embeddings. Adapters in a block have the
    depth of the block, other adapters have depth 0.

    from_head: a tied embedding table counts as the head. In a classifier, only the heads have depth
    0, and the last norm belongs to the last block.
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
    """Names of the parameters that a checkpoint stores: all of them, or for an adapter only those
    that the base lacks."""
    return (
        always_trained(model)
        if cfg.method in ADAPTERS
        else {name for name, _ in model.named_parameters()}
    )


def count_parameters(model: GPT, trained: Sequence[Group]) -> tuple[int, int]:
    """The number of parameters that train, and of all parameters. Padding rows of the vocabulary
    are not counted."""
    named = {name: p for group in trained for name, p in group.params.items()}
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    padded = sum(f"{name}.weight" in named for name in TABLES)
    return sum(p.numel() for p in named.values()) - padded * padding, model.n_params()


def add_adapter(model: GPT, cfg: MethodConfig, new_tokens: range = range(0)) -> None:
    """Add the adapter of cfg.method to `model`, in place, and freeze all that does not train. New
    weights are drawn from the global random state.

    new_tokens: ids that a pretrained model lacks. Their embedding rows train under every method,
    even if it freezes the table. Raises UserError if the method does not fit the model.
    """
    if cfg.method == "last-k" and cfg.last_k > model.config.n_layer:
        raise UserError(
            f"--last-k {cfg.last_k}: the model has only {model.config.n_layer} blocks; use fewer, "
            "or --method full"
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
