"""Adapter files in PEFT's layout: the `peft` package reads what this writes, and this reads what
`peft` writes.

Two more files hold what PEFT has no place for: the hash of the base's weights, and the rows of new
tokens.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from adapters.layers import (
    TABLES,
    DoRA,
    Prefix,
    SoftPrompt,
    add_lora,
    add_rows,
    add_tokens,
    always_trained,
    check_prefix_fits,
    freeze,
    loras,
    token_rows,
)
from config import UserError
from model import GPT, Linear
from storage.checkpoint import locate
from storage.foreign import JsonObject
from storage.hub import ADAPTER_BASE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_base, adapter_config
from storage.weights import plain_names, read_tensors, save_tensors

LEGACY_WEIGHTS = "adapter_model.bin"  # PEFT's file before version 0.9
# Rows of new tokens of a prefix or soft prompt, for which PEFT has no place.
NEW_TOKENS = "new_tokens.safetensors"
ROOT = "base_model.model."  # PEFT's prefix of parameter names
# PEFT's name for the weights of a classifier's scores, by kind of adapter.
SCORES = {"LORA": ROOT + "score.weight"} | dict.fromkeys(
    ("PREFIX_TUNING", "PROMPT_TUNING"), "base_model.score.weight"
)
DELTA = ".token_adapter.trainable_tokens_delta"  # PEFT's suffix for the rows of new tokens


def weights_sha256(model: GPT) -> str:
    """The sha256 of a plain model's weights, in hex.

    It covers the tensors by name, in fp32 and without padding, so it does not depend on the file
    that held them. A classifier's heads do not count, because they are no part of the base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name.startswith("heads."):
            continue
        rows = model.config.vocab_size if name.removesuffix(".weight") in TABLES else None
        tensor = parameter.detach()[:rows].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def locate_base(folder: str | Path) -> str:
    """The base of an adapter: the folder named in training, the same path below the adapter's
    folder, or a hub id.

    Raises UserError if the adapter names no base, or if the base does not exist.
    """
    base = adapter_base(folder)[0]
    if not base:
        raise UserError(
            f"{folder} is an adapter that does not name its base: set base_model_name_or_path in "
            f"{ADAPTER_CONFIG}"
        )
    beside = Path(folder) / base
    try:
        return locate(str(beside) if not Path(base).exists() and beside.exists() else base)
    except UserError as error:
        hint = f"correct base_model_name_or_path in {Path(folder) / ADAPTER_CONFIG}"
        raise UserError(f"{folder} is an adapter for {base}: {error}; {hint}") from None


