"""The options of a run and the shape of a model, as dataclasses.

This file imports no torch, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

# The optimizations that --without can leave out one by one. Those that have an option of their own
# are not in it.
OPTIMIZATIONS = {
    "tied-head": "the output head is the token embedding: a third fewer parameters",
    "scaled-init": "weights start at 0.02, residual projections smaller with depth",
    "flash-attention": "attention that never writes its (T, T) matrix",
    "padded-vocab": "the embedding is padded to a multiple of 128, so that its products run at "
    "full rate",
    "decay-groups": "no weight decay on gains and biases",
    "fused-adamw": "the optimizer in one kernel, not a dozen operations a parameter",
    "attention-backend": "the fastest attention for the hardware, not PyTorch's flash attention",
    "chunked-head": "head and cross-entropy on a chunk of rows at a time: the whole logits are "
    "never in memory",
    "cpu-products": "on a CPU, fp32 products by oneDNN where Intel's MKL leaves half of each "
    "vector unused",
    "kept-memory": "on a CPU, freed memory is kept for the next step, not returned and faulted in "
    "again",
    "cast-once": "weights are cast to the products' format once a step, and activations stay in "
    "it; without it: autocast",
}

ATTENTION_WIDTH = 128  # widest head that the Triton attention kernel can hold
FP8_MULTIPLE = 16  # FP8 tensor cores need widths that are multiples of this
# The embedding is padded to a multiple of this, so that its matrix products run at full rate.
VOCAB_MULTIPLE = 128


class UserError(Exception):
    """A mistake of the user, in one line: what is wrong and what to type. The exit code is 2.

    `local` marks an error that perhaps only this rank has seen (out of memory, a file missing on
    one node). All other errors happen on every rank, and only rank 0 prints them.
    """

    def __init__(self, message: str, local: bool = False):
        super().__init__(message)
        self.local = local


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of an option: `Annotated[int, Range(1, 10)]`."""

    least: float
    most: float


@dataclass(frozen=True)
class PathName:
    """Marks an option as a path, in which `~` is expanded. `many`: several, comma-separated.
    `weighted`: it also takes several words with weights, which become one text (base/sources.py)."""

    many: bool = False
    weighted: bool = False


@dataclass(frozen=True)
class Positional:
    """Marks an option that is typed without its name. Help calls it `metavar`."""

    metavar: str


LARGEST = 2**31 - 1  # largest count: the integers of all libraries can hold it
BELOW_ONE = 0.9999999
Count = Annotated[int, Range(1, LARGEST)]
CountOrNone = Annotated[int, Range(0, LARGEST)]  # 0 turns it off
Tokens = Annotated[int, Range(1, 2**62)]
TokensOrAll = Annotated[int, Range(0, 2**62)]
Width = Annotated[int, Range(1, 1 << 17)]  # size of a matrix
WidthOrNone = Annotated[int, Range(0, 1 << 17)]
SmallCount = Annotated[int, Range(1, 4096)]  # things that are all in memory or started at once
Seed = Annotated[int, Range(0, 2**63 - 1)]
Rate = Annotated[float, Range(0, 1000)]
Weight = Annotated[float, Range(0, 1e6)]
Share = Annotated[float, Range(0, 1)]
Probability = Annotated[float, Range(0, BELOW_ONE)]  # of dropping something: never everything
Positive = Annotated[float, Range(1e-6, 1e6)]
# a path, a hub id or a word such as auto
PathOrName = Annotated[str, PathName()]
PathsOrNames = Annotated[str, PathName(many=True)]
Sources = Annotated[str, PathName(many=True, weighted=True)]


