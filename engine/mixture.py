"""Several sources of training data in one run, each with its share of the windows.

Which source a window comes from depends on its position in the run alone. The assignment is not
random: after any number n of windows, a source of share w has given n * w of them, to within one
window. Coin flips would be off by the square root of n. Tijdeman's rule reaches this (1980, "The
chairman assignment problem"): among the sources that lag far enough behind their share, the one
whose next window would be late first comes next.

Each source has an order of its own (dataset.window_order): a new permutation of its windows in each
of its epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from base.sources import WeightedSpec, names_of
from dataset import TokenDataset, window_order
from decoding.scoring import bits_per_byte, perplexity

PERIOD = 100_000  # parts of the whole, of which shares are multiples
# More epochs than these of one source are worth less and less (Muennighoff et al. 2023, "Scaling
# Data-Constrained Language Models").
MOST_EPOCHS = 4


def parts_of(weights: Sequence[Fraction]) -> list[int]:
    """Weights as whole numbers of parts, at least one each. They are exact if PERIOD parts suffice
    for that, and else rounded."""
    shares = [weight / sum(weights) for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    return [max(1, round(share * min(period, PERIOD))) for share in shares]


def schedule(parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each window of a period of sum(parts) windows: the number of its source, and how many
    windows of that source come before it, both (period,) int64."""
    period, n = sum(parts), len(parts)
    sources, before = np.zeros((2, period), np.int64)
    counts = [0] * n
    for position in range(period):
        # how far each source is behind its share if this window is not its own, times period
        lags = [part * (position + 1) - period * count for part, count in zip(parts, counts)]
        chosen = min(
            (k for k in range(n) if (2 * n - 2) * lags[k] >= period),
            key=lambda k: ((2 * n - 3) * period - (2 * n - 2) * lags[k]) / parts[k],
        )
        sources[position], before[position] = chosen, counts[chosen]
        counts[chosen] += 1
    return sources, before


class Mixture:
    """The token streams of two or more sources. The ids of their windows are numbered through."""

    def __init__(self, sources: Sequence[WeightedSpec], datasets: Sequence[TokenDataset]):
        self.names, self.datasets = names_of(sources), list(datasets)
        self.parts = parts_of([source.weight for source in sources])
        self.shares = [part / sum(self.parts) for part in self.parts]
        self.n_tokens = sum(dataset.n_tokens for dataset in datasets)
        # of each source, so that a refused run shows which of them has changed
        self.sha256 = " ".join(dataset.sha256 for dataset in datasets)

    @functools.cached_property
    def _schedule(self) -> tuple[np.ndarray, np.ndarray]:
        return schedule(self.parts)  # takes a moment, and validation data does not need it

    @property
    def weights(self) -> str:
        """The shares as text, for a run's identity."""
        return " ".join(f"{share:.12g}" for share in self.shares)

    def n_windows(self, seq_len: int) -> int:
        """How many windows all sources have."""
        return sum(dataset.n_windows(seq_len) for dataset in self.datasets)

    def order(self, positions: np.ndarray, seq_len: int, seed: int) -> np.ndarray:
        """The ids (P,) int64 of the windows at these positions (P,) of the run."""
        scheduled, before = self._schedule
        period, slot = np.divmod(positions, len(scheduled))
        sources, ids = scheduled[slot], np.empty(len(positions), np.int64)
        numbers = period * np.array(self.parts)[sources] + before[slot]
        first = 0
        for k, dataset in enumerate(self.datasets):
            own, n = sources == k, dataset.n_windows(seq_len)
            ids[own] = first + window_order(numbers[own], n, seed + k)
            first += n
        return ids

    def windows(self, ids: np.ndarray, seq_len: int) -> np.ndarray:
        """Window ids (B,) to tokens (B, seq_len + 1) int64. Raises IndexError for a wrong id."""
        out, first = np.empty((len(ids), seq_len + 1), np.int64), 0
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.n_windows(seq_len):
            raise IndexError(f"window ids must lie in [0, {self.n_windows(seq_len)})")
        for dataset in self.datasets:
            end = first + dataset.n_windows(seq_len)
            own = (first <= ids) & (ids < end)
            out[own] = dataset.windows(ids[own] - first, seq_len)
            first = end
        return out


