"""Measure tools.serve: tokens per second with several requests at once beside one after another:

python -m benchmarks.serving [--quick] [--shape 10M] [--parallel 1,8,32]

The server is a process of its own with random weights, and OpenAI's client asks over HTTP. Every
turn makes the same requests, so ratios are those of equal texts. Their texts must be equal too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.cli import entry_point, parse
from base.commands import REPO
from base.console import outlive
from benchmarks.decoding import SHAPES
from benchmarks.harness import Cases, alternate, race_table, run_cases, say, timed
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


def measure(options: Options, device: str) -> Cases:
    """Yields each shape and its figures."""
    for shape in known_names("--shape", options.shape, SHAPES):
        say(f"{shape} ...")
        yield {"shape": shape}, measure_shape(shape, options)


def measure_shape(shape: str, options: Options) -> dict[str, Any]:
    """The seconds of the turns by the number of requests at once, the tokens of a turn, and how
    many texts were equal in all turns."""
    counts = [int(word) for word in options.parallel.split(",")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        vocabulary = range(write_model(folder, shape).vocab_size)
        draw = random.Random(0)
        prompts = [draw.choices(vocabulary, k=PROMPT) for _ in range(options.requests)]
        answers: list[list[Any]] = []
        with server(folder, max(counts)) as address:

            def turn(at_once: int) -> None:
                asked = ask(address, prompts, at_once, options.new_tokens)
                answers.append(asyncio.run(asked))

            turn(max(counts))
            turns = {str(n): timed(functools.partial(turn, n)) for n in counts}
            seconds = alternate(turns, range(options.repetitions))
    versions = zip(*([answer.choices[0].text for answer in of_turn] for of_turn in answers))
    return {
        "tokens": sum(answer.usage.completion_tokens for answer in answers[0]),
        "seconds": seconds,
        "equal": sum(len(set(texts)) == 1 for texts in versions),
    }


def report(record: dict[str, Any]) -> str:
    """The table, as Markdown."""
    options, cases = record["options"], record["cases"]
    equal = ", ".join(f"{case['equal']} at {case['shape']}" for case in cases)
    return (
        f"{options['requests']} requests of up to {options['new_tokens']} tokens after {PROMPT}, "
        "temperature 1, each with its seed. Contenders: requests at once. Texts that were equal in "
        f"all turns: {equal}.\n\n{race_table(cases, ['shape'], 'tokens/s', 'tokens')}"
    )


def main() -> None:
    """Measure all shapes, write the result files after each, and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if options.quick:
        options = dataclasses.replace(
            options, shape="micro", parallel="1,4", requests=8, new_tokens=8, repetitions=2
        )
    run_cases(options, "serving", "cpu", measure, report)


if __name__ == "__main__":
    entry_point(main)
