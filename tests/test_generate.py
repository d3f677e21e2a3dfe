"""generate.py as a user runs it."""

from __future__ import annotations

import functools
import io
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import generate as script
from config import UserError
from decoding.batched import generate
from decoding.fixed import FixedDecoder
from decoding.loading import open_model
from decoding.options import DecodeConfig
from decoding.window import kept_tokens
from engine import compiling
from launch import Launch
from model import GPT, GPTConfig
from support import own_lines
from text.chat import END, ROLES
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe

BLOCK = 64


@pytest.fixture(autouse=True)
def commands_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def words() -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices("abcdefgé", k=source.randint(2, 6))) for _ in range(60)] + [
        "naïve",
        "日本",
    ]


def texts() -> list[str]:
    source = random.Random(1)
    return [" ".join(source.choices(words(), k=12)) + "." for _ in range(200)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 331 tokens, so that its embedding is padded, and its tokenizer. The model
    does not repeat itself."""
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


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    GPT(GPTConfig(vocab_size=300, block_size=8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"331 ids and the model of .* only 300"):
        open_model(str(tmp_path), str(checkpoint), torch.device("cpu"), torch.float32)


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path, stdin: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return script.main()


@pytest.mark.parametrize("seed", range(4))
def test_streamed_pieces_join_to_the_whole_text(
    checkpoint: Path, monkeypatch, capsys, seed: int
) -> None:
    words = (
        checkpoint,
        "日本 é",
        "--max-new-tokens",
        "50",
        "--seed",
        str(seed),
        "--temperature",
        "1.5",
    )
    call(monkeypatch, *words)
    streamed = capsys.readouterr().out
    call(monkeypatch, *words, "--no-stream")
    assert capsys.readouterr().out == streamed
    assert streamed.startswith("日本 é") and len(streamed) > 20


@pytest.mark.parametrize("decode", ["greedy", "contrastive", "beam", "mbr", "ensemble"])
def test_every_decoding_method_writes_the_text_it_streams(
    checkpoint: Path, monkeypatch, capsys, decode: str
) -> None:
    words = (
        checkpoint,
        "abc",
        "--max-new-tokens",
        "12",
        "--decode",
        decode,
        "--candidates",
        "4",
        "--beams",
        "2",
    )
    call(monkeypatch, *words)
    streamed = capsys.readouterr().out
    call(monkeypatch, *words, "--no-stream")
    assert capsys.readouterr().out == streamed
    assert streamed.startswith("abc") and len(streamed) > 5


@pytest.mark.parametrize("words", [["abc"], ["abc", "de f", "--num-samples", "2"]])
def test_compiled_steps_write_the_same_texts(
    checkpoint: Path, monkeypatch, capsys, words: list[str]
) -> None:
    """Past the context. The compiler itself is left out: it would take most of a minute."""
    asked = (checkpoint, *words, "--max-new-tokens", "70", "--temperature", "1.2")
    call(monkeypatch, *asked)
    expected = capsys.readouterr().out
    decoder = functools.partial(FixedDecoder, backend=None)
    monkeypatch.setattr(script, "compiled_decoder", decoder)
    call(monkeypatch, *asked, "--compile")
    assert capsys.readouterr().out == expected


def test_compiling_without_a_compiler_is_refused(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiling, "compiler_problem", lambda device: "needs a C++ compiler")
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler; or leave it out"):
        call(monkeypatch, checkpoint, "abc", "--compile")


def test_a_character_is_printed_when_its_bytes_are_complete(tokenizer: Tokenizer, capsys) -> None:
    pieces = []
    stream = script.TextStream(tokenizer, "")
    for byte in "é本".encode():
        token = next(id for id in range(331) if tokenizer.token_bytes(id) == bytes([byte]))
        stream.add(token)
        pieces.append(capsys.readouterr().out)
    assert pieces == ["", "é", "", "", "本"]


def test_a_rule_separates_prompts_and_samples(
    checkpoint: Path, tokenizer: Tokenizer, model: GPT, monkeypatch, capsys
):
    words = (
        checkpoint,
        "abc",
        "de f",
        "--num-samples",
        "2",
        "--max-new-tokens",
        "9",
        "--seed",
        "3",
    )
    call(monkeypatch, *words, "--batch", "3")
    parts = capsys.readouterr().out.removesuffix("\n").split("\n" + script.RULE + "\n")
    prompts = ["abc", "abc", "de f", "de f"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = generate(model, ids, DecodeConfig(max_new_tokens=9), tokenizer.eot, seed=3)
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


def test_a_long_prompt_is_truncated_with_a_warning(checkpoint: Path, monkeypatch, capsys) -> None:
    call(monkeypatch, checkpoint, "abc " * 100, "--max-new-tokens", "5")
    assert f"only its last {kept_tokens(BLOCK)} are read" in capsys.readouterr().err


def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:2000])
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(UserError, match="cannot be read"):
        call(monkeypatch, tmp_path, "abc")


def test_the_command(checkpoint: Path, repo: Path, run) -> None:
    done = run(
        repo / "generate.py", checkpoint, "日本", "--max-new-tokens", "5", "--decode", "greedy"
    )
    assert done.returncode == 0 and done.stdout.startswith("日本") and not own_lines(done.stderr)


BAD_WORDS = {
    "unknown option": (["--temprature", "1"], "did you mean --temperature"),
    "not a choice": (["--decode", "beams"], "--decode"),
    "one text over again": (
        ["--decode", "beam", "--num-samples", "2"],
        "--num-samples 2 would be one text",
    ),
    "no room in an ensemble": (
        ["--decode", "ensemble", "--candidates", "6"],
        "--candidates 6 .* give 7 or more",
    ),
    "no samples": (["--num-samples", "0"], "--num-samples is 0"),
    "a system message without a conversation": (["--system", "x"], "--system belongs to --chat"),
    "several answers": (
        ["--chat", "--num-samples", "2"],
        "--num-samples 2: a conversation has one answer",
    ),
    "compiled beams": (["--compile", "--decode", "beam"], "--compile goes with --decode sample or"),
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
    done = run("-X", "importtime", repo / "generate.py", "--help", fresh=True)
    assert done.returncode == 0 and "CHECKPOINT" in done.stdout
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def sit_at(terminal: str) -> None:
    """Make a pseudo-terminal this process's own."""
    opened = os.open(terminal, os.O_RDWR)
    for number in range(3):
        os.dup2(opened, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (as long as the process)


class Terminal:
    """generate.py in a pseudo-terminal."""

    def __init__(self, folder: Path, name: str, *words: str | Path):
        import pty

        self.master, self.slave = pty.openpty()
        patch = functools.partial(sit_at, os.ttyname(self.slave))
        typed = [str(word) for word in words]
        self.launched = Launch(folder, typed, {}, patch, name, "generate")
        self.process = self.launched.process
        self.unread = b""

    def expect(self, text: str, timeout: float = 120) -> None:
        """Wait until it has printed `text` after the text that was expected before."""
        deadline = time.monotonic() + timeout
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; so far: {self.unread!r}"
            self.unread += os.read(self.master, 4096)
        self.unread = self.unread.partition(text.encode())[2]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ended(self) -> int | None:
        """The exit code, once the program has ended."""
        self.process.join(60)
        return self.process.exitcode

    def interrupt(self) -> None:
        """Press Ctrl-C until the program ends. Python loses a Ctrl-C that comes after readline
        printed the prompt and before it waits for a key."""
        for _ in range(12):
            if self.process.exitcode is None:
                os.kill(self.launched.pid, signal.SIGINT)
                self.process.join(5)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        os.close(self.master)
        os.close(self.slave)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_dialogue_in_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    words = (checkpoint, "--max-new-tokens", "3")
    polite, hasty = (Terminal(tmp_path, name, *words) for name in ("polite", "hasty"))
    try:
        for prompt in ("abc", "de f"):
            polite.expect("> ")
            polite.type(prompt + "\n")
            polite.expect(prompt)  # the echo of the typed text
            polite.expect(prompt)  # the continued text
        polite.expect("> ")
        polite.type("\n")
        assert polite.ended() == 0
        hasty.expect("> ")
        hasty.interrupt()
        assert hasty.ended() == 130
    finally:
        polite.close()
        hasty.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_conversation_in_a_terminal_ends_with_the_input(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    chat = tokenizer.with_special((*ROLES.values(), END))
    model = GPT(GPTConfig(vocab_size=335, block_size=16, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(tmp_path, eot=chat.eot)
    chat.save(tmp_path)
    terminal = Terminal(tmp_path, "terminal", tmp_path, "--chat", "--max-new-tokens", "3")
    try:
        for message in ("abc", "de f"):
            terminal.expect("> ")
            terminal.type(message + "\n")
            terminal.expect(message)  # the echo of the typed text
        terminal.expect("context of 16 tokens is full: the oldest turns are left out")
        terminal.expect("> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.ended() == 0
    finally:
        terminal.close()


def test_standard_input_in_utf_16_is_refused(monkeypatch, checkpoint) -> None:
    raw = io.TextIOWrapper(io.BytesIO("the moon\n".encode("utf-16")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", raw)
    monkeypatch.setattr(sys, "argv", ["generate.py", str(checkpoint)])
    with pytest.raises(
        UserError, match="standard input is not UTF-8 text; pipe it through iconv -f UTF-16"
    ):
        script.main()
