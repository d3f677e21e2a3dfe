"""Encodes rows as sequences of tokens: end-of-text, the prompt, the answer, and its end."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base.files import write_json
from config import UserError
from decoding.window import kept_tokens
from tasks.description import EarlierAnswer, Parts, Truncatable, Turn, plain
from tasks.encoder import encode
from tasks.finetuning import Split
from tasks.generation.description import Example
from text.rows import Row, Rows
from text.tokenizer import Tokenizer


@dataclass
class SequenceSplit(Split):
    """Rows as token sequences. A long text may become several sequences."""

    learned: list[np.ndarray]  # (tokens,) bool, for each sequence: whether a token is learned
    references: list[str]  # the true answer of each sequence's row

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens that the model reads of each sequence, (n,) int64. The last token is
        only a target."""
        return np.array([len(tokens) - 1 for tokens in self.tokens])


TOO_LONG = {  # how a row that is too long is handled, and how a warning says it
    "shortened": "lose their oldest turns",
    "truncated": "are truncated at the end of their text",
    "dropped": "cannot be truncated enough and are left out",
    "split": "are split into several sequences",
}


class Prompt(NamedTuple):
    """An encoded prompt, and what it lost so that it fits."""

    ids: list[int]
    learned: list[bool]  # whether each token belongs to an earlier answer
    lost: dict[str, int]  # tokens, by the keys of TOO_LONG


