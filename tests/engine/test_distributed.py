"""Several ranks, as real processes over gloo: the same sums, updates and end as on one rank."""

from __future__ import annotations

import functools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import TrainConfig
from engine import fit, processes, step, trainer
from engine.evaluation import evaluate
from engine.memory import Memory
from engine.pretraining import LanguageModelling
from engine.processes import StopSignal, World
from launch import launch, log_of, small, write_inputs
from toy import Scripted, TwoHeads, capture_gradients, expected_gradients, loader, run_step, step_of

ALONE = World(0, 0, 1, 1, torch.device("cpu"))


# --- scenarios of two ranks, all run by one pair of processes


def gradients(world: World) -> dict[Any, Any]:
    """Gradients by (rows, step, micro-batch). With 10 rows rank 1 has none in the last micro-batch,
    and with 2 rows none at all."""
    found = {}
    for batch in (10, 2):
        for at in (0, 1, 2):
            for micro_batch in (2, 8):
                task = TwoHeads(batch=batch)
                train = step_of(task, world, clip=0)
                captured = capture_gradients(train)
                result = run_step(train, at, loader(task, world, micro_batch))
                found[batch, at, micro_batch] = captured, result.loss.item(), result.amounts
    return found


def all_reduces(world: World) -> list[int]:
    """Count DDP's all-reduces in three steps of three micro-batches each."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    task = TwoHeads()
    train = step_of(task, world)
    counts: list[int] = []

    def hook(state, bucket):  # DDP insists on its own annotations or none
        counts[-1] += 1
        return allreduce_hook(dist.distributed_c10d._get_default_group(), bucket)

    train.synced.register_comm_hook(None, hook)
    data = loader(task, world, 2)
    for at in range(3):
        counts.append(0)
        batches = data(at)
        assert len(batches.batches) == 3
        train(at, batches)
    return counts


def trained(world: World, poison: dict[int, float] | None = None) -> dict[str, Tensor]:
    """The state after five steps, of which the third is the first to train the trunk."""
    task = TwoHeads(unfreeze_at=2)
    task.poison = poison or {}
    train = step_of(task, world)
    data = loader(task, world, 2)
    for at in range(5):
        train(at, data(at))
    return train.state()


def skipped(world: World) -> dict[str, Tensor]:
    return trained(world, {3: torch.nan})


def replicas(world: World) -> list[str]:
    model = step_of(TwoHeads(), world).model
    answers = []
    for _ in range(2):
        try:
            step.check_replicas(model, world)
            answers.append("equal")
        except RuntimeError as error:
            answers.append(str(error))
        if world.rank == 1:  # the smallest change there is
            bits = model.trunk.weight.detach().view(torch.int32)
            bits[0, 0] += 1
    return answers


def agreements(world: World) -> list[int]:
    """The answers of six calls, if rank 1 gets a signal before the third."""
    signal = StopSignal(world)
    signal.defer()
    answers = []
    for call in range(1, 7):
        if world.rank == 1 and call == 3:
            signal._received(15, None)
        answers.append(signal.agreed())
    return answers


def host_sums(world: World) -> dict[str, float]:
    return processes.sum_over_ranks(world, {"both": world.rank + 0.5, f"only {world.rank}": 2.0})


def evaluation(world: World) -> list[dict[str, float] | None]:
    task = TwoHeads()
    train = step_of(task, world)
    return [evaluate(train, micro_batch) for micro_batch in (1, 4)]


def micro_batch(world: World) -> int:
    """auto's micro-batch for 12 rows. Rank 0 has memory for all of them, rank 1 for seven."""

    task, model = Scripted([]), torch.nn.Identity()
    cfg: Any = TrainConfig()  # nothing of it is asked
    facts = task.setup(cfg, print)
    room = (12, 7)[world.rank] / 0.8
    with (
        mock.patch.object(processes, "available_memory", lambda device, ranks: room),
        mock.patch.object(processes, "memory_bytes", lambda device: 0),
        # n bytes for a micro-batch of n
        mock.patch.object(
            fit, "peak_memory", lambda facts, cfg, n, world: Memory(n, 0, 0, 0, 0, 0)
        ),
    ):
        return fit.largest_micro_batch(task, facts, model, cfg, world, 12)


SCENARIOS = (
    gradients,
    all_reduces,
    trained,
    skipped,
    replicas,
    agreements,
    host_sums,
    evaluation,
    micro_batch,
)


