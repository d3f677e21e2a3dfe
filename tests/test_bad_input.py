"""Mistakes of users. Each gives one line that says what is wrong and what to type, and exit code 2.
No file changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from launch import Ended, launch, small, write_inputs
from support import REPO

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, tokenizers, shards and a finished run, in which the tests make
    mistakes."""
    from text.corpus import TextFiles
    from text.prepare import tokenize_to_folder
    from text.tokenizer import load_tokenizer
    from text.tokenizer_training import train_bpe

    folder = tmp_path_factory.mktemp("world")
    write_inputs(folder)
    (end,) = launch(folder, small("--steps 4 --save-every 2 --eval-every 0 --sample-every 0"))
    assert end.code == 0, end.err
    train_bpe(
        ["another text for another tokenizer, another text for another tokenizer"],
        280,
        folder / "other",
    )
    (folder / "shards").mkdir()
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenize_to_folder(
        TextFiles([folder / "text.txt"]), tokenizer, folder / "shards", "text", True, lambda _: None
    )
    (folder / "bare").mkdir()
    shutil.copy(next((folder / "shards").glob("train*.bin")), folder / "bare" / "train_0.bin")
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    """The hash of every file in the folder, except the outputs of launches."""
    files = (
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "cache"
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if not path.name.startswith("rank0.") and "cache" not in path.relative_to(folder).parts
    }


def refused(folder: Path, *words: object) -> str:
    """The error line for the mistake in `words`, after a check of everything else that must
    hold."""
    before = fingerprint(folder)
    (end,) = launch(folder, small(*words))
    return line_of(end, fingerprint(folder) == before)


def line_of(end: Ended, unchanged: bool = True) -> str:
    assert end.code == 2, end
    assert (
        end.err.startswith("error: ") and end.err.count("\n") == 1 and "Traceback" not in end.out
    ), end
    assert unchanged, "a refused command leaves every file as it was"
    return end.err


