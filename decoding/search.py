"""Beam search and contrastive search, over the rows of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.options import DecodeConfig
from decoding.window import RepetitionPenalty, Stop, Window

NONE = -math.inf  # log-probability of a beam that holds no text


class Growth(NamedTuple):
    """What a beam becomes: its log-probability, the beam that it grows from, and the token
    added."""

    score: float
    parent: int
    token: int


def by_length(log_prob: float, length: int, penalty: float) -> tuple[float, float]:
    """What orders texts as `log_prob / length ** penalty` does (greater is better), where that is
    too large or small.

    The quotient itself comes second: it orders what the logarithms round to the same.
    """
    if log_prob >= 0:
        return math.inf, log_prob
    exponent = penalty * math.log(length)
    quotient = log_prob / math.exp(exponent) if exponent < 700 else 0.0
    return exponent - math.log(-log_prob), quotient


class Beams:
    """Beam search of one prompt, the side of it that the host keeps: texts that grow, and texts
    that have ended."""

    def __init__(self, row: int, options: DecodeConfig, width: int, stop: Stop):
        self.row = row
        self.options = options
        self.width = width
        self.stop = stop
        self.texts: list[list[int]] = [[] for _ in range(width)]
        self.scores = [0.0] + [NONE] * (width - 1)  # the prompt stands once
        self.ended: list[tuple[tuple[float, float], list[int]]] = []  # the best so far, best first

    def grow(self, candidates: Sequence[Growth]) -> list[int]:
        """Take the best continuations of all beams, best first; the beam that each now grows from,
        none when done.

        As in transformers with early_stopping=False: a text that ends counts only among as many
        candidates as there are beams, and the search is over once none of its running texts, at
        their length now, beats the worst of a full set of ended ones.
        """
        growing: list[Growth] = []
        for rank, candidate in enumerate(candidates):
            if candidate.score == NONE or len(growing) == self.width:
                break
            text = [*self.texts[candidate.parent], candidate.token]
            ended = self.stop(self.row, text)
            if ended is None and len(text) < self.options.max_new_tokens:
                growing.append(candidate)
            elif rank < self.width:
                score = by_length(candidate.score, len(text), self.options.length_penalty)
                self._end(score, text[:-1] if ended == "before" else text)
        if not growing or self._is_over(growing[0]):
            return []
        return self._place(growing)

    def _end(self, score: tuple[float, float], text: list[int]) -> None:
        self.ended.append((score, text))
        self.ended.sort(key=lambda ended: ended[0], reverse=True)
        del self.ended[self.width :]

    def _is_over(self, best: Growth) -> bool:
        if len(self.ended) < self.width:
            return False
        length = len(self.texts[best.parent]) + 1
        return by_length(best.score, length, self.options.length_penalty) <= self.ended[-1][0]

    def _place(self, growing: list[Growth]) -> list[int]:
        """The first to grow from a beam stays in its place, the others go where none has: few rows
        are copied."""
        places: list[Growth | None] = [None] * self.width
        others = []
        for growth in growing:
            if places[growth.parent] is None:
                places[growth.parent] = growth
            else:
                others.append(growth)
        placed = [
            place or (others.pop() if others else Growth(NONE, i, 0))
            for i, place in enumerate(places)
        ]
        self.texts = [[*self.texts[growth.parent], growth.token] for growth in placed]
        self.scores = [growth.score for growth in placed]
        return [growth.parent for growth in placed]

    def best(self) -> list[list[int]]:
        """Texts, best first. Where n-gram blocking left no token to go on with, those that
        stand."""
        return [text for _, text in self.ended] or [
            text for score, text in zip(self.scores, self.texts, strict=True) if score > NONE
        ]


def beam_search(window: Window, options: DecodeConfig, n: int, stop: Stop) -> list[list[list[int]]]:
    """For each prompt up to n continuations, best first, by log-probability over length **
    length_penalty.

    The window holds each prompt n times, one after another. Token for token what transformers'
    generate does.
    """
    searches = [Beams(row, options, n, stop) for row in range(len(window.shown) // n)]
    live = searches
    penalty = RepetitionPenalty(options.repetition_penalty, window)
    blocked = NGramBlock(options.no_repeat_ngram, window)
    while live:
        scores = torch.tensor([search.scores for search in live], device=window.device)  # (B, n)
        logits = window.next_logits()  # (B n, V)
        log_probs = penalty(logits - logits.logsumexp(-1, keepdim=True))
        top, ids = blocked(log_probs).topk(min(2 * n, window.vocab_size))
        top = (top.view(len(live), n, -1) + scores[:, :, None]).flatten(1)  # (B, n 2n)
        top, at = top.topk(min(2 * n, top.shape[1]))
        parents = at // ids.shape[1]
        chosen = ids.view(len(live), -1).gather(1, at)
        rows, going = [], []
        for i, growths in enumerate(
            zip(top.tolist(), parents.tolist(), chosen.tolist(), strict=True)
        ):
            if grown := live[i].grow([Growth(*growth) for growth in zip(*growths, strict=True)]):
                rows += [i * n + parent for parent in grown]
                going.append(live[i])
        live = going
        if live:
            for part in (window, penalty, blocked):
                part.select(rows)
            tokens = [text[-1] for search in live for text in search.texts]
            newest = torch.tensor(tokens, device=window.device)
            window.append(newest, tokens)
            penalty.add(newest)
            blocked.add(newest)
    return [search.best() for search in searches]


class NGramBlock:
    """Rules out tokens that would repeat `size` tokens of a row's prompt and continuation; a size
    of 0 does nothing."""

    def __init__(self, size: int, window: Window):
        self.size = size
        longest = max(map(len, window.shown))
        padded = [[-1] * (longest - len(row)) + row for row in window.shown]
        self.tokens = torch.tensor(padded if size else [], device=window.device)  # (B, T)

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities (B, V) with -inf for what would repeat."""
        if not self.size or self.tokens.shape[1] < self.size:
            return log_probs
        grams = self.tokens.unfold(1, self.size, 1)  # (B, T - size + 1, size)
        newest = self.tokens[:, None, self.tokens.shape[1] + 1 - self.size :]
        # no row repeats its padding
        repeats = (grams[..., :-1] == newest).all(-1) & (grams[..., 0] >= 0)
        spare = log_probs.shape[1]
        mask = log_probs.new_zeros(len(log_probs), spare + 1, dtype=torch.bool)
        mask.scatter_(1, torch.where(repeats, grams[..., -1].clamp(max=spare), spare), True)
        return log_probs.masked_fill(mask[:, :spare], -torch.inf)

    def add(self, tokens: Tensor) -> None:
        """The next token (B,) of each row."""
        if self.size:
            self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        if self.size:
            self.tokens = self.tokens[list(rows)]


