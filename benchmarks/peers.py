"""One optimizer step of this engine beside other trainers':

python -m benchmarks.peers [--quick] [--device cuda]

Every contender trains in a process of its own, so that its peak memory is its own. On a CPU this
engine stays, and the others come one after another and take turns with it, A B A B: what else the
machine does falls on both alike. On a GPU each is alone, this engine first: two do not fit, and
nothing else runs there. Nothing is timed before losses and gradient norms agree. The trade-off: two
others are compared only through this engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from base.cli import entry_point, parse
from base.console import bytes_text, outlive
from benchmarks.contenders import CONTENDERS, OURS, SEED, SHAPES, Case, Shape, Step, fitting
from benchmarks.machine import elsewhere, facts
from benchmarks.peers_report import assessed, rates, report
from config import Positive, UserError, Where, known_names
from engine.roofline import peak_flops, product_ceiling

TURN_SECONDS = 0.5  # a turn has as many steps as fit in this, at least one
FREE = 0.85  # share of a GPU's memory that is free where no other process uses it
REPETITIONS = 3, 30  # turns of a contender: at least and at most
# Relative, of the first loss and gradient norm. fp32: sums in another order. bf16 has 8 bits, and
# the two round at other places (the residual stream, the logits); FP8 has 4 of them.
TOLERANCE = {"fp32": (1e-5, 1e-3), "tf32": (1e-3, 1e-2), "bf16": (1e-3, 3e-2), "fp8": (1e-2, 1e-1)}


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to measure."""
    shape: str | None = None
    """Shapes, comma-separated. Default: 10M,124M on a CPU; 124M,350M,774M,1.5B on a GPU."""
    precision: str | None = None
    """Precisions, comma-separated: fp32, tf32, bf16. Default: bf16 where it is native, else
    fp32."""
    against: str | None = None
    """Contenders, comma-separated. Default: all that the device has."""
    seconds: Positive | None = None
    """Time for the turns of each contender. Default: 45 on a CPU, 15 on a GPU."""
    quick: bool = False
    """A tiny shape and two turns each: does it work at all?"""
    resume: bool = False
    """Keep what --out has of this machine, with these versions, and measure what it lacks."""
    out: Where = "benchmarks/results"
    """Folder for peers-DEVICE.json and peers-DEVICE.md."""


# --- the process of a contender


@dataclass
class Turn:
    """What a contender answers to being asked for some steps."""

    seconds: float  # of a step
    cpu_seconds: float  # of a step, over all threads: less moved by what else the machine does
    loss: float  # of the last step
    grad_norm: float
    memory: int  # peak so far, in bytes, without the code


TakeTurn = Callable[[int, int], Turn]  # untimed steps and timed ones


def serve(pipe: Connection, name: str, case: Case) -> None:
    """Build a contender, then answer each (untimed, timed) steps with a Turn; an error is the last
    answer."""
    from engine.failures import is_out_of_memory

    try:
        import torch

        torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
        # torch's optimizers load the former late
        for module in ("torch._dynamo", *CONTENDERS[name].imports):
            importlib.import_module(module)
        check_free(case.device)
        code = _code_bytes(case.device)
        step = CONTENDERS[name].build(case)
        while (steps := pipe.recv()) is not None:
            pipe.send(take_turn(step, *steps, case.device, code))
    except ModuleNotFoundError as error:
        pipe.send(f"not installed (no module {error.name})")
    except UserError as error:
        pipe.send(str(error))
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        pipe.send("out of memory" if is_out_of_memory(error) else message)


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


def _code_bytes(device: str) -> int:
    from base.machine import resident_bytes

    return 0 if device == "cuda" else resident_bytes()


def take_turn(step: Step, untimed: int, steps: int, device: str, code: int) -> Turn:
    import torch

    from engine import processes

    for _ in range(untimed):
        step()[0].item()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loss, norm = step()
    figures = loss.item(), norm.item()  # waits for the device
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    memory = processes.memory_bytes(torch.device(device)) - code
    return Turn(seconds / steps, cpu / steps, *figures, memory)


class Failed(RuntimeError):
    """Contender `name` could not make its steps, or made other ones than this engine."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@contextlib.contextmanager
def contender(name: str, case: Case) -> Generator[TakeTurn]:
    """A function that has contender `name` make some steps in its own process. It raises Failed."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, name, case), daemon=True)
    process.start()
    theirs.close()

    def turn(untimed: int, steps: int) -> Turn:
        try:
            pipe.send((untimed, steps))
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join()
            answer = f"its process ended with code {process.exitcode}"
        if isinstance(answer, str):
            raise Failed(name, answer)
        return answer

    try:
        yield turn
    finally:
        with contextlib.suppress(OSError):
            pipe.send(None)
        process.join(30)
        process.kill()
        process.join()


