"""Text from a model: a batch of prompts read once into the KV cache, then one token a row and step.

Rows of unequal length share a batch by left padding, and a row's tokens never depend on its neighbours: each
row has its own random numbers, its own place in the sliding window, and leaves the batch when it ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from config import UserError
from model import GPT, KVCache
from tokenizer import Tokenizer, load_tokenizer

# On a CPU the head's product with few rows, most of a small model's step, runs 1.2 to 1.9 times faster on a copy
# that is contiguous the other way round. The copy costs as much as it saves in about this many tokens.
HEAD_COPY_PAYS = 32


@dataclass
class Sampling:
    """How the next token is chosen, and for how long."""

    decode: Literal["sample", "greedy"] = "sample"
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 1337

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}; it must be at least 1")
        if self.decode == "sample" and self.temperature <= 0:
            raise UserError(f"--temperature is {self.temperature}; it must be above 0 (or use --decode greedy)")
        if self.top_k < 0:
            raise UserError(f"--top-k is {self.top_k}; it must be at least 0 (0: all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}; it must be above 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"--repetition-penalty is {self.repetition_penalty}; it must be above 0 (1: none)")


def open_model(where: str, tokenizer: str | None, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of `where` (see checkpoint.locate), ready for inference on `device` in `dtype`.

    `tokenizer` names another one than the checkpoint's own. Raises UserError where either cannot be read, or the
    tokenizer has ids that the model lacks.
    """
    model = GPT.from_pretrained(where).to(device, dtype).eval()
    loaded = load_tokenizer(tokenizer or where)
    if loaded.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.name} has {loaded.vocab_size:,} ids and the model of {where} only "
            f"{model.config.vocab_size:,}; name the model's own with --tokenizer"
        )
    return model, loaded


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: Sampling,
    eot: int | None,
    on_token: Callable[[int, int], None] | None = None,
    *,
    rows: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continuation of each prompt (token ids), ended before `eot` or after `max_new_tokens`.

    `on_token(row, token)` sees each token as it is chosen. `rows` number the prompts (default 0, 1, ...): the
    draws of a row follow from (seed, its number) alone, so row i of a batch equals `generate(model,
    [prompts[i]], ..., rows=[i])`. Ids at and past `vocab_size` (the tokenizer's, where it is smaller than the
    model's) are never chosen. Past block_size the window slides: see Window. Raises UserError for an empty prompt.
    """
    if not prompts:
        return []
    training = model.training
    model.eval()
    try:
        return _generate(model, prompts, options, eot, on_token, rows or range(len(prompts)), vocab_size)
    finally:
        model.train(training)


def _generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: Sampling,
    eot: int | None,
    on_token: Callable[[int, int], None] | None,
    rows: Sequence[int],
    vocab_size: int | None,
) -> list[list[int]]:
    continuations: list[list[int]] = [[] for _ in prompts]
    window = Window(model, prompts, options.max_new_tokens)
    sampler = Sampler(options, prompts, rows, vocab_size or model.config.vocab_size, window.device)
    live = list(range(len(prompts)))  # the prompt of each row still in the batch
    for step in range(options.max_new_tokens):
        chosen = sampler(window.next_logits(), step)
        tokens = chosen.tolist()  # the one wait for the device in a step
        for row, token in zip(live, tokens, strict=True):
            if token != eot:
                continuations[row].append(token)
                if on_token:
                    on_token(row, token)
        window.append(chosen, tokens)
        if eot in tokens:
            kept = [i for i, token in enumerate(tokens) if token != eot]
            live = [live[i] for i in kept]
            if not live:
                break
            window.select(kept)
            sampler.select(kept)
    return continuations


def kept_tokens(context: int) -> int:
    """How many of its newest tokens a row keeps that has outgrown the model's context."""
    return context - context // 4


class Window:
    """What a batch of rows shows the model: left padding, the KV cache, and the slide past block_size.

    GPT-2's positions are absolute and end at block_size. A row that outgrows them keeps its newest three
    quarters, read afresh from position 0; the quarter freed is how long the cache serves before the next slide.
    Each row slides by its own length, so a batch slides as its rows would alone.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], room: int):
        """`room` is how many tokens each row may grow by."""
        if not all(prompts):
            raise UserError("a prompt holds no token; begin with the end-of-text token")
        self.model = model
        self.device = model.head_weight.device
        self.room = room
        self.shown = [list(prompt) for prompt in prompts]  # the tokens of each row's window
        self.cache: KVCache | None = None
        self.last = torch.empty(0)  # (B, 1) the tokens that the cache has not seen
        self.head: Tensor | None = None  # (n_embd, vocab_size)
        if self.device.type == "cpu" and room >= HEAD_COPY_PAYS:
            self.head = model.head_weight[: model.config.vocab_size].t().contiguous()

    def next_logits(self) -> Tensor:
        """fp32 logits (B, vocab_size) of the token after each row."""
        if self.cache is None or self.cache.length == self.cache.capacity:
            idx = self._refill()
        else:
            idx = self.last
        x = self.model.hidden(idx, cache=self.cache)[:, -1]
        logits = self.model.logits(x) if self.head is None else x @ self.head
        return logits.float()

    def append(self, chosen: Tensor, tokens: list[int]) -> None:
        """Each row's next token, on the device (B,) and on the host."""
        self.last = chosen[:, None]
        for row, token in zip(self.shown, tokens, strict=True):
            row.append(token)

    def select(self, rows: list[int]) -> None:
        """Keep (and repeat) these rows."""
        index = torch.tensor(rows, device=self.device)
        self.shown = [list(self.shown[row]) for row in rows]
        self.last = self.last[index]
        if self.cache is not None:
            self.cache.select(index)

    def _refill(self) -> Tensor:
        """A new cache, and all that the windows show (B, T) to read into it, padded at the left with token 0."""
        context = self.model.context
        self.shown = [row if len(row) <= context else row[-kept_tokens(context) :] for row in self.shown]
        T = max(map(len, self.shown))
        pad = [T - len(row) for row in self.shown]
        idx = torch.tensor([[0] * n + row for n, row in zip(pad, self.shown, strict=True)], device=self.device)
        padding = torch.tensor(pad, device=self.device) if any(pad) else None
        self.cache = self.model.new_cache(len(pad), T + self.room, padding)
        return idx


class Sampler:
    """Chooses each row's next token. The order is repetition penalty, temperature, top-k, top-p."""

    def __init__(
        self,
        options: Sampling,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        vocab_size: int,
        device: torch.device,
    ):
        self.options = options
        self.vocab_size = vocab_size
        self.seen: Tensor | None = None  # (B, vocab_size) bool: tokens of prompt and continuation
        self.draws: Tensor | None = None  # (B, max_new_tokens) uniform in [0, 1), all drawn before the first step
        if options.repetition_penalty != 1:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool)
            for row, prompt in zip(self.seen, prompts, strict=True):
                row[list(prompt)] = True
            self.seen = self.seen.to(device)
        if options.decode == "sample":
            draws = [_uniform(options.seed, row, options.max_new_tokens) for row in rows]
            self.draws = torch.stack(draws).to(device)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """Token ids (B,) from fp32 logits (B, at least vocab_size)."""
        logits = logits[:, : self.vocab_size]
        if self.seen is not None:
            logits = penalize(logits, self.seen, self.options.repetition_penalty)
        if self.draws is None:
            tokens = logits.argmax(-1)
        else:
            logits = truncate(logits / self.options.temperature, self.options.top_k, self.options.top_p)
            tokens = draw(logits, self.draws[:, step])
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def select(self, rows: list[int]) -> None:
        """Keep (and repeat) these rows."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.draws = None if self.draws is None else self.draws[rows]


def _uniform(seed: int, row: int, count: int) -> Tensor:
    """`count` numbers in [0, 1) that follow from (seed, row) alone; fp32 on the CPU, alike on every machine."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {row}").getrandbits(63))
    return torch.rand(count, generator=generator)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of `seen` (B, V) bool made less likely where penalty > 1 (CTRL, Keskar et al. 2019)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with -inf outside the top_k most likely tokens (Fan et al. 2018; 0: all) and, of those,
    outside the nucleus: the fewest whose probability reaches top_p (Holtzman et al. 2020; 1: all)."""
    vocab_size = logits.shape[-1]
    if top_p == 1 and (top_k == 0 or top_k >= vocab_size):
        return logits
    values, ids = logits.topk(min(top_k or vocab_size, vocab_size)) if top_k else logits.sort(descending=True)
    probs = values.softmax(-1)
    keep = probs.cumsum(-1) - probs < top_p  # the probability before a token; the first is always kept
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids, keep)
    return logits.masked_fill(~kept, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Token ids (B,) of softmax(logits) (B, V), by inverting the distribution function at `uniform` (B,) in [0, 1).

    In the vocabulary's order, not sorted: two nearly equal logits that rounding swaps leave the draw alone.
    """
    probs = logits.softmax(-1)
    # A parallel cumsum may rise by rounding where nothing is added: only tokens with probability count.
    cdf = probs.cumsum(-1).masked_fill(probs == 0, 0)
    return (cdf > uniform[:, None] * cdf.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
