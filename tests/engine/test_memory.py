"""The estimate of --dry-run against the measured memory of training, and the properties that the
choice of a micro-batch relies on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from config import PRESETS, GPTConfig, TrainConfig, UserError
from engine.memory import Memory, checkpoint_bytes, estimate, optimizer_bytes
from engine.task import Cost
from model import GPT

PLAIN = ("kept-memory", "cast-once")
TINY = GPTConfig(vocab_size=331, block_size=64, n_layer=2, n_head=2, n_embd=64)
# Narrow and deep, for many rows: much memory with little computation.
MEASURED = GPTConfig(vocab_size=2048, block_size=128, n_layer=6, n_head=4, n_embd=64)

# Two real steps in a separate process, which also prints its memory before the model. The first
# step has one row, enough to create the optimizer's state. It reads VmHWM because ru_maxrss starts
# at the parent's memory.
TRAIN = """
import json, re, sys
import torch
from config import GPTConfig
from base.machine import resident_bytes
from engine.memory import set_allocator
from model import GPT

print(resident_bytes())
config, rows, micro_batches, autocast = json.loads(sys.argv[1])
set_allocator(keep_freed=False)
config = GPTConfig(**config)
model = GPT(config)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for step in range(2):
    for _ in range(micro_batches):
        idx = torch.randint(config.vocab_size, (rows if step else 1, config.block_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(idx, idx, reduction="sum") / idx.numel()
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
with open("/proc/self/status") as status:
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("changes", "micro_batches", "autocast"),
    [
        ({}, 2, False),
        ({}, 1, True),
        ({"recompute": True}, 2, False),
        ({"attention": "explicit"}, 1, False),
    ],
    ids=["fp32", "bf16", "recompute", "explicit"],
)
def test_the_estimate_is_within_15_percent_of_measured(run, changes, micro_batches, autocast):
    config, rows = dataclasses.replace(MEASURED, **changes), 32
    case = json.dumps([dataclasses.asdict(config), rows, micro_batches, autocast])
    done = run("-c", TRAIN, case, fresh=False)  # forked, so the libraries are in `base`
    assert done.returncode == 0, done.stderr
    base, measured = map(int, done.stdout.split())
    precision, accumulate = "bf16" if autocast else "fp32", micro_batches > 1
    cfg = options(precision, without=("kept-memory", "cast-once"))
    cost = Cost(config, config.block_size)
    estimated = estimate(cost, cfg, rows, "cpu", accumulate=accumulate, base=base).total
    # Without the base, which would hide an error in the step.
    assert estimated - base == pytest.approx(measured - base, rel=0.15)


def options(precision: Any = "fp32", **more: Any) -> TrainConfig:
    given: dict[str, Any] = {"save_every": 0, "without": PLAIN}
    return TrainConfig(precision=precision, **given | more)


def peak(
    config: GPTConfig = TINY,
    micro_batch: int = 8,
    cfg: TrainConfig | None = None,
    device_type: str = "cpu",
    **more: Any,
) -> int:
    cost = Cost(config, 64)
    return estimate(cost, cfg or options(), micro_batch, device_type, base=0, **more).total


def test_weights_gradients_and_moments_are_counted_exactly():
    bytes_fp32 = 4 * sum(p.numel() for p in GPT(TINY).parameters())
    memory = estimate(Cost(TINY, 64), options(), 2, "cpu", base=0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (
        bytes_fp32,
        bytes_fp32,
        2 * bytes_fp32,
    )
    assert memory.activations > 0 and memory.logits > 0
    assert memory.total == sum(getattr(memory, field.name) for field in dataclasses.fields(Memory))


@pytest.mark.parametrize(("precision", "accumulate"), [("fp32", True), ("bf16", False)])
def test_more_rows_need_more_memory(precision, accumulate):
    peaks = [peak(TINY, n, options(precision), accumulate=accumulate) for n in (1, 2, 3, 8)]
    assert peaks == sorted(set(peaks))


def test_options_that_save_memory_and_that_cost_it():
    usual = peak(micro_batch=32)
    assert peak(dataclasses.replace(TINY, recompute=True), 32) < usual
    assert peak(dataclasses.replace(TINY, attention="explicit"), 32) > usual
    assert peak(TINY, 32, accumulate=False) < usual
    assert peak(TINY, 32, options(optimizer="muon")) < usual
    saving = options(save_every=1)
    assert peak(TINY, 32, saving) > usual
    assert peak(TINY, 32, world_size=2) > usual
    assert peak(TINY, 32, saving, device_type="cuda") == peak(TINY, 32, device_type="cuda")


def test_a_length_above_block_size_is_refused():
    with pytest.raises(UserError, match="longer than block_size"):
        estimate(Cost(TINY, 65), options(), 1, "cpu")


def test_checkpoint_bytes_are_those_on_disk(tmp_path):
    model = GPT(TINY)
    model.save_pretrained(tmp_path)
    header = 16 << 10  # names and shapes
    weights, size = 4 * model.n_params(), (tmp_path / "model.safetensors").stat().st_size
    assert weights < size < weights + header
    assert checkpoint_bytes(Cost(TINY, 64), "adamw", lambda name: True) == 2 * weights + 2 * weights


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_bytes_are_what_torch_keeps(optimizer):
    model = GPT(TINY)
    hidden = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    kinds = {
        "adamw": [torch.optim.AdamW([*hidden, *rest])],
        "muon": [torch.optim.Muon(hidden), torch.optim.AdamW(rest)],
    }
    for p in model.parameters():
        p.grad = p.detach().clone()
    for o in kinds[optimizer]:
        o.step()
    kept = [
        v for o in kinds[optimizer] for state in o.state.values() for v in state.values() if v.dim()
    ]
    assert sum(v.numel() * v.element_size() for v in kept) == optimizer_bytes(
        Cost(TINY, 64), optimizer, padded=True
    )


def test_estimating_gpt2_needs_little_memory():
    """Only shapes are needed: GPT-2 XL at full length, which takes 40 GB to train, is estimated on
    any machine."""
    config = GPTConfig(**PRESETS["gpt2-xl"])  # ty: ignore[invalid-argument-type]
    memory = estimate(Cost(config, 1024), options("bf16"), 4, "cpu", base=0)
    assert memory.weights == 4 * (1_557_611_200 + 47 * 1600)  # the padding's rows
    assert 30e9 < memory.total < 50e9


HOLES = """
import torch
from base.machine import resident_bytes
from engine.memory import Heap, set_allocator

set_allocator(keep_freed=True)
blocks = [torch.ones(1 << 18) for _ in range(200)]  # 200 MiB
last = blocks[-1]
full = resident_bytes()
del blocks  # the heap cannot shrink below the last one
kept = resident_bytes()
heap = Heap(limit=full - (100 << 20))
for _ in range(Heap.every):
    heap.after_step()
left = resident_bytes()
Heap(limit=0.0).after_step()  # not yet due
print(full - kept, kept - left, float(last.sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_heap_above_its_limit_is_trimmed(repo) -> None:
    out = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, cwd=repo
    )
    freed, returned, intact = map(float, out.stdout.split())
    assert freed < 20 << 20, "it is kept at first"
    assert returned > 150 << 20
    assert intact == 1 << 18
