"""Training objectives: of labels, their likelihood, R-Drop and SimCSE; of tokens, unlikelihood
beside the likelihood.

All are sums over rows or positions, in fp32 whatever the model's precision: the loop divides by the
global count.

The likelihood and the unlikelihood of a position come from the same softmax, and so do their
gradients: one pass over the logits forwards and one backwards serve both. What the unlikelihood
adds is a gather of T probabilities a position where the softmax has V. The trade-off: the logits
lie in memory whole, which the chunked head avoids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy import IGNORE

PIECE_BYTES = 16 << 20  # of logits in fp32 that a CPU works on at once: they stay in the caches
GPU_PIECE_BYTES = 1 << 30
# of the probability that a position leaves for all but its likeliest token: what -log of it may
# reach
LEAST = 1e-30

# --- labels


def label_nll(
    log_p: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Sum over rows i of w_i x the cross-entropy -sum_k q_ik log_p_ik, with q = (1 - smoothing)
    one-hot + smoothing / K.

    log_p (B, K) of any dtype; labels (B,) int64; weights (B,), None for ones. log_p is taken as it
    is: of a language head's probabilities of the labels' words, under the whole vocabulary, the
    rows add up to less than 1. Returns an fp32 scalar (fp64 for fp64 log_p).
    """
    log_p = _wide(log_p)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * log_p.mean(1)
    return _weighted_sum(nll, weights)


def rdrop(log_p1: Tensor, log_p2: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over rows i of w_i x (KL(p1_i || p2_i) + KL(p2_i || p1_i)) / 2, of two passes of the rows
    (Liang et al. 2021).

    log_p1, log_p2 (B, K) of any dtype, finite; each row is renormalised first. weights (B,), None
    for ones. Returns an fp32 scalar (fp64 for fp64 inputs), never below 0.

    The paper's objective is the sum of both passes' nll + alpha x this. Half of it is what a task
    trains on: the nll averaged over both passes + alpha / 2 x this. So the loss stays what it is
    without R-Drop where the passes agree.
    """
    log_p1, log_p2 = _wide(log_p1).log_softmax(1), _wide(log_p2).log_softmax(1)
    # Both divergences at once: the factors of each product have the same sign, so no rounding makes
    # a sum negative.
    both = ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(1)
    return _weighted_sum(both / 2, weights)


def simcse(first: Tensor, second: Tensor, group: int, temperature: float) -> Tensor:
    """Sum over rows of -log of the share of the row's own second pass among those of its group (Gao
    et al. 2021): InfoNCE, the softmax of the cosine similarities / temperature.

    first, second (B, C) of any dtype: two passes of the same rows, in groups of `group` consecutive
    rows. B is a multiple of `group`, or less than it: one shorter group. Anything else is a
    ValueError, for then a row's negatives would depend on how the batch was cut. Returns an fp32
    scalar (fp64 for fp64 inputs).
    """
    B = len(first)
    size = min(group, B) or group  # no rows: no group
    if B % size:
        raise ValueError(f"{B} rows are no whole number of groups of {group}")
    # Over a temperature of 0.05, cosines in bf16 would be off by hundredths.
    with torch.autocast(first.device.type, enabled=False):
        first, second = (
            F.normalize(_wide(x), dim=1).unflatten(0, (B // size, size)) for x in (first, second)
        )
        # (groups, rows, their second passes)
        log_p = (first @ second.mT / temperature).log_softmax(2)
    return -log_p.diagonal(dim1=1, dim2=2).sum()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (values * weights.to(values.dtype)).sum()


# --- tokens


def nll_and_unlikelihood(
    logits: Tensor, idx: Tensor, targets: Tensor, earlier: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums over positions of -log p(target), and of -log(1 - p(c)) over the position's negative
    candidates c.

    logits (B, T, V) of any dtype; idx (B, T) int64, the tokens read; targets (B, T) int64, -100
    where a position has none and takes part in neither sum. The candidates at position t are the
    different tokens among idx[:, : t + 1], a prompt's among them, but for the target; `earlier` (B,
    T) bool is False where a token is not one to avoid (padding on the left). Returns two fp32
    scalars (fp64 for fp64 logits).

    Both sums and their gradients stay finite and, to rounding, exact where p(c) comes near 1: the
    probability of all other tokens is then added up by itself and not taken from 1. -log(1 - p) is
    at most 69, where fp32 ends.
    """
    return _NllAndUnlikelihood.apply(logits, idx, targets, first_occurrences(idx, earlier))


