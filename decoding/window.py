"""What every way of decoding shares: the window on a batch of texts, when a text ends, and the
repetition penalty.

Rows of unequal length share a batch by left padding, and a row's tokens never depend on its
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

# On a CPU the head's product with one to three rows, most of a small model's step, runs 1.2 to 2
# times faster on a copy that is contiguous the other way round. The copy costs as much as it saves
# in about so many tokens.
HEAD_COPY_ROWS = 3
HEAD_COPY_TOKENS = 32


def kept_tokens(context: int) -> int:
    """How many of its newest tokens a row keeps that has outgrown the model's context."""
    return context - context // 4


class Window:
    """What a batch of rows shows the model: left padding, the KV cache, and the slide past the
    model's context.

    GPT-2's positions are absolute and end. A row that outgrows them keeps its newest three
    quarters, read afresh from position 0; the quarter freed is how long the cache serves before the
    next slide. Each row slides by its own length, so a batch slides as its rows would alone. Rows
    that show the same are read once.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        room: int,
        vocab_size: int | None = None,
        alternatives: int = 0,
    ):
        """`room` is how many tokens each row may grow by. Of the `vocab_size` first ids are the
        logits (default: all).

        `alternatives`: how many candidates for its next token each row reads before one is chosen.
        """
        if not all(prompts):
            raise UserError("a prompt holds no token; begin with the end-of-text token")
        self.model = model
        self.device = model.head_weight.device
        self.room = room
        self.vocab_size = vocab_size or model.config.vocab_size
        self.alternatives = alternatives
        # a candidate stands one position further
        self.longest = model.context - (1 if alternatives else 0)
        self.shown = [list(prompt) for prompt in prompts]  # the tokens of each row's window
        self.cache: KVCache | None = None
        self.last = torch.empty(0)  # (B, 1) the tokens that the cache has not seen
        self.head: Tensor | None = None  # (n_embd, vocab_size)
        if (
            self.device.type == "cpu"
            and room >= HEAD_COPY_TOKENS
            and len(prompts) <= HEAD_COPY_ROWS
        ):
            self.head = model.head_weight[: self.vocab_size].t().to(model.dtype).contiguous()

    @property
    def full(self) -> bool:
        """Whether the windows must be read from their beginning, having slid where they have to."""
        return (
            self.cache is None
            or self.cache.length + max(1, self.alternatives) > self.cache.capacity
        )

    def read(self) -> Tensor:
        """Hidden states of what the cache has not seen (B, T, n_embd): the newest tokens, or where
        full the windows."""
        return self._refill() if self.full else self.model.hidden(self.last, past=self.cache)

    def read_alternatives(self, ids: Tensor) -> Tensor:
        """Hidden states (B, k, n_embd) of candidates (B, k) for the next token. `keep` one before
        reading on."""
        assert self.cache is not None
        return self.model.hidden(ids, past=Alternatives(self.cache))

    def keep(self, chosen: Tensor) -> None:
        """The index (B,) of the candidate of each row that is its next token, to be appended."""
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
        """Each row's next token, on the device (B,) and on the host."""
        self.last = chosen[:, None]
        for row, token in zip(self.shown, tokens, strict=True):
            row.append(token)

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows, before the next tokens are appended or after."""
        self.shown = [list(self.shown[row]) for row in rows]
        if self.last.numel():
            self.last = self.last[list(rows)]
        if self.cache is not None:
            self.cache.select(rows)

    def _refill(self) -> Tensor:
        """Slide, and read all that the windows show into a new cache, padded at the left with token
        0."""
        self.shown = [
            row if len(row) <= self.longest else row[-kept_tokens(self.longest) :]
            for row in self.shown
        ]
        # of rows that differ
        place = {row: i for i, row in enumerate(dict.fromkeys(map(tuple, self.shown)))}
        T = max(map(len, place))
        pad = [T - len(row) for row in place]
        idx = torch.tensor(
            [[0] * n + list(row) for n, row in zip(pad, place, strict=True)], device=self.device
        )
        padding = torch.tensor(pad, device=self.device) if any(pad) else None
        self.cache = new_cache(
            self.model, len(pad), T + self.room, padding, max(1, self.alternatives)
        )
        x = self.model.hidden(idx, past=self.cache)
        if len(place) == len(self.shown):
            return x
        rows = [place[tuple(row)] for row in self.shown]
        self.cache.select(rows)
        return x[rows]


class Stop:
    """When a row's text ends: before the end token, or with its last line, whose newline is not
    kept.

    Lines are counted in the continuation, those of nothing but blanks left out: a prompt's last
    line that is still open is none of them, unless the text goes on with it. A token of text and
    the newline after it stays whole.
    """

    def __init__(self, eot: int | None, lines: Sequence[int], tokenizer: Tokenizer | None):
        """`lines` of each row; 0: as many as come."""
        self.eot = eot
        self.lines = lines
        self.tokenizer = tokenizer
        if any(lines) and tokenizer is None:
            raise ValueError("to count lines takes the tokenizer")

    def __call__(self, row: int, tokens: Sequence[int]) -> Literal["before", "after"] | None:
        """Whether a continuation ends before its newest token, after it, or goes on."""
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
    """Makes the tokens of each row's prompt and continuation less likely; a penalty of 1 does
    nothing."""

    def __init__(self, penalty: float, window: Window):
        self.penalty = penalty
        self.seen: Tensor | None = None  # (B, vocab_size) bool
        if penalty != 1:
            seen = torch.zeros(len(window.shown), window.vocab_size, dtype=torch.bool)
            for row, prompt in zip(seen, window.shown, strict=True):
                row[[token for token in prompt if token < window.vocab_size]] = True
            self.seen = seen.to(window.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits or log-probabilities (B, vocab_size), penalized."""
        return logits if self.seen is None else penalize(logits, self.seen, self.penalty)

    def add(self, tokens: Tensor) -> None:
        """The next token (B,) of each row."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        if self.seen is not None:
            self.seen = self.seen[list(rows)]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of `seen` (B, V) bool made less likely where penalty > 1 (CTRL,
    Keskar et al. 2019)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)
