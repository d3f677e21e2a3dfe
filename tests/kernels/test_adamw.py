"""AdamW and the gradients' norm, all tensors in one launch, against torch.optim and
torch.nn.utils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from config import GPTConfig
from kernels.adamw import Table, adamw, adamw_reference, global_norm
from model import GPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
BETAS, EPS = (0.9, 0.95), 1e-8
HALF_ULP = 2.0**-24  # of fp32: what one rounding moves a value by, as a share of it

# One element; less than a block; blocks of both kernels and a rest; several blocks; nothing at all.
SHAPES = [(1,), (1023,), (8193,), (768, 50), (0,)]
DECAYS, SCALES = [0.0, 0.0, 0.3, 0.1, 0.1], [1.0, 0.5, 1.0, 0.25, 1.0]


def on_device(value: float | bool) -> Tensor:
    return torch.tensor(value, device=DEVICE)


YES, NO, ONE = on_device(True), on_device(False), on_device(1.0)


def values(shapes: Sequence[tuple[int, ...]], seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(DEVICE) for shape in shapes]


def make_table(params: Sequence[Tensor], copies: bool = True) -> Table:
    n = len(params)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.zeros((), device=DEVICE) for _ in params]
    lr_scales, decays = (SCALES * n)[:n], (DECAYS * n)[:n]
    return Table(
        params,
        *moments,
        steps,
        [p.bfloat16() if copies else None for p in params],
        lr_scales,
        decays,
    )


def torch_adamw(params: Sequence[Tensor], **options: bool) -> torch.optim.AdamW:
    groups = [
        {"params": [p], "weight_decay": decay, "lr_scale": scale}
        for p, decay, scale in zip(params, DECAYS, SCALES)
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, **options)


def torch_step(
    optimizer: torch.optim.AdamW, grads: Sequence[Tensor | None], lr: float, factor: float
) -> None:
    for group, grad in zip(optimizer.param_groups, grads):
        (p,) = group["params"]
        group["lr"] = lr * group["lr_scale"]
        p.grad = None if grad is None else grad.to(p.dtype) * factor
    optimizer.step()


def table_of(optimizer: torch.optim.AdamW) -> Table:
    """A table over the state that the optimizer has now."""
    groups = optimizer.param_groups
    params = [group["params"][0] for group in groups]
    state = [[optimizer.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq", "step")]
    decays, scales = (
        [group["weight_decay"] for group in groups],
        [group["lr_scale"] for group in groups],
    )
    return Table(params, *state, [None] * len(params), scales, decays)


def everything(table: Table) -> list[Tensor]:
    copies = [copy for copy in table.copies if copy is not None]
    return [*table.params, *table.exp_avgs, *table.exp_avg_sqs, *table.steps, *copies]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
        for x, y in pairs
    )


# --- the update


@pytest.mark.parametrize("update, dtypes", [(adamw_reference, [FP32]), (adamw, [FP32, BF16])])
def test_agrees_with_torch_in_float64(update: Callable[..., None], dtypes: list[torch.dtype]):
    """Five steps: the rate and the clip factor change, and every tensor's gradient is missing once,
    at its own step."""
    table = make_table(values(SHAPES, 0))
    exact = [p.double() for p in table.params]
    reference = torch_adamw(exact, foreach=False)
    for step in range(5):
        lr, factor = 1e-2 / (1 + step), (1.0, 0.25, 2.0**-10, 0.7, 1.0)[step]
        drawn = enumerate(values(SHAPES, 1 + step, 10.0 ** (step % 3)))
        grads = [None if i == step else g.to(dtypes[i % len(dtypes)]) for i, g in drawn]
        update(table, grads, on_device(lr), on_device(factor), YES, BETAS, EPS)
        torch_step(reference, grads, lr, factor)
    for i, p in enumerate(exact):
        state = reference.state[p]
        assert table.steps[i].item() == state["step"].item() == 4
        # Each step rounds a moment three times; a parameter twice, and its change, at most a few
        # lr, ten times.
        for ours, theirs in (
            (table.exp_avgs, state["exp_avg"]),
            (table.exp_avg_sqs, state["exp_avg_sq"]),
        ):
            largest = theirs.abs().amax() if theirs.numel() else 0
            assert bool(((ours[i] - theirs).abs() <= 5 * 3 * HALF_ULP * largest).all())
        assert bool(((table.params[i] - p).abs() <= 5 * HALF_ULP * (2 * p.abs() + 10 * 3e-2)).all())
        copy = table.copies[i]
        assert copy is not None and same_bits([copy], [table.params[i].bfloat16()])


@pytest.mark.parametrize("update", [adamw, adamw_reference])
def test_nothing_changes_where_it_is_not_ok(update):
    table = make_table(values(SHAPES, 0))
    update(table, values(SHAPES, 1), on_device(1e-2), ONE, YES, BETAS, EPS)
    before = [t.clone() for t in everything(table)]
    grads = values(SHAPES, 2)
    grads[1][5], grads[3][7, 7] = torch.inf, torch.nan
    update(table, grads, on_device(1e-2), on_device(torch.nan), NO, BETAS, EPS)
    assert same_bits(everything(table), before)
    update(table, values(SHAPES, 1), on_device(1e-2), ONE, YES, BETAS, EPS)
    assert not any(torch.equal(a, b) for a, b in zip(everything(table), before) if a.numel())


def test_a_tensor_without_a_gradient_stays_as_it_is():
    table = make_table(values(SHAPES, 0))
    before = [t.clone() for t in everything(table)]
    adamw(table, [None] * len(SHAPES), on_device(1e-2), ONE, YES, BETAS, EPS)
    assert same_bits(everything(table), before)
    adamw(table, [None, *values(SHAPES, 1)[1:]], on_device(1e-2), ONE, YES, BETAS, EPS)
    moved = [not torch.equal(a, b) for a, b in zip(everything(table), before)]
    changes = [False, True, True, True, False]  # the last has no elements, but counts its steps
    assert moved == changes * 3 + [False, True, True, True, True] + changes


def test_tensors_without_elements_alone():
    table = make_table([torch.empty(0, device=DEVICE)])
    adamw(table, [torch.empty(0, device=DEVICE)], on_device(1e-2), ONE, YES, BETAS, EPS)
    assert table.steps[0] == 1  # as torch counts


def test_the_state_is_torch_s():
    """torch's fused AdamW for two steps, this one for two from its state, torch's again from what
    that left."""
    fused = torch_adamw(values(SHAPES, 0), fused=True)
    mixed = torch_adamw(values(SHAPES, 0), fused=True)
    for step in range(6):
        lr, grads = 1e-2 / (1 + step), values(SHAPES, 1 + step)
        torch_step(fused, grads, lr, 0.5)
        if step in (2, 3):
            adamw(table_of(mixed), grads, on_device(lr), on_device(0.5), YES, BETAS, EPS)
        else:
            torch_step(mixed, grads, lr, 0.5)
        if step == 3:  # through a checkpoint, which holds what torch's own would
            saved, params = mixed.state_dict(), [group["params"][0] for group in mixed.param_groups]
            mixed = torch_adamw([p.clone() for p in params], fused=True)
            mixed.load_state_dict(saved)
    for ours, theirs in zip(mixed.param_groups, fused.param_groups):
        p, q = ours["params"][0], theirs["params"][0]
        # as above, on either side
        torch.testing.assert_close(p, q, rtol=12 * HALF_ULP, atol=60 * HALF_ULP * 3e-2)
        assert mixed.state[p].keys() == fused.state[q].keys()
        assert mixed.state[p]["step"] == fused.state[q]["step"] == 6


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.999)])
def test_other_betas(betas):
    """(1 - 0.999) in fp32 would be off by 2e-5, and so would the first steps' size."""
    ours, theirs = make_table(values([(33,)], 0)), make_table(values([(33,)], 0))
    for seed in range(2):
        grads = values([(33,)], seed)
        adamw(ours, grads, on_device(1.0), ONE, YES, betas, EPS)
        adamw_reference(theirs, grads, on_device(1.0), ONE, YES, betas, EPS)
    torch.testing.assert_close(ours.params, theirs.params, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.exp_avg_sqs, theirs.exp_avg_sqs, rtol=1e-6, atol=0.0)


