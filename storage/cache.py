"""The token cache: folders named by the content they were made from, and what was once measured of
a file."""

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

SAMPLES, SAMPLE_BYTES = 8, 16 << 10  # blocks of a file that are looked at to see whether it changed
INDICES = ("index.json", "gpt2-index.json")  # of what was measured: the first that no one else has
# folders of the cache, under their locks
UNFINISHED = re.compile(r"([0-9a-f]{32}|bpe-[0-9a-f]{24})\.tmp")


def writing_tokens(option: str, folder: Path) -> contextlib.AbstractContextManager[None]:
    """`writing_to` for a folder of tokens."""
    return writing_to(
        option, folder, f", with room for the tokens (two bytes each): {option} FOLDER"
    )


Stamp = list[Any]  # of a file: [size, times of change, number, sha256 of sampled blocks]


def stamp(path: Path) -> Stamp:
    """What changes when a file is changed or replaced, from at most SAMPLES blocks of it. Raises
    UserError."""
    with reading(path):
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, sample(path)]


def sample(path: Path) -> str:
    """sha256 of a file's first and last block and some between; of all of a small one. Raises
    OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        last = max(0, os.fstat(file.fileno()).st_size - SAMPLE_BYTES)
        n = min(SAMPLES, -(-last // SAMPLE_BYTES) + 1)
        for block in range(n):
            file.seek(last * block // max(1, n - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def changed_while_read(path: Path | str) -> UserError:
    return UserError(
        f"{path} changed while it was read; type the same command again when nothing writes to it"
    )


def measured(path: Path, measure: Callable[[Path], Any]) -> tuple[Stamp, Any]:
    """The stamp of a file and `measure` of it. Raises UserError where it changes over and over."""
    for _ in range(2):
        before = stamp(path)
        with reading(path):
            value = measure(path)
        if stamp(path) == before:
            return before, value
    raise changed_while_read(path)


class Cache:
    """Folders named by the content they were made from, and what was once measured of a file."""

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root.expanduser()))
        self._measured: dict[str, Any] = {}  # by this process, whether or not it could be written

    def prepare(self) -> None:
        """Make the cache's folder, so that what is measured is kept. Another user's may hold all
        that is needed."""
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)

    def get_or_make(
        self, key: str, make: Callable[[Path], None], say: Callable[[str], None]
    ) -> Path:
        """The folder of `key`, which `make` fills if no process has done so before.

        It is made beside its place and renamed, so that nothing unfinished is ever seen; of several
        processes one makes it and the others wait. A killed maker's lock falls with it. Raises
        UserError where it cannot be written.
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
        """alone: nobody else makes this folder now. Elsewise the first to finish wins."""
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
        return writing_tokens("--cache", self.root)

    def _sweep(self) -> None:
        """Remove what killed processes left unfinished, under any key; no folder of another
        name."""
        for leftover in filter(Path.is_dir, self.root.glob("*.tmp")):
            if not UNFINISHED.fullmatch(leftover.name):
                continue
            with (
                contextlib.suppress(OSError),  # in use, or another user's
                (self.root / f"{leftover.stem}.lock").open("a", encoding="utf-8") as file,
            ):
                if lock(file.fileno()):
                    shutil.rmtree(leftover, ignore_errors=True)

    def measure_once(
        self, what: str, paths: Sequence[Path], measure: Callable[[Path], Any]
    ) -> list[Any]:
        """`measure` of each file, kept for as long as its stamp stays the same.

        Where the folder is not there or cannot be written, each start measures again.
        """
        index = self._index() | self._measured
        known, fresh = [], {}
        for path in paths:
            key = f"{what} {path.absolute()}"
            entry = index.get(key)
            # An entry of before there were stamps, [size, time of change, value], is no proof.
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
        """The index, there or to be made; None where both names are of files that others wrote."""
        files = (self.root / name for name in INDICES)
        return next((file for file in files if not os.path.lexists(file) or _entries(file)), None)

    def _index(self) -> dict[str, Any]:
        file = self._index_file()
        return _entries(file) if file else {}


def _entries(file: Path) -> dict[str, Any]:
    """What an index holds; empty for a file that is not there, or not from here."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if isinstance(index, dict) and all(_is_entry(key, value) for key, value in index.items()):
        return index
    return {}


def _is_entry(key: str, value: Any) -> bool:
    """Whether this was written here: `WHAT PATH`, and a stamp with a value or the older list of
    three."""
    of_now = isinstance(value, dict) and value.keys() == {"stamp", "value"}
    return " " in key and (of_now or (isinstance(value, list) and len(value) == 3))


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
