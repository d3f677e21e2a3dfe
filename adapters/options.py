"""Options of the methods of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from config import Count, Probability, Share, Weight, Width, WidthOrNone

Form = Literal["plain", "prompt", "word"]
Pooling = Literal["last", "mean", "attention", "lstm"]
Cut = Literal["end", "start", "middle"]

Method = Literal["full", "last-layer", "last-k", "ulmfit", "lora", "dora", "prefix", "soft-prompt"]
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
