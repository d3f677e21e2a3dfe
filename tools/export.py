"""Exports a model to GGUF (llama.cpp) or ONNX, reads the file back and compares, and uploads models
to the hub.

python -m tools.export runs/base --to gguf
python -m tools.export runs/base --push NAME/MODEL
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from base.cli import entry_point, parse
from base.errors import reason
from base.files import TEMPORARY, sha256, writable_file, writing_to
from config import PathOrName, Positional, UserError
from decoding.loading import open_tokenizer, open_weights, tokenizer_folder
from model import GPT
from storage.checkpoint import locate
from storage.foreign import JsonObject, read_object
from text.chat import END, TEMPLATE, has_template
from text.tokenizer import Tokenizer

# llama.cpp's names of a GPT-2's tensors.
OUTER = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
INNER = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens in GGUF
# The files of a checkpoint's folder that make a model on the hub.
UPLOADED = (
    "config.json", "*.safetensors", "adapter_config.json", "base.json", "tokenizer*", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "README.md",
)  # fmt: skip


@dataclass(frozen=True)
class ExportConfig:
    """Write the model of CHECKPOINT in another format, or upload it. The file is read back and
    compared with the model, and FILE.md records what was checked."""

    checkpoint: Annotated[PathOrName, Positional("CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id. An adapter is
    merged into its base."""
    to: Literal["none", "gguf", "onnx"] = "none"
    """The format. gguf is llama.cpp's, with the tokenizer inside. onnx has any batch and length."""
    dtype: Literal["f32", "f16", "q8_0"] = "f16"
    """Format of the matrices in a GGUF file."""
    out: PathOrName = ""
    """The file to write. Default: the model's name in this folder."""
    tokenizer: PathOrName | None = None
    """Tokenizer to use in place of the checkpoint's own."""
    push: str = ""
    """Upload the checkpoint, and the file if --to is given, to this id on the hub."""
    private: bool = False
    """Create the hub's repository as a private one."""


def main() -> None:
    """Run the command."""
    cfg = parse(ExportConfig, sys.argv[1:])
    if not cfg.checkpoint:
        raise UserError("no checkpoint is named; type python -m tools.export CHECKPOINT --to gguf")
    if cfg.to == "none" and not cfg.push:
        raise UserError("nothing to do; give --to gguf, --to onnx or --push NAME/MODEL")
    where, file = locate(cfg.checkpoint), None
    if cfg.to != "none":
        model = open_weights(where, torch.device("cpu"), torch.float32)
        check_plain(model, cfg.checkpoint)
        file = writable_file("--out", cfg.out or default_name(cfg))
        checked = export(model, where, file, cfg)
        print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB\n{checked}")
    if cfg.push:
        print(f"uploaded to {push(cfg, Path(where), file)}")


def export(model: GPT, where: str, file: Path, cfg: ExportConfig) -> str:
    """Write the file and its card beside it, and return what was checked. `file` appears only when
    it is whole and has passed."""
    write, check = (write_gguf, check_gguf) if cfg.to == "gguf" else (write_onnx, check_onnx)
    partial = file.with_name(TEMPORARY + file.name)
    try:
        with writing_to("--out", file.parent):
            write(model, where, partial, cfg)
            checked = check(model, partial)
            partial.replace(file)
            card_of(file).write_text(card(cfg, file, checked), encoding="utf-8")
    finally:
        partial.unlink(missing_ok=True)
    return checked


def card_of(file: Path) -> Path:
    """Where an exported file's card stands."""
    return file.with_name(file.name + ".md")


def check_plain(model: GPT, where: str) -> None:
    """Raise UserError for a model with a prefix, which cannot be merged into its weights."""
    if model.prefix is not None:
        raise UserError(
            f"{where} has a prefix or a soft prompt, which the file of a GPT-2 cannot hold; export "
            "its base model"
        )


def default_name(cfg: ExportConfig) -> str:
    """The name of the run or model, the format and its ending."""
    parts = [part for part in Path(cfg.checkpoint).absolute().parts if part != "final"]
    return f"{parts[-1]}-{cfg.dtype}.gguf" if cfg.to == "gguf" else f"{parts[-1]}.onnx"


def card(cfg: ExportConfig, file: Path, checked: str) -> str:
    """What was exported from where, and what was checked, in Markdown."""
    return (
        f"## {file.name}\n\nExported from {cfg.checkpoint} by `python -m tools.export`. sha256 "
        f"{sha256(file)}. {checked}\n"
    )


