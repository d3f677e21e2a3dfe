"""The ledger of a training step: what each class of operation costs, and how fast a device can be.

`operations` counts the FLOPs and bytes of one step, class by class. `Ceilings` hold the speeds of a
device: from its data sheet (`sheet_ceilings`), or measured (engine/calibration.py). `predict`
divides one by the other. This file imports no torch until something is measured.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from config import GPTConfig

# From the makers' data sheets: words of the device's name, dense peaks of the matrix units in FLOP/s
# with fp32 accumulation, for bf16 and fp16 and for tf32, and bytes per second of the memory and of
# the links to other GPUs (one direction; PCIe cards have the 16 lanes of their generation). The
# first row applies whose words are all in the name.
DEVICES = (
    ("H200", 989e12, 494e12, 4.8e12, 450e9),
    ("GH200", 989e12, 494e12, 4.9e12, 450e9),
    ("H100 PCIe", 756e12, 378e12, 2.0e12, 64e9),
    ("H100 NVL", 835e12, 417e12, 3.9e12, 300e9),
    ("H100", 989e12, 494e12, 3.35e12, 450e9),
    ("H20", 148e12, 74e12, 4.0e12, 450e9),
    ("B300", 2250e12, 1125e12, 8.0e12, 900e9),
    ("B200", 2250e12, 1125e12, 8.0e12, 900e9),
    ("GB300", 2500e12, 1250e12, 8.0e12, 900e9),
    ("GB200", 2500e12, 1250e12, 8.0e12, 900e9),
    ("A100", 312e12, 156e12, 1.555e12, 300e9),
    ("A40", 150e12, 75e12, 696e9, 32e9),
    ("A30", 165e12, 82e12, 933e9, 32e9),
    ("A10G", 70e12, 35e12, 600e9, 32e9),
    ("A10", 125e12, 62e12, 600e9, 32e9),
    ("L40S", 362e12, 183e12, 864e9, 32e9),
    ("L40", 181e12, 90e12, 864e9, 32e9),
    ("L4", 121e12, 60e12, 300e9, 32e9),
    ("RTX 6000 Ada", 364e12, 182e12, 960e9, 32e9),
    ("RTX A6000", 155e12, 77e12, 768e9, 32e9),
    ("RTX 5090", 209e12, 105e12, 1792e9, 64e9),
    ("RTX 4090", 165e12, 83e12, 1008e9, 32e9),
    ("RTX 3090 Ti", 80e12, 40e12, 1008e9, 32e9),
    ("RTX 3090", 71e12, 36e12, 936e9, 32e9),
    ("V100", 125e12, None, 900e9, 150e9),
    ("T4", 65e12, None, 300e9, 16e9),
)
# Words that mark a variant slower than the data sheet of the device without that word.
SLOWER = ("Laptop", "Max-Q", "D", "MIG")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device in a precision. None if it is unknown; MFU is then null."""
    found = _sheet(device_name) if precision in ("bf16", "fp16", "tf32") else None
    return found[1 if precision == "tf32" else 0] if found else None


def _sheet(device_name: str) -> tuple[Any, ...] | None:
    """The figures of the first row whose words are all in the name; None for a slower variant."""
    words = re.split(r"[\s-]+", device_name)
    if any(word in words for word in SLOWER):
        return None
    for name, *figures in DEVICES:
        if all(part in words for part in name.split()):
            return tuple(figures)
    return None


def product_ceiling(device: str, precision: str, seconds: float = 2.0) -> float:
    """Measured FLOP/s of a large square product: the best of several rounds. The matrices are
    random, because zeros would be faster."""
    import torch

    from engine import processes
    from engine.precision import DTYPES, set_products

    found = processes.start(device).device
    n, products = (8192, 20) if found.type == "cuda" else (2048, 1)
    set_products(precision, found)
    a, b = (
        torch.randn(n, n, device=found, dtype=DTYPES.get(precision, torch.float32))
        for _ in range(2)
    )

    def timed() -> float:
        began = time.perf_counter()
        for _ in range(products):
            product = a @ b
        product[0, 0].item()  # waits for the device
        return (time.perf_counter() - began) / products

    timed()
    until = time.perf_counter() + seconds
    best = timed()
    while time.perf_counter() < until:
        best = min(best, timed())
    return 2 * n**3 / best


