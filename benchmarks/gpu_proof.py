"""Compile every Triton kernel for real cards on a machine that has none:

python -m benchmarks.gpu_proof [--quick]

The launch code of kernels/ runs on meta tensors, which have shapes but no bytes, under a driver
that only names a GPU. Signatures, constants, warps and stages are therefore those of a real launch,
and Triton's own ptxas makes the machine code. Kernels that a run refuses on a card (kernels.choose,
choose_precision) are listed with the reason. The exit code is 1 if any other kernel does not
compile, spills more than SPILLS bytes per thread, or takes more shared memory than its card has or
than kernels/attention.py says.

The trade-off: this proves neither results nor times, which only a GPU can show (gpu_check).
kernels/fp8_linear.py is left out, because its products are cuBLAS's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from base.cli import entry_point, parse
from base.machine import cores
from benchmarks import machine
from benchmarks.runs import now
from benchmarks.sass import disassembled, per_element
from benchmarks.table import markdown
from config import GPTConfig, PathOrName, SmallCount, TrainConfig, UserError, known_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kernels._card import Card

# One card for each architecture, by its name in kernels._card.CARDS.
ARCHS = {
    75: "T4",
    80: "A100",
    86: "RTX 3090",
    89: "RTX 4090",
    90: "H100",
    100: "B200",
    120: "RTX 5090",
}
SPILLS = 64  # bytes per thread, stored plus loaded
HEADS, QUICK_HEADS = (32, 64, 80, 96, 128), (64, 128)
WIDTHS, QUICK_WIDTHS = (128, 768, 1600), (768,)  # of the residual stream
LOGITS = ((50304, 50257), (1024, 1000))  # columns of the logits, and vocabulary size
ROWS = 8192
TENSOR_CORES = ("tcgen05.mma", "wgmma", "mma.sync")  # PTX's instructions


@dataclass(frozen=True)
class Options:
    """Options of the proof."""

    archs: tuple[SmallCount, ...] = tuple(ARCHS)
    """Architectures: 75 (T4), 80 (A100), 86 (RTX 3090), 89 (RTX 4090), 90 (H100, H200), 100 (B200),
    120 (RTX 5090)."""
    kernels: tuple[str, ...] = ()
    """Kernels to compile. Default: all."""
    quick: bool = False
    """Only bf16, heads of 64 and 128 with documents, and one width."""
    out: PathOrName = "benchmarks/results"
    """Folder for gpu-proof.json and gpu-proof.md."""


@dataclass(frozen=True)
class Case:
    """A kernel's forward and backward pass in one precision and one shape."""

    kernel: str
    precision: str
    size: int = 0  # head_dim, or columns
    documents: bool = False
    autocast: bool = False  # the residual stream is fp32, the products have 16 bits

    @property
    def group(self) -> str:
        """The table's row that this case belongs to."""
        heads = f", heads of {self.size}" if self.kernel == "attention" else ""
        return f"{self.kernel}, {self.precision}" + (" autocast" if self.autocast else "") + heads

    @property
    def name(self) -> str:
        """The name of the case, unique among the cases of an architecture."""
        size = f", {self.size} wide" if self.kernel not in ("attention", "adamw") else ""
        return self.group + size + (", documents" if self.documents else "")


@dataclass
class Row:
    """One compiled kernel, or the reason why it was not compiled."""

    arch: int
    case: str
    group: str
    kernel: str = ""
    result: str = "compiled"  # compiled, refused or failed
    reason: str = ""
    warps: int = 0
    stages: int = 0
    registers: int = 0  # per thread
    spilled: int = 0  # bytes per thread, stored plus loaded
    shared: int = 0  # bytes per program
    tensor_cores: str = ""
    notes: str = ""  # ptxas's warnings of products that wait for each other
    loops: float = 0.0  # instructions per element, as in benchmarks.sass; cross_entropy only
    whole_row: float = 0.0


# --- the launches


