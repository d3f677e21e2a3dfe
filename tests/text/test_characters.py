"""Vocabularies of characters: made from a text, or read from nanoGPT's meta.pkl."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import generate
from config import GPTConfig, UserError
from engine.data import check_data
from launch import launch, log_of
from model import GPT
from text.characters import read_meta
from text.tokenizer import load_tokenizer
from text.tokenizer_training import train_characters

WORDS = [
    "--preset",
    "micro",
    "--n-layer",
    "1",
    "--steps",
    "2",
    "--seq-len",
    "16",
    "--batch-tokens",
    "64",
    "--device",
    "cpu",
]
TEXT = "First Citizen:\nSpeak, wörld. 한글\n" * 40


@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
def test_a_text_has_one_token_a_character(tmp_path_factory: Any, text: str) -> None:
    folder = tmp_path_factory.mktemp("characters") / "tokenizer"
    tokenizer = train_characters([text], folder)
    ids = tokenizer.encode(text)
    assert [sorted(set(text))[id] for id in ids] == list(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert tokenizer.vocab_size == len(set(text)) + 2 and tokenizer.eot == tokenizer.vocab_size - 1


def test_other_characters_are_unknown_and_transformers_agrees(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = train_characters([TEXT], tmp_path / "tokenizer", special=["<answer>"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for text in (TEXT, "zZ <unk> ", "  \r\n\t"):
        ids = ours.encode(text)
        if "<" not in text:  # special tokens in a text are ordinary text here
            assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert ours.encode("q") == [ours.special_id("<unk>")]
    assert load_tokenizer(str(tmp_path / "tokenizer")).sha256 == ours.sha256


def write_nanogpt(folder: Path, itos: Any = None) -> list[str]:
    """The files of nanoGPT's data/shakespeare_char/prepare.py. Returns the characters."""
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(c) for c in TEXT], dtype=np.uint16)
    folder.mkdir()
    ids[:-200].tofile(folder / "train.bin")
    ids[-200:].tofile(folder / "val.bin")
    stoi = {c: i for i, c in enumerate(characters)}
    itos = dict(enumerate(characters)) if itos is None else itos
    meta = {"vocab_size": len(characters), "itos": itos, "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return characters


def test_a_run_on_the_data_of_nanogpt(tmp_path: Path) -> None:
    characters = write_nanogpt(tmp_path / "data")
    (end,) = launch(tmp_path, [*WORDS, "--data", "data", "--out", "run"])
    assert end.code == 0, end.err
    final = load_tokenizer(str(tmp_path / "run" / "final"))
    assert final.vocab_size == len(characters) + 2
    assert final.encode(TEXT) == load_tokenizer(str(tmp_path / "data" / "meta.pkl")).encode(TEXT)
    assert final.decode(final.encode(TEXT)) == TEXT
    shown = "".join(line["text"] for line in log_of(tmp_path / "run", "sample"))
    assert set(shown.replace("<unk>", "").replace("<|endoftext|>", "")) <= {*characters, *"Onceup"}


class Program:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


@pytest.mark.parametrize(
    ("itos", "said"),
    [
        (Program(), "posix.mkdir"),
        ({0: "a", 1: "bc"}, "a single character"),
        ({0: "a", 1: "a"}, "the same character"),
        ({1: "a"}, "no 0"),
        ({}, "a single character"),
        (7, "len"),
    ],
)
def test_another_pickle_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, itos: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "data", itos)
    with pytest.raises(UserError, match=r"meta\.pkl is not .*" + said):
        read_meta(tmp_path / "data" / "meta.pkl")
    assert not (tmp_path / "opened").exists()


def test_damaged_pickles_are_refused(tmp_path: Path) -> None:
    write_nanogpt(tmp_path / "data")
    file = tmp_path / "data" / "meta.pkl"
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x80" + os.urandom(50), b"[]"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"meta\.pkl is not"):
            load_tokenizer(str(file))


