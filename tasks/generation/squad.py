"""Reads SQuAD's layouts: the nested articles and paragraphs of its own files, and the hub's flat
rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from text.row import Record


def expand(record: Record) -> Iterator[Record]:
    """The questions in a record of one of SQuAD's layouts.

    A record is an article with "paragraphs", a paragraph with "qas" (questions), or the hub's
    single question with answers {"text": [...], "answer_start": [...]}. Other records are kept, and
    their answers become texts.
    """
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
    return f"is not in SQuAD's layout ({type(error).__name__}: {error})"


def _answers(cells: dict[str, Any]) -> dict[str, Any]:
    """New cells "answer" (the first answer, which is learned) and "answers" (all, one a line) for a
    record that has them in another form than two texts.

    Both are empty for a question without an answer (SQuAD 2). Cells that cannot be read are not
    replaced, so that the reader reports the row.
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
    """The texts in a list or in an object with a "text", at any depth. None for other values."""
    if isinstance(value, dict) and "text" in value:
        return _texts(value["text"])
    if isinstance(value, list):
        parts = [_texts(part) for part in value]
        return None if None in parts else [text for part in parts if part for text in part]
    if isinstance(value, str | int | float) and not isinstance(value, bool) and value == value:
        return [str(value)] if str(value).strip() else []
    return [] if value is None or value != value else None
