"""Labels of rows: their names, which there are, what they weigh, and the tokens of their words."""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from config import UserError, nearest
from tasks.description import PreprocessContext
from text.rows import Row
from text.tokenizer import Tokenizer

MANY_LABELS = 20  # from here on a label a few rows is no label
# from here on a float is not every whole number, and two labels could become one
EXACT_WHOLE = 1 << 53
DIGITS = 1000  # Python converts no longer numbers by default
_WHOLE = re.compile(r"[-+]?\d+")
# GLUE's test splits have -1, SNLI has - where annotators disagree
UNKNOWN = ("", "-1", "-", "?", "nan", "null")


def label_name(cell: str) -> str:
    """A cell of a label column as the label's name: numbers without a fraction are whole numbers,
    and a letter with its marks is one character (NFC), since two files may spell one label either
    way."""
    text = nfc(cell.strip())
    if not is_number(text):
        return text
    if _WHOLE.fullmatch(text):
        return text.lstrip("+") if len(text) > DIGITS else str(int(text))
    number = float(text)
    return str(int(number)) if number.is_integer() and abs(number) < EXACT_WHOLE else text


def nfc(text: str) -> str:
    """The text in Unicode's form NFC."""
    return unicodedata.normalize("NFC", text)


def is_unknown(cell: str) -> bool:
    """Whether a cell of a label column says that nobody knows the label: -1, -, ?, nan, null or
    nothing."""
    return label_name(cell).casefold() in UNKNOWN


def find_labels(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels of training rows: numbers in their order, words in the alphabet's. Raises
    UserError where these are no classes to learn."""
    counts: Counter[str] = Counter()
    spelled: dict[str, str] = {}  # as the first row has it, which sets the order
    for row in rows:
        name = label_name(row["label"])
        counts[name] += 1
        spelled.setdefault(name, row["label"].strip())
    if len(counts) < 2:
        raise UserError(
            f"all {len(rows)} training rows have the label {next(iter(counts))!r}; there is "
            "nothing to learn"
        )
    words = [name for name in counts if not is_number(name)]
    if words and 2 * sum(counts[name] for name in words) < len(rows):
        row = next(row for row in rows if label_name(row["label"]) == words[0])
        raise UserError(
            f"{row.where}: the label {words[0][:60]!r} is not a number, as most others are; mend "
            "or remove it"
        )
    if len(counts) > MANY_LABELS and 3 * len(counts) > len(rows):
        raise UserError(
            f"{len(rows)} training rows have {len(counts)} labels; name the column of the class: "
            "--label-column"
        )
    return tuple(
        sorted(counts, key=float)
        if not words
        else sorted(counts, key=lambda name: _order(name, spelled[name]))
    )


def _order(name: str, spelled: str) -> str:
    return spelled if nfc(spelled) == name else name


def is_number(name: str) -> bool:
    """Whether a label is a number; 1_1 is a name, though Python would read it as 11."""
    try:
        return "_" not in name and math.isfinite(float(name))
    except ValueError:
        return False


def word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[int]:
    """The token that each word begins with after a prompt."""
    return [tokenizer.encode(f" {word.strip()}")[0] for word in words]


def class_weights(asked: Sequence[str], rows: Counter[int], labels: Sequence[str]) -> list[float]:
    """The weight of each label's rows: all 1 where nothing is asked; `balanced` by how rare they
    are, n / (K n_k); or the numbers that are asked. Raises UserError where those are not one for
    each label."""
    if not asked:
        return [1.0] * len(labels)
    if tuple(asked) == ("balanced",):
        return [rows.total() / (len(labels) * max(1, rows[label])) for label in range(len(labels))]
    try:
        weights = [float(word) for word in asked]
    except ValueError:
        weights = []
    if len(weights) != len(labels) or not all(0 <= weight < math.inf for weight in weights):
        raise UserError(
            f"--class-weights {' '.join(asked)}: give balanced, or {len(labels)} numbers, for the "
            f"labels {', '.join(labels)}"
        )
    return weights


def label_index(row: Row, labels: Sequence[str]) -> int:
    """The number of a row's label. Raises UserError for one that no training row has."""
    name = label_name(row["label"])
    # a checkpoint's may be spelled with combining marks
    known = list(map(nfc, labels))
    if name in known:
        return known.index(name)
    numbers = all(map(is_number, labels)) and not is_number(name)
    why = (
        "is not a number, as those of the training rows are"
        if numbers
        else "is none of the training rows' labels"
    )
    raise UserError(
        f"{row.where}: the label {name[:60]!r} {why}{nearest(name, labels)}; they are "
        f"{', '.join(labels[:MANY_LABELS])}"
    )


def true_labels(rows: Sequence[Row], labels: Sequence[str]) -> dict[int, int]:
    """The label's number of those rows that have one and are answered. Raises UserError for one
    that the classifier does not know."""
    return {
        i: label_index(row, labels)
        for i, row in enumerate(rows)
        if not row.fault and not is_unknown(row.fields.get("label", ""))
    }


def label_words(
    labels: Sequence[str], of_numbers: Mapping[int, Sequence[str]] | None = None
) -> Sequence[str]:
    """What a language model answers for each label: its name. Where the names are numbers, the
    words for as many labels in `of_numbers`; none where it has none."""
    if all(map(is_number, labels)):
        return (of_numbers or {}).get(len(labels), ())
    return [label.replace("_", " ").lower() for label in labels]


def drop_unknown_labels(
    reading: PreprocessContext, rows: list[Row], spec: str, split: str
) -> list[Row]:
    """The rows whose label is known: one without is neither learned from nor scored. All rows that
    are to be answered stay, an unknown label empty."""
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
    told = ", ".join(sorted({repr(row["label"].strip()) for row in unknown}))
    text = f"{len(unknown):,} of {len(rows):,} rows of {spec} have no known label ({told})"
    if len(unknown) == len(rows):
        raise UserError(
            f"{text}; name rows with labels, and a class that is really called so by another name"
        )
    reading.warnings.append(
        f"{text} and are left out; if that is a class of yours, give it another name"
    )
    return [row for row in rows if not is_unknown(row["label"])]
