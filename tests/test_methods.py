"""benchmarks.methods: what is run and in which order, budget, resume, failures, figures, tables, chart; one real run."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import adapters
import benchmarks.methods as bench_module
import benchmarks.methods_cells as cells_module
from benchmarks.methods import Options, compare, execute, extra_options, make_bench, result_of, usual_rate
from benchmarks.methods_cells import DECODINGS, METHODS, Bench, Cell, Decoding, Method
from benchmarks.methods_chart import draw
from benchmarks.methods_report import rows_of, text_of
from benchmarks.stages_run import Failed, TimeUp
from cli import parse
from config import GenerationConfig, UserError
from config import check as check_config
from model import GPT, GPTConfig
from tokenizer import train_bpe

FEW = tuple(Method(name, {"method": name}, rate=1 + number) for number, name in enumerate("abcdefg"))
TWO = (Decoding("draw", {"decode": "sample"}, of="a"), Decoding("first", {"decode": "greedy"}, of="b"))
ABOUT: dict[str, Any] = {
    "task": "sonnets",
    "base": {"init": "runs/base", "folder": "runs/base/final", "parameters": 4321, "n_layer": 2, "n_head": 2,
             "n_embd": 64, "block_size": 64, "vocab_size": 300, "card": {"data": "books: 99 tokens"},
             "results": {"tokens": 1234567, "val_loss": 4.5}},
    "machine": {"device": "cpu", "hardware": {"cpu": "a CPU", "threads": 2, "gpu": None}, "versions": {"torch": "2"}},
    "data": ["train.txt", "val.txt"], "command": "python -m benchmarks.methods --task sonnets",
}  # fmt: skip


class Fake:
    """Stands for `execute` and the clock: a run takes its seconds, writes what the loop writes, and is remembered."""

    def __init__(self, score: Callable[[str, int], float] = lambda name, seed: 1.0, seconds: float = 10.0):
        self.score, self.seconds = score, seconds
        self.now = 1000.0
        self.ran: list[tuple[str, int]] = []
        self.failing: set[str] = set()

    def monotonic(self) -> float:
        return self.now

    def execute(self, words: Sequence[str], output: Path, until: float) -> None:
        if self.now + self.seconds > until:
            self.now = until
            raise TimeUp
        self.now += self.seconds
        options = dict(zip(words[1::2], words[2::2]))
        path = Path(options.get("--answers") or options["--out"])
        name, seed = path.name.split("-")[0], int(options["--seed"])
        self.ran.append((name, seed))
        if name in self.failing:
            raise Failed("error: it broke")
        if "--answers" in options:
            path.with_suffix(".scores.json").write_text(json.dumps({"chrf": 3.0, "seconds": 1.5}))
        else:
            write_run(path, self.score(name, seed))


def write_run(folder: Path, score: float, steps: int = 6, best_step: int = 4) -> None:
    """What a run of three epochs leaves; `score` is of the step whose model is final/, other steps have less."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"epochs": 3, "lr": 0.5, "steps": steps}))
    lines: list[dict[str, Any]] = [{"kind": "warning", "text": "two rows are cut"}]
    for step in range(2, steps + 1, 2):
        lines.append({"kind": "train", "step": step, "loss": 1.0})
        of_step = {"val_loss": 2.0 + step / 10, "chrf": score if step == best_step else score - step, "seconds": 9.0}
        lines.append({"kind": "eval", "step": step, "time": 0.0, **of_step})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = {"steps": steps, "seconds": 30.0, "final_is_step": best_step, "memory_bytes": 2**30, "parameters": 4000}
    (folder / "metrics.json").write_text(json.dumps(results | {"trained_parameters": 1000, "chrf": -99.0}))


def bench_of(folder: Path, **changes: Any) -> Bench:
    bench = Bench(
        folder, ("task",), ("chrf", "max"), 0.5, {"init": "base", "epochs": 3}, {"n-layer": 2}, "val.txt",
        methods=FEW, decodings=TWO, seeds=(1, 2, 3), keep=2,
    )  # fmt: skip
    return dataclasses.replace(bench, **changes)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return install(monkeypatch, Fake())


def install(monkeypatch: pytest.MonkeyPatch, fake: Fake) -> Fake:
    cells_module.figures_of.cache_clear()
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
        fake = install(patch, Fake(lambda name, seed: scores[name] + seed / 10))
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


