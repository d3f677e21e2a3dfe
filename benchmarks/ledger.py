"""What one training step consists of, class by class:

python -m benchmarks.ledger [--preset gpt2] [--batch 2] [--precision fp32] [--quick]
python -m benchmarks.ledger --device-name H100 [--batch 64] [--seq-len 1024] [--ranks 8]

Each class of operation has its FLOPs, its bytes, and the time of its roofline. Without
--device-name it is this machine's step: the engine's own step runs in turns with the calibration
(engine/calibration.py), and the profiler says how its time divides. Beside what was measured stands
what the calibration expects, and what no class explains is the remainder. With --device-name the
data sheet's speeds of that GPU are used, nothing runs, and the sum is a bound. Beside it stand the
bytes that the generated code would really move there (benchmarks/generated.py), and their time.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from base.charts import COLOURS, PALE, STYLE, save
from base.cli import entry_point, parse
from base.console import outlive
from base.files import read_json
from benchmarks.contenders import ours
from benchmarks.generated import Kernel, generated_kernels
from benchmarks.harness import cells, spread, title
from benchmarks.machine import facts, in_own_process
from benchmarks.peers import prepare
from benchmarks.runs import now, say, write_report
from benchmarks.steps import Case, Shape
from benchmarks.table import markdown
from config import (
    PRESETS,
    Count,
    GPTConfig,
    PathOrName,
    Precision,
    SmallCount,
    TrainConfig,
    UserError,
    known_names,
    resolve,
)
from engine.roofline import Ceilings, Operation, operations, predict, sheet_ceilings

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
REMAINDER = "remainder"
SURROUNDINGS = "bias gradients, stack of dq dk dv"  # a group of the picture
# What the profiler's operations and generated kernels belong to: the first rule applies whose word
# is in the name of the operation, of one that called it, or of one that it was fused from. Products
# are told by their shapes.
RULES = (
    ("uncompiled aten::_to_copy", "gradient casts"),
    ("uncompiled aten::", "gradient sums"),
    ("LinearCrossEntropySumBackward", "gradient sums"),
    ("CrossEntropy", "loss"),
    ("cross_entropy", "loss"),
    ("_foreach_norm", "clipping"),
    ("linalg_vector_norm", "clipping"),
    ("_foreach_mul_", "clipping"),
    ("global_norm", "clipping"),
    ("Optimizer.step", "optimizer"),
    ("adamw", "optimizer"),
    ("_UseCopy", "gradient casts"),
    ("_foreach_copy_", "gradient casts"),
    ("AccumulateGrad", "gradient sums"),
    ("nccl", "all-reduce"),
    ("gloo", "all-reduce"),
    ("ttention", "attention"),
    ("Unbind", "attention"),
    ("unbind", "attention"),
    ("gelu", "GELU"),
    ("Gelu", "GELU"),
    ("layer_norm", "norms and residual"),
    ("LayerNorm", "norms and residual"),
    ("_NormOnCPU", "norms and residual"),
    ("mbedding", "embedding"),
    ("AddmmBackward", "bias gradients"),
    ("aten::add", "norms and residual"),
    ("aten.sum", "bias gradients"),
    ("aten.stack", "stack of dq, dk, dv"),
    ("join_heads", "stack of dq, dk, dv"),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm")


@dataclass(frozen=True)
class Options:
    """Options of the ledger."""

    preset: str = "gpt2"
    """Shapes, comma-separated: micro, tiny, mini, gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    batch: Count = 2
    """Sequences in a step of one rank."""
    seq_len: Count = 256
    """Tokens in a sequence."""
    vocab: Count = 50257
    """Size of the vocabulary."""
    precision: str = ""
    """Number formats, comma-separated. Default: fp32 and bf16 on a CPU, bf16 on a GPU."""
    device_name: str = ""
    """A GPU whose data sheet is used, such as H100 or H200. Default: this machine, measured."""
    ranks: SmallCount = 1
    """GPUs that share the step, each with --batch sequences. Only with --device-name."""
    rounds: Count = 3
    """Turns of the calibration and of the engine's steps."""
    steps: Count = 2
    """Steps in a turn. There are more if these take less than a quarter of --seconds."""
    seconds: Count = 8
    """Seconds of one calibration."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on."""
    quick: bool = False
    """The smallest shape and one short turn, to check that everything works."""
    out: PathOrName = "benchmarks/results"
    """Folder for ledger-DEVICE.json, ledger-DEVICE.md and ledger.png."""


