"""Labels of rows: their names and numbers, the weights of classes, and the tokens of label
words."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from config import UserError, nearest
from tasks.description import PreprocessContext
from text.row import Row

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer

MANY_LABELS = 20  # with more labels, each must have three rows on average, or it is no class
EXACT_WHOLE = 1 << 53  # from here on floats skip whole numbers, and two labels could become one
DIGITS = 1000  # longer numbers are not parsed; Python's own default limit is 4300 digits
_WHOLE = re.compile(r"[-+]?\d+")
# GLUE's test splits have -1. SNLI has - if the annotators disagree.
UNKNOWN = ("", "-1", "-", "?", "nan", "null")


def label_name(cell: str) -> str:
    """The name of the label in a cell. "1.0" becomes "1", and combining marks are composed (NFC),
    because two files may spell one label in either way."""
    text = nfc(cell.strip())
    if not is_number(text):
        return text
    if _WHOLE.fullmatch(text):
        return text.lstrip("+") if len(text) > DIGITS else str(int(text))
    number = float(text)
    return str(int(number)) if number.is_integer() and abs(number) < EXACT_WHOLE else text


def nfc(text: str) -> str:
    """The text in Unicode's composed form, NFC."""
    return unicodedata.normalize("NFC", text)


def is_unknown(cell: str) -> bool:
    """Whether a cell of a label column marks an unknown label: -1, -, ?, nan, null or nothing."""
    return label_name(cell).casefold() in UNKNOWN


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of training rows: numbers in numeric order, words in alphabetical order. Raises
    UserError if these are no classes to learn."""
    counts: Counter[str] = Counter()
    spelled: dict[str, str] = {}  # the spelling in the first row, which sets the order
    for row in rows:
        name = label_name(row["label"])
        counts[name] += 1
        spelled.setdefault(name, row["label"].strip())
    if len(counts) < 2:
        raise UserError(
            f"all {len(rows)} training rows have the label {next(iter(counts))!r}; give rows with "
            "two labels or more"
        )
    words = [name for name in counts if not is_number(name)]
    if words and 2 * sum(counts[name] for name in words) < len(rows):
        row = next(row for row in rows if label_name(row["label"]) == words[0])
        raise UserError(
            f"{row.where}: the label {words[0][:60]!r} is not a number, but most others are; "
            "correct or remove the row"
        )
    if len(counts) > MANY_LABELS and 3 * len(counts) > len(rows):
        raise UserError(
            f"{len(rows)} training rows have {len(counts)} labels, too many to be classes; name "
            "the column of the class with --label-column"
        )
    return tuple(
        sorted(counts, key=float)
        if not words
        else sorted(counts, key=lambda name: _order(name, spelled[name]))
    )


def _order(name: str, spelled: str) -> str:
    return spelled if nfc(spelled) == name else name


def is_number(name: str) -> bool:
    """Whether a label is a number. 1_1 is a name, though Python would read it as 11."""
    try:
        return "_" not in name and math.isfinite(float(name))
    except ValueError:
        return False


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """The first token of each word, as it would follow a prompt."""
    return [tokenizer.encode(f" {word.strip()}")[0] for word in words]


def class_weights(option: Sequence[str], rows: Counter[int], labels: Sequence[str]) -> list[float]:
    """The weight of each label's rows, from the words of --class-weights.

    rows: number of rows of each label. All weights are 1 without the option, and n / (K n_k) under
    `balanced`. Raises UserError unless there is one number for each label.
    """
    if not option:
        return [1.0] * len(labels)
    if tuple(option) == ("balanced",):
        return [rows.total() / (len(labels) * max(1, rows[label])) for label in range(len(labels))]
    try:
        weights = [float(word) for word in option]
    except ValueError:
        weights = []
    if len(weights) != len(labels) or not all(0 <= weight < math.inf for weight in weights):
        raise UserError(
            f"--class-weights {' '.join(option)}: give balanced, or {len(labels)} numbers, for the "
            f"labels {', '.join(labels)}"
        )
    return weights


def label_index(row: Row, labels: Sequence[str]) -> int:
    """The index of a row's label in `labels`. Raises UserError for a label that no training row
    has."""
    name = label_name(row["label"])
    # An older checkpoint may spell its labels with combining marks.
    known = list(map(nfc, labels))
    if name in known:
        return known.index(name)
    numbers = all(map(is_number, labels)) and not is_number(name)
    why = (
        "is not a number, but those of the training rows are"
        if numbers
        else "is none of the training rows' labels"
    )
    raise UserError(
        f"{row.where}: the label {name[:60]!r} {why}{nearest(name, labels)}; use one of "
        f"{', '.join(labels[:MANY_LABELS])}"
    )


def true_labels(rows: Sequence[Row], labels: Sequence[str]) -> dict[int, int]:
    """The label index of each row that can be scored, by row number. Rows with a fault or without a
    known label are left out. Raises UserError for a label that the classifier does not have."""
    return {
        i: label_index(row, labels)
        for i, row in enumerate(rows)
        if not row.fault and not is_unknown(row.fields.get("label", ""))
    }


def label_words(
    labels: Sequence[str], words_by_count: Mapping[int, Sequence[str]] | None = None
) -> Sequence[str]:
    """The word that a language model answers for each label: the label's name.

    If all names are numbers, the words for that many labels in `words_by_count`, else ().
    """
    if all(map(is_number, labels)):
        return (words_by_count or {}).get(len(labels), ())
    return [label.replace("_", " ").lower() for label in labels]


def drop_unknown_labels(
    context: PreprocessContext, rows: list[Row], spec: str, split: str
) -> list[Row]:
    """Drop the rows without a known label: they can be neither learned nor scored.

    Rows of --predict (split "test") are all kept, with an empty label instead of an unknown one.
    Raises UserError if no row of the file has a known label.
    """
    unknown = [row for row in rows if is_unknown(row["label"])]
    if split == "test":
        return [
            dataclasses.replace(row, fields=row.fields | {"label": ""})
            if is_unknown(row["label"])
            else row
            for row in rows
        ]
    if not unknown:
        return rows
    spellings = ", ".join(sorted({repr(row["label"].strip()) for row in unknown}))
    text = f"{len(unknown):,} of {len(rows):,} rows of {spec} have no known label ({spellings})"
    if len(unknown) == len(rows):
        raise UserError(
            f"{text}; give rows with labels. If one of your classes has such a name, rename it"
        )
    context.warnings.append(
        f"{text} and are left out. If one of your classes has such a name, rename it"
    )
    return [row for row in rows if not is_unknown(row["label"])]
