"""GPT-2, whole: embeddings, blocks, attention, KV cache, loading and saving in the hub's layout.

Parameter names are the hub's (`transformer.h.0.attn.c_attn.weight`), so a checkpoint maps onto the
model name by name; the hub stores the four matrices of a block transposed, and that is the only
difference.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint

from config import GPTConfig, UserError
from kernels.attention import attention as packed_attention
from kernels.bias_gelu import bias_gelu
from kernels.cpu_attention import cpu_attention
from kernels.cross_entropy import cross_entropy
from kernels.dropout import Dropout
from kernels.fp8_linear import fp8_linear
from kernels.layer_norm import add_layer_norm
from kernels.linear_cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from storage.hub import read_model, write_model

__all__ = ["GPT", "GPTConfig", "KVCache"]

# new keys and values in, all of them out
Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class KVCache:
    """Keys and values of every layer for up to `capacity` positions, filled as the model reads
    tokens.

    `pad` (B,) counts the padding tokens at the left of each row: they are never attended to and
    positions begin after them. What a row's text follows, a prefix, stands before the padding.
    GPT.new_cache makes one.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        capacity: int,
        pad: Tensor | None = None,
        prefix: int = 0,
    ):
        self.shape = (batch, config.n_head, capacity, config.n_embd // config.n_head)
        self.capacity = capacity
        self.length = 0  # positions filled
        self.pad = pad
        self.prefix = prefix  # positions that come before the padding
        self.layers: list[tuple[Tensor, Tensor]] = []

    def at(self, layer: int) -> Extend:
        """`extend` of one layer."""
        return functools.partial(self.extend, layer)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, n_head, T, head_dim) to a layer; returns all of its keys and values so
        far."""
        if layer == len(self.layers):
            self.layers.append((k.new_empty(self.shape), v.new_empty(self.shape)))
        end = self.length + k.shape[2]
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, chosen: Tensor) -> None:
        """Of the alternatives that were read, keep one of each row, `chosen` (B,): one position
        more is filled."""
        rows = torch.arange(len(chosen), device=chosen.device)
        for t in (t for pair in self.layers for t in pair):
            t[:, :, self.length] = t[rows, :, self.length + chosen]
        self.length += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep (and repeat) these rows of the batch; where their number stays, only those that
        change are copied."""
        to = [i for i, row in enumerate(rows) if len(rows) != self.shape[0] or row != i]
        if not to:
            return
        self.shape = (len(rows), *self.shape[1:])
        index = torch.tensor([to, [rows[i] for i in to]], device=self.layers[0][0].device)
        self.layers = [(self._select(k, *index), self._select(v, *index)) for k, v in self.layers]
        if self.pad is not None:
            self.pad = self.pad[list(rows)]

    def _select(self, t: Tensor, to: Tensor, source: Tensor) -> Tensor:
        new = t if t.shape == self.shape else t.new_empty(self.shape)
        filled = slice(self.length)
        new[:, :, filled].index_copy_(0, to, t[:, :, filled].index_select(0, source))
        return new


class Prefixed:
    """Stands for a KVCache where nothing is kept: keys and values (1, n_head, P, head_dim) before
    those of each layer."""

    pad = None

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.length = self.prefix = layers[0][0].shape[2]

    def at(self, layer: int) -> Extend:
        return functools.partial(_put_before, *self.layers[layer])


def _put_before(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], -1, -1, -1)
    return torch.cat((keys.expand(shape).to(k.dtype), k), 2), torch.cat(
        (values.expand(shape).to(v.dtype), v), 2
    )


