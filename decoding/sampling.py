"""Sampling: the model reads a batch of prompts into the KV cache, then adds one token to each row
per step.

A row's text never depends on its neighbours in the batch. Each row has its own random numbers and
its own place in the sliding window, and leaves the batch when it ends.
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

DRAWS = 1024  # random numbers drawn for a row in one call
OnToken = Callable[[int, int], None]


class PromptRow(NamedTuple):
    """A prompt to continue. `name` and the seed determine its random draws. The text ends after
    `lines` lines; with 0 it may have any number."""

    prompt: Sequence[int]
    name: str
    lines: int


class Chooser(Protocol):
    """A decoding method that chooses one token of each row at a time."""

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row of the window. `step` counts from 0."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; an index may appear more than once."""
        ...


def extend(
    window: Window, chooser: Chooser, stop: Stop, max_new_tokens: int, on_token: OnToken | None
) -> list[list[int]]:
    """Continue each row of the window token by token, until `stop` or `max_new_tokens` ends it."""
    continuations: list[list[int]] = [[] for _ in window.tokens]
    live = list(range(len(continuations)))  # the text of each row still in the batch
    for step in range(max_new_tokens):
        chosen = chooser.choose(step)
        tokens = chosen.tolist()  # the only wait for the device in a step
        window.append(chosen, tokens)
        unfinished = []
        for i, (row, token) in enumerate(zip(live, tokens, strict=True)):
            text = continuations[row]
            text.append(token)
            ended = stop(row, text)
            if ended is None:
                unfinished.append(i)
            if ended == "before":
                text.pop()
            elif on_token:
                on_token(row, token)
        if not unfinished:
            break
        if len(unfinished) < len(live):
            live = [live[i] for i in unfinished]
            window.select(unfinished)
            chooser.select(unfinished)
    return continuations


class Sampler:
    """Chooses each row's next token by sampling, or by argmax for greedy decoding.

    It applies the repetition penalty, then the temperature, top-k and top-p.
    """

    def __init__(self, window: Window, options: DecodeConfig, seed: int, names: Sequence[str]):
        self.window = window
        self.options = options
        self.penalty = RepetitionPenalty(options.repetition_penalty, window)
        # (B, DRAWS) uniform in [0, 1), one column for each of the next steps
        self.draws = torch.empty(0)
        self.streams = (
            [] if options.decode == "greedy" else [row_stream(seed, name) for name in names]
        )

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
                apply_temperature(logits, self.options.temperature),
                self.options.top_k,
                self.options.top_p,
            )
            tokens = draw_tokens(logits, self.draws[:, step % DRAWS])
        self.penalty.add(tokens)
        return tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows; an index may appear more than once."""
        self.penalty.select(rows)
        if self.options.decode != "greedy":
            self.draws = self.draws[list(rows)]
            # cloned, because the same row may be kept twice
            self.streams = [self.streams[row].clone_state() for row in rows]


def row_stream(seed: int, name: str) -> torch.Generator:
    """A generator seeded by (seed, name) alone. It draws on the CPU, so every machine gets the same
    numbers."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(63))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits (B, V) divided by the temperature, after subtracting each row's maximum: the likeliest
    token then stays at 0 however low the temperature is."""
    info = torch.finfo(logits.dtype)
    return (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, info.tiny), info.max)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with -inf for all tokens but the top_k likeliest (Fan et al. 2018; 0: all).

    Among those it keeps only the nucleus: the fewest tokens whose probability together reaches
    top_p (Holtzman et al. 2020; 1: all).
    """
    vocab_size = logits.shape[-1]
    if top_p == 1 and (top_k == 0 or top_k >= vocab_size):
        return logits
    values, ids = (
        logits.topk(min(top_k or vocab_size, vocab_size)) if top_k else logits.sort(descending=True)
    )
    probs = values.softmax(-1)
    keep = probs.cumsum(-1) - probs < top_p  # the probability of all likelier tokens
    keep[..., 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids, keep)
    return logits.masked_fill(~kept, -torch.inf)


def draw_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (B,) drawn from softmax(logits), logits (B, V), by inverting the cumulative
    distribution at `uniform` (B,) in [0, 1).

    The distribution is in vocabulary order, not sorted, so that the draw does not change when
    rounding swaps two nearly equal logits.
    """
    probs = logits.softmax(-1)
    # A parallel cumsum may rise by rounding at tokens of probability 0: those must not be drawn.
    cdf = probs.cumsum(-1).masked_fill(probs == 0, 0)
    return (cdf > uniform[:, None] * cdf.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


@dataclass
class SamplingDecoder:
    """Decodes prompts by sampling or greedily; `decoding.batched.Decoder` adds the other methods.

    `eot` ends a text (None: nothing does). Ids from `vocab_size` on are never chosen. Counting
    lines needs the `tokenizer`.
    """

    model: GPT
    options: DecodeConfig
    eot: int | None
    seed: int
    vocab_size: int
    tokenizer: Tokenizer | None

    def sampled(
        self, rows: Sequence[PromptRow], on_token: OnToken | None = None
    ) -> list[list[int]]:
        """The continuation of each row, sampled or greedy as the options say."""
        window = self._window(rows)
        sampler = Sampler(window, self.options, self.seed, [row.name for row in rows])
        return self._extend(window, sampler, rows, on_token)

    def _window(self, rows: Sequence[PromptRow], alternatives: int = 0) -> Window:
        prompts = [row.prompt for row in rows]
        return Window(
            self.model, prompts, self.options.max_new_tokens, self.vocab_size, alternatives
        )

    def _stop(self, rows: Sequence[PromptRow]) -> Stop:
        return Stop(self.eot, [row.lines for row in rows], self.tokenizer)

    def _extend(
        self, window: Window, chooser: Chooser, rows: Sequence[PromptRow], on_token: OnToken | None
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
    """Sample a continuation of each prompt (token ids) for training to print. Arguments as of
    `decoding.batched.generate`."""
    rows = [PromptRow(prompt, str(i), options.stop_lines) for i, prompt in enumerate(prompts)]
    with inference(model):
        return SamplingDecoder(model, options, eot, seed, tokenizer.vocab_size, tokenizer).sampled(
            rows
        )


@contextlib.contextmanager
def inference(model: GPT, compiled: bool = False) -> Generator[None]:
    """A context without dropout and, unless `compiled`, without compilation, for the time that
    texts are made."""
    training = model.training
    model.eval()
    # A compiled block would be compiled again for every length. set_stance imports torch._dynamo,
    # which is slow, and without that import nothing can have been compiled.
    eager = (
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules and not compiled
        else contextlib.nullcontext()
    )
    try:
        # cached: a table with rows of new tokens is assembled only once
        with eager, parametrize.cached():
            yield
    finally:
        model.train(training)
