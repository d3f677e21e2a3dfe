"""Classification metrics against scikit-learn, plain loops and row-by-row resampling, and their
charts."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import struct
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.classification import chart, confusion


@st.composite
def labelled(draw, predictions=1):
    """K, and the true and predicted labels of some rows. Some labels are often only true, only
    predicted, or neither."""
    n_labels = draw(st.integers(1, 6))
    row = st.tuples(*[st.integers(0, n_labels - 1)] * (1 + predictions))
    return n_labels, *np.array(draw(st.lists(row, min_size=1, max_size=40))).T


def scored(rows=200, n_labels=3, seed=0, sharpness=1.0):
    """True labels (N,) and probabilities (N, K) that predict them better than chance."""
    random = np.random.default_rng(seed)
    true = random.integers(0, n_labels, rows)
    scores = random.normal(size=(rows, n_labels)) + 1.5 * np.eye(n_labels)[true]
    odds = np.exp(sharpness * scores)
    return true, odds / odds.sum(1, keepdims=True)


# --- against scikit-learn


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(labelled())
@settings(max_examples=80, deadline=None)
def test_metrics_match_scikit_learn(rows):
    from sklearn import metrics

    n_labels, true, predicted = rows
    matrix = confusion.confusion_matrix(true, predicted, n_labels)
    assert matrix.dtype == np.int64
    np.testing.assert_array_equal(
        matrix, metrics.confusion_matrix(true, predicted, labels=range(n_labels))
    )
    assert confusion.accuracy(matrix) == pytest.approx(metrics.accuracy_score(true, predicted))
    f1 = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert confusion.macro_f1(matrix) == pytest.approx(f1)
    figures = metrics.precision_recall_fscore_support(
        true, predicted, labels=range(n_labels), zero_division=0
    )
    for found, figure in zip(confusion.per_class(matrix).values(), figures, strict=True):
        np.testing.assert_allclose(found, figure, atol=1e-12)


def test_macro_f1_ignores_labels_that_never_occur():
    some = confusion.confusion_matrix([0, 0, 1], [0, 1, 1], 2)
    more = confusion.confusion_matrix([0, 0, 1], [0, 1, 1], 5)
    assert confusion.macro_f1(some) == confusion.macro_f1(more) == pytest.approx(2 / 3)
    # 2/3, 1, and 0 for the label without rows
    given_only = confusion.confusion_matrix([0, 0, 1], [0, 2, 1], 5)
    assert confusion.macro_f1(given_only) == pytest.approx((2 / 3 + 1 + 0) / 3)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_label_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError):
        confusion.confusion_matrix([0, 1], [0, wrong], 3)
    with pytest.raises(ValueError):
        confusion.confusion_matrix([0, wrong], [0, 1], 3)


# --- calibration


def plain_calibration(true, probabilities, bins):
    """Guo et al. (2017), row by row: bin m has the confidences in ((m - 1)/M, m/M]."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = [
            (max(p), list(p).index(max(p)) == t)
            for t, p in zip(true, probabilities)
            if (m - 1) / bins < max(p) <= m / bins
        ]
        if inside:
            confidence, accuracy = (sum(of) / len(inside) for of in zip(*inside))
            error += len(inside) / len(true) * abs(accuracy - confidence)
    return error


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_calibration_error_matches_a_loop(seed, rows, n_labels, bins):
    # 0: all labels have the same probability
    true, probabilities = scored(rows, n_labels, seed, sharpness=seed % 5)
    expected = plain_calibration(true, probabilities, bins)
    assert confusion.calibration_error(true, probabilities, bins) == pytest.approx(
        expected, abs=1e-12
    )


def test_reliability_by_hand():
    probabilities = np.array([[0.5, 0.5], [0.3, 0.7], [0.1, 0.9], [0.0, 1.0]])
    # 0.5 is in the second bin, and 1 in the last
    found = confusion.reliability([0, 0, 1, 1], probabilities, bins=4)
    np.testing.assert_array_equal(found.rows, [0, 1, 1, 2])
    np.testing.assert_allclose(found.confidence, [0, 0.5, 0.7, 0.95])
    np.testing.assert_allclose(found.accuracy, [0, 1, 0, 1])
    expected = (0.5 + 0.7 + 2 * 0.05) / 4
    assert confusion.calibration_error([0, 0, 1, 1], probabilities, bins=4) == pytest.approx(
        expected
    )


def test_log_probabilities_are_refused():
    true, probabilities = scored()
    with pytest.raises(ValueError, match="between 0 and 1"):
        confusion.figures(true, np.log(probabilities))
    with pytest.raises(ValueError, match="between 0 and 1"):
        confusion.figures(true, 2 * probabilities)


