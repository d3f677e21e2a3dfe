"""Labels: their order and names, those that are refused, weights and label words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from moods import LABELS, ROWS, WORDS, mood, quick, row
from tasks.classification.labels import find_labels, label_name, word_ids
from text.rows import Row


@given(
    numbers=st.lists(st.integers(-20, 20), min_size=2, unique=True),
    words=st.lists(st.sampled_from(WORDS), min_size=3),
)
@quick
def test_labels_are_sorted_as_numbers_or_as_words(numbers, words):
    def labels(cells: list[str]) -> tuple[str, ...]:
        return find_labels([Row({"label": cell}, "") for cell in cells])

    ordered = tuple(map(str, sorted(numbers)))
    assert labels([*map(str, numbers)] * 3) == labels([f" {n}.0 " for n in numbers] * 3) == ordered
    if len(set(words)) > 1:
        assert labels([f"{word} " for word in words] * 3) == tuple(sorted(set(words)))


def test_label_names_are_normalised():
    names = {
        "1.0": "1",
        " 2 ": "2",
        "-1": "-1",
        "0.5": "0.5",
        "1e3": "1000",
        "nan": "nan",
        "inf": "inf",
        "so so": "so so",
        "1_1": "1_1",
        "+3": "3",
        "9007199254740993": "9007199254740993",
        "1e300": "1e300",
    }
    assert {cell: label_name(cell) for cell in names} == names


def test_labels_that_are_no_classes_are_refused():
    def rows(*cells: str) -> list[Row]:
        return [Row({"label": cell}, f"a.csv line {n}") for n, cell in enumerate(cells, 2)]

    with pytest.raises(
        UserError, match="all 3 training rows have the label '2'; give rows with two labels"
    ):
        find_labels(rows("2", "2.0", " 2"))
    with pytest.raises(
        UserError, match=r"a.csv line 3: the label 'two' is not a number, but most others are"
    ):
        find_labels(rows("1", "two", "2", "1"))
    assert find_labels(rows("1", "one", "two", "one")) == ("1", "one", "two")
    many = [f"{n}" for n in range(21)]
    with pytest.raises(
        UserError, match=r"22 training rows have 21 labels, too many .* with --label-column"
    ):
        find_labels(rows(*many, "1"))
    assert len(find_labels(rows(*many, *many, *many))) == 21


def test_an_unseen_label_is_refused_with_the_known_ones(tokenizer):
    for known, found, why in (
        (
            ("bad", "good"),
            "goood",
            r"'goood' is none of the training rows' labels \(did you mean good\?\); use one of bad, "
            r"good",
        ),
        (
            ("0", "1"),
            "good",
            r"'good' is not a number, but those of the training rows are; use one of 0, 1",
        ),
        (
            ("0", "1"),
            "-1",
            r"'-1' is none of the training rows' labels \(did you mean 1\?\); use one of 0, 1",
        ),
        (("0", "0.5"), "1.5", r"'1.5' is none of the training rows' labels"),
    ):
        train = [row("a", label) for label in known]
        with pytest.raises(UserError, match=f"val row 1: the label {why}"):
            mood(tokenizer, train, [row("b", known[0]), row("c", found)])
        assert mood(tokenizer, train, [row("b", f"{known[0]} ")]).val.labels.tolist() == [0]


def test_an_overlap_above_one_percent_is_refused(tokenizer):
    train = [row(f"stone {n} of", LABELS[n % 2]) for n in range(200)]
    for both, told in ((2, "2 of 200 training rows (1.0%)"), (3, "3 of 200 training rows (1.5%)")):
        val = [row(f"Stone  {n} OF ") for n in range(both)] + [row("rain")]
        if both == 3:
            with pytest.raises(
                UserError,
                match=re.escape(told)
                + " are also validation rows; remove them, or .*--allow-overlap",
            ):
                mood(tokenizer, train, val, allow_overlap=False)
        task = mood(tokenizer, train, val, allow_overlap=both == 3)
        assert task.source.warnings == [f"{told} are also validation rows"]


def test_class_weights_and_augment_weight(tokenizer):
    def weights(**options: Any) -> list[float]:
        task = mood(tokenizer, **options)
        assert task.val.weights.tolist() == [1.0] * len(ROWS)
        return task.train.weights.tolist()

    of = [LABELS.index(r["label"]) for r in ROWS]
    assert weights() == [1.0] * 7
    assert weights(class_weights=("1", "2.5", "0")) == [(1.0, 2.5, 0.0)[label] for label in of]
    assert weights(class_weights=("balanced",)) == pytest.approx(
        [7 / (3 * of.count(label)) for label in of]
    )
    assert weights(augment="more", augment_weight=0.25) == [1.0] * 7 + [0.25] * 2
    both = weights(augment="more", augment_weight=0.5, class_weights=("2", "1", "1"))
    assert both == [2.0 if label == 0 else 1.0 for label in of] + [1.0, 0.5]
    with pytest.raises(
        UserError,
        match="--class-weights 1 2: give balanced, or 3 numbers, for the labels bad, good, so-so",
    ):
        weights(class_weights=("1", "2"))


def test_label_words_are_scored_by_their_first_token(tokenizer):
    task = mood(tokenizer, form="word")
    assert task.info.words == LABELS  # the word is the label's name
    assert (
        task.objective.scorer.word_ids == [tokenizer.encode(f" {word}")[0] for word in LABELS]
        and len(set(task.objective.scorer.word_ids)) == 3
    )
    assert word_ids(tokenizer, ["rain ", " town"]) == [
        tokenizer.encode(" rain")[0],
        tokenizer.encode(" town")[0],
    ]
    assert mood(tokenizer, form="word", words=("rain", "town", "stone")).info.words == (
        "rain",
        "town",
        "stone",
    )
    numbers = [row("a", "0"), row("b", "1")]
    with pytest.raises(
        UserError, match="--form word: name 2 words with --words, one for each of 0, 1"
    ):
        mood(tokenizer, numbers, form="word")
    with pytest.raises(UserError, match="two of the words rain, rain begin with the same token"):
        mood(tokenizer, numbers, form="word", words=("rain", "rain"))
