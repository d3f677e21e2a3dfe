"""gpu-check's order, limits and records, with parts that need no GPU; and that its real parts name what there is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import Check, Part, all_parts, asked_for
from config import UserError

FACTS = {"hardware": {"gpu": "none such"}, "driver": "1", "versions": {"torch": "2"}, "date": "today"}


def part(name: str, code: str, tries: int = 1, packages: tuple[str, ...] = ()) -> Part:
    """A part that runs `code`; {out} in it is the part's folder."""
    return Part("tests", name, ("-c", code), packages, tries)


def check(folder: Path, limit: float = 30, **facts: Any) -> Check:
    return Check(folder, FACTS | facts, limit)


def written(folder: Path) -> dict[str, Any]:
    """gpu-check.json, its parts by name."""
    result = json.loads((folder / "gpu-check.json").read_text())
    return result | {"parts": {record["part"]: record for record in result["parts"]}}


COUNT = "open('{out}/runs', 'a').write('x')\n"  # a letter for each time that a part ran
FIGURES = "import os, json\njson.dump(os.environ['TRITON_CACHE_DIR'], open('{out}/a.json', 'w'))\nprint('| 7 | ==')"


def runs(folder: Path, name: str) -> int:
    return len((folder / name / "runs").read_text())


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path, capsys) -> None:
    parts = [part("bad", "print('so', 'it is'); raise SystemExit(3)"), part("good", FIGURES)]
    assert not check(tmp_path).run(parts, minutes=1)
    result = written(tmp_path)
    assert result["hardware"] == FACTS["hardware"] and result["date"] == "today"
    bad, good = result["parts"]["bad"], result["parts"]["good"]
    assert (bad["result"], bad["exit_code"], bad["output"]) == ("failed", 3, "so it is\n")
    assert (good["result"], good["exit_code"]) == ("done", 0) and good["command"].startswith(sys.executable)
    assert good["files"] == {"a.json": f"{tmp_path}/cache/triton"}
    table = (tmp_path / "gpu-check.md").read_text().splitlines()
    assert len(table) == 4 and len({len(row) for row in table}) == 1
    assert table[2].startswith("| bad  | failed |") and table[3].startswith("| good | done ") and "| 7" in table[3]
    assert "so it is" in capsys.readouterr().out  # a failure is seen where it happens


def test_done_parts_are_not_run_again(tmp_path) -> None:
    parts = [part("bad", COUNT + "raise SystemExit(1)"), part("good", COUNT)]
    check(tmp_path).run(parts, minutes=1)
    check(tmp_path).run(parts, minutes=1)
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (2, 1)
    assert check(tmp_path).run(parts[1:], minutes=1)
    assert set(written(tmp_path)["parts"]) == {"bad", "good"}  # what was not asked for now stays in the table
    check(tmp_path).run(parts, minutes=1, again=True)
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (3, 2)
    check(tmp_path, driver="2").run(parts, minutes=1)  # other figures
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (4, 3)


def test_a_part_that_hangs_is_ended_and_may_go_on(tmp_path) -> None:
    hang = COUNT + (
        "import time\nprint('begun', flush=True)\n"
        "try:\n  time.sleep(60)\nfinally:\n  open('{out}/tidy', 'w')\n"  # as pytest does, which ends its programs
    )
    goes_on = "import os, time\nif not os.path.exists('{out}/runs'):\n  " + COUNT + "  time.sleep(60)\n" + COUNT
    parts = [part("hangs", hang), part("goes on", goes_on, tries=3), part("good", COUNT)]
    assert not check(tmp_path, limit=2).run(parts, minutes=1)
    result = written(tmp_path)["parts"]
    hangs = result["hangs"]
    assert (hangs["result"], hangs["exit_code"]) == ("timed out", None) and hangs["output"].startswith("begun")
    assert (tmp_path / "hangs/tidy").exists()
    assert result["goes on"]["result"] == result["good"]["result"] == "done"
    assert (runs(tmp_path, "hangs"), runs(tmp_path, "goes on")) == (1, 2)


def test_a_part_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.GRACE", 0.2)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('{out}/x', 'w')\ntime.sleep(60)"
    assert not check(tmp_path, limit=2).run([part("deaf", deaf)], minutes=1)
    assert (tmp_path / "deaf/x").exists() and written(tmp_path)["parts"]["deaf"]["seconds"] < 30