# --- measured here


def measure(
    preset: str, precision: Precision, options: Options, device: str, folder: str
) -> dict[str, Any]:
    """The ledger of this machine, as a case of the result file. Runs in a process of its own."""
    import torch

    from engine.calibration import calibrate
    from kernels import choose, operation_names

    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # keeps the profiler's own messages off stderr
    shape = Shape(**PRESETS[preset], vocab_size=options.vocab, rows=options.batch,
                  seq_len=options.seq_len)  # fmt: skip
    case = Case(preset, shape, precision, device, folder)
    prepare(shape, device, folder)
    step = ours(case)
    kernels, _ = choose(resolve(TrainConfig(precision=precision), device), device)
    config = dataclasses.replace(shape.config, chunked_head=True, kernels=operation_names(kernels))
    own_time = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if own_time else time.perf_counter

    def timed_step() -> float:
        began = clock()
        step()[0].item()
        return clock() - began

    timed_step()
    turns, found = [], []
    for _ in range(options.rounds):
        ceilings = calibrate(config, options.batch, options.seq_len, precision,
                             torch.device(device), options.seconds, clock=clock)  # fmt: skip
        found.append(ceilings)
        # A small model's steps would be over before other programs have had their turn.
        until, took = clock() + options.seconds / 4, list[float]()
        while len(took) < options.steps or clock() < until:
            took.append(timed_step())
        turns.append(statistics.median(took))
    together = merged(found)
    shares = profiled_shares(step, config, device)
    measured = statistics.median(turns)
    predictions = [
        predict(config, options.batch, options.seq_len, precision, one)
        for one in (*found, together)
    ]
    return counted(config, options, precision, together) | {
        "preset": preset,
        "clock": "CPU seconds, so that other programs on the machine do not count"
        if own_time
        else "seconds",
        "predicted": [prediction.seconds for prediction in predictions[:-1]],
        "measured": turns,
        "parts": {name: share * measured for name, share in shares.items()},
    }


def merged(found: Sequence[Ceilings]) -> Ceilings:
    """Several calibrations as one, with the rounds of all."""
    rounds = {key: sum((one.rounds[key] for one in found), ()) for key in found[0].rounds}
    flops, bandwidth = (
        statistics.median(getattr(one, name) for one in found) for name in ("flops", "bandwidth")
    )
    return dataclasses.replace(found[0], flops=flops, bandwidth=bandwidth, rounds=rounds)


def profiled_shares(step: Any, config: GPTConfig, device: str) -> dict[str, float]:
    """The share of each class in the time of one step, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    began = time.perf_counter()
    with profile(activities=activities, record_shapes=True) as found:
        step()[0].item()
        if device == "cuda":
            torch.cuda.synchronize()
        whole = 1e6 * (time.perf_counter() - began)
    shares: dict[str, float] = {}
    for event in found.events():
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        names = [event.name]
        caller = event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        name = class_of(names, event.input_shapes, config)
        shares[name] = shares.get(name, 0.0) + spent / whole
    unknown = shares.pop(REMAINDER, 0.0)
    return shares | {REMAINDER: unknown + max(0.0, 1 - sum(shares.values()) - unknown)}


def class_of(names: Sequence[str], shapes: Sequence[Any], config: GPTConfig) -> str:
    """The class of an operation, from its own name and its callers' and the shapes of its
    inputs."""
    backward = any("Backward" in name for name in names)
    if names[0] in PRODUCTS and (found := _product_of(shapes, config, backward)):
        return found
    for word, name in RULES:
        if any(word in own for own in names):
            both = name in ("attention", "GELU", "norms and residual", "embedding")
            return f"{name} {'backward' if backward else 'forward'}" if both else name
    return REMAINDER


def _product_of(shapes: Sequence[Any], config: GPTConfig, backward: bool) -> str | None:
    """The linear layer and the part of it that a product (a, b) @ (b, c) computes."""
    matrices = [shape for shape in shapes if len(shape) == 2]
    if len(matrices) < 2:
        return None
    (a, b), (_, c) = matrices[-2:]
    C, V = config.n_embd, config.padded_vocab_size
    if V in (a, b, c):
        return f"head {'forward' if c == V else 'dx' if b == V else 'dW'}"
    layers = {
        (C, 3 * C): "qkv", (C, C): "attention projection",
        (C, 4 * C): "fc", (4 * C, C): "mlp projection",
    }  # fmt: skip
    if not backward:
        return f"{layers[b, c]} forward" if (b, c) in layers else None
    if (c, b) in layers:
        return f"{layers[c, b]} dx"
    return f"{layers[c, a]} dW" if (c, a) in layers else None


# --- counted


def counted(
    config: GPTConfig, options: Options, precision: str, ceilings: Ceilings
) -> dict[str, Any]:
    """The ledger of a step at a device's speeds, as a case of the result file."""
    shape = options.batch, options.seq_len, precision
    expected = predict(config, *shape, ceilings, options.ranks)
    return {
        "device": ceilings.device,
        "source": ceilings.source,
        "precision": precision,
        "shape": [options.batch, options.seq_len, config.vocab_size, options.ranks],
        "flops": ceilings.flops,
        "bandwidth": ceilings.bandwidth,
        "seconds": expected.seconds,
        "tokens_per_second": expected.tokens_per_second,
        "operations": [row_of(op, ceilings) for op in operations(config, *shape, options.ranks)],
    }


