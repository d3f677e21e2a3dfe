"""What another library's error says, short enough for the one line that a user gets."""

from __future__ import annotations

MOST = 200  # characters


def reason(error: BaseException, whole: bool = False) -> str:
    """The first line of what `error` says, or its kind where it says nothing. `whole`: all of it,
    in MOST characters."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        return f"no {text}"
    return " ".join(text.split())[:MOST].rstrip(".") if whole else text.splitlines()[0]
