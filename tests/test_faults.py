"""Runs that are killed, stopped or broken at exact points, and resumed: nothing is lost and not a bit differs."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import launch, small, trace, write_inputs

# --- patches: what happens to a run, and where


def at_call(owner: Any, name: str, nth: int, act: Callable[[], Any], before: bool = True) -> None:
    """Make the nth call of owner.name do `act()` too, before or after its own work."""
    original, count = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        now = next(count) == nth
        if now and before:
            act()
        result = original(*args, **kwargs)
        if now and not before:
            act()
        return result

    setattr(owner, name, patched)


def point(where: str) -> tuple[Any, str]:
    """(owner, function) that runs at a place of a training run."""
    import checkpoint
    import runlog
    from step import TrainStep
    from task import LanguageModelling

    return {
        "micro-batch": (TrainStep, "_backward"),
        "evaluation": (LanguageModelling, "sums"),
        "sample": (LanguageModelling, "samples"),
        "state of a save": (checkpoint.json, "dumps") if False else (checkpoint.Saver, "_fill"),
        "manifest of a save": (checkpoint, "flush"),
        "retention": (checkpoint, "prune"),
        "log": (runlog.RunLog, "record"),
    }[where]


def die(where: str, nth: int, before: bool = True) -> None:
    at_call(*point(where), nth, lambda: os.kill(os.getpid(), signal.SIGKILL), before)


def receive(where: str, nth: int, numbers: tuple[int, ...], rank: int = 0) -> None:
    """Send signals to `rank` itself from the nth call; what is under way there takes a moment longer."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(0.2)

    if int(os.environ.get("RANK", "0")) == rank:
        at_call(*point(where), nth, act)


# --- SIGKILL


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and `run`, which nothing ever happened to."""
    folder = tmp_path_factory.mktemp("reference")
    write_inputs(folder)
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    return folder


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    """The same inputs and no run."""
    for name in ("text.txt", "tokenizer", "cache"):
        (tmp_path / name).symlink_to(reference / name)
    return tmp_path


DEATHS = [
    ("micro-batch", 2, True),  # within the first step: nothing saved yet
    ("micro-batch", 18, False),  # half-way through step 5
    ("evaluation", 2, False),
    ("state of a save", 1, True),
    ("manifest of a save", 4, True),
    ("retention", 1, True),  # the checkpoint stands, the older ones are not pruned yet
    ("log", 4, True),
    ("sample", 1, False),
]


def test_a_run_killed_anywhere_ends_bit_for_bit_like_one_that_was_not(reference: Path, folder: Path) -> None:
    for where, nth, before in DEATHS:
        (end,) = launch(folder, small(), functools.partial(die, where, nth, before))
        assert end.code == -signal.SIGKILL, (where, end)
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    assert trace(folder / "run") == trace(reference / "run")
