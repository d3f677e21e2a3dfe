"""The description of a preference task, which a file in finetune/ fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tasks.description import Description, EarlierAnswer, Parts
from tasks.generation import chat
from text.chat import END
from text.preferences import messages_of
from text.row import Row


@dataclass(frozen=True)
class Pair:
    """A row as the model sees it: a prompt and two answers to it.

    An EarlierAnswer in an answer is scored, with the token that ends it. Other parts are only read.
    """

    prompt: Parts
    chosen: Parts
    rejected: Parts
    end: str | None = None  # the special token that ends an answer; None: the end-of-text token


def read_pair(row: Row) -> Pair:
    """Texts as they are, or conversations by the template of text/chat.py."""
    given = tuple(row[name] for name in ("prompt", "chosen", "rejected"))
    prompt, *answers = (messages_of(text) for text in given)
    if prompt is None:
        text, chosen, rejected = given
        return Pair((text,), (EarlierAnswer(chosen),), (EarlierAnswer(rejected),))
    # The template begins an answer with the token that ends the prompt, and ends with it once more.
    chosen, rejected = (chat.prompt(messages or [])[1:-1] for messages in answers)
    return Pair(chat.prompt(prompt), chosen, rejected, END)


@dataclass(frozen=True, kw_only=True)
class PreferenceDescription(Description):
    """Describes a task whose rows hold two answers to a prompt, of which the first is better."""

    pair: Callable[[Row], Pair] = read_pair
