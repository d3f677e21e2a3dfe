"""The store of finished runs: which cells are run, repeated or left out, and the time they may
take."""

from __future__ import annotations

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from base.commands import side_by_side
from benchmarks.store import Cell, Store, place

COUNT = "import sys, pathlib; file = pathlib.Path(sys.argv[1]); file.mkdir(exist_ok=True)\n"
COUNT += "(file / str(len(list(file.iterdir())))).touch()\n"


def cell(folder: Path, name: str, code: str = COUNT, **more: Any) -> Cell:
    path = place(folder, name, 1, {"code": code})
    words = (sys.executable, "-S", "-c", code, str(path))
    return Cell(name, 1, path, words, f"{name} (1)", **more)


def runs(path: Path) -> dict[str, Any]:
    return {"runs": len(list(path.iterdir()))}


def test_a_done_cell_is_not_repeated_and_a_failure_is_named(tmp_path) -> None:
    cells = [cell(tmp_path, "a"), cell(tmp_path, "b", COUNT + "sys.exit('error: it broke')")]
    store = Store(runs)
    first, second = map(store.attempt, cells)
    assert first.endswith(" s") and second == "failed: error: it broke"
    assert store.failed == {cells[1]: "error: it broke"} and store.done.keys() == {cells[0]}
    again = Store(runs)
    found, _ = map(again.attempt, cells)
    assert found == "found in the folder"
    assert cells[0].figures() == {"runs": 1, "command": shlex.join(cells[0].words)}
    assert len(list(cells[1].path.iterdir())) == 2  # it was tried again
    assert again.done == pytest.approx(store.done)


@pytest.mark.parametrize(("restart", "expected"), [(False, 2), (True, 1)])
@pytest.mark.parametrize("note", ['{"torn', '{"command": "", "wall_seconds": 1}', None])
def test_an_unfinished_cell_resumes_or_restarts(tmp_path, note, restart, expected) -> None:
    """The process was killed, the note is incomplete, or an earlier version wrote it."""
    one = cell(tmp_path, "a")
    Store(runs).attempt(one)
    one.note.unlink() if note is None else one.note.write_text(note)
    assert one.figures() is None
    Store(runs, restart=restart).attempt(one)
    assert (one.figures() or {})["runs"] == expected


def test_other_options_make_another_cell(tmp_path) -> None:
    assert place(tmp_path, "a", 1, {"lr": 1}) == place(tmp_path, "a", 1, {"lr": 1})
    assert place(tmp_path, "a", 1, {"lr": 1}) != place(tmp_path, "a", 1, {"lr": 2})


def test_cells_without_time_are_not_failures(tmp_path) -> None:
    cells = [cell(tmp_path, "slow", "import time; time.sleep(60)"), cell(tmp_path, "b")]
    store = Store(runs, until=time.monotonic() + 0.5)
    store.run(lambda: cells, str, lambda: pytest.fail("nothing has run"))
    assert not store.failed
    assert list(store.left_out) == cells and store.rest(cells) <= 0


def test_expected_seconds_come_from_similar_cells(tmp_path) -> None:
    one, other = cell(tmp_path / "runs", "a", work=2), cell(tmp_path / "runs", "b", "", work=1)
    store = Store(runs, done={one: 10.0, other: 2.0, cell(tmp_path / "elsewhere", "c"): 99.0})
    longer, unlike = cell(tmp_path / "runs", "a", "1", work=4), cell(tmp_path / "runs", "d", work=1)
    assert store.usual(longer) == 20 and store.usual(unlike) == 3.5
    assert store.rest([one, longer, unlike]) == 23.5 and store.until == math.inf


def test_an_interrupt_ends_the_commands_under_way(tmp_path) -> None:
    slow = cell(tmp_path, "slow", COUNT + "import time; time.sleep(60)")
    store, began = Store(runs), time.monotonic()

    def work(one: Cell | None) -> None:
        if one:
            store.attempt(one)
            return
        while not slow.path.exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, [None, slow], at_once=2)
    assert time.monotonic() - began < 30 and slow in store.failed
