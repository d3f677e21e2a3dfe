"""Text from a model: a batch of prompts read once into the KV cache, then one token a row and step.

A row's text never depends on its neighbours in the batch: each has its own random numbers, its own place in the
sliding window, and leaves the batch when it ends.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from adapters.layers import can_merge, merge
from adapters.peft import is_adapter, load_adapter, locate_base
from config import DecodeConfig, UserError, check_decode
from model import GPT
from search import Contrastive, beam_search
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_files import has_tokenizer
from window import RepetitionPenalty, Stop, Window, kept_tokens

__all__ = ["generate", "kept_tokens", "open_model"]

CANDIDATES_AT_ONCE = 64  # rows of a batch when several texts are made for each prompt: what bounds their cache
DRAWS = 1024  # random numbers that are drawn for a row at a time

OnToken = Callable[[int, int], None]


def open_model(where: str, tokenizer: str | None, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Tokenizer]:
    """Model and tokenizer of `where` (see checkpoint.locate), ready for inference on `device` in `dtype`.

    An adapter's folder gives its base with the adapter in it, and the base's tokenizer if it has none. `tokenizer` names another one than the checkpoint's own.
    Raises UserError where either cannot be read, or the tokenizer has ids that the model lacks.
    """
    model = open_weights(where, device, dtype)
    return model, open_tokenizer(where, tokenizer, model)


def open_weights(where: str, device: torch.device, dtype: torch.dtype) -> GPT:
    """The model of `where` alone, ready for inference."""
    base = locate_base(where) if is_adapter(where) else where
    model = GPT.from_pretrained(base)
    if base != where:
        load_adapter(model, where)
        if can_merge(model):
            merge(model)
    return model.to(device, dtype).eval()


def tokenizer_folder(where: str) -> str:
    """Where the tokenizer of `where` lies: with an adapter that has none, its base."""
    return locate_base(where) if is_adapter(where) and not has_tokenizer(where) else where


def open_tokenizer(where: str, tokenizer: str | None, model: GPT) -> Tokenizer:
    """The tokenizer named, else that of `where`."""
    loaded = load_tokenizer(tokenizer or tokenizer_folder(where))
    if loaded.rows > model.config.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.name} has {loaded.vocab_size:,} ids and the model of {where} only "
            f"{model.config.vocab_size:,}; name the model's own with --tokenizer"
        )
    return loaded


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: DecodeConfig,
    eot: int | None,
    on_token: OnToken | None = None,
    *,
    seed: int = 1337,
    rows: Sequence[int] | None = None,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    stop_lines: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continuation of each prompt (token ids), ended before `eot`, with its last line or after `max_new_tokens`.

    `on_token(row, token)` sees each token as it is chosen; where whole texts compete (beam, mbr, ensemble), when all
    are done. `rows` number the prompts (default 0, 1, ...): the draws of a row follow from (seed, its number) alone,
    so row i of a batch equals `generate(model, [prompts[i]], ..., rows=[i])`. Ids at and past `vocab_size` (default:
    the tokenizer's, else the model's) are never chosen. `stop_lines` gives each row its own number of lines in place
    of the options'; lines, mbr and ensemble take the `tokenizer`. Past the model's context the window slides: see
    Window. Raises UserError for an empty prompt and for options that cannot be.
    """
    check_decode(options)
    if not prompts:
        return []
    vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else model.config.vocab_size)
    decoder = Decoder(model, options, eot, seed, vocab_size, tokenizer)
    names = map(str, rows if rows is not None else range(len(prompts)))
    lines = stop_lines if stop_lines is not None else [options.stop_lines] * len(prompts)
    training = model.training
    model.eval()
    # A compiled block would be compiled anew for every length. What says so is slow to import, and needless where
    # nothing has imported it yet.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with eager, parametrize.cached():  # a table with rows of new tokens is put together once
            return decoder.texts([Row(*row) for row in zip(prompts, names, lines, strict=True)], on_token)
    finally:
        model.train(training)


class Row(NamedTuple):
    """A prompt to continue: its draws follow from the seed and the name; it ends after `lines`, 0: wherever."""

    prompt: Sequence[int]
    name: str
    lines: int


