"""benchmarks.methods: which cells run and in which order, the budget, resuming, failures, figures,
tables and the chart. And one real run."""

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
from base.cli import parse
from base.commands import Failed, TimeUp
from benchmarks import methods_cells, store
from benchmarks.methods import DECODINGS, METHODS, Options, make_bench, result_of
from benchmarks.methods_cells import Bench, Decoding, Method, extra_options, measured, usual_rate
from benchmarks.methods_report import PUBLISHED, published, rows_of, text_of
from benchmarks.store import Store
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
    """A fake of `execute` and of the clock. A run takes its seconds, writes the files of a real
    run, and is recorded."""

    def __init__(
        self, score: Callable[..., float] = lambda name, seed, **options: 1.0, seconds: float = 10.0
    ):
        self.score, self.seconds = score, seconds
        self.now = 1000.0
        self.ran: list[tuple[str, int]] = []
        self.options: list[dict[str, str]] = []  # the options of each run
        self.failing: set[str] = set()

    def monotonic(self) -> float:
        return self.now

    def execute(self, words: Sequence[str], output: Path, until: float, **more: Any) -> None:
        if self.now + self.seconds > until:
            self.now = until
            raise TimeUp
        self.now += self.seconds
        options = dict(zip(words[3::2], words[4::2]))  # past python -m finetune.TASK
        path = Path(options.get("--answers") or options["--out"])
        name, seed = path.name.rpartition("-")[0].rpartition("-")[0], int(options["--seed"])
        self.ran.append((name, seed))
        self.options.append(
            {name.removeprefix("--").replace("-", "_"): value for name, value in options.items()}
        )
        if name in self.failing:
            raise Failed("error: it broke", 1)
        if "--answers" in options:
            path.with_suffix(".scores.json").write_text(json.dumps({"chrf": 3.0, "seconds": 1.5}))
            return
        tried = {name: float(self.options[-1].get(name, 0)) for name in ("lr", "epochs")}
        write_run(path, self.score(name, seed, **tried), lr=options.get("--lr"))


def write_run(
    folder: Path, score: float, steps: int = 6, best_step: int = 4, lr: Any = 0.5
) -> None:
    """Write the files of a run of three epochs. `score` is that of the step whose model is final/;
    other steps have less. Without a rate, write the files of a model that takes no steps."""
    (folder / "checkpoints").mkdir(parents=True)
    config = {"epochs": 3, "lr": lr, "steps": steps if lr else None}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = []
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
    """Write a classifier's predictions for validation rows whose true labels are 0, 1, 0, ...,
    written as 0.0, 1.0, ..."""
    rows = [
        {"label": f"{n % 2}.0", "prediction": str(label), "probabilities": {"0": 0.5, "1": 0.5}}
        for n, label in enumerate(predicted)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def bench_of(
    folder: Path,
    until: float = math.inf,
    way: str = "max",
    methods: Sequence[Method] = FEW,
    decodings: Sequence[Decoding] = TWO,
    **options: Any,
) -> Bench:
    given: dict[str, Any] = {"init": "base", "val_data": "val.txt", "lr": 0.5, "best": 2}
    given |= {"seeds": (1, 2, 3), "epochs": 3, "out": str(folder)} | options
    task = {"best": ("chrf", way), "answers": "predictions.txt", "defaults": {}}
    store = Store(measured, until)
    return Bench(Options(**given), task, ABOUT["base"], store, methods, decodings)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch, Fake())


