"""Files that survive a crash: flushed to the disk, replaced in one step, known by their hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from config import UserError

TEMPORARY = ".tmp-"  # begins the name of what is still being written


def flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk. Some file systems flush no folders: that is
    no error."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Generator[Path]:
    """A new folder to write into and then to rename; whatever happens, none of this name is left.

    What an earlier attempt left under the name is deleted first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` in one step, as `replace_text` does."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace `path` in one step; a crash leaves the old file or the new one."""
    beside = path.with_name(TEMPORARY + path.name)
    beside.write_text(text, encoding="utf-8")
    flush(beside)
    os.replace(beside, path)
    flush(path.parent)


def writable_file(
    option: str, where: str, read: Sequence[str | Path] = (), make_folder: bool = False
) -> Path:
    """The file that `option` names, found out before the work whose result it is to hold; nothing
    is left there.

    Raises UserError where it is a folder, is one of the files that are `read`, or cannot be
    written; and where it has no folder, unless that is to be made.
    """
    path = Path(where)
    if not path.name or path.is_dir():
        raise UserError(f"{option} {where} is a folder; name a file in it")
    if path.resolve() in [Path(file).resolve() for file in read]:
        raise UserError(f"{option} {where} is also what is read; name another file")
    folder = path.parent
    if not make_folder and not folder.is_dir():
        raise UserError(f"{option} {where}: there is no folder {folder}")
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        if path.exists():
            path.open("ab").close()
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{option} {where} cannot be written: {error.strerror}; name another file"
        ) from None
    return path


@contextlib.contextmanager
def writing_to(option: str, folder: Path, more: str = "") -> Generator[None]:
    """Turn an OSError of what is written under the folder that `option` names into a UserError,
    whose advice ends with `more`."""
    try:
        yield
    except OSError as error:
        if folder.is_symlink() and not os.path.exists(folder):
            reason = "it is a link to a folder that is not there"
        elif os.path.exists(folder) and not os.path.isdir(folder):
            reason = "it is a file"
        else:
            reason = error.strerror or str(error)
        raise UserError(
            f"cannot write to {option} {folder}: {reason}; name a folder that you can write "
            f"to{more}"
        ) from None


def sibling(path: Path, ending: str) -> Path:
    """The file of the same name with another ending; `path` may be any of the files of a set of
    answers."""
    known = path.suffix in (".jsonl", ".csv", ".json", ".txt")
    return path.with_name((path.stem if known else path.name) + ending)