@dataclass
class Decoder:
    """What one call of `generate` is to do, and each way of doing it."""

    model: GPT
    options: DecodeConfig
    eot: int | None
    seed: int
    vocab_size: int
    tokenizer: Tokenizer | None

    def texts(self, rows: Sequence[Row], on_token: OnToken | None) -> list[list[int]]:
        """The continuation of each row."""
        decode = self.options.decode
        if decode in ("sample", "greedy"):
            return self.sampled(rows, on_token)
        if decode == "contrastive":
            return self.contrastive(rows, on_token)
        if decode == "beam":
            texts = [beams[0] for beams in self.beams(rows, self.options.beams)]
        else:
            texts = self.most_alike(rows)
        if on_token:
            for row, text in enumerate(texts):
                for token in text:
                    on_token(row, token)
        return texts

    def sampled(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[list[int]]:
        """Tokens drawn from their distribution, or the likeliest."""
        window = self._window(rows)
        sampler = Sampler(window, self.options, self.seed, [row.name for row in rows])
        return self._extend(window, sampler, rows, on_token)

    def contrastive(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[list[int]]:
        """Tokens that are likely and unlike what stands."""
        window = self._window(rows, alternatives=min(self.options.contrastive_k, self.vocab_size))
        return self._extend(window, Contrastive(window, self.options), rows, on_token)

    def beams(self, rows: Sequence[Row], count: int) -> list[list[list[int]]]:
        """For each row the `count` best texts of a beam search, best first."""
        window = self._window([row for row in rows for _ in range(count)])
        return beam_search(window, self.options, count, self._stop(rows))

    def most_alike(self, rows: Sequence[Row]) -> list[list[int]]:
        """Of each row's candidates the one with the least Bayes risk: see `least_risk`."""
        if self.tokenizer is None:
            raise ValueError("to compare texts takes the tokenizer")
        at_once = max(1, CANDIDATES_AT_ONCE // self.options.candidates)
        batches = [rows[begin : begin + at_once] for begin in range(0, len(rows), at_once)]
        return [least_risk(texts, self.tokenizer) for batch in batches for texts in self._candidates(batch)]

    def _candidates(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        options = self.options
        if options.decode == "mbr":
            of = self.beams if options.candidates_by == "beam" else self._samples
            return of(rows, options.candidates)
        samples = self._samples(rows, options.candidates - options.beams - 1)
        beams = self.beams(rows, options.beams)
        return [[*s, c, *b] for s, c, b in zip(samples, self.contrastive(rows), beams, strict=True)]

    def _samples(self, rows: Sequence[Row], count: int) -> list[list[list[int]]]:
        """`count` samples for each row; their draws follow from its name."""
        texts = self.sampled([row._replace(name=f"{row.name} {i}") for row in rows for i in range(count)])
        return [texts[begin : begin + count] for begin in range(0, len(texts), count)]

    def _window(self, rows: Sequence[Row], alternatives: int = 0) -> Window:
        prompts = [row.prompt for row in rows]
        return Window(self.model, prompts, self.options.max_new_tokens, self.vocab_size, alternatives)

    def _stop(self, rows: Sequence[Row]) -> Stop:
        return Stop(self.eot, [row.lines for row in rows], self.tokenizer)

    def _extend(self, window: Window, chooser: Chooser, rows: Sequence[Row], on_token: OnToken | None):
        return extend(window, chooser, self._stop(rows), self.options.max_new_tokens, on_token)


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


def least_risk(texts: Sequence[list[int]], tokenizer: Tokenizer) -> list[int]:
    """The text whose chrF against the others, taken for the truth in turns, is highest on average.

    Minimum Bayes risk decoding (Kumar and Byrne 2004), the risk estimated from the candidates themselves.
    """
    from metrics import pairwise_chrf

    utility = pairwise_chrf([tokenizer.decode(text, skip_special=True) for text in texts])
    return texts[int((utility.sum(1) - utility.diagonal()).argmax())]


class Sampler:
    """Chooses each row's next token. The order is repetition penalty, temperature, top-k, top-p."""

    def __init__(self, window: Window, options: DecodeConfig, seed: int, names: Sequence[str]):
        self.window = window
        self.options = options
        self.penalty = RepetitionPenalty(options.repetition_penalty, window)
        self.draws = torch.empty(0)  # (B, DRAWS) uniform in [0, 1), for this step and those after it
        self.streams = [] if options.decode == "greedy" else [_stream(seed, name) for name in names]

    def choose(self, step: int) -> Tensor:
        """The next token (B,) of each row."""
        logits = self.penalty(self.window.next_logits())
        if self.options.decode == "greedy":
            tokens = logits.argmax(-1)
        else:
            if step % DRAWS == 0:
                self.draws = torch.stack([torch.rand(DRAWS, generator=s) for s in self.streams]).to(self.window.device)
            logits = truncate(soften(logits, self.options.temperature), self.options.top_k, self.options.top_p)
            tokens = draw(logits, self.draws[:, step % DRAWS])
        self.penalty.add(tokens)
        return tokens

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows."""
        self.penalty.select(rows)
        if self.options.decode != "greedy":
            self.draws = self.draws[list(rows)]
            self.streams = [self.streams[row].clone_state() for row in rows]  # a row may be repeated


def _stream(seed: int, name: str) -> torch.Generator:
    """Random numbers that follow from (seed, name) alone; drawn on the CPU, they are alike on every machine."""
    return torch.Generator().manual_seed(random.Random(f"{seed} {name}").getrandbits(63))


def soften(logits: Tensor, temperature: float) -> Tensor:
    """Logits (B, V) less their greatest, divided by the temperature: however low that is, the likeliest stays 0."""
    info = torch.finfo(logits.dtype)
    return (logits - logits.amax(-1, keepdim=True)) / min(max(temperature, info.tiny), info.max)


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (B, V) with -inf outside the top_k most likely tokens (Fan et al. 2018; 0: all) and, of those,
    outside the nucleus: the fewest whose probability reaches top_p (Holtzman et al. 2020; 1: all)."""
    vocab_size = logits.shape[-1]
    if top_p == 1 and (top_k == 0 or top_k >= vocab_size):
        return logits
    values, ids = logits.topk(min(top_k or vocab_size, vocab_size)) if top_k else logits.sort(descending=True)
    probs = values.softmax(-1)
    keep = probs.cumsum(-1) - probs < top_p  # the probability before a token
    keep[..., 0] = True
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
