"""Every choice a user can make, as dataclasses, and the command line made from them.

No torch in here: `--help` and a mistyped option answer before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import tyro

# What --without leaves out again, one by one: the engine's optimizations that no other option names.
OPTIMIZATIONS = {
    "tied-head": "the output head is the token embedding: a third fewer parameters",
    "scaled-init": "weights start at 0.02, residual projections smaller with depth",
    "flash-attention": "attention that never writes its (T, T) matrix",
    "padded-vocab": "the embedding padded to a multiple of 128, so that its products run at full rate",
    "decay-groups": "no weight decay on gains and biases",
    "fused-adamw": "the optimizer in one kernel, not a dozen operations a parameter",
    "attention-backend": "the fastest attention for the hardware, not PyTorch's flash attention",
    "chunked-head": "head and cross-entropy a chunk of rows at a time: the logits are never held whole",
    "kept-memory": "on a CPU, freed memory is kept for the next step, not given back and faulted in anew",
    "cast-once": "weights cast to the products' format once a step, activations in it throughout; else autocast",
}

ATTENTION_WIDTH = 128  # of a head that the Triton kernel can hold
FP8_MULTIPLE = 16  # of every width that the tensor cores see in FP8
VOCAB_MULTIPLE = 128  # the embedding is padded inside to this, so that its matrix products run at full rate


class UserError(Exception):
    """The user's mistake: one line that says what is wrong and what to type. Exit code 2.

    `local` marks an error that only this rank may have seen (out of memory, a missing file on one node);
    the others happen alike on every rank, and only rank 0 prints them.
    """

    def __init__(self, message: str, local: bool = False):
        super().__init__(message)
        self.local = local


@dataclass
class GPTConfig:
    """The shape of a GPT-2 and the choices that the stage ladder switches."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tied_head: bool = True  # the output head is the token embedding
    scaled_init: bool = True  # residual projections start smaller by 1/sqrt(2 n_layer)
    padded_vocab: bool = True  # pad the embedding to a multiple of VOCAB_MULTIPLE
    attention: Literal["sdpa", "explicit"] = "sdpa"
    chunked_head: bool = True  # in training, logits a chunk of rows at a time
    kernels: tuple[str, ...] = ()  # operations of kernels/ that run in place of PyTorch's
    fp8: bool = False  # in training, the blocks' products in FP8
    recompute: bool = False  # recompute each block's activations in the backward pass

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            nearest = min(fits, key=lambda h: abs(h - self.n_head))
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; try --n-head {nearest}")
        if "attention" in self.kernels and self.n_embd // self.n_head > ATTENTION_WIDTH:
            wide = self.n_embd // self.n_head
            raise UserError(
                f"the attention kernel holds heads of up to {ATTENTION_WIDTH}, and these are {wide} wide; "
                f"leave it out of --kernels or raise --n-head"
            )
        if self.fp8 and self.n_embd % FP8_MULTIPLE:
            raise UserError(
                f"--precision fp8 needs a width that is a multiple of {FP8_MULTIPLE}, and n_embd is {self.n_embd}; "
                f"use --precision bf16"
            )

    @property
    def padded_vocab_size(self) -> int:
        if not self.padded_vocab:
            return self.vocab_size
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


