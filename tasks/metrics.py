"""Figures that evaluations report: pure functions of counts and of texts.

Counts are additive, a sum and what it is over, so that batches and ranks combine exactly. What does
not add up (F1, chrF, rhymes) is computed from the texts of all ranks together. Scores of texts that
have a reference are 0 to 100, as the literature gives them; shares are 0 to 1.
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

REPEATED = 4  # words of the n-grams that the repetition rate counts
# lines of ABAB CDCD EFEF GG
SONNET_RHYMES = ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 13))

# kana, Han, Hangul
ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"(?=[{ALONE}])\w|[^\W_{ALONE}]+")


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """chrF (Popović 2015) of a corpus, 0 to 100: sacrebleu's corpus_chrf with its defaults."""
    import sacrebleu

    return sacrebleu.corpus_chrf(hypotheses, [references]).score


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits; a Han character, a kana and a Hangul syllable is a
    word by itself.

    On ASCII text these are the tokens of rouge_score, whose own tokenizer keeps nothing else.
    """
    return WORD.findall(text.lower())


class _StemmedWords:
    """The tokenizer that rouge_score calls: `words`, those of four letters and more without their
    endings."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        return [self.stem(word) if len(word) > 3 else word for word in words(text)]


def rouge(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004): the F1 of each text with stemmed words, mean over texts, 0 to
    100.

    rouge_score's figures on ASCII text; any other letters count too, see `words`.
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

    Each question has one or more answers, of which the best match counts, and is compared in lower
    case without punctuation, articles and extra white space.
    """
    exact, f1 = [], []
    for prediction, accepted in zip(predictions, answers, strict=True):
        given, golds = _plain(prediction), [_plain(answer) for answer in accepted]
        exact.append(max(float(given == gold) for gold in golds))
        f1.append(max(_overlap_f1(given.split(), gold.split()) for gold in golds))
    return {"exact_match": 100 * _mean(exact), "f1": 100 * _mean(f1)}


def _plain(text: str) -> str:
    """An answer as SQuAD compares it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _overlap_f1(given: list[str], gold: list[str]) -> float:
    shared = (Counter(given) & Counter(gold)).total()
    return 2 * shared / (len(given) + len(gold)) if shared else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al. 2016): different n-grams of a text's words over all of them, mean over
    texts.

    A text of fewer than n words counts 0. Longer texts score lower by their length alone.
    """
    ngrams = [_word_ngrams(text, n) for text in texts]
    return _mean([len(set(grams)) / max(1, len(grams)) for grams in ngrams])


def repetition_rate(texts: Sequence[str]) -> float:
    """The share of a text's 4-grams of words that stood in it before, mean over texts: Welleck et
    al. (2020), seq-rep-4.

    A text of fewer than four words repeats nothing.
    """
    ngrams = [_word_ngrams(text, REPEATED) for text in texts]
    return _mean([(len(grams) - len(set(grams))) / max(1, len(grams)) for grams in ngrams])


def _word_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return list(zip(*(found[i:] for i in range(n))))


def copied(texts: Sequence[str], training: Sequence[str]) -> dict[str, float]:
    """The most words in a row that a text has from the training texts; nothing without those."""
    if not training:
        return {}
    return {"longest_copied": float(longest_copied(texts, training).max(initial=0))}


def longest_copied(texts: Sequence[str], training: Iterable[str]) -> np.ndarray:
    """For each text the most words in a row that stand somewhere in the training texts, (n,) int64.

    Exact: runs grow word by word, at every place at once, and only those that both sides have grow
    further.
    """
    import numpy as np  # here, because a task's --help imports this module

    vocabulary: dict[str, int] = {}
    copy, owner = _numbered(texts, vocabulary, end=0)
    # another end: no run goes past the end of a text
    source, _ = _numbered(training, vocabulary, end=1)
    longest = np.zeros(len(texts), dtype=np.int64)
    at_copy, at_source = np.arange(len(copy)), np.arange(len(source))
    run_copy, run_source, length = copy, source, 1
    while True:
        copied, read = np.isin(run_copy, run_source), np.isin(run_source, run_copy)
        if not copied.any():
            return longest
        at_copy, at_source = at_copy[copied], at_source[read]
        longest[owner[at_copy]] = length
        # A run of one word more: the run's number and the word's, numbered anew lest they outgrow
        # 64 bits.
        runs = np.concatenate((run_copy[copied], run_source[read])) * (len(vocabulary) + 2)
        runs += np.concatenate((copy[at_copy + length], source[at_source + length]))
        run_copy, run_source = np.split(np.unique(runs, return_inverse=True)[1], [len(at_copy)])
        length += 1


def _numbered(
    texts: Iterable[str], vocabulary: dict[str, int], end: int
) -> tuple[np.ndarray, np.ndarray]:
    """The words of all texts as numbers from 2 on, each text followed by `end`; and the text of
    each."""
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
    """How many of the lines that should rhyme in a sonnet, ABAB CDCD EFEF GG, do by CMU's
    pronunciations.

    Two last words rhyme where some pronunciation of each has the same sounds from its last stressed
    vowel on. A word does not rhyme with itself, and a line that is missing rhymes with nothing. A
    pair with a word that the dictionary lacks is not counted: `rhyming_coverage` is the share of
    pairs that are. Pairs within the first `given` lines, which a prompt gave, are left out. Shares
    of 0 to 1, over the pairs of all poems; 0 where there is none.
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
    """With the apostrophes inside it; the part after a hyphen. Empty where a line has no
    letters."""
    return (re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", line.lower().replace("’", "'")) or [""])[-1]


def _rhyme(first: str, second: str) -> bool | None:
    """None where the dictionary lacks one of the words."""
    if not first or not second or first == second:
        return False
    sounds = _rhyming_parts(first), _rhyming_parts(second)
    return bool(sounds[0] & sounds[1]) if all(sounds) else None


def _rhyming_parts(word: str) -> set[str]:
    """The end of each pronunciation from its last stressed vowel, whether that bears the first
    stress or the second."""
    import pronouncing

    return {
        re.sub(r"\d", "", pronouncing.rhyming_part(phones))
        for phones in pronouncing.phones_for_word(word)
    }


def line_count_accuracy(texts: Sequence[str], lines: int = 14) -> float:
    """The share of texts with exactly that many lines that are not blank."""
    return _mean([sum(bool(line.strip()) for line in text.splitlines()) == lines for text in texts])


def _mean(values: Sequence[float]) -> float:
    """0 of no values."""
    return math.fsum(values) / max(1, len(values))
