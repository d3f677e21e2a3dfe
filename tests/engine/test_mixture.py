"""Weighted mixtures: the windows follow from the position alone, the shares are exact to within one
window, and a run is the same on any number of ranks and after any restart."""

from __future__ import annotations

import functools
import json
import re
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.cli import parse
from base.sources import WeightedSpec, joined, names_of, specs_of
from config import TrainConfig, UserError, resolve
from dataset import TokenDataset
from engine import mixture
from engine.loader import partition
from engine.mixture import Mixture
from engine.pretraining import LanguageModelling
from launch import die, launch, log_of, small, trace, write_inputs
from storage.shards import read_shard
from text.overlap import texts_of
from text.tokenizer import load_tokenizer

SHORT = "--steps 6 --sample-every 0"
DATA = "--data text.txt=0.7 more.txt=0.3"
weights = st.lists(
    st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=2, max_size=6
)


def silent(line: str) -> None:
    pass


# ---- shares


@given(weights=weights)
@settings(deadline=None, max_examples=25)
def test_every_prefix_has_its_shares_to_within_one_window(weights: list[Fraction]) -> None:
    # The same property with a short period, because the schedule is a loop over the period.
    parts = [max(1, round(300 * weight / sum(weights))) for weight in weights]
    sources, before = mixture.schedule(parts)
    n = np.arange(1, 2 * sum(parts) + 1)
    for k, part in enumerate(parts):
        own = np.tile(sources, 2) == k
        off = np.abs(own.cumsum() - n * part / sum(parts))
        assert off.max() <= 1 - 1 / (2 * len(parts) - 2) + 1e-9
        assert own[: sum(parts)].sum() == part
        assert np.array_equal(before[sources == k], np.arange(part))


