"""Load a model and its tokenizer for inference from a folder that a run wrote, a folder in the
hub's layout, or an adapter's."""

from __future__ import annotations

from collections.abc import Iterable

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
    """The model and tokenizer of `where` (see checkpoint.locate), ready for inference on `device`
    in `dtype`.

    For an adapter's folder this is the base model with the adapter applied, and the base's
    tokenizer if the folder has none. `tokenizer` names a tokenizer to use in place of the
    checkpoint's own. Raises UserError if either cannot be read, or if the tokenizer has ids that
    the model does not have.
    """
    model = open_weights(where, device, dtype)
    return model, open_tokenizer(where, tokenizer, model)


def open_weights(where: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model of `where`, ready for inference; an adapter is merged if it can be."""
    base = locate_base(where) if is_adapter(where) else where
    model = GPT.from_pretrained(base)
    if base != where:
        load_adapter(model, where)
        if can_merge(model):
            merge(model)
    return model.to(device, dtype).eval()


def tokenizer_folder(where: str) -> str:
    """The folder or hub id that holds the tokenizer of `where`. For an adapter without one, this
    is its base."""
    return locate_base(where) if is_adapter(where) and not has_tokenizer(where) else where


def open_tokenizer(where: str, tokenizer: str | None, model: GPT) -> Tokenizer:
    """The tokenizer that `tokenizer` names, else that of `where`. Raises UserError if it has more
    ids than the model."""
    loaded = load_tokenizer(tokenizer or tokenizer_folder(where))
    if loaded.rows > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.name} has {loaded.vocab_size:,} ids and the model of {where} "
            f"only {model.config.vocab_size:,}; name the model's own tokenizer with --tokenizer"
        )
    return loaded


def opening(tokenizer: Tokenizer, size: int) -> list[int]:
    """What a text without a prompt begins with, for a model of `size` tokens. nanoGPT's models on
    characters have no end token. nanoGPT begins with a new line."""
    return [tokenizer.eot] if tokenizer.eot < size else tokenizer.encode("\n")


def check_known(tokenizer: Tokenizer, size: int, ids: Iterable[int], what: str) -> None:
    """Raise UserError if one of the token ids of `what` is not among the model's `size`: models of
    nanoGPT's on characters have neither an end token nor one for unknown characters."""
    if (id := max(ids, default=0)) < size:
        return
    if id == tokenizer.eot:
        raise UserError(
            f"{what} has documents, which begin with an end token, and the model has none among its "
            f"{size:,} tokens; give token shards without it, such as nanoGPT's train.bin and val.bin"
        )
    raise UserError(
        f"{what} has a character that is not among the {size:,} tokens of the model; leave it out"
    )
