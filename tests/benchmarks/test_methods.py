"""benchmarks.methods: what is run and in which order, budget, resume, failures, figures, tables,
chart; one real run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import benchmarks.methods as bench_module
import benchmarks.methods_cells as cells_module
from base.cli import parse
from benchmarks import methods_cells
from benchmarks.methods import Options, compare, extra_options, make_bench, result_of, usual_rate
from benchmarks.methods_cells import DECODINGS, METHODS, Bench, Cell, Decoding, Method
from benchmarks.methods_chart import draw
from benchmarks.methods_report import PUBLISHED, rows_of, text_of
from benchmarks.runs import Failed, TimeUp
from config import UserError
from model import GPT, GPTConfig
from tasks import methods
from tasks.classification import task as classification
from tasks.classification.options import ClassificationConfig
from tasks.generation.options import GenerationConfig
from text.tokenizer_training import train_bpe

FEW = tuple(
    Method(name, {"method": name}, rate=1 + number) for number, name in enumerate("abcdefg")
)
TWO = (
    Decoding("draw", {"decode": "sample"}, of="a"),
    Decoding("first", {"decode": "greedy"}, of="b"),
)
ABOUT: dict[str, Any] = {
    "task": "sonnets",
    "family": "generation",
    "base": {
        "init": "runs/base",
        "folder": "runs/base/final",
        "parameters": 4321,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 64,
        "block_size": 64,
        "vocab_size": 300,
        "card": {"data": "books: 99 tokens"},
        "results": {"tokens": 1234567, "val_loss": 4.5},
    },
    "machine": {
        "device": "cpu",
        "hardware": {"cpu": "a CPU", "threads": 2, "gpu": None},
        "versions": {"torch": "2"},
    },
    "data": ["train.txt", "val.txt"],
    "command": "python -m benchmarks.methods --task sonnets",
}


class Fake:
    """Stands for `execute` and the clock: a run takes its seconds, writes what the loop writes, and
    is remembered."""

    def __init__(
        self, score: Callable[..., float] = lambda name, seed, **options: 1.0, seconds: float = 10.0
    ):
        self.score, self.seconds = score, seconds
        self.now = 1000.0
        self.ran: list[tuple[str, int]] = []
        self.options: list[dict[str, str]] = []  # of each of those
        self.labels: Callable[[str], Sequence[int]] | None = (
            None  # predicted by a method, of rows that alternate
        )
        self.failing: set[str] = set()

    def monotonic(self) -> float:
        return self.now

    def execute(self, words: Sequence[str], output: Path, until: float, grace: float = 0.0) -> None:
        if self.now + self.seconds > until:
            self.now = until
            raise TimeUp
        self.now += self.seconds
        options = dict(zip(words[1::2], words[2::2]))
        path = Path(options.get("--answers") or options["--out"])
        name, seed = path.name.rpartition("-")[0].rpartition("-")[0], int(options["--seed"])
        self.ran.append((name, seed))
        self.options.append(
            {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
        )
        if name in self.failing:
            raise Failed("error: it broke")
        if "--answers" in options:
            path.with_suffix(".scores.json").write_text(json.dumps({"chrf": 3.0, "seconds": 1.5}))
            return
        tried = {name: float(self.options[-1].get(name, 0)) for name in ("lr", "epochs")}
        write_run(path, self.score(name, seed, **tried), lr=options.get("--lr"))
        if self.labels:
            write_labels(path, self.labels(name))


def write_run(
    folder: Path, score: float, steps: int = 6, best_step: int = 4, lr: Any = 0.5
) -> None:
    """What a run of three epochs leaves; `score` is of the step whose model is final/, other steps
    have less. Without a rate, what remains of a model that takes no steps."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {"epochs": 3, "lr": lr, "steps": steps if lr else None}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [{"kind": "warning", "text": "two rows are cut"}]
    for step in range(1, steps + 1) if lr else ():
        lines.append({"kind": "train", "step": step, "loss": 1.0, "step_ms": 1000.0 * step})
        of_step = {
            "val_loss": 2.0 + step / 10,
            "chrf": score if step == best_step else score - step,
            "seconds": 9.0,
        }
        lines += [{"kind": "eval", "step": step, "time": 0.0, **of_step}] if step % 2 == 0 else []
    if not lr:
        lines.append({"kind": "eval", "step": best_step, "chrf": score})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {
        "steps": steps,
        "seconds": 30.0,
        "final_is_step": best_step,
        "memory_bytes": 2**30,
        "parameters": 4000,
    }
    (folder / "metrics.json").write_text(
        json.dumps(results | {"trained_parameters": 1000, "chrf": -99.0})
    )


