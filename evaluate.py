"""A checkpoint's figures: loss on any data, HellaSwag and LAMBADA.

python evaluate.py CHECKPOINT [--data WHAT] [--hellaswag FILE] [--lambada FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import Positional, arg

from cli import entry_point, parse
from config import Count, UserError, Where, Wheres

if TYPE_CHECKING:
    from torch import Tensor

    from dataset import TokenDataset
    from model import GPT
    from tokenizer import Tokenizer

HUB = {"hellaswag": ("Rowan/hellaswag", "validation"), "lambada": ("EleutherAI/lambada_openai", "test")}
LOGIT_ROWS = 512  # logits held at once: 100 MB in fp32 at GPT-2's vocabulary

Figures = dict[str, float]
Row = TypeVar("Row")


@dataclass
class EvaluateConfig:
    """Score the model of CHECKPOINT on one or more of --data, --hellaswag and --lambada."""

    checkpoint: Annotated[Positional[Where], arg(metavar="CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id."""

    data: Wheres | None = None
    """Loss, perplexity and bits per byte on token shards (those named val, if any are), text, a hub dataset or stdlib."""
    hellaswag: Where | None = None
    """Accuracy on this JSONL file, or on the hub's validation rows: hub."""
    lambada: Where | None = None
    """Last-word accuracy and perplexity on this JSONL file, or on the hub's test rows: hub."""
    limit: Count | None = None
    """Score only the first rows of --hellaswag and --lambada."""
    seq_len: Count | None = None
    """Tokens in a window of --data. Default: the model's block_size."""
    batch_size: Count | None = None
    """Windows in a forward pass; short rows share as many tokens. Default: 32 on CUDA, 4 elsewhere."""
    text_column: str = "text"
    """Column that holds the text in csv, tsv, jsonl and parquet files."""
    cache: Where = "data/cache"
    """Folder of tokenized text."""
    tokenizer: Where | None = None
    """gpt2, a folder, or a tokenizer.json. Default: the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights."""
    json: Where | None = None
    """Write the figures to this file too; - prints them in place of the table."""


# ---- a corpus


def evaluate_data(model: GPT, dataset: TokenDataset, n_bytes: int, seq_len: int, batch_size: int) -> Figures:
    """Loss (nats a token), perplexity and bits per byte of all tokens but the first, each predicted once.

    Windows of seq_len tokens do not overlap, so a token sees at most seq_len - 1 others before it; the last one is
    as long as what is left. `n_bytes`: of the text. Raises UserError for a corpus of fewer than two tokens.
    """
    import torch

    from metrics import bits_per_byte, perplexity

    tokens = dataset.n_tokens - 1
    if tokens < 1:
        raise UserError("--data holds a single token: there is nothing to predict")
    began, nll = time.perf_counter(), 0.0
    device = model.head_weight.device
    with torch.inference_mode(), progress("data", tokens) as advance:
        for windows in batches_of_windows(dataset, seq_len, batch_size):
            idx, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
            nll += float(model(idx, targets, reduction="sum"))
            advance(targets.numel())
    return {
        "loss": nll / tokens,
        "perplexity": perplexity(nll, tokens),
        "bits_per_byte": bits_per_byte(nll, n_bytes),
        "tokens": tokens,
        "bytes": n_bytes,
        "seconds": time.perf_counter() - began,
    }


