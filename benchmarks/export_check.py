"""Compares llama.cpp with this project on one exported model: ids and greedy tokens.

make export-check
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import urllib.request
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
        importlib.import_module("xllamacpp")
    except ImportError:
        raise UserError("xllamacpp is not installed; type make export-check") from None
    where = locate(cfg.checkpoint)
    model, tokenizer = open_model(where, None, torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        print(export(model, where, file, ExportConfig(dtype="f32", to="gguf")))
        theirs, wrong = LlamaCpp(file, model.context), 0
        for prompt in (*PROMPTS, random_text()):
            ids = tokenizer.encode(prompt)
            found = theirs.encode(prompt)
            ours, written = greedy(model, ids, cfg.new_tokens), theirs.greedy(ids, cfg.new_tokens)
            same = found == ids and written == ours
            wrong += not same
            print(f"{'same' if same else 'DIFFERENT'}: {prompt[:40]!r}, {len(ids)} ids")
            if not same:
                print(f"  ids {ids} {found}\n  tokens {ours} {written}")
    print(f"{wrong} of {len(PROMPTS) + 1} prompts differ" if wrong else "llama.cpp agrees")
    sys.exit(1 if wrong else 0)


class LlamaCpp:
    """llama.cpp's server with a GGUF file, on loopback in this process."""

    def __init__(self, file: Path, context: int):
        xllamacpp: Any = importlib.import_module("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.port = str(file), context, 0
        params.warmup, params.verbosity = False, 0
        self.server = xllamacpp.Server(params)

    def encode(self, text: str) -> list[int]:
        """The ids of a text in which special tokens are ordinary text."""
        return self._ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The n likeliest tokens after ids."""
        how = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        return self._ask("completion", prompt=ids, n_predict=n, **how)["tokens"]

    def _ask(self, path: str, **body: Any) -> dict[str, Any]:
        url, content = f"{self.server.listening_address}/{path}", json.dumps(body).encode()
        request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)


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


if __name__ == "__main__":
    entry_point(main)
