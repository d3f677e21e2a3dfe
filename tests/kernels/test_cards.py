"""The choices of `auto` on real cards, each of which is faked. docs/kernels.md shows the same
table."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.table import markdown
from config import Resolved, ResolvedTrain, TrainConfig, resolved
from engine import fit, plan
from engine.fit import peak_memory
from engine.memory import Memory
from engine.plan import resolve_for_machine
from engine.pretraining import rows_per_rank
from engine.processes import World
from engine.shape import model_config
from engine.task import Cost, Facts
from kernels import _card
from kernels._card import CARDS

pytest.importorskip("triton", reason="auto's kernels are Triton's")

GPT2_VOCABULARY = 50257
HEADER = ["card", "precision", "attention", "with --document-mask", "kernels", "micro-batch"]
# GiB that a process finds free on an idle card. The cards are sold with 16, 80, 24, 24, 80, 141,
# 180 and 32 GB.
FREE = {
    "T4": 14.6, "A100": 79.0, "RTX 3090": 23.4, "RTX 4090": 23.4,
    "H100": 79.0, "H200": 139.5, "B200": 177.5, "RTX 5090": 31.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def process_as_it_was() -> Any:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def fake(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make this process see one idle card."""
    card, free = CARDS[name], int(FREE[name] * 2**30)
    monkeypatch.setattr(_card, "card", lambda *device: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: card.name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (free, free))
    for figure in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, figure, lambda *device: 0)
    monkeypatch.setattr(plan, "set_gpu_allocator", lambda cfg: None)


def world(ranks: int = 1) -> World:
    return World(0, 0, ranks, ranks, torch.device("cuda", 0))


known: dict[tuple[str, int], Memory] = {}  # cards with the same precision share estimates


def estimated(facts: Facts, cfg: Resolved, micro_batch: int, world: World) -> Memory:
    key = cfg.precision, micro_batch
    if key not in known:
        known[key] = peak_memory(facts, cfg, micro_batch, world)
    return known[key]


def micro_batch(cfg: TrainConfig) -> int:
    """The micro-batch by estimate. On a real card a trial of the model decides."""
    done = resolved(cfg, ResolvedTrain)
    cost = Cost(model_config(done, GPT2_VOCABULARY, done.seq_len), done.seq_len)
    facts = Facts({}, {}, functools.partial(rows_per_rank, done), 0, cost)
    with mock.patch.object(fit, "peak_memory", estimated):
        return fit.largest_divisor(rows_per_rank(done, 1), fit.estimate_fits(facts, done, world()))


def row(name: str) -> list[str]:
    """A card's row of the table: `python train_gpt2.py` without options."""
    cfg, choices = resolve_for_machine(TrainConfig(data="stdlib"), world())
    _, masked = resolve_for_machine(TrainConfig(data="stdlib", document_mask=True), world())
    return [
        name,
        cfg.precision,
        choices.attention.removesuffix("_attention"),
        # Without the kernel the document mask is a tensor, which PyTorch's fused or plain attention
        # takes.
        masked.attention if masked.attention.endswith("kernel") else "mask",
        cfg.kernels.replace(",", ", "),
        str(micro_batch(cfg)),
    ]


def test_the_page_shows_what_auto_runs_on_each_card(monkeypatch, repo):
    rows = []
    for name in CARDS:
        with monkeypatch.context() as faked:
            fake(faked, name)
            rows.append(row(name))
    table = markdown(HEADER, rows, words=(0, 1, 2, 3, 4))
    print(table)
    page = (repo / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert table in page


@pytest.mark.parametrize("name", CARDS)
def test_auto_uses_only_features_of_the_card(monkeypatch, name):
    fake(monkeypatch, name)
    cfg, choices = resolve_for_machine(TrainConfig(data="stdlib", document_mask=True), world())
    major = CARDS[name].capability[0]
    assert cfg.precision == ("bf16" if major >= 8 else "fp16")
    assert ("attention" in cfg.kernels.split(",")) == (major >= 8)
    assert (choices.fallback is None) == (major >= 8)
    assert ("CUDNN_ATTENTION" in [b.name for b in choices.backends]) == (major in (9, 10))
    assert ("FLASH_ATTENTION" in [b.name for b in choices.backends]) == (major >= 8)


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_banner_says_whether_attention_repeats(monkeypatch, name, deterministic):
    fake(monkeypatch, name)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    _, choices = resolve_for_machine(
        TrainConfig(data="stdlib", deterministic=deterministic), world()
    )
    assert choices.repeatability.startswith("repeatable" if deterministic else "not repeatable")
    if deterministic:
        assert "cudnn" not in choices.attention
    _, ours = resolve_for_machine(
        TrainConfig(data="stdlib", kernels="torch", without=("flash-attention",)), world()
    )
    assert ours.repeatability == "repeatable bit for bit"