def save_adapter(
    model: GPT, folder: str | Path, base: str, base_sha256: str, score: Tensor | None = None
) -> None:
    """Write the model's adapter in PEFT's layout, in fp32. The model's own weights are not read.

    `base` names the base, and `base_sha256` is its weights_sha256. The rows of new tokens go where
    PEFT stores them for LoRA and DoRA. For a prefix or soft prompt they go into NEW_TOKENS, as
    `ids` and `rows` of each table. With `score` (n_labels, n_embd) the adapter is for a
    GPT2ForSequenceClassification, which classifies by the last token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = token_rows(model)
    if model.prefix is None:
        config, tensors = _lora_to_peft(model)
        config["trainable_token_indices"] = {
            n.rpartition(".")[2]: r.ids.tolist() for n, r in rows.items()
        } or None
        tensors |= {ROOT + name + DELTA: r.rows for name, r in rows.items()}
    else:
        config, tensors = _prefix_to_peft(model)
        if rows:
            beside = {
                f"{n}.{k}": t
                for n, r in rows.items()
                for k, t in (("ids", r.ids), ("rows", r.rows))
            }
            save_tensors(_on_cpu(beside), folder / NEW_TOKENS)
    config |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    if score is not None:
        # PEFT always writes both names
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
        tensors[SCORES[config["peft_type"]]] = score
    save_tensors(_on_cpu(tensors), folder / ADAPTER_WEIGHTS, {"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / ADAPTER_BASE).write_text(
        json.dumps({"base": base, "weights_sha256": base_sha256}, indent=2) + "\n", encoding="utf-8"
    )


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _lora_to_peft(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = loras(model)
    tensors = {}
    for name, layer in layers.items():
        tensors |= {
            f"{ROOT}{name}.lora_A.weight": layer.lora_A,
            f"{ROOT}{name}.lora_B.weight": layer.lora_B,
        }
        if isinstance(layer, DoRA):
            tensors[f"{ROOT}{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector.weight
    one = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.lora_dropout.p,
        "use_dora": isinstance(one, DoRA),
        "target_modules": list(layers),
        "fan_in_fan_out": True,  # the hub's GPT-2 stores its matrices transposed
    }
    return config, tensors


def _prefix_to_peft(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    prefix, shape = model.prefix, model.config
    config = {
        "num_virtual_tokens": prefix.length,
        "token_dim": shape.n_embd,
        "num_transformer_submodules": 1,
    }
    config |= {"num_attention_heads": shape.n_head, "num_layers": shape.n_layer}
    if isinstance(prefix, Prefix):
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        return config, {"prompt_embeddings": prefix.table()}
    return config | {"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": prefix.vectors}


def load_adapter(model: GPT, folder: str | Path) -> Tensor | None:
    """Add the adapter of a folder, written by this project or by `peft`, to its base `model`, a
    plain GPT, and freeze the base.

    The vocabulary grows by the adapter's new tokens. Returns the weights of the scores (n_labels,
    n_embd) if the adapter is for a classifier by the last token. Raises UserError for another base,
    for shapes that do not fit, and for a kind of adapter that this project does not support.
    """
    folder = Path(folder)
    config, tensors = adapter_config(folder), _weights(folder)
    kind = config.text("peft_type")
    if kind not in SCORES:
        raise UserError(
            f"{folder} holds an adapter of the kind {kind}; use one of LoRA, DoRA, prefix or "
            "prompt tuning"
        )
    _check_base(model, folder)
    score = _score_from_peft(model, folder, tensors)
    if kind == "LORA":
        rows = _rows_from_peft(folder, config, tensors)
        _lora_from_peft(model, folder, config, tensors)
    else:
        beside = folder / NEW_TOKENS
        rows = _rows_beside(read_tensors(beside)) if beside.is_file() else {}
        model.prefix = _prefix_from_peft(model, folder, kind, tensors)
    _load_rows(model, folder, rows)
    freeze(model, always_trained(model))
    return score


def _weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by plain names, from either of PEFT's file formats. The older format is
    read as weights only, so that no code in it runs."""
    file = next(
        (folder / name for name in (ADAPTER_WEIGHTS, LEGACY_WEIGHTS) if (folder / name).is_file()),
        None,
    )
    if file is None:
        raise UserError(
            f"{folder} is not a whole adapter: it has no {ADAPTER_WEIGHTS}; copy the whole folder"
        )
    return plain_names(read_tensors(file), folder)


def _check_base(model: GPT, folder: Path) -> None:
    base, expected = adapter_base(folder)
    if expected is not None and expected != (found := weights_sha256(model)):
        raise UserError(
            f"{folder} is an adapter for {base} (weights {expected[:12]}), but the weights found "
            f"are others ({found[:12]}); correct base_model_name_or_path in its {ADAPTER_CONFIG}"
        )


# Settings of PEFT's LoRA that would change its results and are not supported: for each key, the
# values that change nothing.
SUPPORTED_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights
}


def _lora_from_peft(
    model: GPT, folder: Path, config: JsonObject, tensors: dict[str, Tensor]
) -> None:
    for key, values in SUPPORTED_LORA.items():
        if (value := config.values.get(key)) not in (None, *values):
            raise UserError(
                f"{folder} holds a LoRA with {key} {value!r}, which is not supported; train it "
                "without, or merge it into its base with peft"
            )
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith("." + end)), None)
        if end is None:
            raise UserError(
                f"{folder} holds {key}, which is no part of a LoRA or DoRA; only plain LoRA and "
                "DoRA adapters can be loaded"
            )
        parts.setdefault(key.removesuffix("." + end), {})[end] = tensor
    rank, alpha = config.whole("r", least=1), config.number("lora_alpha")
    dropout = config.number("lora_dropout", 0.0, least=0, most=1)
    modules = dict(model.named_modules())
    for name in parts:
        if not isinstance(modules.get(name), Linear):
            raise UserError(
                f"{folder} adapts {name}, which is no linear layer of a block of this model; use "
                "the adapter's own base"
            )
        down = parts[name].get(ends[0])
        # checked before matrices of that rank are allocated
        if down is not None and (down.dim() != 2 or len(down) != rank):
            raise config.wrong(
                "r", f"the rank of the weights, of which {name}.{ends[0]} is {tuple(down.shape)}"
            )
    add_lora(model, list(parts), config.yes_no("use_dora", False), rank, alpha, dropout)
    for name, layer in loras(model).items():
        own = {ends[0]: layer.lora_A, ends[1]: layer.lora_B}
        if isinstance(layer, DoRA):
            own[ends[2]] = layer.lora_magnitude_vector.weight
        if not own.keys() >= parts[name].keys():
            raise UserError(
                f"{folder} has magnitudes of a DoRA, but its {ADAPTER_CONFIG} does not set "
                "use_dora; set it to true"
            )
        for end, parameter in own.items():
            _copy(parameter, parts[name].get(end), f"{folder}: {name}.{end}")


