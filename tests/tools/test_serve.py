"""tools.serve as its users meet it: OpenAI's client and raw connections, against the command."""

from __future__ import annotations

import asyncio
import copy
import http.client
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from adapters import heads
from adapters.heads import ClassifierInfo
from decoding import continuous
from decoding.batched import generate
from decoding.options import DecodeConfig
from launch import Launch
from model import GPT, GPTConfig
from tasks.generation import chat
from tasks.generation.sequences import SequenceEncoder
from text.chat import END, ROLES
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe
from tools import serve_app

openai = pytest.importorskip("openai", reason="needs the package openai")
pytest.importorskip("uvicorn", reason="needs the package uvicorn")

CONTEXT = 64
ENDLESS: Any = dict(max_tokens=2_000_000, temperature=0)  # never comes to its end
PROMPTS = ["abc", "日本 é", "", "de fa " * 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that can chat, and does not repeat itself. Most of its tokens are single
    bytes, so its characters are cut."""
    folder = tmp_path_factory.mktemp("served") / "toy"
    plain = train_bpe(["abc de fa gé bad é naïve 日本 cab"] * 20, 280, folder)
    tokenizer = plain.with_special((*ROLES.values(), END))
    torch.manual_seed(0)
    shape = GPTConfig(tokenizer.vocab_size, CONTEXT, n_layer=2, n_head=2, n_embd=32)
    model = GPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
        model.transformer.wte.weight[tokenizer.eot] = 0  # never the likeliest token
    model.save_pretrained(folder, eot=tokenizer.eot)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT:
    return GPT.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(str(folder))


class Server:
    """The command, and the port that it listens on."""

    def __init__(
        self, folder: Path, name: str, *words: str | Path, patch: Callable[[], None] | None = None
    ):
        typed = [*map(str, words), "--port", "0", "--device", "cpu"]
        self.launched = Launch(folder, typed, {}, patch, name, "tools.serve")
        deadline = time.monotonic() + 120
        while not (found := re.search(r"at http://[^/]*:(\d+)/v1", self.output())):
            assert time.monotonic() < deadline and self.launched.process.is_alive(), self.output()
            time.sleep(0.02)
        self.port = int(found[1])

    def output(self) -> str:
        files = (self.launched.out, self.launched.err)
        return "".join(file.read_text() for file in files if file.exists())

    def client(self, **options: Any) -> Any:
        url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(api_key="none", base_url=url, max_retries=0, **options)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[Any, int, Any]:
        """The JSON, status and headers of an answer. `body`: bytes, or JSON to send."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        return json.loads(text), answer.status, answer.headers

    def open_texts(self) -> int:
        return self.ask("GET", "/health")[0]["open"]

    def end(self) -> None:
        if self.launched.process.is_alive():
            os.kill(self.launched.pid, signal.SIGKILL)
        self.launched.process.join()


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    place, servers = tmp_path_factory.mktemp("servers"), []

    def start(*words: str | Path, **options: Any) -> Server:
        servers.append(Server(place, f"server{len(servers)}", *words, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.end()


@pytest.fixture(scope="module")
def server(start: Start, folder: Path) -> Server:
    return start(folder, "--max-batch", "5", "--max-new-tokens", "300")


def alone(
    model: GPT, tokenizer: Tokenizer, ids: list[int], end: int, row: int = 0, **options: Any
) -> str:
    """The text that generate.py writes for this prompt as its text number `row`."""
    seed = options.pop("seed", 1337)
    cfg: Any = DecodeConfig(**options)
    (made,) = generate(
        model, [ids], cfg, end, seed=seed, rows=[row], vocab_size=tokenizer.vocab_size
    )
    return b"".join(map(tokenizer.token_bytes, made)).decode(errors="replace")


SETTINGS = [
    (dict(decode="greedy"), dict(temperature=0)),
    (dict(temperature=0.8, seed=5), dict(temperature=0.8, seed=5)),
    (dict(temperature=1.3, top_p=0.8, seed=6), dict(temperature=1.3, top_p=0.8, seed=6)),
    (dict(temperature=1.0, top_k=9), dict(seed=1337, extra_body={"top_k": 9})),
]


def test_completions_are_the_texts_of_generate(
    server: Server, model: GPT, tokenizer: Tokenizer
) -> None:
    """Past the context too. Four prompts with two choices each share a batch of five."""
    ids = [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in PROMPTS]
    client = server.client()
    for ours, theirs in SETTINGS:
        expected = [
            alone(model, tokenizer, ids[i // 2], tokenizer.eot, i, max_new_tokens=90, **ours)
            for i in range(8)
        ]
        for prompt in (PROMPTS, ids):
            answer = client.completions.create(
                model="toy", prompt=prompt, n=2, max_tokens=90, **theirs
            )
            assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))
        pieces = [""] * 8
        for chunk in client.completions.create(
            model="toy", prompt=PROMPTS, n=2, max_tokens=90, stream=True, **theirs
        ):
            for choice in chunk.choices:
                assert "\ufffd" not in choice.text or "\ufffd" in expected[choice.index]
                pieces[choice.index] += choice.text
        assert pieces == expected
    assert any(ord(character) > 127 for text in expected for character in text)


def test_a_chat_is_answered_as_generate_answers(
    server: Server, model: GPT, tokenizer: Tokenizer
) -> None:
    encoder = SequenceEncoder(tokenizer, model.context, False, END)
    messages = [{"role": "system", "content": "abc"}, {"role": "user", "content": "de <|end|>"}]
    ids = encoder.fit(chat.prompt(messages), CONTEXT).ids
    expected = alone(model, tokenizer, ids, encoder.end, max_new_tokens=20, temperature=0.9, seed=3)
    asked: Any = dict(model="toy", temperature=0.9, seed=3, max_completion_tokens=20)
    client = server.client()
    whole = client.chat.completions.create(messages=messages, logprobs=True, **asked)
    assert whole.choices[0].message.content == expected
    assert whole.usage.total_tokens == len(ids) + whole.usage.completion_tokens
    spelled = [byte for token in whole.choices[0].logprobs.content for byte in token.bytes]
    assert bytes(spelled).decode(errors="replace") == expected
    parts = [{"type": "text", "text": "de "}, {"type": "text", "text": "<|end|>"}]
    messages = [{"role": "developer", "content": "abc"}, {"role": "user", "content": parts}]
    chunks = list(
        client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **asked
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason


def test_older_turns_that_do_not_fit_are_left_out_and_said(server: Server) -> None:
    turns = [{"role": role, "content": "abc " * 3} for role in ("user", "assistant") * 6]
    body = {"messages": [*turns, {"role": "user", "content": "de"}], "max_tokens": 2}
    answer, status, _ = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200 and "oldest turns were left out" in answer["warnings"][0]


def test_a_stop_string_ends_a_text_wherever_tokens_cut_it(server: Server) -> None:
    client = server.client()
    asked: Any = dict(model="toy", prompt="abc", max_tokens=60, seed=8, temperature=1.2)
    whole = client.completions.create(**asked).choices[0].text
    for begin, length in itertools.product((3, 11, 20), (1, 2, 4)):
        stop = whole[begin : begin + length]
        expected = whole[: whole.find(stop)]
        choice = client.completions.create(stop=[stop, "no such"], logprobs=2, **asked).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        assert all(offset < len(expected) for offset in choice.logprobs.text_offset)
        chunks = list(client.completions.create(stop=stop, logprobs=0, stream=True, **asked))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        streamed = [
            token for chunk in chunks if chunk.choices for token in chunk.choices[0].logprobs.tokens
        ]
        assert streamed == choice.logprobs.tokens


def test_logprobs_are_those_of_the_model(server: Server, model: GPT, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc de")
    answer = server.client().completions.create(
        model="toy", prompt="abc de", max_tokens=1, temperature=0, logprobs=3, echo=False
    )
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1).topk(3)
    found = answer.choices[0].logprobs
    assert found.token_logprobs[0] == pytest.approx(expected.values[0].item(), abs=1e-4)
    assert sorted(found.top_logprobs[0].values(), reverse=True) == pytest.approx(
        expected.values.tolist(), abs=1e-4
    )


def test_penalties_lower_the_logits_of_repeated_tokens(server: Server) -> None:
    asked: Any = dict(model="toy", prompt="abc", max_tokens=60, temperature=0, logprobs=0)
    create = server.client().completions.create
    for penalty in ("presence_penalty", "frequency_penalty"):
        repeats = []
        for value in (-2, 0, 2):
            tokens = create(**asked, **{penalty: value}).choices[0].logprobs.tokens
            repeats.append(len(tokens) - len(set(tokens)))
        assert repeats == sorted(repeats, reverse=True) and repeats[0] > repeats[-1]


def test_200_requests_at_once_get_the_answers_they_get_alone(
    server: Server, model: GPT, tokenizer: Tokenizer
) -> None:
    """Each with its own settings, some as streams. Neighbours change nothing."""

    def settings(i: int) -> dict[str, Any]:
        return dict(temperature=0.7 + i % 5 / 4, top_p=1 - i % 3 / 8, seed=i)

    async def ask(client: Any, i: int) -> str:
        asked: Any = dict(model="toy", prompt=PROMPTS[i % 4], max_tokens=1 + i % 17, **settings(i))
        if i % 3:
            return (await client.completions.create(**asked)).choices[0].text
        stream = await client.completions.create(stream=True, **asked)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(200)))

    answers = asyncio.run(ask_all())
    for i in range(0, 200, 7):
        ids = tokenizer.encode(PROMPTS[i % 4]) or [tokenizer.eot]
        assert answers[i] == alone(
            model, tokenizer, ids, tokenizer.eot, max_new_tokens=1 + i % 17, **settings(i)
        )
    assert server.open_texts() == 0


def request_of(path: str, body: Any) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stream", [True, False])
def test_the_texts_of_a_reader_that_leaves_end(start: Start, folder: Path, stream: bool) -> None:
    server = start(folder, "--max-batch", "2", "--max-waiting", "2", "--max-new-tokens", "2000000")
    body = {"prompt": "abc", "stream": stream, "logit_bias": {}, "n": 2, **ENDLESS}
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_of("/v1/completions", body))
        until(lambda: server.open_texts() == 2)
        # the batch is full: two more may wait, and no third
        waiting = socket.create_connection(("127.0.0.1", server.port))
        waiting.sendall(request_of("/v1/completions", body))
        until(lambda: server.open_texts() == 4)
        answer, status, headers = server.ask("POST", "/v1/completions", {"prompt": "abc"})
        assert status == 429 and headers["Retry-After"] == "1"
        assert answer["error"]["type"] == "rate_limit_error"
        waiting.close()
        until(lambda: server.open_texts() == 2)
    until(lambda: server.open_texts() == 0)
    _, status, _ = server.ask("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 2})
    assert status == 200
    server.end()


BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": (b"{", 400, "not JSON"),
    "deep": (b"[" * 100_000, 400, "not JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', 400, "not JSON"),
    "no object": (b"[]", 400, "JSON object"),
    "too large": (b" " * 2_000_000, 413, "larger than 1,048,576 bytes"),
    "another model": ({"model": "gpt-4"}, 404, "only toy"),
    "an unknown parameter": ({"max_token": 3}, 400, 'no parameter "max_token"'),
    "an unsupported one": ({"best_of": 3}, 400, "best_of is not supported"),
    "a number as text": ({"max_tokens": "3"}, 400, "must be a whole number"),
    "a flag as number": ({"n": True}, 400, "must be a whole number"),
    "a fraction": ({"max_tokens": 1.5}, 400, "must be a whole number"),
    "too many tokens": ({"max_tokens": 301}, 400, "must be 1 to 300"),
    "NaN": (b'{"temperature": NaN}', 400, "must be 0 to 2"),
    "a huge number": (b'{"top_p": 1e999}', 400, "must be 0 to 1"),
    "a text as flag": ({"stream": "yes"}, 400, "true or false"),
    "an empty stop": ({"stop": ""}, 400, "none of them empty"),
    "five stops": ({"stop": list("abcde")}, 400, "4 at most"),
    "no prompt": ({"prompt": []}, 400, "prompt must be"),
    "an empty prompt of ids": ({"prompt": [[]]}, 400, "prompt must be"),
    "mixed prompts": ({"prompt": [1, "a"]}, 400, "prompt must be"),
    "a fraction as id": ({"prompt": [1.5]}, 400, "1.5 in prompt is no token id"),
    "an id too large": ({"prompt": [1, 10**9]}, 400, "token id 1000000000"),
    "a long prompt": ({"prompt": "abc " * 99}, 400, "context only 64"),
    "too many texts": ({"prompt": ["a"] * 99, "n": 99}, 400, "too many for one request"),
    "too many long texts": ({"prompt": ["abc " * 99] * 999}, 400, "too many for one request"),
    "echo with logprobs": ({"echo": True, "logprobs": 1}, 400, "leave one out"),
    "a surrogate": (b'{"model": "\\ud800"}', 404, "no model"),
}


@pytest.mark.parametrize(("body", "status", "message"), BAD.values(), ids=BAD)
def test_a_bad_body_gets_an_error_in_the_form_of_openai(
    server: Server, body: Any, status: int, message: str
) -> None:
    answer, found, _ = server.ask("POST", "/v1/completions", body)
    assert found == status and message in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


BAD_CHATS: dict[str, tuple[Any, str]] = {
    "no messages": ({}, "has no list of messages"),
    "a text": ({"messages": "hello"}, "has no list of messages"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "has the role 'tool'"),
    "no content": ({"messages": [{"role": "user", "content": " "}]}, "no content in message 1"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "parts of type text alone",
    ),
    "a prompt": ({"prompt": "x"}, 'no parameter "prompt"'),
    "tools": ({"messages": [], "tools": [{}]}, "tools is not supported"),
    "a long system message": (
        {"messages": [{"role": r, "content": "abc " * 60} for r in ("system", "user")]},
        "context only 64",
    ),
}


@pytest.mark.parametrize(("body", "message"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_gets_an_error(server: Server, body: Any, message: str) -> None:
    answer, status, _ = server.ask("POST", "/v1/chat/completions", body)
    found = answer["error"]["message"]
    assert status == 400 and message in found and not found.endswith(",")


def test_a_surrogate_in_a_prompt_is_echoed_as_a_replacement(server: Server) -> None:
    body = b'{"prompt": "a\\ud800", "echo": true, "max_tokens": 1, "temperature": 0}'
    answer, status, _ = server.ask("POST", "/v1/completions", body)
    assert status == 200 and answer["choices"][0]["text"].startswith("a\ufffd")


def test_models_health_and_paths_that_are_not_served(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    assert server.ask("GET", "/health")[0]["status"] == "ok"
    assert server.ask("POST", "/v1/embeddings", {})[1] == 404
    assert server.ask("GET", "/v1/completions")[1] == 405


def test_a_page_of_another_site_gets_nothing(server: Server) -> None:
    here = f"127.0.0.1:{server.port}"
    assert server.ask("GET", "/health", Origin=f"http://{here}")[1] == 200
    assert server.ask("GET", "/health", Origin="http://evil.example")[1] == 403
    assert server.ask("GET", "/health", Host="evil.example")[1] == 403
    for broken in (dict(Host="[::1"), dict(Origin="http://[::1")):
        answer, status, _ = server.ask("GET", "/health", **broken)
        assert status == 403 and "no address" in answer["error"]["message"]


def test_the_page_is_self_contained(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    page = connection.getresponse().read().decode()
    assert "/v1/completions" in page and "/v1/chat/completions" in page
    assert not re.search(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:)?//", page)


def hasten() -> None:
    serve_app.STALL = 0.4


def trickle(server: Server, begin: bytes) -> bytes:
    """What the server answers until it closes a connection on which a byte comes now and then."""
    answer = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.05) as connection:
        connection.sendall(begin)
        for _ in range(400):
            try:
                if not (found := connection.recv(4096)):
                    return answer
                answer += found
            except TimeoutError:
                connection.sendall(b"a")
            except OSError:
                return answer
    raise AssertionError("the connection is still open")


HEAD = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{"


def test_senders_that_are_too_slow_are_cut_off(start: Start, folder: Path) -> None:
    server = start(folder, patch=hasten)
    head, _, body = trickle(server, HEAD % b"/v1/completions").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert "did not arrive in 0.4 seconds" in json.loads(body)["error"]["message"]
    assert trickle(server, HEAD % b"/nowhere").startswith(b"HTTP/1.1 404")
    assert trickle(server, b"POST /v1/completions HTTP/1.1\r\nx-slow: ") == b""
    answer, status, _ = server.ask("POST", "/v1/completions", {"prompt": "abc", "max_tokens": 3})
    assert status == 200 and answer["usage"]["completion_tokens"] == 3
    server.end()


def test_a_broken_model_and_a_classifier_are_refused(
    folder: Path, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def refusal(what: str) -> str:
        ended = Launch(tmp_path, [what], {}, None, what, "tools.serve").end()
        assert ended.code == 2 and ended.err.count("\n") == 1 and not ended.out, ended
        return ended.err

    shutil.copytree(folder, tmp_path / "classifier")
    info = ClassifierInfo("sentiment", ("good", "bad"), "plain", "last")
    heads.save(model, tmp_path / "classifier", info)
    assert "is a classifier" in refusal("classifier")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken", eot=tokenizer.eot)
    tokenizer.save(tmp_path / "broken")
    assert "NaN or infinite, in transformer.h.1.mlp" in refusal("broken")


def fail_for_seed_13() -> None:
    choose = continuous.choose

    def choose_or_fail(logits: torch.Tensor, texts: Sequence[continuous.Text]) -> torch.Tensor:
        if any(text.seed == 13 for text in texts):
            raise RuntimeError("out of luck")
        return choose(logits, texts)

    mock.patch.object(continuous, "choose", choose_or_fail).start()


def test_a_failure_of_the_model_ends_the_batch_and_not_the_server(
    start: Start, folder: Path
) -> None:
    server = start(folder, patch=fail_for_seed_13)
    asked: Any = dict(prompt="abc", max_tokens=3)
    answer, status, _ = server.ask("POST", "/v1/completions", {**asked, "seed": 13})
    assert status == 500 and answer["error"]["message"] == "the model failed: RuntimeError"
    with pytest.raises(openai.APIError, match="the model failed"):
        list(server.client().completions.create(model="toy", seed=13, stream=True, **asked))
    assert server.ask("POST", "/v1/completions", {**asked, "seed": 14})[1] == 200
    assert "out of luck" in server.output()
    server.end()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_requests_and_then_the_server(
    start: Start, folder: Path, number: signal.Signals, code: int
) -> None:
    server = start(folder, "--max-new-tokens", "2000000", "--name", "mine")
    stream = server.client().completions.create(model="mine", prompt="abc", stream=True, **ENDLESS)
    next(stream)
    os.kill(server.launched.pid, number)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        for _ in stream:
            pass
    ended = server.launched.end(60)
    assert ended.code == code and not ended.err


def test_a_checkpoint_without_a_template_cannot_chat_and_an_open_address_warns(
    start: Start, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "plain"
    plain = train_bpe(["abc de"], 258, folder)
    GPT(GPTConfig(258, 16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(folder, eot=plain.eot)
    server = start(folder, "--host", "0.0.0.0")
    assert "warning: bound to 0.0.0.0" in server.output()
    body = {"messages": [{"role": "user", "content": "abc"}]}
    answer, status, _ = server.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["code"] == "no_chat_template"
    server.end()


def test_a_model_on_characters_without_an_end_token(start: Start, tmp_path: Path) -> None:
    """As nanoGPT trains it: an empty prompt is a new line, and unknown characters are refused."""
    meta = {"vocab_size": 3, "itos": dict(enumerate("\nab")), "stoi": {"\n": 0, "a": 1, "b": 2}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    shape = GPTConfig(3, 16, n_layer=1, n_head=1, n_embd=8, padded_vocab=False)
    GPT(shape).save_pretrained(tmp_path / "model", eot=0)
    words = ("--tokenizer", tmp_path / "meta.pkl", "--max-new-tokens", "8")
    server = start(tmp_path / "model", *words)
    body: dict[str, Any] = {"max_tokens": 3, "temperature": 0}
    texts = []
    for prompt in ("", "\n"):
        answer, status, _ = server.ask("POST", "/v1/completions", {"prompt": prompt, **body})
        assert status == 200, answer
        texts.append(answer["choices"][0]["text"])
    assert texts[0] == texts[1]
    for prompt, message in (("é", "not among the 3 tokens"), ([4], "is not one of 3")):
        answer, status, _ = server.ask("POST", "/v1/completions", {"prompt": prompt, **body})
        assert status == 400 and message in answer["error"]["message"]
    answer, status, _ = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 16})
    assert status == 400 and "must be 1 to 8" in answer["error"]["message"]
    server.end()


def hide_starlette() -> None:
    absent: Any = None
    sys.modules["starlette"] = absent


def test_mistakes_on_the_command_line_are_one_line(run, folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("-m", "tools.serve", folder, "--port", port)
        assert done.returncode == 2 and f"port {port}: Address already in use; give" in done.stderr
    done = run("-m", "tools.serve")
    assert done.returncode == 2 and "no checkpoint is named" in done.stderr
    launched = Launch(tmp_path, ["x"], {}, hide_starlette, "bare", "tools.serve")
    ended = launched.end()
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "pip install '.[serve]'" in ended.err
