"""The bodies of OpenAI's completions and chat completions: what a request asks for, and the form of
its answer."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from config import UserError, without_surrogates
from decoding.continuous import Choice, Progress, Sampling, Text
from decoding.loading import check_known, opening
from decoding.window import kept_tokens
from model import GPT
from tasks.generation import chat
from tasks.generation.sequences import SequenceEncoder
from text.chat import END, conversation, has_template
from text.tokenizer import Tokenizer

Body = dict[str, Any]
MOST_STOPS = 4
MOST_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
# Fields of every request. Those in PASSIVE change no text and are accepted whatever they hold.
COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream")
COMMON += ("stream_options", "presence_penalty", "frequency_penalty", "logprobs")
FIELDS = {
    False: (*COMMON, "prompt", "echo"),
    True: (*COMMON, "messages", "max_completion_tokens", "top_logprobs"),
}
PASSIVE = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Fields that are not supported, with the values that ask for nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class Refused(Exception):
    """A request that is answered by OpenAI's object for errors, with an HTTP status."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> Body:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = dict(message=str(self), type=kind, param=self.param, code=self.code)
        return {"error": error}


@dataclass
class Ask:
    """What a request asks for. The choice with index i is `texts[i]`."""

    chat: bool
    texts: list[Text]
    echoed: list[str]  # what stands before each text in the answer
    prompt_tokens: int
    stream: bool
    with_usage: bool
    warnings: list[str] = field(default_factory=list)


class Fields:
    """Reads the fields of a body. Each method raises Refused for a value that it does not take.
    null is as good as a field that is left out."""

    def __init__(self, body: Body, chat: bool):
        self.body = {name: value for name, value in body.items() if value is not None}
        for name, value in self.body.items():
            if name in INERT:
                if value not in INERT[name]:
                    raise Refused(f"{name} is not supported here; leave it out", name)
            elif name not in FIELDS[chat] and name not in PASSIVE:
                raise Refused(f"there is no parameter {shown(name)} here", name[:100])

    def number(self, name: str, default: Any, least: float, most: float) -> Any:
        """An int if the default is one or None, else a float."""
        value, whole = self.body.get(name, default), not isinstance(default, float)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            kind = "a whole number" if whole else "a number"
            raise Refused(f"{name} is {shown(value)}; it must be {kind}", name)
        if not least <= value <= most:  # NaN is not
            raise Refused(f"{name} is {shown(value)}; it must be {least} to {most}", name)
        return value if whole else float(value)

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.body.get(name, False)
        if not isinstance(value, bool):
            raise Refused(f"{name} is {shown(value)}; it must be true or false", name)
        return value

    def stops(self) -> list[str]:
        """The stop strings."""
        value = self.body.get("stop", [])
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise Refused("stop must be a text or a list of texts, none of them empty", "stop")
        if len(stops) > MOST_STOPS:
            raise Refused(f"stop has {len(stops)} texts; give {MOST_STOPS} at most", "stop")
        return [without_surrogates(stop) for stop in stops]

    def with_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        options = self.body.get("stream_options", {})
        if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
            raise Refused("stream_options may hold include_usage alone", "stream_options")
        value = options.get("include_usage", False)
        if not isinstance(value, bool):
            raise Refused("stream_options.include_usage must be true or false", "stream_options")
        return value


