"""One optimizer step, and the batches that go into it. It never looks inside a batch, a model or a
loss."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from base.machine import cores
from config import Resolved, RunConfig
from engine import processes
from engine.optim import LossScale, Optimizers, Span, lr_multiplier, span_at
from engine.precision import DTYPES, Cast, autocast, casts_once, exact_products
from engine.processes import World
from engine.task import Task
from kernels._triton import missing
from storage import checkpoint

# --- batches


def partition(
    groups: np.ndarray, rank: int, size: int, micro_batch: int
) -> list[np.ndarray | None]:
    """This rank's micro-batches of row ids: a strided slice of the groups (n, rows), micro_batch
    rows at a time.

    Every rank gets the same number of micro-batches; None stands where it has no rows left.
    """
    per = max(1, micro_batch // groups.shape[1])
    mine = groups[rank::size]
    count = math.ceil(math.ceil(len(groups) / size) / per)
    parts = [mine[i * per : (i + 1) * per].reshape(-1) for i in range(count)]
    return [part if len(part) else None for part in parts]


@dataclass
class StepBatches:
    """What one rank reads in one optimizer step."""

    batches: list[Any]  # None: this rank has no rows left
    weights: dict[str, float]  # of this rank alone
    amounts: dict[str, float]  # the same
    spare: Any  # a batch to run for nothing where there is none


class Loader:
    """Collates the batches of coming steps in a thread, and copies them to a GPU while it works on
    this one.

    Its whole state is the step it is asked for.
    """

    def __init__(self, task: Task, world: World, micro_batch: int, steps: int, ahead: int = 2):
        self.task, self.world, self.micro_batch, self.steps, self.ahead = (
            task,
            world,
            micro_batch,
            steps,
            ahead,
        )
        # A new thread works on GPU 0, and whatever it does there opens a context of half a gigabyte
        # on that GPU.
        self.pool = ThreadPoolExecutor(1, "loader", processes.use_device, (world.device,))
        self.futures: dict[int, Future[StepBatches]] = {}
        self.stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None

    def __call__(self, step: int) -> StepBatches:
        for s in range(step, min(step + 1 + self.ahead, self.steps)):
            if s not in self.futures:
                self.futures[s] = self.pool.submit(self._load, s)
        return self.futures.pop(step).result()

    def _load(self, step: int) -> StepBatches:
        groups = self.task.rows("train", step)
        parts = partition(groups, self.world.rank, self.world.size, self.micro_batch)
        found = [None if ids is None else self.task.batch("train", ids) for ids in parts]
        live = [batch for batch in found if batch is not None]
        batches = [None if batch is None else batch.tensors for batch in found]
        spare = (live[0] if live else self.task.batch("train", groups[0])).tensors
        if self.stream:
            batches, spare = self._copied((batches, spare))
        weights = added(batch.weights for batch in live)
        amounts = added(batch.amounts for batch in live)
        return StepBatches(batches, weights, amounts, spare)

    def _copied(self, batches: Any) -> Any:
        """`batches` on the GPU. Only this thread waits for the copy."""
        assert self.stream
        computing = torch.cuda.default_stream(self.world.device)

        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.pin_memory().to(self.world.device, non_blocking=True)
            # its memory is not used again before the computation is through with it
            value.record_stream(computing)
            return value

        with torch.cuda.stream(self.stream):
            batches = tree_map(copied, batches)
        self.stream.synchronize()
        return batches

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.futures.clear()


def added(counts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Sums by name; not all need have all names."""
    total: dict[str, float] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0.0) + number
    return total


def to_device(batch: Any, device: torch.device) -> Any:
    return tree_map(
        lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v, batch
    )


def seed_draws(seed: int, step: int, micro: int, rank: int) -> None:
    """Every random draw of a micro-batch follows from these four numbers, whatever was drawn
    before."""
    drawn = int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0])
    if torch.accelerator.is_available():
        torch.manual_seed(drawn)
    else:  # which would format its caller's stack for each kind of accelerator: a millisecond
        torch.default_generator.manual_seed(drawn)


# --- one optimizer step

AMOUNT = "amount "  # before an amount's name, where it travels with the weights


