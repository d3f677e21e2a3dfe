"""Options of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from config import Count, CountOrNone, Few, Positive, Range, Share, UserError, check_ranges

Decode = Literal["sample", "greedy", "beam", "contrastive", "mbr", "ensemble"]


@dataclass(frozen=True)
class DecodeConfig:
    """How a continuation is chosen, and for how long (decoding/batched.py)."""

    decode: Decode = "sample"
    """sample: each token drawn; greedy: the likeliest; beam: several texts kept at once;
    contrastive: likely, unlike what stands; mbr: of several samples the one most like the others;
    ensemble: mbr over several ways of decoding."""
    max_new_tokens: Count = 200
    """Tokens to add at most. Past the model's context the window slides: the newest three quarters
    are read afresh."""
    stop_lines: CountOrNone = 0
    """End after this many lines; 0: no such end."""
    temperature: Annotated[float, Range(0, 1e30)] = 0.8
    """Divides the logits: below 1 the likely tokens gain."""
    top_k: CountOrNone = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: Share = 1.0
    """Draw from the fewest tokens whose probability reaches this."""
    repetition_penalty: Positive = 1.0
    """Above 1: tokens that the text already holds are less likely."""
    beams: Few = 5
    """Texts that beam search keeps."""
    length_penalty: Annotated[float, Range(0, 1e6)] = 1.0
    """Beam search divides a text's log-probability by its length to this power."""
    no_repeat_ngram: CountOrNone = 0
    """Beam search never repeats this many tokens in a row; 0: it may."""
    contrastive_k: Count = 4
    """Contrastive search chooses among this many likeliest tokens."""
    contrastive_alpha: Share = 0.6
    """Weight of contrastive search's penalty for being like what stands."""
    contrastive_growth: bool = False
    """Let that weight grow from 0 to its value over the text."""
    contrastive_similarity: Literal["max", "mean"] = "max"
    """Likeness to the most alike token that stands, or the mean over all."""
    candidates: Few = 16
    """Texts that mbr and ensemble choose from; an ensemble's are the beams, one by contrastive
    search, and samples."""
    candidates_by: Literal["sample", "beam"] = "sample"
    """How mbr makes its candidates."""

    @property
    def draws(self) -> bool:
        """Whether a text depends on random draws."""
        return self.decode in ("sample", "ensemble") or (
            self.decode == "mbr" and self.candidates_by == "sample"
        )


def check_decode(cfg: DecodeConfig) -> None:
    """Raise UserError for a way of decoding that cannot be."""
    check_ranges(cfg)
    if cfg.draws and cfg.temperature == 0:
        raise UserError(
            f"--temperature is {cfg.temperature}; it must be above 0 (or use --decode greedy)"
        )
    for name, none in (("top_p", "all tokens"), ("repetition_penalty", "none")):
        if getattr(cfg, name) == 0:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must be above 0 (1: "
                f"{none})"
            )
    if cfg.decode == "ensemble" and cfg.candidates < cfg.beams + 2:
        raise UserError(
            f"--candidates {cfg.candidates} of an ensemble are {cfg.beams} beams, a contrastive "
            f"search and samples; give {cfg.beams + 2} or more, or fewer --beams"
        )
