"""Continuous batching: texts of different requests share the steps of one batch, which they join
and leave at any step.

A text's tokens depend on its own prompt, settings and seed, and not on its neighbours: they are
those of decoding/sampling.py for the same seed and name. Rounding is the one exception. A product
of another number of rows may differ in its last bits, which matters only where two tokens are
almost equally likely.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from config import UserError
from decoding.pieces import TextPieces
from decoding.sampling import DRAWS, apply_temperature, draw_tokens, row_stream, truncate
from decoding.slots import Slots
from decoding.window import kept_tokens
from model import GPT
from text.tokenizer import Tokenizer

# Tokens of prompts that are read between two steps, so that the texts in the batch go on.
PROMPT_TOKENS_A_STEP = 512
Ended = Literal["stop", "length"]


class Sampling(NamedTuple):
    """How the tokens of a text are drawn. A temperature of 0 takes the likeliest."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


DRAWN = Sampling()


@dataclass(eq=False)
class Text:
    """A text that is asked for, and how far it is.

    `seed` and `name` determine its random draws, as of a row of decoding/batched.py. It ends before
    the token `end` and before each of `stops`, or after `max_new_tokens`. `presence` is taken once,
    and `frequency` for each time, from the logits of a token that the continuation holds.
    `alternatives` is the number of likeliest tokens to report for each token (None: report no
    probabilities).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    end: int | None
    sampling: Sampling = DRAWN
    seed: int = 1337
    name: str = "0"
    stops: Sequence[str] = ()
    presence: float = 0.0
    frequency: float = 0.0
    alternatives: int | None = None

    made: int = 0  # tokens so far
    dropped: bool = False  # nobody waits for it any more
    tokens: list[int] = field(init=False)  # those of the prompt and continuation in the window
    counts: Counter[int] = field(default_factory=Counter)  # of the continuation's tokens
    pieces: TextPieces = field(init=False)
    _draws: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises UserError for a prompt without tokens."""
        if not self.prompt:
            raise UserError("a prompt has no tokens; start it with the end-of-text token")
        self.tokens = list(self.prompt)
        self.pieces = TextPieces(self.stops)
        self._stream = row_stream(self.seed, self.name)

    def draw(self) -> float:
        """The random number in [0, 1) of the next token."""
        if self.made % DRAWS == 0:
            self._draws = torch.rand(DRAWS, generator=self._stream).tolist()
        return self._draws[self.made % DRAWS]


