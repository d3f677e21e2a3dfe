"""Sampling: a batch of prompts read once into the KV cache, then one token a row and step.

A row's text never depends on its neighbours in the batch: each has its own random numbers, its own
place in the sliding window, and leaves the batch when it ends.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from decoding.options import DecodeConfig
from decoding.window import RepetitionPenalty, Stop, Window
from model import GPT
from text.tokenizer import Tokenizer

DRAWS = 1024  # random numbers that are drawn for a row at a time
OnToken = Callable[[int, int], None]


class Row(NamedTuple):
    """A prompt to continue: its draws follow from the seed and the name; it ends after `lines`, 0:
    wherever."""

    prompt: Sequence[int]
    name: str
    lines: int


class Chooser(Protocol):
    """A way of decoding that settles on one token of each row at a time."""

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row of the window."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        ...


def extend(
    window: Window, chooser: Chooser, stop: Stop, max_new_tokens: int, on_token: OnToken | None
) -> list[list[int]]:
    """The continuation of each row of the window, a token at a time."""
    continuations: list[list[int]] = [[] for _ in window.shown]
    live = list(range(len(continuations)))  # the text of each row still in the batch
    for step in range(max_new_tokens):
        chosen = chooser.choose(step)
        tokens = chosen.tolist()  # the one wait for the device in a step
        window.append(chosen, tokens)
        going = []
        for i, (row, token) in enumerate(zip(live, tokens, strict=True)):
            text = continuations[row]
            text.append(token)
            ended = stop(row, text)
            if ended is None:
                going.append(i)
            if ended == "before":
                text.pop()
            elif on_token:
                on_token(row, token)
        if not going:
            break
        if len(going) < len(live):
            live = [live[i] for i in going]
            window.select(going)
            chooser.select(going)
    return continuations


class Sampler:
    """Chooses each row's next token. The order is repetition penalty, temperature, top-k, top-p."""

    def __init__(self, window: Window, options: DecodeConfig, seed: int, names: Sequence[str]):
        self.window = window
        self.options = options
        self.penalty = RepetitionPenalty(options.repetition_penalty, window)
        # (B, DRAWS) uniform in [0, 1), for this step and those after it
        self.draws = torch.empty(0)
        self.streams = [] if options.decode == "greedy" else [_stream(seed, name) for name in names]

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row."""
        logits = self.penalty(self.window.next_logits())
        if self.options.decode == "greedy":
            tokens = logits.argmax(-1)
        else:
            if step % DRAWS == 0:
                self.draws = torch.stack([torch.rand(DRAWS, generator=s) for s in self.streams]).to(
                    self.window.device
                )
            logits = truncate(
                soften(logits, self.options.temperature), self.options.top_k, self.options.top_p
            )
            tokens = draw(logits, self.draws[:, step % DRAWS])
        self.penalty.add(tokens)
        return tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        self.penalty.select(rows)
        if self.options.decode != "greedy":
            self.draws = self.draws[list(rows)]
            # a row may be repeated
            self.streams = [self.streams[row].clone_state() for row in rows]


def _stream(seed: int, name: str) -> torch.Generator:
    """Random numbers that follow from (seed, name) alone; drawn on the CPU, they are alike on every
    machine."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(63))


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Logits (B, V) less their greatest, divided by the temperature: however low that is, the
    likeliest stays 0."""
    info = torch.finfo(logits.dtype)
    return (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, info.tiny), info.max)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with -inf outside the top_k most likely tokens (Fan et al. 2018; 0: all) and,
    of those, outside the nucleus: the fewest whose probability reaches top_p (Holtzman et al. 2020;
    1: all)."""
    vocab_size = logits.shape[-1]
    if top_p == 1 and (top_k == 0 or top_k >= vocab_size):
        return logits
    values, ids = (
        logits.topk(min(top_k or vocab_size, vocab_size)) if top_k else logits.sort(descending=True)
    )
    probs = values.softmax(-1)
    keep = probs.cumsum(-1) - probs < top_p  # the probability before a token
    keep[..., 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids, keep)
    return logits.masked_fill(~kept, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (B,) of softmax(logits) (B, V), by inverting the distribution function at `uniform`
    (B,) in [0, 1).

    In the vocabulary's order, not sorted: two nearly equal logits that rounding swaps leave the
    draw alone.
    """
    probs = logits.softmax(-1)
    # A parallel cumsum may rise by rounding where nothing is added: only tokens with probability
    # count.
    cdf = probs.cumsum(-1).masked_fill(probs == 0, 0)
    return (cdf > uniform[:, None] * cdf.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


@dataclass
class Sampled:
    """Texts whose tokens are settled one at a time."""

    model: GPT
    options: DecodeConfig
    eot: int | None
    seed: int
    vocab_size: int
    tokenizer: Tokenizer | None

    def sampled(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[list[int]]:
        """Tokens drawn from their distribution, or the likeliest."""
        window = self._window(rows)
        sampler = Sampler(window, self.options, self.seed, [row.name for row in rows])
        return self._extend(window, sampler, rows, on_token)

    def _window(self, rows: Sequence[Row], alternatives: int = 0) -> Window:
        prompts = [row.prompt for row in rows]
        return Window(
            self.model, prompts, self.options.max_new_tokens, self.vocab_size, alternatives
        )

    def _stop(self, rows: Sequence[Row]) -> Stop:
        return Stop(self.eot, [row.lines for row in rows], self.tokenizer)

    def _extend(
        self, window: Window, chooser: Chooser, rows: Sequence[Row], on_token: OnToken | None
    ) -> list[list[int]]:
        return extend(window, chooser, self._stop(rows), self.options.max_new_tokens, on_token)


@torch.inference_mode()
def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: DecodeConfig,
    eot: int | None,
    *,
    seed: int,
    tokenizer: Tokenizer,
) -> list[list[int]]:
    """A continuation of each prompt (token ids), sampled: what training prints. See
    batched.generate."""
    rows = [Row(prompt, str(i), options.stop_lines) for i, prompt in enumerate(prompts)]
    with inference(model):
        return Sampled(model, options, eot, seed, tokenizer.vocab_size, tokenizer).sampled(rows)


@contextlib.contextmanager
def inference(model: GPT) -> Generator[None]:
    """Without dropout and without compilation, as long as texts are made."""
    training = model.training
    model.eval()
    # A compiled block would be compiled anew for every length. What says so is slow to import, and
    # needless where nothing has imported it yet.
    eager = (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else contextlib.nullcontext()
    )
    try:
        with eager, parametrize.cached():  # a table with rows of new tokens is put together once
            yield
    finally:
        model.train(training)