def shown(value: Any) -> str:
    """A value of a body for a message, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class RequestReader:
    """Turns bodies into asks for one model.

    `name` is the model's id, `max_new_tokens` the most that a request may ask for, and `rows` the
    most texts that a request may have.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, name: str, max_new_tokens: int, rows: int):
        self.context, self.vocab_size = model.context, model.config.vocab_size
        self.tokenizer, self.name = tokenizer, name
        self.max_new_tokens, self.rows = max_new_tokens, rows
        self.can_chat = has_template(tokenizer.special_ids)

    def read(self, raw: bytes, is_chat: bool) -> Ask:
        """What a body asks for. Raises Refused."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise Refused(f"the body is not JSON: {error}") from None
        if not isinstance(body, dict):
            raise Refused("the body must be a JSON object")
        fields = Fields(body, is_chat)
        model = fields.body.get("model", self.name)
        if model != self.name:
            raise Refused(
                f"there is no model {shown(model)} here, only {self.name}",
                "model",
                "model_not_found",
                404,
            )
        return self._chat(fields) if is_chat else self._completion(fields)

    def _completion(self, fields: Fields) -> Ask:
        given = _prompts(fields.body.get("prompt", ""))
        self._choices(fields, len(given))  # before encoding, which takes seconds for 1 MiB of texts
        prompts = [self._encoded(prompt) for prompt in given]
        for prompt in prompts:
            if len(prompt) > self.context:
                raise Refused(
                    f"a prompt has {len(prompt)} tokens and the model's context only "
                    f"{self.context}; shorten it",
                    "prompt",
                    "context_length_exceeded",
                )
        usual = min(COMPLETION_TOKENS, self.max_new_tokens)
        most = fields.number("max_tokens", usual, 1, self.max_new_tokens)
        alternatives = fields.number("logprobs", None, 0, 5)
        echo = fields.flag("echo")
        if echo and alternatives is not None:
            raise Refused("echo with logprobs is not supported here; leave one out", "echo")
        ask = self._ask(fields, prompts, most, alternatives)
        if echo:
            n = len(ask.texts) // len(prompts)
            ask.echoed = [self._spelled(prompt) for prompt in prompts for _ in range(n)]
        return ask

    def _chat(self, fields: Fields) -> Ask:
        if not self.can_chat:
            raise Refused(
                f"{self.name} has no chat template; train it on conversations with finetune.chat, "
                "or use /v1/completions",
                code="no_chat_template",
            )
        messages = conversation(_plain_messages(fields.body.get("messages")))
        if isinstance(messages, str):
            raise Refused(f"the request {messages.rstrip(',')}", "messages")
        for message in messages:
            message["content"] = without_surrogates(message["content"])
        encoder = SequenceEncoder(self.tokenizer, self.context, False, END)
        prompt = encoder.fit(chat.prompt(messages), kept_tokens(self.context))
        if len(prompt.ids) > self.context:
            raise Refused(
                f"the messages have {len(prompt.ids)} tokens and the model's context only "
                f"{self.context}; shorten them",
                "messages",
                "context_length_exceeded",
            )
        name = "max_completion_tokens" if "max_completion_tokens" in fields.body else "max_tokens"
        most = fields.number(name, self.max_new_tokens, 1, self.max_new_tokens)
        alternatives = fields.number("top_logprobs", 0, 0, 20)
        if not fields.flag("logprobs"):
            if alternatives:
                raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
            alternatives = None
        ask = self._ask(fields, [prompt.ids], most, alternatives, encoder.end)
        if "shortened" in prompt.lost:
            ask.warnings.append("the context is full: the oldest turns were left out")
        if "truncated" in prompt.lost:
            ask.warnings.append("the context is full: the end of the last message was not read")
        return ask

    def _ask(
        self,
        fields: Fields,
        prompts: list[list[int]],
        most: int,
        alternatives: int | None,
        chat_end: int | None = None,
    ) -> Ask:
        n = self._choices(fields, len(prompts))
        sampling = Sampling(
            fields.number("temperature", 1.0, 0, 2),
            fields.number("top_k", 0, 0, 2**31 - 1),
            fields.number("top_p", 1.0, 0, 1),
        )
        if sampling.top_p == 0:  # the fewest tokens with a probability of 0 are one
            sampling = Sampling(temperature=0.0)
        seed = fields.number("seed", None, -(2**63), 2**63 - 1)
        shared: dict[str, Any] = dict(
            max_new_tokens=most,
            end=self.tokenizer.eot if chat_end is None else chat_end,
            sampling=sampling,
            seed=secrets.randbits(63) if seed is None else seed,
            stops=fields.stops(),
            presence=fields.number("presence_penalty", 0.0, -2, 2),
            frequency=fields.number("frequency_penalty", 0.0, -2, 2),
            alternatives=alternatives,
        )
        repeated = [prompt for prompt in prompts for _ in range(n)]
        return Ask(
            chat_end is not None,
            [Text(prompt, name=str(i), **shared) for i, prompt in enumerate(repeated)],
            [""] * len(repeated),
            sum(map(len, prompts)),
            fields.flag("stream"),
            fields.with_usage(),
        )

    def _choices(self, fields: Fields, prompts: int) -> int:
        """The number of choices of each prompt."""
        n = fields.number("n", 1, 1, MOST_CHOICES)
        if n * prompts > self.rows:
            raise Refused(
                f"{n * prompts} texts are too many for one request; ask for {self.rows} at most",
                "n",
            )
        return n

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt) or opening(self.tokenizer, self.vocab_size)
            try:
                check_known(self.tokenizer, self.vocab_size, ids, "the prompt")
            except UserError as error:
                raise Refused(str(error), "prompt") from None
            return ids
        size = min(self.tokenizer.vocab_size, self.vocab_size)
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int):
                raise Refused(f"{shown(token)} in prompt is no token id", "prompt")
            if not 0 <= token < size:
                raise Refused(
                    f"the token id {shown(token)} in prompt is not one of {size:,}", "prompt"
                )
        return prompt

    def _spelled(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.tokenizer.token_bytes, ids)).decode(errors="replace")


def _prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a completion: a text, texts, token ids, or lists of these."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item for item in value):
            return value
        if not any(isinstance(item, str | list) for item in value):
            return [value]
    raise Refused(
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; none "
        "may be empty but a text",
        "prompt",
    )


def _plain_messages(value: Any) -> Any:
    """The messages with contents that are lists of texts joined, and developer as system."""
    if not isinstance(value, list):
        return None
    plain = []
    for message in value:
        if isinstance(message, dict):
            message = dict(message)
            if message.get("role") == "developer":
                message["role"] = "system"
            parts = message.get("content")
            if isinstance(parts, list):
                message["content"] = "".join(map(_text_of_part, parts))
        plain.append(message)
    return plain


def _text_of_part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise Refused("a message's content may hold parts of type text alone", "messages")
    return text


@dataclass
class Collected:
    """One choice of an answer so far."""

    text: str = ""
    given: int = 0  # tokens whose probabilities were given out
    choices: list[tuple[int, Choice]] = field(default_factory=list)  # by first character
    ended: str | None = None

    def take(self, progress: Progress) -> list[tuple[int, Choice]]:
        """Add what a step made. Returns the tokens whose text is in the answer by now and was not
        before."""
        self.text += progress.piece
        self.ended = progress.ended
        if progress.choice:
            self.choices.append((progress.start, progress.choice))
        whole = self.ended and not progress.text.pieces.stopped
        new = self.choices[self.given :]
        new = [pair for pair in new if whole or pair[0] < len(self.text)]
        self.given += len(new)
        return new


class Answer:
    """The answer to an ask, whole or in pieces."""

    def __init__(self, ask: Ask, name: str, tokenizer: Tokenizer):
        self.ask, self.tokenizer = ask, tokenizer
        self.collected = {text: Collected() for text in ask.texts}
        self.index = {text: i for i, text in enumerate(ask.texts)}
        kind = "chat.completion" if ask.chat else "text_completion"
        if ask.chat and ask.stream:
            kind += ".chunk"
        self.head: Body = {
            "id": ("chatcmpl-" if ask.chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }

    @property
    def complete(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.ended for choice in self.collected.values())

    def add(self, progress: Progress) -> list[tuple[int, Choice]]:
        """Add what a step made: see `Collected.take`."""
        return self.collected[progress.text].take(progress)

    def whole(self) -> Body:
        """The answer's body."""
        choices = []
        for i, (text, found) in enumerate(self.collected.items()):
            logprobs = self._logprobs(text, found.choices[: found.given])
            shared = {"index": i, "logprobs": logprobs, "finish_reason": found.ended}
            if self.ask.chat:
                message = {"role": "assistant", "content": found.text, "refusal": None}
                choices.append({"message": message, **shared})
            else:
                choices.append({"text": self.ask.echoed[i] + found.text, **shared})
        return {**self.head, "choices": choices, "usage": self.usage(), **self._warnings()}

    def first_chunks(self) -> list[Body]:
        """What a stream begins with: the assistant's role, or the prompts that are echoed."""
        if self.ask.chat:
            role = {"role": "assistant", "content": ""}
            return [self._chunk(i, role, None, None) for i in range(len(self.ask.texts))]
        return [self._chunk(i, text, None, None) for i, text in enumerate(self.ask.echoed) if text]

    def chunk(self, progress: Progress) -> Body | None:
        """What a stream gets of a step; None if there is nothing to say yet."""
        new = self.add(progress)
        if not progress.piece and not new and not progress.ended:
            return None
        text: Any = progress.piece
        if self.ask.chat:
            text = {"content": text} if text else {}
        logprobs = self._logprobs(progress.text, new)
        return self._chunk(self.index[progress.text], text, logprobs, progress.ended)

    def last_chunks(self) -> list[Body]:
        """What a stream ends with: the counts of tokens, if they are asked for."""
        if not self.ask.with_usage:
            return []
        return [{**self.head, "choices": [], "usage": self.usage(), **self._warnings()}]

    def usage(self) -> Body:
        """Counts of tokens."""
        made = sum(text.made for text in self.ask.texts)
        prompt = self.ask.prompt_tokens
        return dict(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)

    def _warnings(self) -> Body:
        return {"warnings": self.ask.warnings} if self.ask.warnings else {}

    def _chunk(self, index: int, text: Any, logprobs: Body | None, ended: str | None) -> Body:
        choice = {"index": index, "delta" if self.ask.chat else "text": text}
        choice |= {"logprobs": logprobs, "finish_reason": ended}
        usage = {"usage": None} if self.ask.with_usage else {}
        warnings = self._warnings() if ended else {}
        return {**self.head, "choices": [choice], **usage, **warnings}

    def _logprobs(self, text: Text, choices: Collection[tuple[int, Choice]]) -> Body | None:
        if text.alternatives is None:
            return None
        if self.ask.chat:
            content = [
                {
                    **self._spelled(choice.token, choice.logprob),
                    "top_logprobs": [self._spelled(*pair) for pair in choice.likeliest],
                }
                for _, choice in choices
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._name(choice.token) for _, choice in choices],
            "token_logprobs": [choice.logprob for _, choice in choices],
            "top_logprobs": [
                {self._name(token): logprob for token, logprob in choice.likeliest}
                for _, choice in choices
            ],
            "text_offset": [start for start, _ in choices],
        }

    def _spelled(self, token: int, logprob: float) -> Body:
        raw = self.tokenizer.token_bytes(token)
        return {"token": self._name(token), "logprob": logprob, "bytes": list(raw)}

    def _name(self, token: int) -> str:
        """A token as text. One that is no whole character is written as OpenAI does."""
        raw = self.tokenizer.token_bytes(token)
        if not raw:  # a special token
            names = {id: name for name, id in self.tokenizer.special_ids.items()}
            return names.get(token, "")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
