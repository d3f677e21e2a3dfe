"""A GPT-2's weights in every layout that people hand on, as {name: tensor} with the hub's plain
names.

Layouts: safetensors or pickles, whole or in shards with an index. What saved them wraps names:
torch.compile, DDP and FSDP, PEFT, Lightning. Pickles are read as weights only: nothing in them is
run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from base.errors import reason
from config import UserError
from storage.foreign import read_object

# Parts of a name that a wrapper puts anywhere, and those that may stand before a GPT-2's own name.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HOLDERS = {"model", "base_model", "pretrained_model", "net"}
TRUNK = {"h", "wte", "wpe", "ln_f"}
# keys under which trainers keep the weights
NESTED = ("state_dict", "model_state_dict", "model", "module")

# What PEFT puts into names while an adapter is in memory: the adapter's own name, and copies of
# trained modules.
ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?=\.weight$)")
SAVED_MODULE = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.weight$)")

Wanted = Callable[[str], bool]


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers added: `transformer.h.0...`, `lm_head.weight`,
    `score.weight`."""
    name = ADAPTER_NAME.sub(r".\1", SAVED_MODULE.sub("", name))
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in HOLDERS:
        parts = parts[1:]
    return ".".join(["transformer", *parts] if parts[0] in TRUNK else parts)


def plain_names(tensors: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The tensors by their plain names. Raises UserError where two different ones have the same."""
    found: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        before, other = found.setdefault(plain, (name, tensor))
        if other is not tensor and not (other.shape == tensor.shape and torch.equal(other, tensor)):
            raise UserError(
                f"{where} holds two models: {before} and {name} differ; keep one of them"
            )
    return {name: tensor for name, (_, tensor) in found.items()}


def read_weights(folder: Path, wanted: Wanted = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a model's folder by their plain names, those that are `wanted`.

    Raises UserError where the folder holds no weights, lacks a shard, or a file is damaged.
    """
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (folder / name).is_file():
            files = _shards(folder / name) if name.endswith(".json") else [folder / name]
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors |= read_tensors(file, wanted)
            return plain_names(tensors, folder)
    raise UserError(
        f"{folder} has a config.json but neither model.safetensors nor pytorch_model.bin"
    )


def _shards(index: Path) -> list[Path]:
    named = read_object(index).nested("weight_map")
    files = sorted({named.text(key) or "" for key in named.values})
    if not files:
        raise UserError(
            f"the weights in {index.parent} cannot be read: {index.name} names no file in its "
            "weight_map"
        )
    for file in files:
        if not (index.parent / file).is_file():
            raise UserError(
                f"the weights in {index.parent} cannot be read: {file or 'a file'}, which "
                f"{index.name} names, is missing; copy it beside the others"
            )
    return [index.parent / file for file in files]


def read_tensors(file: Path, wanted: Wanted = lambda name: True) -> dict[str, Tensor]:
    """The tensors of one file, safetensors or a pickle, by the names that it has. Raises UserError
    like `read_weights`."""
    from safetensors import safe_open

    try:
        # safetensors calls a file that may not be read one that is not there
        file.open("rb").close()
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                stored = tensors.keys()  # it is no dict
                names = [name for name in stored if wanted(plain_name(name))]
                return {name: tensors.get_tensor(name) for name in names}
        return {
            key: t for key, t in state_dict(load_pickle(file)).items() if wanted(plain_name(key))
        }
    except Exception as error:  # a damaged file raises half a dozen kinds
        raise UserError(f"{file} cannot be read: {reason(error)}") from None


def load_pickle(file: Path) -> object:
    """A pickle of tensors and plain values; one that would run anything else is refused with
    ValueError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # whose own text advises to load it regardless
        raise ValueError(
            f"{file.name} is damaged or holds something other than weights, and was not run"
        ) from None


def state_dict(value: object) -> dict[str, Tensor]:
    """The weights in what a trainer saved: itself, or what it keeps under a usual key. Raises
    ValueError for neither."""
    while isinstance(value, dict) and not all(
        isinstance(tensor, Tensor) for tensor in value.values()
    ):
        inner = next((value[key] for key in NESTED if isinstance(value.get(key), dict)), None)
        if inner is None:
            break
        value = inner
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    ):
        raise ValueError("it is not a dictionary of tensors")
    return value


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the mode that the umask allows; safetensors 0.8 lets only its
    owner read it."""
    from safetensors.torch import save_file

    path.touch()  # the mode that an ordinary file gets here, or that the file had before
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
