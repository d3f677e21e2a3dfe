"""Compare each operation of kernels/ with PyTorch, torch.compile and Liger:

python -m benchmarks.kernels [--only NAME ...]

An operation limited by memory counts the fewest bytes that its forward and backward pass must move.
An operation limited by arithmetic counts its floating-point operations. Both are compared with what
the same run reaches in a large copy and a large matrix product. The forms of an operation take
turns, A B A B, so that a slow minute of the machine affects all of them. Nothing is timed before
outputs and gradients agree.

The trade-off: an operation that runs alone reads its inputs from memory, not from the operation
before it. What a compiler gains by fusing neighbours shows in benchmarks/peers.py, not here.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from base.cli import entry_point, parse
from base.console import outlive
from base.errors import reason
from base.machine import resident_bytes
from benchmarks import machine
from benchmarks.contenders import LARGE_CARD
from benchmarks.harness import OURS, Results, Turns, alternate, cells, ratio, say, spread
from benchmarks.operations import (
    CEILINGS,
    OPERATIONS,
    PYTORCH,
    SIZES,
    TOLERANCE,
    Form,
    Function,
    Operation,
    Place,
)
from benchmarks.table import markdown
from config import PathOrName, UserError, known_names
from engine import processes
from engine.failures import is_out_of_memory
from engine.memory import set_allocator
from engine.precision import choose_precision
from kernels._triton import no_triton_reason
from kernels.attention import attention_backends

CEILING = "ceiling"
OUT_OF_MEMORY = "not measured: out of memory"
TURNS = Turns(3, 30, 6.0)  # for the forms of one operation


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on, in fp32 on a CPU and bf16 on a GPU."""
    only: tuple[str, ...] = ()
    """Operations to measure. Default: all."""
    quick: bool = False
    """Tiny shapes, two turns and nothing compiled, to check that everything works."""
    out: PathOrName = "benchmarks/results"
    """Folder for kernels-DEVICE.json and kernels-DEVICE.md."""


# --- one run of a form


Moment = Any  # a time in seconds (CPU) or an event in the GPU's queue


def moment(device: torch.device) -> Moment:
    """The time now, or on a GPU an event that gets its time when the queue reaches it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Moment, second: Moment) -> float:
    """The seconds from the first to the second moment. On a GPU both must have passed."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


@dataclass(frozen=True)
class Contender:
    """A form that is ready to run."""

    function: Function
    leaves: tuple[Tensor, ...]
    incoming: list[Tensor]
    device: torch.device
    direct: bool

    def run(self) -> tuple[list[Tensor], list[Moment]]:
        """Outputs and gradients, and the moments of the start, of the outputs and of the
        gradients."""
        moments = [moment(self.device)]
        with torch.set_grad_enabled(not self.direct):
            outputs = list(self.function(*self.leaves))
        moments.append(moment(self.device))
        gradients: Sequence[Tensor] = []
        if not self.direct:
            if not self.incoming:
                self.incoming.extend(
                    torch.randn_like(y) if y.dim() else y.new_ones(()) for y in outputs
                )
            gradients = torch.autograd.grad(outputs, self.leaves, self.incoming)
            moments.append(moment(self.device))
        return [*(output.detach() for output in outputs), *gradients], moments


def build(operation: Operation, form: Form, device: torch.device) -> Contender:
    """Make a form ready to run. All forms share the leaves, except those that overwrite them."""
    mine = [leaf.detach().clone() if form.overwrites else leaf for leaf in operation.leaves]
    leaves = tuple(leaf.requires_grad_() for leaf in mine)
    return Contender(form.make(), leaves, operation.incoming, device, form.direct)


