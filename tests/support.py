"""What tests share that is no fixture: where the project is, and what programs get that a test
starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# No test reaches a network: a library that tries fails at once and does not hang.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# Programs of several tests share the cores: threads that wait for each other there cost more than
# these models' work.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def python_path(*folders: Path) -> str:
    """PYTHONPATH for a child: `folders`, then what is on it already, such as the wheels of `make
    gpu-check`."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


# The modules whose warnings are errors in tests: the project's own.
OWN_MODULES = (
    r"(config|model|dataset|adapters|base|benchmarks|decoding|engine|evaluate|finetune|fineweb_prep"
    r"|generate|kernels|storage|tasks|text|tokenizer|tools|train_gpt2)(\.|$)"
)
WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n(?:  .*\n)?", re.MULTILINE)


def own_lines(stderr: str) -> str:
    """Standard error without Python's warnings, which depend on the libraries' versions, and their
    source lines."""
    return WARNING.sub("", stderr)
