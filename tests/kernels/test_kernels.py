"""Which operations run in Triton."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
import kernels._triton
from config import GPTConfig, TrainConfig, UserError
from engine.precision import Cast
from kernels.attention import attention, attention_reference
from kernels.bias_gelu import bias_gelu
from kernels.cpu_attention import cpu_attention
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.fp8_linear import fp8_linear
from kernels.layer_norm import add_layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy
from launch import small, write_inputs
from tasks.objectives import nll_and_unlikelihood

TRITON = ",".join(kernels.TRITON)
# documents and dropout decide on attention, and a compiler makes the like of some
NO_ATTENTION = [name for name in kernels.TRITON if name != "attention"]
COMPILED = [name for name in NO_ATTENTION if name not in ("layer_norm", "bias_gelu")]


def choose(asked: str, device_type: str, **options: Any) -> tuple[str, str | None]:
    given: dict[str, Any] = {"kernels": asked, "compile": True, "precision": "bf16", **options}
    return kernels.choose(TrainConfig(**given), device_type)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels._triton, "INTERPRETED", False)
    for asked in ("triton", "adamw"):
        with pytest.raises(UserError, match=r"needs a CUDA GPU.*--kernels torch"):
            choose(asked, "cpu")
    monkeypatch.setattr(kernels._triton, "triton", None)
    with pytest.raises(UserError, match="not installed"):
        choose("triton", "cuda")


def test_auto_says_what_is_lost_without_triton(monkeypatch):
    monkeypatch.setattr(kernels._triton, "triton", None)
    chosen, lost = choose("auto", "cuda")
    assert (
        chosen == "torch"
        and lost is not None
        and ", ".join(COMPILED) in lost
        and "not installed" in lost
    )


def test_triton_is_chosen_whole_or_by_name():
    assert choose("triton", "cuda") == (TRITON, None)
    assert choose("layer_norm,adamw", "cuda") == ("layer_norm,adamw", None)
    assert choose(TRITON, "cuda") == (TRITON, None)  # what a resolved configuration says
    assert (
        kernels.operation_names("torch") == () and kernels.operation_names(TRITON) == kernels.TRITON
    )
    with pytest.raises(UserError, match="did you mean layer_norm"):
        choose("layernorm", "cuda")


def test_auto_leaves_to_the_compiler_what_it_can_do():
    assert choose("auto", "cuda")[0] == ",".join(COMPILED)
    assert choose("auto", "cuda", compile=False)[0] == ",".join(NO_ATTENTION)


def test_documents_are_kept_apart_by_the_kernel_but_under_dropout():
    assert "attention" in choose("auto", "cuda", document_mask=True)[0].split(",")
    chosen, lost = choose("auto", "cuda", document_mask=True, dropout=0.1)
    assert "attention" not in chosen and lost is not None and "dropout" in lost
    with pytest.raises(UserError, match=f"dropout; use --kernels {','.join(NO_ATTENTION)}"):
        choose("triton", "cuda", dropout=0.1)


def test_a_cpu_has_its_own_attention_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(kernels.cpu_attention, "is_faster", lambda dtype: dtype == torch.bfloat16)
    assert choose("auto", "cpu") == ("cpu_attention", None)
    assert choose("auto", "cpu", dropout=0.1) == ("cpu_attention", None)
    for options in ({"precision": "fp32"}, {"document_mask": True}):
        assert choose("auto", "cpu", **options) == ("torch", None)
    for without in ("attention-backend", "flash-attention"):
        assert choose("auto", "cpu", without=(without,)) == ("torch", None)
    assert choose("torch", "cpu") == ("torch", None)
    with pytest.raises(UserError, match="needs a CPU; use --kernels adamw"):
        choose("cpu_attention,adamw", "cuda")


def test_what_is_left_out_is_not_there_as_a_kernel_either():
    assert choose("auto", "cuda", without=("fused-adamw",)) == ("cross_entropy", None)
    assert (
        "attention"
        not in choose("auto", "cuda", document_mask=True, without=("flash-attention",))[0]
    )
    with pytest.raises(
        UserError, match="adamw is turned off by --without fused-adamw; use --kernels cross_entropy"
    ):
        choose("cross_entropy,adamw", "cuda", without=("fused-adamw",))


def test_a_head_too_wide_for_the_kernel_is_refused():
    GPTConfig(n_embd=512, n_head=4, kernels=("attention",))
    with pytest.raises(UserError, match="up to 128, and these are 256 wide"):
        GPTConfig(n_embd=512, n_head=2, kernels=("attention",))


def test_a_run_on_every_kernel_has_the_losses_of_pytorch(repo, run, tmp_path):
    write_inputs(tmp_path)
    val = tmp_path / "val.txt"
    val.write_text(val.read_text()[:200])
    options = small(
        "--steps",
        2,
        "--batch-tokens",
        64,
        "--n-embd",
        32,
        "--dropout",
        0,
        "--eval-every",
        2,
        "--save-every",
        0,
        "--sample-every",
        0,
    )
    losses = {}
    for kernels_named in ("torch", "triton"):
        words = [*options, "--kernels", kernels_named, "--out", kernels_named]
        interpreted = dict(env={"TRITON_INTERPRET": "1"}, fresh=True)
        done = run(
            repo / "train_gpt2.py", *words, **interpreted if kernels_named == "triton" else {}
        )
        assert done.returncode == 0, done.stderr
        log = map(json.loads, (tmp_path / kernels_named / "log.jsonl").read_text().splitlines())
        losses[kernels_named] = [
            x.get("loss", x.get("val_loss")) for x in log if x["kind"] in ("train", "eval")
        ]
        banner = TRITON.replace(",", ", ") if kernels_named == "triton" else "torch"
        assert banner in done.stdout
    assert len(losses["torch"]) == 3
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)


N, C, V = 16, 32, 48  # rows, width, vocabulary
TARGETS = torch.arange(N) * 5 % V
DOCUMENTS = torch.arange(N).div(5, rounding_mode="floor")[None]


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
        .to(dtype)
        .requires_grad_()
    )


def of_attention(
    operation: Callable[..., Tensor], *more: Any
) -> tuple[Callable[..., Any], list[Tensor]]:
    return lambda qkv: operation(qkv, *more), [numbers(1, N, 3, 2, C // 2)]


def of_layer_norm(dtype: torch.dtype, triton: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    inputs = [numbers(N, C, dtype=dtype), numbers(N, C, dtype=dtype), numbers(C), numbers(C)]
    return lambda *tensors: add_layer_norm(*tensors, 1e-5, triton), inputs


def of_linear_cross_entropy(triton: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    return lambda x, weight: linear_cross_entropy(x, weight, TARGETS, V - 1, triton), [
        numbers(N, C),
        numbers(V, C),
    ]


def of_unlikelihood() -> tuple[Callable[..., Any], list[Tensor]]:
    targets = TARGETS[None]
    return lambda logits: nll_and_unlikelihood(logits, targets.roll(1, 1), targets), [
        numbers(1, N, V)
    ]


def of_cast() -> tuple[Callable[..., Any], list[Tensor]]:
    layer = torch.nn.Linear(C, V)
    x = numbers(N, C, dtype=torch.bfloat16)
    return Cast(layer, torch.bfloat16), [x, *layer.parameters()]


DIFFERENTIABLE: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
    "attention torch": lambda: of_attention(attention_reference, DOCUMENTS),
    "attention triton": lambda: of_attention(attention, DOCUMENTS),
    "attention cpu": lambda: of_attention(cpu_attention),
    "layer_norm torch": lambda: of_layer_norm(torch.float32, triton=False),
    "layer_norm torch bf16": lambda: of_layer_norm(torch.bfloat16, triton=False),
    "layer_norm triton": lambda: of_layer_norm(torch.float32, triton=True),
    "bias_gelu torch": lambda: (bias_gelu, [numbers(N, C), numbers(C)]),
    "bias_gelu triton": lambda: (
        lambda x, bias: bias_gelu(x, bias, triton=True),
        [numbers(N, C), numbers(C)],
    ),
    "cross_entropy torch": lambda: (
        lambda x: cross_entropy_reference(x, TARGETS, V - 1),
        [numbers(N, V)],
    ),
    "cross_entropy triton": lambda: (lambda x: cross_entropy(x, TARGETS, V - 1), [numbers(N, V)]),
    "linear_cross_entropy torch": lambda: of_linear_cross_entropy(triton=False),
    "linear_cross_entropy triton": lambda: of_linear_cross_entropy(triton=True),
    "fp8_linear": lambda: (fp8_linear, [numbers(N, C), numbers(V, C), numbers(V)]),
    "unlikelihood": of_unlikelihood,
    "weights cast once": of_cast,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_gradients_are_those_of_eager(name):
    """torch 2.11 drops the gradient of a Function that returns what it changed in place."""
    if "triton" in name and not kernels._triton.INTERPRETED:
        pytest.skip("Triton is not interpreted here, and no tensor is on a GPU")
    operation, inputs = DIFFERENTIABLE[name]()

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        outputs = run(*inputs[:1]) if isinstance(operation, Cast) else run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # no gradient is one
        weights = [torch.linspace(0.5, 2, out.numel()).view(out.shape) for out in outputs]
        total = sum(
            (out.float() * weight).sum() for out, weight in zip(outputs, weights, strict=True)
        )
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, inputs))

    torch._dynamo.reset()
    eager = gradients(operation)
    assert all(gradient.count_nonzero() for gradient in eager)
    compiled = gradients(torch.compile(operation, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
