"""A product's bias with the GELU after it, by PyTorch and in Triton, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.bias_gelu
from kernels.bias_gelu import _backward, _forward, bias_gelu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16

# fp32: a few roundings (6e-8 each) a value, and sums of up to a thousand of them, which mostly
# cancel. bf16 keeps 8 bits, 2^-8 of a value when rounded and 2^-7 when cut off, as Triton's
# interpreter does; the inputs below are exact in bf16, and so is x + bias, so only the result
# itself is rounded.
TOLERANCE = {FP32: 4e-6, BF16: 2**-7}
# PyTorch rounds x's gradient to bf16 before it sums it for the bias, and then the sum.
TORCH_BF16 = 2**-6

both = pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])


def coarse(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Multiples of 1/8 in [-2, 2): they and the sums of two of them are exact in bf16."""
    return (torch.randint(-16, 16, shape) / 8).to(DEVICE, dtype)


def inputs(*shape: int, x: torch.dtype = FP32, bias: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(shape[0])
    return coarse(*shape, dtype=x).requires_grad_(), coarse(
        *shape[-1:], dtype=bias
    ).requires_grad_()


def run(x: Tensor, bias: Tensor, triton: bool | None) -> list[Tensor]:
    """The output and the gradients that are asked for, for a fixed gradient of the output; triton
    None: in float64."""
    y = (
        F.gelu(x.double() + bias.double(), approximate="tanh")
        if triton is None
        else bias_gelu(x, bias, triton)
    )
    torch.manual_seed(0)
    asked = [t for t in (x, bias) if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, asked, coarse(*x.shape, dtype=y.dtype))]


def close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    """To a share of the largest value."""
    return bool((ours - exact).abs().max() <= tolerance * exact.abs().max())


def check(x: Tensor, bias: Tensor, triton: bool) -> None:
    """Output and gradients have the dtypes promised and agree with float64."""
    dtypes = [x.dtype, x.dtype, bias.dtype]
    for ours, exact, dtype in zip(run(x, bias, triton), run(x, bias, None), dtypes, strict=True):
        allowed = TOLERANCE[dtype] if triton or BF16 not in (dtype, x.dtype) else TORCH_BF16
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert close(ours, exact, allowed)


SHAPES = [(1, 48), (131, 48), (2, 5, 384), (5, 768), (3, 1600), (4, 7), (3, 1)]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, triton):
    check(*inputs(*shape), triton)


@both
@pytest.mark.parametrize(("x", "bias"), [(BF16, BF16), (BF16, FP32), (FP32, BF16)], ids=str)
def test_dtypes(x, bias, triton):
    check(*inputs(3, 11, 48, x=x, bias=bias), triton)


def test_every_size_of_number():
    """Where tanh is -1 to seven digits GELU keeps its own relative precision; nothing overflows on
    the way."""
    x = torch.cat(
        [torch.linspace(-5, 5, 1001), torch.tensor([-1e6, -1e3, -20.0, 0.0, 20.0, 1e3, 1e6])]
    )
    x = x.to(DEVICE)[:, None].requires_grad_()
    zero = torch.zeros(1, device=DEVICE)
    y = bias_gelu(x, zero, triton=True)
    y64 = F.gelu(x.double(), approximate="tanh")
    # The exponent 2u, -17 at x = -5, is rounded three times by 6e-8 of itself, 3e-6 of exp(2u); 1 +
    # tanh u in float64 by 1e-9 of itself. The derivative passes through 0 near x = -0.75.
    torch.testing.assert_close(y.double(), y64, rtol=4e-6, atol=1e-30)
    dx, exact = (torch.autograd.grad(t.sum(), x)[0] for t in (y, y64))
    torch.testing.assert_close(dx, exact, rtol=4e-6, atol=1e-7)


def test_nan_stays_nan():
    x = torch.full((1, 4), torch.nan, device=DEVICE, requires_grad=True)
    y = bias_gelu(x, torch.zeros(4, device=DEVICE), triton=True)
    assert y.isnan().all() and torch.autograd.grad(y.sum(), x)[0].isnan().all()


@both
def test_no_rows(triton):
    y, dx, dbias = run(*inputs(0, 48), triton)
    assert y.shape == dx.shape == (0, 48) and not dbias.any()


@pytest.mark.parametrize("frozen", ["x", "bias"])
def test_no_work_for_what_is_frozen(monkeypatch, frozen):
    x, bias = inputs(9, 48)
    _, dx, dbias = run(x, bias, True)
    seen = []
    monkeypatch.setattr(
        kernels.bias_gelu, "_backward", lambda *a: seen.append(a[-2:]) or _backward(*a)
    )
    {"x": x, "bias": bias}[frozen].requires_grad_(False)
    _, ours = run(x, bias, True)
    assert seen == [(frozen != "x", frozen != "bias")]
    assert close(ours, dbias if frozen == "x" else dx, TOLERANCE[FP32])


@both
def test_under_autocast(triton):
    """A product's output in bf16, a bias in fp32."""
    with torch.autocast(DEVICE, BF16):
        check(*inputs(9, 48, x=BF16), triton)


def test_operations_keep_their_promises():
    x, bias = inputs(5, 48, x=BF16)
    torch.library.opcheck(_forward, (x, bias))
    x, bias = x.detach(), bias.detach()
    for wanted in ((True, False), (False, True)):
        torch.library.opcheck(_backward, (x, x, bias, *wanted))


def test_shapes_that_do_not_fit():
    x, bias = inputs(4, 48)
    with pytest.raises(ValueError, match="do not fit"):
        bias_gelu(x, bias[:1], triton=True)


@pytest.mark.gpu
def test_rows_out_of_reach_of_32_bits():
    width = 3072
    rows = 2**31 // width + 3
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * width:
        pytest.skip("needs 22 GB of GPU memory")
    x = torch.zeros(rows, width, device="cuda", dtype=BF16)
    x[-2:] = coarse(2, width, dtype=BF16)
    last, bias = x[-2:].clone().requires_grad_(), inputs(1, width)[1]
    y = bias_gelu(x.requires_grad_(), bias, triton=True)
    y64 = F.gelu(last.double() + bias.double(), approximate="tanh")
    grads = torch.zeros_like(y)
    grads[-2:] = coarse(2, width, dtype=BF16)
    ours = torch.autograd.grad(y, (x, bias), grads)
    exact = torch.autograd.grad(y64, (last, bias), grads[-2:].double())
    assert close(y[-2:], y64, TOLERANCE[BF16])
    assert close(ours[0][-2:], exact[0], TOLERANCE[BF16]) and close(
        ours[1], exact[1], TOLERANCE[FP32]
    )
