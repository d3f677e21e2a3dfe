"""The message of another library's error, short enough for the one line that a user gets."""

from __future__ import annotations

MOST = 200  # characters of a message that are kept at most


def reason(error: BaseException, whole: bool = False) -> str:
    """The first line of an error's message, or the error's type if it has none.

    whole: all lines as one, at most MOST characters.
    """
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        return f"no {text}"
    return " ".join(text.split())[:MOST].rstrip(".") if whole else text.splitlines()[0]