class TaskModule(nn.Module):
    """The model with the task's functions of it as its forward pass: what DDP wraps, so that it
    sees every use."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Any, function: str) -> Any:
        return getattr(self.task, function)(self.model, batch)


@dataclass
class StepResult:
    """Figures of one optimizer step; the tensors are scalars on the device, not waited for."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    ok: Tensor  # False: not finite, so nothing was updated
    terms: dict[str, Tensor]  # mean of each loss term
    lr: float
    amounts: dict[str, float]  # what the step's batches held, over all ranks

    def copy_to_host(self) -> Callable[[], list[float]]:
        """Start copying loss, grad_norm, ok and the terms; the function returned waits for them."""
        figures = torch.stack([self.loss, self.grad_norm, self.ok, *self.terms.values()]).float()
        if not figures.is_cuda:
            return figures.tolist
        host = torch.empty(figures.shape, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[float]:
            copied.synchronize()
            return host.tolist()

        return read


BLOCK_GRAPHS = 32


def compile_unit(cfg: RunConfig, world: World, whole: bool = True) -> str:
    """model or block; `whole`: whether what runs is the model's own forward pass. Compiled whole, a
    model has all its gradients at once, and no all-reduce overlaps with them; and on a CPU the
    head's loss, which works on pieces that stay in the caches, is taken apart into whole passes."""
    if cfg.compile_unit != "auto":
        return cfg.compile_unit
    return "block" if world.size > 1 or world.device.type == "cpu" or not whole else "model"


def compiler_lacks(device_type: str) -> str | None:
    """What stops torch.compile on this kind of device, as "needs ..."; None where nothing does.

    It writes Triton kernels for CUDA and C++ for a CPU, and finds a compiler only in the first
    step.
    """
    if device_type == "cuda":
        return missing(device_type)
    if device_type != "cpu":
        return None
    import torch._inductor.config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):  # OSError: $CXX is a folder, or may not be run
        name = os.environ.get("CXX", "cl") if sys.platform == "win32" else inductor.cpp.cxx[-1]
        way = {"linux": " (apt install g++)", "darwin": " (xcode-select --install)"}.get(
            sys.platform, ""
        )
        return f"needs a C++ compiler: install one{way} or name yours in CXX ({name} does not run)"
    return None


def compile_model(model: nn.Module, cfg: RunConfig, world: World, whole: bool = True) -> None:
    """torch.compile the model in place; its blocks are the members of its module lists."""
    # here: a run that does not compile does without its second of imports
    import torch._inductor.config as inductor

    # Each rank starts these processes, by default one for each of the machine's cores.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = min(32, max(1, cores() // world.local_size))
    # The run has chosen its products, and its banner names them.
    warnings.filterwarnings(
        "ignore", "TensorFloat32 tensor cores for float32 matrix multiplication"
    )
    units = [model]
    if compile_unit(cfg, world, whole) == "block":
        # All blocks share one function's graphs: of the first, a middle and the last one, for one
        # length and for any, in training and in evaluation. Past the limit, 8 by default, they
        # would run uncompiled.
        torch._dynamo.config.recompile_limit = BLOCK_GRAPHS  # ty: ignore[invalid-assignment]
        units = [
            block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part
        ]
    for unit in units:
        unit.compile(mode="reduce-overhead" if cfg.cuda_graphs else None)


