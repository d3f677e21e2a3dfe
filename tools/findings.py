"""What the facts of a machine mean for a run: pure functions, so that a test can describe any
machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from base.console import bytes_text, counted

State = Literal["fine", "slow", "broken"]
PYTHONS = ((3, 11), (3, 13))  # the oldest and the newest that are tested
TORCHES = ((2, 11), (2, 13))
# Oldest driver for any version of a CUDA generation (CUDA's release notes, minor version
# compatibility).
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# Bits of nvidia-smi's throttle reasons that mean heat or too little power (NVML's constants).
THROTTLED = {0x08: "hardware", 0x20: "heat", 0x40: "heat", 0x80: "the power supply"}
PROBE = 'python -c "import torch; torch.cuda.init()"'  # says why
NEW_DRIVER = "sudo apt install nvidia-driver-580"
INTERNAL = ("cudnn", "cublas", "cudart", "nccl")  # libraries that PyTorch brings along


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: fine, slow (it works, at a cost or untested) or broken."""

    state: State
    subject: str
    text: str
    type: str = ""  # what to type; empty if it is fine


@dataclass(frozen=True)
class Gpu:
    """A CUDA GPU. `smi` has nvidia-smi's fields by name, as it prints them."""

    name: str
    capability: tuple[int, int]
    smi: Mapping[str, str] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """A field's number; 0 if the card does not report it."""
        found = re.match(r"[\d.]+", self.smi.get(name, ""))
        return float(found[0]) if found else 0.0


@dataclass(frozen=True)
class Machine:
    """The facts of a machine. The defaults are those of a machine without a GPU."""

    python: tuple[int, ...] = (3, 11, 0)
    torch: str = "2.13.0"
    cuda: str | None = None  # the CUDA version of the build
    triton: str | None = None
    triton_wanted: str | None = None  # by this build of torch
    driver: str = ""
    smi: str = "no nvidia-smi"  # why the driver is not known
    gpus: Sequence[Gpu] = ()  # that PyTorch can use
    archs: Sequence[str] = ()  # that the build has code for
    cudnn: str = ""  # its version; empty if it does not load
    cudnn_problem: str = ""
    # libraries in LD_LIBRARY_PATH that PyTorch has its own of, and whether they are loaded
    shadows: Mapping[str, bool] = field(default_factory=dict)
    nccl: str = ""
    interfaces: Sequence[str] = ()
    unlinked: int = 0  # pairs of GPUs that cannot read each other's memory
    environment: Mapping[str, str] = field(default_factory=dict)
    compiler: str | None = None  # what torch.compile lacks
    cores: int = 2
    threads: int = 2
    load: float = 0.0
    vectors: str = "AVX2"  # used by PyTorch
    best_vectors: str = ""  # that the processor has
    glibc: bool = True
    hub: str = "https://huggingface.co"
    offline: bool = False  # the hub must not be asked
    hub_problem: str = ""  # why it cannot be reached


def findings(m: Machine) -> list[Finding]:
    """All findings about a machine, in the order in which they are printed."""
    device = [*_codes(m), *_libraries(m), *_cards(m), *_links(m)] if m.gpus else _cpu(m)
    return [*_versions(m), *_driver(m), *device, *_compiler(m), *_hub(m)]


Problem = tuple[object, State, str, str]  # whether it is there, and the finding


def check(subject: str, fine: str, *problems: Problem) -> list[Finding]:
    """The problems that are there; if none is, that it is fine."""
    found = [Finding(state, subject, text, how) for there, state, text, how in problems if there]
    return found or [Finding("fine", subject, fine)]


def _versions(m: Machine) -> Iterator[Finding]:
    version = tuple(map(int, re.findall(r"\d+", m.torch)[:2]))
    for name, shown, pair, (oldest, newest), make in (
        ("Python", ".".join(map(str, m.python)), m.python[:2], PYTHONS, "PYTHON=python3.13"),
        ("torch", m.torch, version, TORCHES, "TORCH=2.13.0"),
    ):
        tested = " to ".join(".".join(map(str, bound)) for bound in (oldest, newest))
        text, how = f"{shown}; {tested} are tested", f"make train {make}"
        old, new = pair < oldest, pair > newest
        yield from check(name, shown, (old, "broken", text, how), (new, "slow", text, how))
    wanted = m.triton_wanted
    text = f"{m.triton or 'not installed'}; torch {m.torch} wants {wanted}"
    wrong = wanted and wanted != m.triton, "slow", text, f"pip install triton=={wanted}"
    yield from check("triton", m.triton or "not installed; a CPU needs none", wrong)


