"""Trains tokenizers: byte-level BPE with `tokenizers`, unigram and BPE with SentencePiece, and
characters.

The libraries are imported where they are used, so that importing this module is cheap.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.files import temporary_folder, writing_to
from config import UserError, without_surrogates
from text import corpus
from text.characters import UNKNOWN, character_vocabulary
from text.files import TEXT_SUFFIXES, is_hub_id, named_files
from text.tokenizer import (
    METASPACE,
    HubTokenizer,
    Tokenizer,
    check_special,
    load_tokenizer,
    pieces_of,
)
from text.tokenizer_files import ENDOFTEXT, OpenedTokenizer, byte_level

BAD_BYTE = re.compile(r"[\udc80-\udcff]")  # a byte that is not UTF-8, as surrogateescape decodes it

LONGEST_WORD = 256  # bytes, because training time grows with the square of a word's length
LONGEST_LINE = 1000  # characters, because SentencePiece skips lines above 4,192 bytes

# `tokenizers` would read "<0x41>" and "<unk>" in a text as the pieces of that name. To prevent it,
# these pieces get a score below that of any other spelling, and each character of their names is
# made a piece.
NEVER = -1e4
NAME_CHARACTERS = "<>0123456789ABCDEFxunk"

LARGEST_VOCABULARY = 10_000_000  # the trainers allocate memory for the whole vocabulary at once
NO_TEXT = "there is no text to train a tokenizer on; give other text"


def train_byte_level(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> Any:
    """A `tokenizers` tokenizer with byte-level BPE. Its ids are the 256 bytes, then the merges.

    vocab_size includes the `special` tokens, which the caller adds. See train_bpe.
    """
    from tokenizers import models, pre_tokenizers, trainers

    least = 256 + len(special)
    if vocab_size < least:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {' '.join(special)} make "
            f"{least}; give at least that"
        )
    tokenizer = byte_level(models.BPE(), add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    split = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.FixedLength(LONGEST_WORD)]
    )
    tokenizer.train_from_iterator(training_pieces(texts, special), trainer)
    tokenizer.pre_tokenizer = split
    return tokenizer


def train_pieces(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], kind: Literal["unigram", "bpe"]
) -> Any:
    """A `tokenizers` tokenizer with SentencePiece's model. Its ids are <unk>, 256 bytes, pieces.

    vocab_size includes the `special` tokens, which the caller adds. See train_sentencepiece.
    """
    return sentencepiece_pipeline(sentencepiece_model(texts, vocab_size, special, kind), kind)


def sentencepiece_model(
    texts: Iterable[str], vocab_size: int, special: Sequence[str], kind: Literal["unigram", "bpe"]
) -> Any:
    """A SentencePieceProcessor whose model is trained on the lines of the texts.

    vocab_size and special: see `train_pieces`. Raises UserError for a size that the text does not
    allow.
    """
    import sentencepiece

    lines = [line for piece in training_pieces(texts, special) for line in _lines(piece)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=max(1, vocab_size - len(special)),
            byte_fallback=True,
            required_chars=NAME_CHARACTERS if kind == "unigram" else "",
            # These three let decoding return the text without changes.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            # It requires an unknown token. No text uses it, because byte tokens spell everything
            # that is not in the vocabulary.
            unk_piece=UNKNOWN,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_complaint(error, vocab_size, len(special))) from None
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_pipeline(processor: Any, kind: Literal["unigram", "bpe"]) -> Any:
    """A model of `sentencepiece_model` as a `tokenizers` tokenizer, with the same ids.

    The ids may differ only if a unigram model finds two splits of a text equally likely.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [
        (processor.id_to_piece(id), processor.get_score(id)) for id in range(processor.vocab_size())
    ]
    first = 257  # the first piece comes after <unk> and the 256 bytes
    if kind == "unigram":
        scores = [
            (piece, score if id >= first else NEVER) for id, (piece, score) in enumerate(pieces)
        ]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        vocab = {piece: id for id, (piece, _) in enumerate(pieces)}
        merges = _merges([piece for piece, _ in pieces[first:]])
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(METASPACE, prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([UNKNOWN])
    return tokenizer


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to another piece, in the order of the joined pieces.

    SentencePiece joins any such pair, while `tokenizers` needs them listed as merges.
    """
    known = set(pieces)
    halves = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    return [(left, right) for left, right in halves if left in known and right in known]


def _complaint(error: RuntimeError, vocab_size: int, reserved: int) -> str:
    """SentencePiece's error as one line for the user. Raises any other error again.

    reserved: number of special tokens, which SentencePiece does not count.
    """
    message = str(error)
    if found := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", message):
        least = int(found[1]) + reserved
        return (
            f"a vocabulary of {vocab_size} is too small for this text: its characters, "
            f"256 bytes and the special tokens make {least}; give at least that"
        )
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        most = int(found[1]) + reserved
        return (
            f"a vocabulary of {vocab_size} is too large for this text, which gives {most} "
            "tokens; give at most that"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return NO_TEXT
    raise error


def training_pieces(texts: Iterable[str], special: Sequence[str]) -> Iterator[str]:
    """The texts in pieces, so that all cores count words. Special tokens in them are removed.

    Raises UserError at the end if there was no text.
    """
    at_special = re.compile("|".join(map(re.escape, special)) or "(?!)")
    characters = 0
    for text in texts:
        for part in at_special.split(without_surrogates(text)):
            characters += len(part)
            yield from pieces_of(part)
    if not characters:
        raise UserError(NO_TEXT)


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield from (line[i : i + LONGEST_LINE] for i in range(0, len(line), LONGEST_LINE))


@dataclass
class TrainingText:
    """The documents of several sources, one after another. It counts what it reads.

    Bytes that are not UTF-8 become U+FFFD.
    """

    sources: list[Any]  # of type corpus.Source
    characters: int = 0
    bad_bytes: int = 0
    # The first piece of text that is not empty. The trained tokenizer is measured on it.
    first: str = ""

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            for text, _ in source.segments():
                text, bad = BAD_BYTE.subn("\ufffd", text)
                self.bad_bytes += bad
                self.characters += len(text)
                self.first = self.first or text
                yield text


def open_input(items: Sequence[str], column: str, say: Callable[[str], None]) -> TrainingText:
    """The text that --input names.

    It takes what --data takes, except token shards. A file of any other kind is read as plain text.
    Raises UserError for files that do not exist or hold no text.
    """
    files: dict[Path, None] = {}
    sources: list[Any] = []
    for item in items:
        if not Path(item).expanduser().exists() and (item == "stdlib" or is_hub_id(item)):
            sources.append(corpus.open_text(item, column, say))
            continue
        for name, found in named_files(item, TEXT_SUFFIXES):
            if not found and Path(name).expanduser().is_dir():
                raise UserError(
                    f"--input {name} is a folder without text files "
                    f"({' '.join(TEXT_SUFFIXES)}); name other files or folders"
                )
            if not found:
                raise UserError(f"--input {name}: no such file; name files or folders of text")
            if shards := [path for path in found if path.suffix in (".bin", ".npy")]:
                raise UserError(
                    f"--input {shards[0]} holds tokens, not text; give the text that they were "
                    "made from"
                )
            files |= dict.fromkeys(found)
    if files:
        sources.insert(0, corpus.TextFiles(list(files), column, say, errors="surrogateescape"))
    return TrainingText(sources)


def train_bpe(
    texts: Iterable[str], vocab_size: int, out: Path, special: Sequence[str] = ()
) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's split, and write it to the new folder `out`.

    The folder is written whole or not at all. The ids are the 256 bytes, the merges in order,
    <|endoftext|>, then the `special` tokens. Special tokens in the text are not trained on. A pair
    is merged only if it occurs twice, so a short text may give fewer than `vocab_size` tokens. Two
    runs on one text write the same bytes.

    Raises UserError for a vocabulary that is smaller than 257 plus the special tokens or larger
    than LARGEST_VOCABULARY, an empty text, a folder that is not empty, and for special tokens as
    with_special does.
    """
    return _train(train_byte_level, texts, vocab_size, out, special, {})


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    out: Path,
    kind: Literal["unigram", "bpe"] = "unigram",
    special: Sequence[str] = (),
) -> Tokenizer:
    """Train SentencePiece's unigram model (Kudo 2018) or its BPE, and write it to the new folder
    `out`.

    Decoding returns every text without changes, except that U+2581 becomes a space. There is no
    normalization and no space before the text, and characters without a piece are spelled as bytes.
    The ids are <unk>, the 256 bytes, the pieces, <|endoftext|>, then the `special` tokens, together
    `vocab_size`. Two runs on one text write the same bytes. Raises UserError for a vocabulary that
    is too small or too large for the text, and as train_bpe does.
    """
    train = functools.partial(train_pieces, kind=kind)
    return _train(train, texts, vocab_size, out, special, {"unk_token": UNKNOWN})


