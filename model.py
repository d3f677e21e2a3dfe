"""GPT-2: embeddings, blocks, attention, loss, and how the weights begin. The file to read first.

Parameter names are the hub's (`transformer.h.0.attn.c_attn.weight`), so a checkpoint maps onto the
model name by name; only the four matrices of a block are stored transposed there. The model is
given its operations (kernels/ops.py) and what comes before the text (Past), so that nothing here
knows a kernel, a cache or an adapter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from config import GPTConfig, UserError
from kernels.linear_cross_entropy import IGNORE
from kernels.ops import Ops, ops_of
from storage.hub import copy_weights, read_model, write_model

# new keys and values (B, n_head, T, head_dim) in; those that the new queries may look at out
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Past(Protocol):
    """What comes before the tokens of a call: nothing, a KV cache, alternatives (decoding/cache.py)
    or a trained prefix (adapters/layers.py)."""

    @property
    def length(self) -> int:
        """Positions before the tokens."""

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Where T tokens stand: (T,), (B, T), or anything that broadcasts to them."""

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, length + T), True where a token may look; None for plain causal."""

    def at(self, layer: int) -> Extend:
        """What puts the keys and values of a layer before those of the tokens."""

    def advance(self, T: int) -> None:
        """Called when all layers have read the tokens."""


class Nothing:
    """The Past of a text that the model reads from its beginning."""

    length = 0

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(T, device=device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        return None if segments is None else causal_mask(T, segments, device)

    def at(self, layer: int) -> Extend:
        return alone

    def advance(self, T: int) -> None:
        pass


NOTHING = Nothing()


def alone(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def causal_mask(T: int, segments: Tensor | None, device: torch.device, length: int = 0) -> Tensor:
    """(B or 1, 1, T, length + T): each of T tokens sees the `length` positions before them and the
    tokens up to itself; with segments (B, T), where length is 0, only those of its own number."""
    key = torch.arange(length + T, device=device)
    mask = (key <= key[length:, None])[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask[:, None]


class Linear(nn.Linear):
    """x (..., in) to (..., out)."""

    def __init__(self, ops: Ops, width_in: int, width_out: int):
        super().__init__(width_in, width_out)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return (self.ops.linear if self.training else F.linear)(x, self.weight, bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(ops, config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(ops, config.n_embd, config.n_embd)
        self.resid_dropout = ops.dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        segments: Tensor | None,
        extend: Extend,
        at: Tensor | None,
    ) -> Tensor:
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if self.ops.packed_attention and mask is None and extend is alone:
            y = self.ops.packed_attention(qkv, segments, dropout)  # (B, T, n_head, head_dim)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_dim)
            if at is not None:
                q = pick(q.transpose(1, 2), at).transpose(1, 2)
            y = self.ops.attention(q, *extend(k, v), mask, dropout).transpose(1, 2)
        return self.resid_dropout(self.c_proj(y.reshape(B, -1, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(ops, config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(ops, 4 * config.n_embd, config.n_embd)
        self.dropout = ops.dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ops.linear_gelu(self.c_fc.product, x, self.c_fc.bias)
        return self.dropout(self.c_proj(h))


class LayerNorm(nn.LayerNorm):
    """The layer norm of the residual stream, which first adds a branch to it: one pass for both."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__(config.n_embd, eps=config.layer_norm_epsilon)
        self.ops = ops

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch (B, T, n_embd) and its norm."""
        return self.ops.add_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention and MLP. What each adds to the residual stream is added when the next norm reads
    it."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ln_1 = LayerNorm(config, ops)
        self.attn = Attention(config, ops)
        self.ln_2 = LayerNorm(config, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        extend: Extend = alone,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns the residual stream (B, T, n_embd) and the branch to add to it.

        With `at` (B,) it returns these positions alone, (B, 1, n_embd); `mask` is then theirs.
        """
        x, h = self.ln_1(x, branch)
        branch = self.attn(h, mask, segments, extend, at)
        if at is not None:
            x = pick(x, at)
        x, h = self.ln_2(x, branch)
        return x, self.mlp(h)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """x (B, T, ...) at one position of each row, `at` (B,): (B, 1, ...)."""
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with its language-model head.

    model(idx)                            logits (B, T, vocab_size)
    model(idx, targets)                   loss of each target (B, T), fp32, 0 where it is -100
    model(idx, targets, reduction="sum")  their sum, one fp32 scalar: the training path
    """

    def __init__(self, config: GPTConfig, ops: Ops | None = None):
        """ops: what to compute with; default: the operations that the config names."""
        super().__init__()
        self.config = config
        self.ops = ops = ops or ops_of(config)
        # Trained positions before the text: a module with `length`, `past(model)` and
        # `layers(model)` (adapters/layers.py).
        self.prefix: nn.Module | None = None
        self.heads = nn.ModuleDict()  # of a classifier, by task (adapters/heads.py)
        # Drawn below, since only the rows that are not padding are drawn.
        table = torch.empty(config.padded_vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding.from_pretrained(table, freeze=False),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=ops.dropout(config.dropout),
                h=nn.ModuleList(Block(config, ops) for _ in range(config.n_layer)),
                ln_f=LayerNorm(config, ops),
            )
        )
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.scaled_init:
            self._init_weights()
        else:
            nn.init.normal_(self.transformer.wte.weight[: config.vocab_size])  # as nn.Embedding
        self.zero_padding()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds twice to the residual stream: its variance must not grow with
                # depth.
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter[: self.rows_of(name)], std=std)

    def rows_of(self, name: str) -> int | None:
        """How many rows of a parameter are the model's and not padding; None for all of them."""
        table = name in ("transformer.wte.weight", "lm_head.weight")
        return self.config.vocab_size if table else None

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Padding rows get no gradient, so zeroing them once keeps them out of decay, norms and
        checksums."""
        for name, parameter in self.named_parameters():
            if (rows := self.rows_of(name)) is not None:
                parameter[rows:] = 0

    @property
    def head_weight(self) -> Tensor:
        """(padded_vocab_size, n_embd)"""
        return self.transformer.wte.weight if self.config.tied_head else self.lm_head.weight

    @property
    def context(self) -> int:
        """Tokens of text that the positions have room for: all but a prefix's."""
        return self.config.block_size - (self.prefix.length if self.prefix is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' weights (engine/precision.py may cast them) and the residual stream."""
        first = self.transformer.h[0].mlp.c_fc if len(self.transformer.h) else self.transformer.wte
        return first.weight.dtype

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "none",
        segments: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """idx (B, T) int64; targets (B, T) int64; segments (B, T) int: attention stays within equal
        numbers."""
        x = self.hidden(idx, segments=segments, past=past)
        if targets is None:
            return self.logits(x)
        if reduction == "sum":
            rows, of = x.flatten(0, 1), targets.flatten()
            return self.ops.loss(rows, self.head_weight, of, self.config.vocab_size)
        logits = self.logits(x).float()
        return F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction=reduction
        )

    def hidden(
        self,
        idx: Tensor,
        *,
        segments: Tensor | None = None,
        past: Past | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last layer norm (B, T, n_embd). Raises UserError past block_size.

        `at` (B,): the states of these positions alone, (B, 1, n_embd), for which the last block
        computes little more than keys and values of the others.
        """
        past = past or (NOTHING if self.prefix is None else self.prefix.past(self))
        T = idx.shape[1]
        positions = past.positions(T, idx.device)
        end = past.length + positions.shape[-1]
        if end > self.config.block_size:
            raise UserError(
                f"a sequence of {end} tokens is longer than block_size {self.config.block_size}"
            )
        parts, blocks = self.transformer, self.transformer.h
        x = parts.drop(parts.wte(idx) + parts.wpe(positions)).to(self.dtype)
        unmasked = self.ops.masks_segments and past is NOTHING
        mask = None if unmasked else past.mask(T, segments, idx.device)
        branch = None
        for layer, block in enumerate(blocks):
            inputs = (x, branch, mask, segments, past.at(layer))
            if at is not None and layer == len(blocks) - 1:
                inputs = (x, branch, mask_at(at, T, segments, past), None, past.at(layer), at)
            if self.config.recompute and self.training:
                # The backward pass must see these very weights: they may be stand-ins
                # (engine/precision.py).
                again = functools.partial(functional_call, block, dict(block.named_parameters()))
                x, branch = checkpoint(again, inputs, use_reentrant=False)
            else:
                x, branch = block(*inputs)
        if at is not None and not blocks:
            x = pick(x, at)
        past.advance(T)
        return parts.ln_f(x, branch)[1]

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size), without the padding's."""
        return F.linear(x, self.head_weight.to(x.dtype))[..., : self.config.vocab_size]

    def n_params(self) -> int:
        """Parameters of the exact model: the vocabulary's padding is not counted."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        tables = 1 if self.config.tied_head else 2
        return sum(p.numel() for p in self.parameters()) - tables * padding

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward, 6N + 12 L d T, N without the position table (Chowdhery et al. 2022,
        app. B)."""
        tables = self.config.block_size + (0 if self.config.tied_head else self.config.vocab_size)
        n = self.n_params() - tables * self.config.n_embd
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * seq_len

    @classmethod
    def from_pretrained(cls, where: str | Path, **overrides: Any) -> GPT:
        """A model from a hub id, a folder in the hub's GPT-2 layout, or nanoGPT's ckpt.pt.

        `overrides` replace fields of GPTConfig that the weights do not fix (dropout, recompute,
        attention). Raises UserError where there is no such model or it is not a GPT-2.
        """
        config, tensors = read_model(where)
        with torch.device("meta"):  # the weights come from the file: nothing to initialise
            model = cls(GPTConfig(**{**config, **overrides}))
        model.to_empty(device="cpu")
        copy_weights(model.weights(), tensors, where)
        model.zero_padding()
        return model

    def weights(self) -> dict[str, Tensor]:
        """Views of the parameters by the hub's names, without the vocabulary's padding."""
        return {
            name: parameter.detach()[: self.rows_of(name)]
            for name, parameter in self.named_parameters()
            if not name.startswith("heads.")
        }

    def save_pretrained(
        self,
        folder: str | Path,
        eot: int | None = None,
        score: Tensor | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        """Write config.json and model.safetensors (fp32) in the hub's layout.

        eot: the end-of-text id. With `score` (n_labels, n_embd) it is a classifier by the last
        token, GPT2ForSequenceClassification.
        """
        tensors = {name: t.to("cpu", torch.float32) for name, t in self.weights().items()}
        score = None if score is None else score.detach().to("cpu", torch.float32).contiguous()
        write_model(Path(folder), self.config, tensors, eot, score, labels)


def mask_at(at: Tensor, T: int, segments: Tensor | None, past: Past) -> Tensor:
    """The mask (B, 1, 1, keys) of one query of each row, at `at` (B,)."""
    mask = past.mask(T, segments, at.device)
    if mask is not None:
        return pick(mask.expand(len(at), -1, -1, -1).transpose(1, 2), at).transpose(1, 2)
    keys = torch.arange(past.length + T, device=at.device)
    return (keys <= past.length + at[:, None])[:, None, None]
