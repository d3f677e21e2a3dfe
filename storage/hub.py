"""Reads and writes GPT-2 models in the hub's layout, and downloads them. Reads nanoGPT's too.

This module does not import the model. It returns a dict of GPTConfig fields and {name: tensor}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import reason
from config import GPTConfig, UserError
from storage.foreign import JsonObject, read_object
from storage.weights import load_pickle, plain_names, read_weights, save_tensors, state_dict

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Holds the sha256 of the weights that the adapter belongs to. This is not in adapter_config.json,
# because peft warns about keys that it does not know.
ADAPTER_BASE = "base.json"

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_BIASLESS = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")


def read_model(where: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The GPTConfig fields and the tensors of a GPT-2, with the names and shapes of model.py.

    where: a hub id, a folder in the hub's layout, or nanoGPT's ckpt.pt or its folder. Raises
    UserError if there is no such model, it is not a GPT-2, or its weights do not match its config.
    """
    path = Path(where)
    if path.is_file() or (path / "ckpt.pt").is_file():
        config, tensors = _read_nanogpt(path if path.is_file() else path / "ckpt.pt")
    else:
        config, tensors = _read_hub(path if path.is_dir() else download(str(where)))
    _check_size(config, tensors, where)
    return config, tensors


@torch.no_grad()
def copy_weights(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str | Path
) -> None:
    """Copy the tensors that `read_model` returns into a model's weights.

    Raises UserError if a tensor is missing, quantized, or has another shape than its weight.
    """
    for name, weight in weights.items():
        if name not in tensors:
            raise UserError(f"{where} is not a complete GPT-2: it has no {name}")
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise UserError(f"{where}: {name} is {tensor.dtype}; quantized weights cannot be read")
        if tensor.shape != weight.shape:
            raise UserError(
                f"{where}: {name} is {tuple(tensor.shape)}, but its config says "
                f"{tuple(weight.shape)}"
            )
        weight.copy_(tensor)


