"""Opens a tokenizer's folder in any of the hub's layouts, as transformers' AutoTokenizer does.

A folder holds tokenizer.json, or vocab.json with merges.txt, or nanoGPT's meta.pkl. It may also
hold tokenizer_config.json
and, from older versions, added_tokens.json and special_tokens_map.json. The precedence of these
files and the ids of added tokens are those of transformers 5, so that checkpoints trained there
keep their ids here.

Three things differ from transformers:
- A named end token that is not in the vocabulary is refused, because no model was trained on it.
- An added token that would share its id with another token is refused.
- A tokenizer.json without byte-level BPE (KoGPT2's) is used without changes. transformers goes by
  the name of the class alone, puts the vocabulary into GPT-2's pipeline, and gives wrong ids.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from base.errors import reason
from config import UserError
from storage.foreign import JsonObject, read_object
from text.characters import META, UNKNOWN, character_vocabulary, read_meta

ENDOFTEXT = "<|endoftext|>"

# If a folder names no end token, the first of these that its vocabulary has is used.
END_TOKENS = (ENDOFTEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|im_end|>", "[SEP]")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# The class that uses only the vocabulary and the merges of a tokenizer.json.
OWN_VOCABULARY = "GPT2Tokenizer"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# The warnings about BPE dropout that this process has printed, by path of the tokenizer.
dropout_warnings: dict[str, str] = {}


class OpenedTokenizer(NamedTuple):
    """A tokenizer of the `tokenizers` library, with what its folder says about it.

    end: the end token.
    config: the content that tokenizer_config.json should have when the tokenizer is saved.
    rows: how many rows a model's embedding table must have. transformers appends special tokens
        that are named but not in the vocabulary. They do not count, because no model was trained on
        them and no text holds them.
    """

    tokenizer: Any
    end: str
    config: dict[str, Any]
    rows: int


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer in one of the layouts."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "vocab.json", META))


def open_tokenizer(path: Path, quiet: bool = False) -> OpenedTokenizer:
    """The tokenizer of a folder, or of a tokenizer.json and the files next to it.

    quiet: do not warn about BPE dropout, which is always left out. Raises UserError if there is no
    tokenizer, a file cannot be read, or no end token is found.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    folder = path if path.is_dir() else path.parent
    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if path.name == META or (not file.is_file() and not pair and (folder / META).is_file()):
        known = read_meta(folder / META)
        # nanoGPT's own models have no rows for the two special tokens.
        return characters(known)._replace(rows=len(known))
    if not file.is_file() and not pair:
        raise UserError(
            f"no tokenizer at {path}: give --tokenizer gpt2, a folder with tokenizer.json "
            "or vocab.json and merges.txt, or a tokenizer.json"
        )
    settings = _Settings(folder, file)
    tokenizer = settings.backend()
    given = set(tokenizer.get_vocab(with_added_tokens=True)) | settings.added.keys()
    settings.check_end(given)
    settings.add_tokens(tokenizer)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    end = settings.end(vocab)
    _check_ids(path, vocab)
    _leave_out_dropout(path, tokenizer, quiet)
    rows = 1 + max(vocab[token] for token in {*given, end} if token in vocab)
    return OpenedTokenizer(tokenizer, end, settings.resolved(end), rows)


def characters(vocabulary: Iterable[str]) -> OpenedTokenizer:
    """A vocabulary of single characters, then <unk> and the end token."""
    tokenizer = character_vocabulary(vocabulary)
    tokenizer.add_special_tokens([ENDOFTEXT])
    size = tokenizer.get_vocab_size()
    return OpenedTokenizer(tokenizer, ENDOFTEXT, {"unk_token": UNKNOWN}, size)


