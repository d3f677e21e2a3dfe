"""Who is compared by benchmarks.peers, and at what: the shapes, and one function a trainer that
builds its step.

Every trainer starts from the same weights, sees the same tokens and cuts its step into the same
micro-batches. The trade-off of that: a trainer that would be faster in larger micro-batches than
the others can hold does not show it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config import GPTConfig, ResolvedTrain, TrainConfig, resolved

if TYPE_CHECKING:
    import torch

OURS = "this engine"
SEED = 1337
RECIPE: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0)


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int  # sequences in a micro-batch
    seq_len: int
    accumulation: int = 1  # micro-batches in a step

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding as nanoGPT advises: 50,304 in place of 50,257."""
        return -(-self.vocab_size // 64) * 64

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.vocab_size, self.seq_len, self.n_layer, self.n_head, self.n_embd)


SHAPES = {
    "cpu": {
        "micro": Shape(2, 2, 64, 1000, 2, 32, 2),
        "10M": Shape(6, 6, 384, 8192, 32, 256),
        "124M": Shape(12, 12, 768, 50257, 4, 512),
    },
    "cuda": {  # the larger ones with shorter steps, so that one takes a second or less
        "micro": Shape(2, 2, 64, 1000, 2, 32, 2),
        "10M": Shape(6, 6, 384, 8192, 128, 256),
        "124M": Shape(12, 12, 768, 50257, 64, 1024, 8),
        "350M": Shape(24, 16, 1024, 50257, 16, 1024, 8),
        "774M": Shape(36, 20, 1280, 50257, 8, 1024, 8),
        "1.5B": Shape(48, 25, 1600, 50257, 4, 1024, 8),
    },
}


LARGE_CARD = 100e9  # bytes: with less, twice SMALL_ROWS do not fit where the logits are held whole
SMALL_ROWS = 32 * 1024  # tokens of a micro-batch on such a card


def fitting(shape: Shape, memory: int | None) -> Shape:
    """The shape on a card of `memory` bytes (None: on a CPU): on a smaller one the same step in
    smaller micro-batches."""
    tokens = shape.rows * shape.seq_len
    if memory is None or memory >= LARGE_CARD or tokens <= SMALL_ROWS:
        return shape
    parts = tokens // SMALL_ROWS
    return dataclasses.replace(
        shape, rows=shape.rows // parts, accumulation=shape.accumulation * parts
    )


@dataclass(frozen=True)
class Case:
    """What all contenders do alike."""

    name: str
    shape: Shape
    precision: str
    device: str
    weights: str  # folder in the hub's layout that everyone starts from

    @property
    def tokens(self) -> int:
        """Of one optimizer step."""
        return self.shape.rows * self.shape.seq_len * self.shape.accumulation

    @property
    def title(self) -> str:
        return f"{self.name} {self.precision}"

    def tokens_drawn(self) -> torch.Tensor:
        """Random tokens of a step, (rows x accumulation, seq_len) int64, the same for all."""
        import torch

        size = (self.shape.rows * self.shape.accumulation, self.shape.seq_len)
        return torch.randint(
            self.shape.vocab_size, size, generator=torch.Generator().manual_seed(SEED)
        )

    def micro_batches(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The step's tokens and targets in micro-batches, each (rows, seq_len) int64."""
        idx = self.tokens_drawn().to(device)
        return list(
            zip(idx.split(self.shape.rows), targets_of(idx).split(self.shape.rows), strict=True)
        )


def targets_of(idx: torch.Tensor) -> torch.Tensor:
    """Each token's successor; the last one's is unknown, as in transformers, which shifts its
    labels itself."""
    import torch.nn.functional as F

    return F.pad(idx[:, 1:], (0, 1), value=-100)


# one optimizer step: its loss and gradient norm
Step = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]
Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]  # mean loss of tokens and targets


# --- this engine


