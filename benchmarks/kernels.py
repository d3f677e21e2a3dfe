"""Compare each operation of kernels/ with PyTorch, torch.compile and Liger:

python -m benchmarks.kernels [--only NAME ...]

An operation limited by memory counts the fewest bytes that its forward and backward pass must move.
An operation limited by arithmetic counts its floating-point operations. Both are compared with what
the same run reaches in a large copy and a large matrix product. The forms of an operation take
turns, A B A B, so that a slow minute of the machine affects all of them. Nothing is timed before
outputs and gradients agree.

The trade-off: an operation that runs alone reads its inputs from memory, not from the operation
before it. What a compiler gains by fusing neighbours shows in benchmarks/peers.py, not here.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import kernels.adamw
import kernels.attention
import kernels.cpu_attention
import kernels.cross_entropy
import kernels.fp8_linear
import kernels.linear_cross_entropy
from base.cli import entry_point, parse
from base.console import outlive
from base.errors import reason
from base.machine import resident_bytes
from benchmarks import candidates, machine
from benchmarks.contenders import LARGE_CARD
from benchmarks.harness import OURS, Results, Turns, alternate, cells, ratio, say, spread
from benchmarks.table import markdown
from config import GPTConfig, PathOrName, UserError, known_names
from engine import processes
from engine.failures import is_out_of_memory
from engine.memory import set_allocator
from engine.precision import choose_precision
from kernels import KERNELS, TRITON, _card
from kernels._triton import no_triton_reason
from kernels.attention import attention_backends
from model import GPT

PYTORCH, CEILING = "PyTorch", "ceiling"
OUT_OF_MEMORY = "not measured: out of memory"
TURNS = Turns(3, 30, 6.0)  # for the forms of one operation
# Largest norm of the difference over the norm, for outputs and gradients. fp32 sums in another
# order. bf16 rounds each element by 2^-9 on average, at a few places. FP8 changes every factor by
# some 3%, those of gradients by 5%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FP8_TOLERANCE = 0.1


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on, in fp32 on a CPU and bf16 on a GPU."""
    only: tuple[str, ...] = ()
    """Operations to measure. Default: all."""
    quick: bool = False
    """Tiny shapes, two turns and nothing compiled, to check that everything works."""
    out: PathOrName = "benchmarks/results"
    """Folder for kernels-DEVICE.json and kernels-DEVICE.md."""


@dataclass(frozen=True)
class Size:
    """The sizes of the operations on a device."""

    rows: int  # tokens
    logit_rows: int  # tokens whose logits are in memory at once
    model: GPTConfig  # block_size is the length of a sequence
    document: int  # tokens in a document, for attention within documents
    # bytes of the ceiling's copy and of the buffer read between turns; larger than any cache
    copy: int
    product: int  # rows and columns of the ceiling's product


SIZES = {
    "cuda": Size(65536, 65536, GPTConfig(), 256, 1 << 30, 8192),
    "cpu": Size(8192, 1024, GPTConfig(n_layer=2), 256, 256 << 20, 2048),
    "quick": Size(64, 8, GPTConfig(250, 32, n_layer=1, n_head=2, n_embd=64), 16, 1 << 16, 128),
}


@dataclass(frozen=True)
class Place:
    """The device, dtype and sizes to measure with, and the reasons why some forms cannot run
    there."""

    device: torch.device
    dtype: torch.dtype
    size: Size
    no_triton: str | None
    no_compiler: str | None
    no_fp8: str | None

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values of the place's dtype on its device."""
        return (scale * torch.randn(shape, device=self.device)).to(self.dtype)

    def without(self, package: str) -> str | None:
        """Why the GPU kernels of a package cannot be measured here."""
        if package not in machine.versions():
            return "not installed"
        return None if self.device.type == "cuda" else "needs a GPU"

    def targets(self, rows: int) -> Tensor:
        """Random targets (rows,) int64."""
        return torch.randint(self.size.model.vocab_size, (rows,), device=self.device)


