"""Sweeps: the grid, its runs, and what is left after a failure, an interruption or a time limit.

Runs are forks of a process that has torch loaded, so that they start at once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from base.cli import entry_point
from launch import (
    Ended,
    checkpoint_steps,
    fork_children,
    launch,
    log_of,
    slow_steps,
    small,
    start,
    write_inputs,
)
from support import REPO
from tools import sweep
from tools.sweep import SweepConfig, folder_name, plan, read_grid

TRAIN = str(REPO / "train_gpt2.py")
QUIET = ("--sample-every", 0, "--log-every", 0)


def command(grid: str, *more: Any) -> list[str]:
    """A sweep of tiny pretraining runs. `more`: the sweep's options, then -- and the runs'."""
    own, runs = list(map(str, more)), list(map(str, QUIET))
    if "--" in own:
        own, runs = own[: own.index("--")], [*runs, *own[own.index("--") + 1 :]]
    words = iter(small(*runs))
    set_by_sweep = ("--out", *grid.split()[::2])
    pairs = [pair for pair in zip(words, words) if pair[0] not in set_by_sweep]
    return [grid, *own, "--", TRAIN, *itertools.chain(*pairs)]


def run_sweep(folder: Path, *words: str) -> Ended:
    (ended,) = launch(folder, words, fork_children, program="tools.sweep")
    return ended


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


GRID = command("--lr 1e-3,1e-30 --seed 1,2", "--jobs", 2, "--", "--steps", 4, "--eval-every", 2)


@pytest.fixture(scope="module")
def swept(inputs) -> tuple[Path, str]:
    """The folder of a sweep of two rates and two seeds, and what it printed."""
    done = run_sweep(inputs, *GRID)
    assert done.code == 0, done.out + done.err
    return inputs / "sweep", done.out


def test_each_combination_has_a_run_of_its_own(swept) -> None:
    folder, out = swept
    names = [f"lr={lr}_seed={seed}" for lr in ("1e-3", "1e-30") for seed in (1, 2)]
    for name in names:
        options = json.loads((folder / name / "config.json").read_text())
        assert f"lr={options['lr']:g}_seed={options['seed']}".replace("0.001", "1e-3") == name
        assert (folder / name / "metrics.json").is_file() and (folder / f"{name}.txt").is_file()
        assert f"{name} begins" in out and f"{name} finished in 0:" in out
    assert out.startswith("4 runs in sweep: 2 --lr x 2 --seed\n")


def test_a_sweep_ends_in_a_comparison(swept) -> None:
    folder, out = swept
    figures = json.loads((folder / "compare.json").read_text())
    assert [group["metrics"]["val_loss"]["seeds"] for group in figures["groups"]["groups"]] == [
        2,
        2,
    ]
    (found,) = figures["groups"]["differences"]
    assert found["groups"] == ["lr 0.001", "lr 1e-30"] and found["difference"] < 0
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "seeds needed" in out and f"wrote {Path('sweep', 'compare.png')}" in out


def test_the_same_command_skips_finished_runs(inputs, swept) -> None:
    folder, _ = swept
    before = {file: file.stat().st_mtime_ns for file in folder.glob("*/*") if file.is_file()}
    done = run_sweep(inputs, *GRID)
    assert done.code == 0 and "4 finished before and are skipped" in done.out
    assert "begins" not in done.out and "seeds needed" in done.out
    assert before == {
        file: file.stat().st_mtime_ns for file in folder.glob("*/*") if file.is_file()
    }


def test_a_failing_run_does_not_stop_the_others(inputs) -> None:
    words = command("--n-embd 65,64 --lr 1e-3", "--out", "failing", "--", "--steps", 2)
    done = run_sweep(inputs, *words)
    assert done.code == 1
    assert "1 of 2 runs failed" in done.out
    last = done.out.splitlines()[-1]
    assert last.startswith("  n-embd=65_lr=1e-3: error: n_embd 65") and "(exit code 2)" in last
    assert (inputs / "failing" / "n-embd=64_lr=1e-3" / "metrics.json").is_file()


def slow_children() -> None:
    fork_children()
    slow_steps()


def test_an_interrupted_sweep_resumes(inputs) -> None:
    words = command("--lr 1e-3,1e-4", "--out", "stopped", "--", "--save-every", 0)
    (process,) = start(inputs, words, slow_children, program="tools.sweep")
    run = inputs / "stopped" / "lr=1e-3"
    until = time.monotonic() + 120
    while not ((run / "log.jsonl").exists() and len(log_of(run, "train")) >= 2):
        assert time.monotonic() < until, process.out.read_text() + process.err.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    done = process.end()
    assert done.code == 130 and "Traceback" not in done.err
    assert "stopped lr=1e-3; 1 runs have not begun; the same command goes on" in done.out
    assert len(checkpoint_steps(run)) == 1 and not (inputs / "stopped" / "lr=1e-4").exists()
    done = run_sweep(inputs, *words)
    assert done.code == 0, done.out + done.err
    assert "[1/2] lr=1e-3 resumes" in done.out and "[2/2] lr=1e-4 begins" in done.out
    assert [line["step"] for line in log_of(run, "train")] == list(range(1, 13))


def test_no_run_begins_after_the_time_limit(inputs) -> None:
    words = command("--lr 1e-3,1e-4", "--out", "late", "--minutes", 1e-6)
    done = run_sweep(inputs, *words)
    assert done.code == 0
    assert "2 runs have not begun (lr=1e-3, lr=1e-4); the same command goes on" in done.out
    assert not list((inputs / "late").iterdir())


def test_a_task_is_swept_with_paired_tests(inputs) -> None:
    shared = "--preset micro --init scratch --tokenizer tokenizer --steps 1 --batch-size 4"
    words = ["--method full,bitfit", "--out", "methods", "--", "-m", "finetune.sentiment"]
    done = run_sweep(inputs, *words, *shared.split(), "--device", "cpu", "--sample-every", "0")
    assert done.code == 0, done.out + done.err
    (test,) = json.loads((inputs / "methods" / "compare.json").read_text())["tests"]
    assert test["runs"] == ["method=full", "method=bitfit"] and test["rows"] > 0


# --- the grid


def test_values_are_split_at_commas_that_are_not_escaped() -> None:
    grid = read_grid(r"""--data a\,b,c --lr 1,2,1 --prompts 'x y',z --batch_size 4 --lr 3""")
    assert grid == {
        "--data": ["a,b", "c"],
        "--lr": ["1", "2", "3"],
        "--prompts": ["x y", "z"],
        "--batch-size": ["4"],
    }


def test_names_of_folders_are_safe_and_different() -> None:
    names = [folder_name({"--data": value}) for value in ("a/b", "a b", "../a", "é", "x" * 300)]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("=-.") | set("abcdefx0123456789dt") for name in names), names
    assert all("/" not in name and len(name) < 140 for name in names)
    assert folder_name({"--lr": "1e-4", "--seed": "1"}) == "lr=1e-4_seed=1"


def test_the_command_may_use_torchrun_or_a_module() -> None:
    def first(*entry: str) -> list[str]:
        return plan(SweepConfig(grid="--compile true,false", entry=entry))[1][1].words

    out = ["--no-compile", "--out", str(Path("sweep", "compile=false"))]
    assert first(TRAIN, "--steps", "3") == [sys.executable, TRAIN, "--steps", "3", *out]
    assert first("python", TRAIN) == [sys.executable, TRAIN, *out]
    assert first("-m", "finetune.qa") == [sys.executable, "-m", "finetune.qa", *out]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert first("torchrun", "--nproc_per_node=2", TRAIN, "--lr", "1") == [
        *torchrun, TRAIN, "--lr", "1", *out,
    ]  # fmt: skip
    assert first("torchrun", "--nproc_per_node=2", "-m", "finetune.qa") == [
        *torchrun, "-m", "finetune.qa", *out,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stepz 1,2", "--", TRAIN], "unknown option --stepz (did you mean --steps?)"),
        (["--lr 1,x", "--", TRAIN], "--lr is 'x'; it must be a number"),
        (["--lr 1,2", "--", TRAIN, "--stepz", "2"], "unknown option --stepz"),
        (["--lr 1,2", "--", TRAIN, "--lr", "2"], "in the grid and in the command"),
        (["--lr 1,2", "--", TRAIN, "--out", "x"], "--out cannot be given to the runs"),
        (["--dry-run true,false", "--", TRAIN], "--dry-run cannot be given"),
        (["--compile 1,0", "--", TRAIN], "--compile is a flag"),
        (["--lr 1 2", "--", TRAIN], "must be options, each with its values"),
        (["--lr '1,2 ", "--", TRAIN], "cannot be read: No closing quotation"),
        (["--lr 1,2"], "a grid and a command are needed"),
        (["--lr 1,2", "--", "-m"], "no script or module"),
        (["--lr 1,2", "--", "none.py"], "none.py cannot be run"),
        (["--lr 1,2", "--", "-m", "finetune.none"], "finetune.none cannot be run"),
        (["--lr 1,2", "--", str(REPO / "generate.py")], "does not train with this engine"),
        (["--lr 1,2", "--", "torchrun", "--nproc_per_node", "2"], "torchrun: "),
        (["--lr 1,2", "--jobs", "0", "--", TRAIN], "--jobs is 0"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_starts(monkeypatch, tmp_path, words, said) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", *words])
    err = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(err):
        entry_point(sweep.main)
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    text = err.getvalue()
    assert text.startswith("error: ") and text.count("\n") == 1 and said in text, text
