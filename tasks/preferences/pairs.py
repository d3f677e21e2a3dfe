"""Encodes pairs as sequences of tokens: for both answers end-of-text, the prompt, the answer and
its end."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from config import UserError
from engine.task import Tensors
from kernels.linear_cross_entropy import IGNORE
from tasks.description import EarlierAnswer, Parts
from tasks.encoder import encode
from tasks.finetuning import Split
from tasks.generation.sequences import SequenceEncoder
from tasks.preferences.description import Pair, PreferenceDescription
from tasks.preferences.options import PreferencesConfig
from text.chat import END
from text.rows import Row, Rows
from text.tokenizer import Tokenizer

TOO_LONG = {  # how a pair that is too long is handled, and how a warning says it
    "shortened": "lose their oldest turns",
    "truncated": "lose a part of their prompt",
    "dropped": "have no room for their prompt and are left out",
}
Sequences = tuple[tuple[np.ndarray, np.ndarray], ...]  # tokens and whether each is scored


@dataclass
class PairSplit(Split):
    """Pairs as token sequences. Pair i has the sequences 2i (chosen) and 2i + 1 (rejected)."""

    scored: list[np.ndarray]  # (tokens,) bool, for each sequence: whether a token is scored

    @functools.cached_property
    def sequence_lengths(self) -> np.ndarray:
        """Number of tokens that the model reads of each sequence, (2n,) int64. The last token is
        only a target."""
        return np.array([len(tokens) - 1 for tokens in self.tokens])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens that the model reads of the longer sequence of each pair, (n,) int64."""
        return self.sequence_lengths.reshape(-1, 2).max(1)

    @functools.cached_property
    def read(self) -> np.ndarray:
        """Number of tokens that the model reads of both sequences of each pair, (n,) int64."""
        return self.sequence_lengths.reshape(-1, 2).sum(1)

    @functools.cached_property
    def answer_lengths(self) -> np.ndarray:
        """Number of scored tokens of both sequences of each pair, (n,) int64."""
        return np.array([scored.sum() for scored in self.scored]).reshape(-1, 2).sum(1)

    @functools.cached_property
    def sequences_sha256(self) -> str:
        """Hash of the tokens, and of which are scored: all that log-probabilities depend on."""
        found = hashlib.sha256()
        for tokens, scored in zip(self.tokens, self.scored, strict=True):
            found.update(f"{len(tokens)}\n".encode() + tokens.tobytes() + scored.tobytes())
        return found.hexdigest()

    def tensors(
        self, sequences: Sequence[int] | np.ndarray, length: int, filler: int = 0
    ) -> Tensors:
        """Sequences padded at the right: "idx" and "targets" (B, length) int64, and "scored" (N,)
        int64, the places of the scored targets among the B x length."""
        idx = torch.full((len(sequences), length), filler)
        targets = torch.full_like(idx, IGNORE)
        for row, i in enumerate(sequences):
            tokens, scored = torch.from_numpy(self.tokens[i]), torch.from_numpy(self.scored[i])
            place = row, slice(len(tokens) - 1)
            idx[place] = tokens[:-1]
            targets[place] = tokens[1:].where(scored[1:], IGNORE)
        places = (targets.flatten() != IGNORE).nonzero()[:, 0]
        return {"idx": idx, "targets": targets, "scored": places}


@dataclass(frozen=True)
class PairEncoder:
    """Encodes pairs. The model reads at most `encoder.seq_len` tokens of a sequence."""

    encoder: SequenceEncoder

    def split(
        self, rows: Sequence[Row], pair: Callable[[Row], Pair], what: str
    ) -> tuple[PairSplit, list[str]]:
        """The sequences of rows, and warnings about pairs that are too long.

        what: "training" or "validation", for the warnings. Raises UserError if no pair fits.
        """
        split = PairSplit([], [], Rows(list(rows)).sha256, [])
        counts: Counter[str] = Counter()
        for row in rows:
            sequences, how = self.sequences(pair(row), row.where)
            counts.update(how)
            if sequences:
                split.rows.append(row)
            for tokens, scored in sequences:
                split.tokens.append(tokens)
                split.scored.append(scored)
        if not split.rows:
            raise UserError(
                f"no {what} pair fits into {self.encoder.seq_len} tokens; raise --seq-len"
            )
        warnings = [
            f"{counts[name]} of {len(rows)} {what} pairs are longer than {self.encoder.seq_len} "
            f"tokens and {text}"
            for name, text in TOO_LONG.items()
            if counts[name]
        ]
        return split, warnings

    def sequences(self, pair: Pair, where: str) -> tuple[Sequences, list[str]]:
        """The chosen and the rejected sequence, or () if they do not fit, and how they were made to
        fit: keys of TOO_LONG.

        Answers are whole, and both sequences have the same prompt. A conversation loses its oldest
        turns, and then the end of the user's last message. A text loses its beginning.
        """
        answers = [self._answer(parts) for parts in (pair.chosen, pair.rejected)]
        longest = max(len(ids) for ids, _ in answers)
        room = self.encoder.seq_len + 1 - longest  # the last token is only a target
        prompt = self.encoder.fit(pair.prompt, room)
        ids, how = prompt.ids, [name for name, lost in prompt.lost.items() if lost]
        excess = len(ids) - room
        if excess > 0 and not pair.end and room > 1:
            ids, how = [ids[0], *ids[1 + excess :]], ["truncated"]
        elif excess > 0:
            how = ["dropped"]
        if how and self.encoder.strict:
            excess = max(excess, 0) + sum(prompt.lost.values())
            raise UserError(
                f"{where}: {excess} tokens too long for --seq-len {self.encoder.seq_len} "
                "(--strict); raise --seq-len or leave --strict out"
            )
        if how == ["dropped"]:
            return (), how
        unscored = [False] * len(ids)
        return tuple(
            (np.array(ids + answer), np.array(unscored + scored)) for answer, scored in answers
        ), how

    def _answer(self, parts: Parts) -> tuple[list[int], list[bool]]:
        ids, scored = list[int](), list[bool]()
        for part in parts:
            piece = encode(self.encoder.tokenizer, (part,))
            if answer := isinstance(part, EarlierAnswer):
                piece.append(self.encoder.end)
            ids += piece
            scored += [answer] * len(piece)
        return ids, scored


def pair_encoder(
    tokenizer: Tokenizer, seq_len: int, cfg: PreferencesConfig, end: str | None
) -> PairEncoder:
    """The encoder for pairs of which `end` ends the answers."""
    return PairEncoder(SequenceEncoder(tokenizer, seq_len, cfg.strict, end))


def end_of(rows: Sequence[Row], description: PreferenceDescription) -> str | None:
    """The special token that ends the answers of all rows. Raises UserError if some rows are
    conversations and others are not."""
    ends: dict[str | None, str] = {}
    for row in rows:
        if not row.fault:
            ends.setdefault(description.pair(row).end, row.where)
    if len(ends) > 1:
        raise UserError(
            f"{ends[END]} is a conversation and {ends[None]} is not; give rows of one kind"
        )
    return next(iter(ends), None)