def cases(kernel: str, quick: bool) -> Iterator[Case]:
    """The shapes of GPT-2's sizes and others around them, in every precision that a run may
    have."""
    precisions = ("bf16",) if quick else ("bf16", "fp16", "tf32", "fp32")
    widths = QUICK_WIDTHS if quick else WIDTHS
    for precision in precisions:
        if kernel == "attention":
            for head in QUICK_HEADS if quick else HEADS:
                yield from (
                    Case(kernel, precision, head, documents)
                    for documents in ((True,) if quick else (False, True))
                )
        elif precision == "tf32":
            continue  # other kernels have no matrix products, so tf32 is the same as fp32
        elif kernel == "cross_entropy":
            yield from (
                Case(kernel, precision, columns) for columns, _ in LOGITS[: 1 if quick else None]
            )
        elif kernel == "layer_norm":
            yield from (
                Case(kernel, precision, width, autocast=precision == "fp16") for width in widths
            )
        elif kernel != "adamw":
            yield from (Case(kernel, precision, width) for width in widths)
        elif precision != "fp16":  # AdamW's tensors are fp32, and bf16 with cast-once
            yield Case(kernel, precision)
    if kernel == "layer_norm" and not quick:  # --without cast-once
        yield from (Case(kernel, "bf16", width, autocast=True) for width in widths)


def examples(case: Case) -> Iterator[Callable[[], object]]:
    """Functions that each launch a kernel's passes on meta tensors: of its own example, and of
    what a run may ask of it besides."""
    import torch

    from kernels import KERNELS
    from kernels.cross_entropy import cross_entropy_in_place
    from kernels.layer_norm import add_layer_norm

    dtype, config = dtype_of(case), config_of(case)
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    if case.kernel == "adamw":
        yield functools.partial(launch_adamw, dtype)
        return
    make = KERNELS[case.kernel].example
    assert make
    example = make(ROWS, config, dtype=dtype, device="meta")
    inputs = list(example.inputs)
    if case.kernel == "cross_entropy":
        targets = meta(ROWS, dtype=torch.int64)
        yield functools.partial(cross_entropy_in_place, *inputs, targets, config.vocab_size)
    if case.kernel == "layer_norm":
        if case.autocast:  # an fp32 stream and gain, and a branch of 16 bits
            inputs = [t if i == 1 else t.float() for i, t in enumerate(inputs)]
        alone = functools.partial(add_layer_norm, eps=1e-5, triton=True)
        yield functools.partial(both_passes, alone, [inputs[0], None, *inputs[2:]])
    if case.documents:
        inputs.append(meta(*inputs[0].shape[:2], dtype=torch.int64))
    yield functools.partial(both_passes, example.kernel, inputs)


def both_passes(operation: Callable[..., Any], inputs: Sequence[Tensor | None]) -> None:
    """Run an operation and its backward pass, with a gradient for each floating input."""
    import torch

    leaves = [t.requires_grad_() for t in inputs if t is not None and t.is_floating_point()]
    outputs = operation(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    computed = [out for out in outputs if out.grad_fn]
    torch.autograd.grad(computed, leaves, [torch.empty_like(out) for out in computed])


def config_of(case: Case) -> GPTConfig:
    """The widths of the case's model."""
    if case.kernel == "attention":
        return GPTConfig(n_embd=12 * case.size)
    if case.kernel == "cross_entropy":
        return GPTConfig(vocab_size=dict(LOGITS)[case.size])
    return GPTConfig(n_head=1, n_embd=case.size or 768)


def launch_adamw(gradients: torch.dtype) -> None:
    """Launch AdamW and the gradient norm. Gradients are fp32, or bf16 with bf16 copies of the
    weights."""
    import torch

    import kernels.adamw as module

    shapes = ((50304, 768), (2304, 768), (768,))
    n = len(shapes)

    def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [meta(*shape, dtype=dtype) for shape in shapes]

    copies = tensors(torch.bfloat16) if gradients == torch.bfloat16 else [None] * n
    moments = tensors(), tensors()
    table = module.Table(
        tensors(), *moments, [meta() for _ in shapes], copies, [1.0] * n, [0.1] * n
    )
    grads = tensors(gradients)
    module.adamw(table, grads, meta(), meta(), meta(dtype=torch.bool), (0.9, 0.95), 1e-8)
    module.global_norm(grads)


def meta(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized tensor on the meta device, fp32 by default."""
    import torch

    return torch.empty(shape, dtype=dtype or torch.float32, device="meta")


def dtype_of(case: Case) -> torch.dtype:
    """The dtype of the case's activations."""
    import torch

    from engine.precision import DTYPES

    return DTYPES.get(case.precision, torch.float32)


@contextlib.contextmanager
def launching(module: Any) -> Generator[None]:
    """Inside, the file's custom operations run their own code on meta tensors. By themselves they
    would only compute shapes there, and torch knows no autocast for them."""
    import torch
    from torch._library.custom_ops import CustomOpDef

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device: False))
        for operator in vars(module).values():
            if isinstance(operator, CustomOpDef):
                stack.enter_context(mock.patch.object(operator, "_abstract_fn", operator._init_fn))
        yield


