"""Writes documents as token shards into the cache, and makes the tokenizers of `--data stdlib` and
`--tokenizer characters`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from base.console import counted
from base.files import sha256
from base.machine import cores
from config import UserError
from storage.cache import Cache, digest, writing_tokens
from storage.shards import FORMAT, ShardWriter, write_manifest
from text import corpus, tokenizing
from text.overlap import Decontaminated
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe, train_characters

CACHE_SHARD_TOKENS = 100_000_000
STDLIB_VOCAB = 4096
CHARACTERS = "characters"  # --tokenizer: one token for each character of the training text
HOLDOUT = 100  # one document in this many is held out; for ready shards, one token in this many
SMALL = 4 << 20  # bytes of text below which one process is faster than starting several


def tokenize_to_folder(
    source: corpus.Source,
    tokenizer: Tokenizer,
    folder: Path,
    label: str,
    holdout: bool,
    say: Callable[[str], None],
) -> None:
    """Write the documents of `source` as token shards and a manifest.

    holdout: every HOLDOUT-th document goes to the val shards instead of the train shards. Raises
    UserError if no document has any text.
    """
    records: list[dict[str, Any]] = []
    writers = [
        ShardWriter(
            folder,
            lambda number, split=split: f"{split}_{number:06d}.bin",
            tokenizer,
            CACHE_SHARD_TOKENS,
            lambda record, _: records.append(record),
        )
        for split in ("train", "val")
    ]
    workers = cores() if source.total is None or source.total > SMALL else 1
    documents = tokens = empty = 0
    results = tokenizing.tokenize(tokenizing.chunks(source), tokenizer, workers)
    with (
        contextlib.closing(results),
        tokenizing.Progress(f"tokenizing {label}", source.total, say) as progress,
    ):
        for chunk, ids, lengths in results:
            document = documents - 1 + np.cumsum(chunk.starts)  # number of each segment's document
            held_out = np.repeat(document % HOLDOUT == HOLDOUT - 1, lengths) & holdout
            with writing_tokens("--cache", folder.parent):
                for writer, part in zip(writers, (ids[~held_out], ids[held_out]), strict=True):
                    writer.add(part)
            documents, tokens, empty = (
                documents + sum(chunk.starts),
                tokens + len(ids),
                empty + chunk.empty,
            )
            progress.update(chunk.position, tokens)
    shared = source.left_out if isinstance(source, Decontaminated) else 0
    if shared and not documents:
        raise UserError(
            f"every document of {label} shares words with --decontaminate; divide it into more "
            "documents, or leave the option out"
        )
    if not documents:
        raise UserError(
            f"{label} is empty: none of its documents has any text ({empty} empty ones); "
            "give other data"
        )
    with writing_tokens("--cache", folder.parent):
        for writer in writers:
            writer.close()
        write_manifest(
            folder,
            tokenizer,
            sorted(records, key=lambda record: record["name"]),
            empty_documents=empty,
            shared_documents=shared,
        )
    without = f" ({empty} empty ones left out)" if empty else ""
    say(f"tokenized {label}: {counted(documents, 'document')}{without}, {counted(tokens, 'token')}")


def stdlib_tokenizer(files: list[Path], store: Cache, say: Callable[[str], None]) -> Tokenizer:
    """The byte-level BPE tokenizer of the files. It is trained once and then kept in the cache."""

    def make(folder: Path) -> None:
        say(f"training a tokenizer of {STDLIB_VOCAB} tokens on Python's standard library")
        texts = (text for text, _ in corpus.TextFiles(files).segments())
        train_bpe(texts, STDLIB_VOCAB, folder / "stdlib-bpe")

    store.prepare()
    key = digest(store.measure_once("sha256", files, sha256), STDLIB_VOCAB, FORMAT)
    return load_tokenizer(str(store.get_or_make(f"bpe-{key[:24]}", make, say) / "stdlib-bpe"))


def characters_of(files: list[Path], column: str, say: Callable[[str], None]) -> set[str]:
    """The characters of the files' text."""
    return set().union(*(text for text, _ in corpus.TextFiles(files, column, say).segments()))


def characters_tokenizer(
    files: list[Path], column: str, store: Cache, say: Callable[[str], None]
) -> Tokenizer:
    """The characters of the files' text as a tokenizer. It is made once and kept in the cache."""

    def make(folder: Path) -> None:
        found = characters_of(files, column, lambda line: None)  # the tokenizing names bad rows
        train_characters(found, folder / CHARACTERS)

    store.prepare()
    key = digest(store.measure_once("sha256", files, sha256), column, CHARACTERS, FORMAT)
    return load_tokenizer(str(store.get_or_make(f"chars-{key[:24]}", make, say) / CHARACTERS))