def test_elements_are_paired_whatever_the_strides():
    (wide,), (grad,) = values([(30, 70)], 0), values([(30, 70)], 1)
    straight, turned = make_table([wide.clone()]), make_table([wide.t().contiguous().t()])
    # torch.stack leaves gaps
    for g in (grad, grad.t().contiguous().t(), torch.stack([grad, grad], 2)[..., 0]):
        adamw(straight, [g], on_device(1e-2), ONE, YES, BETAS, EPS)
        adamw(turned, [g], on_device(1e-2), ONE, YES, BETAS, EPS)
    adamw_reference(
        table := make_table([wide.clone()]), [grad], on_device(1e-2), ONE, YES, BETAS, EPS
    )
    for _ in range(2):
        adamw_reference(table, [grad], on_device(1e-2), ONE, YES, BETAS, EPS)
    assert turned.params[0].stride() == (1, 30)
    torch.testing.assert_close(straight.params[0], table.params[0])
    assert all(torch.equal(a, b) for a, b in zip(everything(straight), everything(turned)))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_that_begin_anywhere(dtype):
    """DDP's gradients are views of buckets: a block that begins at an odd element is not read 16
    bytes at once."""
    table, views = make_table(values([(5000,)] * 2, 0)), make_table(values([(5000,)] * 2, 0))
    grads = [g.to(dtype) for g in values([(5000,)] * 2, 1)]
    bucket = torch.cat([grads[0][:1], *grads])
    adamw(table, grads, on_device(1e-2), ONE, YES, BETAS, EPS)
    adamw(views, bucket[1:].split(5000), on_device(1e-2), ONE, YES, BETAS, EPS)
    assert same_bits(everything(table), everything(views))
    norm, exact = global_norm(bucket[1:].split(5000)), torch.cat(grads).double().norm()
    assert torch.equal(norm, global_norm(grads)) and (norm - exact).abs() <= 1e-6 * exact


