"""SQuAD's layouts to rows: its own files' articles and paragraphs, and the hub's rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from text.row import Record


def expand(record: Record) -> Iterator[Record]:
    """The questions of a row in one of SQuAD's layouts: an article with paragraphs, a paragraph
    with questions (qas), or as the hub has it, a question whose answers are {"text": [...],
    "answer_start": [...]}; other rows with whatever answers they have as texts."""
    place, cells = record
    if not isinstance(cells, dict):
        yield record
    elif isinstance(cells.get("paragraphs"), list):
        for number, paragraph in enumerate(cells["paragraphs"], 1):
            yield from _questions(f"{place} paragraph {number}", paragraph)
    elif isinstance(cells.get("qas"), list):
        yield from _questions(place, cells)
    else:
        yield place, cells | _answers(cells)


def _questions(place: str, paragraph: Any) -> Iterator[Record]:
    try:
        context, questions = paragraph["context"], list(paragraph["qas"])
    except (KeyError, TypeError) as error:
        yield place, _not_squad(error)
        return
    for qa in questions:
        try:
            row = {"id": str(qa.get("id", "")), "context": context, "question": qa["question"]}
            given = {name: qa[name] for name in ("answer", "answers") if qa.get(name)}
            yield place, row | {"answer": "", "answers": ""} | given | _answers(given)
        except (KeyError, TypeError, AttributeError) as error:
            yield place, _not_squad(error)


def _not_squad(error: Exception) -> str:
    return f"is not as SQuAD has them ({type(error).__name__}: {error})"


def _answers(cells: dict[str, Any]) -> dict[str, Any]:
    """The first answer, which is learned, and all of them, where the row has them otherwise than as
    two texts.

    Both are empty for a question without one (SQuAD 2). What cannot be read is left as it is, and
    so the row is named.
    """
    one, several = (_texts(cells.get(name)) for name in ("answer", "answers"))
    if one is None or several is None:
        return {}
    if isinstance(cells.get("answers"), dict | list):
        texts = list(dict.fromkeys(several)) or one
        return {"answer": _first(texts), "answers": "\n".join(texts)}
    if isinstance(cells.get("answer"), dict | list):
        more = {} if several else {"answers": "\n".join(one)}
        return {"answer": _first(one or several)} | more
    return {} if one or not several else {"answer": _first(several[0].split("\n"))}


def _first(texts: list[str]) -> str:
    return next(filter(str.strip, texts), "")


def _texts(value: Any) -> list[str] | None:
    """The texts in any of a list, an object with a "text", and one in the other; None for
    others."""
    if isinstance(value, dict) and "text" in value:
        return _texts(value["text"])
    if isinstance(value, list):
        parts = [_texts(part) for part in value]
        return None if None in parts else [text for part in parts if part for text in part]
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value == value:
        return [str(value)] if str(value).strip() else []
    return [] if value is None or value != value else None
