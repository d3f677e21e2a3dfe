"""What stands beside GPT-2 on the same rows: scikit-learn's naive Bayes, and a linear model on
TF-IDF.

Both see a text as a bag of what occurs in it. Such a bag of two texts could not compare them, so
that a pair is described by where each thing stands: in both texts, in the first alone or in the
second alone. Nothing here knows a language: what has no words between spaces is known by its
characters.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

BaselineKind = Literal["naive-bayes", "tf-idf"]
Text = tuple[str, ...]  # the one text of a row, or the two

WORD = re.compile(r"\w+|[^\w\s]")
CHARACTERS = (2, 3, 4)  # lengths of the runs of characters that count
# of which a tenth of the rows chooses: the best one lies within, on all data tried
INVERSE_PENALTIES = (0.3, 1.0, 3.0, 10.0)
FEW = 3.0  # the one for rows so few that no label has a tenth
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
        """Numbers that were fitted, without the weights of TF-IDF."""
        names = ("coef_", "intercept_", "feature_log_prob_", "class_log_prior_")
        return sum(
            getattr(self.classifier, name).size for name in names if hasattr(self.classifier, name)
        )

    def log_probs(self, texts: Sequence[Text]) -> np.ndarray:
        """Log-probabilities of the labels (n, K), float64; a label that no training row had has
        next to none."""
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
    """Fit a classifier to n rows of one text, or of two, with labels (n,) int64 of at least two
    kinds from 0 to K - 1.

    naive-bayes: multinomial, over counts of words. tf-idf: logistic regression (L2) on TF-IDF of
    words, pairs of neighbouring words and runs of 2 to 4 characters within a word; how much it is
    regularised, a tenth of the rows of each label that is held out once decides by its loss, drawn
    by `seed`. sample_weight: of each row's loss, (n,).
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

    # A union of two and not one bag: each has the norm 1, else the many runs of characters would
    # drown the words.
    of = (functools.partial(_placed, grams) for grams in (_words_and_pairs, _character_runs))
    features = make_union(
        *(TfidfVectorizer(analyzer=analyzer, sublinear_tf=True) for analyzer in of)
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
    best = min(INVERSE_PENALTIES, key=loss) if held.any() else FEW
    return features, fit(np.ones(len(labels), bool), best)


def _tenth_of_each(labels: np.ndarray, seed: int) -> np.ndarray:
    """A tenth of the rows of each label, rounded down, (n,) bool: every label is among the other
    rows too."""
    generator, held = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        held[rows[: len(rows) // TENTH]] = True
    return held


# --- what occurs in a text


def _placed(grams: Callable[[str], list[str]], text: Text) -> list[str]:
    """What occurs in a text; of two, each thing that does, marked by where: in both, in the first,
    in the second."""
    if len(text) == 1:
        return grams(text[0])
    # sets that keep the order of the text
    first, second = (dict.fromkeys(grams(part)) for part in text)
    both = [f"both:{gram}" for gram in first if gram in second]
    alone = [f"first:{gram}" for gram in first if gram not in second]
    return [*both, *alone, *(f"second:{gram}" for gram in second if gram not in first)]


def _words(text: str) -> list[str]:
    """Runs of letters and digits, and each other sign by itself."""
    return WORD.findall(text.lower())


def _words_and_pairs(text: str) -> list[str]:
    words = _words(text)
    return words + [f"{word} {after}" for word, after in zip(words, words[1:])]


def _character_runs(text: str) -> list[str]:
    """With a space at either end of a word, so that its beginning and its end are told from its
    middle."""
    ends = [f" {word} " for word in _words(text)]
    return [word[i : i + n] for word in ends for n in CHARACTERS for i in range(len(word) - n + 1)]
