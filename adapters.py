"""What is trained: all of a GPT, a part of it, or parameters added to it while its own stay as they are.

An adapter is a module that stands in the model where the model has room for it: in place of a product of a block
(LoRA, DoRA), before the text (prefix tuning, soft prompt), over the rows of new tokens in the table. So the model,
the loop and the decoder know nothing of adapters, and their files are PEFT's, which the `peft` package reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from config import FinetuneConfig, GPTConfig, MethodConfig, UserError
from model import GPT, Linear
from optim import Group, default_groups

LORA = ("lora", "dora")
ADAPTERS = (*LORA, "prefix", "soft-prompt")
ATTENTION, FEED_FORWARD = ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")  # the products of a block
LORA_ON = {"attention": ATTENTION, "feed-forward": FEED_FORWARD, "both": ATTENTION + FEED_FORWARD}
TABLES = ("transformer.wte", "lm_head")  # that have a row a token; the second where the head is not tied
ULMFIT_DECAY = 1 / 2.6  # of the rate, from each group of layers to the one below
FREQUENT = 5000  # ids whose embeddings a soft prompt may start from: the first of a BPE vocabulary are the commonest

OPTIONS = {  # of a method, and the methods that they belong to
    "last_k": ("last-k",),
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_dropout", "lora_on"), LORA),
    "prefix_tokens": ("prefix", "soft-prompt"),
    "prefix_width": ("prefix",),
}


# --- adapters


class LoRA(Linear):
    """W x + alpha/r B A dropout(x) with a frozen W (Hu et al. 2021): B starts at 0, and with it the update."""

    def __init__(self, config: GPTConfig, base: Linear, rank: int, alpha: float, dropout: float):
        with torch.device("meta"):  # W is the base's
            super().__init__(config, base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha = rank, alpha
        self.lora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.lora_dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear does

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        update = F.linear(F.linear(self.lora_dropout(x), self.lora_A), self.lora_B)
        return super().product(x, bias) + self.scale * update

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one matrix (out, in) that gives the same products, fp32; dropout left aside."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return torch.addmm(self.weight.float(), self.lora_B.float(), self.lora_A.float(), alpha=self.scale)


class DoRA(LoRA):
    """m (W + alpha/r B A) x with each row of the bracket divided by its norm, and m trained (Liu et al. 2024).

    The norm follows the update but passes no gradient on (section 4.3 of the paper). Dropout is on the update alone.
    """

    def __init__(self, config: GPTConfig, base: Linear, rank: int, alpha: float, dropout: float):
        super().__init__(config, base, rank, alpha, dropout)
        self.lora_magnitude_vector = Magnitude(base.weight.detach().norm(dim=1))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().product(x)
        scaled = y * self._row_scale()  # in fp32: near 1 bf16 would round away what m learns
        return (scaled if bias is None else scaled + bias).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        return self._row_scale()[:, None] * super().merged()

    def _row_scale(self) -> Tensor:
        return self.lora_magnitude_vector.weight / super().merged().norm(dim=1)


class Magnitude(nn.Module):
    """DoRA's m (out,): a module of its own, for a linear layer's own parameters are cast (precision.py)."""

    def __init__(self, norms: Tensor):
        super().__init__()
        self.weight = nn.Parameter(norms)


class Prefix(nn.Module):
    """Keys and values of P positions for every layer, trained themselves or made by an MLP (Li and Liang 2021).

    `rows` (P, n_embd) are what the MLP reads; without one (P, n_layer * 2 * n_embd), the keys and values.
    """

    def __init__(self, config: GPTConfig, rows: Tensor, width: int):
        super().__init__()
        self.length = len(rows)
        self.shape = (self.length, config.n_layer, 2, config.n_head, config.n_embd // config.n_head)
        self.rows = nn.Parameter(rows)
        self.mlp: nn.Sequential | None = None
        if width:
            out = nn.Linear(width, config.n_layer * 2 * config.n_embd)
            self.mlp = nn.Sequential(nn.Linear(config.n_embd, width), nn.Tanh(), out)

    def table(self) -> Tensor:
        """(P, n_layer * 2 * n_embd): of each layer its keys, then its values. All that is needed once trained."""
        return self.rows if self.mlp is None else self.mlp(self.rows.to(self.mlp[0].weight.dtype))

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        layers = self.table().view(self.shape).permute(1, 2, 3, 0, 4)  # (n_layer, 2, n_head, P, head_dim)
        return [(k[None], v[None]) for k, v in layers]


class SoftPrompt(nn.Module):
    """P vectors (P, n_embd) that the model reads before the text (Lester et al. 2021).

    What it makes of them is the same for every row, so it reads them once, alone: text sees their keys and values.
    """

    def __init__(self, vectors: Tensor):
        super().__init__()
        self.length = len(vectors)
        self.vectors = nn.Parameter(vectors)

    def layers(self, model: GPT) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (1, n_head, P, head_dim) each."""
        return keys_and_values(model, self.vectors)


