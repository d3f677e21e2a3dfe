"""Locks admit one process at a time, on Unix and on Windows. A fake module stands for Windows."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from base import locks
from windows import FakeMsvcrt


@pytest.fixture(params=["Unix", "Windows"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Windows":
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", FakeMsvcrt())
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
