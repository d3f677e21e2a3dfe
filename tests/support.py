"""The project's folder, the environment of programs that tests start, and other helpers that are
not fixtures."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# Tests use no network. With these a library that tries fails at once instead of hanging.
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
# Programs of several tests share the cores. Threads that wait for each other would cost more than
# the work of these small models.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def python_path(*folders: Path) -> str:
    """PYTHONPATH for a child process: `folders`, then its present entries, such as the wheels of
    `make gpu-check`."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


# The project's own modules. Their warnings are errors in tests.
OWN_MODULES = (
    r"(config|model|dataset|adapters|base|benchmarks|decoding|engine|evaluate|finetune|fineweb_prep"
    r"|generate|kernels|storage|tasks|text|tokenizer|tools|train_gpt2)(\.|$)"
)
WARNING = re.compile(r"^\S.*:\d+: \w*Warning: .*\n(?:  .*\n)?", re.MULTILINE)


def own_lines(stderr: str) -> str:
    """Standard error without Python's warnings and their source lines, which depend on the versions
    of libraries."""
    return WARNING.sub("", stderr)


def parsed_classes(source: str) -> set[str]:
    """The names of the classes of options that a program's source gives to `parse`."""
    return {
        node.args[0].id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("parse", "parse_typed")
        and isinstance(node.args[0], ast.Name)
    }
