"""Reads token shards in every common layout, and writes them in llm.c's.

The layouts are the .bin of llm.c and modded-nanogpt, the .npy of build-nanogpt, and the train.bin
and val.bin of nanoGPT. A shard is memory-mapped, so a corpus may be larger than memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from base.files import sha256, write_json
from config import UserError

FORMAT = 1  # version of manifest and cache; after a change the cache's older entries are ignored
HEADER_INTS = 256
# dtype of the tokens, by (magic, version) of the header
LAYOUTS = {(20240520, 1): np.dtype(np.uint16), (20240801, 7): np.dtype(np.uint32)}
BARE_NAMES = ("train.bin", "val.bin")  # nanoGPT's files, which have no header


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn an OSError from reading `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class ShardTokenizer(Protocol):
    """The part of a tokenizer that is needed to write shards. See text.tokenizer.Tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def eot(self) -> int:
        """Id of the token that ends a document."""
        ...

    @property
    def source(self) -> str:
        """What load_tokenizer takes: "gpt2" or a path."""
        ...

    @property
    def name(self) -> str:
        """Name for the manifest and messages."""
        ...

    @property
    def special(self) -> Sequence[str]:
        """Special tokens that were added to those of `source`."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of all that decides a text's ids."""
        ...

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 bytes of one token; b"" for a special token."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files in the hub's layout."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16, or uint32 for a vocabulary of more than 65,536 tokens."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Shard:
    """One file of tokens, and where in it the tokens are."""

    path: Path
    n_tokens: int
    dtype: np.dtype
    offset: int  # bytes before the first token

    def map(self) -> np.ndarray:
        """The tokens as a read-only memory map, (n_tokens,) of `dtype`."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.n_tokens,))


def read_shard(path: Path) -> Shard:
    """The shard in a file, whose header is checked against the file's size.

    Raises UserError for a file of another kind, and for a truncated or empty one.
    """
    with reading(path):
        size = path.stat().st_size
        if path.is_fifo():  # opening it would wait until somebody writes to it
            raise UserError(
                f"{path} is a pipe, but a shard is read in any order; write it to a file"
            )
        path.open("rb").close()
    shard = _read_npy(path) if path.suffix == ".npy" else _read_bin(path, size)
    expected = shard.offset + shard.n_tokens * shard.dtype.itemsize
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise UserError(
            f"{path} is {what}: it has {size} bytes, but its header says {expected}; make or copy "
            "it again"
        )
    if not shard.n_tokens:
        raise UserError(f"{path} holds no tokens; remove it or make it again")
    return shard


def _read_bin(path: Path, size: int) -> Shard:
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) == HEADER_INTS and (layout := (int(header[0]), int(header[1]))) in LAYOUTS:
        return Shard(path, int(header[2]), LAYOUTS[layout], HEADER_INTS * 4)
    if path.name in BARE_NAMES and (not len(header) or header[0] not in dict(LAYOUTS)):
        if size % 2:
            raise UserError(
                f"{path} is truncated: {size} bytes are not a whole number of uint16 tokens; make "
                "or copy it again"
            )
        return Shard(path, size // 2, np.dtype(np.uint16), 0)
    if len(header) and header[0] in [magic for magic, _ in LAYOUTS]:
        raise UserError(
            f"{path} is truncated or of another version: its header is not complete; make or copy "
            "it again"
        )
    raise UserError(
        f"{path} is a foreign shard: it has no llm.c header and is neither .npy nor nanoGPT's "
        "train.bin or val.bin; tokenize the text again with `python fineweb_prep.py --input FILES "
        "--out FOLDER`"
    )


def _read_npy(path: Path) -> Shard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is truncated or not a .npy file: {error}; make or copy it again"
        ) from None
    if array.dtype not in LAYOUTS.values() or array.ndim != 1:
        raise UserError(
            f"{path} is a foreign shard: {array.ndim}-d {array.dtype}; save it as 1-d uint16 or "
            "uint32"
        )
    assert isinstance(array, np.memmap)
    return Shard(path, len(array), array.dtype, array.offset)


class ShardWriter:
    """Cuts a stream of tokens into .bin shards. Each is flushed and renamed before the next begins.

    name(number): the file's name for a shard. finished(record, n): is called after each shard with
    its entry for the manifest, and with how many tokens of the array given to `add` are on disk.
    first: number of the first shard.
    """

    def __init__(
        self,
        folder: Path,
        name: Callable[[int], str],
        tokenizer: ShardTokenizer,
        shard_tokens: int,
        finished: Callable[[dict[str, Any], int], None],
        first: int = 0,
    ):
        self.folder, self.name, self.shard_tokens, self.finished = (
            folder,
            name,
            shard_tokens,
            finished,
        )
        self.dtype, self.eot = token_dtype(tokenizer.vocab_size), tokenizer.eot
        self._byte_lengths = byte_lengths(tokenizer)
        self._number = first
        self._begin()

    def _begin(self) -> None:
        self._tokens = self._documents = self._bytes = self._max_id = 0
        self._file = None

    @property
    def _temporary(self) -> Path:
        return self.folder / (self.name(self._number) + ".tmp")

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens, (n,) of any unsigned dtype, and finish the shards that they fill."""
        begin, self._given = 0, len(tokens)
        while begin < len(tokens):
            part = tokens[begin : begin + self.shard_tokens - self._tokens]
            self._write(part)
            begin += len(part)
            if self._tokens == self.shard_tokens:
                self._finish(begin)

    def close(self) -> None:
        """Finish the last, shorter shard."""
        if self._tokens:
            self._finish(self._given)

    def _write(self, part: np.ndarray) -> None:
        if self._file is None:
            self._file = self._temporary.open("wb")
            self._file.write(bytes(HEADER_INTS * 4))
        self._file.write(part.astype(self.dtype, copy=False).tobytes())
        self._tokens += len(part)
        self._documents += int((part == self.eot).sum())
        self._bytes += int(self._byte_lengths[part].sum())
        self._max_id = max(self._max_id, int(part.max()))

    def _finish(self, consumed: int) -> None:
        assert self._file is not None
        header = np.zeros(HEADER_INTS, "<i4")
        magic, version = next(layout for layout, dtype in LAYOUTS.items() if dtype == self.dtype)
        header[:3] = magic, version, self._tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self.folder / self.name(self._number)
        self._temporary.replace(path)
        record = dict(
            name=path.name, tokens=self._tokens, documents=self._documents, bytes=self._bytes
        )
        record |= dict(max_id=self._max_id, sha256=sha256(path))
        self._number += 1
        self._begin()
        self.finished(record, consumed)


def byte_lengths(tokenizer: ShardTokenizer) -> np.ndarray:
    """The number of text bytes of each token, (vocab_size,) int64. End-of-text has 0."""
    lengths = np.array(
        [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int64
    )
    lengths[tokenizer.eot] = 0
    return lengths


def write_manifest(
    folder: Path, tokenizer: ShardTokenizer, shards: list[dict[str, Any]], **more: Any
) -> None:
    """Write manifest.json, which describes the shards of `folder`.

    Any tokenizer except plain gpt2 is saved next to them, because other machines may not have it.
    more: further keys of the manifest.
    """
    if tokenizer.source != "gpt2" or tokenizer.special:
        tokenizer.save(folder / "tokenizer")
    manifest = dict(
        format=FORMAT,
        tokenizer=dict(source=tokenizer.source, name=tokenizer.name, sha256=tokenizer.sha256),
    )
    manifest |= dict(vocab_size=tokenizer.vocab_size, eot=tokenizer.eot)
    manifest |= {
        total: sum(shard[total] for shard in shards) for total in ("documents", "tokens", "bytes")
    }
    write_json(folder / "manifest.json", manifest | more | {"shards": shards})
