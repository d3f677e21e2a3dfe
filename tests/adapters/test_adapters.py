"""Adapters against the `peft` package: the same outputs, the same gradients, each reads what the
other writes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters import layers, peft
from adapters.heads import Head
from adapters.layers import added, can_merge, merge
from adapters.options import ADAPTERS, LORA, Method, MethodConfig
from adapters.peft import load_adapter, save_adapter, weights_sha256
from config import GPTConfig, UserError
from decoding.cache import new_cache
from decoding.loading import open_model
from engine.optim import Optimizers, default_groups
from engine.precision import Cast
from model import GPT
from storage import hub as hub_files
from tasks import methods
from tasks.methods import groups, stored
from tasks.options import FinetuneConfig
from text.tokenizer_training import train_bpe

VOCAB, NEW, LAYERS, LABELS = 101, 3, 2, 5
SHAPE = GPTConfig(vocab_size=VOCAB, block_size=32, n_layer=LAYERS, n_head=2, n_embd=64)
METHODS = get_args(Method)
LORA_CASES = [(method, on) for method in LORA for on in layers.LORA_ON]
CASES = [*LORA_CASES, ("prefix", "attention"), ("soft-prompt", "attention")]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = GPT(SHAPE)
    for parameter in model.parameters():  # biases and gains that are not all 0 and 1
        parameter.data[:VOCAB] += 0.1 * torch.randn_like(parameter)[:VOCAB]
    model.save_pretrained(folder)
    return folder


def config(method: str, lora_on: str = "attention", **options: Any) -> FinetuneConfig:
    given: dict[str, Any] = {"prefix_tokens": 4, "prefix_width": 16, "lora_rank": 3, "last_k": 1}
    given |= {"init": "base", "method": method, "lora_on": lora_on, **options}
    return FinetuneConfig(**given)


def adapted(
    base: Path,
    method: str,
    lora_on: str = "attention",
    new: int = 0,
    train: bool = True,
    head: bool = False,
    **options: Any,
) -> GPT:
    """The base with an adapter, as after some training: its values are moved off their
    beginning."""
    model = GPT.from_pretrained(base, **options).eval()
    if head:
        model.heads["main"] = Head(64, LABELS, "last")
    if new:
        layers.add_tokens(model, range(VOCAB, VOCAB + new))
    torch.manual_seed(1)
    methods.add_adapter(model, config(method, lora_on), range(VOCAB, VOCAB + new))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if train and name in added(model):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokens(new: int = 0, rows: int = 3, length: int = 9) -> torch.Tensor:
    idx = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    idx[:, 1 : 1 + new] = torch.arange(VOCAB, VOCAB + new)
    return idx


def hub(base: Path, new: int = 0, labels: int = 0):
    """transformers' model, a classifier where there are labels."""
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    if labels:
        model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=labels)
    else:
        model = GPT2LMHeadModel.from_pretrained(base)
    if new:
        model.resize_token_embeddings(VOCAB + new, mean_resizing=False)
    return model.eval()


def of_peft(base: Path, folder: Path, new: int = 0, labels: int = 0):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft of transformers
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(hub(base, new, labels), folder).eval()


# --- the same as peft


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
    assert own.keys() == added(model)
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
    assert {name for name in added(model) if "lora_" not in name} == {
        "transformer.wte.parametrizations.weight.0.rows",
        "lm_head.parametrizations.weight.0.rows",
    }
    save_adapter(
        model, tmp_path / "adapter", "base", weights_sha256(GPT.from_pretrained(tmp_path / "base"))
    )
    with torch.no_grad():
        want = of_peft(tmp_path / "base", tmp_path / "adapter", NEW)(input_ids=tokens(NEW)).logits
        torch.testing.assert_close(model(tokens(NEW)), want, atol=1e-5, rtol=1e-5)


# --- classifiers, the same as peft's


