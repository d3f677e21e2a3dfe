"""A small GPT-2 with adapters, as after some training."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

import torch

from adapters import layers
from adapters.heads import Head
from adapters.layers import adapter_parameters
from adapters.options import LORA, Method
from config import GPTConfig
from model import GPT
from tasks import methods
from tasks.options import FinetuneConfig

VOCAB, NEW, LAYERS, LABELS = 101, 3, 2, 5
SHAPE = GPTConfig(vocab_size=VOCAB, block_size=32, n_layer=LAYERS, n_head=2, n_embd=64)
METHODS = get_args(Method)
LORA_CASES = [(method, on) for method in LORA for on in layers.LORA_ON]
CASES = [*LORA_CASES, ("prefix", "attention"), ("soft-prompt", "attention")]


def config(method: str, lora_on: str = "attention", **options: Any) -> FinetuneConfig:
    given: dict[str, Any] = {"prefix_tokens": 4, "prefix_width": 16, "lora_rank": 3, "last_k": 1}
    given |= {"init": "base", "method": method, "lora_on": lora_on, **options}
    return FinetuneConfig(**given)


def adapted(
    base: Path,
    method: str,
    lora_on: str = "attention",
    new: int = 0,
    train: bool = True,
    head: bool = False,
    **options: Any,
) -> GPT:
    """The base with an adapter, as after some training: its values are moved off their
    beginning."""
    model = GPT.from_pretrained(base, **options).eval()
    if head:
        model.heads["main"] = Head(64, LABELS, "last")
    if new:
        layers.add_tokens(model, range(VOCAB, VOCAB + new))
    torch.manual_seed(1)
    methods.add_adapter(model, config(method, lora_on), range(VOCAB, VOCAB + new))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if train and name in adapter_parameters(model):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens(new: int = 0, rows: int = 3, length: int = 9) -> torch.Tensor:
    idx = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    idx[:, 1 : 1 + new] = torch.arange(VOCAB, VOCAB + new)
    return idx


def hub(base: Path, new: int = 0, labels: int = 0):
    """transformers' model, a classifier where there are labels."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if labels:
        model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=labels)
    else:
        model = GPT2LMHeadModel.from_pretrained(base)
    if new:
        model.resize_token_embeddings(VOCAB + new, mean_resizing=False)
    return model.eval()


def of_peft(base: Path, folder: Path, new: int = 0, labels: int = 0):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft of transformers
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(hub(base, new, labels), folder).eval()


def scores(model: GPT, head: Head, idx: torch.Tensor) -> torch.Tensor:
    return head(model.hidden(idx), torch.full((len(idx),), idx.shape[1]))