# --- the comparison


@dataclass
class Opening:
    """The first two steps, which show that all do the same: the second has the first update behind
    it."""

    loss: float
    grad_norm: float
    next_loss: float
    seconds: float  # of the second, which compiles nothing


def opening(turn: TakeTurn) -> Opening:
    first, second = turn(0, 1), turn(0, 1)
    return Opening(first.loss, first.grad_norm, second.loss, second.seconds)


def check_agreement(case: Case, name: str, own: Opening, other: Opening) -> None:
    """Raise Failed where a contender's first steps are not ours: it would be timed at other
    work."""
    precision = "fp8" if "fp8" in name else case.precision
    loss_tolerance, norm_tolerance = TOLERANCE[precision]
    # The vocabulary's padding in a softmax raises the loss by the logarithm of its share, where all
    # are as likely.
    padding = (
        math.log(case.shape.padded_vocab / case.shape.vocab_size)
        if CONTENDERS[name].padded
        else 0.0
    )
    limits = {
        "loss": loss_tolerance * own.loss + padding,
        "next_loss": 10 * loss_tolerance * own.loss
        + padding,  # Adam's first update is the gradient's mere sign
        "grad_norm": (norm_tolerance + padding) * own.grad_norm,
    }
    for figure, limit in limits.items():
        mine, its = getattr(own, figure), getattr(other, figure)
        if not abs(its - mine) <= limit:
            raise Failed(name, f"{figure.replace('_', ' ')} {its:.6f}, {OURS}'s {mine:.6f}")


@dataclass(frozen=True)
class Pace:
    """Turns of a contender: at least, at most, and how long it goes on between the two."""

    seconds: float
    least: int
    most: int

    def goes_on(self) -> Iterator[int]:
        """Numbers of the turns."""
        until = time.monotonic() + self.seconds
        for number in range(self.most):
            if number >= self.least and time.monotonic() > until:
                return
            yield number


def alternate(own: TakeTurn, other: TakeTurn, steps: int, pace: Pace) -> list[tuple[Turn, Turn]]:
    return [(own(0, steps), other(0, steps)) for _ in pace.goes_on()]


def alone(
    case: Case, name: str, pace: Pace, start: Opening | None = None
) -> tuple[Opening, list[Turn]]:
    """A contender's opening, checked against ours in `start`, and its turns, in a process that
    ends. Raises Failed."""
    with contender(name, case) as turn:
        its = opening(turn)
        if start:
            check_agreement(case, name, start, its)
        steps = max(1, round(TURN_SECONDS / its.seconds))
        return its, [turn(int(number == 0), steps) for number in pace.goes_on()]


def one_by_one(
    case: Case, names: Sequence[str], pace: Pace, contenders: dict[str, Any]
) -> Iterator[str]:
    """As `compare`, on a GPU: ours, then each of the others, with nothing else in the GPU's
    memory."""
    start, mine = alone(case, OURS, pace)
    contenders[OURS] = of_turns(case, mine) | {"opening": dataclasses.asdict(start)}
    yield OURS
    for name in names:
        try:
            if reason := CONTENDERS[name].lacking(case.device):
                raise Failed(name, reason)
            its, theirs = alone(case, name, pace, start)
        except Failed as error:
            contenders[name] = {"error": error.reason}
        else:
            contenders[name] = of_turns(case, theirs) | {
                "opening": dataclasses.asdict(its),
                "beside": of_turns(case, mine),
                "speed_ratio": statistics.median(t.seconds for t in theirs)
                / statistics.median(t.seconds for t in mine),
                "memory_ratio": mine[-1].memory / theirs[-1].memory,
            }
        yield name


def against(case: Case, name: str, own: TakeTurn, start: Opening, pace: Pace) -> dict[str, Any]:
    """The figures of contender `name` in turns with ours, or the error that it met."""
    if reason := CONTENDERS[name].lacking(case.device):
        return {"error": reason}
    try:
        with contender(name, case) as other:
            its = opening(other)
            check_agreement(case, name, start, its)
            steps = max(1, round(TURN_SECONDS / min(start.seconds, its.seconds)))
            turns = alternate(own, other, steps, pace)
    except Failed as error:
        if error.name == OURS:
            raise
        return {"error": error.reason}
    mine, theirs = zip(*turns, strict=True)
    # Ratios are of turns side by side, so that a slow minute of the machine counts against neither.
    return of_turns(case, theirs) | {
        "opening": dataclasses.asdict(its),
        "beside": of_turns(case, mine),
        "speed_ratio": statistics.median(b.seconds / a.seconds for a, b in turns),
        "memory_ratio": mine[-1].memory / theirs[-1].memory,
    }