def install(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    monkeypatch.setattr(store, "execute", fake.execute)
    monkeypatch.setattr(store, "time", SimpleNamespace(monotonic=fake.monotonic))
    return fake


def run_all(bench: Bench) -> None:
    bench.store.run(bench.cells, bench.show, lambda: None)


# --- the cells


@pytest.mark.parametrize(("way", "best"), [("max", ["f", "c"]), ("min", ["d", "a"])])
def test_one_seed_for_all_then_more_for_the_best(
    fake: Fake, tmp_path: Path, way: str, best: list[str]
) -> None:
    fake.score = lambda name, seed, **tried: "daebgcf".index(name) + seed / 10
    bench = bench_of(tmp_path, way=way)
    run_all(bench)
    names = [method.name for method in FEW]
    expected = [(name, 1) for name in names] + [("draw", 1), ("first", 1)]
    for seed in (2, 3):
        expected += [(name, seed) for name in best]
        expected += [(decoding.name, seed) for decoding in TWO if decoding.of in best]
    assert fake.ran == expected
    store = bench.store
    assert not store.left_out and not store.failed and store.rest(bench.cells()) == 0
    rows = {row["name"]: row["seeds"] for row in result_of(bench, ABOUT)["methods"]}
    assert rows == {name: [1, 2, 3] if name in best else [1] for name in names}


def test_a_done_cell_is_kept_and_other_options_make_another(fake: Fake, tmp_path: Path) -> None:
    run_all(bench_of(tmp_path))
    first = len(fake.ran)
    run_all(bench_of(tmp_path))
    assert len(fake.ran) == first
    run_all(bench_of(tmp_path, epochs=4))
    assert len(fake.ran) == 2 * first
    assert not list(tmp_path.glob("runs/*/checkpoints"))  # deleted: final/ is enough


def test_a_failure_loses_one_cell_and_is_named(fake: Fake, tmp_path: Path) -> None:
    fake.failing = {"a"}
    bench = bench_of(tmp_path, best=3)
    run_all(bench)
    assert [cell.name for cell in bench.store.failed] == ["a"]
    # `a` has no weights to decode with
    assert ("draw", 1) not in fake.ran and ("first", 1) in fake.ran
    assert ("a", 2) not in fake.ran and ("g", 1) in fake.ran
    result = result_of(bench, ABOUT)
    assert "a (1) failed: error: it broke" in text_of(result)
    assert "a" not in [row["name"] for row in result["methods"]]


@settings(max_examples=4, deadline=None)
@given(st.floats(0, 200))
def test_the_budget_is_kept_and_the_rest_is_named(
    tmp_path_factory: pytest.TempPathFactory, budget: float
) -> None:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        fake = install(patch, Fake())
        bench = bench_of(folder, until=fake.now + budget)
        run_all(bench)
        assert fake.now <= bench.store.until and len(fake.ran) == min(17, int(budget / 10))
        left_out = {cell.label for cell in bench.store.left_out}
        assert set(result_of(bench, ABOUT)["left_out"]) == left_out
        assert all(label in text_of(result_of(bench, ABOUT)) for label in left_out)
        run_all(bench_of(folder))  # the command without a limit runs all others
        # 7 methods + 2 decodings, then twice 2 + 2
        assert len(fake.ran) == len(set(fake.ran)) == 17


# --- a search


SETTINGS = ((1.0, 3), (0.5, 3), (1.0, 1), (0.5, 1))
SEARCH: dict[str, Any] = {"search": True, "search_rates": (1.0, 0.5), "search_epochs": (3, 1)}
FITTED = Method("fitted", {"method": "z"}, rate=None)


@pytest.mark.parametrize("best", SETTINGS)
def test_a_search_tries_all_methods_equally_and_keeps_the_best(
    fake: Fake, tmp_path: Path, best: tuple[float, int]
) -> None:
    rate, epochs = best  # of b, the second method, which has twice the rate of a
    fake.score = lambda name, seed, **tried: float(
        name == "b" and tried == {"lr": rate * 2 * 0.5, "epochs": epochs}
    )
    methods = (*FEW[:2], FITTED)
    bench = bench_of(tmp_path, methods=methods, decodings=(), **SEARCH, best=1)
    run_all(bench)
    # first trials come first; a method without randomness has one trial
    names = ["a", "b", "fitted", *"ab" * 3]
    assert fake.ran == [*((name, 1) for name in names), ("b", 2), ("b", 3)]
    settings = [(float(o.get("lr", 0)), float(o["epochs"])) for o in fake.options]
    for of_one, name in ((0.5, "a"), (1.0, "b")):
        tried = [s for (other, seed), s in zip(fake.ran, settings) if (other, seed) == (name, 1)]
        assert tried == [(of_one * r, n) for r, n in SETTINGS]
    assert settings[-2:] == [(rate * 2 * 0.5, epochs)] * 2
    result = result_of(bench, ABOUT)
    trials = [trial for trial in result["trials"] if trial["name"] == "b"]
    assert [(t["rate"], t["epochs"]) for t in trials] == list(SETTINGS)
    assert [(t["rate"], t["epochs"]) for t in trials if t["chosen"]] == [best]
    (row,) = [row for row in result["methods"] if row["name"] == "b"]
    assert row["metrics"]["chrf"]["mean"] == 1 and row["seeds"] == [1, 2, 3]


def test_a_search_and_a_comparison_share_the_run_that_both_want(fake: Fake, tmp_path: Path) -> None:
    run_all(bench_of(tmp_path, seeds=(1,)))
    ran = len(fake.ran)
    run_all(bench_of(tmp_path, seeds=(1,), **SEARCH))
    assert len(fake.ran) == ran + 3 * len(FEW)


def test_a_method_without_randomness_runs_with_one_seed(fake: Fake, tmp_path: Path) -> None:
    fake.score = lambda name, seed, **options: 9.0 if name == "fitted" else 1.0
    bench = bench_of(tmp_path, methods=(FITTED, *FEW), best=2)
    run_all(bench)
    rows = {row["name"]: row for row in result_of(bench, ABOUT)["methods"]}
    assert (
        rows["fitted"]["seeds"] == [1] and sum(len(row["seeds"]) == 3 for row in rows.values()) == 2
    )
    assert "--lr" not in rows["fitted"]["command"]


def test_only_named_methods_and_decodings_run(fake: Fake, tmp_path: Path) -> None:
    run_all(bench_of(tmp_path, only="b,first", seeds=(1,)))
    assert fake.ran == [("b", 1), ("first", 1)]
    fake.ran = []
    run_all(bench_of(tmp_path, only="draw", seeds=(1,)))
    assert fake.ran == []  # `a` has not been trained


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
    return [method.name for method in bench.methods if method.name in bench.names]


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
    cells = [bench.run_of(method, 5) for method in bench.methods]
    cells += [bench.decoding_of(decoding, 5) for decoding in bench.decodings]
    (cell,) = [cell for cell in cells if cell.name == name]
    cfg = parse(KINDS[family], cell.words[3:])  # past python -m finetune.TASK
    methods.check_method(cfg)
    cfg.check()
    if family == "classification":
        classification.check_classification(cfg)
    assert cfg.seed == 5 and cfg.epochs == 3 and cfg.precision == "fp32"
    assert cfg.prompts == (("x", "y z") if family == "generation" else ())
    assert cfg.data == "a.txt" and cfg.out and (cfg.init == "runs/base") == (name != "scratch")
    if name == "scratch":
        shape = cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len
        assert (*shape, cfg.tokenizer) == (2, 2, 64, 64, "runs/base")
    if "--answers" in cell.words:
        of = "prefix" if "prefix" in name else "full"
        trained = next(method for method in bench.methods if method.name == of)
        assert cfg.predict == "b.txt" and cfg.answers == str(cell.path)
        assert cfg.out == str(bench.run_of(trained, 5).path)


def test_every_method_is_a_run_of_its_own() -> None:
    """Two methods of a family differ in their options, not only in their names."""
    for bench in (real_bench(), real_bench("topics", "classification", **GIVEN)):
        options = [
            {k: str(v) for k, v in bench.options_of(method, 1).items()} for method in bench.methods
        ]
        assert all(one != other for n, one in enumerate(options) for other in options[:n])
        assert len({method.name for method in bench.methods}) == len(bench.methods)


def test_each_family_and_task_has_its_methods() -> None:
    texts, pairs, topics = (
        {*names_of(real_bench(task, family))}
        for task, family in (
            ("sonnets", "generation"),
            ("paraphrase", "classification"),
            ("topics", "classification"),
        )
    )
    assert texts & {"full+unlikelihood", "full+word", "tf-idf", "full+rdrop"} == {
        "full+unlikelihood"
    }
    assert {"tf-idf", "full+word", "lora+prompt", "lora+llrd"} <= pairs - texts
    assert topics - pairs == {"naive-bayes", "lstm", "lstm-gpt2"}
    asked = real_bench("paraphrase", "classification", only="naive-bayes,full")
    assert names_of(asked) == ["naive-bayes", "full"]
    given = real_bench("paraphrase", "classification", **GIVEN)
    options = {method.name: given.options_of(method, 1) for method in given.methods}
    for option, method in (("augment", "full+augment"), ("also", "full+also")):
        assert {name for name, of in options.items() if option in of} == {method} - pairs
    assert {name for name, of in options.items() if "words" in of} == {"full+word"}
    assert given.decodings == [] and given.predict is None


def test_rates_are_multiples_of_one() -> None:
    bench = real_bench(lr=2e-4)
    rates = {method.name: bench.options_of(method, 1)["lr"] for method in bench.methods}
    assert rates["full"] == 2e-4 and rates["lora-attention-8"] == 2e-3
    labels = real_bench("sentiment", "classification", lr=2e-4)
    heads = {method.name: labels.options_of(method, 1).get("lr") for method in labels.methods}
    # a classifier's head is new, the base's last layer is not
    assert heads["last-layer"] > rates["last-layer"] > heads["full"] == 2e-4
    assert heads["tf-idf"] is None
    assert usual_rate(1e-4, 124_000_000) == 1e-4 < usual_rate(1e-4, 14_000_000) < 1e-3


def test_extra_options() -> None:
    assert extra_options("--a 1 --no-b --c x 'y z'") == {"a": "1", "no-b": True, "c": "x\0y z"}
    with pytest.raises(UserError, match="does not begin with an option"):
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
    monkeypatch.setattr(bench_module, "in_own_process", lambda function, *args: function(*args))
    with pytest.raises(UserError, match=message) as error:
        bench_module.main()
    assert "\n" not in str(error.value)


def test_a_terminated_comparison_writes_its_results(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(words: Sequence[str], output: Path, until: float, **more: Any) -> None:
        if len(fake.ran) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        fake.execute(words, output, until)

    seen = {"of_task": facts_of("generation"), "base": ABOUT["base"], "machine": ABOUT["machine"]}
    monkeypatch.setattr(bench_module, "in_own_process", lambda *_: seen)
    monkeypatch.setattr(store, "execute", stopped)
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


def test_figures_are_those_of_the_step_of_final(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0)
    figures = methods_cells.figures_of(tmp_path / "run")
    # those of step 4, not of the last step
    assert figures["metrics"] == {"val_loss": 2.4, "chrf": 40.0}
    assert (figures["lowest_val_loss"], figures["lowest_epoch"], figures["best_epoch"]) == (
        2.2,
        1.0,
        2.0,
    )
    assert figures["trained_parameters"] == 1000
    # the time of steps, without evaluations
    assert figures["seconds_to_best"] == 1 + 2 + 3 + 4
    of_half = [40.0, 34.0]  # steps 4 and 6, because step 2 is in the first half
    assert figures["between_epochs"]["chrf"] == pytest.approx(statistics.stdev(of_half))


def test_a_run_that_ends_early_has_fewer_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0, steps=4, best_step=2)
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"epochs": 10, "lr": 0.5, "steps": 20})
    )
    figures = methods_cells.figures_of(tmp_path / "run")
    assert (figures["epochs"], figures["best_epoch"]) == (2, 1)
    assert figures["between_epochs"] == {}  # its second half has only one evaluation