MISTAKES = {  # options, and parts of the error line
    # data
    "--out new --data nowhere": [
        "no such data: nowhere",
        "python fineweb_prep.py --dataset",
        "--out nowhere",
    ],
    "--out new --data nowhere.txt": ["no such data: nowhere.txt", "--data stdlib"],
    "--out new --data shards --tokenizer other": ["shards were made with", "other"],
    "--out new --data text.txt --tokenizer nowhere": ["no folder nowhere"],
    "--out new --seq-len 4096 --batch-tokens 4096 --micro-batch 1": ["too short", "--seq-len"],
    # shape and batch
    "--out new --n-head 3": ["n_embd 64 is not divisible by n_head 3", "--n-head 2"],
    "--out new --n-layer 0": ["--n-layer is 0; it must be at least 1"],
    "--out new --batch-tokens 100": ["--batch-tokens 100", "1 ranks x 16", "--batch-tokens 96"],
    "--out new --micro-batch 3": ["--micro-batch 3", "8 rows", "use 2"],
    "--out new --micro-batch 0": ["--micro-batch is 0"],
    # numbers and words
    "--out new --steps 0": ["--steps is 0; it must be at least 1"],
    "--out new --steps many": ["--steps is 'many'; it must be a whole number"],
    "--out new --seq-len -5": ["--seq-len is -5"],
    "--out new --lr nan": ["--lr is nan"],
    "--out new --lr inf": ["--lr is inf", "finite"],
    "--out new --dropout 2": ["--dropout is 2"],
    "--out new --clip -1": ["--clip is -1"],
    "--out new --seed 1e3": ["--seed", "1e3"],
    "--out new --optimizer sgd": ["--optimizer", "sgd", "adamw"],
    "--out new --preset huge": ["--preset", "huge", "gpt2-xl"],
    "--out new --stpes 5": ["unknown option --stpes", "did you mean --steps?"],
    "--out new --lr": ["--lr needs a value"],
    "stray": ["unexpected word 'stray'"],
    # what the machine lacks
    "--out new --precision fp16": ["--precision fp16 needs a CUDA GPU", "bf16"],
    "--out new --precision tf32": ["--precision tf32 needs a CUDA GPU", "fp32"],
    "--out new --precision fp8": ["--precision fp8"],
    "--out new --kernels triton --dropout 0": [
        "--kernels triton",
        "needs a CUDA GPU",
        "--kernels torch",
    ],
    "--out new --kernels layernorm": ["--kernels layernorm", "did you mean layer_norm"],
    "--out new --cuda-graphs": ["--cuda-graphs needs a CUDA GPU and --compile"],
    "--out new --without cast-onces": ["--without cast-onces", "did you mean cast-once"],
    # --config
    "--config nowhere.json": ["--config nowhere.json: No such file"],
    "--config text.txt": ["--config text.txt is not valid"],
    "--config": ["--config needs a value"],
    # models and runs
    "--out new --init nowhere": ["no folder nowhere"],
    "--out new --init shards": ["shards"],
    "--out new --init run --seq-len 32": [
        "--seq-len 32 is longer than the 16 positions of --init run",
        "--seq-len 16",
    ],
    "--out new --init run --preset micro": [
        "--init run already determines the shape of the model; leave out --preset"
    ],
    "--out new --init run --tokenizer gpt2x": ["no folder gpt2x"],
    "--out new --resume nowhere": ["--resume nowhere: there is no undamaged checkpoint"],
    "--out new --resume shards": ["--resume shards", "manifest.json"],
    "--out new --resume run/final": ["a model without training state", "--init run/final"],
    "--out new --resume run --seed 1": ["seed (was 1337, is 1)"],
    "--seed 1 --lr 2e-3": ["run is of another run: seed (was 1337, is 1)"],
    "--steps 8 --batch-tokens 64 --micro-batch 2": [
        "steps (was 4, is 8)",
        "batch_tokens (was 128, is 64)",
    ],
    "--n-layer 3 --tokenizer other": ["n_layer (was 1, is 3)", "tokenizer (was "],
    "--resume never": ["run already holds a run", "another --out"],
    "--out run/final": ["run/final holds a config.json", "another --out"],
    "--out text.txt": ["text.txt", "--out"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line(world: Path, mistake: str) -> None:
    line = refused(world, *mistake.split(), *(["--steps", "4"] if "--steps" not in mistake else []))
    assert all(part in line for part in MISTAKES[mistake]), line


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU")
def test_a_device_that_is_not_there(world: Path) -> None:
    assert "--device cuda: this machine (or this build of PyTorch) has none" in refused(
        world, "--device", "cuda"
    )


# --- files that are not what they should be


def write(name: str, data: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def cut(name: str) -> Change:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 7)


def flip(name: str) -> Change:
    """Change one byte in the middle of a file. Size and format stay the same."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def other_model(folder: Path) -> None:
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "n_embd": 8}))


ids = np.full(4000, 60000, "<u2")
STEP = "run/checkpoints/step-00000004"
DAMAGES: dict[str, tuple[Change, str, list[str]]] = {
    "empty text": (write("empty.txt", b""), "--out new --data empty.txt", ["empty.txt is empty"]),
    "short text": (
        write("short.txt", b"alpha beta"),
        "--out new --data short.txt",
        ["too short", "more data"],
    ),
    "truncated shard": (
        cut("bare/train_0.bin"),
        "--out new --data bare",
        ["train_0.bin", "truncated"],
    ),
    "foreign shard": (
        write("bare/train_0.bin", b"\1" * 4000),
        "--out new --data bare",
        ["is a foreign shard"],
    ),
    "ids beyond": (
        write("ids/train.bin", ids.tobytes()),
        "--out new --data ids",
        ["token id 60000, beyond the 300", "--tokenizer"],
    ),
    "not a GPT-2": (other_model, "--out new --init bert", ["bert is not a GPT-2", "'bert'"]),
    "no weights": (
        lambda folder: shutil.copytree(
            folder / "run/final",
            folder / "bare/m",
            ignore=lambda *_: ["model.safetensors", "manifest.json"],
        ),
        "--out new --init bare/m",
        ["neither model.safetensors nor"],
    ),
    "init without manifest": (
        remove(f"{STEP}/manifest.json"),
        f"--out new --init {STEP}",
        ["has no manifest.json"],
    ),
    "init damaged": (
        flip(f"{STEP}/model.safetensors"),
        f"--out new --init {STEP}",
        ["model.safetensors is damaged"],
    ),
    "resume without manifest": (
        remove(f"{STEP}/manifest.json"),
        f"--resume {STEP}",
        ["has no manifest.json"],
    ),
    "resume cut": (
        cut(f"{STEP}/training_state.safetensors"),
        f"--out new --resume {STEP}",
        ["bytes, not"],
    ),
    "no sound checkpoint": (
        lambda folder: (
            [flip(f"run/checkpoints/step-0000000{n}/config.json")(folder) for n in (2, 4)]
            and (folder / "run/metrics.json").unlink()
        ),
        "",
        ["every checkpoint of run is damaged"],
    ),
    "run.json": (write("run/run.json", b"[]"), "", ["run.json does not belong to a run"]),
    "run.json of another program": (
        write("run/run.json", b'{"name": "other"}'),
        "",
        ["run.json does not belong to a run"],
    ),
    "run.json of another version": (
        write("run/run.json", b'{"identity": {}, "lengths": [{"from": 0}]}'),
        "--data gone.txt",
        ["no such data: gone.txt"],
    ),
    "unknown key": (
        write("c.json", b'{"stepz": 4}'),
        "--config c.json",
        ["'stepz'", "not an option here", "did you mean steps?"],
    ),
    "bad JSON": (write("c.json", b'{"steps": 4'), "--config c.json", ["c.json is not valid json"]),
    "bad TOML": (write("c.toml", b"steps = = 4"), "--config c.toml", ["c.toml is not valid toml"]),
    "no object": (
        write("c.json", b"[1, 2]"),
        "--config c.json",
        ["c.json holds no options; write them as an object"],
    ),
    "wrong kind": (
        write("c.json", b'{"warmup_steps": "many"}'),
        "--config c.json",
        ["c.json: warmup_steps is 'many'; it must be a whole number"],
    ),
    "wrong list": (
        write("c.json", b'{"warmup_steps": [1, 2]}'),
        "--config c.json",
        ["c.json: warmup_steps is [1, 2]"],
    ),
    "binary": (write("c.json", b"\xff\xfe\0\1"), "--config c.json", ["c.json is not valid json"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_it_should_be(world: Path, tmp_path: Path, damage: str) -> None:
    change, words, parts = DAMAGES[damage]
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    change(folder)
    words = "--steps 4 " + words
    line = refused(folder, *words.split())
    assert all(part in line for part in parts), line


# --- out of memory


def little_memory() -> None:
    """Limit memory so that a micro-batch of two rows fits, but not one of eight."""
    from engine import fit

    mock.patch.object(fit, "estimate_fits", lambda *_: lambda rows: rows <= 2).start()


def allocation_fails() -> None:
    from engine import step

    def fail(*_: object) -> None:
        raise MemoryError("not to be had")

    mock.patch.object(step.TrainStep, "_backward", fail).start()


def test_out_of_memory_names_an_option_and_a_value_that_fits(world: Path) -> None:
    (end,) = launch(world, small("--out oom --micro-batch 8"), little_memory)
    assert line_of(end) == "error: out of memory with --micro-batch 8; lower --micro-batch to 2\n"
    (end,) = launch(world, small("--out oom --micro-batch 4"), allocation_fails)
    assert line_of(end) == "error: out of memory with --micro-batch 4; lower --micro-batch to 2\n"


# --- a real process


def test_a_plain_python_process(world: Path) -> None:
    """A Python that is not forked by the test also gives the exit code and one line, and a mistyped
    option loads no torch."""
    command = [sys.executable, str(REPO / "train_gpt2.py")]
    for words, part in (
        (["--stpes", "5"], "--steps?"),
        (small("--batch-tokens 100"), "--batch-tokens 96"),
    ):
        end = subprocess.run(
            [*command, *words], cwd=world, capture_output=True, text=True, timeout=120
        )
        assert part in line_of(Ended(end.returncode, end.stdout, end.stderr))
