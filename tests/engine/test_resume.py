"""Resumed runs: what must not change, which options are restored, what is reported, and how a run
is extended."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.cli import parse_typed
from config import TrainConfig, UserError
from engine import resume
from engine.lengths import Extension, Length, extend, spans
from engine.optim import lr_multiplier, span_at
from engine.resume import restore_options
from launch import Ended, checkpoint_steps, die, launch, log_of, small, trace, typed, write_inputs
from storage import checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Iterator[Path]:
    """The same inputs without a run, as the current folder of the tests."""
    for name in ("text.txt", "val.txt", "tokenizer"):
        (tmp_path / name).symlink_to(inputs / name)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def go(folder: Path, *words: Any, kill: tuple[Any, ...] = ()) -> Ended:
    """A run with exactly these words (see `typed`), killed at the point that `kill` names."""
    patch = functools.partial(die, *kill) if kill else None
    return launch(folder, typed(*words), patch)[0]


def cut_to(run: Path, step: int) -> None:
    """Change a run to what a kill after the checkpoint of `step` would have left."""
    for later in [path for path in checkpoint.checkpoints(run) if int(path.name[5:]) > step]:
        shutil.rmtree(later)
    (run / "metrics.json").unlink(missing_ok=True)


QUIET = "--sample-every 0 --eval-every 4 --save-every 4 --keep 9"
CONSTANT = f"{QUIET} --schedule constant"


# --- what must not change


def test_other_validation_data_is_refused_by_name(folder: Path) -> None:
    assert go(folder, *small(QUIET, "--steps 8"), kill=("whole file", 3)).code == -signal.SIGKILL
    cut_to(folder / "run", 4)
    (folder / "other.txt").write_text(
        "another text to validate on, and no word of the first\n" * 20
    )
    end = go(folder, *small(QUIET, "--steps 8 --val-data other.txt"))
    assert end.code == 2 and "run is of another run: val_data (was " in end.err, end
    assert "data (was" not in end.err.replace("val_data (was", ""), "the training data is the same"
    end = go(folder, *small(QUIET, "--steps 8 --without padded-vocab"))
    assert end.code == 2 and "padded_vocabulary (was 384, is 300)" in end.err, end
    (folder / "moved.txt").write_bytes((folder / "val.txt").read_bytes())
    end = go(folder, *small(QUIET, "--steps 8 --val-data moved.txt"))
    assert end.code == 0 and "val-data val.txt -> moved.txt" in end.out, end


def test_a_key_missing_in_an_older_run_is_reported_once(folder: Path) -> None:
    whole = go(folder, *small(QUIET, "--steps 8 --out whole"))
    assert whole.code == 0 and "older version" not in whole.out
    go(folder, *small(QUIET, "--steps 8"), kill=("retention", 1))
    # decontaminate is not used, so there is nothing to report about it
    forget = {"val_data", "task", "tied_head", "padded_vocabulary", "decontaminate"}
    record = json.loads((folder / "run" / "run.json").read_text())
    identity = {k: v for k, v in record["identity"].items() if k not in forget}
    (folder / "run" / "run.json").write_text(json.dumps({"identity": identity}))
    end = go(folder, *small(QUIET, "--steps 8"), kill=("micro-batch", 3))
    told = (
        "started by an older version, which did not record padded_vocabulary, task, tied_head, "
        "val_data: not compared"
    )
    assert end.code == -signal.SIGKILL and end.out.count(told) == 1, end
    end = go(folder, *small(QUIET, "--steps 8"))
    assert end.code == 0 and "older version" not in end.out, end
    assert sum(told in line["text"] for line in log_of(folder / "run", "warning")) == 1
    assert trace(folder / "run") == trace(folder / "whole")


# --- what changed


def test_options_that_change_are_logged_once(folder: Path) -> None:
    go(folder, *small(QUIET, "--steps 12"), kill=("retention", 1))
    words = small(QUIET, "--steps 12 --lr 0.002 --clip 0.5 --dropout 0.2 --weight-decay 0")
    end = go(folder, *words, kill=("retention", 1))
    told = ("lr 0.001 -> 0.002", "clip 1.0 -> 0.5", "dropout 0.1 -> 0.2", "weight-decay 0.1 -> 0.0")
    assert all(change in end.out for change in told), end.out
    (line,) = log_of(folder / "run", "warning")
    assert line["step"] == 4 and all(change in line["text"] for change in told)
    assert line["text"].count("->") == len(told), line["text"]
    end = go(folder, *words)
    assert end.code == 0 and "->" not in end.out, end.out
    assert log_of(folder / "run", "warning") == [line]


def test_an_option_that_was_not_typed_keeps_its_value(folder: Path) -> None:
    words = small(QUIET, "--steps 8 --weight-decay 0.3 --without decay-groups --prompts 'a b' c")
    assert go(folder, *words, "--out whole").code == 0
    go(folder, *words, kill=("retention", 1))
    end = go(folder, "--out run")
    assert end.code == 0 and "resumed from step-00000004" in end.out and "->" not in end.out, end
    assert trace(folder / "run") == trace(folder / "whole")
    options = [json.loads((folder / name / "config.json").read_text()) for name in ("run", "whole")]
    assert options[0] | {"out": ""} == options[1] | {"out": ""}
    end = go(folder, "--out run")
    assert end.code == 0 and "run is finished (8 steps)" in end.out


def test_a_finished_run_needs_no_data(folder: Path) -> None:
    words = small("--steps 2 --sample-every 0")
    assert go(folder, *words).code == 0
    (folder / "text.txt").rename(folder / "away.txt")
    for ranks in (1, 2):
        ends = launch(folder, words, ranks=ranks)
        assert [end.code for end in ends] == [0] * ranks, ends
        assert "".join(end.out for end in ends).count("run is finished (2 steps)") == 1
    for other in ("--lr 0.5", "--data gone.txt", "--seed 1", "--extend-to 4", "--resume never"):
        end = go(folder, *words, other)
        assert end.code == 2 and "no such data: " in end.err, end
    (folder / "away.txt").rename(folder / "text.txt")
    (folder / "text.txt").write_text("another text " * 500)
    end = go(folder, *words)
    assert end.code == 2 and "run is of another run: data (was " in end.err, end


def write_run(run: Path, options: dict[str, Any], **record: Any) -> None:
    run.mkdir(parents=True)
    cfg = dataclasses.asdict(TrainConfig(steps=9, out=str(run))) | options
    (run / "config.json").write_text(json.dumps(cfg))
    (run / "run.json").write_text(json.dumps({"identity": {"steps": 9}} | record))


def resumed(run: Path, *words: Any) -> TrainConfig:
    argv = ["--out", str(run), *map(str, words)]
    return restore_options(*parse_typed(TrainConfig, argv))


def test_a_config_file_counts_as_typed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"lr": 0.5, "clip": 3.0, "keep": 7, "document_mask": True})
    (tmp_path / "mine.toml").write_text("clip = 2.0\n")
    cfg = resumed(
        tmp_path / "run", "--config", tmp_path / "mine.toml", "--keep=4", "--no-document-mask"
    )
    assert (cfg.lr, cfg.clip, cfg.keep, cfg.document_mask, cfg.steps) == (0.5, 2.0, 4, False, 9)
    assert resumed(tmp_path / "elsewhere").lr is None


FROM_A_GPU = {
    "device": "auto",
    "precision": "fp16",
    "kernels": "adamw,layer_norm",
    "compile": True,
    "cuda_graphs": True,
}


@pytest.mark.parametrize(
    ("record", "compile"),
    [
        ({}, None),
        (
            {
                "device": "cuda",
                "asked": {
                    "device": "auto",
                    "precision": "auto",
                    "kernels": "auto",
                    "compile": None,
                },
            },
            None,
        ),
        ({"device": "cuda", "asked": {"compile": True, "cuda_graphs": True}}, True),
    ],
)
def test_a_run_moved_from_gpu_to_cpu_chooses_options_again(
    tmp_path: Path, monkeypatch, record, compile
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_run(tmp_path / "run", FROM_A_GPU, **record)
    cfg = resumed(tmp_path / "run")
    chosen = (cfg.device, cfg.precision, cfg.kernels, cfg.compile, cfg.cuda_graphs)
    assert chosen == ("auto", "auto", "auto", compile, False)


def test_a_run_on_the_same_machine_keeps_its_choices(tmp_path: Path) -> None:
    own = {
        "device": "cpu",
        "precision": "bf16",
        "kernels": "torch",
        "compile": True,
        "micro_batch": 3,
    }
    write_run(tmp_path / "run", own, device="cpu")
    cfg = resumed(tmp_path / "run")
    assert (cfg.device, cfg.precision, cfg.kernels, cfg.compile) == ("cpu", "bf16", "torch", True)
    assert cfg.micro_batch == "auto", (
        "the micro-batch goes with the checkpoint, and must suit the ranks"
    )
    assert resumed(tmp_path / "run", "--precision", "fp32").precision == "fp32"


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", "fast"), ("lr", True), ("keep", 1.5), ("schedule", "up"), ("prompts", [1])],
)
def test_a_stored_option_of_the_wrong_type_is_an_error(
    tmp_path: Path, name: str, value: Any
) -> None:
    write_run(tmp_path / "run", {name: value})
    with pytest.raises(
        UserError, match=rf"config\.json of the run has {name} .+, which --{name} cannot be"
    ):
        resumed(tmp_path / "run")


# --- longer runs


@pytest.mark.parametrize(("schedule", "first"), [("constant", 8), ("wsd", 16)])
def test_an_extended_run_equals_one_planned_that_long(
    folder: Path, schedule: str, first: int
) -> None:
    """wsd is stopped before its decay. The extended run is killed too, and resumes with or without
    --extend-to."""
    words = (QUIET, "--schedule", schedule, "--warmup-steps 2 --save-every 8")
    assert go(folder, *small(*words, "--steps 24 --out whole")).code == 0
    end = go(
        folder, *small(*words, "--steps", first), kill=("retention", 1) if schedule == "wsd" else ()
    )
    assert end.code == (0 if schedule == "constant" else -signal.SIGKILL), end
    end = go(folder, "--out", "run", "--extend-to", 24, kill=("micro-batch", 9))
    assert f"extended from {first} to 24 steps at step 8" in end.out, end
    end = go(folder, "--out", "run", "--extend-to", 24, kill=("retention", 1))
    assert (
        end.code == -signal.SIGKILL
        and "extended from" not in end.out
        and "steps 8 to 24" in end.out
    ), end
    end = go(folder, "--out run")
    assert end.code == 0 and "resumed from step-00000016" in end.out, end
    assert trace(folder / "run") == trace(folder / "whole")
    assert sum("extended" in line["text"] for line in log_of(folder / "run", "warning")) == 1
    assert json.loads((folder / "run" / "config.json").read_text())["steps"] == 24
    for again in ([], ["--steps", "24"], ["--extend-to", "24"]):
        assert "run is finished (24 steps)" in go(folder, "--out run", *again).out
    assert "planned for 24 steps already" in go(folder, "--out run --extend-to 20").err


def test_a_decayed_schedule_is_restarted_only_when_asked(folder: Path) -> None:
    assert go(folder, *small(QUIET, "--steps 8")).code == 0
    end = go(folder, *small(QUIET, "--steps 16"))
    assert end.code == 2 and "steps (was 8, is 16)" in end.err and "--extend-to 16" in end.err, end
    assert "--reschedule" in end.err
    end = go(folder, "--out run --extend-to 16")
    assert (
        end.code == 2 and "the cosine schedule decays" in end.err and "add --reschedule" in end.err
    ), end
    assert checkpoint_steps(folder / "run") == [4, 8] and (folder / "run" / "metrics.json").exists()
    end = go(folder, "--out", "run", "--extend-to", 16, "--reschedule", kill=("retention", 1))
    assert end.code == -signal.SIGKILL, end
    # run.json holds the restart of the decay, wherever the run resumes.
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000012")
    end = go(folder, "--out run")
    assert end.code == 0 and "resumed from step-00000008" in end.out, end
    rates = [line["lr"] for line in log_of(folder / "run", "train")]
    assert rates[8] == rates[0] == 1e-3 and rates[8:] == pytest.approx(rates[:8]), rates
    (line,) = log_of(folder / "run", "warning")
    assert (
        line["text"]
        == "extended from 8 to 16 steps at step 8; the decay of the cosine schedule restarts there"
    )
    end = go(folder, "--out run --extend-to 20 --reschedule")
    assert end.code == 0 and log_of(folder / "run", "train")[16]["lr"] == 1e-3, end


def test_a_run_without_a_checkpoint_cannot_be_extended(folder: Path) -> None:
    words = small(CONSTANT, "--save-every 0 --steps 2")
    end = go(folder, *words, "--extend-to 4")
    assert end.code == 2 and "run holds no run to extend" in end.err, end
    assert go(folder, *words).code == 0
    end = go(folder, *words, "--extend-to 4")
    assert (
        end.code == 2
        and "run has no checkpoint to resume from" in end.err
        and end.err.count("\n") == 1
    ), end
    assert "run is finished (2 steps)" in go(folder, *words).out
    end = go(folder, *words, "--reschedule")
    assert end.code == 2 and "add --extend-to STEPS" in end.err


SCHEDULES = ("cosine", "linear", "wsd", "constant", "slanted-triangular")


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 20),
    planned=st.integers(1, 60),
    more=st.integers(1, 60),
    made=st.floats(0, 1),
    reschedule=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_an_extension_changes_no_rate_of_the_past(
    schedule, warmup, planned, more, made, reschedule
) -> None:
    step, to = round(made * planned), planned + more
    before = [Length(0, planned)]

    def rates(lengths: list[Length], until: int) -> list[float]:
        over = spans(lengths)
        return [lr_multiplier(s, span_at(s, over), warmup, schedule, 0.1) for s in range(until)]

    try:
        after = extend(before, step, Extension(to, reschedule, schedule, warmup, 0.1))
    except UserError:
        assert not reschedule and schedule != "constant"
        stable = rates(before, step) == rates([Length(0, to)], step)
        assert schedule != "wsd" or not stable
        return
    assert rates(after, step) == rates(before, step) and after[-1].steps == to
    if not after[-1].rescheduled:
        assert rates(after, to) == rates([Length(0, to)], to)
    elif schedule != "slanted-triangular" and step >= warmup:
        assert rates(after, to)[step] == 1.0
    assert extend(after, step, Extension(to, reschedule, schedule, warmup, 0.1)) == after


def test_every_option_of_a_start_and_machine_exists() -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert {*resume.START_OPTIONS, *resume.MACHINE_OPTIONS} <= names
