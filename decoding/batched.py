"""Text from a model by every decoding method: sampling, greedy, beam, contrastive, minimum Bayes
risk, ensemble."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from decoding.fixed import FixedDecoder
from decoding.options import DecodeConfig, check_decode
from decoding.sampling import OnToken, PromptRow, SamplingDecoder, inference
from decoding.search import Contrastive, beam_search
from decoding.similarity import pairwise_chrf
from decoding.window import Stop
from model import GPT
from text.tokenizer import Tokenizer

# Rows of a batch when each prompt gets several candidate texts: this bounds the KV cache.
CANDIDATES_AT_ONCE = 64


@torch.inference_mode()
def generate(  # noqa: PLR0913 (all but five have defaults)
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
    fixed: FixedDecoder | None = None,
) -> list[list[int]]:
    """The continuation of each prompt (token ids). It ends before `eot`, with the last line asked
    for, or after `max_new_tokens`.

    `on_token(row, token)` is called for each token as it is chosen. Methods that compare whole
    texts (beam, mbr, ensemble) call it when all texts are done.

    `rows` numbers the prompts (default 0, 1, ...). A row's random draws depend on (seed, number)
    alone, so row i of a batch equals `generate(model, [prompts[i]], ..., rows=[i])`.

    Ids from `vocab_size` on (default: the smaller of the tokenizer's and the model's) are never
    chosen.
    `stop_lines` gives each row its own number of lines, in place of `options.stop_lines`. Counting
    lines, mbr and ensemble need the `tokenizer`. Past the model's context the window slides: see
    Window. `fixed` decodes with its compiled steps, sampling and greedily only. Raises UserError
    for an empty prompt and for invalid options.
    """
    check_decode(options)
    if not prompts:
        return []
    known = tokenizer.vocab_size if tokenizer else model.config.vocab_size
    vocab_size = vocab_size or min(known, model.config.vocab_size)
    decoder = Decoder(model, options, eot, seed, vocab_size, tokenizer)
    names = map(str, rows if rows is not None else range(len(prompts)))
    lines = stop_lines if stop_lines is not None else [options.stop_lines] * len(prompts)
    prompt_rows = [PromptRow(*row) for row in zip(prompts, names, lines, strict=True)]
    with inference(model, compiled=fixed is not None):
        if fixed is not None:
            stop = Stop(eot, lines, tokenizer)
            return fixed.texts(prompt_rows, options, stop, seed, vocab_size, on_token)
        return decoder.texts(prompt_rows, on_token)


class Decoder(SamplingDecoder):
    """One call of `generate`: its model and options, and a method for each way of decoding."""

    def texts(self, rows: Sequence[PromptRow], on_token: OnToken | None) -> list[list[int]]:
        """The continuation of each row, by the decoding method of the options."""
        decode = self.options.decode
        if decode in ("sample", "greedy"):
            return self.sampled(rows, on_token)
        if decode == "contrastive":
            return self.contrastive(rows, on_token)
        if decode == "beam":
            texts = [beams[0] for beams in self.beams(rows, self.options.beams)]
        else:
            texts = self.minimum_bayes_risk(rows)
        if on_token:
            for row, text in enumerate(texts):
                for token in text:
                    on_token(row, token)
        return texts

    def contrastive(
        self, rows: Sequence[PromptRow], on_token: OnToken | None = None
    ) -> list[list[int]]:
        """The continuation of each row by contrastive search: see `search.Contrastive`."""
        window = self._window(rows, alternatives=min(self.options.contrastive_k, self.vocab_size))
        return self._extend(window, Contrastive(window, self.options), rows, on_token)

    def beams(self, rows: Sequence[PromptRow], count: int) -> list[list[list[int]]]:
        """The `count` best texts of each row by beam search, best first."""
        window = self._window([row for row in rows for _ in range(count)])
        return beam_search(window, self.options, count, self._stop(rows))

    def minimum_bayes_risk(self, rows: Sequence[PromptRow]) -> list[list[int]]:
        """Each row's candidate with the least Bayes risk: see `least_risk`. Raises ValueError
        without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("comparing texts needs the tokenizer; pass tokenizer=...")
        at_once = max(1, CANDIDATES_AT_ONCE // self.options.candidates)
        batches = [rows[begin : begin + at_once] for begin in range(0, len(rows), at_once)]
        return [
            least_risk(texts, self.tokenizer)
            for batch in batches
            for texts in self._candidates(batch)
        ]

    def _candidates(self, rows: Sequence[PromptRow]) -> list[list[list[int]]]:
        options = self.options
        if options.decode == "mbr":
            make = self.beams if options.candidates_by == "beam" else self._samples
            return make(rows, options.candidates)
        samples = self._samples(rows, options.candidates - options.beams - 1)
        beams = self.beams(rows, options.beams)
        return [[*s, c, *b] for s, c, b in zip(samples, self.contrastive(rows), beams, strict=True)]

    def _samples(self, rows: Sequence[PromptRow], count: int) -> list[list[list[int]]]:
        """`count` samples for each row. Their draws depend on the row's name and their number."""
        texts = self.sampled(
            [row._replace(name=f"{row.name} {i}") for row in rows for i in range(count)]
        )
        return [texts[begin : begin + count] for begin in range(0, len(texts), count)]


def least_risk(texts: Sequence[list[int]], tokenizer: Tokenizer) -> list[int]:
    """The text with the highest mean chrF against all others as references.

    This is minimum Bayes risk decoding (Kumar and Byrne 2004), with the risk estimated from the
    candidates themselves.
    """
    utility = pairwise_chrf([tokenizer.decode(text, skip_special=True) for text in texts])
    return texts[int((utility.sum(1) - utility.diagonal()).argmax())]
