"""Attention made of batched products on a CPU, against float64: values and the packed gradient, at
awkward shapes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.cpu_attention as module
from kernels.attention import attention_reference
from kernels.cpu_attention import (
    _backward,
    _even_slices,
    _forward,
    _groups,
    _pool,
    cpu_attention,
    is_faster,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Sums of up to a thousand terms, whose rounding errors (6e-8 and 1e-16 each) mostly cancel.
TOLERANCE = {FP32: 1e-5, FP64: 1e-14}


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One computes where it is called, several in threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(B: int, T: int, H: int, D: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
    torch.manual_seed(B + T + D)
    return (torch.randn(B, T, 3, H, D) * scale).to(dtype).requires_grad_()


def run(qkv: Tensor, attention=cpu_attention) -> tuple[Tensor, Tensor]:
    """The output and the packed gradient, with an output's gradient that bf16 holds exactly."""
    out = attention(qkv)
    torch.manual_seed(0)
    return out.detach(), torch.autograd.grad(
        out, qkv, torch.randn(out.shape).bfloat16().to(out.dtype)
    )[0]


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def check(qkv: Tensor, tolerance: float) -> None:
    in_float64 = run(qkv.detach().double().requires_grad_(), attention_reference)
    for ours, exact in zip(run(qkv), in_float64, strict=True):
        assert ours.dtype == qkv.dtype and ours.is_contiguous()
        assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


SHAPES = [
    (1, 1, 1, 16),
    (2, 1, 3, 64),
    (3, 7, 2, 32),
    (2, 64, 1, 64),
    (3, 100, 5, 48),
    (1, 600, 2, 128),
    (2, 1023, 3, 16),
]


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    check(inputs(*shape, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [1, 200, 400, 700, 10**6])
def test_any_groups(monkeypatch, tokens):
    monkeypatch.setattr(module, "GROUP_TOKENS", tokens)
    check(inputs(3, 100, 5, 16), TOLERANCE[FP32])


@pytest.mark.parametrize(
    ("B", "T", "H"), [(4, 512, 12), (32, 256, 6), (3, 1024, 25), (2, 7, 3), (1, 10**5, 5)]
)
@pytest.mark.parametrize("cores", [1, 2, 64])
def test_groups_are_all_heads_once(B, T, H, cores):
    seen = torch.zeros(B, H)
    for batch, heads in _groups(B, T, H, cores):
        seen[batch, heads] += 1
        assert seen[batch, heads].numel() <= max(1, module.GROUP_TOKENS // T)
    assert (seen == 1).all()


def test_parts_are_even():
    assert [part.stop - part.start for part in _even_slices(16, 6)] == [6, 6, 4]
    assert [part.stop - part.start for part in _even_slices(12, 7)] == [6, 6]


@pytest.mark.parametrize(
    "shape", [(2, 512, 3, 64), (3, 100, 5, 48), (1, 1023, 2, 32), (2, 256, 4, 16)], ids=str
)
def test_bf16_is_as_near_to_float64_as_flash_attention(shape):
    qkv = inputs(*shape, dtype=BF16)
    double = qkv.detach().double().requires_grad_()
    for found in zip(run(qkv), run(qkv, sdpa), run(double, sdpa), strict=True):
        # Of q, k and v apart: the gradient of v is the largest and would cover the others'.
        parts = (t.unbind(2) if t.dim() == 5 else (t,) for t in found)
        for ours, theirs, exact in zip(*parts, strict=True):
            assert ours.dtype == BF16
            assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


def test_huge_scores():
    qkv = inputs(2, 130, 3, 64, scale=100.0)
    q, k, _ = qkv.detach().unbind(2)
    assert (q * k).sum(-1).abs().max() / 8 > 1e4
    # A score's own rounding, 1e4 x 6e-8, moves the softmax between near ties.
    check(qkv, tolerance=1e-2)


def test_no_token_sees_a_later_one():
    qkv = inputs(2, 300, 3, 16).detach()
    before = cpu_attention(qkv)
    qkv[:, 200:] = 1e3
    assert torch.equal(cpu_attention(qkv)[:, :200], before[:, :200])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    qkv = inputs(3, 300, 5, 32, dtype=dtype)
    ours = run(qkv)
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(qkv)))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_under_autocast(dtype):
    qkv = inputs(2, 100, 3, 16, dtype=BF16)
    expected = run(qkv)
    with torch.autocast("cpu", BF16):
        out, grad = run(qkv.detach().to(dtype).requires_grad_())
    assert out.dtype == BF16 and grad.dtype == dtype
    assert torch.equal(out, expected[0]) and torch.equal(grad, expected[1].to(dtype))


def test_keeps_its_input_alone():
    qkv, kept = inputs(2, 300, 3, 16), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.data_ptr()) or t, lambda t: t
    ):
        cpu_attention(qkv)
    assert kept == [qkv.data_ptr()]


def test_threads_of_torch_are_left_as_they_were(threads):
    _pool.cache_clear()
    cpu_attention(inputs(2, 100, 3, 16))
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as later:  # what a thread begins with is a setting of its own
        assert later.submit(torch.get_num_threads).result() == threads
    if threads > 1:
        assert set(_pool(threads).map(lambda _: torch.get_num_threads(), range(threads))) == {1}


