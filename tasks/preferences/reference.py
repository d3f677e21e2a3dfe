"""The reference: the model that rewards compare with. Its log-probabilities are computed once and
kept in --cache, so it is in memory only until they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

from adapters import layers
from base.console import time_text
from config import GPTConfig, UserError
from decoding.loading import open_model
from decoding.scoring import group_by_length
from engine.precision import DTYPES, Cast, autocast, casts_once, exact_products
from engine.step import to_device
from model import GPT
from storage.cache import Cache, digest
from storage.checkpoint import locate
from tasks.preferences.options import PreferencesConfig
from tasks.preferences.pairs import PairSplit
from tasks.preferences.scoring import AnswerScorer
from text.tokenizer import Tokenizer

LOG_PROBS = "log_probs.npy"  # the file of the cache
BATCH_TOKENS = 8192  # tokens of a forward pass, padding included
EVERY = 5.0  # seconds between two lines on the progress
CPU = torch.device("cpu")


def open_reference(
    cfg: PreferencesConfig, tokenizer: Tokenizer, shape: GPTConfig | None = None
) -> GPT:
    """The model of --reference, or the one that training starts from, without adapter and dropout,
    in fp32 on the CPU. Token ids that it lacks are added, as training adds them.

    shape: of the model that training draws if it starts from scratch. Raises UserError if
    --reference has another tokenizer.
    """
    if shape and cfg.init == "scratch" and not cfg.reference:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)  # as the loop does
            return GPT(shape).eval()
    where = locate(cfg.reference or cfg.init)
    given = cfg.tokenizer if cfg.tokenizer in (None, "gpt2") else locate(cfg.tokenizer)
    model, own = open_model(where, None if cfg.reference else given, CPU, torch.float32)
    if own.with_special(tuple(tokenizer.special_ids)).sha256 != tokenizer.sha256:
        raise UserError(
            f"--reference {cfg.reference or cfg.init} has another tokenizer than the model that is "
            "compared with it; name the model that training started from"
        )
    known = min(own.vocab_size, model.config.vocab_size)
    if known < tokenizer.vocab_size:
        layers.add_tokens(model, range(known, tokenizer.vocab_size))
    return model


@torch.no_grad()
def log_probs(
    model: GPT,
    split: PairSplit,
    precision: str,
    say: Callable[[str], None],
    without: Collection[str] = (),
) -> np.ndarray:
    """The log-probability of each answer under a model, (2n,) float32, in the order of the
    sequences of `split`."""
    device, scorer = model.transformer.wte.weight.device, AnswerScorer(model.eval())
    cast = casts_once(precision, without)
    module = Cast(scorer, DTYPES[precision]) if cast else scorer
    lengths, found = split.sequence_lengths, np.empty(len(split.tokens), np.float32)
    began = last = time.monotonic()
    done, total = 0, int(lengths.sum())
    for some in group_by_length(lengths.tolist(), BATCH_TOKENS):
        batch = to_device(split.tensors(some, int(lengths[some].max())), device)
        exact = precision == "fp32"
        with exact_products() if exact else autocast("fp32" if cast else precision, device):
            found[some] = module(batch).float().cpu().numpy()
        done, now = done + int(lengths[some].sum()), time.monotonic()
        if now - last > EVERY:
            last, rate = now, done / (now - began)
            left = time_text((total - done) / rate)
            say(f"log-probabilities: {done / total:.0%}, {rate:,.0f} tokens/s, eta {left}")
    return found


def kept_log_probs(
    model: GPT,
    sha256: str,
    split: PairSplit,
    precision: str,
    device: torch.device,
    cfg: PreferencesConfig,
    say: Callable[[str], None],
) -> np.ndarray:
    """As `log_probs`, for a model whose weights have this `sha256`. They are computed only if --cache
    lacks them for the same weights, sequences and precision.

    Raises UserError if the cache cannot be written, because a resumed run must read the same, and
    for a damaged file in it.
    """
    cache = Cache(Path(cfg.cache))

    def make(folder: Path) -> None:
        began = time.monotonic()
        found = log_probs(model.to(device), split, precision, say, cfg.without)
        with cache.writing():
            np.save(folder / LOG_PROBS, found)
        seconds = time_text(time.monotonic() - began)
        say(
            f"scored {len(split.rows):,} pairs with the reference in {precision} ({seconds}), kept "
            f"in {folder.parent}"
        )

    key = digest(LOG_PROBS, sha256, split.sequences_sha256, precision)[:32]
    file = cache.get_or_make(key, make, say) / LOG_PROBS
    try:
        found = np.load(file)
    except (OSError, ValueError, EOFError):
        found = None
    if found is None or found.shape != (len(split.tokens),) or found.dtype != np.float32:
        raise UserError(
            f"{file} is damaged or missing; remove the folder {file.parent}, and the reference is "
            "scored again"
        )
    return found
