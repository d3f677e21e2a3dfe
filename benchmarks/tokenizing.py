"""Compare fineweb_prep.py with tiktoken alone:

python -m benchmarks.tokenizing --input 'corpus/*.txt'

The text is cut into documents of a few kilobytes and written to a parquet file. fineweb_prep.py
turns the file into shards and is timed as a whole process (start, reading, tokenizing, hashing,
flushing). tiktoken gets the same documents as strings in memory and only makes ids, in as many
threads as fineweb_prep.py has processes. The two take turns.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.cli import entry_point, parse
from base.commands import last_error
from base.console import outlive
from benchmarks.harness import Cases, alternate, race_table, run_cases, timed
from config import Count, PathOrName, PathsOrNames, SmallCount, UserError

DOCUMENT = 4000  # characters, at least
SHARD_TOKENS = 2_000_000  # fineweb_prep.py needs more than one shard
PREPARED = "fineweb_prep.py"


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    input: PathsOrNames | None = None
    """Text files, folders or globs, separated by commas. They must hold more than 2 million tokens,
    about 8 MB of English."""
    workers: SmallCount | None = None
    """Processes of fineweb_prep.py, and threads of tiktoken. Default: one for each core."""
    repetitions: Count = 3
    """Turns of each side."""
    out: PathOrName = "benchmarks/results"
    """Folder for tokenizing.json and tokenizing.md."""


def documents(spec: str) -> list[str]:
    """The files' text, cut after the first line end that follows each DOCUMENT characters. Pieces
    without any text are dropped."""
    from text.corpus import TextFiles
    from text.files import find_files

    texts: list[str] = []
    for text, _ in TextFiles(find_files(spec)).segments():
        begin = 0
        while begin < len(text):
            end = text.find("\n", begin + DOCUMENT) + 1 or len(text)
            texts.append(text[begin:end])
            begin = end
    return [text for text in texts if text.strip()]


def prepare(parquet: Path, workers: int) -> None:
    """Make shards from a parquet file with fineweb_prep.py. Raises UserError with its reason if it
    fails."""
    script = Path(__file__).resolve().parent.parent / "fineweb_prep.py"
    with tempfile.TemporaryDirectory() as folder:
        files = ["--input", str(parquet), "--out", f"{folder}/shards"]
        words = [*files, "--workers", str(workers), "--shard-tokens", str(SHARD_TOKENS)]
        command = [sys.executable, str(script), *words]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        reason = last_error(done.stderr, done.returncode).removeprefix("error: ")
        raise UserError(f"{PREPARED} failed: {reason}")


def measure(options: Options, device: str) -> Cases:
    """Yields the seconds of the turns. Raises UserError for too little text."""
    import pyarrow
    import tiktoken
    from pyarrow import parquet

    from base.machine import cores
    from text.tokenizer import load_tokenizer

    load_tokenizer("gpt2")  # its error says what to do without a network, tiktoken's does not
    encoding, texts = tiktoken.get_encoding("gpt2"), documents(options.input or "")
    workers = options.workers or cores()
    ids = encoding.encode_ordinary_batch(texts, num_threads=workers)
    amounts = {"documents": len(texts), "tokens": sum(map(len, ids))}
    if amounts["tokens"] <= SHARD_TOKENS:
        raise UserError(
            f"--input {options.input} holds {amounts['tokens']:,} tokens; name files with more "
            f"than {SHARD_TOKENS:,}"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.parquet"
        parquet.write_table(pyarrow.table({"text": texts}), file)
        turns = {
            "tiktoken": timed(lambda: encoding.encode_ordinary_batch(texts, num_threads=workers)),
            PREPARED: timed(lambda: prepare(file, workers)),
        }
        yield (
            {"workers": workers} | amounts,
            {"seconds": alternate(turns, range(options.repetitions))},
        )


def report(record: dict[str, Any]) -> str:
    """The table of tokens per second, as Markdown."""
    return f"{PREPARED} beside tiktoken alone. Speed x: over tiktoken's.\n\n" + race_table(
        record["cases"], ("documents", "workers"), "tokens/s", "tokens"
    )


def main() -> None:
    """Measure, write the result files and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if not options.input:
        raise UserError("--input is missing; name text files, for example --input corpus.txt")
    run_cases(options, "tokenizing", "cpu", measure, report)


if __name__ == "__main__":
    entry_point(main)
