"""Head and loss, in PyTorch and with the Triton kernel, against float64: values and gradients, at
awkward shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels.linear_cross_entropy as lce
from kernels._triton import no_triton_reason
from kernels.linear_cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32 sums of up to a few thousand terms, whose rounding errors (6e-8 each) mostly cancel: 1e-5 of
# the largest value.
FP32 = 1e-5
# bf16 keeps 8 bits (2^-9 relative when rounded): the logits are rounded once as they leave the
# product, their gradient once before the next two (the interpreter cuts there: two roundings), and
# dx once more; so may the head's gradient be.
BF16 = 5 * 2**-9

needs_triton = pytest.mark.skipif(no_triton_reason(DEVICE) is not None, reason="needs Triton")
BOTH = [False, pytest.param(True, marks=needs_triton)]
each = pytest.mark.parametrize("triton", BOTH, ids=["torch", "triton"])


def inputs(
    rows: int, width: int, vocab: int, padded: int, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + padded)
    x = torch.randn(rows, width, device=DEVICE) * scale
    weight = torch.randn(padded, width, device=DEVICE) / width**0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (rows,), device=DEVICE)


def check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    triton: bool,
    tolerance: float = FP32,
    times: float = 1.0,
) -> None:
    """The sum and both gradients agree with float64's to `tolerance` of their own largest value."""
    (linear_cross_entropy(x, weight, targets, vocab, triton) * times).backward()
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    # The reference's own .float() would round: its two lines in float64.
    logits = (x64 @ weight64.t())[:, :vocab]
    (
        torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        * times
    ).backward()
    ours = linear_cross_entropy(x.detach(), weight.detach(), targets, vocab, triton)
    rows = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert (ours - rows.sum()).abs() <= tolerance * rows.abs().sum() + 1e-30
    for leaf, exact in ((x, x64.grad), (weight, weight64.grad)):
        ours = leaf.grad
        assert ours is not None and exact is not None and ours.dtype == leaf.dtype
        assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


SHAPES = [
    (1, 48, 331, 384),
    (3, 48, 331, 331),
    (129, 8, 331, 384),
    (3, 16, 50257, 50304),
    (3, 8, 50257, 50257),
]
CASES = [
    *((shape, triton) for shape in SHAPES for triton in BOTH if shape[0] < 100 or not triton),
    ((257, 8, 50257, 50257), False),  # several of the pieces that a CPU takes at once
    ((1023, 48, 331, 384), False),
    # every row is Python in the interpreter
    pytest.param((1023, 48, 331, 384), True, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("shape", "triton"), CASES)
def test_agrees_with_float64(shape, triton):
    x, weight, targets = inputs(*shape)
    vocab = shape[2]
    check(x, weight, targets, vocab, triton)
    assert weight.grad is not None
    assert not weight.grad[vocab:].any()  # exactly zero: the padding must never move


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reference_agrees_with_float64(reduction):
    x, weight, targets = inputs(31, 16, 331, 384)
    targets[::3] = IGNORE
    exact = torch.nn.functional.cross_entropy(
        (x.double() @ weight.double().t())[:, :331],
        targets,
        ignore_index=IGNORE,
        reduction=reduction,
    )
    torch.testing.assert_close(
        linear_cross_entropy_reference(x, weight, targets, 331, reduction).double(), exact
    )


def chunks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """`size` bytes of logits at once."""
    monkeypatch.setattr(lce, "CHUNK_BYTES", size)
    monkeypatch.setattr(lce, "GPU_CHUNK_BYTES", size)


@each
@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 1000])
def test_any_number_of_chunks(monkeypatch, chunk_rows, triton):
    x, weight, targets = inputs(17, 24, 331, 384)
    targets[5:16] = IGNORE  # whole chunks without a target
    chunks_of(monkeypatch, 4 * 384 * chunk_rows)
    check(x, weight, targets, 331, triton)


@pytest.mark.parametrize("rows", [0, 1, 128, 1023, 10_624, 10_625, 65_536, 98_304])
@pytest.mark.parametrize("size", [0, 100, 100_608, 10**6, 256 << 20, 1 << 30])
def test_chunks_of_a_gpu_are_even_and_whole(monkeypatch, rows, size):
    chunks_of(monkeypatch, size)
    ours = lce._chunk_rows(rows, 100_608)
    most = max(1, size // 100_608)
    assert 1 <= ours <= most and ours % min(most, 128) == 0
    if rows > ours:  # the last of them lacks less than a tile for each chunk
        chunks = -(-rows // ours)
        assert chunks * ours - rows < 128 * chunks


@each
def test_some_targets_ignored(triton):
    x, weight, targets = inputs(17, 24, 331, 384)
    targets[::2] = IGNORE
    check(x, weight, targets, 331, triton)
    assert x.grad is not None and not x.grad[::2].any()


@each
@pytest.mark.parametrize("rows", [5, 0])
def test_nothing_to_learn(rows, triton):
    x, weight, targets = inputs(rows, 24, 331, 384)
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE), 331, triton)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert loss == 0 and not dx.any() and not dweight.any()


