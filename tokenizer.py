"""Command to train a tokenizer and to try one:  python tokenizer.py train|encode|decode"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from base.cli import entry_point, warn_of_replaced
from base.console import outlive
from base.signals import ends_promptly
from config import UserError, expand, without_surrogates
from text.encodings import decode_input
from text.tokenizer import load_tokenizer

MODELS = ("byte-bpe", "unigram", "sentencepiece-bpe", "characters")


def _train_command(options: argparse.Namespace) -> None:
    # imported here because the other commands need neither this module nor numpy
    from text import tokenizer_training as training

    outlive()
    if (options.vocab_size is None) != (options.model == "characters"):
        raise UserError(
            "--model characters has one token for each character of the text; leave --vocab-size out"
            if options.vocab_size
            else "--vocab-size is missing: give the size of the vocabulary, such as 8192"
        )
    training.check_free(Path(options.out))
    text = training.open_input(
        options.input, options.text_column, lambda line: print(line, flush=True)
    )
    size = f"of {options.vocab_size:,}" if options.vocab_size else "of characters"
    print(f"training a vocabulary {size} on {' '.join(options.input)} ...", flush=True)
    start = time.perf_counter()
    arguments = (text, options.vocab_size, Path(options.out))
    with ends_promptly():
        if options.model == "characters":
            tokenizer = training.train_characters(text, Path(options.out), options.special)
        elif options.model == "byte-bpe":
            tokenizer = training.train_bpe(*arguments, special=options.special)
        else:
            kind = "unigram" if options.model == "unigram" else "bpe"
            tokenizer = training.train_sentencepiece(*arguments, kind=kind, special=options.special)
    seconds = time.perf_counter() - start
    print(
        f"read {text.characters:,} characters; replaced {text.bad_bytes:,} bytes that are not UTF-8"
    )
    if tokenizer.vocab_size < (options.vocab_size or 0):
        print(f"the text gives only {tokenizer.vocab_size:,} tokens: no other pair occurs twice")
    ratio = len(text.first) / len(tokenizer.encode(text.first))
    print(
        f"{options.out}: vocabulary {tokenizer.vocab_size:,}, {seconds:.1f} s, {ratio:.2f} "
        "characters per token"
    )


def _encode_command(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    text = _read_stdin() if options.text is None else without_surrogates(options.text)
    if options.text not in (None, text):
        warn_of_replaced("TEXT")
    print(*tokenizer.encode(text))


def _decode_command(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer)
    words = (" ".join(options.ids) or _read_stdin()).split()
    wrong = [word for word in words if not re.fullmatch(r"-?\d+", word)]
    if wrong:
        raise UserError(f"ids are whole numbers with spaces between them, not {wrong[0]!r}")
    text = tokenizer.decode([int(word) for word in words])
    sys.stdout.buffer.write(text.encode() + (b"\n" if sys.stdout.isatty() else b""))
    sys.stdout.buffer.flush()


def _read_stdin() -> str:
    return decode_input(sys.stdin.buffer.read(), "standard input")


def _named(word: str) -> str:
    """The argparse type of an option that names a file or folder. Raises an error for "".

    A shell passes "" for a variable that is not set.
    """
    if not word.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name")
    return expand(word)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see python {self.prog} --help)")


INPUT = (
    "text files (.txt .jsonl .csv .tsv .parquet .json, gzipped or not), folders, globs, a hub "
    "id, or stdlib"
)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tokenizer.py", description="Train a tokenizer, and try one.")
    commands = parser.add_subparsers(required=True, metavar="train|encode|decode")
    train = commands.add_parser("train", help="train a tokenizer on text", allow_abbrev=False)
    train.add_argument(
        "--model", choices=MODELS, default="byte-bpe", help="default: byte-bpe, as GPT-2's"
    )
    train.add_argument("--input", nargs="+", required=True, type=_named, metavar="WHAT", help=INPUT)
    train.add_argument(
        "--text-column", default="text", metavar="NAME", help="column that holds the text"
    )
    train.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="size of the vocabulary, including the special tokens; none for characters",
    )
    train.add_argument(
        "--special",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="special tokens of a task; they get the last ids",
    )
    train.add_argument(
        "--out", required=True, type=_named, metavar="FOLDER", help="new folder for the tokenizer"
    )
    train.set_defaults(command=_train_command)
    encode = commands.add_parser("encode", help="text to ids", allow_abbrev=False)
    encode.add_argument("text", nargs="?", metavar="TEXT", help="default: all of standard input")
    encode.set_defaults(command=_encode_command)
    decode = commands.add_parser("decode", help="ids to text", allow_abbrev=False)
    decode.add_argument("ids", nargs="*", metavar="ID", help="default: all of standard input")
    decode.set_defaults(command=_decode_command)
    for command in (encode, decode):
        command.add_argument(
            "--tokenizer",
            default="gpt2",
            type=_named,
            help="gpt2, a folder, a tokenizer.json or nanoGPT's meta.pkl",
        )
    return parser


def main() -> None:
    """Run the command of the command line. Raises UserError for bad options or bad input."""
    options = _parser().parse_args()
    options.command(options)


if __name__ == "__main__":
    entry_point(main)