class _Settings:
    """The merged settings of the files next to a vocabulary.

    A token is a dictionary of its `content` and FLAGS.

    named: the common named tokens (NAMED), by key.
    own: a model's own named tokens, such as image_token, by key.
    extra: special tokens without a name.
    added: added tokens by content, in the order of the ids that the files give.
    names_end_in: the last file that names the end token.
    """

    def __init__(self, folder: Path, file: Path):
        self.folder, self.file = folder, file
        self.spec = read_object(file) if file.is_file() else None
        self.config = _beside(folder, "tokenizer_config.json")
        self.own_vocabulary = self._own_vocabulary()
        self.named: dict[str, dict[str, Any] | None] = dict.fromkeys(NAMED)
        if self.own_vocabulary:
            self.named |= {
                key: _special(ENDOFTEXT) for key in ("unk_token", "bos_token", "eos_token")
            }
        self.own = _own_names(self.config)
        extra = _extra(self.config)
        self.says_extra, self.extra = extra is not None, extra or []
        self.added: dict[str, dict[str, Any]] = {}
        self.names_end_in: JsonObject | None = None
        self._read_names(self.config)
        if "added_tokens_decoder" in self.config:
            self._read_added(self.config.nested("added_tokens_decoder"))
        else:
            self._read_older_files()

    def _own_vocabulary(self) -> bool:
        """Whether to build GPT-2's pipeline around the vocabulary and ignore the rest of
        tokenizer.json."""
        model = _beside(self.folder, "config.json")
        named = self.config.text("tokenizer_class") or model.text("tokenizer_class")
        if self.spec is None:
            return True
        if "ByteLevel" not in json.dumps(
            [self.spec.values.get("pre_tokenizer"), self.spec.values.get("decoder")]
        ):
            return False
        return (
            model.text("model_type") == "gpt2"
            if named is None
            else named.removesuffix("Fast") == OWN_VOCABULARY
        )

    def _read_names(self, source: JsonObject) -> None:
        for key in NAMED:
            if key in source:
                self.named[key] = (
                    _token(source, key, source.values[key]) if source.given(key) else None
                )
        if source.given("eos_token"):
            self.names_end_in = source

    def _read_added(self, decoder: JsonObject) -> None:
        ids = {key: _id(decoder, key) for key in decoder.values}
        for key in sorted(ids, key=ids.__getitem__):
            token = _token(decoder, key, decoder.values[key])
            self.added[token["content"]] = token

    def _read_older_files(self) -> None:
        """Read special_tokens_map.json, added_tokens.json and the added tokens of tokenizer.json.

        Names in special_tokens_map.json override those in tokenizer_config.json.
        """
        names = _beside(self.folder, "special_tokens_map.json")
        self._read_names(names)
        self.own = _own_names(names) | self.own
        if names.given("extra_special_tokens"):
            self.extra += [token for token in _extra(names) or [] if token not in self.extra]
        special = {token["content"] for token in (*self.named.values(), *self.extra) if token}
        if not self.says_extra:
            self.extra = _extra(names) or []
        by_id: dict[int, dict[str, Any]] = {}
        older = _beside(self.folder, "added_tokens.json")
        for content in older.values:
            flags = dict(special=content in special, normalized=content not in special)
            by_id[older.whole(content)] = _special(content) | flags
        for entry in self._listed_tokens():
            by_id[entry.whole("id")] = _token(entry, "content", entry.values)
        self.added = {by_id[id]["content"]: by_id[id] for id in sorted(by_id)}

    def _listed_tokens(self) -> Iterator[JsonObject]:
        """The added tokens of tokenizer.json."""
        entries = self.spec.values.get("added_tokens") if self.spec else None
        for i, entry in enumerate(entries or [] if isinstance(entries, list | None) else [entries]):
            assert self.spec
            if not isinstance(entry, dict):
                raise self.spec.wrong("added_tokens", "a list of objects")
            yield JsonObject(self.spec.file, entry, f"added_tokens[{i}].")

    def backend(self) -> Any:
        """The tokenizer without the tokens that the other files add. Raises UserError if a file
        cannot be read."""
        from tokenizers import Tokenizer, models

        source = self.file if self.spec else self.folder / "vocab.json"
        try:
            if not self.own_vocabulary:
                assert self.spec
                return Tokenizer.from_str(json.dumps(self.spec.values))
            vocab, merges = self._vocabulary()
            if not vocab:
                raise ValueError("it holds no vocabulary")
            model = models.BPE(
                vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False
            )
            return byte_level(model, self.config.yes_no("add_prefix_space", False))
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception for any bad file
            raise UserError(f"{source} is not a tokenizer: {reason(error)}") from None

    def _vocabulary(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        if self.spec is None:
            entries = read_object(self.folder / "vocab.json")
            return {
                token: entries.whole(token, most=(1 << 32) - 1) for token in entries.values
            }, self._merges()
        model = self.spec.nested("model")
        entries = model.nested("vocab")
        pairs = model.values.get("merges") or []
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in pairs
        ]
        return {token: entries.whole(token, most=(1 << 32) - 1) for token in entries.values}, merges

    def _merges(self) -> list[tuple[str, str]]:
        file = self.folder / "merges.txt"
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise UserError(f"{file} cannot be read: {reason}") from None
        lines = [line.removesuffix("\r") for line in lines]
        numbered = [
            (i, line) for i, line in enumerate(lines, 1) if line and not line.startswith("#version")
        ]
        for i, line in numbered:
            if line.count(" ") != 1:
                raise UserError(
                    f"{file}, line {i}: a merge is two tokens with a space between them, not "
                    f"{line[:60]!r}"
                )
        return [(left, right) for left, _, right in (line.partition(" ") for _, line in numbered)]

    def add_tokens(self, tokenizer: Any) -> None:
        """Add the tokens that the files list, then the named and extra ones that are still missing.

        Raises UserError for a token that is not valid text.
        """
        from tokenizers import AddedToken

        tokens = list(self.added.values())
        known = {
            token.content for token in tokenizer.get_added_tokens_decoder().values()
        } | self.added.keys()
        tokens += [t for t in (*self._named(), *self.extra) if t["content"] not in known]
        names = {token["content"] for token in self._named()}
        try:
            for token in tokens:
                flags = {key: token[key] for key in FLAGS} | {
                    "special": token["special"] or token["content"] in names
                }
                tokenizer.add_tokens([AddedToken(token["content"], **flags)])
        except (TypeError, ValueError):  # a lone surrogate
            raise UserError(
                f"{self.folder} names {token['content']!r} as a token, which is not valid text; "
                "remove it"
            ) from None

    def _named(self) -> list[dict[str, Any]]:
        return [token for token in (*self.named.values(), *self.own.values()) if token]

    def check_end(self, given: set[str]) -> None:
        """Raises UserError if a file names an end token that is not in `given`, the tokens of all
        files."""
        named = self.named["eos_token"]
        if self.names_end_in and named and named["content"] not in given:
            raise UserError(
                f"{self.names_end_in.file} names {named['content']!r} as the end token, and the "
                f"vocabulary has no such token; correct eos_token in {self.names_end_in.file.name}"
            )

    def end(self, vocab: dict[str, int]) -> str:
        """The end token: the named one, or else the first of END_TOKENS in the vocabulary.

        Raises UserError if there is none.
        """
        named = self.named["eos_token"]
        for token in (named["content"] if named else None, *END_TOKENS):
            if token in vocab:
                return token
        raise UserError(
            f"{self.file if self.spec else self.folder} has no end token: name one of its tokens "
            "as eos_token in tokenizer_config.json beside it"
        )

    def resolved(self, end: str) -> dict[str, Any]:
        """The tokenizer_config.json to save beside a tokenizer.json with all tokens and flags."""
        left_out = {
            "added_tokens_decoder",
            "additional_special_tokens",
            "extra_special_tokens",
            "tokenizer_class",
        }
        config = {key: value for key, value in self.config.values.items() if key not in left_out}
        named = {key: token["content"] for key, token in (self.named | self.own).items() if token}
        config = (
            {key: value for key, value in config.items() if key not in NAMED}
            | named
            | {"eos_token": end}
        )
        return config | (
            {"extra_special_tokens": [token["content"] for token in self.extra]}
            if self.extra
            else {}
        )


