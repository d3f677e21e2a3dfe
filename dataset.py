"""Token shards to training windows: shards, their cache, and an order that is a pure function of (seed, position).

Shards are memory-mapped, so a corpus may exceed memory; a window is a copy of a slice, at any place of the stream.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import corpus
from base.files import sha256
from base.machine import cores
from config import UserError
from storage.cache import Cache, changed_while_read, writing
from storage.foreign import JsonObject, read_value
from storage.shards import FORMAT, Shard, ShardWriter, byte_lengths, read_shard, reading, write_manifest
from tokenizer import GPT2_SHA256, Tokenizer, load_tokenizer, train_bpe

READ_ANEW = {".csv": ".csv 2", ".tsv": ".tsv 2"}  # in the cache's keys
CACHE_SHARD_TOKENS = 100_000_000
STDLIB_VOCAB = 4096
GPT2_VOCAB = 50257
HOLDOUT = 100  # one document in so many, or that share of the stream, is for validation
SMALL = 4 << 20  # bytes of text that one process tokenizes sooner than several can start


# ---- one shard


def _sha256(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---- a stream of shards


class TokenDataset:
    """A stream of tokens over shards, from token `start` to `stop`. Pickles as file names; maps are opened on use."""

    def __init__(self, shards: Sequence[Shard], identity: str, manifest: dict[str, Any] | None = None):
        """identity: names the content of `shards`. manifest: what made them, where known."""
        manifest = manifest or {}
        tokenizer = manifest.get("tokenizer", {})
        self.shards = list(shards)
        self._ends = np.cumsum([shard.n_tokens for shard in shards])
        self._start = 0
        self.n_tokens = int(self._ends[-1])
        self.sha256 = identity
        self.vocab_size: int | None = manifest.get("vocab_size")
        self.tokenizer_source: str | None = tokenizer.get("source")
        self.tokenizer_sha256: str | None = tokenizer.get("sha256")
        records = {record["name"]: record for record in manifest.get("shards", [])}
        sizes = [records.get(shard.path.name, {}).get("bytes") for shard in shards]
        self.n_bytes: int | None = None if None in sizes else sum(sizes)
        self._maps: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def part(self, begin: int, end: int, n_bytes: int | None) -> TokenDataset:
        """The tokens from `begin` to `end`, behind which are `n_bytes` of text."""
        part = object.__new__(TokenDataset)
        part.__dict__ |= self.__getstate__()
        part._start, part.n_tokens, part.n_bytes = self._start + begin, end - begin, n_bytes
        part.sha256 = _sha256(self.sha256, begin, end)
        return part

    def n_windows(self, seq_len: int) -> int:
        """Windows of seq_len tokens and the one after; they do not overlap, and run over the borders of shards."""
        return max(0, (self.n_tokens - 1) // seq_len)

    def windows(self, ids: np.ndarray, seq_len: int) -> np.ndarray:
        """ids: (B,) window ids. Returns (B, seq_len + 1) int64, the tokens from id * seq_len on.

        Raises IndexError for an id outside [0, n_windows(seq_len)).
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.n_windows(seq_len):
            raise IndexError(f"window ids must lie in [0, {self.n_windows(seq_len)})")
        out = np.empty((len(ids), seq_len + 1), np.int64)
        for row, id in zip(out, ids, strict=True):
            self._read(int(id) * seq_len, row)
        return out

    def count_bytes(self, lengths: np.ndarray) -> int:
        """Bytes of text behind all tokens. lengths: (vocab_size,) bytes behind each."""
        total, buffer = 0, np.empty(1 << 20, np.int64)
        for begin in range(0, self.n_tokens, len(buffer)):
            part = buffer[: self.n_tokens - begin]
            self._read(begin, part)
            total += int(lengths[part].sum())
        return total

    def _read(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `begin` on."""
        at, filled = self._start + begin, 0
        index = int(np.searchsorted(self._ends, at, side="right"))
        while filled < len(out):
            tokens = self._map(index)
            offset = at + filled - (int(self._ends[index]) - len(tokens))
            part = tokens[offset : offset + len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            index += 1

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            self._maps[index] = self.shards[index].map()
        return self._maps[index]


# ---- the order


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: uint64 to uint64, every bit of the input moving every bit of the output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_order(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Window id at each position of the endless stream: positions e*n .. e*n+n-1 hold a permutation of range(n).

    positions: (P,) non-negative integers. Returns (P,) int64, pure in (position, n, seed), in O(P) time and memory.
    A Feistel network keyed by (seed, epoch) permutes the smallest 4**k >= n; values outside range(n) are fed back
    until they fall inside (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    positions = np.asarray(positions, np.uint64)
    half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))
    seeds = _mix(np.full(1, seed % 2**64, np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    keys = _mix(seeds + positions // np.uint64(n))
    values = _feistel(positions % np.uint64(n), keys, half)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _feistel(values[outside], keys[outside], half)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half: np.uint64, rounds: int = 8) -> np.ndarray:
    """A permutation of the numbers of 2 * half bits, chosen by each key. All uint64, (P,)."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for i in range(rounds):
        step = np.uint64((i + 1) * 0x9E3779B97F4A7C15 % 2**64)
        left, right = right, left ^ (_mix(_mix(right + step) ^ keys) & mask)
    return (left << half) | right


# ---- the cache


# ---- text to cached shards


def tokenize_to_folder(
    source: corpus.Source,
    tokenizer: Tokenizer,
    folder: Path,
    label: str,
    holdout: bool,
    say: Callable[[str], None],
) -> None:
    """Write the documents of `source` as shards and a manifest; with `holdout`, each hundredth goes to val."""
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
    results = corpus.tokenize(corpus.chunks(source), tokenizer, workers)
    with contextlib.closing(results), corpus.Progress(f"tokenizing {label}", source.total, say) as progress:
        for chunk, ids, lengths in results:
            document = documents - 1 + np.cumsum(chunk.starts)  # of each segment
            held_out = np.repeat(document % HOLDOUT == HOLDOUT - 1, lengths) & holdout
            with writing("--cache", folder.parent):
                for writer, part in zip(writers, (ids[~held_out], ids[held_out]), strict=True):
                    writer.add(part)
            documents, tokens, empty = documents + sum(chunk.starts), tokens + len(ids), empty + chunk.empty
            progress.update(chunk.position, tokens)
    if not documents:
        raise UserError(f"{label} is empty: no document in it has any text ({empty} empty ones)")
    with writing("--cache", folder.parent):
        for writer in writers:
            writer.close()
        write_manifest(folder, tokenizer, sorted(records, key=lambda record: record["name"]), empty_documents=empty)
    without = f" ({empty} empty ones left out)" if empty else ""
    say(f"tokenized {label}: {documents:,} documents{without}, {tokens:,} tokens")


def _stdlib_tokenizer(files: list[Path], store: Cache, say: Callable[[str], None]) -> Tokenizer:
    """A byte-pair tokenizer trained on the files, once."""

    def make(folder: Path) -> None:
        say(f"training a tokenizer of {STDLIB_VOCAB} tokens on Python's standard library")
        texts = (text for text, _ in corpus.TextFiles(files).segments())
        train_bpe(texts, STDLIB_VOCAB, folder / "stdlib-bpe")

    store.prepare()
    key = _sha256(store.remember("sha256", files, sha256), STDLIB_VOCAB, FORMAT)
    return load_tokenizer(str(store.once(f"bpe-{key[:24]}", make, say) / "stdlib-bpe"))


# ---- what --data may be


@dataclass(frozen=True)
class Vocabulary:
    """What training has to know of its token ids. Token shards need no more: their tokenizer may be elsewhere."""

    size: int
    name: str  # of the tokenizer
    source: str  # what load_tokenizer takes
    eot: int | None  # id that begins a document, where known
    sha256: str | None  # of the tokenizer, where known
    tokenizer: Tokenizer | None  # None where it is not on this machine
    missing: str = ""  # why it is not

    @property
    def rows(self) -> int:
        """How many a model's table must have."""
        return self.tokenizer.rows if self.tokenizer else self.size

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        return Vocabulary(
            tokenizer.vocab_size, tokenizer.name, tokenizer.source, tokenizer.eot, tokenizer.sha256, tokenizer
        )


@dataclass
class Data:
    """What a run trains and validates on."""

    train: TokenDataset
    val: TokenDataset
    vocabulary: Vocabulary

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError where it is not on this machine."""
        return _needed(self.vocabulary)


@dataclass
class _Opened:
    """Shards by the split that their names tell."""

    train: TokenDataset | None
    val: TokenDataset | None
    vocabulary: Vocabulary


def _needed(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.tokenizer is None:
        raise UserError(
            f"the tokenizer of the token shards is not known here ({vocabulary.missing}); name it: --tokenizer"
        )
    return vocabulary.tokenizer


def open_data(
    data: str,
    val_data: str | None,
    tokenizer: str | None,
    text_column: str,
    cache: Path,
    seq_len: int,
    say: Callable[[str], None] = print,
) -> Data:
    """Training and validation tokens of whatever `data` names: shards, text, `stdlib`, or a dataset on the hub.

    Without `val_data`, validation is the shards whose names have the word val or validation; of text, each hundredth document; and
    where there is neither (fewer than 100 documents), the last hundredth of the stream, at least one window and
    at most a tenth. Raises UserError for data that is missing, damaged, empty, too short or of another tokenizer.
    """
    store = Cache(cache)
    asked = Vocabulary.of(load_tokenizer(tokenizer)) if tokenizer else None
    opened = _open(data, asked, text_column, store, val_data is None, say)
    train, val, vocabulary = opened.train, opened.val, opened.vocabulary
    if train is None:
        raise UserError(
            f"{data} holds only validation shards (val or validation in their names); give a folder with others too"
        )
    if val_data is not None:
        unknown = vocabulary.sha256 is None
        other = _open(val_data, None if unknown else vocabulary, text_column, store, False, say, named=False)
        val = other.val or other.train
        if unknown:  # then its size is one more than the largest id
            vocabulary = max(vocabulary, other.vocabulary, key=lambda vocabulary: vocabulary.size)
    elif val is None:
        train, val = _split_tail(train, vocabulary, seq_len, data)
    assert val is not None
    for dataset, what in (
        (train, data),
        (val, f"validation data of {data}" if val_data is None else val_data),
    ):
        if not dataset.n_windows(seq_len):
            raise UserError(_too_short(what, dataset.n_tokens, seq_len, dataset.n_tokens - 1))
    return Data(train, val, vocabulary)


def open_whole(
    data: str,
    tokenizer: Tokenizer | None,
    text_column: str,
    cache: Path,
    say: Callable[[str], None] = print,
) -> TokenDataset:
    """All of `data`, nothing held out, with the bytes of its text; of shards, those named val if there are any.

    Without a tokenizer only shards can be opened, and the bytes are those of their manifest, if any.
    """
    if tokenizer is None and not _shard_files(Path(data).expanduser()):
        raise UserError(f"--data {data} is text, and the checkpoint has no tokenizer; name it: --tokenizer")
    asked = Vocabulary.of(tokenizer) if tokenizer else None
    opened = _open(data, asked, text_column, Cache(cache), False, say)
    whole = opened.val or opened.train
    assert whole is not None
    whole.vocab_size = opened.vocabulary.size
    if whole.n_bytes is None and tokenizer:
        whole.n_bytes = whole.count_bytes(byte_lengths(tokenizer))
    return whole


def _too_short(what: str, n_tokens: int, seq_len: int, fits: int) -> str:
    advice = f"try --seq-len {fits}, or more data" if fits > 0 else "give more data"
    return (
        f"{what} is too short: {n_tokens:,} tokens, where a window of --seq-len {seq_len} takes {seq_len + 1}; {advice}"
    )


def _split_tail(
    whole: TokenDataset, vocabulary: Vocabulary, seq_len: int, data: str
) -> tuple[TokenDataset, TokenDataset]:
    """The last hundredth of the stream is validation: at least one window, at most a tenth."""
    most = whole.n_tokens // 10
    size = max(seq_len + 1, whole.n_tokens // HOLDOUT)
    if size > most:
        raise UserError(_too_short(f"the tenth of {data} kept for validation", most, seq_len, most - 1))
    border = whole.n_tokens - size
    val = whole.part(border, whole.n_tokens, None)
    if whole.n_bytes is None or vocabulary.tokenizer is None:
        return whole.part(0, border, None), val
    val.n_bytes = val.count_bytes(byte_lengths(vocabulary.tokenizer))
    return whole.part(0, border, whole.n_bytes - val.n_bytes), val


def _open(
    spec: str,
    asked: Vocabulary | None,
    column: str,
    store: Cache,
    holdout: bool,
    say: Callable[[str], None],
    named: bool = True,
) -> _Opened:
    """named: whether the user named the vocabulary that is asked for."""
    path = Path(spec).expanduser()
    if files := _shard_files(path):
        return _open_shards(path, files, asked, store, named)
    if spec == "stdlib" and not path.exists():
        texts = corpus.stdlib_files()
        tokenizer = _needed(asked) if asked else _stdlib_tokenizer(texts, store, say)
        return _open_text(texts, spec, tokenizer, column, store, holdout, say)
    hub = not os.path.exists(path) and corpus.is_hub_id(spec)
    texts = [] if hub else corpus.find_files(spec)  # looked for first: what is not there needs no tokenizer
    tokenizer = _needed(asked) if asked else load_tokenizer("gpt2")
    if hub:
        return _open_hub(spec, tokenizer, column, store, holdout, say)
    return _open_text(texts, spec, tokenizer, column, store, holdout, say)


def check_data(data: str, val_data: str | None, tokenizer: str | None, text_column: str, cache: Path) -> int:
    """The size of the vocabulary that `open_data` would find, with nothing tokenized or written.

    Raises UserError where it would find no data or no tokenizer; and for damaged shards.
    """
    asked = Vocabulary.of(load_tokenizer(tokenizer)) if tokenizer else None
    store = Cache(cache)
    _check_there(data, asked, text_column, store)
    if val_data is not None:
        _check_there(val_data, asked, text_column, store)
    path = Path(data).expanduser()
    if files := _shard_files(path):
        return _open_shards(path, files, asked, store).vocabulary.size
    if asked:
        return asked.size
    return STDLIB_VOCAB if data == "stdlib" and not path.exists() else load_tokenizer("gpt2").vocab_size


def _check_there(spec: str, asked: Vocabulary | None, column: str, store: Cache) -> None:
    path = Path(spec).expanduser()
    if files := _shard_files(path):
        _open_shards(path, files, asked, store)
    elif spec == "stdlib" and not path.exists():
        corpus.stdlib_files()
    elif os.path.exists(path) or not corpus.is_hub_id(spec):
        for file in corpus.find_files(spec):
            with reading(file):
                file.open("rb").close()
    elif not _is_cached(spec, asked, column, store):
        _hub_dataset(spec, column)


def _is_cached(spec: str, asked: Vocabulary | None, column: str, store: Cache) -> bool:
    """Whether a hub dataset has been tokenized: then it need not be in reach."""
    if not store.root.is_dir():
        return False
    tokenizer = _needed(asked) if asked else load_tokenizer("gpt2")
    keys = (_hub_key(spec, column, tokenizer, holdout) for holdout in (True, False))
    return any((store.root / key).is_dir() for key in keys)


def _hub_key(spec: str, column: str, tokenizer: Tokenizer, holdout: bool) -> str:
    return _sha256("hub", spec, column, tokenizer.sha256, holdout, FORMAT)[:32]


def _hub_dataset(spec: str, column: str, say: Callable[[str], None] = print) -> corpus.HubDataset:
    name, _, config = spec.partition(":")
    return corpus.HubDataset(name, config or None, column=column, say=say)


def _open_text(
    files: list[Path],
    label: str,
    tokenizer: Tokenizer,
    column: str,
    store: Cache,
    holdout: bool,
    say: Callable[[str], None],
) -> _Opened:
    """Text files, tokenized once for one content, column and tokenizer."""
    store.prepare()
    content = store.remember("sha256", files, sha256)
    # Tables were once read by other rules, so what the cache holds of them from then is not used.
    kinds = [READ_ANEW.get(kind, kind) for kind in map(corpus.suffix_of, files)]
    key = _sha256(content, kinds, column, tokenizer.sha256, holdout, FORMAT)[:32]

    def make(folder: Path) -> None:
        tokenize_to_folder(corpus.TextFiles(files, column, say), tokenizer, folder, label, holdout, say)
        for path, before, now in zip(files, content, store.remember("sha256", files, sha256), strict=True):
            if now != before:
                raise changed_while_read(path)

    folder = store.once(key, make, say)
    return _open_shards(folder, _shard_files(folder), Vocabulary.of(tokenizer), store)


def _open_hub(
    spec: str, tokenizer: Tokenizer, column: str, store: Cache, holdout: bool, say: Callable[[str], None]
) -> _Opened:
    """A hub dataset, streamed and tokenized once under its name; remove its folder in the cache to fetch it anew."""

    def make(folder: Path) -> None:
        tokenize_to_folder(_hub_dataset(spec, column, say), tokenizer, folder, spec, holdout, say)

    folder = store.once(_hub_key(spec, column, tokenizer, holdout), make, say)
    return _open_shards(folder, _shard_files(folder), Vocabulary.of(tokenizer), store)


def is_validation(name: str) -> bool:
    """Whether a whole word of a shard's name says so: val.bin, fineweb_val_000000.bin, but not medieval_000000.npy."""
    return not {"val", "validation"}.isdisjoint(corpus.words_of(Path(name).stem))


def _shard_files(path: Path) -> list[Path]:
    """The token shards that `path` is or holds, in order; none where it holds none."""
    if os.path.isfile(path):
        return [path] if path.suffix in (".bin", ".npy") else []
    if not os.path.isdir(path):
        return []
    if (path / "progress.json").exists() and not (path / "manifest.json").exists():
        raise UserError(f"{path} is unfinished: type the fineweb_prep.py command that began it again, and it goes on")
    with reading(path):
        files = sorted(path.iterdir())
    return [file for file in files if file.suffix in (".bin", ".npy") and not corpus.is_hidden(file.name)]


def _open_shards(path: Path, files: list[Path], asked: Vocabulary | None, store: Cache, named: bool = True) -> _Opened:
    """Raises UserError for shards that are damaged, or of another tokenizer than the one asked for."""
    folder = path if path.is_dir() else path.parent
    manifest = _read_manifest(folder)
    shards = [read_shard(file) for file in files]
    if manifest:
        vocabulary = _manifest_vocabulary(folder, manifest, asked, named)
        records = _check_records(folder, manifest, shards, whole=path.is_dir())
        max_ids, marks = [r["max_id"] for r in records], [[r["tokens"], r["sha256"]] for r in records]
    else:
        max_ids = store.remember("max_id", files, _max_id)
        marks = [_fingerprint(file) for file in files]
        vocabulary = asked or _assumed_vocabulary(max(max_ids) + 1)
    for file, max_id in zip(files, max_ids, strict=True):
        if max_id >= vocabulary.size:
            raise UserError(beyond_vocabulary(file, max_id, vocabulary.size, vocabulary.name))

    def split(val: bool) -> TokenDataset | None:
        chosen = [i for i, file in enumerate(files) if is_validation(file.name) == val]
        identity = _sha256([marks[i] for i in chosen])
        return TokenDataset([shards[i] for i in chosen], identity, manifest) if chosen else None

    return _Opened(split(False), split(True), vocabulary)


def _assumed_vocabulary(n_ids: int) -> Vocabulary:
    """Of shards that do not say what made them: GPT-2's, where their ids are all in it."""
    if n_ids > GPT2_VOCAB:
        reason = f"they hold ids up to {n_ids - 1:,}, beyond GPT-2's, and no manifest.json"
        return Vocabulary(n_ids, "unknown", "unknown", None, None, None, reason)
    try:
        return Vocabulary.of(load_tokenizer("gpt2"))
    except UserError as error:
        return Vocabulary(GPT2_VOCAB, "gpt2", "gpt2", GPT2_VOCAB - 1, GPT2_SHA256, None, str(error))


def beyond_vocabulary(path: Path, max_id: int, size: int, name: str) -> str:
    """What is wrong with a shard that holds `max_id`, and what to type."""
    return (
        f"{path} holds token id {max_id}, beyond the {size:,} of tokenizer {name}; "
        f"name the tokenizer that made it with --tokenizer"
    )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """What this project wrote beside the shards; None where they come from elsewhere."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    values = read_value(file)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None
    _check_manifest(JsonObject(file, values))
    return values


def _check_manifest(manifest: JsonObject) -> None:
    """UserError where someone's editor left a value that a run would stumble over later."""
    manifest.whole("vocab_size", default=1, least=1)
    tokenizer, shards = manifest.nested("tokenizer"), manifest.values.get("shards")
    if any(tokenizer.text(key) is None for key in ("source", "sha256")):
        raise manifest.wrong("tokenizer", "an object with the source and the sha256 of a tokenizer")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise manifest.wrong("shards", "a list of objects, one a shard")
    for i, shard in enumerate(JsonObject(manifest.file, shard, f"shards[{i}].") for i, shard in enumerate(shards)):
        if any(shard.text(key) is None for key in ("name", "sha256")):
            raise manifest.wrong("shards", f"a list whose entry {i} has a name and a sha256")
        for key in ("tokens", "max_id"):
            shard.whole(key)


def _manifest_vocabulary(folder: Path, manifest: dict[str, Any], asked: Vocabulary | None, named: bool) -> Vocabulary:
    made_with = manifest["tokenizer"]
    vocabulary = asked or _own_vocabulary(folder, manifest)
    if vocabulary.sha256 != made_with["sha256"]:
        advice = "leave --tokenizer out" if named else "tokenize the text again"
        raise UserError(
            f"the shards in {folder} were made with tokenizer {made_with['source']} ({made_with['sha256'][:8]}), "
            f"not with {vocabulary.source} ({str(vocabulary.sha256)[:8]}); {advice}"
        )
    return vocabulary


def _own_vocabulary(folder: Path, manifest: dict[str, Any]) -> Vocabulary:
    """With the tokenizer, where it is on this machine."""
    beside, made_with = folder / "tokenizer", manifest["tokenizer"]
    where = str(beside) if beside.is_dir() else made_with["source"]
    reason = f"there is no {where}"
    if where == "gpt2" or os.path.exists(where):
        try:
            return Vocabulary.of(load_tokenizer(where))
        except UserError as error:
            if where != "gpt2":
                raise
            reason = str(error)
    return Vocabulary(
        manifest["vocab_size"],
        made_with["name"],
        made_with["source"],
        manifest["eot"],
        made_with["sha256"],
        None,
        reason,
    )


def _check_records(folder: Path, manifest: dict[str, Any], shards: list[Shard], whole: bool) -> list[dict[str, Any]]:
    """The manifest's entry of each shard. Raises UserError where the two disagree."""
    records = {record["name"]: record for record in manifest["shards"]}
    if whole and (missing := sorted(set(records) - {shard.path.name for shard in shards})):
        raise UserError(f"{folder} lacks {missing[0]}, which its manifest.json names; copy or make it again")
    for shard in shards:
        name = shard.path.name
        if name not in records:
            raise UserError(f"{shard.path} is not in {folder / 'manifest.json'}; remove the one or the other")
        if shard.n_tokens != records[name]["tokens"]:
            raise UserError(
                f"{shard.path} holds {shard.n_tokens:,} tokens where manifest.json says {records[name]['tokens']:,}; "
                f"copy or make it again"
            )
    return [records[shard.path.name] for shard in shards]


def _max_id(path: Path) -> int:
    tokens = read_shard(path).map()
    return max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))


def _fingerprint(path: Path) -> list[Any]:
    """Name, size, head and tail of a shard without a manifest: quick, and enough to tell corpora apart."""
    size, ends = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        ends.update(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        ends.update(file.read())
    return [path.name, size, ends.hexdigest()]
