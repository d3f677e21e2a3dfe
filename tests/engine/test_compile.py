"""torch.compile of a training step: the graph never breaks, and only the first step compiles."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
import torch.nn as nn
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.cpu_vec_isa import x86_isa_checker
from torch.utils._pytree import tree_leaves

from config import GPTConfig
from engine.compiling import compiler_knows_processor, compiler_problem
from engine.evaluation import evaluate
from random_tokens import make_step

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=3, n_head=2, n_embd=64)
# Triton's interpreter is slow
MINUTE = GPTConfig(vocab_size=40, block_size=8, n_layer=3, n_head=1, n_embd=16)


@pytest.fixture
def traced(monkeypatch):
    """Run all of torch.compile except code generation, which is slow and not tested here."""
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **options: compile(m, backend="aot_eager", fullgraph=True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("unit", "precision", "more"),
    [
        ("model", "bf16", {}),
        ("block", "fp32", {}),
        ("model", "bf16", {"without": ("chunked-head",)}),
        ("model", "bf16", {"recompute": True}),
        ("block", "bf16", {"recompute": True}),
        (
            "model",
            "bf16",
            {"kernels": "triton", "shape": MINUTE, "batch_tokens": 16, "micro_batch": 1},
        ),
    ],
)
def test_neither_recompiles_nor_breaks_the_graph(traced, monkeypatch, unit, precision, more):
    # Two of the three blocks share a graph. A whole model is one graph.
    layers = 1 if unit == "model" else 3
    options = {"shape": SMALL, "compile": True, "compile_unit": unit} | more
    options["shape"] = dataclasses.replace(options["shape"], n_layer=layers)
    step, loader = make_step(precision=precision, **options)
    step(0, loader(0))
    graphs = traced["stats"]["unique_graphs"]
    # Blocks with and without a branch to add have different graphs.
    assert 1 <= graphs <= (1 if unit == "model" else 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in range(1, 3):
            step(s, loader(s))
    assert traced["stats"]["unique_graphs"] == graphs
    if not more:  # evaluation compiles once, and training not again
        monkeypatch.setattr(step.task, "rows", lambda split, at: np.arange(16)[:, None])
        monkeypatch.setattr(step.task, "metrics", lambda sums, outputs: sums)
        evaluate(step, 8)
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(3, loader(3))
            assert evaluate(step, 8)
    loader.close()
    assert not traced["graph_break"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_losses_are_those_of_the_plain_model(traced, precision):
    def losses(**options) -> list[float]:
        step, loader = make_step(shape=dataclasses.replace(SMALL), precision=precision, **options)
        found = [step(s, loader(s)) for s in range(2)]
        loader.close()
        return [float(result.loss) for result in found if result]

    plain = losses()
    assert losses(compile=True) == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 1e-3)
    assert losses(compile=True, compile_unit="block") == pytest.approx(
        plain, rel=1e-5 if precision == "fp32" else 1e-3
    )


def live_bytes(graph: torch.fx.Graph) -> int:
    """The most bytes alive at any node of a traced graph that runs in order, inputs included."""
    size: dict[int, int] = {}
    last: dict[int, int] = {}
    born: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        for value in [node, *node.all_input_nodes]:
            for tensor in tree_leaves(value.meta.get("val")):
                if isinstance(tensor, torch.Tensor):
                    key = tensor.untyped_storage()._cdata
                    size[key], last[key] = int(tensor.untyped_storage().nbytes()), place
                    born.setdefault(key, 0 if value.op == "placeholder" else place)
    changes = sorted(
        [(place, size[key]) for key, place in born.items()]
        + [(place + 1, -size[key]) for key, place in last.items()]
    )
    return max(itertools.accumulate(change for _, change in changes))


def test_compiled_recomputation_holds_one_block_at_a_time(monkeypatch):
    """With the whole model compiled, the partitioner keeps the blocks' inputs, and the backward
    graph recomputes one block after another."""
    shape = GPTConfig(vocab_size=64, block_size=64, n_layer=4, n_head=2, n_embd=64)

    def backward_bytes(recompute: bool) -> int:
        found = []

        def keep(module: torch.fx.GraphModule, inputs: object) -> Any:
            found.append(live_bytes(module.graph))
            return make_boxed_func(module.forward)

        plain = nn.Module.compile
        backend = aot_autograd(
            fw_compiler=lambda module, _: make_boxed_func(module.forward),
            bw_compiler=keep,
            partition_fn=min_cut_rematerialization_partition,
        )
        torch._dynamo.reset()
        with monkeypatch.context() as patched:
            patched.setattr(
                nn.Module, "compile", lambda m, **_: plain(m, backend=backend, fullgraph=True)
            )
            step, loader = make_step(
                shape=shape,
                precision="fp32",
                compile=True,
                compile_unit="model",
                recompute=recompute,
            )
            step(0, loader(0))
        loader.close()
        return found[0]

    with_all, with_one = backward_bytes(False), backward_bytes(True)
    assert with_one < with_all / 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Inductor looks by itself")
def test_a_compiler_older_than_the_processor_is_not_trusted(monkeypatch, tmp_path):
    (old := tmp_path / "old").write_text(
        '#!/bin/sh\ncase "$*" in *-mavx*|*-mamx*) exit 1;; esac\nexec g++ "$@"\n'
    )
    old.chmod(0o755)
    if not x86_isa_checker() or compiler_problem("cpu"):
        pytest.skip("needs a C++ compiler and an x86 processor with vector instructions")
    assert compiler_knows_processor()
    monkeypatch.setenv("CXX", str(old))
    with inductor.patch({"cpp.cxx": (None, str(old))}):
        assert not compiler_knows_processor()
