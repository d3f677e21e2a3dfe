"""One file an operation: the plain PyTorch reference, the Triton kernel, its autograd function, one public function.

Which operations run in Triton is chosen once, here, at start-up, and handed to the model and the optimizer as a tuple
of names (GPTConfig.triton). Nothing falls back in silence.
"""

from __future__ import annotations

from config import UserError, nearest
from kernels._triton import missing

OPERATIONS = ("cross_entropy", "layer_norm", "bias_gelu", "attention", "adamw")
FUSED_BY_COMPILER = ("layer_norm", "bias_gelu")  # torch.compile makes the like of these kernels by itself


def named(kernels: str) -> tuple[str, ...]:
    """The operations in Triton of a resolved `--kernels`: torch, or their names with commas between."""
    return () if kernels in ("auto", "torch") else tuple(_asked(kernels))


def choose(
    kernels: str, device_type: str, *, compiled: bool, documents: bool, dropout: float
) -> tuple[str, str | None]:
    """Resolve `--kernels`, and say what `auto` has to do without. Raises UserError.

    auto: on a CUDA GPU, what torch.compile cannot make of PyTorch's operations, and attention where documents would
    need a mask. triton: every operation. Else the names of operations.
    """
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return "torch", None
    names = _automatic(compiled, documents) if kernels == "auto" else _asked(kernels)
    reason = missing(device_type)
    if reason is None and dropout and "attention" in names:
        reason, names = "has no attention with dropout", [name for name in names if name != "attention"]
    elif reason:
        lost, names = ", ".join(names), []
        reason = f"{reason}: {lost}" if kernels == "auto" else reason
    chosen = ",".join(names) or "torch"
    if reason and kernels != "auto":
        raise UserError(f"--kernels {kernels} {reason}; use --kernels {chosen}")
    return chosen, f"--kernels auto {reason}; PyTorch's operations run in place of it" if reason else None


def _automatic(compiled: bool, documents: bool) -> list[str]:
    left = FUSED_BY_COMPILER if compiled else ()
    return [name for name in OPERATIONS if name not in left and (name != "attention" or documents)]


def _asked(kernels: str) -> list[str]:
    names = list(OPERATIONS) if kernels == "triton" else kernels.split(",")
    for name in names:
        if name not in OPERATIONS:
            known = ["auto", "torch", "triton", *OPERATIONS]
            raise UserError(f"--kernels {name}: no such kernel{nearest(name, known)}; there are {', '.join(known)}")
    return names
