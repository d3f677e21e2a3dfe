"""Everything but several processes runs on Windows, as far as tests/windows.py imitates it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

import windows
from launch import launch, receive, small, trace, write_inputs
from support import REPO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="imitates Windows on Linux")

COMMANDS = """
tokenizer train --input text.txt --vocab-size 280 --out trained
fineweb_prep --input text.txt --tokenizer trained --shard-tokens 486 --workers 1 --out shards
train_gpt2 --preset micro --n-layer 1 --data shards --steps 4 --batch-tokens 256 --seq-len 128 --device cpu --out base
train_gpt2 --preset micro --n-layer 1 --data shards --steps 4 --batch-tokens 256 --seq-len 128 --device cpu --out base
generate base alpha --max-new-tokens 3
evaluate base --data val.txt --json scores.json
finetune.sentiment --init base --method lora --epochs 2 --device cpu --out mood --predict rows.csv
finetune.sonnets --init base --epochs 1 --max-new-tokens 3 --device cpu --out poems
tools.verify base
tools.sweep "--seed 1" --out sweep -- SCRIPT --preset micro --n-layer 1 --data text.txt --tokenizer trained --steps 1
tools.compare base poems --plot compared.png
tools.export base --to gguf
"""


def stop_at_step_3() -> None:
    windows.become()
    receive("micro-batch", 9, (signal.SIGINT,))


def test_a_run_interrupted_and_resumed_has_the_bits_of_linux(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    launch(tmp_path, small("--out linux"))
    (stopped,) = launch(tmp_path, small(), stop_at_step_3)
    assert stopped.code == 130, stopped.err
    (ended,) = launch(tmp_path, small(), windows.become)
    assert ended.code == 0, ended.err
    assert trace(tmp_path / "run") == trace(tmp_path / "linux")


def test_commands_before_and_after_a_run(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "rows.csv").write_text("sentence\na fine day\na bad day\n")
    commands = COMMANDS.replace("SCRIPT", str(REPO / "train_gpt2.py")).splitlines()[1:]
    (ended,) = launch(tmp_path, commands, windows.become, program="windows")
    assert ended.code == 0, ended.out + ended.err
    made = ("base/final", "mood/final", "poems/final", "sweep", "compared.png", "scores.json")
    assert all((tmp_path / name).exists() for name in made)
