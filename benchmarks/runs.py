"""Run the commands of a benchmark, with time limits and side by side, and read and write its
files."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.files import replace_text, write_json
from config import UserError


def say(text: str) -> None:
    """Report progress on standard error. Standard output is for the results."""
    print(text, file=sys.stderr, flush=True)


def now() -> str:
    """The local time with its offset, as ISO 8601 text."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


# --- files


def make_folders(folder: Path, parts: Sequence[str]) -> None:
    """Create the subfolders `parts`, which git ignores. Raises UserError."""
    try:
        for part in parts:
            (folder / part).mkdir(parents=True, exist_ok=True)
            (folder / part / ".gitignore").write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None


def write_report(file: Path, result: Any, text: str) -> None:
    """Write a JSON file, and a Markdown file beside it for people."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)
    replace_text(file.with_suffix(".md"), text)
