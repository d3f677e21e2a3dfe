"""The contract that every differentiable kernel and every reference keeps.

Output and gradients agree with float64; the same inputs give the same bits; no_grad keeps no graph;
inputs and gradients may have any strides; torch.compile makes one graph of it. The tests of each
kernel add its own shapes, dtypes and errors.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from config import GPTConfig
from engine.precision import Cast
from kernels import _card
from kernels._triton import no_triton_reason
from kernels.attention import attention, attention_reference, choose_tiles
from kernels.cpu_attention import cpu_attention
from kernels.dropout import Dropout
from kernels.fp8_linear import fp8_linear
from kernels.layer_norm import add_layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tasks.objectives import nll_and_unlikelihood

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = DEVICE == "cuda"
BF16, FP32 = torch.bfloat16, torch.float32
# Errors are relative to the norm. fp32: sums of up to a hundred terms, whose rounding errors (6e-8
# each) mostly cancel. bf16 keeps 8 bits, 2^-8 for a value that is cut off, and PyTorch rounds a
# gradient up to three times.
EXACT, ROUNDED = 1e-5, 2**-6
# e4m3 moves a number by up to 2^-4 of itself and e5m2 by 2^-3; see test_fp8_linear.
FP8 = 1.2 * math.hypot(2**-4, 2**-3) / math.sqrt(3)

ROWS, WIDTH, VOCAB = 19, 32, 48


@dataclass(frozen=True)
class Case:
    """An operation, the same in float64 (None: not compared), and its inputs, which are leaves.

    no_grad_error: how far the result without gradients may be from the one with them.
    """

    operation: Callable[..., Any]
    in_float64: Callable[..., Any] | None
    inputs: list[Tensor]
    tolerance: float = EXACT
    no_grad_error: float = 0.0

    @property
    def between_layouts(self) -> float:
        """Another layout or a compiler may only change the order of sums and the last rounding."""
        return ROUNDED if self.tolerance == ROUNDED else EXACT


def numbers(*shape: int, dtype: torch.dtype = FP32, device: str = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def targets_of(rows: int) -> Tensor:
    return torch.arange(rows, device=DEVICE) * 5 % (VOCAB - 1)


def attention_case(
    operation: Callable[..., Tensor], rows: int, dtype: torch.dtype = FP32, documents: bool = False
) -> Case:
    batch = max(2, rows // 10)
    device = "cpu" if operation is cpu_attention else DEVICE
    qkv = numbers(batch, ROWS, 3, 2, 16, dtype=dtype, device=device)
    more = []
    if documents:
        segments = torch.arange(ROWS, device=DEVICE).div(5, rounding_mode="floor")
        more = [segments.expand(batch, ROWS)]
    return Case(
        lambda qkv: operation(qkv, *more),
        lambda qkv: attention_reference(qkv, *more),
        [qkv],
        EXACT if dtype == FP32 else ROUNDED,
    )


def layer_norm_case(
    triton: bool, rows: int, dtype: torch.dtype = FP32, branch: bool = True
) -> Case:
    def operation(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        added, weight, bias = others if branch else (None, *others)
        return add_layer_norm(x, added, weight, bias, 1e-5, triton)

    def in_float64(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        total = x + others[0] if branch else x
        return total, F.layer_norm(total, (WIDTH,), others[-2], others[-1], 1e-5)

    streams = [numbers(rows + i, WIDTH, dtype=dtype)[:rows].detach() for i in range(1 + branch)]
    inputs = [*(t.requires_grad_() for t in streams), numbers(WIDTH), numbers(WIDTH)]
    return Case(operation, in_float64, inputs, EXACT if dtype == FP32 else ROUNDED)


def example_case(name: str, in_kernel: bool, rows: int) -> Case:
    """A kernel's own example, or its reference beside float64."""
    kernel = kernels.KERNELS[name]
    assert kernel.example
    config = GPTConfig(VOCAB - 1, 13, n_layer=1, n_head=2, n_embd=WIDTH)
    torch.manual_seed(0)
    device = DEVICE if kernel.device == "cuda" else "cpu"
    example = kernel.example(rows, config, dtype=FP32, device=device)
    inputs = [t.requires_grad_() for t in example.inputs]
    return Case(example.kernel if in_kernel else example.reference, example.reference, inputs)


def linear_cross_entropy_case(operation: Callable[..., Tensor], rows: int, *more: Any) -> Case:
    targets = targets_of(rows)
    return Case(
        lambda x, weight: operation(x, weight, targets, VOCAB - 1, *more),
        lambda x, weight: F.cross_entropy(
            (x @ weight.t())[:, : VOCAB - 1], targets, reduction="sum"
        ),
        [numbers(rows, WIDTH), numbers(VOCAB, WIDTH)],
        no_grad_error=EXACT,  # without gradients the logits are reduced in another order
    )


