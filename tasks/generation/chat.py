"""How the messages of a conversation become parts of a row: the template of text/chat.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from config import UserError
from tasks.description import (
    EarlierAnswer,
    Parts,
    PreprocessContext,
    SpecialToken,
    Truncatable,
    Turn,
)
from tasks.generation.description import Example
from text.chat import END, ROLES, Message, loads
from text.row import Row

SYSTEM, ASSISTANT = SpecialToken(ROLES["system"]), SpecialToken(ROLES["assistant"])
USER, TURN_END = Turn(ROLES["user"]), SpecialToken(END)


def prompt(messages: Sequence[Message]) -> Parts:
    """The messages, and the token that begins the assistant's next turn. If they end with a message
    by the user, it may be truncated."""
    parts: list[str] = []
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role == "assistant":
            parts += [ASSISTANT, EarlierAnswer(content)]
        elif role == "system":
            parts += [SYSTEM, content, TURN_END]
        else:
            parts += [USER, Truncatable(content) if number == len(messages) else content, TURN_END]
    return *parts, ASSISTANT


def example(messages: Sequence[Message]) -> Example:
    """The messages up to the assistant's last one, which is the answer."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    return Example(prompt(messages[:last]), (messages[last]["content"],))


def predict_example(messages: Sequence[Message]) -> Example:
    """As `example`, if the assistant has the last word. Otherwise the last message is to be
    answered, and no true answer is known."""
    if messages[-1]["role"] == "assistant":
        return example(messages)
    return Example(prompt(messages), ())


def leave_out_unanswered(
    source: PreprocessContext, rows: list[Row], spec: str, split: str
) -> list[Row]:
    """Leave out conversations without a message by the assistant, except from --predict."""
    if split == "test":
        return rows
    kept, others = [], []
    for row in rows:
        roles = {message["role"] for message in loads(row["messages"])}
        (kept if "assistant" in roles else others).append(row)
    if others:
        text = (
            f"{len(others):,} of {len(rows):,} conversations have no message by the assistant, "
            f"the first in {others[0].where}"
        )
        if source.cfg.strict or not kept:
            raise UserError(f"{spec}: {text}; remove them")
        source.warnings.append(f"{spec}: {text}, and are left out")
    return kept


def fields(row: Row) -> dict[str, Any]:
    """The messages of a row, as the file of answers has them."""
    return {"messages": loads(row["messages"])}
