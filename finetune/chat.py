"""Chat: a conversation is a system message, then turns by the user and the assistant, each between
special tokens. Only what the assistant says is learned.

python -m finetune.chat --init gpt2 --data conversations.jsonl
python generate.py runs/chat --chat
Rows have messages (role, content), conversations as ShareGPT has them (from, value), or Alpaca's
columns instruction, input and output.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from base.cli import entry_point
from config import CountOrNone
from finetune import generate
from tasks import metrics
from tasks.generation import chat
from tasks.generation.description import Answer, Example, GenerationDescription, write_jsonl
from tasks.generation.options import GenerationConfig
from text.chat import END, dumps, expand, loads
from text.row import Row


@dataclass(frozen=True)
class ChatConfig(GenerationConfig):
    """Options of the chat task."""

    messages_column: str | None = None
    """Column of the conversation. Default: messages, conversations, conversation or instruction."""
    eval_rows: CountOrNone = 0
    """Number of validation conversations whose last answer is decoded and scored in an evaluation.
    The validation loss always uses all turns of all conversations."""


def example(row: Row, cfg: ChatConfig) -> Example:
    """The last answer is the answer, and what is before it the prompt, with earlier answers."""
    return chat.example(loads(row["messages"]))


def predict_example(row: Row, cfg: ChatConfig) -> Example:
    """The last message by the user is answered."""
    return chat.predict_example(loads(row["messages"]))


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    """Exact match and F1 of words, as for questions."""
    return metrics.squad([a.text for a in answers], [[a.reference] for a in answers])


def toy_row(*contents: str) -> dict[str, str]:
    """A system message, then messages by the user and the assistant in turn."""
    roles = ["system", *("user", "assistant") * (len(contents) // 2)]
    pairs = zip(roles, contents, strict=True)
    return {"messages": dumps([{"role": role, "content": text} for role, text in pairs])}


TASK = GenerationDescription(
    name="chat",
    config=ChatConfig,
    columns={"messages": ("messages", "conversations", "conversation", "instruction")},
    expand=expand,
    preprocess=chat.leave_out_unanswered,
    example=example,
    predict_example=predict_example,
    end=END,
    scores=scores,
    write=functools.partial(write_jsonl, fields=chat.fields),
    toy=(
        toy_row("Answer in a word.", "Capital of France?", "Paris.", "And of Italy?", "Rome."),
        toy_row("Be polite.", "Hello!", "Good day to you.", "Who are you?", "A small model."),
        toy_row("Answer in a word.", "What is 2 + 3?", "Five."),
    ),
)

if __name__ == "__main__":
    entry_point(lambda: generate(TASK))
