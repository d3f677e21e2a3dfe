"""Compare a classifier's step with transformers and peft, and measure what padding costs:

python -m benchmarks.classifying [--quick]

Steps: the sentiment task under step.TrainStep beside GPT2ForSequenceClassification, which peft
wraps for LoRA. Both start from the same weights and read the same padded rows. benchmarks/steps.py
compares them: two steps without dropout must agree, and the timed steps have dropout.

Padding: only this engine's step, on the same rows in batches that are made in different ways.

The rows of both parts are random letters, one token each, because the choice of tokens does not
change the time. --data reads real rows for the second part.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from adapters.options import Method
from base.cli import entry_point, parse
from base.console import outlive
from benchmarks.contenders import (
    HUGGING_FACE,
    RECIPE,
    SEED,
    Engine,
    device_of,
    silence_transformers,
    step_of,
)
from benchmarks.harness import OURS, Results, Turns, race, race_table
from benchmarks.machine import facts
from benchmarks.steps import Case, Shape, Step, Trainer, compare, figure_columns, trainer_column
from benchmarks.table import Column, table
from config import (
    CountOrNone,
    PathOrName,
    PathsOrNames,
    Positive,
    Probability,
    Resolved,
    known_names,
    resolve_steps,
    resolved,
)

if TYPE_CHECKING:
    import torch

    from engine.loader import StepBatches
    from finetune.sentiment import SentimentConfig

SHAPES = {
    "micro": Shape(2, 2, 64, 300, 8, 16),
    "10M": Shape(6, 6, 384, 8192, 16, 64),
    "124M": Shape(12, 12, 768, 50257, 16, 64),
}
CONTEXT = 256  # block_size of every shape
LABELS = tuple("01234")
# The LoRA has rank 8 on both attention projections.
METHODS: tuple[Method, ...] = ("full", "lora", "last-layer")
THEIRS, KEPT = "transformers", "transformers + our allocator"
TURNS = 3, 30  # least and most
PADDING_PARTS = 3  # the padding gets as much time as this many contenders
# Random rows have lengths like those of SST-5 in a BPE of 8,192 tokens: mean and standard deviation
# of the logarithm, then the limits.
LOG_LENGTH, SHORTEST, LONGEST = (3.2, 0.57), 2, 97
DRAWN_ROWS = 2048
# Ways to make batches, besides this engine's. transformers' Trainer uses the second by default and
# the third as an option.
SET, RANDOM, OWN = (
    "to the longest of all rows",
    "any rows, to their longest",
    "rows of like length, to their longest",
)


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    shape: str = "10M,124M"
    """Shapes, comma-separated: micro, 10M, 124M. The padding is measured at the first."""
    precision: str | None = None
    """Precisions, comma-separated: fp32, tf32, bf16. Default: fp32, and bf16 if the device has it
    natively."""
    method: str = ",".join(METHODS)
    """Methods, comma-separated: full, lora, last-layer. Empty: measure only the padding."""
    against: str = f"{THEIRS},{KEPT}"
    """Contenders, comma-separated: transformers (with peft for LoRA), transformers + our
    allocator."""
    dropout: Probability = 0.1
    """Dropout of the timed steps, the same on both sides."""
    steps: CountOrNone = 96
    """Steps in a round of the padding part; 0 skips that part."""
    data: PathsOrNames | None = None
    """Rows for the padding part, in any form that finetune.sentiment reads. Default: random rows,
    with lengths like SST's."""
    tokenizer: PathOrName = "gpt2"
    """Tokenizer of --data: gpt2, a folder, or a tokenizer.json."""
    minutes: Positive = 40
    """Time for everything. Each part takes turns for its share of it, and at least three."""
    quick: bool = False
    """A tiny shape and few turns, to check that everything works."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on."""
    json: PathOrName | None = None
    """Write the figures to this file, and the tables to an .md file beside it."""


@dataclass(frozen=True)
class Fit(Case):
    """A step that both sides make: one method on the rows in the folder `weights`."""

    method: Method = "full"

    @property
    def key(self) -> dict[str, Any]:
        """The fields that identify this case's rows in a result file, with the method."""
        return super().key | {"method": self.method}

    @property
    def amount(self) -> int:
        """Rows of an optimizer step."""
        return self.shape.rows

    def batch(self) -> dict[str, torch.Tensor]:
        """The batch that `prepare` saved: idx (B, T), labels (B,) and lengths (B,)."""
        from safetensors.torch import load_file

        return load_file(f"{self.weights}/batch.safetensors")


