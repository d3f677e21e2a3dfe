"""Locks between processes, on Unix and on Windows. The system frees the lock of a process that was
killed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows, which has msvcrt in its place
    _fcntl = None

fcntl: Any = _fcntl

POLL = 0.1  # seconds between two tries, where the system cannot wait by itself


def lock(file: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Returns False where the file system has no locks.

    Raises BlockingIOError where another process holds the lock, unless `wait` is given.
    """
    try:
        _lock_unix(file, wait) if fcntl else _lock_windows(file, wait)
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return False
    return True


def _lock_unix(file: int, wait: bool) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _lock_windows(file: int, wait: bool) -> None:
    import msvcrt as windows

    msvcrt: Any = windows

    while True:
        try:
            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # the first byte stands for the file
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from None
        time.sleep(POLL)


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None] = lambda: None) -> Generator[bool]:
    """Hold the lock file `path`; `busy` is called before waiting for another process that holds it.

    Yields False where the file system has no locks. Raises OSError where the file cannot be made.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        file = os.open(path, os.O_RDONLY)  # another user's
    try:
        try:
            alone = lock(file)
        except BlockingIOError:
            busy()
            alone = lock(file, wait=True)
        yield alone
    finally:
        os.close(file)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Generator[None]:
    """Hold the lock of a folder. Raises BlockingIOError where another process holds it.

    On Unix the folder itself is locked. Windows cannot open one, so a file in it stands for it.
    """
    file = (
        os.open(folder, os.O_RDONLY) if fcntl else os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    )
    try:
        lock(file)
        yield
    finally:
        os.close(file)
