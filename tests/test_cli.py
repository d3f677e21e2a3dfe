"""The command as a user sees it: its output, the files it leaves, and the effect of its options."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from base import cli
from base.console import bytes_text, printable, time_text
from config import ResolvedTrain, TrainConfig, UserError, resolve, resolved
from engine import fit, processes, step
from engine.log import step_line
from engine.memory import Memory
from engine.optim import lr_multiplier
from engine.precision import choose_precision
from engine.processes import World
from engine.rates import Rates
from engine.roofline import peak_flops
from launch import launch, log_of, small, trace, write_inputs
from storage.weights import read_tensors
from support import REPO, own_lines, python_path
from toy import Scripted

CPU = torch.device("cpu")
QUIET = "--eval-every 0 --save-every 0 --sample-every 0 --dropout 0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def train(folder: Path, *words: Any, patch: Any = None) -> str:
    """A run that must succeed. Returns what it printed."""
    (ended,) = launch(folder, small(*words), patch)
    assert ended.code == 0, ended.err
    assert own_lines(ended.err) == ""
    return ended.out


@pytest.fixture(scope="module")
def finished(inputs) -> tuple[Path, str]:
    """The folder of a finished run, and what the run printed."""
    return inputs / "run", train(inputs, "--out run")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_of(run, "train")]


# --- before torch


def test_help_names_every_option_without_torch(repo, run):
    script = (
        "import runpy, sys, time\n"
        "sys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code in (0, None)\n"
        "print(f'{time.process_time()} s', 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = run("-c", script, repo / "train_gpt2.py", fresh=True)
    seconds, torch_too = done.stderr.split(" s ")
    assert torch_too.strip() == "False"
    assert float(seconds) < 2
    for name in [*(field.name for field in dataclasses.fields(TrainConfig)), "config"]:
        assert f"--{name.replace('_', '-')}" in done.stdout


# --- what a run prints


def test_a_finished_run_prints_its_main_figures(finished):
    _, out = finished
    assert "\x1b" not in out and "\r" not in out
    rows = dict(re.findall(r"^  (\w+) +(.+)$", out.split("\n\n")[0], re.M))
    assert re.fullmatch(r"1 x cpu \(.+\), threads a rank: 1", rows["device"])
    assert rows["precision"].startswith("fp32 (set by --precision")
    attention, repeatability = rows["attention"].split(", ")
    assert (
        attention in ("flash_attention", "cpu_attention kernel")
        and repeatability == "repeatable bit for bit"
    )
    assert rows["kernels"] in ("torch, not compiled", "cpu_attention, not compiled")
    assert re.match(r"[\d,]+ parameters: 1 layer x 64 wide, 2 heads, context 16", rows["model"])
    assert rows["step"] == "128 tokens = micro-batch 2 x length 16 x accumulation 4 x ranks 1"
    assert "steps 0 to 12" in rows["plan"] and "MFLOP a token" in rows["plan"]
    lines = re.findall(r"^step .*$", out, re.M)
    assert len(lines) == 12
    figures = (
        r"\d\.\d{4} \| lr \d\.\d\de-\d\d \| norm \d+\.\d{3} \| [\d,]+ ms \| [\d,]+ tok/s \| "
        r"\d+\.\d MiB \| eta \d+:\d\d"
    )
    for i, line in enumerate(lines, 1):
        assert re.fullmatch(rf"step {i:2d}/12 +{100 * i / 12:.1f}% \| loss {figures}", line), line
    assert len({len(line.split("|")[0]) for line in lines}) == 1  # aligned
    summary = out[out.index("\ndone\n") :]
    for name in ("validation", "training loss", "speed", "time", "skipped", "model"):
        assert f"\n  {name} " in summary


def test_the_log_has_the_fields_of_the_contract(finished):
    run, _ = finished
    train_lines = log_of(run, "train")
    assert [line["step"] for line in train_lines] == list(range(1, 13))
    fields = [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "mfu",
        "step_ms",
        "memory_bytes",
    ]
    assert all(field in line for line in train_lines for field in fields)
    assert not any("nll" in line for line in train_lines)  # a single term is the loss itself
    assert [line["tokens"] for line in train_lines] == [128 * i for i in range(1, 13)]
    assert all(line["mfu"] is None for line in train_lines)  # the peak of this CPU is not known
    assert all(
        128 / line["tokens_per_second"] == pytest.approx(line["step_ms"] / 1e3)
        for line in train_lines
    )
    cfg = json.loads((run / "config.json").read_text())
    for line in train_lines:
        share = lr_multiplier(
            line["step"] - 1, 12, cfg["warmup_steps"], cfg["schedule"], cfg["min_lr"]
        )
        assert line["lr"] == cfg["lr"] * share
    assert [line["step"] for line in log_of(run, "eval")] == [3, 6, 9, 12]
    assert all("val_loss" in line and "val_perplexity" in line for line in log_of(run, "eval"))
    assert {(line["step"], bool(line["text"])) for line in log_of(run, "sample")} == {
        (6, True),
        (12, True),
    }
    assert [line["step"] for line in log_of(run, "checkpoint")] == [3, 6, 9, 12]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["val_loss"] == log_of(run, "eval")[-1]["val_loss"]
    assert metrics["steps"] == 12 and metrics["tokens"] == 12 * 128 and metrics["skipped"] == 0


def test_intervals_of_0_turn_everything_but_the_log_off(inputs):
    out = train(inputs, QUIET, "--log-every 0 --out quiet")
    assert not re.search(r"^(step \d|evaluation|--- sample|saved)", out, re.M)
    kinds = {
        json.loads(line)["kind"]
        for line in (inputs / "quiet" / "log.jsonl").read_text().splitlines()
    }
    assert kinds == {"train"}
    assert len(losses(inputs / "quiet")) == 12
    assert (inputs / "quiet" / "final" / "model.safetensors").is_file()


def test_step_lines_are_printed_at_an_interval(inputs):
    out = train(inputs, QUIET, "--log-every 5 --out often")
    assert re.findall(r"^step +(\d+)/", out, re.M) == ["5", "10", "12"]


# --- a terminal

BAR = """
import sys
from engine.log import RunLog
log = RunLog(enabled=True)
log.start_progress(3, 0)
for step in (1, 2, 3):
    figures = dict(loss=1.0, lr=1e-3, grad_norm=1.0, step_ms=5.0, tokens_per_second=9.0, mfu=None,
                   memory_bytes=1 << 20)
    log.step(dict(step=step, **figures), 3, 60.0 * (3 - step), True)
