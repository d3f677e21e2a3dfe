"""Measure what token unlikelihood costs:

python -m benchmarks.objectives [--preset mini] [--vocab 8192,50257]

Whole optimizer steps of one model (forward, backward, AdamW) take turns. The steps are: the
likelihood alone, with all logits in memory; the unlikelihood of tasks/objectives.py; the
unlikelihood as Welleck et al. published it, with a (T, V) mask of candidates and clamped
probabilities; and a loop over positions. The last two are written out here, and the tests compare
with them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from base.cli import entry_point, parse
from base.console import outlive
from benchmarks.harness import Cases, race, race_table, run_cases, say
from config import PRESETS, Count, GPTConfig, PathOrName, Preset

if TYPE_CHECKING:
    from torch import Tensor

PLAIN, OURS, MASKED, LOOP = (
    "likelihood alone",
    "objectives.py",
    "mask of candidates",
    "loop over positions",
)


@dataclass(frozen=True)
class Options:
    """Options of the comparison."""

    preset: Preset = "mini"
    """Size of the model."""
    vocab: str = "8192,50257"
    """Vocabulary sizes, comma-separated."""
    seq_len: Count = 256
    """Tokens in a row."""
    batch: Count = 8
    """Rows in a step."""
    repetitions: Count = 7
    """Turns of each step. The loop takes two at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """The device to measure on, in fp32 on a CPU and under bf16 autocast on a GPU."""
    out: PathOrName = "benchmarks/results"
    """Folder for objectives-DEVICE.json and objectives-DEVICE.md."""


def with_mask(
    logits: Tensor, idx: Tensor, targets: Tensor, least: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The sums of negative log-likelihood and unlikelihood, from dense tensors: a mask (B, T, V) of
    the candidates, and 1 - p clamped to at least `least`."""
    import torch
    import torch.nn.functional as F

    log_p = logits.float().log_softmax(-1)
    B, T, _ = log_p.shape
    target = targets.clamp(min=0)[..., None]
    ahead = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)
    # tokens that come later are replaced by the target
    read = torch.where(ahead, target, idx[:, None, :].expand(B, T, T))
    mask = (
        torch.zeros_like(log_p).scatter_(2, read, 1).scatter_(2, target, 0)
        * (targets != -100)[..., None]
    )
    nll = F.nll_loss(log_p.transpose(1, 2), targets, reduction="sum")
    return nll, -(torch.log((1 - log_p.exp()).clamp(min=least)) * mask).sum()


def with_loop(
    logits: Tensor, idx: Tensor, targets: Tensor, least: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The sums of negative log-likelihood and unlikelihood, position by position."""
    import torch

    nll, unlikelihood = [], []
    for row, tokens, wanted in zip(
        logits.float().unbind(), idx.tolist(), targets.tolist(), strict=True
    ):
        for t, (z, target) in enumerate(zip(row.unbind(), wanted, strict=True)):
            if target != -100:
                log_p = z.log_softmax(0)
                nll.append(-log_p[target])
                candidates = torch.tensor(
                    sorted(set(tokens[: t + 1]) - {target}), dtype=torch.int64, device=z.device
                )
                unlikelihood.append(
                    -torch.log((1 - log_p[candidates].exp()).clamp(min=least)).sum()
                )
    return torch.stack(nll).sum(), torch.stack(unlikelihood).sum()


def contenders(vocab: int, options: Options, device: str) -> dict[str, Callable[[], float]]:
    """Functions by name. Each makes one optimizer step of the same model on the same rows and
    returns its loss."""
    import torch

    from model import GPT
    from tasks.objectives import nll_and_unlikelihood

    torch.manual_seed(0)
    shape: dict[str, Any] = {"block_size": options.seq_len, **PRESETS[options.preset]}
    model = GPT(GPTConfig(vocab_size=vocab, **shape)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocab, (options.batch, options.seq_len + 1), device=device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def both(objective: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        nll, unlikelihood = objective(model.logits(model.hidden(idx)), idx, targets)
        return nll + unlikelihood

    def step(total: Callable[[], Tensor]) -> float:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = total() / targets.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    totals = {
        PLAIN: lambda: model(idx, targets).sum(),
        OURS: lambda: both(nll_and_unlikelihood),
        MASKED: lambda: both(with_mask),
        LOOP: lambda: both(with_loop),
    }
    return {name: partial(step, total) for name, total in totals.items()}


def measure(options: Options, device: str) -> Cases:
    """Yields each vocabulary, with the seconds of each step's turns."""
    for vocab in map(int, options.vocab.split(",")):
        say(f"vocabulary {vocab} ...")
        steps = contenders(vocab, options, device)
        seconds = race(steps, range(options.repetitions), limits={LOOP: 2})
        yield {"vocab": vocab}, {"seconds": seconds}


def report(record: dict[str, Any]) -> str:
    """The table of steps, as Markdown."""
    options = record["options"]
    return (
        f"Optimizer steps of {options['preset']} ({options['batch']} rows x {options['seq_len']} "
        "tokens). Speed x: over that of the likelihood alone.\n\n"
        + race_table(record["cases"], ["vocab"], "steps/s", form=",.2f")
    )


def main() -> None:
    """Measure all vocabularies, write the result files and print the table."""
    options = parse(Options, sys.argv[1:])
    outlive()
    run_cases(options, "objectives-DEVICE", options.device, measure, report)


if __name__ == "__main__":
    entry_point(main)
