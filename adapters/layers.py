"""Adapters: trained parameters added to a GPT whose own parameters are frozen.

An adapter is a module at a place that the model leaves open: in place of a linear layer of a block
(LoRA, DoRA), before the text (prefix tuning, soft prompt), or over the embedding rows of new
tokens. The model, the loop and the decoder therefore know nothing of adapters. adapters/peft.py
reads and writes their files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from adapters.options import MethodConfig
from config import GPTConfig, UserError
from kernels.dropout import Dropout
from model import GPT, Extend, Linear, causal_mask

# names of a block's linear layers
ATTENTION, FEED_FORWARD = (("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"))
LORA_ON = {"attention": ATTENTION, "feed-forward": FEED_FORWARD, "both": ATTENTION + FEED_FORWARD}
# tables with one row per token; a model with a tied head has only the first
TABLES = ("transformer.wte", "lm_head")
# A soft prompt starts from embeddings of ids below this: low ids of a BPE vocabulary are common.
FREQUENT = 5000


# --- adapters


class LoRA(Linear):
    """W x + alpha/r B A dropout(x) with a frozen W (Hu et al. 2021). B starts at 0, so the update
    does too."""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float):
        with torch.device("meta"):  # allocates nothing: W and the bias are the base's
            super().__init__(base.ops, base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.lora_dropout = Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear does

    @property
    def scale(self) -> float:
        """The factor of the update, alpha / rank."""
        return self.alpha / self.rank

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output (..., out) for x (..., in), with the update."""
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)
        return super().product(x, bias) + self.scale * update

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The single weight (out, in), fp32, that gives the same output without dropout."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(
                self.weight.float(), self.lora_B.float(), self.lora_A.float(), alpha=self.scale
            )


class DoRA(LoRA):
    """m (W + alpha/r B A) x, with each row of the bracket divided by its norm and a trained m (Liu
    et al. 2024).

    The norm is recomputed with the update, but no gradient flows through it (section 4.3 of the
    paper). Dropout acts on the update alone.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self.lora_magnitude_vector = Magnitude(base.weight.detach().norm(dim=1))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's output (..., out) for x (..., in), each row of the weight rescaled to m."""
        y = super().product(x)
        scaled = y * self._row_scale()  # fp32: bf16 near 1 would round away what m learns
        return (scaled if bias is None else scaled + bias).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The single weight (out, in), fp32, that gives the same output without dropout."""
        return self._row_scale()[:, None] * super().merged()

    def _row_scale(self) -> Tensor:
        return self.lora_magnitude_vector.weight / super().merged().norm(dim=1)


class Magnitude(nn.Module):
    """DoRA's m (out,). It is a separate module because engine/precision.py casts the parameters
    that a linear layer itself holds."""

    def __init__(self, norms: Tensor):
        super().__init__()
        self.weight = nn.Parameter(norms)


class PrefixPast:
    """The Past of a text that follows trained positions. Each layer's trained keys and values (1,
    n_head, P, head_dim) come before those of the text, and no others are stored."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.length = layers[0][0].shape[2]

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions (T,) of the text, counted after the trained ones."""
        return torch.arange(self.length, self.length + T, device=device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """The keys that each token may attend to, as of `causal_mask`. None for a single token,
        which sees all."""
        if segments is None and T == 1:
            return None
        return causal_mask(T, segments, device, self.length)

    def extension(self, layer: int) -> Extend:
        """The function that puts the trained keys and values before those of one layer."""
        return functools.partial(_prepend, *self.layers[layer])

    def advance(self, T: int) -> None:
        """Do nothing: the text's own keys and values are not stored."""


def _prepend(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], -1, -1, -1)
    return torch.cat((keys.expand(shape).to(k.dtype), k), 2), torch.cat(
        (values.expand(shape).to(v.dtype), v), 2
    )


