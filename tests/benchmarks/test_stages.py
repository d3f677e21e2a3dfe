"""The ladder. Its stages are the engine's own options, its figures are those in the logs, and it
resumes. No test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import kernels
from base.cli import parse
from base.commands import Failed
from benchmarks import stages, stages_report, store
from benchmarks.ladder import (
    LADDER,
    Machine,
    Plan,
    Settings,
    default_settings,
    ladder,
    scaling_points,
)
from benchmarks.stages import Bench
from benchmarks.stages_setup import fitting_micro_batch
from config import OPTIMIZATIONS, TrainConfig, UserError, resolve
from launch import write_inputs

AUTO = ("adamw", "bias_gelu", "cross_entropy")  # the default kernels on a GPU with a compiled model
H200 = Machine(
    "cuda",
    "NVIDIA H200",
    8,
    16,
    1,
    139 << 30,
    {"ranks": "there is one GPU", "heap": "no", "products": "no", "cpu_attention": "no"},
    AUTO,
    {},
)
CPU_LACKS = dict.fromkeys(("tf32", "backend", "graphs", "fp8", *kernels.TRITON), "no")
CPU = Machine(
    "cpu",
    "AMD EPYC",
    2,
    2,
    1,
    24 << 30,
    CPU_LACKS,
    (),
    {"versions": {"torch": "2.13.0", "cuda": None}},
)
PLAN = Plan("micro", 16, 2, 4, 2, 5, "text.txt", "tokenizer", 300, 1_000_000)
NAMES = [stage.name for stage in LADDER]


def rungs_of(machine: Machine, **options: Any) -> dict[str, Any]:
    return {rung.stage.name: rung for rung in ladder(machine, **options)}


def record(rate: float, loss: float | None = 5.0, **more: Any) -> dict[str, Any]:
    """The figures of a run with `rate` tokens per second."""
    known = dict(
        step_ms=[1e6 / rate] * 3,
        tokens_per_step=1000,
        memory_bytes=2**30,
        loss=loss,
        warnings=[],
        command="x",
    )
    return known | more


# --- the ladder


def test_each_optimization_and_kernel_is_a_stage_once() -> None:
    added = [name for stage in LADDER for name in stage.change.get("with", ())]
    assert sorted(added) == sorted(OPTIMIZATIONS)
    assert sorted(s.change["kernel"] for s in LADDER if "kernel" in s.change) == sorted(
        kernels.KERNELS
    )
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("machine", [H200, CPU])
def test_the_last_kept_stage_is_the_default_of_the_engine(machine, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "no_triton_reason", lambda device: None)
    engine = resolve(TrainConfig(precision="bf16"), machine.device)
    chosen = kernels.operation_names(kernels.choose(engine, machine.device)[0])
    settings = default_settings(dataclasses.replace(machine, kernels=chosen))
    assert settings.kernels == chosen
    assert (settings.compile, settings.clip, settings.cuda_graphs) == (
        engine.compile,
        engine.clip,
        engine.cuda_graphs,
    )
    assert (settings.precision, settings.accumulation, settings.ranks) == ("bf16", None, 1)
    skipped = [rung.stage for rung in ladder(machine) if rung.skipped]
    assert list(settings.without) == [
        name for stage in skipped for name in stage.change.get("with", ())
    ]


def test_a_stage_is_the_kept_one_before_and_its_change() -> None:
    rungs = rungs_of(CPU)
    assert "cpu" not in rungs and rungs["baseline"].settings == Settings(device="cpu")
    assert rungs["tf32"].skipped == "no"
    assert rungs["compile"].settings.compile and not rungs["compile"].kept
    assert (
        rungs["flash-attention"].before == "bf16" and not rungs["flash-attention"].settings.compile
    )
    assert rungs["ddp"].before == "accumulation" == rungs["cast-once"].before
    assert rungs["cast-once"].settings.ranks == 1 and rungs["ddp"].settings.ranks is None
    gpu = rungs_of(H200)
    assert gpu["baseline"].before == "cpu" and gpu["baseline"].settings.device == "cuda"
    assert gpu["triton-bias-gelu"].settings.kernels == AUTO[:2] and gpu["triton-bias-gelu"].kept
    assert gpu["triton-cross-entropy"].settings.kernels == AUTO
    assert gpu["fp8"].before == "triton-cross-entropy"


def test_nothing_builds_on_a_stage_that_failed() -> None:
    gpu = rungs_of(H200, failed=["compile", "triton-adamw"])
    assert gpu["compile"].settings.compile and not gpu["flash-attention"].settings.compile
    assert gpu["flash-attention"].before == "bf16"
    assert gpu["cuda-graphs"].skipped == "needs compile"
    assert default_settings(H200, ["triton-cross-entropy"]).kernels == AUTO[:2]
    assert gpu["triton-cross-entropy"].settings.kernels == AUTO[1:]


def test_some_stages_are_compared_among_themselves() -> None:
    rungs = rungs_of(CPU, only=["baseline", "bf16", "flash-attention", "clip"])
    assert [(name, rung.before) for name, rung in rungs.items()] == [
        ("baseline", None),
        ("bf16", "baseline"),
        ("flash-attention", "bf16"),
        ("clip", "flash-attention"),
    ]
    assert rungs["bf16"].by_design  # the head and the initialization changed since then
    assert not rungs["flash-attention"].by_design
    assert rungs["clip"].settings == rungs_of(CPU)["clip"].settings


@pytest.mark.parametrize("machine", [H200, CPU])
def test_every_command_is_one_that_the_engine_takes(machine, tmp_path) -> None:
    for rung in ladder(machine):
        if rung.skipped:
            continue
        words = stages.command(rung.settings, PLAN, tmp_path / "cache", tmp_path / "run")
        script = next(i for i, word in enumerate(words) if word.endswith("train_gpt2.py"))
        assert ("torch.distributed.run" in words[:script]) == (rung.stage.name == "ddp")
        cfg = resolve(parse(TrainConfig, words[script + 1 :]), rung.settings.device)
        assert (cfg.without, cfg.clip, cfg.compile) == (
            rung.settings.without,
            rung.settings.clip,
            rung.settings.compile,
        )
        assert kernels.operation_names(cfg.kernels) == rung.settings.kernels
        assert cfg.batch_tokens == 16 * (rung.settings.micro_batch or 2) * (
            rung.settings.accumulation or 4
        )
        assert not (cfg.eval_every or cfg.save_every or cfg.sample_every)


def test_scaling_points_divide() -> None:
    assert scaling_points(4) == {
        "weak": [(1, 1), (2, 1), (4, 1)],
        "strong": [(1, 4), (2, 2), (4, 1)],
    }
    assert bench_of(Path(), ranks=2).points() == [(1, 1), (2, 1), (1, 2)]
    assert bench_of(Path()).points() == []


# --- figures


def test_rates_and_ratios_are_medians_of_the_same_rounds() -> None:
    assert stages_report.rate(record(1) | {"step_ms": [10.0, 20.0, 500.0]}) == 50_000
    slow_minute = [record(100), record(10), record(100)], [record(50), record(5), record(40)]
    assert stages_report.ratio(*slow_minute) == 2
    assert stages_report.ratio(slow_minute[0], ()) is None


@pytest.mark.parametrize(
    ("loss", "before", "precisions", "by_design", "expected"),
    [
        (5.00004, 5.0, {"fp32"}, False, "same"),
        (5.001, 5.0, {"fp32"}, False, "differs"),
        (5.001, 5.0, {"fp32", "bf16"}, False, "same"),  # the coarser precision counts
        (5.1, 5.0, {"bf16"}, False, "differs"),
        (5.1, 5.0, {"bf16"}, True, "by design"),
        (5.0, 5.0, {"bf16"}, True, "same"),
        (5.0, None, {"bf16"}, False, ""),
        (None, 5.0, {"bf16"}, True, "not finite"),
    ],
)  # fmt: skip
def test_losses_are_compared_within_the_precision(
    loss, before, precisions, by_design, expected
) -> None:
    assert stages_report.compare_loss(loss, before, precisions, by_design) == expected


def made_up(machine: Machine = CPU) -> list[dict[str, Any]]:
    """Rows of a ladder in which each stage is a tenth faster, flash attention changes the loss, and
    clip failed."""
    failed = {"clip": "RuntimeError: a | b " + 100 * "x"}
    rungs = ladder(machine, None, failed)
    records: dict[str, list[dict[str, Any]]] = {rung.stage.name: [] for rung in rungs}
    for i, rung in enumerate(rungs):
        if not rung.skipped and rung.stage.name != "kept-memory":
            loss = 5.5 if rung.stage.name == "flash-attention" else 5.0
            records[rung.stage.name] = [record(100 * 1.1**i, loss), record(90 * 1.1**i, loss)]
    ceilings, sheet = {"fp32": 1e9, "bf16": 2e9}, {"fp32": None, "bf16": 4e9}
    return stages_report.stage_rows(rungs, records, failed, PLAN, machine, ceilings, sheet)


def test_rows_say_what_each_stage_was() -> None:
    rows = {row["stage"]: row for row in made_up()}
    assert rows["baseline"]["x_first"] == 1 and rows["baseline"]["x_before"] is None
    assert rows["tied-head"]["x_before"] == pytest.approx(1.1)
    assert (
        rows["baseline"]["mfu_measured"] == pytest.approx(95 * 1e6 / 1e9)
        and rows["baseline"]["mfu_sheet"] is None
    )
    assert rows["bf16"]["mfu_sheet"] == pytest.approx(rows["bf16"]["mfu_measured"] / 2)
    assert rows["baseline"]["slowest"] == pytest.approx(90) and rows["baseline"][
        "fastest"
    ] == pytest.approx(100)
    status = {name: row["status"] for name, row in rows.items()}
    assert [status[name] for name in ("baseline", "compile", "tf32", "clip", "kept-memory")] == [
        "kept", "branch", "skipped", "failed", "not reached",
    ]  # fmt: skip
    assert rows["flash-attention"]["loss_is"] == "differs" and rows["bf16"]["loss_is"] == "same"
    assert rows["adamw"]["before"] == "padded-vocab"  # not clip, which failed


def test_a_row_beside_the_gpu_has_no_share_of_its_ceiling() -> None:
    rows = {row["stage"]: row for row in made_up(H200)}
    assert rows["cpu"]["mfu_measured"] is None and rows["cpu"]["loss_is"] == ""
    assert rows["baseline"]["x_before"] == pytest.approx(1.1)
    assert rows["fp8"]["mfu_measured"] is None  # there is no ceiling for its precision


def test_a_note_says_what_went_wrong_in_one_cell() -> None:
    rows = {row["stage"]: stages_report.note(row) for row in made_up()}
    assert rows["flash-attention"] == "LOSS DIFFERS" and rows["compile"] == "branch"
    assert rows["tf32"] == "skipped: no" and rows["kept-memory"] == "not reached"
    assert rows["clip"].startswith("failed: RuntimeError: a / b x") and len(rows["clip"]) == 90


def test_stages_skipped_for_one_reason_share_a_row() -> None:
    drawn = [row["stage"] for row in stages_report.merge_skipped(made_up())]
    assert "triton-adamw to fp8" in drawn and "tf32" in drawn


def test_scaling_is_over_one_rank_at_the_same_work() -> None:
    points = {
        (1, 1): ([record(100)], None), (2, 1): ([record(150)], 0.2),
        (1, 2): ([record(120)], None),
    }  # fmt: skip
    weak, strong = (
        [r for r in stages_report.scaling_rows(points, 2) if r["kind"] == kind]
        for kind in ("weak", "strong")
    )
    assert [(r["ranks"], r["speedup"], r["efficiency"], r["communication"]) for r in weak] == [
        (1, 1, 1, None), (2, 1.5, 0.75, 0.2),
    ]  # fmt: skip
    assert [(r["ranks"], r["micro_batches_per_rank"], r["speedup"]) for r in strong] == [
        (1, 2, 1),
        (2, 1, pytest.approx(1.25)),
    ]


def event(name: str, category: str, begin: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": begin, "dur": end - begin}


STEPS = [
    event("ProfilerStep#2", "user_annotation", 0, 60),
    event("ProfilerStep#3", "user_annotation", 60, 100),
]
TRACED = [  # events of a CPU
    *STEPS,
    event("gloo:all_reduce", "user_annotation", 10, 40),
    event("aten::mm", "cpu_op", 0, 20),
    event("aten::mm", "cpu_op", 15, 30),
    {"ph": "M", "name": "x"},
]


def test_communication_counts_only_where_nothing_is_computed() -> None:
    gpu = [
        event("ncclDevKernel_AllReduce", "kernel", 10, 40),
        event("gemm", "kernel", 0, 20),
        event("aten::mm", "cpu_op", 0, 99),
    ]
    assert stages.communication_share(STEPS + gpu) == pytest.approx(0.2)
    assert stages.communication_share(TRACED) == pytest.approx(0.1)


# --- runs


@pytest.fixture
def bench(tmp_path) -> Bench:
    """A Bench whose runs are fake (see `runs`)."""
    return bench_of(tmp_path)


def bench_of(
    folder: Path, machine: Machine = CPU, only: Sequence[str] | None = None, ranks: int = 1
) -> Bench:
    return Bench(folder, machine, PLAN, stages.store_of(math.inf), only, ranks)


def run_rounds(bench: Bench, rounds: int) -> None:
    bench.store.run(lambda: bench.cells(rounds), str, lambda: None)


@pytest.fixture
def runs(monkeypatch) -> list[tuple[str, int]]:
    """The fake runs in order. The run of `flash-attention` fails."""
    made: list[tuple[str, int]] = []

    def execute(words: Sequence[str], output: Path, until: float, **more: Any) -> None:
        path = Path(words[words.index("--out") + 1])
        name, number, _key = path.name.rsplit("-", 2)
        made.append((name, int(number)))
        if name == "flash-attention":
            raise Failed("RuntimeError: boom", 1)
        (path / "profile").mkdir(parents=True)
        step = {"kind": "train", "step_ms": 10.0, "tokens": 1000, "memory_bytes": 1, "loss": 5.0}
        (path / "log.jsonl").write_text((json.dumps(step) + "\n") * 5)
        if "--profile" in words:
            (path / "profile/trace.json").write_text(json.dumps({"traceEvents": TRACED}))

    monkeypatch.setattr(store, "execute", execute)
    return made


ONLY = ["baseline", "flash-attention", "clip"]


def test_rounds_repeat_the_ladder_despite_a_failure(tmp_path, runs, capsys) -> None:
    bench = bench_of(tmp_path, only=ONLY)
    run_rounds(bench, rounds=2)
    first = [("baseline", 1), ("flash-attention", 1), ("clip", 1)]
    assert runs == [*first, ("baseline", 2), ("clip", 2)]
    assert bench.failed == {"flash-attention": "RuntimeError: boom"}
    clip = rungs_of(CPU, failed=["flash-attention"])["clip"].settings
    assert "flash-attention" in clip.without  # no later stage builds on it
    assert [len(record["step_ms"]) for record in bench.records("clip", clip)] == [3, 3]
    assert (
        "[2/5] flash-attention              failed: RuntimeError: boom" in capsys.readouterr().err
    )


def test_a_second_call_makes_only_what_is_missing(tmp_path, runs) -> None:
    run_rounds(bench_of(tmp_path, only=["baseline"]), rounds=1)
    run_rounds(bench_of(tmp_path, only=["baseline", "clip"]), rounds=2)
    assert runs == [("baseline", 1), ("clip", 1), ("baseline", 2), ("clip", 2)]
    (note,) = tmp_path.glob("runs/clip-2-*.cell.json")
    note.write_text('{"torn')  # the run's folder still exists
    run_rounds(bench_of(tmp_path, only=["baseline", "clip"]), rounds=2)
    assert runs[4:] == [("clip", 2)]


def test_no_run_starts_that_cannot_end_in_time(tmp_path, runs, capsys) -> None:
    bench = bench_of(tmp_path, only=ONLY)
    bench.store.until = time.monotonic() - 1
    run_rounds(bench, rounds=1)
    assert runs == [] and bench.store.end() == 0
    out = "the time was up; repeat the command to run what is left out: baseline, flash-attention"
    assert out in capsys.readouterr().err


def test_a_failure_is_reported_and_sets_the_exit_code(tmp_path, runs, capsys) -> None:
    bench = bench_of(tmp_path, only=ONLY)
    run_rounds(bench, rounds=1)
    assert bench.store.end() == 1
    assert "flash-attention failed: RuntimeError: boom" in capsys.readouterr().err


def test_scaling_runs_each_point_and_traces_several_ranks(tmp_path, runs) -> None:
    bench = bench_of(tmp_path, only=["scaling"], ranks=2)
    run_rounds(bench, rounds=2)
    names = ["ranks-1-each-1", "ranks-2-each-1", "ranks-1-each-2"]
    first = [(name, 1) for name in names]
    first.insert(2, ("ranks-2-each-1", stages.TRACE))
    assert runs == [*first, *((name, 2) for name in names)]
    found = bench.record(*bench.point(2, 1, stages.TRACE))
    assert found and found["communication"] == pytest.approx(0.1) and len(found["step_ms"]) == 4
    assert not list(tmp_path.glob("runs/*/profile"))  # traces are large, so they are deleted


def test_each_graph_is_compiled_ahead_once(tmp_path, runs) -> None:
    rungs = [rung for rung in ladder(H200) if rung.skipped is None]
    compiled = {rung.stage.name for rung in rungs if rung.settings.compile}
    # these do not change the graph, or run on several ranks
    distinct = compiled - {"clip", "adamw", "accumulation", "ddp", "triton-adamw"}
    bench = bench_of(tmp_path, H200)
    stages.compile_ahead(bench, rungs)
    assert {name for name, _ in runs} == {f"compile-{name}" for name in distinct}
    assert len(runs) == len(distinct)
    stages.compile_ahead(bench, rungs)
    assert len(runs) == len(distinct)  # their compiled code is cached


def test_the_baseline_sets_the_micro_batch_of_a_gpu() -> None:
    large, small = (fitting_micro_batch("micro", 256, memory) for memory in (139 << 30, 1 << 28))
    assert large == 32 and small < 16


# --- the command


def test_a_wrong_name_is_refused_before_anything_runs(monkeypatch, tmp_path) -> None:
    words = ["stages", "--only", "baseline,flash-attn", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(stages, "outlive", lambda: None)
    with pytest.raises(UserError, match="--only flash-attn is not one of cpu, baseline, ") as error:
        stages.main()
    assert "(did you mean flash-attention?)" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_ladder_in_the_folder_is_refused(tmp_path) -> None:
    plan = {"identity": {"preset": "mini"}, "plan": dataclasses.asdict(PLAN), "ceilings": {}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    expected = r"holds another ladder \(preset was mini, is micro; .*layout was None, is 2"
    with pytest.raises(UserError, match=expected):
        stages.make_plan(stages.Options(preset="micro"), CPU, tmp_path)


def test_a_number_out_of_range_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(stages, "outlive", lambda: None)
    monkeypatch.setattr(sys, "argv", ["stages", "--steps", "2"])
    with pytest.raises(UserError, match="--steps is 2; it must be at least 4"):
        stages.main()


@pytest.fixture
def small(run, tmp_path) -> Callable[[], Any]:
    """A whole run of the command on three stages of a tiny model, which a test can call again."""
    write_inputs(tmp_path)
    words = (
        "--preset micro --quick --device cpu --seq-len 16 --micro-batch 2 --steps 4 --rounds 1 "
        "--only baseline,tied-head,accumulation --data text.txt --tokenizer tokenizer --out ladder"
    )
    return lambda: run("-m", "benchmarks.stages", *words.split())


def only(out: Path, pattern: str) -> Path:
    (path,) = out.glob(f"runs/{pattern}")
    return path


def test_the_command_measures_writes_and_resumes(small, tmp_path) -> None:
    done = small()
    assert done.returncode == 0, done.stderr
    out = tmp_path / "ladder"
    result = json.loads((out / "stages.json").read_text())
    rows = {row["stage"]: row for row in result["stages"]}
    assert list(rows) == ["baseline", "tied-head", "accumulation"]
    log = [
        json.loads(line)
        for line in only(out, "accumulation-1-*/log.jsonl").read_text().splitlines()
    ]
    assert rows["accumulation"]["loss"] == log[-1]["loss"] and len(log) == 4
    assert rows["accumulation"]["step_ms"] == pytest.approx(
        (log[2]["step_ms"] + log[3]["step_ms"]) / 2
    )
    assert rows["accumulation"]["tokens_per_step"] == 128 == 4 * rows["baseline"]["tokens_per_step"]
    config = json.loads(only(out, "baseline-1-*/config.json").read_text())
    assert (
        set(config["without"]) == set(OPTIMIZATIONS)
        and config["precision"] == "fp32"
        and not config["compile"]
    )
    assert result["ceilings"]["fp32"] > 0 and rows["baseline"]["mfu_measured"] > 0
    assert done.stdout.strip() == (out / "stages.md").read_text().strip()
    assert (out / "stages.png").read_bytes().startswith(b"\x89PNG")
    again = small()
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("found in the folder") == 3
    assert json.loads((out / "stages.json").read_text())["stages"] == result["stages"]