# --- the ledger

# 15 of 16 predictions from operations timed alone were within this share of a run, whatever their
# rounds said (docs/doctor.md).
ERROR = 0.2

ITEMSIZE = {"fp32": 4, "tf32": 4}  # bytes of an activation; 2 in the other precisions


@dataclass(frozen=True)
class Operation:
    """A class of operation of one optimizer step on one rank."""

    group: str  # what it belongs to, for pictures and sums
    name: str
    key: str  # what is computed, with its shape: the same key costs the same per unit
    units: float  # how often: rows of a product, sequences of attention, elements of other things
    flops: float  # of matrix products only
    bytes: float  # read and written, with every tensor once


@dataclass(frozen=True)
class Ceilings:
    """The speeds of a device in one precision."""

    device: str
    source: str  # where the figures come from, in words
    flops: float  # FLOP/s of a large matrix product
    bandwidth: float  # bytes/s of the memory
    link: float = math.inf  # bytes/s to other ranks
    # by the key of an operation, seconds of one unit in each round; operations without an entry
    # take their roofline's time
    rounds: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def roofline(self, operation: Operation) -> float:
        """The least seconds: those of the products or of the bytes, whichever take longer."""
        rate = self.link if operation.group == "communication" else self.bandwidth
        return max(operation.flops / self.flops, operation.bytes / rate)

    def seconds(self, operation: Operation) -> float:
        """The expected seconds: the median of the rounds, else the roofline's."""
        if rounds := self.rounds.get(operation.key):
            return operation.units * statistics.median(rounds)
        return self.roofline(operation)


@dataclass(frozen=True)
class Prediction:
    """The expected time of an optimizer step."""

    seconds: float  # of one step
    tokens_per_second: float  # of all ranks
    share: float  # give or take, as a share of both, ERROR at least; 0 if nothing was measured


def sheet_ceilings(device_name: str, precision: str) -> Ceilings | None:
    """The data sheet's speeds of a GPU, by words of its name; None if it is unknown."""
    peak, sheet = peak_flops(device_name, precision), _sheet(device_name)
    if peak is None or sheet is None:
        return None
    return Ceilings(device_name, "the data sheet", peak, *sheet[2:])


def predict(
    config: GPTConfig,
    batch: int,
    seq_len: int,
    precision: str,
    ceilings: Ceilings,
    ranks: int = 1,
    micro_batches: int = 1,
) -> Prediction:
    """The expected time of a pretraining step of `batch` sequences a rank, with AdamW.

    The operations run one after another. Only communication overlaps: its time counts as far as it
    exceeds that of the last micro-batch's backward pass. With a data sheet's ceilings the result is
    a bound that no run exceeds.
    """
    ledger = list(operations(config, batch, seq_len, precision, ranks, micro_batches))
    seconds = {op: ceilings.seconds(op) for op in ledger}
    talk = sum(s for op, s in seconds.items() if op.group == "communication")
    work = sum(seconds.values()) - talk
    backward = sum(s for op, s in seconds.items() if op.key.split()[0] in BACKWARD)
    total = work + max(0.0, talk - backward / micro_batches)
    return Prediction(total, ranks * batch * seq_len / total, _spread(ledger, ceilings))


def _spread(ledger: list[Operation], ceilings: Ceilings) -> float:
    """Half the distance between the least and the largest sum of a round, as a share of their
    mean, but ERROR at least."""
    measured = [(op.units, ceilings.rounds[op.key]) for op in ledger if op.key in ceilings.rounds]
    rounds = min((len(values) for _, values in measured), default=0)
    sums = [sum(units * values[i] for units, values in measured) for i in range(rounds)]
    return max(ERROR, (max(sums) - min(sums)) / (max(sums) + min(sums))) if sums else 0.0


# --- what a step consists of

PARTS = ("forward", "dx", "dW")  # the products of a linear layer
BACKWARD = ("dx", "dW", "backward")
BLOCK = ("products", "attention", "norms and residual", "GELU")  # groups that --recompute repeats


