"""What the server of tests/launch.py has loaded, and done once, before a run is forked from it.

PyTorch imports and works out much at the first use of an operation: most of what a tiny run takes.
"""

from __future__ import annotations

import dataclasses
import gc
import io
import warnings
from typing import Any
from unittest import mock

# F401: these are loaded for the runs that are forked, which import them again at no cost.
import matplotlib.figure
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch._dynamo  # what an optimizer would import

import finetune  # noqa: F401
import train_gpt2  # noqa: F401
from base.cli import parse
from config import GPTConfig, TrainConfig
from engine import memory, trainer  # noqa: F401
from engine.task import Cost
from model import GPT
from support import OWN_MODULES

count = memory._peak_by_part
counted: dict[tuple[object, ...], dict[str, int]] = {}


def remembered(cost: Cost, *rest: Any) -> dict[str, int]:
    """The memory of a step, which takes a quarter of a tiny run's time to count; counted anew where
    functions are part of the cost."""
    if cost.added or cost.loss:
        return count(cost, *rest)
    key = (repr(cost), *rest)
    if key not in counted:
        counted[key] = count(cost, *rest)
    return counted[key]


def step() -> None:
    """What the runs of `small` do, once: the answers for its shapes are remembered too."""
    config = GPTConfig(300, 16, n_layer=2, n_head=2, n_embd=64, dropout=0.1, chunked_head=True)
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
    """None of anything: its fonts are found once."""
    figure = matplotlib.figure.Figure()
    figure.add_subplot().set_title("title")
    figure.savefig(io.BytesIO(), format="png")


warnings.filterwarnings("error", module=OWN_MODULES)
mock.patch.object(memory, "_peak_by_part", remembered).start()
picture()
# Where PyTorch is built for an accelerator, be there one or not, a backward pass starts threads, and
# a forked process is without them.
if torch.accelerator.current_accelerator() is None:
    step()
gc.collect()
gc.freeze()  # no collection of a forked run walks it, and copies it
