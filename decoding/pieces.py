"""The text of a continuation, given out piece by piece as its tokens come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextPieces:
    """Turns bytes of tokens into text. A character is given out when the last of its bytes has
    come, and text that may begin a stop string when it is known not to.

    The text ends before the first stop string, wherever tokens cut it.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self.stops = [stop for stop in stops if stop]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # decoded, and not given out yet
        self.decoded = 0  # characters so far, those held included
        self.stopped = False  # whether a stop string has come; then nothing more is given out

    def add(self, token: bytes) -> str:
        """The text that the bytes of one more token complete."""
        return self._release(self.decoder.decode(token), last=False)

    def close(self) -> str:
        """The rest of the text, with U+FFFD for an incomplete character."""
        return self._release(self.decoder.decode(b"", final=True), last=True)

    def _release(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        self.decoded += len(text)
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self.held) - (0 if last else self._may_begin_a_stop())
        piece, self.held = self.held[:end], self.held[end:]
        return piece

    def _may_begin_a_stop(self) -> int:
        """How many characters at the end of the held text may belong to a stop string."""
        longest = min(len(self.held), max((len(stop) - 1 for stop in self.stops), default=0))
        for n in range(longest, 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.stops):
                return n
        return 0
