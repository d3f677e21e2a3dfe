"""A classifier's step beside transformers and peft, and what padding costs:

python -m benchmarks.classifying [--quick]

Steps: the sentiment task under step.TrainStep, and GPT2ForSequenceClassification (under LoRA
wrapped by peft), from the same weights on the same padded rows. Each side has a process and so a
peak of memory of its own; they take turns, A B A B. Nothing is timed before losses and gradient
norms of two steps without dropout agree.

Padding: this engine's step alone, on the same rows put into batches in other ways. The rows of both
are drawn: letters, each a token, since which tokens they are changes no time. --data reads real
ones for the second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adapters.options import Method
from base.cli import entry_point, parse
from base.console import bytes_text, outlive
from base.machine import resident_bytes
from benchmarks.contenders import OURS, RECIPE, SEED, Case, Shape, Step, device_of, trained
from benchmarks.machine import facts
from benchmarks.peers import (
    TURN_SECONDS,
    Failed,
    Opening,
    Pace,
    TakeTurn,
    Turn,
    alternate,
    check_agreement,
    opening,
    take_turn,
)
from benchmarks.table import markdown
from config import Count, Positive, Probability, Where, Wheres, known_names

if TYPE_CHECKING:
    import torch

    from engine.step import StepBatches, StepResult
    from finetune.sentiment import Sentiment, SentimentConfig

SHAPES = {
    "micro": Shape(2, 2, 64, 300, 8, 16),
    "10M": Shape(6, 6, 384, 8192, 16, 64),
    "124M": Shape(12, 12, 768, 50257, 16, 64),
}
CONTEXT = 256  # positions of each
LABELS = tuple("01234")
# LoRA of rank 8 on both products of attention
METHODS: tuple[Method, ...] = ("full", "lora", "last-layer")
THEIRS, KEPT = "transformers", "transformers + our allocator"
NEEDS = {
    OURS: ("finetune.sentiment", "engine.plan", "engine.step"),
    THEIRS: ("transformers.models.gpt2.modeling_gpt2", "engine.precision"),
}
TURNS = 3, 30  # at least and at most
PADDING_PARTS = 3  # of the time: as much as that of so many pairs of contenders
# Lengths of drawn rows as those of SST-5 in a BPE of 8,192 tokens: the mean and the spread of their
# logarithm, the ends.
LOG_LENGTH, SHORTEST, LONGEST = (3.2, 0.57), 2, 97
DRAWN_ROWS = 2048
TOGETHER = 8  # steps of a turn
# Ways to make batches, beside this engine's: transformers' Trainer does the second, and the third
# if it is told to.
SET, RANDOM, OWN = (
    "to the longest of all rows",
    "any rows, to their longest",
    "rows of like length, to their longest",
)


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    shape: str = "10M,124M"
    """Shapes, comma-separated: micro, 10M, 124M. The first is also that of the padding."""
    precision: str | None = None
    """Precisions, comma-separated: fp32, tf32, bf16. Default: fp32, and bf16 where it is native."""
    method: str = ",".join(METHODS)
    """Methods, comma-separated: full, lora, last-layer. Empty: only the padding."""
    against: str = f"{THEIRS},{KEPT}"
    """Contenders, comma-separated: transformers (under LoRA with peft), transformers + our
    allocator."""
    dropout: Probability = 0.1
    """Dropout of both sides' timed steps."""
    steps: Count = 96
    """Steps of a round of the padding; 0: leave it out."""
    data: Wheres | None = None
    """Rows for the padding, in any form that finetune.sentiment reads. Default: drawn, with lengths
    like SST's."""
    tokenizer: Where = "gpt2"
    """Their tokenizer: gpt2, a folder, or a tokenizer.json."""
    minutes: Positive = 40
    """Time for all of it; each part goes on with its turns for its share, at least three."""
    quick: bool = False
    """A tiny shape and few turns: does it work at all?"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    json: Where | None = None
    """Write the figures into this file, and the tables beside it as .md."""


@dataclass(frozen=True)
class Fit(Case):
    """What both sides do alike: a step of a method on the rows of `weights`."""

    method: Method = "full"
    dropout: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.name} {self.precision} {self.method}"

    def batch(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(f"{self.weights}/batch.safetensors")

    def micro_batches(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batch = self.batch()
        return [(batch["idx"].to(device), batch["labels"].to(device))]


# --- what they start from


def draw_rows(file: Path, lengths: np.ndarray, seed: int) -> None:
    """Rows of so many letters each, whose labels take turns."""
    draw = np.random.default_rng(seed)
    texts = ("".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in lengths)
    rows = (
        json.dumps({"text": text, "label": LABELS[i % len(LABELS)]}) for i, text in enumerate(texts)
    )
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def prepare(shape: Shape, folder: str) -> None:
    """Write a classifier of random weights in the hub's layout, LoRA for it in PEFT's, drawn rows
    and their batch."""
    import torch
    from safetensors.torch import save_file

    from adapters import peft
    from model import GPT
    from text.tokenizer_training import train_bpe

    path = Path(folder)
    torch.manual_seed(SEED)
    model = GPT(dataclasses.replace(shape.config, block_size=CONTEXT))
    tokenizer = train_bpe(["letters"], 257, path / "tokenizer")  # the bytes and an end
    score = 0.02 * torch.randn(len(LABELS), shape.n_embd)
    model.save_pretrained(path, tokenizer.eot, score, LABELS)
    tokenizer.save(path)
    # Rows as an order by length puts them together: the shortest has three quarters of what all are
    # padded to.
    draw_rows(
        path / "train.jsonl",
        np.linspace(3 * shape.seq_len // 4, shape.seq_len, shape.rows, dtype=int),
        SEED,
    )
    draw_rows(path / "val.jsonl", np.full(len(LABELS), shape.seq_len), SEED + 1)
    tail = np.random.default_rng(SEED).lognormal(*LOG_LENGTH, DRAWN_ROWS)
    draw_rows(path / "tail.jsonl", tail.clip(SHORTEST, LONGEST).astype(int), SEED + 2)
    engine = Engine(options_of(Fit("", shape, "fp32", "cpu", folder, "lora")))
    peft.save_adapter(engine.model, path / "adapter", folder, engine.task.trunk.base_sha256, score)
    batch = engine.task.batch("train", engine.task.rows("train", 0).reshape(-1)).tensors
    save_file(
        {name: batch[name] for name in ("idx", "labels", "lengths")}, path / "batch.safetensors"
    )


def options_of(case: Fit) -> SentimentConfig:
    from finetune.sentiment import SentimentConfig

    precision: Any = case.precision
    device: Any = case.device
    rows, folder = case.shape.rows, case.weights
    return SentimentConfig(
        init=folder,
        data=f"{folder}/train.jsonl",
        val_data=f"{folder}/val.jsonl",
        batch_size=rows,
        micro_batch=rows,
        steps=10**6,
        schedule="constant",
        warmup_steps=0,
        precision=precision,
        device=device,
        seed=SEED,
        method=case.method,
        dropout=case.dropout,
        head_dropout=0.0,
        show_rows=0,
        **RECIPE,
    )


# --- the two sides


class Engine:
    """step.TrainStep on finetune.sentiment, as trainer.train sets it up; the model is the same
    whenever it is built."""

    def __init__(self, cfg: SentimentConfig):
        import torch
        from torch.nn.attention import sdpa_kernel

        from config import Resolved, resolve_steps, resolved
        from engine import processes
        from engine.plan import settle
        from engine.step import TrainStep, compile_model
        from finetune.sentiment import Sentiment

        world = processes.start(cfg.device)
        cfg, choices = settle(cfg, world)
        self.task = Sentiment()
        facts = self.task.setup(cfg, lambda text: None)
        assert facts.length
        self.cfg = resolved(resolve_steps(cfg, *facts.length), Resolved)
        torch.manual_seed(cfg.seed)
        self.model: Any = self.task.build_model(self.cfg).to(world.device)
        if cfg.compile:
            compile_model(self.model, self.cfg, world, facts.cost.loss is None)
        self.step = TrainStep(self.task, self.model, self.cfg, world, facts.exact_evaluation)
        self.settings = functools.partial(sdpa_kernel, choices.backends, set_priority=True)
        gc.collect()
        gc.freeze()

    def __call__(self, data: StepBatches) -> StepResult:
        with self.settings():
            result = self.step(0, data)
        assert result is not None
        return result


def ours(case: Fit) -> Step:
    from engine.step import Loader

    engine = Engine(options_of(case))
    loader = Loader(engine.task, engine.step.world, case.shape.rows, steps=1)
    data = loader(0)
    loader.close()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        result = engine(data)
        return result.loss, result.grad_norm

    return run


def theirs(case: Fit) -> Step:
    """GPT2ForSequenceClassification as users train it: a mask of the padding, fused AdamW, autocast
    for bf16."""
    import torch
    from transformers import GPT2ForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), case.dropout)
    model: Any = GPT2ForSequenceClassification.from_pretrained(
        case.weights, attn_implementation="sdpa", dtype=torch.float32, **dropout
    )
    if case.method == "last-layer":
        model.transformer.requires_grad_(False)
    elif case.method == "lora":
        model = with_lora(model, f"{case.weights}/adapter")
    device = device_of(case)
    model.to(device).train()
    batch = case.batch()
    there = (torch.arange(batch["idx"].shape[1]) < batch["lengths"][:, None]).long().to(device)

    def loss(idx: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return model(input_ids=idx, attention_mask=there, labels=labels, use_cache=False).loss

    return trained(case, model, loss)


def with_lora(model: Any, folder: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that peft asks transformers by
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


# --- a side's process

_held: dict[str, Any] = {}  # in that process: its step, and the memory of its code


def begin(name: str, case: Fit) -> Opening:
    """Make two steps without dropout, and get ready those that will be timed."""
    import torch

    from engine import memory

    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    needs = (
        NEEDS[OURS]
        if name == OURS
        else (*NEEDS[THEIRS], *(("peft",) if case.method == "lora" else ()))
    )
    for module in ("torch._dynamo", *needs):  # torch's optimizers load that late
        importlib.import_module(module)
    if name == KEPT:
        memory.set_allocator(keep_freed=True)
    _held["code"] = resident_bytes() if case.device == "cpu" else 0
    build = ours if name == OURS else theirs
    _held["step"] = build(dataclasses.replace(case, dropout=0.0))
    start = opening(lambda untimed, steps: turn(case.device, untimed, steps))
    _held["step"] = None
    gc.unfreeze()
    gc.collect()
    _held["step"] = build(case)
    turn(case.device, 0, 1)
    forget_peak(case.device)
    return dataclasses.replace(start, seconds=turn(case.device, 0, 1).seconds)


def turn(device: str, untimed: int, steps: int) -> Turn:
    return take_turn(_held["step"], untimed, steps, device, _held["code"])


def forget_peak(device: str) -> None:
    """Let the peak of memory begin anew: what a step takes is asked for, and not what loading the
    weights took."""
    import torch

    from engine.memory import trim

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    trim()
    # not everywhere allowed: then the peak is that of the whole process
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@contextlib.contextmanager
def side(name: str, case: Fit) -> Generator[tuple[Opening, TakeTurn]]:
    """How a contender begins, and a function that has it make steps in its own process. Raises
    Failed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def ask(function: Any, *args: Any) -> Any:
            try:
                return pool.submit(function, *args).result()
            except BrokenProcessPool:
                raise Failed(name, "its process ended") from None
            except ModuleNotFoundError as error:
                raise Failed(name, f"not installed (no module {error.name})") from None

        yield ask(begin, name, case), lambda untimed, steps: ask(turn, case.device, untimed, steps)


