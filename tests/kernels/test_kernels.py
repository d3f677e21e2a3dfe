"""Which operations run in Triton."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

import kernels
import kernels._triton
import kernels.cpu_attention
from config import GPTConfig, TrainConfig, UserError
from kernels._kernel import all_kernels
from kernels.ops import ops_of
from launch import small, write_inputs

TRITON = ",".join(kernels.operation_names("triton"))  # one for each operation
# The kernels that auto chooses on a GPU without documents, uncompiled and compiled.
UNCOMPILED = ["adamw", "bias_gelu", "cross_entropy", "layer_norm", "split_heads"]
COMPILED = [name for name in UNCOMPILED if name != "layer_norm"]


@pytest.fixture
def shipped(monkeypatch):
    """Hide a kernel that a reader of docs/add-a-kernel.md added: auto may or may not choose it."""
    names = {*UNCOMPILED, "attention", "cpu_attention"}
    known = {name: kernel for name, kernel in kernels.KERNELS.items() if name in names}
    monkeypatch.setattr(kernels, "KERNELS", known)


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


def test_auto_says_what_is_lost_without_triton(monkeypatch, shipped):
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
    assert kernels.operation_names("torch") == () and kernels.operation_names(
        TRITON
    ) == kernels.operation_names("triton")
    with pytest.raises(UserError, match="did you mean layer_norm"):
        choose("layernorm", "cuda")


def test_auto_leaves_fusible_operations_to_the_compiler(shipped):
    assert choose("auto", "cuda")[0] == ",".join(COMPILED)
    assert choose("auto", "cuda", compile=False)[0] == ",".join(UNCOMPILED)


def test_auto_masks_documents_by_kernel_without_dropout():
    assert "attention" in choose("auto", "cuda", document_mask=True)[0].split(",")
    chosen, lost = choose("auto", "cuda", document_mask=True, dropout=0.1)
    assert "attention" not in chosen and lost is not None and "dropout" in lost
    others = ",".join(name for name in TRITON.split(",") if name != "attention")
    with pytest.raises(UserError, match=f"dropout; use --kernels {others}"):
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


def test_without_turns_a_kernel_off(shipped):
    assert choose("auto", "cuda", without=("fused-adamw",)) == (
        "bias_gelu,cross_entropy,split_heads",
        None,
    )
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
    with pytest.raises(UserError, match="128 at most, and these are 256 wide"):
        GPTConfig(n_embd=512, n_head=2, kernels=("attention",))


def test_a_run_on_every_kernel_has_the_losses_of_pytorch(repo, run, tmp_path):
    write_inputs(tmp_path)
    val = tmp_path / "val.txt"
    val.write_text(val.read_text()[:200])
    options = small(
        "--steps 2 --seq-len 8 --batch-tokens 32 --n-embd 32 --dropout 0",
        "--eval-every 2 --save-every 0 --sample-every 0",
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


def test_a_kernel_is_one_file(repo, tmp_path, monkeypatch):
    """The file of docs/add-a-kernel.md, found beside the others and compared with float64."""
    page = (repo / "docs" / "add-a-kernel.md").read_text(encoding="utf-8")
    (tmp_path / "gelu.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    kernel = all_kernels.__wrapped__()["gelu"]
    config = GPTConfig(n_head=1, n_embd=33, kernels=("gelu",))
    assert kernel.example and not kernel.automatic(TrainConfig())
    example = kernel.example(7, config, dtype=torch.float32, device="cpu")
    x = example.inputs[0].requires_grad_()
    wide = x.detach().double().requires_grad_()
    ours, exact = example.kernel(x), example.reference(wide)
    torch.testing.assert_close(ours, exact.float())
    dy = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(y, t, dy.to(y)) for y, t in ((ours, x), (exact, wide)))
    torch.testing.assert_close(found[0], expected[0].float())
    monkeypatch.setitem(all_kernels(), "gelu", kernel)
    assert torch.equal(
        ops_of(config).linear_gelu(lambda x, bias: x + x, x, x), example.kernel(2 * x)
    )
    with pytest.raises(UserError, match="bias_gelu and gelu both replace linear_gelu"):
        ops_of(dataclasses.replace(config, kernels=("bias_gelu", "gelu")))
    monkeypatch.setitem(kernels.KERNELS, "gelu", kernel)
    monkeypatch.setattr(kernels, "TRITON", (*kernels.TRITON, "gelu"))
    assert ",".join(kernels.operation_names("triton")) == TRITON
