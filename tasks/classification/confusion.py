"""Figures of a classification, of all of its rows together: what was confused with what, how sure,
and how surely.

Rows are those of every rank, gathered first, so that every figure is exact. Labels are numbers, 0
to K - 1. Shares are 0 to 1; a share of nothing is 0. Intervals come of the bootstrap (Efron 1979):
the rows drawn anew, with replacement, from the rows there are. A figure depends on how many rows
are of each kind alone, so that many of each kind are drawn: the same distribution as drawing row by
row, at a cost that does not grow with the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

BINS = 15  # of confidence, as Guo et al. have it
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)  # the quantiles that hold 95 % between them


class Counts(NamedTuple):
    """Of each label, (..., K): rows that have it and were given it, rows that have it, rows that
    were given it."""

    right: np.ndarray
    rows: np.ndarray
    given: np.ndarray


class Reliability(NamedTuple):
    """Of each bin of confidence, (bins,): how many rows, their mean confidence and their accuracy;
    0 without rows."""

    rows: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


# --- the confusion matrix, and what is read off it


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_labels: int) -> np.ndarray:
    """How many rows of each true label were given each label, (K, K) int64: [true, predicted].

    ValueError for a label that is not one of the K.
    """
    kinds, rows = _kinds((true, predicted), n_labels)
    matrix = np.zeros((n_labels, n_labels), dtype=np.int64)
    matrix[kinds] = rows
    return matrix


def accuracy(matrix: np.ndarray) -> float:
    return float(_accuracy(_counts(matrix)))


def macro_f1(matrix: np.ndarray) -> float:
    """Mean F1 of the labels that some row has or was given; one that is in neither does not count:
    scikit-learn's."""
    return float(_macro_f1(_counts(matrix)))


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Of each label, (K,): "precision", "recall" and "f1", float64, and "rows", how many have it,
    int64."""
    counts = _counts(matrix)
    precision, recall = _share(counts.right, counts.given), _share(counts.right, counts.rows)
    return {"precision": precision, "recall": recall, "f1": _f1(counts), "rows": counts.rows}


def _counts(matrix: np.ndarray) -> Counts:
    return Counts(np.diagonal(matrix), matrix.sum(1), matrix.sum(0))


def _accuracy(counts: Counts) -> np.ndarray:
    """(..., K) to (...)."""
    return _share(counts.right.sum(-1), counts.rows.sum(-1))


def _macro_f1(counts: Counts) -> np.ndarray:
    """(..., K) to (...)."""
    return _share(_f1(counts).sum(-1), (counts.rows + counts.given > 0).sum(-1))


def _f1(counts: Counts) -> np.ndarray:
    return _share(2 * counts.right, counts.rows + counts.given)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


# --- probabilities


def calibration_error(true: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> float:
    """How far confidence is from accuracy: the expected calibration error of Guo et al. (2017).

    Rows (N,) and their probabilities (N, K) in bins of the highest one, all of the same width: the
    mean over rows of their bin's |accuracy - mean confidence|.
    """
    return _calibration_error(reliability(true, probabilities, bins))


def reliability(true: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> Reliability:
    """Accuracy by confidence, in `bins` bins of equal width over 0 to 1; a bin's upper edge is in
    it, its lower is not.

    ValueError for what cannot be probabilities.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if (probabilities < 0).any() or (probabilities > 1.001).any():  # a sum of roundings may pass 1
        raise ValueError("probabilities must be between 0 and 1")
    confidence, right = probabilities.max(1), probabilities.argmax(1) == np.asarray(true)
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    rows = np.bincount(bin_of, minlength=bins)
    confident, correct = (
        np.bincount(bin_of, weights=of, minlength=bins) for of in (confidence, right)
    )
    return Reliability(rows, _share(confident, rows), _share(correct, rows))


def _calibration_error(found: Reliability) -> float:
    gaps = np.abs(found.accuracy - found.confidence)
    return float(_share((found.rows * gaps).sum(), found.rows.sum()))


