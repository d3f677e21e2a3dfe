"""Which text files a word of the command line names: files, folders, globs, `stdlib`, or a dataset
on the hub."""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from base.files import sha256
from base.sources import specs_of
from config import UserError
from text import encodings
from text.readers import ROW_SUFFIXES

KINDS = (".txt", ".py", *ROW_SUFFIXES)  # suffixes of files that can be read
# Suffixes of the files that are picked from a folder.
TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without .gz: `.jsonl` for both a.jsonl and a.jsonl.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


# Names that systems and editors give to their own files: .ipynb_checkpoints, ._a.txt, #a.txt#,
# a.txt~.
_HIDDEN = re.compile(
    r"\..*|~\$.*|.*~|#.*#|__MACOSX|\$RECYCLE\.BIN|System Volume Information|lost\+found"
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped unless the user names it."""
    return bool(_HIDDEN.fullmatch(name))


def named_files(spec: str, suffixes: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    """Each item of a comma-separated `spec`, with the files that it names.

    An item is a file, a glob or a folder. A folder names all files in and below it that have one of
    the suffixes. Hidden files and folders are skipped unless the item names them. Raises UserError
    for a folder that cannot be listed, and for a broken link.
    """
    for item in _items(spec):
        path = os.path.expanduser(item)
        if os.path.isdir(path):
            files = sorted(p for p in _walk(path) if suffix_of(p) in suffixes)
        else:
            files = [Path(path)] if os.path.isfile(path) else sorted(_glob(path))
        for file in files:
            if file.is_symlink() and not os.path.exists(file):
                raise UserError(
                    f"{file} is a link to a file that is not there; repair or remove the link"
                )
        yield item, [file for file in files if os.path.isfile(file)]


def _items(spec: str) -> list[str]:
    """The comma-separated items of `spec`. A path that exists is one item, even with commas."""
    whole = os.path.exists(os.path.expanduser(spec))
    return [spec] if whole else list(filter(None, map(str.strip, spec.split(","))))


def _walk(folder: str, pattern: Sequence[str] = ()) -> Iterator[Path]:
    """All files in and below a folder. Links are followed, and each folder is visited once.

    Hidden names are skipped unless a hidden part of the `pattern` matches them.
    """
    top, seen = os.path.realpath(folder), set[str]()
    waiting, links = [folder], list[str]()
    while waiting or links:
        # links come last, so that a folder is found under its own name rather than a link's
        current = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(current)
        if real in seen or _is_below(top, real):
            continue  # a link to a folder that was visited, or to one above
        seen.add(real)
        try:
            names = sorted(os.listdir(current), reverse=True)
        except OSError as error:
            raise UserError(
                f"{current} cannot be listed: {error.strerror}; name its files, or leave it out"
            ) from None
        for path in (os.path.join(current, name) for name in names if _is_included(name, pattern)):
            if os.path.isdir(path):
                (links if os.path.islink(path) else waiting).append(path)
            else:
                yield Path(path)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def _is_included(name: str, pattern: Sequence[str]) -> bool:
    named = any(fnmatch.fnmatchcase(name, part) for part in pattern if is_hidden(part))
    return named or not is_hidden(name)


def _glob(pattern: str) -> Iterator[Path]:
    """The files that match a glob. `**` is expanded here because glob's own follows link cycles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        for path in map(Path, glob.iglob(pattern)):
            if all(_is_included(part, parts) for part in path.parts):
                yield path
        return
    head, tail = parts[: parts.index("**")], parts[parts.index("**") :]
    for folder in _glob(str(Path(*head))) if head else [Path()]:
        if folder.is_dir():
            below = _walk(str(folder), tail)
            yield from (path for path in below if _matches(path.relative_to(folder).parts, tail))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(parts)
        return any(_matches(parts[skipped:], pattern[1:]) for skipped in range(len(parts) + 1))
    return (
        bool(parts)
        and fnmatch.fnmatchcase(parts[0], pattern[0])
        and _matches(parts[1:], pattern[1:])
    )


def unknown_kind(path: Path, known: Sequence[str]) -> str:
    """The error for a file whose suffix is not one of `known`, and what to type."""
    if encodings.is_gzip(path):
        return (
            f"{path} is gzip, and its name does not say what is in it; rename it, for example to "
            f"{path.name.removesuffix('.gz')}{known[0]}.gz"
        )
    with contextlib.suppress(OSError), path.open("rb") as file:
        if kind := encodings.other_kind(file.read(encodings.HEAD)):
            return f"{path} is {kind}"
    return (
        f"{path} has none of the suffixes {' '.join(known)} (or these with .gz); convert or rename "
        "it"
    )


def file_id(path: Path) -> object:
    """A value that is equal for two names of one file: links, hard links, spellings of its path."""
    stat = path.stat()
    linked = stat.st_nlink > 1 and stat.st_ino  # some file systems have no inode numbers
    return (stat.st_dev, stat.st_ino) if linked else os.path.realpath(path)


def words_in_name(name: str) -> list[str]:
    """The words in a file's name, in lower case: fineweb and val in fineweb_val_000000.bin.

    medieval.npy has the one word medieval, and so does not count as validation.
    """
    return re.findall(r"[^\W\d_]+", name.lower())


def find_files(spec: str) -> list[Path]:
    """The text files that a comma-separated `spec` names, in order, each file once.

    Items are files, folders and globs. Raises UserError for an item without text, for token shards,
    and for a file of an unknown kind.
    """
    found: dict[object, Path] = {}
    for item, matches in named_files(spec, TEXT_SUFFIXES):
        if not matches:
            raise UserError(no_such_data(item))
        for path in matches:
            if suffix_of(path) in (".bin", ".npy"):
                raise UserError(f"{path} is a token shard: give its folder, or this file alone")
            if suffix_of(path) not in KINDS:
                raise UserError(unknown_kind(path, TEXT_SUFFIXES))
            found.setdefault(file_id(path), path)
    if not found:
        raise UserError(
            f"no data is named in {spec!r}; give text files or a folder of token shards"
        )
    return list(found.values())


def no_such_data(item: str) -> str:
    """The error for an item of --data that does not exist or holds no data, and what to type."""
    path = Path(item).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):
        return f"{item} is neither a file nor a folder; give text files or a folder of token shards"
    if path.suffix or any(sign in item for sign in "*?["):
        return (
            f"no such data: {item}; give text files or a folder of token shards, or type "
            "--data stdlib"
        )
    holds = f"{item} holds no token shards (.bin .npy) and no text"
    found = holds if os.path.isdir(path) else f"no such data: {item}"
    command = f"python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --out {item}"
    return f"{found}; prepare it with `{command}`, or type --data stdlib"