def write_labels(folder: Path, predicted: Sequence[int]) -> None:
    """What a classifier says of validation rows, whose true labels are 0, 1, 0, ..., written as
    0.0, 1.0, ..."""
    rows = [
        {"label": f"{n % 2}.0", "prediction": str(label), "probabilities": {"0": 0.5, "1": 0.5}}
        for n, label in enumerate(predicted)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    intervals = {"chrf": [sum(predicted) / 10, 0.9]}
    (folder / "validation.report.json").write_text(json.dumps({"intervals": intervals}))


def bench_of(folder: Path, **changes: Any) -> Bench:
    bench = Bench(
        folder,
        ("task",),
        ("chrf", "max"),
        0.5,
        {"init": "base", "epochs": 3},
        {"n-layer": 2},
        "val.txt",
        methods=FEW,
        decodings=TWO,
        seeds=(1, 2, 3),
        keep=2,
    )
    return dataclasses.replace(bench, **changes)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch, Fake())


def install(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    monkeypatch.setattr(bench_module, "execute", fake.execute)
    for module in (bench_module, cells_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=fake.monotonic))
    return fake


def silent() -> None:
    return None


# --- what is run


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(len(FEW))), st.integers(0, 7), st.sampled_from(["max", "min"]))
def test_one_seed_for_all_then_more_for_the_best(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], keep: int, way: str
) -> None:
    scores = {method.name: float(rank) for method, rank in zip(FEW, order, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        fake = install(patch, Fake(lambda name, seed, **options: scores[name] + seed / 10))
        bench = bench_of(tmp_path_factory.mktemp("bench"), best=("chrf", way), keep=keep)
        compare(bench, silent)
    names = [method.name for method in FEW]
    best = sorted(names, key=lambda name: scores[name], reverse=way == "max")[:keep]
    expected = [(name, 1) for name in names] + [("draw", 1), ("first", 1)]
    for seed in (2, 3):
        expected += [(name, seed) for name in best]
        expected += [(decoding.name, seed) for decoding in TWO if decoding.of in best]
    assert fake.ran == expected
    assert not bench.left_out and not bench.failed and bench.rest() == 0
    rows = {row["name"]: row["seeds"] for row in result_of(bench, ABOUT)["methods"]}
    assert rows == {name: [1, 2, 3] if name in best else [1] for name in names}


def test_a_done_cell_is_not_run_again_and_other_options_are_another_cell(
    fake: Fake, tmp_path: Path
) -> None:
    compare(bench_of(tmp_path), silent)
    first = len(fake.ran)
    compare(bench_of(tmp_path), silent)
    assert len(fake.ran) == first
    compare(bench_of(tmp_path, common={"init": "base", "epochs": 4}), silent)
    assert len(fake.ran) == 2 * first
    assert not list(tmp_path.glob("runs/*/checkpoints"))  # final/ is enough


def test_a_failure_loses_one_cell_and_is_tried_again(fake: Fake, tmp_path: Path) -> None:
    fake.failing = {"a"}
    bench = bench_of(tmp_path, keep=3)
    compare(bench, silent)
    assert [(cell.name, why) for cell, why in bench.failed.items()] == [("a", "error: it broke")]
    # there is nothing of `a` to decode
    assert ("draw", 1) not in fake.ran and ("first", 1) in fake.ran
    assert ("a", 2) not in fake.ran and ("g", 1) in fake.ran
    result = result_of(bench, ABOUT)
    assert "a (1) failed: error: it broke" in text_of(result)
    assert "a" not in [row["name"] for row in result["methods"]]
    fake.failing, fake.ran = set(), []
    compare(bench_of(tmp_path, keep=3), silent)
    assert fake.ran[0] == ("a", 1)


@settings(max_examples=8, deadline=None)
@given(st.floats(0, 200), st.floats(1, 30))
def test_the_budget_is_kept_and_the_rest_is_named(
    tmp_path_factory: pytest.TempPathFactory, budget: float, seconds: float
) -> None:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        fake = install(patch, Fake(seconds=seconds))
        bench = bench_of(folder, until=fake.now + budget)
        compare(bench, silent)
        assert fake.now <= bench.until
        assert len(fake.ran) in (
            min(17, int(budget / seconds - 1e-6)),
            min(17, int(budget / seconds + 1e-6)),
        )
        left_out = {cell.label for cell in bench.left_out}
        assert set(result_of(bench, ABOUT)["left_out"]) == left_out
        assert all(label in text_of(result_of(bench, ABOUT)) for label in left_out)
        compare(bench_of(folder), silent)  # the same command without a limit makes all the others
        # 7 methods + 2 decodings, then twice 2 + 2
        assert len(fake.ran) == len(set(fake.ran)) == 17


# --- a search


SETTINGS = ((1.0, 3), (0.5, 3), (1.0, 1), (0.5, 1))
FITTED = Method("fitted", {"method": "z"}, rate=None)


@settings(max_examples=10, deadline=None)
@given(
    st.dictionaries(st.tuples(st.sampled_from("ab"), st.sampled_from(SETTINGS)), st.floats(0, 9))
)
def test_a_search_tries_each_method_alike_and_goes_on_with_the_best(
    tmp_path_factory: pytest.TempPathFactory, scores: dict[Any, float]
) -> None:
    def score(name: str, seed: int, lr: float, epochs: float) -> float:
        of_method = next((method.rate or 1 for method in FEW if method.name == name), 1)
        return scores.get((name, (lr / of_method / 0.5, epochs)), 0.0)

    with pytest.MonkeyPatch.context() as patch:
        fake = install(patch, Fake(score))
        bench = bench_of(
            tmp_path_factory.mktemp("bench"),
            methods=(*FEW[:2], FITTED),
            decodings=TWO[:1],
            search=SETTINGS,
            keep=1,
        )
        compare(bench, silent)
    tried = [
        (name, float(o.get("lr", 0)), float(o["epochs"]))
        for (name, seed), o in zip(fake.ran, fake.options)
        if seed == 1
    ]
    of_each = {
        name: [setting for other, *setting in tried if other == name]
        for name in ("a", "b", "fitted")
    }
    for method in FEW[:2]:
        assert of_each[method.name][:4] == [
            [0.5 * (method.rate or 0) * rate, epochs] for rate, epochs in SETTINGS
        ]
    assert len(of_each["fitted"]) == 1
    # all have their first trial first
    assert [name for name, *_ in tried[:5]] == ["a", "b", "fitted", "a", "b"]
    best = {name: max(scores.get((name, s), 0.0) for s in SETTINGS) for name in "ab"}
    winner = max("ab", key=lambda name: best[name])
    later = [o for (name, seed), o in zip(fake.ran, fake.options) if seed > 1 and name == winner]
    chosen = next(s for s in SETTINGS if scores.get((winner, s), 0.0) == best[winner])
    rate = {"a": 1, "b": 2}[winner]
    assert [(float(o["lr"]), float(o["epochs"])) for o in later] == [
        (0.5 * rate * chosen[0], chosen[1])
    ] * 2
    assert not {name for name, seed in fake.ran if seed > 1} - {winner, "draw"}
    result = result_of(bench, ABOUT)
    trials = [trial for trial in result["trials"] if trial["name"] == winner]
    assert [(t["rate"], t["epochs"]) for t in trials] == list(SETTINGS)
    assert [(t["rate"], t["epochs"]) for t in trials if t["chosen"]] == [chosen]
    row = next(row for row in result["methods"] if row["name"] == winner)
    assert row["metrics"]["chrf"]["mean"] == pytest.approx(best[winner]) and row["seeds"] == [
        1,
        2,
        3,
    ]


def test_a_search_and_a_comparison_share_the_run_that_both_want(fake: Fake, tmp_path: Path) -> None:
    compare(bench_of(tmp_path, seeds=(1,)), silent)
    ran = len(fake.ran)
    compare(bench_of(tmp_path, seeds=(1,), search=SETTINGS), silent)
    assert len(fake.ran) == ran + 3 * len(FEW)


def test_a_search_that_is_cut_off_says_what_it_lacks(fake: Fake, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, seeds=(1,), search=SETTINGS, until=fake.now + 95)
    compare(bench, silent)
    text = text_of(result_of(bench, ABOUT))
    assert "What the search tried" in text and "rate x 0.5, 3 epochs" in text
    assert "g, rate 3.5, 1 epoch (1)" in text.partition("left out for want of time")[2]
    done = sum(trial["score"] is not None for trial in result_of(bench, ABOUT)["trials"])
    assert done == sum(name in "abcdefg" for name, _ in fake.ran) < 4 * len(FEW)


def test_what_draws_nothing_has_one_seed_and_no_place_among_the_best(
    fake: Fake, tmp_path: Path
) -> None:
    fake.score = lambda name, seed, **options: 9.0 if name == "fitted" else 1.0
    bench = bench_of(tmp_path, methods=(FITTED, *FEW), keep=2)
    compare(bench, silent)
    rows = {row["name"]: row for row in result_of(bench, ABOUT)["methods"]}
    assert (
        rows["fitted"]["seeds"] == [1] and sum(len(row["seeds"]) == 3 for row in rows.values()) == 2
    )
    assert "--lr" not in rows["fitted"]["command"]


def test_only(fake: Fake, tmp_path: Path) -> None:
    compare(bench_of(tmp_path, only=("b", "first"), seeds=(1,)), silent)
    assert fake.ran == [("b", 1), ("first", 1)]
    fake.ran = []
    compare(bench_of(tmp_path, only=("draw",), seeds=(1,)), silent)
    assert fake.ran == []  # `a` has not been trained


def test_usual_time_is_that_of_the_same_method_else_of_its_like(fake: Fake, tmp_path: Path) -> None:
    bench = bench_of(tmp_path, keep=7, until=fake.now + 9 * 10 + 5)
    compare(bench, silent)
    again = bench.run_of(FEW[0], 2)
    assert bench.usual(again) == 10
    assert bench.usual(dataclasses.replace(again, name="new")) == 10
    assert 0 <= bench.rest() <= 5


@pytest.mark.parametrize(("running", "shown"), [("a", "abcd"), ("d", "bcde"), ("g", "defg")])
def test_the_live_table_shows_the_cells_around_the_one_that_runs(
    fake: Fake, tmp_path: Path, running: str, shown: str
) -> None:
    bench = bench_of(tmp_path, only=tuple("abcdefg"), seeds=(1,))
    bench.running = next(cell for cell in bench.cells() if cell.name == running)
    rows = list(bench_module.board(bench, height=10).columns[0].cells)
    assert [str(row)[0] for row in rows] == list(shown)
    assert str(bench_module.board(bench, height=100).title).startswith("0 of 7 runs")


# --- the command line of a cell


KINDS: dict[str, Any] = {"generation": GenerationConfig, "classification": ClassificationConfig}
BEST = {"generation": ["chrf", "max"], "classification": ["accuracy", "max"]}
GIVEN: dict[str, Any] = {
    "augment": "more.csv",
    "also": ("nli:0.5", "topics:1"),
    "words": ("bad", "good"),
}


def facts_of(family: str) -> dict[str, Any]:
    defaults = dataclasses.asdict(KINDS[family]()) | {"epochs": 3, "lr": 1e-4}
    answers = "predictions.txt" if family == "generation" else None
    return {"family": family, "best": BEST[family], "defaults": defaults, "answers": answers}


def real_bench(task: str = "sonnets", family: str = "generation", **options: Any) -> Bench:
    return make_bench(
        Options(task=task, init="runs/base", **options), facts_of(family), ABOUT["base"], math.inf
    )


def names_of(bench: Bench) -> list[str]:
    return [method.name for method in bench.methods if bench.wanted(method.name)]


ALL = [("generation", method.name) for method in real_bench().methods]
ALL += [("generation", decoding.name) for decoding in DECODINGS]
ALL += [
    ("classification", method.name)
    for method in real_bench("topics", "classification", **GIVEN).methods
]


@pytest.mark.parametrize(("family", "name"), ALL)
def test_every_cell_is_a_command_that_the_tasks_take(family: str, name: str) -> None:
    given = GIVEN if family == "classification" else {}
    extra = "--precision fp32" + (" --prompts x 'y z'" if family == "generation" else "")
    bench = real_bench("topics", family, data="a.txt", val_data="b.txt", extra=extra, **given)
    cells: list[Cell] = [bench.run_of(method, 5) for method in bench.methods if method.name == name]
    cells += [
        bench.decoding_of(decoding, 5) for decoding in bench.decodings if decoding.name == name
    ]
    (cell,) = cells
    cfg = parse(KINDS[family], cell.words)
    methods.check_method(cfg)
    cfg.check()
    if family == "classification":
        classification.check_classification(cfg)
    assert cfg.seed == 5 and cfg.epochs == 3 and cfg.precision == "fp32"
    assert cfg.prompts == (("x", "y z") if family == "generation" else ())
    assert cfg.data == "a.txt" and cfg.out and (cfg.init == "runs/base") == (name != "scratch")
    if name == "scratch":
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len, cfg.tokenizer) == (
            2,
            2,
            64,
            64,
            "runs/base",
        )
    if cell.kind == "decodings":
        trained = next(
            method
            for method in METHODS
            if method.name == ("prefix" if "prefix" in name else "full")
        )
        assert cfg.predict == "b.txt" and cfg.answers == str(cell.path)
        assert cfg.out == str(bench.run_of(trained, 5).path)


def test_every_method_is_a_run_of_its_own() -> None:
    """No two methods of a family differ in name alone."""
    for bench in (real_bench(), real_bench("topics", "classification", **GIVEN)):
        options = [
            {k: str(v) for k, v in bench.run_of(method, 1).options.items()}
            for method in bench.methods
        ]
        assert all(one != other for n, one in enumerate(options) for other in options[:n])
        assert len({method.name for method in bench.methods}) == len(bench.methods)


def test_each_family_and_task_has_its_methods() -> None:
    texts, pairs, topics = (
        names_of(real_bench(task, family))
        for task, family in (
            ("sonnets", "generation"),
            ("paraphrase", "classification"),
            ("topics", "classification"),
        )
    )
    assert "full+unlikelihood" in texts and not {
        "full+word",
        "tf-idf",
        "full+rdrop",
        "full+mean",
    } & {*texts}
    assert "full+unlikelihood" not in pairs and {
        "tf-idf",
        "full+word",
        "lora+prompt",
        "lora+llrd",
    } <= {*pairs}
    assert {*topics} - {*pairs} == {"naive-bayes", "lstm", "lstm-gpt2"}
    assert "naive-bayes" in names_of(
        real_bench("paraphrase", "classification", only="naive-bayes,full")
    )
    assert not {"full+augment", "full+also"} & {*pairs}
    given = real_bench("paraphrase", "classification", **GIVEN)
    options = {method.name: given.run_of(method, 1).options for method in given.methods}
    assert {name for name, of in options.items() if "augment" in of} == {"full+augment"}
    assert {name for name, of in options.items() if "also" in of} == {"full+also"}
    assert {name for name, of in options.items() if "words" in of} == {"full+word"}
    assert given.decodings == [] and given.predict is None


def test_rates_are_multiples_of_one() -> None:
    bench = real_bench(lr=2e-4)
    rates = {method.name: bench.run_of(method, 1).options["lr"] for method in bench.methods}
    assert rates["full"] == 2e-4 and rates["lora-attention-8"] == 2e-3
    labels = real_bench("sentiment", "classification", lr=2e-4)
    heads = {method.name: labels.run_of(method, 1).options.get("lr") for method in labels.methods}
    # a head is new, a base's last layer is not
    assert heads["last-layer"] > rates["last-layer"] > heads["full"] == 2e-4
    assert heads["tf-idf"] is None
    assert usual_rate(1e-4, 124_000_000) == 1e-4 < usual_rate(1e-4, 14_000_000) < 1e-3


def test_extra_options() -> None:
    assert extra_options("--a 1 --no-b --c x 'y z'") == {"a": "1", "no-b": True, "c": "x\0y z"}
    with pytest.raises(UserError, match="begins with no option"):
        extra_options("1 --a")
    with pytest.raises(UserError, match="--extra names --lr"):
        extra_options("--lr 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sonets"], "did you mean sonnets"),
        (["--budget-minutes", "0"], "--budget-minutes is 0"),
        (["--seeds", "1", "1"], "--seeds takes"),
        (["--search-rates", "0.5"], "belong to --search"),
        (["--search", "--search-rates", "0"], "--search-rates is 0.0; it must be at least"),
        (["--init", "no/such/folder", "--device", "cpu"], "no/such/folder"),
    ],
)
def test_bad_input(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["methods", *words])
    monkeypatch.setattr(bench_module, "elsewhere", lambda function, *args: function(*args))
    with pytest.raises(UserError, match=message) as error:
        bench_module.main()
    assert "\n" not in str(error.value)


