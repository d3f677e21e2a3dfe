"""What every kernel file needs from Triton, which may be missing.

With TRITON_INTERPRET=1 in the environment, the same kernels run slowly on a CPU. The tests do this.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU does not need Triton, and launches no kernel
    triton = tl = None

__all__ = ["INTERPRETED", "device_of", "jit", "multiprocessors", "no_triton_reason", "tl", "triton"]

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def _patch_interpreter() -> None:
    """Let loops count to a scalar in the interpreter of Triton 3.6 under numpy 2.4.

    That interpreter stores scalars as arrays of one element, and int() of numpy 2.4 no longer
    converts those. Later versions of Triton squeeze them first.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_with_index


if INTERPRETED and triton.__version__.startswith("3.6."):
    _patch_interpreter()


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit, or the plain function without Triton, so that the file can still be imported."""
    return function if triton is None else triton.jit(function)


def no_triton_reason(device_type: str) -> str | None:
    """Why Triton kernels cannot run on this kind of device, as the end of a sentence; None if they
    can."""
    if triton is None:
        return "needs Triton, which is not installed (pip install triton)"
    if device_type != "cuda" and not INTERPRETED:
        return f"needs a CUDA GPU and this run is on {device_type}"
    return None if INTERPRETED else _no_compiler_reason()


def _no_compiler_reason() -> str | None:
    """Why Triton cannot compile the code that launches its kernels; None if it can.

    On Linux, Triton runs $CC, else gcc, else clang. Triton for Windows brings its own compiler.
    """
    if sys.platform != "linux" or any(map(shutil.which, _compilers())):
        return None
    return (
        "needs a C compiler: install gcc (apt install gcc) or name yours in CC "
        f"({_compilers()[0]} was not found)"
    )


def _compilers() -> tuple[str, ...]:
    named = os.environ.get("CC")
    return ("gcc", "clang") if named is None else (named,)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of the GPU's multiprocessors. The interpreter gets 3, so that the loops over programs
    are tested too."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 3
    )


def device_of(tensor: Tensor) -> Any:
    """The context in which kernels launch on the device that holds `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device("cpu")
