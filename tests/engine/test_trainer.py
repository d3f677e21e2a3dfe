"""The optimizer step against its objective written out in fp64, for a task that is quite unlike a
GPT; and the end of whole runs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import UserError
from engine.evaluation import evaluate
from engine.loader import partition
from engine.log import json_safe
from engine.precision import LossScale
from engine.processes import World
from engine.progress import Progress
from engine.step import check_replicas, seed_draws
from engine.trainer import train
from launch import launch, log_of
from storage import checkpoint
from toy import (
    Scripted,
    TwoHeads,
    capture_gradients,
    expected_gradients,
    loader,
    run_step,
    step_of,
    whole_run,
)

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name].double(), value, rtol=2e-5, atol=1e-7, msg=name)


# --- how a global batch is divided


@pytest.mark.parametrize(
    "n, width, size, micro", [(8, 1, 1, 3), (8, 1, 3, 2), (7, 2, 2, 4), (3, 4, 4, 1), (1, 1, 4, 8)]
)
def test_ranks_and_micro_batches_never_split_a_group(n, width, size, micro):
    groups = np.arange(n * width).reshape(n, width)
    cuts = [partition(groups, rank, size, micro) for rank in range(size)]
    assert len({len(cut) for cut in cuts}) == 1  # DDP: as many passes on every rank
    parts = [part for cut in cuts for part in cut if part is not None]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n * width))
    for part in parts:
        assert len(part) <= max(micro, width)
        assert (part.reshape(-1, width) // width == part.reshape(-1, width)[:, :1] // width).all()


# --- exactness


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 16])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch, step):
    # Step 1 has no second term, and step 2 has it in one row only. In steps 0 and 2 a group has no
    # first term.
    task = TwoHeads()
    train = step_of(task, ALONE, clip=0)
    found = capture_gradients(train)
    result = run_step(train, step, loader(task, ALONE, micro_batch))
    loss, terms, gradients = expected_gradients(task, train.model, step)
    close(found, gradients)
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert {name: value.item() for name, value in result.terms.items()} == pytest.approx(
        terms, rel=1e-5
    )
    assert result.grad_norm.item() == pytest.approx(norm(gradients), rel=1e-5)
    ids = task.rows("train", step).reshape(-1)
    del result.amounts["batch"]
    assert result.amounts == {"tokens": task.lengths[ids].sum(), "rows": len(ids)}
    assert bool(result.ok)


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(g.square().sum().item() for g in gradients.values()))


def test_clipping_scales_to_the_limit_and_logs_the_norm_before():
    task = TwoHeads()
    train = step_of(task, ALONE, clip=0.01)
    found = capture_gradients(train)
    result = run_step(train, 0, loader(task, ALONE, 4))
    _, _, gradients = expected_gradients(task, train.model, 0)
    assert result.grad_norm.item() == pytest.approx(norm(gradients), rel=1e-5)
    # Clipping adds a millionth to the norm that it divides by.
    assert norm(found) == pytest.approx(0.01, rel=1e-3)
    factor = 0.01 / (norm(gradients) + 1e-6)
    close(found, {name: factor * g for name, g in gradients.items()})
    loose = step_of(task, ALONE, clip=1e3)
    found = capture_gradients(loose)
    run_step(loose, 0, loader(task, ALONE, 4))
    close(found, gradients)


def test_the_head_of_an_absent_term_only_decays():
    task = TwoHeads()
    train = step_of(task, ALONE)
    before = copy.deepcopy(train.model.state_dict())
    result = run_step(train, 1, loader(task, ALONE, 4))
    assert "rank" not in result.terms
    kept = 1 - train.lr(1) * train.cfg.weight_decay
    torch.testing.assert_close(
        train.model.ranker.weight.detach(), kept * before["ranker.weight"], rtol=1e-6, atol=0
    )
    assert not torch.equal(train.model.tagger.weight, before["tagger.weight"])


def test_a_batch_without_any_target_changes_nothing():
    task = TwoHeads()
    train = step_of(task, ALONE)
    before = copy.deepcopy(train.model.state_dict())
    task.tagged[:] = False
    task.ranked[:] = False
    result = run_step(train, 0, loader(task, ALONE, 4))
    assert not bool(result.ok)
    assert all(torch.equal(value, before[name]) for name, value in train.model.state_dict().items())


# --- parameters that train from a later step on


def test_changed_groups_keep_the_state_of_trained_parameters():
    task = TwoHeads(unfreeze_at=2)
    train = step_of(task, ALONE)
    data = loader(task, ALONE, 4)
    head, trunk = train.model.tagger.weight, train.model.trunk.weight
    untouched = trunk.detach().clone()
    run_step(train, 0, data)
    optimizers = train.optimizers
    run_step(train, 1, data)
    assert train.optimizers is optimizers  # rebuilt where the groups change and nowhere else
    assert torch.equal(trunk, untouched) and not trunk.requires_grad
    moments = train.optimizers.state()["tagger.weight.exp_avg"].clone()
    train.assemble(2)
    assert train.optimizers is not optimizers and trunk.requires_grad
    assert torch.equal(train.optimizers.state()["tagger.weight.exp_avg"], moments)
    run_step(train, 2, data)
    assert train.optimizers.optimizers[0].state[head]["step"].item() == 3
    assert train.optimizers.optimizers[0].state[trunk]["step"].item() == 1
    assert not torch.equal(trunk, untouched)


def test_a_loaded_step_continues_bit_for_bit():
    task = TwoHeads(unfreeze_at=2)
    whole = step_of(task, ALONE)
    data = loader(task, ALONE, 3)
    for step in range(2):
        run_step(whole, step, data)
    saved = {name: value.clone() for name, value in whole.state().items()}
    resumed = step_of(task, ALONE, seed=5)
    resumed.load_state(saved, 2)
    again = loader(task, ALONE, 3)
    for step in (2, 3):
        run_step(whole, step, data)
        run_step(resumed, step, again)
    assert all(map(torch.equal, whole.state().values(), resumed.state().values()))


# --- updates that are not finite, and other failures


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_no_bit(value):
    task = TwoHeads()
    train = step_of(task, ALONE)
    data = loader(task, ALONE, 4)
    run_step(train, 0, data)
    before = {name: tensor.clone() for name, tensor in train.state().items()}
    task.poison = {1: value}
    assert not bool(run_step(train, 1, data).ok)
    assert all(torch.equal(tensor, before[name]) for name, tensor in train.state().items())
    assert bool(run_step(train, 2, data).ok)
    assert train.state()["optimizer.tagger.weight.step"].item() == 2


def test_a_step_stopped_half_way_changes_nothing():
    task = TwoHeads()
    train, untroubled = step_of(task, ALONE), step_of(task, ALONE)
    data = loader(task, ALONE, 2)
    calls = iter([0, 0, 15])
    assert train(0, data(0), lambda: next(calls)) is None
    assert all(p.grad is None for p in train.model.parameters())
    for each in (train, untroubled):
        run_step(each, 0, loader(task, ALONE, 2))
    assert all(map(torch.equal, train.model.parameters(), untroubled.model.parameters()))


def test_fp16_overflow_halves_the_scale(monkeypatch):
    monkeypatch.setattr(LossScale, "interval", 2)
    task = TwoHeads()
    train = step_of(task, ALONE, precision="fp16", clip=0)
    data = loader(task, ALONE, 4)
    first = train.scale.scale.item()
    task.poison = {0: 1e36}  # finite, until it is scaled
    assert not bool(run_step(train, 0, data).ok)
    assert train.scale.scale.item() == first / 2
    task.poison = {}
    found = capture_gradients(train)
    run_step(train, 1, data)
    _, _, gradients = expected_gradients(task, train.model, 1)
    for name, expected in gradients.items():
        # fp16 has 11 bits.
        torch.testing.assert_close(found[name].double(), expected, rtol=0.02, atol=1e-3)
    run_step(train, 2, data)
    assert train.scale.scale.item() == first  # two good ones


def test_draws_depend_on_seed_step_micro_batch_and_rank_only():
    def draw(*numbers: int) -> float:
        seed_draws(*numbers)
        return torch.rand(()).item()

    base = draw(1, 2, 3, 4)
    torch.rand(100)
    assert draw(1, 2, 3, 4) == base
    assert len({base, draw(2, 2, 3, 4), draw(1, 3, 3, 4), draw(1, 2, 4, 4), draw(1, 2, 3, 5)}) == 5


def test_dropout_repeats_from_its_seed_wherever_a_run_begins():
    task = TwoHeads(dropout=0.5)
    once, again = step_of(task, ALONE), step_of(task, ALONE)
    torch.rand(17)
    found, repeated = capture_gradients(once), capture_gradients(again)
    run_step(once, 3, loader(task, ALONE, 2))
    torch.rand(5)
    run_step(again, 3, loader(task, ALONE, 2))
    assert all(torch.equal(found[name], repeated[name]) for name in found)


# --- evaluation


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_evaluation_counts_every_row_once(micro_batch):
    task = TwoHeads(dropout=0.5)
    train = step_of(task, ALONE)
    train.model.train()
    metrics = evaluate(train, micro_batch)
    assert metrics == pytest.approx(task.expected_metrics(train.model), rel=1e-5)
    assert train.model.training
    assert evaluate(train, micro_batch, stop=lambda: 15) is None
    assert train.model.training


def test_a_single_rank_compares_no_parameters():
    check_replicas(step_of(TwoHeads(), ALONE).model, ALONE)


# --- the end of a run


def test_a_failing_compiler_ends_a_run_with_one_line(untouched, monkeypatch, tmp_path):
    class Fails(Scripted):
        def loss(self, model: Any, batch: Any) -> Any:
            # As Triton's build of a launcher fails, outside torch.compile.
            raise subprocess.CalledProcessError(1, ["gcc", "/tmp/a/main.c", "-O3", "-shared"])

    monkeypatch.setattr("engine.plan.compiler_problem", lambda device_type: None)
    with pytest.raises(UserError, match="--no-compile"):
        train(Fails([1.0]), whole_run(tmp_path / "run", 1, compile=True))
    with pytest.raises(subprocess.CalledProcessError):
        train(Fails([1.0]), whole_run(tmp_path / "other", 1, compile=False))


STEPS = 8
steps = st.integers(1, STEPS)
scores = st.lists(
    st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan, math.inf]), min_size=STEPS, max_size=STEPS
)
options = st.fixed_dictionaries({"eval_every": st.integers(1, 3), "patience": st.integers(0, 3)})


def best_evaluations(values: list[float], mode: str) -> list[int]:
    """The numbers (from 1) of the scores that were better than all before."""
    signed = [-math.inf if not math.isfinite(v) else v if mode == "max" else -v for v in values]
    return [i for i, v in enumerate(signed, 1) if v > max([-math.inf, *signed[: i - 1]])]


def expected_end(scores: list[float], mode: str, eval_every: int, patience: int) -> int:
    """The first step at which `patience` evaluations have followed the best one (or the start),
    else the last step."""
    steps = [s for s in range(1, len(scores) + 1) if s % eval_every == 0 or s == len(scores)]
    best = [0, *best_evaluations([scores[s - 1] for s in steps], mode)]
    ends = [
        s
        for i, s in enumerate(steps, 1)
        if patience and i - max(b for b in best if b <= i) >= patience
    ]
    return min([*ends, len(scores)])


def what_happened(run: Path) -> dict[str, Any]:
    """Everything that two runs with the same options must have in common."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kinds = ("train", "eval", "stopped_early", "sample")
    kept = ("kind", "step", "loss", "tokens", "score", "metric", "best", "text")
    figures = json.loads((run / "metrics.json").read_text())
    return {
        "log": [{k: x[k] for k in kept if k in x} for x in lines if x["kind"] in kinds],
        "figures": {
            k: figures[k] for k in ("steps", "tokens", "train_loss", "score", "final_is_step")
        },
        "final": (run / "final" / "steps.txt").read_text(),
    }


