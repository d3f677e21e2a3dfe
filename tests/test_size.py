"""What a person reads in an afternoon stays that: the spine's size, the seam's, the model's."""

from __future__ import annotations

import ast
import dataclasses
import io
import tokenize

from engine.task import Cost, Facts, Task
from support import REPO

# The goal is 17,500: lower this as the spine shrinks.
SPINE_TOKENS = 19_000
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
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FSTRING_START, FSTRING_END = (
    getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END")
)


def tokens(source: str) -> int:
    """Tokens of Python source without comments, docstrings and layout."""
    documentation = {
        (statement.lineno, statement.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(body := getattr(node, "body", None), list)
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }
    count = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # From Python 3.12 on an f-string is several tokens; it counts as the one that it was.
        inside -= token.type == FSTRING_END
        if token.type not in LAYOUT and token.start not in documentation and not inside:
            count += token.type != FSTRING_END
        inside += token.type == FSTRING_START
    return count


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
