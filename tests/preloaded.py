"""Everything that the server of tests/launch.py loads and runs once before it forks runs.

PyTorch does much work at the first use of an operation. That is most of the time of a tiny run.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import os
import tempfile
import warnings
from typing import Any
from unittest import mock

# F401: the unused imports are for the forked runs, which then import them at no cost.
import matplotlib.figure
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo  # an optimizer would import it

import finetune  # noqa: F401
import train_gpt2  # noqa: F401
from base.cli import parse
from config import GPTConfig, TrainConfig
from engine import memory, trainer  # noqa: F401
from engine.task import Cost
from model import GPT
from support import OWN_MODULES

count = memory._peak_by_part
counted: dict[str, dict[str, int]] = {}
# All runs share this file and append to it: lines with a key and what was counted.
shared = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 (open as long as the server)


def identity(function: Any) -> Any:
    """What the memory of a task's own function depends on: its options, except for paths."""
    if function is None:
        return None
    places = ("out", "resume", "predict", "answers", "config")
    options = dataclasses.asdict(function.__self__.cfg)
    return function.__qualname__, {k: v for k, v in options.items() if k not in places}


def remembered(cost: Cost, *rest: Any) -> dict[str, int]:
    """The memory of a step, cached because counting it takes half of a tiny run's time."""
    key = repr((cost.shape, cost.length, identity(cost.added), identity(cost.loss), rest))
    if key not in counted:
        size = os.fstat(shared.fileno()).st_size
        counted.update(map(json.loads, os.pread(shared.fileno(), size, 0).splitlines()))
    if key not in counted:
        counted[key] = count(cost, *rest)
        shared.write(json.dumps((key, counted[key])).encode() + b"\n")
    return counted[key]


def step() -> None:
    """Do once what the runs of `small` do. This also caches the memory estimates for its shapes."""
    config = GPTConfig(300, 16, n_layer=1, n_head=2, n_embd=64, dropout=0.1, chunked_head=True)
    parse(TrainConfig, [])
    for dropout in (0.1, 0.0):
        shape = dataclasses.replace(config, dropout=dropout)
        memory.estimate(Cost(shape, 16), TrainConfig(precision="fp32"), 2, "cpu", base=0)
    with torch.random.fork_rng():
        model = GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        idx = torch.zeros(2, 16, dtype=torch.int64)
        model(idx, idx, reduction="sum").backward()
        optimizer.step()


def picture() -> None:
    """Save an empty chart, so that matplotlib finds its fonts once."""
    figure = matplotlib.figure.Figure()
    figure.add_subplot().set_title("title")
    figure.savefig(io.BytesIO(), format="png")


warnings.filterwarnings("error", module=OWN_MODULES)
mock.patch.object(memory, "_peak_by_part", remembered).start()
picture()
# If PyTorch is built for an accelerator, a backward pass starts threads even without one, and a
# forked process would lack these threads.
if torch.accelerator.current_accelerator() is None:
    step()
gc.collect()
gc.freeze()  # a collection in a forked run would touch, and so copy, these objects
