"""Training objectives. For labels: likelihood, R-Drop and SimCSE. For tokens: likelihood with
unlikelihood.

All of them are sums over rows or positions, because the loop divides by the global count. They are
computed in fp32 (or fp64) whatever the model's precision.

The likelihood and the unlikelihood of a position share one softmax, and their gradients do too. One
forward and one backward pass over the logits serve both. Per position, the unlikelihood only adds a
gather of T probabilities to a softmax over V. The trade-off: all logits are in memory at once. The
chunked head avoids that.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear_cross_entropy import IGNORE

PIECE_BYTES = 16 << 20  # fp32 logits that a CPU processes at once, so that they stay in its caches
GPU_PIECE_BYTES = 1 << 30
# Floor of the total odds of all tokens but the likeliest. It bounds -log(1 - p) at 69.
MIN_REST = 1e-30

# --- labels


def label_nll(
    log_p: Tensor, labels: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Sum over rows i of w_i x the cross-entropy -sum_k q_ik log_p_ik, with q = (1 - smoothing)
    one-hot + smoothing / K.

    log_p (B, K) of any dtype, labels (B,) int64, weights (B,) or None for ones. log_p is not
    normalised: the probabilities of label words under the whole vocabulary add up to less than 1.
    Returns an fp32 scalar (fp64 for fp64 log_p).
    """
    log_p = _wide(log_p)
    nll = -log_p.gather(1, labels[:, None]).squeeze(1)
    if smoothing:
        nll = (1 - smoothing) * nll - smoothing * log_p.mean(1)
    return _weighted_sum(nll, weights)


def rdrop(log_p1: Tensor, log_p2: Tensor, weights: Tensor | None = None) -> Tensor:
    """R-Drop (Liang et al. 2021): the sum over rows i of w_i x (KL(p1_i || p2_i) +
    KL(p2_i || p1_i)) / 2 for two passes of the same rows.

    log_p1, log_p2 (B, K) of any dtype, finite. Each row is renormalised first. weights (B,) or None
    for ones. Returns an fp32 scalar (fp64 for fp64 inputs), never below 0.

    The paper minimises the nll of both passes, summed, + alpha x this. A task here minimises half
    of that: the mean nll of both passes + alpha / 2 x this. The loss then equals the loss without
    R-Drop when the passes agree.
    """
    log_p1, log_p2 = _wide(log_p1).log_softmax(1), _wide(log_p2).log_softmax(1)
    # This sums both divergences. The two factors always have the same sign, so rounding cannot make
    # the sum negative.
    both = ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum(1)
    return _weighted_sum(both / 2, weights)


def simcse(first: Tensor, second: Tensor, group: int, temperature: float) -> Tensor:
    """SimCSE (Gao et al. 2021): InfoNCE summed over rows. A row's positive is its own second pass,
    and its negatives are the second passes of the other rows of its group.

    first, second (B, C) of any dtype: two passes of the same rows, in groups of `group` consecutive
    rows. The logits are cosine similarities / temperature. B is a multiple of `group`, or smaller
    than `group` and then one shorter group. Raises ValueError otherwise, because a row's negatives
    would depend on how the batch was split. Returns an fp32 scalar (fp64 for fp64 inputs).
    """
    B = len(first)
    size = min(group, B) or group  # `or`: an empty batch
    if B % size:
        raise ValueError(f"{B} rows cannot be split into groups of {group}")
    # Divided by a temperature of 0.05, cosines in bf16 would be off by hundredths.
    with torch.autocast(first.device.type, enabled=False):
        first, second = (
            F.normalize(_wide(x), dim=1).unflatten(0, (B // size, size)) for x in (first, second)
        )
        # (groups, rows, second passes)
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
    """The sum over positions of -log p(target), and the sum of -log(1 - p(c)) over the positions'
    negative candidates c (Welleck et al. 2020).

    logits (B, T, V) of any dtype. idx (B, T) int64: the input tokens. targets (B, T) int64: -100 at
    a position without a target, which counts in neither sum. The candidates at position t are the
    distinct tokens in idx[:, : t + 1], including the prompt's, without the target. earlier (B, T)
    bool: False for tokens that are no candidates, such as padding on the left. Returns two fp32
    scalars (fp64 for fp64 logits).

    Both sums and their gradients stay finite, and exact up to rounding, when p(c) is close to 1:
    1 - p is then the sum of all other probabilities and not a difference. -log(1 - p) is at most
    69, because fp32 ends there.
    """
    return _NllAndUnlikelihood.apply(logits, idx, targets, first_occurrences(idx, earlier))


def first_occurrences(idx: Tensor, counts: Tensor | None = None) -> Tensor:
    """Marks the first occurrence of each token in its row, (B, T) bool. idx (B, T) int64. counts
    (B, T) bool: False for tokens to ignore."""
    counts = torch.ones_like(idx, dtype=torch.bool) if counts is None else counts
    same = idx[:, :, None] == idx[:, None, :]  # (B, T, T)
    return counts & ~(same & counts[:, None, :]).tril(-1).any(2)


class _NllAndUnlikelihood(torch.autograd.Function):
    """Let p be the softmax of a position, q_c = 1 - p_c, and r_c = p_c / q_c the odds. The
    gradients with respect to logit z_j are

    nll            p_j - [j is the target]
    unlikelihood   [j is a candidate] r_j - p_j R,  with R the sum of r_c over the candidates

    Both are p times one factor per position, plus a few entries. Only the likeliest token `top` can
    have p > 1/2. Its q is rest / (1 + rest), where `rest` is the sum of exp(z_j - z_top) over the
    other tokens. The gradient of `top` is computed separately, because the formulas above would
    subtract nearly equal numbers.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, idx: Tensor, targets: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """nll_and_unlikelihood with first (B, T) bool from `first_occurrences`."""
        rows, dtype = logits.flatten(0, 1), torch.promote_types(logits.dtype, torch.float32)
        nll, unlikelihood = rows.new_zeros(2, dtype=dtype).unbind()
        tops, rests = (
            rows.new_empty(len(rows), 1, dtype=torch.int64),
            rows.new_empty(len(rows), 1, dtype=dtype),
        )
        for piece in _pieces(rows):
            z = rows[piece].to(dtype)
            highest, top = z.max(1, keepdim=True)
            rest = (
                (z - highest).exp_().scatter_(1, top, 0).sum(1, keepdim=True).clamp_(min=MIN_REST)
            )
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
        """The gradient of the logits (B, T, V), in their dtype."""
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
            # (n, 1) each: R without the likeliest token, whether that one is a candidate, and R.
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
    """Slices of rows (N, V), small enough for the caches of a CPU or a small part of a GPU's
    memory."""
    size = max(
        1, (PIECE_BYTES if rows.device.type == "cpu" else GPU_PIECE_BYTES) // (4 * rows.shape[1])
    )
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def _candidates(
    piece: slice, idx: Tensor, targets: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For a slice of the B x T positions: targets (n, 1), the tokens of their rows (n, T), and
    which of these are candidates (n, T) bool."""
    T = idx.shape[1]
    position = torch.arange(piece.start, piece.stop, device=idx.device)
    row, t = position // T, (position % T)[:, None]
    target, column = targets.flatten()[piece, None], idx[row]
    read = torch.arange(T, device=idx.device) <= t
    return target, column, first[row] & read & (column != target) & (target != IGNORE)
