"""Optimizer steps of trainers side by side, each trainer in a process of its own, so that its peak
memory is its own.

On a CPU this engine's process stays, and the others come one after another and take turns with it.
On a GPU each is alone, this engine first: two do not fit, and nothing else runs there. Nothing is
timed before losses and gradient norms agree. The trade-off: two others are compared only through
this engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import math
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from base.console import bytes_text
from base.errors import reason
from base.machine import resident_bytes
from benchmarks.harness import OURS, Turns, alternate, cells, ratio, spread
from benchmarks.machine import forget_peak
from config import GPTConfig, UserError

if TYPE_CHECKING:
    import torch

TURN_SECONDS = 0.5  # a turn has as many steps as fit in this, at least one
FREE = 0.85  # share of a GPU's memory that is free where no other process uses it
# Relative, of the first loss and gradient norm. fp32: sums in another order. bf16 has 8 bits, and
# the two round at other places (the residual stream, the logits); FP8 has 4 of them.
TOLERANCE = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (1e-3, 3e-2), "fp8": (1e-2, 1e-1)}

# one optimizer step: its loss and gradient norm
Step = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int  # sequences in a micro-batch
    seq_len: int
    accumulation: int = 1  # micro-batches in a step

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(self.vocab_size, self.seq_len, self.n_layer, self.n_head, self.n_embd)


@dataclass(frozen=True)
class Case:
    """What all trainers do alike."""

    name: str
    shape: Shape
    precision: str
    device: str
    weights: str  # folder in the hub's layout that everyone starts from
    # None: no model has any. Else the steps that are compared have none, and those that are timed
    # have this.
    dropout: float | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells its rows from others in a result file."""
        return {"shape": self.name, **dataclasses.asdict(self.shape), "precision": self.precision}

    @property
    def alone(self) -> bool:
        """Whether no two trainers are in memory at once."""
        return self.device == "cuda"

    @property
    def amount(self) -> int:
        """Tokens of an optimizer step."""
        return self.shape.rows * self.shape.seq_len * self.shape.accumulation


@dataclass(frozen=True)
class Trainer:
    """How to build a trainer's step, and what it needs."""

    build: Callable[..., Step]  # of a case
    imports: tuple[str, ...]  # what it needs of code; its memory is counted from there on
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    peer: bool = True  # not a form of this engine
    kept: bool = False  # with this engine's allocator, so that what is left is the code's
    padded: bool = False  # the vocabulary's padding takes part in the softmax
    needs_gpu: bool = False

    def lacking(self, device: str) -> str | None:
        """What this machine has not that it needs."""
        if self.needs_gpu and device == "cpu":
            return "needs a CUDA GPU"
        compilers = map(shutil.which, ("c++", "g++", "clang++"))
        if self.compiled and device == "cpu" and not any(compilers):
            return "needs a C++ compiler"
        return None


# --- in a trainer's process


@dataclass
class Turn:
    """What a trainer answers to being asked for some steps."""

    seconds: float  # of a step
    cpu_seconds: float  # of a step, over all threads: less moved by what else the machine does
    loss: float  # of the last step
    grad_norm: float
    memory: int  # peak so far, in bytes, without the code


@dataclass
class Opening:
    """The first two steps, which show that all do the same: the second has the first update behind
    it."""

    loss: float
    grad_norm: float
    next_loss: float
    seconds: float  # of a later step, which compiles nothing


_held: list[Callable[[int], Turn]] = []  # takes a turn of the step


def begin(trainer: Trainer, case: Case) -> Opening:
    """Build the step that is compared, take it twice, and get ready the one that is timed."""
    import torch

    from engine import memory

    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    for module in ("torch._dynamo", *trainer.imports):  # torch's optimizers load the former late
        importlib.import_module(module)
    check_free(case.device)
    if trainer.kept:
        memory.set_allocator(keep_freed=True)
    code = 0 if case.device == "cuda" else resident_bytes()

    def hold(case: Case) -> None:
        _held.append(functools.partial(take_turn, trainer.build(case), case.device, code))

    hold(case if case.dropout is None else dataclasses.replace(case, dropout=0.0))
    start = opening(take)
    if case.dropout is not None:
        _held.clear()
        gc.unfreeze()
        gc.collect()
        hold(case)
        take(1)
        forget_peak(case.device)  # what steps take is asked for, and not what loading took
        start = dataclasses.replace(start, seconds=take(1).seconds)
    return start


def take(steps: int) -> Turn:
    return _held[0](steps)


def check_free(device: str) -> None:
    """Raise UserError where other processes hold a GPU's memory: nothing is measured beside
    them."""
    import torch

    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < FREE * total:
            raise UserError(
                f"other processes hold {bytes_text(total - free)} of the GPU; end them first"
            )


def take_turn(step: Step, device: str, code: int, steps: int) -> Turn:
    import torch

    from engine import processes

    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss, norm = step()
    figures = loss.item(), norm.item()  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = processes.memory_bytes(torch.device(device)) - code
    return Turn(seconds / steps, cpu / steps, *figures, memory)


def opening(turn: Callable[[int], Turn]) -> Opening:
    first, second = turn(1), turn(1)
    return Opening(first.loss, first.grad_norm, second.loss, second.seconds)


