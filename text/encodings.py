"""Files as text: gzip, encodings, and what to type for a file in another encoding.

Text is UTF-8. Another encoding is recognised by its bytes, so that the error can name it.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import re
import shlex
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any

from config import UserError

HEAD = 1 << 16  # bytes from which a file's kind is inferred
GZIP = b"\x1f\x8b"  # the first bytes of every gzip file
LAYERS = 3  # most gzip layers that are unpacked: a file can be crafted that unpacks to itself


class NotUtf8(str):
    """A text with bytes that are not UTF-8. Each is a lone surrogate, as by surrogateescape."""


BAD_BYTE = re.compile(r"[\udc80-\udcff]")  # a byte that is not UTF-8, as surrogateescape decodes it


# ---- bytes


def is_gzip(path: Path) -> bool:
    """Whether the file begins with gzip's magic bytes. False for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(GZIP)) == GZIP
    except OSError:
        return False


@contextlib.contextmanager
def open_decompressed(path: Path) -> Generator[tuple[IO[bytes], io.BufferedReader]]:
    """Open a file and yield it twice: as it is, and as a stream of its uncompressed bytes.

    Gzip is detected by the file's first bytes, not by its name. Raises UserError for a file that
    cannot be read or is damaged, on opening and also while the `with` block reads.
    """
    try:
        with path.open("rb", buffering=HEAD) as file, contextlib.ExitStack() as stack:
            assert isinstance(file, io.BufferedReader)
            stream = file
            for layer in itertools.count():
                head = stream.peek(HEAD)[:HEAD]
                if head[:2] != GZIP:
                    break
                if layer == LAYERS:
                    raise UserError(
                        f"{path} is gzip inside gzip, more than {LAYERS} times; unpack it first"
                    )
                unpacked: Any = stack.enter_context(gzip.GzipFile(mode="rb", fileobj=stream))
                stream = io.BufferedReader(unpacked, HEAD)
            if (
                stream is file
                and path.name.lower().endswith(".gz")
                and head
                and not _is_plain(head)
            ):
                raise UserError(
                    f"{path} is not a sound gzip file: it lacks gzip's first bytes; copy or make "
                    "it again"
                )
            yield file, stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} is not a sound gzip file: {error}; copy or make it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _is_plain(head: bytes) -> bool:
    """Whether a file named .gz is not compressed: many downloads unpack it and keep the name."""
    return head[:4] == b"PAR1" or (b"\0" not in head and _decodes(head, "utf-8") is not None)


# ---- encodings


def _decodes(data: bytes, encoding: str) -> str | None:
    """The decoded text, or None if the bytes are not in this encoding.

    The last character may be incomplete.
    """
    try:
        return codecs.getincrementaldecoder(encoding)("strict").decode(data)
    except UnicodeDecodeError:
        return None


def wide_encoding(head: bytes) -> str | None:
    """iconv's name of the UTF-16 or UTF-32 encoding of some bytes, or None for any other encoding.

    The byte order mark decides, or else the share of zero bytes.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    zeros = 0.02 if _decodes(head, "utf-8") is None else 0.4
    if head.count(0) < max(1, zeros * len(head)):
        return None
    best, most = None, 0.0
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        text = _decodes(head, name)
        if text and sum(map(_is_of_text, text)) >= 0.95 * len(text):
            # Every text has ASCII, if only its spaces. The wrong byte order turns it into rare
            # characters.
            share = sum(character < "\x7f" for character in text) / len(text)
            best, most = (name, share) if share > most else (best, most)
    return best


def _is_of_text(character: str) -> bool:
    return character.isprintable() or character in "\t\n\r\ufeff"


# Multi-byte and non-Latin encodings: iconv's name, a pattern of the script, and the smallest share
# of the non-ASCII letters that must match it. Decoding without an error proves little, because most
# byte sequences are valid in these encodings.
_SCRIPTS = (
    ("CP949", re.compile("[가-힣ㄱ-ㆎ]"), 0.85),
    ("EUC-JP", re.compile("[ぁ-ヿ]"), 0.3),
    ("SHIFT_JIS", re.compile("[ぁ-ヿ]"), 0.3),
    ("GB18030", re.compile("[一-鿿\u3000-\u303f\uff00-\uffef]"), 0.95),
    ("WINDOWS-1251", re.compile("[а-яё]"), 0.7),
    ("KOI8-R", re.compile("[а-яё]"), 0.7),
)


def encoding_of(sample: bytes) -> str | None:
    """iconv's name of the encoding of bytes that are not UTF-8, or None if it is unclear."""
    if wide := wide_encoding(sample):
        return wide
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(sample)
    bad = len(BAD_BYTE.findall(text))
    utf8 = sum(character > "\x7f" for character in text) - bad
    if not bad or 2 * utf8 > bad or any(byte < 32 and byte not in b"\t\n\r\f" for byte in sample):
        return None  # UTF-8 with a few damaged bytes, or no text at all
    high = [byte > 0x7F for byte in sample]
    runs = sum(1 for pair in itertools.pairwise(high) if all(pair))
    if 2 * runs >= sum(high):
        for name, script, share in _SCRIPTS:
            found = _decodes(sample, name)
            letters = [character for character in found or "" if character > "\x7f"]
            if letters and len(script.findall("".join(letters))) >= share * len(letters):
                return name
    latin = "WINDOWS-1252" if any(0x80 <= byte < 0xA0 for byte in sample) else "ISO-8859-1"
    # In Latin text an accented letter has ASCII neighbours and rarely follows another one.
    found = _decodes(sample, latin) or ""
    letters = sum(character.isalpha() for character in found if character > "\x7f")
    return latin if 3 * runs <= sum(high) and 2 * letters >= sum(high) else None


