"""Token shards on disk: reading every layout, writing llm.c's.

Read: llm.c's and modded-nanogpt's .bin, build-nanogpt's .npy, nanoGPT's train.bin and val.bin.
A shard is memory-mapped, so a corpus may exceed memory.
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

FORMAT = 1  # of the manifest and the cache; a change makes the cache's older entries unused
HEADER_INTS = 256
# (magic, version)
LAYOUTS = {(20240520, 1): np.dtype(np.uint16), (20240801, 7): np.dtype(np.uint32)}
BARE_NAMES = ("train.bin", "val.bin")  # nanoGPT's, which have no header


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn an OSError of reading `path` into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


class ShardTokenizer(Protocol):
    """What of a tokenizer a shard's writer needs."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eot(self) -> int: ...
    @property
    def source(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def special(self) -> Sequence[str]: ...
    @property
    def sha256(self) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...
    def save(self, folder: Path) -> None: ...


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16, or uint32 where the vocabulary exceeds 65,536."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class Shard:
    """Where the tokens of one file are."""

    path: Path
    n_tokens: int
    dtype: np.dtype
    offset: int  # bytes before the first token

    def map(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.n_tokens,))


def read_shard(path: Path) -> Shard:
    """What the header of `path` says, checked against the file's size. Raises UserError: foreign,
    truncated or empty."""
    with reading(path):
        size = path.stat().st_size
        if path.is_fifo():  # which would wait for somebody to write
            raise UserError(
                f"{path} is a pipe, where a shard is read at any place; write it to a file"
            )
        path.open("rb").close()
    shard = _read_npy(path) if path.suffix == ".npy" else _read_bin(path, size)
    expected = shard.offset + shard.n_tokens * shard.dtype.itemsize
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise UserError(
            f"{path} is {what}: {size} bytes where its header promises {expected}; make or copy it "
            "again"
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
                f"{path} is truncated: {size} bytes are no whole number of uint16 tokens; make or "
                "copy it again"
            )
        return Shard(path, size // 2, np.dtype(np.uint16), 0)
    if len(header) and header[0] in [magic for magic, _ in LAYOUTS]:
        raise UserError(
            f"{path} is truncated or of another version: its header is not whole; make or copy it "
            "again"
        )
    raise UserError(
        f"{path} is a foreign shard: neither llm.c's header, nor .npy, nor nanoGPT's train.bin or "
        "val.bin; tokenize the text again with `python fineweb_prep.py --input FILES --out FOLDER`"
    )


def _read_npy(path: Path) -> Shard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path} is truncated or no .npy file: {error}; make or copy it again"
        ) from None
    if array.dtype not in LAYOUTS.values() or array.ndim != 1:
        raise UserError(
            f"{path} is a foreign shard: {array.ndim}-d {array.dtype} where 1-d uint16 or uint32 "
            "is read"
        )
    assert isinstance(array, np.memmap)
    return Shard(path, len(array), array.dtype, array.offset)


class ShardWriter:
    """Cuts a stream of tokens into .bin shards, each flushed and renamed before the next begins.

    name: of the shard with a given number. finished(record, n): called after each shard with its
    entry for the manifest, and how many tokens of the array in `add` are on disk by then.
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
        """tokens: (n,) of any unsigned dtype."""
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
    """(vocab_size,) int64: bytes of text behind each token; none behind end-of-text."""
    lengths = np.array(
        [len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], np.int64
    )
    lengths[tokenizer.eot] = 0
    return lengths


def write_manifest(
    folder: Path, tokenizer: ShardTokenizer, shards: list[dict[str, Any]], **more: Any
) -> None:
    """Name what the shards of `folder` are, and put a tokenizer that only this machine has beside
    them."""
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
