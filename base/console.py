"""Standard streams on which a failing print does not end a run.

A terminal may close, the reader of a pipe may exit, a disk may fill up, an encoding may not have a
character. `open_console` replaces Python's standard streams, so that every `print`, progress bar
and library of the process is safe. A character that the encoding does not have is escaped. Text
that cannot be written is dropped. A command whose output is its result then ends with `OutputLost`.
A command that has called `outlive` warns once and continues.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import warnings
from typing import Any

# Error handlers that can encode any text.
FORGIVING = ("replace", "ignore", "backslashreplace", "namereplace", "xmlcharrefreplace")


class OutputLost(Exception):
    """Standard output could not be written, in a command whose output is its result.

    Its text is the reason.
    """

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        # True for a reader such as `head`, which has read enough. Then it is not an error.
        self.reader_left = isinstance(error, BrokenPipeError)


class _Outlet(io.RawIOBase):
    """The raw bytes of a standard stream. Only the first write that fails may raise an error."""

    def __init__(self, raw: Any, number: int):
        self.raw = raw  # None: the stream was closed when the process started
        self.number = number  # the file descriptor
        self.error: OSError | None = None  # the first error

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.number

    def isatty(self) -> bool:
        return self.raw is not None and os.isatty(self.number)

    def write(self, data: Any) -> int:
        """Write all of `data`, or drop the rest of it after an error.

        Returns the length of `data` in both cases. Raises OutputLost at the first error of standard
        output, unless `outlive` was called.
        """
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
            return os.write(-1, data)  # raises the OSError of a closed descriptor
        count = self.raw.write(data)
        # None: another process has made the terminal or pipe non-blocking, and it is full.
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
            # stays open until the process ends
            sys.stdin = stream or open(os.devnull, encoding="utf-8")  # noqa: SIM115
        elif stream is None or _is_standard(stream, number):
            setattr(sys, name, _safe(stream, number))


def outlive() -> None:
    """Let this command continue if standard output fails, because its results are in files."""
    global _outlives
    _outlives = True


def output_error() -> str | None:
    """Why standard output could not be written, or None if it could."""
    outlet = _outlet(sys.stdout)
    return None if outlet is None or outlet.error is None else outlet.error.strerror


def _safe(stream: Any, number: int) -> io.TextIOWrapper:
    """A stream with the settings of `stream` on an _Outlet. stream: None if it was closed."""
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
    """Whether `stream` is Python's own for this descriptor, not one of a test or a notebook."""
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
    """Open a closed standard descriptor on the null device.

    Otherwise the next file that is opened would get its number, and prints of libraries in it.
    """
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _say_lost(error: OSError) -> None:
    print(
        f"warning: standard output cannot be written ({error.strerror}); continuing without it",
        file=sys.stderr,
    )


def quiet_libraries() -> None:
    """Hide a few messages of other libraries that no user can act on."""
    for message in ("Guards may run slower on Python 3.13.0",):
        warnings.filterwarnings("ignore", message)
    # inductor looks for CUDA's compiler even in a run on the CPU
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda r: "No CUDA runtime is found" not in r.getMessage()
    )


def counted(n: int, noun: str) -> str:
    """A number and its noun, whose plural ends in s: 1 row, 2,000 rows."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def bytes_text(n: float) -> str:
    """A number of bytes in the largest suitable unit, up to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def time_text(seconds: float) -> str:
    """A duration as m:ss, h:mm:ss or Nd h:mm:ss."""
    seconds = int(max(0, seconds))
    days, rest = divmod(seconds, 86400)
    clock = (
        f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
        if rest >= 3600
        else f"{rest // 60}:{rest % 60:02d}"
    )
    return f"{days}d {clock}" if days else clock


def printable(text: str) -> str:
    """`text` with control characters escaped. An untrained model may generate them, and a terminal
    would execute them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