log.say("sample [bold]not markup[/bold] :smile:" + 30 * " long")
print("library noise", file=sys.stderr)
if sys.argv[1] == "stop":
    log.stop_progress()
    log.say("done")
else:
    log.bar.refresh()
"""


def screen(written: str) -> list[str]:
    """The text on a terminal after `written`, which may contain carriage returns, cursor up and
    erased lines."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token[0] == "\x1b":
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token[0] != "\x1b":
            lines[row] = (
                lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            )
            column += len(token)
    return [line.rstrip() for line in lines]


def on_a_terminal(source: str, *words: str) -> list[str]:
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": python_path(REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", source, *words], stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # on Linux this means that the other side has closed
        pass
    os.close(ours)
    assert process.wait(60) == 0, written.decode()
    return screen(written.decode())


def test_a_terminal_shows_one_live_bar_below_whole_lines():
    lines = [line for line in on_a_terminal(BAR, "live") if line]
    assert [line[:8] for line in lines[:3]] == ["step 1/3", "step 2/3", "step 3/3"]
    sample = "sample [bold]not markup[/bold] :smile:" + 30 * " long"
    assert lines[3:5] == [sample, "library noise"]
    assert re.fullmatch(r"training ━+ 3/3 0:00:\d\d eta 0:00", lines[5])
    assert len(lines) == 6


def test_the_bar_is_erased_at_the_end():
    lines = [line for line in on_a_terminal(BAR, "stop") if line]
    assert lines[-1] == "done" and len(lines) == 6 and not any("━" in line for line in lines)


def test_control_characters_of_a_sample_are_escaped():
    assert printable("a\x1b[31m\r\x07\tb\nc é�") == "a\\x1b[31m\\r\\x07\tb\nc é�"


