"""Metrics against hand-computed cases, and against the libraries of the field."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics

# Few characters, so that n-grams repeat within a text and between texts; white space of several kinds; no Latin too.
TEXTS = st.lists(st.text(alphabet="ab \n\u3000한é", max_size=14), min_size=1, max_size=5)


def naive_pairwise(texts):
    return np.array([[sacrebleu.sentence_chrf(a, [b]).score for b in texts] for a in texts])


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_pairwise_chrf_is_sacrebleus_sentence_chrf(texts):
    np.testing.assert_allclose(metrics.pairwise_chrf(texts), naive_pairwise(texts), rtol=1e-12, atol=1e-12)


def test_pairwise_chrf_by_hand():
    # Order 1: 1 of the 2 characters of "ab", 1 of the 1 of "a"; higher orders take no part. 5PR / (4P + R).
    np.testing.assert_allclose(metrics.pairwise_chrf(["ab", "a"]), [[100, 250 / 3], [500 / 9, 100]])
    np.testing.assert_array_equal(metrics.pairwise_chrf(["ab", "", "ab"])[:, 1], [0, 0, 0])
    assert metrics.pairwise_chrf([]).shape == (0, 0)


@given(TEXTS, st.randoms())
@settings(max_examples=30, deadline=None)
def test_pairwise_chrf_follows_the_order_of_its_texts(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    shuffled = metrics.pairwise_chrf([texts[i] for i in order])
    np.testing.assert_allclose(shuffled, metrics.pairwise_chrf(texts)[np.ix_(order, order)], rtol=1e-12)


def test_chrf_of_a_corpus():
    references = ["From fairest creatures we desire increase,", "봄은 온다", "x"]
    assert metrics.chrf(references, references) == pytest.approx(100)
    # One text alone: the corpus's score is the sentence's.
    assert metrics.chrf(["ab"], ["a"]) == pytest.approx(250 / 3)
    half = metrics.chrf(["From fairest creatures", "봄", "y"], references)
    assert 0 < half < 100
    assert half == pytest.approx(metrics.chrf(["y", "From fairest creatures", "봄"], ["x", *references[:2]]))
