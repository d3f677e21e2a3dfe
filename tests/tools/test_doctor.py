"""The doctor: what it says of machines that are described by hand, how it reads the real one, and
the whole command."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from base.cli import entry_point
from engine import plan
from hub_server import Hub
from tools import doctor
from tools.findings import Finding, Gpu, Machine, code_for, disk, findings

SMI = {
    "driver_version": "580.65.06",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "power.limit": "700.00 W",
    "power.default_limit": "700.00 W",
    "clocks.sm": "345 MHz",
    "clocks.max.sm": "1980 MHz",
    "clocks_throttle_reasons.active": "0x0000000000000001",
}
BUILD = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
LAPTOP = Machine(cores=8, threads=8, hub_problem="Name or service not known")
H100S = Machine(
    torch="2.13.0+cu130",
    cuda="13.0",
    triton="3.7.1",
    triton_wanted="3.7.1",
    driver="580.65.06",
    gpus=[Gpu("NVIDIA H100 80GB HBM3", (9, 0), SMI)] * 8,
    archs=BUILD,
    cudnn="92000",
    nccl="2.29.3",
    interfaces=("lo", "eth0"),
)
T4 = dataclasses.replace(H100S, gpus=[Gpu("Tesla T4", (7, 5), SMI)])
A100 = dataclasses.replace(H100S, gpus=[Gpu("NVIDIA A100-SXM4-80GB", (8, 0), SMI)])
CUDNN = "/usr/lib/cudnn8/libcudnn.so.8"


def wrong(machine: Machine, **changes: Any) -> list[tuple[str, str]]:
    """The state and subject of what is not fine on a changed machine. Each has something to
    type."""
    found = [f for f in findings(dataclasses.replace(machine, **changes)) if f.state != "fine"]
    assert all(f.type for f in found)
    return [(f.state, f.subject) for f in found]


def of(machine: Machine, subject: str) -> Finding:
    return next(f for f in findings(machine) if f.subject == subject)


@pytest.mark.parametrize("machine", [T4, A100, H100S], ids=["T4", "A100", "8 x H100"])
def test_a_sound_gpu_machine_is_fine(machine):
    assert not wrong(machine)


def test_a_laptop_without_gpu_and_network_lacks_only_the_hub():
    assert wrong(LAPTOP) == [("slow", "hub")]
    assert "--data stdlib" in of(LAPTOP, "hub").text
    assert not wrong(LAPTOP, offline=True, hub_problem="")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"shadows": {CUDNN: True}}, [("slow", "libraries")]),
        ({"shadows": {CUDNN: False}}, []),
        (
            {"shadows": {CUDNN: True}, "cudnn": "", "cudnn_problem": "8.9 found, 9.2 wanted"},
            [("slow", "libraries"), ("broken", "cuDNN")],
        ),
        ({"driver": "550.54.14"}, [("broken", "driver")]),
        ({"driver": "550.54.14", "cuda": "12.6"}, []),
        ({"driver": "550.54.14", "gpus": []}, [("broken", "driver")]),
        ({"cuda": None, "gpus": []}, [("broken", "driver")]),
        ({"gpus": []}, [("broken", "driver")]),
        ({"driver": "", "smi": "not found"}, [("slow", "driver")]),
        ({"archs": ("sm_90", "compute_90")}, [("broken", "GPU code")]),
        ({"archs": ("compute_75",)}, [("slow", "GPU code")]),
        ({"triton": "3.6.0"}, [("slow", "triton")]),
        ({"compiler": "needs a C compiler"}, [("broken", "compiler")]),
        ({"python": (3, 10, 2)}, [("broken", "Python")]),
        ({"torch": "2.14.0+cu130"}, [("slow", "torch")]),
    ],
)
def test_what_is_wrong_with_an_a100(changes, found):
    assert wrong(A100, **changes) == found


def test_advice_is_for_the_driver_and_the_card():
    old = dataclasses.replace(A100, driver="550.54.14")
    assert of(old, "driver").type.endswith(
        "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"
    )
    volta = dataclasses.replace(A100, gpus=[Gpu("Tesla V100", (7, 0), SMI)])
    assert of(volta, "GPU code").type.endswith("cu126")


@pytest.mark.parametrize(
    ("field", "value", "state", "typed"),
    [
        ("power.limit", "400.00 W", "slow", "sudo nvidia-smi -i 0 -pl 700"),
        ("clocks_throttle_reasons.active", "0x0000000000000048", "slow", "PERFORMANCE"),
        ("ecc.errors.uncorrected.volatile.total", "3", "broken", "--gpu-reset"),
        ("ecc.errors.uncorrected.volatile.total", "[N/A]", "fine", ""),
        ("clocks_throttle_reasons.active", "[N/A]", "fine", ""),
    ],
)
def test_what_nvidia_smi_tells_of_a_card(field, value, state, typed):
    gpu = dataclasses.replace(A100.gpus[0], smi={**SMI, field: value})
    found = of(dataclasses.replace(A100, gpus=[gpu]), "GPU 0")
    assert found.state == state and typed in found.type


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"unlinked": 12}, [("slow", "P2P")]),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}}, [("slow", "P2P")]),
        ({"environment": {"NCCL_SOCKET_IFNAME": "ib0"}}, [("broken", "NCCL")]),
        ({"environment": {"NCCL_SOCKET_IFNAME": "eth,ib"}}, []),
        ({"environment": {"NCCL_SOCKET_IFNAME": "^docker"}}, []),
    ],
)
def test_what_slows_messages_between_gpus(changes, found):
    assert wrong(H100S, **changes) == found


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"threads": 1}, "threads"),
        ({"load": 9.0}, "load"),
        ({"best_vectors": "AVX512"}, "vectors"),
        ({"environment": {"LD_PRELOAD": "libjemalloc.so"}}, "allocator"),
        ({"glibc": False}, "allocator"),
        ({"compiler": "needs a C++ compiler"}, "compiler"),
    ],
)
def test_what_slows_a_cpu(changes, subject):
    assert wrong(LAPTOP, hub_problem="", **changes) == [("slow", subject)]


def test_a_folder_must_be_writable_and_large_enough():
    (sound,) = disk("--out", "runs/a", writable=True, free=100, needed=100)
    assert sound.state == "fine"
    for writable, free in ((False, 100), (True, 99)):
        (found,) = disk("--out", "runs/a", writable, free, needed=100)
        assert found.state == "broken" and "--out" in found.type


@pytest.mark.parametrize(
    ("archs", "capability", "code"),
    [
        (BUILD, (8, 9), "sm_86"),
        (BUILD, (8, 0), "sm_80"),
        (BUILD, (12, 1), "sm_120"),
        (BUILD, (7, 0), ""),
        (("sm_90a", "sm_80"), (9, 0), "sm_90a"),
        (("sm_100a", "compute_90"), (10, 3), "compute_90"),
    ],
)
def test_a_card_runs_code_of_its_generation_or_ptx(archs, capability, code):
    assert code_for(archs, capability) == code


def test_nvidia_smi_is_read_by_its_fields(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._smi()[1] == []
    line = ", ".join(["GPU-1", *SMI.values()])
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{line}'\n")
    script.chmod(0o755)
    assert doctor._smi() == ("", [{"uuid": "GPU-1", **SMI}])
    script.write_text("#!/bin/sh\necho 'no driver is loaded'\nexit 9\n")
    assert doctor._smi() == ("no driver is loaded", [])


def test_a_hub_that_does_not_answer_is_found(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with Hub() as hub:
        assert doctor._hub_problem(hub.url) == ""
        hub.fault = lambda method, path: 503
        assert doctor._hub_problem(hub.url) == "status 503"
        url = hub.url
    assert "refused" in doctor._hub_problem(url)
    assert doctor._hub_problem("huggingface") != ""


def test_libraries_that_shadow_pytorchs_are_found(monkeypatch, tmp_path):
    (tmp_path / "libcudnn.so.8").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:/nowhere")
    assert doctor._shadows() == {str(tmp_path / "libcudnn.so.8"): False}
    loaded = next(line for line in Path("/proc/self/maps").read_text().split() if ".so" in line)
    monkeypatch.setattr(doctor, "INTERNAL", [Path(loaded).name.partition(".")[0][3:]])
    monkeypatch.setenv("LD_LIBRARY_PATH", str(Path(loaded).parent))
    assert list(doctor._shadows().values()) == [True]


def test_the_doctor_predicts_and_builds_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "TIMED", 0.2)
    monkeypatch.setattr(sys, "argv", ["doctor", "--preset", "micro", "--device", "cpu"])
    assert doctor.main() == 0
    text = capsys.readouterr().out
    for word in ("fine    Python", "attention", "disk, --out    runs/micro", "GB/s\nexpect "):
        assert word in text
    assert "tokens/s, give or take" in text and not list(tmp_path.iterdir())


def test_a_broken_machine_is_not_timed_and_gives_exit_code_1(monkeypatch, capsys):
    broken = dataclasses.replace(A100, driver="470.57.02")
    monkeypatch.setattr(doctor, "gather", lambda *args, **options: broken)
    monkeypatch.setattr(sys, "argv", ["doctor", "--device", "cpu"])
    assert doctor.main() == 1
    text = capsys.readouterr().out
    assert "broken  driver" in text and "type: sudo apt install nvidia-driver" in text
    assert "expect" not in text


def test_a_folder_on_a_read_only_laptop_is_broken(monkeypatch, tmp_path):
    (found,) = doctor.folder("--out", str(tmp_path / "runs" / "tiny"))
    assert found.state == "fine"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (found,) = doctor.folder("--out", str(tmp_path / "runs" / "tiny"))
    assert found.state == "broken" and found.type == "--out ANOTHER_FOLDER"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "huge"], "--preset"),
        (["--outt", "x"], "did you mean --out"),
        (["--device", "cuda"], "--device cpu"),
    ],
)
def test_a_mistake_is_one_line(words, said, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["doctor", *words])
    with pytest.raises(SystemExit) as stop:
        entry_point(doctor.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
