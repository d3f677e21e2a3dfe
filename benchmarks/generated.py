"""The bytes that a compiled step would move on a GPU, counted on a machine that needs none.

A micro-batch of the engine's own step runs forward and backward on fake tensors, which have shapes
but no values. Dynamo and AOTAutograd trace it with the CPU as its device. Each of their graphs is
then said to be on CUDA, and Inductor fuses its operations into kernels and counts the bytes that
each of them reads and writes. What runs outside of compiled graphs is counted operation by
operation. The kernels of AdamW, which need addresses, are counted from their parameters.

The trade-off: a count is what kernels must move when each of their inputs and outputs crosses the
memory bus once. It shows no caches and no times, and it uses parts of PyTorch that may change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from config import GPTConfig, TrainConfig, resolve

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COUNTED = ("bf16", "tf32")  # fp16's autocast does not act on tensors that are on a CPU
ALLOCATIONS = ("empty", "new_empty", "detach", "device")  # beginnings of what moves nothing
FILLS = ("zeros", "ones", "new_zeros")  # beginnings of operations that only write


class Kernel(NamedTuple):
    """A launch, or several of the same kind."""

    names: tuple[str, ...]  # its own name, then those of the operations in it
    shapes: tuple[tuple[int, ...], ...]  # of its inputs
    bytes: int  # read and written


class Card:
    """The properties of an H100 that Inductor asks for."""

    major, minor, warp_size, gcnArchName = 9, 0, 32, ""
    multi_processor_count, max_threads_per_multi_processor = 132, 2048
    regs_per_multiprocessor = 65536


def uncounted_reason(precision: str) -> str | None:
    """Why nothing can be counted here, as a sentence without its full stop; None if it can."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from kernels._triton import triton

    if precision not in COUNTED:
        return f"the count knows {' and '.join(COUNTED)}, not {precision}"
    if triton is None:
        return "Inductor needs Triton to generate code for a GPU; pip install triton"
    if not hasattr(TorchDispatchMode, "ignore_compile_internals"):
        return "the count needs a later PyTorch; 2.13 has all of it"
    return None


def generated_kernels(
    config: GPTConfig, batch: int, seq_len: int, precision: str
) -> list[Kernel] | str:
    """The kernels of one step of one micro-batch, or the reason why they cannot be counted. Changes
    this process's PyTorch, so it needs a process of its own."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported
    if reason := uncounted_reason(precision):
        return reason
    import torch

    try:
        return _kernels_of_step(config, batch, seq_len, precision)
    except Exception as error:  # the parts of PyTorch that this uses differ between its builds
        inner = getattr(error, "inner_exception", error)  # of an error in a compiled graph
        first = str(inner).strip().partition("\n")[0]
        return f"the count follows PyTorch 2.13.0+cpu; {torch.__version__} stopped it ({first})"


def _kernels_of_step(config: GPTConfig, batch: int, seq_len: int, precision: str) -> list[Kernel]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from engine.compiling import compile_model
    from engine.precision import DTYPES, Cast, casts_once
    from engine.pretraining import LanguageModelling
    from engine.processes import World
    from engine.shape import runtime_fields
    from engine.step import TaskModule
    from kernels import choose
    from kernels.ops import ops_of
    from model import GPT

    given: Any = dict(seq_len=seq_len, micro_batch=batch, compile=True, precision=precision)
    cfg = resolve(TrainConfig(**given), "cuda")
    cfg = dataclasses.replace(cfg, kernels=choose(cfg, "cuda")[0])
    config = dataclasses.replace(config, **runtime_fields(cfg))
    task: Any = LanguageModelling()
    task.cfg = cfg
    found: list[Kernel] = []
    prepare_compiler()
    backend = functools.partial(counting_backend, found)
    compiled = mock.patch.object(
        torch, "compile", functools.partial(torch.compile, backend=backend)
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = GPT(config, dataclasses.replace(ops_of(config), attention=cudnn_attention))
        with compiled:
            compile_model(model, cfg, World(0, 0, 1, 1, torch.device("cuda", 0)))
        module = TaskModule(task, model.train())
        if casts_once(precision, cfg.without):
            module = Cast(module, DTYPES[precision], in_place=True)
        idx = torch.zeros(batch, seq_len, dtype=torch.int64)
        with head_operations(found), eager_counter(found):
            terms = module({"idx": idx, "targets": idx.clone()}, "loss")
            terms["nll"].backward()
    return [*found, *optimizer_kernels(model, module)]


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The operation that F.scaled_dot_product_attention chooses on Hopper."""
    import torch

    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    return cudnn(q, k, v, None, True, dropout, is_causal=True)[0]


