"""The contenders of benchmarks.peers: the shapes, and one function for each trainer that builds its
step.

Every trainer starts from the same weights, sees the same tokens and splits its step into the same
micro-batches. The trade-off: a trainer that would be faster with larger micro-batches than the
others can hold does not show it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.harness import OURS
from benchmarks.steps import Case, Shape, Step, Trainer
from config import ResolvedTrain, TrainConfig, resolved

if TYPE_CHECKING:
    import torch

    from engine.loader import StepBatches
    from engine.plan import Choices
    from engine.processes import World
    from engine.step import StepResult

SEED = 1337
RECIPE: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0)


SHAPES = {
    "cpu": {
        "micro": Shape(2, 2, 64, 1000, 2, 32, 2),
        "10M": Shape(6, 6, 384, 8192, 32, 256),
        "124M": Shape(12, 12, 768, 50257, 4, 512),
    },
    "cuda": {  # larger models have fewer tokens in a step, so that it takes a second or less
        "micro": Shape(2, 2, 64, 1000, 2, 32, 2),
        "10M": Shape(6, 6, 384, 8192, 128, 256),
        "124M": Shape(12, 12, 768, 50257, 64, 1024, 8),
        "350M": Shape(24, 16, 1024, 50257, 16, 1024, 8),
        "774M": Shape(36, 20, 1280, 50257, 8, 1024, 8),
        "1.5B": Shape(48, 25, 1600, 50257, 4, 1024, 8),
    },
}


LARGE_CARD = 100e9  # bytes; below this, all logits of twice SMALL_ROWS do not fit
SMALL_ROWS = 32 * 1024  # tokens in a micro-batch on a smaller card


def fitting(shape: Shape, memory: int | None) -> Shape:
    """The shape for a card with `memory` bytes (None: a CPU). A smaller card gets the same step in
    smaller micro-batches."""
    tokens = shape.rows * shape.seq_len
    if memory is None or memory >= LARGE_CARD or tokens <= SMALL_ROWS:
        return shape
    parts = tokens // SMALL_ROWS
    return dataclasses.replace(
        shape, rows=shape.rows // parts, accumulation=shape.accumulation * parts
    )


def tokens_of(case: Case) -> torch.Tensor:
    """Random tokens for a step, (rows x accumulation, seq_len) int64, the same for all trainers."""
    import torch

    size = (case.shape.rows * case.shape.accumulation, case.shape.seq_len)
    draw = torch.Generator().manual_seed(SEED)
    return torch.randint(case.shape.vocab_size, size, generator=draw)


def targets_of(idx: torch.Tensor) -> torch.Tensor:
    """Each token's successor, shaped like `idx`. The last target of a row is -100, because
    transformers shifts its labels itself and so has none there."""
    import torch.nn.functional as F

    return F.pad(idx[:, 1:], (0, 1), value=-100)


# from tokens and targets (B, T) to the mean loss
Loss = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


# --- this engine


class Engine:
    """step.TrainStep, set up as trainer.train does it. Every Engine of a config has the same
    model."""

    def __init__(
        self,
        task: Any,
        cfg: Any,
        world: World,
        choices: Choices,
        whole: bool = True,
        exact: bool = False,
    ):
        import torch

        from engine.compiling import compile_model
        from engine.step import TrainStep

        self.task, self.cfg, self.backends = task, cfg, choices.backends
        torch.manual_seed(cfg.seed)
        self.model: Any = task.build_model(cfg).to(world.device)
        if cfg.compile:
            compile_model(self.model, cfg, world, whole)
        self.step = TrainStep(task, self.model, cfg, world, exact)
        gc.collect()
        gc.freeze()

    def __call__(self, data: StepBatches) -> StepResult:
        """Make one optimizer step on the batches of `data`."""
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self.backends, set_priority=True):
            result = self.step(0, data)
        assert result is not None
        return result

    def on_first_batch(self, rows: int) -> Step:
        """A step that always uses the task's first batch, in micro-batches of `rows` rows."""
        from engine.loader import Loader

        loader = Loader(self.task, self.step.world, rows, steps=1)
        data = loader(0)
        loader.close()

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            result = self(data)
            return result.loss, result.grad_norm

        return run


def ours(case: Case, **options: Any) -> Step:
    """This engine's step on random tokens. `options` are those of TrainConfig."""
    import numpy as np

    from engine import processes
    from engine.plan import resolve_for_machine
    from engine.pretraining import LanguageModelling, packed
    from engine.task import Batch

    class RandomTokens(LanguageModelling):
        def rows(self, split: str, step: int) -> np.ndarray:
            return np.arange(case.shape.rows * case.shape.accumulation)[:, None]

        def batch(self, split: str, ids: np.ndarray) -> Batch:
            idx = tokens_of(case)[ids]
            return packed({"idx": idx, "targets": targets_of(idx)})

    known: dict[str, Any] = RECIPE | {"precision": case.precision} | options
    cfg = TrainConfig(
        init=case.weights,
        data="stdlib",
        seq_len=case.shape.seq_len,
        batch_tokens=case.amount,
        micro_batch=case.shape.rows,
        steps=10**6,
        schedule="constant",
        warmup_steps=0,
        seed=SEED,
        **known,
    )
    world = processes.start(case.device)
    settled, choices = resolve_for_machine(cfg, world)
    task = RandomTokens()
    task.cfg = resolved(settled, ResolvedTrain)
    return Engine(task, task.cfg, world, choices).on_first_batch(case.shape.rows)


