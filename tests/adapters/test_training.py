"""How adapters train: what moves, in which precision, and what they begin as."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from adapted import METHODS, NEW, SHAPE, VOCAB, adapted, config, tokens
from adapters.layers import adapter_parameters
from adapters.options import ADAPTERS, LORA
from decoding.cache import new_cache
from engine.optim import Optimizers
from engine.precision import Cast
from model import GPT
from tasks import methods
from tasks.methods import groups, stored


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_meant_to_train_does(base, method, new):
    """Two steps lower the loss, move what trains and nothing else, and give the optimizer state for
    that alone."""
    model = adapted(base, method, new=new, train=False).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if not new:
        assert (
            before.keys() - adapter_parameters(model) == dict(GPT(SHAPE).named_parameters()).keys()
        )
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
        assert moved == adapter_parameters(model) == stored(model, cfg)
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
        groups(model, cfg, 0, 1),
        cfg,
        {n: c for n, c in copies.items() if n in adapter_parameters(model)},
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
