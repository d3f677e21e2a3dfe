"""The signals that stop a command, and how soon they do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Generator
from types import FrameType

GRACE = 1.0  # seconds that Python code has to end the process by itself
_stopped_by = 0


def watch_signals() -> None:
    """From now on SIGINT and SIGTERM end this process by an exception, and `stopped_by` tells that
    one came."""
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

    Whatever error comes after one may only be its effect: a library wraps the exception, or a
    process of the same group, as a compiler is, has received it too.
    """
    return _stopped_by


@contextlib.contextmanager
def ends_promptly() -> Generator[None]:
    """Let a signal end the process soon, though a library keeps the main thread from Python code
    for minutes."""
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
