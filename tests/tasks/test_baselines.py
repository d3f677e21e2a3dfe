"""The baselines beside GPT-2 classify texts and pairs by their words and character runs."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.classification.baselines import TextModel, fit_text_model

KINDS = ("naive-bayes", "tf-idf")
GOOD, BAD = ("warm", "funny", "splendid", "bright"), ("dull", "tired", "stale", "grim")
NOUNS = ("film", "story", "cast", "song", "plot", "ending", "scene", "hero")


def reviews(n: int, seed: int) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """n texts about anything, and whether their adjectives are positive."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    words = [
        (*generator.choice((BAD, GOOD)[label], 2), *generator.choice(NOUNS, 2)) for label in labels
    ]
    return [(f"A {a} {c} and a {b} {d}.",) for a, b, c, d in words], labels


def pairs(n: int, seed: int) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """n pairs of texts, and whether both have the same words. No single word predicts the label."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n)
    nouns = [generator.permutation(NOUNS) for _ in range(n)]
    return [(" ".join(words[:3]), " ".join(words[2::-1] if same else words[3:6]))
            for words, same in zip(nouns, labels, strict=True)], labels  # fmt: skip


def accuracy(model: TextModel, texts: list[tuple[str, ...]], labels: np.ndarray) -> float:
    return float((model.log_probs(texts).argmax(1) == labels).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_learns_and_gives_probabilities(kind) -> None:
    model = fit_text_model(kind, *reviews(100, 1), 2, seed=1)
    texts, labels = reviews(50, 2)
    log_p = model.log_probs(texts)
    assert log_p.shape == (50, 2) and log_p.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=1e-12)
    assert accuracy(model, texts, labels) == 1
    assert log_p[np.arange(50), labels].mean() > np.log(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_words_identify_a_pair(kind) -> None:
    model = fit_text_model(kind, *pairs(200, 1), 2, seed=1)
    assert accuracy(model, *pairs(100, 2)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_pair_matters(kind) -> None:
    """Entailment needs this: extra words in the second text differ from extra words in the
    first."""
    texts = [("a dog runs", "a dog runs fast"), ("a dog runs fast", "a dog runs")] * 20
    model = fit_text_model(kind, texts, np.array([0, 1] * 20), 2, seed=1)
    assert (
        accuracy(
            model, [("he sings fast", "he sings"), ("he sings", "he sings fast")], np.array([1, 0])
        )
        == 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_character_runs_match_inflected_words(kind) -> None:
    """Korean attaches particles to words, so whole words match little of new texts."""
    texts = [
        ("영화는 재미있다",),
        ("영화가 재미있어서",),
        ("음악은 지루하다",),
        ("음악이 지루해서",),
    ] * 5
    model = fit_text_model(kind, texts, np.array([1, 1, 0, 0] * 5), 2, seed=1)
    right = accuracy(model, [("재미있네요",), ("지루하네요",)], np.array([1, 0]))
    assert right == (1 if kind == "tf-idf" else 0.5)  # naive Bayes only knows whole words


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_is_repeatable(kind) -> None:
    texts, labels = reviews(60, 1)
    labels[::7] ^= 1  # wrong labels, so that the model is uncertain
    one, other = (fit_text_model(kind, texts, labels, 2, seed=3).log_probs(texts) for _ in range(2))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_weight_two_is_two_rows(kind) -> None:
    """The rows are too few to hold any out. Otherwise a row and its copy could be on both sides."""
    texts = [("warm film",), ("dull film",), ("warm song",), ("dull song",), ("warm dull",)]
    labels = np.array([1, 0, 1, 0, 1])
    doubled = fit_text_model(kind, [*texts, texts[4]], np.append(labels, 1), 2, seed=1)
    weighed = fit_text_model(
        kind, texts, labels, 2, seed=1, sample_weight=np.array([1.0, 1, 1, 1, 2])
    )
    plain = fit_text_model(kind, texts, labels, 2, seed=1)
    if kind == "naive-bayes":  # TF-IDF ignores weights when it counts the rows of a word
        np.testing.assert_allclose(weighed.log_probs(texts), doubled.log_probs(texts), rtol=1e-12)
    assert (weighed.log_probs(texts)[:, 1] > plain.log_probs(texts)[:, 1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_without_rows_is_nearly_impossible(kind) -> None:
    texts, labels = reviews(40, 1)
    p = np.exp(fit_text_model(kind, texts, labels * 2, 4, seed=1).log_probs(texts))
    assert p.shape == (40, 4) and (p[:, [1, 3]] < 1e-8).all() and (p[:, [1, 3]] > 0).all()
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-7)
    assert (p.argmax(1) == labels * 2).all()


def test_held_out_rows_choose_the_penalty() -> None:
    """The better the texts predict the label, the smaller the penalty. For random labels it is the
    largest."""
    texts, labels = reviews(300, 1)
    chance = np.random.default_rng(0).integers(0, 2, 300)
    clear, noise = (
        fit_text_model("tf-idf", texts, of, 2, seed=1).classifier.C for of in (labels, chance)
    )
    assert noise < clear


def test_parameters_are_counted() -> None:
    """Naive Bayes has the probabilities of two words under each label and of each label. A linear
    model has its weights."""
    texts, labels = [("a a",), ("b",)], np.array([0, 1])
    assert fit_text_model("naive-bayes", texts, labels, 2, seed=1).n_parameters == 2 * 2 + 2
    # Features: the words a and b, the pair "a a", and the runs " a", "a " and " a " of each word.
    assert fit_text_model("tf-idf", texts, labels, 2, seed=1).n_parameters == 3 + 6 + 1
