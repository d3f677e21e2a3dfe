"""Evaluates a checkpoint: loss on any data, HellaSwag and LAMBADA.

python evaluate.py CHECKPOINT [--data WHAT] [--hellaswag FILE] [--lambada FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from base.cli import entry_point, parse
from base.files import writable_file
from config import Count, Positional, UserError, Where, Wheres

if TYPE_CHECKING:
    from torch import Tensor

    from dataset import TokenDataset
    from model import GPT
    from text.tokenizer import Tokenizer

HUB = {
    "hellaswag": ("Rowan/hellaswag", "validation"),
    "lambada": ("EleutherAI/lambada_openai", "test"),
}
NO_LABEL = ("", "-1")  # labels of HellaSwag's test rows
LOGIT_ROWS = 512  # positions whose logits are held at once: 100 MB in fp32 for GPT-2

Figures = dict[str, float]  # metrics by name
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score the model of CHECKPOINT on one or more of --data, --hellaswag and --lambada."""

    checkpoint: Annotated[Where, Positional("CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id."""

    data: Wheres | None = None
    """Data for loss, perplexity and bits per byte: token shards (those named val, if there are
    any), text, a hub dataset or stdlib."""
    hellaswag: Where | None = None
    """JSONL file for HellaSwag's accuracy, or hub for the hub's validation rows."""
    lambada: Where | None = None
    """JSONL file for LAMBADA's last-word accuracy and perplexity, or hub for the hub's test
    rows."""
    limit: Count | None = None
    """Number of first rows of --hellaswag and --lambada to score. Default: all."""
    seq_len: Count | None = None
    """Tokens in a window of --data. Default: the model's block_size."""
    batch_size: Count | None = None
    """Windows in a forward pass. Rows of the benchmarks fill as many tokens. Default: 32 on CUDA, 4
    elsewhere."""
    text_column: str = "text"
    """Column that holds the text in csv, tsv, jsonl and parquet files."""
    cache: Where = "data/cache"
    """Folder for tokenized text."""
    tokenizer: Where | None = None
    """gpt2, a folder, or a tokenizer.json. Default: the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the weights."""
    json: Where | None = None
    """Also write the figures to this file. - prints JSON instead of the table."""


# ---- loss on a corpus


def evaluate_data(
    model: GPT, dataset: TokenDataset, n_bytes: int | None, seq_len: int, batch_size: int
) -> Figures:
    """Loss (nats per token), perplexity and bits per byte. Every token but the first is predicted
    once.

    Windows of seq_len tokens do not overlap, so a prediction sees at most seq_len tokens. The last
    window may be shorter. n_bytes: length of the text in bytes, None if unknown. Raises UserError
    for a corpus of fewer than two tokens.
    """
    import torch

    from engine.pretraining import bits_per_byte, perplexity

    tokens = dataset.n_tokens - 1
    if tokens < 1:
        raise UserError("--data holds a single token, so there is nothing to predict; give more")
    began, nll = time.perf_counter(), 0.0
    device = model.head_weight.device
    with torch.inference_mode(), progress("data", tokens) as advance:
        for windows in batches_of_windows(dataset, seq_len, batch_size):
            idx, targets = windows[:, :-1].to(device), windows[:, 1:].to(device)
            nll += float(model(idx, targets, reduction="sum"))
            advance(targets.numel())
    per_byte = (
        {} if n_bytes is None else {"bits_per_byte": bits_per_byte(nll, n_bytes), "bytes": n_bytes}
    )
    return {
        "loss": nll / tokens,
        "perplexity": perplexity(nll, tokens),
        **per_byte,
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
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


# ---- scores of continuations


@dataclass(frozen=True)
class Span:
    """Token ids of a context and its continuation. Only the continuation, from `start`, is
    scored."""

    ids: tuple[int, ...]
    start: int


def make_span(tokenizer: Tokenizer, context: str, continuation: str, block_size: int) -> Span:
    """The token ids of a context and a continuation, which are encoded separately because the
    continuation begins a word.

    The beginning of the context is truncated if both exceed block_size. Raises UserError for a
    continuation that is empty or does not fit.
    """
    before = tokenizer.encode(context) or [tokenizer.eot]
    after = tokenizer.encode(continuation)
    if not 0 < len(after) <= block_size:
        raise UserError(
            f"{continuation[:40]!r} has {len(after)} tokens, but only 1 to block_size {block_size} "
            "can be scored; remove the row"
        )
    ids = (*before, *after)[-(block_size + 1) :]  # the last token is only a target
    return Span(ids, len(ids) - len(after))


def spaces_to_word(context: str, continuation: str) -> tuple[str, str]:
    """Both texts, with white space at the end of the context moved to the continuation, as in
    lm-evaluation-harness."""
    text = context.rstrip()
    return (text, context[len(text) :] + continuation) if text else (context, continuation)


@dataclass(frozen=True)
class Score:
    """The score of a continuation."""

    nll: float  # nats, summed over tokens
    tokens: int
    greedy: bool  # whether each token is the likeliest


def score(model: GPT, spans: Sequence[Span], batch_tokens: int, label: str) -> list[Score]:
    """The score of each span's continuation, in order. Spans of similar length share a batch,
    padded at the right."""
    import torch

    from tasks.order import group_by_length

    scores: dict[int, Score] = {}
    with torch.inference_mode(), progress(label, len(spans)) as advance:
        for chosen in group_by_length([len(span.ids) for span in spans], batch_tokens):
            batch = [spans[i] for i in chosen]
            scores |= zip(chosen, score_batch(model, batch), strict=True)
            advance(len(batch))
    return [scores[i] for i in range(len(spans))]


def score_batch(model: GPT, batch: Sequence[Span]) -> list[Score]:
    """The score of each span of a batch. Logits are only computed at the continuations'
    positions."""
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
    each = zip(
        torch.cat(losses).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True
    )
    return [Score(float(loss.sum()), len(loss), bool(hit.all())) for loss, hit in each]


# ---- HellaSwag


@dataclass(frozen=True)
class Choices:
    """A context and the endings to choose from, each without a leading space."""

    context: str
    endings: tuple[str, ...]


@dataclass(frozen=True)
class HellaSwagRow:
    """A row in two forms. They are equal for rows that only have ctx, endings and label."""

    plain: Choices  # the row's own text, which llm.c scores
    harness: Choices  # the text that lm-evaluation-harness makes of it
    label: int | None  # index of the right ending, None if unknown


def hellaswag_row(row: dict[str, Any]) -> HellaSwagRow:
    """A row of the official file, or of a file with only ctx, endings and label. Raises KeyError,
    TypeError or ValueError for any other row."""
    context = row["ctx"] if "ctx" in row else f"{row['ctx_a']} {row['ctx_b']}"
    endings = row["endings"]
    if (
        not isinstance(endings, list)
        or not endings
        or not all(isinstance(text, str) for text in [context, *endings])
    ):
        raise ValueError("ctx must be a text and endings a list of texts")
    plain = harness = Choices(context, tuple(endings))
    if all(isinstance(row.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        harness = Choices(_without_markup(query), tuple(map(_without_markup, endings)))
    if not all(plain.endings) or not all(harness.endings):
        raise ValueError("an ending is empty")
    label = str(row["label"]).strip()
    if label in NO_LABEL or row["label"] is None:
        return HellaSwagRow(plain, harness, None)
    if not 0 <= int(label) < len(endings):
        raise ValueError("label names no ending")
    return HellaSwagRow(plain, harness, int(label))


def _without_markup(text: str) -> str:
    """The text without WikiHow's markup ([title], [step], ...), as in lm-evaluation-harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def evaluate_hellaswag(
    model: GPT, tokenizer: Tokenizer, rows: Sequence[HellaSwagRow], batch_tokens: int
) -> Figures:
    """HellaSwag (Zellers et al. 2019): how often the right ending has the highest log-probability.

    acc, acc_norm and acc_bytes are those of lm-evaluation-harness, on its text: the log-probability
    of the ending, divided by 1, by its characters or by its bytes (without the leading space).
    acc_tokens is that of llm.c, on the row's own text: divided by the ending's tokens. The first of
    equal endings is chosen. Rows without a label are not scored.
    """
    began = time.perf_counter()
    known = [row for row in rows if row.label is not None]
    if not known:
        raise UserError("no row of --hellaswag has a label; give rows with labels")
    # Each text is scored once, so that equal endings get equal scores to the last bit.
    places: dict[Span, int] = {}

    def place(context: str, ending: str) -> int:
        return places.setdefault(
            make_span(tokenizer, context, ending, model.config.block_size), len(places)
        )

    spans_of_rows = [
        (
            [place(row.plain.context, " " + end) for end in row.plain.endings],
            [place(*spaces_to_word(row.harness.context, " " + end)) for end in row.harness.endings],
        )
        for row in known
    ]
    scores = score(model, list(places), batch_tokens, "hellaswag")
    right = dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_tokens"), 0)
    for row, (plain, harness) in zip(known, spans_of_rows, strict=True):
        nlls = [scores[n].nll for n in harness]
        divisors = {
            "acc": [1] * len(nlls),
            "acc_norm": [len(end) for end in row.harness.endings],
            "acc_bytes": [len(end.encode()) for end in row.harness.endings],
        }
        for name, each in divisors.items():
            per_unit = [nll / n for nll, n in zip(nlls, each, strict=True)]
            right[name] += row.label == _argmin(per_unit)
        per_token = [scores[n].nll / scores[n].tokens for n in plain]
        right["acc_tokens"] += row.label == _argmin(per_token)
    return {
        **{name: count / len(known) for name, count in right.items()},
        "rows": len(known),
        "rows_without_label": len(rows) - len(known),
        "seconds": time.perf_counter() - began,
    }


def _argmin(values: Sequence[float]) -> int:
    """The index of the smallest value, the first of equal ones."""
    return min(range(len(values)), key=values.__getitem__)


# ---- LAMBADA


LambadaRow = tuple[str, str]  # the text up to its last space, and the last word with that space


def lambada_row(row: dict[str, Any]) -> LambadaRow:
    """A row of LAMBADA. Raises KeyError, AttributeError or ValueError for any other row."""
    context, space, word = row["text"].rstrip().rpartition(" ")
    if not space:
        raise ValueError("the text has a single word")
    return context, space + word


def evaluate_lambada(
    model: GPT, tokenizer: Tokenizer, rows: Sequence[LambadaRow], batch_tokens: int
) -> Figures:
    """LAMBADA (Paperno et al. 2016): the last word counts as right if each of its tokens is the
    likeliest.

    "perplexity" is per word, as in GPT-2's paper: exp of the mean over rows of the word's nats.
    """
    from engine.pretraining import perplexity

    began = time.perf_counter()
    spans = [make_span(tokenizer, *spaces_to_word(*row), model.config.block_size) for row in rows]
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


def read_benchmark_rows(
    option: str, where: str, parse_row: Callable[[dict[str, Any]], Parsed], limit: int | None
) -> list[Parsed]:
    """The first `limit` rows of a file, or of the hub's dataset for the benchmark `option`. Raises
    UserError for rows of another kind."""
    rows = (
        hub_rows(*HUB[option]) if where == "hub" else file_rows(Path(where), f"--{option} {where}")
    )
    if not rows:
        raise UserError(f"--{option} {where} holds no rows")
    parsed = []
    for number, row in enumerate(rows[:limit], 1):
        try:
            parsed.append(parse_row(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"--{option} {where}: row {number} is not a row of this benchmark ({error!r}); "
                "give its file, or hub"
            ) from None
    return parsed


def file_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """All rows of a file. Raises UserError for a row that cannot be read, because a score without
    it could not be compared with others."""
    from text.corpus import records_of
    from text.readers import with_advice

    if not path.is_file():
        raise UserError(
            f"{what}: No such file; give a file of rows (.jsonl .json .csv .tsv .parquet), or hub"
        )
    # Read all rows first: damage of the file is reported before a row that suffers from it.
    records = list(records_of(path, ".jsonl"))
    for place, cells in records:
        if isinstance(cells, str):
            raise UserError(
                f"a score needs every row: {what} {place} {with_advice(cells, cells, path)}"
            )
    return [cells for _, cells in records if isinstance(cells, dict)]


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split of a hub dataset."""
    from text.corpus import HubDataset

    return [row for _, row in HubDataset(name, split=split).records() if isinstance(row, dict)]


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

    from decoding.loading import open_tokenizer, open_weights, tokenizer_folder
    from engine import processes
    from engine.data import check_files, open_whole
    from engine.precision import set_products
    from storage.checkpoint import locate
    from text.tokenizer_files import has_tokenizer

    # Rows are read before the model, so that their errors appear at once.
    if config.data:
        check_files(config.data)
    limit = config.limit
    hellaswag = (
        read_benchmark_rows("hellaswag", config.hellaswag, hellaswag_row, limit)
        if config.hellaswag
        else []
    )
    lambada = (
        read_benchmark_rows("lambada", config.lambada, lambada_row, limit) if config.lambada else []
    )
    device = processes.start(config.device).device
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    set_products("fp32", device)
    where = locate(config.checkpoint)
    model = open_weights(where, device, dtype)
    # Token shards can be scored without a tokenizer.
    needed = bool(
        config.tokenizer or hellaswag or lambada or has_tokenizer(tokenizer_folder(where))
    )
    tokenizer = open_tokenizer(where, config.tokenizer, model) if needed else None
    batch_size = config.batch_size or (32 if device.type == "cuda" else 4)
    seq_len = config.seq_len or model.config.block_size
    if seq_len > model.config.block_size:
        raise UserError(
            f"--seq-len {seq_len} is longer than the model's block_size {model.config.block_size}; "
            "use a shorter one"
        )
    figures: dict[str, Figures] = {}
    if config.data:
        dataset = open_whole(config.data, tokenizer, config.text_column, Path(config.cache), say)
        if tokenizer is None and (dataset.vocab_size or 0) > model.config.vocab_size:
            raise UserError(
                f"--data {config.data} has {dataset.vocab_size:,} token ids, but the model of "
                f"{config.checkpoint} has only {model.config.vocab_size:,}; give shards that its "
                "tokenizer made"
            )
        figures["data"] = evaluate_data(model, dataset, dataset.n_bytes, seq_len, batch_size)
    batch_tokens = batch_size * model.config.block_size
    if hellaswag and tokenizer:
        figures["hellaswag"] = evaluate_hellaswag(model, tokenizer, hellaswag, batch_tokens)
    if lambada and tokenizer:
        figures["lambada"] = evaluate_lambada(model, tokenizer, lambada, batch_tokens)
    return figures


def show(figures: dict[str, Figures]) -> None:
    """Print one line per figure."""
    for benchmark, values in figures.items():
        print(benchmark)
        for name, value in values.items():
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
        writable_file("--json", config.json, read)
    figures = evaluate(config)
    finite = {
        name: {k: v if math.isfinite(v) else None for k, v in values.items()}
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
