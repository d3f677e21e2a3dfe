"""Files that survive a crash: flushed to the disk, replaced in one step, known by their hash."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"  # begins the name of what is still being written


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step; a crash leaves the old file or the new one."""
    beside = path.with_name(TEMPORARY + path.name)
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    flush(beside)
    os.replace(beside, path)
    flush(path.parent)