# --- the compiler, which runs in worker processes


class NoGPU:
    """The part of a Triton driver that a launch uses, for a GPU that is not there."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        """The architecture, because Triton caches compiled kernels by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_current_target(self) -> Any:
        """The target to compile for, with 32 threads in a warp."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_interface(self) -> Any:
        """torch's interface to CUDA, which Triton asks for."""
        import torch

        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        """The device of the arguments."""
        import torch

        return torch.device("meta")


@contextlib.contextmanager
def compiling(arch: int) -> Generator[list[tuple[Any, str]]]:
    """Inside, kernel[grid](...) compiles for `arch` and launches nothing.

    Yields a list that collects the kernels, each with ptxas's output.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, str]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        words = io.StringIO()
        with contextlib.redirect_stdout(words):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
            kernel = kernel.result() if hasattr(kernel, "result") else kernel
        if words.getvalue():  # a kernel that is compiled already gives no output
            found.append((kernel, words.getvalue()))
        return kernel

    driver.set_active(NoGPU(arch))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch


def proof(arch: int, case: Case) -> list[Row]:
    """The rows of a case's kernels for the card of `arch`, or one row that says why there are
    none."""
    from kernels import _card

    card = _card.CARDS[ARCHS[arch]]
    row = Row(arch, case.name, case.group)
    with compiling(arch) as found, mock.patch.object(_card, "card", lambda device="cuda": card):
        if reason := refusal(case, card):
            return [dataclasses.replace(row, result="refused", reason=reason)]
        failed = []
        try:
            with launching(importlib.import_module(f"kernels.{case.kernel}")):
                for launch in examples(case):
                    launch()
        except Exception as error:  # the compiler raises errors of many kinds
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
            failed = [dataclasses.replace(row, result="failed", reason=reason)]
    most = limit(case, card)
    rows = [
        judged(counted(examined(row, kernel, words), case, kernel), card, most)
        for kernel, words in found
    ]
    return rows + failed


def refusal(case: Case, card: Card) -> str | None:
    """The engine's own reason if a run on this card does not take the kernel, else None."""
    import torch

    from engine.precision import choose_precision
    from kernels import choose

    n_embd = 12 * case.size if case.kernel == "attention" else None
    cfg: Any = TrainConfig(kernels=case.kernel, n_head=12, n_embd=n_embd)
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device: card.capability):
        try:
            precision, _ = choose_precision(case.precision, torch.device("cuda"))
            choose(dataclasses.replace(cfg, precision=precision), "cuda", card)
        except UserError as error:
            return re.sub(r"^--(precision|kernels \S+:) ", "", str(error)).partition(";")[0]
    return None


def limit(case: Case, card: Card) -> int:
    """The largest number of bytes of shared memory that a program may take."""
    if case.kernel != "attention":
        return card.shared_memory
    from kernels.attention import KernelTiles, choose_tiles

    chosen = choose_tiles(card, case.precision, case.size)
    assert isinstance(chosen, KernelTiles)
    return chosen.shared


def examined(row: Row, kernel: Any, words: str) -> Row:
    """`row` with the figures of a compiled kernel. `words` is ptxas's output."""

    def count(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, words)))

    ptx = kernel.asm["ptx"]
    meta = kernel.metadata
    return dataclasses.replace(
        row,
        kernel=meta.name.strip("_"),
        warps=meta.num_warps,
        stages=meta.num_stages,
        registers=count(r"Used (\d+) registers"),
        spilled=count(r"(\d+) bytes spill"),
        shared=meta.shared,
        tensor_cores=", ".join(
            name for name in TENSOR_CORES if re.search(rf"\b{re.escape(name)}", ptx)
        ),
        notes=", ".join(sorted(set(re.findall(r"C75\d\d", words)))),
    )


