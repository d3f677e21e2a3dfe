"""The notebook in examples/ runs unchanged, except for a smaller model and corpus."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from support import REPO
from text.tokenizer_training import train_bpe

NOTEBOOK = REPO / "examples" / "first_model.ipynb"
SMALLER = {
    "--preset tiny": "--preset micro",
    "--steps 200": "--steps 4 --data text.txt --tokenizer tokenizer",
}


def cells() -> list[str]:
    """The source of each code cell."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_trains_plots_and_samples(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"line {n} of a text that is long enough\n" for n in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    train_bpe([text], 300, tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)
    names: dict[str, object] = {}
    printed = []
    for source in cells():
        for long, short in SMALLER.items():
            source = source.replace(long, short)
        if source.startswith("%cd"):
            continue
        if source.startswith("!python "):
            script, *words = shlex.split(source.removeprefix("!python "))
            done = run(REPO / script, *words, "--device", "cpu")
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
        else:
            exec(compile(source, str(NOTEBOOK), "exec"), names)
    training, held_out = plt.gca().lines
    assert np.size(training.get_xdata()) == 4 and np.size(held_out.get_xdata()) > 0
    plt.close("all")
    assert printed[-1].startswith("def ")
    assert "parameters; after 'import ' come" in capsys.readouterr().out


def test_the_notebook_is_committed_without_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
