"""Metrics of a classification: the confusion matrix, calibration, confidence intervals and paired
tests.

The rows of all ranks are gathered first, so every metric is exact. Labels are numbers from 0 to
K - 1. Fractions are 0 to 1, and a fraction of nothing is 0. Intervals come from the bootstrap
(Efron 1979), which draws rows with replacement. A metric depends only on the number of rows of each
kind (true and predicted label). The bootstrap therefore draws these numbers: the distribution is
the same as row by row, and the cost does not grow with the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

BINS = 15  # bins of confidence, as in Guo et al. (2017)
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)  # quantiles that bound a 95 % interval


class Counts(NamedTuple):
    """The number of rows for each label, (..., K)."""

    correct: np.ndarray  # with this label, predicted correctly
    true: np.ndarray  # with this label
    predicted: np.ndarray  # for which this label is predicted


class Reliability(NamedTuple):
    """The number of rows in each bin of confidence, their mean confidence and their accuracy,
    (bins,). All are 0 for an empty bin."""

    rows: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


# --- the confusion matrix and its metrics


def confusion_matrix(true: ArrayLike, predicted: ArrayLike, n_labels: int) -> np.ndarray:
    """The number of rows with each pair [true, predicted] of labels, (K, K) int64.

    Raises ValueError for a label that is not one of the K.
    """
    kinds, rows = _kinds((true, predicted), n_labels)
    matrix = np.zeros((n_labels, n_labels), dtype=np.int64)
    matrix[kinds] = rows
    return matrix


def accuracy(matrix: np.ndarray) -> float:
    """The fraction of rows that are predicted correctly, from a confusion matrix."""
    return float(_accuracy(_counts(matrix)))


def macro_f1(matrix: np.ndarray) -> float:
    """The mean F1 over labels, as in scikit-learn. A label that is neither true nor predicted
    anywhere does not count."""
    return float(_macro_f1(_counts(matrix)))


def per_class(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """For each label (K,): "precision", "recall" and "f1" (float64), and "rows", the number of rows
    with the label (int64)."""
    counts = _counts(matrix)
    precision = _ratio(counts.correct, counts.predicted)
    recall = _ratio(counts.correct, counts.true)
    return {"precision": precision, "recall": recall, "f1": _f1(counts), "rows": counts.true}


def _counts(matrix: np.ndarray) -> Counts:
    return Counts(np.diagonal(matrix), matrix.sum(1), matrix.sum(0))


def _accuracy(counts: Counts) -> np.ndarray:
    """Counts of shape (..., K) to accuracies of shape (...)."""
    return _ratio(counts.correct.sum(-1), counts.true.sum(-1))


def _macro_f1(counts: Counts) -> np.ndarray:
    """Counts of shape (..., K) to macro-F1 of shape (...)."""
    return _ratio(_f1(counts).sum(-1), (counts.true + counts.predicted > 0).sum(-1))


def _f1(counts: Counts) -> np.ndarray:
    return _ratio(2 * counts.correct, counts.true + counts.predicted)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole for counts, 0 if both are 0."""
    return part / np.maximum(whole, 1)


# --- probabilities