@dataclass
class GPTConfig:
    """The shape of a GPT-2 and how it computes. Raises UserError for a shape that cannot be."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tied_head: bool = True  # the output head shares the token embedding's weights
    scaled_init: bool = True  # residual projections start smaller by 1/sqrt(2 n_layer)
    padded_vocab: bool = True  # pad the embedding to a multiple of VOCAB_MULTIPLE
    attention: Literal["sdpa", "explicit"] = "sdpa"  # fused, or with the (T, T) matrix in memory
    chunked_head: bool = False  # in training, compute logits for a chunk of rows at a time
    kernels: tuple[str, ...] = ()  # operations that kernels/ computes in place of PyTorch
    fp8: bool = False  # in training, compute the blocks' products in FP8
    recompute: bool = False  # recompute each block's activations in the backward pass

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            least = 0 if name == "n_layer" else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.n_embd % self.n_head:
            fits = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            nearest = min(fits, key=lambda h: abs(h - self.n_head))
            raise UserError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; try --n-head "
                f"{nearest}"
            )
        if "attention" in self.kernels and self.n_embd // self.n_head > ATTENTION_WIDTH:
            wide = self.n_embd // self.n_head
            raise UserError(
                f"the attention kernel takes heads of width {ATTENTION_WIDTH} at most, and these "
                f"are {wide} wide; use --kernels torch or raise --n-head"
            )
        if self.fp8 and self.n_embd % FP8_MULTIPLE:
            raise UserError(
                f"--precision fp8 needs a width that is a multiple of {FP8_MULTIPLE}, and n_embd "
                f"is {self.n_embd}; use --precision bf16"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory, padding included."""
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