Function = Callable[..., Sequence[Tensor]]  # takes an operation's leaves, returns its outputs


@dataclass(frozen=True)
class Form:
    """One way to compute an operation."""

    make: Callable[[], Function]
    lacks: str | None = None  # why it cannot be measured here
    direct: bool = False  # the function returns the gradients itself, or has none
    overwrites: bool = False  # it overwrites its leaves, so it gets a copy of them


@dataclass(frozen=True)
class Operation:
    """An operation at one shape, with its inputs and all forms that compute it."""

    shape: str
    work: float  # bytes or floating-point operations of forward and backward pass together
    ceiling: str  # a key of CEILINGS
    leaves: tuple[Tensor, ...]  # inputs that get gradients
    forms: dict[str, Form]
    tolerance: float | None = None  # None: that of the dtype in TOLERANCE
    # gradient of each output, drawn when a form first runs; 1 for a sum, as in training
    incoming: list[Tensor] = field(default_factory=list)


# --- the ceilings of the machine: each returns the work of one turn, and its amount


def copy(place: Place) -> tuple[Function, float]:
    """A copy, and the bytes that it moves."""
    source = torch.randn(place.size.copy // 4, device=place.device)
    target = torch.empty_like(source)
    return lambda: [target.copy_(source)], 2.0 * place.size.copy


def product(place: Place) -> tuple[Function, float]:
    """A matrix product, and its floating-point operations."""
    n = place.size.product
    a, b = place.randn(n, n), place.randn(n, n)
    return lambda: [a @ b], 2.0 * n**3


def fp8_product(place: Place) -> tuple[Function, float]:
    """Like `product`, but in FP8, without the conversions."""
    n = place.size.product
    (a, a_scale), (b, b_scale) = (
        kernels.fp8_linear.quantize(place.randn(n, n), torch.float8_e4m3fn) for _ in range(2)
    )
    return lambda: [
        torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16)
    ], 2.0 * n**3


CEILINGS = {"copy": copy, "product": product, "FP8 product": fp8_product}


# --- the operations: each function makes the inputs and the forms


def usual(
    place: Place, eager: Function, triton: Function, liger: Form | None = None
) -> dict[str, Form]:
    """The forms that most operations have: PyTorch's operations, the same compiled, Liger's kernel
    if it has one, and this engine's kernel."""
    forms = {PYTORCH: Form(lambda: eager), "torch.compile": compiled(place, eager)}
    if liger:
        forms["Liger"] = liger
    return forms | {f"{OURS}, Triton": Form(lambda: triton, place.no_triton)}


def own_example(place: Place, name: str, rows: int, liger: Form | None = None) -> Operation:
    """A kernel's own example, limited by memory."""
    make = KERNELS[name].example
    assert make
    example = make(rows, place.size.model, dtype=place.dtype, device=place.device)
    forms = usual(place, listed(example.reference), listed(example.kernel), liger)
    shape = times(*example.inputs[0].shape)
    return Operation(shape, example.moved, "copy", example.inputs, forms)


def listed(function: Callable[..., Tensor | Sequence[Tensor]]) -> Function:
    """The function with a list of outputs, also where it returns one tensor."""

    def outputs(*leaves: Tensor) -> Sequence[Tensor]:
        found = function(*leaves)
        return [found] if isinstance(found, Tensor) else found

    return outputs


def compiled(place: Place, function: Function, lacks: str | None = None) -> Form:
    """The function under torch.compile, unless `lacks` or the place says why it cannot run."""
    return Form(lambda: torch.compile(function, dynamic=False), lacks or place.no_compiler)


def times(*sizes: int) -> str:
    """The sizes as text, such as "8,192 x 768"."""
    return " x ".join(f"{size:,}" for size in sizes)