class Linear(nn.Linear):
    """x (..., in) to (..., out); in training its products run in FP8 where the config says so."""

    def __init__(self, config: GPTConfig, width_in: int, width_out: int):
        super().__init__(width_in, width_out)
        self.fp8 = config.fp8

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight, bias)
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.kernels = config.kernels
        self.explicit = config.attention == "explicit"
        self.c_attn = Linear(config, config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config, config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        segments: Tensor | None,
        extend: Extend | None,
        at: Tensor | None,
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        plain = mask is None and extend is None
        if plain and "attention" in self.kernels:
            y = packed_attention(qkv, segments)  # (B, T, n_head, head_dim)
        elif plain and "cpu_attention" in self.kernels:
            y = cpu_attention(qkv, self.dropout if self.training else 0.0)
        else:
            y = self._attend(qkv, mask, extend, at).transpose(1, 2)
        return self.resid_dropout(self.c_proj(y.reshape(B, -1, C)))

    def _attend(
        self, qkv: Tensor, mask: Tensor | None, extend: Extend | None, at: Tensor | None
    ) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, n_head, T, head_dim)
        if at is not None:
            q = pick(q.transpose(1, 2), at).transpose(1, 2)
        if extend is not None:
            k, v = extend(k, v)
        # One new token sees everything before it; several without a mask are a plain causal
        # sequence. In this order: where lengths vary, a compiler makes a symbol of the comparison,
        # and the operation takes a bool alone.
        causal = q.shape[2] > 1 and mask is None
        dropout = self.dropout if self.training else 0.0
        if self.explicit:
            return explicit_attention(q, k, v, mask, causal, dropout)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """Attention with its (T, T) matrix written out: what the fused kernels are measured against."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.triton = "bias_gelu" in config.kernels
        self.c_fc = Linear(config, config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(config, 4 * config.n_embd, config.n_embd)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.triton:
            h = bias_gelu(self.c_fc.product(x), self.c_fc.bias, triton=True)
        else:
            h = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(h))


class Block(nn.Module):
    """Two branches on the residual stream, each added to it as the next norm reads it: one pass for
    both."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.triton = "layer_norm" in config.kernels
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        extend: Extend | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x (B, T, n_embd) and what the block before adds to it; the same of
        this block.

        `at` (B,): of the positions `at` alone, (B, 1, n_embd); `mask` is then that of those
        queries.
        """
        x, h = add_norm(x, branch, self.ln_1, self.triton)
        branch = self.attn(h, mask, segments, extend, at)
        if at is not None:
            x = pick(x, at)
        x, h = add_norm(x, branch, self.ln_2, self.triton)
        return x, self.mlp(h)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """x (B, T, ...) at one position of each row, `at` (B,): (B, 1, ...)."""
    return x[torch.arange(len(x), device=x.device), at].unsqueeze(1)


def add_norm(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, triton: bool
) -> tuple[Tensor, Tensor]:
    """x + branch, and the norm of it."""
    return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, triton)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with its language-model head.

    model(idx)                            logits (B, T, vocab_size)
    model(idx, targets)                   loss of each target (B, T), fp32, 0 where the target is -100
    model(idx, targets, reduction="sum")  their sum, one fp32 scalar: the training path, logits never held whole
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # Trained keys and values before the text: a module whose `layers(model)` gives them, one
        # (1, n_head, P, head_dim) pair a layer, and whose `length` is P (adapters/layers.py).
        self.prefix: nn.Module | None = None
        self.heads = nn.ModuleDict()  # of a classifier, by task (adapters/heads.py)
        # An empty table, since its first values are drawn below, one for each row that is not
        # padding.
        table = torch.empty(config.padded_vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding.from_pretrained(table, freeze=False),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            )
        )
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.scaled_init:
            self._init_weights()
        else:
            # as nn.Embedding does
            nn.init.normal_(self.transformer.wte.weight[: config.vocab_size])
        self._zero_padding()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds twice to the residual stream: its variance must not grow with
                # depth.
                residual = name.endswith("c_proj.weight")
                table = name in ("transformer.wte.weight", "lm_head.weight")
                # whatever the padding
                drawn = parameter[: self.config.vocab_size] if table else parameter
                nn.init.normal_(
                    drawn, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                )

    def _zero_padding(self) -> None:
        """Padding rows have no gradient, so zero they stay: decay, norms and checksums see nothing
        of them."""
        with torch.no_grad():
            self.transformer.wte.weight[self.config.vocab_size :] = 0
            if not self.config.tied_head:
                self.lm_head.weight[self.config.vocab_size :] = 0

    @property
    def head_weight(self) -> Tensor:
        """(padded_vocab_size, n_embd)"""
        return self.transformer.wte.weight if self.config.tied_head else self.lm_head.weight

    @property
    def context(self) -> int:
        """Tokens of text that the positions have room for: all but a prefix's."""
        return self.config.block_size - (self.prefix.length if self.prefix is not None else 0)

    def new_cache(
        self, batch: int, tokens: int, pad: Tensor | None = None, alternatives: int = 1
    ) -> KVCache:
        """An empty cache for up to `tokens` (at most `context`) of each row of a batch, after the
        prefix if any.

        `alternatives`: how many tokens may be read for one position.
        """
        capacity = min(self.context, tokens) + alternatives - 1
        if self.prefix is None:
            return KVCache(self.config, batch, capacity, pad)
        length = self.prefix.length
        cache = KVCache(self.config, batch, length + capacity, pad, length)
        for layer, (k, v) in enumerate(self.prefix.layers(self)):
            cache.extend(layer, *(t.expand(batch, -1, -1, -1).to(self.dtype) for t in (k, v)))
        cache.length = length
        return cache

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks' weights, and so of the residual stream (engine/precision.py may have cast
        them)."""
        return (
            self.transformer.h[0].mlp.c_fc if len(self.transformer.h) else self.transformer.wte
        ).weight.dtype

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: str = "none",
        segments: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx (B, T) int64; targets (B, T) int64; segments (B, T) int: attention stays within equal
        numbers."""
        x = self.hidden(idx, segments=segments, cache=cache)
        if targets is None:
            return self.logits(x)
        if reduction == "sum":
            return self._summed_loss(x.flatten(0, 1), targets.flatten())
        logits = self.logits(x).float()
        return F.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction=reduction
        )

    def _summed_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x (N, n_embd), targets (N,); one fp32 scalar."""
        triton = "cross_entropy" in self.config.kernels
        if self.config.chunked_head:
            return linear_cross_entropy(
                x, self.head_weight, targets, self.config.vocab_size, triton
            )
        if triton:
            return cross_entropy(self._padded_logits(x), targets, self.config.vocab_size).sum()
        return linear_cross_entropy_reference(x, self.head_weight, targets, self.config.vocab_size)

    def hidden(
        self,
        idx: Tensor,
        *,
        segments: Tensor | None = None,
        cache: KVCache | Prefixed | None = None,
        alternatives: bool = False,
        at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last layer norm (B, T, n_embd). Raises UserError past block_size.

        `alternatives`: the tokens all stand at the one next position, each seeing what the cache
        holds and itself; the cache then waits for `keep` to say which it was. `at` (B,): the states
        of these positions alone, (B, 1, n_embd), for which the last block computes little more than
        keys and values of the others.
        """
        if cache is None and self.prefix is not None:
            cache = Prefixed(self.prefix.layers(self))
        T, start = idx.shape[1], cache.length if cache else 0
        end = start + (1 if alternatives else T)
        if end > self.config.block_size:
            raise UserError(
                f"a sequence of {end} tokens is longer than block_size {self.config.block_size}"
            )
        positions = torch.arange(start, end, device=idx.device)
        if cache is not None and cache.pad is not None:
            positions = (positions - cache.pad[:, None]).clamp(min=cache.prefix)  # (B, T)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions)).to(
            self.dtype
        )
        # documents need no mask there
        in_kernel = "attention" in self.config.kernels and cache is None
        mask = None if in_kernel else attention_mask(T, segments, cache, idx.device, alternatives)
        branch, blocks = None, self.transformer.h
        for layer, block in enumerate(blocks):
            extend = cache.at(layer) if cache else None
            inputs = (x, branch, mask, segments, extend)
            if at is not None and layer == len(blocks) - 1:
                inputs = (x, branch, mask_at(at, T, segments, cache), None, extend, at)
            if self.config.recompute and self.training:
                # With the weights that it has now, in the backward pass too: they may be stand-ins
                # (engine/precision.py).
                again = functools.partial(functional_call, block, dict(block.named_parameters()))
                x, branch = checkpoint(again, inputs, use_reentrant=False)
            else:
                x, branch = block(*inputs)
        if at is not None and not blocks:
            x = pick(x, at)
        if cache is not None and not alternatives:
            cache.length += T
        return add_norm(x, branch, self.transformer.ln_f, "layer_norm" in self.config.kernels)[1]

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) to logits (..., vocab_size); the padding columns are cut
        off."""
        return self._padded_logits(x)[..., : self.config.vocab_size]

    def _padded_logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head_weight.to(x.dtype))

    def add_tokens(self, ids: range) -> None:
        """Make room for new token ids; their embeddings start at the mean of those below, which
        stay as they are.

        Some may lie within the vocabulary, where it has more rows than the tokenizer had ids.
        """
        old = self.config
        self.config = dataclasses.replace(old, vocab_size=max(old.vocab_size, ids.stop))
        for layer in (
            [self.transformer.wte] if old.tied_head else [self.transformer.wte, self.lm_head]
        ):
            rows = layer.weight.detach()[: old.vocab_size]
            table = rows.new_zeros(self.config.padded_vocab_size, old.n_embd)
            table[: old.vocab_size] = rows
            table[ids.start : ids.stop] = rows[: ids.start].mean(0)
            layer.weight = nn.Parameter(table)
            for name in ("num_embeddings", "out_features"):
                if hasattr(layer, name):
                    setattr(layer, name, len(table))

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
        model._load(tensors, where)
        return model

    def _load(self, tensors: dict[str, Tensor], where: str | Path) -> None:
        """Copy tensors named and laid out as this model's into it, the vocabulary's padding left at
        zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name not in tensors:
                    raise UserError(f"{where} is not a complete GPT-2: it has no {name}")
                tensor = tensors[name]
                if not tensor.is_floating_point():
                    raise UserError(
                        f"{where}: {name} is {tensor.dtype}; quantized weights cannot be read"
                    )
                rows = (
                    self.config.vocab_size
                    if name in ("transformer.wte.weight", "lm_head.weight")
                    else None
                )
                if tensor.shape != parameter[:rows].shape:
                    raise UserError(
                        f"{where}: {name} is {tuple(tensor.shape)}, its config says "
                        f"{tuple(parameter.shape)}"
                    )
                parameter[:rows].copy_(tensor)
        self._zero_padding()

    def save_pretrained(
        self,
        folder: str | Path,
        eot: int | None = None,
        score: Tensor | None = None,
        labels: Sequence[str] = (),
    ) -> None:
        """Write config.json and model.safetensors (fp32) in the hub's layout; `eot` is the
        end-of-text id.

        With `score` (n_labels, n_embd) it is a classifier by the last token,
        GPT2ForSequenceClassification.
        """
        tensors = {}
        for name, parameter in self.named_parameters():
            if not name.startswith("heads."):
                table = name in ("transformer.wte.weight", "lm_head.weight")
                rows = parameter[: self.config.vocab_size] if table else parameter
                tensors[name] = rows.detach().to("cpu", torch.float32)
        score = None if score is None else score.detach().to("cpu", torch.float32).contiguous()
        write_model(Path(folder), self.config, tensors, eot, score, labels)


