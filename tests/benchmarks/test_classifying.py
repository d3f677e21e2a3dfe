"""The two sides of benchmarks.classifying do the same work, and the benchmark runs from end to end.
No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import classifying
from benchmarks.classifying import METHODS, OWN, RANDOM, SET, SHAPES, THEIRS, Fit, Options
from benchmarks.harness import OURS
from config import UserError


@pytest.fixture(scope="module", autouse=True)
def allocator() -> object:
    """The process of the tests keeps its own allocator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.plan.set_allocator", lambda keep_freed: None)
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Fit:
    """The tiny shape, with weights and rows for both sides."""
    folder = str(tmp_path_factory.mktemp("classifying"))
    classifying.prepare(SHAPES["micro"], folder)
    return Fit("micro", SHAPES["micro"], "fp32", "cpu", folder, dropout=0.0)


@pytest.mark.parametrize("method", METHODS)
def test_both_sides_make_the_same_steps(case, method) -> None:
    case = dataclasses.replace(case, method=method)
    own, other = classifying.ours(case), classifying.theirs(case)
    losses = []
    for _ in range(3):
        (loss, norm), (its_loss, its_norm) = own(), other()
        # Adam's first update has only signs
        assert its_loss.item() == pytest.approx(loss.item(), rel=1e-5 if not losses else 1e-4)
        assert its_norm.item() == pytest.approx(norm.item(), rel=1e-4 if not losses else 1e-2)
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_the_batch_is_padded_and_dropout_follows_the_case(case) -> None:
    lengths = case.batch()["lengths"]
    assert lengths.min() < lengths.max() == case.batch()["idx"].shape[1] == case.shape.seq_len
    for build in (classifying.ours, classifying.theirs):
        dry, wet = (
            [build(dataclasses.replace(case, dropout=p))()[0] for _ in range(2)] for p in (0.0, 0.5)
        )
        assert torch.equal(*dry) and not torch.equal(wet[0], dry[0])


def test_every_way_of_making_batches_has_the_same_rows(case) -> None:
    cfg = classifying.options_of_padding(Options(shape="micro"), "fp32", case.weights)
    task = classifying.engine_of(cfg).task
    found = classifying.batchings(task, 6)
    batches = {name: [data.batches[0] for data in steps] for name, steps in found.items()}
    rows = {
        name: np.sort(np.concatenate([batch["ids"] for batch in of]))
        for name, of in batches.items()
    }
    assert len(rows[OURS]) == 6 * case.shape.rows == len(set(rows[OURS]))
    assert all(np.array_equal(rows[OURS], ids) for ids in rows.values())
    longest = classifying.longest_of(task)
    assert {batch["idx"].shape[1] for batch in batches[SET]} == {longest}
    for batch in batches[RANDOM] + batches[OWN]:
        assert batch["idx"].shape[1] == batch["lengths"].max()
    amounts = {name: classifying.amounts_of(steps) for name, steps in found.items()}
    assert len({(of["rows"], of["tokens"]) for of in amounts.values()}) == 1
    assert (
        amounts[OWN]["padded_tokens"]
        <= amounts[OURS]["padded_tokens"]
        < amounts[SET]["padded_tokens"]
    )
    assert (
        amounts[OWN]["padded_tokens"]
        < amounts[RANDOM]["padded_tokens"]
        < amounts[SET]["padded_tokens"]
    )
    assert amounts[OWN]["tokens"] < amounts[OWN]["padded_tokens"]


def test_it_runs_and_writes_what_it_prints(run, tmp_path) -> None:
    words = ["--quick", "--device", "cpu", "--precision", "fp32", "--method", "full"]
    words += ["--against", THEIRS, "--steps", "2", "--json", "deep/result.json"]
    done = run("-m", "benchmarks.classifying", *words, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    own, other, padding = json.loads((tmp_path / "deep/result.json").read_text())["cases"]
    for row, trainer in ((own, OURS), (other, THEIRS)):
        assert (row["shape"], row["precision"], row["method"]) == ("micro", "fp32", "full")
        rate, least, most = row["per_second"]
        assert 0 < least <= rate <= most and 0 < row["memory_bytes"] < 2**28
        assert row["trainer"] == trainer
    ratio, least, most = other["speed_ratio"]
    assert 0 < least <= ratio <= most and other["memory_ratio"] > 0
    assert list(padding["seconds"]) == list(padding["amounts"]) == [SET, RANDOM, OWN, OURS]
    text = Path(tmp_path / "deep/result.md").read_text()
    assert text.strip() == done.stdout.strip()
    assert text.count("| micro, 8 x 16 ") == 2 and f"| {SET} " in text and str(tmp_path) not in text


def test_cases_follow_the_options() -> None:
    with pytest.raises(
        UserError,
        match=r"--method lora-r8 is not one of full, lora, last-layer \(did you mean lora\?\)",
    ):
        classifying.cases_of(Options(method="lora-r8"), "cpu", "bf16", "")
    cases = classifying.cases_of(Options(method="last-layer,full"), "cpu", "bf16", "weights")
    assert [(case.name, case.precision, case.method) for case in cases[:4]] == [
        ("10M", "fp32", "full"), ("10M", "fp32", "last-layer"),
        ("10M", "bf16", "full"), ("10M", "bf16", "last-layer"),
    ]  # fmt: skip
    assert {case.dropout for case in cases} == {0.1} and cases[-1].weights == "weights/124M"


def test_a_side_that_does_other_work_is_named() -> None:
    row = {"shape": "micro", "rows": 8, "seq_len": 16, "precision": "fp32", "method": "lora"}
    row |= {"trainer": THEIRS, "error": "loss 1.7, this engine's 1.6"}
    text = classifying.report({"cases": [row], "options": {"dropout": 0.1}})
    assert "| transformers: loss 1.7, this engine's 1.6 " in text
