"""Decoding against transformers and against a loop without a cache; generate.py as a user meets it."""

from __future__ import annotations

import dataclasses
import io
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import generate as script
from config import UserError
from decoding import Sampling, draw, generate, kept_tokens, open_model, penalize, truncate
from model import GPT, GPTConfig
from tokenizer import Tokenizer, load_tokenizer, train_bpe

BLOCK = 64
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [(17 * i) % 330 for i in range(20)]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that wait for one another cost a tiny model more than they save, the more so on a busy machine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def words() -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices("abcdefgé", k=source.randint(2, 6))) for _ in range(60)] + ["naïve", "日本"]


def texts() -> list[str]:
    source = random.Random(1)
    return [" ".join(source.choices(words(), k=12)) + "." for _ in range(200)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 331 tokens (so its embedding is padded) that does not repeat itself, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hub"
    tokenizer = train_bpe(texts(), 331, folder)
    assert tokenizer.vocab_size == 331
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=331, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder, eot=tokenizer.eot)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GPT:
    return GPT.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def transformers_greedy(reference, prompt: list[int], max_new_tokens: int, **options) -> list[int]:
    idx = torch.tensor([prompt])
    out = reference.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


# ---- decoding.py


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers_token_for_token(model: GPT, reference, penalty: float) -> None:
    options = Sampling(decode="greedy", max_new_tokens=40, repetition_penalty=penalty)
    ours = generate(model, PROMPTS, options, eot=None)
    assert len({token for row in ours for token in row}) > 10
    for prompt, continuation in zip(PROMPTS, ours, strict=True):
        assert continuation == transformers_greedy(reference, prompt, 40, repetition_penalty=penalty)


SAMPLINGS = {
    "plain": Sampling(max_new_tokens=30, temperature=1.0),
    "top-k": Sampling(max_new_tokens=30, temperature=0.7, top_k=20),
    "top-p": Sampling(max_new_tokens=30, temperature=1.2, top_p=0.8),
    "all": Sampling(max_new_tokens=30, temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.2),
}


@pytest.mark.parametrize("options", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_row_of_a_batch_is_the_row_alone(model: GPT, options: Sampling) -> None:
    batch = generate(model, PROMPTS, options, eot=3)
    assert batch == generate(model, PROMPTS, options, eot=3)
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], options, eot=3, rows=[i]) == [batch[i]]


def test_the_seed_and_the_row_make_the_draws(model: GPT) -> None:
    options = Sampling(max_new_tokens=30, temperature=1.0)
    first, second = generate(model, [PROMPTS[0]] * 2, options, eot=None)
    assert first != second
    assert generate(model, [PROMPTS[0]], dataclasses.replace(options, seed=2), eot=None) != [first]
    longer = dataclasses.replace(options, max_new_tokens=35)
    assert generate(model, [PROMPTS[0]], longer, eot=None)[0][:30] == first


@pytest.mark.parametrize("narrow", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str)
def test_the_narrowest_sampling_is_greedy(model: GPT, narrow: dict) -> None:
    greedy = generate(model, PROMPTS, Sampling(decode="greedy", max_new_tokens=30), eot=None)
    assert generate(model, PROMPTS, Sampling(max_new_tokens=30, **narrow), eot=None) == greedy


def test_padding_ids_are_never_drawn(model: GPT) -> None:
    options = Sampling(max_new_tokens=60, temperature=1e4)  # every token as likely as another
    drawn = {t for row in generate(model, [[1]] * 32, options, eot=None) for t in row}
    assert max(drawn) < 331 and len(drawn) > 300
    drawn = {t for row in generate(model, [[1]] * 32, options, eot=None, vocab_size=200) for t in row}
    assert max(drawn) < 200


def test_a_row_ends_before_end_of_text_and_its_neighbours_go_on(model: GPT) -> None:
    options = Sampling(decode="greedy", max_new_tokens=30)
    whole = generate(model, PROMPTS, options, eot=None)
    eot = next(token for token in whole[2] if not all(token in row for row in whole))
    seen: list[list[int]] = [[], [], []]
    cut = generate(model, PROMPTS, options, eot, on_token=lambda row, token: seen[row].append(token))
    assert cut == [row[: row.index(eot)] if eot in row else row for row in whole]
    assert len(cut[2]) < 30 and max(map(len, cut)) == 30
    assert seen == cut