def cross_entropy(place: Place) -> Operation:
    """Counts one read of the logits and one write of their gradient. That is enough if the loss's
    own gradient is known, and for a sum it is 1."""
    ours, rows, model = kernels.cross_entropy, place.size.logit_rows, place.size.model
    V, logits, targets = (
        model.vocab_size,
        place.randn(rows, model.padded_vocab_size),
        place.targets(rows),
    )
    logits[:, V:] = -torch.inf  # Liger has no padding

    def make_liger() -> Function:
        from liger_kernel.ops import LigerCrossEntropyFunction

        # class weights, ignored target, z-loss, smoothing, reduction
        settings = (None, -100, 0.0, 0.0, "sum")
        return lambda x: [LigerCrossEntropyFunction.apply(x, targets, *settings)[0]]

    forms = usual(
        place,
        lambda x: [ours.cross_entropy_reference(x, targets, V).sum()],
        lambda x: [ours.cross_entropy(x, targets, V).sum()],
        Form(make_liger, place.without("liger-kernel"), overwrites=True),
    )
    forms[f"{OURS}, Triton in place"] = Form(
        lambda: lambda x: [ours.cross_entropy_in_place(x, targets, V).sum(), x],
        place.no_triton,
        direct=True,
        overwrites=True,
    )
    return Operation(times(*logits.shape), 2.0 * logits.nbytes, "copy", (logits,), forms)


def linear_cross_entropy(place: Place) -> Operation:
    """Counts three products with the head's matrix: for the logits, the gradient of the hidden
    states, and the gradient of the head."""
    ours, rows, model = kernels.linear_cross_entropy, place.size.logit_rows, place.size.model
    V, padded, targets = model.vocab_size, model.padded_vocab_size, place.targets(rows)
    x, weight = place.randn(rows, model.n_embd), place.randn(padded, model.n_embd, scale=0.02)

    def make_liger() -> Function:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused

        # It sums in fp32, as ours does. It has no padding, so its head ends with the
        # vocabulary.
        settings: dict[str, Any] = dict(reduction="sum", accum_dtype=torch.float32)
        return lambda x, weight: [fused(x, weight[:V], targets, **settings)]

    def make_cce() -> Function:
        from cut_cross_entropy import linear_cross_entropy as cut

        # Its default leaves out gradients that it finds small; ours are exact.
        settings: dict[str, Any] = dict(reduction="sum", filter_eps=None)
        return lambda x, weight: [cut(x, weight[:V], targets, **settings)]

    def make_torch() -> Function:
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        settings: dict[str, Any] = dict(reduction="sum", options=LinearCrossEntropyOptions())
        return lambda x, weight: [F.linear_cross_entropy(x, weight[:V], targets, **settings)]

    def chunks(x: Tensor, weight: Tensor, triton: bool = False) -> Sequence[Tensor]:
        return [ours.linear_cross_entropy(x, weight, targets, V, triton=triton)]

    forms = usual(
        place,
        lambda x, weight: [ours.linear_cross_entropy_reference(x, weight, targets, V)],
        functools.partial(chunks, triton=True),
        Form(make_liger, place.without("liger-kernel")),
    )
    old = None if hasattr(F, "linear_cross_entropy") else "needs PyTorch 2.13"
    forms["F.linear_cross_entropy"] = Form(make_torch, old)
    forms["Apple's cut cross-entropy"] = Form(make_cce, place.without("cut-cross-entropy"))
    forms[f"{OURS}, PyTorch"] = Form(lambda: chunks)
    work = 6.0 * rows * model.n_embd * V
    shape = f"{times(*x.shape)}, {padded:,}"
    return Operation(shape, work, "product", (x, weight), forms)


def layer_product(place: Place, inputs: int, outputs: int) -> Operation:
    """A layer's product and the two for its gradients, by PyTorch. `inputs` and `outputs` are
    multiples of n_embd."""
    rows, width = place.size.rows, place.size.model.n_embd
    sizes = rows, inputs * width, outputs * width
    x, weight = place.randn(*sizes[:2]), place.randn(*sizes[:0:-1], scale=0.02)
    forms = {PYTORCH: Form(lambda: lambda x, weight: [F.linear(x, weight)])}
    work = 6.0 * rows * inputs * outputs * width**2
    return Operation(times(*sizes), work, "product", (x, weight), forms)