@functools.cache
def buffer(device: torch.device, size: int) -> Tensor:
    """A tensor of `size` bytes for `evict`, kept for all turns."""
    return torch.zeros(size // 4, device=device)


def evict(place: Place) -> None:
    """Fill the caches with other data, by reading, so that nothing must be written back.

    On a GPU this also takes some milliseconds. In that time the host queues the timed work, so
    launches do not count.
    """
    for _ in range(16 if place.device.type == "cuda" else 1):
        buffer(place.device, place.size.copy).sum()


def turn(contender: Contender, place: Place) -> list[float]:
    """The seconds of the forward pass, then of the backward pass if there is one."""
    evict(place)
    _, moments = contender.run()
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return [seconds_between(a, b) for a, b in zip(moments, moments[1:])]


def peak_memory(contender: Contender) -> int | None:
    """The bytes at the peak of one run, less those in use before. None if the system does not
    say."""
    device = contender.device
    if not machine.forget_peak(device.type):
        return None
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes()
    contender.run()
    return processes.memory_bytes(device) - before


# --- the comparison


class Differs(Exception):
    """A form computes something else than PyTorch."""


def largest_difference(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """The largest relative difference of norms over all tensors, or NaN if any is NaN. It goes
    piece by piece, because an fp32 copy of all logits may not fit."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        pieces = zip(a.flatten().split(1 << 26), b.flatten().split(1 << 26), strict=True)
        sums = [((p.float() - q.float()).norm() ** 2, q.float().norm() ** 2) for p, q in pieces]
        difference, whole = (sum(part.double() for part in parts) for parts in zip(*sums))
        off = (difference / whole).sqrt().item() if difference else 0.0
        worst = off if not off <= worst else worst
    return worst


def try_out(contender: Contender, reference: list[Tensor], tolerance: float) -> dict[str, Any]:
    """Run a contender before timing. Returns its difference and peak memory. The first to run fills
    `reference`. Raises Differs if a later one does not agree with it."""
    results, _ = contender.run()
    if not reference:
        # cloned, because a form may change its results later
        reference += [result.clone() for result in results]
    difference = largest_difference(results, reference)
    if not difference <= tolerance:
        raise Differs(
            f"{difference:.2g} away from {PYTORCH}, relative; {tolerance:.2g} is rounding"
        )
    del results
    return {"difference": difference, "memory_bytes": peak_memory(contender)}


def compare(name: str, place: Place, turns: Turns) -> list[dict[str, Any]]:
    """The rows of one operation, one per form, with figures or a note that says why there are
    none."""
    torch.manual_seed(0)
    operation = OPERATIONS[name](place)
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    reference: list[Tensor] = []
    for label, form in operation.forms.items():
        rows[label] = {"operation": name, "shape": operation.shape, "form": label}
        if form.lacks:
            rows[label]["note"] = f"not measured: {form.lacks}"
            continue
        try:
            contender = build(operation, form, place.device)
            rows[label] |= try_out(
                contender, reference, operation.tolerance or TOLERANCE[place.dtype]
            )
            ready[label] = contender
        except Exception as error:  # other projects' code may raise any error
            rows[label]["note"] = OUT_OF_MEMORY
            if not is_out_of_memory(error):
                traceback.print_exc()
                rows[label]["note"] = f"failed: {type(error).__name__}: {reason(error)}"
    reference.clear()
    function, work = CEILINGS[operation.ceiling](place)
    ready[CEILING] = Contender(function, (), [], place.device, direct=True)
    ready[CEILING].run()
    each = {label: functools.partial(turn, of, place) for label, of in ready.items()}
    # a form that fitted alone may not fit beside the others' inputs
    taken = alternate(each, turns, dropped=(torch.OutOfMemoryError,))
    ceiling = statistics.median(work / sum(passes) for passes in taken[CEILING])
    for label in ready.keys() - {CEILING}:
        rows[label] |= (
            figures(operation, taken[label], taken.get(PYTORCH)) | {"ceiling": ceiling}
            if label in taken
            else {"note": OUT_OF_MEMORY}
        )
    return list(rows.values())


def figures(
    operation: Operation, mine: list[list[float]], first: list[list[float]] | None
) -> dict[str, Any]:
    """Medians over the turns. `first` holds PyTorch's turns."""
    passes = [statistics.median(column) for column in zip(*mine)]
    return {
        "unit": "B/s" if operation.ceiling == "copy" else "FLOP/s",
        "rate": spread(operation.work / sum(seconds) for seconds in mine),
        "forward_seconds": passes[0],
        "backward_seconds": passes[1] if len(passes) > 1 else None,
        "speed": first and ratio(map(sum, first), map(sum, mine)),
        "seconds": mine,
    }


# --- what is written


def report(record: dict[str, Any]) -> str:
    """The table of all operations, as Markdown."""
    head = ("operation", "form", "forward ms", "backward ms", "rate", "least-most", "of ceiling")
    head += ("speed x", "least-most", "memory", "note")
    rows = map(list, map(table_row, record["cases"]))
    return (
        f"Operations in {record['dtype']}.\n\n{markdown(head, rows, (0, 1, len(head) - 1))}\n\n"
        "Medians over alternated turns. Rates count the fewest bytes (or the operations) of both "
        "passes; the ceiling is a\n"
        "large copy (or product) that takes turns with them. Speed x: PyTorch's time over this "
        "one, both passes. Memory:\n"
        "at the peak, beyond the inputs; outputs and gradients are in it."
    )


def table_row(row: dict[str, Any]) -> Iterator[str]:
    """The cells of one row."""
    yield f"{row['operation']}, {row['shape']}"
    yield row["form"]
    if "note" in row:
        yield from [*[""] * 8, row["note"]]
        return
    for seconds in (row["forward_seconds"], row["backward_seconds"]):
        yield "" if seconds is None else number(1000 * seconds)
    prefix, scale = ("T", 1e12) if row["ceiling"] >= 1e13 else ("G", 1e9)
    rate, least, most = (number(of / scale) for of in row["rate"])
    yield f"{rate} {prefix}{row['unit']}"
    yield f"{least}-{most}"
    yield f"{row['rate'][0] / row['ceiling']:.0%} of {number(row['ceiling'] / scale)}"
    yield from cells(row["speed"]) if row["speed"] else ("", "")
    yield "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f} MiB"
    yield ""


def number(x: float) -> str:
    """The number as text with at least three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def make_place(device: torch.device, quick: bool) -> Place:
    """The device with its sizes, and the reasons why some forms cannot run on it."""
    gpu = device.type == "cuda"
    size = SIZES["quick" if quick else device.type]
    if gpu and torch.cuda.get_device_properties(device).total_memory < LARGE_CARD and not quick:
        # PyTorch's form has seven copies of the logits in memory
        size = dataclasses.replace(size, logit_rows=size.logit_rows // 2)
    no_compiler = no_fp8 = None
    if quick:
        no_compiler = "--quick compiles nothing"
    elif not gpu and not shutil.which("c++") and not shutil.which("g++"):
        no_compiler = "needs a C++ compiler"
    try:
        choose_precision("fp8", device)
    except UserError:
        no_fp8 = "needs a GPU with FP8"
    no_triton = no_triton_reason("cuda") if gpu else "needs a GPU"
    dtype = torch.bfloat16 if choose_precision("auto", device)[0] == "bf16" else torch.float32
    return Place(device, dtype, size, no_triton, no_compiler, no_fp8)


def main() -> None:
    """Measure the operations and print the table. Raises RuntimeError if one of this engine's forms
    failed."""
    options = parse(Options, sys.argv[1:])
    outlive()
    known_names("--only", options.only, OPERATIONS)
    device = processes.start(options.device).device
    if device.type == "cpu":
        set_allocator(keep_freed=True)  # as the engine does; the same for all forms
    place = make_place(device, options.quick)
    facts = machine.facts(options.device) | {"dtype": str(place.dtype).removeprefix("torch.")}
    path = Path(options.out) / f"kernels-{device.type}.json"
    results = Results(path, facts, options, report)
    with sdpa_kernel(attention_backends(device, place.dtype), set_priority=True):
        for name in options.only or OPERATIONS:
            say(f"{name} ...")
            for row in compare(name, place, Turns(2, 2) if options.quick else TURNS):
                results.put({key: row[key] for key in ("operation", "form")}, row)
            torch._dynamo.reset()  # frees compiled functions and what they hold
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(results.text())
    broken = [
        f"{row['operation']}, {row['form']} {row['note']}"
        for row in results.cases
        if row["form"].startswith(OURS) and row.get("note", "").startswith("failed")
    ]
    if broken:
        raise RuntimeError("; ".join(broken))


if __name__ == "__main__":
    entry_point(main)
