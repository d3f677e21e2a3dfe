"""The console of a process: standard streams that no print can end a run by.

A terminal closes, the reader of a pipe leaves, a disk fills, an encoding lacks a character.
`open_console` puts streams of ours in the place of Python's, so that every `print`, progress bar
and library of the process is safe. What the encoding lacks is escaped. What cannot be written is
dropped, and then there are two kinds of command: one whose output is its result ends with
`OutputLost`; one that has called `outlive` goes on, and says so once.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import warnings
from typing import Any

# they encode anything
FORGIVING = ("replace", "ignore", "backslashreplace", "namereplace", "xmlcharrefreplace")


class OutputLost(Exception):
    """Standard output could not be written, in a command whose output is its result. Its text says
    why."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        # head has read what it wanted: no fault
        self.reader_left = isinstance(error, BrokenPipeError)


class _Outlet(io.RawIOBase):
    """The bytes of a standard stream. After the first write that fails, no other raises."""

    def __init__(self, raw: Any, number: int):
        self.raw = raw  # None: the stream was closed when the process began
        self.number = number
        self.error: OSError | None = None  # the first that occurred

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return self.raw is not None and os.isatty(self.number)

    def write(self, data: Any) -> int:
        """Write all of `data` or drop the rest of it; in both cases its length is returned."""
        rest = memoryview(data).cast("B")
        length = len(rest)
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self._lose(error)
        return length

    def _write_some(self, data: memoryview) -> int:
        if self.raw is None:
            return os.write(-1, data)  # raises what a closed descriptor raises
        count = self.raw.write(data)
        # another process has made the terminal or pipe non-blocking, and it is full
        if count is None:
            select.select([], [self.number], [])
        return count or 0

    def _lose(self, error: OSError) -> None:
        if self.error is not None:
            return
        self.error = error
        if self.number == 1 and _outlives:
            _say_lost(error)
        elif self.number == 1:
            raise OutputLost(error)


_outlives = False


def open_console() -> None:
    """Make standard output and standard error safe for the rest of this process."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
        if number == 0:
            # for the life of the process
            sys.stdin = stream or open(os.devnull, encoding="utf-8")  # noqa: SIM115
        elif stream is None or _is_standard(stream, number):
            setattr(sys, name, _safe(stream, number))


def outlive() -> None:
    """From now on this command goes on without its standard output: what it makes is in files."""
    global _outlives
    _outlives = True


def output_error() -> str | None:
    """Why standard output could not be written, None where all was."""
    outlet = _outlet(sys.stdout)
    return None if outlet is None or outlet.error is None else outlet.error.strerror


def _safe(stream: Any, number: int) -> io.TextIOWrapper:
    """`stream` again, on an outlet."""
    if stream is None:
        return io.TextIOWrapper(
            io.BufferedWriter(_Outlet(None, number)), "utf-8", "backslashreplace"
        )
    outlet = _Outlet(getattr(stream.buffer, "raw", stream.buffer), number)
    try:
        stream.flush()
    except OSError as error:
        outlet.error = error
    errors = stream.errors if stream.errors in FORGIVING else "backslashreplace"
    ways: Any = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return io.TextIOWrapper(io.BufferedWriter(outlet), stream.encoding, errors, **ways)


def _is_standard(stream: Any, number: int) -> bool:
    """Whether `stream` is Python's own on this descriptor, not one that a test or a notebook has
    put there."""
    try:
        return (
            isinstance(stream, io.TextIOWrapper)
            and stream.fileno() == number
            and _outlet(stream) is None
        )
    except (OSError, ValueError):
        return False


def _outlet(stream: Any) -> _Outlet | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Outlet) else None


def _occupy(number: int) -> None:
    """Open a closed descriptor, so that no file opened later gets its number and another library's
    prints."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _say_lost(error: OSError) -> None:
    print(
        f"warning: standard output cannot be written ({error.strerror}); this goes on without it",
        file=sys.stderr,
    )


def quiet_libraries() -> None:
    """Keep off the screen what other libraries say there and no user can act on, message by
    message."""
    for message in ("Guards may run slower on Python 3.13.0",):
        warnings.filterwarnings("ignore", message)
    # inductor looks for CUDA's compiler, also in a run on the CPU
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda r: "No CUDA runtime is found" not in r.getMessage()
    )


def bytes_text(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def time_text(seconds: float) -> str:
    seconds = int(max(0, seconds))
    days, rest = divmod(seconds, 86400)
    clock = (
        f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
        if rest >= 3600
        else f"{rest // 60}:{rest % 60:02d}"
    )
    return f"{days}d {clock}" if days else clock


def printable(text: str) -> str:
    """`text` with control characters spelled out: an untrained model writes them, and a terminal
    would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
