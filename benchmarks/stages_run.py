"""One run of benchmarks.stages: its command, its process, and the figures in its log and its
trace."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ladder import Plan, Settings
from engine.log import read_log

ENGINE = Path(__file__).resolve().parent.parent
SEED = 1337
LEARNING_RATE = 3e-4  # constant, and small: Adam's first steps blow up differences of rounding


def command(settings: Settings, plan: Plan, cache: Path, out: Path) -> list[str]:
    """train_gpt2.py with a stage's options, through torchrun where there are several ranks."""
    ranks = settings.ranks or plan.ranks
    micro_batch = settings.micro_batch or plan.micro_batch
    options: dict[str, Any] = {
        "preset": plan.preset,
        "data": plan.data,
        "tokenizer": plan.tokenizer,
        "cache": cache,
        "seed": SEED,
        "device": settings.device,
        "seq-len": plan.seq_len,
        "micro-batch": micro_batch,
        "batch-tokens": micro_batch * plan.seq_len * (settings.accumulation or plan.accumulation),
        "steps": settings.steps or plan.steps,
        "lr": LEARNING_RATE,
        "schedule": "constant",
        "warmup-steps": 0,
        "clip": settings.clip,
        "precision": settings.precision,
        "kernels": ",".join(settings.kernels) or "torch",
        "eval-every": 0,
        "save-every": 0,
        "sample-every": 0,
        "log-every": 0,
        "resume": "never",
        "out": out,
    }
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words.append(str(ENGINE / "train_gpt2.py"))
    words += [
        str(word)
        for name, value in options.items()
        if value is not None
        for word in (f"--{name}", value)
    ]
    words.append("--compile" if settings.compile else "--no-compile")
    words += ["--cuda-graphs"] * settings.cuda_graphs + ["--profile"] * settings.profile
    return words + (["--without", *settings.without] if settings.without else [])


def figures_of(run: Path, warm_up: int) -> dict[str, Any]:
    """What a finished run's log, and its trace where it has one, say; without the first steps."""
    log = [record for _, record in read_log((run / "log.jsonl").read_text(encoding="utf-8"))]
    steps = [line for line in log if line["kind"] == "train"]
    figures: dict[str, Any] = {
        "step_ms": [step["step_ms"] for step in steps[warm_up:]],
        "tokens_per_step": steps[0]["tokens"],
        "memory_bytes": steps[-1]["memory_bytes"],
        "loss": steps[-1]["loss"],
        "warnings": [line["text"] for line in log if line["kind"] == "warning"],
    }
    trace = run / "profile" / "trace.json"
    if trace.exists():
        figures["communication"] = communication_share(
            json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        )
    return figures


def communication_share(events: Sequence[Mapping[str, Any]]) -> float:
    """Share of the traced steps in which ranks talk and this one computes nothing.

    On a GPU: NCCL's kernels without the time of other kernels beside them. On a CPU: gloo's
    collectives without the time of PyTorch's operations.
    """
    talk, work, steps = [], [], []
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    for event in events:
        if event.get("ph") != "X":
            continue
        name, kind = event["name"].lower(), event.get("cat")
        span = event["ts"], event["ts"] + event["dur"]
        if kind == "user_annotation" and name.startswith("profilerstep"):
            steps.append(span)
        elif name.startswith("nccl") and kind == "kernel" if on_gpu else name.startswith("gloo:"):
            talk.append(span)
        elif kind == "kernel" if on_gpu else name.startswith("aten::"):
            work.append(span)
    return (covered(talk + work) - covered(work)) / covered(steps)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans (begin, end)."""
    total, reached = 0.0, -math.inf
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, reached))
        reached = max(reached, finish)
    return total