@pytest.mark.parametrize("products", ["highest", "medium"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_memory_that_is_used_again_holds_nothing_of_before(dtype, products):
    """Whoever makes the products (precision.set_products)."""
    torch.set_float32_matmul_precision(products)
    qkv = inputs(2, 100, 3, 16, dtype=dtype)
    before = run(qkv, dropping(0.2))
    lost = run((qkv.detach() * torch.nan).requires_grad_(), dropping(0.2))
    assert all(t.isnan().all() for t in lost)
    assert all(torch.equal(a, b) for a, b in zip(before, run(qkv, dropping(0.2))))


# --- dropout


def dropping(p: float, seed: int = 0):
    """Attention whose draws begin with `seed`."""

    def attention(qkv: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return cpu_attention(qkv, p)

    return attention


def kept(B: int, T: int, H: int, p: float, seed: int = 0) -> Tensor:
    """What is kept and by what it is multiplied, (B, H, T, T) fp64, 0 above the diagonal: q and k
    that make all probabilities of a query equal, and a v that hands them out one by one."""
    qkv = torch.zeros(B, T, 3, H, T, dtype=FP64)
    qkv[:, :, 2] = torch.eye(T, dtype=FP64)[:, None]
    shares = dropping(p, seed)(qkv).transpose(1, 2)
    return shares * torch.arange(1, T + 1)[:, None]


def with_mask(mask: Tensor):
    """Attention as written, with what is kept given, in the dtype of its input."""

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        above = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (scores.masked_fill(above, -torch.inf).softmax(-1) * mask.to(q.dtype) @ v).transpose(
            1, 2
        )

    return attention


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 16), (3, 7, 2, 32), (2, 64, 1, 64), (3, 131, 5, 48), (1, 600, 2, 16)],
    ids=str,
)
def test_dropout_agrees_with_float64(shape, dtype, p):
    qkv = inputs(*shape, dtype=dtype)
    reference = run(qkv.detach().double().requires_grad_(), with_mask(kept(*shape[:3], p)))
    for ours, exact in zip(run(qkv, dropping(p)), reference, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def test_dropout_in_bf16_is_as_near_to_float64_as_the_plain_way():
    qkv, mask = inputs(2, 200, 3, 64, dtype=BF16), kept(2, 200, 3, 0.2)
    double = qkv.detach().double().requires_grad_()
    for found in zip(
        run(qkv, dropping(0.2)),
        run(qkv, with_mask(mask)),
        run(double, with_mask(mask)),
        strict=True,
    ):
        parts = (t.unbind(2) if t.dim() == 5 else (t,) for t in found)
        for ours, theirs, exact in zip(*parts, strict=True):
            assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99999])
def test_each_probability_is_dropped_by_itself(p):
    mask = kept(3, 100, 4, p)
    values = mask[..., *torch.tril_indices(100, 100)]  # (B, H, of the triangle)
    there = values != 0
    assert (mask.triu(1) == 0).all()
    assert there.double().mean().item() == pytest.approx(
        1 - p, abs=4 * (p * (1 - p) / there.numel()) ** 0.5 + 2**-15
    )
    if p < 0.9:
        assert values[there].unique().tolist() == pytest.approx(
            [1 / (1 - p)] * len(values[there].unique()), rel=1e-4
        )
        # Neither heads, nor sequences, nor neighbours, nor calls are alike.
        of_heads = there.flatten(0, 1).double()
        of_heads = torch.cat(
            (
                of_heads,
                of_heads[:1].roll(1, 1),
                (kept(1, 100, 1, p, seed=1)[..., *torch.tril_indices(100, 100)] != 0)[0].double(),
            )
        )
        # four over sqrt(5050)
        assert (torch.corrcoef(of_heads) - torch.eye(len(of_heads))).abs().max() < 0.06


@pytest.mark.parametrize("tokens", [1, 400, 10**6])
def test_neither_groups_nor_threads_change_what_is_dropped(monkeypatch, tokens):
    expected = kept(3, 100, 5, 0.3)
    monkeypatch.setattr(module, "GROUP_TOKENS", tokens)
    assert torch.equal(kept(3, 100, 5, 0.3), expected)
    ours = run(inputs(3, 300, 5, 32), dropping(0.3))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(ours, run(inputs(3, 300, 5, 32), dropping(0.3))))


def test_dropout_keeps_its_input_and_a_number():
    qkv, sizes = inputs(2, 300, 3, 16), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    ):
        cpu_attention(qkv, 0.1)
    assert sizes == [qkv.numel(), 1]


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_operations_keep_their_promises(p):
    qkv, seed = inputs(2, 9, 3, 16), torch.tensor(7) if p else None
    torch.library.opcheck(_forward, (qkv, seed, p))
    torch.library.opcheck(_backward, (qkv.detach(), seed, p, torch.randn(2, 9, 3, 16)))


@pytest.mark.parametrize(("bf16", "amx"), [(True, False), (True, True), (False, False)])
def test_is_faster_only_where_it_was_measured(monkeypatch, bf16, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert is_faster(BF16) == is_faster(FP32) == (libraries and bf16 and not amx)
    assert not is_faster(FP64)
