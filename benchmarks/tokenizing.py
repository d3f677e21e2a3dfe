"""fineweb_prep.py beside tiktoken alone:  python -m benchmarks.tokenizing --input 'corpus/*.txt'

The text is cut into documents of a few kilobytes and written to a parquet file, which
fineweb_prep.py turns into shards, timed as a whole process (start, reading, tokenizing, hashing,
flushing). tiktoken gets the same documents as strings in memory and only makes ids. Same number of
threads as processes, in turns.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from base.cli import entry_point, parse
from base.console import outlive
from config import Count, Few, UserError, Where, Wheres

DOCUMENT = 4000  # characters, about


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    input: Wheres | None = None
    """Text files, folders or globs, separated by commas."""
    workers: Few | None = None
    """Processes, and threads of tiktoken. Default: one for each core."""
    repetitions: Count = 3
    """Turns of each."""
    out: Where = "benchmarks/results"
    """Folder for tokenizing.json."""


def documents(spec: str) -> list[str]:
    """The files' text, cut at the ends of lines into pieces of DOCUMENT characters and a little
    more."""
    from text.corpus import TextFiles, find_files

    texts: list[str] = []
    for text, _ in TextFiles(find_files(spec)).segments():
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin + DOCUMENT) + 1 or len(text)
            texts.append(text[begin:end])
            begin = end
    return [text for text in texts if text.strip()]


def prepare(parquet: Path, workers: int) -> float:
    """Seconds of a whole fineweb_prep.py."""
    script = Path(__file__).resolve().parent.parent / "fineweb_prep.py"
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            script,
            "--input",
            parquet,
            "--out",
            f"{folder}/shards",
            "--workers",
            workers,
        ]
        words += ["--shard-tokens", 2_000_000]
        began = time.perf_counter()
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
        return time.perf_counter() - began


def main() -> None:
    options = parse(Options, sys.argv[1:])
    outlive()
    if not options.input:
        raise UserError("no text is named; type --input FILES")
    import pyarrow
    import tiktoken
    from pyarrow import parquet

    from base.machine import cores
    from text.tokenizer import load_tokenizer

    load_tokenizer("gpt2")  # says what to do where it is not to be had
    encoding, texts = tiktoken.get_encoding("gpt2"), documents(options.input)
    workers = options.workers or cores()
    seconds: dict[str, list[float]] = {"fineweb_prep.py": [], "tiktoken": []}
    tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.parquet"
        parquet.write_table(pyarrow.table({"text": texts}), file)
        for turn in range(options.repetitions):
            print(f"turn {turn + 1} of {options.repetitions} ...", file=sys.stderr, flush=True)
            seconds["fineweb_prep.py"].append(prepare(file, workers))
            began = time.perf_counter()
            tokens = sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=workers)))
            seconds["tiktoken"].append(time.perf_counter() - began)
    rates = {name: tokens / statistics.median(of) for name, of in seconds.items()}
    ratios = sorted(t / p for p, t in zip(*seconds.values(), strict=True))
    record = {
        "date": str(datetime.date.today()),
        "workers": workers,
        "documents": len(texts),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": rates,
        "ratio": statistics.median(ratios),
    }
    Path(options.out).mkdir(parents=True, exist_ok=True)
    (Path(options.out) / "tokenizing.json").write_text(
        json.dumps(record, indent=1) + "\n", encoding="utf-8"
    )
    for name, rate in rates.items():
        print(f"{name:<16}{rate:>12,.0f} tokens/s")
    print(
        f"ratio {record['ratio']:.2f} (slowest to fastest {ratios[0]:.2f} to {ratios[-1]:.2f}), "
        f"{tokens:,} tokens"
    )


if __name__ == "__main__":
    entry_point(main)