class Killed(Exception):
    pass


def die() -> None:
    raise Killed


def trained_through(task: Scripted, cfg: Any, falls: list[tuple[str, int, bool]]) -> None:
    """Train to the end in several starts, each ended at a given point by a signal or a kill."""
    for *point, obeyed in falls:
        fall = functools.partial(os.kill, os.getpid(), signal.SIGTERM) if obeyed else die
        task.during = lambda *now, point=point, fall=fall: fall() if list(now) == point else None
        try:
            code = train(task, cfg)
        except Killed:
            continue
        if code == 0:  # it had ended before that point
            return
        assert code == 143
    task.during = lambda *now: None
    assert train(task, cfg) == 0


@given(scores=scores, mode=st.sampled_from(["min", "max"]), options=options)
@example([2.0, 3.0, 1.0, 2.0, 0.0, 1.0, -1.0, 0.0], "min", {"eval_every": 1, "patience": 2})
@example([2.0, 1.0, 3.0, 2.0, 4.0, 3.0, 3.0, 3.0], "max", {"eval_every": 1, "patience": 2})
@settings(max_examples=8, deadline=None)
def test_patience_ends_a_run_at_an_evaluation(untouched, scores, mode, options):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        cfg = whole_run(run, STEPS, save_every=3, sample_every=0, **options)
        assert train(Scripted(scores, mode), cfg) == 0
        end = expected_end(scores, mode, **options)
        happened = what_happened(run)
        assert happened["figures"]["steps"] == end == log_of(run, "train")[-1]["step"]
        # metrics.json describes the model in final/.
        of_final = happened["figures"]["final_is_step"]
        assert happened["figures"]["score"] == json_safe(scores[of_final - 1])
        assert (run / "checkpoints" / f"step-{end:08d}").is_dir()
        early = log_of(run, "stopped_early")
        assert [line["step"] for line in early] == [end] * (end < STEPS)
        before = (run / "log.jsonl").read_bytes(), (run / "metrics.json").read_bytes()
        # The run is finished.
        assert train(Scripted(scores, mode), dataclasses.replace(cfg, patience=0)) == 0
        assert before == ((run / "log.jsonl").read_bytes(), (run / "metrics.json").read_bytes())