def scores(model: GPT, head: Head, idx: torch.Tensor) -> torch.Tensor:
    return head(model.hidden(idx), torch.full((len(idx),), idx.shape[1]))


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
    with pytest.raises(UserError, match=r"\(5, 63\), and this model is 64 wide"):
        load_adapter(GPT.from_pretrained(base), tmp_path)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_new_rows_of_a_classifier_are_its_table_s_alone(tmp_path, method):
    """Its language model's head is in no loss."""
    GPT(replace(SHAPE, tied_head=False)).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", method, new=NEW, head=True)
    assert [
        name for name in added(model) if name.endswith(".rows") and not name.startswith("prefix.")
    ] == ["transformer.wte.parametrizations.weight.0.rows"]
    save_adapter(model, tmp_path, "base", weights_sha256(GPT.from_pretrained(tmp_path / "base")))
    again = GPT.from_pretrained(tmp_path / "base").eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again.hidden(tokens(NEW)), model.hidden(tokens(NEW)))


# --- how it trains


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_meant_to_train_does(base, method, new):
    """Two steps lower the loss, move what trains and nothing else, and give the optimizer state for
    that alone."""
    model = adapted(base, method, new=new, train=False).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not new:
        assert before.keys() - added(model) == dict(GPT(SHAPE).named_parameters()).keys()
    cfg = config(method, weight_decay=0.0)
    optimizer, losses = Optimizers(groups(model, cfg, 0, 10), cfg), []
    idx = tokens(new)
    for _ in range(3):
        loss = model(idx[:, :-1], idx[:, 1:], reduction="sum") / idx[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(3e-2, None, torch.tensor(True))
        model.zero_grad()
    assert losses[2] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.rpartition(".")[0] for name in optimizer.state()} == moved
    if method in ADAPTERS:
        assert moved == added(model) == stored(model, cfg)
    else:
        assert stored(model, cfg) == before.keys()
    if new:  # whatever freezes the table
        rows = model.transformer.wte.weight[VOCAB : VOCAB + new]
        assert not torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_begins_as_the_base_where_its_paper_says_so(base, method):
    plain, model = GPT.from_pretrained(base).eval(), adapted(base, method, "both", train=False)
    same = torch.allclose(model(tokens()), plain(tokens()), atol=1e-5)
    assert same == (method in LORA)


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("how", ["recompute", "compile", "autocast", "deepcopy"])
def test_gradients_are_those_of_the_plain_path(base, method, how):
    """Recomputed, traced by the compiler, under autocast, in a copy."""
    want = gradients(adapted(base, method, "both", NEW).train())
    model = adapted(base, method, "both", NEW, recompute=how == "recompute").train()
    if how == "compile":  # whole, as on a GPU, or a block
        unit = model if method in ("dora", "soft-prompt") else model.transformer.h[-1]
        unit.compile(backend="aot_eager", fullgraph=True)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext():
        got = gradients(model)
    assert got.keys() == want.keys()
    for name in got:
        error = (got[name] - want[name]).norm() / want[name].norm()
        # bf16 has 8 bits, and roundings add up
        assert error < (0.1 if how == "autocast" else 1e-4), name


def gradients(model) -> dict[str, torch.Tensor]:
    idx = tokens(NEW)
    model(idx[:, :-1], idx[:, 1:], reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ADAPTERS)