def _beside(folder: Path, name: str) -> JsonObject:
    """The object in an optional file; empty if there is no such file."""
    file = folder / name
    return read_object(file) if file.is_file() else JsonObject(file, {})


def _special(content: str) -> dict[str, Any]:
    return {"content": content} | dict.fromkeys(FLAGS, False) | {"special": True}


def _own_names(source: JsonObject) -> dict[str, dict[str, Any]]:
    """A model's own named tokens, such as image_token."""
    keys = [
        key
        for key, value in source.values.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    ]
    names = {key: source.values[key] for key in keys if key not in NAMED}
    extra = source.values.get("extra_special_tokens")
    names |= extra if isinstance(extra, dict) else {}
    return {key: _token(source, key, value) for key, value in names.items()}


def _extra(source: JsonObject) -> list[dict[str, Any]] | None:
    """The special tokens without a name; None if the file has no list of them."""
    key = (
        "extra_special_tokens"
        if source.values.get("extra_special_tokens")
        else "additional_special_tokens"
    )
    value = source.values.get(key, source.values.get("extra_special_tokens"))
    if isinstance(value, list):
        return [_token(source, key, item) for item in value]
    if value is not None and not (isinstance(value, dict) and key == "extra_special_tokens"):
        raise source.wrong(key, "a list of tokens")
    return None


