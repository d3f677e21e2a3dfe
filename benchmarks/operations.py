"""What benchmarks.kernels compares: each operation at one shape, with all forms that compute it.

A form is PyTorch's operations, the same under torch.compile, this engine's kernel, or another
project's. A kernel without a function here is compared by the example of its own file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.adamw
import kernels.attention
import kernels.cpu_attention
import kernels.cross_entropy
import kernels.fp8_linear
import kernels.linear_cross_entropy
from benchmarks import candidates, machine
from benchmarks.harness import OURS
from config import GPTConfig
from kernels import KERNELS, TRITON, _card
from model import GPT

PYTORCH = "PyTorch"
# Largest norm of the difference over the norm, for outputs and gradients. fp32 sums in another
# order. bf16 rounds each element by 2^-9 on average, at a few places. FP8 changes every factor by
# some 3%, those of gradients by 5%.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
FP8_TOLERANCE = 0.1


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
