"""Training steps of a language model on seeded random tokens, without a corpus, a tokenizer or
files."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from config import GPTConfig, ResolvedTrain, TrainConfig, resolve, resolved
from engine.compiling import compile_model
from engine.loader import Loader
from engine.pretraining import LanguageModelling, packed
from engine.processes import World
from engine.shape import runtime_fields
from engine.step import TrainStep
from engine.task import Batch
from model import GPT

SHAPE = GPTConfig(vocab_size=1000, block_size=128, n_layer=3, n_head=4, n_embd=256)
STEPS = 20


class RandomTokens(LanguageModelling):
    evaluated = ("val",)

    def __init__(self, config: GPTConfig, cfg: ResolvedTrain):
        self.shape, self.cfg = config, cfg

    def rows(self, split: str, step: int) -> np.ndarray:
        return np.arange(self.cfg.batch_tokens // self.cfg.seq_len)[:, None] + 1000 * step

    def batch(self, split: str, ids: np.ndarray) -> Batch:
        assert self.cfg.seq_len
        rows = [
            np.random.default_rng(i).integers(0, self.shape.vocab_size, self.cfg.seq_len + 1)
            for i in ids
        ]
        tokens = torch.from_numpy(np.stack(rows))
        return packed({"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()})


def make_step(
    device: str = "cpu", shape: GPTConfig = SHAPE, **options: Any
) -> tuple[TrainStep, Loader]:
    """A step of the engine and the loader of its batches. `options` are those of TrainConfig."""
    T = shape.block_size
    given: dict[str, Any] = dict(
        seq_len=T, batch_tokens=16 * T, micro_batch=8, steps=STEPS, lr=1e-3, warmup_steps=0
    )
    given |= dict(data="stdlib", compile=False) | options
    cfg = resolved(resolve(TrainConfig(**given), device), ResolvedTrain)
    world = World(0, 0, 1, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    task = RandomTokens(shape, cfg)
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(shape, **runtime_fields(cfg))).to(world.device)
    if cfg.compile:
        compile_model(model, cfg, world)
    assert isinstance(cfg.micro_batch, int)
    return TrainStep(task, model, cfg, world), Loader(task, world, cfg.micro_batch, STEPS)