def test_a_comparison_that_is_told_to_end_writes_what_it_has(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(words: Sequence[str], output: Path, until: float, grace: float = 0.0) -> None:
        if len(fake.ran) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        fake.execute(words[2:], output, until, grace)

    seen = {"of_task": facts_of("generation"), "base": ABOUT["base"], "machine": ABOUT["machine"]}
    monkeypatch.setattr(bench_module, "elsewhere", lambda *_: seen)
    monkeypatch.setattr(bench_module, "execute", stopped)
    monkeypatch.setattr(sys, "argv", ["methods", "--out", str(tmp_path), "--data", "a.txt"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            bench_module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.value.code == 143
    assert len(json.loads((tmp_path / "methods.json").read_text())["methods"]) == 2


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--only ful is not one of .*did you mean full"):
        real_bench(only="ful,prefix")
    with pytest.raises(UserError, match="--augment is for tasks with labels"):
        real_bench(augment="more.csv")


# --- figures


def test_figures_are_of_the_step_that_final_is_of(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0)
    figures = methods_cells.figures_of(tmp_path / "run")
    # step 4, not the last of metrics.json
    assert figures["metrics"] == {"val_loss": 2.4, "chrf": 40.0}
    assert (figures["lowest_val_loss"], figures["lowest_epoch"], figures["best_epoch"]) == (
        2.2,
        1.0,
        2.0,
    )
    assert figures["trained_parameters"] == 1000
    assert figures["warnings"] == ["two rows are cut"]
    # of steps, without the evaluations between them
    assert figures["seconds_to_best"] == 1 + 2 + 3 + 4
    of_half = [40.0, 34.0]  # steps 4 and 6: step 2 is of the first half
    assert figures["between_epochs"]["chrf"] == pytest.approx(statistics.stdev(of_half))


def test_a_run_that_ends_early_has_fewer_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0, steps=4, best_step=2)
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"epochs": 10, "lr": 0.5, "steps": 20})
    )
    figures = methods_cells.figures_of(tmp_path / "run")
    assert (figures["epochs"], figures["best_epoch"]) == (2, 1)
    assert figures["between_epochs"] == {}  # one evaluation in its second half