def batches_of_windows(dataset: TokenDataset, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """Windows (B, T + 1) int64 over the whole corpus: T is seq_len, and less in the last one."""
    import numpy as np
    import torch

    whole = dataset.n_windows(seq_len)
    for begin in range(0, whole, batch_size):
        ids = np.arange(begin, min(begin + batch_size, whole))
        yield torch.from_numpy(dataset.windows(ids, seq_len))
    tail = dataset.part(whole * seq_len, dataset.n_tokens, None)
    if tail.n_tokens > 1:
        yield torch.from_numpy(tail.windows(np.zeros(1, np.int64), tail.n_tokens - 1))


# ---- rows of a context and what follows it


@dataclass(frozen=True)
class Span:
    """Token ids of a context and its continuation, which begins at `start` and is what counts."""

    ids: list[int]
    start: int


def make_span(tokenizer: Tokenizer, context: str, continuation: str, block_size: int) -> Span:
    """Encoded apart, as the continuation begins a word; the context loses its head where both exceed block_size."""
    before = tokenizer.encode(context) or [tokenizer.eot]
    after = tokenizer.encode(continuation)
    if not 0 < len(after) <= block_size:
        raise UserError(
            f"{continuation[:40]!r} has {len(after)} tokens, where 1 to block_size {block_size} can be scored"
        )
    ids = [*before, *after][-(block_size + 1) :]  # the last one is only a target
    return Span(ids, len(ids) - len(after))


@dataclass(frozen=True)
class Score:
    """Of a continuation: nats in all, its number of tokens, and whether each of them was the likeliest."""

    nll: float
    tokens: int
    greedy: bool


def score(model: GPT, spans: Sequence[Span], batch_tokens: int, label: str) -> list[Score]:
    """The continuation of each span, in order. Spans of like length go together, padded at the right."""
    import torch

    scores: dict[int, Score] = {}
    with torch.inference_mode(), progress(label, len(spans)) as advance:
        for chosen in group_by_length([len(span.ids) for span in spans], batch_tokens):
            batch = [spans[i] for i in chosen]
            scores |= zip(chosen, score_batch(model, batch), strict=True)
            advance(len(batch))
    return [scores[i] for i in range(len(spans))]


def group_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest first (what does not fit in memory fails at once), padded to at most batch_tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def score_batch(model: GPT, batch: Sequence[Span]) -> list[Score]:
    """Logits are computed at the continuations' positions alone."""
    import torch
    import torch.nn.functional as F

    device = model.head_weight.device
    idx = torch.zeros(len(batch), max(len(span.ids) for span in batch) - 1, dtype=torch.int64)
    for row, span in zip(idx, batch, strict=True):
        row[: len(span.ids) - 1] = torch.tensor(span.ids[:-1])
    places = [(i, t - 1) for i, span in enumerate(batch) for t in range(span.start, len(span.ids))]
    rows, columns = torch.tensor(places, device=device).unbind(1)
    targets = torch.tensor([id for span in batch for id in span.ids[span.start :]], device=device)
    x = model.hidden(idx.to(device))[rows, columns]  # (N, n_embd)
    losses, hits = [], []
    for part, target in zip(x.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = model.logits(part).float()
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    counts = [len(span.ids) - span.start for span in batch]
    each = zip(torch.cat(losses).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True)
    return [Score(float(loss.sum()), len(loss), bool(hit.all())) for loss, hit in each]


# ---- HellaSwag


HellaSwagRow = tuple[str, list[str], int]  # context, endings with the space before them, number of the right one


def hellaswag_row(row: dict[str, Any]) -> HellaSwagRow:
    """From the official file or one of only ctx, endings and label. Raises KeyError, TypeError or ValueError."""
    context = row["ctx"] if "ctx" in row else f"{row['ctx_a']} {row['ctx_b']}"
    endings, label = row["endings"], int(row["label"])
    if not isinstance(endings, list) or not 0 <= label < len(endings):
        raise ValueError("label names no ending")
    return context, [" " + ending for ending in endings], label


def evaluate_hellaswag(model: GPT, tokenizer: Tokenizer, rows: Sequence[HellaSwagRow], batch_tokens: int) -> Figures:
    """HellaSwag (Zellers et al. 2019): which ending is likeliest, per token (accuracy_norm) and in all (accuracy)."""
    began = time.perf_counter()
    block_size = model.config.block_size
    spans = [make_span(tokenizer, context, end, block_size) for context, endings, _ in rows for end in endings]
    scores = iter(score(model, spans, batch_tokens, "hellaswag"))
    norm = total = 0
    for _, endings, label in rows:
        of_row = [next(scores) for _ in endings]
        choices = range(len(endings))
        norm += label == min(choices, key=lambda i: of_row[i].nll / of_row[i].tokens)
        total += label == min(choices, key=lambda i: of_row[i].nll)
    return {
        "accuracy_norm": norm / len(rows),
        "accuracy": total / len(rows),
        "rows": len(rows),
        "seconds": time.perf_counter() - began,
    }


# ---- LAMBADA


LambadaRow = tuple[str, str]  # the text before its last space, and the last word with that space


def lambada_row(row: dict[str, Any]) -> LambadaRow:
    """Raises KeyError, AttributeError or ValueError for a foreign row."""
    context, space, word = row["text"].rstrip().rpartition(" ")
    if not space:
        raise ValueError("the text has a single word")
    return context, space + word


def evaluate_lambada(model: GPT, tokenizer: Tokenizer, rows: Sequence[LambadaRow], batch_tokens: int) -> Figures:
    """LAMBADA (Paperno et al. 2016): the last word is right where each of its tokens is the likeliest.

    `perplexity` is a word's, as GPT-2's paper reports it: exp of the mean over rows of the whole word's nats.
    """
    from metrics import perplexity

    began = time.perf_counter()
    spans = [make_span(tokenizer, context, word, model.config.block_size) for context, word in rows]
    scores = score(model, spans, batch_tokens, "lambada")
    nll = sum(s.nll for s in scores)
    return {
        "accuracy": sum(s.greedy for s in scores) / len(scores),
        "perplexity": perplexity(nll, len(scores)),
        "token_perplexity": perplexity(nll, sum(s.tokens for s in scores)),
        "rows": len(scores),
        "seconds": time.perf_counter() - began,
    }


# ---- rows from a file or the hub


def read_rows(option: str, where: str, parse_row: Callable[[dict[str, Any]], Row], limit: int | None) -> list[Row]:
    """Rows of a JSONL file, or the hub's of the benchmark that `option` names. Raises UserError for foreign ones."""
    rows = hub_rows(*HUB[option]) if where == "hub" else file_rows(Path(where), f"--{option} {where}")
    if not rows:
        raise UserError(f"--{option} {where} holds no rows")
    parsed = []
    for number, row in enumerate(rows[:limit], 1):
        try:
            parsed.append(parse_row(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"--{option} {where}: row {number} is not one of this benchmark: {error!r}") from None
    return parsed


def file_rows(path: Path, what: str) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}; give a JSONL file, or hub") from None
    except ValueError as error:
        raise UserError(f"{what} is not JSONL, one object a line: {error}") from None


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return list(datasets.load_dataset(name, split=split))
    except Exception as error:  # the hub's client raises many kinds: no network, no access
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the hub did not give {name}: {reason}; give a JSONL file") from None


# ---- the command


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(label: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar with the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def evaluate(config: EvaluateConfig) -> dict[str, Figures]:
    """Figures by benchmark: data, hellaswag, lambada."""
    import torch

    import distributed
    from checkpoint import locate
    from dataset import open_whole
    from decoding import open_model
    from precision import set_products

    # Rows are read before the model: what is wrong with them is said at once.
    limit = config.limit
    hellaswag = read_rows("hellaswag", config.hellaswag, hellaswag_row, limit) if config.hellaswag else []
    lambada = read_rows("lambada", config.lambada, lambada_row, limit) if config.lambada else []
    device = distributed.start(config.device).device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_products("fp32", device)
    model, tokenizer = open_model(locate(config.checkpoint), config.tokenizer, device, dtype)
    batch_size = config.batch_size or (32 if device.type == "cuda" else 4)
    seq_len = config.seq_len or model.config.block_size
    if seq_len > model.config.block_size:
        raise UserError(f"--seq-len {seq_len} is longer than the model's block_size {model.config.block_size}")
    figures: dict[str, Figures] = {}
    if config.data:
        dataset = open_whole(config.data, tokenizer, config.text_column, Path(config.cache), say)
        figures["data"] = evaluate_data(model, dataset, dataset.n_bytes or 0, seq_len, batch_size)
    batch_tokens = batch_size * model.config.block_size
    if hellaswag:
        figures["hellaswag"] = evaluate_hellaswag(model, tokenizer, hellaswag, batch_tokens)
    if lambada:
        figures["lambada"] = evaluate_lambada(model, tokenizer, lambada, batch_tokens)
    return figures


def show(figures: dict[str, Figures]) -> None:
    """One line a figure."""
    for benchmark, values in figures.items():
        print(benchmark)
        for name, value in values.items():
            print(f"  {name:<18}{f'{value:,}' if isinstance(value, int) else f'{value:,.4f}':>16}")


def main() -> None:
    config = parse(EvaluateConfig, sys.argv[1:])
    if not config.checkpoint:
        raise UserError("no checkpoint is named; type python evaluate.py CHECKPOINT --data WHAT")
    if not (config.data or config.hellaswag or config.lambada):
        raise UserError("nothing to evaluate on; give --data WHAT, --hellaswag FILE or --lambada FILE")
    if config.json and not Path(config.json).parent.is_dir():
        raise UserError(f"--json {config.json}: there is no folder {Path(config.json).parent}")
    figures = evaluate(config)
    finite = {name: {k: v if math.isfinite(v) else None for k, v in of.items()} for name, of in figures.items()}
    record = json.dumps({"config": dataclasses.asdict(config)} | finite, indent=2)
    if config.json == "-":
        print(record)
        return
    if config.json:
        Path(config.json).write_text(record + "\n", encoding="utf-8")
    show(figures)


if __name__ == "__main__":
    entry_point(main)