def test_a_done_cell_is_not_run_again_and_other_options_are_another_cell(fake: Fake, tmp_path: Path) -> None:
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
    assert ("draw", 1) not in fake.ran and ("first", 1) in fake.ran  # there is nothing of `a` to decode
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
        assert len(fake.ran) in (min(17, int(budget / seconds - 1e-6)), min(17, int(budget / seconds + 1e-6)))
        left_out = {cell.label for cell in bench.left_out}
        assert set(result_of(bench, ABOUT)["left_out"]) == left_out
        assert all(label in text_of(result_of(bench, ABOUT)) for label in left_out)
        compare(bench_of(folder), silent)  # the same command without a limit makes all the others
        assert len(fake.ran) == len(set(fake.ran)) == 17  # 7 methods + 2 decodings, then twice 2 + 2


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


# --- a process


def stub(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "stub.py").write_text(text)
    return [sys.executable, "-S", str(tmp_path / "stub.py")]


def test_a_process_that_fails_leaves_its_last_line(tmp_path: Path) -> None:
    words = stub(tmp_path, "import sys; print('hello'); print('error: no such file', file=sys.stderr); sys.exit(2)")
    with pytest.raises(Failed, match=r"^error: no such file$"):
        execute(words, tmp_path / "out.txt", math.inf)


def test_at_the_end_of_the_budget_a_run_may_save(tmp_path: Path) -> None:
    words = stub(
        tmp_path,
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n    pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\npathlib.Path(sys.argv[1], 'ready').touch()\ntime.sleep(60)\n",
    )
    began = time.monotonic()
    with pytest.raises(TimeUp):
        execute([*words, str(tmp_path)], tmp_path / "out.txt", began + 2)
    assert (tmp_path / "ready").exists() and (tmp_path / "saved").exists()
    assert time.monotonic() - began < 20


# --- the command line of a cell


def real_bench(**options: Any) -> Bench:
    defaults = dataclasses.asdict(GenerationConfig()) | {"epochs": 3, "lr": 1e-4}
    task = {"best": ["chrf", "max"], "defaults": defaults, "answers": "predictions.txt"}
    return make_bench(Options(init="runs/base", **options), task, ABOUT["base"], math.inf)


@pytest.mark.parametrize("name", [method.name for method in METHODS] + [decoding.name for decoding in DECODINGS])
def test_every_cell_is_a_command_that_the_tasks_take(name: str) -> None:
    bench = real_bench(data="a.txt", val_data="b.txt", extra="--precision fp32 --prompts x 'y z'")
    cells: list[Cell] = [bench.run_of(method, 5) for method in bench.methods if method.name == name]
    cells += [bench.decoding_of(decoding, 5) for decoding in bench.decodings if decoding.name == name]
    cfg = parse(GenerationConfig, cells[0].words)
    adapters.check(cfg)
    check_config(cfg)
    assert cfg.seed == 5 and cfg.epochs == 3 and cfg.precision == "fp32" and cfg.prompts == ("x", "y z")
    assert cfg.data == "a.txt" and cfg.out and (cfg.init == "runs/base") == (name != "scratch")
    if name == "scratch":
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.seq_len, cfg.tokenizer) == (2, 2, 64, 64, "runs/base")
    if cells[0].kind == "decodings":
        trained = next(method for method in METHODS if method.name == ("prefix" if "prefix" in name else "full"))
        assert cfg.predict == "b.txt" and cfg.answers == str(cells[0].path)
        assert cfg.out == str(bench.run_of(trained, 5).path)


def test_rates_are_multiples_of_one() -> None:
    bench = real_bench(lr=2e-4)
    assert {m.name: bench.run_of(m, 1).options["lr"] for m in METHODS}["lora-attention-8"] == 2e-3
    assert bench.run_of(METHODS[1], 1).options["lr"] == 2e-4
    assert usual_rate(1e-4, 124_000_000) == 1e-4 < usual_rate(1e-4, 14_000_000) < 1e-3


def test_extra_options() -> None:
    assert extra_options("--a 1 --no-b --c x 'y z'") == {"a": "1", "no-b": True, "c": "x\0y z"}
    with pytest.raises(UserError, match="begins with no option"):
        extra_options("1 --a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "sonets"], "did you mean sonnets"),
        (["--budget-minutes", "0"], "--budget-minutes is 0"),
        (["--seeds", "1", "1"], "--seeds takes"),
        (["--init", "no/such/folder", "--device", "cpu"], "no/such/folder"),
    ],
)
def test_bad_input(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["methods", *words])
    monkeypatch.setattr(bench_module, "elsewhere", lambda function, *args: function(*args))
    with pytest.raises(UserError, match=message) as error:
        bench_module.main()
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--only ful: .*did you mean full"):
        real_bench(only="ful,prefix")