def operations(
    config: GPTConfig,
    batch: int,
    seq_len: int,
    precision: str,
    ranks: int = 1,
    micro_batches: int = 1,
) -> Iterator[Operation]:
    """The ledger of one step of `batch` sequences on one rank, in `micro_batches` passes.

    Dropout is not counted.
    """
    for operation in _counted_once(config, batch, seq_len, precision, ranks, micro_batches):
        if config.recompute and operation.key.startswith("forward") and operation.group in BLOCK:
            names = ("units", "flops", "bytes")
            twice: Any = {name: 2 * getattr(operation, name) for name in names}
            operation = dataclasses.replace(operation, **twice)
        yield operation


def _counted_once(
    config: GPTConfig, batch: int, seq_len: int, precision: str, ranks: int, micro_batches: int
) -> Iterator[Operation]:
    """The ledger without recomputed activations."""
    C, V, L = config.n_embd, config.padded_vocab_size, config.n_layer
    rows, size = batch * seq_len, ITEMSIZE.get(precision, 2)
    layers = {
        "qkv": (C, 3 * C),
        "attention projection": (C, C),
        "fc": (C, 4 * C),
        "mlp projection": (4 * C, C),
    }
    for name, (k, n) in layers.items():
        yield from _products("products", name, k, n, rows, L, size, L * micro_batches)
    yield from _products("head", "head", C, V, rows, 1, size, micro_batches)
    products = 2 * seq_len**2 * C  # of q k' and p v under the diagonal, for one sequence
    for part, flops, tensors in (("forward", 1, 4), ("backward", 2.5, 8)):
        shape = f"attention {config.n_head}x{C // config.n_head}, {seq_len} long"
        yield Operation("attention", f"attention {part}", f"{part} {shape}", batch * L,
                        flops * products * batch * L, tensors * size * C * rows * L)  # fmt: skip
    norms = 2 * L + 1
    for part in ("forward", "backward"):  # each reads two tensors and writes two, or so
        yield _memory("norms and residual", part, f"norm {C}", rows * norms, 4 * size * C)
    for part, tensors in (("forward", 2), ("backward", 3)):
        yield _memory("GELU", part, f"gelu {4 * C}", rows * L, 4 * tensors * size * C)
    yield _memory("loss", "", f"loss {V}", rows, 2 * size * V)
    for part in ("forward", "backward"):
        yield _memory("embedding", part, f"embedding {V}x{C}", rows, (4 + size) * C)
    matrices, table = L * 12 * C * C, V * C
    params = matrices + L * 13 * C + 2 * C + table + config.block_size * C
    params += 0 if config.tied_head else table
    # The head's gradient is scaled and, where it is tied, added to the embedding's, which is
    # zeroed first. Later micro-batches add to every gradient.
    sums = table * micro_batches * (2 + 1 + 3 * config.tied_head) + 3 * params * (micro_batches - 1)
    yield _memory("gradient sums and casts", "sums", "sums", sums, 4)
    if size == 2:
        casts = (matrices + L * 9 * C) * (micro_batches + 1)  # gradients to fp32, weights from it
        yield _memory("gradient sums and casts", "casts", "casts", casts, 6)
    yield _memory("clipping", "", "clipping", params, 12)
    yield _memory("optimizer", "", "optimizer", params, 28)
    if ranks > 1:  # a ring passes each gradient around twice
        sent = 2 * (ranks - 1) / ranks * 4 * params
        yield Operation("communication", "all-reduce", f"all-reduce {ranks}", 1, 0.0, sent)


def _products(
    group: str, name: str, k: int, n: int, rows: int, calls: int, size: int, passes: int
) -> Iterator[Operation]:
    """The three products of `calls` linear layers from k to n. `passes`: how often the weights are
    read."""
    for part in PARTS:
        moved = size * ((k + n) * rows * calls + k * n * passes)
        shape = f"{part} product {k}x{n}"
        yield Operation(group, f"{name} {part}", shape, rows * calls, 2 * k * n * rows * calls,
                        moved)  # fmt: skip


def _memory(group: str, part: str, key: str, units: float, unit_bytes: float) -> Operation:
    """An operation that moves bytes and multiplies no matrices."""
    name = f"{group} {part}".strip() if part not in ("sums", "casts") else f"gradient {part}"
    key = f"{part} {key}" if part in ("forward", "backward") else key
    return Operation(group, name, key, units, 0.0, unit_bytes * units)