def mlp_tensors(place: Place) -> tuple[str, float, tuple[Tensor, ...]]:
    """The shape and the floating-point operations of a block's MLP, and its input, weights and
    biases."""
    rows, width = place.size.rows, place.size.model.n_embd
    up, down = (
        place.randn(*shape, scale=0.02) for shape in ((4 * width, width), (width, 4 * width))
    )
    tensors = (place.randn(rows, width), up, place.randn(4 * width), down, place.randn(width))
    return times(rows, width, 4 * width), 48.0 * rows * width**2, tensors


def mlp(place: Place) -> Operation:
    """Counts the six products of a block's MLP. Bias and GELU are part of it, because a product's
    epilogue may compute them."""
    shape, work, tensors = mlp_tensors(place)
    tuned = functools.partial(
        torch.compile, candidates.mlp, dynamic=False, mode="max-autotune-no-cudagraphs"
    )
    forms = usual(place, candidates.mlp, candidates.mlp_triton)
    on_gpu = None if place.device.type == "cuda" else "needs a GPU"
    forms["torch.compile, max-autotune"] = Form(tuned, place.no_compiler or on_gpu)
    forms["cuBLASLt's epilogues"] = Form(
        lambda: candidates.mlp_epilogue, place.without("nvmath-python")
    )
    return Operation(shape, work, "product", tensors, forms)


def mlp_fp8(place: Place) -> Operation:
    """`mlp` in FP8: this engine's layers, which scale each tensor by itself, and scales from an
    earlier step with weights that are converted once a step."""
    shape, work, tensors = mlp_tensors(place)
    layer = kernels.fp8_linear.fp8_linear

    def scaled(x: Tensor, up: Tensor, b: Tensor, down: Tensor, c: Tensor) -> Sequence[Tensor]:
        return [layer(F.gelu(layer(x, up, b), approximate="tanh"), down, c)]

    def make_delayed() -> Function:
        x, up, b, down, c = (tensor.detach().bfloat16() for tensor in tensors)
        prepared = (
            candidates.delayed_scales(x, up, b, down, c),
            *map(candidates.quantized, (up, down)),
        )
        return lambda *leaves: candidates.mlp_delayed(
            [leaf.bfloat16() for leaf in leaves], *prepared
        )

    forms = {
        PYTORCH: Form(lambda: candidates.mlp),
        f"{OURS}, FP8": Form(lambda: scaled, place.no_fp8),
        f"{OURS}, FP8 compiled": compiled(place, scaled, place.no_fp8),
        "delayed scales": Form(make_delayed, place.no_fp8),
        "delayed scales, compiled": Form(
            lambda: torch.compile(make_delayed(), dynamic=False), place.no_fp8 or place.no_compiler
        ),
    }
    ceiling = "product" if place.no_fp8 else "FP8 product"
    return Operation(shape, work, ceiling, tensors, forms, FP8_TOLERANCE)


