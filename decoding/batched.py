"""Text from a model, in every way of decoding: sampled, greedy, beam, contrastive, minimum Bayes
risk, ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.options import DecodeConfig, check_decode
from decoding.sampling import OnToken, Row, Sampled, inference
from decoding.search import Contrastive, beam_search
from decoding.similarity import pairwise_chrf
from model import GPT
from text.tokenizer import Tokenizer

CANDIDATES_AT_ONCE = (
    64  # rows of a batch when several texts are made for each prompt: what bounds their cache
)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    options: DecodeConfig,
    eot: int | None,
    on_token: OnToken | None = None,
    *,
    seed: int = 1337,
    rows: Sequence[int] | None = None,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    stop_lines: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continuation of each prompt (token ids), ended before `eot`, with its last line or after
    `max_new_tokens`.

    `on_token(row, token)` sees each token as it is chosen; where whole texts compete (beam, mbr,
    ensemble), when all are done. `rows` number the prompts (default 0, 1, ...): the draws of a row
    follow from (seed, its number) alone, so row i of a batch equals `generate(model, [prompts[i]],
    ..., rows=[i])`. Ids at and past `vocab_size` (default: the tokenizer's, else the model's) are
    never chosen. `stop_lines` gives each row its own number of lines in place of the options';
    lines, mbr and ensemble take the `tokenizer`. Past the model's context the window slides: see
    Window. Raises UserError for an empty prompt and for options that cannot be.
    """
    check_decode(options)
    if not prompts:
        return []
    vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else model.config.vocab_size)
    decoder = Decoder(model, options, eot, seed, vocab_size, tokenizer)
    names = map(str, rows if rows is not None else range(len(prompts)))
    lines = stop_lines if stop_lines is not None else [options.stop_lines] * len(prompts)
    with inference(model):
        return decoder.texts(
            [Row(*row) for row in zip(prompts, names, lines, strict=True)], on_token
        )


class Decoder(Sampled):
    """What one call of `generate` is to do, and each way of doing it."""

    def texts(self, rows: Sequence[Row], on_token: OnToken | None) -> list[list[int]]:
        """The continuation of each row."""
        decode = self.options.decode
        if decode in ("sample", "greedy"):
            return self.sampled(rows, on_token)
        if decode == "contrastive":
            return self.contrastive(rows, on_token)
        if decode == "beam":
            texts = [beams[0] for beams in self.beams(rows, self.options.beams)]
        else:
            texts = self.most_alike(rows)
        if on_token:
            for row, text in enumerate(texts):
                for token in text:
                    on_token(row, token)
        return texts

    def contrastive(self, rows: Sequence[Row], on_token: OnToken | None = None) -> list[list[int]]:
        """Tokens that are likely and unlike what stands."""
        window = self._window(rows, alternatives=min(self.options.contrastive_k, self.vocab_size))
        return self._extend(window, Contrastive(window, self.options), rows, on_token)

    def beams(self, rows: Sequence[Row], count: int) -> list[list[list[int]]]:
        """For each row the `count` best texts of a beam search, best first."""
        window = self._window([row for row in rows for _ in range(count)])
        return beam_search(window, self.options, count, self._stop(rows))

    def most_alike(self, rows: Sequence[Row]) -> list[list[int]]:
        """Of each row's candidates the one with the least Bayes risk: see `least_risk`."""
        if self.tokenizer is None:
            raise ValueError("to compare texts takes the tokenizer")
        at_once = max(1, CANDIDATES_AT_ONCE // self.options.candidates)
        batches = [rows[begin : begin + at_once] for begin in range(0, len(rows), at_once)]
        return [
            least_risk(texts, self.tokenizer)
            for batch in batches
            for texts in self._candidates(batch)
        ]

    def _candidates(self, rows: Sequence[Row]) -> list[list[list[int]]]:
        options = self.options
        if options.decode == "mbr":
            of = self.beams if options.candidates_by == "beam" else self._samples
            return of(rows, options.candidates)
        samples = self._samples(rows, options.candidates - options.beams - 1)
        beams = self.beams(rows, options.beams)
        return [[*s, c, *b] for s, c, b in zip(samples, self.contrastive(rows), beams, strict=True)]

    def _samples(self, rows: Sequence[Row], count: int) -> list[list[list[int]]]:
        """`count` samples for each row; their draws follow from its name."""
        texts = self.sampled(
            [row._replace(name=f"{row.name} {i}") for row in rows for i in range(count)]
        )
        return [texts[begin : begin + count] for begin in range(0, len(texts), count)]


def least_risk(texts: Sequence[list[int]], tokenizer: Tokenizer) -> list[int]:
    """The text whose chrF against the others, taken for the truth in turns, is highest on average.

    Minimum Bayes risk decoding (Kumar and Byrne 2004), the risk estimated from the candidates
    themselves.
    """
    utility = pairwise_chrf([tokenizer.decode(text, skip_special=True) for text in texts])
    return texts[int((utility.sum(1) - utility.diagonal()).argmax())]