def test_figures_are_easy_to_read():
    record = {
        "step": 7,
        "loss": 3.25,
        "lr": 6e-4,
        "grad_norm": 0.5,
        "step_ms": 1234.5,
        "tokens_per_second": 424242.4,
    }
    line = step_line(record | {"mfu": 0.4321, "memory_bytes": 3 << 30}, 1000, 93784)
    assert line == (
        "step    7/1000   0.7% | loss 3.2500 | lr 6.00e-04 | norm 0.500 | 1,234 ms | 424,242 "
        "tok/s | mfu 43.2% | 3.00 GiB | eta 1d 2:03:04"
    )
    assert [time_text(s) for s in (-1, 59.9, 61, 3600, 86400)] == [
        "0:00",
        "0:59",
        "1:01",
        "1:00:00",
        "1d 0:00",
    ]
    assert [bytes_text(n) for n in (0, 1023, 1024, 5 << 20)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
    ]
    assert (
        peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
        and peak_flops("NVIDIA H100 PCIe", "tf32") == 378e12
    )
    assert (
        peak_flops("some CPU", "bf16") is None
        and peak_flops("NVIDIA A100-SXM4-40GB", "fp32") is None
    )


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H20-3e", 148e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA GeForce RTX 5090", 209e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA T400", None),
        ("NVIDIA L20", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H2000", None),
    ],
)
def test_a_peak_is_found_by_the_whole_name_of_a_card(name, peak):
    assert peak_flops(name, "bf16") == peak


def test_mfu_counts_all_ranks():
    peak_of_two = 2 * 1e15
    assert Rates(flops=6 * 10**9, peak=peak_of_two).mfu(1e5) == pytest.approx(0.3)
    assert Rates(flops=6 * 10**9, peak=None).mfu(1e5) is None


# --- what a run leaves


def test_the_config_of_a_run_repeats_it_bit_for_bit(inputs, finished):
    run, _ = finished
    (ended,) = launch(inputs, ["--config", "run/config.json", "--out", "again"])
    assert ended.code == 0, ended.err
    assert trace(inputs / "again") == trace(run)
    first, second = (
        json.loads((folder / "config.json").read_text()) for folder in (run, inputs / "again")
    )
    assert {name for name in first if first[name] != second[name]} == {"out"}


def test_transformers_reads_final_and_agrees(finished):
    transformers = pytest.importorskip("transformers")
    from model import GPT
    from text.tokenizer import load_tokenizer

    folder = finished[0] / "final"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = GPT.from_pretrained(folder).eval()
    text = "alpha beta  reads\nthe model"
    ids = tokenizer(text)["input_ids"]
    assert ids == load_tokenizer(str(folder)).encode(text)
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        idx = torch.tensor([ids])
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-5)


def test_a_run_starts_from_a_run_and_from_transformers(inputs, finished, tmp_path):
    transformers = pytest.importorskip("transformers")
    run, _ = finished
    step_of_final = json.loads((run / "metrics.json").read_text())["final_is_step"]
    (expected,) = [
        line["val_loss"] for line in log_of(run, "eval") if line["step"] == step_of_final
    ]
    transformers.AutoModelForCausalLM.from_pretrained(run / "final").save_pretrained(
        inputs / "theirs"
    )
    for number, init in enumerate(("run", "run/final", "theirs")):
        out = f"init{number}"
        words = (
            "--init",
            init,
            "--tokenizer",
            "run",
            "--lr",
            "0",
            "--steps",
            "1",
            "--eval-every",
            "1",
            "--save-every",
            "0",
            "--out",
            out,
        )
        train(inputs, *words, "--sample-every 0")
        assert log_of(inputs / out, "eval")[0]["val_loss"] == pytest.approx(expected, rel=1e-5)


# --- options that change how it trains


@pytest.fixture(scope="module")
def plain(inputs) -> list[float]:
    train(inputs, QUIET, "--schedule constant --lr 3e-3 --out plain")
    return losses(inputs / "plain")


def variant(inputs: Path, name: str, *words: str, patch: Any = None) -> list[float]:
    train(inputs, QUIET, "--schedule constant --lr 3e-3 --out", name, *words, patch=patch)
    return losses(inputs / name)


