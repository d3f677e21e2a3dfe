"""A classifier's checkpoint, opened to answer rows."""

from __future__ import annotations

from typing import Literal

import torch

from adapters import heads
from adapters.heads import Head, Info
from config import UserError
from decoding.loading import open_model
from engine.precision import set_products
from engine.processes import choose_device
from model import GPT
from text.tokenizer import Tokenizer


def open_classifier(
    where: str, task: str, device: Literal["auto", "cpu", "cuda", "mps"]
) -> tuple[GPT, Tokenizer, Info]:
    """The model with its head under the name of the task, in fp32 and ready for inference, its
    tokenizer, and what it says of itself. Raises UserError where it is no classifier."""
    found = heads.find(where)
    info = found[0] if found else heads.read_info(where)
    if info is None:
        raise UserError(
            f"{where} is no classifier; train one first, or name a run of finetune.{task}"
        )
    chosen = choose_device(device)
    set_products("fp32", chosen)
    model, tokenizer = open_model(where, None, chosen, torch.float32)
    if found and info.form != "word":
        model.heads[task] = Head(model.config.n_embd, len(info.labels), info.pooling)
        model.heads[task].load_state_dict(found[1])
        model.heads.to(model.transformer.wte.weight.device)
    return model.eval(), tokenizer, info