def conversion_advice(path: Path | str, sample: bytes) -> str:
    """What to type for a file that is not UTF-8. A command comes last, ready to be pasted."""
    encoding = encoding_of(sample)
    if encoding is None:
        return "repair it, or save the file as UTF-8 (its encoding was not recognized)"
    path = Path(path)
    name = path.name.removesuffix(".gz")
    suffix = Path(name).suffix
    new = str(path.with_name(f"{name.removesuffix(suffix)}.utf8{suffix}"))
    old, new = (
        shlex.quote(f"./{name}" if name.startswith("-") else name) for name in (str(path), new)
    )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return (
                f"it seems to be {encoding}; convert it: gzip -dc < {old} | iconv -f "
                f"{encoding} -t UTF-8 > {new}"
            )
    return f"it seems to be {encoding}; convert it: iconv -f {encoding} -t UTF-8 {old} > {new}"


def encoding_sample(path: Path | str) -> bytes:
    """The beginning of a file and the bytes around the first one that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    with open_decompressed(Path(path)) as (_, stream):
        head = stream.read(HEAD)
        block = head
        while block:
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                start = max(0, error.start - HEAD)
                return head if block is head else head + error.object[start : error.start + HEAD]
            block = stream.read(1 << 20)
    return head


_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"%PDF": "a PDF; extract its text first",
    b"PAR1": "a parquet file; rename it to .parquet",
}


def check_text(head: bytes, where: Path | str) -> None:
    """Raises UserError if a file's first bytes show that it is not UTF-8 text."""
    binary = b"\0" in head or _decodes(head, "utf-8") is None
    if binary and (kind := other_kind(head)):
        raise UserError(f"{where} is not text, but {kind}")
    if wide_encoding(head):
        raise UserError(f"{where} is not UTF-8 text; {conversion_advice(where, head)}")


def other_kind(head: bytes) -> str:
    """What kind of unsupported file begins so, with what to do about it; "" for any other file."""
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if head.startswith(mark)), "")
    return kind if ";" in kind or not kind else f"{kind}; unpack it first"


def not_utf8(where: str, path: Path | str) -> UserError:
    """The error for text of `path` that is not UTF-8, with the command that converts the file."""
    return UserError(f"{where} is not UTF-8 text; {conversion_advice(path, encoding_sample(path))}")


def text_stream(stream: io.BufferedReader, path: Path, errors: str = "strict") -> io.TextIOWrapper:
    """Decode UTF-8 without the byte order mark. Line ends stay as they are in the file."""
    check_text(stream.peek(HEAD)[:HEAD], path)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors=errors, newline="")


def read_text(path: Path | str) -> str:
    """The whole text of a file, gzipped or not. Raises UserError for one that is not UTF-8."""
    with open_decompressed(Path(path)) as (_, stream):
        try:
            with text_stream(stream, Path(path)) as text:
                return text.read()
        except UnicodeDecodeError:
            raise not_utf8(str(path), path) from None


def decode_input(raw: bytes, what: str) -> str:
    """The text of standard input, without a byte order mark. Raises UserError if it is not UTF-8.

    what: the name of the input in the message.
    """
    try:
        if wide_encoding(raw[:HEAD]):
            raise ValueError
        return raw.decode("utf-8-sig")
    except ValueError:
        name = encoding_of(raw[:HEAD])
        advice = f"pipe it through iconv -f {name} -t UTF-8" if name else "convert it"
        packed = raw[:2] == b"\x1f\x8b"
        raise UserError(
            f"{what} is not UTF-8 text; {'unpack it: gzip -dc' if packed else advice}"
        ) from None
