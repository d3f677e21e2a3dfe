"""Shared by every decoding method: the window on a batch of texts, the rule that ends a text, and
the repetition penalty.

Left padding lets rows of unequal length share a batch. A row's tokens never depend on its
neighbours: each row has its own place in the sliding window, and leaves the batch when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from config import UserError
from decoding.cache import Alternatives, KVCache, new_cache
from model import GPT
from text.tokenizer import Tokenizer

# On a CPU, the head's product with one to three rows is most of a small model's step. It runs 1.2
# to 2 times faster on a transposed copy of the weight. The copy pays for itself after about
# HEAD_COPY_TOKENS tokens.
HEAD_COPY_ROWS = 3
HEAD_COPY_TOKENS = 32


def kept_tokens(context: int) -> int:
    """Number of its newest tokens that a row keeps when it outgrows the model's context."""
    return context - context // 4


class Window:
    """The part of each text that the model sees: left padding, the KV cache, and the slide past
    the model's context.

    GPT-2's positions are absolute and limited. A row that outgrows them keeps its newest three
    quarters, which the model reads again from position 0. The freed quarter is how many tokens the
    cache takes before the next slide. Each row slides by its own length, so it slides as it would
    alone. Rows with the same tokens are read once.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        vocab_size: int | None = None,
        alternatives: int = 0,
    ):
        """Each row may grow by `max_new_tokens`. Logits are those of the first `vocab_size` ids
        (default: all). `alternatives` is the number of candidates for its next token that a row
        reads before one is chosen. Raises UserError for a prompt without tokens.
        """
        if not all(prompts):
            raise UserError("a prompt has no tokens; start it with the end-of-text token")
        self.model = model
        self.device = model.head_weight.device
        self.max_new_tokens = max_new_tokens
        self.vocab_size = vocab_size or model.config.vocab_size
        self.alternatives = alternatives
        # a candidate takes one more position
        self.longest = model.context - (1 if alternatives else 0)
        self.tokens = [list(prompt) for prompt in prompts]  # of each row's window
        self.cache: KVCache | None = None
        self.last = torch.empty(0)  # (B, 1) the newest tokens, not yet in the cache
        self.head: Tensor | None = None  # (n_embd, vocab_size) copy of the head's weight
        if (
            self.device.type == "cpu"
            and max_new_tokens >= HEAD_COPY_TOKENS
            and len(prompts) <= HEAD_COPY_ROWS
        ):
            self.head = model.head_weight[: self.vocab_size].t().to(model.dtype).contiguous()

    @property
    def full(self) -> bool:
        """Whether the cache has no place for the next tokens, so that the windows must be read
        again from their beginning."""
        return (
            self.cache is None
            or self.cache.length + max(1, self.alternatives) > self.cache.capacity
        )

    def read(self) -> Tensor:
        """Hidden states (B, T, n_embd) of the tokens that the cache has not seen: the newest ones,
        or the whole windows when the cache is full."""
        return self._refill() if self.full else self.model.hidden(self.last, past=self.cache)

    def read_alternatives(self, ids: Tensor) -> Tensor:
        """Hidden states (B, k, n_embd) of candidates (B, k) for the next token. Call `keep` before
        the next read."""
        assert self.cache is not None
        return self.model.hidden(ids, past=Alternatives(self.cache))

    def keep(self, chosen: Tensor) -> None:
        """Keep in the cache one candidate of each row: `chosen` (B,) holds its index among the k.
        The caller appends the token."""
        assert self.cache is not None
        self.cache.keep(chosen)

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits (N, vocab_size) of hidden states (N, n_embd)."""
        logits = self.model.logits(x)[:, : self.vocab_size] if self.head is None else x @ self.head
        return logits.float()

    def next_logits(self) -> Tensor:
        """fp32 logits (B, vocab_size) of the token after each row."""
        return self.logits(self.read()[:, -1])

    def append(self, chosen: Tensor, tokens: Sequence[int]) -> None:
        """Append each row's next token, given both on the device (B,) and on the host."""
        self.last = chosen[:, None]
        for row, token in zip(self.tokens, tokens, strict=True):
            row.append(token)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, before or after the next tokens are appended. An index may appear more
        than once."""
        self.tokens = [list(self.tokens[row]) for row in rows]
        if self.last.numel():
            self.last = self.last[list(rows)]
        if self.cache is not None:
            self.cache.select(rows)

    def _refill(self) -> Tensor:
        """Slide the windows that are too long, and read all windows into a new cache. Rows are
        padded at the left with token 0."""
        self.tokens = [
            row if len(row) <= self.longest else row[-kept_tokens(self.longest) :]
            for row in self.tokens
        ]
        # each different row is read once
        place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, self.tokens)))}
        T = max(map(len, place))
        pad = [T - len(row) for row in place]
        idx = torch.tensor(
            [[0] * n + list(row) for n, row in zip(pad, place, strict=True)], device=self.device
        )
        padding = torch.tensor(pad, device=self.device) if any(pad) else None
        self.cache = new_cache(
            self.model, len(pad), T + self.max_new_tokens, padding, max(1, self.alternatives)
        )
        x = self.model.hidden(idx, past=self.cache)
        if len(place) == len(self.tokens):
            return x
        rows = [place[tuple(row)] for row in self.tokens]
        self.cache.select(rows)
        return x[rows]


class Stop:
    """The rule that ends a row's text: before the end-of-text token, or after the last line asked
    for, whose newline is dropped.

    Only lines of the continuation count, and blank lines do not. Text that completes the prompt's
    open last line counts as a line. A token that holds both text and a newline is kept whole.
    """

    def __init__(self, eot: int | None, lines: Sequence[int], tokenizer: Tokenizer | None):
        """`lines` is each row's number of lines; 0 means no limit. Raises ValueError when lines
        are to be counted without a tokenizer."""
        self.eot = eot
        self.lines = lines
        self.tokenizer = tokenizer
        if any(lines) and tokenizer is None:
            raise ValueError("counting lines needs the tokenizer; pass tokenizer=...")

    def __call__(self, row: int, tokens: Sequence[int]) -> Literal["before", "after"] | None:
        """Whether the continuation `tokens` of a row ends before its newest token, after it, or
        continues (None)."""
        if tokens[-1] == self.eot:
            return "before"
        if not self.lines[row] or self.tokenizer is None:
            return None
        before, newline, _ = self.tokenizer.token_bytes(tokens[-1]).partition(b"\n")
        if not newline:
            return None
        complete = b"".join(map(self.tokenizer.token_bytes, tokens)).split(b"\n")[:-1]
        if sum(bool(line.strip()) for line in complete) < self.lines[row]:
            return None
        return "after" if before.strip() else "before"


class RepetitionPenalty:
    """Makes the tokens that a row's prompt or continuation holds less likely. A penalty of 1
    changes nothing."""

    def __init__(self, penalty: float, window: Window):
        self.penalty = penalty
        self.seen: Tensor | None = None  # (B, vocab_size) bool
        if penalty != 1:
            seen = torch.zeros(len(window.tokens), window.vocab_size, dtype=torch.bool)
            for row, prompt in zip(seen, window.tokens, strict=True):
                row[[token for token in prompt if token < window.vocab_size]] = True
            self.seen = seen.to(window.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities (B, vocab_size), penalized."""
        return logits if self.seen is None else penalize(logits, self.seen, self.penalty)

    def add(self, tokens: Tensor) -> None:
        """Add each row's next token (B,) to those penalized."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; an index may appear more than once."""
        if self.seen is not None:
            self.seen = self.seen[list(rows)]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with the tokens of `seen` (B, V, bool) made less likely if penalty > 1 (CTRL,
    Keskar et al. 2019)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)
