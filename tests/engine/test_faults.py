"""Runs that are killed, stopped or broken at chosen points and resumed: they lose nothing and end
bit for bit the same."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch import (
    Launch,
    at_call,
    checkpoint_steps,
    die,
    fork_children,
    launch,
    log_of,
    point,
    rank,
    receive,
    slow_steps,
    small,
    start,
    trace,
    write_inputs,
)
from support import REPO

# --- SIGKILL


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs and `run`, an undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    write_inputs(folder)
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    return folder


@pytest.fixture
def folder(reference: Path, tmp_path: Path) -> Path:
    """A folder with the same inputs and without a run."""
    for name in ("text.txt", "val.txt", "tokenizer"):
        (tmp_path / name).symlink_to(reference / name)
    return tmp_path


DEATHS = [  # in this order, each in a start of its own
    ("micro-batch", 2, True),  # within the first step: nothing is saved yet
    ("micro-batch", 18, False),  # half-way through step 5
    ("evaluation", 2, False),
    ("file of a save", 2, True),  # the model is written, the training state is not
    ("flush", 6, True),  # all is written, not all of it is flushed
    ("retention", 1, True),  # the checkpoint stands, the older ones are not pruned yet
    ("log", 4, True),
    ("removal", 1, False),
    ("sample", 1, False),
    ("whole file", 3, True),  # final/ stands, metrics.json does not
    ("removal", 1, False),  # the old final/ is gone, the new one not in its place
]


def test_a_run_killed_at_any_point_ends_like_any_other(reference: Path, folder: Path) -> None:
    for where, nth, before in DEATHS:
        (end,) = launch(folder, small(), functools.partial(die, where, nth, before))
        assert end.code == -signal.SIGKILL, (where, end)
        with (folder / "run" / "log.jsonl").open("a") as log:
            log.write('{"kind": "train", "step": 1, "lo')  # a line torn by the kill
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    assert trace(folder / "run") == trace(reference / "run")
    assert not list((folder / "run").rglob(".tmp-*"))


def test_a_run_killed_at_random_moments(reference: Path, folder: Path) -> None:
    draw = random.Random(7)
    for _ in range(5):
        (process,) = start(folder, small())
        process.process.join(draw.uniform(0.2, 1.2))
        process.process.kill()
        process.end()
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    assert trace(folder / "run") == trace(reference / "run")


# --- SIGTERM and SIGINT

TERM, INT = signal.SIGTERM, signal.SIGINT
STOPS = [  # where, the exit code, the step whose checkpoint must stand, what else the start says
    ("micro-batch", 1, (TERM,), 143, None),  # nothing done yet, nothing to save
    ("start", 1, (INT, TERM), 130, None),
    ("micro-batch", 6, (INT, INT, INT), 130, 1),  # half-way through step 2
    ("evaluation", 2, (TERM, TERM, INT), 143, 3),
    ("file of a save", 2, (TERM, TERM), 143, 3),  # a save under way is joined
    ("sample", 1, (TERM,), 143, 6),
    ("micro-batch", 7, (TERM,), 143, 7),
]


def test_a_stopped_run_saves_its_last_step_and_resumes(reference: Path, folder: Path) -> None:
    for where, nth, numbers, code, step in STOPS:
        (end,) = launch(folder, small(), functools.partial(receive, where, nth, numbers))
        assert (end.code, end.err) == (code, ""), (where, end)
        assert max(checkpoint_steps(folder / "run"), default=None) == step, (where, end.out)
        assert end.out.count("saved run/checkpoints/") == (step is not None), "a step is saved once"
        assert max((x["step"] for x in log_of(folder / "run", "train")), default=None) == step
    (end,) = launch(folder, small(), functools.partial(receive, "whole file", 3, (TERM,)))
    # The signal comes too late: the run is finished.
    assert end.code == 0 and "resumed from step-00000007" in end.out, end
    assert trace(folder / "run") == trace(reference / "run")


def fail_of(where: str, nth: int, number: signal.Signals) -> None:
    """A signal to the whole process group also ends a compiler, and this process only sees an
    error."""
    from engine.optim import Optimizers

    def act() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        except BaseException as stop:
            raise OSError("wrapped") from stop
        raise subprocess.CalledProcessError(-number, "C++ compile error")

    owner, name = (Optimizers, "step") if where == "update" else point(where)
    at_call(owner, name, nth, act, before=where != "update")


FAILURES = [  # where, the exit code, the step whose checkpoint must stand
    ("start", 1, TERM, 143, None),  # nothing is done yet, and the signal is an exception
    ("micro-batch", 1, INT, 130, None),
    ("micro-batch", 6, INT, 130, 1),
    ("evaluation", 2, TERM, 143, 3),
    ("update", 1, TERM, 143, 3),  # some parameters may have been updated, so nothing is saved
]


def test_an_error_after_a_signal_counts_as_a_stop(reference: Path, folder: Path) -> None:
    for where, nth, number, code, step in FAILURES:
        (end,) = launch(folder, small(), functools.partial(fail_of, where, nth, number))
        assert (end.code, end.err) == (code, ""), (where, end)
        assert max(checkpoint_steps(folder / "run"), default=None) == step, (where, end.out)
    (end,) = launch(folder, small())
    assert end.code == 0, end.err
    assert trace(folder / "run") == trace(reference / "run")


@pytest.mark.parametrize(("where", "save_every"), [("micro-batch", 4), ("evaluation", 1)])
def test_stopping_a_run_does_not_change_its_best_model(
    folder: Path, where: str, save_every: int
) -> None:
    """The rate ruins the model, so step 1 is the best. The run is stopped after that step, between
    two saves, or during its evaluation."""
    words = small("--steps 8 --eval-every 1 --save-every", save_every, "--keep 1 --sample-every 0")
    words += ["--lr", "0.1", "--clip", "0"]
    launch(folder, [*words, "--out", "whole"])
    (end,) = launch(folder, words, functools.partial(receive, where, 5, (TERM,)))
    assert end.code == 143 and checkpoint_steps(folder / "run") == [1]
    (end,) = launch(folder, words)
    assert end.code == 0 and trace(folder / "run") == trace(folder / "whole")
    best = min(log_of(folder / "run", "eval"), key=lambda x: x["val_loss"])
    assert best["step"] == 1 and (trace(folder / "run")["final_is_step"] == 1) == (save_every == 1)


def test_two_runs_cannot_share_a_folder(folder: Path) -> None:
    (process,) = start(folder, small(), slow_steps)
    wait_for_steps(folder / "run", 1)
    other = small("--log-every 2")
    end = Launch(folder, other, {}, None, "other").end()
    assert end.code == 2 and end.err.startswith(
        "error: run is in use by a run that is still going"
    ), end
    assert process.process.exitcode is None
    process.process.kill()
    process.end()
    (end,) = launch(folder, other)
    assert end.code == 0 and [x["step"] for x in log_of(folder / "run", "train")] == list(
        range(1, 13)
    )


# --- two ranks


def stop_and_save_slowly(*how: Any) -> None:
    receive(*how)
    at_call(*point("save"), 1, lambda: time.sleep(0.5))


def test_two_ranks_killed_stopped_and_resumed_on_another_number(folder: Path) -> None:
    words = small("--dropout 0")
    for ranks in (1, 2):
        ends = launch(folder, [*words, "--out", f"on{ranks}"], ranks=ranks)
        assert [end.code for end in ends] == [0, 0][:ranks], ends
    ends = launch(folder, words, functools.partial(die, "micro-batch", 9, on=1), ranks=2)
    # Rank 0 does not wait for the dead rank.
    assert [end.code for end in ends] == [1, -signal.SIGKILL], ends
    assert checkpoint_steps(folder / "run") == [3]  # and finishes the save under way
    # Only one rank gets the signal. Both stop at the same point, two micro-batches later.
    for where, nth, on, number, step in (
        ("micro-batch", 3, 1, INT, 5),
        ("evaluation", 2, 0, TERM, 6),
    ):
        processes = start(
            folder,
            words,
            functools.partial(stop_and_save_slowly, where, nth, (number, number), on),
            2,
        )
        silent = processes[1].end()
        assert (silent.code, silent.out) == (128 + number, ""), silent
        assert max(checkpoint_steps(folder / "run")) == step, (
            "torchrun would kill rank 0 soon after rank 1 has left"
        )
        assert processes[0].end().code == 128 + number
    shutil.copytree(folder / "run", folder / "other")
    assert [end.code for end in launch(folder, words, ranks=2)] == [0, 0]
    assert trace(folder / "run") == trace(folder / "on2")
    (end,) = launch(folder, [*words, "--out", "other"])  # the second half on one rank
    assert end.code == 0 and "resumed from step-00000006" in end.out, end
    losses = {
        name: [x["loss"] for x in log_of(folder / name, "train")]
        for name in ("other", "on1", "on2")
    }
    assert losses["other"] == pytest.approx(losses["on1"], rel=1e-5)
    assert losses["on2"] == pytest.approx(losses["on1"], rel=1e-5)


def wait_for_steps(run: Path, steps: int) -> None:
    limit = time.monotonic() + 120
    while not ((run / "log.jsonl").exists() and len(log_of(run, "train")) >= steps):
        assert time.monotonic() < limit, "the run does not get on"
        time.sleep(0.05)


def torchrun(
    folder: Path, patch: str, words: list[str], how: Sequence[str] = ("--standalone",)
) -> Launch:
    """Start two ranks of tests/launch.py, which first calls `patch` of this file."""
    command = [*how, "--nproc_per_node=2", str(REPO / "tests" / "launch.py")]
    command += [f"{__name__}:{patch}", *words]
    return Launch(folder, command, {}, fork_children, "torchrun", "torch.distributed.run")


def nothing() -> None:
    pass


def fault_on_rank_1() -> None:
    def fail() -> None:
        raise ArithmeticError("a fault made for this test")

    # Rank 0 waits, so it is stopped before it has an error of its own.
    act = fail if rank() == 1 else functools.partial(time.sleep, 3)
    at_call(*point("micro-batch"), 5, act)


def test_torchrun_passes_a_signal_to_every_rank(folder: Path) -> None:
    process = torchrun(
        folder, "slow_steps", small("--save-every 0 --eval-every 0 --sample-every 0")
    )
    wait_for_steps(folder / "run", 2)
    os.kill(process.pid, signal.SIGTERM)
    end = process.end()
    assert end.code != 0
    assert [(folder / f"code-of-rank{rank}").read_text() for rank in (0, 1)] == ["143", "143"], end
    assert checkpoint_steps(folder / "run") == [log_of(folder / "run", "train")[-1]["step"]]


def test_a_fault_on_one_rank_ends_all_and_shows_its_traceback(folder: Path) -> None:
    began = time.monotonic()
    end = torchrun(folder, "fault_on_rank_1", small()).end()
    assert end.code != 0 and time.monotonic() - began < 60
    report = end.err.split("Root Cause")[1]
    assert (
        "rank      : 1" in report
        and "ArithmeticError: a fault made for this test" in report
        and "_backward" in report
    )


def test_many_ranks_print_a_mistake_once(folder: Path) -> None:
    end = torchrun(folder, "nothing", small("--batch-tokens 100")).end()
    assert end.code != 0
    lines = [line for line in end.err.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: --batch-tokens 100 is not divisible by 2 ranks x 16 tokens; use --batch-tokens 96"
    ]
    assert "UserError" not in end.err, "torchrun shows its own traceback, and none of ours"
    assert [(folder / f"code-of-rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


# --- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, which holds two checkpoints of these runs but not three."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_the_older_checkpoints(reference: Path, folder: Path, disk: Path) -> None:
    (end,) = launch(folder, small("--out disk/run --keep 9"))
    run = disk / "run"
    assert end.code == 2 and "Traceback" not in end.err, end
    assert (
        end.err.startswith("error: the results of the run could not be written")
        and end.err.count("\n") == 1
    )
    assert [x["step"] for x in log_of(run, "train")] == list(range(1, 13))
    warnings = log_of(run, "warning")
    assert [x["step"] for x in warnings] == [0, 9, 12] and "the run may take" in warnings[0]["text"]
    assert checkpoint_steps(run) == [3, 6]
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
    (end,) = launch(folder, small("--out disk/run"))
    assert (
        end.code == 2
        and end.err == "error: cannot write to --out disk/run: No space left on device\n"
    ), end
    subprocess.run(["mount", "-o", "remount,size=30m", str(disk)], check=True)
    (end,) = launch(folder, small("--out disk/run"))
    assert end.code == 0 and "resumed from step-00000006" in end.out, end
    assert trace(run) == trace(reference / "run")


def no_room_for_the_log() -> None:
    from engine.log import RunLog

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_call(RunLog, "open", 1, fail)


def test_a_log_that_cannot_be_opened_is_a_one_line_error(folder: Path) -> None:
    (end,) = launch(folder, small(), no_room_for_the_log)
    assert end.code == 2 and end.err.count("\n") == 1
    assert end.err.startswith("error: cannot write to --out run: No space left on device; name")


def small_files() -> None:
    """From the second save on, limit files to 600 KiB. The training state needs more."""
    import resource

    at_call(
        *point("save"),
        2,
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600 << 10, resource.RLIM_INFINITY)),
    )


def test_a_checkpoint_that_cannot_be_written_is_a_warning(folder: Path) -> None:
    """Needs no root. The last checkpoint fails too, so the run ends with the error."""
    (end,) = launch(folder, small("--eval-every 0 --sample-every 0"), small_files)
    assert end.code == 2 and "free space" in end.err and "Traceback" not in end.err, end
    assert checkpoint_steps(folder / "run") == [3]
    (end,) = launch(folder, small("--eval-every 0 --sample-every 0"))
    assert end.code == 0 and "resumed from step-00000003" in end.out, end
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 12


# --- torchrun --max-restarts


def die_twice() -> None:
    """Under torchrun, kill rank 1 in the first start, rank 0 in the second, none in the third."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life < 2:
        die("micro-batch", (9, 5)[life], on=(1, 0)[life])


def test_torchrun_restarts_killed_ranks(folder: Path) -> None:
    words = small("--sample-every 0")
    assert [end.code for end in launch(folder, [*words, "--out", "whole"], ranks=2)] == [0, 0]
    how = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=3"]
    # Ranks that hang would do so for ten minutes.
    end = torchrun(folder, "die_twice", words, how).end(timeout=240)
    assert end.code == 0, end
    # The rank that was not killed may save one step more before the launcher stops it.
    resumed = [int(step) for step in re.findall(r"resumed from step-(\d+)", end.out)]
    assert len(resumed) == 2 and min(resumed) >= 3, end.out
    assert "note: if a node joins" not in end.out, end.out
    assert trace(folder / "run") == trace(folder / "whole")