def _id(source: JsonObject, key: str) -> int:
    if not key.isdecimal():
        raise UserError(
            f"{source.file}: {source.inside}{key} is not an id; it must be a whole number"
        )
    return int(key)


def _token(source: JsonObject, key: str, value: Any) -> dict[str, Any]:
    """A token from a file, which writes it as a string or as an object with content and flags."""
    if isinstance(value, str) and not key.isdecimal():
        return _special(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise source.wrong(key, "a token: a string, or an object with its content")
    entry = JsonObject(source.file, value, f"{source.inside}{key}.")
    # A named token and an entry of a list of special tokens are special because of their place.
    special = entry.yes_no("special", not key.isdecimal() and key != "content")
    flags = {name: entry.yes_no(name, False) for name in ("single_word", "lstrip", "rstrip")}
    return flags | {
        "content": value["content"],
        "special": special,
        "normalized": entry.yes_no("normalized", not special),
    }


def _check_ids(path: Path, vocab: dict[str, int]) -> None:
    """Raises UserError if an added token has the id of another token, which the library allows."""
    owner: dict[int, str] = {}
    for token, id in sorted(vocab.items()):
        if owner.setdefault(id, token) != token:
            raise UserError(
                f"{path}: the tokens {owner[id]!r} and {token!r} both have the id {id}; give each "
                "its own"
            )


def _leave_out_dropout(path: Path, tokenizer: Any, quiet: bool) -> None:
    """Turn BPE dropout (Provilkov et al. 2020) off, and warn about it.

    With dropout a text gets other ids each time. The cache, the worker processes and a resumed run
    would each see another corpus. The warning is printed once per process, and only on rank 0.
    """
    dropout = getattr(tokenizer.model, "dropout", None)
    if not dropout:
        return
    tokenizer.model.dropout = None
    if not quiet and os.environ.get("RANK", "0") == "0" and str(path) not in dropout_warnings:
        dropout_warnings[str(path)] = (
            f"{path} has BPE dropout {dropout:g}, which is left out: "
            "a text gets the same ids each time, and the tokenizers that are written have none"
        )
        print(f"warning: {dropout_warnings[str(path)]}", file=sys.stderr, flush=True)


def byte_level(model: Any, add_prefix_space: bool) -> Any:
    """A tokenizer with GPT-2's pipeline around a BPE model of the `tokenizers` library."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