def figures(true: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """ "accuracy", "macro_f1" and "calibration_error" of rows (N,) whose labels have these
    probabilities (N, K).

    The label with the highest probability is the one predicted, the first of equal ones.
    """
    probabilities = np.asarray(probabilities)
    matrix = confusion_matrix(true, probabilities.argmax(1), probabilities.shape[1])
    return {
        "accuracy": accuracy(matrix),
        "macro_f1": macro_f1(matrix),
        "calibration_error": calibration_error(true, probabilities),
    }


# --- how sure the figures are


def bootstrap(
    true: ArrayLike, predicted: ArrayLike, n_labels: int, seed: int, resamples: int = RESAMPLES
) -> dict[str, list[float]]:
    """95 % percentile intervals [low, high] of "accuracy" and "macro_f1", the same for the same
    seed.

    In a resample a label that none of its rows has or was given does not count, as in `macro_f1`.
    ValueError of no rows.
    """
    (drawn,) = _resampled(true, [predicted], n_labels, seed, resamples)
    return {"accuracy": _interval(_accuracy(drawn)), "macro_f1": _interval(_macro_f1(drawn))}


def paired_test(
    true: ArrayLike, first: ArrayLike, second: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Two predictions of the same rows (N,) compared, in what can be written as JSON.

    "accuracy" and "macro_f1": {"difference": the first's less the second's, "interval": its 95 %
    percentile interval, both predictions of a row drawn together}. "wins" and "losses": rows that
    the first alone has right, and the second alone; "mcnemar_p" is of these two, see `mcnemar`.
    "rows": all of them.
    """
    true, first, second = (np.asarray(labels, dtype=np.int64) for labels in (true, first, second))
    n_labels = 1 + int(max(labels.max(initial=0) for labels in (true, first, second)))
    one, other = (_counts(confusion_matrix(true, labels, n_labels)) for labels in (first, second))
    drawn, drawn_other = _resampled(true, [first, second], n_labels, seed, resamples)
    result: dict[str, Any] = {"rows": len(true)}
    for name, figure in (("accuracy", _accuracy), ("macro_f1", _macro_f1)):
        interval = _interval(figure(drawn) - figure(drawn_other))
        result[name] = {"difference": float(figure(one) - figure(other)), "interval": interval}
    wins = int(((first == true) & (second != true)).sum())
    losses = int(((first != true) & (second == true)).sum())
    return result | {"wins": wins, "losses": losses, "mcnemar_p": mcnemar(wins, losses)}


def mcnemar(wins: int, losses: int) -> float:
    """McNemar's test (1947) in its exact form: the two-sided p of a fair coin that comes up so
    unevenly, or more so.

    Every term of the binomial tail is summed, whatever the counts; nothing is approximated but the
    last few digits.
    """
    n, rarer = wins + losses, min(wins, losses)
    log_last = (
        math.lgamma(n + 1) - math.lgamma(rarer + 1) - math.lgamma(n - rarer + 1) - n * math.log(2)
    )
    # from the last term of the tail, its largest, down to that of 0 times
    fewer = np.arange(rarer, 0, -1)
    tail = math.exp(log_last) * (1 + np.cumprod(fewer / (n - fewer + 1)).sum())
    return min(1.0, 2 * float(tail))


def _resampled(
    true: ArrayLike, predictions: Sequence[ArrayLike], n_labels: int, seed: int, resamples: int
) -> list[Counts]:
    """Of each prediction the counts (resamples, K) of rows drawn anew, the same rows for all
    predictions."""
    kinds, rows = _kinds((true, *predictions), n_labels)
    if not len(rows):
        raise ValueError("there are no rows to draw from")
    draws = np.random.default_rng(seed).multinomial(
        rows.sum(), _share(rows, rows.sum()), size=resamples
    )
    # (resamples, kinds): the product of floats is the fast one, and exact here
    draws = draws.astype(np.float64)
    labels = [np.eye(n_labels)[of] for of in kinds]  # (kinds, K): 1 at the label
    has, *given = [draws @ label for label in labels]
    return [Counts(draws @ (labels[0] * label), has, of) for label, of in zip(labels[1:], given)]


def _kinds(labels: Sequence[ArrayLike], n_labels: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The different combinations that the labels of a row make, one array a place, and how many
    rows have each."""
    shape = (n_labels,) * len(labels)
    numbers = np.ravel_multi_index([np.asarray(of, dtype=np.int64) for of in labels], shape)
    kinds, rows = np.unique(numbers, return_counts=True)
    return np.unravel_index(kinds, shape), rows


def _interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, INTERVAL).tolist()


# --- all of it


def report(
    true: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], seed: int
) -> dict[str, Any]:
    """Every figure of one set of predictions, in what can be written as JSON.

    true (N,), probabilities (N, K) of the K `labels` in their order. "rows", `figures`, "intervals"
    (`bootstrap`), "labels", "per_class" by label, "confusion" [true][predicted], and "reliability":
    the bins that hold rows, each with its edges "low" and "high".
    """
    probabilities = np.asarray(probabilities)
    predicted = probabilities.argmax(1)
    matrix = confusion_matrix(true, predicted, probabilities.shape[1])
    return {
        "rows": int(matrix.sum()),
        **figures(true, probabilities),
        "intervals": bootstrap(true, predicted, probabilities.shape[1], seed),
        "labels": list(labels),
        "per_class": _records(per_class(matrix), labels),
        "confusion": matrix.tolist(),
        "reliability": _bins(reliability(true, probabilities)),
    }


def _records(columns: dict[str, np.ndarray], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    values = zip(*(column.tolist() for column in columns.values()))
    return {label: dict(zip(columns, row)) for label, row in zip(labels, values, strict=True)}


def _bins(found: Reliability) -> list[dict[str, float]]:
    edges = np.linspace(0, 1, len(found.rows) + 1).tolist()
    bins = zip(edges, edges[1:], *(column.tolist() for column in found))
    return [dict(zip(("low", "high", *found._fields), of)) for of in bins if of[2]]