class Prefix(nn.Module):
    """Keys and values of P positions for every layer, trained directly or through an MLP (Li and
    Liang 2021).

    `rows` (P, n_embd) are the MLP's input. With a `width` of 0 there is no MLP, and `rows` (P,
    n_layer * 2 * n_embd) are the keys and values themselves.
    """

    def __init__(self, config: GPTConfig, rows: Tensor, width: int):
        super().__init__()
        self.length = len(rows)
        self.shape = (self.length, config.n_layer, 2, config.n_head, config.n_embd // config.n_head)
        self.rows = nn.Parameter(rows)
        self.mlp: nn.Sequential | None = None
        if width:
            out = nn.Linear(width, config.n_layer * 2 * config.n_embd)
            self.mlp = nn.Sequential(nn.Linear(config.n_embd, width), nn.Tanh(), out)

    def table(self) -> Tensor:
        """Keys, then values, of each layer in turn: (P, n_layer * 2 * n_embd). A trained prefix
        needs only these."""
        return self.rows if self.mlp is None else self.mlp(self.rows.to(self.mlp[0].weight.dtype))

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        # (n_layer, 2, n_head, P, head_dim)
        layers = self.table().view(self.shape).permute(1, 2, 3, 0, 4)
        return [(k[None], v[None]) for k, v in layers]

    def past(self, model: GPT) -> PrefixPast:
        """The Past of a text that these positions precede."""
        return PrefixPast(self.layers(model))


class SoftPrompt(nn.Module):
    """P vectors (P, n_embd) that the model reads before the text (Lester et al. 2021).

    Their keys and values are the same for every row, so the model computes them once per batch and
    the text attends to them.
    """

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.length = len(vectors)
        self.vectors = nn.Parameter(vectors)

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        return keys_and_values(model, self.vectors)

    def past(self, model: GPT) -> PrefixPast:
        """The Past of a text that these positions precede."""
        return PrefixPast(self.layers(model))


def keys_and_values(model: GPT, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (1, n_head, P, head_dim) each, when the model reads `vectors`
    (P, n_embd) in place of token embeddings."""
    layers: list[tuple[Tensor, Tensor]] = []

    def keep(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layers.append((k, v))
        return k, v

    parts = model.transformer
    x, branch = parts.drop(vectors + parts.wpe.weight[: len(vectors)])[None].to(model.dtype), None
    for block in parts.h:
        # block.forward skips a compiled block: compiling for one row of a few positions is a waste.
        x, branch = block.forward(x, branch, extend=keep)
    return layers


class TokenRows(nn.Module):
    """The parametrization of a frozen table whose rows for the tokens `ids` (n,) are trained.
    `rows` (n, n_embd) replace them."""

    def __init__(self, ids: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows)

    def forward(self, table: Tensor) -> Tensor:
        """The table (rows, n_embd) with the trained rows in it."""
        return table.index_copy(0, self.ids, self.rows)


# --- putting them into a model


def add_lora(
    model: GPT, names: Sequence[str], dora: bool, rank: int, alpha: float, dropout: float
) -> None:
    """Replace the linear layers of these names by LoRA or DoRA layers."""
    kind = DoRA if dora else LoRA
    for name in names:
        model.set_submodule(name, kind(model.get_submodule(name), rank, alpha, dropout))


def new_prefix(model: GPT, cfg: MethodConfig) -> nn.Module:
    """A prefix or soft prompt that starts from common tokens, as both papers advise. The inputs of
    a prefix's MLP start at random."""
    config, P = model.config, cfg.prefix_tokens
    if cfg.method == "prefix" and cfg.prefix_width:
        return Prefix(config, torch.randn(P, config.n_embd), cfg.prefix_width)
    table = model.transformer.wte.weight.detach()
    vectors = table[torch.randint(min(FREQUENT, config.vocab_size), (P,))]
    if cfg.method == "soft-prompt":
        return SoftPrompt(vectors)
    with torch.no_grad():
        layers = torch.stack([torch.stack(layer) for layer in keys_and_values(model, vectors)])
    return Prefix(config, layers.squeeze(2).permute(3, 0, 1, 2, 4).reshape(P, -1), width=0)


def check_prefix_fits(model: GPT, length: int) -> None:
    """Raise UserError if `length` positions before the text leave no position for the text."""
    if length >= model.config.block_size:
        raise UserError(
            f"{length} positions before the text leave no room for it: the model has "
            f"{model.config.block_size}; use a smaller --prefix-tokens"
        )


def used_tables(model: GPT) -> Sequence[str]:
    """The tables that the loss depends on. A classifier's loss does not use an untied language
    head."""
    return TABLES[:1] if model.config.tied_head or model.heads else TABLES


def add_tokens(model: GPT, ids: range) -> None:
    """Grow the vocabulary by the token ids `ids`. Their embeddings start at the mean of all lower
    ids, which do not change.

    Some of `ids` may already be in the vocabulary, if it has more rows than the tokenizer had ids.
    """
    old = model.config
    model.config = dataclasses.replace(old, vocab_size=max(old.vocab_size, ids.stop))
    for name in TABLES[:1] if old.tied_head else TABLES:
        layer = model.get_submodule(name)
        rows = layer.weight.detach()[: old.vocab_size]
        table = rows.new_zeros(model.config.padded_vocab_size, old.n_embd)
        table[: old.vocab_size] = rows
        table[ids.start : ids.stop] = rows[: ids.start].mean(0)
        layer.weight = nn.Parameter(table)
        for size in ("num_embeddings", "out_features"):
            if hasattr(layer, size):
                setattr(layer, size, len(table))


def add_rows(model: GPT, table: str, ids: Tensor) -> None:
    """Make the rows `ids` (n,) of one of TABLES trainable."""
    layer = model.get_submodule(table)
    rows = TokenRows(ids.to(layer.weight.device), layer.weight.detach()[ids].clone())
    parametrize.register_parametrization(layer, "weight", rows)


def token_rows(model: GPT) -> dict[str, TokenRows]:
    """The trained rows of new tokens, by the name of their table."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in model.named_modules()
        if isinstance(module, TokenRows)
    }


def loras(model: GPT) -> dict[str, LoRA]:
    """The LoRA and DoRA layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def freeze(model: GPT, trained: Collection[str]) -> None:
    """Freeze all parameters but those named in `trained`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


# --- which parameters train


def adapter_parameters(model: GPT) -> set[str]:
    """Names of the adapter's parameters; empty for a model without an adapter."""
    pattern = re.compile(r"^prefix\.|\.lora_|\.parametrizations\.weight\.0\.")
    return {name for name, _ in model.named_parameters() if pattern.search(name)}


def always_trained(model: GPT) -> set[str]:
    """Names of the parameters that train under every method: those of an adapter and of a
    classifier's heads."""
    return adapter_parameters(model) | {
        name for name, _ in model.named_parameters() if name.startswith("heads.")
    }


# --- merging


def can_merge(model: GPT) -> bool:
    """Whether the adapter can become plain weights. A prefix or a soft prompt cannot."""
    return model.prefix is None


def _plain_table(layer: nn.Module) -> nn.Module:
    """A table (an embedding or a head) without trained rows, but with their values."""
    weight = layer.weight.detach().clone()
    if isinstance(layer, nn.Embedding):
        return nn.Embedding.from_pretrained(weight, freeze=False)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight)
    return head


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold LoRA, DoRA and the rows of new tokens into the weights, in place. The model is then a
    plain GPT with the same logits.

    Raises UserError for a prefix or a soft prompt.
    """
    if not can_merge(model):
        raise UserError(
            "a prefix or soft prompt cannot be merged into the weights; keep it as an adapter"
        )
    for name, layer in loras(model).items():
        with torch.device("meta"):
            plain = Linear(layer.ops, layer.in_features, layer.out_features)
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        model.set_submodule(name, plain.train(layer.training))
    for name in token_rows(model):
        # Not remove_parametrizations: it changes the layer's class, which copies of the model share.
        model.set_submodule(name, _plain_table(model.get_submodule(name)))
    model.requires_grad_(True)
