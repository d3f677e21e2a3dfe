"""GPT-2 as published: sizes, initialization, and agreement with transformers in values, loading and
training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.layers import PrefixPast, add_tokens
from config import PRESETS, GPTConfig, UserError
from decoding.cache import KVCache, new_cache
from kernels.linear_cross_entropy import IGNORE
from model import GPT

SMALL = GPTConfig(vocab_size=331, block_size=32, n_layer=2, n_head=4, n_embd=64)


def gpt(**changes: Any) -> GPT:
    """A small model whose biases and gains are random too, so that every parameter matters."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, **changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("wte.weight") and "lm_head" not in name:
                p += 0.1 * torch.randn_like(p)
    return model.eval()


def tokens(*shape: int, vocab: int = SMALL.vocab_size, seed: int = 1) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def hf(vocab_size: int = 331, tied: bool = True, **changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        tie_word_embeddings=tied,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        **changes,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model.eval()


def same_function(ours: GPT, theirs: GPT2LMHeadModel, atol: float = 1e-4) -> None:
    vocab = ours.config.vocab_size
    for T in (1, 7, ours.config.block_size):
        idx = tokens(2, T, vocab=vocab)
        with torch.no_grad():
            logits = ours.eval()(idx)
            assert logits.shape == (2, T, vocab)
            torch.testing.assert_close(logits, theirs(idx).logits, atol=atol, rtol=0)


# --- the architecture


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124439808),
        ("gpt2-medium", 354823168),
        ("gpt2-large", 774030080),
        ("gpt2-xl", 1557611200),
    ],
)
def test_parameter_counts(preset, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(**PRESETS[preset]))  # ty: ignore[invalid-argument-type]
    assert model.n_params() == count
    assert sum(p.numel() for p in model.parameters()) == count + 47 * model.config.n_embd


def test_untied_and_unpadded_counts():
    tied, untied = GPT(SMALL), GPT(dataclasses.replace(SMALL, tied_head=False, padded_vocab=False))
    assert (
        untied.n_params()
        == tied.n_params() + 331 * 64
        == sum(p.numel() for p in untied.parameters())
    )


def test_flops_per_token():
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token(1024) / 1e6 == pytest.approx(855.17, abs=0.005)


def test_the_initial_weights_have_gpt2s_deviations():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=500, block_size=256, n_layer=3, n_head=4, n_embd=256)
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            rows = config.vocab_size if "wte" in name else None
            # Five standard errors. That of a deviation over n numbers is std / sqrt(2 n).
            assert p[:rows].std().item() == pytest.approx(
                std, rel=5 / math.sqrt(2 * p[:rows].numel())
            ), name


def test_dropout_is_off_by_default_and_in_evaluation():
    assert GPTConfig().dropout == 0
    idx = tokens(2, 16)
    still, dropping = gpt().train(), gpt(dropout=0.3).train()
    assert torch.equal(still(idx), still(idx))
    assert not torch.equal(dropping(idx), dropping(idx))
    torch.testing.assert_close(dropping.eval()(idx), still.eval()(idx))


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_dropout_reaches_attention(attention):
    model = gpt(attention=attention, dropout=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # only attention's own dropout remains
    idx = tokens(1, 16)
    assert not torch.equal(model.train()(idx), model(idx))
    assert torch.equal(model.eval()(idx), model(idx))


# --- the vocabulary's padding


@pytest.mark.parametrize("tied_head", [True, False])
def test_padding_rows_never_leave_the_model(tmp_path, tied_head):
    model = gpt(tied_head=tied_head)
    assert model.head_weight.shape[0] == 384 and not model.head_weight[331:].any()
    idx = tokens(2, 8)
    assert model(idx).shape[-1] == 331
    model(idx, idx, reduction="sum").backward()
    assert model.head_weight.grad is not None and not model.head_weight.grad[331:].any()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["transformer.wte.weight"].shape == (331, 64)
    assert ("lm_head.weight" in saved) is not tied_head
    assert tied_head or saved["lm_head.weight"].shape == (331, 64)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 331


def test_padding_takes_no_part_in_the_loss():
    padded, plain = gpt(), gpt(padded_vocab=False)
    plain.load_state_dict({k: v[:331] if "wte" in k else v for k, v in padded.state_dict().items()})
    with torch.no_grad():
        padded.head_weight[331:] = 9.0  # even if the padding rows are not zero
    idx = tokens(2, 8)
    for reduction in ("none", "sum"):
        torch.testing.assert_close(
            padded(idx, idx, reduction=reduction), plain(idx, idx, reduction=reduction)
        )


def test_both_loss_paths_agree():
    model, idx, targets = gpt(), tokens(3, 16), tokens(3, 16, seed=5)
    targets[:, ::3] = IGNORE
    losses = model(idx, targets)
    assert losses.shape == (3, 16) and losses.dtype == torch.float32 and not losses[:, ::3].any()
    torch.testing.assert_close(model(idx, targets, reduction="sum"), losses.sum())


# --- loading and saving


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [331, 50257])
def test_loads_what_transformers_saved(tmp_path, vocab, tied):
    theirs = hf(vocab, tied)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config.tied_head is tied and ours.config.block_size == 32
    same_function(ours, theirs)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [331, 50257])
