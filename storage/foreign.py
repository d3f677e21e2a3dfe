"""Reads JSON files that other programs or people wrote, and checks the type of every value.

Every such file is read here: config.json, adapter_config.json, tokenizer_config.json, manifests and
others. A wrong value raises a one-line error at once. Many programs write a number in quotes, 12.0
for 12, or 0 for false. A value that can mean only one thing is accepted.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from config import UserError

NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
LARGEST = (1 << 63) - 1  # the largest size that a tensor can have
REQUIRED: Any = object()


def read_value(file: Path) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a BOM.

    Raises UserError if the file does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not UTF-8 text, as JSON must be; save it again in UTF-8"
        ) from None
    except RecursionError:
        raise UserError(
            f"{file} is not usable JSON: it is nested too deep; copy it again"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None


def read_object(file: Path) -> JsonObject:
    """The JSON object in a file. Raises UserError as `read_value` does, and for any other value."""
    value = read_value(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, but it holds {_short(value)}")
    return JsonObject(file, value)


class JsonObject:
    """A JSON object whose values are checked when they are read.

    Every method that reads a value raises UserError, which names the file and the key, if the value
    has another type, or if the key is missing and there is no default. inside: the path of keys
    that leads to this object, such as "model.".
    """

    def __init__(self, file: Path, values: dict[str, Any], inside: str = ""):
        self.file, self.values, self.inside = file, values, inside

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def given(self, key: str) -> bool:
        """Whether the key has a value that is not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, must: str) -> UserError:
        """The error for the value of `key`. must: what the value must be."""
        if key not in self.values:
            return UserError(f"{self.file} has no {self.inside}{key}; it must be {must}")
        return UserError(
            f"{self.file}: {self.inside}{key} is {_short(self.values[key])}; it must be {must}"
        )

    def whole(self, key: str, default: int = REQUIRED, least: int = 0, most: int = LARGEST) -> int:
        """A whole number in [least, most]. 12.0 and "12" are read as 12."""
        if key not in self.values and default is not REQUIRED:
            return default
        number = _number(self.values.get(key))
        if number is None or number != int(number) or not least <= number <= most:
            between = f"from {least} to {most}" if most < LARGEST else f"of at least {least}"
            raise self.wrong(key, f"a whole number {between}")
        return int(number)

    def number(
        self,
        key: str,
        default: float = REQUIRED,
        above: float = -math.inf,
        least: float = -math.inf,
        most: float = math.inf,
    ) -> float:
        """A finite number greater than `above`, in [least, most]. "1e-05" is read as 1e-05."""
        if key not in self.values and default is not REQUIRED:
            return default
        number = _number(self.values.get(key))
        if number is None or number <= above or not least <= number <= most:
            limits = [(above, "above"), (least, "of at least"), (most, "of at most")]
            bounds = [f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit)]
            raise self.wrong(key, " ".join(["a number", " and ".join(bounds)]).strip())
        return float(number)

    def yes_no(self, key: str, default: bool = REQUIRED) -> bool:
        """true or false. 1 is read as true and 0 as false."""
        if key not in self.values and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        """A string; None for null or a missing key."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def one_of(self, key: str, options: tuple[str, ...]) -> Any:
        """A string that is one of `options`."""
        value = self.values.get(key)
        if not isinstance(value, str) or value not in options:
            raise self.wrong(key, f"one of {', '.join(options)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty for null or a missing key."""
        value = self.values.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise self.wrong(key, "a list of strings")
        return value or []

    def nested(self, key: str) -> JsonObject:
        """A JSON object; empty for null or a missing key."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return JsonObject(self.file, value or {}, f"{self.inside}{key}.")


def _number(value: Any) -> int | float | None:
    """A JSON value as a finite number, also from a string; None if it is not one."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        whole = re.fullmatch(r"\s*[+-]?\d{1,100}\s*", value)
        value = int(value) if whole else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def _short(value: Any) -> str:
    """A JSON value for a message: as it is written, shortened to 60 characters."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a JSON object"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
