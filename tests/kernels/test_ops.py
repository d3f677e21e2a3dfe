"""Which operations a configuration hands to the model, and that a plain model runs nothing else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from config import GPTConfig
from kernels.attention import explicit_attention
from kernels.dropout import Dropout
from kernels.fp8_linear import fp8_linear
from kernels.linear_cross_entropy import linear_cross_entropy_reference
from kernels.ops import Ops, ops_of
from model import GPT
from support import REPO

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=2, n_head=2, n_embd=32)
REFERENCES: set[Any] = {
    field.default
    for field in dataclasses.fields(Ops)
    if getattr(field.default, "__module__", "").startswith("kernels.")
}


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_plain_model_calls_only_the_plain_references(reduction):
    model, idx = GPT(SMALL), torch.randint(331, (2, 32))
    model(idx)  # what is imported or worked out at the first use
    elsewhere: set[tuple[str, str]] = set()

    def trace(frame: FrameType, event: str, arg: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(REPO) and ".venv" not in file.parts and file != REPO / "model.py":
            elsewhere.add((str(file.relative_to(REPO)), frame.f_code.co_name))

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        model(idx, idx, reduction=reduction).sum().backward()
    finally:
        sys.settrace(before)
    allowed = {
        (f"{f.__module__.replace('.', '/')}.py", f.__name__)
        for f in REFERENCES
        if f is not linear_cross_entropy_reference or reduction == "sum"
    }
    assert elsewhere - {("tests/kernels/test_ops.py", "trace")} == allowed


def test_a_plain_configuration_hands_over_the_plain_references():
    assert ops_of(SMALL) == Ops()


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"attention": "explicit"}, "attention", explicit_attention),
        ({"fp8": True}, "linear", fp8_linear),
        ({"dropout": 0.1}, "dropout", Dropout),
    ],
)
def test_what_is_named_is_handed_over_and_all_else_stays(changes, field, expected):
    ops = ops_of(dataclasses.replace(SMALL, **changes))
    assert getattr(ops, field) is expected
    assert dataclasses.replace(ops, **{field: getattr(Ops(), field)}) == Ops()


def test_the_model_computes_with_the_operations_it_is_given():
    """A GELU that is not GPT-2's reaches every block, and only that changes."""
    torch.manual_seed(0)
    plain = GPT(SMALL)
    squared = GPT(SMALL, Ops(linear_gelu=lambda product, x, bias: F.relu(product(x, bias)) ** 2))
    squared.load_state_dict(plain.state_dict())
    idx = torch.randint(331, (2, 32))
    assert not torch.allclose(squared(idx), plain(idx))
    for block in squared.transformer.h:
        block.mlp.ops = plain.ops
    assert torch.equal(squared(idx), plain(idx))


def test_dropout_of_the_model_is_the_one_it_is_given():
    model = GPT(dataclasses.replace(SMALL, dropout=0.2), Ops())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Dropout)} == {nn.Dropout}
