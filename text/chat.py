"""Conversations: how they are read from rows, and the template that writes them as one text.

A turn is the token of its role, the content, and the token that ends a turn. Contents stand between
special tokens, so the ids of a content do not depend on its neighbours. A text that spells such a
token does not become one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from text.encodings import NotUtf8
from text.row import Record, Unreadable

Message = dict[str, str]  # "role" (a key of ROLES) and "content"

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END = "<|end|>"
# The same for transformers. {% generation %} marks what is learned, for its mask of assistants.
TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What other formats call the roles.
NAMES = dict.fromkeys(("user", "human"), "user") | {"system": "system"}
NAMES |= dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant")


def has_template(special: Collection[str]) -> bool:
    """Whether a tokenizer with these special tokens can write conversations by TEMPLATE."""
    return all(token in special for token in (*ROLES.values(), END))


def expand(record: Record) -> Iterator[Record]:
    """The record with each of its cells as the text of a conversation: see `dumps`.

    A cell holds a list of messages, or such a list as JSON. Alpaca's columns become a conversation
    in the column "instruction". A text in the column "system" becomes the first message. A cell
    that holds something else becomes Unreadable.
    """
    place, cells = record
    if isinstance(cells, dict):
        cells = {name: _cell(cells, name) for name in cells}
    yield place, cells


def _cell(cells: dict[str, Any], name: str) -> Any:
    value = cells[name]
    if isinstance(value, NotUtf8):
        return value
    if isinstance(value, str):
        value = _alpaca(cells) if name == "instruction" else _parsed(value)
    found, system = conversation(value), cells.get("system")
    if isinstance(found, str):
        return Unreadable(found)
    if isinstance(system, str) and system.strip() and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": system})
    return dumps(found)


def _alpaca(cells: dict[str, Any]) -> list[dict[str, Any]]:
    asked, more, answer = (cells.get(name) for name in ("instruction", "input", "output"))
    content = "\n\n".join(part for part in (asked, more) if isinstance(part, str) and part.strip())
    answered = [{"role": "assistant", "content": answer}] if answer else []
    return [{"role": "user", "content": content}, *answered]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def conversation(value: Any) -> list[Message] | str:
    """The messages of a list in the form of OpenAI (role, content) or ShareGPT (from, value), or
    what is wrong with it. A system message without content is left out."""
    if not isinstance(value, list) or not value:
        return "has no list of messages"
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            return f"has no object as message {number}"
        name, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        role = NAMES.get(str(name).lower())
        if role is None:
            return f"has the role {str(name)[:40]!r}, which is not system, user or assistant,"
        if isinstance(content, str) and content.strip():
            messages.append({"role": role, "content": content.replace("\r\n", "\n")})
        elif role != "system":
            return f"has no content in message {number}"
    return messages or "has no messages"


def dumps(messages: list[Message]) -> str:
    """Messages as the text of a row's field. Lone surrogates stay, so that readers find them."""
    return json.dumps(messages, ensure_ascii=False)


def loads(text: str) -> list[Message]:
    """The messages of a row's field. A text that is no conversation is a message by the user."""
    found = conversation(_parsed(text))
    return [{"role": "user", "content": text}] if isinstance(found, str) else found
