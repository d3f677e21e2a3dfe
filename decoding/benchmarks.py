"""HellaSwag and LAMBADA: their rows, what is scored of them, and the figures.

A benchmark says which continuations are to be scored (`spans`), and makes figures of the scores.
evaluate.py and training (engine/benchmarked.py) score them, each in its own way.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from config import UserError
from decoding.scoring import Score, Span, make_span, perplexity, spaces_to_word
from text.corpus import HubDataset, records_of
from text.readers import with_advice
from text.tokenizer import Tokenizer

NO_LABEL = ("", "-1")  # labels of HellaSwag's test rows

Figures = dict[str, Any]  # metrics by name


class Benchmark(ABC):
    """A benchmark whose rows are encoded by a tokenizer, for a model of some block_size."""

    name: ClassVar[str]
    hub: ClassVar[tuple[str, str]]  # the hub's dataset and its split
    curves: ClassVar[tuple[str, ...]]  # the figures that training logs
    spans: Sequence[Span]  # what is to be scored
    texts: Sequence[str]  # of each row that counts
    counts: dict[str, int]  # the number of rows, and of those that do not count

    @abstractmethod
    def __init__(self, tokenizer: Tokenizer, rows: Sequence[Any], block_size: int):
        """`rows`: as `parse` returns them. Raises UserError for a row that cannot be scored."""

    @staticmethod
    @abstractmethod
    def parse(row: dict[str, Any]) -> Any:
        """A row of the benchmark's file. Raises KeyError, TypeError, ValueError or AttributeError
        for any other row."""

    @abstractmethod
    def results(self, scores: Sequence[Score]) -> list[Any]:
        """The result of each row that counts, from the scores of all `spans`."""

    @abstractmethod
    def figures(self, results: Sequence[Any]) -> Figures:
        """The metrics of some rows' results, at least one."""


# ---- HellaSwag


@dataclass(frozen=True)
class Choices:
    """A context and the endings to choose from, each without a leading space."""

    context: str
    endings: tuple[str, ...]


@dataclass(frozen=True)
class HellaSwagRow:
    """A row in two forms. They are equal for rows that only have ctx, endings and label."""

    plain: Choices  # the row's own text, which llm.c scores
    harness: Choices  # the text that lm-evaluation-harness makes of it
    label: int | None  # index of the right ending, None if unknown


def hellaswag_row(row: dict[str, Any]) -> HellaSwagRow:
    """A row of the official file, or of a file with only ctx, endings and label. Raises KeyError,
    TypeError or ValueError for any other row."""
    context = row["ctx"] if "ctx" in row else f"{row['ctx_a']} {row['ctx_b']}"
    endings = row["endings"]
    if (
        not isinstance(endings, list)
        or not endings
        or not all(isinstance(text, str) for text in [context, *endings])
    ):
        raise ValueError("ctx must be a text and endings a list of texts")
    plain = harness = Choices(context, tuple(endings))
    if all(isinstance(row.get(name), str) for name in ("activity_label", "ctx_a", "ctx_b")):
        query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        harness = Choices(_without_markup(query), tuple(map(_without_markup, endings)))
    if not all(plain.endings) or not all(harness.endings):
        raise ValueError("an ending is empty")
    label = str(row["label"]).strip()
    if label in NO_LABEL or row["label"] is None:
        return HellaSwagRow(plain, harness, None)
    if not 0 <= int(label) < len(endings):
        raise ValueError("label names no ending")
    return HellaSwagRow(plain, harness, int(label))


def _without_markup(text: str) -> str:
    """The text without WikiHow's markup ([title], [step], ...), as in lm-evaluation-harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


class HellaSwag(Benchmark):
    """HellaSwag (Zellers et al. 2019): how often the right ending has the highest log-probability.

    acc, acc_norm and acc_bytes are those of lm-evaluation-harness, on its text: the log-probability
    of the ending, divided by 1, by its characters or by its bytes (without the leading space).
    acc_tokens is that of llm.c, on the row's own text: divided by the ending's tokens. The first of
    equal endings is chosen. Rows without a label are not scored.
    """

    name = "hellaswag"
    hub = ("Rowan/hellaswag", "validation")
    curves = ("acc_norm", "acc_tokens")
    parse = staticmethod(hellaswag_row)

    def __init__(self, tokenizer: Tokenizer, rows: Sequence[HellaSwagRow], block_size: int):
        """See Benchmark."""
        self.rows = [row for row in rows if row.label is not None]
        without_label = len(rows) - len(self.rows)
        self.counts = {"rows": len(self.rows), "rows_without_label": without_label}
        if not self.rows:
            raise UserError("no row of HellaSwag has a label; give rows with labels")
        # Each text is scored once, so that equal endings get equal scores to the last bit.
        places: dict[Span, int] = {}

        def place(context: str, ending: str) -> int:
            span = make_span(tokenizer, context, ending, block_size)
            return places.setdefault(span, len(places))

        # the places in `spans` of each row's endings: of the plain text and of the harness's
        self.places = [
            (
                [place(row.plain.context, " " + end) for end in row.plain.endings],
                [
                    place(*spaces_to_word(row.harness.context, " " + end))
                    for end in row.harness.endings
                ],
            )
            for row in self.rows
        ]
        self.spans = list(places)
        self.texts = ["\n".join((row.plain.context, *row.plain.endings)) for row in self.rows]

    def results(self, scores: Sequence[Score]) -> list[dict[str, bool]]:
        """Whether each accuracy's choice is right, for each row with a label."""
        return [
            _hellaswag_hits(row, plain, harness, scores)
            for row, (plain, harness) in zip(self.rows, self.places, strict=True)
        ]

    def figures(self, results: Sequence[Mapping[str, bool]]) -> Figures:
        """The share of rows that are right, for each accuracy."""
        return {name: sum(row[name] for row in results) / len(results) for name in results[0]}