def row_of(op: Operation, ceilings: Ceilings) -> dict[str, Any]:
    """A class of operation with its seconds."""
    return {
        "group": op.group,
        "name": op.name,
        "flops": op.flops,
        "bytes": op.bytes,
        "roofline": ceilings.roofline(op),
        "expected": ceilings.seconds(op),
    }


def moved_by(kernels: Sequence[Kernel], config: GPTConfig) -> dict[str, int]:
    """The bytes that generated kernels move, by class."""
    moved: dict[str, int] = {}
    for kernel in kernels:
        name = class_of(kernel.names, kernel.shapes, config)
        moved[name] = moved.get(name, 0) + kernel.bytes
    return moved | {REMAINDER: moved.pop(REMAINDER, 0)}


def generated_seconds(case: Mapping[str, Any]) -> dict[str, float]:
    """The time of each class if its generated kernels move their bytes at the memory's rate.
    Communication is not generated and keeps its roofline."""
    flops = {op["name"]: op["flops"] for op in case["operations"]}
    return {
        name: max(flops.get(name, 0.0) / case["flops"], moved / case["bandwidth"])
        for name, moved in case["generated"].items()
    } | {op["name"]: op["roofline"] for op in case["operations"] if op["group"] == "communication"}


# --- the report


def report(record: dict[str, Any]) -> str:
    """The table of all cases, then the ledger of each, as Markdown."""
    cases = record["cases"]
    parts = [title(record)] if "hardware" in record else [f"Counted, {record['date'][:10]}."]
    measured = [case for case in cases if "measured" in case]
    if measured:
        parts.append(f"Times are {measured[0]['clock']}. {LEGEND}")
        parts.append(summary(measured))
    return "\n\n".join([*parts, *map(ledger_of, cases)]) + "\n"


LEGEND = "The engine's steps and the calibrations ran in turns."


def summary(cases: Sequence[dict[str, Any]]) -> str:
    """Predicted beside measured, one row for each case."""
    rows = []
    for case in cases:
        batch, seq_len, *_ = case["shape"]
        tokens = batch * seq_len
        predicted, took = (statistics.median(case[name]) for name in ("predicted", "measured"))
        rows.append([
            case["preset"], case["precision"], f"{batch} x {seq_len}",
            *cells([tokens / s for s in _reversed(case["predicted"])], ",.0f"),
            *cells([tokens / s for s in _reversed(case["measured"])], ",.0f"),
            f"{predicted / took:.2f}",
        ])  # fmt: skip
    head = ("preset", "precision", "step", "predicted tokens/s", "least-most",
            "measured tokens/s", "least-most", "measured to predicted speed")  # fmt: skip
    return markdown(head, rows, words=(0, 1, 2))


def _reversed(seconds: Sequence[float]) -> list[float]:
    """The median, the most and the least seconds: their rates are in rising order."""
    median, least, most = spread(seconds)
    return [median, most, least]