def is_hub_id(spec: str) -> bool:
    """Whether a name that is no path looks like `org/name` or `org/name:config` on the hub.

    A name that looks like a missing file does not count: one in data/ or in a folder that exists,
    or one with the suffix of a data file.
    """
    owner = spec.partition("/")[0]
    lost = (
        owner == "data" or os.path.isdir(owner) or suffix_of(Path(spec)) in (*KINDS, ".bin", ".npy")
    )
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", spec)) and not lost


def stdlib_files() -> list[Path]:
    """The source files of the running Python's standard library, about 10 MB.

    Two machines with the same version of Python have the same files. Three kinds are skipped:
    site-packages, the library's tests, which some distributions do not ship, and its tables of
    characters, which are no useful text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
        "encodings",
    }
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [
            name
            for name in names
            if name not in outside and not name.startswith("config-") and not is_hidden(name)
        ]
        found += [
            Path(folder, name) for name in files if name.endswith(".py") and not is_hidden(name)
        ]
    if not found:
        raise UserError(
            f"the source of Python's standard library is not in {root}; give text files with "
            "--data instead"
        )
    return sorted(found)


def files_of(spec: str) -> list[Path] | None:
    """The text files that `spec` names, or that `stdlib` stands for; of several weighted sources
    those of all. None for a dataset on the hub.

    Raises UserError if there are no such files.
    """
    specs = [source.spec for source in specs_of(spec)]
    if specs != [spec]:
        parts = list(map(files_of, specs))
        return None if None in parts else [path for part in parts if part for path in part]
    path = Path(spec).expanduser()
    if spec == "stdlib" and not path.exists():
        return stdlib_files()
    return None if not path.exists() and is_hub_id(spec) else find_files(spec)


def files_sha256(spec: str) -> str | None:
    """A hash of the content of the text files that `spec` names. None if it names none, or more
    than 1 GiB, which would take seconds at each start."""
    try:
        files = files_of(spec)
    except UserError:
        return None
    if files is None or sum(file.stat().st_size for file in files) > 1 << 30:
        return None
    content = "".join(map(sha256, files))
    return hashlib.sha256(content.encode()).hexdigest()
