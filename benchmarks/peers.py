"""One optimizer step of this engine beside other trainers':  python -m benchmarks.peers [--quick] [--device cuda]

Every contender starts from the same weights and trains on the same tokens, in a process of its own, so that its
peak memory is its own. The processes take turns, A B A B, one step each: what else the machine does falls on all
alike. Nothing is timed before losses and gradient norms agree. The trade-off: all contenders are in memory at
once, so the largest shape that a machine can train is not the largest that it can compare.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from config import GPTConfig, TrainConfig, UserError, entry_point, nearest, parse, resolve

if TYPE_CHECKING:
    import torch

OURS = "this engine"
SEED = 1337
TURN_SECONDS = 0.5  # a turn has as many steps as fit in this, at least one
REPETITIONS = 3, 30  # turns of a contender: at least and at most
# Relative, of the first loss and gradient norm. fp32: sums in another order. bf16 has 8 bits, and the two round
# at other places (the residual stream, the logits).
TOLERANCE = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (1e-3, 2e-2)}
RECIPE: dict[str, Any] = dict(lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0)


@dataclass
class Options:
    """Options of the comparison."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    shape: str = "10M,124M"
    """Shapes, comma-separated: 10M, 124M, micro."""
    precision: str | None = None
    """Precisions, comma-separated. Default: bf16 where it is native, and fp32."""
    seconds: float = 70.0
    """Time for the repetitions of one shape in one precision."""
    quick: bool = False
    """A tiny shape and two repetitions: does it work at all?"""
    out: str = "benchmarks/results"
    """Folder for peers-DEVICE.json and peers-DEVICE.md."""


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int  # sequences in a batch
    seq_len: int


SHAPES = {
    "cpu": {
        "micro": Shape(2, 2, 64, 1000, 2, 32),
        "10M": Shape(6, 6, 384, 8192, 32, 256),
        "124M": Shape(12, 12, 768, 50257, 4, 512),
    },
    "cuda": {
        "micro": Shape(2, 2, 64, 1000, 2, 32),
        "10M": Shape(6, 6, 384, 8192, 128, 256),
        "124M": Shape(12, 12, 768, 50257, 32, 1024),
    },
}


@dataclass(frozen=True)
class Case:
    """What all contenders do alike."""

    name: str
    shape: Shape
    precision: str
    device: str
    weights: str  # folder in the hub's layout that everyone starts from

    @property
    def tokens(self) -> int:
        return self.shape.rows * self.shape.seq_len

    @property
    def title(self) -> str:
        return f"{self.name} {self.precision}"

    def tokens_drawn(self) -> torch.Tensor:
        """Random tokens (rows, seq_len) int64, the same for all."""
        import torch

        size = (self.shape.rows, self.shape.seq_len)
        return torch.randint(self.shape.vocab_size, size, generator=torch.Generator().manual_seed(SEED))


Step = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]  # one optimizer step: its loss and gradient norm


# --- the contenders, each a function that builds one


def train_config(case: Case) -> TrainConfig:
    shape, device = case.shape, case.device
    same: dict[str, Any] = dict(precision=case.precision, device=device, seed=SEED, **RECIPE)
    cfg = TrainConfig(
        seq_len=shape.seq_len, batch_tokens=case.tokens, micro_batch=shape.rows, steps=10**6, schedule="constant",
        warmup_steps=0, **same,
    )  # fmt: skip
    return resolve(cfg, device)