def test_trains_behind_weights_that_are_cast_once(base, method):
    model = adapted(base, method, "both", NEW, train=False).train()
    cfg, idx = config(method, weight_decay=0.0), tokens(NEW)
    cast = Cast(model, torch.bfloat16)
    copies = {name.removeprefix("module."): c for name, c in cast.copies.items()}
    # A change that bf16 would round away must last in what is no matrix: DoRA's magnitudes near 1,
    # rows, prefixes.
    assert not any("magnitude" in name or name.endswith((".rows", ".vectors")) for name in copies)
    optimizer = Optimizers(
        groups(model, cfg, 0, 1), cfg, {n: c for n, c in copies.items() if n in added(model)}
    )
    losses = []
    for _ in range(20):
        loss = cast(idx[:, :-1], idx[:, 1:], reduction="sum") / idx[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
        optimizer.step(3e-2, None, torch.tensor(True))
        model.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    plain = model(idx[:, :-1], idx[:, 1:], reduction="sum") / idx[:, 1:].numel()
    cast.refresh()
    again = cast(idx[:, :-1], idx[:, 1:], reduction="sum") / idx[:, 1:].numel()
    assert again.item() == pytest.approx(plain.item(), rel=2e-2)


def test_doras_scale_is_exact_in_bf16(base):
    """Beside a bf16 product a magnitude moves by a thousandth, and the output with it: not rounded
    to bf16's 1/256."""
    model = adapted(base, "dora", train=False)
    layer = model.get_submodule("transformer.h.0.attn.c_attn").bfloat16()
    magnitude = layer.lora_magnitude_vector.float()
    x = torch.randn(4000, 64).bfloat16()
    with torch.no_grad():
        before = layer(x).float().abs().mean()
        magnitude.weight *= 1.001
        after = layer(x).float().abs().mean()
    assert after / before == pytest.approx(1.001, abs=2e-4)


def test_dropout_is_on_the_update_alone(base):
    model = GPT.from_pretrained(base)
    methods.add_adapter(model, config("lora", lora_dropout=0.5))
    layer = model.transformer.h[0].attn.c_attn.train()
    with torch.no_grad():
        layer.lora_B += 1.0
        x = torch.randn(1, 64)
        base_part = torch.nn.functional.linear(x, layer.weight, layer.bias)
        mean = torch.stack([layer(x) - base_part for _ in range(4000)]).mean(0)
        assert (layer(x) != layer(x)).any()
        layer.eval()
        torch.testing.assert_close(mean, layer(x) - base_part, rtol=0.2, atol=0.5)


@pytest.mark.parametrize("method", ["prefix", "soft-prompt"])
def test_the_cache_continues_after_what_comes_before_the_text(base, method):
    model, idx = adapted(base, method), tokens()
    with torch.no_grad():
        cache = new_cache(model, len(idx), idx.shape[1])
        parts = [
            model(idx[:, :5], past=cache),
            *(model(idx[:, i : i + 1], past=cache) for i in range(5, 9)),
        ]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)


def test_a_prefix_without_mlp_begins_as_a_soft_prompt_of_tokens(base):
    models = []
    for method in ("prefix", "soft-prompt"):
        torch.manual_seed(7)
        model = GPT.from_pretrained(base).eval()
        methods.add_adapter(model, config(method, prefix_width=0 if method == "prefix" else 16))
        models.append(model)
    torch.testing.assert_close(models[0](tokens()), models[1](tokens()), atol=1e-5, rtol=1e-5)


# --- which parameters, at which rate


def rates(model: GPT, cfg: FinetuneConfig, step: int = 0, epoch: int = 10) -> dict[str, float]:
    found = groups(model, cfg, step, epoch)
    named = [(name, group.lr_scale) for group in found for name in group.params]
    assert len(dict(named)) == len(named)  # none twice
    return dict(named)


def parts(names) -> set[str]:
    """transformer.h.1.mlp.c_fc.weight is of h.1, transformer.ln_f.bias of ln_f."""
    short = {name.removeprefix("transformer.") for name in names}
    return {
        ".".join(name.split(".")[:2]) if name.startswith("h.") else name.split(".")[0]
        for name in short
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_full_is_what_pretraining_does(base, optimizer):
    model, cfg = GPT.from_pretrained(base), config("full", optimizer=optimizer)
    assert [g.signature() for g in groups(model, cfg, 0, 10)] == [
        g.signature() for g in default_groups(model, cfg)
    ]


@pytest.mark.parametrize(
    "method, options, expected",
    [
        ("last-layer", {}, {"wte", "ln_f"}),
        ("last-k", {"last_k": 1}, {"h.1", "ln_f"}),
        ("last-k", {"last_k": 2}, {"h.0", "h.1", "ln_f"}),
    ],
)
def test_parts_of_the_model(base, method, options, expected):
    found = rates(GPT.from_pretrained(base), config(method, **options))
    assert parts(found) == expected and set(found.values()) == {1.0}


def test_a_head_of_its_own_is_the_head_and_the_table_is_not():
    model = GPT(replace(SHAPE, tied_head=False))
    assert parts(rates(model, config("last-layer"))) == {"lm_head", "ln_f"}
    assert parts(rates(model, config("last-k"))) == {"lm_head", "ln_f", "h.1"}
    assert parts(rates(model, config("ulmfit"), step=29)) == {"lm_head", "ln_f", "h.1", "h.0"}
    assert rates(model, config("ulmfit"), step=30)["transformer.wte.weight"] == pytest.approx(
        2.6**-3
    )


def classifier(method: str, tied: bool, new: int = 0) -> GPT:
    """With heads that have every kind of parameter, and a method's part put in."""
    torch.manual_seed(0)
    model = GPT(replace(SHAPE, tied_head=tied, vocab_size=VOCAB + new)).eval()
    for pooling in ("last", "attention", "lstm"):
        model.heads[pooling] = Head(64, LABELS, pooling)
    methods.add_adapter(model, config(method), range(VOCAB, VOCAB + new))
    return model


def of_heads(model: GPT) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("heads.")}


