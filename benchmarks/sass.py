"""Count a compiled kernel's instructions per element of the row that each of its programs reads.

A loop that loads from memory without a predicate passes over the row's whole blocks; a predicated
load is masked, so its loop covers the last block only. In a kernel whose loads are all predicated,
such loops cover the whole row.

The trade-off: this counts issued instructions, and neither waits nor the difference between slow
and fast ones.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;")
LABEL = re.compile(r"(\.L_x_\d+):")
BACK = re.compile(r"\bBRA\b.*(\.L_x_\d+)")
LOAD = re.compile(r"\bLDG((?:\.\w+)*)")
LOAD_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # else 4


@dataclass(frozen=True)
class PerElement:
    """Instructions that a thread executes per element of a row.

    loops: in the loops over whole blocks, by which kernels of different blocks compare.
    row: in all of a row of a given width, with the masked last block and the code around the
    loops.
    """

    loops: float
    row: float


def disassembled(cubin: bytes) -> str:
    """The machine code of a Triton kernel as text (SASS)."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def per_element(sass: str, itemsize: int, threads: int, width: int) -> PerElement:
    """The instructions per element of a kernel whose programs of `threads` threads each read a row
    of `width` elements. Loops that load nothing, as for a row without a target, do not count."""
    instructions, loops = code_and_loops(sass)
    reading = [loop for loop in loops if any(map(LOAD.search, loop))]
    whole = [loop for loop in reading if not any(masked(line) for line in loop)]
    per_pass = [(len(loop), loaded(loop) / itemsize) for loop in whole or reading]
    once = len(instructions) - sum(map(len, loops)) + sum(map(len, reading))
    once -= sum(length for length, _ in per_pass)
    executed = once + sum(
        length * (width // (n * threads) if whole else -(-width // (n * threads)))
        for length, n in per_pass
    )
    return PerElement(sum(length / n for length, n in per_pass), executed * threads / width)


def code_and_loops(sass: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of each innermost loop."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if found := LABEL.match(line.strip()):
            labels[found[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(found[1])
            back = BACK.search(found[1])
            if back and back[1] in labels:
                spans.append((labels[back[1]], len(instructions)))
    return instructions, [instructions[start:end] for start, end in spans]


def loaded(loop: list[str]) -> int:
    """The bytes that one pass of a loop loads per thread."""
    kinds = [found[1].split(".") for line in loop if (found := LOAD.search(line))]
    return sum(next((LOAD_BYTES[k] for k in kind if k in LOAD_BYTES), 4) for kind in kinds)


def masked(line: str) -> bool:
    """Whether this is a load that only some threads do."""
    return line.startswith("@") and bool(LOAD.search(line))
