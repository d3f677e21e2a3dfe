"""The options of a resumed run: what the user did not type keeps its previous value, and every
change is reported."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.options import MethodConfig
from config import RunConfig, RunOptions, UserError, default_out
from engine.lengths import lengths_of
from engine.precision import choose_precision
from engine.processes import choose_device
from engine.start import Start, is_finished, is_of_a_run
from kernels import choose, operation_names
from storage.checkpoint import RECORD

# Options that belong to a single start, not to the run.
START_OPTIONS = ("out", "resume", "extend_to", "reschedule", "dry_run", "profile")
# Options whose value another machine may not support.
MACHINE_OPTIONS = ("compile", "precision", "kernels", "cuda_graphs")
# Facts in run.json, and their names for the user.
FACTS = {"world_size": "ranks", "torch": "torch", "device": "device"}


@dataclass(frozen=True)
class PreviousStart:
    """What a run's folder says about its last start."""

    options: dict[str, Any]  # resolved, from config.json
    record: dict[str, Any]  # run.json
    # MACHINE_OPTIONS and device, before they were resolved
    asked: dict[str, Any] = field(default_factory=dict)


def folder_of(cfg: RunConfig) -> Path:
    """The folder of the run, --out or its default."""
    return Path(cfg.out or default_out(cfg, choose_device(cfg.device).type))


def previous_start(cfg: RunConfig) -> PreviousStart | None:
    """The last start of the run that `cfg` continues. None if the run is new, or if the folder is
    not a run's, which `open_run` refuses.

    A start that failed before it wrote config.json does not count: it trained nothing.
    """
    run = folder_of(cfg)
    if not (run / RECORD).is_file():
        if cfg.resume in ("auto", "never"):
            return None
        where = Path(cfg.resume)
        run = where if (where / "checkpoints").is_dir() else where.parent.parent
    try:
        record = _read(run / RECORD)
        options = _read(run / "config.json")
    except ValueError as error:
        raise UserError(
            f"{run / 'config.json'} or {RECORD} beside it is not valid JSON: {error}; repair it"
        ) from None
    if not is_of_a_run(record) or not isinstance(options, dict) or not options:
        return None
    return PreviousStart(options, record, record.get("asked") or {})


def is_finished_with(cfg: RunConfig) -> bool:
    """Whether the run of `cfg` is finished, and `cfg` would start it with the options that it had.

    An option that is None or was resolved for the machine counts as equal.
    """
    previous = None if cfg.resume != "auto" or cfg.dry_run else previous_start(cfg)
    if previous is None:
        return False
    lengths = lengths_of(previous.record)
    planned = previous.options | {"steps": lengths[-1].steps}
    given = json.loads(json.dumps(dataclasses.asdict(cfg)))
    same = all(
        value in (None, planned.get(name), previous.asked.get(name))
        for name, value in given.items()
        if name not in (*START_OPTIONS, "micro_batch")
    )
    return same and is_finished(folder_of(cfg), lengths)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def restore_options(cfg: RunOptions, typed: Collection[str] | None) -> RunOptions:
    """Replace each option that was not `typed` by the run's previous value. None: all are typed.

    Raises UserError for a stored value that the option cannot have.
    """
    previous = None if typed is None or not cfg.trains else previous_start(cfg)
    if previous is not None and typed is not None:
        if cfg.extend_to and "steps" in typed:
            _check_steps(cfg, previous)
        cfg = _restored(cfg, frozenset(typed), previous)
    return dataclasses.replace(cfg, steps=cfg.extend_to) if cfg.extend_to else cfg


def _check_steps(cfg: RunConfig, previous: PreviousStart) -> None:
    """Raise UserError for --steps beside --extend-to, unless it repeats a number that the run has
    or will have. Any other number would have no effect."""
    known = {length.steps for length in lengths_of(previous.record)} | {cfg.extend_to}
    if cfg.steps not in known:
        raise UserError(
            f"--steps {cfg.steps} and --extend-to {cfg.extend_to} contradict each other; leave "
            "--steps out"
        )