def test_transformers_loads_what_we_saved(tmp_path, vocab, tied):
    ours = gpt(vocab_size=vocab, tied_head=tied)
    ours.save_pretrained(tmp_path, eot=vocab - 1)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == vocab - 1
    same_function(ours, theirs)


def test_round_trip_is_exact(tmp_path):
    model = gpt()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path, dropout=0.1, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert again.config.dropout == 0.1 and again.config.recompute


def test_loads_shards(tmp_path):
    theirs = hf()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (
        tmp_path / "model.safetensors"
    ).exists()
    same_function(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_loads_keys_with_and_without_prefix_and_old_buffers(tmp_path, file, prefix):
    """The hub's own gpt2 has no prefix and holds each layer's causal mask. Older files also hold
    masked_bias."""
    theirs = hf()
    theirs.config.save_pretrained(tmp_path)
    state = {
        k.replace("transformer.", prefix): v.clone()
        for k, v in theirs.transformer.state_dict(prefix="transformer.").items()
    }
    for layer in range(2):
        state[f"{prefix}h.{layer}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
        state[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / file) if file.endswith("safetensors") else torch.save(
        state, tmp_path / file
    )
    same_function(GPT.from_pretrained(tmp_path), theirs)


def nanogpt(folder: Path, bias: bool, vocab: int = 331, prefix: str = "_orig_mod.") -> GPT:
    """Write ckpt.pt as nanoGPT does (torch.nn.Linear's orientation, tied head listed twice), and
    return the same model."""
    model = gpt(vocab_size=min(vocab, 50257))
    if not bias:
        for name, p in model.named_parameters():
            p.data *= 0 if name.endswith("bias") else 1
    state = {k: v.clone() for k, v in model.state_dict().items() if bias or not k.endswith("bias")}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab].clone()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    args = dict(
        n_layer=2, n_head=4, n_embd=64, block_size=32, bias=bias, vocab_size=vocab, dropout=0.0
    )
    saved = {
        "model": {prefix + k: v for k, v in state.items()},
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "batch_size": 12, "compile": True},
    }
    torch.save(saved, folder / "ckpt.pt")
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("vocab", "prefix"), [(331, "_orig_mod."), (331, ""), (50304, "_orig_mod.")]
)
def test_loads_nanogpt(tmp_path, bias, vocab, prefix):
    expected, idx = nanogpt(tmp_path, bias, vocab, prefix), tokens(2, 32)
    for where in (tmp_path, tmp_path / "ckpt.pt"):
        model = GPT.from_pretrained(where)
        assert model.config.vocab_size == min(vocab, 50257)
        assert torch.equal(model.eval()(idx), expected(idx))


