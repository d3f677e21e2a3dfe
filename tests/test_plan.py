"""What a run settles for its machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

import plan
from config import TrainConfig
from distributed import World
from model import attention_backends

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, [True]), ({"recompute": True}, [False]), ({"without": ("kept-memory",)}, [])],
    ids=["keeps", "gives back", "leaves glibc alone"],
)
def test_what_becomes_of_freed_memory_on_a_cpu(monkeypatch, options, calls):
    made: list[bool] = []
    monkeypatch.setattr(plan, "set_allocator", lambda keep_freed: made.append(keep_freed))
    given: dict[str, Any] = {"precision": "fp32", "kernels": "torch", **options}
    plan.settle(TrainConfig(**given), ALONE)
    assert made == calls


def test_the_banner_names_what_computes_attention():
    def attention(**options: Any) -> str:
        given: dict[str, Any] = {"precision": "fp32", "kernels": "torch", **options}
        return plan.settle(TrainConfig(**given), ALONE)[1].attention

    assert attention() == "flash_attention"
    assert attention(kernels="cpu_attention") == "cpu_attention kernel"
    assert attention(without=("flash-attention",)) == "explicit"


def test_cudnn_comes_first_on_hopper_unless_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert attention_backends(gpu, half)[0] == SDPBackend.CUDNN_ATTENTION
    for options in ({"by_hardware": False}, {"deterministic": True}):
        backends = attention_backends(gpu, half, **options)
        assert backends[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.CUDNN_ATTENTION not in backends
    assert attention_backends(gpu, torch.float32)[0] == SDPBackend.EFFICIENT_ATTENTION


@pytest.mark.parametrize("without", [(), ("cpu-products",)])
def test_the_banner_says_whose_fp32_products_are(monkeypatch, without):
    asked: list[Any] = []
    monkeypatch.setattr(plan, "set_products", lambda *args: asked.append(args) or not args[2])
    cfg = TrainConfig(precision="fp32", kernels="torch", without=without)
    told = plan.settle(cfg, ALONE)[1].precision
    assert asked == [("fp32", ALONE.device, without)]
    assert told == "asked for" + ("" if without else "; fp32 products by oneDNN")
