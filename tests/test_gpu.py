"""Tests that only a CUDA GPU can pass. They are skipped elsewhere, and `make gpu-check` runs them.
They need no network and no other file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from config import GPTConfig
from decoding.batched import generate
from decoding.cache import KVCache
from decoding.fixed import FixedDecoder
from decoding.options import DecodeConfig
from engine.loader import Loader
from engine.precision import autocast
from engine.processes import World
from kernels.attention import attention_backends
from model import GPT
from random_tokens import make_step

pytestmark = pytest.mark.gpu

# cpu: a rehearsal, which checks that the tests themselves work
DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
on_cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA GPU, also in a rehearsal")
# Compiling a fine-tune takes minutes on a CPU.
COMPILE = "--compile" if DEVICE == "cuda" else "--no-compile"
PROCESSES = max(1, torch.cuda.device_count())

DEEP = GPTConfig(vocab_size=1000, block_size=256, n_layer=12, n_head=4, n_embd=256)
SMALL = [
    "--preset",
    "mini" if DEVICE == "cuda" else "micro",  # mini takes minutes in a rehearsal
    "--steps",
    "8",
    "--seq-len",
    "128",
    "--batch-tokens",
    "4096",
    "--data",
    "stdlib",
]
OFTEN = ["--eval-every", "4", "--save-every", "4", "--sample-every", "8", "--eval-tokens", "4096"]


def losses(
    device: str = DEVICE, steps: int = 6 if DEVICE == "cuda" else 2, **options: Any
) -> list[float]:
    step, loader = make_step(device, **options)
    results = [step(s, loader(s)) for s in range(steps)]
    loader.close()
    return [float(result.loss) for result in results if result is not None]


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


# Limits relative to the CPU's fp32 losses. bf16 keeps 8 bits of mantissa, fp16 and tf32 keep 11,
# and errors partly cancel. fp32 sums in another order, and AdamW's first updates are the rate times
# the sign of a gradient, which flips if the gradient is near zero. On a CPU, noise of 1e-5 of each
# gradient's largest value moves these losses by at most 1.2e-6, so 1e-4 leaves room for a GPU.
# Before any update the limit is tight (the test below).
@pytest.mark.parametrize(
    "precision, tolerance",
    [
        ("fp32", 1e-4),
        ("bf16", 8e-3),
        pytest.param("tf32", 2e-3, marks=on_cuda_only),
        pytest.param("fp16", 2e-3, marks=on_cuda_only),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_match_the_cpu(precision, tolerance, compiled):
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        ours = losses(precision=precision, compile=compiled)
        assert ours == pytest.approx(losses("cpu", precision="fp32"), rel=tolerance)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_first_fp32_gradients_match_the_cpu():
    """Before any update no sign can flip, so norm and loss agree up to the order of sums."""
    found = []
    for device in (DEVICE, "cpu"):
        step, loader = make_step(device, precision="fp32")
        result = step(0, loader(0))
        loader.close()
        assert result is not None
        found.append((float(result.loss), float(result.grad_norm)))
    assert found[0] == pytest.approx(found[1], rel=2e-5)


@on_cuda_only
def test_recomputation_saves_memory_in_a_compiled_model():
    def peak(**options: Any) -> int:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses(precision="bf16", compile=True, compile_unit="model", steps=3, shape=DEEP, **options)
        return torch.cuda.max_memory_allocated()

    assert peak(recompute=True) < 0.6 * peak()
    torch._dynamo.reset()


@on_cuda_only
# Relative limits, as above. FP8 keeps 4 bits (e4m3) and 3 bits (e5m2).
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9,
    reason="needs a Hopper GPU or newer",
)
def test_losses_in_fp8_match_the_cpu():
    assert losses(precision="fp8", compile=True) == pytest.approx(
        losses("cpu", precision="fp32"), rel=3e-2
    )


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("without", [(), ("cast-once",), ("chunked-head",), ("flash-attention",)])
def test_losses_match_the_cpu_without_each_optimization(kernels, without):
    ours = losses(precision="bf16", kernels=kernels, without=without)
    assert ours == pytest.approx(losses("cpu", precision="fp32"), rel=8e-3)


@on_cuda_only
@pytest.mark.parametrize("unit", ["model", "block"])
@pytest.mark.parametrize("precision, tolerance", [("bf16", 8e-3), ("tf32", 2e-3)])
def test_cuda_graphs_replay_the_same_losses(unit, precision, tolerance):
    """A step has eight micro-batches, because each replay overwrites the results of the one before
    it."""
    ours = losses(
        precision=precision, compile=True, compile_unit=unit, cuda_graphs=True, micro_batch=2
    )
    assert ours == pytest.approx(losses("cpu", precision="fp32"), rel=tolerance)


@on_cuda_only
def test_the_thread_of_the_loader_uses_the_gpu_of_its_rank():
    last = torch.cuda.device_count() - 1
    step, loader = make_step("cuda", precision="bf16")
    loader.close()
    world = World(0, 0, 1, 1, torch.device("cuda", last))
    loader = Loader(step.task, world, 8, 1)
    loader(0)
    assert loader.pool.submit(torch.cuda.current_device).result() == last
    loader.close()


@on_cuda_only
@pytest.mark.parametrize("kernels", ["torch", "triton", "cross_entropy,adamw"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_steady_state_never_waits_for_the_gpu(kernels, compiled):
    step, loader = make_step("cuda", precision="bf16", kernels=kernels, compile=compiled)
    data = [loader(s) for s in range(6)]
    for s in range(3):  # the first steps allocate, choose kernels and make the optimizer's state
        step(s, data[s])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for s in range(3, 6):
            step(s, data[s])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda_only  # takes minutes on a CPU, where test_compile.py tests it
def test_compiled_training_is_one_graph_that_never_recompiles():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step, loader = make_step(DEVICE, precision="bf16", kernels="triton", compile=True)
    step(0, loader(0))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for s in range(1, 5):
        step(s, loader(s))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]


def test_every_attention_backend_gives_the_same_output():
    device = torch.device(DEVICE)
    q, k, v = (torch.randn(2, 4, 256, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), is_causal=True
    )
    for backend in attention_backends(device, torch.bfloat16):
        with torch.nn.attention.sdpa_kernel(backend):
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert (y.double() - expected).abs().max() < 0.03, (
            backend
        )  # outputs are near 1 and have 8 bits


def test_the_kv_cache_gives_the_logits_of_the_whole_sequence():
    config = GPTConfig(vocab_size=331, block_size=64, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config).to(DEVICE).eval()
    idx = torch.randint(0, 331, (3, 64), device=DEVICE)
    with torch.no_grad(), autocast("fp32", idx.device):
        cache = KVCache(config, 3, 64)
        parts = [
            model(idx[:, :20], past=cache),
            *(model(idx[:, t : t + 1], past=cache) for t in range(20, 64)),
        ]
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), rtol=1e-4, atol=1e-4)


@on_cuda_only
def test_a_replayed_step_decodes_the_same_tokens_and_rarely_waits():
    """Rows of two lengths, past the context, from one graph. The host waits once in 16 tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(331, block_size=64, n_layer=2, n_head=2, n_embd=64)).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    fixed, prompts = FixedDecoder(model), [[1, 2, 3], [4] * 20]
    for options in (
        DecodeConfig(decode="greedy", max_new_tokens=100),
        DecodeConfig(temperature=0.9, top_k=50, top_p=0.9, max_new_tokens=100),
    ):
        expected = generate(model, prompts, options, None)
        assert generate(model, prompts, options, None, fixed=fixed) == expected
        state, step = next(reversed(fixed.steps.values()))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                step(state)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_whole_run_then_generate_and_evaluate(repo, run, tmp_path):
    train = run(repo / "train_gpt2.py", *SMALL, *OFTEN, "--out", "runs/a")
    assert train.returncode == 0, train.stdout + train.stderr
    steps = records(tmp_path / "runs/a", "train")
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["memory_bytes"] > 0
    text = run(repo / "generate.py", "runs/a", "def ", "--max-new-tokens", "20")
    assert text.returncode == 0 and text.stdout.strip(), text.stderr
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 500)
    scores = run(repo / "evaluate.py", "runs/a", "--data", "text.txt", "--json", "-")
    assert scores.returncode == 0 and json.loads(scores.stdout)["data"]["loss"] > 0, scores.stderr