def calibration_error(true: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> float:
    """The expected calibration error (Guo et al. 2017): how far confidence is from accuracy.

    true (N,), probabilities (N, K). Rows are binned by their highest probability, in bins of equal
    width. The result is the mean over rows of their bin's |accuracy - mean confidence|.
    """
    return _calibration_error(reliability(true, probabilities, bins))


def reliability(true: ArrayLike, probabilities: ArrayLike, bins: int = BINS) -> Reliability:
    """Accuracy by confidence, in `bins` bins of equal width from 0 to 1. A bin includes its upper
    edge and excludes its lower edge.

    Raises ValueError if probabilities are not between 0 and 1.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if (probabilities < 0).any() or (probabilities > 1.001).any():  # rounding may exceed 1 slightly
        raise ValueError("probabilities must be between 0 and 1")
    confidence, right = probabilities.max(1), probabilities.argmax(1) == np.asarray(true)
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence)
    rows = np.bincount(bin_of, minlength=bins)
    confident, correct = (
        np.bincount(bin_of, weights=of, minlength=bins) for of in (confidence, right)
    )
    return Reliability(rows, _ratio(confident, rows), _ratio(correct, rows))


def _calibration_error(found: Reliability) -> float:
    gaps = np.abs(found.accuracy - found.confidence)
    return float(_ratio((found.rows * gaps).sum(), found.rows.sum()))


def figures(true: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """The metrics "accuracy", "macro_f1" and "calibration_error" of rows.

    true (N,), probabilities (N, K). The predicted label is the one with the highest probability,
    and the first of equal ones.
    """
    probabilities = np.asarray(probabilities)
    matrix = confusion_matrix(true, probabilities.argmax(1), probabilities.shape[1])
    return {
        "accuracy": accuracy(matrix),
        "macro_f1": macro_f1(matrix),
        "calibration_error": calibration_error(true, probabilities),
    }


# --- intervals and tests


def bootstrap(
    true: ArrayLike, predicted: ArrayLike, n_labels: int, seed: int, resamples: int = RESAMPLES
) -> dict[str, list[float]]:
    """95 % percentile intervals [low, high] of "accuracy" and "macro_f1", pure in `seed`.

    In each resample, macro-F1 ignores labels that are neither true nor predicted, as `macro_f1`
    does. Raises ValueError without rows.
    """
    (drawn,) = _resampled(true, [predicted], n_labels, seed, resamples)
    return {"accuracy": _interval(_accuracy(drawn)), "macro_f1": _interval(_macro_f1(drawn))}


def paired_test(
    true: ArrayLike, first: ArrayLike, second: ArrayLike, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Compare two predictions of the same rows (N,). The result can be written as JSON.

    "accuracy" and "macro_f1" each have "difference" (first minus second) and "interval", its 95 %
    percentile interval from resamples that keep both predictions of a row together. "wins" and
    "losses" count the rows that only the first, or only the second, predicts correctly, and
    "mcnemar_p" tests these two, see `mcnemar`. "rows" is N.
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
    """McNemar's exact test (1947): the two-sided probability that a fair coin gives counts at least
    this uneven.

    Every term of the binomial tail is summed. Only rounding limits the result.
    """
    n, rarer = wins + losses, min(wins, losses)
    log_last = (
        math.lgamma(n + 1) - math.lgamma(rarer + 1) - math.lgamma(n - rarer + 1) - n * math.log(2)
    )
    # From the largest term of the tail, for `rarer`, down to the term for 0.
    fewer = np.arange(rarer, 0, -1)
    tail = math.exp(log_last) * (1 + np.cumprod(fewer / (n - fewer + 1)).sum())
    return min(1.0, 2 * float(tail))


def _resampled(
    true: ArrayLike, predictions: Sequence[ArrayLike], n_labels: int, seed: int, resamples: int
) -> list[Counts]:
    """The Counts (resamples, K) of each prediction in bootstrap resamples. All predictions share
    the resampled rows."""
    kinds, rows = _kinds((true, *predictions), n_labels)
    if not len(rows):
        raise ValueError("there are no rows to draw from")
    draws = np.random.default_rng(seed).multinomial(
        rows.sum(), _ratio(rows, rows.sum()), size=resamples
    )
    # (resamples, kinds). Products of floats use BLAS, and they are exact for such counts.
    draws = draws.astype(np.float64)
    one_hot = [np.eye(n_labels)[kind] for kind in kinds]  # (kinds, K) each
    is_true, *is_predicted = one_hot
    true_counts = draws @ is_true
    return [Counts(draws @ (is_true * each), true_counts, draws @ each) for each in is_predicted]


def _kinds(labels: Sequence[ArrayLike], n_labels: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The distinct combinations of labels that rows have, as one array per element of `labels`, and
    the number of rows with each combination."""
    shape = (n_labels,) * len(labels)
    numbers = np.ravel_multi_index([np.asarray(each, dtype=np.int64) for each in labels], shape)
    kinds, rows = np.unique(numbers, return_counts=True)
    return np.unravel_index(kinds, shape), rows


def _interval(values: np.ndarray) -> list[float]:
    return np.quantile(values, INTERVAL).tolist()


# --- the report


def report(
    true: ArrayLike, probabilities: ArrayLike, labels: Sequence[str], seed: int
) -> dict[str, Any]:
    """All metrics of one set of predictions. The result can be written as JSON.

    true (N,), probabilities (N, K) of the K `labels` in their order. The keys are "rows", those of
    `figures`, "intervals" (see `bootstrap`), "labels", "per_class" by label, "confusion"
    [true][predicted], and "reliability": the bins that have rows, each with its edges "low" and
    "high".
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
    return [dict(zip(("low", "high", *found._fields), values)) for values in bins if values[2]]
