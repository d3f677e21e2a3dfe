"""No print ends a run, even if a standard stream is full, closed, without a reader, or ASCII."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.log import finite_values, kept_lines, read_log
from launch import launch, log_of, receive, small, write_inputs
from support import REPO, own_lines, python_path

PROGRAM = """
import sys, time
from base.cli import entry_point
from base.console import outlive
def main():
    if sys.argv[1] == "run":
        outlive()
    for i in range(3000):
        print("line", i, "한글 é \\udcff", flush=True)
    print("end", file=sys.stderr)
    open(sys.argv[2], "w").close()
entry_point(main)
"""


def program(tmp_path: Path, kind: str, redirect: str, **env: str) -> tuple[int, str, bool]:
    """Exit code, standard error, and whether PROGRAM finished. redirect: of the shell."""
    (tmp_path / "p.py").write_text(PROGRAM, encoding="utf-8")
    words = f"{sys.executable} p.py {kind} reached {redirect}; exit ${{PIPESTATUS[0]}}"
    whole = os.environ | {"PYTHONPATH": python_path(REPO)} | env
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=whole, capture_output=True, timeout=60
    )
    return done.returncode, done.stderr.decode(errors="replace"), (tmp_path / "reached").exists()


BROKEN = [
    "| head -2",
    ">/dev/full",
    ">&-",
    ">/dev/full 2>&1",
    ">&- 2>&-",
    "2>/dev/full >&2",
    "<&- >&- 2>&-",
]


@pytest.mark.parametrize("redirect", BROKEN)
def test_a_run_continues_without_its_console(tmp_path: Path, redirect: str) -> None:
    code, err, reached = program(tmp_path, "run", redirect)
    assert code == 0 and reached
    if "2" not in redirect.replace("-2", "") and "&2" not in redirect:
        assert [line[:25] for line in err.splitlines()] == ["warning: standard output ", "end"]


@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", ">/dev/full 2>&-"])
def test_a_result_that_cannot_be_written_is_an_error(tmp_path: Path, redirect: str) -> None:
    code, err, reached = program(tmp_path, "result", redirect)
    assert code == 2 and not reached
    assert "2>" in redirect or (
        err.startswith("error: standard output cannot be written") and err.count("\n") == 1
    )


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    code, err, reached = program(tmp_path, "result", "| head -2")
    assert (code, err, reached) == (0, "", False)


@pytest.mark.parametrize(
    "encoding", ["cp949", "latin-1", "ascii", "ascii:strict", "utf-8:strict", "utf-8:replace"]
)
def test_characters_outside_the_encoding_are_escaped(tmp_path: Path, encoding: str) -> None:
    code, err, reached = program(tmp_path, "result", "> out", PYTHONIOENCODING=encoding)
    assert (code, err, reached) == (0, "end\n", True)
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert len(lines) == 3000
    assert all((b"\\udcff" in line) != encoding.endswith(":replace") for line in lines)


def test_a_nonblocking_pipe_gets_every_line(tmp_path: Path) -> None:
    slow = "| (sleep 0.5; cat > out)"
    blocking = (
        "import os,sys; os.set_blocking(1, False); os.execv(sys.executable, "
        "[sys.executable, *sys.argv[1:]])"
    )
    (tmp_path / "p.py").write_text(PROGRAM, encoding="utf-8")
    words = f"{sys.executable} -c '{blocking}' p.py result reached {slow}; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": python_path(REPO)}
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out").read_bytes().splitlines()) == 3000


def leave_without_reader() -> None:
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="latin-1")
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, sys.stdout.fileno())


def test_training_finishes_without_a_reader(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words = small("--steps 6 --sample-every 2 --prompts 한글")
    (end,) = launch(tmp_path, words, leave_without_reader)
    assert end.code == 0, end.err
    assert "warning: standard output cannot be written (Broken pipe)" in end.err
    assert len(log_of(tmp_path / "run", "train")) == 6
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["steps"] == 6
    (warning,) = [w for w in log_of(tmp_path / "run", "warning") if "standard output" in w["text"]]
    assert "Broken pipe" in warning["text"]


def fill_the_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), sys.stdout.fileno())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_word_baseline_finishes_on_a_full_disk(tmp_path: Path) -> None:
    words = ["--model", "naive-bayes", "--out", "run"]
    (end,) = launch(tmp_path, words, fill_the_disk, program="finetune.sentiment")
    assert end.code == 0, end.err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["accuracy"] == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] is None


def hang_up() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    receive("micro-batch", 10, (signal.SIGHUP,))


def test_a_run_is_saved_when_its_terminal_closes(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (end,) = launch(tmp_path, small("--save-every 100"), hang_up)
    assert end.code == 128 + signal.SIGHUP
    assert "its checkpoint is saved" in end.out
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


# --- signals

STOPPED = """
import os, signal, sys, time
from base.cli import entry_point
from base.signals import ends_promptly
from config import UserError
def main():
    number, how = getattr(signal, sys.argv[1]), sys.argv[2]
    if how == "library":
        import hashlib, threading
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        with ends_promptly():
            # takes minutes, and handles no signals
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1_000_000_000)
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    except BaseException as stop:
        if how == "wrapped":
            raise RuntimeError("the backend raised") from stop
        if how == "lost":
            raise UserError("the compiler failed") from None
        if how == "exit":
            sys.exit(1)
        raise
entry_point(main)
"""


@pytest.mark.parametrize("how", ["plain", "wrapped", "lost", "exit", "library"])
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_decides_the_exit_code_of_any_command(
    tmp_path: Path, name: str, code: int, how: str
) -> None:
    (tmp_path / "p.py").write_text(STOPPED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "p.py", name, how],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": python_path(REPO)},
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (code, b"")


# --- a log with lines of other programs

FOREIGN = [
    "[]",
    "3",
    '"x"',
    "null",
    '{"kind": 5, "step": 1}',
    '{"step": 1}',
    '{"kind": "train", "step": "x"}',
    '{"kind": "train", "step": 1e999}',
    '{"kind": "train", "step": true}',
    "\0\xff",
    "[" * 100_000,
    "9" * 5000,
    '{"kind": "train", "step": -1}',
    '{"kind": "tr',
]


def test_foreign_lines_of_a_log_are_skipped() -> None:
    ours = [json.dumps({"kind": "train", "step": n, "loss": 1.0}) for n in (1, 2, 3)]
    text = "\n".join([FOREIGN[0], ours[0], *FOREIGN[1:7], ours[1], *FOREIGN[7:], ours[2]])
    assert [line for line, _ in read_log(text)] == ours
    assert kept_lines(text, 2, ()) == [line + "\n" for line in ours[:2]]


def test_only_finite_numbers_of_a_log_count() -> None:
    values = [None, True, "5", [1], math.nan, math.inf, 10**400, 2.5, 3]
    assert finite_values([{"x": value} for value in values] + [{}], "x") == [2.5, 3.0]


def test_own_lines_leave_out_the_warnings_of_libraries() -> None:
    foreign = (
        "/a b/torch/x.py:75: UserWarning: Guards may run slower\n  warnings.warn(\n/y.py:3: "
        "FutureWarning: old\n"
    )
    assert own_lines(foreign) == ""
    ours = (
        'warning: slow\nerror: no\nTraceback (most recent call last):\n  File "x.py", line '
        "3\nValueError: x\n"
    )
    assert own_lines(ours) == ours
    assert own_lines(f"error: a\n{foreign}error: b\n") == "error: a\nerror: b\n"
