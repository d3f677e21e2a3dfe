"""Attention in Triton against its reference in float64: the output and the packed gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.attention as module
from kernels import _card
from kernels.attention import (
    KernelTiles,
    Tile,
    _bounds,
    attention,
    attention_reference,
    choose_tiles,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNFIT = choose_tiles(_card.card(), "fp32", 64)  # a sentence where no blocks fit this GPU
pytestmark = pytest.mark.skipif(isinstance(UNFIT, str), reason=f"attention {UNFIT}")

# fp32 sums of up to a thousand terms, whose rounding errors (6e-8 each) mostly cancel: 1e-5 of the
# largest value.
FP32 = 1e-5
# One unit is the largest relative error of one rounding; the interpreter cuts fp32 to bf16 where a
# GPU rounds. The output is rounded after weights that were rounded: 2 units. A gradient is rounded
# after rounded differences of scores, and these come from the rounded output and from a product
# with the rounded weights: 4.
UNIT = {torch.float16: 2**-11, torch.bfloat16: 2**-9 if DEVICE == "cuda" else 2**-8}


@pytest.fixture(autouse=True)
def tiles_for_the_interpreter(monkeypatch):
    """Half precision's blocks for fp32 too: it takes one Python step a block, and exact fp32's are
    1/8 as large."""
    if DEVICE == "cpu":
        set_tiles(monkeypatch, 128, 64)


def set_tiles(monkeypatch: pytest.MonkeyPatch, kept: int, walked: int) -> None:
    tiles = [Tile(kept, walked, 4, 2)] * 3
    monkeypatch.setattr(
        module, "choose_tiles", lambda card, precision, head_dim: KernelTiles(*tiles, 0)
    )


def packed(
    B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Tensor:
    torch.manual_seed(B * T + D)
    return (torch.randn(B, T, 3, H, D) * scale).to(DEVICE, dtype).requires_grad_()


def output_and_gradient(
    function, qkv: Tensor, segments: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """In `dtype`; the incoming gradient is the same random one for every function and is seen in
    qkv's dtype."""
    B, T, _, H, D = qkv.shape
    torch.manual_seed(1)
    grad = torch.randn(B, T, H, D).to(DEVICE, qkv.dtype).to(dtype)
    qkv = qkv.detach().to(dtype).requires_grad_()
    out = function(qkv, segments)
    return out.detach(), torch.autograd.grad(out, qkv, grad)[0]


def check(
    qkv: Tensor, segments: Tensor | None = None, units: tuple[float, float] = (FP32, FP32)
) -> None:
    """Output, dq, dk and dv are within `units` (of output, of gradients) of the largest value of
    each."""
    out, gradient = output_and_gradient(attention, qkv, segments, qkv.dtype)
    exact, exact_gradient = output_and_gradient(attention_reference, qkv, segments, torch.float64)
    assert out.dtype == gradient.dtype == qkv.dtype
    assert out.is_contiguous() and gradient.is_contiguous()
    assert (out - exact).abs().max() <= units[0] * exact.abs().max()
    for ours, true in zip(gradient.unbind(2), exact_gradient.unbind(2)):
        # A lone token's weight is 1 whatever its score: its dq and dk are 0, and what is left is
        # rounding.
        assert (ours - true).abs().max() <= units[1] * max(
            true.abs().max(), exact_gradient.abs().max() / 10
        )


SHAPES = [(1, 1, 1, 16), (2, 7, 3, 32), (1, 129, 2, 64), (1, 300, 1, 128), (1, 256, 1, 16)]


@pytest.mark.parametrize(("B", "T", "H", "D"), SHAPES)
def test_agrees_with_float64(B, T, H, D):
    check(packed(B, T, H, D))


@pytest.mark.parametrize("D", [1, 24, 80, 96])
def test_any_head_dim(D):
    check(packed(1, 150, 2, D))


@pytest.mark.parametrize("D", [0, 129])
def test_a_head_dim_without_a_block_is_refused(D):
    with pytest.raises(ValueError, match=f"head_dim is {D}"):
        attention(torch.zeros(1, 4, 3, 1, D, device=DEVICE))


def test_a_launch_on_a_card_without_blocks_raises(monkeypatch):
    monkeypatch.setattr(module, "choose_tiles", choose_tiles)  # not the interpreter's
    monkeypatch.setattr(_card, "card", lambda device: _card.CARDS["T4"])
    with pytest.raises(ValueError, match="attention needs a GPU of compute capability"):
        attention(packed(1, 4, 1, 16))


def number(lengths: list[int]) -> list[int]:
    """Each token's document number, for documents of these lengths."""
    return [document for document, length in enumerate(lengths) for _ in range(length)]


