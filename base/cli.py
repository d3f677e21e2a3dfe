"""Turn a command line into a dataclass of options, and errors into the exit codes of the
contract."""

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

# Errors of a path that are the machine's fault or the user's, not this code's.
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
    """The options of a command line: see `parse_typed`."""
    return parse_typed(cls, argv, defaults)[0]


def parse_typed(
    cls: type[Config], argv: Sequence[str], defaults: dict[str, Any] | None = None
) -> tuple[Config, frozenset[str]]:
    """The options of a command line, and the names of those that it or its --config file gives.

    The command line overrides the file of `--config`, which overrides `defaults`. Raises UserError
    for an unknown option (naming the nearest), a value of the wrong kind, or a bad file.
    """
    defaults = defaults or {}
    if {"-h", "--help"} & set(itertools.takewhile(lambda word: word != "--", argv)):
        print(help_text(cls, defaults), end="")
        raise SystemExit(0)
    given = _given(cls, argv)
    config, replaced = replace_surrogates(expand_paths(cls(**defaults | given)))
    for name in replaced:
        warn_of_replaced(shown_name(cls, name))
    check_ranges(config)
    return config, frozenset(given)


def warn_of_replaced(what: str) -> None:
    """Warn, on rank 0 only, that an option held bytes that are not UTF-8."""
    if os.environ.get("RANK", "0") == "0":
        print(
            f"warning: {what} holds bytes that are not UTF-8; each is read as U+FFFD",
            file=sys.stderr,
        )


def _given(cls: Any, argv: Sequence[str]) -> dict[str, Any]:
    """The values of the options that a command line or its --config file names."""
    options = options_of(cls)
    words = read_words([CONFIG, *options], argv)
    file = words.pop(CONFIG.name, None)
    if file is not None and not file.strip():
        raise UserError("--config is empty; give a file, or leave --config out")
    return words if file is None else _read_config(options, file) | words


def _read_config(options: Sequence[Option], file: str) -> dict[str, Any]:
    """The values of the options that a config file names."""
    named = {option.name: option for option in options}
    given = {}
    for key, value in _read_object(file).items():
        name = key.replace("-", "_")
        if name not in named:
            close = nearest(name, list(named))
            raise UserError(
                f"--config {file} has the key {key[:60]!r}, which is not an option here{close}"
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
            f"--config {file} holds no options; write them as an object of names and values"
        )
    return values


def entry_point(main: Callable[[], int | None]) -> NoReturn:
    """Run `main`, then exit. What it returns or raises decides the exit code by the contract."""
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
        console.outlive()  # a lost output must not raise again when Python flushes at exit
    sys.exit(code)


def _code_of(main: Callable[[], int | None]) -> Any:
    try:
        return main() or 0
    except SystemExit as stop:  # --help, or a signal before anything could be saved
        return 128 + signals.stopped_by() if signals.stopped_by() else stop.code or 0


def _code_of_error(error: Exception) -> int:
    """The exit code for an error, after one line about it. An error that is a bug is raised
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
    """Print one line on standard error, even if the message quotes line breaks."""
    print(printable(" ".join(text.split("\n"))), file=sys.stderr, flush=True)


def _line_of(error: Exception) -> str | None:
    """The message for an error that can occur anywhere and is not a bug, else None."""
    if isinstance(error, OSError) and error.filename is not None and error.errno in MACHINE_ERRORS:
        return f"{error.filename}: {error.strerror}; name a path that you may read or write"
    if _is_out_of_memory(error):
        return f"out of memory ({error}); use smaller sizes or fewer at once"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. It avoids torch, which a command may not have imported."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and (
        "allocate memory" in str(error) or "overflow" in str(error)
    )
