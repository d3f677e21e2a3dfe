"""The set-up of a CUDA run, tested without a GPU: fakes record the calls."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn

from config import GPTConfig, TrainConfig
from engine import compiling, plan
from engine.compiling import compile_model
from engine.loader import Loader
from engine.processes import World
from engine.step import to_device
from model import GPT
from random_tokens import make_step
from toy import TwoHeads

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=2, n_head=2, n_embd=64)
CPU, GPU_1 = torch.device("cpu"), torch.device("cuda", 1)


def gradient_addresses(step: Any) -> dict[str, int]:
    return {n: p.grad.data_ptr() for n, p in step.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_cuda_graphs_gradients_keep_their_addresses(monkeypatch, precision):
    """With accumulation a gradient must not lie in the graph's memory, which the next replay
    overwrites."""
    plain, data = make_step(shape=SMALL, precision=precision, micro_batch=4)
    graphs, _ = make_step(shape=SMALL, precision=precision, micro_batch=4)
    graphs.cfg = dataclasses.replace(graphs.cfg, cuda_graphs=True)
    graphs.signature = None
    graphs.assemble(0)
    before = gradient_addresses(graphs)
    assert set(before) == {name for name, _ in graphs.model.named_parameters()}
    for s in range(3):
        batches = data(s)
        assert len(batches.batches) == 4
        expected, found = plain(s, batches), graphs(s, batches)
        assert expected is not None and found is not None
        assert float(found.loss) == float(expected.loss)
        assert gradient_addresses(graphs) == before
        assert all(not p.grad.any() for p in graphs.model.parameters())
    for ours, theirs in zip(graphs.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_loader_thread_works_on_the_ranks_own_gpu(monkeypatch):
    """Otherwise every rank's thread would create a context of half a gigabyte on GPU 0."""
    calls: list[tuple[str, str]] = []

    def record(name: str) -> Any:
        return lambda *args: calls.append((name, threading.current_thread().name))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", record("set_device"))
    task = TwoHeads()
    batch = task.batch
    monkeypatch.setattr(task, "batch", lambda *args: record("batch")() or batch(*args))
    loader = Loader(task, World(1, 1, 2, 2, GPU_1), micro_batch=2, steps=3, ahead=0)
    loader(0)
    assert calls[0] == ("set_device", "loader_0") and ("batch", "loader_0") in calls[1:]


def test_only_a_copy_to_cuda_is_not_waited_for():
    """On MPS such a copy may read memory that was freed: PyTorch's issue 189690."""
    asked = []

    class Recorded(torch.Tensor):
        def to(self, device: Any, non_blocking: bool = False) -> Any:
            asked.append((device.type, non_blocking))
            return self

    for name in ("cuda", "mps", "cpu"):
        to_device({"idx": torch.zeros(1).as_subclass(Recorded)}, torch.device(name))
    assert asked == [("cuda", True), ("mps", False), ("cpu", False)]


@pytest.mark.parametrize(
    "options, variables, expected",
    [
        ({}, {}, ["expandable_segments:True"]),
        ({"cuda_graphs": True}, {}, []),
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, []),
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, []),
    ],
)
def test_segments_grow_unless_graphs_or_the_user_forbid_it(
    monkeypatch, options, variables, expected
):
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append)
    for name in plan.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plan.set_gpu_allocator(TrainConfig(**options))
    assert asked == expected


@pytest.mark.parametrize(
    "cores, ranks, workers", [(16, 8, 2), (4, 8, 1), (128, 8, 16), (64, 1, 32), (2, 1, 2)]
)
def test_ranks_share_the_cores_for_compilation(monkeypatch, cores, ranks, workers):
    import torch._inductor.config as inductor

    monkeypatch.setattr(compiling, "cores", lambda: cores)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with inductor.patch(compile_threads=32):
        compile_model(GPT(SMALL), TrainConfig(), World(0, 0, ranks, ranks, CPU))
        assert inductor.compile_threads == workers


def test_blocks_are_the_units_except_for_one_replay():
    units = {
        (device.type, ranks, graphs): compiling.compile_unit(
            TrainConfig(cuda_graphs=graphs), World(0, 0, ranks, ranks, device)
        )
        for device in (CPU, GPU_1)
        for ranks in (1, 8)
        for graphs in (False, True)
    }
    assert units.pop(("cuda", 1, True)) == "model"
    assert set(units.values()) == {"block"}


@pytest.mark.parametrize("device", [CPU, GPU_1])
def test_on_cuda_the_embedding_and_the_last_norm_are_compiled_too(monkeypatch, device):
    compiled: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(module))
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    model = GPT(SMALL)
    compile_model(model, TrainConfig(), World(0, 0, 1, 1, device))
    others = [model.embed, model.transformer.ln_f] if device is GPU_1 else []
    assert sorted(map(id, compiled)) == sorted(map(id, [*model.transformer.h, *others]))


def test_the_users_number_of_compile_workers_is_kept(monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "5")
    with inductor.patch(compile_threads=5):
        compile_model(GPT(SMALL), TrainConfig(), World(0, 0, 8, 8, CPU))
        assert inductor.compile_threads == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_does_not_advise_tf32(monkeypatch, precision):
    from torch._inductor import compile_fx

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    advice = compile_fx._warn_tf32_disabled.__wrapped__  # it is asked once a process
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        advice()
        assert len(heard) == 1
        compile_model(GPT(SMALL), TrainConfig(precision=precision), World(0, 0, 1, 1, CPU))
        advice()
        assert len(heard) == 1