@dataclass(frozen=True)
class SequenceEncoder:
    """Encodes prompts and answers. The model reads at most `seq_len` tokens of a sequence."""

    tokenizer: Tokenizer
    seq_len: int
    strict: bool  # raise for a row that is too long instead of truncating it
    end_token: str | None = None  # ends an answer; None: the end-of-text token

    @property
    def end(self) -> int:
        """The id that ends an answer."""
        return self.tokenizer.special_id(self.end_token) if self.end_token else self.tokenizer.eot

    def write_ends(self, folder: Path) -> None:
        """Write the ids that end an answer into a model's folder, if end-of-text is not the only
        one. Else generate() of transformers would not stop at a turn's end."""
        if self.end_token:
            eot = self.tokenizer.eot
            stops = {"bos_token_id": eot, "eos_token_id": [self.end, eot]}
            write_json(folder / "generation_config.json", stops)

    def split(
        self, rows: Sequence[Row], example: Callable[[Row], Example], what: str
    ) -> tuple[SequenceSplit, list[str]]:
        """The sequences of rows, and warnings about rows that are too long.

        what: "training" or "validation", for the warnings. Raises UserError if no row fits.
        """
        split = SequenceSplit([], [], Rows(list(rows)).sha256, [], [])
        counts: Counter[str] = Counter()
        for row in rows:
            encoded = example(row)
            sequences, how = self.sequences(encoded, row.where)
            counts.update(how)
            for tokens, learned in sequences:
                split.rows.append(row)
                split.tokens.append(np.array(tokens))
                split.learned.append(np.array(learned))
                split.references.append(encoded.true_answer)
        if not split.rows:
            raise UserError(f"no {what} row fits into {self.seq_len} tokens; raise --seq-len")
        warnings = [
            f"{counts[name]} of {len(rows)} {what} rows are longer than {self.seq_len} tokens and "
            f"{text}"
            for name, text in TOO_LONG.items()
            if counts[name]
        ]
        if counts["lost"]:
            warnings.append(
                f"{counts['lost']} of {len(rows)} {what} rows lose their answer: truncation "
                "removes it from their text"
            )
        return split, warnings

    def _loses_answer(self, example: Example, prompt: list[int]) -> bool:
        """Whether a truncatable text of the prompt contained the answer, and the truncated prompt
        does not."""
        answer = plain(example.answer)
        had = any(answer in part for part in example.prompt if isinstance(part, Truncatable))
        return had and answer not in self.tokenizer.decode(prompt[1:])

    def sequences(
        self, example: Example, where: str
    ) -> tuple[list[tuple[list[int], list[bool]]], list[str]]:
        """The sequences of a row, and how it was made to fit: keys of TOO_LONG, and "lost" if
        truncation removed the answer.

        Each sequence is a pair of tokens and whether each is learned.
        """
        answer = [*encode(self.tokenizer, example.answer), self.end]
        room = self.seq_len + 1  # the last token is only a target
        turns = any(isinstance(part, Turn) for part in example.prompt)
        # A long answer of a conversation is split. It may not push its question out.
        least = kept_tokens(self.seq_len) if turns else 0
        prompt = self.fit(example.prompt, max(least, room - len(answer)))
        tokens, learned = prompt.ids + answer, prompt.learned + [True] * len(answer)
        too_long, how = len(tokens) > room, list(prompt.lost)
        # The rest of an answer is learned in further sequences, unless the prompt has no room.
        dropped = too_long and not turns and (bool(how) or len(prompt.ids) >= room)
        if self.strict and (dropped or how):
            excess = len(tokens) + sum(prompt.lost.values()) - room
            raise UserError(
                f"{where}: {excess} tokens too long for --seq-len {self.seq_len} (--strict); raise "
                "--seq-len or leave --strict out"
            )
        if dropped:
            return [], ["dropped"]
        if "truncated" in how and self._loses_answer(example, prompt.ids):
            how.append("lost")
        # Each sequence starts with the last token of the previous one. It is read, not learned.
        begins = range(0, len(tokens) - 1, room - 1)
        pieces = [(tokens[i : i + room], [False, *learned[i + 1 : i + room]]) for i in begins]
        return pieces, how + ["split"] * too_long

    def prompt(self, parts: Parts, context: int) -> list[int]:
        """The prompt from which the model writes the answer. The oldest turns are left out, and a
        truncatable text is truncated, so that the answer has a quarter of the context."""
        return self.fit(parts, context - context // 4).ids

    def fit(self, parts: Parts, room: int) -> Prompt:
        """The prompt without its oldest turns, if it is longer than `room` tokens. The newest turn
        stays. If that is not enough, its truncatable text is truncated, as far as there is one."""
        pieces = [encode(self.tokenizer, (part,)) for part in parts]
        earlier = [isinstance(part, EarlierAnswer) for part in parts]
        for piece in itertools.compress(pieces, earlier):
            piece.append(self.end)
        excess = 1 + sum(map(len, pieces)) - room
        lost: Counter[str] = Counter()
        turns = [n for n, part in enumerate(parts) if isinstance(part, Turn)]
        for begin, end in itertools.pairwise(turns):
            if lost.total() < excess:
                lost["shortened"] += sum(map(len, pieces[begin:end]))
                pieces[begin:end] = [[]] * (end - begin)
        for n, part in enumerate(parts):
            cut = min(excess - lost.total(), len(pieces[n]))
            if isinstance(part, Truncatable) and cut > 0:
                lost["truncated"] += cut
                del pieces[n][len(pieces[n]) - cut :]
        learned = [on for piece, on in zip(pieces, earlier, strict=True) for _ in piece]
        ids = itertools.chain.from_iterable(pieces)
        return Prompt([self.tokenizer.eot, *ids], [False, *learned], lost)

    def prompts(
        self,
        rows: Sequence[Row],
        parts: Callable[[Row], Parts],
        context: int,
        say: Callable[[str], None],
    ) -> dict[int, list[int]]:
        """The prompts of the rows without a fault, by row number. parts: gives the parts of a row's
        prompt.

        The model reads only the last tokens of a prompt that is longer than the context. `say`
        reports that, or under `strict` it raises UserError.
        """
        prompts = {
            i: self.prompt(parts(row), context) for i, row in enumerate(rows) if not row.fault
        }
        long = [i for i, ids in prompts.items() if len(ids) > context]
        if long and self.strict:
            length, where = len(prompts[long[0]]), rows[long[0]].where
            raise UserError(
                f"{where}: a prompt of {length} tokens is too long for a context of {context} "
                "(--strict); shorten it, or leave --strict out"
            )
        if long:
            say(
                f"{len(long):,} of {len(rows):,} prompts are longer than the model's context of "
                f"{context}, the first in {rows[long[0]].where}: only their last "
                f"{kept_tokens(context)} tokens are read"
            )
        return prompts
