"""Kernels, one file per operation: a plain PyTorch reference, the kernel, its autograd function and
one public function.

`choose` decides once, at start-up, which operations run on a kernel. The model and the optimizer
receive their names (GPTConfig.kernels). No operation falls back to PyTorch without a warning.
"""

from __future__ import annotations

import torch

from config import RunConfig, TrainConfig, UserError, head_dim, known_names
from kernels import _card, attention, cpu_attention
from kernels._card import Card
from kernels._triton import no_triton_reason

TRITON = ("cross_entropy", "layer_norm", "bias_gelu", "attention", "adamw")
OPERATIONS = (*TRITON, "cpu_attention")
SETS = ("auto", "torch", "triton")  # values of --kernels that name several operations at once
# The value of --without that turns an operation off.
WITHOUT_NAMES = {
    "attention": "flash-attention",
    "cpu_attention": "flash-attention",
    "adamw": "fused-adamw",
}
# torch.compile fuses these operations by itself, in as many bytes.
FUSED_BY_COMPILER = ("layer_norm",)


def operation_names(kernels: str) -> tuple[str, ...]:
    """The operations in a resolved `--kernels`, which is torch or names separated by commas."""
    return () if kernels in ("auto", "torch") else tuple(_parse_names(kernels))


def choose(cfg: RunConfig, device_type: str, card: Card | None = None) -> tuple[str, str | None]:
    """Resolve `--kernels`, after all other options are resolved. Returns its value and, for `auto`,
    a warning about kernels that cannot run.

    `auto` on a CUDA GPU chooses the kernels that torch.compile cannot produce, and attention where
    documents would otherwise need a mask. On a CPU it chooses what is faster there. `triton` means
    every operation in Triton. Any other value names operations. A kernel that does not fit `card`
    (default: this process's GPU) is never chosen. Raises UserError if a named kernel cannot run.
    """
    if cfg.kernels == "torch":
        return "torch", None
    auto = cfg.kernels == "auto"
    names = (
        _parse_names(cfg.kernels)
        if not auto
        else [n for n in _automatic(cfg, device_type) if not _is_left_out(n, cfg)]
    )
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
    if device_type == "cuda":
        compiled = FUSED_BY_COMPILER if cfg.compile else ()
        return [
            name
            for name in TRITON
            if name not in compiled and (name != "attention" or _masks_documents(cfg))
        ]
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    faster = (
        device_type == "cpu"
        and "attention-backend" not in cfg.without
        and cpu_attention.is_faster(dtype)
    )
    return (
        ["cpu_attention"] if faster and not _unavailable_reason("cpu_attention", cfg, "cpu") else []
    )


def _is_left_out(name: str, cfg: RunConfig) -> bool:
    return WITHOUT_NAMES.get(name) in cfg.without


def _unavailable_reason(
    name: str, cfg: RunConfig, device_type: str, card: Card | None = None
) -> str | None:
    """Why an operation's kernel cannot run here, as the end of a sentence that begins with its
    name; None if it can."""
    if name == "attention" and cfg.dropout:
        return "does not support dropout"
    if _is_left_out(name, cfg):
        return f"is turned off by --without {WITHOUT_NAMES[name]}"
    if name != "cpu_attention":
        return no_triton_reason(device_type) or (
            _attention_unavailable_reason(cfg, card) if name == "attention" else None
        )
    if device_type != "cpu":
        return "needs a CPU"
    return "does not support --document-mask" if _masks_documents(cfg) else None


def _attention_unavailable_reason(cfg: RunConfig, card: Card | None) -> str | None:
    chosen = attention.choose_tiles(card or _card.card(), cfg.precision, head_dim(cfg))
    return chosen if isinstance(chosen, str) else None


def _masks_documents(cfg: RunConfig) -> bool:
    """Whether attention must keep the documents of a window apart."""
    return isinstance(cfg, TrainConfig) and cfg.document_mask


def _parse_names(kernels: str) -> list[str]:
    if kernels == "triton":
        return list(TRITON)
    names = known_names("--kernels", kernels, (*SETS, *OPERATIONS))
    if mixed := next((name for name in names if name in SETS), None):
        raise UserError(
            f"--kernels {kernels}: {mixed} cannot be combined with other names; use --kernels "
            f"{mixed} alone"
        )
    return names
