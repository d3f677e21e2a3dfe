"""Which operations run in Triton."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launch import small, write_inputs

import kernels
import kernels._triton
from config import UserError

PLAIN: dict[str, Any] = dict(compiled=True, documents=False, dropout=0.0)
EAGER: dict[str, Any] = {**PLAIN, "compiled": False}
DOCUMENTS: dict[str, Any] = {**PLAIN, "documents": True}
DROPOUT: dict[str, Any] = {**DOCUMENTS, "dropout": 0.1}
ALL = ",".join(kernels.OPERATIONS)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels._triton, "INTERPRETED", False)
    assert kernels.choose("auto", "cpu", **PLAIN) == kernels.choose("torch", "cpu", **PLAIN) == ("torch", None)
    for asked in ("triton", "adamw"):
        with pytest.raises(UserError, match=r"needs a CUDA GPU.*--kernels torch"):
            kernels.choose(asked, "cpu", **PLAIN)
    monkeypatch.setattr(kernels._triton, "triton", None)
    with pytest.raises(UserError, match="not installed"):
        kernels.choose("triton", "cuda", **PLAIN)


def test_auto_says_what_is_lost_without_triton(monkeypatch):
    monkeypatch.setattr(kernels._triton, "triton", None)
    chosen, lost = kernels.choose("auto", "cuda", **PLAIN)
    assert chosen == "torch" and lost is not None and "cross_entropy, adamw" in lost and "not installed" in lost


def test_triton_is_chosen_whole_or_by_name():
    assert kernels.choose("triton", "cuda", **PLAIN) == (ALL, None)
    assert kernels.choose("layer_norm,adamw", "cuda", **PLAIN) == ("layer_norm,adamw", None)
    assert kernels.choose(ALL, "cuda", **PLAIN) == (ALL, None)  # what a resolved configuration says
    assert kernels.named("torch") == () and kernels.named(ALL) == kernels.OPERATIONS
    with pytest.raises(UserError, match="did you mean layer_norm"):
        kernels.choose("layernorm", "cuda", **PLAIN)


def test_auto_leaves_to_the_compiler_what_it_can_do():
    assert kernels.choose("auto", "cuda", **PLAIN)[0] == "cross_entropy,adamw"
    eager = kernels.choose("auto", "cuda", **EAGER)[0]
    assert eager == "cross_entropy,layer_norm,bias_gelu,adamw"


def test_documents_are_kept_apart_by_the_kernel_but_under_dropout():
    assert "attention" in kernels.choose("auto", "cuda", **DOCUMENTS)[0]
    chosen, lost = kernels.choose("auto", "cuda", **DROPOUT)
    assert "attention" not in chosen and lost is not None and "dropout" in lost
    with pytest.raises(UserError, match="dropout; use --kernels cross_entropy,layer_norm,bias_gelu,adamw"):
        kernels.choose("triton", "cuda", **DROPOUT)


def test_a_run_on_every_kernel_has_the_losses_of_pytorch(repo, run, tmp_path):
    write_inputs(tmp_path)
    options = small(
        "--steps",
        2,
        "--batch-tokens",
        64,
        "--n-embd",
        32,
        "--dropout",
        0,
        "--eval-every",
        2,
        "--save-every",
        0,
        "--sample-every",
        0,
    )
    losses = {}
    for kernels_named in ("torch", "triton"):
        words = [*options, "--kernels", kernels_named, "--out", kernels_named]
        done = run(repo / "train_gpt2.py", *words, env={"TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stderr
        log = map(json.loads, (tmp_path / kernels_named / "log.jsonl").read_text().splitlines())
        losses[kernels_named] = [x.get("loss", x.get("val_loss")) for x in log if x["kind"] in ("train", "eval")]
        banner = ALL.replace(",", ", ") + " in Triton" if kernels_named == "triton" else "torch"
        assert banner in done.stdout
    assert len(losses["torch"]) == 3
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)
