"""FP8 products against float64: what the formats must lose, and nothing beyond it. They run on a
CPU too."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig, UserError
from engine.precision import choose_precision
from kernels.fp8_linear import dequantized, fp8_linear, fp8_linear_reference, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Half a unit of the last bit of mantissa: the most that rounding moves a number, relative to it.
HALF = {E4M3: 2.0**-4, E5M2: 2.0**-3}
BF16 = 2.0**-8  # the same of the output, rounded once
# Of the terms' magnitudes, what their sum may lose: a CPU adds in fp32, Hopper's tensor cores keep
# about 14 bits.
SUMMED = 2.0**-13 if DEVICE == "cuda" else 2.0**-20

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9, reason="this GPU has no FP8"
)


def inputs(
    rows: int, width: int, out: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight and bias as leaves, and an incoming gradient."""
    torch.manual_seed(rows + width)
    x = (scale * torch.randn(rows, width)).to(DEVICE)
    weight = (torch.randn(out, width) / width**0.5).to(DEVICE)
    bias, dy = (
        scale * torch.randn(out).to(DEVICE),
        torch.randn(rows, out).to(DEVICE, torch.bfloat16),
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dy


def results(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    y = fp8_linear(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]


def off(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


SHAPES = [(1, 48, 144), (16, 16, 16), (1023, 48, 32), (33, 768, 16), (64, 1600, 48)]


@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_agrees_with_float64(rows, width, out):
    x, weight, bias, dy = inputs(rows, width, out)
    y, dx, dweight, dbias = results(x, weight, bias, dy)
    x64, weight64, bias64 = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    exact = F.linear(x64, weight64, bias64)
    exact_dx, exact_dweight, exact_dbias = torch.autograd.grad(
        exact, (x64, weight64, bias64), dy.double()
    )
    # Errors even over +-half a unit have a root mean square of it / sqrt(3). Both factors of each
    # term have one, independent of each other and of all other terms', so that a sum is relatively
    # as far off as its terms are. Single rows and few columns scatter about that: a fifth more.
    forward = 1.2 * math.hypot(HALF[E4M3], HALF[E4M3]) / math.sqrt(3)
    backward = 1.2 * math.hypot(HALF[E4M3], HALF[E5M2]) / math.sqrt(3)
    assert off(y, exact) < forward
    assert off(dx, exact_dx) < backward and off(dweight, exact_dweight) < backward
    assert off(dbias, exact_dbias) < 1e-6  # no FP8: a sum in fp32
    assert y.dtype == torch.bfloat16 and y.shape == (rows, out)
    assert dx.dtype == dweight.dtype == dbias.dtype == torch.float32


def assert_exact(
    ours: Tensor, a: Tensor, b: Tensor, rounded: float, bias: Tensor | None = None
) -> None:
    """`ours` is a (M, K) times the transpose of b (N, K), in float64, but for `rounded` and the
    fp32 sum."""
    bias = ours.new_zeros((), dtype=torch.float64) if bias is None else bias
    exact, terms = a @ b.t() + bias, a.abs() @ b.abs().t() + bias.abs()
    assert ((ours.double() - exact).abs() <= rounded * exact.abs() + SUMMED * terms).all()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_is_the_product_of_the_quantized(rows, width, out, scale):
    """The operation's definition, element by element: nothing is lost beyond the one conversion of
    each tensor."""
    x, weight, bias, dy = inputs(rows, width, out, scale)
    dy = dy * scale
    y, dx, dweight, _ = results(x, weight, bias, dy)
    x8, weight8, dy8 = (
        dequantized(x, E4M3).detach(),
        dequantized(weight, E4M3).detach(),
        dequantized(dy, E5M2),
    )
    bias = bias.detach().bfloat16().double()
    assert torch.equal(fp8_linear_reference(x, weight, bias), x8 @ weight8.t() + bias)
    assert_exact(y, x8, weight8, BF16, bias)
    assert_exact(dx, dy8, weight8.t(), 0.0)  # fp32, as x and weight are
    assert_exact(dweight, dy8.t(), x8.t(), 0.0)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_quantize(dtype, scale, source):
    torch.manual_seed(0)
    x = (scale * torch.randn(64, 48)).to(DEVICE, source)
    x8, factor = quantize(x, dtype)
    assert x8.dtype == dtype and factor.dtype == torch.float32 and factor.dim() == 0
    # the whole range is used, and none of it overflows
    assert x8.float().abs().max() == torch.finfo(dtype).max
    # Below the smallest normal number the steps stay as they are there. The factor and the division
    # round in fp32.
    half_step = HALF[dtype] * x.double().abs().clamp(
        min=torch.finfo(dtype).smallest_normal * factor.item()
    )
    assert ((x8.double() * factor.double() - x.double()).abs() <= half_step * (1 + 1e-5)).all()


@pytest.mark.parametrize("zero", ["x", "weight", "dy", "all"])
def test_zeros(zero):
    tensors = dict(zip(("x", "weight", "bias", "dy"), inputs(32, 48, 16), strict=True))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if zero in (name, "all"):
                tensor.zero_()
    y, dx, dweight, dbias = results(**tensors)
    bias = tensors["bias"].detach().bfloat16().expand(32, 16)
    assert torch.equal(y, bias) if zero != "dy" else y.isfinite().all()
    assert dx.any() == (zero == "x") and dx.isfinite().all()
    assert dweight.any() == (zero == "weight") and dweight.isfinite().all()
    assert dbias.any() == (zero in ("x", "weight"))


def test_magnitudes_too_small_for_a_scale_become_zero():
    x, weight, bias, dy = inputs(16, 48, 16, scale=1e-38)
    y, dx, dweight, _ = results(x, weight, bias, dy)
    assert y.abs().max() < 1e-36 and dweight.abs().max() < 1e-36
    assert dx.any() and dx.isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    x, weight, bias, dy = inputs(16, 48, 16)
    with torch.no_grad():
        x[3, 5] = bad
    y, _, dweight, _ = results(x, weight, bias, dy)
    assert not y[3].isfinite().any() and not dweight[:, 5].isfinite().any()
    dy[2, 1] = bad
    assert not results(*inputs(16, 48, 16)[:3], dy)[1][2].isfinite().any()


def test_leading_dimensions_and_no_bias():
    x, weight, _, dy = inputs(30, 48, 16)
    y = fp8_linear(x.view(2, 3, 5, 48), weight)
    assert y.shape == (2, 3, 5, 16)
    assert torch.equal(y.flatten(0, 2), fp8_linear(x, weight))
    deep = torch.autograd.grad(y, (x, weight), dy.view(2, 3, 5, 16))
    flat = torch.autograd.grad(fp8_linear(x, weight), (x, weight), dy)
    assert all(torch.equal(a, b) for a, b in zip(deep, flat))
    assert torch.equal(fp8_linear(x[0], weight).detach(), fp8_linear(x[:1], weight).detach()[0])


def test_rows_are_padded_to_a_multiple_of_16():
    x, weight, bias, dy = inputs(37, 48, 16)
    more, more_dy = F.pad(x.detach(), (0, 0, 0, 11)).requires_grad_(), F.pad(dy, (0, 0, 0, 11))
    y, dx, dweight, dbias = results(x, weight, bias, dy)
    padded = results(more, weight, bias, more_dy)
    assert torch.equal(y, padded[0][:37]) and torch.equal(dx, padded[1][:37])
    assert torch.equal(dweight, padded[2]) and torch.equal(dbias, padded[3])


def test_used_twice():
    x, weight, bias, dy = inputs(32, 48, 48)
    twice = torch.autograd.grad(
        fp8_linear(x, weight, bias) + fp8_linear(x, weight, bias), (x, weight, bias), dy
    )
    for ours, once in zip(twice, results(x, weight, bias, dy)[1:]):
        assert torch.equal(ours, 2 * once)
    # two uses of one weight
    chained = torch.autograd.grad(fp8_linear(fp8_linear(x, weight), weight), weight, dy)[0]
    assert chained.isfinite().all() and chained.any()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_one_input_frozen(frozen):
    names, (*tensors, dy) = ("x", "weight", "bias"), inputs(32, 48, 16)
    expected = dict(zip(names, results(*tensors, dy)[1:], strict=True))
    live = dict(zip(names, tensors, strict=True))
    live.pop(frozen).requires_grad_(False)
    y = fp8_linear(*tensors)
    # ty: ignore[missing-attribute, missing-union-attribute]
    saved = y.grad_fn.next_functions[0][0].saved_tensors
    # x is kept for the gradient of weight, and weight for that of x: neither for nothing
    assert (saved[0] is None, saved[2] is None) == (frozen == "weight", frozen == "x")
    for name, gradient in zip(live, torch.autograd.grad(y, tuple(live.values()), dy)):
        assert torch.equal(gradient, expected[name])


def test_the_output_may_be_changed_in_place():
    x, weight, bias, dy = inputs(37, 48, 16)
    expected = results(x, weight, bias, dy)[1]
    assert torch.equal(torch.autograd.grad(fp8_linear(x, weight, bias).add_(1), x, dy)[0], expected)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype, enabled):
    """Gradients have their inputs' dtypes, the output is bf16, and the products round as they do
    without it."""
    x, weight, bias, dy = inputs(32, 48, 16)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
        y, dx, dweight, dbias = results(x, weight, bias, dy)
    assert (y.dtype, dx.dtype) == (torch.bfloat16, dtype)
    assert dweight.dtype == dbias.dtype == torch.float32
    x8, weight8, dy8 = (
        dequantized(x, E4M3).detach(),
        dequantized(weight, E4M3).detach(),
        dequantized(dy, E5M2),
    )
    assert_exact(y, x8, weight8, BF16, bias.detach().bfloat16().double())
    assert_exact(dx, dy8, weight8.t(), BF16 if dtype == torch.bfloat16 else 0.0)
    assert_exact(dweight, dy8.t(), x8.t(), 0.0)
    half = weight.detach().bfloat16().requires_grad_()
    assert torch.autograd.grad(fp8_linear(x, half), half, dy)[0].dtype == torch.bfloat16


@pytest.fixture
def without_data(monkeypatch):
    """For tensors of device "meta": torch checks a GPU's demands on layout with them, and never
    with a CPU's."""
    # which knows no such device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("rows", [48, 37])
def test_the_operands_lie_as_tensor_cores_read_them(rows, without_data):
    """Layouts are checked, and there is no number that the host could wait for."""
    x, weight, bias, dy = (t.detach().to("meta").requires_grad_() for t in inputs(rows, 64, 32))
    turned = [t.detach().t().contiguous().t().requires_grad_() for t in (x, weight)]
    for first, second, gradient in ((x, weight, dy), (*turned, dy.detach().t().contiguous().t())):
        y, dx, dweight, _ = results(first, second, bias, gradient)
        assert y.shape == (rows, 32) and dx.shape == (rows, 64) and dweight.shape == (32, 64)


def test_widths_not_a_multiple_of_16_are_refused(without_data):
    GPTConfig(n_embd=48, n_head=3, fp8=True)
    with pytest.raises(UserError, match="multiple of 16, and n_embd is 40; use --precision bf16"):
        GPTConfig(n_embd=40, n_head=1, fp8=True)
    x, weight, _, _ = (t.detach().to("meta") for t in inputs(16, 40, 64))
    with pytest.raises(RuntimeError, match="16"):
        fp8_linear(x, weight)


def test_devices_without_fp8_are_refused(monkeypatch):
    with pytest.raises(UserError, match="Hopper generation or newer; use --precision bf16"):
        choose_precision("fp8", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match="Hopper generation or newer"):
        choose_precision("fp8", torch.device("cuda"))
