"""Adapters merged, written and read; folders that are refused."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapted import LABELS, LORA_CASES, NEW, SHAPE, VOCAB, adapted, config, hub, scores, tokens
from adapters import layers
from adapters.heads import Head
from adapters.layers import adapter_parameters, can_merge, merge
from adapters.options import ADAPTERS
from adapters.peft import load_adapter, save_adapter, weights_sha256
from config import GPTConfig, UserError
from decoding.loading import open_model
from model import GPT
from storage import hub as hub_files
from tasks.methods import stored
from text.tokenizer_training import train_bpe


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
    assert (
        model.heads["main"] is head and not adapter_parameters(model) and head.weight.requires_grad
    )
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
        ("dora", lambda f: spoil(f, use_dora=False), "does not set use_dora"),
        ("lora", lambda f: rename(f, "h.1.", "h.7."), r"h\.7\..*no linear layer"),
        ("lora", lambda f: rename(f, "lora_A", "lora_embedding_A"), "no part of a LoRA"),
        ("lora", lambda f: spoil(f, trainable_token_indices=None), "does not name the tokens"),
        ("lora", lambda f: rows_of_the_head(f), "separate rows for the head"),
        ("lora", lambda f: cut(f, "lora_B"), r"lora_B.weight is"),
        (
            "lora",
            lambda f: cut(f, "trainable_tokens"),
            "trainable_token_indices|the new tokens of transformer.wte",
        ),
        ("prefix", lambda f: cut(f, "prompt"), "needs 256 columns"),
        ("soft-prompt", lambda f: cut(f, "prompt"), "needs 64 columns"),
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
