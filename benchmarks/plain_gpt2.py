"""GPT-2 as nanoGPT writes it, for comparison: plain modules under autocast, with the logits of a
whole batch in memory.

The trade-off is the same as nanoGPT's: the code is simple, and all fusion is left to torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from config import GPTConfig


class Attention(nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to the same shape."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C / heads)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """The feed-forward layers, with GPT-2's tanh form of GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to the same shape."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """A transformer block with its layer norms before attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) to the same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    """GPT-2 without dropout. Parameters have the hub's names. The softmax includes every row of the
    padded embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        vocab_size, n_embd = config.padded_vocab_size, config.n_embd
        parts = dict(
            wte=nn.Embedding(vocab_size, n_embd),
            wpe=nn.Embedding(config.block_size, n_embd),
            h=nn.ModuleList(Block(n_embd, config.n_head) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(n_embd),
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """idx, targets (B, T) int64 to the mean loss (). Targets of -100 do not count."""
        parts = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))  # (B, T, vocab_size)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def load_hub(model: nn.Module, folder: str, name_of: Callable[[str], str] = str) -> None:
    """Copy weights in the hub's layout, whose block matrices are transposed, into `model`.
    `name_of` maps a parameter's name to the hub's."""
    tensors = load_file(Path(folder) / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[name_of(name)]
            if ".h." in name and tensor.dim() == 2:
                tensor = tensor.T
            parameter.zero_()  # the padding rows of the vocabulary stay zero
            parameter[: len(tensor)] = tensor