def first_occurrences(idx: Tensor, counts: Tensor | None = None) -> Tensor:
    """Where a token (of those that count) stands for the first time in its row: idx (B, T), counts
    and result bool."""
    counts = torch.ones_like(idx, dtype=torch.bool) if counts is None else counts
    same = idx[:, :, None] == idx[:, None, :]  # (B, T, T)
    return counts & ~(same & counts[:, None, :]).tril(-1).any(2)


class _NllAndUnlikelihood(torch.autograd.Function):
    """With p the softmax of a position, q_c = 1 - p_c and the odds r_c = p_c / q_c, the gradients
    by logit z_j are

    nll            p_j - [j is the target]
    unlikelihood   [j is a candidate] r_j - p_j R,  R the sum of r_c over the candidates

    so p times one factor a position, and a few entries more. Only the likeliest token, `top`, can
    have p > 1/2. Its q is `rest` / (1 + rest), where rest adds up exp(z_j - z_top) of the others;
    its own entry is computed apart, where in the sums above nearly equal numbers would be
    subtracted.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, idx: Tensor, targets: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, dtype = logits.flatten(0, 1), torch.promote_types(logits.dtype, torch.float32)
        nll, unlikelihood = rows.new_zeros(2, dtype=dtype).unbind()
        tops, rests = (
            rows.new_empty(len(rows), 1, dtype=torch.int64),
            rows.new_empty(len(rows), 1, dtype=dtype),
        )
        for piece in _pieces(rows):
            z = rows[piece].to(dtype)
            highest, top = z.max(1, keepdim=True)
            rest = (z - highest).exp_().scatter_(1, top, 0).sum(1, keepdim=True).clamp_(min=LEAST)
            log_z = highest + rest.log1p()
            target, column, candidate = _candidates(piece, idx, targets, first)
            nll = nll + ((log_z - z.gather(1, target.clamp(min=0))) * (target != IGNORE)).sum()
            is_top = column == top
            p = (z.gather(1, column) - log_z).exp_()
            loss = torch.where(is_top, rest.log1p() - rest.log(), -torch.log1p(-p))  # (n, T)
            unlikelihood = unlikelihood + (loss * candidate).sum()
            tops[piece], rests[piece] = top, rest
        ctx.save_for_backward(logits, idx, targets, first, tops, rests)
        return nll, unlikelihood

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_nll: Tensor, grad_unlikelihood: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, idx, targets, first, tops, rests = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows, gradients = logits.flatten(0, 1), gradient.flatten(0, 1)
        for piece in _pieces(rows):
            z, top, rest = rows[piece].to(rests.dtype), tops[piece], rests[piece]
            target, column, candidate = _candidates(piece, idx, targets, first)
            live, is_top = grad_nll * (target != IGNORE), column == top
            z_top = z.gather(1, top)
            p = (z.gather(1, column) - z_top).exp_() / (1 + rest)
            odds = (p / (1 - p)).masked_fill_(is_top | ~candidate, 0)
            # Of one number a position, (n, 1): R without the likeliest token, whether that is a
            # candidate, and R.
            lower = odds.sum(1, keepdim=True)
            top_counts = (is_top & candidate).any(1, keepdim=True)
            odds_sum = lower + top_counts / rest
            at_top = live * torch.where(top == target, -rest, 1) + grad_unlikelihood * (
                top_counts.to(p) - lower
            )
            dz = (z - z_top).exp_().mul_((live - grad_unlikelihood * odds_sum) / (1 + rest))
            dz.scatter_add_(1, column, grad_unlikelihood * odds).scatter_add_(
                1, target.clamp(min=0), -live
            )
            gradients[piece] = dz.scatter_(1, top, at_top / (1 + rest))
        return gradient, None, None, None


def _pieces(rows: Tensor) -> list[slice]:
    """Slices of rows (N, V) whose work fits into the caches of a CPU, or into a little of a GPU's
    memory."""
    size = max(
        1, (PIECE_BYTES if rows.device.type == "cpu" else GPU_PIECE_BYTES) // (4 * rows.shape[1])
    )
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def _candidates(
    piece: slice, idx: Tensor, targets: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a slice of the B x T positions: targets (n, 1), tokens of their rows (n, T), which are
    candidates (n, T)."""
    T = idx.shape[1]
    position = torch.arange(piece.start, piece.stop, device=idx.device)
    row, t = position // T, (position % T)[:, None]
    target, column = targets.flatten()[piece, None], idx[row]
    read = torch.arange(T, device=idx.device) <= t
    return target, column, first[row] & read & (column != target) & (target != IGNORE)