def dropout_case(rows: int) -> Case:
    def operation(x: Tensor) -> Tensor:
        torch.manual_seed(0)  # the draws depend on the number of elements alone
        return Dropout(0.4)(x)

    return Case(operation, operation, [numbers(rows, WIDTH, device="cpu")])


def fp8_case(rows: int) -> Case:
    inputs = [numbers(rows, WIDTH), numbers(VOCAB, WIDTH), numbers(VOCAB)]
    return Case(fp8_linear, F.linear, inputs, FP8)


CASES: dict[str, Callable[[int], Case]] = {
    f"{name} {form}": functools.partial(example_case, name, form != "torch")
    for name, kernel in kernels.KERNELS.items()
    if kernel.example
    for form in ("torch", "triton" if kernel.device == "cuda" else "kernel")
} | {
    "attention torch documents": lambda rows: attention_case(
        attention_reference, rows, documents=True
    ),
    "attention triton documents": lambda rows: attention_case(attention, rows, documents=True),
    "cpu_attention bf16": lambda rows: attention_case(cpu_attention, rows, BF16),
    "layer_norm torch bf16": lambda rows: layer_norm_case(False, rows, BF16),
    "layer_norm torch alone": lambda rows: layer_norm_case(False, rows, branch=False),
    "layer_norm triton alone": lambda rows: layer_norm_case(True, rows, branch=False),
    "linear_cross_entropy reference": lambda rows: linear_cross_entropy_case(
        linear_cross_entropy_reference, rows
    ),
    "linear_cross_entropy torch": lambda rows: linear_cross_entropy_case(
        linear_cross_entropy, rows, False
    ),
    "linear_cross_entropy triton": lambda rows: linear_cross_entropy_case(
        linear_cross_entropy, rows, True
    ),
    "fp8_linear": fp8_case,
    "dropout": dropout_case,
}


def unlikelihood(rows: int) -> Case:
    targets = targets_of(rows)[None]
    logits = numbers(1, rows, VOCAB)
    return Case(
        lambda logits: nll_and_unlikelihood(logits, targets.roll(1, 1), targets), None, [logits]
    )


def weights_cast_once(rows: int) -> Case:
    cast = Cast(torch.nn.Linear(WIDTH, VOCAB, device=DEVICE), BF16)
    x = numbers(rows, WIDTH, dtype=BF16)
    return Case(lambda x, *parameters: cast(x), None, [x, *cast.parameters()])


# Dropout is PyTorch's own when compiled: see test_dropout. The last two are Functions of other
# packages.
COMPILED = {name: make for name, make in CASES.items() if name != "dropout"} | {
    "unlikelihood": unlikelihood,
    "weights cast once": weights_cast_once,
}
# Operations with PyTorch's own code inside are compiled to machine code, where C++ is installed.
MACHINE_CODE = ["cpu_attention kernel", "linear_cross_entropy torch"]
if DEVICE == "cuda":  # on a CPU nobody compiles these
    MACHINE_CODE += ["attention triton", "attention triton documents", "fp8_linear"]
    MACHINE_CODE += ["linear_cross_entropy triton"]
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> None:
    """Skip what this machine cannot run. The CPU's attention gets threads of its own."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params["name"] if callspec else ""
    if "triton" in name and (reason := no_triton_reason(DEVICE)):
        pytest.skip(reason)
    if name.startswith("attention triton"):
        tiles = choose_tiles(_card.card(), "fp32", 16)
        if isinstance(tiles, str):
            pytest.skip(f"attention {tiles}")
    if name == "fp8_linear" and CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no FP8")
    if name.startswith("cpu_attention"):
        torch.set_num_threads(3)


def outputs_of(operation: Callable[..., Any], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    outputs = operation(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def incoming(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the outputs, no two elements alike."""
    return [
        torch.linspace(0.5, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        for out in outputs
    ]


def results(operation: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, and the gradients of the inputs."""
    outputs = outputs_of(operation, inputs)
    gradients = torch.autograd.grad(outputs, inputs, incoming(outputs))
    return [*(out.detach() for out in outputs), *gradients]


def error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to the norm of `exact`."""
    assert ours.shape == exact.shape
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_kernel_keeps_the_contract(repo: Path) -> None:
    """AdamW updates its tensors in place, without autograd or a compiler: see test_adamw."""
    files = {file.stem for file in (repo / "kernels").glob("[a-z]*.py")} - {"ops", "adamw"}
    assert {name.split()[0] for name in CASES} == files
    in_triton = {name.split()[0] for name in CASES if "triton" in name}
    assert in_triton >= set(kernels.TRITON) - {"adamw"}


@each
def test_output_and_gradients_agree_with_float64(name: str) -> None:
    case = CASES[name](ROWS)
    doubles = [t.detach().double().requires_grad_() for t in case.inputs]
    assert case.in_float64 is not None
    exact = results(case.in_float64, doubles)
    ours = results(case.operation, case.inputs)
    assert all(error(a, b) <= case.tolerance for a, b in zip(ours, exact, strict=True))
    gradients = ours[-len(case.inputs) :]
    assert [t.dtype for t in gradients] == [t.dtype for t in case.inputs]


@each
def test_same_bits_twice(name: str) -> None:
    """More rows than programs on a GPU, and than threads on a CPU. The interpreter runs one program
    after another, however many there are."""
    case = CASES[name](50_000 if CUDA else ROWS if "triton" in name else 100)
    first = results(case.operation, case.inputs)
    assert same_bits(first, results(case.operation, case.inputs))


@each
def test_backward_twice(name: str) -> None:
    """Through a kept graph, with an incoming gradient that is not 1."""
    case = CASES[name](ROWS)
    outputs = outputs_of(case.operation, case.inputs)
    loss = sum((out.float() * 2.0).square().sum() for out in outputs)
    assert isinstance(loss, Tensor)
    first = torch.autograd.grad(loss, case.inputs, retain_graph=True)
    assert same_bits(list(first), list(torch.autograd.grad(loss, case.inputs)))


@each
def test_no_grad_keeps_no_graph(name: str) -> None:
    case = CASES[name](ROWS)
    expected = outputs_of(case.operation, case.inputs)
    assert all(out.requires_grad for out in expected if out is not case.inputs[0])
    with torch.no_grad():
        without = outputs_of(case.operation, case.inputs)
    with torch.inference_mode():
        in_inference = outputs_of(case.operation, [t + 0 for t in case.inputs])
    detached = outputs_of(case.operation, [t.detach() for t in case.inputs])
    for found in (without, in_inference, detached):
        for ours, with_grad in zip(found, expected, strict=True):
            assert ours is case.inputs[0] or not ours.requires_grad
            assert error(ours, with_grad.detach()) <= case.no_grad_error


# The same values at other places in memory.
LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: torch.stack((t, -t), -1)[..., 0],  # every second element
    lambda t: t.repeat_interleave(2, 0)[::2],  # every second row
    lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),  # turned
    lambda t: F.pad(t, (3, 2))[..., 3:-2],  # within wider rows
]