@dataclass(frozen=True)
class RunConfig:
    """Options that every run has, whatever it trains.

    None stands for a default that depends on the machine or on other options; the banner says what
    was chosen.
    """

    # what is trained
    preset: Preset | None = None
    """Shape of a model from scratch. Default: gpt2 on a CUDA GPU, tiny elsewhere."""
    n_layer: SmallCount | None = None
    """Number of blocks. Default: the preset's."""
    n_head: Width | None = None
    """Number of attention heads. Default: the preset's."""
    n_embd: Width | None = None
    """Width of the model. Default: the preset's."""
    dropout: Probability = 0.0
    """Dropout on embeddings, attention and residual branches."""
    init: PathOrName = "scratch"
    """What to start from: scratch, a hub id, or a folder that a run wrote or that has the hub's
    GPT-2 layout."""

    # data
    data: PathsOrNames | None = None
    """Training data."""
    val_data: PathsOrNames | None = None
    """Validation data, in the same forms. Default: a fixed part of the training data, held out."""
    tokenizer: PathOrName | None = None
    """gpt2, characters (those of the training text), a folder, a tokenizer.json, or nanoGPT's
    meta.pkl. Default: the tokenizer of the data or the checkpoint; gpt2 for text."""

    # how long and how large
    steps: Count | None = None
    """Optimizer steps in the whole run."""
    seq_len: Count | None = None
    """Tokens in a sequence. Default: 1024 on CUDA, 256 elsewhere."""
    micro_batch: Count | Literal["auto"] = "auto"
    """Sequences in one forward pass on one rank. auto: the largest number that fits."""

    # optimization
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the blocks' matrices with Muon and the rest with AdamW."""
    lr: Rate | None = None
    """Peak learning rate. Default: 6e-4 at GPT-2's size, 2e-3 for the small presets, 5e-5 with
    --init."""
    schedule: Schedule = "cosine"
    """Curve of the learning rate over the run."""
    warmup_steps: CountOrNone | None = None
    """Steps of linear warm-up. Default: a fiftieth of the run, at most 700."""
    min_lr: Share = 0.1
    """Learning rate at the end of cosine, linear and wsd, as a share of the peak."""
    weight_decay: Rate = 0.1
    """Weight decay of matrices. Gains, biases and other vectors have none."""
    beta1: Probability = 0.9
    """AdamW's first-moment decay."""
    beta2: Probability = 0.95
    """AdamW's second-moment decay."""
    clip: Annotated[float, Range(0, 1e30)] = 1.0
    """Largest gradient norm. 0 turns clipping off."""

    # how the model is computed
    precision: Precision = "auto"
    """Number format of the matrix products. Weights and optimizer stay fp32."""
    compile: bool | None = None
    """torch.compile the model. Default: only on CUDA."""
    kernels: str = "auto"
    """auto, torch, triton, or names of kernels, comma-separated. auto: whatever is faster on this
    hardware."""
    without: tuple[str, ...] = ()
    """Optimizations to leave out, to see what each is worth. docs/options.md lists their names."""
    compile_unit: Literal["auto", "model", "block"] = "auto"
    """What torch.compile compiles as one. auto: each block, or the whole model for CUDA graphs on
    one GPU."""
    cuda_graphs: bool = False
    """Replay a compiled step from CUDA graphs: fewer launches, for small models."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, a third more work."""
    deterministic: bool = False
    """Bit-for-bit repeatable on CUDA too (a CPU run always is)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run."""
    seed: Seed = 1337
    """Determines the initial weights, the data order and every random draw."""

    # what is written and when (an interval of 0 turns it off)
    out: PathOrName | None = None
    """Folder of the run. Default: runs/PRESET, or runs/TASK."""
    resume: PathOrName = "auto"
    """auto: from the newest undamaged checkpoint in --out; never; or a folder to resume from."""
    extend_to: Count | None = None
    """Continue the run in --out past its planned end, to this many steps in total."""
    reschedule: bool = False
    """With --extend-to: restart the decay of the learning rate where the run resumes."""
    eval_every: CountOrNone | None = None
    """Steps between evaluations. Default: a tenth of the run, at most 250; fine-tuning: every
    epoch."""
    save_every: CountOrNone | None = None
    """Steps between checkpoints. Default: a fifth of the run, at most 1000; fine-tuning: every
    epoch."""
    sample_every: CountOrNone | None = None
    """Steps between samples. Default: the same as --eval-every."""
    log_every: CountOrNone | None = None
    """Steps between printed step lines. Default: 1 at a terminal, elsewhere a hundredth of the run.
    log.jsonl has every step."""
    digest_every: CountOrNone = 100
    """Steps between digests of the parameters in log.jsonl, besides those at evaluations and
    checkpoints. tools.verify compares them."""
    prompts: tuple[str, ...] = ()
    """Prompts to sample from during training."""
    keep: Count = 3
    """How many of the newest checkpoints to keep, besides the best."""
    keep_best: Count = 1
    """How many of the best checkpoints to keep, by the metric that also chooses the final model."""
    patience: CountOrNone = 0
    """End the run after this many evaluations in a row without improvement. 0: never."""
    wandb: bool = False
    """Log to Weights & Biases too (offline if there is no key or network)."""
    tensorboard: bool = False
    """Write event files for TensorBoard too, into the run's folder."""
    profile: bool = False
    """Write a trace and a memory snapshot of three steps."""
    dry_run: bool = False
    """Print the memory, time and disk space that the run would take, and start nothing."""

    @property
    def trains(self) -> bool:
        """Whether the run takes any optimizer step."""
        return True

    def check(self) -> None:
        """Raise UserError for a number out of range, an unknown name, or a contradiction."""
        known_names("--without", self.without, OPTIMIZATIONS)
        check_ranges(self)
        if self.patience and self.eval_every == 0:
            raise UserError(
                f"--patience {self.patience} counts evaluations, but --eval-every 0 turns them "
                "off; leave one of them out"
            )
        if self.reschedule and not self.extend_to:
            raise UserError(
                "--reschedule restarts the decay of a run that is extended; add --extend-to STEPS"
            )
        if self.extend_to and self.resume == "never":
            raise UserError(
                f"--extend-to {self.extend_to} continues a run, and --resume never forbids that; "
                "leave one of them out"
            )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Options of a pretraining run. Where an option's help names no default, the run chooses what
    suits the machine, and its banner says what."""

    data: Sources | None = None
    """Token shards, text files or globs, a hub dataset id, or stdlib; or several of these with
    weights: A=0.7 B=0.3. Default: data/fineweb if it has been prepared, else stdlib."""
    val_data: Sources | None = None
    """Validation data, in the same forms. Default: a fixed hundredth of the documents, held out."""
    text_column: str = "text"
    """Column that holds the text in csv, tsv, jsonl and parquet files."""
    decontaminate: PathsOrNames | None = None
    """Data of an evaluation, in any form of --data but shards. Documents of --data that share 13
    words in a row with it are left out and counted."""
    cache: PathOrName = "data/cache"
    """Folder that keeps tokenized text."""
    document_mask: bool = False
    """Keep attention within a document."""
    batch_tokens: Count | None = None
    """Tokens in an optimizer step, over all ranks. Default: 524288 on CUDA, 8192 elsewhere."""
    eval_tokens: TokensOrAll | None = None
    """Validation tokens in one evaluation. 0: all of them. Default: 10485760 on CUDA, 65536
    elsewhere."""
    eval_hellaswag: PathOrName | None = None
    """JSONL file of HellaSwag's rows, or hub: each evaluation scores them too."""
    eval_lambada: PathOrName | None = None
    """JSONL file of LAMBADA's rows, or hub: each evaluation scores them too."""
    eval_rows: CountOrNone | None = None
    """First rows of each of these two to score. 0: all of them. Default: all on CUDA, 250
    elsewhere."""