# --- the others


def trained(case: Case, model: Any, loss_of: Loss) -> Step:
    """A trainer's step on random tokens, in micro-batches of (rows, seq_len)."""
    idx = tokens_of(case).to(device_of(case))
    both = (part.split(case.shape.rows) for part in (idx, targets_of(idx)))
    return step_of(case, model, list(zip(*both, strict=True)), loss_of)


def step_of(
    case: Case,
    model: Any,
    micro_batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    loss_of: Loss,
) -> Step:
    """A step with torch's fused AdamW, no weight decay on vectors, and a clipped norm, as the
    peers' own examples train."""
    import torch

    from engine.precision import autocast

    params = list(model.parameters())
    device = params[0].device
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": RECIPE["weight_decay"]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"], betas=betas, eps=1e-8, fused=True)

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
    """The model, under torch.compile if `compiled`."""
    import torch

    return torch.compile(model) if compiled else model


def silence_transformers() -> None:
    """Turn off transformers' progress bars and warnings."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def plain(case: Case, compiled: bool) -> Step:
    """The step of plain_gpt2.PlainGPT2."""
    from benchmarks.plain_gpt2 import PlainGPT2, load_hub

    model = PlainGPT2(case.shape.config)
    load_hub(model, case.weights)
    return trained(case, model.to(device_of(case)), compiled_if(compiled, model))


def transformers(case: Case, compiled: bool) -> Step:
    """The step of transformers' GPT2LMHeadModel."""
    model = transformers_model(case)
    forward = compiled_if(compiled, model)
    return trained(
        case, model, lambda idx, targets: forward(input_ids=idx, labels=idx, use_cache=False).loss
    )


def transformers_model(case: Case) -> Any:
    """transformers' GPT-2 with the case's weights in fp32, in training mode."""
    import torch
    from transformers import GPT2LMHeadModel

    silence_transformers()
    model: Any = GPT2LMHeadModel.from_pretrained(
        case.weights, attn_implementation="sdpa", dtype=torch.float32
    )
    return model.to(device_of(case)).train()


def litgpt(case: Case, compiled: bool) -> Step:
    """The step of litgpt's blocks, head and chunked loss.

    litgpt has no learned positions. They are added to its embedding, and its rotary positions are
    turned off, so that it trains exactly GPT-2 and its losses can be checked.
    """
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
        padded_vocab_size=shape.config.padded_vocab_size,
        parallel_residual=False,
        gelu_approximate="tanh",
        rotary_percentage=0.0,
    )
    model = GPT(config)
    model.transformer.wte = Embedding(shape.config.padded_vocab_size, shape.seq_len, shape.n_embd)
    model.lm_head.weight = model.transformer.wte.weight  # as litgpt's option tie_embeddings does
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
    """The step of transformers' GPT-2 with Liger's layer norm and its fused head and loss. Liger
    has no patch for GPT-2 itself."""
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
    """The device that the case runs on."""
    from engine import processes

    return processes.start(case.device).device


# --- the list of contenders

HUGGING_FACE = "transformers.models.gpt2.modeling_gpt2"
COMPILER = "torch._inductor.compile_fx"
OWN = Trainer(ours, ("engine.step",), peer=False)
PEERS = {
    "plain": Trainer(plain, ("benchmarks.plain_gpt2",), padded=True),
    "transformers": Trainer(transformers, (HUGGING_FACE,)),
    "litgpt": Trainer(litgpt, ("litgpt.model", "litgpt.utils"), padded=True),
    "liger": Trainer(liger, (HUGGING_FACE, "liger_kernel.transformers"), needs_gpu=True),
}


def forms() -> Iterator[tuple[str, Trainer]]:
    """All contenders by name, the likely fastest first, so that a run that is cut short has
    measured those."""
    yield OURS, OWN
    for compiled, kept in ((True, False), (False, False), (True, True), (False, True)):
        for name, peer in PEERS.items():
            if (name == "litgpt" and not compiled) or (name == "liger" and kept):
                continue  # litgpt's own trainer always compiles; Liger runs on a GPU only
            form = dataclasses.replace(
                peer,
                build=functools.partial(peer.build, compiled=compiled),
                imports=(*peer.imports, "engine.precision", *([COMPILER] if compiled else [])),
                devices=("cpu",) if kept else ("cpu", "cuda"),
                compiled=compiled,
                kept=kept,
            )
            yield name + " compiled" * compiled + " + our allocator" * kept, form
    # this engine with --compile, which is not the default on a CPU
    compiled_step = functools.partial(ours, compile=True)
    imports = (*OWN.imports, COMPILER)
    yield f"{OURS} compiled", Trainer(compiled_step, imports, ("cpu",), compiled=True, peer=False)
    in_fp8 = functools.partial(ours, precision="fp8")
    yield f"{OURS} fp8", dataclasses.replace(OWN, build=in_fp8, devices=("cuda",))


CONTENDERS = dict(forms())
