"""Set-up work of benchmarks.stages that needs torch: facts of the machine, and the tokens. Each
call runs in its own process."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.machine import cores
from benchmarks.ladder import Machine
from benchmarks.machine import facts
from benchmarks.runs import say
from config import PRESETS, GPTConfig, TrainConfig, UserError, resolve
from engine.roofline import product_ceiling

if TYPE_CHECKING:
    import torch

GPT2_VOCABULARY = 50257  # not a multiple of 128, so that padding it makes a difference
# bytes of torch's source; with the standard library they have enough pairs for that vocabulary
TORCH_SOURCE = 8 << 20


def look(device: str, ranks: int | None) -> Machine:
    """The machine with this device. Raises UserError if the device is missing or has no room for
    `ranks` ranks."""
    import torch

    from kernels import choose, operation_names

    known = facts(device)
    device, hardware = known["device"], known["hardware"]
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device} has no ladder; use --device cpu")
    cuda = device == "cuda"
    n_cores = cores()
    devices = torch.cuda.device_count() if cuda else 1
    room = devices if cuda else n_cores
    if ranks is not None and not 1 < ranks <= room:
        raise UserError(
            f"--ranks is {ranks}; it must be from 2 to the {room} {'GPUs' if cuda else 'cores'} "
            "there are"
        )
    cfg = dataclasses.replace(resolve(TrainConfig(), device), precision=known["native"])
    return Machine(
        device=device,
        name=hardware["gpu"] or hardware["cpu"],
        threads=hardware["threads"],
        cores=n_cores,
        devices=devices,
        memory=torch.cuda.get_device_properties(0).total_memory
        if cuda
        else hardware["memory_bytes"],
        lacks=lacks(torch.device(device), room),
        kernels=operation_names(choose(cfg, device)[0]),
        facts=known,
    )


def refused(option: str, choose: Callable[[], object]) -> str | None:
    """Why the engine refuses an option, or None if it takes it."""
    try:
        choose()
    except UserError as error:
        return str(error).partition(";")[0].removeprefix(f"{option} ")
    return None


def lacks(device: torch.device, room: int) -> dict[str, str]:
    """The needs of stages that this machine lacks, kernels too, with the engine's own reasons.
    `room` is the number of ranks that fit."""
    import torch

    from engine.compiling import compiler_problem
    from engine.precision import choose_precision, set_products
    from kernels import KERNELS, choose
    from kernels._triton import no_triton_reason
    from kernels.attention import attention_backends

    def precision(name: str) -> str | None:
        return refused(f"--precision {name}", lambda: choose_precision(name, device))

    def kernel(name: str) -> str | None:
        cfg = dataclasses.replace(
            resolve(TrainConfig(), device.type), precision=native, kernels=name
        )
        return refused(f"--kernels {name}: {name}", lambda: choose(cfg, device.type))

    cuda = device.type == "cuda"
    native, why = choose_precision("auto", device)
    best, plain = (
        attention_backends(device, torch.bfloat16, by_hardware=which)[0] for which in (True, False)
    )
    products = set_products("fp32", device)
    reasons = {
        "products": None if products else "is for CPUs where it is faster than MKL",
        "tf32": precision("tf32"),
        "bf16": None if native == "bf16" else why,
        "compiler": compiler_problem(device.type),
        "ranks": None if room > 1 else f"there is one {'GPU' if cuda else 'core'}",
        "backend": None if best != plain else f"{best.name.lower()} is the best here already",
        "heap": "about a CPU's memory" if cuda else None,
        "graphs": no_triton_reason("cuda") if cuda else "needs a CUDA GPU",
        "fp8": precision("fp8"),
    }
    if not cuda and sys.platform != "linux":
        reasons["heap"] = "needs Linux"
    reasons |= {name: kernel(name) for name in KERNELS}
    return {name: reason for name, reason in reasons.items() if reason}


def prepare(
    preset: str, seq_len: int, data: str, tokenizer: str | None, cache: Path
) -> tuple[str | None, int, int]:
    """Make the tokenizer and the tokens, once. Returns the tokenizer, the size of its vocabulary,
    and the FLOPs per token."""
    import torch

    from engine.data import open_data
    from model import GPT

    if data == "stdlib" and tokenizer is None:
        tokenizer = str(cache / "tokenizer")
        if not Path(tokenizer).exists():
            train_tokenizer(Path(tokenizer))
    opened = open_data(data, None, tokenizer, TrainConfig.text_column, cache, seq_len, say)
    vocabulary = opened.vocabulary.size
    with torch.device("meta"):
        model = GPT(config_of(preset, seq_len, vocab_size=vocabulary))
    return tokenizer, vocabulary, model.flops_per_token(seq_len)


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE with as many tokens as GPT-2's on the Python source on this
    machine."""
    import torch

    from text import corpus
    from text.files import stdlib_files
    from text.tokenizer_training import train_bpe

    sources = sorted(Path(torch.__file__).parent.rglob("*.py"))
    sizes = itertools.accumulate(path.stat().st_size for path in sources)
    beside = [path for path, size in zip(sources, sizes) if size <= TORCH_SOURCE]
    say(f"training a tokenizer of {GPT2_VOCABULARY:,} tokens on this machine's Python source")
    texts = (text for text, _ in corpus.TextFiles([*stdlib_files(), *beside]).segments())
    train_bpe(texts, GPT2_VOCABULARY, folder)


def fitting_micro_batch(preset: str, seq_len: int, memory: int) -> int:
    """The largest power of two up to 32 for which the baseline fits into a GPU. The baseline needs
    the most memory."""
    from engine.memory import estimate
    from engine.task import Cost

    baseline: dict[str, Any] = dict(
        tied_head=False, padded_vocab=False, attention="explicit", chunked_head=False
    )
    cost, cfg = Cost(config_of(preset, seq_len, **baseline), seq_len), TrainConfig(precision="fp32")
    fitting = (n for n in (32, 16, 8, 4, 2) if estimate(cost, cfg, n, "cuda").total < 0.75 * memory)
    return next(fitting, 1)


def product_ceilings(device: str, precisions: Sequence[str]) -> dict[str, float]:
    """The FLOP/s of one large matrix product, by precision."""
    return {precision: product_ceiling(device, precision, 1.0) for precision in precisions}


def config_of(preset: str, seq_len: int, **more: Any) -> GPTConfig:
    """The preset's GPTConfig with this block_size. `more` overrides its fields."""
    shape: dict[str, Any] = PRESETS[preset] | more
    return GPTConfig(block_size=seq_len, **shape)
