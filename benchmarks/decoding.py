"""Compare every decoding method with transformers, if it has the method:

python -m benchmarks.decoding [--quick] [--batch 1,8]

All contenders continue the same random prompts with the same random weights, in one process and in
turns. Greedy decoding, sampling and beam search compete with transformers' generate. Contrastive
search competes with its definition, written out without a cache. Methods without randomness must
give equal tokens in fp32 before anything is timed.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from base.cli import entry_point, parse
from base.console import outlive
from benchmarks.contenders import silence_transformers
from benchmarks.harness import OURS, Cases, race, race_table, run_cases, say
from config import Count, GPTConfig, PathOrName, known_names
from decoding.options import DecodeConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from decoding.fixed import FixedDecoder

SHAPES = {
    "micro": GPTConfig(vocab_size=1000, block_size=256, n_layer=2, n_head=2, n_embd=64),
    "10M": GPTConfig(vocab_size=8192, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "124M": GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
}
PROMPT = 32  # tokens
STRATEGIES = {
    "greedy": DecodeConfig(decode="greedy"),
    "sample": DecodeConfig(temperature=0.8, top_k=50, top_p=0.9),
    "beam": DecodeConfig(decode="beam", beams=5, length_penalty=0.6, no_repeat_ngram=3),
    "contrastive": DecodeConfig(decode="contrastive", contrastive_k=4, contrastive_alpha=0.6),
    "mbr": DecodeConfig(decode="mbr", temperature=0.8, top_p=0.9, candidates=8),
    "ensemble": DecodeConfig(decode="ensemble", temperature=0.8, top_p=0.9, beams=3, candidates=8),
}
# the same settings as arguments of transformers' generate
THEIRS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True, temperature=0.8, top_k=50, top_p=0.9),
    "beam": dict(
        do_sample=False,
        num_beams=5,
        length_penalty=0.6,
        early_stopping=False,
        no_repeat_ngram_size=3,
    ),
}
NO_CACHE = "no cache"
COMPILED = f"{OURS} compiled"


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    shape: str = "10M,124M"
    """Shapes, comma-separated: micro, 10M, 124M."""
    batch: str = "1,8"
    """Numbers of prompts that are generated together, comma-separated."""
    decode: str = ",".join(STRATEGIES)
    """Decoding methods, comma-separated."""
    new_tokens: Count = 128
    """Tokens added to each prompt."""
    repetitions: Count = 5
    """Turns of each contender. The search without a cache has one."""
    compile: bool = False
    """Let the compiled steps of greedy decoding and sampling compete too."""
    quick: bool = False
    """A tiny shape, few tokens and two turns, to check that everything works."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on, in fp32 on a CPU and bf16 on a GPU."""
    out: PathOrName = "benchmarks/results"
    """Folder for decoding-DEVICE.json and decoding-DEVICE.md."""


Generate = Callable[[], list[list[int]]]
# ids (B, T): last hidden states (B, T, C), logits (B, T, V)
Read = Callable[["Tensor"], tuple["Tensor", "Tensor"]]


def contrastive_reference(read: Read, prompt: Sequence[int], options: DecodeConfig) -> list[int]:
    """Contrastive search as defined (Su et al. 2022), without a cache: every step reads each text
    from its beginning. Returns the new ids."""
    import torch
    import torch.nn.functional as F

    text = torch.tensor([list(prompt)])
    alpha = options.contrastive_alpha
    for step in range(options.max_new_tokens):
        hidden, logits = read(text)
        last = logits[0, -1].float()
        if options.repetition_penalty != 1:
            seen = text[0].unique()
            penalty = options.repetition_penalty
            last[seen] = torch.where(last[seen] > 0, last[seen] / penalty, last[seen] * penalty)
        probs, ids = last.softmax(-1).topk(options.contrastive_k)
        longer, _ = read(torch.cat((text.expand(len(ids), -1), ids.cpu()[:, None]), 1))
        similarity = F.cosine_similarity(longer[:, -1:].float(), hidden.float(), dim=-1)  # (k, T)
        unlike = (
            similarity.mean(1) if options.contrastive_similarity == "mean" else similarity.amax(1)
        )
        weight = (
            alpha * step / (options.max_new_tokens - 1) if options.contrastive_growth else alpha
        )
        best = ((1 - weight) * probs - weight * unlike).argmax()
        text = torch.cat((text, ids[best].cpu().view(1, 1)), 1)
    return text[0, len(prompt) :].tolist()


