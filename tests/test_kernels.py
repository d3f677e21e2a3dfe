"""Which operations run in Triton."""

from __future__ import annotations

import pytest

import kernels
import kernels._triton
from config import UserError


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels._triton, "INTERPRETED", False)
    assert kernels.choose("auto", "cpu") == kernels.choose("torch", "cpu") == ()
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        kernels.choose("triton", "cpu")
    monkeypatch.setattr(kernels._triton, "triton", None)
    with pytest.raises(UserError, match="not installed"):
        kernels.choose("triton", "cuda")


def test_triton_is_chosen_whole_where_it_is_asked_for():
    assert kernels.choose("triton", "cuda") == tuple(kernels.OPERATIONS)
