"""What a run settles for its machine."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import launch, log_of, small, write_inputs
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


@pytest.mark.parametrize(("there", "files"), [(0, 4), (1, 3), (3, 1), (7, 1)])
def test_the_disk_needed_counts_what_is_there(there, files):
    assert plan.Disk(kept=3, size=100, final=7).needed(there) == 100 * files + 7
    assert plan.Disk(kept=0, size=100, final=7).needed(there) == 7


def set_free(size: int) -> None:
    shutil.disk_usage = lambda folder: SimpleNamespace(free=size) if Path(folder).is_dir() else None  # ty: ignore


@pytest.mark.parametrize("dry", [True, False])
def test_a_disk_too_small_is_told_before_the_first_step(dry, tmp_path):
    """The dry run tells of it too; what suffices is not mentioned."""
    write_inputs(tmp_path)
    words = small("--steps", 2, "--save-every", 1, "--sample-every", 0, *["--dry-run"] * dry)

    def run(free: int, out: str) -> str:
        (end,) = launch(tmp_path, [*words, "--out", out], functools.partial(set_free, free))
        assert end.code == 0, end
        return end.out

    assert "free some" not in run(1 << 40, "enough")
    said = run(1000, "little")
    line = next(line for line in said.splitlines() if "free some" in line)
    assert "little has 1000 B free and the run may take" in line and "(2 checkpoints of" in line
    if not dry:
        assert said.index(line) < said.index("step 1/2")
        assert line.removeprefix("warning: ") in [record["text"] for record in log_of(tmp_path / "little", "warning")]