def _driver(m: Machine) -> list[Finding]:
    if not m.driver:
        text = f"nvidia-smi tells nothing ({m.smi})"
        unseen = m.gpus, "slow", text, "sudo apt install nvidia-utils-580"
        return check("driver", f"none ({m.smi})", unseen)
    major = int(m.driver.partition(".")[0])
    needed = OLDEST_DRIVER.get(int((m.cuda or "0").partition(".")[0]), 0)
    old, legacy = major < needed, _install(m, "cu126")
    advice = f"{NEW_DRIVER}, or {legacy}" if major >= OLDEST_DRIVER[12] else NEW_DRIVER
    without = f"{m.driver}, but torch {m.torch} is a build without CUDA"
    unseen = not m.gpus and m.cuda and not old
    look = "unset CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in m.environment else PROBE
    return check(
        "driver",
        f"{m.driver}, CUDA {m.cuda}",
        (not m.cuda, "broken", without, legacy if major < 580 else _install(m, "cu130")),
        (old, "broken", f"{m.driver} is too old for CUDA {m.cuda}, which needs {needed}", advice),
        (unseen, "broken", f"{m.driver} is there, but PyTorch sees no GPU", look),
    )


def _install(m: Machine, index: str) -> str:
    version = m.torch.partition("+")[0]
    return f"pip install torch=={version} --index-url https://download.pytorch.org/whl/{index}"


def code_for(archs: Sequence[str], capability: tuple[int, int]) -> str:
    """The code of a build that a card runs: "sm_80" as it is, "compute_80" (PTX) compiled by the
    driver, "" none.

    Machine code runs on its own major version from its minor version on, PTX on every later
    version. A letter at the end binds code to its one version.
    """
    found = []
    for kind, major, minor, letter in re.findall(r"(sm|compute)_(\d+)(\d)(\w?)", " ".join(archs)):
        version, ptx = (int(major), int(minor)), kind == "compute"
        later = version <= capability and (ptx or version[0] == capability[0]) and not letter
        if later or version == capability:
            found.append((not ptx, version, f"{kind}_{major}{minor}{letter}"))
    return max(found)[2] if found else ""


def _codes(m: Machine) -> Iterator[Finding]:
    for name, capability in dict.fromkeys((gpu.name, gpu.capability) for gpu in m.gpus):
        code, shown = code_for(m.archs, capability), "{} ({}.{})".format(name, *capability)
        only = f"torch {m.torch} has no code for {shown}, only {' '.join(m.archs)}"
        yield from check(
            "GPU code",
            f"{code} for {shown}",
            (not code, "broken", only, _install(m, "cu126" if capability < (7, 5) else "cu130")),
            (code.startswith("compute"), "slow", f"{shown} runs {code}, which the driver compiles "
             "at the first start", _install(m, "cu130")),
        )  # fmt: skip


def _libraries(m: Machine) -> Iterator[Finding]:
    for path, loaded in m.shadows.items():
        text = f"{path} of LD_LIBRARY_PATH is loaded in place of PyTorch's own"
        unused = f"{path} is in LD_LIBRARY_PATH, but PyTorch loads its own"
        yield from check("libraries", unused, (loaded, "slow", text, "unset LD_LIBRARY_PATH"))
    again = f"pip install --force-reinstall torch=={m.torch.partition('+')[0]}"
    how = "unset LD_LIBRARY_PATH" if m.shadows else again
    lost = not m.cudnn, "broken", m.cudnn_problem, how
    yield from check("cuDNN", m.cudnn, lost)


def _cards(m: Machine) -> Iterator[Finding]:
    for index, gpu in enumerate(m.gpus):
        if not gpu.smi:  # a part of a card (MIG), or no nvidia-smi
            continue
        limit, usual = gpu.number("power.limit"), gpu.number("power.default_limit")
        mask = gpu.smi.get("clocks_throttle_reasons.active", "")
        mask = int(mask, 16) if mask.startswith("0x") else 0
        causes = dict.fromkeys(cause for bit, cause in THROTTLED.items() if mask & bit)
        errors = int(gpu.number("ecc.errors.uncorrected.volatile.total"))
        clock, most, ecc = (
            gpu.smi.get(name, "?") for name in ("clocks.sm", "clocks.max.sm", "ecc.mode.current")
        )
        yield from check(
            f"GPU {index}",
            f"{gpu.name}: {clock} of {most}, {limit:.0f} W, ECC {ecc}",
            (errors, "broken", f"{counted(errors, 'uncorrected memory error')} since its last reset",
             f"sudo nvidia-smi --gpu-reset -i {index}"),
            (limit < usual, "slow", f"limited to {limit:.0f} W of {usual:.0f}",
             f"sudo nvidia-smi -i {index} -pl {usual:.0f}"),
            (causes, "slow", f"slowed down by {' and '.join(causes)}",
             f"nvidia-smi -i {index} -q -d PERFORMANCE"),
        )  # fmt: skip