def test_muon_trains(inputs, plain):
    from safetensors import safe_open

    found = variant(inputs, "muon", "--optimizer muon --save-every 12")
    assert found[0] == plain[0] and found[-1] < found[0] - 0.5
    # same rate, because its updates have the size of AdamW's
    assert found[-1] == pytest.approx(plain[-1], abs=0.5)
    state = inputs / "muon" / "checkpoints" / "step-00000012" / "training_state.safetensors"
    with safe_open(state, "pt") as file:
        names = set(file.keys())
    assert "optimizer.transformer.h.0.attn.c_attn.weight.momentum_buffer" in names
    assert "optimizer.transformer.wte.weight.exp_avg" in names


def test_bf16_is_near_fp32(inputs, plain):
    found = variant(inputs, "bf16", "--precision bf16")
    assert found == pytest.approx(plain, rel=0.02) and found != plain


def test_accumulation_and_recomputation_change_no_loss(inputs, plain):
    assert variant(inputs, "whole", "--micro-batch 8") == pytest.approx(plain, rel=1e-5)
    assert variant(inputs, "recompute", "--recompute") == pytest.approx(plain, rel=1e-6)


def test_deterministic_changes_nothing_on_a_cpu(inputs, plain):
    assert variant(inputs, "deterministic", "--deterministic --steps 4") == plain[:4]


def test_samples_continue_the_given_prompts(inputs):
    train(inputs, QUIET, "--steps 4 --sample-every 2 --prompts alpha 'beta of' --out prompts")
    samples = log_of(inputs / "prompts", "sample")
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (s, p) for s in (2, 4) for p in ("alpha", "beta of")
    ]


def test_document_mask_changes_what_a_token_sees(inputs, plain):
    documents = "\n".join(
        json.dumps({"text": f"{word} reads"}) for word in ("alpha", "beta", "gamma") * 200
    )
    (inputs / "short.jsonl").write_text(documents)
    data = ("--data", "short.jsonl", "--val-data", "short.jsonl")
    masked, unmasked = (
        variant(inputs, "masked", *data, "--document-mask"),
        variant(inputs, "unmasked", *data),
    )
    assert all(abs(a - b) > 1e-6 for a, b in zip(masked, unmasked, strict=True))
    assert masked[-1] < masked[0] - 0.5


def aot_eager(counts: Path) -> None:
    """Compile without a C++ compiler. The tests check the captured graphs after every step."""
    from torch._dynamo.utils import counters

    torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    original = step.TrainStep.__call__

    def call(self: step.TrainStep, at: int, *args: Any) -> Any:
        result = original(self, at, *args)
        graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        with counts.open("a") as file:
            file.write(json.dumps(graphs) + "\n")
        return result

    mock.patch.object(step.TrainStep, "__call__", call).start()


def test_compiled_training_is_one_graph_and_never_recompiles(inputs, plain, tmp_path):
    often = ("--eval-every", "3", "--sample-every", "4")
    words = ("--compile", "--compile-unit", "model", *often)
    found = variant(
        inputs, "graphs", *words, patch=functools.partial(aot_eager, tmp_path / "counts")
    )
    assert found == pytest.approx(plain, rel=1e-4)
    counts = [json.loads(line) for line in (tmp_path / "counts").read_text().splitlines()]
    assert counts[:3] == [[1, 0]] * 3  # one graph for training, no break
    # evaluation adds one graph, and one for its smaller last batch
    assert counts[3:] == [counts[3]] * 9 and counts[3][0] <= 3
    assert counts[-1][1] == 0


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_compiled_losses_equal_eager_losses(inputs, plain):
    found = variant(inputs, "compiled", "--compile")
    assert found == pytest.approx(plain, rel=1e-4)


# --- options with automatic values


@pytest.mark.parametrize("room, found", [(100, 12), (11.9, 6), (6, 6), (5.9, 4), (1, 1), (0.5, 0)])
def test_micro_batch_auto_is_the_largest_divisor_that_fits(monkeypatch, room, found):
    monkeypatch.setattr(processes, "available_memory", lambda device, ranks: room / 0.8)
    monkeypatch.setattr(processes, "memory_bytes", lambda device: 0)
    # a micro-batch of n rows takes n bytes
    monkeypatch.setattr(fit, "peak_memory", lambda facts, cfg, n, world: Memory(n, 0, 0, 0, 0, 0))
    alone, task, model = World(0, 0, 1, 1, CPU), Scripted([]), torch.nn.Identity()
    cfg = resolved(resolve(TrainConfig(), "cpu"), ResolvedTrain)
    facts = task.setup(cfg, print)
    assert fit.largest_micro_batch(task, facts, model, cfg, alone, 12) == found


