"""SQuAD's layouts to rows: its own files' articles and paragraphs, and the hub's rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from text.readers import Record


def expand(record: Record) -> Iterator[Record]:
    """The questions of a row in one of SQuAD's layouts: an article with paragraphs, a paragraph
    with questions (qas), or as the hub has it, a question whose answers are {"text": [...],
    "answer_start": [...]}; other rows as they are."""
    place, cells = record
    if not isinstance(cells, dict):
        yield record
    elif isinstance(cells.get("paragraphs"), list):
        for number, paragraph in enumerate(cells["paragraphs"], 1):
            yield from _questions(f"{place} paragraph {number}", paragraph)
    elif isinstance(cells.get("qas"), list):
        yield from _questions(place, cells)
    else:
        answers = cells.get("answers")
        yield place, cells | _answers(answers) if isinstance(answers, dict | list) else cells


def _questions(place: str, paragraph: Any) -> Iterator[Record]:
    try:
        context, questions = paragraph["context"], list(paragraph["qas"])
    except (KeyError, TypeError) as error:
        yield place, _not_squad(error)
        return
    for qa in questions:
        try:
            row = {"id": str(qa.get("id", "")), "context": context, "question": qa["question"]}
            yield place, row | _answers(qa.get("answers") or [])
        except (KeyError, TypeError, AttributeError) as error:
            yield place, _not_squad(error)


def _not_squad(error: Exception) -> str:
    return f"is not as SQuAD has them ({type(error).__name__}: {error})"


def _answers(found: dict[str, Any] | list[Any]) -> dict[str, Any]:
    """The first answer, which is learned, and all of them; both empty for a question without one
    (SQuAD 2)."""
    texts = found.get("text") if isinstance(found, dict) else [_text(answer) for answer in found]
    texts = [texts] if isinstance(texts, str) else texts or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return {}
    texts = list(dict.fromkeys(texts))
    return {"answer": texts[0] if texts else "", "answers": "\n".join(texts)}


def _text(answer: Any) -> Any:
    return answer.get("text") if isinstance(answer, dict) else answer
