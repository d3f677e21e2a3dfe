"""Which files are data, what the cache keeps, and runs on shards without a tokenizer."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from base import locks
from base.cli import parse
from base.files import sha256
from config import TrainConfig, UserError, resolve
from dataset import TokenDataset
from engine import data as data_module
from engine.data import check_data, is_validation, open_data, open_whole
from engine.pretraining import LanguageModelling
from launch import launch, log_of, small, write_inputs
from storage import cache, shards
from storage.cache import Cache
from text import corpus, prepare
from text.files import find_files, named_files
from text.rows import check_exists, read_rows
from text.tokenizer import GPT2_SHA256

HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.txt",
    ".git/x.txt",
    "__MACOSX/a.txt",
    "._a.txt",
    "sub/.tmp-a.txt",
    ".cache/deep/er.txt",
    "sub/.hidden.txt",
    "#a.txt#",
    "a.txt~",
    "~$a.txt",
    "lost+found/a.txt",
]


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(spec: object) -> list[str]:
    return [path.name for path in find_files(str(spec))]


# ---- hidden files, links


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    # the named folder may itself be in a hidden one
    data = tmp_path / ".cache" / "data"
    for name in ("a.txt", "sub/b.txt", *HIDDEN):
        write(data / name)
    for spec in (data, f"{data}/**/*.txt", f"{data}/**", f"{data}/*.txt,{data}/sub/*"):
        assert found(spec) == ["a.txt", "b.txt"]


def test_a_hidden_file_that_is_named_is_read(tmp_path: Path) -> None:
    for name in HIDDEN:
        write(tmp_path / name)
    for spec in (
        ".cache",
        "._a.txt",
        ".git/*.txt",
        "**/.git/*.txt",
        "__MACOSX/*",
        "sub/.*.txt",
        ".cache/**/*.txt",
    ):
        assert found(tmp_path / spec), spec


def test_hidden_files_of_rows_are_skipped(tmp_path: Path) -> None:
    for name in ("train.csv", ".ipynb_checkpoints/train-checkpoint.csv", "._train.csv"):
        write(tmp_path / name, f"text\n{name}\n")
    assert [row["text"] for row in read_rows(str(tmp_path), {"text": "text"}).rows] == ["train.csv"]


def test_hidden_shards_are_skipped(tmp_path: Path) -> None:
    for name in ("train_0.npy", "val_0.npy"):
        np.save(tmp_path / name, np.arange(100, dtype=np.uint16))
        (tmp_path / f"._{name}").write_bytes(b"resource fork")
    data = open_data(str(tmp_path), None, None, "text", tmp_path / "cache", 8)
    assert data.train.n_tokens == data.val.n_tokens == 100


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    a = write(tmp_path / "d" / "a.txt")
    write(tmp_path / "elsewhere" / "b.txt")
    os.link(a, tmp_path / "d" / "hard.txt")
    os.symlink(a, tmp_path / "d" / "soft.txt")
    for name, target in {
        "loop": ".",
        "up": "..",
        "linked": "../elsewhere",
        "again": "../elsewhere",
    }.items():
        os.symlink(target, tmp_path / "d" / name)
    for spec in (
        f"{tmp_path}/d",
        f"{tmp_path}/d/**",
        f"{tmp_path}/d,{tmp_path}/d/a.txt,{tmp_path}/elsewhere",
    ):
        assert found(spec) == ["a.txt", "b.txt"], spec


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    os.symlink("gone", tmp_path / "b.txt")
    with pytest.raises(UserError, match=r"b.txt is a link to a file that is not there"):
        find_files(str(tmp_path))


def test_a_very_long_list_of_files_is_read(tmp_path: Path) -> None:
    names = [str(write(tmp_path / f"{i}.txt")) for i in range(300)]
    assert len(found(",".join(names))) == 300


@given(
    st.lists(st.sampled_from(["**", "*", "?", "a*", "b", "[ab]", "*.txt"]), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_globs_match_like_those_of_python(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    import glob

    root = tmp_path_factory.getbasetemp() / "globbed"
    for name in ("a.txt", "b.txt", "a/a.txt", "b/ab.txt", "a/b/a.txt", "a/b/c/b.txt", "b/.a/b.txt"):
        write(root / name)
    pattern = str(root.joinpath(*parts))
    assume(not os.path.isdir(pattern))  # a folder would name all files below it
    expected = sorted(
        {Path(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    )
    ((_, files),) = named_files(pattern, (".txt",))
    assert files == expected


# ---- names


@given(
    st.sampled_from(["val", "validation", "VAL", "Validation"]),
    st.sampled_from("_-. 0"),
    st.booleans(),
)
def test_a_whole_word_marks_validation(word: str, between: str, first: bool) -> None:
    words = [word, "fineweb", "000001"] if first else ["edu", word, "000000"]
    assert is_validation(between.join(words) + ".bin") and is_validation(word + ".npy")


@pytest.mark.parametrize(
    "word", ["medieval", "modern", "evaluation", "valley", "interval", "trainval", "éval", "valid"]
)
def test_part_of_a_word_does_not_mark_validation(word: str) -> None:
    assert not is_validation(f"{word}_000.npy") and not is_validation(f"x-{word}.bin")


def test_shards_with_other_names_are_all_trained_on(tmp_path: Path) -> None:
    for name in ("medieval_000.npy", "modern_000.npy"):
        np.save(tmp_path / name, np.arange(1000, dtype=np.uint16))
    data = open_data(str(tmp_path), None, None, "text", tmp_path / "cache", 8)
    assert data.train.n_tokens + data.val.n_tokens == 2000 and data.val.n_tokens == 20


def test_a_files_own_name_tells_its_split(tmp_path: Path) -> None:
    for name in ("test-kit/train.csv", "test-kit/dev.csv", "latest/éval-train.csv"):
        write(tmp_path / name, f"text\n{name}\n")
    rows = {
        split: read_rows(str(tmp_path), {"text": "text"}, split=split).rows
        for split in ("train", "validation")
    }
    assert [row["text"] for row in rows["train"]] == ["latest/éval-train.csv", "test-kit/train.csv"]
    assert [row["text"] for row in rows["validation"]] == ["test-kit/dev.csv"]


# ---- measurements that are kept


@given(size=st.integers(1, 1 << 19), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_replaced_file_is_measured_again(
    tmp_path_factory: pytest.TempPathFactory, size: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stale")
    file, cache = folder / "a", folder / "cache"
    cache.mkdir()
    file.write_bytes(bytes(size))
    stat = file.stat()
    first = Cache(cache).measure_once("sha256", [file], sha256)
    other = bytearray(size)
    other[data.draw(st.integers(0, size - 1))] = 1
    (folder / "b").write_bytes(other)
    (folder / "b").replace(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert Cache(cache).measure_once("sha256", [file], sha256) != first


FOREIGN = ['{"version": 3, "notes": ["mine"]}', "[]", "{}", '"x"', "not JSON", "[" * 100_000]


@pytest.mark.parametrize("text", [*FOREIGN, '{"sha256 /a": {"stamp": [], "value": 1}, "mine": 2}'])
def test_another_programs_index_is_kept(tmp_path: Path, text: str) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache"
    file.write_bytes(b"some text")
    cache.mkdir()
    (cache / "index.json").write_text(text)
    first = Cache(cache).measure_once("sha256", [file], sha256)
    assert (cache / "index.json").read_text() == text
    assert Cache(cache).measure_once("sha256", [file], lambda path: "measured anew") == first
    (cache / "gpt2-index.json").write_text(text)
    other = Cache(cache)
    assert other.measure_once("sha256", [file], sha256) == first
    assert other.measure_once("sha256", [file], lambda path: "anew") == first, (
        "known to this process"
    )
    assert {path.name for path in cache.glob("*.json")} == {"index.json", "gpt2-index.json"}
    assert (cache / "gpt2-index.json").read_text() == text


def test_blocks_show_a_change_that_times_do_not(tmp_path: Path) -> None:
    """All of a small file is read, and both ends of a large one: a bounded number of bytes."""
    for size in (1, 100_000, 10 << 20):
        file = tmp_path / str(size)
        file.write_bytes(bytes(size))
        before = cache.sample(file)
        for value, place in enumerate((0, size - 1, *([50_000] if size == 100_000 else [])), 1):
            with file.open("r+b") as raw:
                raw.seek(place)
                raw.write(bytes([value]))
            assert cache.sample(file) != before
            before = cache.sample(file)


def test_an_unchanged_file_is_not_read_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "a")
    (tmp_path / "cache").mkdir()
    assert Cache(tmp_path / "cache").measure_once("x", [file], lambda _: 1) == [1]
    assert Cache(tmp_path / "cache").measure_once("x", [file], lambda _: 1 / 0) == [1]


def test_entries_without_a_stamp_are_measured_again(tmp_path: Path) -> None:
    file = write(tmp_path / "a")
    stat = file.stat()
    old = {f"x {file}": [stat.st_size, stat.st_mtime_ns, "old"]}
    for index in (json.dumps(old), "[]", "3", "{"):
        write(tmp_path / "cache" / "index.json", index)
        assert Cache(tmp_path / "cache").measure_once("x", [file], lambda _: "new") == ["new"]
        left = (tmp_path / "cache" / "index.json").read_text()
        assert (
            "new" in left if index[:2] == '{"' else left == index
        )  # another program's file is kept


def test_a_file_that_changes_while_read_is_refused(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    shutil.copy(inputs / "text.txt", file)
    tokenize = prepare.tokenize_to_folder

    def tokenize_and_append(*words: object) -> None:
        tokenize(*words)  # ty: ignore[invalid-argument-type]
        with file.open("a") as text:
            text.write("more")

    monkeypatch.setattr(data_module, "tokenize_to_folder", tokenize_and_append)
    with pytest.raises(UserError, match=r"a.txt changed while it was read"):
        open_data(str(file), None, str(inputs / "tokenizer"), "text", tmp_path / "cache", 8)
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


# ---- a cache that cannot be written


def a_file(cache: Path) -> None:
    write(cache)


def below_a_file(cache: Path) -> None:
    write(cache.parent)


def a_lost_link(cache: Path) -> None:
    cache.parent.mkdir()
    os.symlink("gone", cache)


def read_only(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o555)


@pytest.fixture
def as_user() -> Iterator[None]:
    """Run as a user to whom file permissions apply, because they do not apply to root."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    yield
    os.seteuid(me)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    np.save(folder / "tokens.npy", np.arange(2000, dtype=np.uint16) % 300)
    for path in (folder, *folder.parents):  # another user must be able to read them
        if path.owner() == "root" and str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o055)
    return folder