def test_a_method_without_steps_has_no_epochs(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0, lr=None)
    figures = methods_cells.figures_of(tmp_path / "run")
    assert (
        figures["metrics"] == {"chrf": 40.0}
        and figures["seconds_to_best"] == figures["seconds"] == 30
    )
    assert not figures.keys() & {"lr", "epochs", "best_epoch", "lowest_val_loss"}


def test_labels_of_two_runs_are_compared_by_row(tmp_path: Path) -> None:
    right = [(True, True), (True, False), (True, False), (False, True), (False, False)]
    for name, of_one in zip("ab", zip(*right)):
        (tmp_path / name).mkdir()
        write_labels(tmp_path / name, [n % 2 if yes else 1 - n % 2 for n, yes in enumerate(of_one)])
    test = methods_cells.compared(tmp_path / "a", tmp_path / "b")
    assert test and (test["rows"], test["wins"], test["losses"]) == (5, 2, 1)
    assert methods_cells.compared(tmp_path / "a", tmp_path / "c") is None


def test_figures_of_seeds_are_means_and_spreads() -> None:
    def cell(x: float, y: float | None) -> dict[str, Any]:
        of_rows = {"x": [x / 10, x / 10 + 0.2]}
        metrics = {"x": x, "y": y}
        return {"command": "c", "metrics": metrics, "intervals": of_rows}

    cells = {1: cell(1.0, 2.0), 2: cell(2.0, None)}
    (row,) = rows_of(["m", "none"], {"m": cells}, ("x", "max"))
    # the row has no y, because a seed lacks it
    assert row["metrics"] == {"x": {"mean": 1.5, "spread": pytest.approx(0.5**0.5)}}
    assert row["intervals"]["x"] == pytest.approx([0.2, 0.4])  # those of the best seed
    (row,) = rows_of(["m"], {"m": cells}, ("x", "min"))
    assert row["intervals"]["x"] == pytest.approx([0.1, 0.3])
    (row,) = rows_of(["m"], {"m": {1: cells[1]}}, ("x", "max"))
    assert row["metrics"]["x"] == {"mean": 1.0, "spread": None}


