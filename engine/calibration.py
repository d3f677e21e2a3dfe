"""Measures the speeds of this machine for the ledger (engine/roofline.py), in a few seconds.

Every operation of a training step runs alone, forward and backward through autograd, with the
widths of the model and as many rows as the time allows. Nothing is fitted to a model or to a run.
The trade-off: what a step does between its operations is not in it, and operations alone find more
of their data in the caches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig
from engine import processes
from engine.memory import set_allocator
from engine.precision import DTYPES, set_products
from engine.roofline import Ceilings, Operation, operations, sheet_ceilings
from kernels.cross_entropy import cross_entropy_in_place
from kernels.linear_cross_entropy import CHUNK_BYTES, loss_and_gradient
from kernels.ops import Ops, ops_of

COPIED = 32 << 20  # fp32 elements: more than the caches hold
ROUNDS = 3
ELEMENTS = 8 << 20  # of parameters that the optimizer, clipping and casts are timed on
DRAWN = 1 << 16  # random numbers that are repeated: drawing them takes longer than a product
SLOW = 1e9  # FLOP/s of products that nothing speeds up
LEAST_SECONDS = 0.015  # a call that is shorter gets more rows
FEW, SOME = 32, 1024  # rows that products, and all other operations, begin with
# Rows from which on a product is as fast as with more (measured: 64 rows of GPT-2's shapes reach
# 70% of that rate). A product that takes PATIENCE times as long as its share gets fewer.
FULL, PATIENCE = 512, 4
BUSY = 0.6  # on a quiet CPU the calls keep over 0.75 of the threads running

Call = Callable[[], object]


@dataclass
class Probe:
    """One operation that can be timed with any number of units."""

    operation: Operation
    build: Callable[[int], Call]  # takes the units, returns a call that computes them once
    least: int  # units to begin with
    most: int
    full: int = 0  # units that a call should have at least


def calibrate(
    config: GPTConfig,
    batch: int,
    seq_len: int,
    precision: str,
    device: torch.device,
    seconds: float = 8.0,
    without: Sequence[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> Ceilings:
    """This device's speeds for micro-batches of `batch` sequences, in about `seconds`.

    When the time is over, as on a slow or busy machine, the products that are left get their
    roofline's time, and each operation is timed once. It then takes about twice as long at most.

    On a GPU the compiler fuses what multiplies no matrices, so that only products and attention are
    timed there, and the memory's bandwidth stands for the rest. With time.process_time as `clock`
    and one thread, work of other programs does not count. Sets how this process multiplies and
    allocates, as a run does.
    """
    set_products(precision, device, without)
    if device.type == "cpu" and "kept-memory" not in without:
        set_allocator(keep_freed=True)
    _load(device)
    began, own, wall = clock(), time.process_time(), time.perf_counter()
    a, b = (torch.zeros(COPIED, device=device) for _ in range(2))
    copying = [_seconds(lambda: a.copy_(b), device, clock) for _ in range(3)]
    probes = list(_probes(config, batch, seq_len, precision, device))
    # Products last: one that is left out is about as fast as the others.
    probes.sort(key=lambda probe: " product " in probe.operation.key)
    flops = sum(probe.operation.flops for probe in probes)
    calls: dict[str, tuple[Call, int]] = {}
    for probe in probes:
        if calls and clock() - began > seconds:
            break
        # a call in each round, and about as much to find its size
        share = probe.operation.flops / flops * seconds / (2 * ROUNDS)
        calls[probe.operation.key] = _grown(probe, max(LEAST_SECONDS, share), device, clock)
    rounds: dict[str, list[float]] = {key: [] for key in calls}
    for number in range(ROUNDS):
        if number and clock() - began > seconds:
            break
        for key, (call, units) in calls.items():
            rounds[key].append(_seconds(call, device, clock) / units)
    rates = [
        probe.operation.flops / probe.operation.units / min(rounds[probe.operation.key])
        for probe in probes
        if probe.operation.flops and probe.operation.key in rounds
    ]
    name = processes.device_name(device)
    sheet = sheet_ceilings(name, precision)
    source = "operations timed on this machine"
    if left := len(probes) - len(calls):
        source += f", {left} of {len(probes)} left to the roofline for lack of time"
    had = (time.process_time() - own) / (time.perf_counter() - wall) / torch.get_num_threads()
    if device.type == "cpu" and clock is time.perf_counter and had < BUSY:
        source += f", beside other programs: it had {had:.0%} of its CPU and is faster alone"
    return Ceilings(
        name,
        source,
        max(rates, default=SLOW),
        2 * 4 * COPIED / min(copying),
        sheet.link if sheet else math.inf,
        rounds={key: tuple(values) for key, values in rounds.items()},
    )


def _load(device: torch.device) -> None:
    """Run a backward pass and an optimizer's step: PyTorch takes two seconds for the first ones."""
    p = torch.nn.Parameter(torch.ones(1, device=device))
    p.sum().backward()
    torch.optim.AdamW([p], fused=True).step()