class Pair:
    """A random model in this engine and in transformers, with prompts for both."""

    def __init__(self, config: GPTConfig, batch: int, options: Options, device: str):
        import torch
        from transformers import GPT2LMHeadModel

        from model import GPT

        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            GPT(config).save_pretrained(folder)
            self.ours = GPT.from_pretrained(folder).eval()
            self.theirs: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts = torch.randint(config.vocab_size, (batch, PROMPT))
        self.options, self.device = options, device
        self.to(torch.float32)

    def to(self, dtype: torch.dtype) -> None:
        """Convert both models."""
        from decoding.fixed import FixedDecoder

        self.ours.to(self.device, dtype)
        self.theirs.to(self.device, dtype)
        self.fixed = FixedDecoder(self.ours) if self.options.compile else None

    def contenders(self, decode: str) -> dict[str, Generate]:
        """Functions that continue the prompts, by name, this engine last."""
        length = self.options.new_tokens
        options = dataclasses.replace(STRATEGIES[decode], max_new_tokens=length)
        found: dict[str, Generate] = {}
        if decode in THEIRS:
            found["transformers"] = lambda: self._theirs(decode)
        elif decode == "contrastive" and len(self.prompts) == 1:
            found[NO_CACHE] = lambda: [
                contrastive_reference(self._read, p, options) for p in self.prompts.tolist()
            ]
        found[OURS] = lambda: self._ours(options, None)
        if decode in ("greedy", "sample") and self.fixed:
            found[COMPILED] = lambda: self._ours(options, self.fixed)
        return found

    def _ours(self, options: DecodeConfig, fixed: FixedDecoder | None) -> list[list[int]]:
        from decoding.batched import generate

        tokenizer: Any = Words(self.ours.config.vocab_size)
        prompts = self.prompts.tolist()
        return generate(self.ours, prompts, options, eot=None, tokenizer=tokenizer, fixed=fixed)

    def _theirs(self, decode: str) -> list[list[int]]:
        import torch

        ids = self.prompts.to(self.device)
        more = dict(attention_mask=torch.ones_like(ids), pad_token_id=0)
        more |= dict(max_new_tokens=self.options.new_tokens) | THEIRS[decode]
        return self.theirs.generate(ids, **more)[:, PROMPT:].tolist()

    def _read(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        with torch.inference_mode():
            out = self.theirs(idx.to(self.device), output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1], out.logits


@dataclass
class Words:
    """A substitute for the tokenizer of a model that has none: every id is a word."""

    vocab_size: int

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The ids as hexadecimal words."""
        return " ".join(f"{id:x}" for id in ids)


def check(generators: dict[str, Generate]) -> None:
    """Raise RuntimeError unless all contenders give the same tokens."""
    first, *others = [generate() for generate in generators.values()]
    if any(other != first for other in others):
        raise RuntimeError("the tokens of the contenders differ, so they cannot be compared")


def measure(options: Options, device: str) -> Cases:
    """Yields each case, with the seconds of its contenders' turns."""
    import torch

    silence_transformers()
    shapes = known_names("--shape", options.shape, SHAPES)
    decodes = known_names("--decode", options.decode, STRATEGIES)
    for shape, batch in itertools.product(shapes, map(int, options.batch.split(","))):
        pair = Pair(SHAPES[shape], batch, options, device)
        named = {decode: pair.contenders(decode) for decode in decodes}
        for decode, generators in named.items():
            if decode != "sample":
                check(generators)
        if device == "cuda":
            pair.to(torch.bfloat16)
        for decode, generators in named.items():
            say(f"{shape}, batch {batch}, {decode} ...")
            # generate returns tokens on the host, so the device is idle then
            seconds = race(generators, range(options.repetitions), limits={NO_CACHE: 1})
            key = {"shape": shape, "batch": batch, "decode": decode}
            yield key, {"tokens": batch * options.new_tokens, "seconds": seconds}


def report(record: dict[str, Any]) -> str:
    """The table of all cases, as Markdown."""
    return (
        f"Generation of {record['options']['new_tokens']} tokens after {PROMPT}. Tokens of the "
        "chosen text; beam 5 beams, contrastive 4 candidates, mbr and ensemble 8.\nSpeed x: over "
        "the first of the same case, of turns side by side.\n\n"
        + race_table(record["cases"], ("shape", "batch", "decode"), "tokens/s", "tokens")
    )


def main() -> None:
    """Measure all cases, write the result files after each, and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if options.quick:
        options = dataclasses.replace(options, shape="micro", new_tokens=16, repetitions=2)
    run_cases(options, "decoding-DEVICE", options.device, measure, report)


if __name__ == "__main__":
    entry_point(main)
