"""The command line made from a dataclass of options, and the exit codes of the contract."""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from base import console, signals
from base.arguments import CONFIG, Option, help_text, options_of, read_words
from base.console import printable
from config import (
    UserError,
    check_ranges,
    expand,
    expand_paths,
    nearest,
    replace_surrogates,
    shown_name,
)

# What a path can have against it, wherever it is used, that is no fault of this code.
MACHINE_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EISDIR,
}

Config = TypeVar("Config")  # any dataclass of options


def parse(cls: type[Config], argv: Sequence[str], defaults: dict[str, Any] | None = None) -> Config:
    """Command line to config: `defaults` below the file of `--config`, the command line on top.

    Raises UserError for an unknown option (naming the nearest), a value of the wrong kind, or a bad
    file.
    """
    defaults = defaults or {}
    if {"-h", "--help"} & set(itertools.takewhile(lambda word: word != "--", argv)):
        print(help_text(cls, defaults), end="")
        raise SystemExit(0)
    config, replaced = replace_surrogates(expand_paths(cls(**defaults | _given(cls, argv))))
    for name in replaced:
        warn_of_replaced(shown_name(cls, name))
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
    return frozenset(_given(cls, argv))


def _given(cls: Any, argv: Sequence[str]) -> dict[str, Any]:
    """Values of the options that a command line names, or the file of its --config."""
    options = options_of(cls)
    words = read_words([CONFIG, *options], argv)
    file = words.pop(CONFIG.name, None)
    if file is not None and not file.strip():
        raise UserError("--config is empty; give a file, or leave --config out")
    return words if file is None else _read_config(options, file) | words


def _read_config(options: Sequence[Option], file: str) -> dict[str, Any]:
    """Values of the options that a config file names."""
    named = {option.name: option for option in options}
    given = {}
    for key, value in _read_object(file).items():
        name = key.replace("-", "_")
        if name not in named:
            close = nearest(name, list(named))
            raise UserError(
                f"--config {file} has the key {key[:60]!r}, which is no option here{close}"
            )
        if value is not None:
            values = value if named[name].most > 1 and isinstance(value, list) else [value]
            given[name] = named[name].convert(f"--config {file}: {key}", values)
    return given


def _read_object(file: str) -> dict[str, Any]:
    path = Path(expand(file))
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            import tomllib  # most starts read no TOML

            values = tomllib.loads(text)
        else:
            values = json.loads(text)
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
    if isinstance(error, OSError) and error.filename is not None and error.errno in MACHINE_ERRORS:
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
