"""Handles the signals that stop a command, and makes sure that they stop it soon."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Generator
from types import FrameType

GRACE = 1.0  # seconds that Python code gets to end the process after a signal
_stopped_by = 0


def watch_signals() -> None:
    """Let SIGINT and SIGTERM end this process by an exception, and record them for `stopped_by`."""
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
    """Record that a signal told this process to stop. For other signal handlers."""
    global _stopped_by
    _stopped_by = _stopped_by or number


def stopped_by() -> int:
    """The number of the first signal that told this process to stop; 0 for none.

    An error after a signal may only be its effect. A library may have wrapped the exception, or a
    process of the same group, such as a compiler, may have received the signal too.
    """
    return _stopped_by


@contextlib.contextmanager
def ends_promptly() -> Generator[None]:
    """Let a signal end the process within GRACE seconds, even inside a long call of a library.

    Python runs signal handlers only between bytecodes of the main thread, which may take minutes.
    """
    reader, writer = socket.socketpair()  # Windows cannot make a pipe that does not block
    writer.setblocking(False)
    left = threading.Event()

    def watch() -> None:
        number = reader.recv(1)
        if number and not left.wait(GRACE):
            os._exit(128 + number[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    before = signal.set_wakeup_fd(writer.fileno())
    thread.start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
