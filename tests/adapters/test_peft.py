"""Adapters against the `peft` package: the same outputs, the same gradients, each reads what the
other writes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapted import CASES, LABELS, NEW, SHAPE, adapted, hub, of_peft, scores, tokens
from adapters import peft
from adapters.heads import Head
from adapters.layers import adapter_parameters
from adapters.options import ADAPTERS, LORA
from adapters.peft import load_adapter, save_adapter, weights_sha256
from config import UserError
from model import GPT


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize("method, lora_on", CASES)
def test_peft_reads_what_is_written_here(base, tmp_path, method, lora_on, new):
    model = adapted(base, method, lora_on, new)
    save_adapter(model, tmp_path, str(base), weights_sha256(GPT.from_pretrained(base)))
    theirs = of_peft(base, tmp_path, new)
    if new and method not in LORA:  # PEFT has no place for them
        rows = load_file(tmp_path / peft.NEW_TOKENS)
        table = theirs.get_input_embeddings().weight
        table.data[rows["transformer.wte.ids"]] = rows["transformer.wte.rows"]
    idx = tokens(new)
    with torch.no_grad():
        want = theirs(input_ids=idx).logits[:, -idx.shape[1] :]
        torch.testing.assert_close(model(idx), want, atol=1e-5, rtol=1e-5)

    again = GPT.from_pretrained(base).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(idx), model(idx))


def peft_config(kind: str, options: dict[str, Any]):
    import peft

    options = {"task_type": "CAUSAL_LM"} | options
    if kind in LORA:
        options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} | options
        return peft.LoraConfig(r=3, lora_alpha=5, use_dora=kind == "dora", **options)
    of = peft.PromptTuningConfig if kind == "soft-prompt" else peft.PrefixTuningConfig
    return of(num_virtual_tokens=4, **options)


def made_by_peft(model, kind: str, options: dict[str, Any]):
    """peft's adapter, as after some training."""
    import peft

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, peft_config(kind, options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return theirs


@pytest.mark.parametrize(
    "kind, options",
    [
        # which peft sets right itself for transformers' transposed layers
        ("lora", {"fan_in_fan_out": False}),
        ("lora", {"target_modules": ["attn.c_proj"], "layers_to_transform": [1]}),
        ("lora", {"trainable_token_indices": [5, 2]}),
        ("dora", {}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 8}),
        ("prefix", {}),
        ("soft-prompt", {}),
    ],
)
def test_what_peft_writes_is_read_here_with_the_same_gradients(base, tmp_path, kind, options):
    theirs = made_by_peft(hub(base), kind, options)
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(base)
    load_adapter(model, tmp_path)
    idx = tokens()
    want, got = theirs(input_ids=idx).logits[:, -idx.shape[1] :], model(idx)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    want.square().mean().backward()
    got.square().mean().backward()
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == adapter_parameters(model)
    if "prefix_projection" in options:  # the gradient goes on to the MLP there
        return
    grads = {here(name, kind): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert grads.keys() == own.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(own[name], grad, atol=1e-6, rtol=1e-4)


def here(name: str, kind: str) -> str:
    """What a parameter of peft is called here."""
    name = name.removeprefix("base_model.model.")
    if name.startswith("prompt_encoder"):
        return "prefix.rows" if kind == "prefix" else "prefix.vectors"
    if name.endswith("trainable_tokens_delta.default"):
        return "transformer.wte.parametrizations.weight.0.rows"
    return (
        name.replace(".default", "") if "magnitude" in name else name.replace(".default.weight", "")
    )


def test_new_rows_for_an_untied_head(tmp_path):
    torch.manual_seed(0)
    GPT(replace(SHAPE, tied_head=False)).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", "lora", new=NEW)
    assert {name for name in adapter_parameters(model) if "lora_" not in name} == {
        "transformer.wte.parametrizations.weight.0.rows",
        "lm_head.parametrizations.weight.0.rows",
    }
    save_adapter(
        model, tmp_path / "adapter", "base", weights_sha256(GPT.from_pretrained(tmp_path / "base"))
    )
    with torch.no_grad():
        want = of_peft(tmp_path / "base", tmp_path / "adapter", NEW)(input_ids=tokens(NEW)).logits
        torch.testing.assert_close(model(tokens(NEW)), want, atol=1e-5, rtol=1e-5)


def scores_of_peft(theirs, idx: torch.Tensor) -> torch.Tensor:
    """A row at a time: without padding, whatever their model takes for it."""
    return torch.cat([theirs(input_ids=row[None]).logits for row in idx])


@torch.no_grad()
@pytest.mark.parametrize(
    "method, new", [("lora", 0), ("lora", NEW), ("dora", 0), ("prefix", 0), ("soft-prompt", 0)]
)
def test_peft_reads_a_classifier_that_is_written_here(base, tmp_path, method, new):
    model, idx = adapted(base, method, "both", new, head=True), tokens(new)
    head = model.heads["main"]
    save_adapter(model, tmp_path, str(base), weights_sha256(GPT.from_pretrained(base)), head.weight)
    want = scores_of_peft(of_peft(base, tmp_path, new, LABELS), idx)
    torch.testing.assert_close(scores(model, head, idx), want, atol=1e-5, rtol=1e-5)

    again = GPT.from_pretrained(base).eval()
    score = load_adapter(again, tmp_path)
    assert score is not None and torch.equal(score, head.weight)
    assert torch.equal(again.hidden(idx), model.hidden(idx))


@torch.no_grad()
@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_peft_writes_of_a_classifier_is_read_here(base, tmp_path, kind):
    theirs = made_by_peft(hub(base, labels=LABELS), kind, {"task_type": "SEQ_CLS"})
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(base).eval()
    score = load_adapter(model, tmp_path)
    assert score is not None
    head = Head(64, LABELS, "last")
    head.weight.copy_(score)
    torch.testing.assert_close(
        scores(model, head, tokens()), scores_of_peft(theirs, tokens()), atol=1e-5, rtol=1e-5
    )


def test_an_adapter_of_a_language_model_has_no_scores(base, tmp_path):
    save_adapter(adapted(base, "lora"), tmp_path, "base", weights_sha256(GPT.from_pretrained(base)))
    assert load_adapter(GPT.from_pretrained(base), tmp_path) is None


def test_scores_of_another_width(base, tmp_path):
    model = adapted(base, "lora", head=True)
    save_adapter(
        model,
        tmp_path,
        "base",
        weights_sha256(GPT.from_pretrained(base)),
        model.heads["main"].weight[:, 1:],
    )
    with pytest.raises(UserError, match=r"\(5, 63\), but this model needs 64 columns"):
        load_adapter(GPT.from_pretrained(base), tmp_path)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_new_rows_of_a_classifier_are_its_table_s_alone(tmp_path, method):
    """Its language model's head is in no loss."""
    GPT(replace(SHAPE, tied_head=False)).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", method, new=NEW, head=True)
    assert [
        name
        for name in adapter_parameters(model)
        if name.endswith(".rows") and not name.startswith("prefix.")
    ] == ["transformer.wte.parametrizations.weight.0.rows"]
    save_adapter(model, tmp_path, "base", weights_sha256(GPT.from_pretrained(tmp_path / "base")))
    again = GPT.from_pretrained(tmp_path / "base").eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again.hidden(tokens(NEW)), model.hidden(tokens(NEW)))