def optimizer_kernels(model: Any, module: Any) -> Iterator[Kernel]:
    """The kernels of kernels/adamw.py. The norm reads the gradients. The update reads parameter,
    gradient and both moments, and writes all but the gradient, and the copy in the products'
    format."""
    params = sum(p.numel() for p in model.parameters())
    copies = sum(copy.nbytes for copy in getattr(module, "copies", {}).values())
    yield Kernel(("global_norm",), (), 4 * params)
    yield Kernel(("adamw",), (), 28 * params + copies)


# --- outside of compiled graphs


def eager_counter(found: list[Kernel]) -> contextlib.AbstractContextManager[Any]:
    """A context in which every operation outside of compiled graphs adds itself to `found`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from kernels.linear_cross_entropy import _with_triton

    class Counter(TorchDispatchMode):
        @classmethod
        def ignore_compile_internals(cls) -> bool:
            return True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is _with_triton._opoverload:  # look inside, not at its declared shapes
                with self:
                    return _with_triton._init_fn(*args, **(kwargs or {}))
            out = func(*args, **(kwargs or {}))
            name = func._schema.name.partition("::")[2].lstrip("_")
            if not func.is_view and not name.startswith(ALLOCATIONS):
                found.append(eager_kernel(func, args, kwargs or {}, out))
            return out

    return Counter()


def eager_kernel(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Kernel:
    """An operation with the bytes of the tensors that it reads and of those that it writes."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    reads, writes = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        reads += [] if argument.is_out else tensors
        writes += tensors if argument.alias_info and argument.alias_info.is_write else []
    made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    writes += [t for t in made if all(t is not old for old in writes)]
    name = str(func._schema.name)
    reads = [] if name.startswith(tuple(f"aten::{fill}" for fill in FILLS)) else reads
    return Kernel((name, f"uncompiled {name}"), shapes_of(reads), bytes_of(reads + writes))