# --- intervals


def intervals_by_rows(true, predictions, resamples):
    """Intervals of accuracy and macro-F1 from rows drawn one by one, or of their differences for
    two predictions."""
    random, n_labels = (
        np.random.default_rng(1),
        1 + max(true.max(), *(of.max() for of in predictions)),
    )
    figures = []
    for _ in range(resamples):
        rows = random.integers(0, len(true), len(true))
        matrices = [
            confusion.confusion_matrix(true[rows], of[rows], n_labels) for of in predictions
        ]
        figures.append(
            [[confusion.accuracy(matrix), confusion.macro_f1(matrix)] for matrix in matrices]
        )
    drawn = np.array(figures)  # (resamples, predictions, 2)
    drawn = drawn[:, 0] - drawn[:, 1] if len(predictions) == 2 else drawn[:, 0]
    return np.quantile(drawn, [0.025, 0.975], axis=0).T


@pytest.fixture(scope="module")
def pair():
    """True labels and two predictions of 300 rows that often agree. The labels differ in
    frequency."""
    random = np.random.default_rng(5)
    true = random.choice(3, 300, p=[0.7, 0.2, 0.1])
    first, second = (
        np.where(random.random(300) < share, true, random.integers(0, 3, 300))
        for share in (0.8, 0.5)
    )
    return true, first, np.where(random.random(300) < 0.5, first, second)


def test_bootstrap_matches_drawing_row_by_row(pair):
    true, first, _ = pair
    found = confusion.bootstrap(true, first, 3, seed=0, resamples=4000)
    expected = intervals_by_rows(true, [first], 4000)
    # The ends of the intervals vary over seeds by about 0.001 and 0.0015.
    np.testing.assert_allclose([found["accuracy"], found["macro_f1"]], expected, atol=0.006)
    # by the normal distribution
    width = 2 * 1.96 * math.sqrt(np.mean(true == first) * np.mean(true != first) / 300)
    assert np.ptp(found["accuracy"]) == pytest.approx(width, rel=0.1)


def test_bootstrap_intervals_have_their_coverage():
    random, share, covered = np.random.default_rng(0), 0.8, 0
    for seed in range(200):
        right = random.random(250) < share
        low, high = confusion.bootstrap(
            np.zeros(250), np.where(right, 0, 1), 2, seed, resamples=400
        )["accuracy"]
        covered += low <= share <= high
    # 190 are expected: the bounds are four standard deviations of 3.1, and fewer at the top.
    assert 178 <= covered <= 199


@given(labelled(), st.randoms())
@settings(max_examples=25, deadline=None)
def test_bootstrap_does_not_depend_on_the_order_of_rows(rows, shuffle):
    n_labels, true, predicted = rows
    order = shuffle.sample(range(len(true)), len(true))
    interval = confusion.bootstrap(true, predicted, n_labels, seed=3, resamples=50)
    assert (
        confusion.bootstrap(true[order], predicted[order], n_labels, seed=3, resamples=50)
        == interval
    )


def test_bootstrap_depends_on_the_seed(pair):
    true, first, _ = pair
    same = [confusion.bootstrap(true, first, 3, seed) for seed in (7, 7, 8)]
    assert same[0] == same[1] != same[2]
    matrix = confusion.confusion_matrix(true, first, 3)
    for figure, (low, high) in zip(
        (confusion.accuracy(matrix), confusion.macro_f1(matrix)), same[0].values()
    ):
        assert low < figure < high
    # Labels that are neither true nor predicted change nothing.
    wider = confusion.bootstrap(true, first, 9, 7)
    assert wider == same[0]


def test_bootstrap_without_rows_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        confusion.bootstrap([], [], 2, seed=0)


# --- two predictions


@given(labelled(predictions=2))
@settings(max_examples=40, deadline=None)
def test_paired_test_counts(rows):
    n_labels, true, first, second = rows
    found = confusion.paired_test(true, first, second, seed=0, resamples=20)
    matrices = [confusion.confusion_matrix(true, of, n_labels) for of in (first, second)]
    for name, figure in (("accuracy", confusion.accuracy), ("macro_f1", confusion.macro_f1)):
        assert found[name]["difference"] == pytest.approx(
            figure(matrices[0]) - figure(matrices[1]), abs=1e-12
        )
    assert found["wins"] == sum(a == t != b for t, a, b in zip(true, first, second))
    assert found["losses"] == sum(b == t != a for t, a, b in zip(true, first, second))
    assert (found["wins"] - found["losses"]) / found["rows"] == pytest.approx(
        found["accuracy"]["difference"]
    )
    assert found["mcnemar_p"] == confusion.mcnemar(found["wins"], found["losses"])
    assert json.loads(json.dumps(found)) == found


