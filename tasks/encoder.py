"""Encodes the parts of a row as token ids, truncates long rows, and pads rows to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.options import Cut
from config import UserError
from engine.task import Tensors
from tasks.description import SpecialToken, Truncatable
from tasks.order import bucket_for
from text.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Token ids of the parts."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, SpecialToken):
            ids.append(tokenizer.special_id(part))
        else:
            ids += tokenizer.encode(part)
    return ids


@dataclass(frozen=True)
class Encoder:
    """Encodes rows to at most `seq_len` tokens."""

    tokenizer: Tokenizer
    seq_len: int
    cut: Cut = "end"  # where a text that is too long loses tokens
    strict: bool = False  # raise for a row that is too long instead of truncating it

    def tokens(
        self, parts: Sequence[str], where: str, separated: bool = False
    ) -> tuple[np.ndarray, bool]:
        """The tokens of a row (n,) int64, and whether it was truncated.

        separated: put the end-of-text token between the parts. where: names the row in errors.
        Raises UserError if no token of a truncatable text fits, or if a row is too long under
        `strict`.
        """
        pieces = [encode(self.tokenizer, (part,)) for part in parts]
        separators = len(parts) - 1 if separated else 0
        excess = separators + sum(map(len, pieces)) - self.seq_len
        if excess > 0:
            if self.strict:
                raise UserError(
                    f"{where}: {excess} tokens too long for --seq-len {self.seq_len} (--strict); "
                    "raise --seq-len or leave --strict out"
                )
            pieces = self._truncate(where, parts, pieces, excess)
        between = [self.tokenizer.eot] if separated else []
        tokens = [
            token for n, piece in enumerate(pieces) for token in (between if n else []) + piece
        ]
        return np.array(tokens or [self.tokenizer.eot], np.int64), excess > 0

    def _truncate(
        self, where: str, parts: Sequence[str], pieces: list[list[int]], excess: int
    ) -> list[list[int]]:
        """Remove `excess` tokens from the truncatable texts, always from the longest one."""
        long = [n for n, part in enumerate(parts) if isinstance(part, Truncatable)]
        keep = {n: len(pieces[n]) for n in long}
        if sum(keep.values()) - excess < len(long):
            raise UserError(
                f"{where}: nothing of its text fits into {self.seq_len} tokens; raise --seq-len"
            )
        for _ in range(excess):
            keep[max(keep, key=lambda n: keep[n])] -= 1
        return [
            _cut(piece, keep[n], self.cut) if n in keep else piece for n, piece in enumerate(pieces)
        ]


def _cut(piece: list[int], keep: int, cut: str) -> list[int]:
    if cut == "end":
        return piece[:keep]
    head = keep // 2 if cut == "middle" else 0
    return piece[:head] + piece[len(piece) - (keep - head) :]


def pad_rows(rows: Sequence[np.ndarray], filler: int, sizes: np.ndarray | None = None) -> Tensors:
    """Pads rows of tokens at the right with `filler`: "idx" (B, T) and "lengths" (B,), int64.

    T is the length of the longest row, or the smallest of `sizes` that holds it.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    idx = torch.full((len(rows), longest if sizes is None else bucket_for(longest, sizes)), filler)
    for i, row in enumerate(rows):
        idx[i, : len(row)] = torch.from_numpy(row)
    return {"idx": idx, "lengths": lengths}