@each
def test_huge_logits(triton):
    x, weight, targets = inputs(17, 24, 331, 384, scale=1e4)
    assert (x @ weight.t()).abs().max() > 1e4
    # The logits' own rounding, 1e4 x 6e-8 each, moves the softmax between near ties.
    check(x, weight, targets, 331, triton, tolerance=1e-2)


@each
@pytest.mark.parametrize("times", [0.0, 1 / 3, -2.0, 1e-6])
def test_incoming_gradient(times, triton):
    check(*inputs(9, 24, 331, 384), 331, triton, times=times)


@each
def test_incoming_gradient_is_not_rounded_to_bf16(triton):
    x, weight, targets = inputs(9, 24, 331, 384)
    x, weight = x.detach().bfloat16().requires_grad_(), weight.detach().bfloat16()
    loss = linear_cross_entropy(x, weight, targets, 331, triton)
    whole = torch.autograd.grad(loss, x, retain_graph=True)[0]
    third = torch.autograd.grad(loss * (1 / 3), x)[0]
    assert torch.equal(third, (whole.float() * (1 / 3)).bfloat16())


@each
def test_inputs_have_another_use(triton):
    """A tied head and a penalty on the hidden states: both gradients add to the loss's own."""
    x, weight, targets = inputs(9, 24, 331, 384)
    alone = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 331, triton), (x, weight))
    loss = (
        linear_cross_entropy(x, weight, targets, 331, triton)
        + x.square().sum()
        + weight[targets].sum()
    )
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    torch.testing.assert_close(dx, alone[0] + 2 * x)
    uses = torch.bincount(targets, minlength=384)[:, None]
    torch.testing.assert_close(dweight, alone[1] + uses)


@each
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_one_input_frozen(frozen, triton):
    x, weight, targets = inputs(9, 24, 331, 384)
    both = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 331, triton), (x, weight))
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    live, expected = (weight, both[1]) if frozen == "x" else (x, both[0])
    loss = linear_cross_entropy(x, weight, targets, 331, triton)
    saved = loss.grad_fn.saved_tensors  # ty: ignore[missing-attribute]
    assert sum(t is not None for t in saved) == 1  # no work for what is frozen
    assert torch.equal(torch.autograd.grad(loss, live)[0], expected)


@pytest.mark.parametrize(
    ("rows", "triton"), [(1, False), (1023, False), *((17, triton) for triton in BOTH[1:])]
)
def test_bf16_under_autocast(rows, triton):
    x, weight, targets = inputs(rows, 48, 331, 384)
    targets[1::5] = IGNORE
    with torch.no_grad():  # both sides begin with the inputs that autocast's products see
        x.copy_(x.bfloat16())
        weight.copy_(weight.bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16):
        check(x, weight, targets, 331, triton, tolerance=BF16)


@each
@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_bf16_hidden_states(monkeypatch, head, triton):
    """What the model hands over when its last operation ran in bf16; a bf16 head too where weights
    are cast once."""
    x, weight, targets = inputs(17, 48, 331, 384)
    x = x.detach().bfloat16().requires_grad_()
    weight = weight.detach().bfloat16().to(head).requires_grad_()
    chunks_of(monkeypatch, 2 * 384 * 16)  # the head's gradient is a sum of products
    with torch.autocast(DEVICE, torch.bfloat16, enabled=head == torch.float32):
        check(x, weight, targets, 331, triton, tolerance=BF16)


@needs_triton
@pytest.mark.parametrize(("grad_x", "grad_weight"), [(True, True), (False, True), (False, False)])
def test_operator_keeps_its_contract(grad_x, grad_weight):
    x, weight, targets = inputs(3, 8, 37, 48)
    arguments = (x.detach(), weight.detach(), targets, 37, torch.float32, grad_x, grad_weight)
    torch.library.opcheck(torch.ops.gpt2.linear_cross_entropy.default, arguments)


@pytest.mark.gpu
def test_memory_is_a_chunk_and_not_the_logits():
    torch.manual_seed(0)
    x = torch.randn(64 * 1024, 768, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(50304, 768, device="cuda") / 28).bfloat16().requires_grad_()
    targets = torch.randint(50257, (64 * 1024,), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, targets, 50257, triton=True).backward()
    # A seventh of the logits, the gradients of x (0.1 GB) and of the head in fp32 (0.15 GB), and
    # cuBLAS's workspace.
    assert torch.cuda.max_memory_allocated() - before < 1.5e9  # the logits: 6.6 GB


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_never_waits_for_the_gpu(dtype):
    x, weight, targets = inputs(300, 64, 50257, 50304)
    x = x.detach().to(dtype).requires_grad_()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            linear_cross_entropy(x, weight, targets, 50257, triton=True).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