# --- weights and rows


def draw_rows(file: Path, lengths: np.ndarray, seed: int) -> None:
    """Write a JSONL file with one row of random letters per length. The labels repeat in order."""
    draw = np.random.default_rng(seed)
    texts = ("".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in lengths)
    rows = (
        json.dumps({"text": text, "label": LABELS[i % len(LABELS)]}) for i, text in enumerate(texts)
    )
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def prepare(shape: Shape, folder: str) -> None:
    """Write a classifier with random weights in the hub's layout, a LoRA for it in PEFT's layout,
    random rows, and a batch of them."""
    import torch
    from safetensors.torch import save_file

    from adapters import peft
    from model import GPT
    from text.tokenizer_training import train_bpe

    path = Path(folder)
    torch.manual_seed(SEED)
    model = GPT(dataclasses.replace(shape.config, block_size=CONTEXT))
    tokenizer = train_bpe(["letters"], 257, path / "tokenizer")  # bytes and end of text
    score = 0.02 * torch.randn(len(LABELS), shape.n_embd)
    model.save_pretrained(path, tokenizer.eot, score, LABELS)
    tokenizer.save(path)
    # A batch like one from rows ordered by length: the shortest has three quarters of the padded
    # length.
    draw_rows(
        path / "train.jsonl",
        np.linspace(3 * shape.seq_len // 4, shape.seq_len, shape.rows, dtype=int),
        SEED,
    )
    draw_rows(path / "val.jsonl", np.full(len(LABELS), shape.seq_len), SEED + 1)
    tail = np.random.default_rng(SEED).lognormal(*LOG_LENGTH, DRAWN_ROWS)
    draw_rows(path / "tail.jsonl", tail.clip(SHORTEST, LONGEST).astype(int), SEED + 2)
    engine = engine_of(options_of(Fit("", shape, "fp32", "cpu", folder, method="lora")))
    peft.save_adapter(engine.model, path / "adapter", folder, engine.task.trunk.base_sha256, score)
    batch = engine.task.batch("train", engine.task.rows("train", 0).reshape(-1)).tensors
    save_file(
        {name: batch[name] for name in ("idx", "labels", "lengths")}, path / "batch.safetensors"
    )


def options_of(case: Fit, **more: Any) -> SentimentConfig:
    """The options of this engine's run for a case, and `more`. All rows of a step are in one
    micro-batch."""
    from finetune.sentiment import SentimentConfig

    rows, folder = case.shape.rows, case.weights
    known: dict[str, Any] = dict(
        init=folder,
        data=f"{folder}/train.jsonl",
        val_data=f"{folder}/val.jsonl",
        batch_size=rows,
        micro_batch=rows,
        steps=10**6,
        schedule="constant",
        warmup_steps=0,
        precision=case.precision,
        device=case.device,
        seed=SEED,
        method=case.method,
        dropout=case.dropout or 0.0,
        head_dropout=0.0,
        show_rows=0,
    )
    return SentimentConfig(**known | RECIPE | more)


# --- the two sides


def engine_of(cfg: SentimentConfig) -> Engine:
    """The sentiment task, set up as trainer.train does it."""
    from engine import processes
    from engine.plan import resolve_for_machine
    from finetune.sentiment import TASK
    from tasks.classification.task import Classification

    world = processes.start(cfg.device)
    cfg, choices = resolve_for_machine(cfg, world)
    task = Classification(TASK)
    found = task.setup(cfg, lambda text: None)
    assert found.length
    full = resolved(resolve_steps(cfg, *found.length), Resolved)
    whole = found.cost.loss is None
    return Engine(task, full, world, choices, whole, found.exact_evaluation)


def ours(case: Fit) -> Step:
    """This engine's step."""
    return engine_of(options_of(case)).on_first_batch(case.shape.rows)


def theirs(case: Fit) -> Step:
    """The step of GPT2ForSequenceClassification as users train it: an attention mask for the
    padding, fused AdamW, and autocast for bf16."""
    import torch
    from transformers import GPT2ForSequenceClassification

    silence_transformers()
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

    return step_of(case, model, [(batch["idx"].to(device), batch["labels"].to(device))], loss)


def with_lora(model: Any, folder: str) -> Any:
    """Wrap `model` in peft with the adapter in `folder`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses old names of transformers
        return PeftModel.from_pretrained(model, folder, is_trainable=True)


def trainers(method: Method) -> dict[str, Trainer]:
    """This engine and its contenders for a method, by name."""
    own = Trainer(ours, ("finetune.sentiment", "engine.plan", "engine.step"))
    more = ("peft",) if method == "lora" else ()
    other = Trainer(theirs, (HUGGING_FACE, "engine.precision", *more))
    return {OURS: own, THEIRS: other, KEPT: dataclasses.replace(other, kept=True)}


# --- padding


def batchings(task: Any, steps: int) -> dict[str, list[StepBatches]]:
    """The rows of an epoch's first `steps` batches, put into batches in each of the ways."""
    ordered = [
        task.rows("train", step).reshape(-1)
        for step in range(min(steps, task.order.steps_per_epoch))
    ]
    rows = np.random.default_rng(SEED).permutation(np.concatenate(ordered))
    drawn = [rows[i : i + task.cfg.batch_size] for i in range(0, len(rows), task.cfg.batch_size)]
    any_length = np.arange(1, longest_of(task) + 1)
    own = padded_to(task, ordered, task.buckets)
    return {
        SET: padded_to(task, ordered, any_length[-1:]),
        RANDOM: padded_to(task, drawn, any_length),
        OWN: padded_to(task, ordered, any_length),
        OURS: own,
    }


def padded_to(task: Any, batches: Sequence[np.ndarray], sizes: np.ndarray) -> list[StepBatches]:
    """Batches of row ids, each padded to the smallest of `sizes` that fits."""
    from engine.loader import StepBatches

    task.buckets = sizes
    made = [task.batch("train", ids) for ids in batches]
    return [StepBatches([b.tensors], b.weights, b.amounts, b.tensors) for b in made]


def measure_padding(
    options: Options, precision: Any, folder: str, turns: Turns, results: Results
) -> None:
    """Put the rows, the tokens and the seconds of each way of batching into `results`. A turn is a
    step on each batch."""
    engine = engine_of(options_of_padding(options, precision, folder))
    found = batchings(engine.task, options.steps)
    runs = {name: functools.partial(run_all, engine, of) for name, of in found.items()}
    amounts = {name: amounts_of(of) for name, of in found.items()}
    key = {
        "shape": options.shape.split(",")[0],
        "precision": engine.cfg.precision,
        "data": Path(options.data).name if options.data else "drawn, with lengths like SST's",
        "longest": longest_of(engine.task),
    }
    rows = amounts[OURS]["rows"]
    results.put(key, {"rows": rows, "amounts": amounts, "seconds": race(runs, turns)})


def options_of_padding(options: Options, precision: Any, folder: str) -> SentimentConfig:
    """The options of this engine's run for the padding part, on random rows or on --data."""
    shape = SHAPES[options.shape.split(",")[0]]
    case = Fit("", shape, precision, options.device, folder, dropout=options.dropout)
    if not options.data:
        return options_of(case, val_data=None, data=f"{folder}/tail.jsonl")
    return options_of(
        case,
        val_data=None,
        data=options.data,
        tokenizer=options.tokenizer,
        init="scratch",
        seq_len=CONTEXT,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
    )


def longest_of(task: Any) -> int:
    """Tokens in the longest row of the training and validation rows."""
    return int(max(task.train.lengths.max(), task.val.lengths.max()))


def amounts_of(batches: Sequence[StepBatches]) -> dict[str, Any]:
    """The total rows, tokens and padded tokens of all batches, and the padded lengths that
    occur."""
    total = {
        name: sum(data.amounts[name] for data in batches)
        for name in ("rows", "tokens", "padded_tokens")
    }
    return total | {"lengths": sorted({data.batches[0]["idx"].shape[1] for data in batches})}


def run_all(engine: Engine, batches: Sequence[StepBatches]) -> None:
    """Make a step on each batch, and wait for the device."""
    results = [engine(data) for data in batches]
    results[-1].loss.item()


# --- the report


def report(record: dict[str, Any]) -> str:
    """The tables of both parts, as Markdown."""
    padding = [row for row in record["cases"] if "amounts" in row]
    steps = [row for row in record["cases"] if "trainer" in row]
    texts = [f"Classifiers, dropout {record['options']['dropout']:g}."]
    if steps:
        columns: list[Column] = [
            ("shape", lambda row: f"{row['shape']}, {row['rows']} x {row['seq_len']}"),
            ("precision", lambda row: row["precision"]),
            ("method", lambda row: row["method"]),
            ("trainer", trainer_column),
            *figure_columns("rows/s", ",.1f"),
        ]
        texts += [
            "One optimizer step on the same padded rows, the shortest of three quarters of their "
            "length. Speed x and memory x:\nthis engine over the other, the median, least and most "
            "of turns side by side. Peak memory is that of a process\nwithout its code (on a GPU: "
            "of its allocations) in these steps. transformers: GPT2ForSequenceClassification,\n"
            "eager, with a mask of the padding, fused AdamW, bf16 by autocast. LoRA, with peft, of "
            "rank 8 on both products of attention.",
            table(columns, steps, ("precision", "method", "trainer")),
        ]
    if padding:
        (of,) = padding
        lengths = ", ".join(map(str, of["amounts"][OURS]["lengths"]))
        shares = ", ".join(
            f"{way} {1 - amounts['tokens'] / amounts['padded_tokens']:.0%}"
            for way, amounts in of["amounts"].items()
        )
        texts += [
            f"The same {of['rows']:,.0f} rows ({of['data']}, the longest of all {of['longest']} "
            f"tokens) in batches made in several ways: this engine's step on {of['shape']}, "
            f"{of['precision']}.\nIts own batches: rows of like length, padded to {lengths}. "
            f"Padding: {shares}.",
            race_table(padding, (), "rows/s", "rows", ",.1f"),
        ]
    return "\n\n".join(texts)


# --- the command


def cases_of(options: Options, device: str, native: str, folder: str) -> list[Fit]:
    """The cases that the options ask for. Raises UserError for an unknown name."""
    shapes = known_names("--shape", options.shape, list(SHAPES))
    methods = known_names("--method", options.method, METHODS)
    usual = "fp32" if native == "fp32" else f"fp32,{native}"
    precisions = known_names("--precision", options.precision or usual, ["fp32", "tf32", "bf16"])
    return [
        Fit(name, SHAPES[name], precision, device, f"{folder}/{name}", options.dropout, method)
        for name in shapes for precision in precisions for method in METHODS if method in methods
    ]  # fmt: skip


def measure(options: Options, results: Results) -> None:
    """Measure all cases and the padding, and put each result into `results`."""
    device, native = results.record["device"], results.record["native"]
    options = dataclasses.replace(options, device=device)
    known = known_names("--against", options.against, [THEIRS, KEPT])
    names = [name for name in known if name != KEPT or device == "cpu"]
    shapes = options.shape.split(",")
    with tempfile.TemporaryDirectory() as folder:
        cases = cases_of(options, device, native, folder)
        parts = len(cases) * (1 + len(names)) + PADDING_PARTS * bool(options.steps)
        turns = Turns(*((2, 3) if options.quick else TURNS), 60 * options.minutes / parts)
        for name in shapes:
            prepare(SHAPES[name], f"{folder}/{name}")
        for case in cases:
            found = trainers(case.method)
            others = {name: found[name] for name in names}
            compare(case, found[OURS], others, turns, results, {})
        if options.steps:
            turns = dataclasses.replace(turns, seconds=PADDING_PARTS * turns.seconds)
            measure_padding(options, native, f"{folder}/{shapes[0]}", turns, results)


def main() -> None:
    """Measure, write the result files after each case, and print the tables."""
    options = parse(Options, sys.argv[1:])
    outlive()
    if options.quick:
        options = dataclasses.replace(
            options, shape="micro", steps=min(options.steps, 8), minutes=0.1
        )
    path = Path(options.json) if options.json else None
    results = Results(path, facts(options.device), options, report)
    measure(options, results)
    print(results.text())


if __name__ == "__main__":
    entry_point(main)
