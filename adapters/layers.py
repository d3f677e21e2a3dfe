"""What is trained: all of a GPT, a part of it, or parameters added to it while its own stay as they
are.

An adapter is a module that stands in the model where the model has room for it: in place of a
product of a block (LoRA, DoRA), before the text (prefix tuning, soft prompt), over the rows of new
tokens in the table. So the model, the loop and the decoder know nothing of adapters. Their files
are adapters/peft.py's.
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

# the products of a block
ATTENTION, FEED_FORWARD = (("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"))
LORA_ON = {"attention": ATTENTION, "feed-forward": FEED_FORWARD, "both": ATTENTION + FEED_FORWARD}
# that have a row a token; the second where the head is not tied
TABLES = ("transformer.wte", "lm_head")
# ids whose embeddings a soft prompt may start from: the first of a BPE vocabulary are the commonest
FREQUENT = 5000


# --- adapters


class LoRA(Linear):
    """W x + alpha/r B A dropout(x) with a frozen W (Hu et al. 2021): B starts at 0, and with it the
    update."""

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float):
        with torch.device("meta"):  # W is the base's
            super().__init__(base.ops, base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.lora_dropout = Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear does

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)
        return super().product(x, bias) + self.scale * update

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix (out, in) that gives the same products, fp32; dropout left aside."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(
                self.weight.float(), self.lora_B.float(), self.lora_A.float(), alpha=self.scale
            )


class DoRA(LoRA):
    """m (W + alpha/r B A) x with each row of the bracket divided by its norm, and m trained (Liu et
    al. 2024).

    The norm follows the update but passes no gradient on (section 4.3 of the paper). Dropout is on
    the update alone.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float):
        super().__init__(base, rank, alpha, dropout)
        self.lora_magnitude_vector = Magnitude(base.weight.detach().norm(dim=1))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().product(x)
        scaled = y * self._row_scale()  # in fp32: near 1 bf16 would round away what m learns
        return (scaled if bias is None else scaled + bias).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        return self._row_scale()[:, None] * super().merged()

    def _row_scale(self) -> Tensor:
        return self.lora_magnitude_vector.weight / super().merged().norm(dim=1)


class Magnitude(nn.Module):
    """DoRA's m (out,): a module of its own, for a linear layer's own parameters are cast
    (engine/precision.py)."""

    def __init__(self, norms: Tensor):
        super().__init__()
        self.weight = nn.Parameter(norms)


class Prefixed:
    """The Past of a text after trained positions: keys and values (1, n_head, P, head_dim) before
    those of each layer. Nothing is kept."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]):
        self.layers = layers
        self.length = layers[0][0].shape[2]

    def positions(self, T: int, device: torch.device) -> Tensor:
        return torch.arange(self.length, self.length + T, device=device)

    def mask(self, T: int, segments: Tensor | None, device: torch.device) -> Tensor | None:
        """For one token None: it sees all."""
        if segments is None and T == 1:
            return None
        return causal_mask(T, segments, device, self.length)

    def extension(self, layer: int) -> Extend:
        return functools.partial(_put_before, *self.layers[layer])

    def advance(self, T: int) -> None:
        pass


def _put_before(keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    shape = (k.shape[0], -1, -1, -1)
    return torch.cat((keys.expand(shape).to(k.dtype), k), 2), torch.cat(
        (values.expand(shape).to(v.dtype), v), 2
    )


class Prefix(nn.Module):
    """Keys and values of P positions for every layer, trained themselves or made by an MLP (Li and
    Liang 2021).

    `rows` (P, n_embd) are what the MLP reads; without one (P, n_layer * 2 * n_embd), the keys and
    values.
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
        """(P, n_layer * 2 * n_embd): of each layer its keys, then its values. All that is needed
        once trained."""
        return self.rows if self.mlp is None else self.mlp(self.rows.to(self.mlp[0].weight.dtype))

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        # (n_layer, 2, n_head, P, head_dim)
        layers = self.table().view(self.shape).permute(1, 2, 3, 0, 4)
        return [(k[None], v[None]) for k, v in layers]

    def past(self, model: GPT) -> Prefixed:
        return Prefixed(self.layers(model))


