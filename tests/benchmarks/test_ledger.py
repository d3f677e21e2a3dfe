"""The ledger of a training step: what it counts, what it predicts, and what it writes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time

import pytest
import torch

import kernels._triton
from benchmarks import generated, ledger
from config import PRESETS, GPTConfig, UserError
from engine.calibration import calibrate
from engine.roofline import ERROR, Ceilings, operations, predict, sheet_ceilings
from model import GPT
from support import REPO

SHAPE = GPTConfig(vocab_size=256, block_size=16, n_layer=2, n_head=2, n_embd=32, chunked_head=True)


def test_products_are_six_flops_a_weight_and_token():
    found = [op for op in operations(SHAPE, 4, 16, "bf16") if op.group in ("products", "head")]
    weights = sum(
        p.numel() for name, p in GPT(SHAPE).named_parameters() if p.dim() == 2 and "wpe" not in name
    )
    assert sum(op.flops for op in found) == 6 * weights * 4 * 16


def test_the_optimizer_moves_28_bytes_a_parameter():
    (found,) = [op for op in operations(SHAPE, 4, 16, "fp32") if op.group == "optimizer"]
    assert found.bytes == 28 * sum(p.numel() for p in GPT(SHAPE).parameters())


def test_recomputing_repeats_the_blocks_forward_pass():
    again = dataclasses.replace(SHAPE, recompute=True)
    more = [
        b.name
        for a, b in zip(operations(SHAPE, 4, 16, "bf16"), operations(again, 4, 16, "bf16"))
        if b.flops + b.bytes == 2 * (a.flops + a.bytes)
    ]
    assert "fc forward" in more and "GELU forward" in more
    assert not {"fc dx", "head forward", "optimizer"} & set(more)


def test_a_data_sheet_gives_the_ceilings_of_its_card_alone():
    h200 = sheet_ceilings("NVIDIA H200", "bf16")
    assert h200 and (h200.flops, h200.bandwidth) == (989e12, 4.8e12)
    assert sheet_ceilings("some CPU", "bf16") is None


def test_communication_counts_as_far_as_nothing_hides_it():
    slow = Ceilings("", "", flops=1e12, bandwidth=1e12, link=1e3)
    fast = dataclasses.replace(slow, link=1e12)
    alone = predict(SHAPE, 4, 16, "bf16", slow)
    assert predict(SHAPE, 4, 16, "bf16", fast, ranks=2).seconds == alone.seconds
    assert predict(SHAPE, 4, 16, "bf16", slow, ranks=2).seconds > 100 * alone.seconds


def test_a_calibration_times_every_operation():
    found = calibrate(SHAPE, 4, 16, "bf16", torch.device("cpu"), seconds=60.0)
    ledger_of_step = list(operations(SHAPE, 4, 16, "bf16"))
    assert {op.key for op in ledger_of_step} == set(found.rounds)
    expected = predict(SHAPE, 4, 16, "bf16", found)
    assert expected.seconds == pytest.approx(sum(map(found.seconds, ledger_of_step)))
    assert expected.tokens_per_second == pytest.approx(64 / expected.seconds)


def test_a_calibration_without_time_leaves_operations_to_the_roofline(monkeypatch):
    cpu_seconds = itertools.count()
    monkeypatch.setattr(time, "process_time", lambda: 1e-6 * next(cpu_seconds))  # a busy machine
    found = calibrate(SHAPE, 4, 16, "fp32", torch.device("cpu"), seconds=0.0)
    assert "beside other programs: it had 0% of its CPU" in found.source
    ledger_of_step = list(operations(SHAPE, 4, 16, "fp32"))
    (timed,) = found.rounds
    left = [op for op in ledger_of_step if op.key != timed]
    assert len(found.rounds[timed]) == 1 and "for lack of time" in found.source
    assert all(found.seconds(op) == found.roofline(op) > 0 for op in left)
    assert predict(SHAPE, 4, 16, "fp32", found).share == ERROR


@pytest.mark.parametrize(
    ("names", "shapes", "found"),
    [
        (["aten::addmm"], [[96], [64, 32], [32, 96]], "qkv forward"),
        (["aten::mm", "AddmmBackward0"], [[64, 128], [128, 32]], "fc dx"),
        (["aten::mm", "AddmmBackward0"], [[32, 64], [64, 128]], "mlp projection dW"),
        (["aten::mm", "_LinearCrossEntropySum"], [[256, 64], [64, 32]], "head dW"),
        (["aten::exp", "_LinearCrossEntropySum"], [], "loss"),
        (["aten::gelu_backward", "GeluBackward0"], [], "GELU backward"),
        (["aten::frobnicate"], [], "remainder"),
    ],
)
def test_an_operation_of_the_profiler_has_a_class(names, shapes, found):
    assert ledger.class_of(names, shapes, SHAPE) == found


def test_a_gpus_ledger_counts_the_generated_code(monkeypatch, tmp_path, capsys):
    size = PRESETS["micro"] | {"n_layer": 1}  # every layer is compiled in the same way
    monkeypatch.setitem(PRESETS, "micro", size)
    shape = ["--preset", "micro", "--vocab", "512", "--batch", "3", "--seq-len", "32"]
    words = ["--device-name", "H200", "--ranks", "8", *shape, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ledger", *words])
    ledger.main()
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "ledger-h200.md").read_text(encoding="utf-8").strip()
    assert "all-reduce" in text and "No run exceeds" in text
    assert (tmp_path / "ledger-h200.png").read_bytes().startswith(b"\x89PNG")
    (case,) = json.loads((tmp_path / "ledger-h200.json").read_text(encoding="utf-8"))["cases"]
    if "uncounted" in case:  # the count is written for one build of PyTorch, and says so
        assert torch.__version__ != "2.13.0+cpu", case["uncounted"]
        pytest.skip(case["uncounted"])
    moved, bound = case["generated"], {op["name"]: op["bytes"] for op in case["operations"]}
    stack = 2 * 6 * (3 * 32) * size["n_embd"]  # and the sums for the biases
    assert stack <= moved["stack of dq, dk, dv"] < 1.02 * stack
    assert moved[ledger.REMAINDER] < 0.01 * sum(moved.values())
    for name in ("qkv forward", "fc dx", "mlp projection dW", "attention forward", "GELU forward"):
        assert bound[name] <= moved[name] < 1.25 * bound[name], name


def test_an_unknown_gpu_has_no_ledger(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ledger", "--device-name", "abacus"])
    with pytest.raises(UserError, match="abacus has no speed"):
        ledger.main()


def test_a_ledger_says_why_the_generated_code_is_not_counted(monkeypatch):
    monkeypatch.setattr(kernels._triton, "triton", None)
    reason = generated.uncounted_reason("bf16")
    assert reason and "pip install triton" in reason
    ceilings = sheet_ceilings("H100", "bf16")
    assert ceilings
    case = ledger.counted(SHAPE, ledger.Options(), "bf16", ceilings)
    text = ledger.ledger_of(case | {"preset": "micro", "uncounted": reason})
    assert f"is not counted: {reason}." in text and "generated ms" not in text


def test_a_measured_ledger_accounts_for_the_whole_step(run, tmp_path):
    done = run("-m", "benchmarks.ledger", "--quick", "--device", "cpu", "--out", "out")
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "out/ledger-cpu.json").read_text())["cases"]
    (measured,) = case["measured"]
    assert sum(case["parts"].values()) == pytest.approx(measured, rel=0.1)
    assert {"qkv forward", "head dW", "optimizer", "remainder"} <= set(case["parts"])


def test_prediction_imports_no_torch():
    code = "import engine.roofline, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
