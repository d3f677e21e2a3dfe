"""Checkpoint folders are complete or absent, verified, pruned, and written during training.

The log of a run is tested here too.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from engine import start
from engine.log import RunLog
from launch import checkpoint_steps, die, launch, log_of, small, trace, write_inputs
from storage import checkpoint, weights


def write_texts(**texts: str) -> Callable[[Path], None]:
    """A `fill` for write_folder: name_suffix=text."""

    def fill(folder: Path) -> None:
        for name, text in texts.items():
            (folder / ".".join(name.rsplit("_", 1))).write_text(text)

    return fill


def no_room(folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


# --- whole folders


def test_a_folder_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "final"
    assert checkpoint.write_folder(folder, write_texts(a_txt="old", b_txt="old")) == 6
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_folder(folder, no_room)
    assert checkpoint.find_damage(folder) is None and (folder / "a.txt").read_text() == "old"
    checkpoint.write_folder(folder, write_texts(a_txt="new"))
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "manifest.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["final"], "nothing temporary stays"
    entry = json.loads((folder / "manifest.json").read_text())["files"]["a.txt"]
    assert entry == {"bytes": 3, "sha256": checkpoint.sha256(folder / "a.txt")}


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_may_not_flush_folders(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or not flushes_files:
            raise OSError(reason, os.strerror(reason))

    def fill(folder: Path) -> None:
        (folder / "a").write_text("b")

    flushes_files = True
    monkeypatch.setattr(os, "fsync", refuse)
    checkpoint.write_folder(tmp_path / "whole", fill)
    assert checkpoint.find_damage(tmp_path / "whole") is None
    flushes_files = False
    with pytest.raises(OSError, match=re.escape(os.strerror(reason))):
        checkpoint.write_folder(tmp_path / "lost", fill)


def test_files_are_flushed_before_the_folder_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(
        checkpoint, "flush", lambda path: flushed.append(f"{path.relative_to(tmp_path)}")
    )
    checkpoint.write_folder(tmp_path / "step", write_texts(a_txt="a"))
    inside = [".tmp-step/a.txt", ".tmp-step/manifest.json", ".tmp-step"]
    assert flushed == [*inside, "."], "the parent, which holds the new name, comes last"


def test_an_interrupted_removal_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step"
    checkpoint.write_folder(folder, write_texts(a_txt="old"))

    def killed(path: Path, ignore_errors: bool) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._remove(folder)
    assert [path.name[: len(checkpoint.TEMPORARY)] for path in tmp_path.iterdir()] == [
        checkpoint.TEMPORARY
    ]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    "no folder": (shutil.rmtree, "it has no manifest.json"),
    "torn manifest": (
        lambda f: (f / "manifest.json").write_text('{"files": {'),
        "not that of a checkpoint",
    ),
    "foreign manifest": (
        lambda f: (f / "manifest.json").write_text('{"files": [1]}'),
        "not that of a checkpoint",
    ),
    "binary manifest": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\0"),
        "not that of a checkpoint",
    ),
    "missing file": (lambda f: (f / "b.txt").unlink(), "b.txt is missing"),
    "truncated file": (lambda f: (f / "b.txt").write_text("bb"), "b.txt has 2 bytes, not 3"),
    "flipped byte": (
        lambda f: (f / "a.txt").write_text("aba"),
        "a.txt is damaged (its sha256 differs)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_says_why(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "step"
    checkpoint.write_folder(folder, write_texts(a_txt="aaa", b_txt="bbb"))
    assert checkpoint.find_damage(folder) is None
    break_it, reason = DAMAGES[damage]
    break_it(folder)
    assert reason in (checkpoint.find_damage(folder) or "")


# --- retention


def make_run(run: Path, metrics: dict[int, float | None]) -> None:
    for step, metric in metrics.items():
        meta = json.dumps({"step": step, "best_metric": metric})
        checkpoint.write_folder(
            checkpoint.step_folder(run, step), write_texts(training_state_json=meta)
        )


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    make_run(tmp_path, {1: None, 2: 3.0, 3: 5.0, 4: None, 5: 4.0, 6: 4.5})
    for mode, best in (("max", 3), ("min", 2)):
        assert checkpoint.rank_by_metric(tmp_path, mode)[0][0].name == f"step-{best:08d}"
    checkpoint.prune(tmp_path, 5, 2, "max")
    assert checkpoint_steps(tmp_path) == [3, 4, 5, 6], (
        "6 is later than the step: neither kept nor counted"
    )
    checkpoint.prune(tmp_path, 6, 1, "min")
    assert checkpoint_steps(tmp_path) == [5, 6]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("keep_best", "left"), [(1, [3, 7]), (2, [2, 3, 7]), (3, [2, 3, 6, 7]), (9, [2, 3, 5, 6, 7])]
)
def test_several_of_the_best_are_kept(tmp_path: Path, keep_best: int, left: list[int]) -> None:
    make_run(tmp_path, {1: None, 2: 4.0, 3: 5.0, 4: None, 5: 1.0, 6: 2.0, 7: None})
    checkpoint.prune(tmp_path, 7, 1, "max", keep_best)
    assert checkpoint_steps(tmp_path) == left


def test_checkpoints_without_a_metric_are_not_ranked(tmp_path: Path) -> None:
    make_run(tmp_path, {1: None, 2: None})
    assert checkpoint.rank_by_metric(tmp_path, "min") == []


# --- the user's own files


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


NOT_OURS = (
    "step-00000002-backup",
    "step-2",
    "step-000000002",
    "step-0000000a",
    "old-step-00000002",
    "notes",
    "best",
)


@given(st.sets(st.sampled_from(NOT_OURS)), st.integers(1, 3), st.booleans())
@settings(max_examples=20, deadline=None)
def test_other_folders_are_neither_read_nor_deleted(names, keep, with_link) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary)
        make_run(run, {1: 1.0, 2: 5.0, 3: 4.0, 4: 3.0})
        folder = run / "checkpoints"
        for name in names:
            shutil.copytree(folder / "step-00000002", folder / name)
        # a copy of a checkpoint, which holds another step than its name says
        shutil.copytree(folder / "step-00000002", folder / "step-00000099")
        (folder / ".tmp-mine").mkdir()
        (folder / ".tmp-mine" / "a.txt").write_text("mine")
        (run / ".tmp-notes").write_text("mine")
        if with_link:
            (folder / "step-00000000").symlink_to(
                folder / "step-00000003", target_is_directory=True
            )
        told: list[str] = []
        assert checkpoint.newest_sound(run, told.append) == checkpoint.step_folder(run, 4)
        assert told == [
            f"skipping {folder}/step-00000099: it is a copy of the checkpoint of step 2"
        ]
        checkpoint.remove_leftovers(run)
        checkpoint.prune(run, 99, keep, "min")
        assert checkpoint.rank_by_metric(run, "max")[-1][0] == checkpoint.step_folder(run, 1), (
            "the best of those kept"
        )
        left = {path.name for path in folder.iterdir()}
        ours = {f"step-{step:08d}" for step in {1, *range(5 - keep, 5)}}
        assert left == ours | names | {"step-00000099", ".tmp-mine"} | (
            {"step-00000000"} if with_link else set()
        )
        assert all(
            contents(folder / name).keys() == {"training_state.json", "manifest.json"}
            for name in names
        )
        assert (run / ".tmp-notes").exists()


def test_files_of_a_user_in_a_checkpoint_are_kept(tmp_path: Path) -> None:
    make_run(tmp_path, {1: None, 2: None})
    old = checkpoint.step_folder(tmp_path, 1)
    (old / "plots").mkdir()
    (old / "plots" / "loss.txt").write_text("mine")
    (old / "notes.txt").write_text("mine")
    told: list[str] = []
    checkpoint.prune(tmp_path, 2, 1, "min", say=told.append)
    kept = tmp_path / "checkpoints" / "kept-step-00000001"
    assert contents(kept) == {"plots/loss.txt": "mine", "notes.txt": "mine"}
    assert told == [f"{old} held files that this run did not write; they are now in {kept}"]
    assert checkpoint_steps(tmp_path) == [2]


def test_a_final_folder_of_the_user_is_moved_aside(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for text in ("first", "second"):
        final.mkdir()
        (final / "a.txt").write_text(text)
        checkpoint.write_folder(final, write_texts(b_txt="ours"))
        assert (final / "b.txt").read_text() == "ours" and not (final / "a.txt").exists()
        shutil.rmtree(final)
    assert contents(tmp_path / "kept-final") == {"a.txt": "first"}
    assert contents(tmp_path / "kept-final-2") == {"a.txt": "second"}


@pytest.mark.parametrize("killed_at", ["rename", "rmtree"])
def test_an_interrupted_removal_keeps_files_of_a_user(
    tmp_path: Path, monkeypatch, killed_at: str
) -> None:
    make_run(tmp_path, {1: None})
    folder = checkpoint.step_folder(tmp_path, 1)
    (folder / "notes.txt").write_text("mine")
    owner = checkpoint.shutil if killed_at == "rmtree" else Path
    real = getattr(owner, killed_at)

    def killed(path: Path, *args: Any, **how: Any) -> None:
        if killed_at == "rmtree" and not path.exists():
            return
        if killed_at == "rename":
            real(path, *args, **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, killed_at, killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint._remove(folder)
    checkpoint.remove_leftovers(tmp_path)
    (kept,) = tmp_path.rglob("notes.txt")
    assert kept.read_text() == "mine" and not list(tmp_path.rglob(".tmp-*"))
    assert not checkpoint.checkpoints(tmp_path)


# --- modes


UMASK = 0o026  # gives the modes 640 and 751, which no library sets by itself


def set_umask() -> None:
    os.umask(UMASK)


def test_every_file_has_the_mode_that_the_umask_allows(finished: Path, tmp_path: Path) -> None:
    for name in ("text.txt", "val.txt", "tokenizer"):
        (tmp_path / name).symlink_to(finished / name)
    words = small("--steps 2 --sample-every 0")
    (end,) = launch(tmp_path, words, set_umask)
    assert end.code == 0, end.err
    rows = [f"{label},the word {label} of row {n}" for n in range(4) for label in (0, 1)]
    (tmp_path / "rows.csv").write_text("\n".join(["label,text", *rows]))
    words = [
        "--init",
        "run",
        "--method",
        "lora",
        "--data",
        "rows.csv",
        "--predict",
        "rows.csv",
        "--device",
        "cpu",
    ]
    words += ["--epochs", "1", "--out", "tuned"]
    (end,) = launch(tmp_path, words, set_umask, program="finetune.sentiment")
    assert end.code == 0, end.err
    written = [path for name in ("run", "tuned", "cache") for path in (tmp_path / name).rglob("*")]
    modes = {path: path.stat().st_mode & 0o777 for path in written}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~UMASK for path in written}
    assert len(modes) > 40 and modes == expected


def test_saving_over_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"")
    path.chmod(0o640)
    weights.save_tensors({"w": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o777 == 0o640


# --- the writer


class Written:
    """A Saver over a run folder, and what it reported."""

    def __init__(self, run: Path, export: Callable[..., Any] = lambda *_: None):
        self.facts: list[dict[str, Any]] = []
        self.saver = checkpoint.Saver(run, export, lambda **facts: self.facts.append(facts))

    def save(self, step: int, tensors: dict[str, torch.Tensor]) -> None:
        self.saver.save(tensors, {"step": step, "best_metric": None}, lambda: None)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    gate = threading.Event()
    written = Written(tmp_path, lambda *_: gate.wait(10))
    weight = torch.arange(4.0)
    written.save(7, {"model.w": weight})
    assert not written.facts and not checkpoint_steps(tmp_path), (
        "save returned before anything was written"
    )
    weight += 100  # the next optimizer step
    gate.set()
    written.saver.join()
    tensors, meta = checkpoint.read_state(checkpoint.step_folder(tmp_path, 7))
    assert tensors["model.w"].tolist() == [0, 1, 2, 3] and meta["step"] == 7
    (facts,) = written.facts
    assert (
        facts["step"] == 7
        and 0 <= facts["blocked_ms"] < 1e4
        and facts["write_ms"] > 0
        and facts["bytes"] > 0
    )


def test_a_failed_save_keeps_older_checkpoints(tmp_path: Path) -> None:
    fails = iter([False, True, False])
    written = Written(tmp_path, lambda _, folder: no_room(folder) if next(fails) else None)
    for step in (1, 2, 3):
        written.save(step, {"model.w": torch.full((2,), float(step))})
        written.saver.join()
        assert (written.saver.error is not None) == (step == 2)
    assert ["error" in facts for facts in written.facts] == [False, True, False]
    assert "No space left" in written.facts[1]["error"]
    assert [checkpoint.find_damage(folder) for folder in checkpoint.checkpoints(tmp_path)] == [
        None,
        None,
    ]
    assert checkpoint_steps(tmp_path) == [1, 3]


# --- claiming a run's folder

IDENTITY = {"seed": 1, "steps": 9, "data": "a" * 64}


def open_run(run: Path, resume: str = "auto", **changes: object) -> start.Start:
    return start.open_run(run, resume, IDENTITY | changes, {}, lambda text: None)


def test_options_that_contradict_the_folder_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert open_run(run) == start.Start()
    with pytest.raises(
        UserError,
        match=r"run is of another run: seed \(was 1, is 2\), data \(was aaaaaaaaaaaa, is bbb\)",
    ):
        open_run(run, seed=2, data="bbb")
    with pytest.raises(UserError, match="already holds a run"):
        open_run(run, resume="never")
    assert open_run(run) == start.Start()


@pytest.mark.parametrize("name", checkpoint.WRITTEN)
def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / ".tmp-mine").write_text("mine")
    with pytest.raises(UserError, match=f"holds a {name} that does not belong to a run"):
        open_run(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: "mine",
        ".tmp-mine": "mine",
    }


def test_leftovers_of_a_kill_are_removed_at_the_next_start(tmp_path: Path) -> None:
    open_run(tmp_path)
    (tmp_path / ".tmp-run.json").write_text("{")
    (tmp_path / "checkpoints" / ".tmp-step-00000003").mkdir(parents=True)
    open_run(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_folder_is_used_by_one_process_at_a_time(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    for _ in range(2):
        with (
            start.claim_folder(run),
            pytest.raises(UserError, match="in use"),
            start.claim_folder(run),
        ):
            pass
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(UserError, match="cannot write to --out"),
        start.claim_folder(tmp_path / "file"),
    ):
        pass


# --- the log


def test_a_full_disk_delays_the_log_and_loses_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(enabled=True)
    log.open(tmp_path, None)
    file = log.file
    log.record("train", {"step": 1})
    log.file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        log.record("train", {"step": step})
    log.file.close()
    log.file = file
    log.record("train", {"step": 4, "loss": float("nan")})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss"] is None
    assert capsys.readouterr().out.count("warning: log.jsonl cannot be written") == 1


def test_a_resumed_log_is_cut_at_the_checkpoint(tmp_path: Path) -> None:
    kinds = [
        ("train", 1),
        ("eval", 1),
        ("train", 2),
        ("eval", 2),
        ("sample", 2),
        ("train", 3),
        ("warning", None),
    ]
    lines = [json.dumps({"kind": kind, "step": step}) for kind, step in kinds]
    for done, last in (((), [("train", 2)]), (("eval",), [("train", 2), ("eval", 2)])):
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
        log = RunLog(enabled=True)
        log.open(tmp_path, 2, done)
        log.close()
        kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [(x["kind"], x["step"]) for x in kept] == [*kinds[:2], *last, ("warning", None)]


# --- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs and a finished run with checkpoints 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    (end,) = launch(folder, small("--keep 3"))
    assert end.code == 0, end.err
    return folder


@pytest.fixture
def cut_off(finished: Path, tmp_path: Path) -> Path:
    """The same run, as after a kill just before its end."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (folder / "run" / "metrics.json").unlink()
    return folder


