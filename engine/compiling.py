"""What torch.compile is given: the whole model or its blocks, and whether it can work here."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.nn as nn

from base.machine import cores
from config import RunConfig
from engine.processes import World
from kernels._triton import no_triton_reason

BLOCK_GRAPHS = 32


def compile_unit(cfg: RunConfig, world: World, whole: bool = True) -> str:
    """model or block; `whole`: whether what runs is the model's own forward pass. Compiled whole, a
    model has all its gradients at once, and no all-reduce overlaps with them; and on a CPU the
    head's loss, which works on pieces that stay in the caches, is taken apart into whole passes."""
    if cfg.compile_unit != "auto":
        return cfg.compile_unit
    return "block" if world.size > 1 or world.device.type == "cpu" or not whole else "model"


def compiler_lacks(device_type: str) -> str | None:
    """What stops torch.compile on this kind of device, as "needs ..."; None where nothing does.

    It writes Triton kernels for CUDA and C++ for a CPU, and finds a compiler only in the first
    step.
    """
    if device_type == "cuda":
        return no_triton_reason(device_type)
    if device_type != "cpu":
        return None
    import torch._inductor.config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):  # OSError: $CXX is a folder, or may not be run
        name = os.environ.get("CXX", "cl") if sys.platform == "win32" else inductor.cpp.cxx[-1]
        way = {"linux": " (apt install g++)", "darwin": " (xcode-select --install)"}.get(
            sys.platform, ""
        )
        return f"needs a C++ compiler: install one{way} or name yours in CXX ({name} does not run)"
    return None


def compile_model(model: nn.Module, cfg: RunConfig, world: World, whole: bool = True) -> None:
    """torch.compile the model in place; its blocks are the members of its module lists."""
    # here: a run that does not compile does without its second of imports
    import torch._inductor.config as inductor

    # Each rank starts these processes, by default one for each of the machine's cores.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = min(32, max(1, cores() // world.local_size))
    # The run has chosen its products, and its banner names them.
    warnings.filterwarnings(
        "ignore", "TensorFloat32 tensor cores for float32 matrix multiplication"
    )
    units = [model]
    if compile_unit(cfg, world, whole) == "block":
        # All blocks share one function's graphs: of the first, a middle and the last one, for one
        # length and for any, in training and in evaluation. Past the limit, 8 by default, they
        # would run uncompiled.
        torch._dynamo.config.recompile_limit = BLOCK_GRAPHS  # ty: ignore[invalid-assignment]
        units = [
            block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part
        ]
    for unit in units:
        unit.compile(mode="reduce-overhead" if cfg.cuda_graphs else None)
