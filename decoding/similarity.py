"""Similarity of texts for minimum Bayes risk decoding: the sentence chrF of every pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

CHRF_ORDER = 6  # character n-grams up to this length: sacrebleu's default
CHRF_BETA = 2  # recall weighs this many times as much as precision


def pairwise_chrf(texts: Sequence[str]) -> np.ndarray:
    """Sentence chrF of every pair, (n, n) float64 from 0 to 100: [i, j] scores text i against
    reference j.

    The values are those of sacrebleu's sentence_chrf with its defaults. Here the n-grams of each
    text are counted once and not n times. The memory is n times the number of different n-grams
    of one length in all texts, which is small for a few dozen candidates.
    """
    n = len(texts)
    precision, recall, orders = np.zeros((n, n)), np.zeros((n, n)), np.zeros((n, n))
    for row, gram in _character_ngrams(texts):
        total = np.bincount(row, minlength=n)
        matches = _matches(row, gram, total)
        # a text shorter than the order has no n-grams of it, and the order does not count
        both = (total[:, None] > 0) & (total > 0)
        precision += np.where(both, matches / np.maximum(total, 1)[:, None], 0)
        recall += np.where(both, matches / np.maximum(total, 1), 0)
        orders += both
    precision, recall = precision / np.maximum(orders, 1), recall / np.maximum(orders, 1)
    weight = CHRF_BETA**2
    return (
        100
        * (1 + weight)
        * precision
        * recall
        / np.maximum(weight * precision + recall, np.finfo(float).tiny)
    )


def _character_ngrams(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each order, the index of the text and the id of the n-gram for every n-gram of every
    text. White space is removed first."""
    bare = ["".join(text.split()) for text in texts]
    code_points = np.frombuffer("".join(bare).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    characters, character = np.unique(code_points, return_inverse=True)
    row = np.repeat(np.arange(len(bare)), [len(text) for text in bare])
    gram = character
    yield row, gram
    for order in range(2, CHRF_ORDER + 1):
        # An n-gram is the shorter one that starts at the same character, plus the next character.
        key = gram[: max(0, len(gram) - 1)] * len(characters) + character[order - 1 :]
        gram = np.unique(key, return_inverse=True)[1]
        inside = row[: len(gram)] == row[order - 1 :]  # starts and ends in the same text
        yield row[: len(gram)][inside], gram[inside]


def _matches(row: np.ndarray, gram: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Number of n-grams that each pair of texts shares, (n, n): the sum over n-grams of the
    smaller of the two counts."""
    n, grams = len(total), int(gram.max(initial=-1)) + 1
    counts = np.bincount(row * grams + gram, minlength=n * grams).reshape(n, grams)
    # an n-gram that only one text has matches nothing
    counts = counts[:, (counts > 0).sum(0) > 1].astype(np.int32)
    matches = np.array([np.minimum(counts, one).sum(1) for one in counts]).reshape(n, n)
    np.fill_diagonal(matches, total)
    return matches