TRUNK = {"h.0", "h.1", "ln_f", "wte", "wpe"}
WITH_HEADS = {  # what trains in the first epoch
    "full": TRUNK,
    "last-layer": set(),
    "last-k": {"ln_f", "h.1"},
    "ulmfit": set(),
    "bitfit": {"h.0", "h.1", "ln_f"},
    "lora": {"h.0", "h.1"},
    "dora": {"h.0", "h.1"},
    "prefix": {"prefix"},
    "soft-prompt": {"prefix"},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_heads_train_under_every_method_and_the_language_model_s_under_none(method, tied):
    model = classifier(method, tied)
    found = rates(model, config(method))
    assert parts(found) == {"heads"} | WITH_HEADS[method]
    assert found.keys() >= of_heads(model) and set(found.values()) == {1.0}
    if method in LORA:
        assert found.keys() == added(model) | of_heads(model)


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_what_trains_beside_heads_has_a_gradient(method, tied, new):
    """All of it, or processes would wait for each other's; new tokens' rows and the heads are part
    of it."""
    model = classifier(method, tied, new)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == rates(model, config(method), step=1000).keys()
    assert added(model) | of_heads(model) <= trained and "lm_head.weight" not in trained
    idx = tokens(new)
    sum(
        F.cross_entropy(scores(model, head, idx), torch.tensor([1, 3, 2]))
        for head in model.heads.values()
    ).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == trained
    assert all(grads[name].any() for name in of_heads(model))
    if new:
        rows = grads.get("transformer.wte.parametrizations.weight.0.rows")
        rows = grads["transformer.wte.weight"][VOCAB:] if rows is None else rows
        assert rows[:new].any(1).all()


@pytest.mark.parametrize("method", METHODS)
def test_heads_are_stored_and_counted(method):
    model = classifier(method, tied=False)
    names = {name for name, _ in model.named_parameters()}
    assert stored(model, config(method)) == (
        added(model) | of_heads(model) if method in ADAPTERS else names
    )
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    for table in ("lm_head.weight", "transformer.wte.weight"):
        numbers[table] = VOCAB * 64
    trained = rates(model, config(method))
    want = sum(numbers[name] for name in trained), sum(numbers.values())
    assert methods.count_parameters(model, groups(model, config(method), 0, 10)) == want


@pytest.mark.parametrize("tied", [True, False])
def test_bitfit_trains_every_bias_and_nothing_else_of_the_model(tied):
    model = GPT(dataclasses.replace(SHAPE, tied_head=tied))
    names = [name for name, _ in model.named_parameters()]
    found = rates(model, config("bitfit"))
    assert found == {name: 1.0 for name in names if name.endswith("bias")} and len(found) == 13
    scales = rates(model, config("bitfit", llrd=0.5))
    assert (
        scales["transformer.h.0.attn.c_attn.bias"] == 0.25 and scales["transformer.ln_f.bias"] == 1
    )


def test_ulmfit_begins_with_the_heads_alone():
    order = [{"heads"}, {"h.1", "ln_f"}, {"h.0"}, {"wte", "wpe"}]
    for step in range(0, 60, 5):
        found, thawed = (
            rates(classifier("ulmfit", tied=True), config("ulmfit"), step),
            min(step // 10 + 1, 4),
        )
        assert parts(found) == set().union(*order[:thawed])
        for depth, layer in enumerate(order[:thawed]):
            scales = [rate for name, rate in found.items() if parts([name]) <= layer]
            assert scales == pytest.approx([2.6**-depth] * len(scales))


def test_ulmfit_thaws_a_layer_an_epoch_and_divides_its_rate(base):
    model, cfg = GPT.from_pretrained(base), config("ulmfit")
    order = [{"wte", "ln_f"}, {"h.1"}, {"h.0"}, {"wpe"}]
    for step in range(60):
        found, thawed = rates(model, cfg, step), min(step // 10 + 1, 4)
        assert parts(found) == set().union(*order[:thawed])
        for depth, layer in enumerate(order[:thawed]):
            scales = [rate for name, rate in found.items() if parts([name]) <= layer]
            assert scales == pytest.approx([2.6**-depth] * len(scales))


@given(
    llrd=st.floats(0.1, 0.99),
    last_k=st.integers(1, LAYERS),
    method=st.sampled_from(["full", "last-k", *LORA]),
    head=st.booleans(),
    new=st.sampled_from([0, NEW]),
)
@settings(max_examples=20, deadline=None)
def test_llrd_lowers_the_rate_block_by_block(llrd, last_k, method, head, new):
    """What is new and in no block has the whole rate."""
    cfg = config(method, lora_on="both", llrd=llrd, last_k=last_k)
    with torch.device("meta"):
        model = GPT(replace(SHAPE, vocab_size=VOCAB + new))
        if head:
            model.heads["main"] = Head(64, LABELS, "last")
        methods.add_adapter(model, cfg, range(VOCAB, VOCAB + new))
    found = rates(model, cfg)
    assert ("heads.main.weight" in found) == head and {"h.1"} <= parts(found)
    for name, rate in found.items():
        depth = {"heads": 0, "ln_f": 0, "h.1": 1, "h.0": 2, "wte": 3, "wpe": 3}[parts([name]).pop()]
        assert rate == pytest.approx(1.0 if name.endswith(".rows") else llrd**depth)


def test_muon_takes_the_blocks_matrices(base):
    model = GPT.from_pretrained(base)
    for method, rows in (("full", 8), ("last-k", 4), ("ulmfit", 4)):
        found = groups(model, config(method, optimizer="muon"), 15, 10)
        names = [name for group in found if group.optimizer == "muon" for name in group.params]
        assert len(names) == rows and all(".h." in name and "weight" in name for name in names)


def test_vectors_have_no_decay(base):
    found = groups(adapted(base, "dora"), config("dora"), 0, 10)
    decay = {name: group.weight_decay for group in found for name in group.params}
    assert all((wd == 0) == ("magnitude" in name) for name, wd in decay.items())


def test_counts_leave_the_padding_out(base):
    model = GPT.from_pretrained(base)
    total = sum(p.numel() for p in GPT(replace(SHAPE, padded_vocab=False)).parameters())
    assert methods.count_parameters(model, groups(model, config("full"), 0, 1)) == (total, total)
    assert methods.count_parameters(model, groups(model, config("last-layer"), 0, 1)) == (
        VOCAB * 64 + 128,
        total,
    )
    model = adapted(base, "lora")
    extra = LAYERS * 3 * ((64 + 192) + (64 + 64))
    assert methods.count_parameters(model, groups(model, config("lora"), 0, 1)) == (
        extra,
        total + extra,
    )


# --- merged and written


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize(
    "method, lora_on", [*LORA_CASES, ("last-k", "attention"), ("full", "attention")]
)
def test_merged_logits_are_the_same_and_the_model_is_plain(base, tmp_path, method, lora_on, new):
    model = adapted(base, method, lora_on, new)
    want = model(tokens(new))
    assert can_merge(model)
    merge(model)
    torch.testing.assert_close(model(tokens(new)), want, atol=1e-5, rtol=1e-5)
    plain = GPT(replace(SHAPE, vocab_size=VOCAB + new))
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path).eval()(tokens(new)), want, atol=1e-5, rtol=1e-5
    )


def test_heads_stay_when_an_adapter_is_merged(base):
    model = adapted(base, "dora", "both", head=True)
    head = model.heads["main"]
    want = scores(model, head, tokens())
    merge(model)
    assert model.heads["main"] is head and not added(model) and head.weight.requires_grad
    torch.testing.assert_close(scores(model, head, tokens()), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["prefix", "soft-prompt"])
def test_a_prefix_is_not_merged(base, method):
    model = adapted(base, method)
    assert not can_merge(model)
    with pytest.raises(UserError, match="cannot be merged"):
        merge(model)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_double_without_the_base_can_be_written(base, tmp_path, method):
    """As the writer of checkpoints does it: a copy on `meta` into which only the adapter's tensors
    are put."""
    model = adapted(base, method, new=NEW)
    double = copy.deepcopy(
        model, {id(p): torch.nn.Parameter(p.to("meta")) for p in model.parameters()}
    )
    weights = {
        n: p.detach().clone()
        for n, p in model.named_parameters()
        if n in stored(model, config(method))
    }
    double.load_state_dict(weights, strict=False, assign=True)
    for source, folder in ((model, "a"), (double, "b")):
        save_adapter(source, tmp_path / folder, "base", "0" * 64)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    size = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors"))
    assert size < 4 * VOCAB * 64  # less than the smallest table of the base


def test_the_hash_is_of_the_weights_and_not_of_their_file(base, tmp_path):
    model = GPT.from_pretrained(base)
    one = weights_sha256(model)
    assert weights_sha256(GPT.from_pretrained(base, padded_vocab=False)) == one
    torch.save(hub(base).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert weights_sha256(GPT.from_pretrained(tmp_path)) == one
    model.heads["main"] = Head(64, LABELS, "last")  # no part of a base
    assert weights_sha256(model) == one
    model.transformer.h[1].mlp.c_fc.bias.data[7] += 1e-6
    assert weights_sha256(model) != one


def test_base_of(base, tmp_path):
    save_adapter(adapted(base, "lora"), tmp_path, "somewhere", "5" * 64)
    assert hub_files.adapter_base(tmp_path) == ("somewhere", "5" * 64)
    assert hub_files.is_adapter(tmp_path) and not hub_files.is_adapter(base)
    (tmp_path / hub_files.ADAPTER_BASE).unlink()
    assert hub_files.adapter_base(tmp_path) == ("somewhere", None)  # one that peft wrote


# --- refusals


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "lora", "optimizer": "muon"}, "--optimizer adamw"),
        ({"method": "last-layer", "optimizer": "muon"}, "--optimizer adamw"),
        ({"method": "soft-prompt", "llrd": 0.9}, "does not train these"),
        ({"method": "prefix", "llrd": 0.9}, "does not train these"),
        ({"method": "last-layer", "llrd": 0.9}, "does not train these"),
        ({"method": "ulmfit", "llrd": 0.9}, "sets them itself"),
        ({"method": "dora", "init": "scratch"}, "--init"),
        ({"method": "full", "lora_rank": 4}, "--lora-rank belongs to --method lora or dora"),
        ({"method": "full", "lora_on": "both"}, "--lora-on belongs to --method lora or dora"),
        (
            {"method": "lora", "prefix_tokens": 4},
            "--prefix-tokens belongs to --method prefix or soft-prompt",
        ),
        ({"method": "soft-prompt", "prefix_width": 0}, "--prefix-width belongs to --method prefix"),
        ({"method": "full", "last_k": 1}, "--last-k belongs to --method last-k"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    with pytest.raises(UserError) as error:
        methods.check_method(FinetuneConfig(**options))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_alone_is_fine(method):
    methods.check_method(FinetuneConfig(method=method))
    if method in ("full", "last-k", *LORA):
        methods.check_method(FinetuneConfig(method=method, llrd=0.9))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "last-k", "last_k": 3}, "2 blocks"),
        ({"method": "prefix", "prefix_tokens": 32}, "--prefix-tokens"),
        ({"method": "soft-prompt", "prefix_tokens": 40}, "--prefix-tokens"),
    ],
)
def test_what_the_model_has_no_room_for(base, options, words):
    with pytest.raises(UserError, match=words):
        methods.add_adapter(GPT.from_pretrained(base), MethodConfig(**options))


