"""The console of a process: standard streams that no print can end a run by, and the signals that stop it.

A terminal closes, the reader of a pipe leaves, a disk fills, an encoding lacks a character. `open_console` puts
streams of ours in the place of Python's, so that every `print`, progress bar and library of the process is safe.
What the encoding lacks is escaped. What cannot be written is dropped, and then there are two kinds of command:
one whose output is its result ends with `OutputLost`; one that has called `outlive` goes on, and says so once.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Generator
from types import FrameType
from typing import Any

FORGIVING = ("replace", "ignore", "backslashreplace", "namereplace", "xmlcharrefreplace")  # they encode anything


class OutputLost(Exception):
    """Standard output could not be written, in a command whose output is its result. Its text says why."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        self.reader_left = isinstance(error, BrokenPipeError)  # head has read what it wanted: no fault


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
        if count is None:  # another process has made the terminal or pipe non-blocking, and it is full
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
            sys.stdin = stream or open(os.devnull, encoding="utf-8")  # noqa: SIM115  for the life of the process
        elif stream is None or _is_standard(stream, number):
            setattr(sys, name, _safe(stream, number))


def outlive() -> None:
    """From now on this command goes on without its standard output: what it makes is in files."""
    global _outlives
    _outlives = True


def lost() -> str | None:
    """Why standard output could not be written, None where all was."""
    outlet = _outlet(sys.stdout)
    return None if outlet is None or outlet.error is None else outlet.error.strerror


def _safe(stream: Any, number: int) -> io.TextIOWrapper:
    """`stream` again, on an outlet."""
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(_Outlet(None, number)), "utf-8", "backslashreplace")
    outlet = _Outlet(getattr(stream.buffer, "raw", stream.buffer), number)
    try:
        stream.flush()
    except OSError as error:
        outlet.error = error
    errors = stream.errors if stream.errors in FORGIVING else "backslashreplace"
    ways: Any = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return io.TextIOWrapper(io.BufferedWriter(outlet), stream.encoding, errors, **ways)


def _is_standard(stream: Any, number: int) -> bool:
    """Whether `stream` is Python's own on this descriptor, not one that a test or a notebook has put there."""
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == number and _outlet(stream) is None
    except (OSError, ValueError):
        return False


def _outlet(stream: Any) -> _Outlet | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Outlet) else None


def _occupy(number: int) -> None:
    """Open a closed descriptor, so that no file opened later gets its number and another library's prints."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _say_lost(error: OSError) -> None:
    print(f"warning: standard output cannot be written ({error.strerror}); this goes on without it", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep off the screen what other libraries say there and no user can act on, message by message."""
    for message in ("Guards may run slower on Python 3.13.0",):
        warnings.filterwarnings("ignore", message)
    # inductor looks for CUDA's compiler, also in a run on the CPU
    logging.getLogger("torch.utils.cpp_extension").addFilter(lambda r: "No CUDA runtime is found" not in r.getMessage())


# ---- signals

GRACE = 1.0  # seconds that Python code has to end the process by itself
_stopped_by = 0


def watch_signals() -> None:
    """From now on SIGINT and SIGTERM end this process by an exception, and `stopped_by` tells that one came."""
    global _stopped_by
    _stopped_by = 0
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    note_signal(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def note_signal(number: int) -> None:
    """For a handler: this process was told to stop."""
    global _stopped_by
    _stopped_by = _stopped_by or number


def stopped_by() -> int:
    """The first signal that told this process to stop, 0 for none.

    Whatever error comes after one may only be its effect: a library wraps the exception, or a process of the same
    group, as a compiler is, has received it too.
    """
    return _stopped_by


@contextlib.contextmanager
def ends_promptly() -> Generator[None]:
    """Let a signal end the process soon, though a library keeps the main thread from Python code for minutes."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    left = threading.Event()

    def watch() -> None:
        number = os.read(reader, 1)
        if number and not left.wait(GRACE):
            os._exit(128 + number[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    before = signal.set_wakeup_fd(writer)
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