def write_model(
    folder: Path,
    config: GPTConfig,
    tensors: Mapping[str, Tensor],
    eot: int | None = None,
    score: Tensor | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Write config.json and model.safetensors in the hub's layout. The inverse is `read_model`.

    eot: id of the end-of-text token. score: weight of a classification head, (n_labels, n_embd).
    With it the model is a GPT2ForSequenceClassification, which classifies by the last token.
    labels: the names of the classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: (t.t() if name.endswith(TRANSPOSED) else t).contiguous()
        for name, t in tensors.items()
    }
    values = hub_config(config, eot)
    if score is not None:
        stored["score.weight"] = score
        values |= {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": {str(i): label for i, label in enumerate(labels)},
            "label2id": {label: i for i, label in enumerate(labels)},
            "pad_token_id": eot,
        }
    save_tensors(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def hub_config(config: GPTConfig, eot: int | None = None) -> dict[str, Any]:
    """The content of the hub's config.json for a GPTConfig. eot: id of the end-of-text token."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": "float32",
    }


def _from_hub_config(hub: JsonObject, where: str | Path) -> dict[str, Any]:
    """The fields of GPTConfig from the hub's config.json.

    Missing keys get transformers' defaults, and its alternative names of the sizes are accepted.
    Raises UserError for a model that is not exactly a GPT-2.
    """
    kind = hub.text("model_type")
    if kind is None and any(name.startswith("GPT2") for name in hub.texts("architectures")):
        kind = "gpt2"
    if kind != "gpt2":
        raise UserError(
            f"{where} is not a GPT-2: its config.json says model_type {kind!r}; give a GPT-2"
        )
    fields: dict[str, Any] = {
        "vocab_size": _size(hub, 50257, "vocab_size"),
        "block_size": _size(hub, 1024, "n_positions", "max_position_embeddings", "n_ctx"),
        "n_layer": _size(hub, 12, "n_layer", "num_hidden_layers"),
        "n_head": _size(hub, 12, "n_head", "num_attention_heads"),
        "n_embd": _size(hub, 768, "n_embd", "hidden_size"),
        "layer_norm_epsilon": hub.number("layer_norm_epsilon", 1e-5, above=0, most=1),
        "tied_head": hub.yes_no("tie_word_embeddings", True),
    }
    if fields["n_embd"] % fields["n_head"]:
        raise UserError(
            f"{hub.file}: n_embd {fields['n_embd']} is not divisible by n_head {fields['n_head']}"
        )
    if "activation_function" in hub and hub.text("activation_function") not in (
        "gelu_new",
        "gelu_pytorch_tanh",
    ):
        raise hub.wrong("activation_function", "gelu_new, as in an exact GPT-2")
    if hub.given("n_inner") and hub.whole("n_inner") != 4 * fields["n_embd"]:
        raise hub.wrong("n_inner", f"null or {4 * fields['n_embd']}, as in an exact GPT-2")
    for key, exact in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if hub.yes_no(key, exact) != exact:
            raise hub.wrong(key, f"{str(exact).lower()}, as in an exact GPT-2")
    return fields


def _size(hub: JsonObject, default: int, *names: str) -> int:
    """A size under the first of its names that the config has, or the default."""
    given = [key for key in names if key in hub]
    return hub.whole(given[0], least=0 if "n_layer" in names else 1) if given else default


def _read_hub(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config fields and tensors of a folder in the hub's layout, as model.py has them."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no model: it has no config.json; give a model's folder or a hub id"
        )
    hub = read_object(folder / "config.json")
    config, tensors = _from_hub_config(hub, folder), read_weights(folder)
    if unmerged := next(
        (name for name in tensors if ".lora_" in name or ".base_layer." in name), None
    ):
        raise UserError(
            f"{folder} holds {unmerged}, which belongs to an unmerged adapter; merge the adapter, "
            "or save it separately"
        )
    head, table = "lm_head.weight", "transformer.wte.weight"
    if config["tied_head"] and head in tensors:
        tensors.setdefault(table, tensors[head])  # the tied tensor may have either name
    if not config["tied_head"] and head not in tensors:
        # A classifier's checkpoint never has this head, even if its config says that it is untied.
        config["tied_head"] = "GPT2ForSequenceClassification" in hub.texts("architectures")
    return config, {
        name: t.t() if name.endswith(TRANSPOSED) and t.dim() == 2 else t
        for name, t in tensors.items()
    }


def _check_size(config: dict[str, Any], tensors: dict[str, Tensor], where: str | Path) -> None:
    """Raises UserError if config and weights do not match.

    This is checked before a model of the config's size, which may be huge, is allocated.
    """
    blocks = {
        int(found[1]) for name in tensors if (found := re.match(r"transformer\.h\.(\d+)\.", name))
    }
    missing = next((i for i in range(config["n_layer"]) if i not in blocks), None)
    if missing is not None:
        raise UserError(f"{where} is not a complete GPT-2: it has no transformer.h.{missing}")
    for name, rows in (("wte", config["vocab_size"]), ("wpe", config["block_size"])):
        tensor = tensors.get(f"transformer.{name}.weight")
        if tensor is None:
            raise UserError(f"{where} is not a complete GPT-2: it has no transformer.{name}.weight")
        if tensor.shape != (rows, config["n_embd"]):
            raise UserError(
                f"{where}: transformer.{name}.weight is {tuple(tensor.shape)}, but its config says "
                f"{(rows, config['n_embd'])}"
            )


def _read_nanogpt(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config fields and tensors of nanoGPT's ckpt.pt.

    Its matrices have the orientation of model.py. Names may have a wrapper's prefix. Its bias
    option may leave out biases, which become zeros here.
    """
    try:
        saved: Any = load_pickle(file)
        tensors, given = (
            plain_names(state_dict(saved["model"]), file),
            JsonObject(file, dict(saved["model_args"])),
        )
    except UserError:
        raise
    except Exception as error:  # a damaged file raises many kinds of errors
        raise UserError(f"{file} is not a nanoGPT checkpoint: {reason(error)}") from None
    config = {
        key: given.whole(key, least=1)
        for key in ("block_size", "n_layer", "n_head", "n_embd", "vocab_size")
    }
    if config["vocab_size"] == 50304:  # nanoGPT pads GPT-2's 50257 to this size
        config["vocab_size"] = 50257
        tables = {"transformer.wte.weight", "lm_head.weight"} & tensors.keys()
        tensors |= {name: tensors[name][:50257] for name in tables}
    for name in [name for name in tensors if name.endswith("weight") and name not in _BIASLESS]:
        rows = tensors[name].shape[0]
        tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(rows))
    return config, tensors


def download(hub_id: str) -> Path:
    """The local folder with a hub model's files, downloaded unless they are cached already.

    Raises UserError if the hub does not provide it.
    """
    from huggingface_hub import snapshot_download

    wanted = [
        "*.json",  # of model, shards, tokenizer in any layout, adapter and classifier
        "*.safetensors",
        "merges.txt",
    ]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, allow_patterns=["pytorch_model*.bin", "adapter_model.bin"])
    except Exception as error:
        # The hub's client raises many kinds of errors: no network, no such id, no access.
        raise UserError(
            f"there is no folder {hub_id}, and the hub has no such id: {reason(error)}; check the "
            "name and the network"
        ) from None
    return folder


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's layout."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def adapter_base(folder: str | Path) -> tuple[str | None, str | None]:
    """The base model of an adapter, as it was named in training, and the sha256 of its weights.

    Each is None if the adapter's files do not tell it.
    """
    folder = Path(folder)
    sha256 = (
        read_object(folder / ADAPTER_BASE).text("weights_sha256")
        if (folder / ADAPTER_BASE).is_file()
        else None
    )
    return adapter_config(folder).text("base_model_name_or_path"), sha256


def adapter_config(folder: Path) -> JsonObject:
    """The adapter_config.json of a folder. Raises UserError if it has none."""
    if not is_adapter(folder):
        raise UserError(f"{folder} is not a complete adapter: it has no {ADAPTER_CONFIG}")
    return read_object(folder / ADAPTER_CONFIG)
