"""Options of decoding. This file imports no torch, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from config import Count, CountOrNone, Positive, Range, Share, SmallCount, UserError, check_ranges

Decode = Literal["sample", "greedy", "beam", "contrastive", "mbr", "ensemble"]


@dataclass(frozen=True)
class DecodeConfig:
    """How the tokens of a continuation are chosen, and when it ends (decoding/batched.py)."""

    decode: Decode = "sample"
    """sample: draw each token; greedy: take the likeliest; beam: keep several texts at once;
    contrastive: take a likely token unlike those before it; mbr: of several candidate texts, take
    the one most like the others; ensemble: mbr over the texts of several methods."""
    max_new_tokens: Count = 200
    """Largest number of tokens to add. Past the model's context the window slides: the newest
    three quarters are read again."""
    stop_lines: CountOrNone = 0
    """End after this many lines; 0: no limit."""
    temperature: Annotated[float, Range(0, 1e30)] = 0.8
    """Divides the logits. Values below 1 favour likely tokens."""
    top_k: CountOrNone = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: Share = 1.0
    """Draw from the fewest tokens whose probability together reaches this."""
    repetition_penalty: Positive = 1.0
    """Values above 1 make tokens that the text already holds less likely."""
    beams: SmallCount = 5
    """Number of texts that beam search keeps."""
    length_penalty: Annotated[float, Range(0, 1e6)] = 1.0
    """Beam search divides a text's log-probability by its length to this power."""
    no_repeat_ngram: CountOrNone = 0
    """Beam search never repeats an n-gram of this many tokens; 0: it may repeat any."""
    contrastive_k: Count = 4
    """Contrastive search chooses among this many likeliest tokens."""
    contrastive_alpha: Share = 0.6
    """Weight of contrastive search's penalty for similarity to earlier tokens."""
    contrastive_growth: bool = False
    """Let that weight grow from 0 to its full value over the text."""
    contrastive_similarity: Literal["max", "mean"] = "max"
    """Compare with the most similar earlier token (max), or average over all (mean)."""
    candidates: SmallCount = 16
    """Number of texts that mbr and ensemble choose from. An ensemble's are the beams, one text by
    contrastive search, and samples."""
    candidates_by: Literal["sample", "beam"] = "sample"
    """How mbr makes its candidate texts."""

    @property
    def draws(self) -> bool:
        """Whether this method draws random numbers."""
        return self.decode in ("sample", "ensemble") or (
            self.decode == "mbr" and self.candidates_by == "sample"
        )


def check_decode(cfg: DecodeConfig) -> None:
    """Raise UserError for values out of range, or options that contradict each other."""
    check_ranges(cfg)
    if cfg.draws and cfg.temperature == 0:
        raise UserError(
            f"--temperature is {cfg.temperature}; it must be above 0 (or use --decode greedy)"
        )
    for name, meaning_of_1 in (("top_p", "all tokens"), ("repetition_penalty", "no penalty")):
        if getattr(cfg, name) == 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be above 0 (1: "
                f"{meaning_of_1})"
            )
    if cfg.decode == "ensemble" and cfg.candidates < cfg.beams + 2:
        raise UserError(
            f"--candidates {cfg.candidates} is too few for an ensemble of {cfg.beams} beams, a "
            f"contrastive text and samples; give {cfg.beams + 2} or more, or fewer --beams"
        )
