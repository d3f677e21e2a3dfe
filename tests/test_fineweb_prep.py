"""fineweb_prep.py writes the same shards for any number of workers and after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fineweb_prep
from config import UserError
from engine.data import open_data
from storage.shards import read_shard
from support import python_path
from text import corpus
from text.tokenizer import load_tokenizer
from text.tokenizer_training import train_bpe

REPO = Path(__file__).resolve().parent.parent


def make_documents(n: int) -> list[str]:
    rng = np.random.default_rng(5)
    words = [
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
        "not",
        "which",
        "have",
    ]
    return [
        "\n".join(" ".join(rng.choice(words, 12)) for _ in range(rng.integers(1, 9)))
        for _ in range(n)
    ]


DOCUMENTS = make_documents(400)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bpe") / "small"
    train_bpe(DOCUMENTS, 300, folder)
    return str(folder)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parquet files with small row groups and one empty document each."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("texts")
    for i, begin in enumerate((0, 150, 300)):
        rows = ["", *DOCUMENTS[begin : min(begin + 150, 400)]]
        parquet.write_table(
            pyarrow.table({"id": rows, "text": rows}), folder / f"{i}.parquet", row_group_size=20
        )
    return folder


@pytest.fixture
def prepare(texts: Path, bpe: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(corpus, "CHUNK_CHARS", 3000)

    def prepare(
        out: Path, *words: object, source: tuple[object, ...] = ("--input", f"{texts}/*.parquet")
    ) -> int:
        options = [*source, "--out", out, "--tokenizer", bpe, "--shard-tokens", 4000, *words]
        return fineweb_prep.main([str(word) for word in options])

    return prepare


def contents(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.bin"))}


def expected(bpe: str) -> list[int]:
    tokenizer = load_tokenizer(bpe)
    return [id for text in DOCUMENTS for id in [tokenizer.eot, *tokenizer.encode(text)]]


def tokens(out: Path) -> list[int]:
    return [
        id
        for file in sorted(out.glob("*.bin"), key=lambda f: f.name[-10:])
        for id in read_shard(file).map().tolist()
    ]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path, bpe: str) -> Path:
    """The output of an uninterrupted run in one process."""
    out = tmp_path_factory.mktemp("out") / "whole"
    options = [
        "--input",
        f"{texts}/*.parquet",
        "--out",
        out,
        "--tokenizer",
        bpe,
        "--shard-tokens",
        4000,
        "--workers",
        1,
    ]
    assert fineweb_prep.main([str(word) for word in options]) == 0
    return out


def test_the_stream_is_cut_into_shards(whole: Path, bpe: str, tmp_path: Path) -> None:
    ids = expected(bpe)
    assert tokens(whole) == ids
    names = [file.name for file in sorted(whole.glob("*.bin"), key=lambda f: f.name[-10:])]
    assert names[:2] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"] and len(names) == -(
        -len(ids) // 4000
    )
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["documents"] == len(DOCUMENTS) and manifest["tokens"] == len(ids)
    assert manifest["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert not (whole / "progress.json").exists()
    data = open_data(str(whole), None, None, "text", tmp_path, 64)
    assert data.val.n_tokens == 4000 and data.train.n_tokens == len(ids) - 4000
    assert data.tokenizer.sha256 == load_tokenizer(bpe).sha256


@pytest.mark.parametrize("workers", [2, 3])
def test_shards_do_not_depend_on_workers(
    workers: int, whole: Path, prepare: Callable[..., int], tmp_path: Path
) -> None:
    prepare(tmp_path / "out", "--workers", workers)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("limit", [9000, 8000])
def test_max_tokens_limits_the_shards(
    limit: int, prepare: Callable[..., int], tmp_path: Path, bpe: str
) -> None:
    prepare(tmp_path / "out", "--max-tokens", limit)
    assert tokens(tmp_path / "out") == expected(bpe)[:limit]


def test_a_finished_folder_is_left_alone(
    prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], bpe: str
) -> None:
    prepare(tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.bin")}
    assert prepare(tmp_path / "out", "--workers", 2) == 0
    assert "is already finished" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.bin")}
    for option, value in (
        ("--shard-tokens", 5000),
        ("--text-column", "id"),
        ("--max-tokens", 9000),
    ):
        with pytest.raises(
            UserError, match=rf"was made with another {option} .*; give another --out"
        ):
            prepare(tmp_path / "out", option, value)


class Killed(BaseException):
    pass


def test_an_interrupted_run_resumes_after_any_shard(
    whole: Path, prepare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every start stops at a shard, before or after its entry is written, and does at least one
    more."""
    plain, out = fineweb_prep._Run.finished, tmp_path / "out"
    n = len(contents(whole))

    def finished(run: Any, shard: dict[str, Any], consumed: int) -> None:
        if early:
            raise Killed
        plain(run, shard, consumed)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fineweb_prep._Run, "finished", finished)
        for done in range(n):
            for early in (True, False):
                with pytest.raises(Killed):
                    prepare(out)
                entries = json.loads((out / "progress.json").read_text())["shards"]
                assert len(entries) == (done if early else done + 1)
                assert not (out / "manifest.json").exists()
    assert prepare(out) == 0
    assert contents(out) == contents(whole)
    assert json.loads((out / "manifest.json").read_text()) == json.loads(
        (whole / "manifest.json").read_text()
    )


