"""A model and its tokenizer, ready for inference, from any folder that a run wrote, the hub's, or
an adapter's."""

from __future__ import annotations

import torch

from adapters.layers import can_merge, merge
from adapters.peft import load_adapter, locate_base
from config import UserError
from model import GPT
from storage.hub import is_adapter
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_files import has_tokenizer


def open_model(
    where: str, tokenizer: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of `where` (see checkpoint.locate), ready for inference on `device` in
    `dtype`.

    An adapter's folder gives its base with the adapter in it, and the base's tokenizer if it has
    none. `tokenizer` names another one than the checkpoint's own. Raises UserError where either
    cannot be read, or the tokenizer has ids that the model lacks.
    """
    model = open_weights(where, device, dtype)
    return model, open_tokenizer(where, tokenizer, model)


def open_weights(where: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model of `where` alone, ready for inference."""
    base = locate_base(where) if is_adapter(where) else where
    model = GPT.from_pretrained(base)
    if base != where:
        load_adapter(model, where)
        if can_merge(model):
            merge(model)
    return model.to(device, dtype).eval()


def tokenizer_folder(where: str) -> str:
    """Where the tokenizer of `where` lies: with an adapter that has none, its base."""
    return locate_base(where) if is_adapter(where) and not has_tokenizer(where) else where


def open_tokenizer(where: str, tokenizer: str | None, model: GPT) -> Tokenizer:
    """The tokenizer named, else that of `where`."""
    loaded = load_tokenizer(tokenizer or tokenizer_folder(where))
    if loaded.rows > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.name} has {loaded.vocab_size:,} ids and the model of {where} "
            f"only {model.config.vocab_size:,}; name the model's own with --tokenizer"
        )
    return loaded