def test_damaged_metrics_of_a_finished_run_are_named(untouched, tmp_path):
    task, cfg = Scripted([1.0] * STEPS), whole_run(tmp_path / "run", STEPS, sample_every=0)
    assert train(task, cfg) == 0
    file = tmp_path / "run" / "metrics.json"
    steps = json.loads(file.read_text())["steps"]
    for damaged in ("{", "[]", "{}", ""):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"metrics\.json is damaged; remove it: "):
            train(task, cfg)
    file.unlink()
    assert train(task, cfg) == 0 and json.loads(file.read_text())["steps"] == steps


@given(
    scores=scores,
    options=options,
    save_every=st.integers(0, 3),
    falls=st.lists(
        st.tuples(st.sampled_from(["step", "evaluation", "sample"]), steps, st.booleans()),
        max_size=3,
    ),
)
@example(
    [1.0, *[2.0] * 7],
    {"eval_every": 2, "patience": 1},
    4,
    [("evaluation", 4, True), ("sample", 4, False)],
)
@settings(max_examples=5, deadline=None)
def test_a_killed_run_stops_early_at_the_same_step(untouched, scores, options, save_every, falls):
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "whole", Path(folder) / "fallen"
        whole, fallen = (
            whole_run(run, STEPS, save_every=save_every, sample_every=2, **options) for run in runs
        )
        assert train(Scripted(scores), whole) == 0
        trained_through(Scripted(scores), fallen, falls)
        assert what_happened(runs[1]) == what_happened(runs[0])