def ours(case: Case) -> Step:
    """step.TrainStep under the settings that trainer.train makes; only the tokens are made up."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    import distributed
    from kernels.linear_cross_entropy import IGNORE
    from memory import set_allocator
    from model import GPT, attention_backends
    from precision import DTYPES
    from step import Loader, TrainStep
    from task import Batch, LanguageModelling

    class RandomTokens(LanguageModelling):
        def rows(self, split: str, step: int) -> np.ndarray:
            return np.arange(case.shape.rows)[:, None]

        def collate(self, split: str, ids: np.ndarray) -> Batch:
            idx = case.tokens_drawn()[ids]
            # The last token's successor is unknown, as in transformers, which shifts its labels itself.
            return {"idx": idx, "targets": F.pad(idx[:, 1:], (0, 1), value=IGNORE)}

    if case.device == "cpu":
        set_allocator(keep_freed=True)
    world = distributed.start(case.device)
    task, cfg = RandomTokens(), train_config(case)
    task.cfg = cfg
    model = GPT.from_pretrained(case.weights).to(world.device)
    if cfg.compile:
        model.compile()
    step = TrainStep(task, model, cfg, world)
    assert isinstance(cfg.micro_batch, int)
    data = Loader(task, world, cfg.micro_batch, steps=1)(0)
    backends = attention_backends(world.device, DTYPES.get(case.precision, torch.float32))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with sdpa_kernel(backends, set_priority=True):
            result = step(0, data)
        assert result is not None
        return result.loss, result.grad_norm

    return run


def transformers(case: Case, compiled: bool = False) -> Step:
    """transformers' GPT-2 and torch's fused AdamW, as its documentation trains them."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    import distributed
    from precision import autocast

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = distributed.start(case.device).device
    model: Any = GPT2LMHeadModel.from_pretrained(case.weights, attn_implementation="sdpa", dtype=torch.float32)
    model = model.to(device).train()
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": RECIPE["weight_decay"]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (RECIPE["beta1"], RECIPE["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=RECIPE["lr"], betas=betas, eps=1e-8, fused=True)
    idx = case.tokens_drawn().to(device)
    forward = torch.compile(model) if compiled else model

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(case.precision, device):
            loss = forward(input_ids=idx, labels=idx, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, RECIPE["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return run


def transformers_compiled(case: Case) -> Step:
    return transformers(case, compiled=True)


def transformers_kept(case: Case) -> Step:
    """With this engine's allocator setting, so that what is left of the difference is the code's."""
    from memory import set_allocator

    set_allocator(keep_freed=True)
    return transformers(case)


HUGGING_FACE = "transformers.models.gpt2.modeling_gpt2"


@dataclass(frozen=True)
class Contender:
    build: Callable[[Case], Step]
    imports: tuple[str, ...]  # what it needs of code; its memory is counted from there on
    devices: tuple[str, ...] = ("cpu", "cuda")


CONTENDERS = {
    OURS: Contender(ours, ("step",)),
    "transformers": Contender(transformers, (HUGGING_FACE, "step")),
    "transformers, our allocator": Contender(transformers_kept, (HUGGING_FACE, "step"), devices=("cpu",)),
    "transformers, compiled": Contender(transformers_compiled, (HUGGING_FACE, "step"), devices=("cuda",)),
}


# --- the process of a contender


@dataclass
class Turn:
    """What a contender answers to being asked for some steps."""

    seconds: float  # of a step
    cpu_seconds: float  # of a step, over all threads: less moved by what else the machine does
    loss: float  # of the last step
    grad_norm: float
    memory: int  # peak so far, in bytes, without the code


def serve(pipe: Connection, name: str, case: Case) -> None:
    """Build a contender, then answer each number of steps with a Turn; an exception is the last answer."""
    try:
        for module in ("torch._dynamo", *CONTENDERS[name].imports):  # torch's optimizers load the former late
            importlib.import_module(module)
        code = _code_bytes(case.device)
        step = CONTENDERS[name].build(case)
        while (steps := pipe.recv()) is not None:
            pipe.send(take_turn(step, steps, case.device, code))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


def _code_bytes(device: str) -> int:
    from memory import resident_bytes

    return 0 if device == "cuda" else resident_bytes()


def take_turn(step: Step, steps: int, device: str, code: int) -> Turn:
    import torch

    import distributed

    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss, norm = step()
    figures = loss.item(), norm.item()  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = distributed.memory_bytes(torch.device(device)) - code
    return Turn(seconds / steps, cpu / steps, *figures, memory)


@contextlib.contextmanager
def contender(name: str, case: Case) -> Generator[Callable[[int], Turn]]:
    """A function that has contender `name` make some steps in its own process. It raises Failed."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, case), daemon=True)
    process.start()
    theirs.close()

    def turn(steps: int) -> Turn:
        try:
            pipe.send(steps)
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join()
            answer = f"its process ended with code {process.exitcode}"
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    try:
        yield turn
    finally:
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(30)
        process.kill()


class Failed(Exception):
    """A contender could not make its steps."""


def prepare(shape: Shape, folder: str) -> None:
    """Write the weights that all contenders start from."""
    import torch

    from model import GPT

    torch.manual_seed(SEED)
    config = {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name not in ("rows", "seq_len")}
    GPT(GPTConfig(block_size=shape.seq_len, **config)).save_pretrained(folder)


def machine(device: str) -> dict[str, Any]:
    """The device that is meant, whether bf16 is native to it, hardware and versions. UserError if there is none."""
    import torch

    import distributed
    from precision import choose_precision

    world = distributed.start(device)
    packages = ("torch", "transformers", "numpy")
    return {
        "device": world.device.type,
        "native": choose_precision("auto", world.device)[0],
        "hardware": {
            "gpu": distributed.device_name(world.device) if world.device.type == "cuda" else None,
            "cpu": distributed.device_name(torch.device("cpu")),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "allocator": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "GLIBC_", "PYTORCH_", "LD_PRE"))},
    }


def elsewhere(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in a process of its own: torch stays out of this one, whose memory children inherit."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# --- the comparison


def compare(case: Case, seconds: float, repetitions: tuple[int, int]) -> dict[str, Any]:
    """All contenders in turns until `seconds` are over, `repetitions` (least, most); figures by contender."""
    until = time.monotonic() + seconds
    turns: dict[str, list[Turn]] = {}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(contender(name, case))
            for name, kind in CONTENDERS.items()
            if case.device in kind.devices
        }

        def everyone(steps: int) -> dict[str, Turn]:
            answers = {}
            for name in list(running):
                try:
                    answers[name] = running[name](steps)
                except Failed as error:
                    failed[name] = str(error)
                    del running[name]
            return answers

        first = everyone(1)
        if OURS in failed:
            raise RuntimeError(f"{case.title}: {failed[OURS]}")
        check_agreement(case, first)
        steps = max(1, round(TURN_SECONDS / min(t.seconds for t in everyone(1).values())))
        for repetition in range(repetitions[1]):
            if repetition >= repetitions[0] and time.monotonic() > until:
                break
            for name, turn in everyone(steps).items():
                turns.setdefault(name, []).append(turn)
    return figures(case, first, {name: turns[name] for name in running}, failed)


def check_agreement(case: Case, first: dict[str, Turn]) -> None:
    """Stop where a contender's first loss or gradient norm is not ours: it would be timed at other work."""
    loss_tolerance, norm_tolerance = TOLERANCE[case.precision]
    own = first[OURS]
    for name, turn in first.items():
        off = abs(turn.loss / own.loss - 1), abs(turn.grad_norm / own.grad_norm - 1)
        if not (off[0] <= loss_tolerance and off[1] <= norm_tolerance):
            raise RuntimeError(
                f"{case.title}: {name} has loss {turn.loss:.6f} and gradient norm {turn.grad_norm:.5f}, "
                f"{OURS} {own.loss:.6f} and {own.grad_norm:.5f}"
            )


def figures(case: Case, first: dict[str, Turn], turns: dict[str, list[Turn]], failed: dict[str, str]) -> dict[str, Any]:
    """The JSON of one case. Ratios are ours over the other's: above 1 in speed and below 1 in memory is better."""
    contenders: dict[str, Any] = {name: {"error": error} for name, error in failed.items()}
    for name, mine in turns.items():
        rates = [case.tokens / t.seconds for t in mine]
        contenders[name] = {
            "tokens_per_second": statistics.median(rates),
            "slowest": min(rates),
            "fastest": max(rates),
            "memory_bytes": max(t.memory for t in mine),
            "first_loss": first[name].loss,
            "first_grad_norm": first[name].grad_norm,
            "last_loss": mine[-1].loss,
            "seconds": [t.seconds for t in mine],
            "cpu_seconds": [t.cpu_seconds for t in mine],
        }
    own = contenders[OURS]
    for name in turns:
        other = contenders[name]
        other["ratio"] = {
            # of turns side by side, so that a slow minute of the machine counts against neither
            "speed": statistics.median(b / a for a, b in zip(own["seconds"], other["seconds"], strict=True)),
            "memory": own["memory_bytes"] / other["memory_bytes"],
        }
    return {
        "shape": case.name,
        **dataclasses.asdict(case.shape),
        "precision": case.precision,
        "contenders": {name: contenders[name] for name in CONTENDERS if name in contenders},
    }


# --- what is written


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Results as a Markdown table, aligned so that it reads as plain text too."""
    head = ["shape", "precision", "trainer", "tokens/s", "slowest-fastest", "peak memory", "speed x", "memory x"]
    rows = [head, *(row for case in cases for row in table_rows(case))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    left = 3  # columns of words
    lines = [
        "| " + " | ".join(f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def table_rows(case: dict[str, Any]) -> Iterator[list[str]]:
    for name, of in case["contenders"].items():
        words = [f"{case['shape']}, {case['rows']} x {case['seq_len']}", case["precision"], name]
        if "error" in of:
            yield [*words, "failed", "", "", "", ""]
            continue
        speed = f"{of['tokens_per_second']:,.0f}", f"{of['slowest']:,.0f}-{of['fastest']:,.0f}"
        ratio = ("", "") if name == OURS else (f"{of['ratio']['speed']:.2f}", f"{of['ratio']['memory']:.2f}")
        yield [*words, *speed, bytes_text(of["memory_bytes"]), *ratio]


def bytes_text(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def write(folder: Path, facts: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """peers-DEVICE.json with everything and peers-DEVICE.md with the table; returns the latter's text."""
    hardware, versions = facts["hardware"], facts["versions"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    text = (
        f"One optimizer step on {where}, {facts['date'][:10]}: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f".\n\n{table(cases)}\n\n"
        "Speed x and memory x: this engine over the other, medians over alternated steps; more speed, less memory is "
        "better.\nPeak memory is that of a process (on a GPU: of its allocations) without its code.\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"peers-{facts['device']}"
    (folder / f"{stem}.json").write_text(json.dumps(facts | {"cases": cases}, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(text)
    return text


def chosen(option: str, asked: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"--{option} {name} is none of {', '.join(known)}{nearest(name, known)}")
    return names


def main() -> None:
    options = parse(Options, sys.argv[1:])
    shapes = chosen("shape", "micro" if options.quick else options.shape, list(SHAPES["cpu"]))
    asked = options.precision and chosen("precision", options.precision, list(TOLERANCE))
    facts = {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    facts |= elsewhere(machine, options.device)
    device = facts["device"]
    precisions = asked or (["bf16", "fp32"] if facts["native"] == "bf16" and not options.quick else ["fp32"])
    results: list[dict[str, Any]] = []
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            weights = f"{folder}/{name}"
            elsewhere(prepare, SHAPES[device][name], weights)
            for precision in precisions:
                case = Case(name, SHAPES[device][name], precision, device, weights)
                print(f"{case.title} ...", file=sys.stderr, flush=True)
                results.append(compare(case, options.seconds, (2, 2) if options.quick else REPETITIONS))
                text = write(Path(options.out), facts, results)  # after each: an interrupted run leaves what it has
    print(text)


if __name__ == "__main__":
    entry_point(main)
