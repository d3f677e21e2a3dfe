"""Weighted sources of data, as a run's --data takes them: `A=0.7 B=0.3`."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from config import UserError

# The digits are limited because Python computes with all of them.
NUMBER = re.compile(r"(\d{1,15}(\.\d{0,15})?|\.\d{1,15})([eE][+-]?\d{1,2})?")


@dataclass(frozen=True)
class WeightedSpec:
    """One source: what --data takes for a whole run, and its weight among the sources."""

    spec: str
    weight: Fraction = Fraction(1)


def weighted_spec(word: str) -> WeightedSpec | None:
    """A source with its weight: what follows the last `=` is a positive number. None for any other
    word, and for a path that exists."""
    spec, _, number = word.rpartition("=")
    if not spec.strip() or not NUMBER.fullmatch(number) or _exists(word):
        return None
    weight = Fraction(number)
    return WeightedSpec(spec, weight) if weight else None


def joined(option: str, words: Sequence[str]) -> str:
    """Several words of a command line as one text, quoted as in a shell, for `specs_of`. A single
    word stays as it is. Raises UserError if one of several has no weight."""
    if len(words) == 1:
        return words[0]
    for word in words:
        if weighted_spec(word) is None:
            raise UserError(
                f"{option} names {len(words)} sources, and {word!r} has no positive weight; give "
                "each one (A=0.7 B=0.3), or join the paths of one corpus with commas (A,B)"
            )
    return shlex.join(words)


def specs_of(spec: str) -> list[WeightedSpec]:
    """The sources that a text names: several words with weights, or one source."""
    if _exists(spec):
        return [WeightedSpec(spec)]
    try:
        words = shlex.split(spec)
    except ValueError:  # a quote without its end is part of a name
        words = []
    found = [source for word in words if (source := weighted_spec(word))]
    if len(words) > 1 and len(found) == len(words):
        return found
    return [weighted_spec(spec) or WeightedSpec(spec)]


def names_of(sources: Sequence[WeightedSpec]) -> list[str]:
    """A short name for each source: the last part of its first path, without its suffix. Equal
    names are numbered."""
    names: list[str] = []
    for source in sources:
        last = source.spec.split(",")[0].rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        stem = last.partition(".")[0] or last
        short = re.sub(r"[^\w-]+", "_", stem).strip("_") or "data"
        numbered = (f"{short}_{n}" if n > 1 else short for n in itertools.count(1))
        name = next(name for name in numbered if name not in names)
        names.append(name)
    return names


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # a null character
        return False
