"""Rows whose answers are texts, as sequences of tokens: end-of-text, the prompt, the answer,
end-of-text."""

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
    """A long text is several sequences; end-of-text at both ends."""

    answer_starts: list[int]  # place of the first token that is learned
    references: list[str]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model reads of each: the last is only written."""
        return np.array([len(tokens) - 1 for tokens in self.tokens])


TOO_LONG = {  # what becomes of a row that is too long
    "cut": "are cut at the end of their text",
    "dropped": "cannot be cut to fit and are left out",
    "continued": "go on in further sequences",
}


@dataclass(frozen=True)
class SequenceEncoder:
    """Prompts and answers as tokens, of which the model reads at most `seq_len` at once."""

    tokenizer: Tokenizer
    seq_len: int
    strict: bool  # whether a row that is too long is an error

    def split(
        self, rows: Sequence[Row], example: Callable[[Row], Example], what: str
    ) -> tuple[SequenceSplit, list[str]]:
        """The sequences of rows, and warnings about those that are too long; `what` names the rows
        there. Raises UserError where none fits."""
        split = SequenceSplit([], [], Rows(list(rows)).sha256, [], [])
        counts: Counter[str] = Counter()
        for row in rows:
            learned = example(row)
            sequences, happened = self.sequences(learned, row.where)
            counts[happened] += 1
            if happened == "cut" and self._loses_answer(learned, *sequences[0]):
                counts["lost"] += 1
            for tokens, begin in sequences:
                split.rows.append(row)
                split.tokens.append(np.array(tokens))
                split.answer_starts.append(begin)
                split.references.append(learned.true_answer)
        if not split.rows:
            raise UserError(
                f"there is no {what} row that fits into {self.seq_len} tokens; raise --seq-len"
            )
        warnings = [
            f"{counts[name]} of {len(rows)} {what} rows are longer than {self.seq_len} tokens and "
            f"{text}"
            for name, text in TOO_LONG.items()
            if counts[name]
        ]
        if counts["lost"]:
            warnings.append(
                f"{counts['lost']} of {len(rows)} {what} rows lose their answer where it is cut off"
            )
        return split, warnings

    def _loses_answer(self, example: Example, tokens: list[int], begin: int) -> bool:
        """Whether the answer stood in a long text of the prompt and does not in what is left of
        the prompt."""
        answer = plain(example.answer)
        stood = any(answer in part for part in example.prompt if isinstance(part, Truncatable))
        return stood and answer not in self.tokenizer.decode(tokens[1:begin])

    def sequences(self, example: Example, where: str) -> tuple[list[tuple[list[int], int]], str]:
        """(tokens, place of the first that is learned) of a row, and what had to be done to make it
        fit."""
        eot = self.tokenizer.eot
        room = self.seq_len + 1  # the last token is not read
        prompt, answer = (encode(self.tokenizer, part) for part in (example.prompt, example.answer))
        over = 2 + len(prompt) + len(answer) - room
        tokens = [eot, *prompt, *answer, eot]
        if over <= 0:
            return [(tokens, 1 + len(prompt))], ""
        long = self._long(example.prompt)
        if not long and 1 + len(prompt) < room:
            # Each piece begins with the last token of the one before, which it reads and does not
            # learn.
            pieces = [(tokens[i : i + room], 1) for i in range(0, len(tokens) - 1, room - 1)]
            return [(pieces[0][0], 1 + len(prompt)), *pieces[1:]], "continued"
        if self.strict:
            raise UserError(
                f"{where}: {over} tokens too long for --seq-len {self.seq_len} (--strict)"
            )
        if over > long:
            return [], "dropped"
        prompt = encode(self.tokenizer, example.prompt, keep=long - over)
        return [([eot, *prompt, *answer, eot], 1 + len(prompt))], "cut"

    def prompt(self, parts: Parts, context: int) -> list[int]:
        """What a row gives the model to go on from: a long text is cut to leave the answer a
        quarter of the context."""
        ids = [self.tokenizer.eot, *encode(self.tokenizer, parts)]
        over, long = len(ids) - (context - context // 4), self._long(parts)
        if over > 0 and long:
            ids = [self.tokenizer.eot, *encode(self.tokenizer, parts, keep=max(0, long - over))]
        return ids

    def prompts(
        self,
        rows: Sequence[Row],
        asked: Callable[[Row], Parts],
        context: int,
        say: Callable[[str], None],
    ) -> dict[int, list[int]]:
        """What each row that can be read gives the model to go on from, by its number; `asked`: its
        parts.

        Of a prompt longer than the context the newest tokens are read, and that is told. Raises
        UserError for it where strict.
        """
        prompts = {
            i: self.prompt(asked(row), context) for i, row in enumerate(rows) if not row.fault
        }
        long = [i for i, ids in prompts.items() if len(ids) > context]
        if long and self.strict:
            length, where = len(prompts[long[0]]), rows[long[0]].where
            raise UserError(
                f"{where}: a prompt of {length} tokens is too long for a context of {context} "
                "(--strict)"
            )
        if long:
            say(
                f"{len(long):,} of {len(rows):,} prompts are longer than the model's context of "
                f"{context}, the first in {rows[long[0]].where}: only their last "
                f"{kept_tokens(context)} tokens are read"
            )
        return prompts

    def _long(self, parts: Parts) -> int:
        """Tokens of the long texts among the parts."""
        return sum(
            len(self.tokenizer.encode(part)) for part in parts if isinstance(part, Truncatable)
        )
