"""JSON that other programs and people write, read with its types checked: a wrong value is one
line, at once.

One reader for every such file (config.json, adapter_config.json, tokenizer_config.json, manifests
...). Many writers put a number into quotes, 12.0 for 12, or 0 for false: what can only mean one
thing is read so.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from config import UserError

NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")
LARGEST = (1 << 63) - 1  # what a tensor's size can be
REQUIRED: Any = object()


def read_value(file: Path) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a BOM.

    Raises UserError where the file is not there, cannot be read, or holds no JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not text in UTF-8, as JSON must be; save it again in UTF-8"
        ) from None
    except RecursionError:
        raise UserError(f"{file} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None


def read_object(file: Path) -> JsonObject:
    """The JSON object in a file. Raises UserError like `read_value`, and where it holds something
    else."""
    value = read_value(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object: it is {_short(value)}")
    return JsonObject(file, value)


class JsonObject:
    """A JSON object whose values are checked as they are read.

    Every method raises UserError, naming file and key, for a value that cannot be what it asks for,
    and for a key that is not there unless a default is given. `inside` is the path of keys that
    leads to this object.
    """

    def __init__(self, file: Path, values: dict[str, Any], inside: str = ""):
        self.file, self.values, self.inside = file, values, inside

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def given(self, key: str) -> bool:
        """Whether the key has a value, and not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, must: str) -> UserError:
        """The error for the value of `key`: what it must be."""
        if key not in self.values:
            return UserError(f"{self.file} has no {self.inside}{key}; it must be {must}")
        return UserError(
            f"{self.file}: {self.inside}{key} is {_short(self.values[key])}; it must be {must}"
        )

    def whole(self, key: str, default: int = REQUIRED, least: int = 0, most: int = LARGEST) -> int:
        """A whole number in [least, most]; 12.0 and "12" are 12."""
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
        """A finite number greater than `above`, in [least, most]; "1e-05" is 1e-05."""
        if key not in self.values and default is not REQUIRED:
            return default
        number = _number(self.values.get(key))
        if number is None or number <= above or not least <= number <= most:
            limits = [(above, "above"), (least, "of at least"), (most, "of at most")]
            bounds = [f"{word} {limit:g}" for limit, word in limits if math.isfinite(limit)]
            raise self.wrong(key, " ".join(["a number", " and ".join(bounds)]).strip())
        return float(number)

    def yes_no(self, key: str, default: bool = REQUIRED) -> bool:
        """true or false; 1 is true and 0 is false."""
        if key not in self.values and default is not REQUIRED:
            return default
        value = self.values.get(key)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise self.wrong(key, "true or false")
        return bool(value)

    def text(self, key: str) -> str | None:
        """A string; None for null and where the key is not there."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def one_of(self, key: str, options: tuple[str, ...]) -> Any:
        """One of some strings."""
        value = self.values.get(key)
        if not isinstance(value, str) or value not in options:
            raise self.wrong(key, f"one of {', '.join(options)}")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty for null and where the key is not there."""
        value = self.values.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise self.wrong(key, "a list of strings")
        return value or []

    def nested(self, key: str) -> JsonObject:
        """A JSON object; empty for null and where the key is not there."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a JSON object")
        return JsonObject(self.file, value or {}, f"{self.inside}{key}.")


def _number(value: Any) -> int | float | None:
    """What a JSON value says as a finite number; None where it says none."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        whole = re.fullmatch(r"\s*[+-]?\d{1,100}\s*", value)
        value = int(value) if whole else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def _short(value: Any) -> str:
    """A JSON value as it is written, cut where it is long."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a JSON object"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
