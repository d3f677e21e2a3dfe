"""Finds texts that share a 13-gram, thirteen words in a row, with other texts.

Words are runs of letters, digits and underscores, in lower case. A text of fewer than thirteen
words is shared only if the other text has exactly these words. GPT-3's report (Brown et al. 2020)
uses 13-grams to find training texts in benchmarks.

The index holds the n-grams of one set of texts, and the other set is streamed. So memory grows with
the smaller set alone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from base.sources import specs_of
from config import UserError
from storage.cache import Cache, digest
from text import corpus, readers
from text.corpus import Segment
from text.files import files_of, suffix_of

N = 13  # words of an n-gram
EXAMPLES = 3  # shared texts that a report shows
SHOWN = 100  # characters of each that are shown
BATCH = 1 << 22  # characters that are compared at a time
KEPT = 1 << 22  # characters of training texts above which the cache keeps the result
SHARED = "shared.npy"  # file of the cache that tells which rows are shared
WORD = re.compile(r"\w+")
Item = TypeVar("Item")
Score = TypeVar("Score")
SEEN_BITS = 24
SEEN_SHIFT = np.uint64(64 - SEEN_BITS)
ASCII_WORDS = str.maketrans({c: c.lower() if WORD.match(c) else " " for c in map(chr, range(128))})
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a hash is lost


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    # This is twice as fast as the regular expression, which took most of the time.
    return text.translate(ASCII_WORDS).split() if text.isascii() else WORD.findall(text.lower())


class NgramIndex:
    """The n-grams of some texts. Hashes find candidates, and the words themselves confirm them."""

    def __init__(self, texts: Sequence[str]):
        self.n_texts = len(texts)
        # Id 0 stands for words that no text of the index has.
        self._ids: dict[str, int] = {}
        parts = list(batches(texts, len))
        grams = [self._grams(part, grow=True) for part in parts]
        words, starts, owners = _joined(grams, list(map(len, parts)))
        drawn = np.random.default_rng(0).integers(1 << 64, size=len(self._ids) + 1, dtype=np.uint64)
        self._hashes_of_words = drawn
        hashes = self._hashes(words, starts)
        order = np.argsort(hashes, kind="stable")
        self._words, self._hashes_found = words, hashes[order]
        self._starts, self._owners = starts[order], owners[order]
        self.n_grams = len(starts)
        # A table by the first bits of a hash. It saves most searches among the sorted hashes.
        self._seen = np.zeros(1 << SEEN_BITS, bool)
        self._seen[hashes >> SEEN_SHIFT] = True

    def _grams(
        self, texts: Sequence[str], grow: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The word ids of texts in one array, the place at which each n-gram begins, and the number
        of its text. A short text is padded with "", which no word equals."""
        words = list(map(words_of, texts))
        for each in words:
            if each:
                each += [""] * (N - len(each))
        flat = itertools.chain.from_iterable(words)
        lengths = np.array([len(each) for each in words], np.int64)
        if grow:
            known = self._ids
            numbers: Iterable[int] = (known.setdefault(word, len(known) + 1) for word in flat)
        else:
            numbers = map(self._ids.get, flat, itertools.repeat(0))
        ids = np.fromiter(numbers, np.int32, int(lengths.sum()))
        owners = np.repeat(np.arange(len(texts)), lengths)
        starts = np.flatnonzero(owners[: 1 - N] == owners[N - 1 :])
        return ids, starts, owners[starts]

    def _hashes(self, words: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The polynomial hash of each n-gram, (len(starts),) uint64."""
        each, found = self._hashes_of_words[words], np.zeros(len(starts), np.uint64)
        for i in range(N):
            found = found * FACTOR + each[starts + i]
        return found

    def _matches(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """For each n-gram of `texts` that the index has: where its hash first stands in the index,
        and the number of its text."""
        words, starts, owners = self._grams(texts)
        if not len(starts) or not len(self._starts):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        hashes = self._hashes(words, starts)
        hits = np.flatnonzero(self._seen[hashes >> SEEN_SHIFT])
        places = np.searchsorted(self._hashes_found, hashes[hits])
        equal = self._hashes_found[np.minimum(places, len(self._starts) - 1)] == hashes[hits]
        places, hits = places[equal], hits[equal]
        own = starts[hits]
        same = np.ones(len(hits), bool)
        for i in range(N):
            same &= self._words[self._starts[places] + i] == words[own + i]
        return places[same], owners[hits[same]]

    def contains(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text shares an n-gram with a text of the index, (len(texts),) bool."""
        found = np.zeros(len(texts), bool)
        found[self._matches(texts)[1]] = True
        return found

    def found_in(self, others: Iterable[str]) -> np.ndarray:
        """Whether each text of the index shares an n-gram with one of `others`, (n_texts,) bool."""
        hit = np.zeros(len(self._hashes_found), bool)
        for batch in batches(others, len):
            hit[self._matches(batch)[0]] = True
        # Equal n-grams have equal hashes, which stand next to each other.
        first = np.searchsorted(self._hashes_found, self._hashes_found)
        shared = np.zeros(self.n_texts, bool)
        shared[self._owners[hit[first]]] = True
        return shared


def batches(items: Iterable[Item], size_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in lists whose sizes add up to about BATCH. There is at least one list."""
    batch, size = list[Item](), 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    yield batch


def _joined(
    parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], texts: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of batches as those of one batch. See NgramIndex._grams. texts: the number of
    texts in each batch."""
    words, starts, owners = zip(*parts, strict=True)
    before = np.cumsum([0, *map(len, words)])
    starts = [start + n for start, n in zip(starts, before)]
    owners = [owner + n for owner, n in zip(owners, np.cumsum([0, *texts]))]
    return np.concatenate(words), np.concatenate(starts), np.concatenate(owners)


# ---- the texts of files


def documents(source: corpus.Source) -> Iterator[list[str]]:
    """The documents of a source, each as a list of its pieces."""
    pieces = list[str]()
    for text, starts in source.segments():
        if starts and pieces:
            yield pieces
            pieces = []
        pieces.append(text)
    if pieces:
        yield pieces


def texts_of(spec: str, column: str) -> Iterator[str]:
    """The texts that `spec` names, in any form that --data takes but token shards.

    A row's text is its `column`. Without such a column it is all of its text cells, so that a
    benchmark's file need not be converted. Rows that cannot be read are left out.
    """
    specs = [source.spec for source in specs_of(spec)]
    if specs != [spec]:
        for each in specs:
            yield from texts_of(each, column)
        return
    files = files_of(spec)
    if files is None:
        name, _, config = spec.partition(":")
        for _, cells in corpus.HubDataset(name, config or None).records():
            yield _text_of(cells, column)
        return
    for path in files:
        if suffix_of(path) in readers.ROW_SUFFIXES:
            for _, cells in corpus.records_of(path):
                yield _text_of(cells, column)
        else:
            yield from map("".join, documents(corpus.TextFiles([path])))


def _text_of(cells: dict[str, Any] | str, column: str) -> str:
    if isinstance(cells, str):
        return ""  # what is wrong with the row
    return "\n".join(_strings(cells.get(column) or cells))


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value of JSON, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


class Decontaminated:
    """The documents of a source that share no n-gram with the texts of an index. A document is in
    memory whole."""

    def __init__(self, source: corpus.Source, index: NgramIndex):
        self._source, self._index = source, index
        self.total = source.total
        self.left_out = 0  # documents so far

    @property
    def position(self) -> int:
        """Bytes of the source that were read so far."""
        return self._source.position

    def state(self) -> Any:
        """The place in the source. Reading cannot resume there."""
        return self._source.state()

    def segments(self, state: Any = None) -> Iterator[Segment]:
        """All documents that share no n-gram, in pieces."""
        for batch in batches(documents(self._source), lambda pieces: sum(map(len, pieces))):
            shared = self._index.contains(["".join(pieces) for pieces in batch])
            self.left_out += int(shared.sum())
            for pieces, leave_out in zip(batch, shared, strict=True):
                if not leave_out:
                    yield from ((text, not n) for n, text in enumerate(pieces))


# ---- a report


@dataclass(frozen=True)
class Overlap:
    """Which rows of an evaluation share an n-gram with a training text."""

    rows: Sequence[str]
    shared: np.ndarray  # (rows,) bool

    def part(self, ids: np.ndarray) -> Overlap:
        """The overlap of the rows with these ids."""
        return Overlap([self.rows[i] for i in ids], self.shared[ids])

    @property
    def counts(self) -> dict[str, Any]:
        """The counts for a report, and the beginnings of the first shared rows."""
        shared = np.flatnonzero(self.shared)
        examples = [" ".join(self.rows[i].split())[:SHOWN] for i in shared[:EXAMPLES]]
        return {
            "rows": len(self.rows),
            "clean_rows": len(self.rows) - len(shared),
            "shared_rows": len(shared),
            "examples": examples,
        }

    @property
    def summary(self) -> str:
        """The counts and the examples in one line."""
        return summary(self.counts)


def summary(counts: Mapping[str, Any]) -> str:
    """`Overlap.counts` in one line."""
    examples = "; ".join(map(repr, counts["examples"]))
    return (
        f"{counts['clean_rows']:,} of {counts['rows']:,} rows share no {N} words in a row with the "
        f"training rows{f', others do: {examples}' if examples else ''}"
    )


def overlap(rows: Sequence[str], training: Iterable[str]) -> Overlap:
    """Find the `rows` of an evaluation that share an n-gram with a `training` text."""
    return Overlap(rows, NgramIndex(rows).found_in(training))


def kept_overlap(
    rows: Sequence[str], training: Sequence[str], cache: Path, say: Callable[[str], None]
) -> Overlap:
    """Like `overlap`, but a long search is made once: its result is kept in the folder `cache`, for
    other ranks and later starts."""

    def make(folder: Path) -> None:
        np.save(folder / SHARED, overlap(rows, training).shared)

    if sum(map(len, training)) < KEPT:
        return overlap(rows, training)
    key = digest(SHARED, N, list(rows), list(training))[:32]
    try:
        return Overlap(rows, np.load(Cache(cache).get_or_make(key, make, say) / SHARED))
    except UserError:  # the cache cannot be written
        return overlap(rows, training)


def with_clean(scores: Mapping[str, Score], clean: Mapping[str, Score]) -> dict[str, Score]:
    """Each score NAME, followed by clean_NAME, the same score of the clean rows if it is known."""
    found: dict[str, Score] = {}
    for name, value in scores.items():
        found[name] = value
        if name in clean:
            found[f"clean_{name}"] = clean[name]
    return found