def of_turns(case: Case, turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "seconds": [t.seconds for t in turns],
        "cpu_seconds": [t.cpu_seconds for t in turns],
        "memory_bytes": max(t.memory for t in turns),
    } | rates(case.tokens, [t.seconds for t in turns])


def compare(
    case: Case, names: Sequence[str], pace: Pace, contenders: dict[str, Any]
) -> Iterator[str]:
    """Fill `contenders` with the figures of ours and of each of `names`; yields each name when it
    is there."""
    if case.device == "cuda":
        yield from one_by_one(case, names, pace, contenders)
        return
    with contender(OURS, case) as own:
        start = opening(own)
        steps = max(1, round(TURN_SECONDS / start.seconds))
        turns = [own(0, steps) for _ in range(pace.least)]
        contenders[OURS] = of_turns(case, turns) | {"opening": dataclasses.asdict(start)}
        yield OURS
        for name in names:
            contenders[name] = against(case, name, own, start, pace)
            yield name


# --- what is asked for, and what is written


def prepare(shape: Shape, device: str, folder: str) -> int:
    """Write the weights that all contenders start from, drawn on the device; returns FLOPs a
    token."""
    import torch

    from model import GPT

    torch.manual_seed(SEED)
    with torch.device(device):
        model = GPT(shape.config)
    model.save_pretrained(folder)
    return model.flops_per_token(shape.seq_len)


def write(folder: Path, facts: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    """peers-DEVICE.json with everything and peers-DEVICE.md with the table; returns the latter's
    text."""
    cases = list(map(assessed, cases))
    text = report(facts, cases)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"peers-{facts['device']}"
    (folder / f"{stem}.json").write_text(
        json.dumps(facts | {"cases": cases}, indent=1) + "\n", encoding="utf-8"
    )
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    return text


def earlier(folder: Path, now: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases that `folder` has of this machine with these versions."""
    try:
        before = json.loads((folder / f"peers-{now['device']}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    same = all(
        before.get(key) == now[key] for key in ("hardware", "driver", "versions", "settings")
    )
    return before["cases"] if same else []


def asked_for(options: Options, device: str) -> tuple[list[str], list[str], Pace]:
    """Shapes, contenders and pace. UserError for a name that this device has not."""
    shapes = list(SHAPES[device])
    default = "micro" if options.quick else ",".join(shapes[1:] if device == "cpu" else shapes[2:])
    peers = [name for name, kind in CONTENDERS.items() if name != OURS and device in kind.devices]
    pace = Pace(options.seconds or (45 if device == "cpu" else 15), *REPETITIONS)
    return (
        known_names("--shape", options.shape or default, shapes),
        known_names("--against", options.against or ",".join(peers), peers),
        Pace(0, 2, 2) if options.quick else pace,
    )


def begun(
    case: Case,
    flops_per_token: int,
    facts: dict[str, Any],
    cases: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    """The JSON of a case without its figures, added to `cases`; or the one that is there.

    `seconds` are for measuring the ceiling.
    """
    key = {"shape": case.name, **dataclasses.asdict(case.shape), "precision": case.precision}
    for of in cases:
        if key.items() <= of.items():
            return of
    known = (of["ceiling_flops"] for of in cases if of["precision"] == case.precision)
    new = key | {
        "flops_per_token": flops_per_token,
        "ceiling_flops": next(known, None)
        or elsewhere(product_ceiling, case.device, case.precision, seconds),
        "sheet_flops": peak_flops(facts["hardware"]["gpu"] or "", case.precision),
        "contenders": {},
    }
    cases.append(new)
    return new


def main() -> None:
    options = parse(Options, sys.argv[1:])
    outlive()
    now = elsewhere(facts, options.device)
    now |= {"date": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    device, out = now["device"], Path(options.out)
    shapes, peers, pace = asked_for(options, device)
    precisions = known_names(
        "--precision", options.precision or now["native"], ["fp32", "tf32", "bf16"]
    )
    cases = earlier(out, now) if options.resume else []
    with tempfile.TemporaryDirectory() as folder:
        memory = now["hardware"]["gpu_memory_bytes"]
        for name, shape in ((name, fitting(SHAPES[device][name], memory)) for name in shapes):
            weights = f"{folder}/{name}"
            flops = elsewhere(prepare, shape, device, weights)
            for precision in precisions:
                case = Case(name, shape, precision, device, weights)
                contenders = begun(case, flops, now, cases, 0 if options.quick else 3)["contenders"]
                missing = [peer for peer in peers if peer not in contenders]
                if not missing:
                    continue
                for done in compare(case, missing, pace, contenders):
                    print(f"{case.title}: {done}", file=sys.stderr, flush=True)
                    write(out, now, cases)  # after each: an interrupted run leaves what it has
            shutil.rmtree(weights)
    print(write(out, now, cases))


if __name__ == "__main__":
    entry_point(main)
