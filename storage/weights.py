"""Reads a GPT-2's weights from the usual layouts, as {name: tensor} with the hub's plain names.

The layouts are safetensors and pickles, in one file or in shards with an index. torch.compile, DDP,
FSDP, PEFT and Lightning add their own parts to the names, which are removed here. Pickles are read
as weights only, so that no code in them runs.
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

# WRAPPERS are parts that a wrapper may put anywhere in a name. HOLDERS may only precede the name
# that the weight has in a GPT-2.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HOLDERS = {"model", "base_model", "pretrained_model", "net"}
TRUNK = {"h", "wte", "wpe", "ln_f"}
# Keys under which trainers save the weights.
NESTED = ("state_dict", "model_state_dict", "model", "module")

# PEFT adds these to names while an adapter is in memory: the adapter's name, and the name of the
# wrapper around modules that are trained whole.
ADAPTER_NAME = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+(?=\.weight$)")
SAVED_MODULE = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.weight$)")

Wanted = Callable[[str], bool]


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers added.

    Examples are `transformer.h.0...`, `lm_head.weight` and `score.weight`.
    """
    name = ADAPTER_NAME.sub(r".\1", SAVED_MODULE.sub("", name))
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in HOLDERS:
        parts = parts[1:]
    return ".".join(["transformer", *parts] if parts[0] in TRUNK else parts)


def plain_names(tensors: dict[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """The tensors by their plain names. Raises UserError if two different tensors share a name."""
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
    """The tensors of a model's folder by their plain names.

    wanted: tells by the plain name whether a tensor is read. Raises UserError if the folder holds
    no weights, a shard is missing, or a file is damaged.
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
        f"{folder} has a config.json but neither model.safetensors nor pytorch_model.bin; copy the "
        "weights into it"
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
    """The tensors of one file, safetensors or a pickle, by their names in the file.

    wanted: see `read_weights`. Raises UserError if the file cannot be read or is damaged.
    """
    from safetensors import safe_open

    try:
        # For a file without read permission, safetensors would say that it does not exist.
        file.open("rb").close()
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                stored = tensors.keys()  # `tensors` is not a dict and cannot be iterated
                names = [name for name in stored if wanted(plain_name(name))]
                return {name: tensors.get_tensor(name) for name in names}
        return {
            key: t for key, t in state_dict(load_pickle(file)).items() if wanted(plain_name(key))
        }
    except Exception as error:  # a damaged file raises many kinds of errors
        raise UserError(f"{file} cannot be read: {reason(error)}") from None


def load_pickle(file: Path) -> object:
    """The content of a pickle of tensors and plain values.

    Raises ValueError for a pickle that holds anything else, because loading it could run code.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its own text advises to load the file anyway
        raise ValueError(
            f"{file.name} is damaged or holds something other than weights, and was not run"
        ) from None


def state_dict(value: object) -> dict[str, Tensor]:
    """The weights in the object that a trainer saved: the object itself, or one under a NESTED key.

    Raises ValueError if neither is a dictionary of tensors.
    """
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
    """Write a safetensors file with the file mode that the umask gives to new files.

    safetensors 0.8 would make it readable for its owner only.
    """
    from safetensors.torch import save_file

    path.touch()  # gives a new file the usual mode; an existing file keeps its mode
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)
