"""The methods of fine-tuning: their options, and which of a model's parameters each trains.

What adapters add to a model stands in adapters/layers.py. Nothing here imports torch, so that
`--help` is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from config import Count, Probability, Share, Weight, Width, WidthOrNone

Form = Literal["plain", "prompt", "word"]
Pooling = Literal["last", "mean", "attention", "lstm"]
Cut = Literal["end", "start", "middle"]

Method = Literal[
    "full", "last-layer", "last-k", "ulmfit", "bitfit", "lora", "dora", "prefix", "soft-prompt"
]
LORA: tuple[Method, ...] = ("lora", "dora")
ADAPTERS: tuple[Method, ...] = (*LORA, "prefix", "soft-prompt")  # added to a frozen model


@dataclass(frozen=True)
class MethodConfig:
    """Which parameters train, and what is added to the model for it (adapters/layers.py)."""

    method: Method = "full"
    """What is trained: everything, a part of the model, or parameters added to it."""
    last_k: Count = 2
    """Blocks that last-k trains, counted from the end."""
    lora_rank: Width = 8
    """Rank of LoRA's and DoRA's updates."""
    lora_alpha: Weight = 16.0
    """Scale of LoRA's and DoRA's updates, times 1/rank."""
    lora_dropout: Probability = 0.0
    """Dropout before LoRA's and DoRA's updates."""
    lora_on: Literal["attention", "feed-forward", "both"] = "attention"
    """Which matrices of a block LoRA and DoRA update."""
    prefix_tokens: Count = 10
    """Positions of a prefix or a soft prompt."""
    prefix_width: WidthOrNone = 512
    """Hidden width of the MLP that makes a prefix's keys and values in training; 0: they are
    trained themselves."""
    llrd: Share = 1.0
    """Layer-wise rate decay: each block's rate is this share of the rate of the block above it."""


@dataclass(frozen=True)
class ParameterPlace:
    """Where a parameter of a model stands."""

    name: str
    depth: int  # layers from the top: 0 the head and the last norm, then block by block
    epoch: int  # of the run


@dataclass(frozen=True)
class MethodTraits:
    """What a method does with the model's own parameters."""

    trains: Callable[[ParameterPlace, MethodConfig], bool] = lambda place, cfg: False
    options: tuple[str, ...] = ()  # that belong to it
    llrd: bool = False  # whether --llrd may set the rates of its blocks
    matrices: bool = False  # whether it trains matrices of the blocks, as Muon needs


_LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_on")

# What trains under each method, of the parameters that the model had before: the heads of a
# classifier and what an adapter adds always train.
METHODS: dict[Method, MethodTraits] = {
    "full": MethodTraits(lambda place, cfg: True, llrd=True, matrices=True),
    "last-layer": MethodTraits(lambda place, cfg: place.depth == 0),
    "last-k": MethodTraits(
        lambda place, cfg: place.depth <= cfg.last_k, ("last_k",), llrd=True, matrices=True
    ),
    # Howard and Ruder (2018): it begins with the head, and each epoch thaws the layer below.
    "ulmfit": MethodTraits(lambda place, cfg: place.depth <= place.epoch, matrices=True),
    # Ben Zaken et al. (2022): the biases alone, those of the norms among them.
    "bitfit": MethodTraits(lambda place, cfg: place.name.endswith(".bias"), llrd=True),
    "lora": MethodTraits(options=_LORA_OPTIONS, llrd=True),
    "dora": MethodTraits(options=_LORA_OPTIONS, llrd=True),
    "prefix": MethodTraits(options=("prefix_tokens", "prefix_width")),
    "soft-prompt": MethodTraits(options=("prefix_tokens",)),
}
