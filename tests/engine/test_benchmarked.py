"""Benchmarks scored during pretraining: the figures of evaluate.py, on any number of ranks, and a
run that is otherwise the same to the last bit."""

from __future__ import annotations

import functools
import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate as script
from config import ResolvedTrain, TrainConfig, UserError, resolve, resolved
from decoding.benchmarks import BENCHMARKS
from engine.benchmarked import SPLIT
from engine.loader import partition
from engine.pretraining import LanguageModelling
from launch import WORDS, die, launch, log_of, small, trace, write_inputs
from model import GPT

FILES = "--eval-hellaswag hellaswag.jsonl --eval-lambada lambada.jsonl"
SHORT = "--steps 6 --sample-every 0"
N_ROWS = 7
CURVES = ("hellaswag_acc_norm", "hellaswag_acc_tokens", "lambada_accuracy", "lambada_perplexity")


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of `small`, N_ROWS rows of each benchmark, and `run`, a run that scores them."""
    folder = tmp_path_factory.mktemp("curves")
    write_inputs(folder)
    draw = random.Random(3)

    def text(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    endings = [[text(draw.randint(1, 4)) for _ in range(4)] for _ in range(N_ROWS)]
    rows = [{"ctx": text(3 + n), "endings": e, "label": n % 4} for n, e in enumerate(endings)]
    write_lines(folder / "hellaswag.jsonl", rows)
    write_lines(folder / "lambada.jsonl", [{"text": text(2 + n)} for n in range(N_ROWS)])
    assert launch(folder, small(SHORT, FILES))[0].code == 0
    return folder


def task_of(folder: Path, **options: Any) -> LanguageModelling:
    files = {"data": "text.txt", "val_data": "val.txt", "tokenizer": "tokenizer", "cache": "cache"}
    files |= {f"eval_{kind.name}": f"{kind.name}.jsonl" for kind in BENCHMARKS}
    paths: dict[str, Any] = {name: str(folder / file) for name, file in files.items()}
    sizes: dict[str, Any] = {"preset": "micro", "seq_len": 16, "batch_tokens": 128, "steps": 2}
    task = LanguageModelling()
    task.setup(resolve(TrainConfig(**paths | sizes | options), "cpu"), lambda line: None)
    return task


def figures(task: LanguageModelling, model: GPT, ranks: int, micro_batch: int) -> dict[str, float]:
    """What an evaluation on so many ranks finds."""
    scores: dict[int, Any] = {}
    for rank in range(ranks):
        for ids in partition(task.rows(SPLIT, 0), rank, ranks, micro_batch):
            if ids is not None:
                sums, found = task.evaluate(model, task.batch(SPLIT, ids).tensors)
                assert not sums and not scores.keys() & found.keys()
                scores |= found
    return task.benchmarks.metrics(scores)


def test_the_curves_are_the_figures_of_evaluate(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    words = ["run/checkpoints/step-00000006", "--device", "cpu", "--json", "-"]
    files = [word.replace("eval-", "") for word in FILES.split()]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *words, *files])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert found["hellaswag"]["rows"] == N_ROWS
    expected = {name: found[(p := name.partition("_"))[0]][p[2]] for name in CURVES}
    for line, step in zip(log_of(folder / "run", "eval"), (3, 6), strict=True):
        assert line["step"] == step and line.keys() >= {*CURVES, "val_loss"}
    assert {name: line[name] for name in CURVES} == expected
    results = json.loads((folder / "run" / "metrics.json").read_text())
    card = (folder / "run" / "final" / "README.md").read_text()
    assert all(results[name] is not None and f"- {name}: " in card for name in CURVES)
    printed = (folder / "rank0.out").read_text()
    assert f"hellaswag {N_ROWS} rows, lambada {N_ROWS} rows" in printed
    assert printed.count("hellaswag_acc_norm 0.") == 3  # two evaluations and the closing banner


def test_a_run_that_scores_benchmarks_has_the_same_bits(folder: Path) -> None:
    assert launch(folder, small(SHORT, "--out plain"))[0].code == 0
    scored, plain = trace(folder / "run"), trace(folder / "plain")
    for line in scored["eval"]:
        for name in CURVES:
            del line[name]
    assert scored == plain


def test_a_run_killed_in_a_benchmark_resumes(folder: Path) -> None:
    words = small(SHORT, FILES, "--out killed")
    whole = len(log_of(folder / "run", "eval"))
    batches = partition(task_of(folder).rows("val", 0), 0, 1, 2)
    # the call after the last batch of the validation data
    kill = functools.partial(die, "evaluation", len(batches) + 1)
    (end,) = launch(folder, words, kill)
    assert end.code == -signal.SIGKILL and not log_of(folder / "killed", "eval")
    assert launch(folder, words)[0].code == 0
    assert whole == 2 and trace(folder / "killed") == trace(folder / "run")


def test_a_finished_run_needs_no_benchmark_file(folder: Path) -> None:
    words, file = small(SHORT, FILES), folder / "hellaswag.jsonl"
    held = file.rename(folder / "away.jsonl")
    (end,) = launch(folder, words)
    assert end.code == 0 and "run is finished (6 steps)" in end.out
    (end,) = launch(folder, [*words, "--extend-to", "8"])  # which trains, and so evaluates
    held.rename(file)
    assert end.code == 2 and "--eval-hellaswag hellaswag.jsonl: No such file" in end.err


def test_figures_do_not_depend_on_ranks_or_micro_batches(folder: Path) -> None:
    task = task_of(folder)
    torch.manual_seed(0)
    model = task.build_model(task.cfg)
    assert isinstance(model, GPT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        expected = figures(task, model, 1, 1)
        assert len(task.benchmarks.batches) > 2
        for ranks in range(1, 5):
            for micro_batch in (1, 3, 64):
                assert figures(task, model, ranks, micro_batch) == expected
    assert tuple(expected) == CURVES


def test_eval_rows_takes_the_first_rows(folder: Path) -> None:
    counts = [each.counts["rows"] for each in task_of(folder, eval_rows=3).benchmarks.encoded]
    assert counts == [3, 3]
    assert len(task_of(folder, eval_rows=0).benchmarks.spans) > 4 * N_ROWS


def test_nothing_is_compiled_for_a_length(folder: Path) -> None:
    task = task_of(folder)
    model = task.build_model(task.cfg)
    assert isinstance(model, GPT)
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(graph)
        return graph

    for block in model.transformer.h:
        block.compile(backend=count)
    model.compile(backend=count)
    with torch.no_grad():
        figures(task, model, 1, 8)
        assert not compiled
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert compiled


def test_without_the_option_nothing_is_scored(folder: Path) -> None:
    task = task_of(folder, eval_hellaswag=None, eval_lambada=None)
    assert not len(task.rows(SPLIT, 0)) and task.benchmarks.metrics({}) == {}
    assert task.benchmarks.banner == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_hellaswag": "{}/none.jsonl"}, "--eval-hellaswag .*none.jsonl: No such file"),
        ({"eval_lambada": "{}/hellaswag.jsonl"}, "--eval-lambada .* row 1 is not a row of this"),
        (
            {"eval_hellaswag": "{}/unlabelled.jsonl"},
            "--eval-hellaswag: no row of HellaSwag has a label",
        ),
        ({"eval_every": 0}, "--eval-every 0 turns them off"),
        (
            {"seq_len": 1, "batch_tokens": 8},
            "--eval-hellaswag: .* only 1 to block_size 1 can be scored",
        ),
        (
            {"data": "{}/shards", "val_data": None, "tokenizer": None},
            "--eval-hellaswag needs the tokenizer of the shards, .*; name it with --tokenizer",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_input_is_one_line_before_the_first_step(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    write_lines(folder / "unlabelled.jsonl", [{"ctx": "a b", "endings": ["c", "d"], "label": ""}])
    shards = folder / "shards"
    shards.mkdir(exist_ok=True)
    np.arange(60_000, 60_900, dtype=np.uint16).tofile(shards / "train.bin")
    given = {k: v.format(folder) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(UserError, match=message) as raised:
        task_of(folder, **given)
    assert "\n" not in str(raised.value)


def test_resolved_rows_depend_on_the_device() -> None:
    rows = [resolved(resolve(TrainConfig(), d), ResolvedTrain).eval_rows for d in ("cuda", "cpu")]
    assert rows == [0, 250]
