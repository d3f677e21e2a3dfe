"""The notebooks in examples/ run unchanged, except for a smaller model and corpus."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from support import REPO
from text.tokenizer_training import train_bpe

NOTEBOOKS = sorted((REPO / "examples").glob("*.ipynb"))
SMALLER = {
    "--preset tiny": "--preset micro",
    "--steps 200": "--steps 4 --data text.txt --tokenizer tokenizer",
    "--steps 300": "--steps 4 --data text.txt --tokenizer tokenizer",
    "--precision fp16": "--precision fp32",  # fp16 needs a GPU
}


def cells(notebook: Path) -> list[str]:
    """The source of each code cell."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.fixture
def run_cells(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], dict[str, str]]:
    """Runs the cells of a notebook of this name. Returns what each command printed."""
    text = "".join(f"line {n} of a text that is long enough\n" for n in range(3000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    train_bpe([text], 300, tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: None)

    def run_all(name: str) -> dict[str, str]:
        names: dict[str, object] = {}
        printed: dict[str, str] = {}
        for source in cells(REPO / "examples" / name):
            for long, short in SMALLER.items():
                source = source.replace(long, short)
            if not source.startswith("!python "):
                if "%cd" not in source:
                    exec(compile(source, name, "exec"), names)
                continue
            command = source.removeprefix("!python ").replace("{RUNS}", str(names.get("RUNS")))
            words = shlex.split(command)
            if "tools.doctor" in words or "--dry-run" in words:  # they time operations for seconds
                continue
            words = words[:2] if words[0] == "-m" else [str(REPO / words[0])]
            done = run(*words, *shlex.split(command)[len(words) :], "--device", "cpu")
            assert done.returncode == 0, done.stderr
            printed[" ".join(words)] = done.stdout
        return printed

    return run_all


def test_the_first_notebook_trains_plots_and_samples(
    run_cells, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_cells("first_model.ipynb")
    training, held_out = plt.gca().lines
    assert np.size(training.get_xdata()) == 4 and np.size(held_out.get_xdata()) > 0
    plt.close("all")
    assert list(printed.values())[-1].startswith("def ")
    assert "parameters; after 'import ' come" in capsys.readouterr().out


def test_the_t4_notebook_trains_and_fine_tunes(run_cells) -> None:
    printed = run_cells("t4.ipynb")
    assert len(printed) == 3 and "accuracy" in printed["-m finetune.sentiment"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_output(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in found)