def train_characters(texts: Iterable[str], out: Path, special: Sequence[str] = ()) -> Tokenizer:
    """Make a vocabulary of the characters of the texts, in their order in Unicode as nanoGPT has
    them, and write it to the new folder `out`.

    The ids are the characters, <unk>, <|endoftext|>, then the `special` tokens. Special tokens in
    the text do not count. Raises UserError as train_bpe does.
    """

    def train(texts: Iterable[str], size: int, special: Sequence[str]) -> Any:
        return character_vocabulary(sorted(set().union(*training_pieces(texts, special))))

    return _train(train, texts, 0, out, special, {"unk_token": UNKNOWN})


def _train(
    train: Callable[..., Any],
    texts: Iterable[str],
    vocab_size: int,
    out: Path,
    special: Sequence[str],
    config: dict[str, Any],
) -> Tokenizer:
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"a vocabulary is too large above {LARGEST_VOCABULARY:,} tokens; give at most that"
        )
    check_special(special)
    out = Path(out).absolute()
    check_free(out)
    with writing_to("--out", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    tokenizer = train(texts, vocab_size, tuple(dict.fromkeys((ENDOFTEXT, *special))))
    tokenizer.add_special_tokens([ENDOFTEXT])
    opened = OpenedTokenizer(tokenizer, ENDOFTEXT, config, tokenizer.get_vocab_size())
    _save_whole(HubTokenizer(opened, out).with_special(special), out)
    return load_tokenizer(str(out))


def check_free(out: Path) -> None:
    """Raises UserError unless `out` is empty or can be made. No file of the user is replaced."""
    try:
        file = next((above for above in out.parents if above.exists() and not above.is_dir()), None)
        if file:
            raise UserError(f"--out {out}: {file} is a file; name a new folder")
        if out.exists() and not out.is_dir():
            raise UserError(
                f"--out {out} is a file; name a new folder, such as --out {out}-tokenizer"
            )
        if out.exists() and any(out.iterdir()):
            raise UserError(
                f"--out {out} is not empty; name a new folder, such as --out {out / 'tokenizer'}"
            )
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be used: {error.strerror}; name a new folder"
        ) from None


def _save_whole(tokenizer: Tokenizer, out: Path) -> None:
    try:
        with temporary_folder(out.with_name(f".{out.name}.{os.getpid()}.tmp")) as temporary:
            tokenizer.save(temporary)
            temporary.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
