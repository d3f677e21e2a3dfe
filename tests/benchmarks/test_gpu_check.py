"""The order, limits and records of gpu-check, with parts that need no GPU. And its real parts name
commands and options that exist."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import conftest
from benchmarks import gpu_check
from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.gpu_check import Check, Options, Part, all_parts, asked_for, begun_in, forecast
from config import UserError
from support import REPO, python_path

FACTS = {"hardware": {"gpu": "none such"}, "driver": "1", "versions": {"torch": "2"}}


def part(
    name: str, code: str, packages: tuple[str, ...] = (), seconds: float = 12, **more: Any
) -> Part:
    """A part that runs `code`, in which {out} is the part's folder."""
    return Part("tests", name, ("-c", code), packages, seconds, **more)


def check(folder: Path, at_once: int = 1, rehearse: bool = False, **facts: Any) -> Check:
    return Check(Options(out=str(folder), rehearse=rehearse), FACTS | facts, at_once)


def written(folder: Path) -> dict[str, Any]:
    """The parts in gpu-check.json by name."""
    result = json.loads((folder / "gpu-check.json").read_text())
    return result | {"parts": {record["part"]: record for record in result["cases"]}}


COUNT = "open('{out}/runs', 'a').write('x')\n"  # one letter for each run of a part
FIGURES = (
    "import os, json\njson.dump(os.environ['TRITON_CACHE_DIR'], open('{out}/a.json', "
    "'w'))\nprint('| 7 | ==')"
)


def runs(folder: Path, name: str) -> int:
    return len((folder / "cache/parts" / name / "runs").read_text())


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(tmp_path, capsys) -> None:
    parts = [part("bad", "print('so', 'it is'); raise SystemExit(3)"), part("good", FIGURES)]
    assert not check(tmp_path).run(parts, minutes=1)
    result = written(tmp_path)
    assert result["hardware"] == FACTS["hardware"]
    bad, good = result["parts"]["bad"], result["parts"]["good"]
    assert (bad["result"], bad["exit_code"], bad["output"]) == ("failed", 3, "so it is\n")
    assert (good["result"], good["exit_code"]) == ("done", 0) and good["command"].startswith(
        sys.executable
    )
    assert good["files"] == {"a.json": f"{tmp_path}/cache/triton"}
    text = (tmp_path / "gpu-check.md").read_text()
    assert text.startswith("Measured on none such, ")
    table = [line for line in text.splitlines() if "|" in line]
    assert len(table) == 4 and len({len(row) for row in table}) == 1
    assert (
        table[2].startswith("| bad  | failed |")
        and table[3].startswith("| good | done ")
        and "| 7" in table[3]
    )
    assert "so it is" in capsys.readouterr().out  # the output of a failed part is printed


def test_done_parts_are_not_run_again(tmp_path) -> None:
    parts = [part("bad", COUNT + "raise SystemExit(1)"), part("good", COUNT)]
    check(tmp_path).run(parts, minutes=1)
    check(tmp_path).run(parts, minutes=1)
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (2, 1)
    assert check(tmp_path).run(parts[1:], minutes=1)
    # parts that this call does not name stay in the table
    assert set(written(tmp_path)["parts"]) == {"bad", "good"}
    check(tmp_path, driver="2").run(parts, minutes=1)  # other figures
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (3, 2)
    (before,) = tmp_path.glob("gpu-check-20*-before.json")
    assert json.loads(before.read_text())["driver"] == "1"
    check(tmp_path, driver="2").run(parts, minutes=1, again=True)  # from the beginning
    assert (runs(tmp_path, "bad"), runs(tmp_path, "good")) == (1, 1)


def test_a_part_that_hangs_is_ended_and_can_continue(tmp_path) -> None:
    hang = COUNT + (
        "import time\nprint('begun', flush=True)\n"
        # like pytest, which ends its programs
        "try:\n  time.sleep(60)\nfinally:\n  open('{out}/tidy', 'w')\n"
    )
    parts = [part("hangs", hang, seconds=1), part("good", COUNT)]
    assert not check(tmp_path).run(parts, minutes=1)
    result = written(tmp_path)["parts"]
    hangs = result["hangs"]
    assert (hangs["result"], hangs["exit_code"]) == ("timed out", None) and hangs[
        "output"
    ].startswith("begun")
    assert (tmp_path / "cache/parts/hangs/tidy").exists() and result["good"]["result"] == "done"