def _grown(
    probe: Probe, target: float, device: torch.device, clock: Callable[[], float]
) -> tuple[Call, int]:
    """A call with so many units that it takes about `target` seconds, and its units. It has
    run."""
    work = probe.operation.flops / probe.operation.units
    units = max(probe.least, int(target * SLOW / work)) if work else probe.least
    probe.build(min(units, probe.most))()  # the first call allocates, and packs weights
    while True:
        units = min(units, probe.most)
        call = probe.build(units)
        took = _seconds(call, device, clock)
        few = units < probe.full and took < PATIENCE * target  # too few rows for the full rate
        if units == probe.most or (took >= target / 2 and not few):
            return call, units
        grown = math.ceil(units * min(16.0, max(2.0, target / took)))
        units = min(grown, probe.full) if few and took >= target / 2 else grown


def _seconds(call: Call, device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    began = clock()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - began


def _probes(
    config: GPTConfig, batch: int, seq_len: int, precision: str, device: torch.device
) -> Iterator[Probe]:
    """The operations to time, each with a way to run it."""
    dtype, ops = DTYPES.get(precision, torch.float32), ops_of(config)
    seen = set[str]()
    for operation in operations(config, batch, seq_len, precision):
        part, _, what = operation.key.partition(" ")
        if operation.key in seen or not operation.units:
            continue
        seen.add(operation.key)
        timing = Timing(config, seq_len, dtype, device, ops, part)
        rows, least = batch * seq_len, SOME
        if what.startswith("product"):
            k, n = map(int, what.split()[-1].split("x"))
            head = operation.group == "head"
            rows = min(rows, max(1, CHUNK_BYTES // (dtype.itemsize * n))) if head else rows
            linear = F.linear if head else ops.linear
            yield Probe(operation, lambda n_rows, t=timing, k=k, n=n, linear=linear, head=head:
                        t.product(linear, n_rows, k, n, bias=not head), FEW, rows, FULL)  # fmt: skip
        elif what.startswith("attention"):
            yield Probe(operation, timing.attention, 1, batch)
        elif device.type == "cuda":
            continue
        elif what.startswith("norm"):
            yield Probe(operation, timing.norm, least, rows)
        elif what.startswith("gelu"):
            yield Probe(operation, timing.gelu, least, rows)
        elif what.startswith("embedding"):
            yield Probe(operation, timing.embedding, rows, rows)
        elif part == "loss":
            yield Probe(operation, timing.loss, FEW, min(rows, SOME))
        else:
            elements = min(ELEMENTS, int(operation.units))
            yield Probe(operation, getattr(timing, part), elements, elements)


@dataclass(frozen=True)
class Timing:
    """Builds the calls that run an operation of a model, for one part of it: forward, dx, dW or
    backward."""

    config: GPTConfig
    seq_len: int
    dtype: torch.dtype
    device: torch.device
    ops: Ops
    part: str

    def product(
        self, linear: Callable[[Tensor, Tensor, Tensor | None], Tensor], rows: int, k: int, n: int,
        bias: bool,
    ) -> Call:  # fmt: skip
        """A linear layer from k to n; dW includes the bias's gradient."""
        x, weight = self._random(rows, k), self._random(n, k)
        shift = self._random(n) if bias else None
        wanted = [x] if self.part == "dx" else [t for t in (weight, shift) if t is not None]
        return self._pass(lambda: linear(x, weight, shift), wanted)

    def attention(self, sequences: int) -> Call:
        """Causal attention of packed qkv, as model.Attention calls it."""
        H, C = self.config.n_head, self.config.n_embd
        qkv, bias = self._random(sequences, self.seq_len, 3, H, C // H), self._random(3 * C)

        def forward() -> Tensor:
            if self.ops.packed_attention:
                y = self.ops.packed_attention(qkv, None, 0.0)
            else:
                q, k, v = self.ops.split_heads(lambda x, _: x, qkv.flatten(2), bias, H)
                y = self.ops.attention(q, k, v, None, 0.0).transpose(1, 2)
            return y.reshape(sequences, -1, C)

        return self._pass(forward, [qkv])

    def norm(self, rows: int) -> Call:
        """The addition of a branch to the residual stream, and the layer norm of the sum."""
        C = self.config.n_embd
        x, branch = self._random(rows, C), self._random(rows, C)
        weight, bias = self._random(C, dtype=torch.float32), self._random(C, dtype=torch.float32)
        eps = self.config.layer_norm_epsilon
        return self._pass(
            lambda: self.ops.add_norm(x, branch, weight, bias, eps), [x, branch, weight, bias]
        )

    def gelu(self, rows: int) -> Call:
        """The GELU of a product that is computed already."""
        x, bias = self._random(rows, 4 * self.config.n_embd), self._random(4 * self.config.n_embd)
        return self._pass(lambda: self.ops.linear_gelu(lambda x, bias: x, x, bias), [x])

    def embedding(self, rows: int) -> Call:
        """Both embeddings and their sum; backward includes zeroing the gradient's table."""
        C, T = self.config.n_embd, min(rows, self.seq_len)
        table = self._random(self.config.padded_vocab_size, C, dtype=torch.float32)
        positions = self._random(self.config.block_size, C, dtype=torch.float32)
        idx = torch.randint(self.config.vocab_size, (rows // T, T), device=self.device)
        place = torch.arange(T, device=self.device)
        return self._pass(
            lambda: (F.embedding(idx, table) + F.embedding(place, positions)).to(self.dtype),
            [table, positions],
        )

    def loss(self, rows: int) -> Call:
        """The loss and the gradient of the logits, without the head's products."""
        V = self.config.padded_vocab_size
        logits = self._random(rows, V).detach()
        targets = torch.randint(self.config.vocab_size, (rows,), device=self.device)
        if "cross_entropy" in self.config.kernels:
            return lambda: cross_entropy_in_place(logits, targets, self.config.vocab_size)
        return lambda: loss_and_gradient(logits, targets, self.config.vocab_size, True)

    def optimizer(self, elements: int) -> Call:
        """Fused AdamW, and the copies in the products' format."""
        p = torch.nn.Parameter(self._random(elements, dtype=torch.float32).detach())
        p.grad = torch.full_like(p, 1e-3)
        return torch.optim.AdamW([p], fused=True).step

    def clipping(self, elements: int) -> Call:
        """The norm of the gradients, and their product with a factor."""
        grad, factor = torch.full((elements,), 1e-3, device=self.device), torch.ones(())
        factor = factor.to(self.device)

        def clip() -> None:
            torch.nn.utils.get_total_norm([grad])
            torch._foreach_mul_([grad], factor)

        return clip

    def sums(self, elements: int) -> Call:
        """A pass over a gradient in fp32: a third of an addition to another one."""
        a, b = (torch.zeros(elements // 3 + 1, device=self.device) for _ in range(2))
        return lambda: a.add_(b)

    def casts(self, elements: int) -> Call:
        """A cast between fp32 and the products' format."""
        narrow = torch.zeros(elements, dtype=self.dtype, device=self.device)
        return lambda: narrow.float()

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype, size = dtype or self.dtype, math.prod(shape)
        numbers = torch.randn(min(size, DRAWN), device=self.device).to(dtype)
        repeated = numbers.repeat(math.ceil(size / DRAWN))[:size]
        return repeated.view(shape).requires_grad_()

    def _pass(
        self, forward: Callable[[], Tensor | tuple[Tensor, ...]], wanted: list[Tensor]
    ) -> Call:
        """A call of the forward pass, or of the backward pass to the tensors that are wanted."""
        if self.part == "forward":
            return forward
        found = forward()
        outputs = found if isinstance(found, tuple) else (found,)
        grads = [self._random(*out.shape, dtype=out.dtype).detach() for out in outputs]
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