@pytest.mark.parametrize(
    ("task", "data", "expected"),
    [
        ("sentiment", "x/ids-sst-train.csv", 0.518),
        ("sentiment", "x/ids-CFIMDB-train.csv", 0.988),
        ("sentiment", "sst/reviews.csv", None),  # the file's name counts, not its folder's
        ("paraphrase", "quora-train.csv", 0.8919),
        ("paraphrase", "mrpc_train.tsv", None),
    ],
)
def test_published_figures_stand_beside_the_same_rows(
    task: str, data: str, expected: float | None
) -> None:
    beside = published({"task": task, "data": [data, "dev"]}).get("accuracy", {})
    assert beside.get("full") == expected


def test_published_figures_belong_to_existing_methods() -> None:
    names = {each.name for each in (*METHODS, *DECODINGS)}
    assert {name for of in PUBLISHED.values() for metric in of.values() for name in metric} <= names


# --- a whole comparison


OPTIONS = "--init base --out out --epochs 1 --seeds 3 --device cpu"
WHOLE = ("-m", "benchmarks.methods", *OPTIONS.split())
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    text = ["the snow lies deep upon the hill and waits all morning for the sun"] * 20
    tokenizer = train_bpe(text, 280, tmp_path / "base")
    model = GPT(GPTConfig(vocab_size=280, block_size=256, n_layer=1, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path / "base", eot=tokenizer.eot)
    return tmp_path / "base"


def test_from_a_base_to_the_tables(run, base: Path, tmp_path: Path) -> None:
    extra = "--extra=--max-new-tokens 8 --eval-rows 1"
    done = run(*WHOLE, "--task", "sonnets", "--only", "full,beam", extra, env=ONE_THREAD)
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
    words = "--task sentiment --only full,tf-idf --search --search-rates 1 2 --batch-size 4"
    done = run(*WHOLE, *words.split(), env=ONE_THREAD)
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
