"""tools.verify on tiny runs: the same bits, and every kind of difference that it must find."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from base.files import sha256
from base.machine import cores
from engine.digest import start_digest
from launch import Ended, launch, small, write_inputs
from toy_runs import run_well

STATE = "training_state.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 6 steps and checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    write_inputs(folder)
    (end,) = launch(folder, small("--steps 6 --sample-every 0"))
    assert end.code == 0, end.err
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def verify(folder: Path, *words: Any) -> Ended:
    (end,) = launch(folder, [str(word) for word in ("run", *words)], program="tools.verify")
    return end


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_replay_is_the_same_and_writes_nothing_into_the_run(copied: Path) -> None:
    before = files_of(copied / "run")
    end = verify(copied)
    assert end.code == 0, end
    assert "bit for bit the same for 3 steps (4 to 6)" in end.out
    assert files_of(copied / "run") == before
    end = verify(copied, "--from", 0, "--steps", 1)
    assert end.code == 0 and "bit for bit the same for 1 steps (1 to 1)" in end.out


def test_a_changed_token_of_the_corpus_is_named(copied: Path) -> None:
    text = (copied / "text.txt").read_text()
    (copied / "text.txt").write_text(text.replace("alpha", "gamma", 1))
    end = verify(copied, "--from", 0)
    assert end.code == 1, end
    assert "differs: data was" in end.out and "different: step 1: batch was" in end.out


def test_a_changed_learning_rate_is_named(copied: Path) -> None:
    config = copied / "run" / "config.json"
    options = json.loads(config.read_text())
    config.write_text(json.dumps(options | {"lr": 2 * options["lr"]}))
    end = verify(copied)
    assert end.code == 1 and "different: step 4: lr was" in end.out, end


def test_a_changed_weight_of_a_checkpoint_is_found(copied: Path) -> None:
    folder = copied / "run" / "checkpoints" / "step-00000003"
    tensors = load_file(folder / STATE)
    tensors["model.transformer.wpe.weight"][0, 0] += 1e-6
    save_file(tensors, folder / STATE)
    end = verify(copied)
    assert end.code == 2 and "is damaged" in end.err and end.err.count("\n") == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    size = (folder / STATE).stat().st_size
    manifest["files"][STATE] = {"bytes": size, "sha256": sha256(folder / STATE)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    end = verify(copied)
    assert end.code == 1 and "the checkpoint was changed" in end.out, end


def test_other_hardware_is_compared_within_a_tolerance(copied: Path) -> None:
    record = json.loads((copied / "run" / "run.json").read_text())
    (copied / "run" / "run.json").write_text(json.dumps(record | {"hardware": "a CPU of 1999"}))
    end = verify(copied, "--steps", 1)
    assert end.code == 0, end
    assert "hardware was a CPU of 1999" in end.out and "the same within 0.001" in end.out


@pytest.fixture(scope="module")
def on_three(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on three ranks. How DDP divides the gradients does not show on two."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copytree(trained, folder, dirs_exist_ok=True, ignore=lambda *_: ["run"])
    words = small("--steps 6 --sample-every 0 --batch-tokens 96 --eval-every 0")
    assert [end.code for end in launch(folder, words, ranks=3)] == [0, 0, 0]
    return folder


def verify_on_three(folder: Path) -> tuple[list[int | None], str]:
    ends = launch(folder, ["run", "--from", "3"], ranks=3, program="tools.verify")
    assert not any(end.out + end.err for end in ends[1:])
    return [end.code for end in ends], ends[0].out


def test_a_run_of_three_ranks_is_the_same_bit_for_bit(on_three: Path) -> None:
    before = files_of(on_three / "run")
    codes, out = verify_on_three(on_three)
    assert codes == [0, 0, 0] and "bit for bit the same for 3 steps (4 to 6)" in out, out
    assert files_of(on_three / "run") == before
    (text := on_three / "text.txt").write_text(text.read_text().replace("alpha", "gamma", 1))
    codes, out = verify_on_three(on_three)
    assert codes[0] == 1 and "differs: data was" in out and "different: step " in out, out


def test_verify_starts_as_many_processes_as_the_run_had(
    run, trained: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["run"])
    words = small("--steps 4 --save-every 2 --eval-every 0 --sample-every 0")
    assert [end.code for end in launch(tmp_path, words, ranks=2)] == [0, 0]
    found = run("-m", "tools.verify", "run")
    same = "bit for bit the same for 2 steps (3 to 4)"
    alone = "this machine has 1 core: replaying on one"
    assert found.returncode == 0 and (same if cores() > 1 else alone) in found.stdout, found
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    slow = [sys.executable, "-m", "tools.verify", "run", "--from", "0"]
    with subprocess.Popen(slow, cwd=tmp_path) as process:
        while not any(scratch.iterdir()):
            time.sleep(0.02)
        process.terminate()
    assert process.returncode == 143 and not any(scratch.iterdir())
    (tmp_path / "text.txt").unlink()
    found = run("-m", "tools.verify", "run")
    assert found.returncode == 2 and found.stderr.count("\n") == 1, found
    assert "no such data: text.txt" in found.stderr


def test_a_run_without_a_replayable_checkpoint_is_refused(copied: Path) -> None:
    shutil.rmtree(copied / "run" / "checkpoints" / "step-00000003")
    end = verify(copied)
    assert end.code == 2 and "no checkpoint with logged steps after it" in end.err
    end = verify(copied, "--from", 5)
    assert end.code == 2 and "no such checkpoint" in end.err
    shutil.rmtree(copied / "run")
    end = verify(copied)
    assert end.code == 2 and "run holds no run" in end.err and end.err.count("\n") == 1


@pytest.mark.parametrize("task", ["sentiment", "lyrics"])
def test_a_fine_tuning_run_is_verified(trained: Path, tmp_path: Path, task: str) -> None:
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    run_well(task, tmp_path, "--steps 4 --save-every 2 --eval-every 2")
    end = verify(tmp_path)
    assert end.code == 0 and "bit for bit the same for 2 steps (3 to 4)" in end.out, end


def test_a_digest_sees_a_flipped_bit_a_swap_and_a_name() -> None:
    weight = torch.randn(7, 5)
    digest = start_digest({"w": weight})()
    assert digest == start_digest({"w": weight.clone()})()
    flipped, swapped = weight.clone(), weight.clone()
    flipped.view(torch.int32)[6, 4] ^= 1
    swapped[0, 0], swapped[6, 4] = weight[6, 4], weight[0, 0]
    padded = torch.cat([weight, torch.zeros(3, 5)])
    assert start_digest({"w": padded})() == digest
    assert len({digest, *(start_digest({"w": t})() for t in (flipped, swapped))}) == 3
    assert start_digest({"v": weight})() != digest


def test_the_digest_of_a_large_tensor_does_not_depend_on_chunks(monkeypatch) -> None:
    weight = torch.randn(100)
    whole = start_digest({"w": weight})()
    monkeypatch.setattr("engine.digest.CHUNK", 7)
    assert start_digest({"w": weight})() == whole
