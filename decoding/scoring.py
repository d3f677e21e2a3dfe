"""Scores of continuations: the log-probability that a model gives to a text after another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import UserError
from model import GPT
from text.tokenizer import Tokenizer

LOGIT_ROWS = 512  # positions whose logits are held at once: 100 MB in fp32 for GPT-2


@dataclass(frozen=True)
class Span:
    """Token ids of a context and its continuation. Only the continuation, from `start`, is
    scored."""

    ids: tuple[int, ...]
    start: int


def make_span(tokenizer: Tokenizer, context: str, continuation: str, block_size: int) -> Span:
    """The token ids of a context and a continuation, which are encoded separately because the
    continuation begins a word.

    The beginning of the context is truncated if both exceed block_size. Raises UserError for a
    continuation that is empty or does not fit.
    """
    before = tokenizer.encode(context) or [tokenizer.eot]
    after = tokenizer.encode(continuation)
    if not 0 < len(after) <= block_size:
        raise UserError(
            f"{continuation[:40]!r} has {len(after)} tokens, but only 1 to block_size {block_size} "
            "can be scored; remove the row, or train with a longer --seq-len"
        )
    ids = (*before, *after)[-(block_size + 1) :]  # the last token is only a target
    return Span(ids, len(ids) - len(after))


def spaces_to_word(context: str, continuation: str) -> tuple[str, str]:
    """Both texts, with white space at the end of the context moved to the continuation, as in
    lm-evaluation-harness."""
    text = context.rstrip()
    return (text, context[len(text) :] + continuation) if text else (context, continuation)


@dataclass(frozen=True)
class Score:
    """The score of a continuation."""

    nll: float  # nats, summed over tokens
    tokens: int
    greedy: bool  # whether each token is the likeliest


def score_batch(model: GPT, batch: Sequence[Span]) -> list[Score]:
    """The score of each span of a batch. Logits are only computed at the continuations'
    positions."""
    device = model.head_weight.device
    idx = torch.zeros(len(batch), max(len(span.ids) for span in batch) - 1, dtype=torch.int64)
    for row, span in zip(idx, batch, strict=True):
        row[: len(span.ids) - 1] = torch.tensor(span.ids[:-1])
    places = [(i, t - 1) for i, span in enumerate(batch) for t in range(span.start, len(span.ids))]
    rows, columns = torch.tensor(places, device=device).unbind(1)
    targets = torch.tensor([id for span in batch for id in span.ids[span.start :]], device=device)
    x = model.hidden(idx.to(device))[rows, columns]  # (N, n_embd)
    losses, hits = [], []
    for part, target in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = model.logits(part).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    counts = [len(span.ids) - span.start for span in batch]
    each = zip(
        torch.cat(losses).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True
    )
    return [Score(float(loss.sum()), len(loss), bool(hit.all())) for loss, hit in each]


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices of at most `batch_tokens` tokens after padding. The longest come first, so
    that a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def perplexity(nll: float, count: float) -> float:
    """exp(nll / count) for a sum of nats over `count` tokens (or words); inf on overflow."""
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, n_bytes: float) -> float:
    """Convert a sum of nats to bits per byte of text, comparable between tokenizers."""
    return nll / math.log(2) / n_bytes
