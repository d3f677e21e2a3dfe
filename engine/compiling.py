"""torch.compile: whether it works here, and whether it compiles the model or each block."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings

import torch
import torch.nn as nn

from base.machine import cores
from config import RunConfig
from engine.processes import World
from kernels._triton import no_triton_reason
from model import GPT

BLOCK_GRAPHS = 32  # graphs that the blocks may share, see compile_model


def compile_unit(cfg: RunConfig, world: World, whole: bool = True) -> str:
    """The part that torch.compile compiles as one: "model" or "block". `whole`: whether training
    calls the model's own forward pass.

    Blocks share their graphs, so twelve compile about as fast as two, and they give the same
    kernels as a whole model: a block leaves the addition of its branch to the next block's norm. A
    model compiled as one yields all gradients together at the end, so with several ranks no
    all-reduce overlaps with the backward pass. On a CPU it would split the head's loss, which works
    on chunks that fit the caches, into passes over the whole logits. Only CUDA graphs prefer a
    whole model, which is one replay in each direction.
    """
    if cfg.compile_unit != "auto":
        return cfg.compile_unit
    one_replay = cfg.cuda_graphs and world.device.type == "cuda" and world.size == 1
    return "model" if one_replay and whole else "block"


def compiler_problem(device_type: str) -> str | None:
    """The compiler that is missing on this kind of device, as "needs ...", or None.

    torch.compile generates Triton kernels for CUDA and C++ for a CPU. By itself it would look for a
    compiler only in the first step.
    """
    if device_type == "cuda":
        return no_triton_reason(device_type)
    if device_type != "cpu":
        return None
    import torch._inductor.config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError):  # OSError: $CXX is a folder or not executable
        name = os.environ.get("CXX", "cl") if sys.platform == "win32" else inductor.cpp.cxx[-1]
        way = {"linux": " (apt install g++)", "darwin": " (xcode-select --install)"}.get(
            sys.platform, ""
        )
        return f"needs a C++ compiler: install one{way} or name yours in CXX ({name} does not run)"
    return None


def compile_model(model: nn.Module, cfg: RunConfig, world: World, whole: bool = True) -> None:
    """torch.compile the model in place. Its blocks are the members of its module lists.

    With blocks on CUDA a GPT's embedding and last norm are compiled too. On a CPU these small
    operations gain less than the compiler takes.
    """
    # Imported here, because it takes a second that other runs save.
    import torch._inductor.config as inductor

    # Each rank starts this many processes. By default it would start one for every core.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = min(32, max(1, cores() // world.local_size))
    # The run has chosen the precision of products already, and its banner names it.
    warnings.filterwarnings(
        "ignore", "TensorFloat32 tensor cores for float32 matrix multiplication"
    )
    if world.device.type == "cpu" and sys.platform == "linux":
        _prepare_cpp()
    mode = "reduce-overhead" if cfg.cuda_graphs else None
    units = [model]
    if compile_unit(cfg, world, whole) == "block":
        # All blocks share the graphs of one function: for the first, a middle and the last block,
        # for one length and any length, in training and evaluation. Above the limit, by default 8,
        # blocks would run uncompiled.
        torch._dynamo.config.recompile_limit = BLOCK_GRAPHS  # ty: ignore[invalid-assignment]
        units = [
            block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part
        ]
        for gpt in model.modules() if world.device.type == "cuda" else ():
            if isinstance(gpt, GPT):
                units.append(gpt.transformer.ln_f)
                gpt.embed = torch.compile(gpt.embed, mode=mode)
    for unit in units:
        unit.compile(mode=mode)


def _prepare_cpp() -> None:
    """Shorten the first step of a run that finds nothing in Inductor's cache.

    Inductor compiles small programs to see which vector instructions work here, most of them with
    PyTorch's headers. PyTorch's own kernels trust the processor's flags, and so do these, if the
    compiler knows the instructions: one that is older than the processor does not, and Inductor
    then looks for those that it knows. A thread compiles the header of all kernels while the first
    graph is traced.
    """
    import torch._inductor.config as inductor
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Kernels
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    def compile_header() -> None:
        with contextlib.suppress(Exception):  # the first graph meets the same error and reports it
            # the header for a kernel that is then not compiled itself
            Kernels.load_pybinding_async([], "void kernel() {}", submit_fn=lambda compile: None)

    # not None: TORCHINDUCTOR_VEC_ISA_OK has set it
    if inductor.cpp.vec_isa_ok is None and compiler_knows_processor():
        inductor.cpp.vec_isa_ok = True
    pick_vec_isa()  # keeps its result, and two threads must not look at a time
    threading.Thread(target=compile_header, daemon=True).start()


def compiler_knows_processor() -> bool:
    """Whether the C++ compiler takes the flags of all of this processor's vector instructions."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

    here = set(x86_isa_checker())  # empty on other processors, whose flags are old
    known = [isa for isa in supported_vec_isa_list if here.issuperset(str(isa).split())]
    flags = [flag for isa in known for flag in isa.build_arch_flags().split()]
    command = [get_cpp_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
