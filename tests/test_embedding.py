"""The embedding's gradient against float64's, where a few tokens are most of the text."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.embedding import embedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("tokens", [1, 1023, 8192])
def test_the_gradient_is_rounded_once(dtype, tolerance, tokens):
    torch.manual_seed(0)
    weight = torch.randn(50, 24, device=DEVICE, dtype=dtype, requires_grad=True)
    idx = (50 * torch.rand(tokens, device=DEVICE) ** 4).long()  # a third of them are 0
    dy = torch.randn(tokens, 24, device=DEVICE, dtype=dtype)
    y = embedding(idx, weight)
    assert torch.equal(y, F.embedding(idx, weight))
    ours = torch.autograd.grad(y, weight, dy, retain_graph=True)[0]
    exact = torch.zeros(50, 24, device=DEVICE, dtype=torch.float64).index_add_(0, idx, dy.double())
    assert ours.dtype == dtype and (ours - exact).norm() <= tolerance * exact.norm()
    assert torch.equal(ours, torch.autograd.grad(y, weight, dy)[0])


def test_compiles_without_a_break():
    weight = torch.randn(50, 24, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    idx = torch.randint(50, (4, 7), device=DEVICE)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(idx, weight).float().square().sum(), weight)[0] for f in (compiled, embedding)]
    assert torch.equal(*grads)
