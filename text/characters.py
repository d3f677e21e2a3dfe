"""Vocabularies of single characters, as in nanoGPT's character-level data sets.

A vocabulary is a tokenizer of the `tokenizers` library like any other here, so checkpoints, the
decoding and transformers need to know nothing about it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from base.errors import reason
from config import UserError

META = "meta.pkl"  # nanoGPT writes the characters of its shards into this file
UNKNOWN = "<unk>"
LARGEST_META = 64 << 20  # bytes; all of Unicode takes a fifth of it


def character_vocabulary(characters: Iterable[str]) -> Any:
    """A `tokenizers` tokenizer with one token for each character; the ids are their order.

    The id after the last one is <unk>, which stands for every other character.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {character: id for id, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocab | {UNKNOWN: len(vocab)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


class _OnlyData(pickle.Unpickler):
    """An unpickler that calls nothing. A pickle may otherwise run any program."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and it should hold only data")


def read_meta(file: Path) -> Sequence[str]:
    """The characters of nanoGPT's meta.pkl in the order of their ids.

    Raises UserError for a file that holds anything but a vocabulary of single characters.
    """
    try:
        if file.stat().st_size > LARGEST_META:
            raise ValueError("it is too large for a vocabulary of characters")
        with file.open("rb") as opened:
            meta = _OnlyData(opened).load()
        by_id = meta["itos"]
        characters = [by_id[id] for id in range(len(by_id))]
        if not characters or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise ValueError("itos must give a single character for each id")
        if len(set(characters)) < len(characters):
            raise ValueError("two ids have the same character")
    except Exception as error:  # a damaged pickle raises exceptions of any kind
        raise UserError(
            f"{file} is not nanoGPT's vocabulary of characters: {reason(error)}; name another "
            "tokenizer with --tokenizer, or remove the file"
        ) from None
    return characters
