"""torch.compile of a training step: no graph break, and after the first step nothing is compiled again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn as nn
from random_tokens import make_step

from config import GPTConfig
from trainer import evaluate

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=3, n_head=2, n_embd=64)
MINUTE = GPTConfig(vocab_size=40, block_size=8, n_layer=3, n_head=1, n_embd=16)  # Triton's interpreter is slow


@pytest.fixture
def traced(monkeypatch):
    """Compiles with everything but code generation, which takes the time and is not what is asked about."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **options: compile(m, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("unit", ["model", "block"])
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("fp32", {}),
        ("bf16", {}),
        ("bf16", {"without": ("cast-once",)}),
        ("bf16", {"without": ("chunked-head",)}),
        ("bf16", {"recompute": True}),
        ("bf16", {"kernels": "triton", "shape": MINUTE, "batch_tokens": 16, "micro_batch": 1}),
    ],
)
def test_neither_recompiles_nor_breaks_the_graph(traced, unit, precision, options):
    step, loader = make_step(
        **{"shape": SMALL, "precision": precision, "compile": True, "compile_unit": unit} | options
    )
    step(0, loader(0))
    graphs = traced["stats"]["unique_graphs"]
    # Blocks with and without a branch to add are two graphs.
    assert 1 <= graphs <= (1 if unit == "model" else 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in range(1, 4):
            step(s, loader(s))
    loader.close()
    assert traced["stats"]["unique_graphs"] == graphs
    assert not traced["graph_break"]


@pytest.mark.parametrize("unit", ["model", "block"])
def test_evaluation_compiles_once_and_leaves_training_alone(traced, monkeypatch, unit):
    step, loader = make_step(shape=SMALL, precision="bf16", compile=True, compile_unit=unit)
    monkeypatch.setattr(step.task, "rows", lambda split, at: np.arange(16)[:, None])
    monkeypatch.setattr(step.task, "metrics", lambda sums, outputs: sums)
    step(0, loader(0))
    evaluate(step)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in range(1, 3):
            step(s, loader(s))
            assert evaluate(step)
    loader.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_losses_are_those_of_the_plain_model(traced, precision):
    def losses(**options) -> list[float]:
        step, loader = make_step(shape=dataclasses.replace(SMALL), precision=precision, **options)
        found = [step(s, loader(s)) for s in range(4)]
        loader.close()
        return [float(result.loss) for result in found if result]

    plain = losses()
    assert losses(compile=True) == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-3)
    assert losses(compile=True, compile_unit="block") == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-3)
