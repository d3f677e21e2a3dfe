"""Files are UTF-8 in every locale: no code opens a text file without an encoding."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from docs.packages import source_files
from launch import log_of, small, write_inputs
from support import REPO

TEXT = {"read_text": 0, "write_text": 1}  # arguments before the encoding
# Their `open` takes no encoding, or reads bytes unless the mode says otherwise.
BINARY = {"os", "gzip", "tarfile", "zipfile", "Image", "log"}


def without_encoding(source: str) -> list[int]:
    """The lines that open, read or write a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or {"encoding", None} & {
            word.arg for word in node.keywords
        }:
            continue
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        owner = getattr(node.func, "value", None)
        modes = [word.value for word in node.keywords if word.arg == "mode"]
        modes += [
            a
            for a in node.args
            if isinstance(a, ast.Constant) and re.fullmatch("[rwxabt+]+", str(a.value))
        ]
        binary = any("b" in str(getattr(mode, "value", "")) for mode in modes)
        opened = (
            name == "open"
            and not binary
            and getattr(owner, "id", getattr(owner, "attr", "")) not in BINARY
        )
        if opened or (
            name in TEXT and isinstance(node.func, ast.Attribute) and len(node.args) <= TEXT[name]
        ):
            found.append(node.lineno)
    return found


def test_every_text_file_is_opened_with_an_encoding() -> None:
    for bad in (
        "open(f)",
        "path.open('w')",
        "path.read_text()",
        "path.write_text(x)",
        "open(f, mode='r')",
    ):
        assert without_encoding(bad) == [1]
    found = {
        file.name: lines
        for file in source_files()
        if (lines := without_encoding(file.read_text(encoding="utf-8")))
    }
    assert not found


def test_a_run_under_an_ascii_locale_writes_utf_8(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    env = os.environ | {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "OMP_NUM_THREADS": "1",
    }
    words = small("--steps 2 --prompts 한글 --out läuft")
    done = subprocess.run(
        [sys.executable, str(REPO / "train_gpt2.py"), *words],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    run = tmp_path / "läuft"
    assert len(log_of(run, "train")) == 2
    for file in (run / "config.json", run / "metrics.json"):
        assert json.loads(file.read_text(encoding="utf-8"))
    assert b"gpt2" in (run / "final" / "README.md").read_bytes()
