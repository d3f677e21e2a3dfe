"""Which parameters each method trains, at which rate, and options that do not go together."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adapted import LABELS, LAYERS, METHODS, NEW, SHAPE, VOCAB, adapted, config, scores, tokens
from adapters.heads import Head
from adapters.layers import adapter_parameters
from adapters.options import ADAPTERS, LORA, MethodConfig
from config import UserError
from engine.optim import default_groups
from model import GPT
from tasks import methods
from tasks.methods import groups, stored
from tasks.options import FinetuneConfig


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
def test_classifier_heads_train_under_every_method(method, tied):
    model = classifier(method, tied)
    found = rates(model, config(method))
    assert parts(found) == {"heads"} | WITH_HEADS[method]
    assert found.keys() >= of_heads(model) and set(found.values()) == {1.0}
    if method in LORA:
        assert found.keys() == adapter_parameters(model) | of_heads(model)


@pytest.mark.parametrize("new", [0, NEW])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_what_trains_beside_heads_has_a_gradient(method, tied, new):
    """All of it, or processes would wait for each other's; new tokens' rows and the heads are part
    of it."""
    model = classifier(method, tied, new)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == rates(model, config(method), step=1000).keys()
    assert (
        adapter_parameters(model) | of_heads(model) <= trained and "lm_head.weight" not in trained
    )
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
        adapter_parameters(model) | of_heads(model) if method in ADAPTERS else names
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
