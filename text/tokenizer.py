"""Text to token ids and back, with GPT-2's own tokenizer or any tokenizer.json.

tiktoken runs GPT-2's vocabulary, several times faster than `tokenizers` would. `tokenizers` runs
everything else. Both have the interface of one class, and both are saved in the hub's layout, so
that a checkpoint carries its tokenizer. The libraries are imported where they are used, so that
importing this module is cheap.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from base.machine import cores
from config import UserError, without_surrogates
from text.characters import META
from text.chat import TEMPLATE, has_template
from text.tokenizer_files import ENDOFTEXT, OpenedTokenizer, open_tokenizer

METASPACE = "▁"  # SentencePiece writes it for a space
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # the name of a byte's token in byte fallback

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
# GPT-2's split into words, written so that the matcher hardly ever backtracks. A run of white space
# at the end of the text is one word. Any other run ends before its last character.
GPT2_SPLIT = (
    r"'(?:s|t|d|m|re|ve|ll)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|(?:\s(?!\S))++|\s"
)
# Tokenizer.sha256 of "gpt2"
GPT2_SHA256 = "f48e711eae19af0544e922f2a4b1fe9ea883dcf66a4171d70e900ad7ddb74fea"
# Names of the folders of a run that hold a tokenizer.
IN_RUN = re.compile(r"final|checkpoints|step-\d+")
# Characters up to which encoding a text costs less than building the tiktoken encoding.
SHORT_TEXT = 1000

# Places where a text can be cut without changing its ids. No word of GPT-2's split extends from a
# visible character into white space, and a run of white space leaves its last character to the word
# after it. Python counts \x1c-\x1f as white space. GPT-2's split does not.
SAFE_CUT = re.compile(
    r"(?<=[\S\x1c-\x1f])(?=[^\S\x1c-\x1f])|(?<=[^\S\x1c-\x1f])(?=[^\S\x1c-\x1f][\S\x1c-\x1f])"
)

PIECE_CHARS = 1 << 16  # least length of the pieces that a long text is cut into


class Tokenizer(ABC):
    """Text to ids in [0, vocab_size) and back.

    It pickles as its source, so it is cheap to send to a worker process.

    name: "gpt2", or the folder's name; in a run the path from the run on, such as try/final.
    source: the argument with which load_tokenizer() returns this tokenizer, without `special`.
    eot: id of the token that ends a document.
    special: the tokens that with_special() added.
    special_ids: the id of every special token, including the end token.
    rows: how many rows a model's embedding table must have. This is less than vocab_size if the
        files name special tokens that no model was trained on, and for nanoGPT's meta.pkl, where
        the end token may be among the missing ones.
    num_threads: threads of encode_batch; None uses every core.
    """

    name: str
    source: str
    vocab_size: int
    eot: int
    special: tuple[str, ...]
    special_ids: dict[str, int]
    rows: int
    num_threads: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens are not recognized in it: they are ordinary text.

        A lone surrogate becomes U+FFFD.
        """

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, on several threads."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _with_new_tokens(self, tokens: tuple[str, ...]) -> Tokenizer:
        """This tokenizer with `tokens` as special tokens, which get the ids from vocab_size on."""

    @abstractmethod
    def _has_token(self, token: str) -> bool:
        """Whether the vocabulary has an ordinary token that is written like `token`."""

    @functools.cached_property
    @abstractmethod
    def _spec(self) -> dict[str, Any]:
        """The content of tokenizer.json."""

    @functools.cached_property
    @abstractmethod
    def _token_bytes(self) -> list[bytes]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of the ids, with special tokens unless `skip_special`.

        Bytes that are not UTF-8 become U+FFFD. Raises UserError for an id outside [0, vocab_size).
        """
        left_out = set(self.special_ids.values()) if skip_special else ()
        return self._decode([self._check(i) for i in ids if i not in left_out])

    def token_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of a token; b"" for a special one. Raises UserError as `decode` does."""
        return self._token_bytes[self._check(id)]

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises UserError if this tokenizer has no such token."""
        if token not in self.special_ids:
            raise UserError(
                f"{self.name} has no special token {token!r}; it has {' '.join(self.special_ids)}"
            )
        return self.special_ids[token]

    def with_special(self, tokens: Sequence[str]) -> Tokenizer:
        """This tokenizer with each of `tokens` as a special token.

        New tokens get the ids from vocab_size on. The ids of a text do not change, even if it
        contains the name of a special token. Raises UserError for a token that is given twice, has
        no visible character, or is an ordinary token of the vocabulary.
        """
        check_special(tokens)
        new = tuple(token for token in tokens if token not in self.special_ids)
        for token in new:
            self._check_meaning(token)
        if not new:
            return self
        extended = self._with_new_tokens(new)
        extended.num_threads = self.num_threads
        return extended

    def _check_meaning(self, token: str) -> None:
        ids = self.encode(token)
        if self._has_token(token) or (len(ids) == 1 and self.token_bytes(ids[0]) == token.encode()):
            raise UserError(
                f"{token!r} cannot be a special token of {self.name}: it already is an ordinary "
                "one; take one that no text holds, such as <answer>"
            )

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that decides a text's ids: vocabulary, merges, normalizer, split, end token.

        GPT-2 has the same hash from tiktoken, from its tokenizer.json, and from its vocab.json with
        merges.txt.
        """
        return hashlib.sha256(
            json.dumps(_canonical(self._spec, self.eot), sort_keys=True).encode()
        ).hexdigest()

    def save(self, folder: Path, pads: bool = False) -> None:
        """Write the hub's layout into `folder`. AutoTokenizer.from_pretrained(folder) gives the
        same ids.

        pads: name the end token as the padding token too, as transformers needs for a classifier.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        spec, config = self._spec, self._config()
        if has_template(self.special_ids):
            config["chat_template"] = TEMPLATE
        _write_json(folder / "tokenizer.json", spec)
        _write_json(
            folder / "tokenizer_config.json",
            config | ({"pad_token": self._end} if pads else {}),
            indent=2,
        )
        if _is_byte_level_bpe(spec):
            merges = "".join(f"{a} {b}\n" for a, b in spec["model"]["merges"])
            _write_json(folder / "vocab.json", _vocab(spec))
            (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        # In every version of transformers this class uses tokenizer.json without changes.
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= dict.fromkeys(("bos_token", "eos_token"), self._end)
        return config | ({"additional_special_tokens": list(self.special)} if self.special else {})

    @property
    def _end(self) -> str:
        return next(token for token, id in self.special_ids.items() if id == self.eot)

    def _check(self, id: int) -> int:
        id = operator.index(id)
        if not 0 <= id < self.vocab_size:
            raise UserError(
                f"token id {id} is outside the vocabulary of {self.name}; give ids from 0 to "
                f"{self.vocab_size - 1}"
            )
        return id

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.source, self.num_threads, self.special)


class _GPT2Tokenizer(Tokenizer):
    """GPT-2's vocabulary, run by tiktoken."""

    name = source = "gpt2"

    def __init__(self, special: tuple[str, ...] = ()) -> None:
        self._encoding = _tiktoken_gpt2(special)
        self.vocab_size = self.rows = self._encoding.n_vocab
        self.eot = self._encoding.eot_token
        self.special = special
        self.special_ids = dict(self._encoding._special_tokens)

    @functools.cached_property
    def sha256(self) -> str:
        # Computing the hash rebuilds 50,000 merges, which is too slow for every process.
        return super().sha256 if self.special else GPT2_SHA256

    def _with_new_tokens(self, tokens: tuple[str, ...]) -> Tokenizer:
        return _GPT2Tokenizer(self.special + tokens)

    def _has_token(self, token: str) -> bool:
        return _unicode_to_bytes(token) in self._encoding._mergeable_ranks

    def encode(self, text: str) -> list[int]:
        return _tiktoken_encode(self._encoding, text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return _tiktoken_batch(self._encoding, texts, self.num_threads)

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids, errors="replace")

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token in self._encoding.token_byte_values():
            table[self._encoding.encode_single_token(token)] = token
        return table

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        ranks = {token: id for id, token in enumerate(self._token_bytes) if token}
        merges = [
            [_bytes_to_unicode(half) for half in _merged_pair(token, ranks)]
            for token in ranks
            if len(token) > 1
        ]
        vocab = {_bytes_to_unicode(token): id for token, id in ranks.items()} | {
            ENDOFTEXT: self.eot
        }
        form = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        return {
            "version": "1.0",
            "added_tokens": [
                {"id": id, "content": token, **form} for token, id in self.special_ids.items()
            ],
            "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": BYTE_LEVEL,
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }


def _name(folder: Path) -> str:
    """The name of a folder or file. A folder in a run is named from the run on: try/final."""
    parts = folder.absolute().parts
    depth = 1
    while depth < len(parts) and IN_RUN.fullmatch(parts[-depth]):
        depth += 1
    return "/".join(parts[-depth:]).removesuffix(".json")


class HubTokenizer(Tokenizer):
    """Any tokenizer of the `tokenizers` library.

    Batches and long texts go through tiktoken if it is certain to give the same ids, because it is
    several times faster.
    """

    def __init__(self, opened: OpenedTokenizer, source: Path, special: tuple[str, ...] = ()):
        self._opened = opened
        self._tokenizer = tokenizer = opened.tokenizer
        folder = source.parent if source.name in ("tokenizer.json", META) else source
        self.name, self.source = _name(folder), str(source)
        tokenizer.add_special_tokens([opened.end])
        tokenizer.encode_special_tokens = True  # the library's name for: as ordinary text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size, self.rows = max(vocab.values()) + 1, opened.rows
        self.eot = vocab[opened.end]
        self.special = special
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special}

    def _with_new_tokens(self, tokens: tuple[str, ...]) -> Tokenizer:
        tokenizer = type(self._tokenizer).from_str(self._tokenizer.to_str())
        tokenizer.add_special_tokens(list(tokens))
        if tokenizer.token_to_id(tokens[0]) != self.vocab_size:
            raise UserError(
                f"special tokens cannot be added to {self.source}, because some of its ids have no "
                "token; give another tokenizer"
            )
        opened = self._opened._replace(tokenizer=tokenizer, rows=self.vocab_size + len(tokens))
        return HubTokenizer(opened, Path(self.source), self.special + tokens)

    def _has_token(self, token: str) -> bool:
        return self._tokenizer.token_to_id(token) is not None

    def encode(self, text: str) -> list[int]:
        """See Tokenizer.encode. A long text goes through tiktoken if possible."""
        if len(text) > SHORT_TEXT:
            return self.encode_batch([text])[0]
        return self._encode([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See Tokenizer.encode_batch. It goes through tiktoken if possible."""
        if self._encoding:
            return _tiktoken_batch(self._encoding, texts, self.num_threads)
        if self.num_threads == 1:
            return [ids for text in texts for ids in self._encode([text])]
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # a str with a lone surrogate cannot be encoded as UTF-8
            texts = [without_surrogates(text) for text in texts]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._without_specials(encoding.ids) for encoding in encodings]

    def _without_specials(self, ids: list[int]) -> list[int]:
        """Replace the special tokens that the model recognized in the text by their characters.

        A unigram model recognizes them itself, even with encode_special_tokens.
        """
        if self._special.isdisjoint(ids):
            return ids
        return [
            part for id in ids for part in (self._characters(id) if id in self._special else [id])
        ]

    def _characters(self, id: int) -> list[int]:
        model, token = self._tokenizer.model, self._tokenizer.id_to_token(id)
        return [part.id for character in token for part in model.tokenize(character)]

    @functools.cached_property
    def _special(self) -> set[int]:
        """Ids of the special tokens without the unknown token, which stands for ordinary text."""
        settings = self._spec["model"]
        unknown = settings.get(
            "unk_id", self._tokenizer.token_to_id(settings.get("unk_token") or "")
        )
        return {id for id in self.special_ids.values() if id != unknown}

    @functools.cached_property
    def _encoding(self) -> Any:
        """This tokenizer as a tiktoken encoding, or None if tiktoken could give other ids."""
        ranks = _ranks(self._spec)
        if ranks is None:
            return None
        import tiktoken

        return tiktoken.Encoding(
            self.name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _token_bytes(self) -> list[bytes]:
        added = self._tokenizer.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        spell = _unicode_to_bytes if _is_byte_level_bpe(self._spec) else self._bytes_after_another
        for token, id in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id not in added:
                table[id] = spell(token)
            elif not added[id].special:
                table[id] = added[id].content.encode()
        return table

    def _bytes_after_another(self, token: str) -> bytes:
        """The bytes that a token adds to a text in which it is not the first token.

        The first one would not do, because some decoders drop a leading space.
        """
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        id = self._tokenizer.token_to_id(token)
        return self._decode([id, id])[len(self._decode([id])) :].encode()

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._tokenizer.to_str())

    def _config(self) -> dict[str, Any]:
        config = super()._config() | self._opened.config
        if not self.special:
            return config
        new_name = isinstance(config.get("extra_special_tokens"), list)  # transformers 5 and later
        name = "extra_special_tokens" if new_name else "additional_special_tokens"
        return config | {name: list(dict.fromkeys([*config.get(name, []), *self.special]))}


def load_tokenizer(where: str, num_threads: int | None = None, quiet: bool = False) -> Tokenizer:
    """The tokenizer named "gpt2", of a folder, or of a tokenizer.json.

    A folder holds tokenizer.json, or vocab.json and merges.txt, or nanoGPT's meta.pkl. num_threads: see Tokenizer. quiet:
    do not warn that BPE dropout is left out. Raises UserError if there is no tokenizer, it cannot
    be read, or it has no end token.
    """
    if where == "gpt2":
        tokenizer: Tokenizer = _GPT2Tokenizer()
    else:
        path = Path(where).absolute()
        tokenizer = HubTokenizer(open_tokenizer(path, quiet), path)
    tokenizer.num_threads = num_threads
    return tokenizer


def _restore(source: str, num_threads: int | None, special: tuple[str, ...]) -> Tokenizer:
    # This is another process. The first one has printed the warnings already.
    return load_tokenizer(source, num_threads, quiet=True).with_special(special)


def _tiktoken_gpt2(special: tuple[str, ...]) -> Any:
    """tiktoken's gpt2 encoding, with `special` as further special tokens after its own."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):
        # There is no network (requests' errors are OSErrors), or a download is damaged.
        raise UserError(
            "GPT-2's tokenizer is not on this machine and cannot be downloaded: set "
            "TIKTOKEN_CACHE_DIR to a folder with tiktoken's two gpt2 files, or give --tokenizer "
            "FOLDER (python tokenizer.py train makes one)"
        ) from None
    if not special:
        return encoding
    ids = encoding._special_tokens | {
        token: encoding.n_vocab + i for i, token in enumerate(special)
    }
    ranks = encoding._mergeable_ranks
    return tiktoken.Encoding(
        "gpt2", pat_str=encoding._pat_str, mergeable_ranks=ranks, special_tokens=ids
    )


def _tiktoken_encode(encoding: Any, text: str) -> list[int]:
    if len(text) <= PIECE_CHARS:
        return encoding.encode_ordinary(text)
    # On a word after a very long run of white space, tiktoken's regular expression would overflow
    # its stack.
    return [id for piece in pieces_of(text) for id in encoding.encode_ordinary(piece)]


def _tiktoken_batch(encoding: Any, texts: list[str], num_threads: int | None) -> list[list[int]]:
    with ThreadPoolExecutor(num_threads or cores()) as pool:
        return list(pool.map(functools.partial(_tiktoken_encode, encoding), texts))


def check_special(special: Sequence[str]) -> None:
    """Raises UserError for a special token that is given twice, is invisible, or that a decoder
    would rewrite."""
    for i, token in enumerate(special):
        if token in special[:i]:
            raise UserError(f"special token {token!r} is given twice; name it once")
        readable = token.strip() and token == without_surrogates(token)
        if not readable or METASPACE in token or _unicode_to_bytes(token) != token.encode():
            raise UserError(
                f"{token!r} cannot be a special token; take one of plain characters, such as "
                "<answer>"
            )


@functools.cache
def _byte_alphabet() -> list[str]:
    """The character for each byte in a byte-level vocabulary. Visible bytes are their own."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(256)]


@functools.cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(_byte_alphabet())}


def _bytes_to_unicode(token: bytes) -> str:
    alphabet = _byte_alphabet()
    return "".join([alphabet[byte] for byte in token])


def _unicode_to_bytes(token: str) -> bytes:
    try:
        return bytes([_byte_of()[character] for character in token])
    except KeyError:  # it is not a byte-level token, and a decoder does not change it
        return token.encode()


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one: the merges before it reduce its bytes to them."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """tiktoken's ranks for a tokenizer.json: ids by token bytes. None if it could give other ids.

    tiktoken joins the pair whose result has the lowest id. `tokenizers` joins the pair of the first
    merge. Both are the same if words are split as in GPT-2, merges have ids in their order, and
    each merge joins the two tokens to which the earlier merges reduce its result.
    """
    form = _canonical(spec, eot=0)
    model = form.pop("model")
    special = all(token["special"] for token in spec["added_tokens"])
    if not special or form["normalizer"] or form["split"] != _split(BYTE_LEVEL):
        return None
    if not _is_byte_level_bpe(spec) or model.keys() - {"type", "vocab", "merges"}:
        return None
    ranks = {
        _unicode_to_bytes(token): id
        for token, id in sorted(model["vocab"].items(), key=operator.itemgetter(1))
    }
    merged = [token for token in ranks if len(token) > 1]
    if len(ranks) - len(merged) != 256 or len(merged) != len(model["merges"]):
        return None
    halves = [[_bytes_to_unicode(half) for half in _merged_pair(token, ranks)] for token in merged]
    return ranks if halves == [list(pair) for pair in model["merges"]] else None


def _is_byte_level_bpe(spec: dict[str, Any]) -> bool:
    return spec["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(spec["decoder"])


def _vocab(spec: dict[str, Any]) -> dict[str, int]:
    vocab = spec["model"]["vocab"] | {
        token["content"]: token["id"] for token in spec["added_tokens"]
    }
    return dict(sorted(vocab.items(), key=operator.itemgetter(1)))


def _canonical(spec: dict[str, Any], eot: int) -> dict[str, Any]:
    """The part of a tokenizer.json that decides a text's ids, in one form however it is written."""
    unset = (None, False, "")
    model = {
        key: value for key, value in spec["model"].items() if not any(value is no for no in unset)
    }
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in added}
    if _is_byte_level_bpe(spec):
        model.pop("unk_token", None)  # unused, because the vocabulary has every byte
    split = _split(spec["pre_tokenizer"] or {})
    return {
        "model": model,
        "added": added,
        "normalizer": spec["normalizer"],
        "split": split,
        "eot": eot,
    }


def _split(pre_tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def pieces_of(text: str) -> Iterator[str]:
    """Cut a long text after every PIECE_CHARS characters or a little later, at a SAFE_CUT."""
    start = 0
    while cut := SAFE_CUT.search(text, start + PIECE_CHARS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
