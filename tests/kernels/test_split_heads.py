"""q, k and v split into heads: the model with it, and biases that do not train."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from config import GPTConfig
from kernels._triton import no_triton_reason
from kernels.split_heads import split_heads, split_heads_reference
from model import GPT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    bool(no_triton_reason(DEVICE)), reason=no_triton_reason(DEVICE) or ""
)
SMALL = GPTConfig(vocab_size=60, block_size=11, n_layer=2, n_head=3, n_embd=33)


def gradients(model: GPT, idx: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.compile(model, **options)(idx, idx, reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_has_the_gradients_of_the_plain_one(compiled):
    torch.manual_seed(0)
    plain = GPT(SMALL).to(DEVICE)
    ours = GPT(dataclasses.replace(SMALL, kernels=("split_heads",))).to(DEVICE)
    ours.load_state_dict(plain.state_dict())
    idx = torch.randint(60, (2, 11), device=DEVICE)
    options = dict(backend="aot_eager", fullgraph=True, disable=not compiled)
    expected, found = (gradients(model, idx, **options) for model in (plain, ours))
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [(True, True), (True, False), (False, True)])
def test_joined_gradients_are_exact_and_sums_are_fp32(dtype, trains):
    x = torch.randn(3, 7, 3 * 4 * 65, device=DEVICE, dtype=dtype, requires_grad=trains[0])
    bias = torch.zeros(3 * 4 * 65, device=DEVICE, dtype=dtype, requires_grad=trains[1])
    grads = [torch.randn(3, 7, 4, 65, device=DEVICE, dtype=dtype) for _ in range(3)]
    ours, plain = (
        torch.autograd.grad(
            split(lambda x, bias: x if bias is None else x + bias, x, bias, 4),
            [t for t in (x, bias) if t.requires_grad],
            [grad.transpose(1, 2) for grad in grads],
        )
        for split in (split_heads, split_heads_reference)
    )
    if trains[0]:
        assert torch.equal(ours[0], plain[0])
    if trains[1]:
        exact = torch.cat([grad.double().sum((0, 1)).flatten() for grad in grads])
        torch.testing.assert_close(ours[-1], exact.to(dtype), rtol=2**-8, atol=1e-5)
