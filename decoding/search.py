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


class Candidate(NamedTuple):
    """One possible step of the search: the beam `parent` continued by `token`, with the
    log-probability `score` of the whole continuation."""

    score: float
    parent: int
    token: int


def length_score(log_prob: float, length: int, penalty: float) -> tuple[float, float]:
    """A key that sorts texts by `log_prob / length ** penalty` (greater is better) even where the
    power would overflow or the quotient underflow.

    The key is the quotient in logarithms. The quotient itself comes second, to break ties of
    logarithms that round to the same number.
    """
    if log_prob >= 0:
        return math.inf, log_prob
    exponent = penalty * math.log(length)
    quotient = log_prob / math.exp(exponent) if exponent < 700 else 0.0
    return exponent - math.log(-log_prob), quotient


class Beams:
    """The host's side of one prompt's beam search: its running texts and its ended texts."""

    def __init__(self, row: int, options: DecodeConfig, width: int, stop: Stop):
        self.row = row
        self.options = options
        self.width = width
        self.stop = stop
        self.texts: list[list[int]] = [[] for _ in range(width)]
        self.scores = [0.0] + [NONE] * (width - 1)  # all beams hold the same prompt: one counts
        self.ended: list[tuple[tuple[float, float], list[int]]] = []  # the best so far, best first

    def advance(self, candidates: Sequence[Candidate]) -> list[int]:
        """Extend the beams by the best of `candidates` (best first). Returns the parent of each
        beam, or an empty list when the search is done.

        This follows transformers with early_stopping=False. A text may end only among the first
        `width` candidates. The search is done when `width` texts have ended and the best running
        text, at its present length, scores no better than the worst of them.
        """
        growing: list[Candidate] = []
        for rank, candidate in enumerate(candidates):
            if candidate.score == NONE or len(growing) == self.width:
                break
            text = [*self.texts[candidate.parent], candidate.token]
            ended = self.stop(self.row, text)
            if ended is None and len(text) < self.options.max_new_tokens:
                growing.append(candidate)
            elif rank < self.width:
                score = length_score(candidate.score, len(text), self.options.length_penalty)
                self._end(score, text[:-1] if ended == "before" else text)
        if not growing or self._is_over(growing[0]):
            return []
        return self._place(growing)

    def _end(self, score: tuple[float, float], text: list[int]) -> None:
        self.ended.append((score, text))
        self.ended.sort(key=lambda ended: ended[0], reverse=True)
        del self.ended[self.width :]

    def _is_over(self, best: Candidate) -> bool:
        if len(self.ended) < self.width:
            return False
        length = len(self.texts[best.parent]) + 1
        return length_score(best.score, length, self.options.length_penalty) <= self.ended[-1][0]

    def _place(self, growing: list[Candidate]) -> list[int]:
        """Assign candidates to beams. The first continuation of a beam stays in that beam and the
        others fill the free ones, so that few cache rows are copied."""
        places: list[Candidate | None] = [None] * self.width
        others = []
        for candidate in growing:
            if places[candidate.parent] is None:
                places[candidate.parent] = candidate
            else:
                others.append(candidate)
        placed = [
            place or (others.pop() if others else Candidate(NONE, i, 0))
            for i, place in enumerate(places)
        ]
        self.texts = [[*self.texts[candidate.parent], candidate.token] for candidate in placed]
        self.scores = [candidate.score for candidate in placed]
        return [candidate.parent for candidate in placed]

    def best(self) -> list[list[int]]:
        """The ended texts, best first. If n-gram blocking left no token to continue with, the
        running texts instead."""
        return [text for _, text in self.ended] or [
            text for score, text in zip(self.scores, self.texts, strict=True) if score > NONE
        ]


def beam_search(window: Window, options: DecodeConfig, n: int, stop: Stop) -> list[list[list[int]]]:
    """Up to n continuations of each prompt, best first by log_prob / length ** length_penalty.

    The window holds each prompt n times in a row. The tokens are those of transformers' generate.
    """
    searches = [Beams(row, options, n, stop) for row in range(len(window.tokens) // n)]
    live = searches
    penalty = RepetitionPenalty(options.repetition_penalty, window)
    blocked = NGramBlock(options.no_repeat_ngram, window)
    while live:
        scores = torch.tensor([search.scores for search in live], device=window.device)  # (B, n)
        logits = window.next_logits()  # (B n, V)
        log_probs = penalty(logits - logits.logsumexp(-1, keepdim=True))
        top, ids = blocked(log_probs).topk(min(2 * n, window.vocab_size))
        top = (top.view(len(live), n, -1) + scores[:, :, None]).flatten(1)  # (B, n 2n)
        top, best = top.topk(min(2 * n, top.shape[1]))
        parents = best // ids.shape[1]
        chosen = ids.view(len(live), -1).gather(1, best)
        rows, unfinished = [], []
        for i, candidates in enumerate(
            zip(top.tolist(), parents.tolist(), chosen.tolist(), strict=True)
        ):
            ranked = [Candidate(*candidate) for candidate in zip(*candidates, strict=True)]
            if beams := live[i].advance(ranked):
                rows += [i * n + parent for parent in beams]
                unfinished.append(live[i])
        live = unfinished
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
    """Forbids tokens that would repeat an n-gram of `size` tokens from a row's prompt or
    continuation. A size of 0 forbids nothing."""

    def __init__(self, size: int, window: Window):
        self.size = size
        longest = max(map(len, window.tokens))
        padded = [[-1] * (longest - len(row)) + row for row in window.tokens]
        self.tokens = torch.tensor(padded if size else [], device=window.device)  # (B, T)

    def __call__(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities (B, V) with -inf for every token that would complete a repeat."""
        if not self.size or self.tokens.shape[1] < self.size:
            return log_probs
        grams = self.tokens.unfold(1, self.size, 1)  # (B, T - size + 1, size)
        newest = self.tokens[:, None, self.tokens.shape[1] + 1 - self.size :]
        # padding (-1) is no n-gram
        repeats = (grams[..., :-1] == newest).all(-1) & (grams[..., 0] >= 0)
        spare = log_probs.shape[1]
        mask = log_probs.new_zeros(len(log_probs), spare + 1, dtype=torch.bool)
        mask.scatter_(1, torch.where(repeats, grams[..., -1].clamp(max=spare), spare), True)
        return log_probs.masked_fill(mask[:, :spare], -torch.inf)

    def add(self, tokens: Tensor) -> None:
        """Append the next token (B,) of each row."""
        if self.size:
            self.tokens = torch.cat((self.tokens, tokens[:, None]), 1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; an index may appear more than once."""
        if self.size:
            self.tokens = self.tokens[list(rows)]


class Contrastive:
    """Chooses tokens by contrastive search (Su et al. 2022): likely ones whose hidden state is
    unlike those before it.

    Among the k likeliest tokens v it takes the one with the greatest (1 - alpha) p(v) - alpha s(v).
    s is the greatest (or mean) cosine between the last hidden state of v and those of the prompt
    and continuation. The model reads all candidates of a row in one pass, as alternatives for one
    position.
    """

    def __init__(self, window: Window, options: DecodeConfig):
        self.window = window
        self.options = options
        self.k = window.alternatives
        self.penalty = RepetitionPenalty(options.repetition_penalty, window)
        self.logits = torch.empty(0)  # (B, vocab_size) of the next token
        # (B, capacity, n_embd) unit hidden states of the positions in the cache
        self.past = torch.empty(0)
        self.filled = 0

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row, and read it."""
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
        """Keep these rows; an index may appear more than once."""
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
        """The penalty s (B, k) of the candidates' unit hidden states (B, k, n_embd)."""
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