def attention_mask(
    T: int,
    segments: Tensor | None,
    cache: KVCache | Prefixed | None,
    device: torch.device,
    alternatives: bool = False,
) -> Tensor | None:
    """True where a query may look, broadcastable to (B, n_head, T, keys); None where plain causal
    attention does."""
    start = cache.length if cache else 0
    pad = cache.pad if cache else None
    if segments is None and pad is None and (start == 0 or T == 1):
        return None
    key = torch.arange(start + T, device=device)
    query = key[start:, None]
    # (1, T, keys), aligned to the lower right
    mask = ((key < start) | (key == query) if alternatives else key <= query)[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if pad is not None:
        # A padding query looks at itself: a row of nothing would be NaN.
        ahead = cache.prefix if cache else 0
        mask = mask & (((key < ahead) | (key >= ahead + pad[:, None]))[:, None] | (key == query))
    return mask[:, None]


def mask_at(
    at: Tensor, T: int, segments: Tensor | None, cache: KVCache | Prefixed | None
) -> Tensor:
    """The mask (B, 1, 1, keys) of one query of each row, at `at` (B,)."""
    mask = attention_mask(T, segments, cache, at.device)
    if mask is not None:
        return pick(mask.expand(len(at), -1, -1, -1).transpose(1, 2), at).transpose(1, 2)
    start = cache.length if cache else 0
    return (torch.arange(start + T, device=at.device) <= start + at[:, None])[:, None, None]


def attention_backends(
    device: torch.device, dtype: torch.dtype, deterministic: bool = False, by_hardware: bool = True
) -> list[SDPBackend]:
    """Fused attention kernels in the order to try; `dtype` is that of the products.

    `by_hardware`: the one that is fastest on this device first, else PyTorch's flash attention.
    """
    if device.type == "cpu":
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if device.type != "cuda":
        return [SDPBackend.MATH]
    half = dtype in (torch.bfloat16, torch.float16)
    major = torch.cuda.get_device_capability(device)[0]
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if half and major >= 8:
        backends.insert(0, SDPBackend.FLASH_ATTENTION)
    # Hopper and Blackwell of data centres (9.0, 10.x); on others cuDNN's has not been shown to be
    # faster.
    if half and major in (9, 10) and by_hardware and not deterministic:
        backends.insert(0, SDPBackend.CUDNN_ATTENTION)
    return backends
