"""The lines of a file, decoded one by one, with any of the three line ends."""

from __future__ import annotations

import codecs
import io
import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from text.encodings import BAD_BYTE, HEAD, NotUtf8, check_text


class Lines:
    """The lines of a file, with their ends. Lines can be looked at ahead, and given back."""

    def __init__(self, stream: io.BufferedReader, path: Path | str):
        head = stream.peek(HEAD)[:HEAD]
        check_text(head, path)
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        self._lines = _mac_lines(stream) if _has_mac_line_ends(head) else _unix_lines(stream)
        self._ahead: deque[str] = deque()
        self.number = 0  # number of the last line that was taken, from 1
        self.has_bad_bytes = False  # whether any line so far was not UTF-8

    def take(self) -> str | None:
        """The next line; None at the end of the file."""
        line = self._ahead.popleft() if self._ahead else next(self._lines, None)
        if line is not None:
            self.number += 1
            self.has_bad_bytes = self.has_bad_bytes or line.__class__ is NotUtf8
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """Put back the lines that were taken last, so that they are taken again."""
        self._ahead.extendleft(reversed(lines))
        self.number -= len(lines)

    def following(self, n: int) -> list[str]:
        """Look at the next n lines without taking them; fewer at the end of the file."""
        self._ahead.extend(itertools.islice(self._lines, max(0, n - len(self._ahead))))
        return list(itertools.islice(self._ahead, n))

    def is_done(self) -> bool:
        """Whether no line is left."""
        return not self.following(1)

    def peek(self, characters: int) -> list[str]:
        """Look at the next lines, at least `characters` in all; fewer at the end of the file."""
        held = sum(map(len, self._ahead))
        while held < characters and (line := next(self._lines, None)) is not None:
            self._ahead.append(line)
            held += len(line)
        return list(self._ahead)


def _unix_lines(stream: io.BufferedReader) -> Iterator[str]:
    """Lines that end with a newline. A block of lines is decoded at once, which is faster."""

    def blocks() -> Iterator[Iterable[str]]:
        while data := stream.read(1 << 18):
            data += stream.readline()
            try:
                yield io.StringIO(data.decode(), newline="\n")
            except UnicodeDecodeError:
                yield map(_decode_line, io.BytesIO(data))

    return itertools.chain.from_iterable(blocks())


def _decode_line(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return NotUtf8(line.decode("utf-8", "surrogateescape"))


def _has_mac_line_ends(head: bytes) -> bool:
    """Whether lines end with a carriage return alone, as on the classic Mac.

    Quoted cells are ignored, because they may hold other line ends.
    """
    first = re.match(rb'(?:[^"\r\n]++|"[^"]*+")*+', head)
    assert first
    end = head[first.end() : first.end() + 2]
    return (len(end) == 2 and end[:1] == b"\r" and end != b"\r\n") or (
        b"\r" in head and b"\n" not in head
    )


def _mac_lines(stream: io.BufferedReader) -> Iterator[str]:
    with io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="") as text:
        for line in text:
            yield NotUtf8(line) if BAD_BYTE.search(line) else line


def without_end(line: str) -> str:
    """A line without its line end."""
    for end in ("\r\n", "\n", "\r"):
        if line.endswith(end):
            return line[: -len(end)]
    return line
