"""The parts of a row as token ids, cut where they are too long, and rows as padded tensors."""

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


def encode(tokenizer: Tokenizer, parts: Sequence[str], keep: int | None = None) -> list[int]:
    """Token ids of the parts, the first `keep` of a long text."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, SpecialToken):
            ids.append(tokenizer.special_id(part))
        elif isinstance(part, Truncatable):
            ids += tokenizer.encode(part)[:keep]
        else:
            ids += tokenizer.encode(part)
    return ids


@dataclass(frozen=True)
class Encoder:
    """Rows of at most `seq_len` tokens; `cut`: where a long text is cut."""

    tokenizer: Tokenizer
    seq_len: int
    cut: Cut = "end"
    strict: bool = False  # whether a row that is too long is an error

    def tokens(
        self, parts: Sequence[str], where: str, separated: bool = False
    ) -> tuple[np.ndarray, bool]:
        """The tokens of a row, and whether it had to be cut; `separated`: with the end-of-text token
        between its parts. Raises UserError for a row of which nothing fits."""
        pieces = [encode(self.tokenizer, (part,)) for part in parts]
        scaffold = len(parts) - 1 if separated else 0
        over = scaffold + sum(map(len, pieces)) - self.seq_len
        if over > 0:
            if self.strict:
                raise UserError(
                    f"{where}: {over} tokens too long for --seq-len {self.seq_len} (--strict)"
                )
            pieces = self._shortened(where, parts, pieces, over)
        between = [self.tokenizer.eot] if separated else []
        tokens = [
            token for n, piece in enumerate(pieces) for token in (between if n else []) + piece
        ]
        return np.array(tokens or [self.tokenizer.eot], np.int64), over > 0

    def _shortened(
        self, where: str, parts: Sequence[str], pieces: list[list[int]], over: int
    ) -> list[list[int]]:
        """Take `over` tokens from the long texts, always from the longest."""
        long = [n for n, part in enumerate(parts) if isinstance(part, Truncatable)]
        keep = {n: len(pieces[n]) for n in long}
        if sum(keep.values()) - over < len(long):
            raise UserError(
                f"{where}: nothing of its text fits into {self.seq_len} tokens; raise --seq-len"
            )
        for _ in range(over):
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
    """Rows of tokens as idx (B, T) with `filler` at the right, T the longest or the least of
    `sizes` that holds it, and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    idx = torch.full((len(rows), longest if sizes is None else bucket_for(longest, sizes)), filler)
    for i, row in enumerate(rows):
        idx[i, : len(row)] = torch.from_numpy(row)
    return {"idx": idx, "lengths": lengths}
