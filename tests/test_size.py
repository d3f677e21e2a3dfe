"""Limits on the size of the code that a person must read: the spine, the seam and the model."""

from __future__ import annotations

import ast
import dataclasses

import pytest

from docs.packages import source_files, tokens
from engine.task import Cost, Facts, Task
from support import REPO
from tasks.classification.description import ClassificationDescription
from tasks.description import Description
from tasks.generation.description import GenerationDescription
from tasks.preferences.description import PreferenceDescription

SPINE_TOKENS = 17_630
SPINE = (
    "train_gpt2.py",
    "config.py",
    "model.py",
    "dataset.py",
    "engine/task.py",
    "engine/pretraining.py",
    "engine/step.py",
    "engine/trainer.py",
    "engine/optim.py",
)


def test_only_code_is_counted():
    assert (
        tokens('"""A module."""\n\nx = 1  # one\n\n\ndef f():\n    """Text."""\n    return x\n')
        == 10
    )


def test_an_f_string_is_one_token():
    assert tokens("x = f'{f\"{a}\"} {b}'\n") == tokens("x = '{a} {b}'\n") == 3


def test_the_spine_stays_readable_in_an_afternoon():
    sizes = {name: tokens((REPO / name).read_text(encoding="utf-8")) for name in SPINE}
    assert sum(sizes.values()) <= SPINE_TOKENS, sizes


def test_the_model_stays_within_400_short_lines():
    lines = (REPO / "model.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 100


def test_the_seam_is_eleven_methods_and_fifteen_facts():
    methods = [name for name, value in vars(Task).items() if callable(value) and name[0] != "_"]
    assert len(methods) == 11, methods
    assert len(dataclasses.fields(Facts)) + len(dataclasses.fields(Cost)) == 15


def test_no_class_is_longer_than_250_lines():
    lengths = {
        f"{file.relative_to(REPO)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in source_files()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.end_lineno
    }
    assert len(lengths) > 200
    assert not {name: n for name, n in lengths.items() if n > 250}


@pytest.mark.parametrize(
    "kind", [ClassificationDescription, GenerationDescription, PreferenceDescription]
)
def test_a_description_of_a_task_has_at_most_25_names(kind: type[Description]) -> None:
    fields = {field.name for field in dataclasses.fields(kind)}
    names = fields | {name for name in dir(kind) if not name.startswith("_")}
    assert len(names) <= 25, sorted(names)
