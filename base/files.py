"""Writes files that survive a crash, and checks output paths before the work starts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from config import UserError

TEMPORARY = ".tmp-"  # prefix of the name of a file or folder that is still being written


def flush(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk.

    A system or a file system that cannot flush folders is no error.
    """
    is_folder = path.is_dir()
    # Windows flushes only what is open for writing, and it opens no folder.
    writing = sys.platform == "win32" and not is_folder
    try:
        descriptor = os.open(path, os.O_RDWR if writing else os.O_RDONLY)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not is_folder:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Generator[Path]:
    """A new folder to write into and then to rename. Afterwards no folder of this name is left.

    A folder that an earlier attempt left under the name is deleted first.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256(path: Path) -> str:
    """sha256 of the whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON. It replaces `path` in one step, as `replace_text` does."""
    replace_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. None if the file is missing or incomplete, because its writer may
    have been killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def replace_text(path: Path, text: str) -> None:
    """Replace `path` in one step. A crash leaves the old file or the new one."""
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def writable_file(
    option: str, where: str, read: Sequence[str | Path] = (), make_folder: bool = False
) -> Path:
    """The path `where` that `option` names, after a check that it can be written.

    The check runs before the work whose result the file will hold, and leaves no file. read: files
    that must not be overwritten. make_folder: the file's folder will be made. Raises UserError if
    the path is a folder, is in `read`, cannot be written, or has no folder and none will be made.
    """
    path = Path(where)
    if not path.name or path.is_dir():
        raise UserError(f"{option} {where} is a folder; name a file in it")
    if path.resolve() in [Path(file).resolve() for file in read]:
        raise UserError(f"{option} {where} is also an input file; name another file")
    folder = path.parent
    if not make_folder and not folder.is_dir():
        raise UserError(f"{option} {where}: there is no folder {folder}; make it, or name another")
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
    """Turn an OSError from writing into the folder that `option` names into a UserError.

    more: the end of the advice in its message.
    """
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
    """The path with another ending, such as the .scores.json of answers in a .csv.

    A suffix that is not one of a set of answers is part of the name and stays.
    """
    known = path.suffix in (".jsonl", ".csv", ".json", ".txt")
    return path.with_name((path.stem if known else path.name) + ending)
