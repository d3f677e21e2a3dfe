"""One optimizer step. This code never looks inside a batch, a model or a loss: the Task does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from config import Resolved
from engine import processes
from engine.loader import StepBatches
from engine.optim import Optimizers, Span, lr_multiplier, span_at
from engine.precision import DTYPES, Cast, LossScale, autocast, casts_once, exact_products
from engine.processes import World
from engine.task import Task
from storage import checkpoint


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy every tensor of a batch to the device. On CUDA this does not wait for the copies. On MPS
    it must: an unfinished copy reads memory that Python may have freed."""
    return tree_map_only(Tensor, lambda v: v.to(device, non_blocking=device.type == "cuda"), batch)


def seed_draws(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the generators from these four numbers, so that a micro-batch draws the same numbers
    after a resume."""
    mixed = int(np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)[0])
    if torch.accelerator.is_available():
        torch.manual_seed(mixed)
    else:  # manual_seed would format the call stack for each kind of accelerator: a millisecond
        torch.default_generator.manual_seed(mixed)


# --- one optimizer step

AMOUNT = "amount "  # prefix of an amount's key in the dict that ranks exchange with the weights


class TaskModule(nn.Module):
    """The module that DDP wraps: its forward pass is a method of the task applied to the model, so
    DDP sees every use of a parameter."""

    def __init__(self, task: Task, model: nn.Module):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Any, function: str) -> Any:
        """Call the task's `loss` or `evaluate`, named by `function`, with the model and a batch."""
        return getattr(self.task, function)(self.model, batch)


@dataclass
class StepResult:
    """Figures of one optimizer step. The tensors are scalars that the device may still compute."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    ok: Tensor  # False: loss or gradient is not finite, so the update was skipped
    terms: dict[str, Tensor]  # the mean of each loss term
    lr: float
    amounts: dict[str, float]  # of the step's batches, summed over all ranks

    def copy_to_host(self) -> Callable[[], list[float]]:
        """Start to copy loss, grad_norm, ok and the terms. The returned function waits for them."""
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


class TrainStep:
    """One optimizer step: forward and backward over micro-batches, all-reduce, clip, update.

    Each loss term is divided by its weight over all micro-batches and ranks. The update therefore
    does not depend on how the batch is divided among them.
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
        # of the schedule: more than one if its decay was restarted
        self.spans = [Span(0, cfg.steps)]
        self.signature: Any = None
        self.settled = True  # whether DDP's buckets keep their layout
        # How many steps the parameters have had. None while an update is in progress.
        self.weights_step: int | None = 0
        self.module: nn.Module  # computes the task's loss or evaluation
        self.synced: nn.Module  # like `module`, but its backward pass also all-reduces gradients
        self.optimizers: Optimizers
        self.assemble(0)

    def assemble(self, step: int) -> None:
        """Rebuild DDP, the optimizers and the cast copies if the task's groups of parameters differ
        at this step from those of the step before."""
        groups = self.task.groups(self.model, step)
        signature = [group.signature() for group in groups]
        if signature == self.signature:
            return
        trained = {name for group in groups for name in group.params}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = None  # under DDP it is a view of the old buckets
        # Overwrites the old DDP, whose memory the new one needs.
        self.module = self.synced = TaskModule(self.task, self.model)
        copies = None
        if casts_once(self.cfg.precision, self.cfg.without):
            alone = self.world.size == 1
            self.module = self.synced = Cast(self.module, DTYPES[self.cfg.precision], alone)
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
            self.settled = self.world.size < 3
        elif self.cfg.cuda_graphs:
            # A gradient that a CUDA graph returns lies in the graph's memory, which the next replay
            # overwrites. Gradients that exist already are added to in place.
            for parameter in self.optimizers.params:
                parameter.grad = torch.zeros_like(parameter)

    def lr(self, step: int) -> float:
        """The learning rate of a step (0-based), before each group's scale."""
        cfg = self.cfg
        return cfg.lr * lr_multiplier(
            step, span_at(step, self.spans), cfg.warmup_steps, cfg.schedule, cfg.min_lr
        )

    def __call__(
        self, step: int, data: StepBatches, stop: Callable[[], int] = lambda: 0
    ) -> StepResult | None:
        """Update the model with step `step` (0-based).

        `stop` is asked before each micro-batch. If it returns true, nothing is updated and the
        result is None.
        """
        self.assemble(step)
        self.model.train()
        if not self.settled:
            # After its first backward pass DDP divides the gradients into other buckets. The sums of
            # three ranks or more depend on the buckets in their last bits (those of two do not). So
            # a pass without weight comes first: else a resumed run would have other bits.
            self._backward(data.spare, False, self.task.terms, {})
            self.zero_grad()
            self.settled = True
        total, amounts = self._sum_over_ranks(data)
        factors = {k: self.task.terms[k] / w for k, w in total.items() if w}
        sums = {k: torch.zeros((), device=self.world.device) for k in factors}
        for micro, batch in enumerate(data.batches):
            if stop():
                self.zero_grad()
                return None
            seed_draws(self.cfg.seed, step, micro, self.world.rank)
            with self._sync_gradients(last=micro == len(data.batches) - 1):
                # A rank that has no rows left computes a spare batch with weight zero, because DDP
                # waits for every rank's gradients.
                live = batch is not None
                self._backward(batch if live else data.spare, live, factors, sums)
        loss, terms = self._means(sums, total)
        norm, factor, ok = self._clip(loss)
        lr = self.lr(step)
        self.weights_step = None
        self.optimizers.step(lr, factor, ok)
        self.scale.update(ok)
        self.weights_step = step + 1
        self.zero_grad()
        return StepResult(loss, norm, ok, terms, lr, amounts)

    def _sum_over_ranks(self, data: StepBatches) -> tuple[dict[str, float], dict[str, float]]:
        """The step's weights and amounts, summed over all ranks in one exchange."""
        both = processes.sum_over_ranks(
            self.world, {AMOUNT + k: n for k, n in data.amounts.items()} | data.weights
        )
        amounts = {k.removeprefix(AMOUNT): both.pop(k) for k in list(both) if k.startswith(AMOUNT)}
        return both, amounts

    def _sync_gradients(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Make DDP all-reduce the gradients only in the last micro-batch's backward pass."""
        if isinstance(self.synced, DistributedDataParallel) and not last:
            return self.synced.no_sync()
        return contextlib.nullcontext()

    def _backward(
        self, batch: Any, live: bool, factors: dict[str, float], sums: dict[str, Tensor]
    ) -> None:
        terms = self._call(self.synced, batch, "loss")
        used = [k for k in factors if k in terms]
        # DDP averages gradients over ranks, but the objective is a sum: so multiply by the ranks.
        loss = sum(factors[k] * self.world.size * terms[k] for k in used)
        if len(used) < len(self.task.terms):
            loss = loss + self._zero_term()
        (loss * self.scale.scale * float(live)).backward()
        for k in used:
            if live:
                sums[k] += terms[k].detach()

    @property
    def eval_precision(self) -> str:
        """The number format of evaluations: fp32 or the run's precision."""
        return "fp32" if self.exact_evaluation else self.cfg.precision

    def evaluate(self, batch: Any) -> tuple[dict[str, Tensor | float], dict[int, Any]]:
        """The task's sums and records for a batch, computed in `eval_precision`."""
        if not self.exact_evaluation:
            return self._call(self.module, batch, "evaluate")
        batch = to_device(batch, self.world.device)
        with exact_products():
            return self.task.evaluate(self.model, batch)

    def _call(self, module: nn.Module, batch: Any, function: str) -> Any:
        batch = to_device(batch, self.world.device)
        if self.cfg.cuda_graphs:  # results of the last replay may now be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        if isinstance(self.module, Cast):
            return module(batch, function)
        with autocast(self.cfg.precision, self.world.device):
            return module(batch, function)

    def _zero_term(self) -> Tensor:
        """A zero that depends on every parameter. It gives a zero gradient to the head of a term
        that is absent here, for DDP expects one from every parameter."""
        return 0.0 * torch.stack([p.sum() for p in self.optimizers.params]).sum()

    def _means(
        self, sums: dict[str, Tensor], total: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective and the mean of each term over all ranks. NaN if no rank had a target."""
        if not sums:
            return torch.full((), math.nan, device=self.world.device), {}
        means = torch.stack([sums[k] / total[k] for k in sums])
        processes.all_reduce_sum(self.world, means)
        terms = dict(zip(sums, means.unbind(), strict=True))
        return torch.stack([self.task.terms[k] * mean for k, mean in terms.items()]).sum(), terms

    def _clip(self, loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the gradients' norm without the loss scale, the factor that clips and unscales
        them (None: 1), and whether loss and norm are finite."""
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
        """Clear the gradients: in place if DDP's buckets or CUDA graphs refer to their memory."""
        if self.world.size == 1 and not self.cfg.cuda_graphs:
            for p in self.optimizers.params:
                p.grad = None
        else:
            torch._foreach_zero_([p.grad for p in self.optimizers.params if p.grad is not None])

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a resumed run needs to give the same bits as an uninterrupted one."""
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
        """Load what `state` returned after `step` steps."""
        self.assemble(step)
        load_weights(self.model, checkpoint.without_prefix(tensors, "model"), self.task.stored)
        self.optimizers.load_state(checkpoint.without_prefix(tensors, "optimizer"))
        self.scale.load_state(checkpoint.without_prefix(tensors, "loss_scale"))
        self.weights_step = step
        if isinstance(self.module, Cast):
            self.module.refresh()


def load_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    stored: Callable[[str], bool] = lambda name: True,
    assign: bool = False,
) -> None:
    """Load weights into the model. They must be exactly the parameters that are `stored`.

    With `assign` the model takes the tensors themselves, not copies. Raises RuntimeError if weights
    are missing or unexpected.
    """
    wrong = model.load_state_dict(weights, strict=False, assign=assign)
    missing = [name for name in wrong.missing_keys if stored(name)]
    if missing or wrong.unexpected_keys:
        raise RuntimeError(
            f"the weights of a checkpoint lack {missing} and have {wrong.unexpected_keys} too many"
        )


def check_replicas(model: nn.Module, world: World) -> None:
    """Raise RuntimeError if the ranks' parameters are not bit for bit the same."""
    if world.size == 1:
        return
    bits = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
    sums = processes.gather(world, int(torch.stack(bits).sum()))
    different = [rank for rank, value in enumerate(sums) if value != sums[0]]
    if different:
        raise RuntimeError(
            f"the parameters of ranks {different} differ from rank 0's; resume from a checkpoint"
        )
