"""Sampling and greedy decoding with fixed shapes: a step that torch.compile compiles once, and that
a GPU replays from a CUDA graph.

The KV cache has its whole length from the beginning, and each row its own place in it. Tokens are
drawn, appended and read again on the device. So the host does not wait for a token. It looks at
the texts every CHECK_EVERY tokens to see whether all have ended.

The trade-off: attention reads the whole cache in each step, a row that has ended stays in the batch
until all have, and the first text of a shape waits for the compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from config import UserError
from decoding.cache import new_cache
from decoding.options import DecodeConfig
from decoding.sampling import (
    DRAWS,
    OnToken,
    PromptRow,
    apply_temperature,
    draw_tokens,
    row_stream,
    truncate,
)
from decoding.window import Stop, kept_tokens, penalize
from kernels.attention import explicit_attention
from model import GPT, Extend

# Tokens between two looks at the texts. On a CPU a look waits for nothing.
CHECK_EVERY = {"cpu": 1, "cuda": 16}
# Lengths of the cache and of texts are rounded up, so that few shapes are compiled.
MULTIPLE = 128
KEPT_STEPS = 2  # shapes whose step is kept: each takes a cache, and on a CPU packed weights


Step = Callable[["State"], None]


class State:
    """The tensors of a batch of B rows, all on the device. It is the Past of each row's newest
    token.

    text (B, S): the tokens of each row. newest (B,): the place of its newest token in the text.
    filled (B,): positions in its cache. uniform (B, S): random numbers, one for each place. seen
    (B, vocab_size): whether a row's text holds a token.
    """

    length = 0  # of the Past: where each row's text ends is in `filled`

    def __init__(self, model: GPT, rows: int, places: int, capacity: int, vocab_size: int):
        device, config = model.head_weight.device, model.config
        self.capacity = capacity  # positions of the cache
        self.text = torch.zeros(rows, places, dtype=torch.int64, device=device)
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self.filled = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniform = torch.zeros(rows, places, device=device)
        self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        shape = (rows, config.n_head, capacity, config.n_embd // config.n_head)
        # Zeros: attention multiplies the masked values by 0, and 0 times NaN would be NaN.
        self.layers = [
            (
                torch.zeros(shape, dtype=model.dtype, device=device),
                torch.zeros(shape, dtype=model.dtype, device=device),
            )
            for _ in range(config.n_layer)
        ]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions (B, 1) of the newest tokens."""
        return self.filled[:, None]

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor:
        """(B, 1, 1, capacity) bool: a row's newest token attends to its text and to itself."""
        key = torch.arange(self.capacity, device=device)
        return (key <= self.filled[:, None])[:, None, None]

    def extension(self, layer: int) -> Extend:
        """The function that writes a layer's new keys and values, and returns the whole cache."""
        return functools.partial(self.extend, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, n_head, 1, head_dim)."""
        keys, values = self.layers[layer]
        row = torch.arange(len(k), device=k.device)
        keys[row, :, self.filled] = k[:, :, 0]
        values[row, :, self.filled] = v[:, :, 0]
        return keys, values

    def advance(self, T: int) -> None:
        """Nothing: `next_token` counts."""


def next_token(model: GPT, options: DecodeConfig, state: State) -> None:
    """Read the newest token of each row and append the next one."""
    idx = state.text.gather(1, state.newest[:, None])
    x = model.hidden(idx, past=state)[:, -1]
    logits = model.logits(x)[:, : state.seen.shape[1]].float()
    if options.repetition_penalty != 1:
        logits = penalize(logits, state.seen, options.repetition_penalty)
    place = state.newest + 1
    if options.decode == "greedy":
        tokens = logits.argmax(-1)
    else:
        logits = apply_temperature(logits, options.temperature)
        logits = truncate(logits, options.top_k, options.top_p)
        tokens = draw_tokens(logits, state.uniform.gather(1, place[:, None])[:, 0])
    state.text.scatter_(1, place[:, None], tokens[:, None])
    if options.repetition_penalty != 1:
        state.seen.scatter_(1, tokens[:, None], True)
    state.newest.copy_(place)
    state.filled.add_(1)


class FixedDecoder:
    """Decodes batches with one model, and keeps the compiled step of each shape.

    `backend` is that of torch.compile; with None, tests run the steps without a compiler.
    """

    def __init__(self, model: GPT, backend: str | None = "inductor"):
        """Raises UserError for a model with a prefix, whose positions would precede each row's."""
        if model.prefix is not None:
            raise UserError("--compile does not go with a prefix or soft prompt; leave it out")
        self.model, self.backend = model, backend
        self.device = model.head_weight.device
        self.steps: dict[Any, tuple[State, Step]] = {}
        # On a CPU in fp32, two products and a softmax are faster for one query than the fused
        # attention, which works on tiles of queries. A token takes 2 to 10% less.
        explicit = backend and self.device.type == "cpu" and model.dtype == torch.float32
        self.stepped = with_ops(model, attention=explicit_attention) if explicit else model

    def texts(
        self,
        rows: Sequence[PromptRow],
        options: DecodeConfig,
        stop: Stop,
        seed: int,
        vocab_size: int,
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """The continuation of each row, sampled or greedy. The tokens are those of
        `SamplingDecoder.sampled`, but for rounding. Raises UserError for other methods."""
        if options.decode not in ("sample", "greedy"):
            raise UserError(
                f"--compile goes with --decode sample or greedy, not {options.decode}; leave one out"
            )
        prompts = [self._within(list(row.prompt)) for row in rows]
        state, step = self._step(prompts, options, vocab_size)
        self._fill(state, prompts, rows, seed, options)
        read = _Reader(state, prompts, stop, on_token)
        every = CHECK_EVERY.get(self.device.type, 1)
        for made in range(options.max_new_tokens):
            self._slide(state, prompts, made)
            step(state)
            look = (made + 1) % every == 0 or made + 1 == options.max_new_tokens
            if look and read(made + 1):
                break
        return read.texts

    def _within(self, prompt: list[int]) -> list[int]:
        if not prompt:
            raise UserError("a prompt has no tokens; start it with the end-of-text token")
        context = self.model.context
        return prompt if len(prompt) <= context else prompt[-kept_tokens(context) :]

    def _step(
        self, prompts: Sequence[Sequence[int]], options: DecodeConfig, vocab_size: int
    ) -> tuple[State, Step]:
        """The state and the step of a shape. On a GPU the step is a graph on this state's
        memory."""
        longest = max(map(len, prompts)) + options.max_new_tokens
        places = math.ceil(longest / MULTIPLE) * MULTIPLE
        penalty = options.repetition_penalty
        how = (options.decode, options.temperature, options.top_k, options.top_p, penalty)
        key = (len(prompts), places, vocab_size, how)
        if key not in self.steps:
            if len(self.steps) == KEPT_STEPS:
                self.steps.clear()
                if self.backend:
                    torch.compiler.reset()  # else the compiler keeps them
            capacity = min(self.model.context, places)
            state = State(self.model, len(prompts), places, capacity, vocab_size)
            step: Step = functools.partial(next_token, self.stepped, options)
            if self.backend:
                step = compiled_step(self.stepped, options, state, self.backend)
            self.steps[key] = state, captured(step, state) if self.device.type == "cuda" else step
        return self.steps[key]

    def _fill(
        self,
        state: State,
        prompts: Sequence[list[int]],
        rows: Sequence[PromptRow],
        seed: int,
        options: DecodeConfig,
    ) -> None:
        """Write the prompts, the random numbers of each row, and the cache of all tokens but the
        newest."""
        text = torch.zeros(state.text.shape, dtype=torch.int64)
        uniform, seen = torch.zeros(state.uniform.shape), torch.zeros(state.seen.shape).bool()
        for row, (prompt, asked) in enumerate(zip(prompts, rows, strict=True)):
            text[row, : len(prompt)] = torch.tensor(prompt)
            seen[row, [token for token in asked.prompt if token < seen.shape[1]]] = True
            if options.decode == "sample":
                new, stream = options.max_new_tokens, row_stream(seed, asked.name)
                draws = [torch.rand(DRAWS, generator=stream) for _ in range(0, new, DRAWS)]
                uniform[row, len(prompt) : len(prompt) + new] = torch.cat(draws)[:new]
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        for t, value in (
            (state.text, text),
            (state.uniform, uniform),
            (state.seen, seen),
            (state.newest, last),
            (state.filled, last),
        ):
            t.copy_(value)
        alike: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            alike.setdefault(len(prompt), []).append(row)
        for length, same in alike.items():
            self._read(state, same, state.text[same, : length - 1])

    def _read(self, state: State, rows: Sequence[int], idx: Tensor) -> None:
        """Make the caches of rows hold their tokens idx (n, T), and nothing else."""
        n, T = idx.shape
        if not T:
            return
        cache = new_cache(self.model, n, T)
        self.model.hidden(idx, past=cache)
        for to, source in zip(state.layers, cache.layers, strict=True):
            for t, new in zip(to, source, strict=True):
                for i, row in enumerate(rows):
                    t[row, :, :T] = new[i]

    def _slide(self, state: State, prompts: Sequence[Sequence[int]], made: int) -> None:
        """Slide the window of each row whose cache is full, as window.Window does. When that is
        depends on lengths alone, so the host knows without asking the device."""
        context = self.model.context
        kept = kept_tokens(context)
        for row, prompt in enumerate(prompts):
            newest = len(prompt) - 1 + made
            if newest >= context and (newest - context) % (context - kept + 1) == 0:
                first = newest - kept + 1
                self._read(state, [row], state.text[row : row + 1, first:newest])
                state.filled[row] = kept - 1


class _Reader:
    """The host's side: the rows' texts as far as it has looked at them, and which have ended."""

    def __init__(
        self, state: State, prompts: Sequence[Sequence[int]], stop: Stop, on_token: OnToken | None
    ):
        self.state, self.stop, self.on_token = state, stop, on_token
        self.lengths = [len(prompt) for prompt in prompts]
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        self.seen = 0  # tokens of each row that were looked at

    def __call__(self, made: int) -> bool:
        """Look at the tokens up to the `made`th. Returns whether all rows have ended. This is the
        only wait for the device."""
        first = min(self.lengths) + self.seen
        new = self.state.text[:, first : max(self.lengths) + made].tolist()
        for place in range(self.seen, made):
            for row, length in enumerate(self.lengths):
                if not self.ended[row]:
                    self._add(row, new[row][length + place - first])
        self.seen = made
        return all(self.ended)

    def _add(self, row: int, token: int) -> None:
        text = self.texts[row]
        text.append(token)
        ended = self.stop(row, text)
        self.ended[row] = ended is not None
        if ended == "before":
            text.pop()
        elif self.on_token:
            self.on_token(row, token)


def with_ops(model: GPT, **replaced: Any) -> GPT:
    """A copy of the model that shares its weights and computes with other operations of
    kernels.ops.Ops."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    ops = dataclasses.replace(model.ops, **replaced)
    for module in copied.modules():
        if hasattr(module, "ops"):
            module.ops = ops
    return copied


def compiled_step(model: GPT, options: DecodeConfig, state: State, backend: str) -> Step:
    """`next_token`, compiled for the shapes of `state`, which it overwrites.

    On a CPU the weights become constants, which the compiler packs for the products of this batch.
    That takes their memory once more. C++ calls the products there: from Python, their calls take a
    tenth of a token's time.
    """
    import torch._inductor.config as inductor

    def step(state: State) -> None:
        next_token(model, options, state)

    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    on_cpu = state.text.device.type == "cpu"
    with inductor.patch(freezing=on_cpu, cpp_wrapper=on_cpu):
        compiled(state)
    return compiled


def captured(step: Step, state: State) -> Step:
    """The step as a CUDA graph on this state's memory: one launch for all kernels of a token."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # libraries set themselves up
            step(state)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(state)
    return lambda _: graph.replay()
