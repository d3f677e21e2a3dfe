"""Compare optimizer steps of trainers, each in its own process so that its peak memory can be
measured.

On a CPU this engine's process stays, and the other trainers come one after another and take turns
with it. On a GPU each trainer runs alone, this engine first, because two do not fit and nothing
else runs there. Nothing is timed before losses and gradient norms agree. The trade-off: two other
trainers are compared only through this engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import math
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from base.console import bytes_text
from base.errors import reason
from base.machine import resident_bytes
from benchmarks.harness import OURS, Results, Turns, alternate, ratio, say, spread, spread_columns
from benchmarks.machine import forget_peak
from benchmarks.table import Column, Row
from config import GPTConfig, UserError

if TYPE_CHECKING:
    import torch

TURN_SECONDS = 0.5  # a turn has as many steps as fit into this, at least one
FREE = 0.85  # share of a GPU's memory that is free if no other process uses it
# Largest relative differences of the first loss and gradient norm. fp32 sums in another order. bf16
# has 8 bits, and trainers round at different places (the residual stream, the logits). FP8 has 4
# bits.
TOLERANCE = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (1e-3, 3e-2), "fp8": (1e-2, 1e-1)}

# one optimizer step: its loss and gradient norm
Step = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Shape:
    """The size of the model and of a step."""

    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    rows: int  # sequences in a micro-batch
    seq_len: int
    accumulation: int = 1  # micro-batches in a step

    @property
    def config(self) -> GPTConfig:
        """The model's config, with seq_len as its block_size."""
        return GPTConfig(self.vocab_size, self.seq_len, self.n_layer, self.n_head, self.n_embd)


@dataclass(frozen=True)
class Case:
    """The work that all trainers do."""

    name: str
    shape: Shape
    precision: str
    device: str
    weights: str  # folder in the hub's layout with everyone's first weights
    # None: no model has dropout. Else the timed steps have this dropout, and the steps that must
    # agree have none.
    dropout: float | None = None

    @property
    def key(self) -> dict[str, Any]:
        """The fields that identify this case's rows in a result file."""
        return {"shape": self.name, **dataclasses.asdict(self.shape), "precision": self.precision}

    @property
    def alone(self) -> bool:
        """Whether only one trainer is in memory at a time."""
        return self.device == "cuda"

    @property
    def amount(self) -> int:
        """Tokens in an optimizer step."""
        return self.shape.rows * self.shape.seq_len * self.shape.accumulation


@dataclass(frozen=True)
class Trainer:
    """A function that builds a trainer's step, and what it needs."""

    build: Callable[..., Step]  # takes a case
    imports: tuple[str, ...]  # modules to load first, so that their memory does not count
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    peer: bool = True  # False: a form of this engine
    kept: bool = False  # uses this engine's allocator, so that differences are the code's
    padded: bool = False  # the vocabulary's padding takes part in the softmax
    needs_gpu: bool = False


# --- in a trainer's process


@dataclass
class Turn:
    """The figures of one turn of a trainer."""

    seconds: float  # per step
    loss: float  # in the last step
    grad_norm: float
    memory: int  # peak so far, in bytes, without the code


@dataclass
class Opening:
    """The first two steps, which show that all trainers do the same work. The second follows the
    first update."""

    loss: float
    grad_norm: float
    next_loss: float
    seconds: float  # the second step's, which compiles nothing


_held: list[Callable[[int], Turn]] = []  # the function that takes a turn, once `begin` has made it


def begin(trainer: Trainer, case: Case) -> Opening:
    """Build the step that must agree and take it twice. Then prepare the step that is timed. Raises
    UserError if the trainer cannot run here."""
    import torch

    from engine import memory
    from engine.compiling import compiler_problem

    if trainer.needs_gpu and case.device == "cpu":
        raise UserError("needs a CUDA GPU")
    if trainer.compiled and (problem := compiler_problem(case.device)):
        raise UserError(problem)
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    for module in ("torch._dynamo", *trainer.imports):  # torch's optimizers load torch._dynamo late
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
        forget_peak(case.device)  # measure the memory of steps, not of loading
        start = dataclasses.replace(start, seconds=take(1).seconds)
    return start


def take(steps: int) -> Turn:
    """Take a turn of so many steps."""
    return _held[0](steps)


def check_free(device: str) -> None:
    """Raise UserError if other processes hold memory of the GPU, because they would change the
    figures."""
    import torch

    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        if free < FREE * total:
            raise UserError(
                f"other processes hold {bytes_text(total - free)} of the GPU; end them first"
            )


def take_turn(step: Step, device: str, code: int, steps: int) -> Turn:
    """Make `steps` steps. `code` is the memory in bytes before the trainer was built."""
    import torch

    from engine import processes

    began = time.perf_counter()
    for _ in range(steps):
        loss, norm = step()
    figures = loss.item(), norm.item()  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    memory = processes.memory_bytes(torch.device(device)) - code
    return Turn(seconds, *figures, memory)


def opening(turn: Callable[[int], Turn]) -> Opening:
    """The figures of the first two steps."""
    first, second = turn(1), turn(1)
    return Opening(first.loss, first.grad_norm, second.loss, second.seconds)


