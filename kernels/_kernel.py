"""What the rest of the project needs to know of a kernel, declared once in the kernel's own file.

A public file of this package with a `KERNEL` is a kernel, and nothing else names it. `--kernels`
accepts it, the model takes its operations, and the contract of the tests, the proof for real cards,
the stages and the comparison of kernels run its example.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from config import GPTConfig, RunConfig, TrainConfig
from kernels._card import Card


@dataclass(frozen=True)
class Example:
    """One use of an operation.

    `reference` and `kernel` take the inputs, which all get gradients, and return a tensor or a
    tuple. `moved`: the fewest bytes that the forward and the backward pass together must read and
    write.
    """

    inputs: tuple[Tensor, ...]
    reference: Callable[..., Any]
    kernel: Callable[..., Any]
    moved: float = 0.0


def masks_documents(cfg: RunConfig) -> bool:
    """Whether attention must keep the documents of a window apart."""
    return isinstance(cfg, TrainConfig) and cfg.document_mask


def _every_run(cfg: RunConfig) -> bool:
    return True


def _no_operation(config: GPTConfig) -> dict[str, Any]:
    return {}


def _no_reason(cfg: RunConfig, card: Card | None) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """How a run chooses a kernel and what it computes with it."""

    about: str
    """What it does, in a few words."""
    example: Callable[..., Example] | None = None
    """example(rows, config, dtype=, device=): a use with that many tokens and the widths of
    `config`. None for AdamW, which has no gradients."""
    ops: Callable[[GPTConfig], Mapping[str, Any]] = _no_operation
    """The fields of `kernels.ops.Ops` that it replaces. Loss and optimizer ask for their kernel by
    name."""
    automatic: Callable[[RunConfig], bool] = _every_run
    """Whether `--kernels auto` takes it for this run."""
    refusal: Callable[[RunConfig, Card | None], str | None] = _no_reason
    """Why it cannot run, as the end of a sentence that begins with its name. The card is None for
    this process's GPU."""
    without: str | None = None
    """The value of --without that turns it off."""
    device: str = "cuda"
    """cuda: it is in Triton. cpu: it is in PyTorch's operations and needs a CPU."""


@functools.cache
def all_kernels() -> dict[str, Kernel]:
    """The kernels by name, which is their file's, in alphabetical order."""
    package = importlib.import_module(__package__ or "kernels")
    modules = {
        name: importlib.import_module(f"{package.__name__}.{name}")
        for _, name, _ in pkgutil.iter_modules(package.__path__)
        if not name.startswith("_")
    }
    return {
        name: modules[name].KERNEL for name in sorted(modules) if hasattr(modules[name], "KERNEL")
    }