# --- figures


def test_figures_are_of_the_step_that_final_is_of(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 40.0)
    figures = cells_module.figures_of(tmp_path / "run")
    assert figures["metrics"] == {"val_loss": 2.4, "chrf": 40.0}  # step 4, not the last of metrics.json
    assert (figures["lowest_val_loss"], figures["lowest_epoch"], figures["best_epoch"]) == (2.2, 1.0, 2.0)
    assert figures["seconds_per_epoch"] == 10 and figures["trained_parameters"] == 1000
    assert figures["warnings"] == ["two rows are cut"]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_mean_and_spread(values: list[float]) -> None:
    cells = [{"seed": seed, "metrics": {"x": value}, "seconds": 1.0} for seed, value in enumerate(values)]
    (row,) = rows_of(["m", "none"], {"m": cells}, {"m": "command"})
    assert row["metrics"]["x"]["mean"] == statistics.fmean(values)
    if len(values) == 1:
        assert row["metrics"]["x"]["spread"] is None
    else:
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        assert row["metrics"]["x"]["spread"] == pytest.approx(spread, abs=1e-6)


def test_a_figure_that_a_seed_lacks_is_none_of_the_rows() -> None:
    cells = [{"seed": 1, "metrics": {"x": 1.0, "y": 2.0}}, {"seed": 2, "metrics": {"x": 1.0, "y": None}}]
    assert list(rows_of(["m"], {"m": cells}, {"m": ""})[0]["metrics"]) == ["x"]


# --- tables and chart


@pytest.fixture
def result(fake: Fake, tmp_path: Path) -> dict[str, Any]:
    """Of methods and decodings that have published figures beside them."""
    fake.score = lambda name, seed: {"scratch": 20.0, "full": 30.0, "prefix": 25.0}[name] + seed
    named = [method for method in METHODS if method.name in ("scratch", "full", "prefix")]
    ways = [decoding for decoding in DECODINGS if decoding.name in ("beam", "greedy")]
    bench = bench_of(tmp_path, methods=named, decodings=ways, keep=1)
    compare(bench, silent)
    return json.loads(json.dumps(result_of(bench, ABOUT)))


def test_the_tables(result: dict[str, Any]) -> None:
    text = text_of(result)
    for part in (
        "**32 ± 1**", " 21 ", "25.00%", "1,234,567 tokens", "validation loss of 4.500", "books: 99 tokens", "train.txt",
        "a CPU, 2 threads", "python -m benchmarks.methods --task sonnets", "1.00 GiB", "published, GPT-2 124M", "55.73",
        "33.44", "chose that epoch and are scored here as well",
    ):  # fmt: skip
        assert part in text, part
    assert f"{math.exp(2.2):.4g} (epoch 1)" in text
    assert "published" not in text_of(result | {"task": "lyrics"})
    widths = [len(line) for line in text.splitlines() if line.startswith("| full ")]
    assert len(widths) == 3  # quality, cost, published


def test_the_chart(result: dict[str, Any], tmp_path: Path) -> None:
    for name, of in (("all", result), ("methods", result | {"decodings": []}), ("none", result | {"methods": []})):
        draw(of, tmp_path / f"{name}.png")
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG") and not (tmp_path / "none.png").exists()
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "methods.png").stat().st_size > 10_000


# --- all of it


def test_from_a_base_to_the_tables(run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = ["the snow lies deep upon the hill and waits all morning for the sun"] * 20
    tokenizer = train_bpe(text, 280, tmp_path / "base")
    GPT(GPTConfig(vocab_size=280, block_size=256, n_layer=1, n_head=2, n_embd=32)).save_pretrained(
        tmp_path / "base", eot=tokenizer.eot
    )
    words = ["-m", "benchmarks.methods", "--task", "sonnets", "--init", "base", "--out", "out", "--epochs", "1"]
    words += ["--seeds", "3", "--device", "cpu", "--only", "full,beam", "--extra=--max-new-tokens 8 --eval-rows 1"]
    done = run(*words, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "methods.json").read_text())
    (full,), (beam,) = result["methods"], result["decodings"]
    assert full["name"] == "full" and full["seeds"] == [3] and full["metrics"]["chrf"]["mean"] >= 0
    assert full["trained_parameters"] == full["parameters"] and beam["metrics"]["chrf_poem"]["mean"] > 0
    assert done.stdout.startswith("# sonnets: methods compared") and (tmp_path / "out" / "methods.png").exists()
    assert "full (3)" in done.stderr