@each
def test_inputs_need_not_be_contiguous(name: str) -> None:
    case = CASES[name](ROWS)
    values = [t.detach() for t in case.inputs]
    # Rows that share one place. Where all inputs did, gradients would cancel.
    shared = [values[0][:1].expand_as(values[0]), *values[1:]]
    for expected, others in (
        (values, [[layout(t) for t in values] for layout in LAYOUTS]),
        ([t.contiguous() for t in shared], [shared]),
    ):
        exact = results(case.operation, [t.clone().requires_grad_() for t in expected])
        for views in others:
            assert not views[0].is_contiguous()
            ours = results(case.operation, [t.detach().requires_grad_() for t in views])
            for found, true in zip(ours, exact, strict=True):
                assert error(found, true) <= case.between_layouts


@each
def test_incoming_gradients_need_not_be_contiguous(name: str) -> None:
    """The gradient of a sum is one number for all; a turned one has another order in memory."""
    case = CASES[name](ROWS)
    outputs = outputs_of(case.operation, case.inputs)

    def gradients(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        given = [change(t) for t in outputs]
        return torch.autograd.grad(outputs, case.inputs, given, retain_graph=True)

    def turn(t: Tensor) -> Tensor:
        return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else t

    pairs = [
        (torch.ones_like, lambda t: torch.ones((), device=t.device).to(t.dtype).expand_as(t)),
        (lambda t: incoming((t,))[0], lambda t: turn(incoming((t,))[0])),
    ]
    for contiguous, other in pairs:
        for ours, expected in zip(gradients(other), gradients(contiguous), strict=True):
            assert error(ours, expected) <= case.between_layouts


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_break(name: str) -> None:
    """torch 2.11 drops the gradient of a Function that returns what it changed in place."""
    case = COMPILED[name](ROWS)
    compiler = shutil.which("c++") or shutil.which("g++")
    backend = "inductor" if compiler and name in MACHINE_CODE else "aot_eager"

    def between(*inputs: Tensor) -> tuple[Tensor, ...]:
        """The operation amid others in one graph. Factors of 2 are exact in every dtype."""
        outputs = outputs_of(case.operation, [t * 2.0 for t in inputs])
        return tuple(out * 2.0 for out in outputs)

    torch._dynamo.reset()
    eager = results(between, case.inputs)
    assert all(t.count_nonzero() for t in eager)
    ours = results(torch.compile(between, fullgraph=True, backend=backend), case.inputs)
    for found, exact in zip(ours, eager, strict=True):
        assert error(found, exact) <= case.between_layouts