def ours(case: Case, **options: Any) -> Step:
    """step.TrainStep as trainer.train sets it up; only the tokens are made up. `options` are
    TrainConfig's."""
    import gc

    import numpy as np
    from torch.nn.attention import sdpa_kernel

    from engine import processes
    from engine.plan import settle
    from engine.pretraining import LanguageModelling, packed
    from engine.step import Loader, TrainStep, compile_model
    from engine.task import Batch

    class RandomTokens(LanguageModelling):
        def rows(self, split: str, step: int) -> np.ndarray:
            return np.arange(case.shape.rows * case.shape.accumulation)[:, None]

        def batch(self, split: str, ids: np.ndarray) -> Batch:
            idx = case.tokens_drawn()[ids]
            return packed({"idx": idx, "targets": targets_of(idx)})

    world = processes.start(case.device)
    settled, choices = settle(dataclasses.replace(train_config(case), **options), world)
    cfg = resolved(settled, ResolvedTrain)
    task = RandomTokens()
    task.cfg = cfg
    model = task.build_model(cfg).to(world.device)
    if cfg.compile:
        compile_model(model, cfg, world)
    step = TrainStep(task, model, cfg, world)
    data = Loader(task, world, case.shape.rows, steps=1)(0)
    gc.collect()
    gc.freeze()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with sdpa_kernel(choices.backends, set_priority=True):
            result = step(0, data)
        assert result is not None
        return result.loss, result.grad_norm

    return run


def train_config(case: Case) -> TrainConfig:
    shape = case.shape
    precision: Any = case.precision
    return TrainConfig(
        init=case.weights,
        data="stdlib",
        seq_len=shape.seq_len,
        batch_tokens=case.tokens,
        micro_batch=shape.rows,
        steps=10**6,
        schedule="constant",
        warmup_steps=0,
        precision=precision,
        seed=SEED,
        **RECIPE,
    )


def ours_in_fp8(case: Case) -> Step:
    return ours(dataclasses.replace(case, precision="fp8"))


def ours_compiled(case: Case) -> Step:
    """With what --compile gives on a CPU, where it is not the default."""
    return ours(case, compile=True)


# --- the others


