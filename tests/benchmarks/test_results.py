"""The committed reports are equal to what today's code makes of their committed figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods_report, stages_report
from support import REPO

RESULTS = REPO / "benchmarks/results"
FILES = [*RESULTS.glob("methods-*.json"), RESULTS / "stages-cpu.json"]
DRAWN = (
    "methods-sonnets",
    "methods-ag",
    "stages-cpu",
)  # a task with texts, a search on a task with labels, a ladder


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_committed_report_follows_from_its_figures(file: Path) -> None:
    module = stages_report if file.stem.startswith("stages") else methods_report
    assert file.with_suffix(".md").read_text(encoding="utf-8") == module.text_of(read(file.stem))


@pytest.mark.parametrize("name", DRAWN)
def test_committed_figures_can_be_drawn(name: str, tmp_path: Path) -> None:
    draw: Callable[..., None] = (stages_report if "stages" in name else methods_report).draw
    draw(read(name), tmp_path / "chart.png")
    png = (tmp_path / "chart.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_without_methods_there_is_no_chart(tmp_path: Path) -> None:
    methods_report.draw(read("methods-sonnets") | {"methods": []}, tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()


def test_committed_pictures_are_small() -> None:
    pictures = [*RESULTS.glob("*.png"), *(REPO / "docs").glob("*.svg")]
    assert len(pictures) > 5
    assert not [picture.name for picture in pictures if picture.stat().st_size > 100_000]