def _restored(cfg: RunOptions, typed: frozenset[str], previous: PreviousStart) -> RunOptions:
    own = previous.options | {"steps": previous.record["identity"].get("steps")}
    # The micro-batch is restored with the checkpoint.
    kept = typed | {*START_OPTIONS, *MACHINE_OPTIONS, "device", "micro_batch"}
    if "epochs" in typed:
        kept |= {"steps"}
    if "init" in typed and cfg.init != own.get("init"):  # these weights have their own shape
        kept |= {"preset", "n_layer", "n_head", "n_embd"}
    if "method" in typed and getattr(cfg, "method", None) != own.get("method"):
        # Do not add the old method's options. The new method is refused later, as another run.
        kept |= {f.name for f in dataclasses.fields(MethodConfig)}
    hints = typing.get_type_hints(type(cfg))
    names = [f.name for f in dataclasses.fields(cfg) if f.name in own and f.name not in kept]
    cfg = dataclasses.replace(
        cfg, **{name: _as_option(name, own[name], hints[name]) for name in names}
    )
    return _for_this_machine(cfg, typed, previous)


def _as_option(name: str, value: Any, hint: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    if not _has_type(value, hint):
        raise UserError(
            f"config.json of the run has {name} {value!r}, which --{name.replace('_', '-')} cannot "
            "be; repair it"
        )
    return value


def _has_type(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_has_type(part, parts[0]) for part in value)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _for_this_machine(
    cfg: RunOptions, typed: frozenset[str], previous: PreviousStart
) -> RunOptions:
    """Restore device, compilation, precision and kernels as far as this machine supports them."""
    if "device" not in typed:
        device = previous.asked.get("device", previous.options.get("device", "auto"))
        cfg = dataclasses.replace(cfg, device=device if _device_exists(device) else "auto")
    same = choose_device(cfg.device).type == _device_of(previous)
    for name in MACHINE_OPTIONS:
        if name not in typed and name in previous.options:
            sources = ([previous.options] if same else []) + [previous.asked]
            usable = (
                source[name]
                for source in sources
                if name in source and _is_usable(cfg, name, source[name])
            )
            cfg = dataclasses.replace(cfg, **{name: next(usable, getattr(cfg, name))})
    return cfg


def _device_exists(device: str) -> bool:
    try:
        choose_device(device)
    except UserError:
        return False
    return True


def _device_of(previous: PreviousStart) -> str:
    """The type of a run's device. If an older version did not record it, infer it from the kernels
    and compilation that the run used."""
    known = previous.record.get("device") or previous.options.get("device")
    if known and known != "auto":
        return known
    triton = set(operation_names(previous.options.get("kernels", "torch"))) - {"cpu_attention"}
    return "cuda" if triton or previous.options.get("compile") else "cpu"


def _is_usable(cfg: RunConfig, name: str, value: Any) -> bool:
    """Whether an option can have this value on this machine. The options that precede it in
    MACHINE_OPTIONS are restored already."""
    device = choose_device(cfg.device)
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    try:
        if name == "cuda_graphs":
            return not value or (device.type == "cuda" and compiled)
        if name == "precision":
            choose_precision(value, device)
        if name == "kernels":
            precision, _ = choose_precision(cfg.precision, device)
            choose(
                dataclasses.replace(cfg, kernels=value, precision=precision, compile=compiled),
                device.type,
            )
    except UserError:
        return False
    return True


def changes(
    options: dict[str, Any], facts: dict[str, Any], previous: PreviousStart, start: Start
) -> Iterator[str]:
    """`NAME OLD -> NEW` for each option and fact that has changed since the last start."""
    left_out = {*START_OPTIONS, "steps"} if start.extended else set(START_OPTIONS)
    for name, new in json.loads(json.dumps(options)).items():
        old = previous.options.get(name, new)
        if old != new and name not in left_out:
            yield f"{name.replace('_', '-')} {_shown(old)} -> {_shown(new)}"
    for name, title in FACTS.items():
        old, new = previous.record.get(name), facts.get(name)
        if old is not None and new is not None and old != new:
            yield f"{title} {old} -> {new}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