def test_copies_are_rounded_as_torch_rounds():
    bits = torch.tensor(
        [
            0x3F808000,
            0x3F818000,
            0x3F808001,
            0x3F807FFF,
            0x7F7FFFFF,
            0x00008001,
            0x007FFFFF,
            0x7FFFFFFF,
        ]
    )
    # ties, near ties, the largest, the smallest, a NaN
    special = bits.int().view(torch.float32).to(DEVICE)
    table = make_table([torch.cat([special, -special])])
    adamw(table, [torch.zeros(16, device=DEVICE)], on_device(0.0), ONE, YES, BETAS, EPS)
    copy, expected = table.copies[0], table.params[0].bfloat16()
    assert copy is not None and expected.isinf().sum() == 2 and expected.isnan().sum() == 2
    assert torch.equal(copy.isnan(), expected.isnan())
    assert torch.equal(
        copy[~copy.isnan()].view(torch.int16), expected[~expected.isnan()].view(torch.int16)
    )


def test_repeats_bit_for_bit():
    tables = [make_table(values(SHAPES[:3], 0)) for _ in range(2)]
    for table in tables:
        adamw(table, values(SHAPES[:3], 1), on_device(1e-2), on_device(0.3), YES, BETAS, EPS)
    assert same_bits(everything(tables[0]), everything(tables[1]))


