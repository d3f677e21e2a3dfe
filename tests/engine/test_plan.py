"""How a run resolves its options for the machine."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch.nn.attention import SDPBackend

import kernels._triton
from config import TrainConfig, UserError
from engine import failures, plan
from engine.processes import World
from kernels.attention import attention_backends
from launch import launch, log_of, small, write_inputs

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, [True]), ({"recompute": True}, [False]), ({"without": ("kept-memory",)}, [])],
    ids=["keeps", "gives back", "leaves glibc alone"],
)
def test_the_allocator_of_a_cpu_run(monkeypatch, options, calls):
    made: list[bool] = []
    monkeypatch.setattr(plan, "set_allocator", lambda keep_freed: made.append(keep_freed))
    given: dict[str, Any] = {"precision": "fp32", "kernels": "torch", **options}
    plan.resolve_for_machine(TrainConfig(**given), ALONE)
    assert made == calls


def test_the_banner_names_what_computes_attention():
    def attention(**options: Any) -> str:
        given: dict[str, Any] = {"precision": "fp32", "kernels": "torch", **options}
        return plan.resolve_for_machine(TrainConfig(**given), ALONE)[1].attention

    assert attention() == "flash_attention"
    assert attention(kernels="cpu_attention") == "cpu_attention kernel"
    assert attention(without=("flash-attention",)) == "explicit"


def test_cudnn_comes_first_on_hopper_unless_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert attention_backends(gpu, half)[0] == SDPBackend.CUDNN_ATTENTION
    for options in ({"by_hardware": False}, {"deterministic": True}):
        backends = attention_backends(gpu, half, **options)
        assert (
            backends[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.CUDNN_ATTENTION not in backends
        )
    assert attention_backends(gpu, torch.float32)[0] == SDPBackend.EFFICIENT_ATTENTION


@pytest.mark.parametrize("without", [(), ("cpu-products",)])
def test_the_banner_says_that_onednn_multiplies_fp32(monkeypatch, without):
    asked: list[Any] = []
    monkeypatch.setattr(plan, "set_products", lambda *args: asked.append(args) or not args[2])
    cfg = TrainConfig(precision="fp32", kernels="torch", without=without)
    told = plan.resolve_for_machine(cfg, ALONE)[1].precision
    assert asked == [("fp32", ALONE.device, without)]
    assert told == "set by --precision or by the run" + (
        "" if without else "; fp32 products by oneDNN"
    )


# --- the compiler behind --compile


@pytest.mark.parametrize("name", ["g++-nowhere", "ccache g++", "", "."])
def test_a_missing_cpp_compiler_is_reported_before_the_run(name):
    given: dict[str, Any] = {"precision": "fp32", "kernels": "torch"}
    with torch._inductor.config.patch({"cpp.cxx": (None, name)}):
        with pytest.raises(
            UserError, match=r"--compile needs a C\+\+ compiler: .*--no-compile$"
        ) as raised:
            plan.resolve_for_machine(TrainConfig(compile=True, **given), ALONE)
        assert f"({name} does not run)" in str(raised.value)
        plan.resolve_for_machine(
            TrainConfig(**given), ALONE
        )  # a run that does not compile needs none


def test_cuda_needs_a_c_compiler_for_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(kernels._triton, "triton", kernels)  # as if it were installed
    monkeypatch.setattr(kernels._triton, "INTERPRETED", False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    gpu = World(0, 0, 1, 1, torch.device("cuda"))
    with pytest.raises(
        UserError, match=r"--compile needs a C compiler: .*gcc was not found.*--no-compile$"
    ):
        plan.check_compiler(gpu)
    chosen, lost = kernels.choose(TrainConfig(compile=False, precision="bf16"), "cuda")
    assert chosen == "torch" and lost is not None and "needs a C compiler" in lost
    (tmp_path / "clang").touch(mode=0o755)
    plan.check_compiler(gpu)
    monkeypatch.setenv("CC", "no-such-cc")
    with pytest.raises(UserError, match="no-such-cc was not found"):
        plan.check_compiler(gpu)


HEADERS = (
    "In file included from x.cpp:2:\nx.cpp:2:10: fatal error: Python.h: No such file or "
    "directory\n    2 |"
)
TRITON_BUILD = [
    "/usr/bin/gcc",
    "/tmp/a/main.c",
    "-O3",
    "-shared",
    "-fPIC",
    "-o",
    "/tmp/a/launcher.so",
]
COMPILER_ERRORS = {
    "no headers": (
        InductorError(CppCompileError(["g++"], HEADERS), None),
        "Python.h: No such file",
    ),
    "no compiler": (InductorError(InvalidCxxCompiler(), None), "No working"),
    "none for Triton": (
        RuntimeError("Failed to find C compiler. Please specify via CC"),
        "Failed to find",
    ),
    "Triton's build": (subprocess.CalledProcessError(1, TRITON_BUILD), "main.c"),
}


@pytest.mark.parametrize(("error", "part"), COMPILER_ERRORS.values(), ids=COMPILER_ERRORS)
def test_a_compiler_error_becomes_one_line(error, part):
    line = str(failures.compiler_error(error))
    assert "compiler failed" in line and line.endswith("or type --no-compile")
    assert part in line and "\n" not in line


def test_an_error_inside_torch_compile_keeps_its_traceback():
    assert (
        failures.compiler_error(InductorError(AssertionError("an internal error: 3"), None)) is None
    )
    assert failures.compiler_error(subprocess.CalledProcessError(1, ["nvidia-smi"])) is None


@pytest.mark.parametrize(("there", "files"), [(0, 4), (1, 3), (3, 1), (7, 1)])
def test_existing_checkpoints_reduce_the_disk_needed(there, files):
    assert plan.Disk(kept=3, size=100, final=7).needed(there) == 100 * files + 7
    assert plan.Disk(kept=0, size=100, final=7).needed(there) == 7


def set_free(size: int) -> None:
    # ty: ignore
    shutil.disk_usage = lambda folder: SimpleNamespace(free=size) if Path(folder).is_dir() else None


@pytest.mark.parametrize("dry", [True, False])
def test_a_disk_too_small_is_a_warning_before_the_first_step(dry, tmp_path):
    """The dry run warns of it too. Enough space is not mentioned."""
    write_inputs(tmp_path)
    words = small("--steps 2 --save-every 1 --sample-every 0", *["--dry-run"] * dry)

    def run(free: int, out: str) -> str:
        (end,) = launch(tmp_path, [*words, "--out", out], functools.partial(set_free, free))
        assert end.code == 0, end
        return end.out

    assert "free some" not in run(1 << 40, "enough")
    said = run(1000, "little")
    line = next(line for line in said.splitlines() if "free some" in line)
    assert "little has 1000 B free and the run may take" in line and "(2 checkpoints of" in line
    if not dry:
        assert said.index(line) < said.index("step 1/2")
        assert line.removeprefix("warning: ") in [
            record["text"] for record in log_of(tmp_path / "little", "warning")
        ]


@pytest.mark.parametrize("path", ["/tmp/a/x.main.so", "/home/a b/cache/x.main.so"])
def test_a_damaged_file_in_the_compilers_cache_is_named(path):
    error = InductorError(ImportError(f"{path}: file too short"), None)
    line = str(failures.compiler_error(error))
    assert line.startswith(f"{path} in torch.compile's cache is damaged") and "\n" not in line
