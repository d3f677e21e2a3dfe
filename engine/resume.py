"""The options of a run that goes on: what was not typed is as it was, and what changed is told."""

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
from config import Run, RunConfig, UserError, default_out
from engine.lengths import lengths_of
from engine.precision import choose_precision
from engine.processes import choose_device
from engine.start import Start
from kernels import choose, operation_names
from storage.checkpoint import RECORD

# Options that say how one start goes about it, not what the run is.
OF_A_START = ("out", "resume", "extend_to", "reschedule", "dry_run", "profile")
# may have to be chosen anew on another machine
BY_MACHINE = ("compile", "precision", "kernels", "cuda_graphs")
# of run.json, and their names for a user
FACTS = {"world_size": "ranks", "torch": "torch", "device": "device"}


@dataclass(frozen=True)
class Earlier:
    """What a run's folder says of its last start."""

    options: dict[str, Any]  # resolved
    record: dict[str, Any]  # run.json
    # of BY_MACHINE and device, before they were resolved
    asked: dict[str, Any] = field(default_factory=dict)


def earlier_start(cfg: RunConfig) -> Earlier | None:
    """The last start of the run that `cfg` continues; None where it begins a run.

    A start that failed before config.json has trained nothing: its options are not the run's.
    """
    run = Path(cfg.out or default_out(cfg, choose_device(cfg.device).type))
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
            f"{run / 'config.json'} or {RECORD} beside it is not valid JSON: {error}; mend it"
        ) from None
    if not isinstance(record, dict) or not isinstance(options, dict) or not options:
        return None
    return Earlier(options, record, record.get("asked") or {})


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def own_options(cfg: Run, typed: Collection[str] | None) -> Run:
    """`cfg` with the run's own value of each option that was not `typed`. None: all count as typed.

    Raises UserError for a stored value that its option cannot have.
    """
    earlier = None if typed is None or not cfg.trains else earlier_start(cfg)
    if earlier is not None and typed is not None:
        if cfg.extend_to and "steps" in typed:
            _check_steps(cfg, earlier)
        cfg = _with_own(cfg, frozenset(typed), earlier)
    return dataclasses.replace(cfg, steps=cfg.extend_to) if cfg.extend_to else cfg


def _check_steps(cfg: RunConfig, earlier: Earlier) -> None:
    """Beside --extend-to, --steps may say what the run had; any other number would be lost."""
    known = {length.steps for length in lengths_of(earlier.record)} | {cfg.extend_to}
    if cfg.steps not in known:
        raise UserError(
            f"--steps {cfg.steps} and --extend-to {cfg.extend_to} contradict each other; leave "
            "--steps out"
        )


def _with_own(cfg: Run, typed: frozenset[str], earlier: Earlier) -> Run:
    own = earlier.options | {"steps": earlier.record["identity"].get("steps")}
    # a micro-batch is resumed with the checkpoint
    kept = typed | {*OF_A_START, *BY_MACHINE, "device", "micro_batch"}
    if "epochs" in typed:
        kept |= {"steps"}
    if "init" in typed and cfg.init != own.get("init"):  # the weights fix the shape
        kept |= {"preset", "n_layer", "n_head", "n_embd"}
    if "method" in typed and getattr(cfg, "method", None) != own.get("method"):
        # another run, and refused as one
        kept |= {f.name for f in dataclasses.fields(MethodConfig)}
    hints = typing.get_type_hints(type(cfg))
    names = [f.name for f in dataclasses.fields(cfg) if f.name in own and f.name not in kept]
    cfg = dataclasses.replace(
        cfg, **{name: _as_option(name, own[name], hints[name]) for name in names}
    )
    return _for_this_machine(cfg, typed, earlier)


def _as_option(name: str, value: Any, hint: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    if not _fits(value, hint):
        raise UserError(
            f"config.json of the run has {name} {value!r}, which --{name.replace('_', '-')} cannot "
            "be; mend it"
        )
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, parts[0]) for part in value)
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _for_this_machine(cfg: Run, typed: frozenset[str], earlier: Earlier) -> Run:
    """Device, precision, kernels and compilation as they were, as far as this machine has them."""
    if "device" not in typed:
        device = earlier.asked.get("device", earlier.options.get("device", "auto"))
        cfg = dataclasses.replace(cfg, device=device if _is_there(device) else "auto")
    same = choose_device(cfg.device).type == _device_of(earlier)
    for name in BY_MACHINE:
        if name not in typed and name in earlier.options:
            sources = ([earlier.options] if same else []) + [earlier.asked]
            usable = (
                source[name]
                for source in sources
                if name in source and _works(cfg, name, source[name])
            )
            cfg = dataclasses.replace(cfg, **{name: next(usable, getattr(cfg, name))})
    return cfg


def _is_there(device: str) -> bool:
    try:
        choose_device(device)
    except UserError:
        return False
    return True


def _device_of(earlier: Earlier) -> str:
    """The type of device of a run; told by what it computed with, where an older version wrote no
    more."""
    known = earlier.record.get("device") or earlier.options.get("device")
    if known and known != "auto":
        return known
    triton = set(operation_names(earlier.options.get("kernels", "torch"))) - {"cpu_attention"}
    return "cuda" if triton or earlier.options.get("compile") else "cpu"


def _works(cfg: RunConfig, name: str, value: Any) -> bool:
    """Whether an option can have a value here, where those before it in BY_MACHINE are settled."""
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
    options: dict[str, Any], facts: dict[str, Any], earlier: Earlier, start: Start
) -> Iterator[str]:
    """`NAME OLD -> NEW` for each of the resolved `options` and `facts` that has changed since the
    last start."""
    left_out = {*OF_A_START, "steps"} if start.extended else set(OF_A_START)
    for name, new in json.loads(json.dumps(options)).items():
        old = earlier.options.get(name, new)
        if old != new and name not in left_out:
            yield f"{name.replace('_', '-')} {_shown(old)} -> {_shown(new)}"
    for name, title in FACTS.items():
        old, new = earlier.record.get(name), facts.get(name)
        if old is not None and new is not None and old != new:
            yield f"{title} {old} -> {new}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
