"""The options of a dataclass: how users type them, and the help that lists them.

argparse prints the help but does not parse. Versions of Python differ in how argparse takes
positionals between options, a bare `--`, and values that begin with a dash.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from base.sources import joined
from config import PathName, UserError, marks, nearest, shown_name

# The types of a value, with their names in the help and in messages.
TYPES = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("TEXT", "text"),
    bool: ("", "true or false"),
}
# The beginning of an option. -1, -.5, -inf and a lone dash are values.
DASHED = re.compile(r"--|-(?!inf\b|nan\b)[^\W\d]")
LONG = 60  # messages show this many characters of a wrong value


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a dataclass of options, and how users type it."""

    name: str
    label: str  # its name in help and messages
    typed: tuple[str, ...]  # --name, and --no-name for a flag; empty for a positional
    kinds: tuple[Any, ...]  # types of its values, and fixed words that it accepts
    most: int = 1  # largest number of values: a flag takes 0, a tuple any number
    weighted: bool = False  # several values become one text, see base/sources.py

    def convert(self, where: str, given: Sequence[Any]) -> Any:
        """Turn words or JSON values into the field's value. Raises UserError, which says that they
        came from `where`."""
        values = tuple(self._convert_one(where, value) for value in given)
        if self.weighted:
            return joined(where, values)
        return values if self.most > 1 else values[0]

    def _convert_one(self, where: str, given: Any) -> Any:
        if isinstance(given, bool):
            if bool in self.kinds:
                return given
        elif given is not None and not isinstance(given, list | dict):  # TOML has dates too
            if str(given) in self.kinds:
                return str(given)
            for kind in (int, float, str):
                if kind in self.kinds:
                    with contextlib.suppress(ValueError):
                        return kind(str(given))
        text = repr(given) if isinstance(given, str) else json.dumps(given, default=str)
        if len(text) > LONG:
            text = f"{text[:LONG]}... ({len(text)} characters)"
        *others, last = [TYPES[kind][1] if kind in TYPES else kind for kind in self.kinds]
        allowed = f"{', '.join(others)} or {last}" if others else last
        words = [kind for kind in self.kinds if kind not in TYPES]
        raise UserError(f"{where} is {text}; it must be {allowed}{nearest(str(given), words)}")


CONFIG = Option("config", "--config", ("--config",), (str,))  # every command has it


def options_of(cls: Any) -> list[Option]:
    """One option for each field of a dataclass."""
    options = []
    for name, hint in get_type_hints(cls).items():
        label, kinds, most = shown_name(cls, name), _kinds(hint), 1
        typed = (label,) if label.startswith("--") else ()
        if bool in kinds:
            typed, most = (label, f"--no-{label[2:]}"), 0
        weighted = any(isinstance(m, PathName) and m.weighted for m in marks(cls)[name])
        if get_origin(hint) is tuple or weighted:
            most = sys.maxsize
        options.append(Option(name, label, typed, kinds, most, weighted))
    return options


def _kinds(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if parts := get_args(hint):
        return tuple(kind for part in parts for kind in _kinds(part))
    return () if hint in (NoneType, ...) else (hint,)


def read_words(options: Sequence[Option], argv: Sequence[str]) -> dict[str, Any]:
    """The values that a command line gives to each option, in the option's type.

    Raises UserError for an unknown option (naming the nearest), a word that no option takes, and a
    value that is missing or of the wrong kind.
    """
    named = {typed: option for option in options for typed in option.typed}
    given, alone, words = dict[str, list[Any]](), list[str](), deque(argv)
    while words:
        word = words.popleft()
        if word == "--":
            alone += words
            break
        if not DASHED.match(word):
            alone.append(word)
            continue
        head, equals, value = word.partition("=")
        typed = head[:2] + head[2:].replace("_", "-")
        if typed not in named:
            raise UserError(_unknown(head, options, list(named)))
        option = named[typed]
        values: list[Any] = [value] if equals else []
        while words and len(values) < option.most and not DASHED.match(words[0]):
            values.append(words.popleft())
        if option.most == 0:
            if values:
                raise UserError(f"{typed} takes no value; type {' or '.join(option.typed)} alone")
            values = [typed == option.label]
        elif (option.most == 1 or option.weighted) and not values:
            raise UserError(f"{typed} needs a value")
        given[option.name] = values
    for option in options:
        if alone and not option.typed:
            given[option.name], alone = alone[: option.most], alone[option.most :]
    if alone:
        raise UserError(
            f"unexpected word {alone[0]!r}; options are written --name value (see --help)"
        )
    return {
        option.name: option.convert(option.label, given[option.name])
        for option in options
        if option.name in given
    }


def _unknown(typed: str, options: Sequence[Option], known: list[str]) -> str:
    for option in options:
        if not option.typed and option.name == typed[2:].replace("-", "_"):
            return f"{typed} is not an option; type {option.label} without a name (see --help)"
    return f"unknown option {typed}{nearest(typed, known)}"


def help_text(cls: Any, defaults: Mapping[str, Any]) -> str:
    """The usage of a command, and each option with its docstring and default."""
    import argparse  # here, because a command without --help does not need it

    options, texts, values = options_of(cls), field_docs(cls), cls(**defaults)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    positionals = [option.label for option in options if not option.typed]
    parser = argparse.ArgumentParser(
        usage=" ".join(["python", program, "[options]", *positionals]).replace("%", "%%"),
        description=cls.__doc__,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="Print this help.")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Read options from a JSON or TOML file, for example a run's config.json. Options on "
        "the command line override it.",
    )
    for option in options:
        text, default = texts.get(option.name, ""), getattr(values, option.name)
        if default not in (None, "", ()) and "default" not in text.lower():
            words = default if isinstance(default, tuple) else [default]
            text += f" (default: {' '.join(map(str, words))})"
        kinds = [TYPES[kind][0] if kind in TYPES else kind for kind in option.kinds]
        shape: dict[str, Any] = {"metavar": "|".join(kinds) if option.typed else option.label}
        if option.most == 0:
            shape = {"action": "store_true"}
        elif option.typed and option.most > 1:
            shape["nargs"] = "*"
        names = option.typed or [option.name]
        parser.add_argument(*names, help=text.replace("%", "%%"), **shape)
    return parser.format_help()


def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and its base classes. A derived class overrides
    its bases."""
    texts = {}
    for owner in reversed(cls.__mro__[:-1]):
        source: Any = ast.parse(inspect.getsource(owner))
        for statements in itertools.pairwise(source.body[0].body):
            match statements:
                case (ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text)))):
                    texts[name] = " ".join(text.split())
    return texts