def test_a_run_stopped_early_says_so_and_keeps_its_best_model(untouched, tmp_path, capsys):
    scores = [5.0, 3.0, 4.0, 3.0, 9.0, 1.0]
    cfg = whole_run(tmp_path / "run", 6, eval_every=1, save_every=1, sample_every=0, patience=3)
    assert train(Scripted(scores), cfg) == 0
    out = capsys.readouterr().out
    assert "steps 0 to 6" in out and "ends after 3 evaluations without a better score" in out
    assert "\nstopped early at step 5: 3 evaluations without a better score than 3.0000\n" in out
    assert what_happened(tmp_path / "run")["figures"]["final_is_step"] == 2
    assert what_happened(tmp_path / "run")["final"] == "2"
    assert train(Scripted(scores), cfg) == 0
    assert f"{tmp_path}/run is finished (5 steps): its model is" in capsys.readouterr().out


def test_a_checkpoint_written_before_patience_existed_resumes(untouched, tmp_path):
    task, cfg = (
        Scripted([1.0] * 6),
        whole_run(tmp_path / "run", 6, eval_every=1, save_every=1, sample_every=0),
    )
    task.during = lambda what, step: die() if step == 4 else None
    with pytest.raises(Killed):
        train(task, cfg)
    fields = {"best_so_far", "not_better"}
    assert fields < {field.name for field in dataclasses.fields(Progress)}

    def fill(folder: Path) -> None:
        for path in newest.iterdir():
            if path.name != "manifest.json":
                (folder / path.name).write_bytes(path.read_bytes())
        meta = json.loads((newest / checkpoint.META).read_text())
        (folder / checkpoint.META).write_text(
            json.dumps({k: v for k, v in meta.items() if k not in fields})
        )

    newest = checkpoint.step_folder(tmp_path / "run", 3)
    checkpoint.write_folder(newest, fill)
    assert train(Scripted([1.0] * 6), dataclasses.replace(cfg, patience=2)) == 0
    # Step 4 is the best that it knows of.
    assert what_happened(tmp_path / "run")["figures"]["steps"] == 6