def counted(row: Row, case: Case, kernel: Any) -> Row:
    """`row` with the instructions per element, for kernels whose programs each read a row."""
    if case.kernel != "cross_entropy":
        return row
    threads = 32 * kernel.metadata.num_warps
    sass = disassembled(kernel.asm["cubin"])
    count = per_element(sass, dtype_of(case).itemsize, threads, case.size)
    return dataclasses.replace(row, loops=count.loops, whole_row=count.row)


def judged(row: Row, card: Card, limit: int) -> Row:
    """`row`, marked as failed if the kernel spills or does not fit."""
    faults = []
    if not row.registers:
        faults.append("ptxas printed no number of registers")
    if row.spilled > SPILLS:
        faults.append(f"spills {row.spilled} bytes")
    if row.shared > card.shared_memory:
        faults.append(
            f"takes {row.shared} bytes of shared memory, but {card.name} has {card.shared_memory}"
        )
    elif row.shared > limit:
        faults.append(
            f"takes {row.shared} bytes of shared memory, but kernels/attention.py says {limit}"
        )
    return dataclasses.replace(row, result="failed", reason="; ".join(faults)) if faults else row


def versions_of_tools() -> dict[str, str]:
    """The versions of Triton's assemblers. Raises UserError if Triton or an assembler is
    missing."""
    try:
        from triton import knobs
    except ImportError:
        raise UserError(
            "the proof needs Triton, which is not installed; pip install triton"
        ) from None
    try:
        tools = {"ptxas": knobs.nvidia.ptxas, "ptxas-blackwell": knobs.nvidia.ptxas_blackwell}
        return {name: tool.version for name, tool in tools.items()}
    except RuntimeError as error:
        raise UserError(
            f"the proof needs Triton's assembler: {error}; pip install --force-reinstall triton"
        ) from None


# --- the command


def run(archs: Iterable[int], names: Iterable[str], quick: bool) -> list[Row]:
    """Compile all cases in at most two processes, and report each on standard error."""
    work = [(arch, case) for arch in archs for name in names for case in cases(name, quick)]
    rows: dict[int, list[Row]] = {}
    began = time.perf_counter()
    workers = min(2, cores())
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(proof, *job): i for i, job in enumerate(work)}
        for done in as_completed(futures):
            arch, case = work[futures[done]]
            try:
                found = done.result()
            except Exception as error:  # the compiler may kill its process
                found = [Row(arch, case.name, case.group, result="failed", reason=str(error))]
            rows[futures[done]] = found
            seconds = time.perf_counter() - began
            result = "; ".join(sorted({f"{row.result} {row.reason}".strip() for row in found}))
            print(
                f"{len(rows)}/{len(work)}, {seconds:.0f} s: sm_{arch} {case.name}: {result}",
                file=sys.stderr,
            )
    return [row for i in sorted(rows) for row in rows[i]]


def cell(rows: list[Row]) -> str:
    """The worst figures of a card's kernels, for one cell of the table."""
    if not rows:
        return ""
    if failed := sum(row.result == "failed" for row in rows):
        return f"{failed} FAILED"
    if all(row.result == "refused" for row in rows):
        return "refused"
    registers, spilled, shared = (
        max(getattr(row, name) for row in rows) for name in ("registers", "spilled", "shared")
    )
    cores = ", ".join(sorted({row.tensor_cores for row in rows} - {""})) or "-"
    return f"{registers} / {spilled} / {shared / 1024:.0f} / {cores}"


