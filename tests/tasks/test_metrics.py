"""Metrics against values worked out by hand, and against the libraries of the field."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import scoring, similarity
from support import own_lines
from tasks import metrics

# Few characters, so that n-grams repeat within a text and between texts, with several kinds of
# white space and with other scripts than Latin.
TEXTS = st.lists(st.text(alphabet="ab \n\u3000한é", max_size=14), min_size=1, max_size=5)


def naive_pairwise(texts):
    return np.array([[sacrebleu.sentence_chrf(a, [b]).score for b in texts] for a in texts])


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_pairwise_chrf_is_sacrebleus_sentence_chrf(texts):
    np.testing.assert_allclose(
        similarity.pairwise_chrf(texts), naive_pairwise(texts), rtol=1e-12, atol=1e-12
    )


def test_pairwise_chrf_by_hand():
    # Order 1: 1 of the 2 characters of "ab", and the 1 of "a". Higher orders do not count.
    # F = 5PR / (4P + R).
    np.testing.assert_allclose(
        similarity.pairwise_chrf(["ab", "a"]), [[100, 250 / 3], [500 / 9, 100]]
    )
    np.testing.assert_array_equal(similarity.pairwise_chrf(["ab", "", "ab"])[:, 1], [0, 0, 0])
    assert similarity.pairwise_chrf([]).shape == (0, 0)


@given(TEXTS, st.randoms())
@settings(max_examples=30, deadline=None)
def test_pairwise_chrf_follows_the_order_of_its_texts(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    shuffled = similarity.pairwise_chrf([texts[i] for i in order])
    np.testing.assert_allclose(
        shuffled, similarity.pairwise_chrf(texts)[np.ix_(order, order)], rtol=1e-12
    )


def test_chrf_of_a_corpus():
    references = ["From fairest creatures we desire increase,", "봄은 온다", "x"]
    assert metrics.chrf(references, references) == pytest.approx(100)
    # For a single text, the corpus score is the sentence score.
    assert metrics.chrf(["ab"], ["a"]) == pytest.approx(250 / 3)
    half = metrics.chrf(["From fairest creatures", "봄", "y"], references)
    assert 0 < half < 100
    assert half == pytest.approx(
        metrics.chrf(["y", "From fairest creatures", "봄"], ["x", *references[:2]])
    )


ENGLISH = st.text(alphabet="abt heHErning'-_.,0", max_size=40)


@given(ENGLISH, ENGLISH)
@settings(max_examples=80, deadline=None)
def test_rouge_of_ascii_matches_rouge_score(hypothesis, reference):
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(
        reference, hypothesis
    )
    ours = metrics.rouge([hypothesis], [reference])
    assert ours == pytest.approx({kind: 100 * score.fmeasure for kind, score in theirs.items()})


def test_rouge_by_hand():
    # Stems: "the cat run" and "the cat run fast". Unigrams 3 of 3 and 3 of 4, bigrams 2 of 2 and
    # 2 of 3.
    assert metrics.rouge(["The cats, running"], ["the cat runs fast"]) == pytest.approx(
        {"rouge1": 600 / 7, "rouge2": 400 / 5, "rougeL": 600 / 7}
    )
    assert metrics.rouge(["bus"], ["bu"])["rouge1"] == 0  # Words of three letters are not stemmed.
    # The longest common subsequence of a b c d and c d a b has 2 words. The mean is over texts.
    both = metrics.rouge(["a b c d", "x"], ["c d a b", "y"])
    assert both == pytest.approx({"rouge1": 50, "rouge2": 100 / 3, "rougeL": 25})


def test_rouge_counts_words_of_every_script():
    assert metrics.words("봄은 café, 日本_ラーメン!") == [
        "봄",
        "은",
        "café",
        "日",
        "本",
        "ラ",
        "ー",
        "メ",
        "ン",
    ]
    assert metrics.rouge(["봄은"], ["봄이"])["rouge1"] == pytest.approx(50)
    assert metrics.rouge(["Привет мир"], ["привет, мир!"])["rouge2"] == pytest.approx(100)


def test_squad_by_hand():
    answers = [["The Norman dukes", "Normans"], ["1066"], ["in Paris, France"]]
    # Equal without article, case and punctuation; no common word; 1 word of 1 and of 3.
    scores = metrics.squad(
        ["an norman-dukes!", "in 1067", "Paris"], [["The normandukes"], *answers[1:]]
    )
    assert scores == pytest.approx({"exact_match": 100 / 3, "f1": (100 + 0 + 50) / 3})
    # The best answer counts.
    assert metrics.squad(["normans"], answers[:1]) == {"exact_match": 100, "f1": 100}
    # Both texts are empty after normalisation, as in the official script.
    assert metrics.squad(["the"], [["A!"]]) == {"exact_match": 100, "f1": 0}


ANSWERS = st.text(alphabet="an theTHE cat.,\n\u00a0é", min_size=1, max_size=20)


@given(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=3), st.randoms())
@settings(max_examples=80, deadline=None)
def test_squad_takes_the_best_answer_and_any_order_of_words(prediction, answers, random):
    each = [metrics.squad([prediction], [[answer]]) for answer in answers]
    scores = metrics.squad([prediction], [answers])
    assert scores == {kind: max(score[kind] for score in each) for kind in scores}
    assert scores["f1"] == 100 or scores["exact_match"] == 0 or not metrics._normalised(prediction)
    shuffled = " ".join(random.sample(prediction.split(), len(prediction.split())))
    assert metrics.squad([shuffled], [answers])["f1"] == scores["f1"]
    assert metrics.squad(answers[:1], [[prediction]]) == each[0]


def test_distinct_and_repetition_by_hand():
    texts = ["a rose is a rose", "one two", ""]
    assert metrics.distinct(texts, 1) == pytest.approx((3 / 5 + 1 + 0) / 3)
    assert metrics.distinct(texts, 2) == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert metrics.repetition_rate(["la " * 10]) == pytest.approx(6 / 7)
    assert metrics.repetition_rate(["la " * 10, "a b c d e", "a a"]) == pytest.approx(2 / 7)
    assert metrics.distinct([], 1) == metrics.repetition_rate([]) == 0


def naive_copied(text, training):
    copied, spans = (
        metrics.words(text),
        [f" {' '.join(metrics.words(other))} " for other in training],
    )
    runs = (copied[i:j] for i in range(len(copied)) for j in range(i + 1, len(copied) + 1))
    return max(
        (len(run) for run in runs if any(f" {' '.join(run)} " in span for span in spans)), default=0
    )


FEW_WORDS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "aa"]), max_size=12).map(" ".join), max_size=4
)


@given(FEW_WORDS, FEW_WORDS)
@settings(max_examples=100, deadline=None)
def test_longest_copied_matches_a_plain_search(texts, training):
    assert metrics.longest_copied(texts, training).tolist() == [
        naive_copied(text, training) for text in texts
    ]


def test_longest_copied_by_hand():
    training = ["Shall I compare thee to a summer's day?", "Thou art more lovely"]
    texts = ["shall I compare thee, to THE summer", "day thou art", "", "nothing", training[1]]
    assert metrics.longest_copied(texts, training).tolist() == [5, 2, 0, 0, 4]


def poem(*ends):
    return "\n".join(f"A line that ends in {end}," for end in ends)


GOOD = [
    "day",
    "light",
    "way",
    "night",
    "tree",
    "moon",
    "sea",
    "June",
    "rose",
    "heart",
    "grows",
    "self-part",
    "me",
    "be",
]


def test_rhymes_by_hand():
    assert metrics.rhyming_accuracy([poem(*GOOD)]) == {"rhyming_accuracy": 1, "rhyming_coverage": 1}
    worse = poem(
        "day",
        "light",
        "day",
        "night",
        "tree",
        "moon",
        "xqzzt",
        "June",
        *GOOD[8:12],
        "love",
        "prove",
    )
    # A word does not rhyme with itself, unknown words do not count, love and prove only look alike.
    assert metrics.rhyming_accuracy([worse]) == pytest.approx(
        {"rhyming_accuracy": 4 / 6, "rhyming_coverage": 6 / 7}
    )
    # Without the last two lines, and without the pair within the prompt's three lines.
    assert metrics.rhyming_accuracy([poem(*GOOD[:12])])["rhyming_accuracy"] == pytest.approx(6 / 7)
    given = metrics.rhyming_accuracy([poem("day", "light", "grass", "stone", *GOOD[4:])], given=3)
    assert given == pytest.approx({"rhyming_accuracy": 5 / 6, "rhyming_coverage": 1})
    # The pairs of all poems count together, and blank lines are skipped.
    two = metrics.rhyming_accuracy([poem(*GOOD).replace("\n", "\n\n"), ""])
    assert two == {"rhyming_accuracy": 0.5, "rhyming_coverage": 1}
    assert metrics.rhyming_accuracy([]) == {"rhyming_accuracy": 0, "rhyming_coverage": 0}


def test_rhymes_follow_the_dictionary():
    import pronouncing

    for word in ("night", "conditioner", "read", "o'clock"):
        assert all(metrics._rhyme(word, other) for other in pronouncing.rhymes(word)[:50])
    assert metrics._rhyme("late", "congregate")  # Secondary stress rhymes with primary stress.
    assert metrics._rhyme("night", "day") is False and metrics._rhyme("night", "mak'st") is None
    assert metrics._last_word("And tender churl, mak’st o’er-- ") == "o'er"


def test_true_sonnets_rhyme_and_shuffled_lines_do_not(repo):
    file = repo.parent / "shared/data/cs224n/sonnets.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    poems = [
        poem.strip() for poem in re.split(r"\n\s*\d+\s*\n", file.read_text(encoding="utf-8"))[1:]
    ]
    # One sonnet has 15 lines and one has 12.
    assert metrics.line_count_accuracy(poems) == pytest.approx(129 / 131)
    true = metrics.rhyming_accuracy(poems)
    assert true["rhyming_accuracy"] > 0.75 and true["rhyming_coverage"] > 0.9
    lines = [line for poem in poems for line in poem.splitlines()]
    np.random.default_rng(0).shuffle(lines)
    shuffled = ["\n".join(lines[i : i + 14]) for i in range(0, len(lines) - 13, 14)]
    assert metrics.rhyming_accuracy(shuffled)["rhyming_accuracy"] < 0.05


def test_line_count():
    assert metrics.line_count_accuracy(["a\n\nb\n", "a", "a\nb\nc"], lines=2) == pytest.approx(
        1 / 3
    )
    assert metrics.line_count_accuracy(["x\n" * 14]) == 1


def test_perplexity_and_bits():
    assert scoring.perplexity(4 * np.log(8), 4) == pytest.approx(8)
    assert scoring.perplexity(1e6, 1) == float("inf")
    assert scoring.bits_per_byte(16 * np.log(2), 4) == pytest.approx(4)


QUIET = """
from tasks import metrics
text = "From fairest creatures we desire increase"
metrics.chrf([text], [text]), metrics.rouge([text], [text]), metrics.rhyming_accuracy([text])
"""


def test_the_libraries_print_nothing_and_need_no_network(run, tmp_path):
    # The proxy's port is closed, and a new home folder has no data of NLTK.
    nowhere = {
        "HOME": str(tmp_path),
        "NLTK_DATA": str(tmp_path),
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }
    done = run("-W", "always", "-c", QUIET, env=nowhere, fresh=True)
    assert (done.returncode, done.stdout, own_lines(done.stderr)) == (0, "", "")
