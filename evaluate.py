"""Evaluates a checkpoint: loss on any data, HellaSwag and LAMBADA.

python evaluate.py CHECKPOINT [--data WHAT] [--hellaswag FILE] [--lambada FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from base.cli import entry_point, parse
from base.files import writable_file
from base.sources import names_of, specs_of
from config import Count, PathOrName, PathsOrNames, Positional, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from dataset import TokenDataset
    from decoding.benchmarks import Benchmark
    from decoding.scoring import Score, Span
    from model import GPT
    from text.overlap import Overlap

Figures = dict[str, Any]  # metrics by name, and `clean`, the counts of clean and shared rows
Result = TypeVar("Result")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score the model of CHECKPOINT on one or more of --data, --hellaswag and --lambada."""

    checkpoint: Annotated[PathOrName, Positional("CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id."""

    data: PathsOrNames | None = None
    """Data for loss, perplexity and bits per byte: token shards (those named val, if there are
    any), text, a hub dataset or stdlib. A run's "A=0.7 B=0.3", as one word, gives each source's."""
    hellaswag: PathOrName | None = None
    """JSONL file for HellaSwag's accuracy, or hub for the hub's validation rows."""
    lambada: PathOrName | None = None
    """JSONL file for LAMBADA's last-word accuracy and perplexity, or hub for the hub's test
    rows."""
    train_data: PathsOrNames | None = None
    """Training data of the model, in any form of --data but shards. Each score is shown again for
    the rows that share no 13 words in a row with it. Default: the run's own --data, if its files
    are unchanged."""
    limit: Count | None = None
    """Number of first rows of --hellaswag and --lambada to score. Default: all."""
    seq_len: Count | None = None
    """Tokens in a window of --data. Default: the model's block_size."""
    batch_size: Count | None = None
    """Windows in a forward pass. Rows of the benchmarks fill as many tokens. Default: 32 on CUDA, 4
    elsewhere."""
    text_column: str = "text"
    """Column that holds the text in csv, tsv, jsonl and parquet files."""
    cache: PathOrName = "data/cache"
    """Folder for tokenized text."""
    tokenizer: PathOrName | None = None
    """gpt2, a folder, a tokenizer.json, or nanoGPT's meta.pkl. Default: the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights."""
    json: PathOrName | None = None
    """Also write the figures to this file. - prints JSON instead of the table."""


# ---- loss on a corpus


def evaluate_data(
    model: GPT,
    dataset: TokenDataset,
    n_bytes: int | None,
    seq_len: int,
    batch_size: int,
    eot: int | None = None,
    overlap: Overlap | None = None,
) -> Figures:
    """Loss (nats per token), perplexity and bits per byte. Every token but the first is predicted
    once.

    Windows of seq_len tokens do not overlap, so a prediction sees at most seq_len tokens. The last
    window may be shorter. n_bytes: length of the text in bytes, None if unknown. overlap: that of
    the documents, each of which begins with `eot`. Raises UserError for a corpus of fewer than two
    tokens.
    """
    import torch

    from kernels.linear_cross_entropy import IGNORE
    from text.overlap import with_clean

    tokens = dataset.n_tokens - 1
    if tokens < 1:
        raise UserError("--data holds a single token, so there is nothing to predict; give more")
    began, nll, shared_nll, shared_tokens, document = time.perf_counter(), 0.0, 0.0, 0, 0
    device = model.head_weight.device
    shared = None if overlap is None else torch.from_numpy(overlap.shared)
    with torch.inference_mode(), progress("data", tokens) as advance:
        for windows in batches_of_windows(dataset, seq_len, batch_size):
            idx, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
            nll += float(model(idx, targets, reduction="sum"))
            advance(targets.numel())
            if shared is not None:
                documents = document + torch.eq(
                    windows[:, 1:], -1 if eot is None else eot
                ).flatten().cumsum(0)
                document = int(documents[-1])
                is_shared = shared[documents].view_as(windows[:, 1:]).to(device)
                if bool(is_shared.any()):
                    masked = targets.where(is_shared, IGNORE)
                    shared_nll += float(model(idx, masked, reduction="sum"))
                    shared_tokens += int(is_shared.sum())
    figures = _loss_figures(nll, tokens, n_bytes)
    if overlap is not None:
        others = [overlap.rows[i] for i in overlap.shared.nonzero()[0]]
        left = None if n_bytes is None else n_bytes - sum(len(text.encode()) for text in others)
        clean = _loss_figures(nll - shared_nll, tokens - shared_tokens, left)
        figures = with_clean(figures, clean) | {"clean": overlap.counts}
    return figures | {"seconds": time.perf_counter() - began}


def _loss_figures(nll: float, tokens: int, n_bytes: int | None) -> Figures:
    """The figures of a sum of nats. {} without tokens."""
    from decoding.scoring import bits_per_byte, perplexity

    if tokens < 1:
        return {}
    per_byte = {"bits_per_byte": bits_per_byte(nll, n_bytes), "bytes": n_bytes} if n_bytes else {}
    return {"loss": nll / tokens, "perplexity": perplexity(nll, tokens), **per_byte} | {
        "tokens": tokens
    }


def batches_of_windows(dataset: TokenDataset, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """Windows (B, T + 1) int64 over the whole corpus. T is seq_len, and the last window may be
    shorter."""
    import numpy as np
    import torch

    whole = dataset.n_windows(seq_len)
    for begin in range(0, whole, batch_size):
        ids = np.arange(begin, min(begin + batch_size, whole))
        yield torch.from_numpy(dataset.windows(ids, seq_len))
    tail = dataset.part(whole * seq_len, dataset.n_tokens, None)
    if tail.n_tokens > 1:
        yield torch.from_numpy(tail.windows(np.zeros(1, np.int64), tail.n_tokens - 1))


# ---- HellaSwag and LAMBADA


def evaluate_benchmark(
    model: GPT, benchmark: Benchmark, batch_tokens: int, training: Training | None = None
) -> Figures:
    """The figures of a benchmark. `training`: shows each figure again for the rows that share
    nothing with this data."""
    began = time.perf_counter()
    scores = score(model, benchmark.spans, batch_tokens, benchmark.name)
    results = benchmark.results(scores)
    return {
        **clean_scores(results, benchmark.figures, benchmark.texts, training),
        **benchmark.counts,
        "seconds": time.perf_counter() - began,
    }


def score(model: GPT, spans: Sequence[Span], batch_tokens: int, label: str) -> list[Score]:
    """The score of each span's continuation, in order. Spans of similar length share a batch,
    padded at the right."""
    import torch

    from decoding.scoring import group_by_length, score_batch

    scores: dict[int, Score] = {}
    with torch.inference_mode(), progress(label, len(spans)) as advance:
        for chosen in group_by_length([len(span.ids) for span in spans], batch_tokens):
            batch = [spans[i] for i in chosen]
            scores |= zip(chosen, score_batch(model, batch), strict=True)
            advance(len(batch))
    return [scores[i] for i in range(len(spans))]


def clean_scores(
    results: Sequence[Result],
    figures: Callable[[Sequence[Result]], Figures],
    texts: Sequence[str],
    training: Training | None,
) -> Figures:
    """The figures of all rows' results, and beside each that of the rows whose texts share no
    n-gram with the training data."""
    from text.overlap import with_clean

    if training is None:
        return figures(results)
    overlap = training.overlap(texts)
    clean = [result for result, no in zip(results, overlap.shared, strict=True) if not no]
    found = with_clean(figures(results), figures(clean) if clean else {})
    return found | {"clean": overlap.counts}


# ---- clean scores


@dataclass(frozen=True)
class Training:
    """The training data of a model."""

    spec: str
    column: str

    def overlap(self, rows: Sequence[str]) -> Overlap:
        """Which rows share an n-gram with the training data."""
        from text.overlap import overlap, texts_of

        return overlap(rows, texts_of(self.spec, self.column))


def find_training(config: EvaluateConfig, where: Path) -> Training | str:
    """The training data of --train-data or of the run that wrote the checkpoint `where`, or why it
    is not known."""
    from storage.checkpoint import RECORD
    from text.files import files_of, files_sha256

    if config.train_data:
        files_of(config.train_data)
        return Training(config.train_data, config.text_column)
    for folder in (where, where.parent, where.parent.parent):
        try:
            known = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("data_sha256")
            options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, AttributeError):
            continue
        data = options.get("data")
        if not known:
            return f"{folder} names no training files with their hash"
        if files_sha256(data) != known:
            return f"the training data {data} of {folder} is not there or has changed"
        return Training(data, options.get("text_column") or "text")
    return f"{where} does not belong to a run that names its training data"


# ---- the command


def say(text: str) -> None:
    """Report progress on stderr, so that stdout has only the figures."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int) -> Generator[Callable[[int], None]]:
    """A progress bar with the time left, on a terminal only. Yields a function that advances it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def evaluate(config: EvaluateConfig) -> dict[str, Figures]:
    """The figures of each benchmark: data, hellaswag, lambada. Raises UserError for options or
    files that cannot be used."""
    import torch

    from decoding.benchmarks import BENCHMARKS, read_rows
    from decoding.loading import check_known, open_tokenizer, open_weights, tokenizer_folder
    from engine import processes
    from engine.data import check_files, open_whole
    from engine.precision import set_products
    from storage.checkpoint import locate
    from text.tokenizer_files import has_tokenizer

    # Rows are read before the model, so that their errors appear at once.
    if config.data:
        check_files(config.data)
    benchmarks = [
        (kind, read_rows(kind, f"--{kind.name}", where, config.limit))
        for kind in BENCHMARKS
        if (where := getattr(config, kind.name))
    ]
    device = processes.start(config.device).device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_products("fp32", device)
    where = locate(config.checkpoint)
    model = open_weights(where, device, dtype)
    # Token shards can be scored without a tokenizer.
    needed = bool(config.tokenizer or benchmarks or has_tokenizer(tokenizer_folder(where)))
    tokenizer = open_tokenizer(where, config.tokenizer, model) if needed else None
    batch_size = config.batch_size or (32 if device.type == "cuda" else 4)
    seq_len = config.seq_len or model.config.block_size
    if seq_len > model.config.block_size:
        raise UserError(
            f"--seq-len {seq_len} is longer than the model's block_size {model.config.block_size}; "
            "use a shorter one"
        )
    found = find_training(config, Path(where))
    training = found if isinstance(found, Training) else None
    if isinstance(found, str):
        say(f"no clean scores: {found}; name it with --train-data FILE")
    figures: dict[str, Figures] = {}
    sources = specs_of(config.data) if config.data else []
    for name, source in zip(names_of(sources), sources, strict=True):
        one = dataclasses.replace(config, data=source.spec)
        dataset = open_whole(source.spec, tokenizer, config.text_column, Path(config.cache), say)
        if tokenizer is None and (dataset.vocab_size or 0) > model.config.vocab_size:
            raise UserError(
                f"--data {source.spec} has {dataset.vocab_size:,} token ids, but the model of "
                f"{config.checkpoint} has only {model.config.vocab_size:,}; give shards that its "
                "tokenizer made"
            )
        if tokenizer and tokenizer.eot >= model.config.vocab_size:
            for windows in batches_of_windows(dataset, 1 << 16, 1):
                ids = windows.unique().tolist()
                check_known(tokenizer, model.config.vocab_size, ids, f"--data {source.spec}")
        eot = tokenizer.eot if tokenizer else None
        overlap = overlap_of_documents(one, dataset, training, eot)
        figures["data" if len(sources) == 1 else f"data {name}"] = evaluate_data(
            model, dataset, dataset.n_bytes, seq_len, batch_size, eot, overlap
        )
    batch_tokens = batch_size * model.config.block_size
    for kind, rows in benchmarks:
        assert tokenizer  # opened, because it is needed
        benchmark = kind(tokenizer, rows, model.config.block_size)
        spans = itertools.chain(*(span.ids for span in benchmark.spans))
        check_known(tokenizer, model.config.vocab_size, spans, f"--{kind.name}")
        figures[kind.name] = evaluate_benchmark(model, benchmark, batch_tokens, training)
    return figures


def overlap_of_documents(
    config: EvaluateConfig, dataset: TokenDataset, training: Training | None, eot: int | None
) -> Overlap | None:
    """The overlap of the documents of --data. None, with a line that says why, if it is unknown."""
    from text.corpus import open_text
    from text.overlap import documents

    if training is None or config.data is None:
        return None
    if not all(
        shard.path.parent.parent == Path(config.cache).absolute() for shard in dataset.shards
    ):
        say(f"no clean score of --data {config.data}: token shards hold no text; give the text")
        return None
    source = open_text(config.data, config.text_column, lambda line: None)
    texts = ["".join(pieces) for pieces in documents(source)]
    return training.overlap([text for text in texts if text.strip()])


def show(figures: dict[str, Figures]) -> None:
    """Print one line per figure."""
    from text.overlap import summary

    for benchmark, values in figures.items():
        print(benchmark)
        for name, value in values.items():
            if name == "clean":
                print(f"  {name:<18}{summary(value)}")
                continue
            print(f"  {name:<18}{f'{value:,}' if isinstance(value, int) else f'{value:,.4f}':>16}")


def main() -> None:
    """Run the command."""
    config = parse(EvaluateConfig, sys.argv[1:])
    if not config.checkpoint:
        raise UserError("no checkpoint is named; type python evaluate.py CHECKPOINT --data WHAT")
    if not (config.data or config.hellaswag or config.lambada):
        raise UserError(
            "nothing to evaluate on; give --data WHAT, --hellaswag FILE or --lambada FILE"
        )
    if config.json and config.json != "-":
        read = [where for where in (config.data, config.hellaswag, config.lambada) if where]
        read += [config.train_data] if config.train_data else []
        writable_file("--json", config.json, read)
    figures = evaluate(config)
    finite = {
        name: {k: v if isinstance(v, dict) or math.isfinite(v) else None for k, v in values.items()}
        for name, values in figures.items()
    }
    about = {"config": dataclasses.asdict(config), "eval_precision": config.precision}
    record = json.dumps(about | finite, indent=2)
    if config.json == "-":
        print(record)
        return
    if config.json:
        Path(config.json).write_text(record + "\n", encoding="utf-8")
    show(figures)


if __name__ == "__main__":
    entry_point(main)