def test_a_sliced_part_takes_all_its_tries(tmp_path) -> None:
    slices = dataclasses.replace(part("slices", COUNT, tries=4), sliced=True)
    check(tmp_path).run([dataclasses.replace(slices, tries=1)], minutes=1)  # as if the time had been over then
    assert runs(tmp_path, "slices") == 1
    assert check(tmp_path).run([slices], minutes=1) and runs(tmp_path, "slices") == 4
    assert check(tmp_path).run([slices], minutes=1) and runs(tmp_path, "slices") == 4
    assert written(tmp_path)["parts"]["slices"]["tries"] == 4
    broken = dataclasses.replace(slices, name="broken", words=("-c", COUNT + "raise SystemExit(1)"))
    assert not check(tmp_path).run([broken], minutes=1)  # of what failed in one slice, the next may do the rest
    assert runs(tmp_path, "broken") == 4


def test_no_part_begins_when_the_time_is_over(tmp_path) -> None:
    checked = check(tmp_path)
    assert not checked.run([part("late", COUNT)], minutes=0)
    assert "| late | not run |" in checked.table() and not (tmp_path / "late").exists()


def test_a_missing_package_costs_its_parts_only(tmp_path) -> None:
    checked = check(tmp_path)
    assert not checked.run([part("poor", COUNT, packages=("json", "no_such")), part("good", COUNT)], minutes=1)
    assert "not installed: no_such" in checked.table() and not (tmp_path / "poor").exists()
    assert written(tmp_path)["parts"]["good"]["result"] == "done"


def test_the_caches_stay_out_of_git(tmp_path) -> None:
    check(tmp_path).run([], minutes=1)
    assert (tmp_path / "cache/.gitignore").read_text() == "*\n"


def test_only_names_parts_or_groups() -> None:
    parts = [part("a", ""), part("b", ""), dataclasses.replace(part("c", ""), group="speed")]
    assert [p.name for p in asked_for("speed, a", parts)] == ["a", "c"]
    assert asked_for(None, parts) == parts
    with pytest.raises(UserError, match=r"--only sped is none of tests, speed, a, b, c \(did you mean speed\?\)"):
        asked_for("sped", parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(repo) -> None:
    command = ["make", "--silent", "-C", repo, "gpu-check", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as under no make
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    line, of_make = done.stderr.splitlines()
    assert line == "error: torch sees no CUDA GPU on this machine; nothing was run"
    assert done.returncode == 2 and of_make.startswith("make: ***") and not done.stdout


# --- the real parts


def test_the_parts_come_in_order_of_worth() -> None:
    parts = all_parts()
    assert len({p.name for p in parts}) == len(parts)
    groups = list(dict.fromkeys(p.group for p in parts))
    assert groups == ["correctness", "peers", "ladder", "kernels", "sizes", "decoding"]


def test_every_kernel_and_every_gpu_test_is_in_a_part(repo) -> None:
    words = [word for p in all_parts() if p.group == "correctness" for word in p.words]
    files = {word for word in words if word.startswith("tests/") and "::" not in word}
    assert files == {"tests/test_gpu.py", *(f"tests/test_{f.stem}.py" for f in (repo / "kernels").glob("[!_]*.py"))}
    assert all((repo / file).is_file() for file in files)
    programs = {word.partition("::")[2] for word in words if "::" in word}
    (others,) = (word for word in words if word.startswith("not ("))
    assert set(others[len("not (") : -1].split(" or ")) == programs  # so whatever is no program is among the steps
    assert {"test_a_whole_run_then_generate_and_evaluate", "test_options_run_under_torchrun"} <= programs


@pytest.mark.parametrize("measured", [p for p in all_parts() if p.group != "correctness"], ids=lambda p: p.name)
def test_a_benchmark_has_the_options_that_it_is_given(measured: Part) -> None:
    module = importlib.import_module(measured.words[1])
    fields = {field.name for field in dataclasses.fields(module.Options)}
    assert {word[2:].replace("-", "_") for word in measured.words if word.startswith("--")} <= fields


def test_the_engine_needs_small_packages_only(repo) -> None:
    """What its modules import at their top, without which no part could run."""
    files = [*repo.glob("*.py"), *(repo / "kernels").glob("*.py"), repo / "benchmarks/peers.py"]
    own = {file.stem for file in files} | {"benchmarks", "kernels"}
    imported = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    outside = imported - own - sys.stdlib_module_names - {"__future__"}
    assert outside <= {"torch", "numpy", "triton", *Part("", "", ()).packages}