Dataset = TokenDataset | Mixture


def mixed(sources: Sequence[WeightedSpec], datasets: Sequence[TokenDataset]) -> Dataset:
    """The mixture of several sources. A single one stays as it is."""
    return datasets[0] if len(datasets) == 1 else Mixture(sources, datasets)


def weights_of(dataset: Dataset) -> str | None:
    """The shares of the sources, for a run's identity. None for a single source."""
    return dataset.weights if isinstance(dataset, Mixture) else None


class Validation:
    """Validation data: one split, or a split of its own for each source of a mixture."""

    def __init__(self, dataset: Dataset):
        self.splits: dict[str, TokenDataset] = {}
        self.shares: dict[str, float] = {}
        if isinstance(dataset, Mixture):
            names = [f"val {name}" for name in dataset.names]
            self.splits = dict(zip(names, dataset.datasets, strict=True))
            self.shares = dict(zip(names, dataset.shares, strict=True))
        else:
            self.splits, self.shares = {"val": dataset}, {"val": 1.0}

    def rows(self, split: str, seq_len: int, tokens: int) -> np.ndarray:
        """Window ids (n, 1) of a split: its share of `tokens`, at least one window. 0: all."""
        windows = self.splits[split].n_windows(seq_len)
        if tokens:
            windows = min(windows, max(1, int(tokens * self.shares[split]) // seq_len))
        return np.arange(windows)[:, None]

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Loss per token in nats, perplexity and, if the text's size is known, bits per byte; for a
        mixture also the loss of each source, of which the first three are the weighted means.

        sums: "nll" and "tokens", after the name of the split where it is not "val".
        """
        losses, loss, n_bytes = {}, 0.0, 0.0
        for split, dataset in self.splits.items():
            prefix = "" if split == "val" else f"{split} "
            own = sums[f"{prefix}nll"] / sums[f"{prefix}tokens"]
            losses[f"val_loss_{split.removeprefix('val ')}"] = own
            loss += self.shares[split] * own
            n_bytes += self.shares[split] * (dataset.n_bytes or math.nan) / dataset.n_tokens
        metrics = {"val_loss": loss, "val_perplexity": perplexity(loss, 1)}
        if math.isfinite(n_bytes):
            metrics["val_bits_per_byte"] = bits_per_byte(loss, n_bytes)
        return metrics | (losses if len(losses) > 1 else {})


def epochs_of(dataset: Dataset, tokens: int) -> list[tuple[str, TokenDataset, float, float]]:
    """The name of each source, its tokens, its share, and how often a run of `tokens` repeats
    them."""
    if not isinstance(dataset, Mixture):
        return [("", dataset, 1.0, tokens / dataset.n_tokens)]
    sources = zip(dataset.names, dataset.datasets, dataset.shares, strict=True)
    return [(name, each, share, share * tokens / each.n_tokens) for name, each, share in sources]


def banner(spec: str, train: Dataset, val: Dataset, left_out: str, tokens: int) -> dict[str, str]:
    """Lines about the data of a run of `tokens` tokens."""
    lines = {}
    held_out = f"{val.n_tokens:,} held out{left_out}"
    sources = epochs_of(train, tokens)
    for name, dataset, share, epochs in sources:
        text = f"{dataset.n_tokens:,} tokens to train on ({epochs:.2f} epochs)"
        if not name:
            return {"data": f"{spec}: {text}, {held_out}"}
        lines[f"data, {name}"] = f"{100 * share:.3g}% of the windows: {text}"
    return {"data": f"{len(sources)} sources, {train.n_tokens:,} tokens, {held_out}"} | lines


def repeated(train: Dataset, tokens: int) -> tuple[str, ...]:
    """A warning for each source of a mixture that a run of `tokens` tokens repeats too often."""
    return tuple(
        f"{name} is repeated {epochs:.1f} times: beyond {MOST_EPOCHS} epochs the same text teaches "
        "less and less; give it a lower weight, or more text"
        for name, _, _, epochs in epochs_of(train, tokens)
        if name and epochs > MOST_EPOCHS
    )