DOCUMENTS = {
    "boundaries inside blocks": [[50, 3, 147, 70, 30], [50, 3, 147, 70, 30]],
    "boundaries on blocks": [[64, 64, 128, 44], [128, 128, 44]],
    "rows differ": [[1, 298, 1], [200, 100]],
    "a token each": [[1] * 300, [1] * 300],
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_documents(documents):
    segments = torch.tensor([number(lengths) for lengths in documents], device=DEVICE)
    check(packed(2, 300, 1, 16), segments)


@pytest.mark.parametrize("kept, walked", [(32, 32), (16, 32), (64, 16)])
@pytest.mark.parametrize("lengths", [None, [5, 30, 1, 1, 29, 4]])
def test_any_blocks(monkeypatch, kept, walked, lengths):
    """The bounds of the loops, whichever side of a block is the longer. (32, 32) is what exact fp32
    has on a GPU."""
    set_tiles(monkeypatch, kept, walked)
    segments = None if lengths is None else torch.tensor([number(lengths)], device=DEVICE)
    check(packed(1, 70, 1, 16), segments)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_blocks_of_other_documents_are_not_read():
    segments = torch.tensor([number([128, 128, 128])], device=DEVICE)
    qkv = packed(1, 384, 1, 16).detach()
    out, gradient = output_and_gradient(attention, qkv, segments, torch.float32)
    for poisoned in range(3):
        rows = segments[0] == poisoned
        spoilt = qkv.clone()
        spoilt[:, rows] = torch.nan
        ours, ours_gradient = output_and_gradient(attention, spoilt, segments, torch.float32)
        assert torch.equal(ours[:, ~rows], out[:, ~rows])
        assert torch.equal(ours_gradient[:, ~rows], gradient[:, ~rows])
        assert ours[:, rows].isnan().all()


def test_numbers_of_documents_need_not_be_dense():
    qkv = packed(1, 40, 1, 16)
    dense = torch.tensor([number([3, 17, 20])], device=DEVICE)
    with torch.no_grad():
        ours = attention(qkv, (dense * 1000 - 7).int())
    assert torch.equal(ours, attention(qkv, dense))


@pytest.mark.parametrize("lengths", [None, [100, 30, 20]])
@pytest.mark.parametrize("dtype", UNIT.keys())
def test_half_precision(dtype, lengths):
    segments = None if lengths is None else torch.tensor([number(lengths)], device=DEVICE)
    check(packed(1, 150, 1, 64, dtype), segments, units=(2 * UNIT[dtype], 4 * UNIT[dtype]))


# of the weights of keys that are not seen: they are then set to 0
@pytest.mark.filterwarnings("ignore:overflow")
def test_huge_scores():
    qkv = packed(1, 150, 1, 64, scale=100.0)
    q, k, _ = qkv.detach().unbind(2)
    assert (q * k).sum(-1).abs().max() / 8 > 1e4  # exp overflows at 89
    # The scores' own rounding, 1e4 x 6e-8 each, moves the softmax between near ties.
    check(qkv, units=(1e-2, 1e-2))


def sdpa(qkv: Tensor, _: None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def test_autocast_decides_the_dtype():
    qkv = packed(1, 40, 2, 16)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(qkv)
    half = qkv.detach().bfloat16().requires_grad_()
    assert torch.equal(out, attention(half))
    gradient = torch.autograd.grad(out.float().square().sum(), qkv)[0]
    assert gradient.dtype == torch.float32
    assert torch.equal(
        gradient, torch.autograd.grad(attention(half).float().square().sum(), half)[0].float()
    )


def test_operators_are_sound():
    qkv = packed(1, 7, 2, 16)
    bounds = _bounds(torch.tensor([number([3, 4])], device=DEVICE))
    torch.library.opcheck(torch.ops.gpt2.attention.default, (qkv, bounds))
    with torch.no_grad():
        out, lse = torch.ops.gpt2.attention(qkv, bounds)
    torch.library.opcheck(
        torch.ops.gpt2.attention_backward.default, (out, qkv.detach(), out, lse, bounds)
    )


@pytest.mark.gpu
def test_at_full_size():
    """In bf16 no further from float64 than PyTorch's fused attention, which rounds at the same
    places."""
    qkv = packed(8, 1024, 12, 64, torch.bfloat16)
    ours = output_and_gradient(attention, qkv, None, torch.bfloat16)
    theirs = output_and_gradient(sdpa, qkv, None, torch.bfloat16)
    exact = output_and_gradient(attention_reference, qkv, None, torch.float64)
    for our, their, true in zip(ours, theirs, exact):
        assert (our - true).norm() <= 1.25 * (their - true).norm()
    segments = (torch.rand(8, 1024, device=DEVICE) < 1 / 300).cumsum(1)
    check(qkv, segments, units=(2 * UNIT[torch.bfloat16], 4 * UNIT[torch.bfloat16]))


@pytest.mark.gpu
def test_offsets_past_an_int32():
    """A view whose last tokens begin past element 2^31."""
    T, apart = 1100, 2_000_000
    whole = torch.zeros(T * apart, dtype=torch.bfloat16, device="cuda")
    view = whole.as_strided((1, T, 3, 2, 16), (T * apart, apart, 32, 16, 1))
    view.copy_(torch.randn(view.shape))
    ours = output_and_gradient(
        lambda qkv, _: attention(qkv), view.contiguous(), None, torch.bfloat16
    )
    out, lse = torch.ops.gpt2.attention(view, None)
    assert torch.equal(out, ours[0])
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to("cuda", torch.bfloat16)
    assert torch.equal(torch.ops.gpt2.attention_backward(grad, view, out, lse, None), ours[1])
