"""Baselines for the same rows as GPT-2: scikit-learn's naive Bayes, and a linear model on TF-IDF.

Both see a text as a bag of features. A joint bag could not compare the two texts of a pair, so each
feature of a pair says where it occurs: in both texts, only in the first or only in the second.
Nothing depends on a language. Runs of characters describe languages without spaces.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BaselineKind = Literal["naive-bayes", "tf-idf"]
Text = tuple[str, ...]  # the one or two texts of a row

WORD = re.compile(r"\w+|[^\w\s]")
CHARACTERS = (2, 3, 4)  # lengths of the runs of characters
# Candidates for logistic regression's C. On all data tried, the best one is not at either end.
INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0)
DEFAULT_INVERSE_PENALTY = 3.0  # if no label has enough rows to hold out a tenth
TENTH = 10
UNSEEN = 1e-9  # probability of a label that no training row has


@dataclass(frozen=True)
class TextModel:
    """A fitted classifier of texts."""

    features: Any  # scikit-learn's vectorizer and classifier
    classifier: Any
    n_labels: int

    @property
    def n_parameters(self) -> int:
        """Number of fitted parameters, without the weights of TF-IDF."""
        names = ("coef_", "intercept_", "feature_log_prob_", "class_log_prior_")
        return sum(
            getattr(self.classifier, name).size for name in names if hasattr(self.classifier, name)
        )

    def log_probs(self, texts: Sequence[Text]) -> np.ndarray:
        """Log-probabilities of the labels (n, K), float64. They are log(UNSEEN) for a label without
        training rows."""
        found = np.full((len(texts), self.n_labels), np.log(UNSEEN))
        found[:, self.classifier.classes_] = self.classifier.predict_log_proba(
            self.features.transform(texts)
        )
        return found


def fit_text_model(
    kind: BaselineKind,
    texts: Sequence[Text],
    labels: np.ndarray,
    n_labels: int,
    seed: int,
    sample_weight: np.ndarray | None = None,
) -> TextModel:
    """Fit a classifier to n rows of one or two texts, with labels (n,) int64 from 0 to K - 1, of
    which at least two occur.

    naive-bayes: multinomial, over counts of words. tf-idf: logistic regression (L2) on the TF-IDF
    of words, pairs of neighbouring words, and runs of 2 to 4 characters within a word. Its penalty
    is the one with the lowest loss on a held-out tenth of each label's rows, drawn with `seed`.
    sample_weight: (n,) weights of the rows' losses, None for ones.
    """
    weights = np.ones(len(labels)) if sample_weight is None else sample_weight
    fit = _fit_naive_bayes if kind == "naive-bayes" else functools.partial(_fit_tf_idf, seed=seed)
    return TextModel(*fit(texts, labels, weights), n_labels)


def _fit_naive_bayes(
    texts: Sequence[Text], labels: np.ndarray, weights: np.ndarray
) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    features = CountVectorizer(analyzer=functools.partial(_placed, _words))
    return features, MultinomialNB().fit(features.fit_transform(texts), labels, weights)


def _fit_tf_idf(
    texts: Sequence[Text], labels: np.ndarray, weights: np.ndarray, seed: int
) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_union

    # Words and character runs are two bags of norm 1 each. In a single bag, the many character runs
    # would outweigh the words.
    analyzers = (functools.partial(_placed, grams) for grams in (_words_and_pairs, _character_runs))
    features = make_union(
        *(TfidfVectorizer(analyzer=analyzer, sublinear_tf=True) for analyzer in analyzers)
    )
    x = features.fit_transform(texts)

    def fit(rows: np.ndarray, inverse_penalty: float) -> Any:
        return LogisticRegression(C=inverse_penalty, max_iter=1000).fit(
            x[rows], labels[rows], weights[rows]
        )

    def loss(inverse_penalty: float) -> float:
        log_p = fit(~held, inverse_penalty).predict_log_proba(x[held])
        return -(
            weights[held] * log_p[np.arange(len(log_p)), np.searchsorted(kinds, labels[held])]
        ).sum()

    held, kinds = _tenth_of_each(labels, seed), np.unique(labels)
    best = min(INVERSE_PENALTIES, key=loss) if held.any() else DEFAULT_INVERSE_PENALTY
    return features, fit(np.ones(len(labels), bool), best)


def _tenth_of_each(labels: np.ndarray, seed: int) -> np.ndarray:
    """A tenth of the rows of each label, rounded down, (n,) bool. The other rows have every label
    too."""
    generator, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held[rows[: len(rows) // TENTH]] = True
    return held


# --- features of a text


def _placed(grams: Callable[[str], list[str]], text: Text) -> list[str]:
    """The features of a row. Those of a pair of texts are distinct and say where they occur: in
    both texts, in the first or in the second."""
    if len(text) == 1:
        return grams(text[0])
    # dict.fromkeys is a set that keeps the order of the text
    first, second = (dict.fromkeys(grams(part)) for part in text)
    both = [f"both:{gram}" for gram in first if gram in second]
    alone = [f"first:{gram}" for gram in first if gram not in second]
    return [*both, *alone, *(f"second:{gram}" for gram in second if gram not in first)]


def _words(text: str) -> list[str]:
    """Runs of letters and digits, and every other character by itself, in lower case."""
    return WORD.findall(text.lower())


def _words_and_pairs(text: str) -> list[str]:
    words = _words(text)
    return words + [f"{word} {after}" for word, after in zip(words, words[1:])]


def _character_runs(text: str) -> list[str]:
    """Character runs of each word. A space at both ends of the word makes runs at its beginning and
    end differ from those in its middle."""
    spaced = [f" {word} " for word in _words(text)]
    return [
        word[i : i + n] for word in spaced for n in CHARACTERS for i in range(len(word) - n + 1)
    ]
