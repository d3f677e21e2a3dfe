"""Measure tools.serve: tokens per second with several requests at once beside one after another:

python -m benchmarks.serving [--quick] [--shape 10M] [--parallel 1,8,32]

The server is a process of its own with random weights, and OpenAI's client asks over HTTP. Every
turn makes the same requests, so ratios are those of equal texts. Their texts must be equal too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.cli import entry_point, parse
from base.commands import REPO
from base.console import outlive
from benchmarks.decoding import SHAPES
from benchmarks.harness import alternate, cells, ratio, results_in, say, spread
from benchmarks.table import markdown
from config import Count, PathOrName, UserError, known_names

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer

PROMPT = 32  # tokens


@dataclass(frozen=True)
class Options:
    """Options of the measurement."""

    shape: str = "10M"
    """Shapes, comma-separated: micro, 10M, 124M."""
    parallel: str = "1,8,32"
    """Numbers of requests at once, comma-separated. The first is what the others compare with."""
    requests: Count = 32
    """Requests in a turn."""
    new_tokens: Count = 64
    """Most tokens of an answer."""
    repetitions: Count = 3
    """Turns of each."""
    quick: bool = False
    """A tiny shape, few tokens and two turns, to check that everything works."""
    out: PathOrName = "benchmarks/results"
    """Folder for serving.json and serving.md."""


def write_model(folder: Path, shape: str) -> Tokenizer:
    """Write a random model and a tokenizer that is as large as its vocabulary, or smaller."""
    import torch

    from model import GPT
    from text.tokenizer_training import train_bpe

    texts = [path.read_text(encoding="utf-8") for path in sorted((REPO / "engine").glob("*.py"))]
    tokenizer = train_bpe(texts, min(SHAPES[shape].vocab_size, 4096), folder)
    torch.manual_seed(0)
    GPT(SHAPES[shape]).save_pretrained(folder, eot=tokenizer.eot)
    return tokenizer


@contextlib.contextmanager
def server(folder: Path, rows: int) -> Generator[str]:
    """A running server of the model in a folder. Yields its address."""
    words = ["-m", "tools.serve", str(folder), "--port", "0", "--max-batch", str(rows)]
    process = subprocess.Popen(
        [sys.executable, *words], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        found = re.search(r"http://\S+/v1", process.stdout.readline())
        if not found:
            raise UserError("the server did not start; its reason stands above")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


async def ask(address: str, prompts: list[list[int]], at_once: int, tokens: int) -> list[Any]:
    """The answers to all prompts, with `at_once` requests open at a time."""
    from openai import AsyncOpenAI

    free = asyncio.Semaphore(at_once)

    async with AsyncOpenAI(api_key="none", base_url=address) as client:

        async def one(seed: int, prompt: list[int]) -> Any:
            async with free:
                return await client.completions.create(
                    model="model", prompt=prompt, max_tokens=tokens, seed=seed
                )

        return await asyncio.gather(*(one(*pair) for pair in enumerate(prompts)))


def measure(shape: str, options: Options) -> dict[str, Any]:
    """Tokens per second of every turn, by the number of requests at once."""
    import random

    counts = [int(word) for word in options.parallel.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        vocabulary = range(write_model(folder, shape).vocab_size)
        draw = random.Random(0)
        prompts = [draw.choices(vocabulary, k=PROMPT) for _ in range(options.requests)]
        texts: list[list[str]] = []
        with server(folder, max(counts)) as address:

            def turn(at_once: int) -> float:
                began = time.perf_counter()
                answers = asyncio.run(ask(address, prompts, at_once, options.new_tokens))
                seconds = time.perf_counter() - began
                texts.append([answer.choices[0].text for answer in answers])
                return sum(answer.usage.completion_tokens for answer in answers) / seconds

            turn(max(counts))
            say(f"{shape} ...")
            turns = {str(n): lambda n=n: turn(n) for n in counts}
            rates = alternate(turns, range(options.repetitions))
    equal = sum(len(set(versions)) == 1 for versions in zip(*texts, strict=True))
    return {"tokens_per_second": rates, "equal": equal}


def report(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    rows = []
    for case in record["cases"]:
        first, *_ = case["tokens_per_second"].values()
        for n, rates in case["tokens_per_second"].items():
            shown = [*cells(spread(rates), ",.0f"), *cells(ratio(rates, first))]
            rows.append([case["shape"], n, *shown])
    options = record["options"]
    first = options["parallel"].partition(",")[0]
    head = ("shape", "at once", "tokens/s", "least-most", f"beside {first}", "least-most")
    equal = ", ".join(f"{case['equal']} at {case['shape']}" for case in record["cases"])
    return (
        f"{options['requests']} requests of up to {options['new_tokens']} tokens after {PROMPT}, "
        "temperature 1, each with its seed. Texts that were equal in all turns: "
        f"{equal}.\n\n{markdown(head, rows, words=(0,))}"
    )


def main() -> None:
    """Measure all shapes, write the result files after each, and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if options.quick:
        options = dataclasses.replace(
            options, shape="micro", parallel="1,4", requests=8, new_tokens=8, repetitions=2
        )
    shapes = known_names("--shape", options.shape, SHAPES)
    results = results_in(options.out, "serving", "cpu", options, report)
    for shape in shapes:
        results.put({"shape": shape}, measure(shape, options))
    print(results.text())


if __name__ == "__main__":
    entry_point(main)
