"""Opens --data: token shards, text, `stdlib` or a dataset on the hub. Text is tokenized once, into
the cache.

Shards are identified by the hashes in their manifest, or without one by size, first and last bytes.
A vocabulary is identified by the hash of its tokenizer, if that is known.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.console import counted
from base.files import sha256
from base.sources import specs_of
from config import UserError
from dataset import TokenDataset
from engine.mixture import Dataset, mixed
from storage.cache import Cache, changed_while_read, digest
from storage.foreign import JsonObject, read_value
from storage.shards import FORMAT, Shard, byte_lengths, read_shard, reading
from text import corpus
from text.characters import META, UNKNOWN
from text.files import (
    files_of,
    find_files,
    is_hidden,
    is_hub_id,
    stdlib_files,
    suffix_of,
    words_in_name,
)
from text.overlap import Decontaminated, N, NgramIndex, texts_of
from text.prepare import (
    CHARACTERS,
    HOLDOUT,
    STDLIB_VOCAB,
    characters_of,
    characters_tokenizer,
    stdlib_tokenizer,
    tokenize_to_folder,
)
from text.tokenizer import GPT2_SHA256, Tokenizer, load_tokenizer
from text.tokenizer_files import ENDOFTEXT

TABLE_READER_VERSIONS = {".csv": ".csv 2", ".tsv": ".tsv 3"}  # part of the cache's keys
GPT2_VOCAB = 50257


@dataclass(frozen=True)
class Vocabulary:
    """What training needs to know about token ids. For token shards that is enough, even if their
    tokenizer is not on this machine."""

    size: int
    name: str  # of the tokenizer
    source: str  # the argument of load_tokenizer
    eot: int | None  # the id that begins each document; None: unknown
    sha256: str | None  # of the tokenizer; None: unknown
    tokenizer: Tokenizer | None  # None: not on this machine
    missing: str = ""  # why it is not on this machine

    @property
    def rows(self) -> int:
        """How many rows the embedding of a model must have. Training needs the end token's."""
        return max(self.tokenizer.rows, self.tokenizer.eot + 1) if self.tokenizer else self.size

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer that is on this machine."""
        return Vocabulary(
            tokenizer.vocab_size,
            tokenizer.name,
            tokenizer.source,
            tokenizer.eot,
            tokenizer.sha256,
            tokenizer,
        )


@dataclass
class Data:
    """The training and validation tokens of a run, and their vocabulary."""

    train: Dataset
    val: Dataset
    vocabulary: Vocabulary
    excluded: str | None = None  # hash of the data of --decontaminate
    left_out: str = ""  # how many documents that data left out, for the banner

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises UserError if it is not on this machine."""
        return _needed(self.vocabulary)


@dataclass
class _Splits:
    """Opened data, divided into splits by the names of its shards. None: there is no such shard."""

    train: TokenDataset | None
    val: TokenDataset | None
    vocabulary: Vocabulary
    shared_documents: int = 0  # left out because of --decontaminate


@dataclass(frozen=True)
class _Excluded:
    """The data of --decontaminate."""

    spec: str
    column: str
    sha256: str  # of its content

    @staticmethod
    def find(spec: str, column: str, store: Cache) -> _Excluded:
        """Find the files. Raises UserError if there are none."""
        files = files_of(spec)
        if files is None:
            return _Excluded(spec, column, digest("hub", spec, column))
        store.prepare()
        content = store.measure_once("sha256", files, sha256)
        kinds = list(map(suffix_of, files))
        return _Excluded(spec, column, digest(content, kinds, column))

    def leave_out(self, source: corpus.Source) -> corpus.Source:
        """The documents of `source` that share no n-gram with this data. Raises UserError if it
        holds no words."""
        index = NgramIndex(list(texts_of(self.spec, self.column)))
        if not index.n_grams:
            raise UserError(f"--decontaminate {self.spec} holds no words; give other data")
        return Decontaminated(source, index)