def test_micro_batch_auto_is_stored(inputs):
    out = train(inputs, QUIET, "--micro-batch auto --steps 1 --save-every 1 --out auto")
    assert "micro-batch 8 x length 16 x accumulation 1" in out
    assert json.loads((inputs / "auto" / "config.json").read_text())["micro_batch"] == 8


def test_precision_says_why(monkeypatch):
    monkeypatch.setattr("engine.precision.cpu_has_bf16", lambda: True)
    assert choose_precision("auto", CPU) == ("bf16", "native on this CPU")
    monkeypatch.setattr("engine.precision.cpu_has_bf16", lambda: False)
    assert choose_precision("auto", CPU) == ("fp32", "no fast bf16 on this cpu")
    assert choose_precision("bf16", CPU) == ("bf16", "set by --precision or by the run")
    for lacking in ("fp16", "tf32", "fp8"):
        with pytest.raises(UserError, match=rf"--precision {lacking} .*use --precision"):
            choose_precision(lacking, CPU)


# --- dry run and profile


def test_dry_run_starts_nothing_and_predicts_the_memory(inputs, run, repo):
    words = small(QUIET, "--preset mini --steps 2 --seq-len 16 --out dry")
    before = sorted(inputs.rglob("*"))
    said = run(repo / "train_gpt2.py", *words, "--dry-run", cwd=inputs)
    assert said.returncode == 0 and own_lines(said.stderr) == "", said.stderr
    assert sorted(inputs.rglob("*")) == before
    rows = dict(re.findall(r"^  (\w.*?)  +(.+)$", said.stdout, re.M))
    assert rows["tokens"] == "256 in 2 steps"
    assert re.search(r"at [\d,]+ tokens/s \(estimated from operations timed on", rows["time"])
    assert re.match(r"\S+ FLOP \(\S+ MFLOP a token\)", rows["compute"])
    value, unit = rows["memory, peak of a rank"].split()
    promised = float(value) * {"MiB": 1 << 20, "GiB": 1 << 30}[unit]
    done = run(repo / "train_gpt2.py", *words, cwd=inputs)
    assert done.returncode == 0, done.stderr
    measured = log_of(inputs / "dry", "train")[-1]["memory_bytes"]
    assert promised == pytest.approx(measured, rel=0.15)
    (ended,) = launch(inputs, [*words, "--dry-run"])
    assert "tokens/s (measured in dry)" in ended.out


def test_dry_run_estimates_no_speed_that_it_does_not_count(inputs):
    said = train(inputs, "--dry-run --out never --optimizer muon")
    assert re.search(r"time +unknown: no run in --out .* none is estimated with --opt", said)


def no_memory() -> None:
    mock.patch.object(processes, "available_memory", lambda device, ranks: 1 << 20).start()


def test_dry_run_says_what_does_not_fit(inputs):
    said = train(inputs, "--dry-run --out never")
    assert "too little" not in said
    said = train(inputs, "--dry-run", "--out", "never", patch=no_memory)
    assert re.search(r"free now for a rank +1\.0 MiB: too little", said)


def test_a_run_too_short_to_profile_says_so(inputs):
    train_with_noise(inputs, QUIET, "--profile --steps 2 --out short")
    assert [
        "--profile needs five steps" in line["text"] for line in log_of(inputs / "short", "warning")
    ] == [True]