SCRIPT = """
import sys, time
import fineweb_prep
from text import corpus, tokenizing
corpus.CHUNK_CHARS = 3000
plain = tokenizing.encode
def encode(*words):
    time.sleep(0.05)
    return plain(*words)
tokenizing.encode = encode
fineweb_prep.main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes(
    how: int, whole: Path, texts: Path, bpe: str, prepare: Callable[..., int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [
        "--input",
        f"{texts}/*.parquet",
        "--out",
        str(out),
        "--tokenizer",
        bpe,
        "--shard-tokens",
        "4000",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words],
        env={**os.environ, "PYTHONPATH": python_path(REPO)},
        start_new_session=True,
    )
    end = time.monotonic() + 30
    while not (out / "fineweb_train_000002.bin").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in sorted(out.glob("*.bin"))}
    assert not (out / "manifest.json").exists()
    assert prepare(out, "--workers", 2) == 0
    assert contents(out) == contents(whole)
    redone = [file.name for file, changed in done.items() if file.stat().st_mtime_ns != changed]
    assert len(redone) <= 1


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[str]) -> list[dict[str, Any]]:
    import datasets
    import huggingface_hub

    asked: list[dict[str, Any]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        asked.append({"name": name, "config": config, **options})
        return datasets.Dataset.from_list([{"text": text} for text in rows]).to_iterable_dataset(
            num_shards=4
        )

    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc")
    )
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_resumes_where_it_stopped(
    prepare: Callable[..., int], tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, hub = fake_hub(monkeypatch, DOCUMENTS), ("--dataset", "org/web", "--name", "sample")
    plain = fineweb_prep._Run.finished

    def finished(run: Any, shard: dict[str, Any], consumed: int) -> None:
        plain(run, shard, consumed)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fineweb_prep._Run, "finished", finished)
        for _ in range(2):
            with pytest.raises(Killed):
                prepare(tmp_path / "out", source=hub)
    prepare(tmp_path / "out", source=hub)
    assert contents(tmp_path / "out") == contents(whole)
    assert asked[0] == {
        "name": "org/web",
        "config": "sample",
        "split": "train",
        "revision": "abc",
        "streaming": True,
    }
    assert len(asked) == 3


def fake_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A fake hub repository with the files of `folder`. Returns the names that are downloaded."""
    import huggingface_hub

    fetched: list[str] = []
    files = [
        SimpleNamespace(rfilename=file.name, size=file.stat().st_size) for file in folder.iterdir()
    ]

    def download(repo: str, name: str, local_dir: Path, **_: Any) -> None:
        fetched.append(name)
        shutil.copy(folder / name, local_dir / name)

    monkeypatch.setattr(
        huggingface_hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha="abc", siblings=files)
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


def test_ready_shards_of_the_hub_are_downloaded(
    whole: Path,
    prepare: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fetched, hub = (
        fake_repository(whole, monkeypatch),
        ("--dataset", "org/shards", "--pretokenized", "--max-shards", 2),
    )
    prepare(tmp_path / "out", source=hub)
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(fetched) == sorted(names)
    made, ready = (
        json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "out", whole)
    )
    by_name = {shard["name"]: shard for shard in ready["shards"]}
    assert sorted(made["shards"], key=lambda s: s["name"]) == [
        by_name[name] for name in sorted(names)
    ]
    prepare(tmp_path / "out", source=hub)
    assert len(fetched) == 3 and "is already finished" in capsys.readouterr().out


