"""Text to shards, shards to windows, the order of windows, and the error line of each bad input."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from config import UserError
from dataset import window_order
from engine import data
from engine.data import open_data
from engine.mixture import Dataset
from storage import shards
from support import python_path
from text import corpus, prepare, readers, tokenizing
from text.files import stdlib_files
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe

REPO = Path(__file__).resolve().parent.parent
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "was",
    "his",
    "he",
    "it",
    "with",
    "is",
    "for",
    "as",
    "had",
    "you",
    "not",
    "be",
    "her",
    "on",
    "at",
    "by",
    "which",
    "have",
]


def sentences(rng: np.random.Generator, n: int) -> str:
    lines = (" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(n))
    return "\n".join(line.capitalize() + "." for line in lines)


def make_documents(n: int, seed: int = 0) -> list[str]:
    """Texts with everything that a format could damage: quotes, commas, tabs, blank lines, other
    scripts."""
    rng = np.random.default_rng(seed)
    odd = [
        'He said, "yes"\tand\n\nleft.',
        "한국어 문장입니다. 다음 문장.",
        "x = '\\n'  # <|endoftext|> inside a line",
        "  two  spaces ",
    ]
    return [sentences(rng, int(rng.integers(2, 9))) + odd[i % 4] * (i % 3 == 0) for i in range(n)]


DOCUMENTS = make_documents(230)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a small byte-pair tokenizer."""
    folder = tmp_path_factory.mktemp("bpe") / "small"
    train_bpe(DOCUMENTS, 400, folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "other"
    train_bpe(make_documents(50, 1), 300, folder)
    return str(folder)


@pytest.fixture
def open_here(tmp_path: Path, bpe: str) -> Callable[..., data.Data]:
    def open_here(data: object, **options: object) -> data.Data:
        chosen = dict(
            val_data=None, tokenizer=bpe, text_column="text", cache=tmp_path / "cache", seq_len=16
        )
        return open_data(str(data), **(chosen | options))  # ty: ignore[invalid-argument-type]

    return open_here


def write_txt(path: Path, documents: list[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8", newline="")
    return path


def write_csv(path: Path, documents: list[str], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerows([("id", "text"), *enumerate(documents)])
    return path


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def write_parquet(path: Path, documents: list[str]) -> Path:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    parquet.write_table(table, path, row_group_size=7)
    return path


def write_tsv(path: Path, documents: list[str]) -> Path:
    return write_csv(path, documents, "\t")


WRITERS = {
    ".txt": write_txt,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}


def stream(data: Dataset) -> np.ndarray:
    """All tokens, (n_tokens,)."""
    return data.windows(np.arange(1), data.n_tokens - 1)[0]


def expected(documents: list[str], tokenizer: Tokenizer) -> list[int]:
    return [id for text in documents for id in [tokenizer.eot, *tokenizer.encode(text)]]


def write_bin(
    path: Path, tokens: object, magic: int = 20240520, version: int = 1, count: int | None = None
) -> Path:
    """A shard as llm.c writes it."""
    ids = np.asarray(tokens, np.uint16 if version == 1 else np.uint32)
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


# ---- the order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 1000, 12345])
def test_every_epoch_has_each_window_once(n: int) -> None:
    for seed, epoch in itertools.product((0, 1337, 2**63 + 5), (0, 1, 1000)):
        ids = window_order(np.arange(epoch * n, (epoch + 1) * n), n, seed)
        assert ids.dtype == np.int64
        assert np.array_equal(np.sort(ids), np.arange(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_order_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    assert len(set(window_order(np.arange(n) + epoch * n, n, seed).tolist())) == n


@given(n=st.integers(1, 10**15), seed=st.integers(0, 2**40), data=st.data())
@settings(max_examples=50, deadline=None)
def test_order_is_a_pure_function_of_each_index(n: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, 10**17), min_size=1, max_size=20)))
    whole = window_order(positions, n, seed)
    assert whole.min() >= 0 and whole.max() < n
    assert whole.tolist() == [int(window_order(np.array([p]), n, seed)[0]) for p in positions]


def test_order_never_changes() -> None:
    """A run that another version of the code resumes must continue with the same rows."""
    assert window_order(np.arange(12), 5, 1337).tolist() == [1, 3, 0, 2, 4, 4, 1, 3, 2, 0, 3, 1]


@pytest.mark.parametrize("n", [100, 1000, 12345])
def test_order_looks_random(n: int) -> None:
    place = np.arange(n)
    for seed in range(5):
        ids, later = window_order(place, n, seed), window_order(place + n, n, seed)
        other = window_order(place, n, seed + 1)
        limit = 4.5 / n**0.5  # a random correlation has the standard deviation 1/sqrt(n)
        for a, b in (
            (place, ids),
            (ids[1:], ids[:-1]),
            (ids, later),
            (ids, other),
            (ids % 2, place % 2),
            (ids % 8, place % 8),
        ):
            assert abs(np.corrcoef(a, b)[0, 1]) < limit
        assert (np.abs(np.diff(ids)) == 1).sum() <= 12  # two are expected
        assert (ids == place).sum() <= 8 and (ids == later).sum() <= 8 and (ids == other).sum() <= 8


# A true uniform order exceeds these limits once in 100,000 times.
@pytest.mark.parametrize(("n", "chi2_limit"), [(2, 19.5), (3, 33.0), (7, 90.0)])
def test_small_orders_are_uniform(n: int, chi2_limit: float) -> None:
    """Over many epochs, each window comes equally often at each position."""
    epochs = 4000
    ids = window_order(np.arange(n * epochs), n, 1).reshape(epochs, n)
    counts = np.array([np.bincount(column, minlength=n) for column in ids.T])
    assert (((counts - epochs / n) ** 2) / (epochs / n)).sum() < chi2_limit
    if n == 3:
        kinds = np.unique(ids, axis=0, return_counts=True)[1]
        assert len(kinds) == 6 and ((kinds - epochs / 6) ** 2 / (epochs / 6)).sum() < 30


def test_order_is_quick_at_any_size() -> None:
    begin = time.perf_counter()
    window_order(np.arange(100_000), 10**12 + 1, 0)
    assert time.perf_counter() - begin < 5


# ---- formats


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_tokens(
    suffix: str, compressed: bool, tmp_path: Path, bpe: str, open_here: Callable[..., data.Data]
) -> None:
    path = WRITERS[suffix](
        tmp_path / f"texts{suffix}", ["", *DOCUMENTS[:120], " \n", *DOCUMENTS[120:]]
    )
    if compressed:
        packed = path.with_name(path.name + ".gz")
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        path = packed
    data = open_here(path)
    tokenizer = load_tokenizer(bpe)
    held_out = [text for i, text in enumerate(DOCUMENTS) if i % 100 == 99]
    kept = [text for i, text in enumerate(DOCUMENTS) if i % 100 != 99]
    assert stream(data.train).tolist() == expected(kept, tokenizer)
    assert stream(data.val).tolist() == expected(held_out, tokenizer)
    assert isinstance(data.train, dataset.TokenDataset)
    assert isinstance(data.val, dataset.TokenDataset)
    assert data.train.n_bytes == sum(len(text.encode()) for text in kept)
    assert data.val.n_bytes == sum(len(text.encode()) for text in held_out)
    assert data.tokenizer.sha256 == tokenizer.sha256
    assert data.train.vocab_size == tokenizer.vocab_size


def test_folders_globs_and_lists(tmp_path: Path, open_here: Callable[..., data.Data]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    write_txt(texts / "a.txt", DOCUMENTS[:60])
    write_jsonl(texts / "b.jsonl", DOCUMENTS[60:])
    whole = stream(open_here(write_csv(tmp_path / "all.csv", DOCUMENTS)).train)
    for spec in (
        texts,
        f"{texts}/*",
        f"{texts}/a.txt,{texts}/b.*",
        f"{texts}/**/*.txt, {texts}/b.jsonl",
    ):
        assert np.array_equal(stream(open_here(spec).train), whole)


@given(
    parts=st.lists(
        st.sampled_from(["a", "b ", "\n", "<|endoftext|>", "\r\n", "<|endof", "text|>", " ", "한"]),
        max_size=30,
    ),
    block=st.integers(1, 20),
)
@settings(max_examples=300, deadline=None)
def test_separators_do_not_depend_on_the_blocks(parts: list[str], block: int) -> None:
    text = "".join(parts)
    assert read_txt(text, block) == split_by_line(text)


def read_txt(text: str, block: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK_CHARS", block)
        documents: list[str] = []
        for piece, starts in corpus._read_txt(
            io.BufferedReader(io.BytesIO(text.encode())), Path("a.txt")
        ):
            if starts:
                documents.append(piece)
            else:
                documents[-1] += piece
    return documents


def split_by_line(text: str) -> list[str]:
    """The simple rule that `_read_txt` applies block by block."""
    documents, lines = [], []
    *whole, last = text.split("\n")
    for line in whole:
        if line in ("<|endoftext|>", "<|endoftext|>\r"):
            documents.append("\n".join(lines).removesuffix("\r"))
            lines = []
        else:
            lines.append(line)
    if last == "<|endoftext|>":
        return [*documents, "\n".join(lines).removesuffix("\r"), ""]
    return [*documents, "\n".join([*lines, last])]


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    shared = REPO.parent / "shared" / "data" / "tiktoken_cache"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and not shared.is_dir():
        pytest.skip(
            "needs GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder with tiktoken's files"
        )
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(shared))
    return load_tokenizer("gpt2")


SPLIT_PARTS = [
    "word",
    "'s",
    "'",
    "don't",
    "12",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "...",
    "한국",
    "é",
    "\x1c",
    "\u3000",
    "\x85",
]


@given(parts=st.lists(st.sampled_from(SPLIT_PARTS), min_size=4, max_size=60))
@settings(max_examples=400, deadline=None)
def test_a_long_document_is_cut_where_the_tokenizer_cuts(
    gpt2: Tokenizer, bpe: str, parts: list[str]
) -> None:
    text = "".join(parts)
    for tokenizer in (gpt2, load_tokenizer(bpe)):
        whole = tokenizer.encode(text)
        for seam in readers.SEAM.finditer(text):
            left, right = text[: seam.end()], text[seam.end() :]
            assert tokenizer.encode(left) + tokenizer.encode(right) == whole


def test_a_long_document_is_one_document(
    tmp_path: Path, bpe: str, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 300)
    text = "\n\n".join(DOCUMENTS[:100])
    data = open_here(
        write_txt(tmp_path / "long.txt", [text]),
        val_data=str(write_txt(tmp_path / "val.txt", DOCUMENTS)),
    )
    tokenizer = load_tokenizer(bpe)
    assert stream(data.train).tolist() == expected([text], tokenizer)
    assert len(list(corpus.TextFiles([tmp_path / "long.txt"]).segments())) > 10


def test_few_documents_leave_the_end_of_the_stream(
    tmp_path: Path, bpe: str, open_here: Callable[..., data.Data]
) -> None:
    data = open_here(write_txt(tmp_path / "a.txt", DOCUMENTS[:20]), seq_len=8)
    ids = expected(DOCUMENTS[:20], load_tokenizer(bpe))
    size = max(9, len(ids) // 100)
    assert stream(data.val).tolist() == ids[-size:]
    assert stream(data.train).tolist() == ids[:-size]
    assert isinstance(data.train, dataset.TokenDataset)
    assert isinstance(data.val, dataset.TokenDataset)
    assert (data.train.n_bytes or 0) + (data.val.n_bytes or 0) == sum(
        len(text.encode()) for text in DOCUMENTS[:20]
    )
    assert data.val.n_bytes == len(
        load_tokenizer(bpe).decode([i for i in ids[-size:] if i != ids[0]]).encode()
    )


def test_separate_validation_data(
    tmp_path: Path, bpe: str, open_here: Callable[..., data.Data]
) -> None:
    texts, val = (
        write_txt(tmp_path / "a.txt", DOCUMENTS),
        write_jsonl(tmp_path / "val.jsonl", DOCUMENTS[:9]),
    )
    data = open_here(texts, val_data=str(val))
    assert stream(data.train).tolist() == expected(DOCUMENTS, load_tokenizer(bpe))
    assert stream(data.val).tolist() == expected(DOCUMENTS[:9], load_tokenizer(bpe))


def test_stdlib_needs_no_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = stdlib_files()
    assert 5e6 < sum(path.stat().st_size for path in files) < 25e6
    assert not any("site-packages" in str(path) for path in files)
    for path in files:
        path.read_bytes().decode("utf-8" if path.name != "idlelib" else "latin-1")
    small = [path for path in files if path.parent.name == "json"]
    monkeypatch.setattr(data, "stdlib_files", lambda: small)
    said: list[str] = []
    first = open_data("stdlib", None, None, "text", tmp_path, 16, said.append)
    assert len(said) == 2 and first.tokenizer.vocab_size <= 4096
    again = open_data("stdlib", None, None, "text", tmp_path, 16, said.append)
    assert len(said) == 2 and again.train.sha256 == first.train.sha256
    text = first.tokenizer.decode(stream(first.train).tolist())
    assert text.startswith(
        first.tokenizer.decode([first.tokenizer.eot]) + small[0].read_text()[:100]
    )


class Streamed:
    """A fake streamed hub dataset with the methods that the code uses."""

    def __init__(self, rows: list[dict[str, object]]):
        self.rows, self.at = rows, 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def __iter__(self):
        while self.at < len(self.rows):
            self.at += 1
            yield self.rows[self.at - 1]


def test_a_dataset_on_the_hub(
    bpe: str, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets
    import huggingface_hub

    asked: list[tuple[object, ...]] = []

    def load_dataset(*words: object, **options: object) -> object:
        asked.append(words)
        return datasets.Dataset.from_list(
            [{"text": text} for text in DOCUMENTS]
        ).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc")
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub, from_file = (
        open_here("org/name:small"),
        open_here(write_txt(tmp_path / "a.txt", DOCUMENTS)),
    )
    assert asked == [("org/name", "small")]
    assert np.array_equal(stream(from_hub.train), stream(from_file.train))
    open_here("org/name:small")
    assert len(asked) == 1
    with pytest.raises(UserError, match=r"no column 'txt' \(did you mean text\?\)"):
        open_here("org/name:small", text_column="txt")


# ---- other projects' shards


TOKENS = np.random.default_rng(0).integers(0, 380, 3000)


def write_layout(folder: Path, layout: str) -> Path:
    """Write TOKENS as files in one project's layout, 2500 of them for training."""
    folder.mkdir()
    train, val = TOKENS[:2500], TOKENS[2500:]
    if layout == "llm.c":
        write_bin(folder / "fineweb_val_000000.bin", val)
        write_bin(folder / "fineweb_train_000001.bin", train[:1111])
        write_bin(folder / "fineweb_train_000002.bin", train[1111:])
    elif layout == "uint32":
        write_bin(folder / "x_val_000000.bin", val, 20240801, 7)
        write_bin(folder / "x_train_000001.bin", train, 20240801, 7)
    elif layout == "build-nanogpt":
        np.save(folder / "edufineweb_val_000000.npy", val.astype(np.uint16))
        np.save(folder / "edufineweb_train_000001.npy", train[:7].astype(np.uint16))
        np.save(folder / "edufineweb_train_000002.npy", train[7:].astype(np.uint16))
    else:
        train.astype(np.uint16).tofile(folder / "train.bin")
        val.astype(np.uint16).tofile(folder / "val.bin")
        (folder / "meta.pkl").write_bytes(b"not opened")
    return folder


@pytest.mark.parametrize("layout", ["llm.c", "uint32", "build-nanogpt", "nanoGPT"])
def test_shards_of_other_projects(
    layout: str, tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    data = open_here(write_layout(tmp_path / "shards", layout))
    assert np.array_equal(stream(data.train), TOKENS[:2500])
    assert np.array_equal(stream(data.val), TOKENS[2500:])
    assert isinstance(data.train, dataset.TokenDataset)
    assert data.train.vocab_size is None and data.train.n_bytes is None


@given(
    seq_len=st.integers(1, 60),
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_windows_are_slices_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, seq_len: int, sizes: list[int], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(sum(sizes))
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    files = [write_bin(folder / f"{i:02}.bin", part) for i, part in enumerate(parts)]
    stream = dataset.TokenDataset([shards.read_shard(file) for file in files], "")
    n = stream.n_windows(seq_len)
    assert n == (len(tokens) - 1) // seq_len
    if n:
        ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=9)), np.int64)
        got = pickle.loads(pickle.dumps(stream)).windows(ids, seq_len)
        assert got.dtype == np.int64
        assert np.array_equal(got, ids[:, None] * seq_len + np.arange(seq_len + 1))
    for bad in (-1, n):
        with pytest.raises(IndexError):
            stream.windows(np.array([bad]), seq_len)


def test_shards_written_here_carry_their_tokenizer(
    tmp_path: Path, bpe: str, open_here: Callable[..., data.Data]
) -> None:
    first = open_here(write_txt(tmp_path / "a.txt", DOCUMENTS))
    (made,) = (tmp_path / "cache").glob("*/manifest.json")
    manifest = json.loads(made.read_text())
    assert manifest["documents"] == len(DOCUMENTS) and manifest["empty_documents"] == 0
    assert manifest["tokens"] == first.train.n_tokens + first.val.n_tokens
    moved = tmp_path / "moved"
    made.parent.rename(moved)
    again = open_here(moved, tokenizer=None)
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    assert (again.train.sha256, again.val.sha256) == (first.train.sha256, first.val.sha256)
    alone = open_here(
        moved / "train_000000.bin", tokenizer=None, val_data=str(moved / "val_000000.bin")
    )
    assert (alone.train.sha256, alone.val.sha256) == (first.train.sha256, first.val.sha256)


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Wide(Streamed):
        vocab_size, eot, source = 70_000, 69_999, "gpt2"

        def token_bytes(self, id: int) -> bytes:
            return b"ab"

    wide: Any = Wide([])
    records: list[dict[str, Any]] = []
    writer = shards.ShardWriter(
        tmp_path, "{}.bin".format, wide, 4, lambda r, at: records.append(r | {"at": at})
    )
    writer.add(np.array([69_999, 1, 65_536, 2, 3, 69_999]))
    writer.close()
    written = [shards.read_shard(tmp_path / f"{i}.bin") for i in range(2)]
    assert [shard.map().tolist() for shard in written] == [[69_999, 1, 65_536, 2], [3, 69_999]]
    assert [(r["tokens"], r["documents"], r["bytes"], r["max_id"], r["at"]) for r in records] == [
        (4, 1, 6, 69_999, 4),
        (2, 1, 2, 69_999, 6),
    ]
    assert np.fromfile(tmp_path / "0.bin", np.int32, 3).tolist() == [20240801, 7, 4]


# ---- the cache and its processes


def test_a_second_start_reads_the_cache(
    tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    path, said = write_txt(tmp_path / "a.txt", DOCUMENTS), []
    first = open_here(path, say=said.append)
    assert len(said) == 1 and said[0].startswith("tokenized")
    files = {
        file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()
    }
    again = open_here(path, say=said.append)
    assert len(said) == 1 and again.train.sha256 == first.train.sha256
    assert files == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*") if file.is_file()
    }
    renamed = path.rename(tmp_path / "b.txt")  # the name does not matter, only the content
    open_here(renamed, say=said.append)
    assert len(said) == 1
    write_txt(renamed, DOCUMENTS[1:])
    assert open_here(renamed, say=said.append).train.sha256 != first.train.sha256
    assert len(said) == 2


def test_shards_that_differ_at_their_end_are_other_data(
    tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    hashes = set()
    for last in (1, 2):
        np.save(tmp_path / "train.npy", np.array([*[0] * 99_999, last], np.uint16))
        hashes.add(open_here(tmp_path / "train.npy").train.sha256)
    assert len(hashes) == 2


def test_all_that_changes_the_tokens_tokenizes_again(
    tmp_path: Path, other_bpe: str, open_here: Callable[..., data.Data]
) -> None:
    path, said = write_txt(tmp_path / "a.txt", DOCUMENTS), []
    open_here(path, say=said.append)
    open_here(path, tokenizer=other_bpe, say=said.append)
    open_here(path, val_data=str(path), say=said.append)
    assert len(said) == 3


def test_shards_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(prepare, "SMALL", 0)
    path = write_txt(tmp_path / "a.txt", DOCUMENTS)
    hashes = set()
    for workers in (1, 2, 3):
        monkeypatch.setattr(prepare, "cores", lambda workers=workers: workers)
        data = open_here(path, cache=tmp_path / str(workers))
        hashes.add((data.train.sha256, data.val.sha256))
    assert len(hashes) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_is_bounded(workers: int, bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if results are read slowly, only a few chunks are between input and output."""
    pulled = given_back = 0

    def source():
        nonlocal pulled
        for text in DOCUMENTS[:40]:
            pulled += 1
            yield tokenizing.Chunk([text], [True], 0, None, 0)

    for chunk, tokens, _ in tokenizing.tokenize(source(), load_tokenizer(bpe), workers):
        assert chunk.texts == [DOCUMENTS[given_back]] and len(tokens) > 1
        assert pulled - given_back <= tokenizing.CHUNKS_PER_WORKER * workers
        given_back += 1
        time.sleep(0.005)
    assert given_back == 40


def test_workers_are_not_forked_beside_other_threads(bpe: str) -> None:
    chunks = [tokenizing.Chunk([text], [True], 0, None, 0) for text in DOCUMENTS[:4]]
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        results = [
            ids.tolist() for _, ids, _ in tokenizing.tokenize(iter(chunks), load_tokenizer(bpe), 2)
        ]
    finally:
        stop.set()
        thread.join()
    assert results == [expected([text], load_tokenizer(bpe)) for text in DOCUMENTS[:4]]


def test_progress_on_a_terminal_and_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizing.Progress, "EVERY", 0.0)
    said: list[str] = []
    with tokenizing.Progress("tokenizing a.txt", 40_000_000, said.append) as progress:
        progress.update(10_000_000, 2_000_000)
        time.sleep(0.01)
        progress.update(20_000_000, 4_000_000)
    assert said[0] == "tokenizing a.txt:  25% 10 MB, 2.0M tokens"
    assert re.fullmatch(
        r"tokenizing a.txt:  50% 20 MB, 4.0M tokens, [\d.]+ MB/s, 0:00:0\d left", said[1]
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    threads = threading.active_count()
    monkeypatch.setenv("COLUMNS", "100")
    with tokenizing.Progress("tokenizing a.txt", 40_000_000, said.append) as progress:
        progress.update(10_000_000, 2_000_000)
        assert threading.active_count() == threads  # another thread would prevent the quick fork
    assert len(said) == 2
    assert "10 MB, 2.0M tokens" in capsys.readouterr().err


def test_a_dead_worker_is_an_error(bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [tokenizing.Chunk(["a"], [True], 0, None, 0)] * 4
    # With one thread, workers are forked and so inherit the next line's change.
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(tokenizing, "encode", lambda *_: os._exit(9))
    with pytest.raises(RuntimeError, match=r"died"):
        list(tokenizing.tokenize(iter(chunks), load_tokenizer(bpe), 2))
    monkeypatch.setattr(tokenizing, "encode", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError"):
        list(tokenizing.tokenize(iter(chunks), load_tokenizer(bpe), 2))


SCRIPT = """
import sys, time
from pathlib import Path
from engine import data
from text import corpus, prepare, tokenizing
path, tokenizer, cache, pause = sys.argv[1:]
prepare.SMALL, corpus.CHUNK_CHARS, prepare.cores = 0, 2000, lambda: 2
plain = tokenizing.encode
def encode(*words):
    time.sleep(float(pause))
    return plain(*words)
tokenizing.encode = encode
say = lambda line: print(line, flush=True)
found = data.open_data(path, None, tokenizer, "text", Path(cache), 16, say)
print(found.train.sha256, found.val.sha256)
"""


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": python_path(REPO)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_while_tokenizing(
    how: int, tmp_path: Path, bpe: str, open_here: Callable[..., data.Data]
) -> None:
    path, cache = write_txt(tmp_path / "a.txt", DOCUMENTS), tmp_path / "killed"
    process = start(path, bpe, cache, 0.3)
    wait_for(lambda: any(file.stat().st_size for file in cache.glob("*.tmp/*")))
    process.send_signal(how)
    process.communicate(timeout=10)
    assert process.returncode != 0
    wait_for(lambda: group_is_gone(process), 5)
    assert not list(cache.glob("*/manifest.json")) and not [
        p for p in cache.iterdir() if p.is_dir() and p.suffix != ".tmp"
    ]
    again = open_here(path, cache=cache)
    assert not list(cache.glob("*.tmp"))
    assert again.train.sha256 == open_here(path).train.sha256


def test_leftovers_of_other_data_are_removed(
    tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    left = [
        tmp_path / "cache" / f"{key}.tmp" for key in ("0123456789abcdef" * 2, "bpe-" + "01ab" * 6)
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "train_000000.bin.tmp").write_bytes(b"1")
    open_here(write_txt(tmp_path / "a.txt", DOCUMENTS))
    assert not any(folder.exists() for folder in left)


@pytest.mark.parametrize(
    "name", ["drafts.tmp", ".tmp", "0123.tmp", "0123456789ABCDEF" * 2 + ".tmp", "a" * 33 + ".tmp"]
)
def test_the_users_own_tmp_folders_stay_in_the_cache(
    name: str, tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    own = tmp_path / "cache" / name / "thesis.txt"
    own.parent.mkdir(parents=True)
    own.write_text("years of work")
    open_here(write_txt(tmp_path / "a.txt", DOCUMENTS))
    assert own.read_text() == "years of work"
    assert not (tmp_path / "cache" / f"{own.parent.stem}.lock").exists(), (
        "nor is a lock made beside it"
    )


def test_two_processes_tokenize_once(tmp_path: Path, bpe: str) -> None:
    path, cache = write_txt(tmp_path / "a.txt", DOCUMENTS), tmp_path / "cache"
    both = [start(path, bpe, cache, 0.1) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = [out.splitlines() for out, _ in said]
    assert sum(line.startswith("tokenized") for out in lines for line in out) == 1
    assert sum(line.startswith("waiting for another process") for out in lines for line in out) <= 1
    assert lines[0][-1] == lines[1][-1]


# ---- bad input, and its error line


def bad_text(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


BAD_FILES = [
    ("a.txt", "", "is empty: none of its documents has any text"),
    ("a.txt", "\n<|endoftext|>\n \n", "2 empty ones"),
    (
        "a.txt",
        b"caf\xe9 au lait",
        "is not UTF-8 text; it seems to be ISO-8859-1; convert it: iconv -f ISO-8859-1",
    ),
    ("a.txt.gz", b"\x1f\x8c no gzip", "is not a sound gzip file"),
    (
        "a.txt",
        "too short",
        r"is too short: it has \d+ tokens, and a window of --seq-len 16 needs 17; give more data",
    ),
    ("a.pdf", "x", "has none of the suffixes .txt .jsonl"),
    ("a.jsonl", '{"text": ', "holds no row that can be read: .*a.jsonl line 1 is not valid JSON"),
    ("a.jsonl", '["b"]\n["c"]', "line 1 is not a JSON object"),
    (
        "a.jsonl",
        '{"txt": "a", "id": 1}',
        r"row 1 has no column 'text' \(did you mean txt\?\); it has: txt, id",
    ),
    ("a.jsonl", '{"text": 3}', "row 1 holds int in column 'text', not text"),
    ("a.csv", "id,body\n1,a", "has no column 'text'; it has: id, body. Use --text-column"),
    ("a.csv", "", "is empty: none of its documents"),
    ("a.csv", "id,text\n1,a,b", "line 2 has 3 cells where the first line names 2 columns"),
    ("a.tsv", "id:text\n1:a", "has no column 'text'"),
    ("a.parquet", "x", "is not a sound parquet file"),
]


@pytest.mark.parametrize(("name", "content", "line"), BAD_FILES)
def test_bad_files(
    name: str, content: str | bytes, line: str, tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    with pytest.raises(UserError, match=line) as error:
        open_here(bad_text(tmp_path, name, content))
    assert "\n" not in str(error.value)


def test_a_parquet_column_that_is_not_text(
    tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    path = write_parquet(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(UserError, match=r"row 1 holds int in column 'id', not text"):
        open_here(path, text_column="id")
    with pytest.raises(UserError, match=r"no column 'tex' \(did you mean text\?\)"):
        open_here(path, text_column="tex")


def test_missing_data_is_refused(
    tmp_path: Path, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    command = "python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --out"
    for spec in ("data/fineweb", "texts/more", str(tmp_path / "none"), "word"):
        with pytest.raises(
            UserError, match=f"no such data: {spec}; prepare it with `{command} {spec}`"
        ):
            open_here(spec)
    for spec in ("none.txt", "none/a.jsonl", "*.csv"):
        with pytest.raises(
            UserError, match=r"no such data: .*; give text files or a folder of token shards"
        ):
            open_here(spec)
    with pytest.raises(
        UserError,
        match=f"texts holds no token shards .* and no text; prepare it with `{command} texts`",
    ):
        open_here("texts")
    with pytest.raises(UserError, match=r"cannot get org/name \(train\) from the hub"):
        open_here("org/name")


def test_a_path_takes_precedence_over_a_name(
    tmp_path: Path, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("stdlib", "org/name"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_txt(folder / "a.txt", DOCUMENTS)
        assert open_here(name).train.n_tokens < 50_000


def test_too_short_data_names_a_seq_len_that_fits(
    tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    few, many = (
        write_txt(tmp_path / "a.txt", DOCUMENTS[:20]),
        write_txt(tmp_path / "b.txt", DOCUMENTS),
    )
    for path, line in (
        (few, "the tenth of .* held out for validation is too short"),
        (many, "validation data of .* is too short"),
    ):
        with pytest.raises(UserError, match=line) as error:
            open_here(path, seq_len=5000)
        fits = int(
            str(error.value)
            .partition("--seq-len 5000")[2]
            .partition("--seq-len ")[2]
            .partition(",")[0]
        )
        assert open_here(path, seq_len=fits).val.n_windows(fits) >= 1
    with pytest.raises(UserError, match=r"a.txt is too short"):
        open_here(few, val_data=str(many), seq_len=50_000)
    n_tokens = open_here(few, val_data=str(many), seq_len=8).train.n_tokens
    with pytest.raises(UserError, match=r"^\S+a.txt is too short"):
        open_here(many, val_data=str(few), seq_len=n_tokens)


def shard_folder(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "shards", "llm.c")


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


BAD_SHARDS = [
    (
        lambda f: truncate(f / "fineweb_train_000002.bin", 1500),
        "fineweb_train_000002.bin is truncated: it has 1500 bytes, but",
    ),
    (
        lambda f: truncate(f / "fineweb_train_000002.bin", 100),
        "fineweb_train_000002.bin is truncated or of another version",
    ),
    (
        lambda f: truncate(f / "fineweb_train_000002.bin", 0),
        "fineweb_train_000002.bin is a foreign shard",
    ),
    (lambda f: write_bin(f / "fineweb_train_000002.bin", [1, 2, 3], count=2), "is damaged"),
    (
        lambda f: write_bin(f / "fineweb_train_000002.bin", [1, 2, 3], version=2),
        "of another version",
    ),
    (
        lambda f: write_bin(f / "fineweb_train_000002.bin", []),
        "fineweb_train_000002.bin holds no tokens",
    ),
    (lambda f: (f / "x.bin").write_bytes(bytes(4000)), "x.bin is a foreign shard"),
    (lambda f: (f / "train.bin").write_bytes(bytes(4001)), "train.bin is truncated"),
    (lambda f: (f / "train.bin").write_bytes(b""), "train.bin holds no tokens"),
    (
        lambda f: np.save(f / "x.npy", np.zeros((3, 3), np.uint16)),
        "x.npy is a foreign shard: 2-d uint16",
    ),
    (lambda f: np.save(f / "x.npy", np.zeros(3, np.int64)), "x.npy is a foreign shard: 1-d int64"),
    (
        lambda f: (np.save(f / "x.npy", np.zeros(99, np.uint16)), truncate(f / "x.npy", 150)),
        "x.npy is truncated",
    ),
    (
        lambda f: write_bin(f / "fineweb_train_000002.bin", [1, 5000]),
        "fineweb_train_000002.bin holds token id 5000, beyond the",
    ),
]


@pytest.mark.parametrize(("spoil", "line"), BAD_SHARDS)
def test_bad_shards(
    spoil: Callable[[Path], object], line: str, tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    folder = shard_folder(tmp_path)
    open_here(folder)
    spoil(folder)
    with pytest.raises(UserError, match=line) as error:
        open_here(folder)
    assert "\n" not in str(error.value)


def test_only_validation_shards(tmp_path: Path, open_here: Callable[..., data.Data]) -> None:
    folder = shard_folder(tmp_path)
    for file in folder.glob("*train*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds only validation shards"):
        open_here(folder)


def test_the_largest_id_is_computed_once(
    tmp_path: Path, open_here: Callable[..., data.Data], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shard_folder(tmp_path)
    (tmp_path / "cache").mkdir()
    open_here(folder)
    monkeypatch.setattr(data, "_max_id", lambda _: 1 / 0)
    open_here(folder)


@pytest.fixture
def made(tmp_path: Path, open_here: Callable[..., data.Data]) -> Path:
    """A folder of shards with a manifest."""
    open_here(write_txt(tmp_path / "a.txt", DOCUMENTS))
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    return manifest.parent.rename(tmp_path / "made")


def test_a_tokenizer_that_did_not_make_the_shards(
    made: Path, other_bpe: str, tmp_path: Path, open_here: Callable[..., data.Data]
) -> None:
    with pytest.raises(
        UserError,
        match=r"were made with tokenizer .*small \(\w{8}\), not with .*other \(\w{8}\); leave",
    ):
        open_here(made, tokenizer=other_bpe)
    texts = write_txt(tmp_path / "b.txt", DOCUMENTS)
    with pytest.raises(UserError, match=r"were made with tokenizer .*; tokenize the text again"):
        open_here(texts, tokenizer=other_bpe, val_data=str(made))


def test_a_manifest_that_contradicts_the_shards(
    made: Path, open_here: Callable[..., data.Data]
) -> None:
    write_bin(made / "train_000001.bin", [1, 2])
    with pytest.raises(UserError, match=r"train_000001.bin is not in .*manifest.json"):
        open_here(made)
    (made / "train_000001.bin").rename(made / "val_000000.bin")
    with pytest.raises(UserError, match=r"val_000000.bin holds 2 tokens, but manifest.json says"):
        open_here(made)
    (made / "val_000000.bin").unlink()
    with pytest.raises(UserError, match=r"lacks val_000000.bin"):
        open_here(made)
    (made / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not valid JSON"):
        open_here(made)
    (made / "manifest.json").unlink()
    (made / "progress.json").write_text("{}")
    with pytest.raises(UserError, match=r"is unfinished"):
        open_here(made)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "many"),
        ("vocab_size", None),
        ("tokenizer", "gpt2"),
        ("tokenizer", {"source": 3}),
        ("shards", {}),
        ("shards", ["train_000000.bin"]),
        ("shards", [{"name": 5}]),
        ("shards", [{"name": "train_000000.bin", "sha256": "0", "tokens": "all", "max_id": 1}]),
    ],
)
def test_a_manifest_value_of_the_wrong_kind(
    made: Path, open_here: Callable[..., data.Data], key, value
) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    (made / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(UserError, match=f"manifest.json: {key}") as error:
        open_here(str(made))
    assert "\n" not in str(error.value)
