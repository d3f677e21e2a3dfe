"""Learning-rate schedules, parameter groups, AdamW and Muon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import kernels
from config import RunConfig
from kernels.adamw import Table, adamw, global_norm


@dataclass(frozen=True)
class Span:
    """The steps that one schedule covers, from `begin` to `end` (exclusive). A run has several if
    its decay was restarted."""

    begin: int
    end: int


def span_at(step: int, spans: Sequence[Span]) -> Span:
    """The span that covers a step: the last one that has begun."""
    return next(span for span in reversed(spans) if span.begin <= step or span.begin == 0)


def lr_multiplier(
    step: int, steps: int | Span, warmup: int, schedule: str, end: float = 0.1
) -> float:
    """The learning rate at `step` (0-based) of `steps`, as a share of the peak.

    After a linear warm-up, cosine and linear fall to `end`. wsd (warmup, stable, decay: Hu et al.
    2024) stays at 1 and falls linearly to `end` over the last fifth. constant stays at 1.
    slanted-triangular (Howard and Ruder 2018) ignores `warmup`: it rises over the first tenth and
    falls to 1/32.

    A span that begins after step 0 belongs to a restarted decay. It starts at the peak, without a
    second warm-up (but slanted-triangular rises again).
    """
    begin, steps = (steps.begin, steps.end) if isinstance(steps, Span) else (0, steps)
    if schedule == "slanted-triangular":
        step, steps = step - begin, steps - begin
        peak = max(1, steps // 10)
        rise = step / peak if step < peak else 1 - (step - peak) / max(1, steps - peak)
        return (1 + 31 * rise) / 32
    if step < warmup:
        return (step + 1) / warmup
    begin = max(begin, warmup)
    progress = (step - begin) / max(1, steps - begin)
    if schedule == "cosine":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - (1 - end) * progress
    if schedule == "wsd":
        return 1 - (1 - end) * max(0.0, (progress - 0.8) / 0.2)
    return 1.0


@dataclass
class Group:
    """Parameters, by name, that train with the same optimizer, rate scale and decay."""

    params: dict[str, nn.Parameter]
    weight_decay: float = 0.0
    lr_scale: float = 1.0
    optimizer: str = "adamw"

    def signature(self) -> tuple[Any, ...]:
        """Identifies the group. If it changes, DDP and the optimizers are rebuilt."""
        return tuple(self.params), self.weight_decay, self.lr_scale, self.optimizer


def default_groups(model: nn.Module, cfg: RunConfig) -> list[Group]:
    """Groups of all parameters: matrices with decay, vectors without. With --optimizer muon the
    blocks' matrices are a group of their own."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() >= 2}
    vectors = {name: p for name, p in named.items() if p.dim() < 2}
    hidden = (
        {name: p for name, p in matrices.items() if ".h." in name}
        if cfg.optimizer == "muon"
        else {}
    )
    tables = {name: p for name, p in matrices.items() if name not in hidden}
    groups = [
        Group(tables, cfg.weight_decay),
        Group(vectors, cfg.weight_decay if "decay-groups" in cfg.without else 0.0),
        Group(hidden, cfg.weight_decay, optimizer="muon"),
    ]
    return [group for group in groups if group.params]


class TritonAdamW(torch.optim.AdamW):
    """torch's AdamW with its groups and state, whose update is the kernel in kernels/adamw.py."""

    # Holds addresses of tensors, so it must be dropped when a tensor of the state is replaced.
    table: Table | None = None

    def update(
        self, lr: float, factor: Tensor | None, ok: Tensor, copies: dict[int, Tensor]
    ) -> None:
        """One step with rate `lr` times each group's scale and gradients times `factor`, skipped if
        `ok` is false. The kernel also writes each parameter's copy, found by id(parameter)."""
        params = [p for group in self.param_groups for p in group["params"]]
        self.table = self.table or self._make_table(params, copies)
        device = params[0].device
        rate = torch.full((), lr, device=device)
        one = torch.ones((), device=device) if factor is None else factor
        adamw(
            self.table,
            [p.grad for p in params],
            rate,
            one,
            ok,
            self.defaults["betas"],
            self.defaults["eps"],
        )

    def _make_table(self, params: list[nn.Parameter], copies: dict[int, Tensor]) -> Table:
        for p in params:
            if not self.state[p]:
                moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p] = {"step": torch.zeros((), device=p.device)} | moments
        state = {
            key: [self.state[p][key] for p in params] for key in ("step", "exp_avg", "exp_avg_sq")
        }
        groups = [group for group in self.param_groups for _ in group["params"]]
        return Table(
            [p.detach() for p in params], state["exp_avg"], state["exp_avg_sq"], state["step"],
            [copies.get(id(p)) for p in params],
            [group["lr_scale"] for group in groups], [group["weight_decay"] for group in groups],
        )  # fmt: skip