def test_a_part_that_says_it_is_unfinished_continues(tmp_path) -> None:
    code = COUNT + "import os\nif os.path.getsize('{out}/runs') < 2: print('the time was up')"
    slices = part("slices", code, unfinished="the time was up")
    assert not check(tmp_path).run([slices], minutes=1)
    assert written(tmp_path)["parts"]["slices"]["result"] == "timed out"
    assert check(tmp_path).run([slices], minutes=1) and runs(tmp_path, "slices") == 2
    assert check(tmp_path).run([slices], minutes=1) and runs(tmp_path, "slices") == 2


def test_another_machine_continues_from_the_record(tmp_path) -> None:
    code = (
        "import json, os, pathlib\nfolder = "
        "pathlib.Path('{out}/runs')\nfolder.mkdir(exist_ok=True)\n"
        "had = len(list(folder.iterdir()))\n(folder / f'{had}.json').write_text('1')\nif had < 1: "
        "print('time up')"
    )
    parts = [part("slices", code, unfinished="time up")]
    assert not check(tmp_path / "a").run(parts, minutes=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/gpu-check.json").write_text((tmp_path / "a/gpu-check.json").read_text())
    assert check(tmp_path / "b").run(parts, minutes=1)
    assert set(written(tmp_path / "b")["parts"]["slices"]["files"]) == {
        "runs/0.json",
        "runs/1.json",
    }


def test_an_emptied_results_folder_comes_back_from_the_cache(tmp_path) -> None:
    done = part("done", COUNT)
    for _ in range(2):
        options = Options(out=str(tmp_path / "out"), cache=str(tmp_path / "cache"))
        assert Check(options, FACTS).run([done], minutes=1)
        assert {"gpu-check.json", "gpu-check.md"} <= {
            path.name for path in (tmp_path / "out").iterdir()
        }
        for path in (tmp_path / "out").iterdir():
            path.unlink()
    assert len((tmp_path / "cache/parts/done/runs").read_text()) == 1


def test_tests_run_beside_one_another_and_measurements_alone(tmp_path) -> None:
    stamps = "import time\nopen('{out}/a', 'w').write(str(time.time()))\ntime.sleep(1.5)\n"
    stamps += "open('{out}/b', 'w').write(str(time.time()))"
    parts = [part("x", stamps, beside=True), part("y", stamps, beside=True), part("alone", stamps)]
    assert check(tmp_path, at_once=2).run(parts, minutes=1)
    spans = {
        p.name: [float((tmp_path / "cache/parts" / p.name / n).read_text()) for n in "ab"]
        for p in parts
    }
    assert spans["x"][0] < spans["y"][1] and spans["y"][0] < spans["x"][1]
    assert spans["alone"][0] > max(spans["x"][1], spans["y"][1])


def test_the_forecast_fills_calls_in_order() -> None:
    parts = [
        part("a", "", seconds=50),
        part("b", "", seconds=400),
        part("c", "", seconds=100, beside=True),
        part("d", "", seconds=500, unfinished=""),
    ]
    assert [p.name for p, _ in begun_in(parts, 300, 2)] == ["a", "c", "d"]
    lines = forecast(parts, 300, 2)
    assert lines == [
        "call 1: a 50 s, c 100 s, d 150 s",
        "call 2: b 300 s",
        "call 3: b 100 s, d 200 s",
        "later: d",
    ]


def test_a_rehearsal_says_so_and_runs_on_the_cpu(tmp_path) -> None:
    told = part(
        "told",
        "import os, sys; print(sys.argv[1:], os.environ['GPU_TESTS_DEVICE'])",
        rehearsal=("--tiny",),
    )
    assert check(tmp_path, rehearse=True).run([told], minutes=1)
    text = (tmp_path / "gpu-check-rehearsal.md").read_text()
    assert "This was a rehearsal" in text and "['--tiny'] cpu" in text
    assert not (tmp_path / "gpu-check.json").exists()


def test_a_rehearsal_runs_one_case_of_each_test(monkeypatch) -> None:
    def item(nodeid: str) -> Any:
        return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: None)

    left_out: list[Any] = []
    config: Any = SimpleNamespace(
        hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    )
    found = [item(name) for name in ("a::x[1]", "a::x[2]", "a::y", "b::x[1]")]
    for device, first_cases in ((None, found), ("cpu", [found[0], found[2], found[3]])):
        monkeypatch.delenv("GPU_TESTS_DEVICE", raising=False)
        if device:
            monkeypatch.setenv("GPU_TESTS_DEVICE", device)
        items = list(found)
        conftest.pytest_collection_modifyitems(config, items)
        assert items == first_cases
    assert left_out == [found[1]]


