"""Generation beside transformers' generate:  python -m benchmarks.decoding [--shape 10M,124M] [--batch 1,8]

Both continue the same random prompts with the same random weights, greedily and on a KV cache, in one process and
in turns. Their tokens must be equal before a time counts.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.table import markdown
from cli import entry_point, parse
from config import GPTConfig, UserError, nearest

if TYPE_CHECKING:
    import torch

SHAPES = {
    "micro": GPTConfig(vocab_size=1000, block_size=256, n_layer=2, n_head=2, n_embd=64),
    "10M": GPTConfig(vocab_size=8192, block_size=256, n_layer=6, n_head=6, n_embd=384),
    "124M": GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
}
PROMPT = 32  # tokens


@dataclass
class Options:
    """Options of the comparison."""

    shape: str = "10M,124M"
    """Shapes, comma-separated: micro, 10M, 124M."""
    batch: str = "1,8"
    """Prompts generated together, comma-separated."""
    new_tokens: int = 128
    """Tokens added to each prompt."""
    repetitions: int = 5
    """Turns of each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure, in fp32 on a CPU and bf16 on a GPU."""
    out: str = "benchmarks/results"
    """Folder for decoding-DEVICE.json and decoding-DEVICE.md."""


Generate = Callable[[], list[list[int]]]


def contenders(config: GPTConfig, batch: int, options: Options, device: torch.device) -> dict[str, Generate]:
    """A function for each that continues the same prompts."""
    import torch
    from transformers import GPT2LMHeadModel

    from decoding import Sampling, generate
    from model import GPT

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        GPT(config).save_pretrained(folder)
        ours: Any = GPT.from_pretrained(folder).to(device, dtype).eval()
        theirs: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    prompts = torch.randint(config.vocab_size, (batch, PROMPT))
    sampling = Sampling(decode="greedy", max_new_tokens=options.new_tokens)

    def of_ours() -> list[list[int]]:
        return generate(ours, prompts.tolist(), sampling, eot=None)

    def of_transformers() -> list[list[int]]:
        ids = prompts.to(device)
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=options.new_tokens, pad_token_id=0
        )
        return out[:, PROMPT:].tolist()

    return {"this engine": of_ours, "transformers": of_transformers}


def measure(generators: dict[str, Generate], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each turn, after one to warm up; the tokens of all must be equal."""
    first, *others = [generate() for generate in generators.values()]
    if any(other != first for other in others):
        raise RuntimeError("the tokens differ: nothing is compared")
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(repetitions):
        for name, generate in generators.items():
            began = time.perf_counter()
            generate()  # its tokens come back to the host, so nothing is left to wait for
            seconds[name].append(time.perf_counter() - began)
    return seconds


def table(rows: list[dict[str, Any]], title: str) -> str:
    head = (
        "shape",
        "batch",
        "this engine, tokens/s",
        "transformers, tokens/s",
        "ratio of medians",
        "slowest-fastest ratio",
    )
    cells = []
    for row in rows:
        ours, theirs = row["seconds"]["this engine"], row["seconds"]["transformers"]
        rate = [row["tokens"] / statistics.median(seconds) for seconds in (ours, theirs)]
        pairs = sorted(t / o for o, t in zip(ours, theirs, strict=True))
        ratios = f"{rate[0] / rate[1]:.2f}", f"{pairs[0]:.2f}-{pairs[-1]:.2f}"
        cells.append([row["shape"], str(row["batch"]), f"{rate[0]:,.0f}", f"{rate[1]:,.0f}", *ratios])
    return f"{title}\n\n{markdown(head, cells, words=(0,))}\n"


def main() -> None:
    options = parse(Options, sys.argv[1:])
    shapes = [name.strip() for name in options.shape.split(",")]
    for name in shapes:
        if name not in SHAPES:
            raise UserError(f"no shape {name}{nearest(name, list(SHAPES))}; there are: {', '.join(SHAPES)}")
    import torch
    import transformers
    from transformers.utils import logging

    import distributed

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = distributed.start(options.device).device
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    title = (
        f"Greedy generation of {options.new_tokens} tokens after {PROMPT}, {distributed.device_name(device)}, {torch.get_num_threads()} threads, "
        f"{datetime.date.today()}: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."
    )
    rows = []
    for shape in shapes:
        for batch in map(int, options.batch.split(",")):
            print(f"{shape}, batch {batch} ...", file=sys.stderr, flush=True)
            seconds = measure(contenders(SHAPES[shape], batch, options, device), options.repetitions)
            rows.append(dict(shape=shape, batch=batch, tokens=batch * options.new_tokens, seconds=seconds))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    record = dict(title=title, versions=versions, options=dataclasses.asdict(options), rows=rows)
    (out / f"decoding-{device.type}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"decoding-{device.type}.md").write_text(table(rows, title))
    print(table(rows, title))


if __name__ == "__main__":
    entry_point(main)