def instructions(rows: list[Row], archs: list[int]) -> str:
    """The table of instructions per element by cards, or nothing if no kernel was counted."""
    counts: dict[str, dict[int, list[str]]] = {}
    for row in rows:
        if row.loops:
            cells = counts.setdefault(row.case, {})
            cells.setdefault(row.arch, []).append(f"{row.loops:.1f} ({row.whole_row:.1f})")
    if not counts:
        return ""
    lines = [
        [case, *(", ".join(cells.get(arch, [])) for arch in archs)]
        for case, cells in counts.items()
    ]
    heads = ["instructions per element", *(f"{ARCHS[arch]} (sm_{arch})" for arch in archs)]
    return (
        markdown(heads, lines, range(len(heads)))
        + "\n\nEach cell: in place, forward, backward, in the loops over whole blocks (in all of a "
        "row)."
    )


def report(rows: list[Row], archs: list[int], facts: dict[str, Any]) -> str:
    """The table of kernels by cards, then what was refused and what failed."""
    groups = dict.fromkeys(row.group for row in rows)
    lines = [
        [
            group,
            *(
                cell([row for row in rows if row.group == group and row.arch == arch])
                for arch in archs
            ),
        ]
        for group in groups
    ]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    compiled = sum(bool(row.kernel) for row in rows)
    refused = dict.fromkeys(f"- {ARCHS[r.arch]}: {r.reason}" for r in rows if r.result == "refused")
    failed = [
        f"- {ARCHS[r.arch]}: {r.case} {r.kernel}: {r.reason}" for r in rows if r.result == "failed"
    ]
    waits = dict.fromkeys(
        f"- {ARCHS[r.arch]}: {r.case} {r.kernel}: {r.notes}" for r in rows if r.notes
    )
    parts = [
        f"{compiled} kernels compiled without a GPU{' (--quick)' * facts['quick']}, "
        f"{facts['date'][:10]}: {versions}.",
        markdown(
            ["kernel", *(f"{ARCHS[arch]} (sm_{arch})" for arch in archs)],
            lines,
            range(len(archs) + 1),
        ),
        "Each cell: registers a thread / bytes spilled a thread / KiB of shared memory a program / "
        "the tensor cores'\n"
        "instruction; the most over forward and backward passes, widths, and documents or none.",
    ]
    parts += filter(None, [instructions(rows, archs)])
    lists = (
        ("Refused, as a run refuses it:", refused),
        ("Failed:", failed),
        ("ptxas lets products wait:", waits),
    )
    parts += [heading + "\n" + "\n".join(items) for heading, items in lists if items]
    return "\n\n".join(parts) + "\n"


def write(folder: Path, rows: list[Row], archs: list[int], facts: dict[str, Any]) -> str:
    """Write gpu-proof.json, one row per line, and gpu-proof.md. Returns the text of
    gpu-proof.md."""
    text = report(rows, archs, facts)
    columns = [field.name for field in dataclasses.fields(Row)]
    head = json.dumps(facts | {"columns": columns})[:-1]
    body = ",\n".join(json.dumps(list(dataclasses.astuple(row))) for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu-proof.json").write_text(f'{head}, "rows": [\n{body}\n]}}\n', encoding="utf-8")
    (folder / "gpu-proof.md").write_text(text, encoding="utf-8")
    return text


def checked(options: Options) -> tuple[list[int], list[str]]:
    """The architectures and kernels to compile. Raises UserError for an unknown one."""
    from kernels import TRITON

    for arch in options.archs:
        if arch not in ARCHS:
            raise UserError(
                f"--archs {arch} is unknown; it must be one of {', '.join(map(str, ARCHS))}"
            )
    asked = known_names("--kernels", options.kernels, TRITON) or TRITON
    return sorted(set(options.archs)), [name for name in TRITON if name in asked]


def main() -> int:
    """Compile, write the result files and print the table. The exit code is 1 if a kernel
    failed."""
    options = parse(Options, sys.argv[1:])
    archs, names = checked(options)
    os.environ.pop("TRITON_INTERPRET", None)  # else Triton interprets kernels and compiles nothing
    tools = versions_of_tools()
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        rows = run(archs, names, options.quick)
    facts = {
        "quick": options.quick,
        "date": now(),
        "versions": {k: v for k, v in machine.versions().items() if k in ("torch", "triton")}
        | tools,
    }
    print(write(Path(options.out), rows, archs, facts))
    return int(any(row.result == "failed" for row in rows))


if __name__ == "__main__":
    entry_point(main)
