"""Each file imports only from floors below its own; no circles; importing has no side effect."""

from __future__ import annotations

import ast
import graphlib
import json
from pathlib import Path

from conftest import own_lines

REPO = Path(__file__).resolve().parent.parent

FLOORS = {  # from the ground up; a package stands for all of its modules
    "ground": ["config", "base", "foreign", "readers", "distributed", "kernels"],
    "parts": [
        "tokenizer",
        "tokenizer_files",
        "tokenizer_training",
        "weights",
        "corpus",
        "dataset",
        "rows",
        "squad",
        "labels",
        "order",
        "model",
        "heads",
        "baselines",
        "adapters",
        "adapter_files",
        "optim",
        "precision",
    ],
    "services": [
        "lengths",
        "checkpoint",
        "resume",
        "decoding",
        "search",
        "window",
        "metrics",
        "confusion",
        "confusion_chart",
        "predictions",
        "objectives",
        "runlog",
        "memory",
    ],
    "task seam": ["task", "finetuning", "generation", "classification"],
    "one step": ["step"],
    "before a run": ["plan"],
    "loop": ["trainer"],
    "entry points": ["train_gpt2", "generate", "evaluate", "fineweb_prep", "finetune", "benchmarks"],
}
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS.values()) for name in names}

SIDEWAYS = {  # the imports within a floor that are allowed
    ("base", "config"),
    ("base", "base"),
    ("distributed", "base"),
    ("foreign", "config"),
    ("readers", "config"),
    ("distributed", "config"),
    ("kernels", "config"),
    ("kernels", "kernels"),
    ("tokenizer", "tokenizer_training"),  # a tokenizer is read, or made
    ("tokenizer", "tokenizer_files"),  # the layouts of the hub
    ("tokenizer_files", "tokenizer_training"),
    ("tokenizer_training", "corpus"),  # a vocabulary is made of whatever --data may name
    ("dataset", "tokenizer"),  # shards know the vocabulary they were written with
    ("dataset", "corpus"),  # --data may be text, tokenized on the spot
    ("rows", "corpus"),  # what --data may name is one thing for all
    ("labels", "rows"),
    ("labels", "tokenizer"),  # the tokens of their words
    ("predictions", "confusion"),
    ("predictions", "confusion_chart"),
    ("predictions", "runlog"),
    ("order", "dataset"),  # one random permutation for windows and rows
    ("decoding", "search"),
    ("decoding", "window"),
    ("search", "window"),
    ("decoding", "metrics"),  # minimum Bayes risk compares candidates by chrF
    ("heads", "model"),  # what they read
    ("heads", "weights"),  # one reader of weights in every layout
    ("model", "weights"),
    ("adapter_files", "weights"),
    ("adapter_files", "checkpoint"),  # an adapter's base may be a run
    ("checkpoint", "lengths"),  # the planned lengths of a run
    ("resume", "checkpoint"),
    ("resume", "lengths"),
    ("adapters", "model"),  # what adapters are put into
    ("adapters", "optim"),  # which of its parameters train alike
    ("adapter_files", "adapters"),  # what is written and read
    ("adapter_files", "model"),
    ("finetuning", "task"),  # what two families of tasks share
    ("generation", "finetuning"),
    ("classification", "finetuning"),
    ("classification", "task"),
    ("generation", "task"),
    ("finetune", "finetune"),  # what a task's command does
    ("benchmarks", "finetune"),  # the tasks that are measured
    ("benchmarks", "benchmarks"),  # the machine, the contenders: what several of them share
}


def project_modules() -> dict[str, Path]:
    """Every module of the project but its tests: dotted name to file."""
    files = [
        *REPO.glob("*.py"),
        *(f for f in REPO.glob("[!.]*/**/*.py") if f.relative_to(REPO).parts[0] in FLOOR_OF),
    ]
    parts = {file: file.relative_to(REPO).with_suffix("").parts for file in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): file for file, p in sorted(parts.items())}


MODULES = project_modules()


def imports(name: str) -> set[str]:
    """The project's modules that a module names in an import, at its top or inside a function."""
    found: set[str] = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from package import name`: name may be a module or something inside the package
            found.update(f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)
    return {module for module in found if module in MODULES} - {name}


def unit(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_has_a_floor() -> None:
    folders = {file.parent.name for file in REPO.glob("[!.]*/*.py")} - {"tests"}
    homeless = ({unit(name) for name in MODULES} | folders) - FLOOR_OF.keys()
    assert not homeless, f"place these in FLOORS (and in the design): {sorted(homeless)}"


def test_imports_go_down() -> None:
    wrong = [
        f"{name} -> {other}"
        for name in MODULES
        for other in sorted(imports(name))
        if FLOOR_OF[unit(other)] >= FLOOR_OF[unit(name)] and (unit(name), unit(other)) not in SIDEWAYS
    ]
    assert not wrong, f"upward or sideways imports: {wrong}"


def test_no_circles() -> None:
    graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).prepare()


# Floor by floor in one process, so that what each import does is its own doing. torch comes after config,
# which must do without it, and before the others, whose effects are then told from torch's.
IMPORT_EACH = """
import importlib, json, os, random, sys, threading

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
    order = sorted(MODULES, key=lambda name: FLOOR_OF[unit(name)])
    order.remove("config")
    done = run("-c", IMPORT_EACH, "config", "torch", *order)
    assert done.returncode == 0, done.stderr
    assert own_lines(done.stderr) == ""
    assert json.loads(done.stdout) == {}  # a module that prints breaks the JSON


def test_help_answers_without_torch(run) -> None:
    done = run("-X", "importtime", REPO / "train_gpt2.py", "--help")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "config" in imported and "torch" not in imported
