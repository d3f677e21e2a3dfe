"""The benchmark of the operations runs, compares equal work, and says why a figure is missing. No
test asserts a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import candidates, operations
from benchmarks import kernels as bench
from benchmarks.harness import OURS, Turns
from benchmarks.operations import Form, Operation, Place

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def place() -> Place:
    """Tiny shapes, with our own kernels. On a CPU they run in Triton's interpreter."""
    return dataclasses.replace(bench.make_place(DEVICE, quick=True), no_triton=None)


def test_quick_writes_a_figure_or_a_reason_for_every_form(run, tmp_path) -> None:
    done = run("-m", "benchmarks.kernels", "--quick", "--device", "cpu", "--out", "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/kernels-cpu.json").read_text())
    assert results["device"] == "cpu" and results["dtype"] in ("float32", "bfloat16")
    rows = {(row["operation"], row["form"]): row for row in results["cases"]}
    assert {operation for operation, _ in rows} == set(operations.OPERATIONS)
    for row in rows.values():
        if "note" in row:
            assert row["note"].startswith("not measured: ") and "rate" not in row
            continue
        rate, least, most = row["rate"]
        assert 0 < least <= rate <= most and row["ceiling"] > 0
        assert len(row["seconds"]) == 2 and row["forward_seconds"] > 0
        assert row["difference"] <= max(operations.TOLERANCE.values())
    for operation in operations.OPERATIONS:
        assert rows[operation, operations.PYTORCH]["speed"] == [1, 1, 1]
    for (_, form), row in rows.items():
        if "Triton" in form:
            assert row["note"] == "not measured: needs a GPU"
    assert rows["linear_cross_entropy", f"{OURS}, PyTorch"]["speed"][0] > 0
    text = (tmp_path / "results/kernels-cpu.md").read_text()
    assert text.strip() == done.stdout.strip()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2 and len({len(line) for line in lines}) == 1