def _needed(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.tokenizer is None:
        raise UserError(
            f"the tokenizer of the shards is not on this machine ({vocabulary.missing}); name it "
            "with --tokenizer"
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
    decontaminate: str | None = None,
) -> Data:
    """Open the training and validation tokens that `data` names: shards, text, `stdlib`, or a
    dataset on the hub.

    Without `val_data` a part of `data` is held out: the shards whose names contain the word val or
    validation, or every hundredth document of a text. If there is neither (fewer than 100
    documents), it is the last hundredth of the stream, at least one window and at most a tenth.
    Each of several weighted sources holds out its own part, and all have one vocabulary: that of
    token shards if there are any, else that of stdlib, else GPT-2's, unless `tokenizer` names it.
    Documents of `data` that share an n-gram with the texts of `decontaminate` are left out first.
    Raises UserError for data that is missing, damaged, empty, too short or of another tokenizer.
    """
    store, sources = Cache(cache), specs_of(data)
    if tokenizer == CHARACTERS:
        files = _text_for_characters(data)
        requested = Vocabulary.of(characters_tokenizer(files, text_column, store, say))
    else:
        requested = Vocabulary.of(load_tokenizer(tokenizer)) if tokenizer else None
    excluded = _Excluded.find(decontaminate, text_column, store) if decontaminate else None
    specs, named = [source.spec for source in sources], requested is not None
    holdout = val_data is None
    opened, vocabulary = _open_sources(
        specs, requested, text_column, store, holdout, say, named, excluded
    )
    trains, vals = [], []
    for spec, found in zip(specs, opened, strict=True):
        train, val = _train_and_val(spec, found, vocabulary, seq_len, holdout)
        trains.append(train)
        vals += [val] if val else []
    val_sources = sources
    if val_data is not None:
        val_sources = specs_of(val_data)
        specs = [source.spec for source in val_sources]
        known = vocabulary if vocabulary.sha256 else None  # else its size is that of the largest id
        others, theirs = _open_sources(specs, known, text_column, store, False, say, named=False)
        vocabulary = known or max(vocabulary, theirs, key=lambda vocabulary: vocabulary.size)
        for source, found in zip(val_sources, others, strict=True):
            val = found.val or found.train
            assert val is not None
            vals.append(_long_enough(val, source.spec, seq_len))
    train, val = mixed(sources, trains), mixed(val_sources, vals)
    if excluded is None:
        return Data(train, val, vocabulary)
    left_out = counted(sum(found.shared_documents for found in opened), "document")
    note = f"; {left_out} left out for sharing {N} words in a row with {decontaminate}"
    return Data(train, val, vocabulary, excluded.sha256, note)


def _open_sources(
    specs: list[str],
    vocabulary: Vocabulary | None,
    column: str,
    store: Cache,
    holdout: bool,
    say: Callable[[str], None],
    named: bool,
    excluded: _Excluded | None = None,
) -> tuple[list[_Splits], Vocabulary]:
    """Open each of `specs` with one vocabulary, and return it too. `vocabulary`: the one to use, if
    it is determined already; `named`: whether the user chose it."""
    opened: dict[str, _Splits] = {}
    for spec in _by_vocabulary(specs):
        # Shards of an unknown vocabulary are of the same one, as far as anybody can tell.
        unknown = vocabulary is not None and vocabulary.sha256 is None
        wanted = None if unknown and _shard_files(Path(spec).expanduser()) else vocabulary
        found = _open(spec, wanted, column, store, holdout, say, named, excluded)
        opened[spec] = found
        if vocabulary is None or unknown:  # its size is then only known from the largest id
            sizes = filter(None, (vocabulary, found.vocabulary))
            vocabulary = max(sizes, key=lambda vocabulary: vocabulary.size)
    assert vocabulary is not None
    return [opened[spec] for spec in specs], vocabulary


def _train_and_val(
    spec: str, found: _Splits, vocabulary: Vocabulary, seq_len: int, holdout: bool
) -> tuple[TokenDataset, TokenDataset | None]:
    """The training data of a source, and with `holdout` its validation data."""
    train, val = found.train, found.val
    if train is None:
        raise UserError(
            f"{spec} holds only validation shards (val or validation in their names); give a "
            "folder that holds others too"
        )
    if not holdout:
        return _long_enough(train, spec, seq_len), None
    if val is None:
        train, val = _split_tail(train, vocabulary, seq_len, spec)
    return (
        _long_enough(train, spec, seq_len),
        _long_enough(val, f"validation data of {spec}", seq_len),
    )


def _long_enough(dataset: TokenDataset, what: str, seq_len: int) -> TokenDataset:
    """The same dataset. Raises UserError if it has no window."""
    if not dataset.n_windows(seq_len):
        raise UserError(_too_short(what, dataset.n_tokens, seq_len, dataset.n_tokens - 1))
    return dataset


def _by_vocabulary(specs: list[str]) -> list[str]:
    """The sources in the order in which they determine the vocabulary: token shards come first,
    whose ids are fixed, then stdlib, which has a tokenizer of its own."""

    def rank(spec: str) -> int:
        path = Path(spec).expanduser()
        return 0 if _shard_files(path) else 1 if spec == "stdlib" and not path.exists() else 2

    return sorted(specs, key=rank)


def _text_for_characters(data: str) -> list[Path]:
    """The text files whose characters --tokenizer characters takes."""
    shards = any(_shard_files(Path(source.spec).expanduser()) for source in specs_of(data))
    files = None if shards else files_of(data)
    if files is None:
        raise UserError(
            f"--tokenizer {CHARACTERS} reads text files, and {data} is "
            f"{'token shards' if shards else 'on the hub'}; name a tokenizer's folder (python "
            "tokenizer.py train --model characters makes one)"
        )
    return files


def open_whole(
    data: str,
    tokenizer: Tokenizer | None,
    text_column: str,
    cache: Path,
    say: Callable[[str], None] = print,
) -> TokenDataset:
    """Open all of `data`, with nothing held out, and count the bytes of its text. If shards are
    named val, only these are opened.

    Without a tokenizer only shards can be opened, and the bytes are only known from their manifest.
    """
    if tokenizer is None and not _shard_files(Path(data).expanduser()):
        raise UserError(
            f"--data {data} is text, and the checkpoint has no tokenizer; name it with --tokenizer"
        )
    requested = Vocabulary.of(tokenizer) if tokenizer else None
    opened = _open(data, requested, text_column, Cache(cache), False, say)
    whole = opened.val or opened.train
    assert whole is not None
    whole.vocab_size = opened.vocabulary.size
    if whole.n_bytes is None and tokenizer:
        whole.n_bytes = whole.count_bytes(byte_lengths(tokenizer))
    return whole


def _too_short(what: str, n_tokens: int, seq_len: int, fits: int) -> str:
    advice = f"try --seq-len {fits}, or more data" if fits > 0 else "give more data"
    return (
        f"{what} is too short: it has {n_tokens:,} tokens, and a window of --seq-len {seq_len} "
        f"needs {seq_len + 1}; {advice}"
    )


def _split_tail(
    whole: TokenDataset, vocabulary: Vocabulary, seq_len: int, data: str
) -> tuple[TokenDataset, TokenDataset]:
    """Hold out the last hundredth of the stream: at least one window, at most a tenth."""
    most = whole.n_tokens // 10
    size = max(seq_len + 1, whole.n_tokens // HOLDOUT)
    if size > most:
        raise UserError(
            _too_short(f"the tenth of {data} held out for validation", most, seq_len, most - 1)
        )
    border = whole.n_tokens - size
    val = whole.part(border, whole.n_tokens, None)
    if whole.n_bytes is None or vocabulary.tokenizer is None:
        return whole.part(0, border, None), val
    val.n_bytes = val.count_bytes(byte_lengths(vocabulary.tokenizer))
    return whole.part(0, border, whole.n_bytes - val.n_bytes), val


def _open(
    spec: str,
    requested: Vocabulary | None,
    column: str,
    store: Cache,
    holdout: bool,
    say: Callable[[str], None],
    named: bool = True,
    excluded: _Excluded | None = None,
) -> _Splits:
    """Open what `spec` names. `named`: whether the user chose the requested vocabulary."""
    path = Path(spec).expanduser()
    if files := _shard_files(path):
        if excluded:
            raise UserError(
                f"--decontaminate reads documents, and {spec} is token shards; name the text that "
                "they were made from with --data"
            )
        return _open_shards(path, files, requested, store, named)
    if spec == "stdlib" and not path.exists():
        texts = stdlib_files()
        tokenizer = _needed(requested) if requested else stdlib_tokenizer(texts, store, say)
        return _open_text(texts, spec, tokenizer, column, store, holdout, say, excluded)
    hub = not os.path.exists(path) and is_hub_id(spec)
    # Find the files before a tokenizer is loaded: if they are missing, it is of no use.
    texts = [] if hub else find_files(spec)
    tokenizer = _needed(requested) if requested else load_tokenizer("gpt2")
    if hub:
        return _open_hub(spec, tokenizer, column, store, holdout, say, excluded)
    return _open_text(texts, spec, tokenizer, column, store, holdout, say, excluded)


def check_data(
    data: str, val_data: str | None, tokenizer: str | None, text_column: str, cache: Path
) -> int:
    """The size of the vocabulary that `open_data` would return. Tokenizes and writes nothing.

    Raises UserError if the data or the tokenizer is missing, or shards are damaged.
    """
    for spec in filter(None, (data, val_data)):
        check_files(spec)  # before the tokenizer: if files are missing, it is of no use
    specs = _by_vocabulary([source.spec for source in specs_of(data)])
    requested, tokenizer_error = None, None
    try:
        if tokenizer == CHARACTERS:
            found = characters_of(_text_for_characters(data), text_column, print)
            return len(found) + len((UNKNOWN, ENDOFTEXT))
        requested = Vocabulary.of(load_tokenizer(tokenizer)) if tokenizer else None
    except UserError as error:  # raised below, after errors about the data
        tokenizer_error = error
    store = Cache(cache)
    for spec in (*specs, *(source.spec for source in specs_of(val_data or "") if val_data)):
        _check_there(spec, requested, text_column, store)
    if tokenizer_error:
        raise tokenizer_error
    path = Path(specs[0]).expanduser()
    if files := _shard_files(path):
        return _open_shards(path, files, requested, store).vocabulary.size
    if requested:
        return requested.size
    return (
        STDLIB_VOCAB
        if specs[0] == "stdlib" and not path.exists()
        else load_tokenizer("gpt2").vocab_size
    )


def check_files(spec: str) -> None:
    """Raise UserError if `spec` names files of which one is missing or cannot be read, in any of
    its sources. The hub is not asked about a dataset."""
    specs = [source.spec for source in specs_of(spec)]
    if specs != [spec]:
        for each in specs:
            check_files(each)
        return
    path = Path(spec).expanduser()
    if _shard_files(path) or (spec == "stdlib" and not path.exists()):
        return
    if os.path.exists(path) or not is_hub_id(spec):
        for file in find_files(spec):
            with reading(file):
                file.open("rb").close()


def _check_there(spec: str, requested: Vocabulary | None, column: str, store: Cache) -> None:
    path = Path(spec).expanduser()
    if files := _shard_files(path):
        _open_shards(path, files, requested, store)
    elif spec == "stdlib" and not path.exists():
        stdlib_files()
    elif os.path.exists(path) or not is_hub_id(spec):
        check_files(spec)
    elif not _is_cached(spec, requested, column, store):
        _hub_dataset(spec, column)


def _is_cached(spec: str, requested: Vocabulary | None, column: str, store: Cache) -> bool:
    """Whether a hub dataset is tokenized already, so that the network is not needed."""
    if not store.root.is_dir():
        return False
    try:
        tokenizer = _needed(requested) if requested else load_tokenizer("gpt2")
    except UserError:
        return False
    keys = (_hub_key(spec, column, tokenizer, holdout) for holdout in (True, False))
    return any((store.root / key).is_dir() for key in keys)


def _hub_key(spec: str, column: str, tokenizer: Tokenizer, holdout: bool) -> str:
    return digest("hub", spec, column, tokenizer.sha256, holdout, FORMAT)[:32]


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
    excluded: _Excluded | None,
) -> _Splits:
    """Open text files. They are tokenized once for each content, column and tokenizer."""
    store.prepare()
    content = store.measure_once("sha256", files, sha256)
    # Older versions read tables by other rules, so what they cached must not be used.
    kinds = [TABLE_READER_VERSIONS.get(kind, kind) for kind in map(suffix_of, files)]
    own = [excluded.sha256] if excluded else []
    key = digest(content, kinds, column, tokenizer.sha256, holdout, FORMAT, *own)[:32]

    def make(folder: Path) -> None:
        source: corpus.Source = corpus.TextFiles(files, column, say)
        source = excluded.leave_out(source) if excluded else source
        tokenize_to_folder(source, tokenizer, folder, label, holdout, say)
        for path, before, now in zip(
            files, content, store.measure_once("sha256", files, sha256), strict=True
        ):
            if now != before:
                raise changed_while_read(path)

    folder = store.get_or_make(key, make, say)
    return _open_shards(folder, _shard_files(folder), Vocabulary.of(tokenizer), store)


def _open_hub(
    spec: str,
    tokenizer: Tokenizer,
    column: str,
    store: Cache,
    holdout: bool,
    say: Callable[[str], None],
    excluded: _Excluded | None,
) -> _Splits:
    """Open a hub dataset. It is streamed and tokenized once for each name, column and tokenizer. To
    fetch it again, remove its folder in the cache."""

    def make(folder: Path) -> None:
        source: corpus.Source = _hub_dataset(spec, column, say)
        source = excluded.leave_out(source) if excluded else source
        tokenize_to_folder(source, tokenizer, folder, spec, holdout, say)

    key = _hub_key(spec, column, tokenizer, holdout)
    key = digest(key, excluded.sha256)[:32] if excluded else key
    folder = store.get_or_make(key, make, say)
    return _open_shards(folder, _shard_files(folder), Vocabulary.of(tokenizer), store)


def is_validation(name: str) -> bool:
    """Whether a shard's name contains the whole word val or validation: val.bin and
    fineweb_val_000000.bin do, medieval_000000.npy does not."""
    return not {"val", "validation"}.isdisjoint(words_in_name(Path(name).stem))


def _shard_files(path: Path) -> list[Path]:
    """The token shards in a folder, in the order of their names, or the one that `path` is."""
    if os.path.isfile(path):
        return [path] if path.suffix in (".bin", ".npy") else []
    if not os.path.isdir(path):
        return []
    if (path / "progress.json").exists() and not (path / "manifest.json").exists():
        raise UserError(
            f"{path} is unfinished: type the same fineweb_prep.py command again, which continues it"
        )
    with reading(path):
        files = sorted(path.iterdir())
    return [file for file in files if file.suffix in (".bin", ".npy") and not is_hidden(file.name)]


def _open_shards(
    path: Path, files: list[Path], requested: Vocabulary | None, store: Cache, named: bool = True
) -> _Splits:
    """Open shards. Raises UserError if they are damaged, or not of the requested vocabulary."""
    folder = path if path.is_dir() else path.parent
    manifest = _read_manifest(folder)
    shards = [read_shard(file) for file in files]
    if manifest:
        vocabulary = _manifest_vocabulary(folder, manifest, requested, named)
        records = _check_records(folder, manifest, shards, whole=path.is_dir())
        max_ids, marks = (
            [r["max_id"] for r in records],
            [[r["tokens"], r["sha256"]] for r in records],
        )
    else:
        max_ids = store.measure_once("max_id", files, _max_id)
        marks = [_fingerprint(file) for file in files]
        vocabulary = requested or _named_beside(folder) or _assumed_vocabulary(max(max_ids) + 1)
    for file, max_id in zip(files, max_ids, strict=True):
        if max_id >= vocabulary.size:
            raise UserError(beyond_vocabulary(file, max_id, vocabulary.size, vocabulary.name))

    def split(val: bool) -> TokenDataset | None:
        chosen = [i for i, file in enumerate(files) if is_validation(file.name) == val]
        identity = digest([marks[i] for i in chosen])
        return TokenDataset([shards[i] for i in chosen], identity, manifest) if chosen else None

    return _Splits(
        split(False), split(True), vocabulary, (manifest or {}).get("shared_documents", 0)
    )


def _named_beside(folder: Path) -> Vocabulary | None:
    """The vocabulary of nanoGPT's character-level shards, which lies beside them."""
    meta = folder / META
    return Vocabulary.of(load_tokenizer(str(meta))) if meta.is_file() else None


def _assumed_vocabulary(n_ids: int) -> Vocabulary:
    """The vocabulary of shards without a manifest: GPT-2's, if it has all their ids."""
    if n_ids > GPT2_VOCAB:
        reason = f"they have ids up to {n_ids - 1:,}, more than GPT-2's, and no manifest.json"
        return Vocabulary(n_ids, "unknown", "unknown", None, None, None, reason)
    try:
        return Vocabulary.of(load_tokenizer("gpt2"))
    except UserError as error:
        return Vocabulary(GPT2_VOCAB, "gpt2", "gpt2", GPT2_VOCAB - 1, GPT2_SHA256, None, str(error))


def beyond_vocabulary(path: Path, max_id: int, size: int, name: str) -> str:
    """The error message for a shard that holds `max_id`, which the vocabulary does not have."""
    return (
        f"{path} holds token id {max_id}, beyond the {size:,} of tokenizer {name}; "
        f"name the tokenizer that made it with --tokenizer"
    )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest beside shards that this project wrote. None for other shards."""
    file = folder / "manifest.json"
    if not file.is_file():
        return None
    values = read_value(file)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None
    _check_manifest(JsonObject(file, values))
    return values


def _check_manifest(manifest: JsonObject) -> None:
    """Raise UserError for a wrong value, which an editor may have left, before a run depends on
    it."""
    manifest.whole("vocab_size", default=1, least=1)
    tokenizer, shards = manifest.nested("tokenizer"), manifest.values.get("shards")
    if any(tokenizer.text(key) is None for key in ("source", "sha256")):
        raise manifest.wrong("tokenizer", "an object with the source and the sha256 of a tokenizer")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise manifest.wrong("shards", "a list of objects, one a shard")
    for i, shard in enumerate(
        JsonObject(manifest.file, shard, f"shards[{i}].") for i, shard in enumerate(shards)
    ):
        if any(shard.text(key) is None for key in ("name", "sha256")):
            raise manifest.wrong("shards", f"a list whose entry {i} has a name and a sha256")
        for key in ("tokens", "max_id"):
            shard.whole(key)


def _manifest_vocabulary(
    folder: Path, manifest: dict[str, Any], requested: Vocabulary | None, named: bool
) -> Vocabulary:
    made_with = manifest["tokenizer"]
    vocabulary = requested or _own_vocabulary(folder, manifest)
    if vocabulary.sha256 != made_with["sha256"]:
        advice = "leave --tokenizer out" if named else "tokenize the text again"
        raise UserError(
            f"the shards in {folder} were made with tokenizer {made_with['source']} "
            f"({made_with['sha256'][:8]}), "
            f"not with {vocabulary.source} ({str(vocabulary.sha256)[:8]}); {advice}"
        )
    return vocabulary


def _own_vocabulary(folder: Path, manifest: dict[str, Any]) -> Vocabulary:
    """The vocabulary that the manifest describes, with its tokenizer if it is on this machine."""
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


def _check_records(
    folder: Path, manifest: dict[str, Any], shards: list[Shard], whole: bool
) -> list[dict[str, Any]]:
    """The manifest's entry for each shard. Raises UserError if the two disagree."""
    records = {record["name"]: record for record in manifest["shards"]}
    if whole and (missing := sorted(set(records) - {shard.path.name for shard in shards})):
        raise UserError(
            f"{folder} lacks {missing[0]}, which its manifest.json names; copy or make it again"
        )
    for shard in shards:
        name = shard.path.name
        if name not in records:
            raise UserError(
                f"{shard.path} is not in {folder / 'manifest.json'}; remove one of the two"
            )
        if shard.n_tokens != records[name]["tokens"]:
            raise UserError(
                f"{shard.path} holds {shard.n_tokens:,} tokens, but manifest.json says "
                f"{records[name]['tokens']:,}; copy or make it again"
            )
    return [records[shard.path.name] for shard in shards]


def _max_id(path: Path) -> int:
    tokens = read_shard(path).map()
    return max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))


def _fingerprint(path: Path) -> list[Any]:
    """Name, size, and a hash of the first and last bytes of a shard without a manifest. That is
    quick, and enough to tell corpora apart."""
    size, ends = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        ends.update(file.read(1 << 16))
        file.seek(max(0, size - (1 << 16)))
        ends.update(file.read())
    return [path.name, size, ends.hexdigest()]