@pytest.mark.parametrize("spoil", [a_file, below_a_file, a_lost_link, read_only])
def test_an_unwritable_cache_is_a_one_line_error(
    spoil: Callable[[Path], None], tmp_path: Path, inputs: Path, request: pytest.FixtureRequest
) -> None:
    cache = tmp_path / "data" / "cache"
    spoil(cache)
    if spoil is read_only:
        tmp_path.chmod(0o755)
        request.getfixturevalue("as_user")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"cannot write to --cache .*: --cache FOLDER") as error:
        open_data(str(inputs / "text.txt"), None, str(inputs / "tokenizer"), "text", cache, 8)
    assert "\n" not in str(error.value)
    tokens = open_data(
        str(inputs / "tokens.npy"), None, str(inputs / "tokenizer"), "text", cache, 8
    )
    assert tokens.train.n_tokens + tokens.val.n_tokens == 2000
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_make_no_cache(tmp_path: Path, inputs: Path) -> None:
    open_data(str(inputs / "tokens.npy"), None, None, "text", tmp_path / "cache", 8)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_a_one_line_error(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    open_text = (
        str(inputs / "text.txt"),
        None,
        str(inputs / "tokenizer"),
        "text",
        tmp_path / "cache",
        8,
    )
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_write", full)
        with pytest.raises(UserError, match=r"cannot write to --cache .*No space left on device"):
            open_data(*open_text)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    open_data(*open_text)


@pytest.mark.parametrize("read", ["dry run", "run"])
def test_an_unreadable_text_is_a_one_line_error(
    read: str, tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, unguarded = inputs / "text.txt", Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path == text:
            raise PermissionError(13, "Permission denied", str(path))
        return unguarded(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)
    words = (str(text), None, str(inputs / "tokenizer"), "text", tmp_path / "cache")
    with pytest.raises(UserError, match=r"text.txt cannot be read: Permission denied"):
        check_data(*words) if read == "dry run" else open_data(*words, 8)


def test_a_pipe_among_shards_is_refused_at_once(tmp_path: Path, inputs: Path) -> None:
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"a.bin is a pipe, but a shard is read in any order"):
        open_data(str(tmp_path), None, str(inputs / "tokenizer"), "text", tmp_path / "cache", 8)


def test_a_cache_works_without_locks(
    tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    cache = tmp_path / "cache"
    data = open_data(str(inputs / "text.txt"), None, str(inputs / "tokenizer"), "text", cache, 8)
    assert data.train.n_tokens and not list(cache.glob("*.tmp"))


def test_the_cache_of_another_user_is_used(
    tmp_path: Path, inputs: Path, request: pytest.FixtureRequest
) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    words = (
        str(inputs / "text.txt"),
        None,
        str(inputs / "tokenizer"),
        "text",
        cache,
        8,
        said.append,
    )
    first = open_data(*words)
    (cache / "index.json").unlink()
    tmp_path.chmod(0o755)
    cache.chmod(0o555)
    request.getfixturevalue("as_user")
    assert open_data(*words).train.sha256 == first.train.sha256
    assert len(said) == 1


# ---- shards whose tokenizer is not on this machine


def missing(_: object) -> None:
    raise UserError("GPT-2's tokenizer is not on this machine")


def test_shards_need_no_gpt2_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from text import tokenizer

    monkeypatch.setattr(tokenizer, "_tiktoken_gpt2", missing)
    np.save(tmp_path / "train.npy", np.arange(2000, dtype=np.uint16))
    known = open_data(str(tmp_path), None, None, "text", tmp_path / "cache", 8).vocabulary
    # with GPT-2's files the same run would continue
    assert (known.size, known.eot, known.sha256) == (50257, 50256, GPT2_SHA256)
    assert known.tokenizer is None and known.missing == "GPT-2's tokenizer is not on this machine"


def test_a_run_on_shards_needs_no_tokenizer(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    made = open_data(
        str(tmp_path / "text.txt"), None, str(tmp_path / "tokenizer"), "text", tmp_path / "made", 16
    )
    (manifest,) = (tmp_path / "made").glob("*/manifest.json")
    manifest.parent.rename(tmp_path / "shards")
    shutil.rmtree(tmp_path / "shards" / "tokenizer")
    shutil.rmtree(tmp_path / "tokenizer")
    words = [word for word in small("--data shards --steps 2") if word != "tokenizer"]
    for word in ("--tokenizer", "--val-data", "val.txt"):
        words.remove(word)
    (end,) = launch(
        tmp_path, [*words, "--eval-every", "2", "--save-every", "1", "--sample-every", "1"]
    )
    assert end.code == 0, end.err
    assert not (tmp_path / "cache").exists()
    (warning,) = log_of(tmp_path / "run", "warning")
    assert warning["text"].startswith("training without the shards' tokenizer (there is no ")
    assert not log_of(tmp_path / "run", "sample") and not list(
        (tmp_path / "run").rglob("tokenizer*")
    )
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert (identity["tokenizer"], identity["vocabulary"]) == (made.vocabulary.sha256, 300)
    (end,) = launch(tmp_path, ["run", "--data", "shards", "--device", "cpu"], program="evaluate")
    assert end.code == 0 and "bits_per_byte" in end.out, end.err
    (end,) = launch(tmp_path, ["run", "hello", "--device", "cpu"], program="generate")
    assert end.code == 2 and "--tokenizer" in end.err and end.err.count("\n") == 1


def test_the_manifest_gives_the_vocabulary_size(tmp_path: Path, inputs: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(inputs / "tokenizer", tokenizer)
    first = open_data(str(inputs / "text.txt"), None, str(tokenizer), "text", tmp_path / "cache", 8)
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    shutil.rmtree(manifest.parent / "tokenizer")
    shutil.rmtree(tokenizer)
    data = open_data(str(manifest.parent), None, None, "text", tmp_path / "none", 8)
    known, before = data.vocabulary, first.vocabulary
    assert isinstance(data.val, TokenDataset) and data.val.n_bytes is None
    assert known.tokenizer is None
    whole = open_whole(str(manifest.parent), None, "text", tmp_path / "none")
    assert whole.n_bytes == len((inputs / "text.txt").read_bytes())
    assert (known.size, known.eot, known.sha256) == (before.size, before.eot, before.sha256)


def test_ids_beyond_gpt2_give_the_vocabulary_size(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.array([60_000, *range(2000)], np.uint16))
    np.save(tmp_path / "other.npy", np.array([60_010, *range(2000)], np.uint16))
    for val, size in ((None, 60_001), (str(tmp_path / "other.npy"), 60_011)):
        data = open_data(str(tmp_path / "train.npy"), val, None, "text", tmp_path / "cache", 8)
        assert data.vocabulary.tokenizer is None and data.vocabulary.size == size


# ---- dry runs of missing inputs


@pytest.mark.parametrize(
    "words",
    [
        "--data nowhere",
        "--data nowhere.txt",
        "--data no/where",
        "--data *.csv",
        "--val-data nowhere",
        "--tokenizer nowhere",
        "--init nowhere",
        "--data empty",
    ],
)
def test_a_dry_run_refuses_missing_inputs(inputs: Path, words: str) -> None:
    (inputs / "empty").mkdir(exist_ok=True)
    (end,) = launch(inputs, small("--dry-run --out new", *words.split()))
    assert end.code == 2 and end.err.count("\n") == 1, end
    assert words.split()[1] in end.err and not (inputs / "new").exists()


def test_gzip_with_an_unclear_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noend").write_bytes(gzip.compress(b"some text\n"))
    (tmp_path / "other.dat").write_bytes(b"BZh91AY&SY\0\0")
    for find in (find_files, check_exists):
        with pytest.raises(UserError, match=r"other.dat is compressed by bzip2; unpack it first$"):
            find(str(tmp_path / "other.dat"))
    with pytest.raises(UserError, match=r"noend is gzip, .* for example to noend.txt.gz"):
        find_files(str(tmp_path / "noend"))
    with pytest.raises(UserError, match=r"noend is gzip, .* for example to noend.csv.gz"):
        list(corpus.records_of(tmp_path / "noend"))


def test_a_dry_run_takes_validation_text_beside_shards(tmp_path: Path, inputs: Path) -> None:
    """The text's tokenizer is that of the shards, even if it is not on this machine."""
    np.save(tmp_path / "train.npy", np.arange(2000, dtype=np.uint16) % 300)
    val = str(inputs / "val.txt")
    assert check_data(str(tmp_path), val, None, "text", tmp_path / "none") == 50257
    with pytest.raises(UserError, match=r"no such data: nowhere"):
        check_data(str(tmp_path), "nowhere", None, "text", tmp_path / "none")


@pytest.mark.parametrize(
    "task", ["text", "lyrics", "sonnets", "qa", "summarize", "sentiment", "topics"]
)
def test_a_dry_run_of_a_task_refuses_missing_data(inputs: Path, task: str) -> None:
    words = [
        "--dry-run",
        "--init",
        "scratch",
        "--preset",
        "micro",
        "--tokenizer",
        "tokenizer",
        "--data",
        "nowhere.csv",
    ]
    (end,) = launch(inputs, [*words, "--out", "new"], program=f"finetune.{task}")
    assert end.code == 2 and end.err.count("\n") == 1 and "nowhere.csv" in end.err, end


@pytest.mark.parametrize("more", ["", "--dry-run"])
@pytest.mark.parametrize(
    "words", ["--data gone.txt", "--data gone", "--val-data gone.txt", "--data val.txt,gone.txt"]
)
def test_missing_data_comes_before_a_missing_tokenizer(inputs: Path, words: str, more: str) -> None:
    for lacking in (("--tokenizer", "lost"), ("--init", "lost")):
        cfg = resolve(parse(TrainConfig, [*small(*words.split(), *lacking), *more.split()]), "cpu")
        task = LanguageModelling()
        with contextlib.chdir(inputs), pytest.raises(UserError, match=r"no such data: gone"):
            task.setup(cfg, print, dry=bool(more))


def test_a_hub_dataset_is_checked_before_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for tokenizer in (None, str(tmp_path / "lost")):
        with pytest.raises(UserError, match=r"^cannot get no-such/data-set \(train\)"):
            check_data("no-such/data-set", None, tokenizer, "text", tmp_path)


@pytest.mark.parametrize("task", ["sentiment", "text"])
def test_a_task_checks_its_data_before_the_model(inputs: Path, task: str) -> None:
    for words in ("--data gone.csv", "--val-data gone.csv", "--epochs 0 --predict gone.csv"):
        asked = ["--init", "lost", *words.split(), "--out", "new"]
        (end,) = launch(inputs, asked, program=f"finetune.{task}")
        assert end.code == 2 and end.err.startswith("error: no such data: gone.csv"), end