def test_the_characters_of_the_training_text(tmp_path: Path) -> None:
    """--tokenizer characters takes them, again when the run goes on; shards have none."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [*WORDS, "--data", "text.txt", "--tokenizer", "characters", "--out", "run"]
    (dry,) = launch(tmp_path, [*words, "--dry-run"])
    assert dry.code == 0 and not (tmp_path / "data").exists(), dry.err
    file = str(tmp_path / "text.txt")
    size = check_data(file, None, "characters", "text", tmp_path / "cache")
    assert size == len(set(TEXT)) + 2
    (first,) = launch(tmp_path, words)
    assert first.code == 0 and f"characters, {size} ids" in first.out, first.err
    (again,) = launch(tmp_path, words)
    assert again.code == 0 and "finished" in again.out, again.err
    write_nanogpt(tmp_path / "shards")
    (refused,) = launch(tmp_path, [*words, "--data", "shards", "--out", "other"])
    assert refused.code == 2 and "token shards" in refused.err and refused.err.count("\n") == 1


def test_the_command(run: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = ("tokenizer.py", "train", "--model", "characters", "--input", "text.txt", "--out")
    repo = Path(__file__).resolve().parents[2]
    done = run(repo / words[0], *words[1:], "made")
    assert done.returncode == 0 and f"vocabulary {len(set(TEXT)) + 2}," in done.stdout, done.stderr
    for more, said in (
        (("other", "--vocab-size", "300"), "leave --vocab-size out"),
        (("other", "--model", "unigram"), "--vocab-size is missing"),
    ):
        done = run(repo / words[0], *words[1:], *more)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def nanogpt(tmp_path: Path) -> list[str]:
    """A checkpoint as nanoGPT trains it on characters, without rows for special tokens: run/ckpt.pt.
    Its data are in the folder data. Returns the characters."""
    characters = write_nanogpt(tmp_path / "data")
    (tmp_path / "run").mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(len(characters), 16, n_layer=1, n_head=1, n_embd=8, padded_vocab=False))
    sizes = dict(
        n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=len(characters), bias=True
    )
    checkpoint = {"model": model.state_dict(), "model_args": sizes}
    torch.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    return characters


def test_a_checkpoint_of_nanogpt_on_characters(
    tmp_path: Path, nanogpt: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    meta = ("--tokenizer", "data/meta.pkl", "--device", "cpu")

    def answer(module: Any, *words: str) -> str:
        monkeypatch.setattr("sys.argv", ["command", "run", *words, *meta])
        capsys.readouterr()
        module.main()
        return capsys.readouterr().out

    for prompt in ("First", ""):
        text = answer(generate, prompt, "--max-new-tokens", "40", "--temperature", "3")
        assert text.startswith(prompt) and len(text) >= 40 and set(text) <= {*nanogpt, "\n"}
    found = json.loads(answer(evaluate, "--data", "data", "--json", "-"))["data"]
    model = GPT.from_pretrained(tmp_path / "run").eval()
    ids = torch.tensor([nanogpt.index(c) for c in TEXT[-200:]])
    nll = 0.0
    for i in range(0, 199, 16):
        targets = ids[i + 1 : i + 17]
        with torch.no_grad():
            nll += float(model(ids[None, i : i + len(targets)], targets[None], reduction="sum"))
    assert found["loss"] == pytest.approx(nll / 199, rel=1e-5)
    assert found["tokens"] == 199 and found["bytes"] == len(TEXT[-200:].encode())
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a zebra"}))
    for module, words, said in (
        (generate, ["Qq"], "the prompt has a character that is not among the"),
        (evaluate, ["--data", "text.txt"], "documents, which begin with an end token"),
        (evaluate, ["--lambada", "rows.jsonl"], "--lambada has a character"),
    ):
        with pytest.raises(UserError, match=said):
            answer(module, *words)
    (end,) = launch(tmp_path, [*WORDS[4:], "--data", "data", "--init", "run", "--out", "on"])
    assert end.code == 2 and "has only" in end.err, end