class Contrastive:
    """Chooses tokens by contrastive search (Su et al. 2022): likely, and unlike what stands.

    Of the k likeliest tokens v the one with the greatest (1 - alpha) p(v) - alpha s(v), where s is
    the greatest (or mean) cosine between the last hidden state of v and those of prompt and
    continuation. The candidates of a row are read in one pass, as alternatives for one position.
    """

    def __init__(self, window: Window, options: DecodeConfig):
        self.window = window
        self.options = options
        self.k = window.alternatives
        self.penalty = RepetitionPenalty(options.repetition_penalty, window)
        self.logits = torch.empty(0)  # (B, vocab_size) of the next token
        # (B, capacity, n_embd) unit hidden states of what the cache holds
        self.past = torch.empty(0)
        self.filled = 0

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row."""
        if self.window.full:
            self._read()
        logits = self.penalty(self.logits)
        top, ids = logits.topk(self.k)
        probs = (top - logits.logsumexp(-1, keepdim=True)).exp()
        x = self.window.read_alternatives(ids)  # (B, k, n_embd)
        unit = F.normalize(x.float(), dim=-1)
        alpha = self._alpha(step)
        chosen = ((1 - alpha) * probs - alpha * self._similarity(unit)).argmax(-1)
        self.window.keep(chosen)
        rows = torch.arange(len(chosen), device=chosen.device)
        self.past[:, self.filled] = unit[rows, chosen]
        self.filled += 1
        self.logits = self.window.logits(x[rows, chosen])
        tokens = ids[rows, chosen]
        self.penalty.add(tokens)
        return tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        self.logits, self.past = self.logits[list(rows)], self.past[list(rows)]
        self.penalty.select(rows)

    def _read(self) -> None:
        x = self.window.read()
        B, self.filled, C = x.shape
        cache = self.window.cache
        assert cache is not None
        self.past = x.new_empty(B, cache.capacity, C, dtype=torch.float32)
        self.past[:, : self.filled] = F.normalize(x.float(), dim=-1)
        self.logits = self.window.logits(x[:, -1])

    def _alpha(self, step: int) -> float:
        if not self.options.contrastive_growth:
            return self.options.contrastive_alpha
        return self.options.contrastive_alpha * step / max(1, self.options.max_new_tokens - 1)

    def _similarity(self, unit: Tensor) -> Tensor:
        """s (B, k) of candidates' unit hidden states (B, k, n_embd)."""
        cosines = unit @ self.past[:, : self.filled].mT  # (B, k, filled)
        cache = self.window.cache
        assert cache is not None
        mean = self.options.contrastive_similarity == "mean"
        if cache.pad is None:
            return cosines.mean(-1) if mean else cosines.amax(-1)
        padding = torch.arange(self.filled, device=unit.device) < cache.pad[:, None, None]
        if mean:
            return cosines.masked_fill(padding, 0).sum(-1) / (self.filled - cache.pad)[:, None]
        return cosines.masked_fill(padding, -torch.inf).amax(-1)
