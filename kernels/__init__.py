"""Kernels, one file per operation: a plain PyTorch reference, the kernel, its autograd function,
one public function, and `KERNEL`, which says when a run takes it (_kernel.py).

`choose` decides once, at start-up, which operations run on a kernel. The model and the optimizer
receive their names (GPTConfig.kernels). No operation falls back to PyTorch without a warning.
"""

from __future__ import annotations

from config import GPTConfig, RunConfig, UserError, known_names
from kernels._card import Card
from kernels._kernel import all_kernels
from kernels._triton import no_triton_reason

KERNELS = all_kernels()
TRITON = tuple(name for name, kernel in KERNELS.items() if kernel.device == "cuda")
SETS = ("auto", "torch", "triton")  # values of --kernels that name several operations at once


def operation_names(kernels: str) -> tuple[str, ...]:
    """The operations in a resolved `--kernels`, which is torch or names separated by commas."""
    return () if kernels in ("auto", "torch") else tuple(_parse_names(kernels))


def choose(cfg: RunConfig, device_type: str, card: Card | None = None) -> tuple[str, str | None]:
    """Resolve `--kernels`, after all other options are resolved. Returns its value and, for `auto`,
    a warning about kernels that cannot run.

    `auto` chooses the device's kernels that are faster than what runs without them. `triton` means
    every operation in Triton, by the first of its kernels. Any other value names operations. A kernel that does not fit `card`
    (default: this process's GPU) is never chosen. Raises UserError if a named kernel cannot run.
    """
    if cfg.kernels == "torch":
        return "torch", None
    names = _automatic(cfg, device_type) if cfg.kernels == "auto" else _parse_names(cfg.kernels)
    refused: dict[str, list[str]] = {}  # by reason
    for name in names:
        if reason := _unavailable_reason(name, cfg, device_type, card):
            refused.setdefault(reason, []).append(name)
    chosen = (
        ",".join(name for name in names if not any(name in lost for lost in refused.values()))
        or "torch"
    )
    reasons = "; ".join(f"{', '.join(lost)} {reason}" for reason, lost in refused.items())
    if refused and cfg.kernels != "auto":
        raise UserError(f"--kernels {cfg.kernels}: {reasons}; use --kernels {chosen}")
    return (
        chosen,
        f"PyTorch's operations run in place of some kernels: {reasons}" if refused else None,
    )


def _automatic(cfg: RunConfig, device_type: str) -> list[str]:
    return [
        name
        for name, kernel in KERNELS.items()
        if kernel.device == device_type
        and kernel.without not in cfg.without
        and kernel.automatic(cfg)
    ]


def _unavailable_reason(
    name: str, cfg: RunConfig, device_type: str, card: Card | None
) -> str | None:
    """Why an operation's kernel cannot run here, as the end of a sentence that begins with its
    name; None if it can."""
    kernel = KERNELS[name]
    if kernel.without in cfg.without:
        return f"is turned off by --without {kernel.without}"
    if kernel.device == "cpu":
        elsewhere = None if device_type == "cpu" else "needs a CPU"
    else:
        elsewhere = no_triton_reason(device_type)
    return elsewhere or kernel.refusal(cfg, card)


def _one_for_each_operation() -> list[str]:
    """The kernels in Triton, without those that replace what one before them replaces."""
    names, replaced = list[str](), set[str]()
    for name in TRITON:
        operations = set(KERNELS[name].ops(GPTConfig()))
        if not operations & replaced:
            names.append(name)
            replaced |= operations
    return names


def _parse_names(kernels: str) -> list[str]:
    if kernels == "triton":
        return _one_for_each_operation()
    names = known_names("--kernels", kernels, (*SETS, *KERNELS))
    if mixed := next((name for name in names if name in SETS), None):
        raise UserError(
            f"--kernels {kernels}: {mixed} cannot be combined with other names; use --kernels "
            f"{mixed} alone"
        )
    return names