def ledger_of(case: dict[str, Any]) -> str:
    """The ledger of one case: its ceilings, and a row for each class."""
    batch, seq_len, vocab, ranks = case["shape"]
    columns = columns_of(case)
    rows = []
    for op in case["operations"]:
        more = [column.pop(op["name"], "") for column in columns.values()]
        rows.append([
            op["name"], f"{op['flops'] / 1e9:,.2f}" if op["flops"] else "", mb(op["bytes"]),
            ms(op["roofline"]), *more,
        ])  # fmt: skip
    sums = [column.pop("all") for column in columns.values()]
    left = dict.fromkeys(name for column in columns.values() for name in column)
    rows += [[name, "", "", "", *(c.get(name, "") for c in columns.values())] for name in left]
    flops, moved, seconds = (
        sum(op[key] for op in case["operations"]) for key in ("flops", "bytes", "roofline")
    )
    rows.append(["all", f"{flops / 1e9:,.2f}", mb(moved), ms(seconds), *sums])
    head = ["class", "GFLOP", "MB", "roofline ms", *columns]
    of = f"{case['preset']} {case['precision']}, {batch} x {seq_len} tokens, vocabulary {vocab:,}"
    of += f", {ranks} ranks" if ranks > 1 else ""
    words = (
        f"{case['device']}, {case['source']}: {case['flops'] / 1e12:,.3g} TFLOP/s, "
        f"{case['bandwidth'] / 1e9:,.3g} GB/s. {limit_of(case)}"
    )
    return f"### {of}\n\n{words}\n\n{markdown(head, rows, words=(0,))}"