def play(folder: Path) -> None:
    world = processes.start("cpu")
    torch.save(
        {scenario.__name__: scenario(world) for scenario in SCENARIOS}, folder / f"{world.rank}.pt"
    )
    processes.finish(world)
    raise SystemExit(0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict[str, Any]]:
    """The results of both ranks."""
    folder = tmp_path_factory.mktemp("pair")
    ended = launch(folder, [], functools.partial(play, folder), ranks=2)
    assert [end.code for end in ended] == [0, 0], "\n".join(end.err for end in ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("batch", [10, 2])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_gradients_are_those_of_the_whole_batch(pair, batch, at, micro_batch):
    (mine, loss, amounts), (other, *_) = (
        found["gradients"][batch, at, micro_batch] for found in pair
    )
    task = TwoHeads(batch=batch)
    expected_loss, _, expected = expected_gradients(task, step_of(task, ALONE).model, at)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    ids = task.rows("train", at).reshape(-1)
    amounts.pop("batch", None)
    assert amounts == {"tokens": task.lengths[ids].sum(), "rows": len(ids)}
    assert equal(mine, other)
    for name, value in expected.items():
        torch.testing.assert_close(mine[name].double(), value, rtol=2e-5, atol=1e-7, msg=name)


def test_ranks_all_reduce_gradients_once_a_step(pair):
    assert pair[0]["all_reduces"] == pair[1]["all_reduces"] == [1, 1, 1]


def test_groups_that_change_at_a_step_train_as_on_one_rank(pair):
    assert equal(pair[0]["trained"], pair[1]["trained"])
    alone = trained(ALONE)
    assert alone.keys() == pair[0]["trained"].keys()
    for name, value in alone.items():
        torch.testing.assert_close(pair[0]["trained"][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_nan_on_one_rank_skips_the_update_on_both(pair):
    assert equal(pair[0]["skipped"], pair[1]["skipped"])
    assert pair[0]["skipped"]["optimizer.tagger.weight.step"].item() == 4
    assert all(value.isfinite().all() for value in pair[0]["skipped"].values())
    assert not equal(pair[0]["skipped"], pair[0]["trained"])


def test_ranks_whose_parameters_differ_in_one_bit_are_found(pair):
    assert pair[0]["replicas"] == pair[1]["replicas"]
    same, different = pair[0]["replicas"]
    assert same == "equal"
    assert "ranks [1] differ from rank 0" in different


def test_ranks_agree_to_stop_at_the_same_call(pair):
    assert pair[0]["agreements"] == pair[1]["agreements"] == [0, 0, 0, 15, 15, 15]


def test_sums_over_ranks_allow_missing_keys(pair):
    assert (
        pair[0]["host_sums"] == pair[1]["host_sums"] == {"both": 2.0, "only 0": 2.0, "only 1": 2.0}
    )


def test_evaluation_on_two_ranks_equals_that_on_one(pair):
    task = TwoHeads()
    expected = task.expected_metrics(step_of(task, ALONE).model)
    assert pair[0]["evaluation"] == pair[1]["evaluation"]
    for metrics in pair[0]["evaluation"]:
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_micro_batch_auto_fits_on_every_rank(pair):
    assert [found["micro_batch"] for found in pair] == [6, 6]


# --- the meeting of ranks in torchrun's store


def ranks_meet(store: dist.Store, size: int) -> list[str]:
    """The name of the meeting that each rank returns, if all are alive."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: processes.rendezvous(store, rank, size, 20), range(size)))


LIVES = st.lists(st.sets(st.integers(0, 3)), max_size=4)


@given(size=st.integers(2, 4), lives=LIVES)
@settings(max_examples=10, deadline=None)
def test_ranks_ignore_what_dead_ranks_left_in_the_store(size, lives):
    """Earlier starts left names in the store: of some ranks before all were killed, or of all."""
    store = dist.HashStore()
    met = set()
    for came in lives:
        alive = [rank for rank in range(size) if rank in came]
        if len(alive) == size:
            met.add(ranks_meet(store, size)[0])
            continue
        for rank in alive:
            with pytest.raises(TimeoutError, match="did not come"):
                processes.rendezvous(store, rank, size, 0.05)
    names = ranks_meet(store, size)
    assert len(set(names)) == 1 and names[0] not in met


@pytest.mark.parametrize(
    "env, told",
    [
        ({}, False),
        ({"PET_NNODES": "1:2"}, True),
        ({"PET_NNODES": "2:2"}, False),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}, True),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"PET_NNODES": "1:2", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_a_run_that_nodes_may_join_prints_advice(monkeypatch, env, told):
    for name, value in ({"TORCHELASTIC_USE_AGENT_STORE": "True"} | env).items():
        monkeypatch.setenv(name, value)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (processes.restart_advice() or "")) == told


# --- threads


@pytest.mark.parametrize(
    "env, ranks, threads",
    [
        ({}, 1, 8),
        ({}, 3, 2),
        ({}, 100, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 1, 8),  # torchrun's default
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, 2, 3),
    ],
)
def test_ranks_on_one_cpu_share_its_cores(monkeypatch, env, ranks, threads):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert processes.threads_per_rank(ranks) == threads


# --- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


QUIET = "--eval-every 0 --save-every 0 --sample-every 0 --dropout 0 --schedule constant"


# In bf16 the gradients of a micro-batch are rounded to 8 bits, and another number of ranks adds
# them up in another order.
@pytest.mark.parametrize(
    ("precision", "tolerance", "numbers"), [("fp32", 1e-5, (1, 2, 4)), ("bf16", 2e-3, (1, 2))]
)
def test_any_number_of_ranks_has_the_same_losses(inputs, precision, tolerance, numbers):
    losses = {}
    for ranks in numbers:
        words = small(QUIET, "--steps 20 --precision", precision, "--out", f"{precision}{ranks}")
        ended = launch(inputs, words, ranks=ranks)
        assert [end.code for end in ended] == [0] * ranks, ended[0].err
        assert f"accumulation {4 // ranks} x ranks {ranks}" in ended[0].out
        assert all(end.out == "" for end in ended[1:])  # only rank 0 speaks
        losses[ranks] = [line["loss"] for line in log_of(inputs / f"{precision}{ranks}", "train")]
    assert len(losses[1]) == 20
    assert losses[1][-1] < losses[1][0] - 0.5
    for found in losses.values():
        assert found == pytest.approx(losses[1], rel=tolerance)


def test_torchrun_starts_ranks_that_share_the_cores(inputs, run, repo):
    words = small(QUIET, "--steps 2 --out torchrun")
    done = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        repo / "train_gpt2.py",
        *words,
        cwd=inputs,
    )
    assert done.returncode == 0, done.stderr
    threads = re.search(r"device +2 x cpu \(.+\), threads a rank: (\d+)", done.stdout)
    assert threads and int(threads[1]) == max(1, len(os.sched_getaffinity(0)) // 2)


def spoil_loss(from_step: int, steps: int) -> None:
    """Make the loss NaN on rank 1 only, in the last micro-batch of `steps` steps, and compare the
    ranks after every step."""
    mock.patch.object(trainer, "CHECK_EVERY", 1).start()
    per_step = 2
    original = LanguageModelling.loss
    calls = 0

    def loss(self: LanguageModelling, model: Any, batch: Any) -> dict[str, Tensor]:
        nonlocal calls
        at, micro = divmod(calls, per_step)
        calls += 1
        spoil = (
            os.environ["RANK"] == "1"
            and from_step <= at < from_step + steps
            and micro == per_step - 1
        )
        return {
            name: value * (torch.nan if spoil else 1.0)
            for name, value in original(self, model, batch).items()
        }

    mock.patch.object(LanguageModelling, "loss", loss).start()


def test_nine_updates_skipped_in_a_row_are_counted_and_survived(inputs):
    words = small(QUIET, "--steps 15 --out nine")
    ended = launch(inputs, words, functools.partial(spoil_loss, 3, 9), ranks=2)
    assert [end.code for end in ended] == [0, 0], ended[0].err
    warnings = log_of(inputs / "nine", "warning")
    assert [line["step"] for line in warnings] == list(range(4, 13))
    assert "update skipped (9 so far)" in ended[0].out
    lines = log_of(inputs / "nine", "train")
    assert [line["loss"] is None for line in lines] == [3 <= at < 12 for at in range(15)]


def test_ten_in_a_row_end_the_run_on_every_rank(inputs):
    words = small(QUIET, "--steps 15 --out ten")
    ended = launch(inputs, words, functools.partial(spoil_loss, 3, 99), ranks=2)
    assert [end.code for end in ended] == [1, 1]
    message = (
        "10 updates in a row were not finite, the last at step 13; lower --lr or raise "
        "--warmup-steps"
    )
    assert all(message in end.err for end in ended)
    assert len(log_of(inputs / "ten", "train")) == 13


def drift() -> None:
    """Change one weight of rank 1 after the second step, and compare the ranks after every third
    step."""
    mock.patch.object(trainer, "CHECK_EVERY", 3).start()
    original = step.TrainStep.__call__

    def call(self: step.TrainStep, at: int, *args: Any) -> Any:
        result = original(self, at, *args)
        if at == 1 and self.world.rank == 1:
            with torch.no_grad():
                self.model.transformer.ln_f.bias[0] += 1e-3
        return result

    mock.patch.object(step.TrainStep, "__call__", call).start()


def test_ranks_that_drift_apart_stop(inputs):
    ended = launch(inputs, small(QUIET, "--out drift"), drift, ranks=2)
    assert [end.code for end in ended] == [1, 1]
    assert all(
        "the parameters of ranks [1] differ from rank 0's; resume from a checkpoint" in end.err
        for end in ended
    )
    assert len(log_of(inputs / "drift", "train")) == 3