class Choice(NamedTuple):
    """A token that was chosen, and its log-probability by the model among the likeliest tokens."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


class Progress(NamedTuple):
    """What a step added to a text: new characters, the token (None: the end token), and whether
    the text has ended. `start` counts the characters before the token."""

    text: Text
    piece: str
    start: int
    token: int | None
    choice: Choice | None  # if the text reports probabilities
    ended: Ended | None


class Batcher:
    """The texts in the batch and those that wait to join it, first come, first served.

    `rows` is the largest batch. It bounds the memory of the KV cache.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, rows: int):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.slots = Slots(model, rows)
        self.batch: list[Text] = []  # the text of each slot
        self.waiting: deque[Text] = deque()

    def add(self, texts: Iterable[Text]) -> None:
        """Let texts join the batch when there is room."""
        self.waiting += texts

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.batch and not self.waiting

    def clear(self) -> list[Text]:
        """Drop all texts, and return them."""
        texts = [*self.batch, *self.waiting]
        self.batch.clear()
        self.waiting.clear()
        self.slots.lengths.clear()
        return texts

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Let texts join, then add a token to each text of the batch. Call it within
        `sampling.inference`."""
        self.waiting = deque(text for text in self.waiting if not text.dropped)
        self._leave([slot for slot, text in enumerate(self.batch) if text.dropped])
        self._join()
        if not self.batch:
            return []
        context = self.model.context
        for slot, text in enumerate(self.batch):
            if len(text.tokens) > context:  # the window slides, as in window.Window
                text.tokens = text.tokens[-kept_tokens(context) :]
                self.slots.read(slot, text.tokens[:-1])
        states = self.slots.next_states([text.tokens[-1] for text in self.batch])
        logits = self.model.logits(states)[:, : self.tokenizer.vocab_size].float()
        chosen = choose(logits, self.batch)
        reports = report(logits, chosen, self.batch)
        progress = [
            self._advance(text, token, choice)
            for text, token, choice in zip(self.batch, chosen.tolist(), reports, strict=True)
        ]
        self._leave([slot for slot, made in enumerate(progress) if made.ended])
        return progress

    def _join(self) -> None:
        """Read prompts into free slots, all but the last token of each: the step reads that."""
        left = PROMPT_TOKENS_A_STEP
        read: dict[tuple[int, ...], int] = {}  # the slot of each prompt that was read in this call
        while self.waiting and len(self.batch) < self.rows and left > 0:
            text = self.waiting.popleft()
            context = self.model.context
            if len(text.tokens) > context:
                text.tokens = text.tokens[-kept_tokens(context) :]
            prompt, slot = tuple(text.tokens[:-1]), len(self.batch)
            if prompt in read:
                self.slots.copy(read[prompt], slot)
            else:
                self.slots.read(slot, prompt)
                left -= len(prompt)
                read[prompt] = slot
            self.batch.append(text)

    def _leave(self, slots: Sequence[int]) -> None:
        for slot in reversed(slots):
            self.slots.remove(slot)
            self.batch[slot] = self.batch[-1]
            self.batch.pop()

    def _advance(self, text: Text, token: int, choice: Choice | None) -> Progress:
        start = text.pieces.decoded
        if token == text.end:
            return Progress(text, text.pieces.close(), start, None, None, "stop")
        text.tokens.append(token)
        text.counts[token] += 1
        text.made += 1
        piece = text.pieces.add(self.tokenizer.token_bytes(token))
        full = text.made >= text.max_new_tokens
        if full and not text.pieces.stopped:
            piece += text.pieces.close()
        ended: Ended | None = "stop" if text.pieces.stopped else "length" if full else None
        return Progress(text, piece, start, token, choice, ended)


def choose(logits: Tensor, texts: Sequence[Text]) -> Tensor:
    """The next token (B,) of each text, by its own settings; logits (B, V)."""
    logits = penalized(logits, texts)
    tokens = logits.argmax(-1)
    groups: dict[Sampling, list[int]] = {}
    for row, text in enumerate(texts):
        if text.sampling.temperature:
            groups.setdefault(text.sampling, []).append(row)
    for sampling, rows in groups.items():
        part = apply_temperature(logits[rows], sampling.temperature)
        uniform = torch.tensor([texts[row].draw() for row in rows], device=logits.device)
        tokens[rows] = draw_tokens(truncate(part, sampling.top_k, sampling.top_p), uniform)
    return tokens


def penalized(logits: Tensor, texts: Sequence[Text]) -> Tensor:
    """Logits (B, V) less each text's penalties for tokens that its continuation holds."""
    rows, ids, less = [], [], []
    for row, text in enumerate(texts):
        if text.presence or text.frequency:
            for token, count in text.counts.items():
                rows.append(row)
                ids.append(token)
                less.append(text.presence + text.frequency * count)
    if not rows:
        return logits
    at = torch.tensor([rows, ids], device=logits.device)
    changed = logits.clone()
    changed[at[0], at[1]] -= torch.tensor(less, device=logits.device)
    return changed


def report(logits: Tensor, chosen: Tensor, texts: Sequence[Text]) -> list[Choice | None]:
    """The probabilities of the texts that ask for them; logits (B, V), chosen (B,)."""
    reports: list[Choice | None] = [None] * len(texts)
    rows = [row for row, text in enumerate(texts) if text.alternatives is not None]
    if not rows:
        return reports
    log_probs = logits[rows].log_softmax(-1)
    own = log_probs.gather(1, chosen[rows, None])[:, 0].tolist()
    most = max(texts[row].alternatives or 0 for row in rows)
    top, ids = (part.tolist() for part in log_probs.topk(min(most, logits.shape[1])))
    for row, logprob, values, tokens in zip(rows, own, top, ids, strict=True):
        likeliest = list(zip(tokens, values))[: texts[row].alternatives]
        reports[row] = Choice(int(chosen[row]), logprob, likeliest)
    return reports