def test_deterministic_runs_repeat_and_resume_bit_for_bit(repo, run, tmp_path):
    options = [*SMALL, *OFTEN, "--deterministic", "--dropout", "0.1", "--no-compile"]
    for out in ("a", "b"):
        assert run(repo / "train_gpt2.py", *options, "--out", f"runs/{out}").returncode == 0
    branch = run(
        repo / "train_gpt2.py",
        *options,
        "--out",
        "runs/c",
        "--resume",
        "runs/a/checkpoints/step-00000004",
    )
    assert branch.returncode == 0, branch.stderr
    a, b, c = (
        [(x["step"], x["loss"]) for x in records(tmp_path / "runs" / n, "train")] for n in "abc"
    )
    assert a == b and a[4:] == c
    weights = [
        (tmp_path / "runs" / name / "final/model.safetensors").read_bytes() for name in "abc"
    ]
    assert weights[0] == weights[1] == weights[2]


@on_cuda_only
def test_a_deterministic_run_repeats_at_a_full_batch(repo, run, tmp_path):
    """The order of attention's sums varies only at large batches. So this resumes GPT-2's size with
    16 rows of 1,024 tokens at once."""
    size = [
        "--preset",
        "gpt2",
        "--n-layer",
        "4",
        "--seq-len",
        "1024",
        "--batch-tokens",
        str(1 << 16),
    ]
    options = [
        *size,
        "--micro-batch",
        "16",
        "--data",
        "stdlib",
        "--steps",
        "6",
        "--save-every",
        "3",
        "--eval-every",
        "0",
    ]
    options += ["--sample-every", "0", "--deterministic", "--no-compile"]
    for out in ("a", "b"):
        done = run(repo / "train_gpt2.py", *options, "--out", f"runs/{out}")
        assert done.returncode == 0 and "repeatable bit for bit" in done.stdout, done.stderr
    branch = run(
        repo / "train_gpt2.py",
        *options,
        "--out",
        "runs/c",
        "--resume",
        "runs/a/checkpoints/step-00000003",
    )
    assert branch.returncode == 0, branch.stderr
    a, b, c = (
        [(x["step"], x["loss"]) for x in records(tmp_path / "runs" / n, "train")] for n in "abc"
    )
    assert a == b and a[3:] == c
    weights = [
        (tmp_path / "runs" / name / "final/model.safetensors").read_bytes() for name in "abc"
    ]
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize(
    "method", ["full", "last-k", "ulmfit", "lora", "dora", "prefix", "soft-prompt"]
)
def test_losses_of_every_fine_tuning_method_match_the_cpu(run, tmp_path, method):
    from text.tokenizer_training import train_bpe

    torch.manual_seed(0)
    GPT(GPTConfig(300, 128, n_layer=2, n_head=2, n_embd=64)).save_pretrained(tmp_path / "base")
    train_bpe(["The moon is up, the night is long. " * 20], 300, tmp_path / "base" / "tokenizer")
    base = [
        "--init",
        "base",
        "--tokenizer",
        "base/tokenizer",
        "--method",
        method,
        "--lr",
        "1e-3",
        "--epochs",
        "4",
    ]
    how = {"reference": ["--device", "cpu", "--precision", "fp32", "--no-compile"],
           "here": ["--device", DEVICE, "--precision", "bf16", COMPILE]}  # fmt: skip
    found = {}
    for place, options in how.items():
        words = [*options, "--eval-rows", "0", "--sample-every", "0", "--out", f"runs/{place}"]
        done = run("-m", "finetune.sonnets", *base, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        found[place] = [record["loss"] for record in records(tmp_path / "runs" / place, "train")]
    assert len(found["reference"]) == 4 and found["here"] == pytest.approx(
        found["reference"], rel=1e-2
    )


@pytest.mark.parametrize(
    "more",
    [
        ["--pooling", "last"],
        ["--pooling", "attention"],
        ["--form", "word"],
        ["--method", "lora"],
        ["--model", "lstm"],
        ["--method", "last-layer", "--pooling", "lstm"],
        ["--also", "topics:0.5"],
        ["--class-weights", "balanced"],
    ],
)
def test_losses_of_classifiers_match_the_cpu(run, tmp_path, more):
    from text.tokenizer_training import train_bpe

    torch.manual_seed(0)
    GPT(GPTConfig(300, 128, n_layer=2, n_head=2, n_embd=64)).save_pretrained(tmp_path / "base")
    train_bpe(["A warm film, a dull film, a loud one. " * 20], 300, tmp_path / "base" / "tokenizer")
    base = [
        "--init",
        "base",
        "--tokenizer",
        "base/tokenizer",
        *more,
        "--lr",
        "1e-3",
        "--steps",
        "4",
        "--dropout",
        "0",
        "--head-dropout",
        "0",
    ]
    how = {"reference": ["--device", "cpu", "--precision", "fp32", "--no-compile"],
           "here": ["--device", DEVICE, "--precision", "bf16", COMPILE]}  # fmt: skip
    found = {}
    for place, options in how.items():
        words = [*options, "--out", f"runs/{place}"]
        done = run("-m", "finetune.sentiment", *base, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        found[place] = [record["loss"] for record in records(tmp_path / "runs" / place, "train")]
    assert len(found["reference"]) == 4 and found["here"] == pytest.approx(
        found["reference"], rel=2e-2
    )


def test_two_passes_under_dropout_run_compiled(run, tmp_path):
    """R-Drop and SimCSE. Random draws differ between devices, so the test only checks that the
    model learns."""
    from text.tokenizer_training import train_bpe

    train_bpe(["A warm film, a dull film, a loud one. " * 20], 300, tmp_path / "tokenizer")
    words = [
        "--init",
        "scratch",
        "--preset",
        "micro",
        "--tokenizer",
        "tokenizer",
        "--objective",
        "rdrop",
        "simcse",
        "--simcse-group",
        "4",
        "--batch-size",
        "8",
        "--lr",
        "5e-3",
        "--steps",
        "40",
        "--out",
        "runs/a",
    ]
    done = run("-m", "finetune.sentiment", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [record["nll"] for record in records(tmp_path / "runs/a", "train")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "more", [["--optimizer", "muon"], ["--recompute"], ["--precision", "fp16"], ["--document-mask"]]
)
def test_options_run_under_torchrun(repo, run, more):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    done = run(
        *torchrun, repo / "train_gpt2.py", *SMALL, "--out", "runs/x", "--eval-every", "0", *more
    )
    assert done.returncode == 0, done.stdout + done.stderr


@on_cuda_only
def test_out_of_memory_names_a_micro_batch_that_fits(repo, run):
    huge = [
        "--preset",
        "gpt2-xl",
        "--data",
        "stdlib",
        "--seq-len",
        "1024",
        "--batch-tokens",
        str(1 << 20),
    ]
    done = run(
        repo / "train_gpt2.py",
        *huge,
        "--micro-batch",
        "1024",
        "--no-compile",
        "--steps",
        "1",
        "--out",
        "runs/o",
    )
    assert (
        done.returncode == 2 and "out of memory" in done.stderr and "--micro-batch" in done.stderr
    ), done.stderr
    assert "Traceback" not in done.stderr
