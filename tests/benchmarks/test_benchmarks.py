"""The benchmarks run, write their results, and answer a mistake with one line. No test asserts a
time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Generator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from base.charts import limits, smooth
from benchmarks import contenders, decoding, peers, plot, serving, steps, tokenizing
from benchmarks.contenders import CONTENDERS
from benchmarks.harness import OURS, Results, Turns, alternate, ratio
from benchmarks.steps import Case, Opening, Step, Turn
from config import UserError
from tools.runs import run_names

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
            scores = {"hellaswag_acc_norm": 0.25 + step / 100, "lambada_accuracy": step / 50}
            lines.append({"kind": "eval", "step": step, "val_loss": loss + 0.1} | scores)
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
        plot.curves(write_run(tmp_path / "new", 0), "tokens")


def test_curves_skip_torn_lines_and_infinite_values(tmp_path) -> None:
    got = plot.curves(write_run(tmp_path / "a", 10, torn=True), "tokens")
    assert [x for x, _ in got["loss"]] == [1024 * step for step in range(1, 11)]
    assert [x for x, _ in got["val_loss"]] == [5 * 1024, 10 * 1024]
    assert len(got["grad_norm"]) == 9  # one value was not finite
    assert got["lambada_accuracy"] == [(5 * 1024, 0.1), (10 * 1024, 0.2)]


def test_warm_up_does_not_set_the_limits() -> None:
    series = [(float(i), 1000.0 if i < 5 else 5.0 + 0.1 * math.sin(i)) for i in range(200)]
    low, high = limits([series]) or (0, 0)
    assert 4.8 < low < high < 5.2
    smoothed = smooth(series)
    assert [x for x, _ in smoothed] == [x for x, _ in series]
    assert abs(smoothed[100][1] - 5) < 0.1


def test_runs_with_equal_names_are_shown_by_path() -> None:
    assert run_names([Path("a/x"), Path("a/y")]) == ["x", "y"]
    assert run_names([Path("a/x"), Path("b/x")]) == ["a/x", "b/x"]


# --- the harness


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: partial(order.append, name) for name in ("a", "b", "slow")}
    results = alternate(contenders, Turns(3, 9), limits={"slow": 1})
    assert order == ["a", "b", "slow", "a", "b", "a", "b"]
    assert {name: len(of) for name, of in results.items()} == {"a": 3, "b": 3, "slow": 1}
    left = iter([1, 0])
    contenders = {"fails later": lambda: 1 // next(left), "works": lambda: 2}
    assert alternate(contenders, range(2), dropped=(ZeroDivisionError,)) == {"works": [2, 2]}


def test_turns_end_when_their_time_is_over() -> None:
    assert list(Turns(2, 5)) == [0, 1] and list(Turns(2, 5, seconds=60)) == [0, 1, 2, 3, 4]


def test_ratios_are_of_the_same_turn() -> None:
    assert ratio([2.0, 40.0, 3.0], [1.0, 10.0, 1.0]) == [3, 2, 4]
    assert ratio([2.0], [1.0, 10.0]) == [2, 2, 2]  # one side took fewer turns


FACTS = {
    "device": "cpu",
    "hardware": {"gpu": None, "cpu": "x", "threads": 1},
    "driver": None,
    "versions": {"torch": "2"},
    "settings": {},
}


def test_results_resume_on_the_same_machine_only(tmp_path, capsys) -> None:
    file = tmp_path / "new/x.json"

    def resumed(facts: dict = FACTS) -> Results:
        results = Results(file, facts, Turns(1, 2), lambda record: f"{record['cases']}")
        results.resume()
        return results

    first = resumed()
    for shape, seconds in (("a", 1), ("b", 2), ("a", 3)):
        first.put({"shape": shape}, {"seconds": seconds})
    assert file.with_suffix(".md").read_text() == first.text()
    assert first.text().startswith("Measured on x, 1 threads, 2")
    again = resumed()
    assert again.cases == [{"shape": "a", "seconds": 3}, {"shape": "b", "seconds": 2}]
    assert again.find({"shape": "b"}) and not again.find({"shape": "c"})
    assert capsys.readouterr().err == ""
    assert resumed(FACTS | {"versions": {"torch": "3"}}).cases == []
    file.write_text(json.dumps(FACTS | {"cases": [{"shape": "a"}]}))  # from earlier versions
    assert resumed().cases == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("is of another machine" in line for line in lines)


# --- other trainers


def test_peers_writes_its_figures(run, tmp_path) -> None:
    words = ["--quick", "--device", "cpu", "--precision", "fp32", "--against", "plain,liger"]
    done = run("-m", "benchmarks.peers", *words, "--out", "results")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results/peers-cpu.json").read_text())
    assert results["device"] == "cpu" and results["hardware"]["threads"] >= 1
    assert {"python", "torch", "numpy"} <= results["versions"].keys()
    ours, plain, liger = results["cases"]
    assert [row["trainer"] for row in results["cases"]] == [OURS, "plain", "liger"]
    for row in (ours, plain):
        rate, least, most = row["per_second"]
        assert 0 < least <= rate <= most and row["ceiling_flops"] > 1e8
        assert 0 < row["memory_bytes"] < 2**30 and row["accumulation"] == 2
        assert row["opening"]["next_loss"] < row["opening"]["loss"]
    assert len(plain["seconds"]) == 2
    assert ours["seconds"][2:] == plain["beside_seconds"]  # without the turns that it took alone
    assert plain["speed_ratio"] == ratio(plain["seconds"], plain["beside_seconds"])
    assert liger["error"] == "needs a CUDA GPU"
    text = (tmp_path / "results/peers-cpu.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert "| liger: needs a CUDA GPU " in text and "the best peer as it ships (plain)" in text


@pytest.fixture
def case(tmp_path) -> Case:
    """The tiny shape, with weights for all contenders."""
    shape = contenders.SHAPES["cpu"]["micro"]
    peers.prepare(shape, "cpu", str(tmp_path / "weights"))
    return Case("micro", shape, "fp32", "cpu", str(tmp_path / "weights"))


def opening(step: Step) -> Opening:
    return steps.opening(partial(steps.take_turn, step, "cpu", 0))


def check(name: str, case: Case, own: Opening, other: Opening) -> None:
    steps.check_agreement(name, CONTENDERS[name], case, own, other)


def test_the_peers_train_exact_gpt2(case) -> None:
    reference = opening(contenders.transformers(case, compiled=False))
    check("plain", case, reference, opening(contenders.plain(case, compiled=False)))
    try:
        import litgpt.model
    except ImportError:
        return
    litgpt = opening(contenders.litgpt(case, compiled=False))
    check("litgpt compiled", case, reference, litgpt)


def test_a_contender_that_does_other_work_is_not_timed(case) -> None:
    own = Opening(loss=7.0, grad_norm=1.0, next_loss=6.9, seconds=1.0)
    check("transformers", case, own, own)
    # the padding of 24 rows for 1,000 ids may add this much
    more = dataclasses.replace(own, loss=7.01, next_loss=6.91)
    check("plain", case, own, more)
    later = dataclasses.replace(own, next_loss=7.0)
    for other in (more, later, dataclasses.replace(own, grad_norm=math.nan)):
        with pytest.raises(steps.Failed, match=r"transformers: .*this engine's"):
            check("transformers", case, own, other)


def test_the_best_peer_is_the_fastest_of_its_kind() -> None:
    shape = contenders.SHAPES["cpu"]["micro"]
    case = Case("micro", shape, "bf16", "cpu", "").key | {"flops_per_token": 1000}
    case |= {"ceiling_flops": 1e6, "sheet_flops": 2e6}
    row = case | {"per_second": [256.0, 128.0, 512.0], "memory_bytes": 2**30, "memory_ratio": 0.5}
    ratios = {"plain": 2.0, "transformers": 1.5, "plain + our allocator": 1.25, f"{OURS} fp8": 0.5}
    rows = [row | {"trainer": name, "speed_ratio": [x, x, x]} for name, x in ratios.items()]
    rows.append(case | {"trainer": "transformers compiled", "error": "needs a C++ compiler"})
    table, *_, words = peers.report({"cases": rows}).split("\n\n")
    assert words == (
        "- micro bf16: 1.50 x the speed of the best peer as it ships (transformers), 0.50 x its "
        "memory; 1.25 x the speed of the best peer with our allocator (plain + our allocator), "
        "0.50 x its memory."
    )
    lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert lines[2][1:6] == ["micro, 2 x 32 x 2", "bf16", "plain", "256", "128-512"]
    assert lines[2][10:12] == ["25.6%", "12.8%"]
    assert lines[6][3:5] == ["transformers compiled: needs a C++ compiler", ""]


def test_on_a_gpu_each_contender_trains_alone(monkeypatch, tmp_path) -> None:
    running: list[str] = []
    beside: list[list[str]] = []

    @contextlib.contextmanager
    def made_up(name: str, trainer: steps.Trainer, case: Case) -> Generator[Any]:
        seconds, memory = (1.0, 4) if name == OURS else (3.0, 8)

        def take(count: int) -> Turn:
            beside.append(list(running))
            return Turn(seconds, 7.0, 1.0, memory)

        running.append(name)
        yield Opening(7.0, 1.0, 6.9, seconds=0.5), take
        running.remove(name)

    monkeypatch.setattr(steps, "process", made_up)
    shape = contenders.SHAPES["cuda"]["micro"]
    case = Case("micro", shape, "bf16", "cuda", str(tmp_path))
    others = {name: CONTENDERS[name] for name in ("transformers", "plain")}
    results = Results(None, FACTS, Turns(2, 2), str)
    steps.compare(case, CONTENDERS[OURS], others, Turns(2, 2), results, {})
    found = {row["trainer"]: row for row in results.cases}
    assert beside == [[OURS]] * 2 + [["transformers"]] * 2 + [["plain"]] * 2 and not running
    assert found["plain"]["speed_ratio"] == [3, 3, 3] and found["plain"]["memory_ratio"] == 0.5
    assert found[OURS]["seconds"] == found["plain"]["beside_seconds"] == [1, 1]


def test_a_process_says_why_it_cannot_build_its_step(capsys) -> None:
    def out_of_memory() -> None:
        raise MemoryError

    missing = steps.answer(importlib.import_module, "no_such_module")
    assert missing == "not installed (no module no_such_module)"
    assert steps.answer(out_of_memory) == "out of memory"
    assert steps.answer(int, "x").startswith("ValueError: invalid literal")
    assert steps.answer(int, "7") == 7
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("name", contenders.SHAPES["cuda"])
def test_a_small_card_gets_the_same_step_in_fewer_rows(name) -> None:
    shape = contenders.SHAPES["cuda"][name]
    assert contenders.fitting(shape, None) == contenders.fitting(shape, 144_000_000_000) == shape
    small = contenders.fitting(shape, 80 * 2**30)
    assert small.rows * small.seq_len <= 32 * 1024
    # the step has the same tokens
    assert small.rows * small.accumulation == shape.rows * shape.accumulation
    assert dataclasses.replace(small, rows=shape.rows, accumulation=shape.accumulation) == shape
    assert (small.rows, small.accumulation) == (32, 16) if name == "124M" else small == shape


def test_peers_suggests_the_nearest_name() -> None:
    with pytest.raises(
        UserError, match=r"--shape 124 is not one of micro, 10M, 124M \(did you mean 124M\?\)"
    ):
        peers.asked_for(peers.Options(shape="124"), "cpu")
    with pytest.raises(UserError, match="--against this engine fp8 is not one of"):
        peers.asked_for(peers.Options(against=f"{OURS} fp8"), "cpu")
    shapes, against, _ = peers.asked_for(peers.Options(), "cuda")
    assert shapes == ["124M", "350M", "774M", "1.5B"]
    assert f"{OURS} fp8" in against and OURS not in against


# --- decoding and tokenizing


def test_decoding_compares_equal_tokens(run, tmp_path) -> None:
    words = ["--quick", "--batch", "2", "--new-tokens", "8", "--device", "cpu"]
    done = run("-m", "benchmarks.decoding", *words, "--out", "results")
    assert done.returncode == 0, done.stderr
    case = json.loads((tmp_path / "results/decoding-cpu.json").read_text())["cases"][0]
    assert case["tokens"] == 32 and all(len(seconds) == 2 for seconds in case["seconds"].values())
    assert (tmp_path / "results/decoding-cpu.md").read_text().strip() == done.stdout.strip()


def test_races_are_compared_with_the_first_contender() -> None:
    seconds = {"transformers": [3.0, 6.0], OURS: [2.0, 2.0], decoding.COMPILED: [1.0, 1.0]}
    case = dict(shape="10M", batch=1, decode="greedy", tokens=6, seconds=seconds)
    rows = decoding.report({"options": {"new_tokens": 6}, "cases": [case]}).splitlines()[-3:]
    found = [[cell.strip() for cell in row.split("|")[4:-1]] for row in rows]
    assert found == [
        ["transformers", "2", "1-2", "1.00", "1.00-1.00"],
        [OURS, "3", "3-3", "2.25", "1.50-3.00"],
        [decoding.COMPILED, "6", "6-6", "4.50", "3.00-6.00"],
    ]
    case = dict(shape="10M", equal=4, tokens=60, seconds={"1": [6.0, 3.0], "8": [2.0, 1.5]})
    options = dict(parallel="1,8", requests=4, new_tokens=6)
    row = serving.report({"options": options, "cases": [case]}).splitlines()[-1]
    found = [cell.strip() for cell in row.split("|")[1:-1]]
    assert found == ["10M", "8", "35", "30-40", "2.50", "2.00-3.00"]


def test_contenders_whose_tokens_differ_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="differ"):
        decoding.check({"one": lambda: [[1]], "other": lambda: [[2]]})


def test_tokenizing_compares_the_same_documents(tmp_path, monkeypatch, capsys) -> None:
    text = "".join(f"line {i} of a text\n" for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    pieces = tokenizing.documents(str(tmp_path / "a.txt"))
    assert "".join(pieces) == text and len(pieces) == 5
    assert all(piece.endswith("\n") for piece in pieces)
    read = SimpleNamespace(encode_ordinary_batch=lambda texts, num_threads: texts)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: read)
    monkeypatch.setattr("text.tokenizer.load_tokenizer", lambda name: None)
    monkeypatch.setattr(tokenizing, "SHARD_TOKENS", len(text) - 1)
    monkeypatch.setattr(tokenizing, "prepare", lambda parquet, workers: parquet.read_bytes())
    words = ["tokenizing", "--input", f"{tmp_path}/a.txt", "--out", f"{tmp_path}/results"]
    monkeypatch.setattr(sys, "argv", [*words, "--workers", "1"])
    tokenizing.main()
    (case,) = json.loads((tmp_path / "results/tokenizing.json").read_text())["cases"]
    assert case["tokens"] == len(text) and case["documents"] == 5
    assert [len(seconds) for seconds in case["seconds"].values()] == [3, 3]
    assert (tmp_path / "results/tokenizing.md").read_text() in capsys.readouterr().out


def test_tokenizing_refuses_too_little_text(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("a line\n")
    read = SimpleNamespace(encode_ordinary_batch=lambda texts, num_threads: texts)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: read)
    monkeypatch.setattr("text.tokenizer.load_tokenizer", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["tokenizing", "--input", str(tmp_path / "a.txt")])
    with pytest.raises(UserError, match=r"a\.txt holds 7 tokens; name files with more than 2,000"):
        tokenizing.main()


def test_tokenizing_passes_on_why_fineweb_prep_failed(tmp_path) -> None:
    (tmp_path / "text.parquet").write_text("this is not parquet")
    # without a network the reason is GPT-2's tokenizer, else the broken file
    reason = r"^fineweb_prep\.py failed: .*(text\.parquet|GPT-2's tokenizer).*$"
    with pytest.raises(UserError, match=reason) as caught:
        tokenizing.prepare(tmp_path / "text.parquet", 1)
    assert "\n" not in str(caught.value)