def spoil(folder: Path, **changes) -> None:
    file = folder / hub_files.ADAPTER_CONFIG
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def rename(folder: Path, old: str, new: str) -> None:
    file = folder / hub_files.ADAPTER_WEIGHTS
    save_file({key.replace(old, new): tensor for key, tensor in load_file(file).items()}, file)


def rows_of_the_head(folder: Path) -> None:
    rename(folder, "transformer.wte.", "lm_head.")
    spoil(folder, trainable_token_indices={"lm_head": list(range(VOCAB, VOCAB + NEW))})


def cut(folder: Path, key: str) -> None:
    file = folder / hub_files.ADAPTER_WEIGHTS
    tensors = load_file(file)
    save_file({k: t[..., :-1].contiguous() if key in k else t for k, t in tensors.items()}, file)


@pytest.mark.parametrize(
    "method, damage, words",
    [
        ("lora", lambda f: spoil(f, peft_type="IA3"), "of the kind IA3"),
        ("lora", lambda f: spoil(f, use_rslora=True), "use_rslora"),
        ("lora", lambda f: spoil(f, alpha_pattern={"c_attn": 3}), "alpha_pattern"),
        ("lora", lambda f: spoil(f, init_lora_weights="pissa"), "pissa"),
        ("lora", lambda f: spoil(f, r=None), "has no r"),
        ("lora", lambda f: spoil(f, r=5), r"r is 5; .*lora_A.weight is \(3, 64\)"),
        ("lora", lambda f: spoil(f, use_dora=True), "lora_magnitude_vector is missing"),
        ("dora", lambda f: spoil(f, use_dora=False), "says it is none"),
        ("lora", lambda f: rename(f, "h.1.", "h.7."), r"h\.7\..*no product"),
        ("lora", lambda f: rename(f, "lora_A", "lora_embedding_A"), "no part of a LoRA"),
        ("lora", lambda f: spoil(f, trainable_token_indices=None), "does not say of which tokens"),
        ("lora", lambda f: rows_of_the_head(f), "rows of its own for the head"),
        ("lora", lambda f: cut(f, "lora_B"), r"lora_B.weight is"),
        (
            "lora",
            lambda f: cut(f, "trainable_tokens"),
            "trainable_token_indices|the new tokens of transformer.wte",
        ),
        ("prefix", lambda f: cut(f, "prompt"), "256 wide"),
        ("soft-prompt", lambda f: cut(f, "prompt"), "64 wide"),
        ("prefix", lambda f: rename(f, "prompt", "x"), "no prompt_embeddings"),
        (
            "lora",
            lambda f: (f / hub_files.ADAPTER_WEIGHTS).unlink(),
            "no adapter_model.safetensors",
        ),
        ("lora", lambda f: (f / hub_files.ADAPTER_CONFIG).unlink(), "no adapter_config.json"),
        ("lora", lambda f: (f / hub_files.ADAPTER_WEIGHTS).write_bytes(b"x" * 9), "cannot be read"),
        ("lora", lambda f: (f / hub_files.ADAPTER_CONFIG).write_text("{"), "not valid JSON"),
        ("lora", lambda f: spoil(f, r="three"), "adapter_config.json: r is 'three'"),
        ("lora", lambda f: spoil(f, r=10**12), "r is 1000000000000"),
        ("lora", lambda f: spoil(f, r=0), "r is 0"),
        ("lora", lambda f: spoil(f, lora_alpha=float("nan")), "lora_alpha is NaN"),
        ("lora", lambda f: spoil(f, lora_alpha=[6]), "lora_alpha is a list"),
        ("lora", lambda f: spoil(f, lora_dropout=-1), "lora_dropout is -1"),
        ("lora", lambda f: spoil(f, use_dora="no"), "use_dora is 'no'"),
        ("lora", lambda f: spoil(f, peft_type=["LORA"]), "peft_type is a list"),
        ("lora", lambda f: spoil(f, base_model_name_or_path=7), "base_model_name_or_path is 7"),
        (
            "lora",
            lambda f: spoil(f, trainable_token_indices={"wte": ["a"]}),
            "trainable_token_indices",
        ),
        (
            "lora",
            lambda f: (f / hub_files.ADAPTER_CONFIG).write_text("[]"),
            "must hold a JSON object",
        ),
    ],
)
def test_folders_that_cannot_be_loaded(base, tmp_path, method, damage, words):
    save_adapter(
        adapted(base, method, new=NEW), tmp_path, "base", weights_sha256(GPT.from_pretrained(base))
    )
    damage(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load_adapter(GPT.from_pretrained(base), tmp_path)
    assert "\n" not in str(error.value)


def test_an_adapter_for_another_base(base, tmp_path):
    sha = weights_sha256(GPT.from_pretrained(base))
    save_adapter(adapted(base, "lora"), tmp_path, "the-base", sha)
    other = GPT(SHAPE)
    with pytest.raises(UserError) as error:
        load_adapter(other, tmp_path)
    message = str(error.value)
    assert "the-base" in message and sha[:12] in message and weights_sha256(other)[:12] in message


# --- adapters as others save them


def older(folder: Path, rename: Callable[[str], str] = lambda name: name) -> None:
    """adapter_model.bin in place of adapter_model.safetensors."""
    file = folder / hub_files.ADAPTER_WEIGHTS
    torch.save(
        {rename(name): tensor for name, tensor in load_file(file).items()},
        folder / "adapter_model.bin",
    )
    file.unlink()


NAMES = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "of a base without a head": lambda name: name.replace(
        "base_model.model.transformer.", "base_model.model."
    ),
    "in memory": lambda name: re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name),
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("method", ["lora", "soft-prompt"])
def test_an_older_adapter_is_read_under_every_wrapper(base, tmp_path, method, names):
    model = adapted(base, method)
    save_adapter(model, tmp_path, str(base), weights_sha256(GPT.from_pretrained(base)))
    older(tmp_path, NAMES[names])
    again = GPT.from_pretrained(base).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))


