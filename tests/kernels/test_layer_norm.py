"""The residual's addition with its layer norm, by PyTorch and in Triton, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.layer_norm
from kernels.layer_norm import _backward, _forward, add_layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16

# fp32 sums of up to a few thousand terms, whose rounding errors (6e-8 each) mostly cancel. bf16
# keeps 8 bits, 2^-8 of a value when rounded and 2^-7 when cut off, as Triton's interpreter does;
# the inputs below are exact in bf16, and so is the sum of two of them, so only the result itself is
# rounded.
TOLERANCE = {FP32: 4e-6, BF16: 2**-7}

both = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])


def coarse(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Multiples of 1/8 in [-2, 2): they and the sums of two of them are exact in bf16."""
    return (torch.randint(-16, 16, shape) / 8).to(DEVICE, dtype)


def inputs(
    *shape: int, x: torch.dtype = FP32, branch: torch.dtype = FP32, affine: torch.dtype = FP32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, branch, weight and bias, leaves that ask for gradients."""
    torch.manual_seed(shape[0])
    sizes_and_dtypes = (shape, x), (shape, branch), (shape[-1:], affine), (shape[-1:], affine)
    a, b, c, d = (coarse(*size, dtype=dtype).requires_grad_() for size, dtype in sizes_and_dtypes)
    return a, b, c, d


def in_float64(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x.double() if branch is None else x.double() + branch.double()
    return total, F.layer_norm(total, weight.shape, weight.double(), bias.double(), EPS)


def run(leaves, triton: bool | None, use: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """Both outputs, and the leaves' gradients for fixed gradients of the outputs in `use`; triton
    None: in float64."""
    x, branch, weight, bias = leaves
    pair = (
        in_float64(x, branch, weight, bias)
        if triton is None
        else add_layer_norm(x, branch, weight, bias, EPS, triton)
    )
    torch.manual_seed(0)
    grads = [coarse(*x.shape, dtype=t.dtype) for t in pair]
    used = [i for i in (0, 1) if use[i]]
    asked = [t for t in leaves if t is not None and t.requires_grad]
    found = torch.autograd.grad(
        [pair[i] for i in used], asked, [grads[i] for i in used], allow_unused=True
    )
    return [*(t.detach() for t in pair), *found]


def close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    """To a share of the largest value."""
    return bool((ours - exact).abs().max() <= tolerance * exact.abs().max())


def check(
    leaves, triton: bool, use: tuple[bool, bool] = (True, True), tolerance: float | None = None
) -> None:
    """Outputs and gradients have the dtypes promised and agree with float64."""
    x = leaves[0]
    dtypes = [x.dtype, x.dtype, *(t.dtype for t in leaves if t is not None)]
    for ours, exact, dtype in zip(
        run(leaves, triton, use), run(leaves, None, use), dtypes, strict=True
    ):
        assert (ours is None) == (exact is None)
        if ours is None:
            continue
        allowed = TOLERANCE[dtype if triton else BF16 if BF16 in (dtype, x.dtype) else FP32]
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert close(ours, exact, tolerance or allowed)


SHAPES = [(1, 48), (131, 48), (2, 5, 384), (5, 768), (3, 1600), (4, 7)]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, triton):
    check(inputs(*shape), triton)


# x, branch, weight and bias; the first is a fp32 stream under autocast, whose branches are bf16
MIXED = [
    (FP32, BF16, FP32),
    (BF16, BF16, BF16),
    (BF16, BF16, FP32),
    (BF16, FP32, BF16),
    (FP32, FP32, BF16),
]


@both
@pytest.mark.parametrize(("x", "branch", "affine"), MIXED, ids=str)
def test_dtypes(x, branch, affine, triton):
    check(inputs(3, 11, 48, x=x, branch=branch, affine=affine), triton)


@both
def test_large_mean(triton):
    """E[x^2] - E[x]^2 in fp32 would be off by 0.1 here."""
    x, branch, weight, bias = inputs(33, 768)
    with torch.no_grad():
        x.copy_(torch.randn_like(x) + 1000.0)
    # fp32 keeps 1000 to 3e-5: the sum and its mean are rounded so, values of about 1 are left.
    check((x, branch, weight, bias), triton, tolerance=1e-4)


@both
def test_statistics_are_those_of_the_rounded_sum(triton):
    """At 64 bf16 rounds by up to 1/4: the statistics must be those of what later blocks and the
    backward pass read."""
    x, branch, weight, bias = inputs(9, 48, x=BF16, branch=BF16, affine=BF16)
    total, normed = add_layer_norm((x + 64).detach(), branch, weight, bias, EPS, triton)
    assert close(normed, in_float64(total, None, weight, bias)[1], TOLERANCE[BF16])
    assert not close(
        normed, in_float64((x + 64).detach(), branch, weight, bias)[1], 4 * TOLERANCE[BF16]
    )


@both
def test_no_branch(triton):
    x, _, weight, bias = inputs(2, 9, 48)
    assert add_layer_norm(x, None, weight, bias, EPS, triton)[0] is x
    check((x, None, weight, bias), triton)
    check((x, None, weight, bias), triton, use=(False, True))


@both
@pytest.mark.parametrize("branch", [FP32, BF16], ids=str)
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["total", "normed"])
def test_one_output_used(use, branch, triton):
    check(inputs(9, 48, branch=branch), triton, use)


@both
def test_stream_is_its_own_branch(triton):
    x, _, weight, bias = inputs(9, 48)
    total, normed = add_layer_norm(x, x, weight, bias, EPS, triton)
    total64, normed64 = in_float64(x, x, weight, bias)
    ours, exact = (
        torch.autograd.grad(loss.sum(), x)[0] for loss in (total * normed, total64 * normed64)
    )
    assert close(ours, exact, TOLERANCE[FP32])


@both
def test_no_rows(triton):
    _, _, dx, _, dweight, dbias = run(inputs(0, 48), triton)
    assert dx.shape == (0, 48) and not dweight.any() and not dbias.any()


# Frozen inputs, and what the backward pass is then asked for: the stream's gradient, its copy in
# bf16, weight and bias
FROZEN = [
    ((), (True, BF16, True)),
    ((0,), (True, BF16, True)),
    ((1,), (True, None, True)),
    ((0, 1), (False, None, True)),
    ((2, 3), (True, BF16, False)),
    ((3,), (True, BF16, True)),
]


@pytest.mark.parametrize(("frozen", "asked"), FROZEN, ids=str)
def test_no_work_for_what_is_frozen(monkeypatch, frozen, asked):
    leaves = inputs(9, 48, branch=BF16)
    expected = run(leaves, True)[2:]
    seen = []
    monkeypatch.setattr(
        kernels.layer_norm, "_backward", lambda *a: seen.append(a[-3:]) or _backward(*a)
    )
    for i in frozen:
        leaves[i].requires_grad_(False)
    ours = run(leaves, True)[2:]
    assert seen == [asked]
    live = [gradient for i, gradient in enumerate(expected) if i not in frozen]
    assert all(close(a, b, TOLERANCE[b.dtype]) for a, b in zip(ours, live, strict=True))


@both
@pytest.mark.parametrize("x", [FP32, BF16], ids=str)
def test_under_autocast(x, triton):
    """The stream's dtype decides, as it does outside."""
    leaves = inputs(9, 48, x=x, branch=BF16)
    with torch.autocast(DEVICE, BF16):
        check(leaves, triton)


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no branch"])
def test_operations_keep_their_promises(branch):
    x, b, weight, bias = inputs(5, 48, branch=BF16)
    torch.library.opcheck(_forward, (x, b if branch else None, weight, bias, EPS))
    total, d, row = coarse(5, 48), coarse(5, 48), torch.rand(5, device=DEVICE)
    for wanted in ((True, BF16, False), (False, None, True)):
        torch.library.opcheck(
            _backward, (d, total if branch else None, total, weight.detach(), row, row, *wanted)
        )


def test_shapes_that_do_not_fit():
    x, branch, weight, bias = inputs(4, 48)
    for wrong in (
        (x, branch[:1], weight, bias),
        (x, branch, weight[1:], bias[1:]),
        (x, None, weight, bias[:1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            add_layer_norm(*wrong, EPS, triton=True)


@pytest.mark.gpu
def test_rows_out_of_reach_of_32_bits():
    width = 1600
    rows = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 8 * 2 * rows * width:
        pytest.skip("needs 35 GB of GPU memory")
    x = torch.zeros(rows, width, device="cuda", dtype=BF16)
    x[-2:] = coarse(2, width, dtype=BF16)
    x.requires_grad_()
    _, _, weight, bias = inputs(2, width, affine=BF16)
    total, normed = add_layer_norm(x, x.detach(), weight, bias, EPS, triton=True)
    last = x[-2:].detach().requires_grad_()
    total64, normed64 = in_float64(last, last.detach(), weight, bias)
    grads = torch.zeros_like(normed)
    grads[-2:] = coarse(2, width, dtype=BF16)
    ours = torch.autograd.grad(normed, x, grads)[0][-2:]
    exact = torch.autograd.grad(normed64, last, grads[-2:].double())[0]
    pairs = (total[-2:], total64), (normed[-2:], normed64), (ours, exact)
    assert all(close(a, b, TOLERANCE[BF16]) for a, b in pairs)


def test_gain_and_bias_gradients_add_up_over_bf16_rows():
    """PyTorch's own norm in bf16 loses 8% of them on a CPU, where it adds them up in bf16."""
    torch.manual_seed(0)
    x, dnormed = (torch.randn(8192, 16, device=DEVICE, dtype=BF16) for _ in range(2))
    affine = [torch.randn(16, device=DEVICE, dtype=BF16, requires_grad=True) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in affine]
    normed = add_layer_norm(x, None, affine[0], affine[1], EPS)[1]
    reference = torch.nn.functional.layer_norm(x.double(), (16,), exact[0], exact[1], EPS)
    for ours, theirs in zip(
        torch.autograd.grad(normed, affine, dnormed),
        torch.autograd.grad(reference, exact, dnormed.double()),
    ):
        assert (ours - theirs).norm() <= 2**-8 * theirs.norm()  # rounded once
