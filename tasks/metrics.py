"""Metrics of generated texts, as pure functions.

Metrics such as F1, chrF and rhymes do not add up over batches, so they are computed from the texts
of all ranks together. Scores against a reference are 0 to 100, as in the literature. Fractions are
0 to 1.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

REPETITION_N = 4  # the n of the n-grams in the repetition rate
# pairs of rhyming lines, from 0, in the scheme ABAB CDCD EFEF GG
SONNET_RHYMES = ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))

# kana, Han, Hangul
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"(?=[{CJK}])\w|[^\W_{CJK}]+")


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """chrF (Popović 2015) of a corpus, 0 to 100: sacrebleu's corpus_chrf with its defaults."""
    import sacrebleu

    return sacrebleu.corpus_chrf(hypotheses, [references]).score


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits. Each Han character, kana and
    Hangul syllable is a word by itself.

    On ASCII text these are the tokens of rouge_score. Its own tokenizer drops all other letters.
    """
    return WORD.findall(text.lower())


class _StemmedWords:
    """A tokenizer for rouge_score: `words`, with those of four or more letters stemmed."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Called by rouge_score."""
        return [self.stem(word) if len(word) > 3 else word for word in words(text)]


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004): the F1 over stemmed words, mean over texts, 0 to 100.

    On ASCII text the figures equal rouge_score's. Other letters count too, see `words`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=_StemmedWords())
    scores = [
        scorer.score(reference, hypothesis)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return {kind: 100 * _mean([score[kind].fmeasure for score in scores]) for kind in kinds}


def squad(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and word F1 as SQuAD 1.1 scores them (Rajpurkar et al. 2016), mean over
    questions, 0 to 100.

    Each question has one or more accepted answers, and the best match counts. Texts are compared in
    lower case, without punctuation, articles and extra white space.
    """
    exact, f1 = [], []
    for prediction, accepted in zip(predictions, answers, strict=True):
        answer, golds = _normalised(prediction), [_normalised(gold) for gold in accepted]
        exact.append(max(float(answer == gold) for gold in golds))
        f1.append(max(_overlap_f1(answer.split(), gold.split()) for gold in golds))
    return {"exact_match": 100 * _mean(exact), "f1": 100 * _mean(f1)}


def _normalised(text: str) -> str:
    """An answer as SQuAD compares it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _overlap_f1(answer: list[str], gold: list[str]) -> float:
    shared = (Counter(answer) & Counter(gold)).total()
    return 2 * shared / (len(answer) + len(gold)) if shared else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al. 2016): the fraction of distinct n-grams among a text's word n-grams,
    mean over texts.

    A text of fewer than n words counts as 0. Longer texts score lower only because of their length.
    """
    ngrams = [_word_ngrams(text, n) for text in texts]
    return _mean([len(set(grams)) / max(1, len(grams)) for grams in ngrams])


def repetition_rate(texts: Sequence[str]) -> float:
    """seq-rep-4 (Welleck et al. 2020): the fraction of a text's word 4-grams that occurred earlier
    in it, mean over texts.

    A text of fewer than four words counts as 0.
    """
    ngrams = [_word_ngrams(text, REPETITION_N) for text in texts]
    return _mean([(len(grams) - len(set(grams))) / max(1, len(grams)) for grams in ngrams])


def _word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return list(zip(*(found[i:] for i in range(n))))


def copied(texts: Sequence[str], training: Sequence[str]) -> dict[str, float]:
    """The longest run of words that any text copies from the training texts, as a metric. {}
    without training texts."""
    if not training:
        return {}
    return {"longest_copied": float(longest_copied(texts, training).max(initial=0))}


def longest_copied(texts: Sequence[str], training: Iterable[str]) -> np.ndarray:
    """The length of the longest run of words that each text shares with a training text, (n,)
    int64.

    Exact. All runs grow by one word at a time, at every start at once. A run that only one side has
    is dropped.
    """
    import numpy as np  # here, because a task's --help imports this module

    vocabulary: dict[str, int] = {}
    copy, owner = _numbered(texts, vocabulary, end=0)
    # The two sides have different ends, so no run goes past the end of a text.
    source, _ = _numbered(training, vocabulary, end=1)
    longest = np.zeros(len(texts), dtype=np.int64)
    copy_starts, source_starts = np.arange(len(copy)), np.arange(len(source))
    run_copy, run_source, length = copy, source, 1
    while True:
        copied, read = np.isin(run_copy, run_source), np.isin(run_source, run_copy)
        if not copied.any():
            return longest
        copy_starts, source_starts = copy_starts[copied], source_starts[read]
        longest[owner[copy_starts]] = length
        # A longer run is the pair of the run's number and the next word's number. The pairs are
        # renumbered, so that they do not outgrow 64 bits.
        runs = np.concatenate((run_copy[copied], run_source[read])) * (len(vocabulary) + 2)
        runs += np.concatenate((copy[copy_starts + length], source[source_starts + length]))
        run_copy, run_source = np.split(np.unique(runs, return_inverse=True)[1], [len(copy_starts)])
        length += 1


def _numbered(
    texts: Iterable[str], vocabulary: dict[str, int], end: int
) -> tuple[np.ndarray, np.ndarray]:
    """The words of all texts as numbers from 2, with `end` after each text, and the number of the
    text that each belongs to."""
    import numpy as np

    numbers: list[int] = []
    lengths = []
    for text in texts:
        before = len(numbers)
        numbers.extend(vocabulary.setdefault(word, len(vocabulary) + 2) for word in words(text))
        numbers.append(end)
        lengths.append(len(numbers) - before)
    return np.array(numbers, dtype=np.int64), np.repeat(np.arange(len(lengths)), lengths)


def rhyming_accuracy(poems: Sequence[str], given: int = 0) -> dict[str, float]:
    """The fraction of the pairs of lines in a sonnet (ABAB CDCD EFEF GG) that rhyme, by the CMU
    pronouncing dictionary.

    Two last words rhyme if a pronunciation of each has the same sounds from its last stressed vowel
    on. A word does not rhyme with itself, and a missing line rhymes with nothing. Pairs with a word
    that is not in the dictionary are not counted, and "rhyming_coverage" is the fraction of pairs
    that are. Pairs within the first `given` lines come from the prompt and are left out. Both
    figures are 0 to 1, over the pairs of all poems, and 0 without pairs.
    """
    known, rhyming, pairs = 0, 0, 0
    for poem in poems:
        ends = [_last_word(line) for line in poem.splitlines() if line.strip()]
        ends += [""] * (SONNET_RHYMES[-1][-1] + 1 - len(ends))
        for first, second in SONNET_RHYMES:
            if second >= given:
                rhyme = _rhyme(ends[first], ends[second])
                pairs += 1
                known += rhyme is not None
                rhyming += rhyme is True
    return {"rhyming_accuracy": rhyming / max(1, known), "rhyming_coverage": known / max(1, pairs)}


def _last_word(line: str) -> str:
    """The last word of a line with its inner apostrophes, or its part after a hyphen. Empty if the
    line has no letters."""
    return (re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", line.lower().replace("’", "'")) or [""])[-1]


def _rhyme(first: str, second: str) -> bool | None:
    """Whether two words rhyme. None if the dictionary lacks one of them."""
    if not first or not second or first == second:
        return False
    sounds = _rhyming_parts(first), _rhyming_parts(second)
    return bool(sounds[0] & sounds[1]) if all(sounds) else None


def _rhyming_parts(word: str) -> set[str]:
    """The sounds of each pronunciation from its last stressed vowel on. Primary and secondary
    stress count the same."""
    import pronouncing

    return {
        re.sub(r"\d", "", pronouncing.rhyming_part(phones))
        for phones in pronouncing.phones_for_word(word)
    }


def line_count_accuracy(texts: Sequence[str], lines: int = 14) -> float:
    """The fraction of texts with exactly `lines` lines that are not blank."""
    return _mean([sum(bool(line.strip()) for line in text.splitlines()) == lines for text in texts])


def _mean(values: Sequence[float]) -> float:
    """The mean, or 0 without values."""
    return math.fsum(values) / max(1, len(values))