def keys_and_values(model: GPT, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each layer attends to when the model reads `vectors` (P, n_embd) in place of tokens' embeddings."""
    layers: list[tuple[Tensor, Tensor]] = []

    def keep(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layers.append((k, v))
        return k, v

    parts = model.transformer
    x, branch = parts.drop(vectors + parts.wpe.weight[: len(vectors)])[None].to(model.dtype), None
    for block in parts.h:
        # Its forward itself: where blocks are compiled, not for the sake of one row of a few positions.
        x, branch = block.forward(x, branch, extend=keep)
    return layers


class TokenRows(nn.Module):
    """Trained rows (n, n_embd) in place of those of the tokens `ids` (n,) in a frozen table: its parametrization."""

    def __init__(self, ids: Tensor, rows: Tensor):
        super().__init__()
        self.register_buffer("ids", ids, persistent=False)
        self.rows = nn.Parameter(rows)

    def forward(self, table: Tensor) -> Tensor:
        return table.index_copy(0, self.ids, self.rows)


# --- putting them into a model


def add_adapter(model: GPT, cfg: MethodConfig, new_tokens: range = range(0)) -> None:
    """Add to `model`, in place, what cfg.method trains, drawn from the global random state; freeze the rest.

    `new_tokens` are ids that are new to a pretrained model: their rows train under every method, those that freeze
    the table too. Raises UserError where method and model do not fit.
    """
    if cfg.method == "last-k" and cfg.last_k > model.config.n_layer:
        raise UserError(f"--last-k {cfg.last_k}: the model has {model.config.n_layer} blocks; use --method full")
    if cfg.method in LORA:
        names = [f"transformer.h.{i}.{name}" for i in range(model.config.n_layer) for name in LORA_ON[cfg.lora_on]]
        _add_lora(model, names, cfg.method == "dora", cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    elif cfg.method in ADAPTERS:
        _check_room(model, cfg.prefix_tokens)
        model.prefix = _new_prefix(model, cfg)
    trained = _rates(model, cfg, epoch=model.config.n_layer + 1)
    if new_tokens:
        _add_rows(model, torch.tensor(new_tokens), trained)
    _freeze(model, trained.keys() | added(model))


def _add_lora(model: GPT, names: Sequence[str], dora: bool, rank: int, alpha: float, dropout: float) -> None:
    kind = DoRA if dora else LoRA
    for name in names:
        model.set_submodule(name, kind(model.config, model.get_submodule(name), rank, alpha, dropout))


def _new_prefix(model: GPT, cfg: MethodConfig) -> nn.Module:
    """Starts from common tokens, as both papers advise; but the MLP's rows are free."""
    config, P = model.config, cfg.prefix_tokens
    if cfg.method == "prefix" and cfg.prefix_width:
        return Prefix(config, torch.randn(P, config.n_embd), cfg.prefix_width)
    table = model.transformer.wte.weight.detach()
    vectors = table[torch.randint(min(FREQUENT, config.vocab_size), (P,))]
    if cfg.method == "soft-prompt":
        return SoftPrompt(vectors)
    with torch.no_grad():
        layers = torch.stack([torch.stack(layer) for layer in keys_and_values(model, vectors)])
    return Prefix(config, layers.squeeze(2).permute(3, 0, 1, 2, 4).reshape(P, -1), width=0)


def _check_room(model: GPT, length: int) -> None:
    if length >= model.config.block_size:
        raise UserError(
            f"{length} positions before the text leave it none of the model's {model.config.block_size}; "
            f"use a smaller --prefix-tokens"
        )


def _add_rows(model: GPT, ids: Tensor, trained: Collection[str] = ()) -> None:
    """TokenRows on each table that does not train itself."""
    modules = dict(model.named_modules())
    for name in TABLES:
        if name in modules and f"{name}.weight" not in trained:
            layer = model.get_submodule(name)
            rows = TokenRows(ids.to(layer.weight.device), layer.weight.detach()[ids].clone())
            parametrize.register_parametrization(layer, "weight", rows)


def _rows(model: GPT) -> dict[str, TokenRows]:
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in model.named_modules()
        if isinstance(module, TokenRows)
    }


def _loras(model: GPT) -> dict[str, LoRA]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


def _freeze(model: GPT, trained: Collection[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


# --- which parameters train


def check(cfg: FinetuneConfig) -> None:
    """Raise UserError for options that do not go with cfg.method."""
    defaults = {field.name: field.default for field in dataclasses.fields(MethodConfig)}
    for name, methods in OPTIONS.items():
        if getattr(cfg, name) != defaults[name] and cfg.method not in methods:
            option, owners = name.replace("_", "-"), " or ".join(methods)
            raise UserError(f"--{option} belongs to --method {owners}, not to {cfg.method}; leave it out")
    if cfg.llrd != 1 and cfg.method not in ("full", "last-k"):
        why = "sets them itself" if cfg.method == "ulmfit" else "does not train these"
        raise UserError(f"--llrd sets the rates of the model's blocks, and --method {cfg.method} {why}; leave it out")
    if cfg.optimizer == "muon" and cfg.method not in ("full", "last-k", "ulmfit"):
        raise UserError(
            f"--optimizer muon is for the matrices of the model's blocks, which --method {cfg.method} does not train; "
            f"use --optimizer adamw"
        )
    if cfg.init == "scratch" and cfg.method in ADAPTERS:
        raise UserError(f"--method {cfg.method} adds to trained weights; name some with --init, or use --method full")


def groups(model: GPT, cfg: FinetuneConfig, step: int, steps_per_epoch: int) -> list[Group]:
    """The parameters that train in `step`, as optim.default_groups but with the rate of each layer. Pure in step.

    ulmfit (Howard and Ruder 2018) begins with the head, and each epoch thaws the layer below; a layer's rate is
    1/2.6 of that of the layer above.
    """
    rates = _rates(model, cfg, step // steps_per_epoch)
    found = []
    for group in default_groups(model, cfg):
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in group.params.items():
            if name in rates:
                by_rate.setdefault(rates[name], {})[name] = parameter
        found += [dataclasses.replace(group, params=params, lr_scale=rate) for rate, params in by_rate.items()]
    return found


def _rates(model: GPT, cfg: MethodConfig, epoch: int) -> dict[str, float]:
    """Names of the parameters that train in an epoch, with their share of the learning rate."""
    rates = dict.fromkeys(added(model), 1.0)
    if cfg.method in ADAPTERS:
        return rates
    deepest = {"full": math.inf, "last-layer": 0, "last-k": cfg.last_k, "ulmfit": epoch}[cfg.method]
    decay = ULMFIT_DECAY if cfg.method == "ulmfit" else cfg.llrd
    depths = _depths(model, from_head=cfg.method in ("last-layer", "ulmfit"))
    return rates | {name: decay**depth for name, depth in depths.items() if depth <= deepest}


def _depths(model: GPT, from_head: bool) -> dict[str, int]:
    """Layers from the top to each of the model's own parameters: 0 the head and the last norm, then block by block,
    last the embeddings. A table that is both embedding and head is the head where `from_head`."""
    n_layer, own = model.config.n_layer, dict(model.named_parameters()).keys() - added(model)
    tied = all(name.startswith("transformer.") for name in own)  # no head beside the trunk
    depths = {}
    for name in own:
        block = re.match(r"transformer\.h\.(\d+)\.", name)
        embedding = name.startswith(("transformer.wte.", "transformer.wpe."))
        if name == "transformer.wte.weight" and tied and from_head:
            embedding = False
        depths[name] = n_layer - int(block[1]) if block else n_layer + 1 if embedding else 0
    return depths


def added(model: GPT) -> set[str]:
    """Names of the parameters that are not the model's own but an adapter's; empty where there is none."""
    pattern = re.compile(r"(^|\.)(lora_|prefix\.|parametrizations\.weight\.0\.)")
    return {name for name, _ in model.named_parameters() if pattern.search(name)}


def stored(model: GPT, cfg: MethodConfig) -> set[str]:
    """Names of the parameters that a checkpoint must hold: an adapter's own, where the base is elsewhere."""
    return added(model) if cfg.method in ADAPTERS else {name for name, _ in model.named_parameters()}


def counts(model: GPT, trained: Sequence[Group]) -> tuple[int, int]:
    """Parameters that train, and all; the vocabulary's padding is not counted."""
    named = {name: p for group in trained for name, p in group.params.items()}
    padding = (model.config.padded_vocab_size - model.config.vocab_size) * model.config.n_embd
    padded = sum(f"{name}.weight" in named for name in TABLES)
    return sum(p.numel() for p in named.values()) - padded * padding, model.n_params()


# --- merging


def can_merge(model: GPT) -> bool:
    """Whether plain weights can say the same: not what comes before the text."""
    return model.prefix is None


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold LoRA, DoRA and the rows of new tokens into the weights, in place: the logits stay, the model is plain.

    Raises UserError for a prefix or a soft prompt.
    """
    if not can_merge(model):
        raise UserError("a prefix or soft prompt cannot be merged into the weights; keep it as an adapter")
    for name, layer in _loras(model).items():
        with torch.device("meta"):
            plain = Linear(model.config, layer.in_features, layer.out_features)
        plain.weight, plain.bias = nn.Parameter(layer.merged()), layer.bias
        model.set_submodule(name, plain.train(layer.training))
    for name in _rows(model):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)
    model.requires_grad_(True)


# --- files: PEFT's layout

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # beside them: which weights the adapter is for, by content (peft warns of keys it does not know)
NEW_TOKENS = "new_tokens.safetensors"  # beside a prefix or soft prompt, where PEFT has no place for them
ROOT = "base_model.model."  # begins PEFT's names
DELTA = ".token_adapter.trainable_tokens_delta"  # ends PEFT's name of the rows of new tokens
KINDS = ("LORA", "PREFIX_TUNING", "PROMPT_TUNING")


def weights_sha256(model: GPT) -> str:
    """Of a plain model's weights: by name, in fp32, without padding; so of what they are, not of the file they are in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        rows = model.config.vocab_size if name.removesuffix(".weight") in TABLES else None
        tensor = parameter.detach()[:rows].to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.numpy()).cast("B"))
    return digest.hexdigest()


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def base_of(folder: str | Path) -> tuple[str | None, str | None]:
    """Where an adapter's base is (as it was named in training) and its weights_sha256; None for what is not said."""
    folder = Path(folder)
    sha256 = _read_json(folder / BASE).get("weights_sha256") if (folder / BASE).is_file() else None
    return _read_json(folder / CONFIG).get("base_model_name_or_path"), sha256


def save_adapter(model: GPT, folder: str | Path, base: str, base_sha256: str) -> None:
    """Write the model's adapter in PEFT's layout, fp32. The model's own weights are not looked at.

    `base` names the weights it belongs to, `base_sha256` is their weights_sha256. New tokens go where PEFT has
    them beside LoRA and DoRA, else into a file beside, `ids` and `rows` by table.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _rows(model)
    if model.prefix is None:
        config, tensors = _lora_to_peft(model)
        config["trainable_token_indices"] = {n.rpartition(".")[2]: r.ids.tolist() for n, r in rows.items()} or None
        tensors |= {ROOT + name + DELTA: r.rows for name, r in rows.items()}
    else:
        config, tensors = _prefix_to_peft(model)
        if rows:
            beside = {f"{n}.{k}": t for n, r in rows.items() for k, t in (("ids", r.ids), ("rows", r.rows))}
            save_file(_on_cpu(beside), folder / NEW_TOKENS)
    config |= {"base_model_name_or_path": base, "task_type": "CAUSAL_LM", "inference_mode": True}
    save_file(_on_cpu(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / BASE).write_text(json.dumps({"base": base, "weights_sha256": base_sha256}, indent=2) + "\n")


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _lora_to_peft(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    layers = _loras(model)
    tensors = {}
    for name, layer in layers.items():
        tensors |= {f"{ROOT}{name}.lora_A.weight": layer.lora_A, f"{ROOT}{name}.lora_B.weight": layer.lora_B}
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
    config = {"num_virtual_tokens": prefix.length, "token_dim": shape.n_embd, "num_transformer_submodules": 1}
    config |= {"num_attention_heads": shape.n_head, "num_layers": shape.n_layer}
    if isinstance(prefix, Prefix):
        config |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
        return config, {"prompt_embeddings": prefix.table()}
    return config | {"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": prefix.vectors}


def load_adapter(model: GPT, folder: str | Path) -> None:
    """Put the adapter of a folder, written here or by `peft`, into its base, a plain model; the base is frozen.

    The vocabulary grows where the adapter has tokens that the base lacks. Raises UserError for another base, shapes
    that do not fit, and a kind of adapter that this project does not have.
    """
    folder = Path(folder)
    config, tensors = _read_json(folder / CONFIG), _read_tensors(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise UserError(
            f"{folder} holds an adapter of the kind {kind}; LoRA, DoRA, prefix and prompt tuning can be read"
        )
    _check_base(model, folder)
    if kind == "LORA":
        rows = _rows_from_peft(folder, config, tensors)
        _lora_from_peft(model, folder, config, tensors)
    else:
        beside = folder / NEW_TOKENS
        rows = _rows_beside(_read_tensors(beside)) if beside.is_file() else {}
        model.prefix = _prefix_from_peft(model, folder, kind, tensors)
    _load_rows(model, folder, rows)
    _freeze(model, added(model))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file.parent} is not a whole adapter: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not of an adapter: it holds no JSON object")
    return value


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file.parent} is not a whole adapter: it has no {file.name}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _check_base(model: GPT, folder: Path) -> None:
    base, expected = base_of(folder)
    if expected is not None and expected != (found := weights_sha256(model)):
        raise UserError(
            f"{folder} is an adapter for {base} (weights {expected[:12]}), and these are other weights ({found[:12]})"
        )


# What would change the numbers and is not done here: by key of a LoRA's configuration, the values that leave it be.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "use_rslora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "alora_invocation_tokens": (),
    "init_lora_weights": (True, False, "gaussian"),  # the others change the base's weights
}


def _lora_from_peft(model: GPT, folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key, values in PLAIN_LORA.items():
        if config.get(key) not in (None, *values):
            raise UserError(f"{folder} holds a LoRA with {key} {config[key]!r}, which cannot be read")
    ends = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        end = next((end for end in ends if key.endswith("." + end)), None)
        if end is None:
            raise UserError(f"{folder} holds {key}, which is no part of a LoRA or DoRA")
        parts.setdefault(key.removeprefix(ROOT).removesuffix("." + end), {})[end] = tensor
    try:
        rank, alpha, dropout = int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout", 0))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / CONFIG} does not say a LoRA's r and lora_alpha") from None
    modules = dict(model.named_modules())
    for name in parts:
        if not isinstance(modules.get(name), Linear):
            raise UserError(f"{folder} adapts {name}, which is no product of a block of this model")
    _add_lora(model, list(parts), bool(config.get("use_dora")), rank, alpha, dropout)
    for name, layer in _loras(model).items():
        own = {ends[0]: layer.lora_A, ends[1]: layer.lora_B}
        if isinstance(layer, DoRA):
            own[ends[2]] = layer.lora_magnitude_vector.weight
        if not own.keys() >= parts[name].keys():
            raise UserError(f"{folder} has magnitudes of a DoRA and a {CONFIG} that says it is none")
        for end, parameter in own.items():
            _copy(parameter, parts[name].get(end), f"{folder}: {name}.{end}")


def _prefix_from_peft(model: GPT, folder: Path, kind: str, tensors: dict[str, Tensor]) -> nn.Module:
    rows = tensors.get("prompt_embeddings")
    if rows is None:
        raise UserError(f"{folder / WEIGHTS} holds no prompt_embeddings")
    config = model.config
    width = config.n_embd * (2 * config.n_layer if kind == "PREFIX_TUNING" else 1)
    if rows.dim() != 2 or rows.shape[1] != width:
        raise UserError(f"{folder}: prompt_embeddings are {tuple(rows.shape)}, and this model's are {width} wide")
    _check_room(model, len(rows))
    rows = rows.to(model.transformer.wte.weight)
    return Prefix(config, rows, width=0) if kind == "PREFIX_TUNING" else SoftPrompt(rows)


Rows = dict[str, tuple[Tensor, Tensor]]  # by table, ids (n,) and rows (n, n_embd)


def _rows_from_peft(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Rows:
    """Taken out of `tensors`."""
    found = {key: tensors.pop(key) for key in list(tensors) if key.endswith(DELTA)}
    indices = config.get("trainable_token_indices") or {}
    rows = {}
    for key, tensor in found.items():
        name = key.removeprefix(ROOT).removesuffix(DELTA)
        ids = indices.get(name.rpartition(".")[2], indices.get(name)) if isinstance(indices, dict) else indices
        if name not in TABLES or ids is None:
            raise UserError(f"{folder} holds {key}, and its {CONFIG} does not say of which tokens")
        rows[name] = torch.tensor(ids), tensor
    return rows


def _rows_beside(tensors: dict[str, Tensor]) -> Rows:
    names = [name.removesuffix(".ids") for name in tensors if name.endswith(".ids")]
    return {name: (tensors[f"{name}.ids"], tensors[f"{name}.rows"]) for name in names}


def _load_rows(model: GPT, folder: Path, rows: Rows) -> None:
    if not rows:
        return
    ids = rows[TABLES[0]][0]
    if (size := int(ids.max()) + 1) > model.config.vocab_size:
        model.add_tokens(range(model.config.vocab_size, size))
    _add_rows(model, ids)
    for name, own in _rows(model).items():
        _copy(own.rows, rows[name][1] if name in rows else None, f"{folder}: the new tokens of {name}")


@torch.no_grad()
def _copy(parameter: Tensor, tensor: Tensor | None, what: str) -> None:
    if tensor is None or tensor.shape != parameter.shape:
        shape = "missing" if tensor is None else str(tuple(tensor.shape))
        raise UserError(f"{what} is {shape}, and this model's is {tuple(parameter.shape)}")
    parameter.copy_(tensor)
