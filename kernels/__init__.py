"""One file an operation: the plain PyTorch reference, the Triton kernel, its autograd function, one public function.

Which operations run in Triton is chosen once, here, at start-up, and handed to the model and the optimizer as a tuple
of names (GPTConfig.triton). Nothing falls back in silence.
"""

from __future__ import annotations

from config import UserError
from kernels._triton import missing

OPERATIONS = {  # name: what the Triton kernel does better than the PyTorch operations in its place
    "cross_entropy": "logits are read once and become their gradient in place",
    "layer_norm": "the residual's addition and the norm in one pass",
    "bias_gelu": "bias and GELU in one pass, the bias's gradient with it",
    "attention": "one gradient for q, k and v; documents without a mask",
    "adamw": "all parameters in one launch: clipping, update and the copy that the products read",
}
COMPILED = ("cross_entropy", "attention", "adamw")  # what torch.compile cannot make of the PyTorch operations


def choose(kernels: str, device_type: str, head_dim: int = 64) -> tuple[str, ...]:
    """Resolve `--kernels`: the names of the operations that run in Triton. Raises UserError."""
    reason = missing(device_type)
    if kernels == "triton" and reason:
        raise UserError(f"--kernels triton {reason}; use --kernels torch")
    return tuple(OPERATIONS) if kernels == "triton" else ()