def _links(m: Machine) -> list[Finding]:
    if len(m.gpus) < 2:
        return []
    settings = {k: v for k, v in m.environment.items() if k.startswith("NCCL_")}
    shown = "".join(f", {name}={value}" for name, value in settings.items())
    wanted = settings.get("NCCL_SOCKET_IFNAME", "")
    lost = wanted[:1] not in ("", "^") and not any(
        name.startswith(wanted.lstrip("=").split(",")[0]) for name in m.interfaces
    )
    bad = f"NCCL_SOCKET_IFNAME={wanted} names none of {' '.join(m.interfaces)}"
    off = settings.get("NCCL_P2P_DISABLE", "0") != "0"
    apart = f"{counted(m.unlinked, 'pair')} of GPUs cannot read each other's memory"
    start = f"torchrun --standalone --nproc_per_node={len(m.gpus)} train_gpt2.py takes them all"
    return [
        *check("NCCL", m.nccl + shown, (lost, "broken", bad, "unset NCCL_SOCKET_IFNAME")),
        *check(
            "P2P",
            f"between all {len(m.gpus)} GPUs; {start}",
            (off, "slow", "turned off by NCCL_P2P_DISABLE", "unset NCCL_P2P_DISABLE"),
            (m.unlinked, "slow", apart, "nvidia-smi topo -m"),
        ),
    ]


def _cpu(m: Machine) -> Iterator[Finding]:
    text = f"{m.threads} of {m.cores} cores, by OMP_NUM_THREADS"
    few = m.threads < m.cores, "slow", text, "unset OMP_NUM_THREADS"
    yield from check("threads", f"{m.threads} on {counted(m.cores, 'core')}", few)
    text = f"other programs run here (load {m.load:.1f}), and a run shares its cores with them"
    yield from check("load", f"{m.load:.1f}", (m.load > m.cores / 2, "slow", text, "top"))
    less = m.best_vectors not in ("", m.vectors)
    text = f"PyTorch uses {m.vectors}, and the processor has {m.best_vectors}"
    how = "unset ATEN_CPU_CAPABILITY" if "ATEN_CPU_CAPABILITY" in m.environment else "lscpu"
    yield from check("vectors", m.vectors, (less, "slow", text, how))
    other = m.environment.get("LD_PRELOAD")
    text = "it may return freed memory in every step, which costs time"
    yield from check(
        "allocator",
        "glibc's, which keeps freed memory for the next step",
        (other, "slow", f"{other}: {text}", "unset LD_PRELOAD"),
        (not m.glibc, "slow", f"not glibc's: {text}", "ldd --version"),
    )


def _compiler(m: Machine) -> list[Finding]:
    state: State = "broken" if m.gpus else "slow"  # a run on a GPU compiles by default
    how = "sudo apt install gcc g++" + ", or add --no-compile" * bool(m.gpus)
    missing = m.compiler, state, f"--compile {m.compiler}", how
    return check("compiler", "torch.compile has one", missing)


def _hub(m: Machine) -> list[Finding]:
    works = "--data stdlib, local files and what is in the cache work"
    fine = f"not asked, by HF_HUB_OFFLINE; {works}" if m.offline else f"{m.hub} answers"
    text = f"{m.hub} cannot be reached ({m.hub_problem}); {works}"
    return check("hub", fine, (m.hub_problem, "slow", text, "export HF_HUB_OFFLINE=1"))


def disk(option: str, path: str, writable: bool, free: int, needed: int = 0) -> list[Finding]:
    """Whether a run can write `needed` bytes to the folder of an option."""
    space, other = f"{path}: {bytes_text(free)} free", f"{option} ANOTHER_FOLDER"
    taken = f"{space}, a run takes {bytes_text(needed)}"
    return check(
        f"disk, {option}",
        taken if needed else space,
        (not writable, "broken", f"{path} cannot be written", other),
        (free < needed, "broken", taken, f"{other}, or a lower --keep"),
    )
