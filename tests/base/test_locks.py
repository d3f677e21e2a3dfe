"""Locks admit one process at a time, on Unix and on Windows. A fake module stands for Windows."""

from __future__ import annotations

import os
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from base import locks


class Windows(types.ModuleType):
    """A fake of msvcrt's locks: a byte of an open file is locked for one descriptor at a time."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[int, int] = {}  # inode number to the descriptor that holds the lock

    def locking(self, file: int, mode: int, n_bytes: int) -> None:
        assert mode == self.LK_NBLCK and n_bytes == 1 and os.lseek(file, 0, os.SEEK_CUR) == 0
        open_files = {os.fstat(f).st_ino for f in self.held.values() if _is_open(f)}
        number = os.fstat(file).st_ino
        if number in self.held and number in open_files and self.held[number] != file:
            raise PermissionError(13, "Permission denied")
        self.held[number] = file


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


@pytest.fixture(params=["Unix", "Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Windows":
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", Windows())
    return request.param


def test_a_held_lock_is_refused_or_waited_for(system: str, tmp_path: Path) -> None:
    path, order = tmp_path / "a.lock", []

    def second() -> None:
        with locks.locked(path, lambda: order.append("busy")) as alone:
            order.append("second")
            assert alone

    with locks.locked(path) as alone:
        assert alone
        file = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            locks.lock(file)
        os.close(file)
        thread = threading.Thread(target=second)
        thread.start()
        while not order:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["busy", "first", "second"]


def test_a_folder_is_held_by_one_process(system: str, tmp_path: Path) -> None:
    held = locks.locked_folder(tmp_path)
    with held, pytest.raises(BlockingIOError), locks.locked_folder(tmp_path):
        pass
    with locks.locked_folder(tmp_path):
        pass
