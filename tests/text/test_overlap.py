"""Shared 13-grams against an exhaustive plain reference, and whole runs that report or use them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import REPO
from text import overlap
from text.overlap import Decontaminated, NgramIndex, kept_overlap, words_of
from text.overlap import overlap as find_overlap


def grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[\w]+", text.lower())
    if len(words) < 13:
        return {tuple(words)} if words else set()
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@pytest.mark.parametrize("seed", range(40))
def test_shared_texts_are_those_of_the_plain_reference(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(overlap, "BATCH", draw.choice([1, 50, 1 << 20]))

    def text() -> str:
        words = draw.choices(["a", "A", "b", "é,", "-"], k=draw.choice([0, 2, 12, 13, 14, 30]))
        return " ".join(words)

    first, second = ([text() for _ in range(draw.randint(0, 12))] for _ in range(2))
    known = {gram for each in second for gram in grams(each)}
    index, own = NgramIndex(first), {gram for each in first for gram in grams(each)}
    assert index.found_in(second).tolist() == [bool(grams(each) & known) for each in first]
    assert index.contains(second).tolist() == [bool(grams(each) & own) for each in second]


def test_equal_hashes_of_different_words_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        NgramIndex, "_hashes", lambda self, words, starts: np.zeros(len(starts), np.uint64)
    )
    assert NgramIndex(["one"]).contains(["two", "one"]).tolist() == [False, True]


def test_words_are_those_of_the_regular_expression() -> None:
    for text in ("".join(map(chr, range(128))), "It's É-2_b\x1cc", "\u0130 \u00df"):
        assert words_of(text) == re.findall(r"[\w]+", text.lower())


def test_a_document_in_pieces_is_left_out_whole() -> None:
    words = [f"w{i}" for i in range(30)]
    pieces = [(" ".join(words[:6]), True), (" " + " ".join(words[6:]), False), ("other", True)]

    class Source:
        total, position = None, 0

        def state(self) -> None: ...

        def segments(self, state: Any = None) -> Any:
            return iter(pieces)

    source = Decontaminated(Source(), NgramIndex([" ".join(words[2:15])]))
    assert list(source.segments()) == [("other", True)] and source.left_out == 1


def test_a_report_shows_counts_and_examples() -> None:
    rows = [f"row {n} " + "word " * 20 for n in range(9)] + ["short", "another"]
    counts = find_overlap(rows, ["word " * 13, "short and long"]).counts
    assert (counts["rows"], counts["clean_rows"], counts["shared_rows"]) == (11, 2, 9)
    assert [text[:6] for text in counts["examples"]] == ["row 0 ", "row 1 ", "row 2 "]


def test_a_long_search_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is kept for the same texts alone. A cache that cannot be written is no error."""
    monkeypatch.setattr(overlap, "KEPT", 20)
    searches: list[int] = []

    def search(rows: list[str], training: list[str]) -> overlap.Overlap:
        searches.append(len(training))
        return find_overlap(rows, training)

    monkeypatch.setattr(overlap, "overlap", search)
    cache, training, said = tmp_path / "cache", ["one two", "three"] * 4, list[str]()

    def shared(training: list[str], folder: Path = cache) -> list[bool]:
        found = kept_overlap(["three", "four"], training, folder, said.append)
        return found.shared.tolist()

    assert shared(training) == shared(training) == [True, False] and searches == [8]
    assert shared([*training, "four"]) == [True, True] and searches == [8, 9]
    assert shared(["four"]) == [False, True] and len(list(cache.glob("*/*"))) == 2  # a short one
    (tmp_path / "file").touch()
    assert shared(training, tmp_path / "file") == [True, False] and searches == [8, 9, 1, 8]


def test_pretraining_leaves_out_documents_of_an_evaluation(run: Any, tmp_path: Path) -> None:
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=40)) for _ in range(60)]
    separator = "\n<|endoftext|>\n"
    (tmp_path / "all.txt").write_text(separator.join(texts))
    (tmp_path / "kept.txt").write_text(separator.join(texts[:10] + texts[12:]))
    rows = [{"ctx": texts[n][10:60], "endings": ["x"]} for n in (10, 11)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "one two"}))
    run(
        REPO / "tokenizer.py",
        "train",
        "--input",
        "all.txt",
        "--vocab-size",
        270,
        "--out",
        "bpe",
        cwd=tmp_path,
    )

    def train(out: str, *words: Any) -> Any:
        shape = (
            "--preset micro --seq-len 16 --batch-tokens 64 --steps 1 --tokenizer bpe --eval-every 0"
        )
        return run(REPO / "train_gpt2.py", *shape.split(), "--out", out, *words, cwd=tmp_path)

    assert train("kept", "--data", "kept.txt").returncode == 0
    without = ("--data", "all.txt", "--decontaminate")
    done = train("run", *without, "rows.jsonl")
    assert done.returncode == 0 and "2 documents left out" in done.stdout, done.stderr
    weights = [
        (tmp_path / name / "final/model.safetensors").read_bytes() for name in ("kept", "run")
    ]
    assert weights[0] == weights[1]
    other = train("run", *without, "other.jsonl")
    assert other.returncode == 2 and "decontaminate (was" in other.stderr
    shard = next((tmp_path / "data/cache").glob("*/train*.bin"))
    refused = train("new", "--data", shard.parent, "--decontaminate", "rows.jsonl")
    assert refused.returncode == 2 and "token shards" in refused.stderr
