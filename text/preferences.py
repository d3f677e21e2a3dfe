"""Pairs of answers to one prompt, the better one in "chosen": the layouts that rows come in.

All layouts become the same three texts: the prompt, the chosen and the rejected answer. For a
conversation each of them is a list of messages as text/chat.py writes it, and "chosen" and
"rejected" begin with the first message in which they differ.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from text.chat import Message, conversation, dumps
from text.encodings import NotUtf8
from text.row import Record, Unreadable

PROMPTS = ("prompt", "question", "instruction")  # usual names of the column
ANSWERS = ("chosen", "rejected")
TURN = "\n\nAssistant:"  # ends the prompt in the files of Anthropic's HH
SAME = Unreadable("is the same as 'chosen'")


def messages_of(value: Any) -> list[Message] | None:
    """The messages of a conversation, or of its JSON text. None for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    found = conversation(value)
    return None if isinstance(found, str) else found


def expand(record: Record) -> Iterator[Record]:
    """The record with the cells "prompt", "chosen" and "rejected", whichever layout it had.

    A cell that does not fit becomes Unreadable. If a cell is missing, the reader says so.
    """
    place, cells = record
    if isinstance(cells, dict) and any(name in cells for name in ANSWERS):
        prompt = next((cells[name] for name in PROMPTS if cells.get(name)), "")
        given = {"prompt": prompt} | {name: cells[name] for name in ANSWERS if name in cells}
        read = {name: _checked(value) for name, value in given.items()}
        cells = {k: dumps(v) if isinstance(v, list) else v for k, v in read.items()}
        cells |= _pair(**read) if len(read) == 3 else {}
    yield place, cells


def _checked(value: Any) -> Any:
    """The messages of a conversation, a text with Unix line ends ("" for a missing value), or the
    value as it is if the reader will refuse it."""
    if isinstance(value, NotUtf8):
        return value
    if value is None or value != value:  # NaN, which pandas writes for a missing value
        return ""
    if isinstance(value, int | float):
        return str(value)
    if (messages := messages_of(value)) is not None:
        return messages
    if isinstance(value, list):
        return Unreadable(str(conversation(value)))
    return value.replace("\r\n", "\n") if isinstance(value, str) else value


def _pair(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """The cells that change when a pair is put into its common layout. See `_checked` for the
    values."""
    readable = all(isinstance(value, str | list) for value in (prompt, chosen, rejected))
    if not (readable and chosen and rejected):  # the reader says what is wrong
        # The prompt may be empty. So that --predict does not read the row without it:
        return {} if isinstance(prompt, str | list) else {"chosen": prompt}
    if isinstance(prompt, list):  # the answers may still be texts
        return _of_conversations(prompt, _answered(chosen), _answered(rejected))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _of_conversations(prompt, chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _of_texts(prompt, chosen, rejected)
    return {"rejected": Unreadable("is not of the kind of 'chosen', a text or a conversation,")}


def _answered(value: list[Message] | str) -> list[Message]:
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else value


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of equal messages or characters at the beginning of both."""
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))
    return sum(1 for _ in equal)


def _of_conversations(
    prompt: str | list[Message], chosen: list[Message], rejected: list[Message]
) -> dict[str, Any]:
    if isinstance(prompt, str):  # a text beside whole conversations repeats what they hold
        alone = bool(prompt) and chosen[0]["role"] == "assistant"
        prompt = [{"role": "user", "content": prompt}] if alone else []
    n = len(prompt)
    first, second = (
        answer if answer[:n] == prompt else prompt + answer for answer in (chosen, rejected)
    )
    shared = _shared(first, second)
    if first == second:
        return {"rejected": SAME}
    rests = {"chosen": first[shared:], "rejected": second[shared:]}
    for name, rest in rests.items():
        if not shared:
            return {
                name: Unreadable("has no message in common with the other answer, and no prompt")
            }
        if not rest or rest[-1]["role"] != "assistant":
            return {name: Unreadable("does not end with an answer by the assistant")}
        if rest[0]["role"] != "assistant":
            return {name: Unreadable("differs from the other before an answer by the assistant")}
    return {"prompt": dumps(first[:shared])} | {name: dumps(rest) for name, rest in rests.items()}


def _of_texts(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """The cells of a pair of texts. Without a prompt they share one: all up to the last
    "Assistant:", or else up to the last space before they differ."""
    if chosen == rejected:
        return {"rejected": SAME}
    if not prompt:
        shared = chosen[: _shared(chosen, rejected)]
        turn = shared.rfind(TURN)
        n = turn + len(TURN) if turn >= 0 else max(map(shared.rfind, (" ", "\n")))
        prompt, chosen, rejected = shared[: max(0, n)], chosen[max(0, n) :], rejected[max(0, n) :]
        if not prompt.strip():
            return {"rejected": Unreadable("begins unlike 'chosen', and there is no prompt")}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.strip():
                return {name: Unreadable("has no answer after what both texts share,")}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