def test_a_rehearsal_of_a_real_part_leaves_its_record(tmp_path) -> None:
    (real,) = (p for p in all_parts() if p.name == "kernels-first")
    tiny = dataclasses.replace(real, rehearsal=(*real.rehearsal, "--only", "bias_gelu"))
    rehearsed = check(tmp_path, rehearse=True)
    assert rehearsed.run([tiny], minutes=2), rehearsed.results.text()
    (record,) = json.loads((tmp_path / "gpu-check-rehearsal.json").read_text())["cases"]
    assert (record["part"], record["result"], record["exit_code"], record["tries"]) == (
        "kernels-first",
        "done",
        0,
        1,
    )
    (figures,) = record["files"].values()
    assert figures["hardware"]["gpu"] is None and "bias_gelu" in json.dumps(figures)


def test_a_part_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_check.GRACE", 0.2)
    deaf = (
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nopen('{out}/x', "
        "'w')\ntime.sleep(60)"
    )
    assert not check(tmp_path).run([part("deaf", deaf, seconds=1)], minutes=1)
    assert (tmp_path / "cache/parts/deaf/x").exists() and written(tmp_path)["parts"]["deaf"][
        "seconds"
    ] < 30


def test_an_interrupt_ends_the_part_and_begins_no_other(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("base.commands.GRACE", 0.2)
    monkeypatch.setattr("benchmarks.gpu_check.GRACE", 0.2)
    this = threading.get_ident()

    def interrupt() -> None:
        while not (tmp_path / "cache/parts/long/begun").exists():
            time.sleep(0.05)
        signal.pthread_kill(this, signal.SIGINT)

    sleep = "import time\nopen('{out}/begun', 'w')\ntime.sleep(20)\nopen('{out}/slept', 'w')"
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path).run([part("long", sleep, seconds=60), part("next", COUNT)], minutes=2)
    assert (
        not (tmp_path / "cache/parts/long/slept").exists()
        and not (tmp_path / "cache/parts/next").exists()
    )
    assert written(tmp_path)["parts"]["next"]["result"] == "not run"


def test_no_part_begins_when_the_time_is_over(tmp_path) -> None:
    checked = check(tmp_path)
    assert not checked.run([part("late", COUNT)], minutes=0)
    assert (
        "| late | not run |" in checked.results.text()
        and not (tmp_path / "cache/parts/late").exists()
    )


def test_a_missing_package_only_skips_its_parts(tmp_path) -> None:
    checked = check(tmp_path)
    assert not checked.run(
        [part("poor", COUNT, packages=("json", "no_such")), part("good", COUNT)], minutes=1
    )
    assert (
        "not installed: no_such" in checked.results.text()
        and not (tmp_path / "cache/parts/poor").exists()
    )
    assert written(tmp_path)["parts"]["good"]["result"] == "done"


def test_the_caches_stay_out_of_git(tmp_path) -> None:
    check(tmp_path).run([part("done", COUNT)], minutes=1)
    ignored = "git init -q && git status --porcelain --untracked-files=all"
    done = subprocess.run(["bash", "-c", ignored], cwd=tmp_path, capture_output=True, text=True)
    assert "gpu-check.json" in done.stdout and "cache/" not in done.stdout


def test_only_names_parts_or_groups() -> None:
    parts = [part("a", ""), part("b", ""), dataclasses.replace(part("c", ""), group="speed")]
    assert [p.name for p in asked_for("speed, a", parts)] == ["a", "c"]
    assert asked_for(None, parts) == parts
    with pytest.raises(
        UserError, match=r"--only sped is not one of tests, speed, a, b, c \(did you mean speed\?\)"
    ):
        asked_for("sped", parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(repo) -> None:
    command = ["make", "--silent", "-C", repo, "gpu-check", f"PYTHON={sys.executable}"]
    # as if no make were running
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    line, of_make = done.stderr.splitlines()
    assert (
        line
        == "error: torch sees no CUDA GPU on this machine; --rehearse tries every part tiny on the "
        "CPU"
    )
    assert done.returncode == 2 and of_make.startswith("make: ***") and not done.stdout


# --- the real parts


def test_the_parts_come_in_order_of_worth() -> None:
    parts = all_parts()
    assert len({p.name for p in parts}) == len(parts)
    groups = list(dict.fromkeys(p.group for p in parts))
    assert groups == ["correctness", "kernels", "peers", "ladder", "sizes", "decoding"]


def test_three_calls_take_all_but_larger_models_and_decoding() -> None:
    first, second, third, later = forecast(all_parts(), 540, 5)  # 16 cores
    correctness = {p.name for p in all_parts() if p.group == "correctness"}
    assert {
        named.rpartition(" ")[0].rpartition(" ")[0]
        for named in first[len("call 1: ") :].split(", ")
    } == correctness
    assert (
        "kernels-first" in second
        and "kernels-rest" in second
        and "peers-124M " in second
        and "ladder " in third
    )
    assert (
        not any(word in first + second + third for word in ("350M", "decoding")) and "350M" in later
    )


def test_every_kernel_and_every_gpu_test_is_in_a_part(repo) -> None:
    words = [word for p in all_parts() if p.group == "correctness" for word in p.words]
    files = {word for word in words if word.startswith("tests/") and "::" not in word}
    assert files == {
        "tests/test_gpu.py",
        "tests/kernels/test_contract.py",
        *(f"tests/kernels/test_{f.stem}.py" for f in (repo / "kernels").glob("[!_]*.py")),
    }
    assert all((repo / file).is_file() for file in files)
    programs = {word.partition("::")[2] for word in words if "::" in word}
    (others,) = (word for word in words if word.startswith("not ("))
    # so the part `steps` has all tests that are not programs
    assert set(others[len("not (") : -1].split(" or ")) == programs
    assert {
        "test_a_whole_run_then_generate_and_evaluate",
        "test_options_run_under_torchrun",
    } <= programs


@pytest.mark.parametrize(
    "measured", [p for p in all_parts() if p.group != "correctness"], ids=lambda p: p.name
)
def test_a_benchmark_has_the_options_that_it_is_given(measured: Part) -> None:
    module = importlib.import_module(measured.words[1])
    fields = {field.name for field in dataclasses.fields(module.Options)}
    assert {
        word[2:].replace("-", "_") for word in measured.words if word.startswith("--")
    } <= fields


def test_every_peer_of_a_gpu_is_compared() -> None:
    peers = {name for name, of in CONTENDERS.items() if "cuda" in of.devices and of.peer}
    assert {*gpu_check.COMPILED, *gpu_check.EAGER} == peers | {f"{OURS} fp8"} <= {*CONTENDERS}
    assert set(gpu_check.EXPECTED) <= {part.name for part in all_parts()}


def test_the_engine_needs_small_packages_only(repo) -> None:
    """The top-level imports of its modules. Without these packages no part can run."""
    packages = ("base", "storage", "kernels", "text", "decoding", "engine")
    files = [*repo.glob("*.py"), repo / "benchmarks/peers.py"]
    files += [file for name in packages for file in (repo / name).glob("*.py")]
    own = {file.stem for file in repo.glob("*.py")} | {"benchmarks", "adapters", *packages}
    imported = set()
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    outside = imported - own - sys.stdlib_module_names - {"__future__"}
    assert outside <= {"torch", "numpy", "triton", *Part("", "", ()).packages}


# --- wheels


def make_wheel(
    folder: Path, name: str, version: str, needs: str = "", tag: str = "py3-none-any"
) -> None:
    folder.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        file.writestr(f"{name}.py", f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(
            f"{info}/WHEEL",
            f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n",
        )
        file.writestr(f"{info}/RECORD", "")


def test_wheels_that_fit_are_installed_and_others_named(run, tmp_path) -> None:
    folder = tmp_path / "wheels"
    make_wheel(folder, "gpu_tiny", "1.0")
    make_wheel(folder, "gpu_tiny", "1.10")  # newer than 1.9
    make_wheel(folder, "gpu_tiny", "1.9")
    make_wheel(folder, "gpu_other", "1.0", tag="cp27-cp27m-win32")
    make_wheel(folder, "pytest", "0.1")  # another version is installed
    (folder / "gpu_broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    done = run("-m", "benchmarks.wheels", "install", folder, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert "gpu_other is left out" in done.stdout.replace(
        "-", "_"
    ) and "gpu_broken is left out" in done.stdout.replace("-", "_")
    assert (tmp_path / "site/gpu_tiny.py").read_text() == "version = '1.10'\n"
    assert not (tmp_path / "site/pytest.py").exists()


def test_a_folder_without_wheels_is_one_line(run, tmp_path) -> None:
    done = run("-m", "benchmarks.wheels", "install", tmp_path, tmp_path / "site")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make wheels" in done.stderr


def test_the_programs_of_tests_keep_the_path_of_their_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"wheels{os.pathsep}more")
    assert python_path(REPO, Path("other")).split(os.pathsep) == [
        str(REPO),
        "other",
        "wheels",
        "more",
    ]
    monkeypatch.delenv("PYTHONPATH")
    assert python_path(REPO) == str(REPO)
    files = [
        file
        for file in (REPO / "tests").rglob("*.py")
        if file.name not in (Path(__file__).name, "support.py")
    ]
    values = [value for file in files for value in file.read_text().split('"PYTHONPATH": ')[1:]]
    assert len(values) > 5 and all(value.startswith("python_path(") for value in values), values
