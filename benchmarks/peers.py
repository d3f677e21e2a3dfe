"""Compare one optimizer step of this engine with other trainers' steps:

python -m benchmarks.peers [--quick] [--device cuda]

benchmarks/contenders.py has the trainers, and benchmarks/steps.py compares them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.cli import entry_point, parse
from base.console import outlive
from benchmarks.contenders import CONTENDERS, SEED, SHAPES, fitting
from benchmarks.harness import OURS, Results, Turns
from benchmarks.machine import facts, in_own_process
from benchmarks.steps import Case, Shape, compare, figure_columns, trainer_column
from benchmarks.table import Column, Row, table
from config import PathOrName, Positive, known_names
from engine.roofline import peak_flops, product_ceiling

TURNS = 3, 30  # least and most turns of a contender
NOTES = """\
Shapes: micro-batch x length x accumulation. Speed x and memory x: this engine over the other, the
median, least and most of turns side by side (on a GPU, medians of each alone); more speed, less
memory is better. Peak memory is that of a process (on a GPU: of its allocations) without its code.
plain: a module as nanoGPT writes it. litgpt: its blocks, head and loss, GPT-2's position table
added and its own rotary positions taken out. liger: transformers' GPT-2 with Liger's layer norm and
its fused head and loss."""


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on."""
    shape: str | None = None
    """Shapes, comma-separated. Default: 10M,124M on a CPU; 124M,350M,774M,1.5B on a GPU."""
    precision: str | None = None
    """Precisions, comma-separated: fp32, tf32, bf16. Default: bf16 if the device has it natively,
    else fp32."""
    against: str | None = None
    """Contenders, comma-separated. Default: all that run on the device."""
    seconds: Positive | None = None
    """Time for the turns of each contender. Default: 45 on a CPU, 15 on a GPU."""
    quick: bool = False
    """A tiny shape and two turns each, to check that everything works."""
    resume: bool = False
    """Keep the results in --out that are from this machine with these versions, and measure the
    others."""
    out: PathOrName = "benchmarks/results"
    """Folder for peers-DEVICE.json and peers-DEVICE.md."""


def asked_for(options: Options, device: str) -> tuple[list[str], list[str], Turns]:
    """Shapes, contenders and turns. Raises UserError for a name that does not exist on this
    device."""
    shapes = list(SHAPES[device])
    default = "micro" if options.quick else ",".join(shapes[1:] if device == "cpu" else shapes[2:])
    peers = [name for name, of in CONTENDERS.items() if name != OURS and device in of.devices]
    seconds = options.seconds or (45 if device == "cpu" else 15)
    return (
        known_names("--shape", options.shape or default, shapes),
        known_names("--against", options.against or ",".join(peers), peers),
        Turns(2, 2) if options.quick else Turns(*TURNS, seconds),
    )


def prepare(shape: Shape, device: str, folder: str) -> int:
    """Write the weights that all contenders start from, drawn on the device. Returns the FLOPs per
    token."""
    import torch

    from model import GPT

    torch.manual_seed(SEED)
    with torch.device(device):
        model = GPT(shape.config)
    model.save_pretrained(folder)
    return model.flops_per_token(shape.seq_len)


def measure(options: Options, results: Results) -> None:
    """Measure every case that `results` lacks, and put each into it."""
    device, hardware = results.record["device"], results.record["hardware"]
    shapes, peers, turns = asked_for(options, device)
    precisions = known_names(
        "--precision", options.precision or results.record["native"], ["fp32", "tf32", "bf16"]
    )
    ceilings = {row["precision"]: row["ceiling_flops"] for row in results.cases}
    for precision in set(precisions) - ceilings.keys():
        seconds = 0 if options.quick else 3
        ceilings[precision] = in_own_process(product_ceiling, device, precision, seconds)
    with tempfile.TemporaryDirectory() as folder:
        for name in shapes:
            shape = fitting(SHAPES[device][name], hardware["gpu_memory_bytes"])
            flops = in_own_process(prepare, shape, device, f"{folder}/{name}")
            for precision in precisions:
                case = Case(name, shape, precision, device, f"{folder}/{name}")
                more = {
                    "flops_per_token": flops,
                    "ceiling_flops": ceilings[precision],
                    "sheet_flops": peak_flops(hardware["gpu"] or "", precision),
                }
                todo = {
                    peer: of
                    for peer, of in CONTENDERS.items()
                    if peer in peers and not results.find(case.key | {"trainer": peer})
                }
                compare(case, CONTENDERS[OURS], todo, turns, results, more)
            shutil.rmtree(f"{folder}/{name}")


# --- the report


def report(record: dict[str, Any]) -> str:
    """The table, its notes, and one sentence per case."""
    rows = record["cases"]

    def share(ceiling: str) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            if "error" in row or not row[ceiling]:
                return ""
            return f"{row['flops_per_token'] * row['per_second'][0] / row[ceiling]:.1%}"

        return text

    columns: list[Column] = [
        ("shape", lambda row: f"{row['shape']}, {size_text(row)}"),
        ("precision", lambda row: row["precision"]),
        ("trainer", trainer_column),
        *figure_columns("tokens/s"),
        ("MFU", share("ceiling_flops")),
        ("of sheet", share("sheet_flops")),
    ]
    ceilings = {row["precision"]: row["ceiling_flops"] / 1e12 for row in rows}
    of = ", ".join(f"{flops:.3g} TFLOP/s in {name}" for name, flops in ceilings.items())
    return (
        f"{table(columns, rows, ('precision', 'trainer'))}\n\n{NOTES} MFU: share of the "
        f"matrix-product ceiling measured in this run, {of}; of sheet: on a GPU, of the maker's "
        "data sheet.\n\n" + "\n".join(sentences(rows))
    )


def size_text(row: Row) -> str:
    """The size of a step: rows x length, and x accumulation if there is any."""
    factors = row["rows"], row["seq_len"], row["accumulation"]
    return " x ".join(map(str, factors[:2] if factors[2] == 1 else factors))


def sentences(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One sentence per case: this engine beside the fastest of the peers."""
    for shape, precision in dict.fromkeys((row["shape"], row["precision"]) for row in rows):
        parts = []
        for kind, kept in (("as it ships", False), ("with our allocator", True)):
            among = [
                row
                for row in rows
                if (row["shape"], row["precision"]) == (shape, precision)
                and "speed_ratio" in row
                and CONTENDERS[row["trainer"]].peer
                and CONTENDERS[row["trainer"]].kept == kept
            ]
            if among:
                best = min(among, key=lambda row: row["speed_ratio"][0])
                parts.append(
                    f"{best['speed_ratio'][0]:.2f} x the speed of the best peer {kind} "
                    f"({best['trainer']}), {best['memory_ratio']:.2f} x its memory"
                )
        yield f"- {shape} {precision}: {'; '.join(parts) or 'no peer was measured'}."


def main() -> None:
    """Measure, write the result files and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    now = in_own_process(facts, options.device)
    results = Results(Path(options.out) / f"peers-{now['device']}.json", now, options, report)
    if options.resume:
        results.resume()
    measure(options, results)
    print(results.text())


if __name__ == "__main__":
    entry_point(main)