def answer(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, or a text that says why it failed."""
    from engine.failures import is_out_of_memory

    try:
        return function(*args)
    except ModuleNotFoundError as error:
        return f"not installed (no module {error.name})"
    except UserError as error:
        return str(error)
    except Exception as error:  # other projects' code may raise any error
        traceback.print_exc()
        if is_out_of_memory(error):
            return "out of memory"
        return f"{type(error).__name__}: {reason(error)}"


def end_with_parent() -> None:
    """Let this process end, and free its GPU memory, when its parent ends or is killed."""

    def wait() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# --- side by side


class Failed(RuntimeError):
    """Trainer `name` could not make its steps, or made other steps than this engine."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@contextlib.contextmanager
def process(
    name: str, trainer: Trainer, case: Case
) -> Generator[tuple[Opening, Callable[[int], Turn]]]:
    """Yields a trainer's opening and a function that makes it take a turn in its own process. Both
    raise Failed."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=end_with_parent) as pool:

        def ask(function: Callable[..., Any], *args: Any) -> Any:
            try:
                answered = pool.submit(answer, function, *args).result()
            except BrokenProcessPool:
                answered = "its process was killed or crashed"
            if isinstance(answered, str):
                raise Failed(name, answered)
            return answered

        yield ask(begin, trainer, case), functools.partial(ask, take)


def check_agreement(name: str, trainer: Trainer, case: Case, own: Opening, other: Opening) -> None:
    """Raise Failed if a trainer's first steps differ from ours: its times would be those of other
    work."""
    loss_tolerance, norm_tolerance = TOLERANCE["fp8" if "fp8" in name else case.precision]
    # Padding rows in the softmax raise the loss, at equal probabilities by the logarithm of this
    # quotient.
    vocab = case.shape.config
    padding = math.log(vocab.padded_vocab_size / vocab.vocab_size) if trainer.padded else 0.0
    limits = {
        "loss": loss_tolerance * own.loss + padding,
        # wider, because Adam's first update is only the gradient's sign
        "next_loss": 10 * loss_tolerance * own.loss + padding,
        "grad_norm": (norm_tolerance + padding) * own.grad_norm,
    }
    for figure, limit in limits.items():
        mine, its = getattr(own, figure), getattr(other, figure)
        if not abs(its - mine) <= limit:
            raise Failed(name, f"{figure.replace('_', ' ')} {its:.6f}, {OURS}'s {mine:.6f}")


def compare(
    case: Case,
    ours: Trainer,
    others: dict[str, Trainer],
    turns: Turns,
    results: Results,
    more: Mapping[str, Any],
) -> None:
    """Put the figures, or an error, of this engine and of each other trainer into `results`, with
    the fields `more`, as soon as they are known. This engine comes again after each trainer that
    took turns with it, with the figures of all its turns.
    Without others, nothing is measured.
    """
    if not others:
        return
    words = " ".join(value for value in case.key.values() if isinstance(value, str))

    def put(name: str, found: dict[str, Any]) -> None:
        say(f"{words}: {name}")
        results.put(case.key | {"trainer": name}, {**more, **found})

    with contextlib.ExitStack() as stack:
        start, own = stack.enter_context(process(OURS, ours, case))
        steps = steps_of(start)
        mine = [own(steps) for _ in (turns if case.alone else range(turns.least))]
        put(OURS, figures(case, start, mine))
        if case.alone:
            stack.close()
        for name, trainer in others.items():
            try:
                with process(name, trainer, case) as (its, other):
                    check_agreement(name, trainer, case, start, its)
                    steps = steps_of(its) if case.alone else max(steps_of(start), steps_of(its))
                    both = {} if case.alone else {OURS: functools.partial(own, steps)}
                    both[name] = functools.partial(other, steps)
                    taken = alternate(both, turns)
            except Failed as error:
                if error.name == OURS:
                    raise
                put(name, {"error": error.reason})
                continue
            beside = taken.get(OURS, mine)
            put(name, figures(case, its, taken[name]) | against(taken[name], beside, case.alone))
            if not case.alone:
                mine += beside
                put(OURS, figures(case, start, mine))


def steps_of(start: Opening) -> int:
    """Steps in a turn: as many as fit into TURN_SECONDS, at least one."""
    return max(1, round(TURN_SECONDS / start.seconds))


def figures(case: Case, start: Opening, turns: Sequence[Turn]) -> dict[str, Any]:
    """The figures of a trainer's turns, as they go into a result file."""
    return {
        "opening": dataclasses.asdict(start),
        "seconds": [turn.seconds for turn in turns],
        "memory_bytes": max(turn.memory for turn in turns),
        "per_second": spread(case.amount / turn.seconds for turn in turns),
    }


def against(theirs: Sequence[Turn], mine: Sequence[Turn], alone: bool) -> dict[str, Any]:
    """Ratios of this engine's turns to another trainer's, of the same turn unless each ran
    alone."""
    over, under = ([turn.seconds for turn in side] for side in (theirs, mine))
    speed = ratio(over, under)
    if alone:
        median = statistics.median(over) / statistics.median(under)
        speed = [median, min(over) / max(under), max(over) / min(under)]
    memory = mine[-1].memory / theirs[-1].memory
    return {"memory_ratio": memory, "speed_ratio": speed, "beside_seconds": under}


# --- in the table


def trainer_column(row: Row) -> str:
    """The trainer's name, with the reason why it has no figures."""
    return f"{row['trainer']}: {row['error']:.60}" if "error" in row else row["trainer"]


def figure_columns(rate: str, form: str = ",.0f") -> list[Column]:
    """The columns of a trainer's figures. `rate` says what is counted per second."""

    def memory(row: Row) -> str:
        return bytes_text(row["memory_bytes"]) if "memory_bytes" in row else ""

    def memory_ratio(row: Row) -> str:
        return f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else ""

    return [
        *spread_columns(rate, lambda row: row.get("per_second"), form),
        ("peak memory", memory),
        *spread_columns("speed x", lambda row: row.get("speed_ratio")),
        ("memory x", memory_ratio),
    ]