class Optimizers:
    """AdamW and, for groups that ask for it, Muon (Jordan et al. 2024), stepped together.

    `copies`: cast copies of parameters by name, which matrix products read (engine/precision.py).
    Each step updates them with their parameters.
    """

    def __init__(
        self, groups: Sequence[Group], cfg: RunConfig, copies: Mapping[str, Tensor] | None = None
    ):
        named = {name: p for group in groups for name, p in group.params.items()}
        self.names = {id(p): name for name, p in named.items()}
        self.params = list(named.values())
        self.copies = {
            id(named[name]): copy for name, copy in (copies or {}).items() if name in named
        }
        self.optimizers: list[torch.optim.Optimizer] = []
        self.triton = "adamw" in kernels.named(cfg.kernels)
        adam = [_torch_group(group) for group in groups if group.optimizer == "adamw"]
        muon = [_torch_group(group) for group in groups if group.optimizer == "muon"]
        if adam:
            kind = TritonAdamW if self.triton else torch.optim.AdamW
            fused = "fused-adamw" not in cfg.without
            betas = (cfg.beta1, cfg.beta2)
            self.optimizers.append(
                kind(adam, lr=0.0, betas=betas, eps=1e-8, fused=fused, foreach=False)
            )
        if muon:
            # Scale Muon's updates to the size of AdamW's, so that one learning rate suits both.
            self.optimizers.append(torch.optim.Muon(muon, lr=0.0, adjust_lr_fn="match_rms_adamw"))

    def norm(self) -> Tensor:
        """The norm of all gradients together, an fp32 scalar."""
        grads = [p.grad for p in self.params if p.grad is not None]
        return global_norm(grads) if self.triton else torch.nn.utils.get_total_norm(grads)

    def step(self, lr: float, factor: Tensor | None, ok: Tensor) -> None:
        """Update with rate `lr` (times each group's scale) and gradients times `factor`. Change
        nothing if `ok`, a bool scalar on the device, is false.

        Fused AdamW reads `ok` on the device. The other optimizers cannot, so they wait for the GPU.
        """
        for optimizer in self.optimizers:
            if isinstance(optimizer, TritonAdamW):
                optimizer.update(lr, factor, ok, self.copies)
            else:
                self._step(optimizer, lr, factor, ok)

    def _step(
        self, optimizer: torch.optim.Optimizer, lr: float, factor: Tensor | None, ok: Tensor
    ) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if factor is not None:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], factor)
        if optimizer.defaults.get("fused"):
            # The fused kernel skips the update if this is 1.
            vars(optimizer)["found_inf"] = (~ok).float()
            optimizer.step()
        elif bool(ok):
            optimizer.step()
        with torch.no_grad():
            copied = [p for p in params if id(p) in self.copies]
            if copied:
                torch._foreach_copy_([self.copies[id(p)] for p in copied], copied)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state, by `parameter.key`."""
        return {
            f"{self.names[id(p)]}.{key}": value
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load the state of the parameters that train here, and ignore that of others."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            by_name.setdefault(name, {})[part] = tensor
        for optimizer in self.optimizers:
            if isinstance(optimizer, TritonAdamW):
                optimizer.table = None
            for p in [p for group in optimizer.param_groups for p in group["params"]]:
                for part, tensor in by_name.get(self.names[id(p)], {}).items():
                    optimizer.state[p][part] = tensor.detach().clone().to(p.device)


def _torch_group(group: Group) -> dict[str, Any]:
    params = list(group.params.values())
    return {"params": params, "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