def test_a_run_stopped_early_is_extended_only_with_more_patience(untouched, tmp_path):
    scores = [1.0, 2.0, 2.0, 2.0, 0.5, 3.0, 3.0, 3.0]
    options = dict(eval_every=1, save_every=1, sample_every=0, schedule="constant")
    cfg = whole_run(tmp_path / "run", 6, patience=2, **options)
    assert (
        train(Scripted(scores), cfg) == 0
        and what_happened(tmp_path / "run")["figures"]["steps"] == 3
    )
    longer = dataclasses.replace(cfg, extend_to=8)
    with pytest.raises(
        UserError, match="stopped early, after 2 evaluations without a better one; add --patience 4"
    ):
        train(Scripted(scores), longer)
    assert train(Scripted(scores), cfg) == 0, "it is still finished, with its old length"
    assert train(Scripted(scores), dataclasses.replace(longer, patience=4)) == 0
    whole = whole_run(tmp_path / "whole", 8, patience=4, **options)
    assert train(Scripted(scores), whole) == 0
    assert (
        what_happened(tmp_path / "run")["final"]
        == what_happened(tmp_path / "whole")["final"]
        == "5"
    )
    assert what_happened(tmp_path / "run")["figures"]["steps"] == 8


def test_a_run_without_its_last_checkpoint_repeats_steps(untouched, tmp_path, capsys):
    options = dict(eval_every=0, save_every=2, sample_every=0, schedule="constant")
    cfg = whole_run(tmp_path / "run", 4, **options)
    assert train(Scripted([]), cfg) == 0
    shutil.rmtree(checkpoint.step_folder(tmp_path / "run", 4))
    assert train(Scripted([]), dataclasses.replace(cfg, extend_to=8)) == 0
    assert (
        "the checkpoint of step 4 is gone: the run resumes from step 2\n" in capsys.readouterr().out
    )
    assert [line["step"] for line in log_of(tmp_path / "run", "train")] == list(range(1, 9))


def test_patience_without_evaluations_is_refused(untouched, tmp_path):
    with pytest.raises(
        UserError, match="--patience 2 counts evaluations, but --eval-every 0 turns them off"
    ):
        train(Scripted([1.0]), whole_run(tmp_path / "run", 1, eval_every=0, patience=2))


def play(scores: list[float], folder: Path) -> None:
    cfg = whole_run(
        folder / "run", len(scores), eval_every=2, save_every=4, sample_every=0, patience=2
    )
    raise SystemExit(train(Scripted(scores), cfg))


def test_ranks_end_together(untouched, tmp_path):
    scores = [9.0, 4.0, 9.0, 5.0, 9.0, 3.0, 9.0, math.nan, 9.0, 3.0, 9.0, 1.0]
    (tmp_path / "alone").mkdir()
    cfg = whole_run(
        tmp_path / "alone" / "run", 12, eval_every=2, save_every=4, sample_every=0, patience=2
    )
    assert train(Scripted(scores), cfg) == 0
    ended = launch(tmp_path, [], functools.partial(play, scores, tmp_path), ranks=2)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    assert what_happened(tmp_path / "run") == what_happened(tmp_path / "alone" / "run")
    assert what_happened(tmp_path / "run")["figures"]["steps"] == 10


# --- rates


def test_every_amount_in_a_batch_gets_a_rate(untouched, tmp_path, capsys):
    assert train(Scripted([1.0] * 5), whole_run(tmp_path / "run", 5, sample_every=0)) == 0
    lines, figures = (
        log_of(tmp_path / "run", "train"),
        json.loads((tmp_path / "run" / "metrics.json").read_text()),
    )
    for name, amount in (("tokens", 12), ("padded_tokens", 20), ("rows", 4)):
        rates = [line[f"{name}_per_second"] for line in lines]
        assert rates == pytest.approx([amount / (line["step_ms"] / 1e3) for line in lines])
        assert figures[f"{name}_per_second"] == statistics.median(rates)
    assert [line["tokens"] for line in lines] == [12, 24, 36, 48, 60]
    out = capsys.readouterr().out
    assert (
        f"{lines[0]['tokens_per_second']:,.0f} tok/s | {lines[0]['rows_per_second']:,.1f} rows/s | "
        in out
    )
    median = (
        f"{figures[f'{name}_per_second']:,.0f} {name.replace('_', ' ')}/s"
        for name in ("tokens", "padded_tokens", "rows")
    )
    assert f"{', '.join(median)} (median)" in out
