"""The token cache: folders named by the content they were made from, and measurements of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from base.files import flush, temporary_folder, write_json, writing_to
from base.locks import lock, locked
from config import UserError
from storage.shards import reading

SAMPLES, SAMPLE_BYTES = 8, 16 << 10  # number and size of the blocks that show a file's change
# Names of the file with the measurements. The first one is used that is free or was written here.
INDICES = ("index.json", "gpt2-index.json")
# Names of the temporary folders in which the cache's folders are made.
UNFINISHED = re.compile(r"([0-9a-f]{32}|bpe-[0-9a-f]{24})\.tmp")


def writing_tokens(option: str, folder: Path) -> contextlib.AbstractContextManager[None]:
    """`writing_to` for a folder of tokens, with advice on the room that it needs."""
    return writing_to(
        option, folder, f", with room for the tokens (two bytes each): {option} FOLDER"
    )


Stamp = list[Any]  # [size, mtime, ctime, inode number, sha256 of sampled blocks] of a file


def stamp(path: Path) -> Stamp:
    """A value that differs when a file is changed or replaced. It reads at most SAMPLES blocks.

    Raises UserError if the file cannot be read.
    """
    with reading(path):
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sample(path)]


def sample(path: Path) -> str:
    """sha256 of a file's first and last blocks and some between, or of all of a small file.

    Raises OSError if the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES)
        n = min(SAMPLES, -(-last // SAMPLE_BYTES) + 1)
        for block in range(n):
            file.seek(last * block // max(1, n - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def changed_while_read(path: Path | str) -> UserError:
    """The error for a file that another program wrote to during reading."""
    return UserError(
        f"{path} changed while it was read; run the same command again when nothing writes to it"
    )


def measured(path: Path, measure: Callable[[Path], Any]) -> tuple[Stamp, Any]:
    """A file's stamp and the result of `measure(path)`. Raises UserError if it keeps changing."""
    for _ in range(2):
        before = stamp(path)
        with reading(path):
            value = measure(path)
        if stamp(path) == before:
            return before, value
    raise changed_while_read(path)


class Cache:
    """Folders named by the content they were made from, and measurements of files."""

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root.expanduser()))
        self._measured: dict[str, Any] = {}  # by this process, also what could not be written

    def prepare(self) -> None:
        """Make the cache's folder, so that measurements are kept.

        An error is ignored: a folder of another user may already hold all that is needed.
        """
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)

    def get_or_make(
        self, key: str, make: Callable[[Path], None], say: Callable[[str], None]
    ) -> Path:
        """The folder of `key`. `make(folder)` fills it if no process has done so before.

        It is made under a temporary name and then renamed, so that no process sees an unfinished
        one. One process makes it and the others wait. The system frees the lock of a process that
        is killed. Raises UserError if the folder cannot be written.
        """
        folder = self.root / key
        if os.path.isdir(folder):
            return folder
        with contextlib.ExitStack() as held:
            with self.writing():
                self.root.mkdir(parents=True, exist_ok=True)
                waiting = f"waiting for another process that is preparing {folder}"
                alone = held.enter_context(locked(self.root / f"{key}.lock", lambda: say(waiting)))
            if not os.path.isdir(folder):
                self._make(folder, make, alone)
        return folder

    def _make(self, folder: Path, make: Callable[[Path], None], alone: bool) -> None:
        """Make a folder and rename it.

        alone: this process holds the lock. On a file system without locks several processes may
        make the folder, and the first one to finish wins.
        """
        name = folder.name if alone else f"{folder.name}.{platform.node()}-{os.getpid()}"
        with contextlib.ExitStack() as held:
            with self.writing():
                if alone:
                    self._sweep()
                new = held.enter_context(temporary_folder(self.root / f"{name}.tmp"))
            make(new)
            with self.writing():
                flush(new)
                try:
                    new.replace(folder)
                except OSError:
                    if alone or not os.path.isdir(folder):
                        raise
                flush(self.root)

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """Turn an OSError of writing to the cache into a UserError."""
        return writing_tokens("--cache", self.root)

    def _sweep(self) -> None:
        """Remove the unfinished folders of killed processes, and no folder with another name."""
        for leftover in filter(Path.is_dir, self.root.glob("*.tmp")):
            if not UNFINISHED.fullmatch(leftover.name):
                continue
            with (
                contextlib.suppress(OSError),  # it is in use or belongs to another user
                (self.root / f"{leftover.stem}.lock").open("a", encoding="utf-8") as file,
            ):
                if lock(file.fileno()):
                    shutil.rmtree(leftover, ignore_errors=True)

    def measure_once(
        self, what: str, paths: Sequence[Path], measure: Callable[[Path], Any]
    ) -> list[Any]:
        """The result of `measure(path)` for each file. It is kept until the file's stamp changes.

        what: the name of the measurement. If the cache's folder does not exist or cannot be
        written, each process measures again.
        """
        index = self._index() | self._measured
        known, fresh = [], {}
        for path in paths:
            key = f"{what} {path.absolute()}"
            entry = index.get(key)
            # Older versions wrote no stamps but [size, mtime, value], which does not prove enough.
            if not isinstance(entry, dict) or entry.get("stamp") != stamp(path):
                now, value = measured(path, measure)
                entry = fresh[key] = {"stamp": now, "value": value}
            known.append(entry["value"])
        self._measured |= fresh
        if fresh and os.path.isdir(self.root):
            with contextlib.suppress(OSError), locked(self.root / "index.lock"):
                if file := self._index_file():
                    write_json(file, self._index() | fresh)
        return known

    def _index_file(self) -> Path | None:
        """The file with the measurements, which may not exist yet.

        None if other programs have written files under both names.
        """
        files = (self.root / name for name in INDICES)
        return next((file for file in files if not os.path.lexists(file) or _entries(file)), None)

    def _index(self) -> dict[str, Any]:
        file = self._index_file()
        return _entries(file) if file else {}


def _entries(file: Path) -> dict[str, Any]:
    """The content of a measurements file; empty if there is none or another program wrote it."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if isinstance(index, dict) and all(_is_entry(key, value) for key, value in index.items()):
        return index
    return {}


def _is_entry(key: str, value: Any) -> bool:
    """Whether the cache wrote this entry: `WHAT PATH`, with a stamp and a value.

    The older form, a list of three, counts too.
    """
    is_current = isinstance(value, dict) and value.keys() == {"stamp", "value"}
    return " " in key and (is_current or (isinstance(value, list) and len(value) == 3))


def digest(*parts: Any) -> str:
    """sha256, in hex, of some JSON values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