class TrainStep:
    """One optimizer step: forward and backward over micro-batches, all-reduce, clip, update.

    Divides every loss term by its global weight, so the update does not depend on how the batch was
    cut.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        cfg: Resolved,
        world: World,
        exact_evaluation: bool = False,
    ):
        self.task, self.model, self.cfg, self.world = task, model, cfg, world
        self.exact_evaluation = exact_evaluation
        self.scale = LossScale(cfg.precision == "fp16", world.device)
        # of the schedule; more than one where its decay was restarted
        self.spans = [Span(0, cfg.steps)]
        self.signature: Any = None
        self.stands_at: int | None = (
            0  # steps that the parameters have had; None while they are being updated
        )
        self.module: nn.Module  # computes the task's functions of a batch
        self.synced: nn.Module  # the same, but that its backward pass sums gradients over ranks
        self.optimizers: Optimizers
        self.assemble(0)

    def assemble(self, step: int) -> None:
        """Build what depends on which parameters train, if that differs from the step before."""
        groups = self.task.groups(self.model, step)
        signature = [group.signature() for group in groups]
        if signature == self.signature:
            return
        trained = {name for group in groups for name in group.params}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None  # under DDP a view of the old buckets
        # lets go of an old DDP before there is a new one
        self.module = self.synced = TaskModule(self.task, self.model)
        copies = None
        if casts_once(self.cfg.precision, self.cfg.without):
            self.module = self.synced = Cast(self.module, DTYPES[self.cfg.precision])
            copies = {
                name.removeprefix("model."): copy for name, copy in self.module.copies.items()
            }
        before = self.optimizers.state() if self.signature is not None else {}
        self.optimizers = Optimizers(groups, self.cfg, copies)
        self.optimizers.load_state(before)
        self.signature = signature
        if self.world.size > 1:
            ids = [self.world.device.index] if self.world.device.type == "cuda" else None
            self.synced = DistributedDataParallel(
                self.module, device_ids=ids, gradient_as_bucket_view=True
            )
        elif self.cfg.cuda_graphs:
            # A gradient that the graph's backward pass returns lies in the graph's memory, which
            # the next replay overwrites. In buffers of their own the gradients are added up.
            for parameter in self.optimizers.params:
                parameter.grad = torch.zeros_like(parameter)

    def lr(self, step: int) -> float:
        cfg = self.cfg
        span = span_at(step, self.spans)
        return cfg.lr * lr_multiplier(step, span, cfg.warmup_steps, cfg.schedule, cfg.min_lr)

    def __call__(
        self, step: int, data: StepBatches, stop: Callable[[], int] = lambda: 0
    ) -> StepResult | None:
        """Update the model with step `step` (0-based); None, and nothing changed, where `stop()`
        said so half-way."""
        self.assemble(step)
        self.model.train()
        total, amounts = self._over_ranks(data)
        factors = {k: self.task.terms[k] / w for k, w in total.items() if w}
        sums = {k: torch.zeros((), device=self.world.device) for k in factors}
        for micro, batch in enumerate(data.batches):
            if stop():
                self.zero_grad()
                return None
            seed_draws(self.cfg.seed, step, micro, self.world.rank)
            with self._sync_gradients(last=micro == len(data.batches) - 1):
                # A rank without rows left runs another batch for nothing, since DDP waits for its
                # gradients.
                live = batch is not None
                self._backward(batch if live else data.spare, live, factors, sums)
        loss, terms = self._means(sums, total)
        norm, factor, ok = self._clip(loss)
        lr = self.lr(step)
        self.stands_at = None
        self.optimizers.step(lr, factor, ok)
        self.scale.update(ok)
        self.stands_at = step + 1
        self.zero_grad()
        return StepResult(loss, norm, ok, terms, lr, amounts)

    def _over_ranks(self, data: StepBatches) -> tuple[dict[str, float], dict[str, float]]:
        """The step's weights and amounts over all ranks, in one exchange."""
        both = processes.sum_over_ranks(
            self.world, {AMOUNT + k: n for k, n in data.amounts.items()} | data.weights
        )
        amounts = {k.removeprefix(AMOUNT): both.pop(k) for k in list(both) if k.startswith(AMOUNT)}
        return both, amounts

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP all-reduces gradients in the last micro-batch's backward pass only."""
        if isinstance(self.synced, DistributedDataParallel) and not last:
            return self.synced.no_sync()
        return contextlib.nullcontext()

    def _backward(
        self, batch: Any, live: bool, factors: dict[str, float], sums: dict[str, Tensor]
    ) -> None:
        terms = self._call(self.synced, batch, "loss")
        used = [k for k in factors if k in terms]
        # DDP averages over ranks; the objective is a sum.
        loss = sum(factors[k] * self.world.size * terms[k] for k in used)
        if len(used) < len(self.task.terms):
            loss = loss + self._touch()
        (loss * self.scale.scale * float(live)).backward()
        for k in used:
            if live:
                sums[k] += terms[k].detach()

    @property
    def eval_precision(self) -> str:
        """What evaluations compute in."""
        return "fp32" if self.exact_evaluation else self.cfg.precision

    def evaluate(self, batch: Any) -> tuple[dict[str, Tensor | float], dict[int, Any]]:
        """What the task finds in a batch, in `eval_precision`."""
        if not self.exact_evaluation:
            return self._call(self.module, batch, "evaluate")
        batch = to_device(batch, self.world.device)
        with exact_products():
            return self.task.evaluate(self.model, batch)

    def _call(self, module: nn.Module, batch: Any, function: str) -> Any:
        batch = to_device(batch, self.world.device)
        # what the last batch left in the graphs' memory may be overwritten
        if self.cfg.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if isinstance(self.module, Cast):
            return module(batch, function)
        with autocast(self.cfg.precision, self.world.device):
            return module(batch, function)

    def _touch(self) -> Tensor:
        """0, with a zero gradient for every parameter: the head of an absent term takes part as it
        does elsewhere."""
        return 0.0 * torch.stack([p.sum() for p in self.optimizers.params]).sum()

    def _means(
        self, sums: dict[str, Tensor], total: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective and the mean of each term, over ranks; NaN where the whole batch had no
        target."""
        if not sums:
            return torch.full((), math.nan, device=self.world.device), {}
        means = torch.stack([sums[k] / total[k] for k in sums])
        processes.all_reduce_sum(self.world, means)
        terms = dict(zip(sums, means.unbind(), strict=True))
        return torch.stack([self.task.terms[k] * mean for k, mean in terms.items()]).sum(), terms

    def _clip(self, loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The gradients' norm without the loss scale, what to multiply them with, and whether all
        is finite."""
        norm = self.optimizers.norm() / self.scale.scale
        ok = torch.isfinite(norm) & torch.isfinite(loss)
        if not self.cfg.clip and not self.scale.on:
            return norm, None, ok
        factor = (
            (self.cfg.clip / (norm + 1e-6)).clamp(max=1.0)
            if self.cfg.clip
            else torch.ones_like(norm)
        )
        return norm, factor / self.scale.scale, ok

    def zero_grad(self) -> None:
        """Forget the gradients: in place where they are views of DDP's buckets or stay beside a
        CUDA graph."""
        if self.world.size == 1 and not self.cfg.cuda_graphs:
            for p in self.optimizers.params:
                p.grad = None
        else:
            torch._foreach_zero_([p.grad for p in self.optimizers.params if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Everything that an uninterrupted run would have here at this step."""
        named = checkpoint.with_prefix
        state = named(
            "model", {k: v for k, v in self.model.state_dict().items() if self.task.stored(k)}
        )
        return (
            state
            | named("optimizer", self.optimizers.state())
            | named("loss_scale", self.scale.state())
        )

    def load_state(self, tensors: dict[str, Tensor], step: int) -> None:
        self.assemble(step)
        load_weights(self.model, checkpoint.part(tensors, "model"), self.task.stored)
        self.optimizers.load_state(checkpoint.part(tensors, "optimizer"))
        self.scale.load_state(checkpoint.part(tensors, "loss_scale"))
        self.stands_at = step
        if isinstance(self.module, Cast):
            self.module.refresh()


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    stored: Callable[[str], bool] = lambda name: True,
    assign: bool = False,
) -> None:
    """Load what is `stored` of a model's state, all of it and nothing else; `assign`: the tensors
    themselves."""
    wrong = model.load_state_dict(weights, strict=False, assign=assign)
    missing = [name for name in wrong.missing_keys if stored(name)]
    if missing or wrong.unexpected_keys:
        raise RuntimeError(
            f"a checkpoint's weights lack {missing} and have {wrong.unexpected_keys} too many"
        )


def check_replicas(model: nn.Module, world: World) -> None:
    """Stop where the ranks' parameters are no longer the same bits."""
    if world.size == 1:
        return
    bits = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    sums = processes.gather(world, int(torch.stack(bits).sum()))
    different = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if different:
        raise RuntimeError(
            f"the parameters of ranks {different} differ from rank 0's; resume from a checkpoint"
        )