PRESETS: dict[str, dict[str, int]] = {
    "micro": dict(n_layer=2, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "mini": dict(n_layer=6, n_head=6, n_embd=384),
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

Preset = Literal["micro", "tiny", "mini", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"]
Schedule = Literal["cosine", "linear", "wsd", "constant", "slanted-triangular"]


@dataclass
class TrainConfig:
    """Options of a training run. None means: what suits the machine (the banner says what was chosen)."""

    # what is trained
    preset: Preset | None = None
    """Shape of the model. Default: gpt2 on a CUDA GPU, tiny elsewhere."""
    n_layer: int | None = None
    """Number of blocks, in place of the preset's."""
    n_head: int | None = None
    """Attention heads, in place of the preset's."""
    n_embd: int | None = None
    """Width, in place of the preset's."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residual branches."""
    init: str = "scratch"
    """Start from: scratch, a hub id, or a folder in the hub's GPT-2 layout or written by a run."""

    # data
    data: str | None = None
    """Token shards, text files or globs, a hub dataset id, or stdlib. Default: data/fineweb if prepared, else stdlib."""
    val_data: str | None = None
    """Validation data, in the same forms. Default: a fixed hundredth of the documents."""
    text_column: str = "text"
    """Column that holds the text in csv, tsv, jsonl and parquet files."""
    tokenizer: str | None = None
    """gpt2, a folder, or a tokenizer.json. Default: the data's or the checkpoint's own; gpt2 for text."""
    cache: str = "data/cache"
    """Folder of tokenized text."""
    document_mask: bool = False
    """Keep attention from crossing documents."""

    # how long and how large
    steps: int | None = None
    """Optimizer steps of the whole run."""
    seq_len: int | None = None
    """Tokens in a sequence. Default: 1024 on CUDA, 256 elsewhere."""
    batch_tokens: int | None = None
    """Tokens in an optimizer step, over all ranks. Default: 524288 on CUDA, 8192 elsewhere."""
    micro_batch: int | Literal["auto"] = "auto"
    """Sequences in one forward pass on one rank. auto: the largest that fits."""

    # optimization
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the hidden matrices with Muon and the rest with AdamW."""
    lr: float | None = None
    """Peak learning rate. Default: 6e-4 at GPT-2's size, 2e-3 for the small presets."""
    schedule: Schedule = "cosine"
    """Shape of the learning rate over the run."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Default: a fiftieth of the run, at most 700."""
    min_lr: float = 0.1
    """Where cosine, linear and wsd end, as a share of the peak."""
    weight_decay: float = 0.1
    """Decay of matrices; gains, biases and other vectors have none."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    # how it runs
    precision: Precision = "auto"
    """Number format of the matrix products; weights and optimizer stay fp32."""
    compile: bool | None = None
    """torch.compile the model. Default: on CUDA yes, elsewhere no."""
    kernels: str = "auto"
    """auto, torch, triton, or names of kernels, comma-separated. auto: what is faster on this hardware."""
    without: tuple[str, ...] = ()
    """Optimizations to leave out, to see what each is worth: names in README."""
    compile_unit: Literal["auto", "model", "block"] = "auto"
    """What torch.compile takes at once. auto: the model; its blocks on a CPU, and with several ranks."""
    cuda_graphs: bool = False
    """Replay a compiled step from CUDA graphs: fewer launches, for small models."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    deterministic: bool = False
    """Bit-for-bit repeatable on CUDA too (a CPU run always is)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    seed: int = 1337
    """Names the run: weights, data order and every random draw follow from it."""

    # what is written and when (an interval of 0 turns that thing off)
    out: str | None = None
    """Folder of the run. Default: runs/PRESET."""
    resume: str = "auto"
    """auto: the newest sound checkpoint in --out; never; or a folder to resume from."""
    eval_every: int | None = None
    """Steps between evaluations. Default: a tenth of the run, at most 250."""
    eval_tokens: int | None = None
    """Validation tokens of one evaluation. Default: 10485760 on CUDA, 65536 elsewhere; 0 for all there are."""
    save_every: int | None = None
    """Steps between checkpoints. Default: a fifth of the run, at most 1000."""
    sample_every: int | None = None
    """Steps between samples. Default: that of the evaluations."""
    log_every: int = 1
    """Steps between printed step lines; log.jsonl has every step."""
    prompts: tuple[str, ...] = ()
    """Prompts to sample from during training."""
    keep: int = 3
    """Newest checkpoints to keep; the best is kept as well."""
    wandb: bool = False
    """Log to Weights & Biases too (offline where there is no key or network)."""
    profile: bool = False
    """Write a trace and a memory snapshot of three steps."""
    dry_run: bool = False
    """Print the memory, time and disk the run would take, and start nothing."""


# Peak learning rates: GPT-3's table for GPT-2's sizes (Brown et al. 2020, table 2.1), more for smaller ones.
PEAK_LR = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}
FINEWEB = "data/fineweb"  # where fineweb_prep.py is told to write, and where a run without --data looks first


def resolve(cfg: TrainConfig, device_type: str) -> TrainConfig:
    """A copy with every None that depends on the machine or on other options filled in, and checked."""
    gpu = device_type == "cuda"
    cfg = dataclasses.replace(cfg)

    def default(name: str, value: Any) -> None:
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)

    scratch = cfg.init == "scratch"
    if scratch:
        default("preset", "gpt2" if gpu else "tiny")
    default("data", FINEWEB if (Path(FINEWEB) / "manifest.json").is_file() else "stdlib")
    default("seq_len", 1024 if gpu else 256)
    default("batch_tokens", 524288 if gpu else 8192)
    default("steps", 500 if cfg.data == "stdlib" else 19073 if gpu else 1000)  # 19,073 steps are 10B tokens
    default("lr", PEAK_LR.get(cfg.preset or "", 2e-3) if scratch else 5e-5)
    check(cfg)
    assert cfg.steps
    default("warmup_steps", min(700, cfg.steps // 50))
    default("eval_every", min(250, max(1, cfg.steps // 10)))
    default("eval_tokens", 10 << 20 if gpu else 1 << 16)
    default("save_every", min(1000, max(1, cfg.steps // 5)))
    default("sample_every", cfg.eval_every)
    default("compile", gpu)
    if cfg.cuda_graphs and not (gpu and cfg.compile):
        raise UserError("--cuda-graphs needs a CUDA GPU and --compile; leave it out here")
    default("out", f"runs/{cfg.preset or Path(cfg.init).name}")
    return cfg


def check(cfg: TrainConfig) -> None:
    """Raise UserError for a number out of its range, or a name that is none."""
    for name in cfg.without:
        if name not in OPTIMIZATIONS:
            raise UserError(f"--without {name}: no such optimization{nearest(name, list(OPTIMIZATIONS))}")
    at_least = dict.fromkeys(("steps", "seq_len", "batch_tokens", "micro_batch", "keep"), 1)
    at_least |= dict.fromkeys(("warmup_steps", "eval_every", "save_every", "sample_every", "log_every", "seed"), 0)
    at_least |= dict.fromkeys(("weight_decay", "clip", "eval_tokens", "lr"), 0)
    for name, least in at_least.items():
        value = getattr(cfg, name)
        if value is not None and value != "auto" and not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}, and finite")
    for name in ("dropout", "min_lr", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) <= (1 if name == "min_lr" else 0.9999999):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; it must lie between 0 and 1")


Config = TypeVar("Config")  # any dataclass of options


def option_names(cls: Any) -> list[str]:
    """Fields of a dataclass of options, as attributes."""
    return [field.name for field in dataclasses.fields(cls)]


def parse(cls: type[Config], argv: Sequence[str], defaults: dict[str, Any] | None = None) -> Config:
    """Command line to config: `defaults` below the file of `--config`, the command line on top.

    Raises UserError for an unknown option (naming the nearest), a value of the wrong kind, or a bad file.
    """
    argv, file = _take_config(list(argv))
    from_file = _as_arguments(cls, _read_config(file)) if file else []
    base = cls(**(defaults or {}))
    if "-h" in argv or "--help" in argv:
        print(
            "--config FILE: read options from a JSON or TOML file (a run's own config.json too); others override it.\n"
        )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                cls,
                args=from_file + argv,
                default=base,
                return_unknown_args=True,
                config=(tyro.conf.DisallowNone,),  # `bool | None` becomes a pair of flags whose default is None
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(errors.getvalue())) from None
    if unknown:
        raise UserError(_unknown_option(cls, unknown[0]))
    return config


def entry_point(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and turn what it returns or raises into the contract's exit codes."""
    try:
        code = main() or 0
    except UserError as error:
        if error.local or os.environ.get("RANK", "0") == "0":
            rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ and error.local else ""
            print(f"{rank}error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def nearest(word: str, among: Sequence[str]) -> str:
    """` (did you mean X?)`, or nothing where no word is near."""
    match = difflib.get_close_matches(word, among, n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""


def _take_config(argv: list[str]) -> tuple[list[str], str | None]:
    """Split `--config FILE` off a command line."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise UserError("--config needs a file")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith("--config="):
            return argv[:i] + argv[i + 1 :], word.partition("=")[2]
    return argv, None


def _read_config(file: str) -> dict[str, Any]:
    path = Path(file)
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--config {file} is not valid {path.suffix[1:] or 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {file} holds no options; it should be an object of names and values")
    return values


def _as_arguments(cls: type, values: dict[str, Any]) -> list[str]:
    """A config file as command-line words, so that one parser checks both."""
    words: list[str] = []
    for key, value in values.items():
        option = "--" + key.replace("_", "-")
        if key.replace("-", "_") not in option_names(cls):
            raise UserError(_unknown_option(cls, option))
        if isinstance(value, bool):
            words.append(option if value else "--no-" + option[2:])
        elif isinstance(value, list | tuple):
            words += [option, *map(str, value)] if value else []
        elif value is not None:
            words += [option, str(value)]
    return words


def _one_line(box: str) -> str:
    """The message inside tyro's box, on one line."""
    lines = [re.sub(r"[│╭╮╰╯─━┃]+", " ", line).strip() for line in box.splitlines()[1:]]
    body = []
    for line in lines:
        if not line or line.startswith(("Argument helptext", "For full helptext")):
            if body:
                break
            continue
        body.append(line)
    return " ".join(body) or box.strip()


def _unknown_option(cls: type, word: str) -> str:
    options = ["--config"] + ["--" + name.replace("_", "-") for name in option_names(cls)]
    if not word.startswith("-"):
        return f"unexpected word {word!r}; options are written --name value (see --help)"
    return f"unknown option {word.partition('=')[0]}{nearest(word.partition('=')[0], options)}"
