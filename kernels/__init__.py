"""One file an operation: the plain PyTorch reference, the kernel, its autograd function, one public
function.

Which operations run on the kernels here is chosen once, at start-up, and handed to the model and
the optimizer as a tuple of names (GPTConfig.kernels). Nothing falls back in silence.
"""

from __future__ import annotations

import torch

from config import RunConfig, TrainConfig, UserError, head_dim, known_names
from kernels import _card, attention, cpu_attention
from kernels._card import Card
from kernels._triton import no_triton_reason

TRITON = ("cross_entropy", "layer_norm", "bias_gelu", "attention", "adamw")
OPERATIONS = (*TRITON, "cpu_attention")
SETS = ("auto", "torch", "triton")  # of operations
# of --without
WITHOUT_NAMES = {
    "attention": "flash-attention",
    "cpu_attention": "flash-attention",
    "adamw": "fused-adamw",
}
# torch.compile makes the like of these kernels by itself
FUSED_BY_COMPILER = ("layer_norm", "bias_gelu")


def operation_names(kernels: str) -> tuple[str, ...]:
    """The operations of a resolved `--kernels`: torch, or names with commas between."""
    return () if kernels in ("auto", "torch") else tuple(_parse_names(kernels))


def choose(cfg: RunConfig, device_type: str, card: Card | None = None) -> tuple[str, str | None]:
    """Resolve `--kernels` where all else is resolved, and say what `auto` has to do without. Raises
    UserError.

    auto: on a CUDA GPU what torch.compile cannot make of PyTorch's operations, and attention where
    documents would need a mask; on a CPU what is faster there. triton: every operation in Triton.
    Else the names of operations. What does not fit `card`, by default this process's own GPU, is
    never chosen.
    """
    if cfg.kernels == "torch":
        return "torch", None
    auto = cfg.kernels == "auto"
    names = (
        _parse_names(cfg.kernels)
        if not auto
        else [n for n in _automatic(cfg, device_type) if not _is_left_out(n, cfg)]
    )
    lacking: dict[str, list[str]] = {}
    for name in names:
        if reason := _unavailable_reason(name, cfg, device_type, card):
            lacking.setdefault(reason, []).append(name)
    chosen = (
        ",".join(name for name in names if not any(name in lost for lost in lacking.values()))
        or "torch"
    )
    reasons = "; ".join(f"{', '.join(lost)} {reason}" for reason, lost in lacking.items())
    if lacking and cfg.kernels != "auto":
        raise UserError(f"--kernels {cfg.kernels}: {reasons}; use --kernels {chosen}")
    return (
        chosen,
        f"PyTorch's operations run in place of some kernels: {reasons}" if lacking else None,
    )


def _automatic(cfg: RunConfig, device_type: str) -> list[str]:
    if device_type == "cuda":
        left = FUSED_BY_COMPILER if cfg.compile else ()
        return [
            name
            for name in TRITON
            if name not in left and (name != "attention" or _masks_documents(cfg))
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
    """Why an operation cannot run here; None where it can."""
    if name == "attention" and cfg.dropout:
        return "has no dropout"
    if _is_left_out(name, cfg):
        return f"is not --without {WITHOUT_NAMES[name]}"
    if name != "cpu_attention":
        return no_triton_reason(device_type) or (
            _attention_unavailable_reason(cfg, card) if name == "attention" else None
        )
    if device_type != "cpu":
        return "needs a CPU"
    return "has no documents" if _masks_documents(cfg) else None


def _attention_unavailable_reason(cfg: RunConfig, card: Card | None) -> str | None:
    chosen = attention.choose_tiles(card or _card.card(), cfg.precision, head_dim(cfg))
    return chosen if isinstance(chosen, str) else None


def _masks_documents(cfg: RunConfig) -> bool:
    """Whether attention keeps documents apart."""
    return isinstance(cfg, TrainConfig) and cfg.document_mask


def _parse_names(kernels: str) -> list[str]:
    if kernels == "triton":
        return list(TRITON)
    names = known_names("--kernels", kernels, (*SETS, *OPERATIONS))
    if mixed := next((name for name in names if name in SETS), None):
        raise UserError(f"--kernels {kernels}: {mixed} stands alone; leave the other names out")
    return names
