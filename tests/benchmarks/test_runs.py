"""A benchmark's command: its time limit, its grace time, and its errors."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytest

from base.commands import Failed, TimeUp, execute, last_error
from base.files import read_json


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("banner\nerror: --precision fp8 needs a GPU\n", "error: --precision fp8 needs a GPU"),
        ("Traceback\n  x()\nRuntimeError: boom\n", "RuntimeError: boom"),
        (
            "[rank1]: torch.OutOfMemoryError: CUDA\n"
            + "torch.distributed.elastic.ChildFailedError: "
            "\n" + 9 * "=",
            "[rank1]: torch.OutOfMemoryError: CUDA",
        ),
        ("Segmentation fault\n", "Segmentation fault"),
        ("", "it ended with code 9"),
    ],
)
def test_the_last_error_is_found(output, expected) -> None:
    assert last_error(output, 9) == expected


def stub(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "stub.py").write_text(text)
    return [sys.executable, "-S", str(tmp_path / "stub.py")]


def test_a_process_that_fails_leaves_its_last_line(tmp_path: Path) -> None:
    words = stub(
        tmp_path,
        "import sys; print('hello'); print('error: no such file', file=sys.stderr); sys.exit(2)",
    )
    with pytest.raises(Failed, match=r"^error: no such file$"):
        execute(words, tmp_path / "out.txt", math.inf)


def test_a_process_that_is_killed_leaves_the_signal(tmp_path: Path) -> None:
    words = stub(tmp_path, "import os; print('all is well', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(Failed, match=r"^killed by SIGKILL$"):
        execute(words, tmp_path / "out.txt", math.inf)


def test_a_run_may_save_when_its_time_is_over(tmp_path: Path) -> None:
    words = stub(
        tmp_path,
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n    pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1], "
        "'ready').touch()\ntime.sleep(60)\n",
    )
    began = time.monotonic()
    with pytest.raises(TimeUp):
        execute([*words, str(tmp_path)], tmp_path / "out.txt", began + 2, grace=30)
    assert (tmp_path / "ready").exists() and (tmp_path / "saved").exists()
    assert time.monotonic() - began < 20


def test_a_command_past_its_time_is_ended_without_failure(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    with pytest.raises(TimeUp):
        execute(words, tmp_path / "out.txt", time.monotonic() + 0.2)


def test_an_incomplete_file_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ')
    (tmp_path / "whole.json").write_text('{"a": 1}')
    found = [read_json(tmp_path / f"{name}.json") for name in ("torn", "none", "whole")]
    assert found == [None, None, {"a": 1}]
