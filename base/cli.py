"""The command line made from a dataclass of options, and the exit codes of the contract."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from base import console, signals
from base.console import printable
from config import UserError, check_ranges, expand, expand_paths, nearest, replace_surrogates

# What a path can have against it, wherever it is used, that is no fault of this code.
OF_THE_MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EISDIR,
}

TEXTS = (str, str | None)  # types of an option that takes any text

Config = TypeVar("Config")  # any dataclass of options


def option_names(cls: Any) -> list[str]:
    """Fields of a dataclass of options, as attributes."""
    return [field.name for field in dataclasses.fields(cls)]


def parse(cls: type[Config], argv: Sequence[str], defaults: dict[str, Any] | None = None) -> Config:
    """Command line to config: `defaults` below the file of `--config`, the command line on top.

    Raises UserError for an unknown option (naming the nearest), a value of the wrong kind, or a bad
    file.
    """
    argv, file = _take_config(list(argv))
    texts, from_file = _from_file(cls, file)
    base = cls(**((defaults or {}) | texts))
    if "-h" in argv or "--help" in argv:
        print(
            "--config FILE: read options from a JSON or TOML file (a run's own config.json too); "
            "others override it.\n"
        )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                cls,
                args=from_file + argv,
                default=base,
                return_unknown_args=True,
                # `bool | None` becomes a pair of flags whose default is None
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None
    if unknown:
        raise UserError(_unknown_option(cls, unknown[0]))
    positionals = _positionals(cls)
    config, replaced = replace_surrogates(expand_paths(config, positionals))
    for name in replaced:
        warn_of_replaced(positionals.get(name, "--" + name.replace("_", "-")))
    check_ranges(config)
    return config


def warn_of_replaced(what: str) -> None:
    """Say, once for all ranks, that an option held bytes that are no text."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {what} holds bytes that are not UTF-8; each is read as U+FFFD",
            file=sys.stderr,
        )


def typed_options(cls: Any, argv: Sequence[str]) -> frozenset[str]:
    """Options that a command line names, or the file of its --config: the others have their
    defaults."""
    argv, file = _take_config(list(argv))
    texts, from_file = _from_file(cls, file)
    heads = {
        word.partition("=")[0][2:].replace("-", "_")
        for word in from_file + argv
        if word.startswith("--")
    }
    return frozenset(
        name for name in option_names(cls) if name in texts or heads & {name, f"no_{name}"}
    )


def entry_point(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and turn what it returns or raises into the contract's exit codes."""
    console.open_console()
    console.quiet_libraries()
    signals.watch_signals()
    try:
        code = _code_of(main)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = _code_of_error(error)
    finally:
        console.outlive()  # what Python flushes at its end raises no more
    sys.exit(code)


def _code_of(main: Callable[[], int | None]) -> Any:
    try:
        return main() or 0
    except SystemExit as stop:  # --help, or a signal before there is anything to save
        return 128 + signals.stopped_by() if signals.stopped_by() else stop.code or 0


def _code_of_error(error: Exception) -> int:
    """The exit code for an error, which is told in one line; a fault of the code is raised
    again."""
    if number := signals.stopped_by():
        return 128 + number
    if isinstance(error, UserError):
        if error.local or os.environ.get("RANK", "0") == "0":
            rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ and error.local else ""
            _say_error(f"{rank}error: {error}")
        return 2
    if isinstance(error, console.OutputLost):
        if not error.reader_left:
            _say_error(
                f"error: standard output cannot be written ({error}); write it somewhere else: > "
                "FILE"
            )
        return 0 if error.reader_left else 2
    line = _line_of(error)
    if line is None:
        raise error
    _say_error(f"error: {line}")
    return 2


def _say_error(text: str) -> None:
    """One line on standard error, whatever the message quotes."""
    print(printable(" ".join(text.split("\n"))), file=sys.stderr, flush=True)


def _line_of(error: Exception) -> str | None:
    """What to tell of an error that may come from anywhere and is no fault of the code; None for
    the others."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in OF_THE_MACHINE:
        return f"{error.filename}: {error.strerror}; name one that you may read, or write to"
    if _is_out_of_memory(error):
        return f"out of memory ({error}); ask for less: smaller sizes, fewer at once"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Asked without torch, which a command may not have imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and (
        "allocate memory" in str(error) or "overflow" in str(error)
    )


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` off a command line."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise UserError("--config needs a file")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith("--config="):
            return argv[:i] + argv[i + 1 :], word.partition("=")[2]
    return argv, None


def _read_config(file: str) -> dict[str, Any]:
    path = Path(expand(file))
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--config {file} is not valid {path.suffix[1:] or 'JSON'}: {error}"
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            f"--config {file} holds no options; it should be an object of names and values"
        )
    return values


def _from_file(cls: Any, file: str | None) -> tuple[dict[str, Any], list[str]]:
    """What a config file says: its texts by name, and the rest as words of a command line.

    The parser of the command line checks the words. A text needs no check, and as a word it could
    be taken for another thing: it may begin with a dash, and a positional has no name to give it
    by.
    """
    texts: dict[str, Any] = {}
    words: list[str] = []
    hints = get_type_hints(cls)
    for key, value in _read_config(file).items() if file else ():
        name, option = key.replace("-", "_"), "--" + key.replace("_", "-")
        if name not in option_names(cls):
            close = nearest(name, option_names(cls))
            raise UserError(
                f"--config {file} has the key {key[:60]!r}, which is no option here{close}"
            )
        if value is None:
            continue
        if hints[name] in TEXTS:
            texts[name] = _text(f"--config {file}: {key}", value)
        elif hints[name] == tuple[str, ...]:
            items = value if isinstance(value, list) else [value]
            texts[name] = tuple(_text(f"--config {file}: {key}", item) for item in items)
        elif isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        elif isinstance(value, list):
            words += [option, *map(str, value)] if value else []
        else:
            words += [option, str(value)]
    return texts, words


def _text(where: str, value: Any) -> str:
    if isinstance(value, bool | list | dict):
        raise UserError(f"{where} is {json.dumps(value)[:60]}; it must be text")
    return str(value)


def _one_line(box: str) -> str:
    """The message inside tyro's box, on one line."""
    lines = [re.sub(r"[│╭╮╰╯─━┃]+", " ", line).strip() for line in box.splitlines()[1:]]
    body = []
    for line in lines:
        if not line or line.startswith(("Argument helptext", "For full helptext")):
            if body:
                break
            continue
        body.append(line)
    return " ".join(body) or box.strip()


def _unknown_option(cls: Any, word: str) -> str:
    if not word.startswith("-"):
        return f"unexpected word {word!r}; options are written --name value (see --help)"
    word = word.partition("=")[0]
    positionals = _positionals(cls)
    if shown := positionals.get(word[2:].replace("-", "_")):
        return f"{word} is no option: {shown} is typed without a name (see --help)"
    names = [name for name in option_names(cls) if name not in positionals]
    return (
        "unknown option "
        f"{word}{nearest(word, ['--config', *('--' + n.replace('_', '-') for n in names)])}"
    )


def _positionals(cls: Any) -> dict[str, str]:
    """The options that are typed without their names, and how the help shows them."""
    found = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        if tyro.conf.Positional in notes:
            found[name] = next(
                (shown for note in notes if (shown := getattr(note, "metavar", None))), name.upper()
            )
    return found