def test_a_graph_from_before_the_step_is_stale():
    """As after torch's own step: what a graph has saved was changed underneath it."""
    table = make_table([torch.randn(5, device=DEVICE).requires_grad_()], copies=False)
    p = table.params[0]
    loss = (p * p).sum()
    (grad,) = torch.autograd.grad(loss, p, retain_graph=True)
    adamw(table, [grad], on_device(1e-2), ONE, YES, BETAS, EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_is_refused():
    p = torch.zeros(4, 6, device=DEVICE)

    def table(**changed: Any) -> Table:
        lists: dict[str, Any] = {
            "params": [p],
            "exp_avgs": [p.clone()],
            "exp_avg_sqs": [p.clone()],
            "copies": [None],
        }
        lists |= {
            "steps": [torch.zeros((), device=DEVICE)],
            "lr_scales": [1.0],
            "weight_decays": [0.0],
        }
        return Table(**lists | changed)

    wrong = [
        torch.zeros(6, 4),
        torch.zeros(6, 4).t(),
        torch.zeros(4, 6).half(),
        torch.zeros(4, 6, device="meta"),
    ]
    wrong = [t if t.is_meta else t.to(DEVICE) for t in wrong]
    for name in ("exp_avgs", "exp_avg_sqs", "copies", "steps"):
        for tensor in wrong:
            with pytest.raises(ValueError, match=r"differ|it must be"):
                table(**{name: [tensor]})
    with pytest.raises(ValueError, match="not dense"):
        table(params=[torch.zeros(4, 12, device=DEVICE)[:, ::2]])
    with pytest.raises(ValueError, match="one entry per parameter"):
        table(copies=[])
    for grad in (wrong[0], wrong[2], wrong[3]):
        with pytest.raises(ValueError, match=r"differ|it must be"):
            adamw(table(), [grad], ONE, ONE, YES, BETAS, EPS)
    moved = table()
    p.data = p.clone()
    with pytest.raises(ValueError, match="has moved"):
        adamw(moved, [moved.exp_avgs[0]], ONE, ONE, YES, BETAS, EPS)
    with pytest.raises(ValueError, match="all must be"):
        global_norm([wrong[2]])


# --- the norm


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norm_agrees_with_torch(dtype):
    tensors = [t.to(dtype) for t in values(SHAPES, 3)]
    exact = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    # Squares of bf16 are exact in fp32; then sums of a block's 8192 terms, halved thirteen times.
    assert (global_norm(tensors) - exact).abs() <= 15 * HALF_ULP * exact
    assert torch.equal(global_norm(tensors), global_norm(tensors))


def test_norm_of_mixed_types_and_strides():
    a, b, c = values([(30, 70), (64, 65), (9,)], 3)
    # turned, gaps, gaps, bf16, thrice the same
    tensors = [a.t(), b[:, 1:], b[::2, 5], c.bfloat16(), c.expand(3, 9)]
    exact = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    assert (global_norm(tensors) - exact).abs() <= 15 * HALF_ULP * exact


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, under the interpreter
@pytest.mark.parametrize("value", [1e18, 3e19, torch.inf, torch.nan])
def test_norm_of_what_is_huge_or_not_finite(value):
    (tensor,) = values([(3000,)], 3)
    tensor[1500] = value
    torch.testing.assert_close(
        global_norm([tensor]), torch.nn.utils.get_total_norm([tensor]), equal_nan=True
    )


def test_norm_of_nothing():
    assert global_norm([]) == 0 == global_norm([torch.empty(0, device=DEVICE)])


# --- GPT-2's own tensors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gpt2_without_a_wait_for_the_gpu(dtype):
    """The shapes of GPT-2 124M; gradients in new places every step, one step skipped, no
    synchronisation."""
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(GPTConfig()).parameters()]
    torch.manual_seed(0)
    params = [torch.randn(shape, device="cuda") * 0.02 for shape in shapes]
    theirs = [p.clone() for p in params]
    table = make_table(params)
    groups = [
        {"params": [p], "weight_decay": d, "lr_scale": s}
        for p, d, s in zip(theirs, table.weight_decays, table.lr_scales)
    ]
    fused = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
    held = []
    for step in range(4):
        lr, ok = 1e-3 / (1 + step), step != 2
        grads = [torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes]
        lr_there, clip, ok_there = on_device(lr), on_device(1.0), on_device(ok)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = global_norm(grads)
            factor = (clip / norm).clamp(max=1.0)
            adamw(table, grads, lr_there, factor, ok_there, BETAS, EPS)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        exact = torch.nn.utils.get_total_norm([g.float() for g in grads])
        torch.testing.assert_close(norm, exact, rtol=1e-5, atol=0.0)
        if ok:
            torch_step(fused, grads, lr, factor.item())
        held.append(grads.pop())  # so that the allocator cannot give every gradient its old place
    for p, q, copy, count in zip(params, theirs, table.copies, table.steps):
        # As in the CPU tests: three steps of roundings, of the parameter and of its change, on
        # either side.
        torch.testing.assert_close(p, q, rtol=12 * HALF_ULP, atol=60 * HALF_ULP * 3e-3)
        assert copy is not None and torch.equal(copy, p.bfloat16()) and count == 3