def test_paired_intervals_match_drawing_row_by_row(pair):
    true, first, second = pair
    found = confusion.paired_test(true, first, second, seed=0, resamples=4000)
    expected = intervals_by_rows(true, [first, second], 4000)
    np.testing.assert_allclose(
        [found[name]["interval"] for name in ("accuracy", "macro_f1")], expected, atol=0.006
    )
    # Paired intervals are narrower than those of two independent samples.
    apart = [confusion.bootstrap(true, of, 3, seed=0)["accuracy"] for of in (first, second)]
    assert np.ptp(found["accuracy"]["interval"]) < 0.9 * math.hypot(*np.ptp(apart, axis=1))


def test_swapping_the_runs_flips_the_paired_test(pair):
    true, first, second = pair
    one, other = (
        confusion.paired_test(true, *of, seed=0, resamples=4000)
        for of in ((first, second), (second, first))
    )
    assert one["accuracy"]["difference"] > 0
    assert (one["wins"], one["losses"], one["mcnemar_p"]) == (
        other["losses"],
        other["wins"],
        other["mcnemar_p"],
    )
    for name in ("accuracy", "macro_f1"):
        assert one[name]["difference"] == -other[name]["difference"]
        low, high = other[name]["interval"]
        # The seed gives other draws.
        np.testing.assert_allclose(one[name]["interval"], [-high, -low], atol=0.006)


def test_a_run_does_not_differ_from_itself(pair):
    true, first, _ = pair
    nothing = {"difference": 0.0, "interval": [0.0, 0.0]}
    found = confusion.paired_test(true, first, first, seed=0)
    assert found == {
        "rows": 300,
        "accuracy": nothing,
        "macro_f1": nothing,
        "wins": 0,
        "losses": 0,
        "mcnemar_p": 1.0,
    }


