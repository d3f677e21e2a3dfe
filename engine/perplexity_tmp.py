"""TODO"""

from __future__ import annotations

import math


def perplexity(nll: float, count: float) -> float:
    """exp(nll / count) of a sum of nats over `count` tokens (or words); inf where that overflows."""
    try:
        return math.exp(nll / count)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, n_bytes: float) -> float:
    """A sum of nats as bits per byte of the text: comparable between tokenizers."""
    return nll / math.log(2) / n_bytes
