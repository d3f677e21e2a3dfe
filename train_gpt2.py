"""Pretrain GPT-2 on one process or many:

python train_gpt2.py [options]
torchrun --standalone --nproc_per_node=N train_gpt2.py [options]
"""

from __future__ import annotations

import sys

from base.cli import entry_point, parse_typed
from base.console import outlive
from config import TrainConfig


def main() -> int:
    """Parse the command line, train, and return the exit code."""
    cfg, typed = parse_typed(TrainConfig, sys.argv[1:])
    if not cfg.dry_run:
        outlive()
    # Importing torch takes seconds, so --help and a mistyped option are answered before it.
    from engine.pretraining import LanguageModelling
    from engine.processes import record_failures
    from engine.trainer import train

    return record_failures(train, LanguageModelling(), cfg, typed)


if __name__ == "__main__":
    entry_point(main)