def trained(case: Case, model: Any, loss_of: Loss) -> Step:
    """Torch's fused AdamW, no decay on vectors, the norm clipped: as the peers' own examples train
    them."""
    import torch

    from engine.precision import autocast

    device = next(model.parameters()).device
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": RECIPE["weight_decay"]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"], betas=betas, eps=1e-8, fused=True)
    micro_batches = case.micro_batches(device)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.zeros((), device=device)
        for idx, targets in micro_batches:
            with autocast(case.precision, device):
                loss = loss_of(idx, targets) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(params, RECIPE["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    return run


def compiled_if(compiled: bool, model: Any) -> Any:
    import torch

    return torch.compile(model) if compiled else model


def plain(case: Case, compiled: bool) -> Step:
    from benchmarks.plain_gpt2 import PlainGPT2, load_hub

    shape = case.shape
    model = PlainGPT2(shape.n_layer, shape.n_head, shape.n_embd, shape.padded_vocab, shape.seq_len)
    load_hub(model, case.weights)
    return trained(case, model.to(device_of(case)), compiled_if(compiled, model))


def transformers(case: Case, compiled: bool) -> Step:
    model = transformers_model(case)
    forward = compiled_if(compiled, model)
    return trained(
        case, model, lambda idx, targets: forward(input_ids=idx, labels=idx, use_cache=False).loss
    )


def transformers_model(case: Case) -> Any:
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = GPT2LMHeadModel.from_pretrained(
        case.weights, attn_implementation="sdpa", dtype=torch.float32
    )
    return model.to(device_of(case)).train()


def litgpt(case: Case, compiled: bool) -> Step:
    """litgpt's blocks, head and chunked loss. It has no learned positions: they are added to its
    embedding, and its rotary ones are set to none, so that it trains exact GPT-2 and its losses can
    be checked."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    from benchmarks.plain_gpt2 import load_hub

    class Embedding(torch.nn.Embedding):
        def __init__(self, vocab_size: int, positions: int, width: int):
            super().__init__(vocab_size, width)
            self.wpe = torch.nn.Embedding(positions, width)

        def forward(self, idx: torch.Tensor) -> torch.Tensor:
            return super().forward(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))

    shape = case.shape
    config = Config(
        name="gpt2",
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        block_size=shape.seq_len,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.padded_vocab,
        parallel_residual=False,
        gelu_approximate="tanh",
        rotary_percentage=0.0,
    )
    model = GPT(config)
    model.transformer.wte = Embedding(shape.padded_vocab, shape.seq_len, shape.n_embd)
    model.lm_head.weight = model.transformer.wte.weight  # its option tie_embeddings
    theirs = {
        "norm_": "ln_",
        "attn.qkv": "attn.c_attn",
        "proj": "c_proj",
        "mlp.fc": "mlp.c_fc",
        "wte.wpe": "wpe",
    }
    theirs["lm_head"] = "transformer.wte"

    def hub_name(name: str) -> str:
        for part, hub in theirs.items():
            name = name.replace(part, hub)
        return name

    load_hub(model, case.weights, hub_name)
    forward = compiled_if(compiled, model.to(device_of(case)))
    return trained(case, model, lambda idx, targets: chunked_cross_entropy(forward(idx), targets))


def liger(case: Case, compiled: bool) -> Step:
    """transformers' GPT-2 with Liger's layer norm and its fused head and loss; Liger has no patch
    for GPT-2 itself."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerLayerNorm
    from torch import nn

    model = transformers_model(case)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                norm = LigerLayerNorm(child.normalized_shape[0], eps=child.eps)
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm)
    forward, loss = compiled_if(compiled, model.transformer), LigerFusedLinearCrossEntropyLoss()

    def loss_of(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = forward(input_ids=idx, use_cache=False).last_hidden_state
        return loss(model.lm_head.weight, hidden.flatten(0, 1), targets.flatten())

    return trained(case, model, loss_of)


def device_of(case: Case) -> torch.device:
    from engine import processes

    return processes.start(case.device).device


# --- the list of them


@dataclass(frozen=True)
class Contender:
    """`kept`: with this engine's allocator setting, so that what is left of the difference is the
    code's."""

    builder: Callable[..., Step]
    imports: tuple[str, ...]  # what it needs of code; its memory is counted from there on
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool | None = None  # None: its own affair
    kept: bool = False
    padded: bool = False  # the vocabulary's padding takes part in the softmax

    @property
    def peer(self) -> bool:
        return self.compiled is not None

    def lacking(self, device: str) -> str | None:
        """What this machine has not that it needs."""
        if self.builder is liger and device == "cpu":
            return "needs a CUDA GPU"
        compiles = self.compiled or self.builder is ours_compiled
        if compiles and device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "needs a C++ compiler"
        return None

    def build(self, case: Case) -> Step:
        from engine.memory import set_allocator

        if self.kept:
            set_allocator(keep_freed=True)
        return self.builder(case, self.compiled) if self.peer else self.builder(case)


HUGGING_FACE = "transformers.models.gpt2.modeling_gpt2"
PEERS: dict[str, tuple[Callable[..., Step], tuple[str, ...], bool]] = {
    "plain": (plain, ("benchmarks.plain_gpt2",), True),
    "transformers": (transformers, (HUGGING_FACE,), False),
    "litgpt": (litgpt, ("litgpt.model", "litgpt.utils"), True),
    "liger": (liger, (HUGGING_FACE, "liger_kernel.transformers"), False),
}


def _all() -> Iterator[tuple[str, Contender]]:
    """The likely best first: a run that is cut short has compared with them."""
    yield OURS, Contender(ours, ("engine.step",))
    for compiled, kept in ((True, False), (False, False), (True, True), (False, True)):
        for name, (builder, imports, padded) in PEERS.items():
            if (builder is litgpt and not compiled) or (builder is liger and kept):
                continue  # litgpt's own trainer always compiles; Liger runs on a GPU only
            words = f"{name}{' compiled' if compiled else ''}{' + our allocator' if kept else ''}"
            needs = (
                *imports,
                "engine.precision",
                *(("torch._inductor.compile_fx",) if compiled else ()),
            )
            devices = ("cpu",) if kept else ("cpu", "cuda")
            yield words, Contender(builder, needs, devices, compiled, kept, padded)
    yield (
        f"{OURS} compiled",
        Contender(ours_compiled, ("engine.step", "torch._inductor.compile_fx"), ("cpu",)),
    )
    yield f"{OURS} fp8", Contender(ours_in_fp8, ("engine.step",), ("cuda",))


CONTENDERS = dict(_all())
