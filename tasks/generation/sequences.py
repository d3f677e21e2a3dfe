"""Encodes rows as sequences of tokens: end-of-text, the prompt, the answer, end-of-text."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from config import UserError
from decoding.window import kept_tokens
from tasks.description import Parts, Truncatable, plain
from tasks.encoder import encode
from tasks.finetuning import Split
from tasks.generation.description import Example
from text.rows import Row, Rows
from text.tokenizer import Tokenizer


@dataclass
class SequenceSplit(Split):
    """Rows as token sequences. A long text may become several sequences."""

    answer_starts: list[int]  # index of the first token that is learned, for each sequence
    references: list[str]  # the true answer of each sequence's row

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens that the model reads of each sequence, (n,) int64. The last token is
        only a target."""
        return np.array([len(tokens) - 1 for tokens in self.tokens])


TOO_LONG = {  # how a row that is too long is handled, and how a warning says it
    "truncated": "are truncated at the end of their text",
    "dropped": "cannot be truncated enough and are left out",
    "split": "are split into several sequences",
}


@dataclass(frozen=True)
class SequenceEncoder:
    """Encodes prompts and answers. The model reads at most `seq_len` tokens of a sequence."""

    tokenizer: Tokenizer
    seq_len: int
    strict: bool  # raise for a row that is too long instead of truncating it

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
            counts[how] += 1
            if how == "truncated" and self._loses_answer(encoded, *sequences[0]):
                counts["lost"] += 1
            for tokens, start in sequences:
                split.rows.append(row)
                split.tokens.append(np.array(tokens))
                split.answer_starts.append(start)
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

    def _loses_answer(self, example: Example, tokens: list[int], start: int) -> bool:
        """Whether a truncatable text of the prompt contained the answer, and the truncated prompt
        does not."""
        answer = plain(example.answer)
        had = any(answer in part for part in example.prompt if isinstance(part, Truncatable))
        return had and answer not in self.tokenizer.decode(tokens[1:start])

    def sequences(self, example: Example, where: str) -> tuple[list[tuple[list[int], int]], str]:
        """The sequences of a row, and the key in TOO_LONG that says how it was made to fit ("" if
        it fits).

        Each sequence is a pair of tokens and the index of the first token that is learned.
        """
        eot = self.tokenizer.eot
        room = self.seq_len + 1  # the last token is only a target
        prompt, answer = (encode(self.tokenizer, part) for part in (example.prompt, example.answer))
        excess = 2 + len(prompt) + len(answer) - room
        tokens = [eot, *prompt, *answer, eot]
        if excess <= 0:
            return [(tokens, 1 + len(prompt))], ""
        truncatable = self._truncatable(example.prompt)
        if not truncatable and 1 + len(prompt) < room:
            # Each sequence starts with the last token of the previous one. It is read, not learned.
            pieces = [(tokens[i : i + room], 1) for i in range(0, len(tokens) - 1, room - 1)]
            return [(pieces[0][0], 1 + len(prompt)), *pieces[1:]], "split"
        if self.strict:
            raise UserError(
                f"{where}: {excess} tokens too long for --seq-len {self.seq_len} (--strict); raise "
                "--seq-len or leave --strict out"
            )
        if excess > truncatable:
            return [], "dropped"
        prompt = encode(self.tokenizer, example.prompt, keep=truncatable - excess)
        return [([eot, *prompt, *answer, eot], 1 + len(prompt))], "truncated"

    def prompt(self, parts: Parts, context: int) -> list[int]:
        """The prompt from which the model writes the answer. A truncatable text is truncated so
        that the answer has a quarter of the context."""
        ids = [self.tokenizer.eot, *encode(self.tokenizer, parts)]
        excess, truncatable = len(ids) - (context - context // 4), self._truncatable(parts)
        if excess > 0 and truncatable:
            keep = max(0, truncatable - excess)
            ids = [self.tokenizer.eot, *encode(self.tokenizer, parts, keep)]
        return ids

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

    def _truncatable(self, parts: Parts) -> int:
        """Number of tokens in the truncatable texts among the parts."""
        return sum(
            len(self.tokenizer.encode(part)) for part in parts if isinstance(part, Truncatable)
        )