class SoftPrompt(nn.Module):
    """P vectors (P, n_embd) that the model reads before the text (Lester et al. 2021).

    What it makes of them is the same for every row, so it reads them once, alone: text sees their
    keys and values.
    """

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.length = len(vectors)
        self.vectors = nn.Parameter(vectors)

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        return keys_and_values(model, self.vectors)

    def past(self, model: GPT) -> Prefixed:
        return Prefixed(self.layers(model))


def keys_and_values(model: GPT, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer attends to when the model reads `vectors` (P, n_embd) in place of tokens'
    embeddings."""
    layers: list[tuple[Tensor, Tensor]] = []

    def keep(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layers.append((k, v))
        return k, v

    parts = model.transformer
    x, branch = parts.drop(vectors + parts.wpe.weight[: len(vectors)])[None].to(model.dtype), None
    for block in parts.h:
        # Its forward itself: where blocks are compiled, not for the sake of one row of a few
        # positions.
        x, branch = block.forward(x, branch, extend=keep)
    return layers


class TokenRows(nn.Module):
    """Trained rows (n, n_embd) in place of those of the tokens `ids` (n,) in a frozen table: its
    parametrization."""

    def __init__(self, ids: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows)

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.ids, self.rows)


# --- putting them into a model


def add_lora(
    model: GPT, names: Sequence[str], dora: bool, rank: int, alpha: float, dropout: float
) -> None:
    """LoRA or DoRA in place of the products of these names."""
    kind = DoRA if dora else LoRA
    for name in names:
        model.set_submodule(name, kind(model.get_submodule(name), rank, alpha, dropout))


def new_prefix(model: GPT, cfg: MethodConfig) -> nn.Module:
    """Starts from common tokens, as both papers advise; but the MLP's rows are free."""
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


def check_room(model: GPT, length: int) -> None:
    """Raise UserError where `length` positions before the text leave it none."""
    if length >= model.config.block_size:
        raise UserError(
            f"{length} positions before the text leave it none of the model's "
            f"{model.config.block_size}; use a smaller --prefix-tokens"
        )


def tables(model: GPT) -> Sequence[str]:
    """Those that a loss depends on: a language model's own head is in none of a classifier's."""
    return TABLES[:1] if model.config.tied_head or model.heads else TABLES


def add_tokens(model: GPT, ids: range) -> None:
    """Make room for new token ids; their embeddings start at the mean of those below, which stay as
    they are.

    Some may lie within the vocabulary, where it has more rows than the tokenizer had ids.
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
    """TokenRows on a table, of TABLES."""
    layer = model.get_submodule(table)
    rows = TokenRows(ids.to(layer.weight.device), layer.weight.detach()[ids].clone())
    parametrize.register_parametrization(layer, "weight", rows)


def token_rows(model: GPT) -> dict[str, TokenRows]:
    """The rows of new tokens, by table."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in model.named_modules()
        if isinstance(module, TokenRows)
    }


def loras(model: GPT) -> dict[str, LoRA]:
    """The products that LoRA or DoRA stands in for, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def freeze(model: GPT, trained: Collection[str]) -> None:
    """Freeze all but the parameters of these names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


# --- which parameters train


def added(model: GPT) -> set[str]:
    """Names of the parameters that are not the model's own but an adapter's; empty where there is
    none."""
    pattern = re.compile(r"^prefix\.|\.lora_|\.parametrizations\.weight\.0\.")
    return {name for name, _ in model.named_parameters() if pattern.search(name)}


def always_trained(model: GPT) -> set[str]:
    """Names of the parameters that train under every method: an adapter's, and those of a
    classifier's heads."""
    return added(model) | {
        name for name, _ in model.named_parameters() if name.startswith("heads.")
    }


# --- merging


def can_merge(model: GPT) -> bool:
    """Whether plain weights can say the same: not what comes before the text."""
    return model.prefix is None


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold LoRA, DoRA and the rows of new tokens into the weights, in place: the logits stay, the
    model is plain.

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
        parametrize.remove_parametrizations(
            model.get_submodule(name), "weight", leave_parametrized=True
        )
    model.requires_grad_(True)