def test_a_damaged_download_is_refused(
    whole: Path, prepare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled = Path(shutil.copytree(whole, tmp_path / "spoiled"))
    path = spoiled / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    fake_repository(spoiled, monkeypatch)
    with pytest.raises(UserError, match=r"fineweb_train_000001.bin is truncated"):
        prepare(tmp_path / "out", source=("--dataset", "org/shards", "--pretokenized"))
    with pytest.raises(UserError, match=r"is unfinished"):
        open_data(str(tmp_path / "out"), None, None, "text", tmp_path, 64)
    path.write_bytes((whole / path.name).read_bytes()[:-2] + b"\xff\x00"[::-1])
    with pytest.raises(UserError, match=r"holds token id \d+, beyond the"):
        prepare(tmp_path / "out", source=("--dataset", "org/shards", "--pretokenized"))


def test_a_repository_without_shards_is_refused(
    prepare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    fake_repository(tmp_path / "empty", monkeypatch)
    with pytest.raises(UserError, match=r"org/shards has no .bin shards; leave --pretokenized out"):
        prepare(tmp_path / "out", source=("--dataset", "org/shards", "--pretokenized"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--input", "x"], "--out is missing"),
        (["--out", "x"], "give either --dataset HUB_ID"),
        (["--out", "x", "--input", "a", "--dataset", "b/c"], "give either"),
        (["--out", "x", "--input", "a", "--pretokenized"], "--pretokenized needs --dataset"),
        (["--out", "x", "--input", "a", "--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--out", "x", "--input", "a", "--shard-tokens", "-1"], "--shard-tokens is -1"),
        (["--out", "x", "--inputs", "a"], r"unknown option --inputs \(did you mean --input\?\)"),
        (["--out", "x", "--input", "none.txt", "--tokenizer", "BPE"], "no such data: none.txt"),
        (
            ["--out", "x", "--dataset", "org/none", "--tokenizer", "BPE"],
            r"cannot get org/none \(train\) from the hub",
        ),
        (
            ["--out", "x", "--dataset", "org/none", "--tokenizer", "BPE", "--pretokenized"],
            "cannot get org/none from the hub",
        ),
    ],
)
def test_bad_options_are_refused(
    words: list[str], line: str, bpe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        fineweb_prep.main([bpe if word == "BPE" else word for word in words])


def test_too_little_disk_is_refused(
    prepare: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"the shards will take about .* GB and .* has 0.0 GB free"):
        prepare(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin*"))
    fake_hub(monkeypatch, DOCUMENTS)
    with pytest.raises(UserError, match=r"free some space, give another --out, or fewer tokens"):
        prepare(tmp_path / "out", "--max-tokens", 9000, source=("--dataset", "org/web"))


def test_too_little_text_is_refused(prepare: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the validation shard leaves none for training; type --shard-tokens \d+,"
    ):
        prepare(tmp_path / "out", "--shard-tokens", 10**6)
    assert (
        not list((tmp_path / "out").glob("*.bin*"))
        and not (tmp_path / "out" / "progress.json").exists()
    )
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty.txt holds 0 tokens"):
        prepare(tmp_path / "out", source=("--input", tmp_path / "empty.txt"))


def test_shards_of_other_programs_are_not_touched(
    prepare: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "train.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"holds shards that this program did not make"):
        prepare(tmp_path)
    assert (tmp_path / "train.bin").read_bytes() == b"1234"


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
@pytest.mark.parametrize(
    "content",
    ['{"name": "my web app", "icons": []}', '{"shards": []}', '{"settings": {"theme": "dark"}, '
                                                              '"shards": []}', "[1]",
     "null", "{}", "", '{"settings": 1}', "not json", b"\xff\xfe\x00"],
)  # fmt: skip
def test_state_files_of_other_programs_are_kept(
    name: str, content: str | bytes, prepare: Callable[..., int], tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = file.read_bytes()
    with pytest.raises(UserError) as refused:
        prepare(tmp_path)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == [name] and file.read_bytes() == before


def test_a_foreign_progress_file_is_kept(
    whole: Path, prepare: Callable[..., int], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (out / "progress.json").write_text('{"chapter": 3}')
    with pytest.raises(
        UserError, match=r"progress.json was not written by this program; give another --out"
    ):
        prepare(out)
    assert (out / "progress.json").read_text() == '{"chapter": 3}'


def test_another_tokenizer_is_not_replaced(
    prepare: Callable[..., int], bpe: str, tmp_path: Path
) -> None:
    shutil.copytree(bpe, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("mine")
    with pytest.raises(
        UserError, match=r"tokenizer would be replaced by --tokenizer .*; give another --out"
    ):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == "mine"
    shutil.copy(Path(bpe) / "tokenizer.json", tmp_path / "tokenizer")
    assert prepare(tmp_path, "--tokenizer", tmp_path / "tokenizer") == 0


def test_an_unreadable_input_is_refused(
    prepare: Callable[..., int], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *rest: object, **more: object) -> object:
        if path.parent == texts:
            raise PermissionError(13, "Permission denied", str(path))
        return unguarded(path, *rest, **more)

    unguarded: Any = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"0.parquet cannot be read: Permission denied"):
        prepare(tmp_path / "out")


def test_exit_codes_follow_the_contract(
    run: Callable[..., subprocess.CompletedProcess[str]], texts: Path, bpe: str, tmp_path: Path
) -> None:
    words = [REPO / "fineweb_prep.py", "--input", texts, "--tokenizer", bpe, "--shard-tokens", 4000]
    assert run(*words, "--out", tmp_path / "out").returncode == 0
    wrong = run(*words)
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: --out is missing")
        and wrong.stderr.count("\n") == 1
    )
