"""The order of rows, and the bucket sizes that batches are padded to."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from tasks.order import POOL, Order, bucket_for, bucket_lengths, padding_share

SST = Path(__file__).resolve().parents[3] / "shared" / "data" / "cs224n" / "ids-sst-train.csv"
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=300).map(np.array)


@given(
    lengths=LENGTHS,
    groups=st.integers(1, 5),
    group=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=120, deadline=None)
def test_an_epoch_visits_every_row_once(
    lengths: np.ndarray, groups: int, group: int, seed: int
) -> None:
    order, n, batch = Order(lengths, groups * group, seed, group), len(lengths), groups * group
    assert order.steps_per_epoch == math.ceil((n - n % group) / batch) + bool(n % group)
    for epoch in range(2):
        steps = [order(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert sorted(np.concatenate([step.reshape(-1) for step in steps])) == list(range(n))
        assert [step.shape for step in steps[: n // batch]] == [(groups, group)] * (n // batch)
        rest = [step.shape for step in steps[n // batch :]]
        whole, short = divmod(n % batch, group)
        assert rest == [(whole, group)] * bool(whole) + [(1, short)] * bool(short)


@given(lengths=LENGTHS, batch=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=50, deadline=None)
def test_the_order_is_pure(lengths: np.ndarray, batch: int, seed: int, data: st.DataObject) -> None:
    one = Order(lengths, batch, seed)
    steps = [one(step) for step in range(3 * one.steps_per_epoch)]
    other = Order(lengths, batch, seed)
    for step in data.draw(st.permutations(range(len(steps)))):
        assert np.array_equal(other(step), steps[step])


def test_seeds_and_epochs_differ() -> None:
    lengths = np.arange(1000) % 50 + 1
    firsts = [
        Order(lengths, 8, seed)(epoch * 125).tobytes() for seed in range(4) for epoch in range(4)
    ]
    assert len(set(firsts)) == 16
    one_pool = np.arange(640)  # one sorted pool: only the order of its batches varies
    assert (
        len(
            {
                np.stack(Order(one_pool, 10, seed).epoch(epoch)).tobytes()
                for seed in range(4)
                for epoch in range(4)
            }
        )
        == 16
    )


def test_batches_have_similar_lengths_and_are_shuffled() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 10_000)
    order = Order(lengths, 10, 7)
    batches = order.epoch(0)
    spread = [np.ptp(lengths[batch]) for batch in batches]
    assert np.mean(spread) < 2 * 500 / POOL  # a pool of sorted rows is split into 64 batches
    means = np.array([lengths[batch].mean() for batch in batches])
    halves = means[:500].mean() - means[500:].mean()
    # Lengths drift neither along the epoch nor from one batch to the next.
    assert abs(halves) < 4 * means.std() * math.sqrt(2 / 500)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.15
    smaller = Order(lengths, 64, 7)
    lasts = [lengths[smaller.epoch(epoch)[-1]].mean() for epoch in range(40)]
    assert abs(np.mean(lasts) - lengths.mean()) < 4 * lengths.std() / math.sqrt(40 * (10_000 % 64))


def test_groups_must_fill_a_batch() -> None:
    with pytest.raises(
        UserError, match="--batch-size 20 is not a multiple of groups of 8 rows; use 24"
    ):
        Order(np.ones(5), 20, 0, group=8)


# ---- padding


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=30).map(np.array),
    n_buckets=st.integers(1, 4),
    multiple=st.sampled_from([8, 16, 5]),
)
@settings(max_examples=150, deadline=None)
def test_bucket_lengths_are_optimal(lengths: np.ndarray, n_buckets: int, multiple: int) -> None:
    """The best sizes, by trying every choice."""
    sizes = bucket_lengths(lengths, 10**6, n_buckets, multiple)
    assert len(sizes) <= n_buckets and np.all(np.diff(sizes) > 0) and not np.any(sizes % multiple)
    longest = math.ceil(lengths.max() / multiple) * multiple
    assert sizes[-1] == longest

    def tokens(sizes: tuple[int, ...]) -> int:
        return sum(min(size for size in sizes if size >= length) for length in lengths)

    others = range(multiple, longest, multiple)
    choices = itertools.chain.from_iterable(
        itertools.combinations(others, k) for k in range(n_buckets)
    )
    assert tokens(tuple(sizes)) == min(tokens((*choice, longest)) for choice in choices)
    assert [bucket_for(int(n), sizes) for n in lengths] == [
        min(s for s in sizes if s >= n) for n in lengths
    ]


def test_no_bucket_exceeds_the_limit() -> None:
    sizes = bucket_lengths(np.array([3, 50, 100]), limit=100, multiple=8)
    assert sizes.tolist() == [8, 56, 100]
    with pytest.raises(ValueError, match="101 tokens"):
        bucket_for(101, sizes)


def test_padding_share() -> None:
    lengths, sizes = np.array([3, 8, 9, 16, 5]), np.array([8, 16])
    batches = [np.array([[0], [1], [2]]), np.array([[3], [4]])]
    # (8 + 8) + 16, then 16 + 16
    assert padding_share(batches, lengths, sizes, micro_batch=2) == pytest.approx(1 - 41 / 64)


@pytest.mark.skipif(not SST.is_file(), reason="needs ../shared/data/cs224n")
def test_buckets_save_most_of_the_padding_on_sst() -> None:
    with SST.open(encoding="utf-8") as file:
        lengths = np.array(
            [len(row["sentence"].split()) for row in csv.DictReader(file, delimiter="\t")]
        )
    sizes, batches = bucket_lengths(lengths, 1024), Order(lengths, 64, 1337).epoch(0)
    share = padding_share(batches, lengths, sizes, 16)
    longest = padding_share(batches, lengths, sizes[-1:], 16)
    assert share < 0.2
    assert (1 - share) / (1 - longest) > 2.4