@given(st.integers(0, 400), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_mcnemar_matches_a_plain_sum(wins, losses):
    n = wins + losses
    tail = Fraction(sum(math.comb(n, i) for i in range(min(wins, losses) + 1)), 2**n)
    assert confusion.mcnemar(wins, losses) == pytest.approx(min(1.0, float(2 * tail)), rel=1e-10)
    assert confusion.mcnemar(wins, losses) == confusion.mcnemar(losses, wins) <= 1


def test_mcnemar_of_many_rows():
    # The normal distribution with continuity correction: |101000 - 100000| - 1 over its standard
    # deviation.
    assert confusion.mcnemar(100_000, 101_000) == pytest.approx(
        math.erfc(999 / math.sqrt(201_000) / math.sqrt(2)), rel=1e-4
    )
    assert confusion.mcnemar(0, 5000) == 0.0  # 2 ** -4999


# --- the report


def test_a_report_has_every_metric():
    true, probabilities = scored(150, 4)
    labels = ["north", "east", "south", "west"]
    found = confusion.report(true, probabilities, labels, seed=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    predicted = probabilities.argmax(1)
    matrix = confusion.confusion_matrix(true, predicted, 4)
    assert (
        found["rows"] == 150 and found["confusion"] == matrix.tolist() and found["labels"] == labels
    )
    assert {
        name: found[name] for name in ("accuracy", "macro_f1", "calibration_error")
    } == confusion.figures(true, probabilities)
    assert found["intervals"] == confusion.bootstrap(true, predicted, 4, seed=2)
    for name, column in confusion.per_class(matrix).items():
        assert [found["per_class"][label][name] for label in labels] == column.tolist()


def test_a_report_leaves_out_empty_bins():
    true, probabilities = scored(150, 4)
    bins = confusion.report(true, probabilities, list("abcd"), seed=0)["reliability"]
    assert sum(one["rows"] for one in bins) == 150
    assert all(one["rows"] and one["low"] < one["confidence"] <= one["high"] for one in bins)
    error = sum(one["rows"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / 150
    assert error == pytest.approx(confusion.calibration_error(true, probabilities))


def test_labels_must_match_the_probabilities():
    true, probabilities = scored(50, 3)
    with pytest.raises(ValueError):
        confusion.report(true, probabilities, ["a", "b"], seed=0)
    with pytest.raises(ValueError):
        confusion.report(true, probabilities, list("abcd"), seed=0)


def test_reports_of_edge_cases_are_valid_json():
    one_right = confusion.report([1], [[0.0, 1.0]], ["no", "yes"], seed=0)
    assert one_right["intervals"] == {"accuracy": [1.0, 1.0], "macro_f1": [1.0, 1.0]}
    single = np.array([[0.2, 0.8]], dtype=np.float32)  # as a model gives them
    json.dumps([one_right, confusion.report([0], single, ["no", "yes"], seed=0)], allow_nan=False)


# --- the charts


def size(path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:])


LABELS = {
    2: ["no", r"$\yes$"],  # no formula, and one that does not parse
    # letters that some fonts lack, and one that all fonts lack
    5: ["여행", "경제", "a\nb", "\U0010ffff", "x" * 300],
    42: [f"org:place_of_headquarters_{i}" for i in range(42)],
}


@pytest.mark.parametrize("n_labels", LABELS)
def test_charts_are_drawn_without_output(n_labels, tmp_path, caplog, capfd):
    true, probabilities = scored(400, n_labels)
    report = confusion.report(true, probabilities, LABELS[n_labels], seed=0)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        paths = chart.draw(report, tmp_path, "a_title $ of 한글 $")
    assert paths == [tmp_path / "confusion.png", tmp_path / "reliability.png"]
    # Ignore what matplotlib says when it rebuilds its font list.
    assert [record.message for record in caplog.records if "font cache" not in record.message] == []
    assert capfd.readouterr().out == ""
    (width, height), (reliability_width, reliability_height) = map(size, paths)
    least, most = {2: (600, 1300), 5: (700, 1500), 42: (1800, 3200)}[n_labels]
    assert least < width < most and least < height < most
    assert 700 < reliability_width < 1300 and 1000 < reliability_height < 1500


def test_bins_show_accuracy_and_its_gap_to_confidence():
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    bins = [dict(low=0.5, high=0.6, accuracy=0.4, confidence=0.55)]
    bins += [dict(low=0.9, high=1.0, accuracy=1.0, confidence=0.95)]
    axes = Figure().add_subplot()
    chart.draw_bins(axes, bins)
    (diagonal,) = axes.lines
    assert np.array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    # accuracy, too confident, too cautious
    assert heights == pytest.approx([0.4, 1.0, 0.15, 0.0, 0.0, 0.05])


def test_counts_are_written_where_they_fit(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    written = []
    text = Axes.text
    monkeypatch.setattr(
        Axes,
        "text",
        lambda self, x, y, s, **more: written.append((x, y, s)) or text(self, x, y, s, **more),
    )
    report = confusion.report([0, 0, 0, 1, 2], np.eye(3)[[0, 0, 1, 1, 0]], ["a", "b", "c"], seed=0)
    chart.draw_confusion(report, tmp_path / "a.png", "")
    matrix = report["confusion"]
    assert written == [(x, y, str(matrix[y][x])) for y in range(3) for x in range(3)]
    written.clear()
    many = confusion.report(
        [0] * 30, np.eye(14)[np.arange(30) % 2], list(map(str, range(14))), seed=0
    )
    chart.draw_confusion(many, tmp_path / "b.png", "")
    assert written == [(0, 0, "15"), (1, 0, "15")]  # With many labels, zeros are not written.
    written.clear()
    many["confusion"] = (np.array(many["confusion"]) * 10**9).tolist()
    chart.draw_confusion(many, tmp_path / "c.png", "")
    assert not written


def test_a_font_is_found_for_letters_outside_matplotlibs(monkeypatch):
    from matplotlib.font_manager import fontManager

    own = chart.glyphs_of(chart.FONT)
    other = next(
        font
        for font in fontManager.ttflist
        if font.name == "STIXGeneral" and font.style == "normal"
    )
    hyphened = dataclasses.replace(other, name="A-Name: hyphened", weight=400)
    monkeypatch.setattr(fontManager, "ttflist", [hyphened, *fontManager.ttflist])
    lacking = chr(min(chart.glyphs_of("STIXGeneral") - own))
    fonts, glyphs = chart.fonts_for(["plain", f"not plain {lacking}"])
    assert fonts == [chart.FONT, "A-Name: hyphened"]
    assert ord(lacking) in glyphs and own < glyphs
    for none_needed_or_none_has in ("plain", "\U0010ffff"):
        assert chart.fonts_for([none_needed_or_none_has]) == ([chart.FONT], own)


def test_without_matplotlib_there_are_no_charts(tmp_path, monkeypatch):
    true, probabilities = scored(20, 2)
    report = confusion.report(true, probabilities, ["no", "yes"], seed=0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert chart.draw(report, tmp_path, "title") == []
    assert list(tmp_path.iterdir()) == []