def test_a_checkpoint_has_no_pickle_and_logs_its_cost(finished: Path) -> None:
    run = finished / "run"
    assert checkpoint_steps(run) == [6, 9, 12]
    files = {path.name for path in checkpoint.step_folder(run, 12).iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "manifest.json",
        "tokenizer.json",
        checkpoint.META,
    } <= files
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".txt"}
    saves = log_of(run, "checkpoint")
    assert [x["step"] for x in saves] == [3, 6, 9, 12]
    assert all(x["blocked_ms"] > 0 and x["write_ms"] > 0 and x["bytes"] > 1e6 for x in saves)


def test_a_finished_run_says_so_and_is_left_alone(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")}
    (end,) = launch(finished, small("--keep 1"))
    assert end.code == 0 and "run is finished (12 steps): its model is run/final" in end.out
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")} == before


def test_a_finished_run_without_checkpoints_says_so_too(finished: Path) -> None:
    words = small("--steps 2 --save-every 0 --eval-every 0 --sample-every 0 --out unsaved")
    assert [launch(finished, words)[0].code for _ in range(2)] == [0, 0]
    (end,) = launch(finished, words)
    assert end.code == 0 and "unsaved is finished" in end.out and "step 1/2" not in end.out


def test_damaged_checkpoints_are_skipped_with_the_reason(finished: Path, cut_off: Path) -> None:
    run = cut_off / "run"
    (checkpoint.step_folder(run, 12) / "manifest.json").unlink()
    state = checkpoint.step_folder(run, 9) / checkpoint.STATE
    state.write_bytes(state.read_bytes()[:-1] + b"\0")
    (end,) = launch(
        cut_off, small("--keep 1"), functools.partial(die, "retention", 1, before=False)
    )
    assert end.code == -signal.SIGKILL and "resumed from step-00000006" in end.out, end
    assert "skipping run/checkpoints/step-00000012: it has no manifest.json" in end.out
    assert f"skipping run/checkpoints/step-00000009: {checkpoint.STATE} is damaged" in end.out
    (end,) = launch(cut_off, small("--keep 3"))
    assert end.code == 0 and "resumed from step-00000009" in end.out, (
        "retention may not prefer the damaged one"
    )
    assert trace(run) == trace(finished / "run")


def test_final_is_the_best_model_unless_it_is_damaged(cut_off: Path) -> None:
    """The test makes step 6 the best, then damages it. final/ is then the last step, with a
    warning."""
    run = cut_off / "run"
    best = checkpoint.step_folder(run, 6)
    meta = json.loads((best / checkpoint.META).read_text()) | {"best_metric": 0.5}
    weights = {
        path.name: path.read_bytes()
        for path in best.iterdir()
        if path.name not in ("manifest.json", checkpoint.META)
    }

    def fill(folder: Path) -> None:
        for name, data in weights.items():
            (folder / name).write_bytes(data)
        (folder / checkpoint.META).write_text(json.dumps(meta))

    checkpoint.write_folder(best, fill)
    (end,) = launch(cut_off, small("--keep 3"))
    assert end.code == 0 and json.loads((run / "metrics.json").read_text())["final_is_step"] == 6
    assert (run / "final" / "model.safetensors").read_bytes() == weights["model.safetensors"]
    (run / "metrics.json").unlink()
    (best / checkpoint.STATE).write_bytes(b"")
    (end,) = launch(cut_off, small("--keep 3"))
    assert (
        end.code == 0 and "best checkpoint, run/checkpoints/step-00000006, is damaged" in end.out
    ), end
    assert json.loads((run / "metrics.json").read_text())["final_is_step"] == 12


def test_a_run_can_continue_in_another_folder(finished: Path, cut_off: Path) -> None:
    (end,) = launch(cut_off, small("--resume run/checkpoints/step-00000006 --out branch --keep 1"))
    assert end.code == 0 and "resumed from step-00000006" in end.out, end
    assert [x["step"] for x in log_of(cut_off / "branch", "train")] == list(range(7, 13))
    assert trace(cut_off / "branch")["files"] == trace(finished / "run")["files"]
    assert checkpoint_steps(cut_off / "run") == [6, 9, 12]
    (end,) = launch(cut_off, small("--resume run/checkpoints/step-00000006"))
    assert (
        end.code == 2
        and "run holds later checkpoints than step-00000006; choose another --out" in end.err
    )


# --- the CHECKPOINT of a command line


def test_locate_finds_checkpoints_and_refuses_bad_ones(finished: Path, cut_off: Path) -> None:
    run = cut_off / "run"
    assert checkpoint.locate(str(run)) == str(run / "final")
    shutil.rmtree(run / "final")
    assert checkpoint.locate(str(run)) == str(checkpoint.step_folder(run, 12))
    (checkpoint.step_folder(run, 12) / "config.json").write_text("{}")
    assert checkpoint.locate(str(run)) == str(checkpoint.step_folder(run, 9))
    with pytest.raises(UserError, match=r"is damaged: config\.json has 2 bytes"):
        checkpoint.locate(str(checkpoint.step_folder(run, 12)))
    for step in (6, 9):
        (checkpoint.step_folder(run, step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no undamaged checkpoint yet"):
        checkpoint.locate(str(run))
    with pytest.raises(UserError, match="no folder someone/gpt2"):
        checkpoint.locate("someone/gpt2")
