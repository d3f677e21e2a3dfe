"""The objectives and their gradients against plain loops in fp64, including extreme
probabilities."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import objectives as written_out
from kernels.linear_cross_entropy import IGNORE
from tasks import objectives
from tasks.objectives import first_occurrences, label_nll, nll_and_unlikelihood, rdrop, simcse

# --- labels

SHAPES = dict(B=st.integers(1, 6), K=st.integers(1, 5), seed=st.integers(0, 99))


def draws(*shape, seed=0, n=2, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator) * scale).to(dtype).requires_grad_()
        for _ in range(n)
    ]


def labelled(B, K, seed=0, dtype=torch.float32):
    """log_p whose rows add up to less than 1, labels and weights."""
    [logits], generator = (
        draws(B, K + 1, seed=seed, n=1, dtype=dtype),
        torch.Generator().manual_seed(seed),
    )
    # The last column stands for all other words.
    log_p = logits.detach().log_softmax(1)[:, :K].clone().requires_grad_()
    weights = torch.rand(B, generator=generator)
    return log_p, torch.randint(K, (B,), generator=generator), weights


def equal_to_loop(ours, plain, *leaves):
    """The sums and their gradients."""
    torch.testing.assert_close(ours.double(), plain, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(plain, leaves)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), wanted, rtol=1e-4, atol=1e-5)


@given(**SHAPES, smoothing=st.sampled_from([0.0, 0.1, 0.9]), weighted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_label_nll_equals_the_loop(B, K, seed, smoothing, weighted):
    log_p, labels, weights = labelled(B, K, seed)
    plain, exact = torch.zeros((), dtype=torch.float64), log_p.double()
    for i in range(B):
        for k in range(K):
            q = (1 - smoothing) * (k == labels[i]) + smoothing / K
            plain = plain - (float(weights[i]) if weighted else 1.0) * q * exact[i, k]
    equal_to_loop(label_nll(log_p, labels, weights if weighted else None, smoothing), plain, log_p)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_nll_is_the_cross_entropy_of_logits(smoothing):
    [logits], labels = draws(7, 4, n=1, dtype=torch.float64), torch.arange(7) % 4
    ours = label_nll(logits.log_softmax(1), labels, smoothing=smoothing)
    torch.testing.assert_close(
        ours, F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    )
    of_class = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    ours = label_nll(logits.log_softmax(1), labels, of_class[labels])
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, of_class, reduction="sum"))


def test_a_label_of_probability_0_leaves_other_rows_finite():
    log_p = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)]])
    assert label_nll(log_p, torch.tensor([0, 1])).item() == pytest.approx(math.log(2))


@given(**SHAPES, weighted=st.booleans())
@settings(max_examples=40, deadline=None)
def test_rdrop_equals_the_loop(B, K, seed, weighted):
    one, two = draws(B, K, seed=seed)
    _, _, weights = labelled(B, K, seed)
    plain = 0.0 * (one + two).double().sum()
    for i in range(B):
        p, q = one[i].double().softmax(0), two[i].double().softmax(0)
        both = sum(p[k] * (p[k] / q[k]).log() + q[k] * (q[k] / p[k]).log() for k in range(K))
        plain = plain + (weights[i].double() if weighted else 1) * both / 2
    equal_to_loop(rdrop(one, two, weights if weighted else None), plain, one, two)


@given(**SHAPES)
@settings(max_examples=40, deadline=None)
def test_rdrop_is_a_symmetric_divergence_of_distributions(B, K, seed):
    one, two = draws(B, K, seed=seed)
    value = rdrop(one, two)
    assert value >= 0 and value == rdrop(two, one)
    # Rows are renormalised.
    torch.testing.assert_close(rdrop(one + 1.7, two - 0.3), value, rtol=1e-4, atol=1e-5)
    assert rdrop(one, one).item() == 0
    assert rdrop(one, one + 1e-6 * two) >= 0  # about 1e-12


def infonce(first, second, group, temperature):
    """A loop over rows in fp64."""
    loss = 0.0 * (first + second).double().sum()
    for i in range(len(first)):
        begin = i - i % group
        others = range(begin, min(begin + group, len(first)))
        cosines = {
            j: torch.cosine_similarity(first[i].double(), second[j].double(), dim=0) for j in others
        }
        loss = (
            loss
            - cosines[i] / temperature
            + sum((c / temperature).exp() for c in cosines.values()).log()
        )
    return loss


@given(
    group=st.integers(1, 4), groups=st.integers(1, 3), C=st.integers(2, 5), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_simcse_equals_the_loop(group, groups, C, seed):
    one, two = draws(group * groups, C, seed=seed)
    equal_to_loop(simcse(one, two, group, 0.5), infonce(one, two, group, 0.5), one, two)


def test_simcse_with_fewer_rows_than_a_group():
    one, two = draws(3, 4)
    torch.testing.assert_close(simcse(one, two, 8, 0.1), simcse(one, two, 3, 0.1))
    equal_to_loop(simcse(one, two, 8, 0.1), infonce(one, two, 8, 0.1), one, two)
    assert simcse(one[:1], two[:1], 8, 0.1).item() == 0  # no negatives
    assert simcse(one[:0], two[:0], 8, 0.1).item() == 0
    for rows, group in ((3, 2), (9, 8)):
        one, two = draws(rows, 4)
        with pytest.raises(ValueError, match=f"{rows} rows cannot be split into groups of {group}"):
            simcse(one, two, group, 0.1)


def test_simcse_groups_are_independent():
    one, two = draws(8, 5)
    parts = [simcse(one[s], two[s], 4, 0.1) for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(simcse(one, two, 4, 0.1), torch.stack(parts).sum())
    assert not torch.allclose(simcse(one, two, 8, 0.1), torch.stack(parts).sum())
    with torch.no_grad():
        two[4:] = 9.0
    torch.testing.assert_close(simcse(one[:4], two[:4], 4, 0.1), parts[0])


def test_simcse_does_not_depend_on_order_or_vector_length():
    one, two = draws(8, 5)
    order = torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])  # within groups of four
    value = simcse(one, two, 4, 0.1)
    torch.testing.assert_close(simcse(one[order], two[order], 4, 0.1), value)
    torch.testing.assert_close(simcse(3 * one, 0.2 * two, 4, 0.1), value)
    across = torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    assert not torch.allclose(simcse(one[across], two[across], 4, 0.1), value)


def test_gradients_of_label_objectives_in_fp64():
    log_p, labels, weights = labelled(5, 3, dtype=torch.float64)
    one, two = draws(6, 3, dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda x: label_nll(x, labels, weights, 0.1), log_p)
    assert check(lambda x, y: rdrop(x, y, torch.arange(6.0)), (one, two))
    assert check(lambda x, y: simcse(x, y, 3, 0.3), (one, two))
    assert {
        x.dtype for x in (label_nll(log_p, labels), rdrop(one, two), simcse(one, two, 3, 1.0))
    } == {torch.float64}


def test_label_objectives_are_computed_in_fp32():
    one, two = draws(8, 16, dtype=torch.bfloat16)
    labels = torch.arange(8)
    wide = one.detach().float(), two.detach().float()
    expected = label_nll(wide[0], labels, smoothing=0.1), rdrop(*wide), simcse(*wide, 4, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        ours = label_nll(one, labels, smoothing=0.1), rdrop(one, two), simcse(one, two, 4, 0.05)
    assert all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


# --- tokens


def loop(logits, idx, targets, earlier=None):
    """Both sums in fp64 by definition. 1 - p is the total probability of all other tokens."""
    log_p = logits.double().log_softmax(-1)
    nll = unlikelihood = torch.zeros((), dtype=torch.float64)
    for b, t in (targets != IGNORE).nonzero().tolist():
        target = int(targets[b, t])
        nll = nll - log_p[b, t, target]
        read = {int(idx[b, s]) for s in range(t + 1) if earlier is None or earlier[b, s]}
        for candidate in read - {target}:
            others = torch.cat((log_p[b, t, :candidate], log_p[b, t, candidate + 1 :]))
            unlikelihood = unlikelihood - others.logsumexp(0)
    return nll, unlikelihood


def inputs(B=2, T=7, V=9, scale=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, V, generator=generator) * scale).to(dtype).requires_grad_()
    idx, targets = torch.randint(V, (2, B, T), generator=generator)
    return logits, idx, targets


def gradients(sums, logits):
    """The gradients of each sum by itself. Zero if it does not depend on the logits."""
    found = [
        torch.autograd.grad(s, logits, retain_graph=True)[0] if s.requires_grad else None
        for s in sums
    ]
    return [torch.zeros_like(logits) if g is None else g for g in found]


def check(logits, idx, targets, earlier=None, rtol=1e-5, atol=1e-6):
    ours, plain = (
        nll_and_unlikelihood(logits, idx, targets, earlier),
        loop(logits, idx, targets, earlier),
    )
    torch.testing.assert_close([s.double() for s in ours], list(plain), rtol=rtol, atol=atol)
    torch.testing.assert_close(
        gradients(ours, logits), gradients(plain, logits), rtol=rtol, atol=atol
    )


@given(
    *(st.integers(1, n) for n in (3, 6, 5)),
    st.sampled_from([0.1, 3.0, 12.0]),
    st.integers(0, 99),
    st.floats(0, 0.9),
)
@settings(max_examples=60, deadline=None)
def test_unlikelihood_matches_a_loop(B, T, V, scale, seed, without):
    logits, idx, targets = inputs(B, T, V + 1, scale, seed)
    draw = torch.rand(2, B, T, generator=torch.Generator().manual_seed(seed))
    targets[draw[0] < without] = IGNORE
    check(logits, idx, targets, earlier=draw[1] >= without)
    check(logits, idx, targets)


def test_unlikelihood_by_hand():
    """One position has read the tokens 0, 1 and 0, and its target is 1. The only candidate is 0,
    once."""
    p = torch.tensor([0.5, 0.3, 0.2])
    logits = p.log().expand(1, 3, 3).clone().requires_grad_()
    idx, targets = torch.tensor([[0, 1, 0]]), torch.tensor([[IGNORE, IGNORE, 1]])
    nll, unlikelihood = nll_and_unlikelihood(logits, idx, targets)
    assert nll.item() == pytest.approx(-math.log(0.3)) and unlikelihood.item() == pytest.approx(
        -math.log(0.5)
    )
    # The odds of 0 are 1: its logit gets 1 - p, and the others lose p.
    torch.testing.assert_close(
        gradients([unlikelihood], logits)[0][0, 2], torch.tensor([0.5, -0.3, -0.2])
    )


def test_unlikelihood_gradients_in_fp64():
    logits, idx, targets = inputs(scale=2.0, dtype=torch.float64)
    targets[0, :3] = IGNORE
    assert torch.autograd.gradcheck(lambda z: nll_and_unlikelihood(z, idx, targets), logits)
    nll, unlikelihood = nll_and_unlikelihood(logits, idx, targets)
    mixed = torch.autograd.grad(3.0 * nll - 0.5 * unlikelihood, logits)
    apart = gradients(loop(logits, idx, targets), logits)
    torch.testing.assert_close(mixed[0], 3.0 * apart[0] - 0.5 * apart[1])


@pytest.mark.parametrize("form", [written_out.with_mask, written_out.with_loop])
def test_unlikelihood_matches_the_published_form(form):
    logits, idx, targets = inputs(3, 20, 31, scale=2.0)
    targets[1, 4:9] = IGNORE
    ours, theirs = nll_and_unlikelihood(logits, idx, targets), form(logits, idx, targets)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        gradients(ours, logits), gradients(theirs, logits), rtol=1e-4, atol=1e-6
    )


def test_unlikelihood_is_exact_for_p_close_to_1():
    """The published clamp at 1e-5 has no gradient here: 1 - p goes down to 1e-26, in fp32."""
    logits, idx, targets = inputs(2, 6, 11, dtype=torch.float32)
    sure = torch.linspace(5, 60, 12).view(2, 6, 1)
    with torch.no_grad():
        logits.scatter_add_(2, idx[..., None], sure)
    check(logits, idx, targets)
    # The certain token is the target. The remaining gradient is as small as 1 - p, and it is not
    # rounded away.
    p = logits.detach().double().softmax(-1).scatter_(2, idx[..., None], 0)
    expected = p.scatter(2, idx[..., None], -p.sum(-1, keepdim=True))
    ours = gradients(nll_and_unlikelihood(logits, idx, idx), logits)[0]
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unlikelihood_is_finite_for_finite_logits(dtype):
    logits, idx, targets = inputs(
        2, 6, 11, scale=1e4 if dtype != torch.float16 else 1e3, dtype=dtype
    )
    sums = nll_and_unlikelihood(logits, idx, targets)
    assert all(torch.isfinite(s) and s.dtype == torch.float32 for s in sums)
    # Only one token per position can be certain.
    assert sums[1] <= -math.log(objectives.MIN_REST) * idx.numel() * 1.001
    for gradient in gradients([s * 2.0**14 for s in sums], logits):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_bf16_logits_are_summed_in_fp32():
    logits, idx, targets = inputs(4, 16, 50, scale=3.0, dtype=torch.bfloat16)
    same = logits.detach().float().requires_grad_()
    ours, wide = (
        nll_and_unlikelihood(logits, idx, targets),
        nll_and_unlikelihood(same, idx, targets),
    )
    torch.testing.assert_close(ours, wide, rtol=0, atol=0)
    for narrow, exact in zip(gradients(ours, logits), gradients(wide, same)):
        assert torch.equal(narrow, exact.bfloat16())


def test_unlikelihood_without_targets_or_candidates():
    logits, idx, targets = inputs(B=3, T=1)
    targets[0] = idx[0]  # the only token read is the target, so there is no candidate
    check(logits, idx, targets)
    ours = nll_and_unlikelihood(logits, idx, torch.full_like(targets, IGNORE))
    assert [s.item() for s in ours] == [0, 0]
    assert all(not gradient.any() for gradient in gradients(ours, logits))
    assert (
        nll_and_unlikelihood(logits, idx, targets, torch.zeros_like(idx, dtype=torch.bool))[
            1
        ].item()
        == 0
    )


def test_unlikelihood_adds_up_over_rows_and_chunks(monkeypatch):
    logits, idx, targets = inputs(3, 8, 21, scale=2.0)
    whole = nll_and_unlikelihood(logits, idx, targets)
    dz = gradients(whole, logits)
    alone = [
        nll_and_unlikelihood(*(x[b : b + 1] for x in (logits, idx, targets))) for b in range(3)
    ]
    torch.testing.assert_close(list(whole), [torch.stack(s).sum() for s in zip(*alone)])
    # five positions per chunk, across the ends of rows
    monkeypatch.setattr(objectives, "PIECE_BYTES", 4 * 21 * 5)
    pieces = nll_and_unlikelihood(logits, idx, targets)
    torch.testing.assert_close(pieces, whole)
    assert all(torch.equal(a, b) for a, b in zip(gradients(pieces, logits), dz))


def test_prompt_tokens_are_candidates_and_padding_is_not():
    logits, idx, targets = inputs(1, 5, 9)
    pad = 3
    wide = torch.cat((torch.randn(1, pad, 9), logits.detach()), 1).requires_grad_()
    # The padding token also occurs in the text.
    padded = torch.cat((idx.new_full((1, pad), int(idx[0, 1])), idx), 1)
    wanted = torch.cat((targets.new_full((1, pad), IGNORE), targets), 1)
    earlier = torch.arange(pad + 5)[None] >= pad
    torch.testing.assert_close(
        nll_and_unlikelihood(wide, padded, wanted, earlier),
        nll_and_unlikelihood(logits, idx, targets),
    )
    prompt = torch.tensor([[4, 5, 6, 7, 8]]), torch.tensor([[IGNORE, IGNORE, IGNORE, IGNORE, 0]])
    expected = -torch.log1p(-logits.detach()[0, -1].softmax(0)[4:]).sum()
    torch.testing.assert_close(nll_and_unlikelihood(logits, *prompt)[1], expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
@settings(deadline=None)
def test_first_occurrences(tokens):
    expected = [token not in tokens[:t] for t, token in enumerate(tokens)]
    assert first_occurrences(torch.tensor([tokens]))[0].tolist() == expected


def test_a_padded_vocabulary_of_gpt2():
    """The logits are a view that leaves out padding columns, as from the model. Nothing else of
    that size is kept for backward."""
    torch.manual_seed(0)
    wide = torch.randn(2, 12, 50304, requires_grad=True)
    idx, targets = torch.randint(50257, (2, 2, 12))
    with torch.no_grad():
        wide.scatter_add_(2, idx[..., None], torch.full((2, 12, 1), 12.0))
    logits = wide[..., :50257]
    ours = nll_and_unlikelihood(logits, idx, targets)
    saved = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in ours[0].grad_fn.saved_tensors  # ty: ignore[missing-attribute]
    }
    assert saved.pop(wide.untyped_storage().data_ptr())  # the logits themselves
    assert sum(saved.values()) < 10_000
    plain = loop(logits, idx, targets)
    torch.testing.assert_close([s.double() for s in ours], list(plain), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(ours, wide), gradients(plain, wide), rtol=1e-4, atol=1e-7)


def test_unlikelihood_compiles_without_a_break():
    logits, idx, targets = inputs()
    compiled = torch.compile(nll_and_unlikelihood, fullgraph=True, backend="aot_eager")(
        logits, idx, targets
    )
    eager = nll_and_unlikelihood(logits, idx, targets)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, logits), gradients(eager, logits))


def test_the_benchmark_runs(monkeypatch, tmp_path, capsys):
    words = "--preset micro --vocab 300 --seq-len 16 --batch 2 --repetitions 1 --device cpu --out"
    monkeypatch.setattr(sys, "argv", ["objectives", *words.split(), str(tmp_path)])
    written_out.main()
    [row] = json.loads((tmp_path / "objectives-cpu.json").read_text())["cases"]
    assert {name: len(seconds) for name, seconds in row["seconds"].items()} == dict.fromkeys(
        row["seconds"], 1
    )
    assert (tmp_path / "objectives-cpu.md").read_text().strip() in capsys.readouterr().out