def needs(package: str) -> Any:
    """An optional package. Raises UserError with how to install it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"this export needs the package {package} ({reason(error)}); "
            "pip install gguf onnx onnxscript onnxruntime"
        ) from None


# --- GGUF


def gguf_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by llama.cpp's names. Matrices are (out, in) there as here."""
    for name, tensor in model.weights().items():
        if name in OUTER:
            yield OUTER[name], tensor
        else:
            _, _, layer, rest = name.split(".", 3)
            part, _, kind = rest.rpartition(".")
            yield f"blk.{layer}.{INNER[part]}.{kind}", tensor


def write_gguf(model: GPT, where: str, file: Path, cfg: ExportConfig) -> None:
    """Write tensors, shape and tokenizer. Raises UserError for a tokenizer that is not like
    GPT-2's."""
    gguf = needs("gguf")
    tokenizer = open_tokenizer(where, cfg.tokenizer, model)
    shape, kinds = model.config, gguf.GGMLQuantizationType
    wanted = {"f32": kinds.F32, "f16": kinds.F16, "q8_0": kinds.Q8_0}[cfg.dtype]
    tokens = gguf_tokens(cfg.tokenizer or tokenizer_folder(where), tokenizer, shape.vocab_size)
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_name(Path(default_name(cfg)).stem)
    writer.add_context_length(shape.block_size)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(4 * shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(shape.layer_norm_epsilon)
    types = gguf.LlamaFileType
    writer.add_file_type(
        {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "q8_0": types.MOSTLY_Q8_0}[cfg.dtype]
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([text for text, _ in tokens.rows])
    writer.add_token_types([kind for _, kind in tokens.rows])
    writer.add_token_merges(tokens.merges)
    writer.add_bos_token_id(tokenizer.eot)
    writer.add_eos_token_id(tokenizer.eot)
    writer.add_add_bos_token(False)
    if has_template(tokenizer.special_ids):
        writer.add_chat_template(TEMPLATE)
        writer.add_eot_token_id(tokenizer.special_id(END))
    for name, tensor in gguf_tensors(model):
        array = tensor.float().numpy()
        # Vectors stay in fp32, and so do positions, as llama.cpp's own converter has it. q8_0 has
        # blocks of 32.
        kind = kinds.F32 if tensor.dim() == 1 or name.startswith("position") else wanted
        if kind == kinds.Q8_0 and tensor.shape[-1] % 32:
            kind = kinds.F16
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Tokens:
    """A byte-level BPE as GGUF stores it."""

    rows: list[tuple[str, int]]  # text and kind, by id
    merges: list[str]  # two texts with a space between, the first merge first


def gguf_tokens(folder: str, tokenizer: Tokenizer, rows: int) -> Tokens:
    """The tokens of a folder's tokenizer, filled up to `rows` rows.

    Raises UserError if it splits or normalizes texts in another way than GPT-2's.
    """
    path = Path(folder)
    if (path / "tokenizer.json").is_file():
        whole = read_object(path / "tokenizer.json")
        if problem := unlike_gpt2(whole):
            raise UserError(
                f"GGUF holds byte-level BPE that splits texts as GPT-2's does, and the tokenizer "
                f"of {folder} {problem}; export to onnx, or train with such a tokenizer"
            )
        model = whole.values["model"]
        vocabulary = dict(model["vocab"])
        merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        vocabulary = dict(read_object(path / "vocab.json").values)
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise UserError(
            f"GGUF holds byte-level BPE, and {folder} has no tokenizer.json, and no vocab.json "
            "with merges.txt; export to onnx"
        )
    special = tokenizer.special_ids
    by_id = {id: text for text, id in (vocabulary | special).items()}
    return Tokens(
        [
            (by_id[id], CONTROL if by_id[id] in special else NORMAL)
            if id in by_id
            else (f"[unused {id}]", UNUSED)
            for id in range(rows)
        ],
        merges,
    )


def unlike_gpt2(whole: JsonObject) -> str | None:
    """What a tokenizer.json has that GPT-2's has not, as the end of a sentence; None if nothing."""
    values = whole.values
    model, split = values.get("model") or {}, values.get("pre_tokenizer") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        return f"is {model.get('type', 'of another kind')}"
    if values.get("normalizer"):
        return "normalizes its texts"
    if {key: split.get(key, True) for key in GPT2_SPLIT} != GPT2_SPLIT:
        return f"splits them by {split.get('type', 'nothing')} with other settings"
    if model.get("byte_fallback") or model.get("ignore_merges"):
        return "falls back to bytes or ignores merges"
    return None


def check_gguf(model: GPT, file: Path) -> str:
    """Read a GGUF file back, and compare tensors and logits. Returns a sentence on what came.

    Raises UserError if a tensor is missing or further from the model's than its format rounds.
    """
    gguf = needs("gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    expected = dict(gguf_tensors(model))
    if found.keys() != expected.keys():
        raise UserError(f"{file} does not hold the model's tensors; free some disk and try again")
    again = {}
    for name, tensor in expected.items():
        array = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        again[name] = torch.from_numpy(np.array(array, np.float32)).reshape(tensor.shape)
        # q8_0 rounds to 1/254 of a block's largest value, f16 to 1/2048 of each.
        error = (again[name] - tensor.float()).abs().max() / tensor.float().abs().max().clamp(1e-9)
        if error > 0.005:
            raise UserError(f"{file}: {name} differs by {float(error):.2%} of its largest value")
    copy = GPT(model.config).eval()
    names = dict(zip(expected, copy.weights().values(), strict=True))
    with torch.no_grad():
        for name, weight in names.items():
            weight.copy_(again[name])
        ids = sample_ids(model)
        return compared(model(ids), copy(ids), f"{len(found)} tensors read back")


# --- ONNX


def write_onnx(model: GPT, where: str, file: Path, cfg: ExportConfig) -> None:
    """Write the graph from input_ids (batch, length) to logits (batch, length, vocabulary)."""
    needs("onnx")
    needs("onnxscript")
    free = torch.export.Dim.DYNAMIC
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names operators that are not used
    warnings.filterwarnings("ignore", category=FutureWarning)
    program = torch.onnx.export(
        model,
        (sample_ids(model),),
        dynamo=True,
        dynamic_shapes=({0: free, 1: free},),
        input_names=["input_ids"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(file)


def check_onnx(model: GPT, file: Path) -> str:
    """Run the ONNX file at several batches and lengths, and compare logits. Returns a sentence."""
    runtime = needs("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    pairs = []
    for batch, length in ((1, 1), (2, min(7, model.context)), (3, model.context)):
        ids = sample_ids(model, batch, length)
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            pairs.append((model(ids).flatten(0, 1), torch.from_numpy(logits).flatten(0, 1)))
    ours, theirs = (torch.cat(side) for side in zip(*pairs))
    return compared(ours, theirs, "three batches and lengths run by onnxruntime")


# --- both


def sample_ids(model: GPT, batch: int = 2, length: int = 32) -> Tensor:
    """Random ids (batch, length or the context) from a fixed seed."""
    drawn = torch.Generator().manual_seed(0)
    shape = (batch, min(length, model.context))
    return torch.randint(model.config.vocab_size, shape, generator=drawn)


def compared(ours: Tensor, theirs: Tensor, what: str) -> str:
    """A sentence about two sets of logits (..., vocabulary). Raises UserError if they are far
    apart."""
    ours, theirs = ours.flatten(0, -2).float(), theirs.flatten(0, -2).float()
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    difference = float((ours - theirs).abs().max() / ours.std())
    if not difference < 0.5:
        raise UserError(f"the exported logits differ by {difference:.2f} standard deviations")
    return (
        f"{what}; the largest difference of a logit is {difference:.1e} standard deviations, and "
        f"{same:.1%} of {len(ours)} positions have the same likeliest token."
    )


def push(cfg: ExportConfig, folder: Path, file: Path | None) -> str:
    """Upload in one commit, and return its address. Raises UserError if the hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = {path.name: path for pattern in UPLOADED for path in folder.glob(pattern)}
    if "config.json" not in files and "adapter_config.json" not in files:
        raise UserError(f"{folder} is not in the hub's layout; give a run with a final/ folder")
    adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if file is not None:
        adds.append(CommitOperationAdd(file.name, str(file)))
        texts = [files[n].read_text("utf-8") for n in ("README.md",) if n in files]
        texts.append(card_of(file).read_text("utf-8"))
        adds = [add for add in adds if add.path_in_repo != "README.md"]
        adds.append(CommitOperationAdd("README.md", "\n".join(texts).encode()))
    try:
        api = HfApi()
        url = api.create_repo(cfg.push, private=cfg.private, exist_ok=True)
        done = api.create_commit(url.repo_id, adds, commit_message="Upload a GPT-2")
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(
            f"--push {cfg.push}: {reason(error, whole=True)}; check the id, the network and hf auth login"
        ) from None
    return done.commit_url


if __name__ == "__main__":
    entry_point(main)
