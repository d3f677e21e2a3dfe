"""The benchmarks run, write what they say, and answer a mistake with one line. No timing is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import decoding, peers, plot, tokenizing
from config import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, steps: int, evals: bool = True, torn: bool = False) -> Path:
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        loss = 3 + 8 / step
        lines.append(
            {
                "kind": "train", "step": step, "loss": loss, "grad_norm": None if step == 3 else 1.0 / step,
                "tokens": 1024 * step, "tokens_per_second": 50.0 if step == 1 else 5000.0,
            }
        )  # fmt: skip
        if evals and step % 5 == 0:
            lines.append({"kind": "eval", "step": step, "val_loss": loss + 0.1})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text(text + ('{"kind": "train", "step": 99, "lo' if torn else ""))
    return folder


def test_plot_writes_a_picture(run, tmp_path) -> None:
    first = write_run(tmp_path / "first", 40)
    second = write_run(tmp_path / "second", 1, evals=False, torn=True)
    done = run("-m", "benchmarks.plot", first, second, "--out", "deep/runs.png", "--x", "steps")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deep/runs.png").read_bytes().startswith(PNG)


def test_plot_says_what_is_wrong_in_one_line(run, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("-m", "benchmarks.plot", tmp_path / "empty")
    assert done.returncode == 2
    assert "no log.jsonl" in done.stderr and done.stderr.count("\n") == 1


def test_a_run_without_steps_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no training step"):
        plot.curves(write_run(tmp_path / "new", 0), "tokens", "new")


def test_curves_leave_out_what_is_not_whole(tmp_path) -> None:
    got = plot.curves(write_run(tmp_path / "a", 10, torn=True), "tokens", "a")
    assert [x for x, _ in got.loss] == [1024 * step for step in range(1, 11)]
    assert [x for x, _ in got.val_loss] == [5 * 1024, 10 * 1024]
    assert len(got.grad_norm) == 9  # one was not finite


def test_warm_up_does_not_set_the_limits() -> None:
    series = [(float(i), 1000.0 if i < 5 else 5.0 + 0.1 * math.sin(i)) for i in range(200)]
    low, high = plot.limits([series]) or (0, 0)
    assert 4.8 < low < high < 5.2
    smoothed = plot.smooth(series)
    assert [x for x, _ in smoothed] == [x for x, _ in series]
    assert abs(smoothed[100][1] - 5) < 0.1


def test_runs_of_the_same_name_are_told_apart() -> None:
    assert plot.names([Path("a/x"), Path("a/y")]) == ["x", "y"]
    assert plot.names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]


def test_peers_writes_its_figures(run, tmp_path) -> None:
    done = run("-m", "benchmarks.peers", "--quick", "--device", "cpu", "--precision", "fp32", "--out", "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/peers-cpu.json").read_text())
    assert results["device"] == "cpu" and results["hardware"]["threads"] >= 1
    assert {"python", "torch", "transformers"} <= results["versions"].keys()
    (case,) = results["cases"]
    ours, theirs = case["contenders"][peers.OURS], case["contenders"]["transformers"]
    for of in (ours, theirs):
        assert len(of["seconds"]) == 2
        assert 0 < of["slowest"] <= of["tokens_per_second"] <= of["fastest"]
        assert 0 < of["memory_bytes"] < 2**30
        assert of["last_loss"] < of["first_loss"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    assert ours["last_loss"] == pytest.approx(theirs["last_loss"], rel=1e-4)  # the optimizers do the same work
    assert theirs["ratio"]["speed"] > 0 and theirs["ratio"]["memory"] > 0
    text = (tmp_path / "results/peers-cpu.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert "| transformers " in text and "our allocator" in text


def test_contenders_that_differ_are_not_timed() -> None:
    case = peers.Case("micro", peers.SHAPES["cpu"]["micro"], "fp32", "cpu", "")
    turn = peers.Turn(1.0, 1.0, loss=7.0, grad_norm=1.0, memory=1)
    other = peers.Turn(1.0, 1.0, loss=7.001, grad_norm=1.0, memory=1)
    peers.check_agreement(case, {peers.OURS: turn, "transformers": turn})
    with pytest.raises(RuntimeError, match=r"transformers has loss 7\.001"):
        peers.check_agreement(case, {peers.OURS: turn, "transformers": other})


def test_a_contender_that_fails_is_in_the_table() -> None:
    case = peers.Case("micro", peers.SHAPES["cpu"]["micro"], "fp32", "cpu", "")
    turn = peers.Turn(0.5, 0.5, loss=7.0, grad_norm=1.0, memory=2**30)
    result = peers.figures(case, {peers.OURS: turn}, {peers.OURS: [turn]}, {"transformers": "MemoryError: "})
    rows = peers.table([result]).splitlines()
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1
    assert "failed" in rows[3] and "1.00 GiB" in rows[2] and " 128 " in rows[2]


def test_peers_names_the_nearest_shape(run) -> None:
    done = run("-m", "benchmarks.peers", "--shape", "124")
    assert done.returncode == 2
    assert done.stderr == "error: --shape 124 is none of micro, 10M, 124M (did you mean 124M?)\n"


def test_decoding_compares_equal_tokens(run, tmp_path) -> None:
    words = ["--shape", "micro", "--batch", "2", "--new-tokens", "8", "--repetitions", "2", "--device", "cpu"]
    done = run("-m", "benchmarks.decoding", *words, "--out", "results")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results/decoding-cpu.json").read_text())["rows"][0]
    assert row["tokens"] == 16 and all(len(seconds) == 2 for seconds in row["seconds"].values())
    assert (tmp_path / "results/decoding-cpu.md").read_text().strip() == done.stdout.strip()


def test_contenders_whose_tokens_differ_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="differ"):
        decoding.measure({"one": lambda: [[1]], "other": lambda: [[2]]}, repetitions=1)


def test_tokenizing_cuts_documents_that_together_are_the_text(tmp_path) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    pieces = tokenizing.documents(str(tmp_path / "a.txt"))
    assert "".join(pieces) == text and len(pieces) == 5 and all(piece.endswith("\n") for piece in pieces)