def test_only_names_the_nearest(run) -> None:
    done = run("-m", "benchmarks.kernels", "--only", "adamw", "layernorm")
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: --only layernorm is not one of {', '.join(operations.OPERATIONS)} "
    )
    assert done.stderr.endswith("(did you mean layer_norm?)\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_all_forms_agree_with_pytorch(place, name, monkeypatch) -> None:
    # aot_eager traces as for a real compilation and then runs without one. That needs no compiler and
    # is fast.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    # mlp_fp8 compiles what fp8_linear compiles, twice
    place = dataclasses.replace(place, no_compiler="slow" if name == "mlp_fp8" else None)
    if DEVICE.type == "cpu":
        place = dataclasses.replace(place, no_fp8=None)  # slow on a CPU, but it works
    rows = {row["form"]: row for row in bench.compare(name, place, Turns(1, 1))}
    ours = [form for form in rows if form.startswith(OURS)]
    assert ours or name.startswith("product_")  # a layer's products have only PyTorch's form
    ours = [form for form in ours if rows[form].get("note") != "not measured: slow"]
    for form in (operations.PYTORCH, *ours):
        assert "note" not in rows[form], rows[form]["note"]
        assert len(rows[form]["seconds"]) == 1
    assert "failed" not in rows.get("torch.compile", {}).get("note", "")


def add(place: Place, forms: dict[str, Form]) -> Operation:
    x = torch.ones(64, device=place.device, requires_grad=True)
    return Operation("64", 512.0, "copy", (x,), forms)


def raises(error: Exception) -> Form:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        raise error

    return Form(lambda: function)


def test_a_form_that_differs_or_fails_is_not_timed(place, monkeypatch) -> None:
    forms = {
        operations.PYTORCH: Form(lambda: lambda x: [2 * x]),
        "another output": Form(lambda: lambda x: [2 * x + 0.1 * x.detach()]),
        "another gradient": Form(lambda: lambda x: [3 * x - x.detach()]),
        "NaN": Form(lambda: lambda x: [x * torch.nan]),
        "broken": raises(ValueError("no such thing\nand more")),
        "large": raises(torch.OutOfMemoryError()),
        "elsewhere": Form(lambda: lambda x: [x], lacks="needs something"),
    }
    monkeypatch.setitem(operations.OPERATIONS, "add", lambda place: add(place, forms))
    rows = {row["form"]: row for row in bench.compare("add", place, Turns(2, 2))}
    assert list(rows) == list(forms) and len(rows[operations.PYTORCH]["seconds"]) == 2
    for form in ("another output", "another gradient", "NaN"):
        assert rows[form]["note"].startswith("failed: Differs: ") and "rate" not in rows[form]
    assert rows["broken"]["note"] == "failed: ValueError: no such thing"
    assert rows["large"]["note"] == "not measured: out of memory"
    assert rows["elsewhere"]["note"] == "not measured: needs something"


def test_a_form_may_run_out_of_memory_only_beside_the_others(place, monkeypatch) -> None:
    calls = iter([None, None, torch.OutOfMemoryError()])  # try-out, memory, timing

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        if error := next(calls):
            raise error
        return [2 * x]

    forms = {operations.PYTORCH: Form(lambda: function), "other": Form(lambda: lambda x: [2 * x])}
    monkeypatch.setitem(operations.OPERATIONS, "add", lambda place: add(place, forms))
    first, second = bench.compare("add", place, Turns(2, 2))
    assert first["note"] == "not measured: out of memory"
    assert len(second["seconds"]) == 2 and second["speed"] is None  # nothing to compare with


def test_our_own_failure_ends_in_one(place, monkeypatch, tmp_path) -> None:
    forms = {
        operations.PYTORCH: Form(lambda: lambda x: [2 * x]),
        f"{OURS}, Triton": Form(lambda: lambda x: [3 * x]),
    }
    monkeypatch.setitem(operations.OPERATIONS, "add", lambda place: add(place, forms))
    # this process keeps its allocator
    monkeypatch.setattr(bench, "set_allocator", lambda keep_freed: None)
    monkeypatch.setattr(
        sys, "argv", ["kernels", "--quick", "--only", "add", "--out", str(tmp_path)]
    )
    with pytest.raises(RuntimeError, match="add, this engine, Triton failed: Differs"):
        bench.main()
    assert "failed: Differs" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize("document", [None, 16])
def test_attention_counts_the_pairs_that_are_seen(place, document) -> None:
    model = place.size.model
    T, D = model.block_size, model.n_embd // model.n_head
    token = torch.arange(T)
    seen = (token[:, None] >= token) & (
        token[:, None] // (document or T) == token // (document or T)
    )
    pairs = place.size.rows // T * model.n_head * seen.sum().item()
    # q k' and p v forward; dp, dv, dq, dk and the scores again backward. Each has a multiplication
    # and an addition.
    assert operations.attention(place, document).work == pairs * D * 2 * 7


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process's peak is not reset")
def test_peak_memory_is_that_of_one_run(place) -> None:
    size = 64 << 20
    held = bench.Contender(
        lambda: [torch.ones(size // 4, device=DEVICE)], (), [], DEVICE, direct=True
    )
    for _ in range(2):  # the second run reuses memory that the first freed
        peak = bench.peak_memory(held)
        assert peak is not None and size <= peak + (1 << 20) < 1.2 * size


def gradients_of(form, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output of a form of `mlp` and its gradients, in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    (y,) = form(*leaves)
    torch.manual_seed(1)
    return [t.double() for t in (y, *torch.autograd.grad(y, leaves, torch.randn_like(y)))]


def mlp_tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes, scales = ((48, 32), (128, 32), (128,), (32, 128), (32,)), (1, 0.1, 1, 0.1, 1)
    return [(scale * torch.randn(shape)).to(dtype) for shape, scale in zip(shapes, scales)]


def test_the_mlp_with_epilogues_is_the_mlp(monkeypatch) -> None:
    """A fake of nvmath-python has its meaning: results and biases in column order."""

    def matmul(a, b, *, epilog: str, epilog_inputs: dict[str, torch.Tensor]):
        product = a @ b
        if epilog == "GELU_AUX_BIAS":
            before = product + epilog_inputs["bias"][:, None]
            return F.gelu(before, approximate="tanh"), {"gelu_aux": before}
        assert epilog == "DGELU_BGRAD"
        du = torch.ops.aten.gelu_backward(product, epilog_inputs["gelu_aux"], approximate="tanh")
        return du, {"dgelu_bgrad": du.sum(1, keepdim=True)}

    names = {name: name for name in ("GELU_AUX_BIAS", "DGELU_BGRAD")}
    fake: Any = types.ModuleType("nvmath.linalg.advanced")
    fake.matmul, fake.MatmulEpilog = matmul, types.SimpleNamespace(**names)
    for name in ("nvmath", "nvmath.linalg"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "nvmath.linalg.advanced", fake)
    tensors = mlp_tensors(torch.float32)
    for ours, plain in zip(
        gradients_of(candidates.mlp_epilogue, tensors), gradients_of(candidates.mlp, tensors)
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_mlp_with_delayed_scales_is_the_mlp_but_for_rounding() -> None:
    tensors = mlp_tensors(torch.bfloat16)
    x, up, b, down, c = tensors
    scales = candidates.delayed_scales(x, up, b, down, c)
    weights = candidates.quantized(up), candidates.quantized(down)
    ours = gradients_of(lambda *t: candidates.mlp_delayed(t, scales, *weights), tensors)
    assert bench.largest_difference(ours, gradients_of(candidates.mlp, tensors)) < 0.1