def _hellaswag_hits(
    row: HellaSwagRow, plain: list[int], harness: list[int], scores: Sequence[Score]
) -> dict[str, bool]:
    """Whether each accuracy's choice is right. plain, harness: the places of the endings' scores."""
    nlls = [scores[n].nll for n in harness]
    divisors = {
        "acc": [1] * len(nlls),
        "acc_norm": [len(end) for end in row.harness.endings],
        "acc_bytes": [len(end.encode()) for end in row.harness.endings],
    }
    per_unit = {
        name: [nll / n for nll, n in zip(nlls, each, strict=True)]
        for name, each in divisors.items()
    }
    per_unit["acc_tokens"] = [scores[n].nll / scores[n].tokens for n in plain]
    return {name: row.label == _argmin(values) for name, values in per_unit.items()}


def _argmin(values: Sequence[float]) -> int:
    """The index of the smallest value, the first of equal ones."""
    return min(range(len(values)), key=values.__getitem__)


# ---- LAMBADA


LambadaRow = tuple[str, str]  # the text up to its last space, and the last word with that space


def lambada_row(row: dict[str, Any]) -> LambadaRow:
    """A row of LAMBADA. Raises KeyError, AttributeError or ValueError for any other row."""
    context, space, word = row["text"].rstrip().rpartition(" ")
    if not space:
        raise ValueError("the text has a single word")
    return context, space + word


class Lambada(Benchmark):
    """LAMBADA (Paperno et al. 2016): the last word counts as right if each of its tokens is the
    likeliest.

    "perplexity" is per word, as in GPT-2's paper: exp of the mean over rows of the word's nats.
    """

    name = "lambada"
    hub = ("EleutherAI/lambada_openai", "test")
    curves = ("accuracy", "perplexity")
    parse = staticmethod(lambada_row)

    def __init__(self, tokenizer: Tokenizer, rows: Sequence[LambadaRow], block_size: int):
        """See Benchmark."""
        self.spans = [make_span(tokenizer, *spaces_to_word(*row), block_size) for row in rows]
        self.texts = ["".join(row) for row in rows]
        self.counts = {"rows": len(rows)}

    def results(self, scores: Sequence[Score]) -> list[Score]:
        """The score of each row's last word."""
        return list(scores)

    def figures(self, results: Sequence[Score]) -> Figures:
        """Accuracy, and perplexity per word and per token."""
        nll = sum(score.nll for score in results)
        return {
            "accuracy": sum(score.greedy for score in results) / len(results),
            "perplexity": perplexity(nll, len(results)),
            "token_perplexity": perplexity(nll, sum(score.tokens for score in results)),
        }


BENCHMARKS = (HellaSwag, Lambada)


# ---- rows from a file or the hub


def read_rows(kind: type[Benchmark], option: str, where: str, limit: int | None) -> list[Any]:
    """The first `limit` rows of a file, or of the hub's dataset if `where` is hub, as `kind.parse`
    returns them. Raises UserError, which names the `option`, for rows of another kind."""
    what = f"{option} {where}"
    rows = hub_rows(*kind.hub) if where == "hub" else file_rows(Path(where), what)
    if not rows:
        raise UserError(f"{what} holds no rows")
    parsed = []
    for number, row in enumerate(rows[:limit], 1):
        try:
            parsed.append(kind.parse(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{what}: row {number} is not a row of this benchmark ({error!r}); give its file, "
                "or hub"
            ) from None
    return parsed


def file_rows(path: Path, what: str) -> list[dict[str, Any]]:
    """All rows of a file. Raises UserError for a row that cannot be read, because a score without
    it could not be compared with others."""
    if not path.is_file():
        raise UserError(
            f"{what}: No such file; give a file of rows (.jsonl .json .csv .tsv .parquet), or hub"
        )
    # Read all rows first: damage of the file is reported before a row that suffers from it.
    records = list(records_of(path, ".jsonl"))
    for place, cells in records:
        if isinstance(cells, str):
            raise UserError(
                f"a score needs every row: {what} {place} {with_advice(cells, cells, path)}"
            )
    return [cells for _, cells in records if isinstance(cells, dict)]


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    """All rows of a split of a hub dataset."""
    return [row for _, row in HubDataset(name, split=split).records() if isinstance(row, dict)]