def _prefix_from_peft(model: GPT, folder: Path, kind: str, tensors: dict[str, Tensor]) -> nn.Module:
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise UserError(
            f"the weights of {folder} hold no prompt_embeddings; copy the whole adapter again"
        )
    config = model.config
    width = config.n_embd * (2 * config.n_layer if kind == "PREFIX_TUNING" else 1)
    if rows.dim() != 2 or rows.shape[1] != width:
        raise UserError(
            f"{folder}: prompt_embeddings are {tuple(rows.shape)}, but this model needs {width} "
            "columns; use the adapter's own base"
        )
    check_prefix_fits(model, len(rows))
    rows = rows.to(model.transformer.wte.weight)
    return Prefix(config, rows, width=0) if kind == "PREFIX_TUNING" else SoftPrompt(rows)


def _score_from_peft(model: GPT, folder: Path, tensors: dict[str, Tensor]) -> Tensor | None:
    """Take the weights of a classifier's scores out of `tensors`."""
    score = tensors.pop("score.weight", None)
    tensors.pop("score.original_module.weight", None)  # what it was before training
    width = model.config.n_embd
    if score is not None and (score.dim() != 2 or score.shape[1] != width):
        raise UserError(
            f"{folder}: the scores' weights are {tuple(score.shape)}, but this model needs {width} "
            "columns; use the adapter's own base"
        )
    return score


RowsByTable = dict[str, tuple[Tensor, Tensor]]  # by table, ids (n,) and rows (n, n_embd)


def _rows_from_peft(folder: Path, config: JsonObject, tensors: dict[str, Tensor]) -> RowsByTable:
    """Take the rows of new tokens out of `tensors`."""
    found = {key: tensors.pop(key) for key in list(tensors) if key.endswith(DELTA)}
    indices = config.values.get("trainable_token_indices") or {}
    rows = {}
    for key, tensor in found.items():
        name = key.removesuffix(DELTA)
        ids = (
            indices.get(name.rpartition(".")[2], indices.get(name))
            if isinstance(indices, dict)
            else indices
        )
        if name not in TABLES or ids is None:
            raise UserError(
                f"{folder} holds {key}, but its {ADAPTER_CONFIG} does not name the tokens; set "
                "trainable_token_indices"
            )
        if (
            not isinstance(ids, list)
            or any(type(id) is not int or id < 0 for id in ids)
            or len(ids) != len(tensor)
        ):
            raise config.wrong(
                "trainable_token_indices", f"the {len(tensor)} ids of the rows for {name}"
            )
        rows[name] = torch.tensor(ids), tensor
    return rows


def _rows_beside(tensors: dict[str, Tensor]) -> RowsByTable:
    names = [name.removesuffix(".ids") for name in tensors if name.endswith(".ids")]
    return {name: (tensors[f"{name}.ids"], tensors[f"{name}.rows"]) for name in names}


def _load_rows(model: GPT, folder: Path, rows: RowsByTable) -> None:
    """Add the rows of new tokens to the tables that the file names. A classifier's adapter has none
    for a head that it does not use."""
    size = max((int(ids.max()) + 1 for ids, _ in rows.values()), default=0)
    if size > model.config.vocab_size:
        add_tokens(model, range(model.config.vocab_size, size))
    for name, (ids, tensor) in rows.items():
        if name == "lm_head" and model.config.tied_head:
            raise UserError(
                f"{folder} has separate rows for the head, but this model's head is tied to its "
                "embeddings; use the adapter's own base"
            )
        add_rows(model, name, ids)
        _copy(token_rows(model)[name].rows, tensor, f"{folder}: the new tokens of {name}")


@torch.no_grad()
def _copy(parameter: Tensor, tensor: Tensor | None, what: str) -> None:
    if tensor is None or tensor.shape != parameter.shape:
        shape = "missing" if tensor is None else str(tuple(tensor.shape))
        raise UserError(
            f"{what} is {shape}, but this model needs {tuple(parameter.shape)}; use the adapter's "
            "own base"
        )
    parameter.copy_(tensor)
