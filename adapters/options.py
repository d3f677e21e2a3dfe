"""The fine-tuning methods: their options, and which parameters of a model each method trains.

The parameters that adapters add are in adapters/layers.py. This file imports no torch, so that
`--help` is fast.
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
    """Which parameters train, and what an adapter adds to the model (adapters/layers.py)."""

    method: Method = "full"
    """What to train: the whole model, a part of it, or an adapter added to it."""
    last_k: Count = 2
    """Number of last blocks that last-k trains."""
    lora_rank: Width = 8
    """Rank of the update of LoRA and DoRA."""
    lora_alpha: Weight = 16.0
    """LoRA and DoRA multiply their update by this over the rank."""
    lora_dropout: Probability = 0.0
    """Dropout on the input of the update of LoRA and DoRA."""
    lora_on: Literal["attention", "feed-forward", "both"] = "attention"
    """Which matrices of a block LoRA and DoRA update."""
    prefix_tokens: Count = 10
    """Number of positions of a prefix or a soft prompt."""
    prefix_width: WidthOrNone = 512
    """Hidden width of the MLP that makes a prefix's keys and values in training; 0: train them
    directly."""
    llrd: Share = 1.0
    """Layer-wise learning rate decay: each block's rate is this times the rate of the block
    above."""


@dataclass(frozen=True)
class ParameterPlace:
    """A parameter's name and depth, and the epoch of the run."""

    name: str
    depth: int  # 0 for the head and the last norm, then 1 for the last block, and so on
    epoch: int


@dataclass(frozen=True)
class MethodTraits:
    """How a method treats the parameters that the model had before it."""

    trains: Callable[[ParameterPlace, MethodConfig], bool] = lambda place, cfg: False
    options: tuple[str, ...] = ()  # the options of this method alone
    llrd: bool = False  # whether --llrd may set the rates of its blocks
    matrices: bool = False  # whether it trains matrices of the blocks, as Muon needs


_LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_on")

# Which of the model's own parameters each method trains. The heads of a classifier and the
# parameters of an adapter always train.
METHODS: dict[Method, MethodTraits] = {
    "full": MethodTraits(lambda place, cfg: True, llrd=True, matrices=True),
    "last-layer": MethodTraits(lambda place, cfg: place.depth == 0),
    "last-k": MethodTraits(
        lambda place, cfg: place.depth <= cfg.last_k, ("last_k",), llrd=True, matrices=True
    ),
    # Howard and Ruder (2018): training starts with the head, and each epoch unfreezes one layer.
    "ulmfit": MethodTraits(lambda place, cfg: place.depth <= place.epoch, matrices=True),
    # Ben Zaken et al. (2022): only the biases, those of the norms included.
    "bitfit": MethodTraits(lambda place, cfg: place.name.endswith(".bias"), llrd=True),
    "lora": MethodTraits(options=_LORA_OPTIONS, llrd=True),
    "dora": MethodTraits(options=_LORA_OPTIONS, llrd=True),
    "prefix": MethodTraits(options=("prefix_tokens", "prefix_width")),
    "soft-prompt": MethodTraits(options=("prefix_tokens",)),
}
