"""Benchmarks that a run scores at each evaluation: HellaSwag and LAMBADA, as curves over the steps.

The continuations to score are divided into batches once, whatever the number of ranks. Each rank
scores some of the batches, and the scores are gathered. So the figures do not depend on the ranks,
nor on the micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from config import ResolvedTrain, UserError
from decoding.benchmarks import BENCHMARKS, Benchmark, read_rows
from decoding.sampling import inference
from decoding.scoring import Score, Span, group_by_length, score_batch
from engine.data import Vocabulary
from model import GPT

SPLIT = "benchmarks"  # the name of their rows, and of the tensor in a batch of these
# Windows whose tokens fill a batch. Without gradients these take less memory than a micro-batch of
# one window does in training. evaluate.py has the same batches on a CPU.
WINDOWS = 4


class BenchmarksOfRun:
    """The benchmarks of --eval-hellaswag and --eval-lambada. There may be none."""

    spans: list[Span]  # what is to be scored, of all benchmarks
    batches: list[list[int]]  # the same as batches of places in `spans`

    def __init__(self, cfg: ResolvedTrain):
        """Read the rows. Raises UserError for a file that is not of its benchmark, and for options
        that have no effect."""
        self.encoded: list[Benchmark] = []
        self.rows_of = [
            (kind, read_rows(kind, option, where, cfg.eval_rows or None))
            for kind in BENCHMARKS
            for option, where in [(f"--eval-{kind.name}", getattr(cfg, f"eval_{kind.name}"))]
            if where
        ]
        if self.rows_of and not cfg.eval_every:
            raise UserError(
                f"--eval-{self.rows_of[0][0].name} scores a benchmark at each evaluation, but "
                "--eval-every 0 turns them off; leave one of them out"
            )

    def prepare(self, vocabulary: Vocabulary, block_size: int) -> None:
        """Encode the rows. Raises UserError if there is no tokenizer, or for a row that does not
        fit in block_size."""
        if self.rows_of and vocabulary.tokenizer is None:
            raise UserError(
                f"--eval-{self.rows_of[0][0].name} needs the tokenizer of the shards, which is not "
                f"on this machine ({vocabulary.missing}); name it with --tokenizer"
            )
        for kind, rows in self.rows_of:
            assert vocabulary.tokenizer
            try:
                self.encoded.append(kind(vocabulary.tokenizer, rows, block_size))
            except UserError as error:
                raise UserError(f"--eval-{kind.name}: {error}") from None
        self.spans = [span for benchmark in self.encoded for span in benchmark.spans]
        lengths = [len(span.ids) for span in self.spans]
        self.batches = list(group_by_length(lengths, WINDOWS * block_size))

    @property
    def banner(self) -> dict[str, str]:
        """A line with the rows of each benchmark, if there is one."""
        told = [f"{each.name} {each.counts['rows']:,} rows" for each in self.encoded]
        return {"benchmarks": ", ".join(told)} if told else {}

    def rows(self) -> np.ndarray:
        """The numbers of all batches of continuations, each a group of its own (batches, 1)."""
        return np.arange(len(self.batches))[:, None]

    def score(self, model: GPT, numbers: Tensor) -> dict[int, Score]:
        """Score the batches of these numbers. Returns the score of each continuation, by its place
        in `spans`. Nothing is compiled for the lengths of the batches."""
        scores: dict[int, Score] = {}
        with inference(model):
            for chosen in (self.batches[number] for number in numbers.tolist()):
                batch = [self.spans[i] for i in chosen]
                scores |= zip(chosen, score_batch(model, batch), strict=True)
        return scores

    def metrics(self, scores: dict[int, Score]) -> dict[str, float]:
        """The benchmarks' figures, from the scores of all continuations."""
        found: dict[str, Any] = {}
        first = 0
        for benchmark in self.encoded:
            end = first + len(benchmark.spans)
            figures = benchmark.figures(benchmark.results([scores[n] for n in range(first, end)]))
            found |= {f"{benchmark.name}_{name}": figures[name] for name in benchmark.curves}
            first = end
        return found
