"""GPT-2: embeddings, blocks, attention, loss and initialization. The file to read first.

Parameters have the hub's names (`transformer.h.0.attn.c_attn.weight`), so a checkpoint maps onto
the model name by name. Only the four matrices of a block are stored transposed there. The model
receives its operations (kernels/ops.py) and what precedes the text (Past) from outside, so this
file knows nothing of kernels, caches or adapters.
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

# Takes keys and values (B, n_head, T, head_dim) of new tokens, returns all that they attend to.
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Past(Protocol):
    """What precedes the tokens of a call: nothing, a KV cache, alternatives (decoding/cache.py) or
    a trained prefix (adapters/layers.py)."""

    @property
    def length(self) -> int:
        """How many positions precede the tokens."""

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions of the T tokens: (T,), (B, T), or a shape that broadcasts to these."""

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """(B or 1, 1, T, length + T) bool, True where a token attends; None for plain causal."""

    def extension(self, layer: int) -> Extend:
        """The function that prepends this layer's past keys and values to the tokens' own."""

    def advance(self, T: int) -> None:
        """Count T more positions; called when all layers have read the tokens."""


class NoPast:
    """The Past of a text that the model reads from its beginning."""

    length = 0

    def positions(self, T: int, device: torch.device) -> Tensor:
        """(T,): 0, 1, 2 and so on."""
        return torch.arange(T, device=device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """None (plain causal) unless documents are kept apart."""
        return None if segments is None else causal_mask(T, segments, device)

    def extension(self, layer: int) -> Extend:
        """Every layer attends to the tokens only."""
        return no_extension

    def advance(self, T: int) -> None:
        """Nothing is kept."""


NO_PAST = NoPast()


def no_extension(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The Extend of a layer without a past. Attention compares with it to take a faster path."""
    return k, v


def causal_mask(T: int, segments: Tensor | None, device: torch.device, length: int = 0) -> Tensor:
    """(B or 1, 1, T, length + T): each token attends to the `length` positions of the past and to
    the tokens up to itself; with segments (B, T), only to equal ones (length is then 0)."""
    key = torch.arange(length + T, device=device)
    mask = (key <= key[length:, None])[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    return mask[:, None]


class Linear(nn.Linear):
    """Training uses the chosen product (FP8, for one), and evaluation always PyTorch's."""

    def __init__(self, ops: Ops, width_in: int, width_out: int):
        super().__init__(width_in, width_out)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x times the weight, plus the given bias. Some kernels pass none and add it later."""
        return (self.ops.linear if self.training else F.linear)(x, self.weight, bias)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

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
        query_index: Tensor | None,
    ) -> Tensor:
        """x (B, T, n_embd) to the same shape; with query_index (B,), to (B, 1, n_embd)."""
        dropout = self.dropout if self.training else 0.0
        if self.ops.packed_attention and mask is None and extend is no_extension:
            qkv = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1)
            y = self.ops.packed_attention(qkv, segments, dropout)  # (B, T, n_head, head_dim)
        else:
            q, k, v = self.ops.split_heads(self.c_attn.product, x, self.c_attn.bias, self.n_head)
            if query_index is not None:
                q = pick(q.transpose(1, 2), query_index).transpose(1, 2)
            y = self.ops.attention(q, *extend(k, v), mask, dropout).transpose(1, 2)
        return self.resid_dropout(self.c_proj(y.flatten(2)))


class MLP(nn.Module):
    """The feed-forward half of a block: four times wider inside, with a GELU between."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ops = ops
        self.c_fc = Linear(ops, config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(ops, 4 * config.n_embd, config.n_embd)
        self.dropout = ops.dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, n_embd) to the same shape."""
        h = self.ops.linear_gelu(self.c_fc.product, x, self.c_fc.bias)
        return self.dropout(self.c_proj(h))


class LayerNorm(nn.LayerNorm):
    """Adds a branch to the residual stream and normalizes the sum, as one operation."""

    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__(config.n_embd, eps=config.layer_norm_epsilon)
        self.ops = ops

    def forward(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch and its layer norm, both (B, T, n_embd)."""
        return self.ops.add_norm(x, branch, self.weight, self.bias, self.eps)


class Block(nn.Module):
    """Attention and MLP. Each output (branch) is added to the residual stream by the next norm."""

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
        extend: Extend = no_extension,
        query_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns the residual stream x and the branch that is still to be added to it,
        both (B, T, n_embd). With query_index (B,), returns that position only: (B, 1, n_embd)."""
        x, h = self.ln_1(x, branch)
        branch = self.attn(h, mask, segments, extend, query_index)
        if query_index is not None:
            x = pick(x, query_index)
        x, h = self.ln_2(x, branch)
        return x, self.mlp(h)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """One position of each row: x (B, T, ...) and index (B,) to (B, 1, ...)."""
    return x[torch.arange(len(x), device=x.device), index].unsqueeze(1)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with its language-model head.

    model(idx)                            logits (B, T, vocab_size)
    model(idx, targets)                   loss of each target (B, T), fp32, 0 where it is -100
    model(idx, targets, reduction="sum")  the sum of these losses, an fp32 scalar, for training
    """

    def __init__(self, config: GPTConfig, ops: Ops | None = None):
        """`ops`: the operations to compute with; by default those that the config names."""
        super().__init__()
        self.config = config
        self.ops = ops = ops or ops_of(config)
        self.prefix: nn.Module | None = None  # trained positions before the text (adapters/layers)
        self.heads = nn.ModuleDict()  # a classifier's heads, by task (adapters/heads.py)
        # Left empty here: padding rows must draw no random numbers.
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
            nn.init.normal_(self.transformer.wte.weight[: config.vocab_size])  # nn.Embedding's own
        self.zero_padding()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # A block adds to the residual stream twice: its variance must not grow with depth.
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(parameter[: self.rows_of(name)], std=std)

    def rows_of(self, name: str) -> int | None:
        """How many rows of a parameter are real ones, not padding; None: all of them."""
        table = name in ("transformer.wte.weight", "lm_head.weight")
        return self.config.vocab_size if table else None

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Zero the padding rows: without gradients they stay out of decay, norms and sums."""
        for name, parameter in self.named_parameters():
            if (rows := self.rows_of(name)) is not None:
                parameter[rows:] = 0

    @property
    def head_weight(self) -> Tensor:
        """The output head (padded_vocab_size, n_embd): the token embedding unless it is untied."""
        return self.transformer.wte.weight if self.config.tied_head else self.lm_head.weight

    @property
    def context(self) -> int:
        """How many tokens of text fit: block_size less the positions that a prefix takes."""
        return self.config.block_size - (self.prefix.length if self.prefix is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        """Format of the blocks' weights, which engine/precision.py may cast, and of the stream."""
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
        """idx and targets (B, T) int64; segments (B, T) int: attention stays within equal numbers.
        The class docstring lists what is returned."""
        x = self.hidden(idx, segments=segments, past=past)
        if targets is None:
            return self.logits(x)
        if reduction == "sum":
            states, flat = x.flatten(0, 1), targets.flatten()
            return self.ops.loss(states, self.head_weight, flat, self.config.vocab_size)
        logits = self.logits(x).float().transpose(1, 2)  # (B, vocab_size, T)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction=reduction)

    def hidden(
        self,
        idx: Tensor,
        *,
        segments: Tensor | None = None,
        past: Past | None = None,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, n_embd) after the last layer norm. Raises UserError past block_size.

        With query_index (B,), only that position of each row: (B, 1, n_embd). The last block then
        computes little more than keys and values for the other positions.
        """
        past = past or (NO_PAST if self.prefix is None else self.prefix.past(self))
        T = idx.shape[1]
        positions = past.positions(T, idx.device)
        end = past.length + positions.shape[-1]
        if end > (limit := self.config.block_size):
            raise UserError(f"a sequence of {end} tokens is longer than block_size {limit}")
        blocks = self.transformer.h
        unmasked = self.ops.masks_segments and past is NO_PAST
        mask = None if unmasked else past.mask(T, segments, idx.device)
        x, branch = self.embed(idx, positions), None
        for layer, block in enumerate(blocks):
            inputs = (x, branch, mask, segments, past.extension(layer), None)
            if query_index is not None and layer == len(blocks) - 1:
                last_mask = query_mask(query_index, T, segments, past)
                inputs = (x, branch, last_mask, None, past.extension(layer), query_index)
            if self.config.recompute and self.training:
                # The weights may be copies (engine/precision.py): recompute with the same ones.
                again = functools.partial(functional_call, block, dict(block.named_parameters()))
                x, branch = checkpoint(again, inputs, use_reentrant=False)
            else:
                x, branch = block(*inputs)
        if query_index is not None and not blocks:
            x = pick(x, query_index)
        past.advance(T)
        return self.transformer.ln_f(x, branch)[1]

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        """The residual stream (B, T, n_embd) before the first block."""
        parts = self.transformer
        return parts.drop(parts.wte(idx) + parts.wpe(positions)).to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size); the padding's are cut off."""
        return F.linear(x, self.head_weight.to(x.dtype))[..., : self.config.vocab_size]

    def n_params(self) -> int:
        """How many parameters the model has, the vocabulary's padding not counted."""
        return sum(p[: self.rows_of(name)].numel() for name, p in self.named_parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """FLOPs of a forward and backward pass: 6N + 12 L d T (Chowdhery et al. 2022, app. B).
        N leaves out the position table and an untied token embedding, which multiply nothing."""
        tables = self.config.block_size + (0 if self.config.tied_head else self.config.vocab_size)
        n = self.n_params() - tables * self.config.n_embd
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * seq_len

    @classmethod
    def from_pretrained(cls, where: str | Path, **overrides: Any) -> GPT:
        """Load a model from a hub id, a folder in the hub's GPT-2 layout, or nanoGPT's ckpt.pt.

        `overrides` replace fields of GPTConfig that the weights do not fix (dropout, recompute,
        attention). Raises UserError if there is no such model or it is not a GPT-2.
        """
        config, tensors = read_model(where)
        with torch.device("meta"):  # skips initialization: the weights come from the file
            model = cls(GPTConfig(**{**config, **overrides}))
        model.to_empty(device="cpu")
        copy_weights(model.weights(), tensors, where)
        model.zero_padding()
        return model

    def weights(self) -> dict[str, Tensor]:
        """Views of the parameters by the hub's names, without padding and classifier heads."""
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

        `eot` is the end-of-text id. With `score` (n_labels, n_embd) and its `labels` the folder
        holds a GPT2ForSequenceClassification, which classifies by the last token.
        """
        tensors = {name: t.to("cpu", torch.float32) for name, t in self.weights().items()}
        score = None if score is None else score.detach().to("cpu", torch.float32).contiguous()
        write_model(Path(folder), self.config, tensors, eot, score, labels)


def query_mask(index: Tensor, T: int, segments: Tensor | None, past: Past) -> Tensor:
    """The mask (B, 1, 1, keys) of one query in each row, at position index (B,)."""
    mask = past.mask(T, segments, index.device)
    mask = causal_mask(T, None, index.device, past.length) if mask is None else mask
    return pick(mask.expand(len(index), -1, -1, -1).transpose(1, 2), index).transpose(1, 2)
