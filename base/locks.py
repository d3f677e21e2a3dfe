"""Locks between processes, on Unix and on Windows. The system frees a killed process's locks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows, which has msvcrt instead
    _fcntl = None

fcntl: Any = _fcntl

POLL = 0.1  # seconds between two attempts on Windows, which cannot wait for a lock


def lock(file: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed. Returns False if the file system has no locks.

    Raises BlockingIOError if another process holds the lock, unless `wait` is true.
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
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # the lock of the first byte locks the file
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError(error.errno, error.strerror) from None
        time.sleep(POLL)


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None] = lambda: None) -> Generator[bool]:
    """Hold the lock file `path`. busy() is called before waiting for another process.

    Yields False if the file system has no locks. Raises OSError if the file cannot be made.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        file = os.open(path, os.O_RDONLY)  # a file of another user can still be locked
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
    """Hold the lock of a folder. Raises BlockingIOError if another process holds it.

    On Unix the folder itself is locked. Windows cannot open a folder, so a file in it is locked.
    """
    file = (
        os.open(folder, os.O_RDONLY) if fcntl else os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    )
    try:
        lock(file)
        yield
    finally:
        os.close(file)