class Malicious:
    """Makes a folder when it is unpickled, as an example of code that a pickle can run."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_is_not_weights_is_refused_and_not_run(tmp_path):
    hf().config.save_pretrained(tmp_path)
    torch.save(
        {"transformer.wte.weight": Malicious(tmp_path / "executed")}, tmp_path / "pytorch_model.bin"
    )
    refused(tmp_path, "pytorch_model.bin is damaged or holds something other than weights")
    torch.save({"model": Malicious(tmp_path / "executed")}, tmp_path / "ckpt.pt")
    refused(tmp_path / "ckpt.pt", "not a nanoGPT checkpoint")
    assert not (tmp_path / "executed").exists()


def refused(where: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        GPT.from_pretrained(where)
    assert "\n" not in str(error.value)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "not a GPT-2: .*llama"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_head": 5}, "n_embd 64 is not divisible by n_head 5"),
        ({"n_embd": 128}, "its config says"),
        ({"vocab_size": 500}, "wte.weight"),
        ({"n_layer": 3}, "not a complete GPT-2: it has no transformer.h.2"),
        ({"n_layer": None}, "n_layer is null"),
    ],
)
def test_a_config_of_other_weights_or_not_of_gpt2(tmp_path, changes, match):
    gpt().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"model_type": "gpt2"}', '{"model_type": "gp'])
def test_a_config_that_is_not_a_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json")


def test_folders_without_a_model(tmp_path):
    refused(tmp_path, "no config.json")
    gpt().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "neither model.safetensors nor pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 5, 300, 20_000])
def test_truncated_safetensors(tmp_path, keep):
    gpt().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02", b"PK\x03\x04broken"])
def test_damaged_pickles(tmp_path, content):
    hf().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    refused(tmp_path, "cannot be read")
    (tmp_path / "ckpt.pt").write_bytes(content)
    refused(tmp_path, "not a nanoGPT checkpoint")


def test_pickles_of_other_objects(tmp_path):
    hf().config.save_pretrained(tmp_path)
    for content in ([1, 2], {"epoch": 3}, {"state": {"a": torch.zeros(2)}}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        refused(tmp_path, "cannot be read|not a complete GPT-2")


def test_a_tensor_or_a_shard_is_missing(tmp_path):
    hf().save_pretrained(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    refused(tmp_path, "cannot be read")
    index.write_text("{}")
    refused(tmp_path, "cannot be read")


# --- attention


@pytest.mark.parametrize("T", [1, 2, 31, 32])
def test_explicit_attention_equals_sdpa(T):
    idx, segments = tokens(2, T), (torch.arange(T) // 5).expand(2, T)
    fused, explicit = gpt(), gpt(attention="explicit")
    torch.testing.assert_close(explicit(idx), fused(idx), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        explicit(idx, segments=segments), fused(idx, segments=segments), atol=1e-5, rtol=1e-5
    )


def test_no_token_sees_a_later_one():
    model, idx = gpt(), tokens(1, 32)
    other = idx.clone()
    other[:, 20:] = tokens(1, 12, seed=9)
    torch.testing.assert_close(model(idx)[:, :20], model(other)[:, :20])


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_documents_do_not_see_each_other(attention):
    model, idx = gpt(attention=attention), tokens(2, 32)
    segments = torch.tensor([[0] * 10 + [1] * 22, [3] * 25 + [7] * 7])
    logits = model(idx, segments=segments)
    changed = idx.clone()
    changed[0, :10], changed[1, :25] = tokens(10, seed=8), tokens(25, seed=9)
    later = model(changed, segments=segments)
    # The second document does not depend on the first.
    torch.testing.assert_close(later[0, 10:], logits[0, 10:])
    torch.testing.assert_close(later[1, 25:], logits[1, 25:])
    # The first document has the same logits without the second.
    torch.testing.assert_close(logits[:1, :10], model(idx[:1, :10]))
    # The second has the same logits without the first, at the same positions.
    alone = GPT(model.config).eval()
    alone.load_state_dict(model.state_dict())
    with torch.no_grad():
        alone.transformer.wpe.weight[:22] = model.transformer.wpe.weight[10:32]
    torch.testing.assert_close(logits[:1, 10:], alone(idx[:1, 10:]), atol=1e-5, rtol=1e-5)


def test_one_segment_is_plain_causal_attention():
    model, idx = gpt(), tokens(2, 16)
    torch.testing.assert_close(
        model(idx, segments=torch.zeros(2, 16, dtype=torch.int64)), model(idx)
    )


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
@pytest.mark.parametrize("parts", [[32], [1] * 32, [31, 1], [1, 31], [5, 1, 1, 20, 5], [16, 16]])
@torch.no_grad()
def test_a_cache_gives_the_same_logits_in_any_split(attention, parts):
    model, idx = gpt(attention=attention), tokens(2, 32)
    cache = KVCache(model.config, 2, 32)
    pieces = [model(piece, past=cache) for piece in idx.split(parts, dim=1)]
    assert cache.length == 32
    torch.testing.assert_close(torch.cat(pieces, 1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [[16], [1] * 16, [9, 7], [2, 1, 13], [12, 1, 1, 1, 1]])
@torch.no_grad()
def test_cache_with_left_padding(parts):
    """Rows of different lengths, padded at the left, have the same logits as each row alone."""
    model, idx, pad = gpt(), tokens(3, 16), torch.tensor([0, 3, 11])
    cache = KVCache(model.config, 3, 16, pad=pad)
    logits = torch.cat([model(piece, past=cache) for piece in idx.split(parts, dim=1)], 1)
    assert logits.isfinite().all()
    for row, p in enumerate(pad.tolist()):
        torch.testing.assert_close(
            logits[row : row + 1, p:], model(idx[row : row + 1, p:]), atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_cache_select_repeats_rows():
    model, idx, pad = gpt(), tokens(2, 8), torch.tensor([0, 2])
    cache = KVCache(model.config, 2, 12, pad=pad)
    model(idx, past=cache)
    rows = [1, 1, 0]
    cache.select(rows)
    more = tokens(3, 2, seed=4)
    logits = model(more, past=cache)
    for i, row in enumerate(rows):
        alone = torch.cat([idx[row, pad[row] :], more[i]])[None]
        torch.testing.assert_close(logits[i], model(alone)[0, -2:], atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_block_size_is_refused():
    model = gpt()
    with pytest.raises(UserError, match="33 tokens is longer than block_size 32"):
        model(tokens(1, 33))
    cache = KVCache(model.config, 1, 32)
    model(tokens(1, 32), past=cache)
    with pytest.raises(UserError, match="block_size"):
        model(tokens(1, 1), past=cache)


# --- a query index: one position of each row

AT = torch.tensor([0, 11, 4])


def prefixed(model: GPT, recompute: bool = False) -> GPT:
    """Add random keys and values before the text, like prefix tuning."""
    draw = torch.Generator().manual_seed(5)
    drawn = [torch.randn(2, 1, 4, 3, 16, generator=draw) for _ in range(model.config.n_layer)]
    layers = [(keys, values) for keys, values in drawn]
    model.prefix = torch.nn.Module()
    model.prefix.past, model.prefix.length = lambda model: PrefixPast(layers), 3
    return model


POSITIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "explicit": dict(attention="explicit"),
    "recompute": dict(recompute=True),
    "a kernel": dict(kernels=("cpu_attention",)),
    "one block": dict(n_layer=1),
    "no block": dict(n_layer=0),
    "prefix": {},
    "documents": {},
}


@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_query_index_selects_among_all_states(case, dtype):
    """Compares values and gradients of all weights, in fp64 and in bf16 autocast."""
    model, idx = gpt(**POSITIONS[case]).train(), tokens(3, 12)
    model = (prefixed(model) if case == "prefix" else model).to(
        torch.float64 if dtype == torch.float64 else None
    )
    segments = (torch.arange(12) // 5).expand(3, -1) if case == "documents" else None
    weigh = torch.randn(3, 64, generator=torch.Generator().manual_seed(6)).double()

    def run(**options: Any) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            hidden = model.hidden(idx, segments=segments, **options)
        states = hidden[:, 0] if options else hidden[torch.arange(3), AT]
        model.zero_grad()
        (states.double() * weigh).sum().backward()
        return states.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    (states, gradients), (expected, of_all) = run(query_index=AT), run()
    assert states.shape == (3, 64) and len(gradients) == len(of_all)
    rtol = 1e-9 if dtype == torch.float64 else 0.05  # a few of bf16's 2^-8
    for ours, exact in ((states, expected), *zip(gradients, of_all, strict=True)):
        assert (ours - exact).norm() <= rtol * exact.norm()


def test_a_query_index_computes_less_of_the_last_block():
    model, rows = gpt(n_layer=3), []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda _, x, y: rows.append(y.shape))
    model.hidden(tokens(3, 12), query_index=AT)
    assert rows == [(3, 12, 64), (3, 12, 64), (3, 1, 64)]


def test_a_query_index_after_a_left_padded_cache():
    model, pad = gpt(), torch.tensor([2, 0, 5])
    caches = [new_cache(model, 3, 32, pad) for _ in range(2)]
    for cache in caches:
        model.hidden(tokens(3, 7), past=cache)
    idx = tokens(3, 12, seed=2)
    found = model.hidden(idx, past=caches[0], query_index=AT)
    torch.testing.assert_close(found[:, 0], model.hidden(idx, past=caches[1])[torch.arange(3), AT])
    assert caches[0].length == caches[1].length == 19


# --- training


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("autocast", [False, True])
def test_recompute_gives_equal_gradients(dropout, autocast):
    idx, grads = tokens(2, 32), []
    for recompute in (False, True):
        model = gpt(dropout=dropout, recompute=recompute).train()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(idx, idx, reduction="sum")
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_trains_as_transformers_does(tmp_path):
    """In 200 fp32 steps from the same weights on the same batches, the losses differ by less than
    1e-4."""
    torch.manual_seed(0)
    ours = GPT(SMALL)
    ours.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="sdpa").train()
    models = (ours.train(), theirs)
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
        for m in models
    ]
    # A language that can be learnt: each token follows from the one before it, with some noise.
    follows = torch.randperm(331, generator=torch.Generator().manual_seed(4))
    apart, losses = 0.0, []
    for step in range(200):
        columns = [tokens(4, seed=step)]
        while len(columns) < 33:
            columns.append(
                (follows[columns[-1]] + tokens(4, vocab=2, seed=len(columns) + step)) % 331
            )
        batch = torch.stack(columns, 1)
        idx, targets = batch[:, :-1], batch[:, 1:]
        a = ours(idx, targets, reduction="sum") / targets.numel()
        b = torch.nn.functional.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
        for model, loss, optimizer in zip(models, (a, b), optimizers):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        apart = max(apart, abs(a.item() - b.item()))
        losses.append(a.item())
    assert apart <= 1e-4
    assert losses[-1] < losses[0] - 1  # the model did learn


def test_impossible_shapes_are_refused():
    for changes in ({"n_head": 5}, {"n_layer": -1}, {"vocab_size": 0}):
        with pytest.raises(UserError) as error:
            dataclasses.replace(SMALL, **changes)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="try --n-head 4"):
        GPTConfig(n_embd=64, n_head=5)


def test_fp8_keeps_the_gelu_kernel_and_only_trains(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "kernels.ops.fp8_linear",
        lambda x, w, bias: calls.append(bias) or torch.nn.functional.linear(x, w, bias),
    )
    monkeypatch.setattr(
        "kernels.bias_gelu.bias_gelu",
        lambda x, bias, triton: torch.nn.functional.gelu(x + bias, approximate="tanh"),
    )
    torch.manual_seed(0)
    plain = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=32))
    eight = GPT(dataclasses.replace(plain.config, fp8=True, kernels=("bias_gelu",)))
    eight.load_state_dict(plain.state_dict())
    idx = torch.randint(50, (2, 16))
    torch.testing.assert_close(eight(idx), plain(idx))
    # c_attn, c_proj, c_fc, c_proj
    assert [bias is None for bias in calls] == [False, False, True, False]
    eight.eval()(idx)
    assert len(calls) == 4


def test_new_tokens_start_at_the_mean_and_old_ones_stay() -> None:
    for tied in (True, False):
        # Beyond the vocabulary, within it, and across its end.
        for ids in (range(300, 303), range(290, 293), range(299, 301)):
            torch.manual_seed(0)
            model = GPT(GPTConfig(300, 16, n_layer=1, n_head=2, n_embd=32, tied_head=tied))
            tables = [model.transformer.wte] + ([] if tied else [model.lm_head])
            before = [table.weight.detach().clone() for table in tables]
            add_tokens(model, ids)
            assert model.config.vocab_size == max(300, ids.stop)
            for table, old in zip(tables, before, strict=True):
                new, kept = table.weight.detach(), [i for i in range(300) if i not in ids]
                assert torch.equal(new[kept], old[kept])
                torch.testing.assert_close(
                    new[list(ids)], old[: ids.start].mean(0).expand(len(ids), -1)
                )
                assert (
                    len(new) == model.config.padded_vocab_size
                    and not new[model.config.vocab_size :].any()
                )
            assert model(torch.tensor([[ids[0], 5]])).shape == (1, 2, model.config.vocab_size)


# --- other layouts of the same weights

WRAPPED = {
    "plain": lambda name: name,
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of a compiled model": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "compiled blocks": lambda name: re.sub(r"(\.h\.\d+)\.", r"\1._orig_mod.", name),
    "a compiled trunk": lambda name: name.replace("transformer.", "transformer._orig_mod."),
    "Lightning": lambda name: f"model.{name}",
    "Lightning, compiled": lambda name: f"model._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "DDP of PEFT": lambda name: f"module.base_model.model.{name}",
    "the trunk alone": lambda name: name.removeprefix("transformer."),
    "the trunk alone, compiled": lambda name: f"_orig_mod.{name.removeprefix('transformer.')}",
}
LAYOUTS = ("safetensors", "safetensors shards", "bin", "bin shards", "nested bin")


def save_as(folder: Path, tensors: dict[str, Tensor], layout: str) -> None:
    names = sorted(tensors)
    halves = [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]
    end = "safetensors" if layout.startswith("safetensors") else "bin"
    stem = "model" if end == "safetensors" else "pytorch_model"
    parts = (
        dict(zip((f"{stem}-{i}-of-2.{end}" for i in (1, 2)), halves))
        if "shards" in layout
        else {f"{stem}.{end}": tensors}
    )
    for file, part in parts.items():
        if end == "safetensors":
            save_file({name: t.contiguous() for name, t in part.items()}, folder / file)
        else:
            torch.save(
                {"state_dict": part, "epoch": 3} if layout == "nested bin" else part, folder / file
            )
    if len(parts) > 1:
        index = {
            "metadata": {},
            "weight_map": {name: file for file, part in parts.items() for name in part},
        }
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_in_every_layout_and_wrapper(tmp_path, layout, wrapper):
    theirs = hf()
    theirs.config.save_pretrained(tmp_path)
    tensors = {
        name: t.clone() for name, t in theirs.state_dict().items() if name != "lm_head.weight"
    }
    # Old checkpoints hold this buffer.
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["v_head.summary.weight"] = torch.zeros(1, 64)
    save_as(tmp_path, {WRAPPED[wrapper](name): t for name, t in tensors.items()}, layout)
    idx = tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            GPT.from_pretrained(tmp_path).eval()(idx), theirs(idx).logits, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("names", ["both", "table", "head"])
def test_a_tied_head_is_stored_once_or_twice(tmp_path, dtype, names):
    theirs = hf().to(dtype)
    theirs.config.save_pretrained(tmp_path)
    left_out = {"both": (), "table": ("lm_head.weight",), "head": ("transformer.wte.weight",)}[
        names
    ]
    save_as(
        tmp_path,
        {name: t.clone() for name, t in theirs.state_dict().items() if name not in left_out},
        "bin",
    )
    ours = GPT.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert torch.equal(ours.head_weight[:331], theirs.lm_head.weight.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_of_the_hub_is_found_in_every_layout(tmp_path, layout, tied):
    from adapters import heads

    theirs, score = hf(tied=True), torch.randn(3, 64)
    theirs.config.update(
        {"architectures": ["GPT2ForSequenceClassification"], "tie_word_embeddings": tied}
    )
    theirs.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    theirs.config.save_pretrained(tmp_path)
    tensors = {
        name: t.clone() for name, t in theirs.state_dict().items() if name != "lm_head.weight"
    }
    save_as(
        tmp_path,
        {f"module.{name}": t for name, t in (tensors | {"score.weight": score}).items()},
        layout,
    )
    found = heads.find(tmp_path)
    assert (
        found
        and found[0].labels == ("no", "maybe", "yes")
        and torch.equal(found[1]["weight"], score)
    )
    assert torch.equal(
        GPT.from_pretrained(tmp_path).transformer.wpe.weight, tensors["transformer.wpe.weight"]
    )


@pytest.mark.parametrize(
    "labels", [{"0": "no"}, {"0": "no", "1": 1, "2": "yes"}, ["no", "maybe", "yes"], "no"]
)
def test_labels_of_the_wrong_kind_are_refused(tmp_path, labels):
    from adapters import heads

    gpt().save_pretrained(tmp_path, score=torch.zeros(3, 64), labels=["a", "b", "c"])
    edit_config(tmp_path, id2label=labels)
    with pytest.raises(UserError, match="id2label"):
        heads.find(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors shards", "bin shards"])
def test_a_missing_shard_is_named(tmp_path, layout):
    theirs = hf()
    theirs.config.save_pretrained(tmp_path)
    save_as(tmp_path, {name: t.clone() for name, t in theirs.state_dict().items()}, layout)
    shard = next(iter(sorted(tmp_path.glob("*-2-of-2.*"))))
    shard.unlink()
    refused(tmp_path, f"{shard.name}, which .*index.json names, is missing")
    index = next(iter(tmp_path.glob("*.index.json")))
    for text in (
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 3}}',
        "{",
        '{"weight_map": {"a": null}}',
    ):
        index.write_text(text)
        refused(tmp_path, "index.json|a file")


def test_two_models_in_one_file_are_refused(tmp_path):
    theirs = hf()
    theirs.config.save_pretrained(tmp_path)
    tensors = {name: t.clone() for name, t in theirs.state_dict().items()}
    save_as(tmp_path, tensors | {"module.transformer.wpe.weight": torch.zeros(32, 64)}, "bin")
    refused(tmp_path, "holds two models")
    save_as(
        tmp_path,
        tensors | {"transformer.h.0.attn.c_attn.lora_A.default.weight": torch.zeros(2, 64)},
        "bin",
    )
    refused(tmp_path, "belongs to an unmerged adapter")
    save_as(
        tmp_path, tensors | {"transformer.ln_f.weight": torch.zeros(64, dtype=torch.int8)}, "bin"
    )
    refused(tmp_path, "quantized")


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module."])
def test_loads_nanogpt_saved_under_ddp(tmp_path, prefix):
    expected, idx = nanogpt(tmp_path, True, 331, prefix), tokens(2, 32)
    assert torch.equal(GPT.from_pretrained(tmp_path).eval()(idx), expected(idx))


# --- the values in config.json

READ = [
    {"layer_norm_epsilon": "1e-05"},
    {"layer_norm_epsilon": "0.00001"},
    {"n_layer": "2"},
    {"n_layer": 2.0},
    {"n_head": " 4 "},
    {"n_embd": "64.0"},
    {"vocab_size": 331.0},
    {"n_inner": 256},
    {"n_inner": "256"},
    {"n_inner": None},
    {"tie_word_embeddings": 1},
    {"scale_attn_weights": 1},
    {"add_cross_attention": 0},
    {"activation_function": "gelu_pytorch_tanh"},
    {"model_type": None},
]


@pytest.mark.parametrize("changes", READ, ids=str)
def test_an_unambiguous_config_value_is_read(tmp_path, changes):
    model = gpt()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    assert GPT.from_pretrained(tmp_path).config == model.config


def test_other_names_and_missing_keys_are_as_in_transformers(tmp_path):
    model = gpt()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    names = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
    }
    kept = ("architectures", "vocab_size", "n_positions", *names)
    file.write_text(
        json.dumps({names.get(key, key): config[key] for key in kept}), encoding="utf-8-sig"
    )
    assert GPT.from_pretrained(tmp_path).config == model.config
    assert GPT2Config(**json.loads(file.read_text(encoding="utf-8-sig"))).n_embd == 64


SIZES = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
NO_SIZE = (
    None,
    "many",
    "",
    "1e999",
    -1,
    -2.0,
    2.5,
    "2.5",
    True,
    float("nan"),
    float("inf"),
    [2],
    {},
    1 << 70,
    "0x10",
)
WRONG = [(key, value) for key in SIZES for value in NO_SIZE] + [
    *(
        ("layer_norm_epsilon", value)
        for value in (None, "small", 0, -1e-5, float("nan"), 1e30, True, [])
    ),
    *(
        (key, value)
        for key in ("scale_attn_weights", "tie_word_embeddings")
        for value in (None, "true", 2, [])
    ),
    ("scale_attn_weights", False),
    ("scale_attn_by_inverse_layer_idx", 1),
    ("add_cross_attention", True),
    ("activation_function", "gelu_fast"),
    ("activation_function", None),
    ("activation_function", 3),
    ("n_inner", 255),
    ("n_inner", "wide"),
    ("model_type", 3),
    ("vocab_size", 332),
    ("n_positions", 31),
    ("n_layer", 10**9),
    ("vocab_size", 10**12),
    ("architectures", "GPT2LMHeadModel"),
]


def test_a_value_of_the_wrong_kind_names_file_and_key(tmp_path):
    gpt().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    right = file.read_text()
    for key, value in WRONG:
        file.write_text(right)
        edit_config(
            tmp_path, **{key: value} | ({"model_type": None} if key == "architectures" else {})
        )
        named = {
            "vocab_size": "vocab_size|wte",
            "n_positions": "n_positions|wpe",
            "n_layer": r"n_layer|transformer\.h\.2",
        }
        refused(tmp_path, named.get(key, key))