@given(weights=weights, exact=st.lists(st.integers(1, 999), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_shares_are_the_weights(weights: list[Fraction], exact: list[int]) -> None:
    parts = mixture.parts_of(weights)
    for part, weight in zip(parts, weights, strict=True):
        share = float(weight / sum(weights))
        assert part >= 1 and part / sum(parts) == pytest.approx(
            share, abs=len(parts) / mixture.PERIOD
        )
    tenths = [Fraction(n, 1000) for n in exact]
    parts = mixture.parts_of(tenths)
    assert [Fraction(part, sum(parts)) for part in parts] == [t / sum(tenths) for t in tenths]


# ---- the order of windows


def dataset_of(folder: Path, name: str, n_tokens: int) -> TokenDataset:
    """A stream whose tokens are counted up, in a file of its own."""
    file = folder / f"{name}.npy"
    np.save(file, np.arange(n_tokens, dtype=np.uint16))
    return TokenDataset([read_shard(file)], name)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenDataset]:
    folder = tmp_path_factory.mktemp("streams")
    return [dataset_of(folder, name, n) for name, n in (("a", 301), ("b", 101), ("c", 57))]


def mixture_of(streams: list[TokenDataset], weights: list[int]) -> Mixture:
    sources = [WeightedSpec(s.sha256, Fraction(w)) for s, w in zip(streams, weights, strict=True)]
    return Mixture(sources, streams)


@given(
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    seed=st.integers(0, 2**63 - 1),
    cuts=st.lists(st.integers(0, 400), max_size=5),
)
@settings(deadline=None, max_examples=25)
def test_each_source_shows_its_windows_once_an_epoch(
    streams: list[TokenDataset], weights: list[int], seed: int, cuts: list[int]
) -> None:
    seq_len = 5
    mixed = mixture_of(streams, weights)
    ids = mixed.order(np.arange(400), seq_len, seed)
    # Any division into steps and starts sees the same windows.
    parts = np.split(np.arange(400), sorted(cuts))
    assert np.array_equal(np.concatenate([mixed.order(p, seq_len, seed) for p in parts]), ids)
    tokens, first = mixed.windows(ids, seq_len), 0
    for stream in streams:
        n = stream.n_windows(seq_len)
        own = (first <= ids) & (ids < first + n)
        local = ids[own] - first
        for begin in range(0, len(local) - n + 1, n):
            assert sorted(local[begin : begin + n]) == list(range(n))
        assert np.array_equal(tokens[own], local[:, None] * seq_len + np.arange(seq_len + 1))
        first += n
    assert first == mixed.n_windows(seq_len)
    for wrong in (-1, first):
        with pytest.raises(IndexError):
            mixed.windows(np.array([0, wrong]), seq_len)


# ---- words of the command line


names = st.text(st.sampled_from("ab=. ,'\"*0"), min_size=1, max_size=8).filter(str.strip)
sizes = st.sampled_from(["1", "0.7", ".5", "2e-1", "30"])


@given(words=st.lists(st.tuples(names, sizes), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_typed_sources_are_read_back(words: list[tuple[str, str]]) -> None:
    expected = [WeightedSpec(name, Fraction(size)) for name, size in words]
    typed = [f"{name}={size}" for name, size in words]
    assert specs_of(joined("--data", typed)) == expected
    options = parse(TrainConfig, ["--data", *typed])
    assert options.data == joined("--data", typed)
    assert len(set(names_of(expected))) == len(expected)


def test_an_existing_path_is_no_weight(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.5").mkdir()
    plain = ["lr=0.5", "a=b.txt", "a=0", "a=-1", "a=inf", "=1", "a,b", "x y", "it's"]
    assert [specs_of(word) for word in plain] == [[WeightedSpec(word)] for word in plain]
    assert specs_of("lr=0.5=2 a=0.5=1")[0] == WeightedSpec("lr=0.5", Fraction(2))
    assert [source.spec for source in specs_of("lr=0.5=2 a=0.5=1")] == ["lr=0.5", "a=0.5"]
    assert names_of([WeightedSpec(s) for s in ("d/a.txt.gz", "a.b", "x/*.txt", "me/a:b")]) == [
        "a", "a_2", "data", "a_b",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["a", "b"], ["a=1", "b"], ["a=1", "b=0"]])
def test_several_words_need_weights(words: list[str]) -> None:
    with pytest.raises(UserError, match=f"{words[1]!r} has no|'a' has no positive weight"):
        parse(TrainConfig, ["--data", *words])
    with pytest.raises(UserError, match="--data needs a value"):
        parse(TrainConfig, ["--data"])


# ---- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The inputs of `small`, another text, and `run`, a run on both."""
    folder = tmp_path_factory.mktemp("mixture")
    write_inputs(folder)
    text = (folder / "text.txt").read_text().split("\n")
    (folder / "more.txt").write_text("\n".join(line[::-1] for line in text[:9]))
    (end,) = launch(folder, small(SHORT, DATA, "--val-data val.txt=1 more.txt=3"))
    assert end.code == 0, end.err
    return folder


def task_of(folder: Path, **options: Any) -> tuple[LanguageModelling, Any]:
    """A task on text.txt and more.txt, of which each holds out its own part."""
    paths = {"tokenizer": str(folder / "tokenizer"), "cache": str(folder / "cache")}
    sizes = {"preset": "micro", "seq_len": 16, "batch_tokens": 160, "steps": 4}
    data = f"{folder}/text.txt=0.7 {folder}/more.txt=0.3"
    task = LanguageModelling()
    given: dict[str, Any] = sizes | {"data": data} | paths | options
    return task, task.setup(resolve(TrainConfig(**given), "cpu"), silent)


@pytest.mark.parametrize("step", [0, 7])
def test_windows_of_a_step_do_not_depend_on_ranks(folder: Path, step: int) -> None:
    task, _ = task_of(folder)
    ids = task.rows("train", step)
    first = task.data.train.datasets[0].n_windows(16) if isinstance(task.data.train, Mixture) else 0
    assert (ids < first).sum() == 7 and len(ids) == 10
    for ranks in range(1, 5):
        for micro_batch in (1, 3):
            parts = [p for r in range(ranks) for p in partition(ids, r, ranks, micro_batch)]
            shared = np.concatenate([part for part in parts if part is not None])
            assert sorted(shared) == sorted(ids[:, 0])


def test_the_validation_loss_is_the_weighted_mean(folder: Path) -> None:
    for line in log_of(folder / "run", "eval"):
        mean = 0.25 * line["val_loss_val"] + 0.75 * line["val_loss_more"]
        assert line["val_loss"] == pytest.approx(mean, rel=1e-12)
        assert line["val_perplexity"] == pytest.approx(np.exp(mean))
        assert line["val_bits_per_byte"] > 0
    results = json.loads((folder / "run" / "metrics.json").read_text())
    assert results["val_loss_more"] != results["val_loss_val"]
    printed = (folder / "rank0.out").read_text()
    assert re.search(r"data, text +70% of the windows: [\d,]+ tokens to train on \(\d", printed)


def test_two_ranks_have_the_losses_of_one(folder: Path) -> None:
    words = small(SHORT, DATA, "--val-data val.txt=1 more.txt=3 --dropout 0")
    assert launch(folder, [*words, "--out", "one"])[0].code == 0
    ends = launch(folder, [*words, "--out", "two"], ranks=2)
    assert [end.code for end in ends] == [0, 0], ends
    for kind, keys in (
        ("train", ("loss",)),
        ("eval", ("val_loss", "val_loss_val", "val_loss_more")),
    ):
        one, two = (log_of(folder / name, kind) for name in ("one", "two"))
        for key in keys:
            assert [x[key] for x in two] == pytest.approx([x[key] for x in one], rel=1e-5)


def test_a_killed_run_goes_on_and_a_new_weight_is_refused(folder: Path) -> None:
    words = small(SHORT, DATA, "--val-data val.txt=1 more.txt=3 --out killed")
    (end,) = launch(folder, words, functools.partial(die, "micro-batch", 17))
    assert end.code == -signal.SIGKILL and len(log_of(folder / "killed", "train")) == 4
    (end,) = launch(folder, [*words, "--data", "text.txt=0.6", "more.txt=0.4"])
    assert end.code == 2 and "weights (was 0.7 0.3, is 0.6 0.4)" in end.err, end
    (end,) = launch(folder, [*words, "--data", "more.txt=0.3", "text.txt=0.7"])
    assert end.code == 2 and "data (was " in end.err and end.err.count("\n") == 1, end
    edited = folder / "more.txt"
    text = edited.read_text()
    edited.write_text(text + "alpha\n")
    (end,) = launch(folder, words)
    edited.write_text(text)
    assert end.code == 2
    assert re.search(r"data \(was (\w{12}) (\w{12}), is \1 (?!\2)\w{12}\); give", end.err), end
    # the same shares in other words
    (end,) = launch(folder, [*words, "--data", "text.txt=7", "more.txt=3"])
    assert end.code == 0, end
    assert trace(folder / "killed") == trace(folder / "run")


def test_one_source_with_a_weight_is_a_run_without(folder: Path) -> None:
    for words in ("--out plain", "--data text.txt=0.2 --val-data val.txt=3 --out single"):
        (end,) = launch(folder, small(SHORT, words))
        assert end.code == 0, end
    assert trace(folder / "single") == trace(folder / "plain")


def test_each_source_holds_out_its_own_part(folder: Path) -> None:
    task, facts = task_of(folder)
    assert task.evaluated[:2] == ("val text", "val more")
    assert all(len(task.rows(split, 0)) for split in task.evaluated[:2])
    assert facts.identity["weights"] == facts.identity["val_weights"] == "0.7 0.3"
    (line,) = [text for name, text in facts.banner.items() if name == "data, more"]
    assert line.startswith("30% of the windows") and line.endswith("epochs)")
    plain, plain_facts = task_of(folder, data=str(folder / "text.txt"))
    assert plain.evaluated[0] == "val" and plain_facts.identity["weights"] is None


def test_a_source_that_is_repeated_often_is_told(folder: Path) -> None:
    task, _ = task_of(folder)
    per_step = sorted(epochs for _, _, _, epochs in mixture.epochs_of(task.data.train, 160))
    counts = []
    for steps in (1, int(4 / per_step[1]) + 1, int(4 / per_step[0]) + 1):
        task, facts = task_of(folder, steps=steps)
        sources = mixture.epochs_of(task.data.train, 160 * steps)
        often = [(name, f"{epochs:.1f}") for name, _, _, epochs in sources if epochs > 4]
        counts.append(len(facts.warnings))
        for (name, times), warning in zip(often, facts.warnings, strict=True):
            assert warning.startswith(f"{name} is repeated {times} times: beyond 4 epochs")
    assert counts == [0, 1, 2]


def test_decontamination_reaches_every_source(folder: Path) -> None:
    rows = folder / "rows.txt"
    rows.write_text((folder / "more.txt").read_text())
    with pytest.raises(UserError, match=r"every document of .*more.txt shares words"):
        task_of(folder, decontaminate=str(rows), cache=str(folder / "clean"))
    texts = list(texts_of(f"{folder}/text.txt=1 {folder}/more.txt=2", "text"))
    assert texts == [(folder / name).read_text() for name in ("text.txt", "more.txt")]


def test_shards_determine_the_vocabulary(folder: Path) -> None:
    task_of(folder)
    shards = next((folder / "cache").glob("*/manifest.json")).parent
    expected = load_tokenizer(str(folder / "tokenizer")).sha256
    for data in (f"{folder}/more.txt=1 {shards}=1", f"{shards}=1 {folder}/more.txt=1"):
        assert task_of(folder, data=data, tokenizer=None)[0].data.tokenizer.sha256 == expected
    with pytest.raises(UserError, match=r"none.txt"):
        task_of(folder, data=f"{folder}/more.txt=1 {folder}/none.txt=1")
    (folder / "short.txt").write_text("a")
    with pytest.raises(UserError, match=r"short.txt.* is too short|held out"):
        task_of(folder, data=f"{folder}/more.txt=1 {folder}/short.txt=1")


def test_a_dry_run_looks_at_every_source(folder: Path) -> None:
    words = small(SHORT, DATA, "--out dry --dry-run")
    (end,) = launch(folder, [*words, "--data", "text.txt=1", "none.txt=1"])
    assert end.code == 2 and "none.txt" in end.err
    assert not (folder / "dry").exists()