@contextlib.contextmanager
def head_operations(found: list[Kernel]) -> Generator[None]:
    """Inside, what only a GPU runs of the head adds itself to `found`: the kernel of the loss,
    whose second read the L2 serves, and products of bf16 that add to an fp32 gradient."""
    import kernels.linear_cross_entropy as module

    def loss(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        losses = logits.new_empty(logits.shape[0])
        read = (logits, logits, targets, losses)
        found.append(Kernel(("cross_entropy",), (), bytes_of(read)))
        return losses

    def product(a: Tensor, b: Tensor, out: Tensor, beta: int) -> None:
        moved = bytes_of((a, b, *([out] * (1 + beta))))
        found.append(Kernel(("aten::mm", "Backward"), shapes_of((a, b)), moved))

    with mock.patch.multiple(module, cross_entropy_in_place=loss, _product=product):
        yield


def shapes_of(tensors: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Their shapes."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The sum of their bytes."""
    return sum(tensor.nbytes for tensor in tensors)


# --- compiled graphs


def prepare_compiler() -> None:
    """Let Inductor generate code for a GPU that this process does not have."""
    import torch._dynamo.config as dynamo
    import torch._dynamo.device_interface as interfaces
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    worker = {"Worker": type("Worker", (), dict(FUNCTIONS))}
    interface = type("Interface", (interfaces.CudaInterface,), FUNCTIONS | worker)
    interfaces.init_device_reg()
    for device in ("cuda", "cuda:0"):
        interfaces.register_interface_for_device(device, interface)
    functorch.enable_autograd_cache = inductor.fx_graph_cache = False
    dynamo.automatic_dynamic_local_pgo = False
    inductor.compile_threads = 1
    inductor.shape_padding = False  # would time products


def _returning(value: Any) -> Any:
    return staticmethod(lambda *args, **kwargs: value)


# What Inductor asks torch.cuda, or its own interface to it.
FUNCTIONS = {
    "is_available": _returning(True),
    "current_device": _returning(0),
    "get_device_properties": _returning(Card),
    "get_rng_state": _returning(None),
    "set_rng_state": _returning(None),
    "_exchange_device": _returning(0),
    "_maybe_exchange_device": _returning(0),
}


class Scheduled(BaseException):
    """Ends Inductor's work on a graph when its kernels are settled, before it writes their code."""


@contextlib.contextmanager
def scheduling(kernels: list[Kernel], backward: bool) -> Generator[None]:
    """Inside, Inductor takes this machine for one with a GPU. It stops when a graph's operations are
    fused and leaves the kernels in `kernels`."""
    import torch
    from torch._inductor.scheduler import Scheduler

    def stop(scheduler: Any) -> None:
        sizes = ((node, node.get_read_write_buffers_sizes()) for node in scheduler.nodes)
        kernels.extend(compiled_kernel(node, size, backward) for node, size in sizes if size)
        raise Scheduled

    known = {name: f.__func__ for name, f in FUNCTIONS.items() if hasattr(torch.cuda, name)}
    known["get_rng_state"] = lambda *args: torch.zeros(16, dtype=torch.uint8)
    with (
        mock.patch.multiple(torch.cuda, **known),
        # `~mask` asks for a CUDA device, and the function of the same meaning does not
        mock.patch.object(torch.Tensor, "__invert__", lambda self: torch.bitwise_not(self)),
        mock.patch.object(Scheduler, "codegen", stop),
        contextlib.suppress(Scheduled),
    ):
        yield


def compiled_kernel(node: Any, moved: int, backward: bool) -> Kernel:
    """A kernel of Inductor's scheduler, with the operations that it was fused from."""
    buffers = [part.node for part in node.get_nodes() if part.node is not None]
    origins = [origin for buffer in buffers for origin in buffer.origins]
    names = {str(origin.meta.get("original_aten") or origin.target) for origin in origins}
    own = getattr(buffers[0], "op_overload", None)
    inputs = buffers[0].inputs if own is not None else ()
    shapes = tuple(tuple(map(int, i.get_size())) for i in inputs if hasattr(i, "get_size"))
    first = own._schema.name if own is not None else "compiled"
    return Kernel((first, *sorted(names), *["Backward"] * backward), shapes, moved)


def counting_backend(found: list[Kernel], graph: Any, inputs: Any) -> Any:
    """Inductor as torch.compile's backend, but each call of a compiled graph adds the graph's
    kernels to `found`."""
    from torch._inductor import compile_fx

    def compile_one(graph: Any, inputs: Sequence[Any], **settings: Any) -> Any:
        kernels: list[Kernel] = []
        with scheduling(kernels, settings.get("is_backward", False)):
            compile_fx.compile_fx_inner(on_cuda(graph), [moved(i) for i in inputs], **settings)

        def run(arguments: list[Any]) -> Any:
            given = list(arguments)
            arguments.clear()
            found.extend(kernels)
            before = len(found)
            outputs = graph(*given)
            del found[before:]  # the graph's operations, which the kernels replace
            return outputs

        boxed: Any = run
        boxed._boxed_call = True  # it empties its list of arguments
        return boxed

    return compile_fx.compile_fx(graph, inputs, inner_compile=compile_one)


def on_cuda(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a traced graph whose tensors are on a GPU."""
    import copy

    import torch
    from torch.utils._pytree import tree_map

    copied = copy.deepcopy(graph)
    for node in copied.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    return copied


def moved(value: Any) -> Any:
    """A fake tensor as one on a GPU; anything else as it is. (`to` would ask for a device.)"""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=torch.device("cuda", 0)
        )
