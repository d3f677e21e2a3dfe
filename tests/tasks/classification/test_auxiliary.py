"""Several tasks in one run: the order of their rows, their heads and labels."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moods import LABELS, OTHERS, ROWS, WORDS, mood, of_two, quick, row
from tasks.order import Order

sizes = st.integers(2, 12)


@given(
    own=sizes,
    other=sizes,
    batch=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    grouped=st.booleans(),
)
@quick
def test_an_epoch_visits_each_row_of_the_main_task_once(
    tokenizer, own, other, batch, seed, grouped
):
    group: dict[str, Any] = (
        dict(objective=("simcse",), simcse_group=2, dropout=0.1, batch_size=2 * batch)
        if grouped
        else {}
    )
    train = [row(" ".join(WORDS[: n + 1]), LABELS[n % 2]) for n in range(own)]
    others = [row(" ".join(WORDS[n:]), LABELS[n % 2]) for n in range(other)]
    task = of_two(tokenizer, train, others, **dict(batch_size=batch, seed=seed) | group)
    epochs = 4
    n = task.order.steps_per_epoch
    steps = [task.rows("train", step) for step in range(epochs * n)]
    heads_of = [set(task.train.heads[groups.reshape(-1)].tolist()) for groups in steps]
    assert all(len(found) == 1 for found in heads_of)  # All rows of a step belong to one task.
    whole = [[g for g, of in zip(steps, heads_of, strict=True) if of == {head}] for head in (0, 1)]
    own_steps = len(whole[0]) // epochs
    for epoch in range(epochs):
        mine = [
            g
            for g, of in zip(steps[epoch * n :][:n], heads_of[epoch * n :][:n], strict=True)
            if of == {0}
        ]
        assert sorted(np.concatenate([g.reshape(-1) for g in mine])) == list(range(own))
    per_pass = task.order.orders[1].steps_per_epoch
    assert n - own_steps == min(own_steps, per_pass) and len(whole[1]) == epochs * (n - own_steps)
    # The next epoch continues where this one stopped.
    for begin in range(0, len(whole[1]) - per_pass + 1, per_pass):
        found = np.concatenate([g.reshape(-1) for g in whole[1][begin : begin + per_pass]])
        assert sorted(found) == list(range(own, own + other))
    again = copy.deepcopy(task)
    for step in np.random.default_rng(seed).permutation(epochs * n):
        assert np.array_equal(again.rows("train", int(step)), steps[step])


def test_auxiliary_steps_are_shuffled_by_seed_and_epoch(tokenizer):
    def turns(seed: int) -> list[list[int]]:
        task = of_two(
            tokenizer,
            [row(f"{n} stone", LABELS[n % 2]) for n in range(12)],
            batch_size=1,
            seed=seed,
        )
        n = task.order.steps_per_epoch
        assert n == 24
        found = [
            int(task.train.heads[task.rows("train", step).reshape(-1)[0]]) for step in range(2 * n)
        ]
        return [found[:n], found[n:]]

    first = turns(1)
    assert first == turns(1) and first[0] != first[1] and first[0] != turns(2)[0]
    assert sum(first[0]) == sum(first[1]) == 12


def test_a_single_task_keeps_the_order_of_its_rows(tokenizer):
    task = mood(tokenizer, seed=5)
    alone = Order(task.train.lengths, 4, seed=5)
    assert alone.steps_per_epoch == task.order.steps_per_epoch == 2
    assert all(np.array_equal(task.rows("train", step), alone(step)) for step in range(6))
    val = task.rows("val", 0)
    assert val.shape == (7, 1) and sorted(val.reshape(-1)) == list(range(7))
    assert (np.diff(task.val.lengths[val.reshape(-1)]) >= 0).all()


def test_ulmfit_unfreezes_by_epochs_of_all_tasks(tokenizer):
    task = of_two(tokenizer, method="ulmfit")
    model, n = task.build_model(task.cfg), task.order.steps_per_epoch
    assert n == 4 > task.order.orders[0].steps_per_epoch

    def trained(step: int) -> set[str]:
        """The heads or blocks (h.0, h.1, ...) that train in a step."""
        names = [name for group in task.groups(model, step) for name in group.params]
        return {
            re.sub(r"^transformer\.|(?<=h\.\d)\..*$|\.weight$|\.bias$", "", name) for name in names
        }

    assert trained(0) == trained(n - 1) == {"heads.mood", "heads.mood-2"}
    assert trained(n) == trained(2 * n - 1) == trained(0) | {"h.1", "ln_f"}
    assert trained(2 * n) == trained(n) | {"h.0"} and trained(3 * n) == trained(2 * n) | {
        "wte",
        "wpe",
    }


def test_an_auxiliary_task_has_its_own_labels_and_options(tokenizer):
    task = of_two(
        tokenizer,
        ROWS,
        [*OTHERS, row(" ".join(WORDS), "yes")],
        seq_len=12,
        class_weights=("1", "2", "3"),
    )
    assert task.head_names == ["mood", "mood-2"] and [rows.labels for rows in task.rows_of] == [
        LABELS,
        ("no", "yes"),
    ]
    assert task.train.heads.tolist() == [0] * len(ROWS) + [1] * (len(OTHERS) + 1)
    assert (task.train.weights[task.train.heads == 1] == 1).all()
    assert sum("1 of 13 training rows are longer" in text for text in task.source.warnings) == 1
    shapes = {
        name: tuple(p.shape)
        for name, p in task.build_model(task.cfg).named_parameters()
        if "heads" in name
    }
    assert shapes == {"heads.mood.weight": (3, 64), "heads.mood-2.weight": (2, 64)}
    alone = mood(tokenizer, seq_len=12)
    assert alone.identity()["data"] != task.identity()["data"]
