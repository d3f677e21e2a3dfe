"""Compares llama.cpp with this project on one exported model: ids and greedy tokens.

make export-check
"""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from base.cli import entry_point, parse
from config import PathOrName, Positional, SmallCount, UserError
from decoding.loading import open_model
from storage.checkpoint import locate
from tools.export import ExportConfig, export

PROMPTS = ("The man", "def main():\n    ", "naïve 日本 \t  text,", "1984 was it's")


@dataclass(frozen=True)
class CheckConfig:
    """Export a model as f32 GGUF and compare llama.cpp's ids and greedy tokens with ours."""

    checkpoint: Annotated[PathOrName, Positional("CHECKPOINT")] = ""
    """A trained model."""
    new_tokens: SmallCount = 24
    """How many tokens to compare after each prompt."""


def main() -> None:
    """Run the comparison; exits 1 if anything differs."""
    cfg = parse(CheckConfig, sys.argv[1:])
    try:
        llama: Any = importlib.import_module("llama_cpp")
    except ImportError:
        raise UserError("llama-cpp-python is not installed; type make export-check") from None
    where = locate(cfg.checkpoint)
    model, tokenizer = open_model(where, None, torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        print(export(model, where, file, ExportConfig(dtype="f32", to="gguf")))
        theirs = llama.Llama(str(file), n_ctx=model.context, verbose=False, logits_all=True)
        wrong = 0
        for prompt in (*PROMPTS, random_text()):
            ids = tokenizer.encode(prompt)
            found = theirs.tokenize(prompt.encode(), add_bos=False, special=False)
            ours = greedy(model, ids, cfg.new_tokens)
            written = llama_greedy(theirs, ids, cfg.new_tokens)
            same = found == ids and written == ours
            wrong += not same
            print(f"{'same' if same else 'DIFFERENT'}: {prompt[:40]!r}, {len(ids)} ids")
            if not same:
                print(f"  ids {ids} {found}\n  tokens {ours} {written}")
    print(f"{wrong} of {len(PROMPTS) + 1} prompts differ" if wrong else "llama.cpp agrees")
    sys.exit(1 if wrong else 0)


def random_text() -> str:
    """A hundred characters of many kinds."""
    draw = random.Random(1)
    return "".join(draw.choice("aeiou bcdfg.,'é1 \n日ßΩ") for _ in range(100))


@torch.no_grad()
def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The n likeliest tokens after ids, one by one, without a cache."""
    new: list[int] = []
    for _ in range(n):
        seen = torch.tensor([(ids + new)[-model.context :]])
        new.append(int(model(seen)[0, -1].argmax()))
    return new


def llama_greedy(llama: Any, ids: list[int], n: int) -> list[int]:
    """The same by llama.cpp."""
    llama.reset()
    new: list[int] = []
    for token in llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        new.append(int(token))
        if len(new) == n:
            return new
    return new


if __name__ == "__main__":
    entry_point(main)