class Resolved(RunConfig):
    """The types of a run's options after `resolve` and `resolve_steps` have replaced each None."""

    data: str
    steps: int
    lr: float
    warmup_steps: int
    compile: bool
    out: str
    eval_every: int
    save_every: int
    sample_every: int


class ResolvedTrain(Resolved, TrainConfig):
    """Like Resolved, for a pretraining run."""

    seq_len: int
    batch_tokens: int
    eval_tokens: int
    eval_rows: int


# Peak learning rates of GPT-3's models of these sizes (Brown et al. 2020, table 2.1). Smaller
# models get a higher one.
PEAK_LR = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}
# The README has fineweb_prep.py write here, and a run without --data looks here first.
FINEWEB = "data/fineweb"
# Fine-tuning evaluates and saves after whole epochs, by default after at least this many steps.
MIN_INTERVAL = 5
RunOptions = TypeVar("RunOptions", bound=RunConfig)
ResolvedOptions = TypeVar("ResolvedOptions", bound=Resolved)
Options = TypeVar("Options")  # any dataclass of options


def preset_shape(cfg: RunConfig) -> dict[str, int]:
    """n_layer, n_head and n_embd of the preset, with the user's overrides. Without a preset (the
    weights of --init fix the shape) GPT-2's."""
    shape = PRESETS[cfg.preset or "gpt2"]
    return {name: getattr(cfg, name) or size for name, size in shape.items()}


def head_dim(cfg: RunConfig) -> int:
    """Width of one attention head in `preset_shape`."""
    shape = preset_shape(cfg)
    return shape["n_embd"] // shape["n_head"]


def resolve(cfg: RunOptions, device_type: str) -> RunOptions:
    """Replace each None that depends on the machine or on other options, and check the result.

    The steps of a fine-tuning run depend on how many rows it has. `resolve_steps` fills them in
    later, with what depends on them.
    """
    gpu = device_type == "cuda"
    scratch = cfg.init == "scratch"
    defaults: dict[str, Any] = {"preset": "gpt2" if gpu else "tiny"} if scratch else {}
    cfg = _fill_missing(cfg, defaults | {"compile": gpu})
    cfg = _fill_missing(cfg, {"lr": PEAK_LR.get(cfg.preset or "", 2e-3) if scratch else 5e-5})
    cfg = _fill_missing(cfg, {"out": default_out(cfg, device_type)})
    if isinstance(cfg, TrainConfig):
        cfg = _fill_missing(cfg, _pretraining_defaults(cfg, gpu))
    cfg = _fill_missing(cfg, {"data": "toy"})
    cfg.check()
    if cfg.cuda_graphs and not (gpu and cfg.compile):
        raise UserError("--cuda-graphs needs a CUDA GPU and --compile; leave it out here")
    return cfg if cfg.steps is None else resolve_steps(cfg, cfg.steps)


