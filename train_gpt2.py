"""Pretrain GPT-2:

torchrun --standalone --nproc_per_node=N train_gpt2.py [options]   (or plain python)"""

from __future__ import annotations

import sys

from base.cli import entry_point, parse, typed_options
from base.console import outlive
from config import TrainConfig


def main() -> int:
    cfg = parse(TrainConfig, sys.argv[1:])
    if not cfg.dry_run:
        outlive()
    # torch is imported only now: --help and a mistyped option answer at once.
    from engine.pretraining import LanguageModelling
    from engine.processes import record_failures
    from engine.trainer import train

    return record_failures(
        train, LanguageModelling(), cfg, typed_options(TrainConfig, sys.argv[1:])
    )


if __name__ == "__main__":
    entry_point(main)