def answer(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, or as text why it cannot."""
    from engine.failures import is_out_of_memory

    try:
        return function(*args)
    except ModuleNotFoundError as error:
        return f"not installed (no module {error.name})"
    except UserError as error:
        return str(error)
    except Exception as error:  # of other people's code as well
        traceback.print_exc()
        if is_out_of_memory(error):
            return "out of memory"
        return f"{type(error).__name__}: {reason(error)}"


def serve(pipe: Connection) -> None:
    """Answer what is asked until None is, or the process that asks was killed."""
    with contextlib.suppress(EOFError, OSError):
        while asked := pipe.recv():
            pipe.send(answer(*asked))


# --- side by side


class Failed(RuntimeError):
    """Trainer `name` could not make its steps, or made other ones than this engine."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@contextlib.contextmanager
def process(
    name: str, trainer: Trainer, case: Case
) -> Generator[tuple[Opening, Callable[[int], Turn]]]:
    """How a trainer begins, and a function that has it make some steps in its own process. Both
    raise Failed."""
    if reason := trainer.lacking(case.device):
        raise Failed(name, reason)
    context = get_context("spawn")
    pipe, theirs = context.Pipe()
    child = context.Process(target=serve, args=(theirs,), daemon=True)
    child.start()
    theirs.close()

    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            pipe.send((function, *args))
            answered = pipe.recv()
        except (EOFError, OSError):
            child.join()
            answered = f"its process ended with code {child.exitcode}"
        if isinstance(answered, str):
            raise Failed(name, answered)
        return answered

    try:
        yield ask(begin, trainer, case), functools.partial(ask, take)
    finally:
        with contextlib.suppress(OSError):
            pipe.send(None)
        child.join(30)
        child.kill()
        child.join()


def check_agreement(name: str, trainer: Trainer, case: Case, own: Opening, other: Opening) -> None:
    """Raise Failed where a trainer's first steps are not ours: it would be timed at other work."""
    loss_tolerance, norm_tolerance = TOLERANCE["fp8" if "fp8" in name else case.precision]
    # The vocabulary's padding in a softmax raises the loss by the logarithm of its share, where all
    # are as likely.
    vocab = case.shape.config
    padding = math.log(vocab.padded_vocab_size / vocab.vocab_size) if trainer.padded else 0.0
    limits = {
        "loss": loss_tolerance * own.loss + padding,
        # Adam's first update is the gradient's mere sign
        "next_loss": 10 * loss_tolerance * own.loss + padding,
        "grad_norm": (norm_tolerance + padding) * own.grad_norm,
    }
    for figure, limit in limits.items():
        mine, its = getattr(own, figure), getattr(other, figure)
        if not abs(its - mine) <= limit:
            raise Failed(name, f"{figure.replace('_', ' ')} {its:.6f}, {OURS}'s {mine:.6f}")


def compare(
    case: Case, ours: Trainer, others: dict[str, Trainer], turns: Callable[[], Turns]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures, or an error, of this engine and of each of the others, as soon as they are
    there. This engine comes again after each that it took turns with: its figures are of all its
    turns.

    `turns` are asked for before each of the others. Where there are none, nothing is measured.
    """
    if not others:
        return
    with contextlib.ExitStack() as stack:
        start, own = stack.enter_context(process(OURS, ours, case))
        steps, first = steps_of(start), turns()
        mine = [own(steps) for _ in (first if case.alone else range(first.least))]
        yield OURS, figures(case, start, mine)
        if case.alone:
            stack.close()
        for name, trainer in others.items():
            try:
                with process(name, trainer, case) as (its, other):
                    check_agreement(name, trainer, case, start, its)
                    steps = steps_of(its) if case.alone else max(steps_of(start), steps_of(its))
                    both = {} if case.alone else {OURS: functools.partial(own, steps)}
                    both[name] = functools.partial(other, steps)
                    taken = alternate(both, turns())
            except Failed as error:
                if error.name == OURS:
                    raise
                yield name, {"error": error.reason}
                continue
            beside = taken.get(OURS, mine)
            yield name, figures(case, its, taken[name]) | against(taken[name], beside, case.alone)
            if not case.alone:
                mine += beside
                yield OURS, figures(case, start, mine)


def steps_of(start: Opening) -> int:
    return max(1, round(TURN_SECONDS / start.seconds))


def figures(case: Case, start: Opening, turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "opening": dataclasses.asdict(start),
        "seconds": [turn.seconds for turn in turns],
        "cpu_seconds": [turn.cpu_seconds for turn in turns],
        "memory_bytes": max(turn.memory for turn in turns),
        "per_second": spread(case.amount / turn.seconds for turn in turns),
    }


def against(theirs: Sequence[Turn], mine: Sequence[Turn], alone: bool) -> dict[str, Any]:
    """Ratios of this engine's turns to another's, from turns side by side where there are any."""
    found: dict[str, Any] = {"memory_ratio": mine[-1].memory / theirs[-1].memory}
    for name, ratio_name in (("seconds", "speed_ratio"), ("cpu_seconds", "cpu_ratio")):
        over, under = ([getattr(turn, name) for turn in side] for side in (theirs, mine))
        if alone:
            median = statistics.median(over) / statistics.median(under)
            ratios = [median, min(over) / max(under), max(over) / min(under)]
        else:
            ratios = ratio(over, under)
        found |= {ratio_name: ratios, f"beside_{name}": under}
    return found


# --- in a table

COLUMNS = ("least-most", "peak memory", "speed x", "least-most", "memory x")


def row_cells(row: dict[str, Any], form: str = ",.0f") -> list[str]:
    """The rate and the cells under COLUMNS; all are empty where there are no figures."""
    if "error" in row:
        return [""] * (1 + len(COLUMNS))
    ratios = [""] * 3
    if "speed_ratio" in row:
        ratios = [*cells(row["speed_ratio"]), f"{row['memory_ratio']:.2f}"]
    return [*cells(row["per_second"], form), bytes_text(row["memory_bytes"]), *ratios]
