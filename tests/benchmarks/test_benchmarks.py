"""The benchmarks run, write what they say, and answer a mistake with one line. No timing is
asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import contenders, decoding, peers, peers_report, plot, tokenizing
from benchmarks.contenders import OURS, Case, Step
from benchmarks.peers import Opening
from config import UserError

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, steps: int, evals: bool = True, torn: bool = False) -> Path:
    lines: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        loss = 3 + 8 / step
        lines.append(
            {
                "kind": "train",
                "step": step,
                "loss": loss,
                "grad_norm": None if step == 3 else 1.0 / step,
                "tokens": 1024 * step,
                "tokens_per_second": 50.0 if step == 1 else 5000.0,
            }
        )
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
    words = ["--quick", "--device", "cpu", "--precision", "fp32", "--against", "plain,liger"]
    done = run("-m", "benchmarks.peers", *words, "--out", "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/peers-cpu.json").read_text())
    assert results["device"] == "cpu" and results["hardware"]["threads"] >= 1
    assert {"python", "torch", "numpy"} <= results["versions"].keys()
    (case,) = results["cases"]
    assert case["accumulation"] == 2 and case["ceiling_flops"] > 1e8
    ours, plain = case["contenders"][OURS], case["contenders"]["plain"]
    for of in (ours, plain):
        assert 0 < of["slowest"] <= of["tokens_per_second"] <= of["fastest"]
        assert 0 < of["memory_bytes"] < 2**30 and of["mfu"] > 0
        assert of["opening"]["next_loss"] < of["opening"]["loss"]
    assert len(plain["seconds"]) == len(plain["beside"]["seconds"]) == 2
    assert plain["speed_ratio"] > 0 and plain["memory_ratio"] > 0
    assert case["contenders"]["liger"] == {"error": "needs a CUDA GPU"}
    assert (
        case["best"]["as it ships"]["name"] == "plain" and "with our allocator" not in case["best"]
    )
    text = (tmp_path / "results/peers-cpu.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert "| liger: needs a CUDA GPU " in text and "the best peer as it ships (plain)" in text


@pytest.fixture
def case(tmp_path) -> Case:
    """The tiny one, with weights for all."""
    shape = contenders.SHAPES["cpu"]["micro"]
    peers.prepare(shape, "cpu", str(tmp_path / "weights"))
    return Case("micro", shape, "fp32", "cpu", str(tmp_path / "weights"))


def opening(step: Step) -> Opening:
    return peers.opening(lambda untimed, steps: peers.take_turn(step, untimed, steps, "cpu", 0))


def test_the_peers_train_exact_gpt2(case) -> None:
    reference = opening(contenders.transformers(case, compiled=False))
    peers.check_agreement(case, "plain", reference, opening(contenders.plain(case, compiled=False)))
    try:
        import litgpt.model  # noqa: F401
    except ImportError:
        return
    peers.check_agreement(
        case, "litgpt compiled", reference, opening(contenders.litgpt(case, compiled=False))
    )


def test_a_contender_at_other_work_is_not_timed(case) -> None:
    own = Opening(loss=7.0, grad_norm=1.0, next_loss=6.9, seconds=1.0)
    peers.check_agreement(case, "transformers", own, own)
    # what the padding of 24 in 1,000 words may add
    more = dataclasses.replace(own, loss=7.01, next_loss=6.91)
    peers.check_agreement(case, "plain", own, more)
    for other in (
        more,
        dataclasses.replace(own, next_loss=7.0),
        dataclasses.replace(own, grad_norm=math.nan),
    ):
        with pytest.raises(peers.Failed, match=r"transformers: .*this engine's"):
            peers.check_agreement(case, "transformers", own, other)


def test_a_turn_times_only_what_it_should() -> None:
    taken: list[int] = []

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(len(taken))
        return torch.tensor(float(len(taken))), torch.tensor(0.5)

    turn = peers.take_turn(step, 1, 2, "cpu", code=0)
    assert len(taken) == 3 and turn.loss == 3.0 and turn.memory > 0


def measured(seconds: list[float], memory: int, ratio: float) -> dict[str, Any]:
    beside = {"seconds": [0.5, 0.25], "memory_bytes": 2**30}
    return {
        "seconds": seconds,
        "memory_bytes": memory,
        "beside": beside,
        "speed_ratio": ratio,
        "memory_ratio": 0.5,
    } | (peers_report.rates(128, seconds))


def test_the_best_peer_is_the_fastest_of_its_kind() -> None:
    figures = {
        OURS: {"seconds": [1.0], "memory_bytes": 2**29} | peers_report.rates(128, [1.0]),
        "transformers compiled": {"error": "needs a C++ compiler"},
        "plain": measured([0.5], 2**31, 2.0),
        "transformers": measured([0.4], 2**31, 1.5),
        "plain + our allocator": measured([0.25], 2**31, 1.25),
        f"{OURS} fp8": measured([0.125], 2**30, 0.5),
    }
    shape = dataclasses.asdict(contenders.SHAPES["cpu"]["micro"])
    rates = {"flops_per_token": 1000, "ceiling_flops": 1e6, "sheet_flops": 2e6}
    case = peers_report.assessed(
        {"shape": "micro", **shape, "precision": "bf16", "contenders": figures, **rates}
    )
    assert case["best"]["as it ships"] == {
        "name": "transformers",
        "speed_ratio": 1.5,
        "memory_ratio": 0.5,
    }
    assert case["best"]["with our allocator"]["name"] == "plain + our allocator"
    ours = case["contenders"][OURS]  # of all its turns, alone and beside the others
    assert ours["slowest"] == 128 and ours["fastest"] == 512 and ours["memory_bytes"] == 2**30
    plain = case["contenders"]["plain"]
    assert plain["mfu"] == pytest.approx(0.256) and plain["mfu_of_data_sheet"] == pytest.approx(
        0.128
    )
    assert peers_report.assessed(case) == case  # what --resume reads again
    rows = peers_report.table([case]).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert "| transformers compiled: needs a C++ compiler " in rows[3] and " 2 x 32 x 2 " in rows[3]
    assert "12.8%" in next(row for row in rows if "| plain " in row)


def test_on_a_gpu_each_contender_trains_alone(case, monkeypatch) -> None:
    process, beside = peers.contender, []

    @contextlib.contextmanager
    def counted(name: str, case: Case) -> Generator[peers.TakeTurn]:
        with process(name, case) as turn:
            beside.append((name, len(multiprocessing.active_children())))
            yield turn

    monkeypatch.setattr(peers, "contender", counted)
    monkeypatch.setattr(peers, "TURN_SECONDS", 0.01)
    found: dict[str, Any] = {}
    for name in peers.one_by_one(case, ["liger", "plain"], peers.Pace(0, 2, 2), found):
        assert name in found and not multiprocessing.active_children()  # its memory is free again
    assert beside == [(OURS, 1), ("plain", 1)]
    assert found["liger"] == {"error": "needs a CUDA GPU"}
    ours, plain = found[OURS], found["plain"]
    assert (
        len(ours["seconds"]) == len(plain["seconds"]) == 2
        and plain["beside"]["seconds"] == ours["seconds"]
    )
    assert plain["speed_ratio"] == statistics.median(plain["seconds"]) / statistics.median(
        ours["seconds"]
    )
    assert plain["memory_ratio"] == ours["memory_bytes"] / plain["memory_bytes"]
    assert plain["opening"]["loss"] == pytest.approx(ours["opening"]["loss"], rel=0.01)


@pytest.mark.parametrize("name", contenders.SHAPES["cuda"])
def test_a_small_card_gets_the_same_step_in_fewer_rows(name) -> None:
    shape = contenders.SHAPES["cuda"][name]
    assert contenders.fitting(shape, None) == contenders.fitting(shape, 144_000_000_000) == shape
    small = contenders.fitting(shape, 80 * 2**30)
    assert small.rows * small.seq_len <= 32 * 1024
    # the same tokens in a step
    assert small.rows * small.accumulation == shape.rows * shape.accumulation
    assert dataclasses.replace(small, rows=shape.rows, accumulation=shape.accumulation) == shape
    assert (small.rows, small.accumulation) == (32, 16) if name == "124M" else small == shape


def test_peers_goes_on_only_on_the_same_machine(tmp_path) -> None:
    facts = {
        "device": "cpu",
        "hardware": {"cpu": "x"},
        "driver": None,
        "versions": {"torch": "2"},
        "settings": {},
    }
    (tmp_path / "peers-cpu.json").write_text(
        json.dumps(facts | {"date": "yesterday", "cases": [{"shape": "10M"}]})
    )
    assert peers.earlier(tmp_path, facts | {"date": "today"}) == [{"shape": "10M"}]
    assert peers.earlier(tmp_path, facts | {"versions": {"torch": "3"}}) == []
    assert peers.earlier(tmp_path / "empty", facts) == []


def test_peers_names_what_is_nearest() -> None:
    with pytest.raises(
        UserError, match=r"--shape 124 is none of micro, 10M, 124M \(did you mean 124M\?\)"
    ):
        peers.asked_for(peers.Options(shape="124"), "cpu")
    with pytest.raises(UserError, match="--against this engine fp8 is none of"):
        peers.asked_for(peers.Options(against=f"{OURS} fp8"), "cpu")
    shapes, against, _ = peers.asked_for(peers.Options(), "cuda")
    assert (
        shapes == ["124M", "350M", "774M", "1.5B"]
        and f"{OURS} fp8" in against
        and OURS not in against
    )


def test_decoding_compares_equal_tokens(run, tmp_path) -> None:
    words = [
        "--shape",
        "micro",
        "--batch",
        "2",
        "--new-tokens",
        "8",
        "--repetitions",
        "2",
        "--device",
        "cpu",
    ]
    done = run("-m", "benchmarks.decoding", *words, "--out", "results")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "results/decoding-cpu.json").read_text())["rows"][0]
    assert row["tokens"] == 16 and all(len(seconds) == 2 for seconds in row["seconds"].values())
    assert (tmp_path / "results/decoding-cpu.md").read_text().strip() == done.stdout.strip()


def test_contenders_whose_tokens_differ_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="differ"):
        decoding.check({"one": lambda: [[1]], "other": lambda: [[2]]})


def test_tokenizing_cuts_documents_that_together_are_the_text(tmp_path) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    pieces = tokenizing.documents(str(tmp_path / "a.txt"))
    assert (
        "".join(pieces) == text
        and len(pieces) == 5
        and all(piece.endswith("\n") for piece in pieces)
    )