def test_numbers_in_quotes_are_read(base, tmp_path):
    model = adapted(base, "dora")
    save_adapter(model, tmp_path, str(base), weights_sha256(GPT.from_pretrained(base)))
    said = json.loads((tmp_path / hub_files.ADAPTER_CONFIG).read_text())
    spoil(
        tmp_path,
        r=str(said["r"]),
        lora_alpha=str(said["lora_alpha"]),
        lora_dropout="0.0",
        use_dora=1,
    )
    again = GPT.from_pretrained(base).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(again(tokens()), model(tokens()))


class Malicious:
    """Unpickled, it makes a folder: a stand-in for any command."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_adapter_that_is_no_weights_is_refused_and_not_run(base, tmp_path):
    save_adapter(
        adapted(base, "lora"), tmp_path, str(base), weights_sha256(GPT.from_pretrained(base))
    )
    (tmp_path / hub_files.ADAPTER_WEIGHTS).unlink()
    file = tmp_path / "adapter_model.bin"
    torch.save({"a": Malicious(tmp_path / "executed")}, file)
    for content in (file.read_bytes(), b"", b"junk", b"PK\x03\x04broken"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model\.bin cannot be read") as error:
            load_adapter(GPT.from_pretrained(base), tmp_path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["absolute", "beside"])
def test_an_adapter_without_a_tokenizer_takes_its_bases(tmp_path, where):
    words = train_bpe(["the fox and the dog "] * 20, 280, tmp_path / "words")
    model = GPT(
        GPTConfig(vocab_size=words.vocab_size, block_size=32, n_layer=1, n_head=2, n_embd=32)
    )
    model.save_pretrained(tmp_path / "base")
    words.save(tmp_path / "base")
    sha256 = weights_sha256(model)
    layers.add_lora(model, ["transformer.h.0.attn.c_attn"], False, 2, 4.0, 0.0)
    named = str(tmp_path / "base") if where == "absolute" else "../base"
    save_adapter(model, tmp_path / "adapter", named, sha256)
    older(tmp_path / "adapter")
    opened, tokenizer = open_model(
        str(tmp_path / "adapter"), None, torch.device("cpu"), torch.float32
    )
    assert tokenizer.sha256 == words.sha256
    idx = torch.tensor([words.encode("the fox")])
    torch.testing.assert_close(opened(idx), model.eval()(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("named", [None, "", "no/such/base"])
def test_an_adapter_whose_base_is_not_there_says_so(base, tmp_path, named):
    save_adapter(adapted(base, "lora"), tmp_path, str(base), "0" * 64)
    spoil(tmp_path, base_model_name_or_path=named)
    with pytest.raises(UserError, match="base_model_name_or_path in") as error:
        open_model(str(tmp_path), None, torch.device("cpu"), torch.float32)
    assert "\n" not in str(error.value)