# --- steps side by side


def compare(
    case: Fit, names: Sequence[str], pace: Callable[[], Pace]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each of `names` with the figures of both sides, or with the error that it met."""
    with side(OURS, case) as (start, own):
        for name in names:
            yield name, against(case, name, start, own, pace())


def against(case: Fit, name: str, start: Opening, own: TakeTurn, pace: Pace) -> dict[str, Any]:
    try:
        with side(name, case) as (its, other):
            check_agreement(case, name, start, its)
            steps = max(1, round(TURN_SECONDS / min(start.seconds, its.seconds)))
            turns = alternate(own, other, steps, pace)
    except Failed as error:
        if error.name == OURS:
            raise
        return {"error": error.reason}
    mine, theirs = zip(*turns, strict=True)
    return {
        OURS: figures(case, mine) | {"opening": dataclasses.asdict(start)},
        name: figures(case, theirs) | {"opening": dataclasses.asdict(its)},
        "speed_ratio": spread([b.seconds / a.seconds for a, b in turns]),
        "cpu_ratio": spread([b.cpu_seconds / a.cpu_seconds for a, b in turns]),
        "memory_ratio": mine[-1].memory / theirs[-1].memory,
    }


def figures(case: Fit, turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "seconds": [t.seconds for t in turns],
        "cpu_seconds": [t.cpu_seconds for t in turns],
        "rows_per_second": spread([case.shape.rows / t.seconds for t in turns]),
        "memory_bytes": max(t.memory for t in turns),
    }


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


# --- padding


def batchings(task: Sentiment, steps: int) -> dict[str, list[StepBatches]]:
    """The rows of the first `steps` batches of an epoch, put into batches in each of the ways."""
    ordered = [
        task.rows("train", step).reshape(-1) for step in range(min(steps, task.steps_per_epoch))
    ]
    rows = np.random.default_rng(SEED).permutation(np.concatenate(ordered))
    drawn = [rows[i : i + task.cfg.batch_size] for i in range(0, len(rows), task.cfg.batch_size)]
    any_length = np.arange(1, longest_of(task) + 1)
    return {
        OURS: padded_to(task, ordered, task.padded),
        SET: padded_to(task, ordered, any_length[-1:]),
        RANDOM: padded_to(task, drawn, any_length),
        OWN: padded_to(task, ordered, any_length),
    }


def padded_to(
    task: Sentiment, batches: Sequence[np.ndarray], sizes: np.ndarray
) -> list[StepBatches]:
    """Batches of row ids, each padded to the least of `sizes` that holds it."""
    from engine.step import StepBatches

    task.padded = sizes
    made = [task.batch("train", ids) for ids in batches]
    return [StepBatches([b.tensors], b.weights, b.amounts, b.tensors) for b in made]


def measure_padding(options: Options, precision: Any, folder: str, pace: Pace) -> dict[str, Any]:
    """Of each way its rows and tokens, and the seconds of each round: within it the ways take turns
    of a few steps."""
    engine = Engine(options_of_padding(options, precision, folder))
    found = batchings(engine.task, options.steps)
    for batches in found.values():
        run_all(engine, batches[:2])  # to warm up
    seconds: dict[str, list[float]] = {name: [] for name in found}
    until, rounds = time.monotonic() + pace.seconds, 0
    while rounds < pace.least or (rounds < pace.most and time.monotonic() < until):
        parts = {name: [] for name in found}
        for begin in range(0, len(found[SET]), TOGETHER):
            for name, batches in found.items():
                parts[name].append(run_all(engine, batches[begin : begin + TOGETHER]))
        for name in found:
            seconds[name].append(sum(parts[name]))
        rounds += 1
    return {
        "shape": options.shape.split(",")[0],
        "precision": engine.cfg.precision,
        "data": Path(options.data).name if options.data else "drawn, with lengths like SST's",
        "longest": longest_of(engine.task),
        "batchings": {
            name: amounts_of(batches) | {"seconds": seconds[name]}
            for name, batches in found.items()
        },
    }


def options_of_padding(options: Options, precision: Any, folder: str) -> SentimentConfig:
    shape = SHAPES[options.shape.split(",")[0]]
    cfg = options_of(Fit("", shape, precision, options.device, folder, dropout=options.dropout))
    if not options.data:
        return dataclasses.replace(cfg, val_data=None, data=f"{folder}/tail.jsonl")
    made = dict(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        init="scratch",
        seq_len=CONTEXT,
    )
    return dataclasses.replace(
        cfg, val_data=None, data=options.data, tokenizer=options.tokenizer, **made
    )


def longest_of(task: Sentiment) -> int:
    return int(max(task.train.lengths.max(), task.val.lengths.max()))


def amounts_of(batches: Sequence[StepBatches]) -> dict[str, Any]:
    """Rows, tokens and padded tokens of all, and what they are padded to."""
    total = {
        name: sum(data.amounts[name] for data in batches)
        for name in ("rows", "tokens", "padded_tokens")
    }
    return total | {"lengths": sorted({data.batches[0]["idx"].shape[1] for data in batches})}


def run_all(engine: Engine, batches: Sequence[StepBatches]) -> float:
    """Seconds of a step on each."""
    began = time.perf_counter()
    results = [engine(data) for data in batches]
    results[-1].loss.item()  # waits for the device
    return time.perf_counter() - began


# --- in words


def step_table(cases: Sequence[dict[str, Any]]) -> str:
    head = [
        "shape",
        "precision",
        "method",
        "trainer",
        "rows/s",
        "least-most",
        "peak memory",
        "ours x",
        "least-most",
    ]
    return markdown(
        [*head, "memory x"], (row for case in cases for row in step_rows(case)), words=range(4)
    )


def step_rows(case: dict[str, Any]) -> Generator[list[str]]:
    words = [
        f"{case['shape']}, {case['rows']} x {case['seq_len']}",
        case["precision"],
        case["method"],
    ]
    for name, of in case["against"].items():
        label = name.replace(THEIRS, f"{THEIRS} + peft") if case["method"] == "lora" else name
        if "error" in of:
            yield [*words, f"{label}: {of['error']:.60}", *[""] * 6]
            continue
        for trainer, ratios in ((OURS, [""] * 3), (name, ratio_cells(of))):
            rate, least, most = of[trainer]["rows_per_second"]
            memory = bytes_text(of[trainer]["memory_bytes"])
            shown = OURS if trainer == OURS else label
            yield [*words, shown, f"{rate:,.1f}", f"{least:,.1f}-{most:,.1f}", memory, *ratios]


def ratio_cells(of: dict[str, Any]) -> list[str]:
    ratio, least, most = of["speed_ratio"]
    return [f"{ratio:.2f}", f"{least:.2f}-{most:.2f}", f"{of['memory_ratio']:.2f}"]


def padding_table(found: dict[str, Any]) -> str:
    head = (
        "batches",
        "rows/s",
        "least-most",
        "tokens/s",
        "padded tokens/s",
        "padding",
        "ours x",
        "least-most",
    )
    first, rows = found["batchings"][OURS]["seconds"], []
    for name, of in found["batchings"].items():
        rate, least, most = spread([of["rows"] / s for s in of["seconds"]])
        tokens, padded = (
            f"{rate * of[key] / of['rows']:,.0f}" for key in ("tokens", "padded_tokens")
        )
        ratio, low, high = spread([b / a for a, b in zip(first, of["seconds"], strict=True)])
        cells = [
            f"{1 - of['tokens'] / of['padded_tokens']:.0%}",
            f"{ratio:.2f}",
            f"{low:.2f}-{high:.2f}",
        ]
        rows.append([name, f"{rate:,.1f}", f"{least:,.1f}-{most:,.1f}", tokens, padded, *cells])
    return markdown(head, rows, words=(0,))


def report(record: dict[str, Any]) -> str:
    hardware = record["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    versions = ", ".join(
        f"{name} {version}" for name, version in record["versions"].items() if version
    )
    dropout = record["dropout"]
    texts = [f"Classifiers on {where}, {record['date'][:10]}: {versions}."]
    if record["steps"]:
        texts += [
            "One optimizer step on the same padded rows, the shortest of three quarters of their "
            "length; dropout "
            f"{dropout:g}. ours x: rows\nper second of this engine over the other's, median, least "
            "and most of turns side by side. "
            "Peak memory is that of a process without\nits code (on a GPU: of its allocations) in "
            "these steps. transformers: "
            "GPT2ForSequenceClassification, eager, with a mask of the\npadding, fused AdamW, bf16 "
            "by autocast. "
            f"LoRA of rank 8 on both products of attention.",
            step_table(record["steps"]),
        ]
    if found := record["padding"]:
        of = found["batchings"][OURS]
        lengths = ", ".join(map(str, of["lengths"]))
        texts += [
            f"The same {of['rows']:,.0f} rows ({found['data']}; {of['tokens'] / of['rows']:.1f} "
            "tokens in the mean, the longest of "
            f"all {found['longest']}) in batches made in other ways:\nthis engine's step on "
            f"{found['shape']}, {found['precision']}, "
            f"dropout {dropout:g}. Its own batches: rows of like length, padded to {lengths}.\n"
            "ours x: rows per second of the first over these.",
            padding_table(found),
        ]
    return "\n\n".join(texts) + "\n"


def write(record: dict[str, Any], file: str | None) -> None:
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(report(record), encoding="utf-8")


# --- what is asked for


def cases_of(options: Options, device: str, native: str, folder: str) -> list[Fit]:
    """UserError for a name that there is not."""
    shapes = known_names("--shape", options.shape, list(SHAPES))
    methods = known_names("--method", options.method, METHODS)
    usual = "fp32" if native == "fp32" else f"fp32,{native}"
    precisions = known_names("--precision", options.precision or usual, ["fp32", "tf32", "bf16"])
    return [
        Fit(name, SHAPES[name], precision, device, f"{folder}/{name}", method, options.dropout)
        for name in shapes for precision in precisions for method in METHODS if method in methods
    ]  # fmt: skip


class Budget:
    """Seconds that are left, and in how many parts of equal size they are to be spent."""

    def __init__(self, seconds: float, parts: int, turns: tuple[int, int]):
        self.deadline, self.parts, self.turns = time.monotonic() + seconds, parts, turns

    def pace(self, parts: int = 1) -> Pace:
        """For so many of the parts."""
        share = max(0.0, self.deadline - time.monotonic()) * parts / self.parts
        self.parts -= parts
        return Pace(share, *self.turns)


def measure(options: Options, now: dict[str, Any]) -> dict[str, Any]:
    device = now["device"]
    options = dataclasses.replace(options, device=device)
    names = [
        name
        for name in known_names("--against", options.against, [THEIRS, KEPT])
        if name != KEPT or device == "cpu"
    ]
    steps: list[dict[str, Any]] = []
    record = now | {"dropout": options.dropout, "steps": steps, "padding": None}
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(options, device, now["native"], folder)
        parts = len(cases) * len(names) + PADDING_PARTS * bool(options.steps)
        budget = Budget(60 * options.minutes, parts, (2, 3) if options.quick else TURNS)
        for name in options.shape.split(","):
            prepare(SHAPES[name], f"{folder}/{name}")
        for case in cases:
            against: dict[str, Any] = {}
            shape = {"rows": case.shape.rows, "seq_len": case.shape.seq_len}
            steps.append(
                {
                    "shape": case.name,
                    **shape,
                    "precision": case.precision,
                    "method": case.method,
                    "against": against,
                }
            )
            for name, of in compare(case, names, budget.pace):
                against[name] = of
                print(f"{case.title}: {name}", file=sys.stderr, flush=True)
                write(record, options.json)  # after each: an interrupted run leaves what it has
        if options.steps:
            base = f"{folder}/{options.shape.split(',')[0]}"
            record["padding"] = measure_padding(
                options, now["native"], base, budget.pace(PADDING_PARTS)
            )
    return record


def main() -> None:
    options = parse(Options, sys.argv[1:])
    outlive()
    if options.quick:
        options = dataclasses.replace(
            options, shape="micro", steps=min(options.steps, 8), minutes=0.1
        )
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    record = measure(options, facts(options.device) | {"date": date})
    write(record, options.json)
    print(report(record))


if __name__ == "__main__":
    entry_point(main)
