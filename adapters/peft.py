"""Adapters on the disk, in PEFT's layout: the `peft` package reads what is written here, and the
other way round.

Beside PEFT's two files stands what it has no place for: which weights the adapter is for, and rows
of new tokens.
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
    check_room,
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

OLDER_WEIGHTS = "adapter_model.bin"  # as PEFT wrote them before version 0.9
NEW_TOKENS = (
    "new_tokens.safetensors"  # beside a prefix or soft prompt, where PEFT has no place for them
)
ROOT = "base_model.model."  # begins PEFT's names
# By kind of adapter, PEFT's name of the weights of a classifier's scores.
SCORES = {"LORA": ROOT + "score.weight"} | dict.fromkeys(
    ("PREFIX_TUNING", "PROMPT_TUNING"), "base_model.score.weight"
)
DELTA = ".token_adapter.trainable_tokens_delta"  # ends PEFT's name of the rows of new tokens


def weights_sha256(model: GPT) -> str:
    """Of a plain model's weights: by name, in fp32, without padding; so of what they are, not of
    the file they are in.

    A classifier's heads are left aside: they are no part of the base.
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
    """The base of an adapter: a folder as it was named in training, or below the adapter's own;
    else a hub id.

    Raises UserError where the adapter names none, or there is none.
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
    """Write the model's adapter in PEFT's layout, fp32. The model's own weights are not looked at.

    `base` names the weights it belongs to, `base_sha256` is their weights_sha256. New tokens go
    where PEFT has them beside LoRA and DoRA, else into a file beside, `ids` and `rows` by table.
    With `score` (n_labels, n_embd) it is an adapter for a classifier by the last token, of
    GPT2ForSequenceClassification.
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
        # as PEFT always writes it
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
        "fan_in_fan_out": True,  # the hub's GPT-2 holds its matrices transposed
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
    """Put the adapter of a folder, written here or by `peft`, into its base, a plain model; the
    base is frozen.

    Returns the scores' weights (n_labels, n_embd) where it is for a classifier by the last token.
    The vocabulary grows where the adapter has tokens that the base lacks. Raises UserError for
    another base, shapes that do not fit, and a kind of adapter that this project does not have.
    """
    folder = Path(folder)
    config, tensors = adapter_config(folder), _weights(folder)
    kind = config.text("peft_type")
    if kind not in SCORES:
        raise UserError(
            f"{folder} holds an adapter of the kind {kind}; LoRA, DoRA, prefix and prompt tuning "
            "can be read"
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
    """By plain names, of PEFT's two forms; the older one is read as weights only."""
    file = next(
        (folder / name for name in (ADAPTER_WEIGHTS, OLDER_WEIGHTS) if (folder / name).is_file()),
        None,
    )
    if file is None:
        raise UserError(f"{folder} is not a whole adapter: it has no {ADAPTER_WEIGHTS}")
    return plain_names(read_tensors(file), folder)


def _check_base(model: GPT, folder: Path) -> None:
    base, expected = adapter_base(folder)
    if expected is not None and expected != (found := weights_sha256(model)):
        raise UserError(
            f"{folder} is an adapter for {base} (weights {expected[:12]}), and these are other "
            f"weights ({found[:12]})"
        )


# What would change the numbers and is not done here: by key of a LoRA's configuration, the values
# that leave it be.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights
}


def _lora_from_peft(
    model: GPT, folder: Path, config: JsonObject, tensors: dict[str, Tensor]
) -> None:
    for key, values in PLAIN_LORA.items():
        if (value := config.values.get(key)) not in (None, *values):
            raise UserError(f"{folder} holds a LoRA with {key} {value!r}, which cannot be read")
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith("." + end)), None)
        if end is None:
            raise UserError(f"{folder} holds {key}, which is no part of a LoRA or DoRA")
        parts.setdefault(key.removesuffix("." + end), {})[end] = tensor
    rank, alpha = config.whole("r", least=1), config.number("lora_alpha")
    dropout = config.number("lora_dropout", 0.0, least=0, most=1)
    modules = dict(model.named_modules())
    for name in parts:
        if not isinstance(modules.get(name), Linear):
            raise UserError(f"{folder} adapts {name}, which is no product of a block of this model")
        down = parts[name].get(ends[0])
        # before matrices of that rank are made
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
                f"{folder} has magnitudes of a DoRA and a {ADAPTER_CONFIG} that says it is none"
            )
        for end, parameter in own.items():
            _copy(parameter, parts[name].get(end), f"{folder}: {name}.{end}")


def _prefix_from_peft(model: GPT, folder: Path, kind: str, tensors: dict[str, Tensor]) -> nn.Module:
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise UserError(f"the weights of {folder} hold no prompt_embeddings")
    config = model.config
    width = config.n_embd * (2 * config.n_layer if kind == "PREFIX_TUNING" else 1)
    if rows.dim() != 2 or rows.shape[1] != width:
        raise UserError(
            f"{folder}: prompt_embeddings are {tuple(rows.shape)}, and this model's are {width} "
            "wide"
        )
    check_room(model, len(rows))
    rows = rows.to(model.transformer.wte.weight)
    return Prefix(config, rows, width=0) if kind == "PREFIX_TUNING" else SoftPrompt(rows)


def _score_from_peft(model: GPT, folder: Path, tensors: dict[str, Tensor]) -> Tensor | None:
    """Taken out of `tensors`."""
    score = tensors.pop("score.weight", None)
    tensors.pop("score.original_module.weight", None)  # what it was before training
    width = model.config.n_embd
    if score is not None and (score.dim() != 2 or score.shape[1] != width):
        raise UserError(
            f"{folder}: the scores' weights are {tuple(score.shape)}, and this model is {width} "
            "wide"
        )
    return score


Rows = dict[str, tuple[Tensor, Tensor]]  # by table, ids (n,) and rows (n, n_embd)


def _rows_from_peft(folder: Path, config: JsonObject, tensors: dict[str, Tensor]) -> Rows:
    """Taken out of `tensors`."""
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
                f"{folder} holds {key}, and its {ADAPTER_CONFIG} does not say of which tokens"
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


def _rows_beside(tensors: dict[str, Tensor]) -> Rows:
    names = [name.removesuffix(".ids") for name in tensors if name.endswith(".ids")]
    return {name: (tensors[f"{name}.ids"], tensors[f"{name}.rows"]) for name in names}


def _load_rows(model: GPT, folder: Path, rows: Rows) -> None:
    """On the tables that have them in the file: a classifier's adapter has none for a head that it
    does not use."""
    size = max((int(ids.max()) + 1 for ids, _ in rows.values()), default=0)
    if size > model.config.vocab_size:
        add_tokens(model, range(model.config.vocab_size, size))
    for name, (ids, tensor) in rows.items():
        if name == "lm_head" and model.config.tied_head:
            raise UserError(
                f"{folder} has rows of its own for the head, and this model's head is its table"
            )
        add_rows(model, name, ids)
        _copy(token_rows(model)[name].rows, tensor, f"{folder}: the new tokens of {name}")


@torch.no_grad()
def _copy(parameter: Tensor, tensor: Tensor | None, what: str) -> None:
    if tensor is None or tensor.shape != parameter.shape:
        shape = "missing" if tensor is None else str(tuple(tensor.shape))
        raise UserError(f"{what} is {shape}, and this model's is {tuple(parameter.shape)}")
    parameter.copy_(tensor)
