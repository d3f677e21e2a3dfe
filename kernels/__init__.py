"""One file an operation: the plain PyTorch reference, the Triton kernel, its autograd function, one public function."""

from __future__ import annotations

from config import UserError


def choose(kernels: str, device_type: str) -> str:
    """Resolve `--kernels` once, at start-up: the implementation that every operation will use."""
    if kernels == "triton":
        if device_type != "cuda":
            raise UserError(f"--kernels triton needs a CUDA GPU and this run is on {device_type}; use --kernels torch")
        raise UserError("--kernels triton: no operation has a Triton kernel yet; use --kernels torch")
    return "torch"
