"""The operations of GPT-2 that may run on a kernel, chosen once and passed to the model's layers.

A plain `Ops()` holds PyTorch's own operations and the plain references from the kernels' files.
GPTConfig.kernels names the kernels to use, and kernels.choose decides which a machine may name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from config import GPTConfig, UserError
from kernels._kernel import all_kernels
from kernels.attention import explicit_attention, fused_attention
from kernels.bias_gelu import linear_gelu_reference
from kernels.cross_entropy import cross_entropy
from kernels.dropout import Dropout
from kernels.fp8_linear import fp8_linear
from kernels.layer_norm import add_layer_norm_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.split_heads import Heads, Product, split_heads_reference

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Ops:
    """The operations that a GPT calls. Shapes are those of the references."""

    add_norm: Callable[[Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        add_layer_norm_reference
    )
    """Takes x, branch, gain, bias and epsilon; returns x + branch and the layer norm of that."""
    linear: Linear = F.linear
    """The linear layers of a block in training. In evaluation they are always F.linear."""
    linear_gelu: Callable[[Product, Tensor, Tensor], Tensor] = linear_gelu_reference
    """Takes product, x and bias; returns the GELU of product(x, bias)."""
    split_heads: Callable[[Product, Tensor, Tensor, int], Heads] = split_heads_reference
    """Takes product, x, bias and n_head; returns q, k and v of product(x, bias)."""
    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = fused_attention
    """Takes q, k, v (B, n_head, T, head_dim), a mask (None: plain causal) and the dropout."""
    packed_attention: Callable[[Tensor, Tensor | None, float], Tensor] | None = None
    """Attention of whole sequences without a mask. Takes qkv (B, T, 3, n_head, head_dim) as the
    linear layer wrote it, segments (B, T) and the dropout. If None, `attention` is called."""
    masks_segments: bool = False
    """Whether packed_attention itself keeps documents apart, so that they need no mask."""
    loss: Callable[[Tensor, Tensor, Tensor, int], Tensor] = linear_cross_entropy_reference
    """Takes states (N, n_embd), head weight, targets (N,) and vocabulary size; returns the summed
    loss."""
    dropout: type[nn.Dropout] = nn.Dropout


def ops_of(config: GPTConfig) -> Ops:
    """The operations that a configuration asks for. Raises UserError if two kernels replace one
    operation."""
    fields: dict[str, Any] = {
        "linear": fp8_linear if config.fp8 else F.linear,
        "attention": explicit_attention if config.attention == "explicit" else fused_attention,
        "loss": _loss(config.chunked_head, triton="cross_entropy" in config.kernels),
        "dropout": Dropout if config.dropout else nn.Dropout,
    }
    owners: dict[str, str] = {}
    for name in config.kernels:
        for replaced, operation in all_kernels()[name].ops(config).items():
            if other := owners.get(replaced):
                raise UserError(
                    f"the kernels {other} and {name} both replace {replaced}; name one of them with "
                    "--kernels"
                )
            owners[replaced], fields[replaced] = name, operation
    return Ops(**fields)


def _loss(chunked: bool, triton: bool) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
    if chunked:
        return functools.partial(linear_cross_entropy, triton=triton)
    return _cross_entropy_of_all_logits if triton else linear_cross_entropy_reference


def _cross_entropy_of_all_logits(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int
) -> Tensor:
    return cross_entropy(F.linear(x, weight.to(x.dtype)), targets, vocab_size).sum()