def greedy_without_cache(reference, prompt: list[int], count: int) -> list[int]:
    """What sliding means: a window that outgrows block_size keeps its newest three quarters."""
    window, out = list(prompt), []
    for _ in range(count):
        if len(window) > BLOCK:
            window = window[-kept_tokens(BLOCK) :]
        with torch.no_grad():
            token = int(reference(torch.tensor([window])).logits[0, -1].argmax())
        window.append(token)
        out.append(token)
    return out


def test_sliding_past_block_size(model: GPT, reference) -> None:
    prompts = [*PROMPTS, list(range(BLOCK)), list(range(100, 100 + BLOCK + 30))]
    ours = generate(model, prompts, Sampling(decode="greedy", max_new_tokens=2 * BLOCK), eot=None)
    for prompt, continuation in zip(prompts, ours, strict=True):
        assert continuation == greedy_without_cache(reference, prompt, 2 * BLOCK)


def test_training_mode_comes_back(model: GPT) -> None:
    model.train()
    generate(model, [[1]], Sampling(max_new_tokens=1), eot=None)
    assert model.training
    model.eval()
    generate(model, [[1]], Sampling(max_new_tokens=1), eot=None)
    assert not model.training


def test_penalty_and_truncation_are_transformers() -> None:
    logits = torch.randn(3, 331, generator=torch.Generator().manual_seed(0)) * 3
    prompt = torch.randint(0, 331, (3, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, 331, dtype=torch.bool).scatter_(1, prompt, True)
    torch.testing.assert_close(penalize(logits, seen, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(prompt, logits))
    for top_k, top_p in ((5, 1.0), (0, 0.6), (40, 0.7), (1000, 0.3)):
        expected = TopKLogitsWarper(top_k)(prompt, logits) if top_k else logits
        expected = TopPLogitsWarper(top_p)(prompt, expected) if top_p < 1 else expected
        assert torch.equal(truncate(logits, top_k, top_p), expected)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    n = 10_000
    uniform = torch.arange(n) / n  # from 0 up
    drawn = draw(logits.expand(n, -1), uniform).bincount(minlength=5) / n
    torch.testing.assert_close(drawn, logits.softmax(-1)[0], atol=2 / n, rtol=0)
    assert drawn[1] == drawn[4] == 0
    assert draw(logits, torch.tensor([1 - 2**-24])).tolist() == [3]


BAD = [
    dict(temperature=0.0),
    dict(temperature=-1.0),
    dict(top_p=0.0),
    dict(top_p=1.1),
    dict(top_k=-1),
    dict(repetition_penalty=0.0),
    dict(max_new_tokens=0),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_options_are_refused_by_name(bad: dict) -> None:
    with pytest.raises(UserError, match="--" + next(iter(bad)).replace("_", "-")):
        Sampling(**bad)


def test_greedy_needs_no_temperature() -> None:
    Sampling(decode="greedy", temperature=0.0)


def test_an_empty_prompt_is_refused(model: GPT) -> None:
    assert generate(model, [], Sampling(), eot=None) == []
    with pytest.raises(UserError, match="no token"):
        generate(model, [[1], []], Sampling(), eot=None)


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"331 ids and the model of .* only 300"):
        open_model(str(tmp_path), str(checkpoint), torch.device("cpu"), torch.float32)


# ---- generate.py


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path, stdin: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return script.main()


def test_defaults_are_those_of_decoding() -> None:
    given = dataclasses.asdict(script.GenerateConfig())
    assert dataclasses.asdict(Sampling()).items() <= given.items()


@pytest.mark.parametrize("seed", range(4))
def test_streamed_text_is_the_whole_text(checkpoint: Path, monkeypatch, capsys, seed: int) -> None:
    words = (checkpoint, "日本 é", "--max-new-tokens", "50", "--seed", str(seed), "--temperature", "1.5")
    call(monkeypatch, *words)
    streamed = capsys.readouterr().out
    call(monkeypatch, *words, "--no-stream")
    assert capsys.readouterr().out == streamed
    assert streamed.startswith("日本 é") and len(streamed) > 20


def test_a_character_waits_for_its_bytes(tokenizer: Tokenizer, capsys) -> None:
    pieces = []
    stream = script.Stream(tokenizer, "")
    for byte in "é本".encode():
        token = next(id for id in range(331) if tokenizer.token_bytes(id) == bytes([byte]))
        stream.add(token)
        pieces.append(capsys.readouterr().out)
    assert pieces == ["", "é", "", "", "本"]


def test_prompts_and_samples_are_told_apart(checkpoint: Path, tokenizer: Tokenizer, model: GPT, monkeypatch, capsys):
    words = (checkpoint, "abc", "de f", "--num-samples", "2", "--max-new-tokens", "9", "--seed", "3")
    call(monkeypatch, *words, "--batch", "3")
    parts = capsys.readouterr().out.removesuffix("\n").split("\n" + script.RULE + "\n")
    prompts = ["abc", "abc", "de f", "de f"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = generate(model, ids, Sampling(max_new_tokens=9, seed=3), tokenizer.eot)
    spell = [b"".join(map(tokenizer.token_bytes, row)).decode(errors="replace") for row in expected]
    assert parts == [prompt + text for prompt, text in zip(prompts, spell, strict=True)]


def test_prompts_come_from_a_pipe(checkpoint: Path, monkeypatch, capsys) -> None:
    call(monkeypatch, checkpoint, "--max-new-tokens", "5", stdin="abc\n\nde f\r\n")
    first, second = capsys.readouterr().out.split(script.RULE + "\n")
    assert first.startswith("abc") and second.startswith("de f")
    with pytest.raises(UserError, match="no prompt"):
        call(monkeypatch, checkpoint, stdin="\n")


def test_an_empty_prompt_begins_a_document(checkpoint: Path, monkeypatch, capsys) -> None:
    call(monkeypatch, checkpoint, "", "--max-new-tokens", "5")
    assert capsys.readouterr().out.strip()


def test_a_long_prompt_is_cut_aloud(checkpoint: Path, monkeypatch, capsys) -> None:
    call(monkeypatch, checkpoint, "abc " * 100, "--max-new-tokens", "5")
    assert f"only its last {kept_tokens(BLOCK)} are read" in capsys.readouterr().err


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:2000])
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be read"):
        call(monkeypatch, tmp_path, "abc")


def test_the_command(checkpoint: Path, repo: Path, run) -> None:
    done = run(repo / "generate.py", checkpoint, "日本", "--max-new-tokens", "5", "--decode", "greedy")
    assert done.returncode == 0 and done.stdout.startswith("日本") and not done.stderr


BAD_WORDS = {
    "unknown option": (["--temprature", "1"], "did you mean --temperature"),
    "not a choice": (["--decode", "beam"], "--decode"),
    "no samples": (["--num-samples", "0"], "--num-samples is 0"),
    "temperature": (["--temperature", "0"], "--temperature is 0.0"),
    "no checkpoint": ([], "no checkpoint is named"),
}


@pytest.mark.parametrize(("words", "message"), BAD_WORDS.values(), ids=BAD_WORDS)
def test_bad_input_is_one_line(words: list[str], message: str, monkeypatch) -> None:
    with pytest.raises(UserError, match=message) as raised:
        call(monkeypatch, *(["nowhere", "abc", *words] if words else []))
    assert "\n" not in str(raised.value)


def test_bad_input_exits_2_and_help_needs_no_torch(repo: Path, run) -> None:
    done = run(repo / "generate.py", "./nowhere", "abc")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    done = run("-X", "importtime", repo / "generate.py", "--help")
    assert done.returncode == 0 and "CHECKPOINT" in done.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


class Terminal:
    """generate.py at a pseudo-terminal."""

    def __init__(self, *words: str | Path):
        import pty

        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.unread = b""

    def expect(self, text: str, timeout: float = 120) -> None:
        """Wait until it has printed `text`, after what was expected before."""
        deadline = time.monotonic() + timeout
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; so far: {self.unread!r}"
            self.unread += os.read(self.master, 4096)
        self.unread = self.unread.partition(text.encode())[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_dialogue(checkpoint: Path, repo: Path) -> None:
    words = (repo / "generate.py", checkpoint, "--max-new-tokens", "3")
    polite, hasty = Terminal(*words), Terminal(*words)
    try:
        for prompt in ("abc", "de f"):
            polite.expect("> ")
            polite.type(prompt + "\n")
            polite.expect(prompt)  # the echo of what was typed
            polite.expect(prompt)  # the continued text
        polite.expect("> ")
        polite.type("\n")
        assert polite.process.wait(60) == 0
        hasty.expect("> ")
        hasty.process.send_signal(signal.SIGINT)
        assert hasty.process.wait(60) == 130
    finally:
        polite.close()
        hasty.close()