def test_profile_writes_a_trace_and_memory_of_three_steps(inputs):
    out = train_with_noise(inputs, QUIET, "--profile --steps 7 --out profiled")
    assert "profile of three steps: profiled/profile/trace.json" in out
    events = json.loads((inputs / "profiled" / "profile" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::addmm" in (inputs / "profiled" / "profile" / "memory.txt").read_text()


def train_with_noise(folder: Path, *words: Any) -> str:
    """Like `train`, but libraries may print to stderr."""
    (ended,) = launch(folder, small(*words))
    assert ended.code == 0, ended.err
    return ended.out


# --- Weights & Biases


def broken_wandb(where: str) -> None:
    """A fake wandb in which one call raises."""

    def call(name: str, answer: Any = None) -> Any:
        def answer_or_raise(*args: Any, **kwargs: Any) -> Any:
            if name == where:
                raise OSError("no space left")
            return answer

        return answer_or_raise

    run = types.SimpleNamespace(log=call("log"), finish=call("finish"))
    fake = types.ModuleType("wandb")
    vars(fake).update(
        Settings=call("Settings"), init=call("init", run), log=run.log, finish=run.finish
    )
    sys.modules["wandb"] = None if where == "import" else fake  # ty: ignore[invalid-assignment]


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_a_broken_or_missing_wandb_is_a_warning(inputs, plain, where):
    patch = functools.partial(broken_wandb, where)
    assert variant(inputs, f"wandb-{where}", "--wandb", "--steps", "2", patch=patch) == plain[:2]
    warnings = [line["text"] for line in log_of(inputs / f"wandb-{where}", "warning")]
    reason = "ModuleNotFoundError: .*" if where == "import" else "OSError: no space left"
    told = rf"wandb stopped \({reason}\); training goes on without it"
    assert any(re.fullmatch(told, text) for text in warnings), warnings


def test_wandb_without_a_key_logs_offline(inputs):
    pytest.importorskip("wandb")
    out = train_with_noise(inputs, QUIET, "--steps 2 --wandb --out offline")
    assert "wandb logs offline under offline/wandb" in out
    (folder,) = (inputs / "offline" / "wandb").glob("offline-run-*")
    (recorded,) = folder.glob("*.wandb")
    assert recorded.stat().st_size > 0


def test_tensorboard_shows_the_figures_of_the_log(inputs):
    """Also after a resume: each step once."""
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = (QUIET, "--save-every 2 --tensorboard --steps 4 --out board")
    for more in ((), ("--extend-to", "6", "--reschedule")):
        train_with_noise(inputs, *board, *more)
    events = EventAccumulator(str(inputs / "board" / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {line["step"]: line["loss"] for line in log_of(inputs / "board", "train")}
    assert shown == pytest.approx(logged) and len(events.Scalars("train/loss")) == 6


def no_tensorboard() -> None:
    mock.patch.dict(sys.modules, tensorboard=None).start()


def test_a_missing_tensorboard_is_a_warning(inputs, plain):
    assert variant(inputs, "no-board", "--tensorboard", patch=no_tensorboard) == plain
    (warning,) = log_of(inputs / "no-board", "warning")
    assert "tensorboard stopped" in warning["text"]


def test_a_pipe_gets_about_a_hundred_step_lines(inputs):
    options = "--steps 250 --batch-tokens 16 --seq-len 8 --out long"
    lines = train_with_noise(inputs, QUIET, options).splitlines()
    assert 100 <= sum(line.startswith("step ") for line in lines) <= 130
    assert len(log_of(inputs / "long", "train")) == 250


@pytest.mark.parametrize(
    ("reason", "told"),
    [("EACCES", True), ("EISDIR", True), ("ELOOP", True), ("EROFS", True), ("ENOENT", False)],
)
def test_a_forbidden_path_is_one_line(reason, told, monkeypatch, capsys):
    """The error may occur anywhere. Missing files are reported before by name, so an unexpected one
    would be a bug."""
    number = getattr(errno, reason)

    def main() -> int:
        raise OSError(number, os.strerror(number), "some/file")

    # these would change the tests' own process
    for name in ("open_console", "quiet_libraries", "outlive"):
        monkeypatch.setattr(cli.console, name, lambda: None)
    with pytest.raises(SystemExit if told else OSError) as end:
        cli.entry_point(main)
    if isinstance(end.value, SystemExit):
        assert end.value.code == 2
        line = f"error: some/file: {os.strerror(number)}; name a path that you may read or write\n"
        assert capsys.readouterr().err == line


def test_a_name_too_long_for_a_path_is_one_line(run, repo):
    end = run(repo / "generate.py", "x" * 300, "hello")
    assert (
        end.returncode == 2 and end.stderr.startswith("error: ") and end.stderr.count("\n") == 1
    ), end.stderr


def test_unreadable_weights_are_not_reported_as_missing(tmp_path, monkeypatch):
    """The message must be ours, because safetensors reports such a file as missing."""

    def refuse(path: Path, *how: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"model.safetensors cannot be read: Permission denied$"):
        read_tensors(tmp_path / "model.safetensors")