def _pretraining_defaults(cfg: TrainConfig, gpu: bool) -> dict[str, Any]:
    data = cfg.data or (FINEWEB if (Path(FINEWEB) / "manifest.json").is_file() else "stdlib")
    return {
        "data": data,
        # 19,073 steps of 524,288 tokens are 10 billion tokens
        "steps": 500 if data == "stdlib" else 19073 if gpu else 1000,
        "batch_tokens": 524288 if gpu else 8192,
        "eval_tokens": 10 << 20 if gpu else 1 << 16,
        "eval_rows": 0 if gpu else 250,
        "seq_len": 1024 if gpu else 256,
    }


def default_out(cfg: RunConfig, device_type: str) -> str:
    """The --out of a run that does not name one: runs/PRESET, or runs/ and the name of --init."""
    preset = cfg.preset or ("gpt2" if device_type == "cuda" else "tiny")
    return f"runs/{preset if cfg.init == 'scratch' else cfg.preset or Path(cfg.init).name}"


def resolve_steps(cfg: RunOptions, steps: int, epoch: int | None = None) -> RunOptions:
    """Set the steps of the run and the defaults that depend on them. `epoch`: the steps of one
    pass over the rows."""
    # If epochs are short, skip some: evaluating and saving would take most of the time.
    interval = epoch and min(steps, epoch * math.ceil(MIN_INTERVAL / epoch))
    defaults = {
        "warmup_steps": min(700, steps // 50),
        "eval_every": interval or min(250, max(1, steps // 10)),
        "save_every": interval or min(1000, max(1, steps // 5)),
    }
    cfg = _fill_missing(dataclasses.replace(cfg, steps=steps), defaults)
    return _fill_missing(cfg, {"sample_every": cfg.eval_every})


def resolved(cfg: RunConfig, kind: type[ResolvedOptions]) -> ResolvedOptions:
    """Return `cfg` itself, typed as resolved options of that kind, for the type checker.

    Raises RuntimeError for a None that `kind` does not allow.
    """
    hints = get_type_hints(kind).items()
    required = [name for name, hint in hints if NoneType not in get_args(hint)]
    if left := [name for name in required if getattr(cfg, name) is None]:
        raise RuntimeError(f"options that are not resolved yet: {', '.join(left)}")
    return cast(ResolvedOptions, cfg)


def _fill_missing(cfg: RunOptions, defaults: dict[str, Any]) -> RunOptions:
    """Replace each None by its value in `defaults`."""
    missing = {name: value for name, value in defaults.items() if getattr(cfg, name) is None}
    return dataclasses.replace(cfg, **missing)


@functools.cache
def marks(cls: type) -> dict[str, tuple[Any, ...]]:
    """The `Range`, `PathName` and `Positional` annotations of a dataclass's options, by option."""

    def inside(hint: Any) -> list[Any]:
        own = [
            mark
            for mark in getattr(hint, "__metadata__", ())
            if isinstance(mark, Range | PathName | Positional)
        ]
        return own + [mark for part in get_args(hint) for mark in inside(part)]

    return {
        name: tuple(inside(hint)) for name, hint in get_type_hints(cls, include_extras=True).items()
    }


def shown_name(cls: type, name: str) -> str:
    """What messages call an option: `--its-name`, or the metavar of one that is typed without."""
    metavars = [mark.metavar for mark in marks(cls)[name] if isinstance(mark, Positional)]
    return metavars[0] if metavars else "--" + name.replace("_", "-")


def check_ranges(cfg: Any) -> None:
    """Raise UserError if a number in a dataclass of options is out of its `Range`."""
    for name, found in marks(type(cfg)).items():
        value = getattr(cfg, name)
        for limits in found:
            if isinstance(limits, Range):
                for number in value if isinstance(value, tuple | list) else (value,):
                    _check_range(shown_name(type(cfg), name), number, limits)


def _check_range(option: str, value: Any, limits: Range) -> None:
    if not isinstance(value, int | float) or limits.least <= value <= limits.most:
        return
    shown = (
        str(value)
        if isinstance(value, float) or abs(value) < 10**40
        else "a number of very many digits"
    )
    most = "below 1" if limits.most == BELOW_ONE else f"at most {limits.most:g}"
    words = f"be at least {limits.least:g}" if value < limits.least else f"be {most}"
    if isinstance(value, float) and not math.isfinite(value):
        words = f"be finite, between {limits.least:g} and {limits.most:g}"
    raise UserError(f"{option} is {shown}; it must {words}")


def expand_paths(cfg: Options) -> Options:
    """Expand a leading `~` or `~user` in every option that names a path (`./~` stays).

    Raises UserError for an empty path. A shell passes one for a variable that is not set.
    """
    expanded = {}
    for name, found in marks(type(cfg)).items():
        for mark in found:
            if isinstance(mark, PathName):
                _check_not_empty(cfg, name)
                value = getattr(cfg, name)
                expanded[name] = (
                    tuple(expand(word, mark.many) for word in value)
                    if isinstance(value, tuple | list)
                    else expand(value, mark.many)
                )
    return _replaced(cfg, expanded)


def _replaced(cfg: Options, changes: dict[str, Any]) -> Options:
    options: Any = cfg
    return dataclasses.replace(options, **changes)


def _check_not_empty(cfg: Any, name: str) -> None:
    """Raise UserError if a path that the user typed is empty."""
    value = getattr(cfg, name)
    words = value if isinstance(value, tuple | list) else (value,)
    empty = any(isinstance(word, str) and not word.strip() for word in words)
    default = next(f.default for f in dataclasses.fields(cfg) if f.name == name)
    if empty and value != default:
        shown = shown_name(type(cfg), name)
        raise UserError(f"{shown} is empty; give a name, or leave {shown} out")


def replace_surrogates(cfg: Options) -> tuple[Options, list[str]]:
    """Replace lone surrogates, which cannot be encoded, and return the names of changed options.

    Python passes bytes of a command line that are not UTF-8 as lone surrogates, and JSON may hold
    some too. Paths keep them: a file's name may be any bytes.
    """
    paths = {
        name
        for name, found in marks(type(cfg)).items()
        if any(isinstance(mark, PathName) for mark in found)
    }
    changed = {}
    for name in marks(type(cfg)):
        if name in paths:
            continue
        value = getattr(cfg, name)
        words = value if isinstance(value, tuple) else (value,)
        new = tuple(without_surrogates(word) if isinstance(word, str) else word for word in words)
        if new != words:
            changed[name] = new if isinstance(value, tuple) else new[0]
    return _replaced(cfg, changed), list(changed)


def without_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD and each surrogate pair by its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def expand(value: Any, many: bool = False) -> Any:
    """Expand `~` in a path, or in each of `many`. A value that is not text is returned as it is."""
    if not isinstance(value, str):
        return value
    if many:
        return ",".join(
            re.sub(
                r"(\s*)(.*)", lambda m: m[1] + os.path.expanduser(m[2]), part, count=1, flags=re.S
            )
            for part in value.split(",")
        )
    return os.path.expanduser(value)


def known_names(option: str, given: str | Iterable[str], known: Iterable[str]) -> list[str]:
    """The names in a comma-separated text or a list. Raises UserError for an unknown one."""
    words = given.split(",") if isinstance(given, str) else given
    names, among = [name.strip() for name in words if name.strip()], list(known)
    for name in names:
        if name not in among:
            raise UserError(
                f"{option} {name} is not one of {', '.join(among)}{nearest(name, among)}"
            )
    return names


def nearest(word: str, among: Sequence[str]) -> str:
    """` (did you mean X?)` for the most similar word, or nothing if none is similar."""
    match = difflib.get_close_matches(word, among, n=1, cutoff=0.5)
    return f" (did you mean {match[0]}?)" if match else ""