def columns_of(case: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What stands beside the roofline, by the heading: a text for each class, and for all."""
    if "parts" in case:
        expected = {op["name"]: op["expected"] for op in case["operations"]}
        expected["all"] = sum(expected.values())
        took = {name: s for name, s in case["parts"].items() if s}
        took["all"] = statistics.median(case["measured"])
        return {"expected ms": texts(expected, ms), "measured ms": texts(took, ms)}
    if "generated" not in case:
        return {}
    moved, took = dict(case["generated"]), generated_seconds(case)
    bound = {op["name"]: op["roofline"] for op in case["operations"]}
    for figures in (moved, took, bound):
        figures["all"] = sum(figures.values())
    more = {name: seconds - bound.get(name, 0.0) for name, seconds in took.items()}
    return {
        "generated MB": texts(moved, mb),
        "generated ms": texts(took, ms),
        "remainder ms": texts(more, lambda seconds: f"{1000 * seconds:.2f}"),
    }


def texts(figures: Mapping[str, float], text: Callable[[float], str]) -> dict[str, str]:
    """The text of each figure."""
    return {name: text(value) for name, value in figures.items()}


def limit_of(case: Mapping[str, Any]) -> str:
    """The speed that the ledger predicts or that it says no run exceeds."""
    speed = f"{case['tokens_per_second']:,.0f} tokens/s"
    if "parts" in case:
        return f"Expected: {speed}."
    if "generated" not in case:
        reason = case.get("uncounted", "an earlier version wrote this")
        return f"No run exceeds {speed}. The generated code is not counted: {reason}."
    seconds = case["seconds"] + sum(generated_seconds(case).values())
    seconds -= sum(op["roofline"] for op in case["operations"])
    batch, seq_len, _, ranks = case["shape"]
    return (
        f"No run exceeds {speed}, and none with the bytes of today's generated code "
        f"{ranks * batch * seq_len / seconds:,.0f}."
    )


def mb(moved: float) -> str:
    """Megabytes."""
    return f"{moved / 1e6:,.1f}"


def ms(seconds: float) -> str:
    """Milliseconds, with three digits at least; 0 below a microsecond."""
    return f"{1000 * seconds:,.0f}" if seconds >= 1 else f"{1000 * seconds * (seconds >= 1e-6):.3g}"


# --- the picture


def bars_of(case: dict[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The bars of a case: a label, and the seconds of each group."""
    vocab = case["shape"][2]
    label = f"{case['device'].replace('NVIDIA ', '')}\n{case['preset']} {case['precision']}, V {vocab:,}"
    groups = {op["name"]: op["group"] for op in case["operations"]}

    def sums(seconds: Mapping[str, float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in seconds.items():
            around = name == "bias gradients" or name.startswith("stack")
            group = groups.get(name, SURROUNDINGS if around else REMAINDER)
            found[group] = found.get(group, 0.0) + value
        return found

    kinds = {"expected": "expected"} if "parts" in case else {"roofline": "roofline"}
    bars = [(f"{label}, {word}", sums({op["name"]: op[key] for op in case["operations"]}))
            for key, word in kinds.items()]  # fmt: skip
    if "generated" in case:
        bars.append((f"{label}, generated", sums(generated_seconds(case))))
    return bars + ([(f"{label}, measured", sums(case["parts"]))] if "parts" in case else [])


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Stacked bars: what share of a step each group of operations takes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [bar for case in cases for bar in bars_of(case)]
    names = list(dict.fromkeys(name for _, groups in bars for name in groups))
    names = [name for name in names if name != REMAINDER] + [REMAINDER] * (REMAINDER in names)
    styles: dict[str, dict[str, Any]] = {
        name: {"facecolor": PALE}
        if name == REMAINDER
        else {"facecolor": COLOURS[i % len(COLOURS)], "hatch": "///" * (i >= len(COLOURS)),
              "edgecolor": "white"}
        for i, name in enumerate(names)
    }  # fmt: skip
    style: Any = STYLE | {"font.size": 11, "axes.grid.axis": "x", "axes.spines.left": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(10, 1.7 + 0.62 * len(bars)), layout="constrained")
        for y, (_, groups) in enumerate(bars):
            whole, left = sum(groups.values()), 0.0
            for name in names:
                share = 100 * groups.get(name, 0.0) / whole
                axes.barh(y, share, left=left, height=0.7, **styles[name])
                left += share
            axes.text(101, y, f"{ms(whole)} ms", va="center")
        handles = [plt.Rectangle((0, 0), 1.0, 1.0, **styles[name]) for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=4)
        axes.set(yticks=range(len(bars)), xlim=(0, 112), xlabel="% of the step")
        axes.set_yticklabels([label for label, _ in bars])
        axes.set_xticks(range(0, 101, 20))
        axes.invert_yaxis()
        axes.set_title("What a training step consists of")
        save(figure, path)
        plt.close(figure)


# --- the command


def settled(options: Options) -> tuple[Options, list[str], list[str]]:
    """The options, the presets and the precisions. Raises UserError for an unknown one."""
    if options.quick:
        options = dataclasses.replace(options, preset="micro", vocab=512, batch=2, seq_len=32,
                                      rounds=1, steps=1, seconds=1)  # fmt: skip
    if options.ranks > 1 and not options.device_name:
        raise UserError("--ranks counts GPUs of a data sheet; add --device-name, such as H100")
    gpu = bool(options.device_name) or options.device == "cuda"
    given = options.precision or ("bf16" if gpu else "fp32" if options.quick else "fp32,bf16")
    precisions = known_names("--precision", given, PRECISIONS)
    return options, known_names("--preset", options.preset, PRESETS), precisions


def sheet_case(preset: str, precision: str, options: Options) -> dict[str, Any]:
    """A ledger at a data sheet's speeds. Raises UserError for a GPU or precision not in it."""
    ceilings = sheet_ceilings(options.device_name, precision)
    if ceilings is None:
        raise UserError(
            f"--device-name {options.device_name} has no speed for {precision} in "
            "engine/roofline.py's tables; name a GPU such as H100, H200, A100 or RTX 4090, and "
            "tf32, bf16 or fp16"
        )
    size: dict[str, Any] = PRESETS[preset]
    config = GPTConfig(options.vocab, options.seq_len, **size, chunked_head=True)
    case = {"preset": preset} | counted(config, options, precision, ceilings)
    shape = config, options.batch, options.seq_len, precision
    kernels = in_own_process(generated_kernels, *shape)
    if isinstance(kernels, str):
        return case | {"uncounted": kernels}
    return case | {"generated": moved_by(kernels, config)}


def key_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """What a later run of the same case replaces."""
    return case["preset"], case["precision"], *case["shape"]


def earlier_cases(path: Path, known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cases of the file that is there, if it is from this machine with these versions."""
    before = read_json(path) or {}
    same = all(before.get(name) == known.get(name) for name in ("hardware", "versions"))
    return list(before.get("cases", [])) if same else []


def main() -> None:
    """Make the ledgers, write the result files and the picture, and print the tables."""
    options, presets, precisions = settled(parse(Options, sys.argv[1:]))
    outlive()
    known = {} if options.device_name else in_own_process(facts, options.device)
    name = options.device_name.lower().replace(" ", "-") or known["device"]
    path = Path(options.out) / f"ledger-{name}.json"
    cases = earlier_cases(path, known)
    record = known | {"date": now(), "options": dataclasses.asdict(options), "cases": cases}
    for preset in presets:
        for precision in precisions:
            say(f"{preset} {precision} ...")
            if options.device_name:
                case = sheet_case(preset, precision, options)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    arguments = preset, precision, options, known["device"], folder
                    case = in_own_process(measure, *arguments)
            cases[:] = [old for old in cases if key_of(old) != key_of(case)] + [case]
            write_report(path, record, report(record))
    draw(cases, path.with_suffix(".png"))
    print(report(record))


if __name__ == "__main__":
    entry_point(main)
