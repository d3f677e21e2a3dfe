"""Ensembles of runs: averages their predictions for the same rows, or lets them vote.

python -m tools.ensemble runs/*/validation.jsonl --out ensemble.jsonl
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from base.cli import entry_point, parse
from base.console import outlive
from config import PathOrName, Positional, UserError, Weight
from tools.predictions import UNKNOWN, Predictions, check_out, read_predictions, show_table

How = Literal["mean", "geometric", "vote"]


@dataclass(frozen=True)
class EnsembleConfig:
    """Combine the predictions of several runs for the same rows."""

    files: Annotated[tuple[PathOrName, ...], Positional("FILE ...")] = ()
    """Two or more files of predictions: the runs' validation.jsonl, or their predictions.jsonl."""
    out: PathOrName = ""
    """File to write the ensemble's predictions to, in the same format."""
    how: How = "mean"
    """mean: the mean of the probabilities. geometric: the mean of their logarithms, in which a
    confident run counts more. vote: the label that most runs predict, and in a tie the likelier
    one. A label's probability is then its fraction of the votes."""
    weights: tuple[Weight, ...] = ()
    """Weight of each run, in the order of the files. Default: 1 for all."""


def combine(
    members: Sequence[Predictions], weights: Sequence[float], how: How
) -> tuple[np.ndarray, np.ndarray]:
    """The ensemble's probabilities (n, K) float64, and the labels it predicts (n,) int64."""
    shares = np.array(weights) / sum(weights)
    probabilities = np.stack([member.probabilities for member in members])
    mean = np.einsum("m,mnk->nk", shares, probabilities)
    if how == "mean":
        return mean, mean.argmax(1)
    if how == "geometric":
        logs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
        log_p = np.einsum("m,mnk->nk", shares, logs)
        p = np.exp(log_p - log_p.max(1, keepdims=True))
        return p / p.sum(1, keepdims=True), log_p.argmax(1)
    one_hot = np.eye(probabilities.shape[2])
    votes = np.einsum("m,mnk->nk", shares, one_hot[[member.predicted for member in members]])
    most = np.isclose(votes, votes.max(1, keepdims=True))
    return votes, np.where(most, mean, -1).argmax(1)


def write(path: Path, run: Predictions, probabilities: np.ndarray, predicted: np.ndarray) -> None:
    """Write the rows of `run` with the ensemble's predictions."""
    with path.open("w", encoding="utf-8") as file:
        for fields, p, label in zip(run.fields, probabilities.tolist(), predicted, strict=True):
            answer: dict[str, Any] = {"prediction": None, "probabilities": None}
            if label != UNKNOWN:
                answer = {
                    "prediction": run.labels[label],
                    "probabilities": dict(zip(run.labels, p, strict=True)),
                }
            file.write(json.dumps(fields | answer, ensure_ascii=False) + "\n")


def main() -> None:
    """Run the command."""
    cfg = parse(EnsembleConfig, sys.argv[1:])
    outlive()
    if len(cfg.files) < 2:
        raise UserError(
            "an ensemble needs two runs or more; type python -m tools.ensemble A.jsonl B.jsonl "
            "--out FILE"
        )
    weights = cfg.weights or (1.0,) * len(cfg.files)
    if (
        len(weights) != len(cfg.files)
        or not all(0 <= weight < math.inf for weight in weights)
        or not sum(weights)
    ):
        raise UserError(
            f"--weights: give {len(cfg.files)} numbers, one for each file, none below 0 and not "
            "all 0"
        )
    out = check_out(cfg.out, cfg.files)
    members = read_predictions(cfg.files)
    probabilities, predicted = combine(members, weights, cfg.how)
    unread = (np.stack([member.predicted for member in members]) == UNKNOWN).any(0)
    predicted = np.where(unread, UNKNOWN, predicted)
    if unread.any():
        print(
            f"{unread.sum():,} of {len(unread):,} rows could not be read by one of the runs. The "
            "ensemble does not answer them either"
        )
    write(out, members[0], probabilities, predicted)
    if members[0].known.any():
        scores = [(member.where, *member.scores()) for member in members]
        scores += [(f"{cfg.how} of {len(members)}: {out}", *members[0].scores(predicted))]
        show_table(
            [
                ["", "accuracy", "macro-F1"],
                *([name, f"{a:.4f}", f"{f1:.4f}"] for name, a, f1 in scores),
            ]
        )
    else:
        print(f"{out}: {len(predicted):,} rows without known labels")


if __name__ == "__main__":
    entry_point(main)
