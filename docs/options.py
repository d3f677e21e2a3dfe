"""Writes docs/options.md, the page of all options, from the dataclasses that declare them.

python -m docs.options
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import finetune
from base.arguments import TYPES, Option, field_docs, options_of
from config import LARGEST, OPTIMIZATIONS, Range, marks

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Options

Every option of the commands and tools. Each command prints its own with `--help`. `--config FILE` reads options from
a JSON or TOML file, for example a run's `config.json`, and the command line overrides it. A flag has a `--no-` form. On
resume, an option that is not typed takes the run's own value. `python -m docs.options` makes this page from the
dataclasses that declare the options, and a test holds it. The options of benchmarks are in their `--help` alone.
"""
# heading, the commands that have these options, and the dataclass
SHARED = (
    ("Every run", "`train_gpt2.py`, `finetune.*`", "config.RunConfig"),
    ("Pretraining", "`train_gpt2.py`", "config.TrainConfig"),
    ("Fine-tuning", "`finetune.*`", "tasks.options.FinetuneConfig"),
    ("Methods of fine-tuning", "`finetune.*`", "adapters.options.MethodConfig"),
    (
        "Classification",
        "the tasks of classification",
        "tasks.classification.options.ClassificationConfig",
    ),
    ("Generation", "the tasks of generation", "tasks.generation.options.GenerationConfig"),
    ("Preferences", "`finetune.preferences`", "tasks.preferences.options.PreferencesConfig"),
    (
        "Decoding",
        "`generate.py`, the tasks of generation, `finetune.preferences`",
        "decoding.options.DecodeConfig",
    ),
)
TOOLS = (
    ("Writing text", "`generate.py`", "generate.GenerateConfig"),
    ("Evaluation", "`evaluate.py`", "evaluate.EvaluateConfig"),
    ("Preparing data", "`fineweb_prep.py`", "fineweb_prep.PrepConfig"),
    ("Comparing runs", "`tools.compare`", "tools.compare.CompareConfig"),
    ("Export", "`tools.export`", "tools.export.ExportConfig"),
    ("Serving", "`tools.serve`", "tools.serve.ServeConfig"),
    ("Verifying a run", "`tools.verify`", "tools.verify.VerifyConfig"),
    ("Looking at a machine", "`tools.doctor`", "tools.doctor.DoctorConfig"),
    ("Sweeps", "`tools.sweep`", "tools.sweep.SweepConfig"),
    ("Ensembles", "`tools.ensemble`", "tools.ensemble.EnsembleConfig"),
    ("Hard pairs", "`tools.mine`", "tools.mine.MineConfig"),
    ("Back-translation", "`tools.backtranslate`", "tools.backtranslate.BacktranslateConfig"),
)


def task_sections() -> list[tuple[str, str, str]]:
    """A section for each task with options of its own, found in finetune/: a task is one file."""
    names = sorted(info.name for info in pkgutil.iter_modules(finetune.__path__) if not info.ispkg)
    configs = {name: importlib.import_module(f"finetune.{name}").TASK.config for name in names}
    return [
        (name.capitalize(), f"`finetune.{name}`", f"{config.__module__}.{config.__name__}")
        for name, config in configs.items()
        if config.__module__ == f"finetune.{name}"
    ]


def page() -> str:
    """The page as Markdown: a table for each dataclass, of the fields that it declares itself."""
    parts = [HEAD]
    for heading, commands, name in (*SHARED, *task_sections(), *TOOLS):
        module, _, kind = name.rpartition(".")
        cls = getattr(importlib.import_module(module), kind)
        own = [option for option in options_of(cls) if option.name in vars(cls)["__annotations__"]]
        rows = [_row(cls, option) for option in own]
        parts.append(f"## {heading}\n\n{commands}\n")
        parts.append("| option | value | default | meaning |\n| --- | --- | --- | --- |")
        parts.append("\n".join(rows) + "\n")
    parts.append("## Names for `--without`\n\n| name | what is left out |\n| --- | --- |")
    parts.append("\n".join(f"| {name} | {what} |" for name, what in OPTIMIZATIONS.items()) + "\n")
    return "\n".join(parts)


def _row(cls: type, option: Option) -> str:
    value = [TYPES[kind][0] if kind in TYPES else str(kind) for kind in option.kinds]
    ranges = [mark for mark in marks(cls)[option.name] if isinstance(mark, Range)]
    default = getattr(cls, option.name, None)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    cells = (
        f"`{option.label}`",
        ("several " if option.most > 1 else "") + _limits(", ".join(filter(None, value)), ranges),
        "" if default is None or default is False or default in ((), "") else f"`{shown}`",
        field_docs(cls)[option.name],
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _limits(value: str, ranges: list[Range]) -> str:
    """The kind of a value with its range, as far as the range says something."""
    if not ranges:
        return value
    least, most = ranges[0].least, ranges[0].most
    if most >= LARGEST:
        return f"{value}, at least {least:g}" if least else value
    return f"{value}, {least:g} to {most:g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
