"""A translation model of transformers, for tools.backtranslate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from base.errors import reason
from config import UserError
from engine.processes import choose_device


class Translator:
    """A sequence-to-sequence model of transformers, from one language to another."""

    def __init__(self, where: str, option: str, beams: int, max_tokens: int, device: str):
        """Loads the model in fp32. option: the option that named it, for errors. Raises UserError
        if it cannot be loaded."""
        try:
            from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, logging
        except ImportError:
            raise UserError(
                "translating needs transformers: pip install transformers sentencepiece"
            ) from None
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(where)
            model = AutoModelForSeq2SeqLM.from_pretrained(where, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"{option} {where} is not a translation model that can be loaded here: "
                f"{reason(error)}"
            ) from None
        self.model, self.beams = model.eval().to(choose_device(device)), beams
        room = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, room, self.tokenizer.model_max_length)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The lengths of texts in tokens."""
        return (
            [len(ids) for ids in self.tokenizer(list(texts), verbose=False).input_ids]
            if texts
            else []
        )

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> list[str | None]:
        """The translations of texts. None for a text of more than `max_tokens` tokens, and for a
        translation that does not end within as many."""
        fits = [n for n, length in enumerate(self.lengths(texts)) if length <= self.max_tokens]
        found: list[str | None] = [None] * len(texts)
        if not fits:
            return found
        inputs = self.tokenizer([texts[n] for n in fits], padding=True, return_tensors="pt").to(
            self.model.device
        )
        ids = self.model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=self.max_tokens,
            num_beams=self.beams,
            do_sample=False,
        )
        # The first token starts the decoder. An end in the last place does not count: generate may
        # have forced it at the length limit.
        ended = (ids[:, 1 : self.max_tokens] == self.tokenizer.eos_token_id).any(1).tolist()
        for n, end, text in zip(
            fits, ended, self.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True
        ):
            found[n] = text.strip() if end and text.strip() else None
        return found
