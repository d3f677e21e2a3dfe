"""Comparing runs: what differs, the time to a loss, seeds, paired tests, and runs that lost files.

The runs are written by hand, so that every expected figure can be worked out. tests/tools/
test_sweep.py compares runs that were trained.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from base.charts import short_numbers
from base.cli import entry_point
from tasks.classification.confusion import paired_test
from tools import compare, seeds
from tools.runs import Point, reached, read_run

STEPS = 40
HASH = {"data": "d" * 64, "val_data": "e" * 64, "tokenizer": "f" * 64}


def write_run(folder: Path, final: float = 3.0, seed: int = 1, **changes: Any) -> Path:
    """A run whose losses fall along a straight line from final + 4 to final, in 40 steps of 100
    tokens and half a second, with an evaluation after every tenth. `changes`: more options, or the
    files `record`, `metrics` and `log`."""
    record = {"torch": "2.13", "identity": {"task": "pretrain", "seed": seed, **HASH}}
    record = changes.pop("record", record)
    metrics = changes.pop("metrics", {"steps": STEPS, "val_loss": final, "train_loss": final})
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = final + 4 * (1 - step / STEPS)
        spent = {"tokens": 100 * step, "step_ms": 500.0}
        lines.append({"kind": "train", "step": step, "loss": loss, **spent})
        if step % 10 == 0:
            lines.append({"kind": "eval", "step": step, "val_loss": loss, "seconds": 9.0})
    folder.mkdir(parents=True)
    options = {"lr": 0.1, "steps": STEPS, "seed": seed, "out": str(folder)}
    for name, content in (
        ("config.json", options | changes.pop("options", {})),
        ("run.json", record),
        ("metrics.json", metrics),
    ):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    log = changes.pop("log", "".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.jsonl").write_text(log)
    return folder


def write_predictions(file: Path, right: int, rows: int = 50, label: str = "a") -> Path:
    """Predictions for rows with one label, of which the first `right` are correct."""
    lines = [
        {
            "text": f"row {n}",
            "label": label,
            "prediction": (chosen := "a" if n < right else "b"),
            "probabilities": {"a": 0.1, "b": 0.1} | {chosen: 0.9},
        }
        for n in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Any:
    """`command(*words)` runs tools.compare in this process. Returns its exit code, figures, output
    and error."""

    def command(*words: Any) -> tuple[Any, dict[str, Any], str, str]:
        out = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, words), "--json", str(out)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry_point(compare.main)
        figures = json.loads(out.read_text()) if out.exists() else {}
        return stop.value.code, figures, *capsys.readouterr()

    return command


def table(output: str, title: str) -> dict[str, list[str]]:
    """The rows of the table under a title, by their first cell."""
    lines = output[output.index(title) :].split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: line.split()[1:] for line in lines}


# --- what differs


def test_only_what_differs_is_shown(command, tmp_path) -> None:
    identity = {"task": "pretrain", **HASH, "data": "0" * 64}
    a = write_run(tmp_path / "a", batch=8)
    b = write_run(
        tmp_path / "b", options={"lr": 0.3}, record={"torch": "2.12", "identity": identity}
    )
    code, figures, out, _ = command(a, b)
    assert code == 0
    assert table(out, "options that differ") == {"lr": [], "a": ["0.1"], "b": ["0.3"]}
    assert figures["differ"] == {
        "options": {"lr": {"a": 0.1, "b": 0.3}},
        "versions_hardware_data": {
            "torch": {"a": "2.13", "b": "2.12"},
            "data": {"a": "d" * 64, "b": "0" * 64},
        },
    }
    assert "data (sha256)" in out and "0" * 12 in out and "0" * 13 not in out


def test_what_is_not_known_is_said(command, tmp_path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", 6.0)
    bare = write_run(tmp_path / "bare", record=None, options={f"o{n:02}": n for n in range(20)})
    _, _, out, _ = command(a, b, bare, "--loss", 7)
    assert "not recorded: those of bare\n" in out
    assert "o11 and 8 more (--json has all)\n" in out and "o12" not in out
    # at its first evaluation a is below 7 already, and b is not
    assert table(out, "to val_loss 7.0000")["a"] == ["≤", "10", "≤", "1,000", "≤", "5.0"]
    assert table(out, "to val_loss 7.0000")["b"] == ["30", "3,000", "15.0"]


def test_many_runs_are_the_rows_of_a_table(command, tmp_path) -> None:
    runs = [write_run(tmp_path / f"r{n}", 3 + n / 8, n) for n in range(6)]
    _, _, out, _ = command(*runs)
    assert table(out, "final metrics")["r4"] == ["3.5000", "3.5000"]
    assert table(out, "options that differ")["r4"] == ["4"]


def test_runs_of_other_tasks_show_what_they_share(command, tmp_path) -> None:
    other = {"identity": {"task": "topics", **HASH}}
    a = write_run(tmp_path / "a")
    b = write_run(
        tmp_path / "b",
        metrics={"train_loss": 1.0, "accuracy": 0.5},
        record=other,
        options={"method": "full"},
    )
    code, figures, out, _ = command(a, b)
    assert code == 0 and figures["metrics"] == {"train_loss": [3.0, 1.0]}
    assert "the losses cannot be compared" in out and figures["to_loss"] is None
    assert "not in every run: method\n" in out and "not in every run: accuracy, val_loss\n" in out


# --- the time to a loss


def test_the_time_to_a_loss_is_interpolated(command, tmp_path) -> None:
    a, b = write_run(tmp_path / "a", 3.0), write_run(tmp_path / "b", 4.5)
    _, figures, out, _ = command(a, b)
    assert figures["to_loss"]["of"] == "val_loss" and figures["to_loss"]["loss"] == 4.5
    spent = figures["to_loss"]["runs"]  # a falls by 0.1 a step, from 5 after step 20 to 4
    assert spent["a"] == pytest.approx({"step": 25, "tokens": 2500, "seconds": 12.5, "loss": 4.5})
    assert spent["b"]["step"] == STEPS
    assert table(out, "to val_loss 4.5000")["a"] == ["25", "2,500", "12.5"]
    _, figures, out, _ = command(a, b, "--loss", 3.5)
    assert figures["to_loss"]["runs"]["a"]["step"] == pytest.approx(35)
    assert figures["to_loss"]["runs"]["b"] is None and "not reached" in out


def test_without_an_evaluation_the_training_loss_counts(command, tmp_path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", 3.5)
    lines = [line for line in (b / "log.jsonl").read_text().splitlines() if '"eval"' not in line]
    (b / "log.jsonl").write_text("\n".join(lines))
    _, figures, _, _ = command(a, b)
    assert figures["to_loss"]["of"] == "train_loss"
    assert figures["to_loss"]["runs"]["a"]["step"] == pytest.approx(35, abs=1.5)


def test_a_loss_is_reached_where_the_curve_first_crosses_it() -> None:
    curve = [Point(1, 10, 1, 5.0), Point(2, 20, 2, 4.0), Point(3, 30, 3, 6.0), Point(4, 40, 4, 3.0)]
    assert reached(curve, 4.5) == Point(1.5, 15, 1.5, 4.5)
    assert reached(curve, 5.5) == curve[0]
    assert reached(curve, 2.0) is None and reached([], 2.0) is None


# --- seeds


def test_seeds_of_one_configuration_are_grouped(command, tmp_path) -> None:
    finals = {0.1: [3.0, 3.2, 3.4], 0.3: [3.5, 3.4, 3.9]}
    runs = [
        write_run(tmp_path / f"{lr}-{n}", final, n, options={"lr": lr, "cache": f"c{n}"})
        for lr, of in finals.items()
        for n, final in enumerate(of)
    ]
    _, figures, out, _ = command(*runs)
    first, _ = figures["groups"]["groups"]
    assert (first["label"], first["runs"]) == ("lr 0.1", ["0.1-0", "0.1-1", "0.1-2"])
    expected = stats.t.interval(0.95, 2, 3.2, stats.sem(finals[0.1]))
    assert first["metrics"]["val_loss"]["interval"] == pytest.approx(list(expected))
    assert f"3.2000 ± {expected[1] - 3.2:.4f}" in out
    (found,) = figures["groups"]["differences"]
    test = stats.ttest_ind(finals[0.1], finals[0.3])
    assert found["groups"] == ["lr 0.1", "lr 0.3"] and found["metric"] == "val_loss"
    assert found["difference"] == pytest.approx(-0.4) and found["p"] == pytest.approx(test.pvalue)
    assert found["interval"] == pytest.approx(list(test.confidence_interval()))
    sd = math.sqrt((np.var(finals[0.1], ddof=1) + np.var(finals[0.3], ddof=1)) / 2)
    assert found["seeds_needed"] == seeds.seeds_needed(-0.4, sd)
    assert table(out, "val_loss of the best group")["lr"][-1] == str(found["seeds_needed"])


@pytest.mark.parametrize(("effect", "needed"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17)])
def test_the_seeds_needed_are_those_of_cohens_tables(effect: float, needed: int) -> None:
    assert seeds.seeds_needed(effect, 1.0) == needed
    assert seeds.seeds_needed(-3 * effect, 3.0) == needed


def test_extreme_spreads_have_an_answer() -> None:
    assert seeds.seeds_needed(1.0, 0.0) == 2 and seeds.seeds_needed(1e6, 1e-3) == 2
    assert seeds.seeds_needed(0.0, 1.0) is seeds.seeds_needed(0.0, 0.0) is None
    assert seeds.summary([2.0]) == {"seeds": 1, "mean": 2.0, "sd": None, "interval": None}
    assert seeds.difference([1.0], [3.0])["interval"] is None
    assert seeds.difference([1.0, 1.0], [3.0, 3.0])["p"] == 0


def test_a_repeated_seed_or_other_data_is_no_further_seed(command, tmp_path) -> None:
    a = write_run(tmp_path / "a", seed=1)
    again = write_run(tmp_path / "again", 3.1, seed=1)
    other = {"identity": {"task": "pretrain", **HASH, "data": "0" * 64}}
    b = write_run(tmp_path / "b", 3.2, seed=2, record=other)
    assert command(a, again, b)[1]["groups"] is None


# --- metrics and predictions


def test_runs_with_predictions_get_paired_tests(command, tmp_path) -> None:
    rights = {"a": 20, "b": 45, "c": 30}
    runs = []
    for name, right in rights.items():
        figures = {"accuracy": right / 50, "val_loss": 1.0}
        runs.append(write_run(tmp_path / name, metrics=figures))
        write_predictions(runs[-1] / "validation.jsonl", right)
    other = write_run(tmp_path / "other", metrics={"accuracy": 0.5})
    write_predictions(other / "validation.jsonl", 5, rows=10)
    _, figures, out, _ = command(*runs, other)
    *tests, untested = figures["tests"]
    assert [test["runs"] for test in tests] == [["a", "b"], ["b", "c"]]  # b is the best
    true = np.zeros(50, dtype=int)
    predicted = {name: (np.arange(50) >= right).astype(int) for name, right in rights.items()}
    expected = paired_test(true, predicted["a"], predicted["b"], 1337)
    assert {name: tests[0][name] for name in expected} == expected
    assert f"{expected['accuracy']['difference']:+.4f}" in out
    assert untested["runs"] == ["other"] and "other is not tested: " in out and "10 rows" in out
    assert figures["metrics"]["accuracy"] == [0.4, 0.9, 0.6, 0.5]


def test_a_run_compares_with_files_of_predictions(command, tmp_path) -> None:
    run = write_run(tmp_path / "a", metrics={"accuracy": 0.4})
    write_predictions(run / "validation.jsonl", 20)
    files = [write_predictions(tmp_path / f"{n}.jsonl", n) for n in (40, 30)]
    code, figures, _, _ = command(run, *files)
    assert code == 0 and figures["metrics"]["accuracy"] == [0.4, 0.8, 0.6]
    assert [test["runs"] for test in figures["tests"]] == [
        ["a", "40.jsonl"],
        ["40.jsonl", "30.jsonl"],
    ]


# --- runs that lost files, and mistakes


def test_an_unfinished_run_compares_by_its_log(command, tmp_path) -> None:
    a = write_run(tmp_path / "a", metrics=None)
    torn = (a / "log.jsonl").read_text().splitlines()[:33]  # up to step 30 and its evaluation
    b = write_run(tmp_path / "b", 3.5, metrics=None, record=None, log="\n".join(torn) + '\n{"ki')
    (b / "config.json").write_text('{"lr": ')
    code, figures, out, _ = command(a, b)
    assert code == 0 and [run["finished"] for run in figures["runs"]] == [False, False]
    assert "(unfinished: step 40 of 40; figures of its log)" in out
    assert figures["metrics"]["steps"] == [40, 30] and figures["metrics"]["tokens"] == [4000, 3000]
    assert figures["metrics"]["val_loss"] == [3.0, 4.0]
    assert figures["metrics"]["train_loss"][0] == pytest.approx(3.45)  # the mean of ten
    assert figures["metrics"]["seconds"] == [20.0, 15.0]


def test_metrics_of_before_an_extension_do_not_count(tmp_path) -> None:
    lengths = [{"at": 0, "steps": 20}, {"at": 20, "steps": STEPS}]
    half = {"steps": 20, "planned_steps": 20, "val_loss": 9.0}
    run = write_run(tmp_path / "a", metrics=half, record={"lengths": lengths})
    found = read_run(run, "a")
    assert not found.finished and found.metrics["val_loss"] == 3.0
    (run / "metrics.json").write_text(json.dumps(half | {"planned_steps": STEPS}))
    assert read_run(run, "a").finished


def test_a_run_without_training_steps_still_compares(command, tmp_path) -> None:
    """TF-IDF logs one evaluation and no step."""
    log = json.dumps({"kind": "eval", "step": 1, "accuracy": 0.7}) + "\n"
    a = write_run(tmp_path / "a", metrics={"accuracy": 0.7, "seconds": 1.0}, log=log)
    b = write_run(tmp_path / "b", metrics={"accuracy": 0.8, "seconds": 2.0})
    code, figures, _, _ = command(a, b, "--plot", tmp_path / "plot.png")
    assert code == 0 and figures["metrics"] == {"accuracy": [0.7, 0.8], "seconds": [1.0, 2.0]}


def test_benchmarks_of_a_run_get_panels_of_their_own(command, tmp_path) -> None:
    plain = write_run(tmp_path / "plain")
    lines = [json.loads(line) for line in (plain / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["hellaswag_acc_norm"] = line["step"] / 100
    log = "".join(json.dumps(line) + "\n" for line in lines)
    runs = [write_run(tmp_path / name, log=log) for name in ("a", "b")]
    points = read_run(runs[0], "a").accuracies["hellaswag_acc_norm"]
    assert [(point.tokens, point.loss) for point in points] == [
        (1000, 0.1), (2000, 0.2), (3000, 0.3), (4000, 0.4),
    ]  # fmt: skip
    assert not read_run(plain, "plain").accuracies
    heights = []
    for pair in ((plain, runs[0]), (plain, write_run(tmp_path / "other"))):
        code, _, _, err = command(*pair, "--plot", tmp_path / "plot.png")
        assert code == 0, err
        heights.append(Image.open(tmp_path / "plot.png").height)
    assert heights[0] > heights[1]


@pytest.mark.parametrize("low, high", [(0.692, 0.6932), (2e6, 2.0004e6), (0, 7), (-1, 1e9)])
def test_the_labels_of_an_axis_differ(low: float, high: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_ylim(low, high)
    short_numbers(axes.yaxis)
    figure.draw_without_rendering()
    texts = [label.get_text() for label in axes.get_yticklabels()]
    assert len(texts) > 3 and len(set(texts)) == len(texts)


def test_the_picture_is_small_and_the_runs_stay_as_they_were(command, tmp_path) -> None:
    runs = [write_run(tmp_path / f"{n}", 3 + n / 9, n, options={"lr": n // 2}) for n in range(18)]
    before = {file: file.read_bytes() for run in runs for file in run.rglob("*")}
    code, _, _, err = command(*runs, "--plot", tmp_path / "plot.png")
    assert code == 0, err
    assert before == {file: file.read_bytes() for run in runs for file in run.rglob("*")}
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_mistakes_are_one_line(command, tmp_path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    new = write_run(tmp_path / "new", log="")
    file = write_predictions(tmp_path / "a.jsonl", 20)
    for words, said in (
        ((a,), "1 runs are named"),
        ((a, a), "named twice"),
        ((a, tmp_path / "none"), "No such file"),
        ((a, tmp_path / "empty"), "no log.jsonl"),
        ((a, new), "no training step"),
        ((a, b, "--plot", a / "plot.png"), "in the folder of a run"),
        ((a, b, "--plot", "plot.svg"), "must end in .png"),
        ((a, b, "--plot", tmp_path / "no" / "plot.png"), "no folder"),
        ((a, b, "--loss", "-1"), "at least 0"),
        ((file, file, "--plot", tmp_path / "plot.png"), "draws the logs of runs"),
        ((a, file, write_predictions(tmp_path / "b.jsonl", 1, rows=9)), "9 rows"),
    ):
        code, figures, out, err = command(*words)
        assert code == 2 and not figures and not out, words
        assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err
    assert not (tmp_path / "plot.png").exists()
