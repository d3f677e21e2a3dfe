"""GPT-2 as nanoGPT writes it, for comparison: plain modules under autocast, the logits of a batch
whole.

Its trade-off is the one that its many readers make with it: nothing is special, so torch.compile is
left to find what can be fused.
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
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, C / heads)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT2(nn.Module):
    """Without dropout. Parameters are named as in the hub's layout. Every row of the padded
    embedding is in the softmax."""

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
        """idx, targets (B, T) int64; the mean loss, where targets are not -100."""
        parts = self.transformer
        x = parts.wte(idx) + parts.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))  # (B, T, vocab_size)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def load_hub(model: nn.Module, folder: str, name_of: Callable[[str], str] = str) -> None:
    """Copy weights in the hub's layout, which has the blocks' matrices transposed; `name_of` gives
    the hub's names."""
    tensors = load_file(Path(folder) / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = tensors[name_of(name)]
            if ".h." in name and tensor.dim() == 2:
                tensor = tensor.T
            parameter.zero_()  # the vocabulary's padding stays so
            parameter[: len(tensor)] = tensor
