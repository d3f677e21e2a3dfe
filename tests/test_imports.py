"""A module imports only from its own package and from packages before it. There are no circles, and
importing has no side effects."""

from __future__ import annotations

import graphlib
import json
import re

import pytest

from docs.packages import COMMANDS, draw, imports, modules
from support import OWN_MODULES, REPO, own_lines

# The import order. A module imports from its own package and from packages before it. Commands do
# not import each other.
ORDER = (
    "config",
    "base",
    "storage",
    "kernels",
    "text",
    "model",
    "adapters",
    "decoding",
    "dataset",
    "engine",
    "tasks",
    "train_gpt2",
    "generate",
    "evaluate",
    "fineweb_prep",
    "tokenizer",
    "finetune",
    "tools",
    "benchmarks",
)


MODULES = modules()


def unit(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_is_in_the_import_order() -> None:
    homeless = {unit(name) for name in MODULES} - set(ORDER)
    assert not homeless, f"place these in ORDER (and in the design): {sorted(homeless)}"


def test_imports_follow_the_order() -> None:
    at = {name: place for place, name in enumerate(ORDER)}
    wrong = [
        f"{name} -> {other}"
        for name in MODULES
        for other in sorted(imports(name))
        if at[unit(other)] > at[unit(name)]
        or (unit(name) != unit(other) and unit(other) in COMMANDS)
    ]
    assert not wrong, f"imports from packages to the right, or of a command: {wrong}"


def test_pretraining_does_not_import_fine_tuning() -> None:
    seen, waiting = set[str](), ["train_gpt2"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        waiting += imports(name) - seen
    other = {"tasks", "finetune", "tools", "benchmarks", "evaluate", "generate"}
    assert not {name for name in seen if unit(name) in other}
    assert not seen & {
        "decoding.batched",
        "decoding.search",
        "decoding.similarity",
        "adapters.layers",
        "adapters.peft",
    }


def test_imports_have_no_circles() -> None:
    graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).prepare()


def test_warnings_of_every_module_are_errors_in_tests() -> None:
    assert all(re.match(OWN_MODULES, name) for name in MODULES)


def test_the_picture_of_the_packages_shows_every_package(tmp_path) -> None:
    draw(tmp_path / "packages.svg")
    drawn, committed = (
        set(re.findall(r">(\w+)</text>", (folder / "packages.svg").read_text(encoding="utf-8")))
        for folder in (tmp_path, REPO / "docs")
    )
    boxes = {unit(name) for name in MODULES} - set(COMMANDS) | {"commands"}
    assert drawn == committed == boxes, "run python -m docs.packages"


# One process imports package after package, so that an effect is that of the last import. torch
# comes after config, which must not import it, and before the others, so that its effects do not
# count as theirs.
IMPORT_EACH = """
import importlib, json, os, random, sys, threading

import psutil  # on Linux it needs one of the modules below

# Windows has neither: nothing may need them to be imported.
sys.modules.update(fcntl=None, resource=None)

def state():
    torch = sys.modules.get("torch")
    return {
        "files": sorted(os.listdir()),
        "threads": threading.active_count(),
        "environment": dict(os.environ),
        "random": hash(random.getstate()),
        "torch": torch and [hash(bytes(torch.get_rng_state().tolist())), torch.get_num_threads(),
                            str(torch.get_default_dtype()), torch.is_grad_enabled(),
                            torch.get_float32_matmul_precision(), torch.cuda.is_initialized()],
    }

effects = {}
for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    sys.stdout.flush(), sys.stderr.flush()
    if name == "config":
        effects["config imports torch"] = "torch" in sys.modules
    after = state()
    if name != "torch":
        effects[name] = [key for key in before if before[key] != after[key]]
print(json.dumps({name: what for name, what in effects.items() if what}))
"""


def test_importing_has_no_side_effect(run) -> None:
    order = sorted(MODULES, key=lambda name: ORDER.index(unit(name)))
    order.remove("config")
    done = run("-c", IMPORT_EACH, "config", "torch", *order, fresh=True)
    assert done.returncode == 0, done.stderr
    assert own_lines(done.stderr) == ""
    assert json.loads(done.stdout) == {}  # a module that prints breaks the JSON


@pytest.mark.parametrize(
    "command", [[REPO / "train_gpt2.py"], ["-m", "finetune.sentiment"], ["-m", "finetune.sonnets"]]
)
def test_help_needs_neither_torch_nor_numpy(run, command) -> None:
    done = run("-X", "importtime", *command, "--help", fresh=True)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "config" in imported and not imported & {"torch", "numpy"}