def test_what_takes_no_steps_has_no_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0, lr=None)
    figures = methods_cells.figures_of(tmp_path / "run")
    assert (
        figures["metrics"] == {"chrf": 40.0}
        and figures["seconds_to_best"] == figures["seconds"] == 30
    )
    assert not figures.keys() & {"lr", "epochs", "best_epoch", "lowest_val_loss"}


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_labels_of_two_runs_are_compared_row_by_row(
    tmp_path_factory: pytest.TempPathFactory, right: list[tuple[bool, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    for name, of_one in zip("ab", zip(*right)):
        (folder / name).mkdir()
        write_labels(folder / name, [n % 2 if yes else 1 - n % 2 for n, yes in enumerate(of_one)])
    test = methods_cells.compared(folder / "a", folder / "b")
    assert test is not None and test["rows"] == len(right)
    assert test["wins"] == sum(a and not b for a, b in right)
    assert test["losses"] == sum(b and not a for a, b in right)
    assert methods_cells.compared(folder / "a", folder / "c") is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_mean_and_spread(values: list[float]) -> None:
    cells = [
        {"seed": seed, "metrics": {"x": value}, "seconds": 1.0} for seed, value in enumerate(values)
    ]
    (row,) = rows_of(["m", "none"], {"m": cells}, {"m": "command"}, ("x", "max"))
    assert row["metrics"]["x"]["mean"] == statistics.fmean(values)
    if len(values) == 1:
        assert row["metrics"]["x"]["spread"] is None
    else:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert row["metrics"]["x"]["spread"] == pytest.approx(spread, abs=1e-6)


def test_a_figure_that_a_seed_lacks_is_none_of_the_rows() -> None:
    cells = [
        {"seed": 1, "metrics": {"x": 1.0, "y": 2.0}},
        {"seed": 2, "metrics": {"x": 1.0, "y": None}},
    ]
    assert list(rows_of(["m"], {"m": cells}, {"m": ""}, ("x", "max"))[0]["metrics"]) == ["x"]


@pytest.mark.parametrize(("way", "expected"), [("max", [0.2, 0.4]), ("min", [0.1, 0.3])])
def test_the_interval_is_of_the_best_seed(way: str, expected: list[float]) -> None:
    cells = [
        {"seed": seed, "metrics": {"x": x}, "intervals": {"x": [x / 10, x / 10 + 0.2]}}
        for seed, x in enumerate([1.0, 2.0])
    ]
    (row,) = rows_of(["m"], {"m": cells}, {"m": ""}, ("x", way))
    assert row["intervals"]["x"] == pytest.approx(expected)


# --- tables and chart


@pytest.fixture
def result(fake: Fake, tmp_path: Path) -> dict[str, Any]:
    """Of methods and decodings that have published figures beside them."""
    fake.score = lambda name, seed, **options: (
        {"scratch": 20.0, "full": 30.0, "prefix": 25.0}[name] + seed
    )
    named = [method for method in METHODS if method.name in ("scratch", "full", "prefix")]
    ways = [decoding for decoding in DECODINGS if decoding.name in ("beam", "greedy")]
    bench = bench_of(tmp_path, methods=named, decodings=ways, keep=1)
    compare(bench, silent)
    return json.loads(json.dumps(result_of(bench, ABOUT)))


def test_the_tables(result: dict[str, Any]) -> None:
    text = text_of(result)
    for part in (
        "**32 ± 1**",
        " 21 ",
        "25.00%",
        "1,234,567 tokens",
        "validation loss of 4.500",
        "books: 99 tokens",
        "train.txt",
        "a CPU, 2 threads",
        "python -m benchmarks.methods --task sonnets",
        "1.00 GiB",
        "published of GPT-2 124M",
        "55.73",
        "33.44",
        "chose that epoch and are scored here as well",
    ):
        assert part in text, part
    assert f"{math.exp(2.2):.4g} (epoch 1)" in text
    assert "published" not in text_of(result | {"task": "lyrics"})
    widths = [len(line) for line in text.splitlines() if line.startswith("| full ")]
    assert len(widths) == 3  # quality, cost, published


SOME = ("naive-bayes", "tf-idf", "full", "full+word", "last-2", "lora+prompt")


@pytest.fixture
def of_labels(fake: Fake, tmp_path: Path) -> dict[str, Any]:
    """Of some methods of a classifier, searched."""
    fake.score = lambda name, seed, lr, epochs: len(name) / 40 + seed / 100
    fake.labels = lambda name: (
        [0, 1, 0, 1] * 5
        if name == "full"
        else [0, 1, 0, 0] * 5
        if name == "tf-idf"
        else [1, 0] * 10
    )
    bench = real_bench(
        "topics",
        "classification",
        data="news.csv",
        search=True,
        out=str(tmp_path),
        only=",".join(SOME),
        seeds=(1, 2),
        best=1,
    )
    bench = dataclasses.replace(bench, best=("chrf", "max"), program=("task",))
    compare(bench, silent)
    return json.loads(
        json.dumps(result_of(bench, ABOUT | {"task": "topics", "family": "classification"}))
    )


def test_tables_of_labels(of_labels: dict[str, Any]) -> None:
    text = text_of(
        of_labels | {"best": ["accuracy", "max"]} | {"methods": as_accuracies(of_labels["methods"])}
    )
    lines = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")]
        for line in text.splitlines()[::-1]
        if "|" in line
    }
    head, tf_idf = lines["method"], lines["tf-idf"]
    assert head[2:5] == ["accuracy", "95% of rows", "p against full"]
    assert tf_idf[2:5] == ["0.16", "0.500 to 0.900", "0.062"]  # 0 wins, 5 losses: 2 / 2**5
    assert lines["full"][4] == "" and lines["last-2"][4] == "<0.0001"
    assert "perplexity" not in text and "McNemar" in text
    searched = text.partition("What the search tried")[2]
    assert searched.count("**") == 2 * sum(
        row["name"] not in ("tf-idf", "naive-bayes") for row in of_labels["methods"]
    )


def as_accuracies(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The rows of a stub that knows chrF alone, as those of a classifier."""
    return [
        row
        | {group: {"accuracy": row[group]["chrf"]} for group in ("metrics", "intervals")}
        | {"between_epochs": {}}
        for row in rows
    ]


@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        ("sentiment", "x/ids-sst-train.csv", 0.518),
        ("sentiment", "x/ids-CFIMDB-train.csv", 0.988),
        ("sentiment", "x/nsmc_train.txt", None),
        ("sentiment", "sst/reviews.csv", None),  # the name of the file, not of its folder
        ("paraphrase", "quora-train.csv", 0.8919),
        ("paraphrase", "mrpc_train.tsv", None),
    ],
)
def test_published_figures_stand_beside_the_same_rows(
    of_labels: dict[str, Any], task: str, data: str, expected: float | None
) -> None:
    of = of_labels | {
        "task": task,
        "data": [data, "dev"],
        "methods": as_accuracies(of_labels["methods"]),
    }
    text = text_of(of | {"best": ["accuracy", "max"]})
    assert ("published" in text) == (expected is not None)
    if expected:
        assert f" {expected} " in text


def test_published_figures_are_of_methods_that_there_are() -> None:
    names = {method.name for method in METHODS} | {decoding.name for decoding in DECODINGS}
    assert {name for of in PUBLISHED.values() for name in of} <= names


def test_the_chart(result: dict[str, Any], of_labels: dict[str, Any], tmp_path: Path) -> None:
    of_labels = of_labels | {
        "best": ["accuracy", "max"],
        "methods": as_accuracies(of_labels["methods"]),
    }
    cases = {
        "all": result,
        "methods": result | {"decodings": []},
        "none": result | {"methods": []},
        "labels": of_labels,
    }
    for name, of in cases.items():
        draw(of, tmp_path / f"{name}.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG") and not (
        tmp_path / "none.png"
    ).exists()
    assert (
        (tmp_path / "all.png").stat().st_size > (tmp_path / "methods.png").stat().st_size > 10_000
    )
    # a row for each of many
    assert (tmp_path / "labels.png").stat().st_size > (tmp_path / "methods.png").stat().st_size


# --- all of it


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    text = ["the snow lies deep upon the hill and waits all morning for the sun"] * 20
    tokenizer = train_bpe(text, 280, tmp_path / "base")
    model = GPT(GPTConfig(vocab_size=280, block_size=256, n_layer=1, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path / "base", eot=tokenizer.eot)
    return tmp_path / "base"


def test_from_a_base_to_the_tables(run, base: Path, tmp_path: Path) -> None:
    words = [
        "--task",
        "sonnets",
        "--init",
        "base",
        "--out",
        "out",
        "--epochs",
        "1",
        "--seeds",
        "3",
        "--device",
        "cpu",
    ]
    words += ["--only", "full,beam", "--extra=--max-new-tokens 8 --eval-rows 1"]
    done = run("-m", "benchmarks.methods", *words, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "methods.json").read_text())
    (full,), (beam,) = result["methods"], result["decodings"]
    assert full["name"] == "full" and full["seeds"] == [3] and full["metrics"]["chrf"]["mean"] >= 0
    assert (
        full["trained_parameters"] == full["parameters"]
        and beam["metrics"]["chrf_poem"]["mean"] > 0
    )
    assert (
        done.stdout.startswith("# sonnets: methods compared")
        and (tmp_path / "out" / "methods.png").exists()
    )
    assert "full (3)" in done.stderr


def test_classifiers_from_a_base_to_the_tables(run, base: Path, tmp_path: Path) -> None:
    words = [
        "--task",
        "sentiment",
        "--init",
        "base",
        "--out",
        "out",
        "--epochs",
        "1",
        "--seeds",
        "3",
        "--device",
        "cpu",
    ]
    words += ["--only", "full,tf-idf", "--search", "--search-rates", "1", "2", "--batch-size", "4"]
    done = run("-m", "benchmarks.methods", *words, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "methods.json").read_text())
    rows = {row["name"]: row for row in result["methods"]}
    assert rows.keys() == {"tf-idf", "full"} and not result["failed"]
    for row in rows.values():
        low, high = row["intervals"]["accuracy"]
        assert low <= row["metrics"]["accuracy"]["mean"] <= high
    assert (
        rows["full"]["rows_per_second"]["mean"] > 0 and rows["full"]["seconds_to_best"]["mean"] > 0
    )
    assert rows["tf-idf"]["against_full"]["rows"] == 8
    assert [(trial["rate"], trial["score"] is not None) for trial in result["trials"]] == [
        (1, True),
        (2, True),
    ]
    assert "p against full" in done.stdout and (tmp_path / "out" / "methods.png").exists()
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoints"))