def layer_norm(place: Place) -> Operation:
    """The kernel's example, with Liger beside it."""
    eps = place.size.model.layer_norm_epsilon

    def make_liger() -> Function:
        from liger_kernel.ops import LigerLayerNormFunction

        def liger(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
            total = x + branch  # it has no kernel for both
            return total, LigerLayerNormFunction.apply(total, weight, bias, eps)

        return liger

    liger = Form(make_liger, place.without("liger-kernel"))
    return own_example(place, "layer_norm", place.size.rows, liger)


def attention(place: Place, document: int | None = None) -> Operation:
    """Counts two products over the visible pairs of query and key, and five more for the gradients.
    `document` is the tokens in a document (None: no documents)."""
    size = place.size
    T, H, D = size.model.block_size, size.model.n_head, size.model.n_embd // size.model.n_head
    B, length = size.rows // T, document or T
    segments = mask = None
    if document:
        segments = (torch.arange(T, device=place.device) // document).expand(B, T).contiguous()
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mask = same & torch.ones(T, T, dtype=torch.bool, device=place.device).tril()  # (B, 1, T, T)

    def eager(qkv: Tensor) -> Sequence[Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return [y.transpose(1, 2).contiguous()]

    precision = "fp32" if place.dtype == torch.float32 else "bf16"
    fitting = kernels.attention.choose_tiles(_card.card(place.device), precision, D)
    if isinstance(fitting, str):
        place = dataclasses.replace(place, no_triton=place.no_triton or fitting)
    forms = usual(place, eager, lambda qkv: [kernels.attention.attention(qkv, segments)])
    if not document:
        forms[f"{OURS}, on a CPU"] = Form(
            lambda: lambda qkv: [kernels.cpu_attention.cpu_attention(qkv)],
            None if place.device.type == "cpu" else "needs a CPU",
        )
    pairs = B * H * (T // length) * length * (length + 1) / 2
    work = pairs * (2 + 5) * 2 * D
    qkv = place.randn(B, T, 3, H, D)
    return Operation(times(B, T, H, D), work, "product", (qkv,), forms)


def attention_documents(place: Place) -> Operation:
    """`attention` within documents."""
    return attention(place, place.size.document)


def adamw(place: Place) -> Operation:
    """Clip all gradients, update, and round to bf16. Counts 4 bytes per parameter for the norm, and
    16 read and 14 written for the update."""
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in GPT(place.size.model).parameters()]
    betas, eps, decay, clip = (0.9, 0.95), 1e-8, 0.1, 1.0
    lr = 0.1  # large, so that a wrong update shows in the weights

    def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, gradients and bf16 copies, the same for every form."""
        torch.manual_seed(0)
        params = [torch.randn(shape, device=place.device) for shape in shapes]
        return params, [torch.randn_like(p) for p in params], [p.bfloat16() for p in params]

    def make_eager() -> Function:
        params, grads, copies = tensors()
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer = torch.optim.AdamW(
            params, lr=lr, betas=betas, eps=eps, weight_decay=decay, fused=True
        )

        def step() -> Sequence[Tensor]:
            torch.nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
            torch._foreach_copy_(copies, params)
            return params + copies

        return step

    def make_triton() -> Function:
        params, grads, copies = tensors()
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.zeros((), device=place.device) for _ in params]
        n = len(params)
        table = kernels.adamw.Table(params, *moments, steps, copies, [1.0] * n, [decay] * n)
        rate = torch.tensor(lr, device=place.device)

        def step() -> Sequence[Tensor]:
            norm = kernels.adamw.global_norm(grads)
            factor = (clip / (norm + 1e-6)).clamp(max=1.0)
            kernels.adamw.adamw(table, grads, rate, factor, norm.isfinite(), betas, eps)
            return params + copies

        return step

    count = sum(shape.numel() for shape in shapes)
    forms = {
        PYTORCH: Form(make_eager, direct=True),
        # Compiling took 50 CPU seconds in a trial, for a step that PyTorch has as one fused kernel.
        "torch.compile": Form(make_eager, "a minute to compile so many tensors", direct=True),
        f"{OURS}, Triton": Form(make_triton, place.no_triton, direct=True),
    }
    shape = f"{count:,} in {len(shapes)} tensors"
    return Operation(shape, 34.0 * count, "copy", (), forms, TOLERANCE[torch.float32])


def fp8_linear(place: Place) -> Operation:
    """Counts the three products of the MLP's first layer."""
    rows, width = place.size.rows, place.size.model.n_embd
    x, bias = place.randn(rows, width), place.randn(4 * width)
    weight = place.randn(4 * width, width, scale=0.02)
    ours = kernels.fp8_linear.fp8_linear
    forms = {
        PYTORCH: Form(lambda: lambda *tensors: [F.linear(*tensors)]),
        f"{OURS}, FP8": Form(lambda: lambda *tensors: [ours(*tensors)], place.no_fp8),
        f"{OURS}, FP8 compiled": compiled(place, lambda *tensors: [ours(*tensors)], place.no_fp8),
    }
    shape, work = times(rows, width, 4 * width), 6.0 * rows * width * 4 * width
    ceiling = "product" if place.no_fp8 else "FP8 product"
    return Operation(shape, work, ceiling, (x, weight, bias), forms, FP8_TOLERANCE)


OPERATIONS: dict[str, Callable[[Place], Operation]] = {
    "product_qkv": functools.partial(layer_product, inputs=1, outputs=3),
    "product_projection": functools.partial(layer_product, inputs=1, outputs=1),
    "product_up": functools.partial(layer_product, inputs=1, outputs=4),
    "product_down": functools.partial(layer_product, inputs=4, outputs=1),
    "mlp": mlp,
    "mlp_fp8": mlp_fp8,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "layer_norm": layer_norm,
    "attention": attention,
    "attention_documents": attention_documents,
    "adamw": adamw,
    "fp8_linear": fp8_linear,
}
# All other kernels in Triton: their own examples.
OPERATIONS |= {
    name: lambda place, name=name: own_example(place, name, place.size.rows)
    for name in TRITON
    if name not in OPERATIONS
}


# --- one run of a form


Moment = Any  # a time in seconds (CPU) or an event in the GPU's queue


def moment(device: torch.device) -> Moment:
    """The time now, or on a GPU an event that gets its time when the queue reaches it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Moment, second: Moment) -> float:
    """The seconds from the first to the second moment. On a GPU both must have passed."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


@dataclass(frozen=True)
class Contender:
    """A form that is ready to run."""

    function: Function
    leaves: tuple[Tensor, ...]
    incoming: list[Tensor]
    device: torch.device
    direct: bool

    def run(self) -> tuple[list[Tensor], list[Moment]]:
        """Outputs and gradients, and the moments of the start, of the outputs and of the
        gradients."""
        moments = [moment(self.device)]
        with torch.set_grad_enabled(not self.direct):
            outputs = list(self.function(*self.leaves))
        moments.append(moment(self.device))
        gradients: Sequence[Tensor] = []
        if not self.direct:
            if not self.incoming:
                self.incoming.extend(
                    torch.randn_like(y) if y.dim() else y.new_ones(()) for y in outputs
                )
            gradients = torch.autograd.grad(outputs, self.leaves, self.incoming)
            moments.append(moment(self.device))
        return [*(output.detach() for output in outputs), *gradients], moments


def build(operation: Operation, form: Form, device: torch.device) -> Contender:
    """Make a form ready to run. All forms share the leaves, except those that overwrite them."""
    mine = [leaf.detach().clone() if form.overwrites else leaf for leaf in operation.leaves]
    leaves = tuple(leaf.requires_grad_() for leaf in mine)
    return Contender(form.make(), leaves, operation.incoming, device, form.direct)


@functools.cache
def buffer(device: torch.device, size: int) -> Tensor:
    """A tensor of `size` bytes for `evict`, kept for all turns."""
    return torch.zeros(size // 4, device=device)


def evict(place: Place) -> None:
    """Fill the caches with other data, by reading, so that nothing must be written back.

    On a GPU this also takes some milliseconds. In that time the host queues the timed work, so
    launches do not count.
    """
    for _ in range(16 if place.device.type == "cuda" else 1):
        buffer(place.device, place.size.copy).sum()


def turn(contender: Contender, place: Place) -> list[float]:
    """The seconds of the forward pass, then of the backward pass if there is one."""
    evict(place)
    _, moments = contender.run()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return [seconds_between(a, b) for a, b in zip(moments, moments[1:])]


def peak_memory(contender: Contender) -> int | None:
    """The bytes at the peak of one run, less those in use before. None if the system does not
    say."""
    device = contender.device
    if not machine.forget_peak(device.type):
        return None
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes()
    contender.run()
    return processes.memory_bytes(device) - before


# --- the comparison


class Differs(Exception):
    """A form computes something else than PyTorch."""


def largest_difference(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest relative difference of norms over all tensors, or NaN if any is NaN. It goes
    piece by piece, because an fp32 copy of all logits may not fit."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        pieces = zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26), strict=True)
        sums = [((p.float() - q.float()).norm() ** 2, q.float().norm() ** 2) for p, q in pieces]
        difference, whole = (sum(part.double() for part in parts) for parts in zip(*sums))
        off = (difference / whole).sqrt().item() if difference else 0.0
        worst = off if not off <= worst else worst
    return worst


def try_out(contender: Contender, reference: list[Tensor], tolerance: float) -> dict[str, Any]:
    """Run a contender before timing. Returns its difference and peak memory. The first to run fills
    `reference`. Raises Differs if a later one does not agree with it."""
    results, _ = contender.run()
    if not reference:
        # cloned, because a form may change its results later
        reference += [result.clone() for result in results]
    difference = largest_difference(results, reference)
    if not difference <= tolerance:
        raise Differs(
            f"{difference:.2g} away from {PYTORCH}, relative; {tolerance:.2g} is rounding"
        )
    del results
    return {"difference": difference, "memory_bytes": peak_memory(contender)}


def compare(name: str, place: Place, turns: Turns) -> list[dict[str, Any]]:
    """The rows of one operation, one per form, with figures or a note that says why there are
    none."""
    torch.manual_seed(0)
    operation = OPERATIONS[name](place)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    reference: list[Tensor] = []
    for label, form in operation.forms.items():
        rows[label] = {"operation": name, "shape": operation.shape, "form": label}
        if form.lacks:
            rows[label]["note"] = f"not measured: {form.lacks}"
            continue
        try:
            contender = build(operation, form, place.device)
            rows[label] |= try_out(
                contender, reference, operation.tolerance or TOLERANCE[place.dtype]
            )
            ready[label] = contender
        except Exception as error:  # other projects' code may raise any error
            rows[label]["note"] = OUT_OF_MEMORY
            if not is_out_of_memory(error):
                traceback.print_exc()
                rows[label]["note"] = f"failed: {type(error).__name__}: {reason(error)}"
    reference.clear()
    function, work = CEILINGS[operation.ceiling](place)
    ready[CEILING] = Contender(function, (), [], place.device, direct=True)
    ready[CEILING].run()
    each = {label: functools.partial(turn, of, place) for label, of in ready.items()}
    # a form that fitted alone may not fit beside the others' inputs
    taken = alternate(each, turns, dropped=(torch.OutOfMemoryError,))
    ceiling = statistics.median(work / sum(passes) for passes in taken[CEILING])
    for label in ready.keys() - {CEILING}:
        rows[label] |= (
            figures(operation, taken[label], taken.get(PYTORCH)) | {"ceiling": ceiling}
            if label in taken
            else {"note": OUT_OF_MEMORY}
        )
    return list(rows.values())


def figures(
    operation: Operation, mine: list[list[float]], first: list[list[float]] | None
) -> dict[str, Any]:
    """Medians over the turns. `first` holds PyTorch's turns."""
    passes = [statistics.median(column) for column in zip(*mine)]
    return {
        "unit": "B/s" if operation.ceiling == "copy" else "FLOP/s",
        "rate": spread(operation.work / sum(seconds) for seconds in mine),
        "forward_seconds": passes[0],
        "backward_seconds": passes[1] if len(passes) > 1 else None,
        "speed": first and ratio(map(sum, first), map(sum, mine)),
        "seconds": mine,
    }


# --- what is written


def report(record: dict[str, Any]) -> str:
    """The table of all operations, as Markdown."""
    head = ("operation", "form", "forward ms", "backward ms", "rate", "least-most", "of ceiling")
    head += ("speed x", "least-most", "memory", "note")
    rows = map(list, map(table_row, record["cases"]))
    return (
        f"Operations in {record['dtype']}.\n\n{markdown(head, rows, (0, 1, len(head) - 1))}\n\n"
        "Medians over alternated turns. Rates count the fewest bytes (or the operations) of both "
        "passes; the ceiling is a\n"
        "large copy (or product) that takes turns with them. Speed x: PyTorch's time over this "
        "one, both passes. Memory:\n"
        "at the peak, beyond the inputs; outputs and gradients are in it."
    )


def table_row(row: dict[str, Any]) -> Iterator[str]:
    """The cells of one row."""
    yield f"{row['operation']}, {row['shape']}"
    yield row["form"]
    if "note" in row:
        yield from [*[""] * 8, row["note"]]
        return
    for seconds in (row["forward_seconds"], row["backward_seconds"]):
        yield "" if seconds is None else number(1000 * seconds)
    prefix, scale = ("T", 1e12) if row["ceiling"] >= 1e13 else ("G", 1e9)
    rate, least, most = (number(of / scale) for of in row["rate"])
    yield f"{rate} {prefix}{row['unit']}"
    yield f"{least}-{most}"
    yield f"{row['rate'][0] / row['ceiling']:.0%} of {number(row['ceiling'] / scale)}"
    yield from cells(row["speed"]) if row["speed"] else ("", "")
    yield "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f} MiB"
    yield ""


def number(x: float) -> str:
    """The number as text with at least three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def make_place(device: torch.device, quick: bool) -> Place:
    """The device with its sizes, and the reasons why some forms cannot run on it."""
    gpu = device.type == "cuda"
    size = SIZES["quick" if quick else device.type]
    if gpu and torch.cuda.get_device_properties(device).total_memory < LARGE_CARD and not quick:
        # PyTorch's form has seven copies of the logits in memory
        size = dataclasses.replace(size, logit_rows=size.logit_rows // 2)
    no_compiler = no_fp8 = None
    if quick:
        no_compiler = "--quick compiles nothing"
    elif not gpu and not shutil.which("c++") and not shutil.which("g++"):
        no_compiler = "needs a C++ compiler"
    try:
        choose_precision("fp8", device)
    except UserError:
        no_fp8 = "needs a GPU with FP8"
    no_triton = no_triton_reason("cuda") if gpu else "needs a GPU"
    dtype = torch.bfloat16 if choose_precision("auto", device)[0] == "bf16" else torch.float32
    return Place(device, dtype, size, no_triton, no_compiler, no_fp8)


def main() -> None:
    """Measure the operations and print the table. Raises RuntimeError if one of this engine's forms
    failed."""
    options = parse(Options, sys.argv[1:])
    outlive()
    known_names("--only", options.only, OPERATIONS)
    device = processes.start(options.device).device
    if device.type == "cpu":
        set_allocator(keep_freed=True)  # as the engine does; the same for all forms
    place = make_place(device, options.quick)
    facts = machine.facts(options.device) | {"dtype": str(place.dtype).removeprefix("torch.")}
    path = Path(options.out) / f"kernels-{device.type}.json"
    results = Results(path, facts, options, report)
    with sdpa_kernel(attention_backends(device, place.dtype), set_priority=True):
        for name in options.only or OPERATIONS:
            say(f"{name} ...")
            for row in compare(name, place, Turns(2, 2) if options.quick else TURNS):
                results.put({key: row[key] for key in ("operation", "form")}, row)
            torch._dynamo.reset()  # frees compiled functions and what they hold
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(results.text())
    broken = [
        f"{row['operation']}, {row['form']} {row['note']}"
        for row in results.cases
        if row["form"].startswith(OURS) and row.get("note", "").startswith("failed")
    ]
    if broken:
        raise RuntimeError("; ".join(broken))


if __name__ == "__main__":
    entry_point(main)
