"""Folders that are whole or are not there: writing, verifying, finding and pruning checkpoints.

A checkpoint is written under a temporary name, every file flushed, its manifest (sizes and sha256)
last, then renamed, then the parent flushed. A kill at any instant leaves either the finished folder
or a temporary one that the next start removes. Nothing is ever pickled. What a manifest does not
list is the user's: it is never deleted.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.files import TEMPORARY, flush, sha256, temporary_folder
from config import UserError
from storage import weights
from storage.hub import download

STATE = "training_state.safetensors"
META = "training_state.json"
RESULTS = "metrics.json"  # of a run: written last of all, so a run that has it is finished
WRITTEN = ("config.json", "log.jsonl", "checkpoints", "final", RESULTS)  # what else a run writes
RECORD = "run.json"  # of a run: written before anything else
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")  # of a checkpoint's folder
REMOVING = f"{TEMPORARY}old-"  # begins the name of a folder whose files are about to be deleted
DISCARDED = f"{TEMPORARY}gone-"  # the same, when nothing in it is the user's any more


# --- whole folders


def _silent(text: str) -> None:
    pass


def write_folder(
    folder: Path, fill: Callable[[Path], None], say: Callable[[str], None] = _silent
) -> int:
    """Create `folder` with what `fill` writes into it, atomically; returns its bytes. An OSError
    leaves nothing.

    An older folder of that name is deleted. What in it is the user's is kept beside, and `say`
    tells where.
    """
    with temporary_folder(folder.with_name(TEMPORARY + folder.name)) as temporary:
        fill(temporary)
        paths = sorted(p for p in temporary.rglob("*") if p.is_file())
        sizes = [path.stat().st_size for path in paths]
        manifest = {
            str(path.relative_to(temporary)): {"bytes": size, "sha256": sha256(path)}
            for path, size in zip(paths, sizes, strict=True)
        }
        (temporary / MANIFEST).write_text(
            json.dumps({"files": manifest}, indent=1) + "\n", encoding="utf-8"
        )
        for path in [*paths, temporary / MANIFEST, temporary]:
            flush(path)
        _remove(folder, say)  # of an earlier attempt at the same step, or an older final/
        temporary.rename(folder)
        flush(folder.parent)
    return sum(sizes)


def _remove(folder: Path, say: Callable[[str], None] = _silent) -> None:
    """Delete a folder that we wrote, if it is there; a kill half-way leaves no half of it under its
    name.

    What its manifest does not list is moved aside: everything, where it has no manifest of ours.
    """
    _finish_removal(folder, say)
    if os.path.lexists(folder):
        folder.rename(folder.with_name(REMOVING + folder.name))
        _finish_removal(folder, say)


def _finish_removal(folder: Path, say: Callable[[str], None]) -> None:
    """Go on with the removal of a folder that has lost its name already."""
    old, gone = folder.with_name(REMOVING + folder.name), folder.with_name(DISCARDED + folder.name)
    if os.path.lexists(old):
        _keep_what_is_not_ours(old, folder, say)
    if os.path.lexists(old):
        shutil.rmtree(gone, ignore_errors=True)
        old.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _keep_what_is_not_ours(old: Path, folder: Path, say: Callable[[str], None]) -> None:
    listed = None if old.is_symlink() else _listed(old)
    kept = _free_name(folder.with_name(f"kept-{folder.name}"))
    if listed is None:
        old.rename(kept)
    else:
        names = [
            str(p.relative_to(old)) for p in old.rglob("*") if p.is_symlink() or not p.is_dir()
        ]
        others = sorted(set(names) - set(listed) - {MANIFEST})
        if not others:
            return
        for name in others:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(kept / name)
    say(f"{folder} held files that this run did not write: they are in {kept}")


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that is not taken."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not os.path.lexists(name))


def _listed(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Bytes and sha256 of each file that a folder's manifest lists; None where it has no manifest
    of ours.

    Raises OSError where the manifest cannot be read.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_damage(folder: Path) -> str | None:
    """Why a written folder cannot be trusted, or None where its manifest verifies."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest.json"
    try:
        listed = _listed(folder)
    except OSError:
        listed = None
    if listed is None:
        return "its manifest.json is not that of a checkpoint"
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256(path) != digest:
            return f"{name} is damaged (its sha256 differs)"
    return None


# --- finding them


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path, until: int | None = None) -> list[Path]:
    """Folders named as checkpoints of a run up to step `until`, newest first, whatever is in
    them."""
    steps = {
        path: step
        for path in _entries(run / "checkpoints")
        if (step := _step_named(path)) is not None
    }
    found = [
        path for path, step in steps.items() if path.is_dir() and (until is None or step <= until)
    ]
    return sorted(found, key=lambda path: steps[path], reverse=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _step_named(folder: Path) -> int | None:
    match = STEP_NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def _own_checkpoints(run: Path, until: int | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Those of `checkpoints` that a run wrote under their names, with their facts: not a copy or a
    link of the user's."""
    facts = [
        (folder, _facts_of(folder)) for folder in checkpoints(run, until) if not folder.is_symlink()
    ]
    return [
        (folder, meta) for folder, meta in facts if meta and meta.get("step") == _step_named(folder)
    ]


def _facts_of(folder: Path) -> dict[str, Any] | None:
    """The facts of a checkpoint whose manifest lists them, or None."""
    try:
        if META not in (_listed(folder) or {}):
            return None
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def newest_sound(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; says which ones it passed over and why."""
    for folder in checkpoints(run):
        reason = find_damage(folder) or _other_step(folder)
        if reason is None:
            return folder
        say(f"passing over {folder}: {reason}")
    return None


def _other_step(folder: Path) -> str | None:
    """What is wrong with a sound folder that does not hold the step of its name."""
    meta = _facts_of(folder)
    if meta is None:
        return f"its manifest.json lists no {META}"
    step = meta.get("step")
    return None if step == _step_named(folder) else f"it is a copy of the checkpoint of step {step}"


def locate(where: str) -> str:
    """CHECKPOINT of the command line to a path that GPT.from_pretrained and load_tokenizer take.

    A run gives its final/ or newest sound checkpoint, a checkpoint is verified first, any other
    path is returned as it is, and what is no path is fetched from the hub. Raises UserError for a
    run without checkpoints, for a damaged one, and for a name that the hub does not know.
    """
    folder = Path(where)
    if not folder.exists():
        return str(download(where))
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif (folder / "checkpoints").is_dir():
        sound = newest_sound(folder, say=lambda text: None)
        if sound is None:
            bad = [f"{p.name}: {find_damage(p)}" for p in checkpoints(folder)]
            raise UserError(
                f"{where} has no sound checkpoint yet" + (f" ({'; '.join(bad)})" if bad else "")
            )
        folder = sound
    written_here = folder.parent.name == "checkpoints" or (folder / MANIFEST).exists()
    reason = find_damage(folder) if folder.is_dir() and written_here else None
    if reason is not None:
        raise UserError(
            f"{folder} is not a sound checkpoint: {reason}; take another one of that run"
        )
    return str(folder)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Training state of a verified checkpoint: its tensors, by name, and its facts (step, identity,
    ...)."""
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder} holds a model but no training state; start from it with --init {folder}"
        )
    return load_file(folder / STATE), json.loads((folder / META).read_text(encoding="utf-8"))


def remove_leftovers(run: Path, say: Callable[[str], None] = _silent) -> None:
    """Remove what a kill in the middle of a save left behind."""
    for name in (RECORD, *WRITTEN):
        _remove_leftover(run / name, say)
    checkpoints = run / "checkpoints"
    for path in _entries(checkpoints):
        name = re.sub(rf"^{re.escape(TEMPORARY)}(old-|gone-)?", "", path.name)
        if path.name.startswith(TEMPORARY) and STEP_NAME.fullmatch(name):
            _remove_leftover(checkpoints / name, say)


def _remove_leftover(path: Path, say: Callable[[str], None]) -> None:
    """Remove what was being written under a name, and of what was being deleted there all that is
    ours."""
    unfinished = path.with_name(TEMPORARY + path.name)
    unfinished.unlink(missing_ok=True) if unfinished.is_file() else shutil.rmtree(
        unfinished, ignore_errors=True
    )
    _finish_removal(path, say)


def prune(
    run: Path,
    step: int,
    keep: int,
    mode: str,
    keep_best: int = 1,
    say: Callable[[str], None] = _silent,
) -> None:
    """Of the checkpoints up to `step`, delete all but the newest `keep` and the best `keep_best`.

    Later ones are those that a resumed run passed over: they may not push out a sound one.
    """
    best = [folder for folder, _ in rank_by_metric(run, mode, step)[: max(1, keep_best)]]
    for folder, _ in _own_checkpoints(run, step)[max(1, keep) :]:
        if folder not in best:
            _remove(folder, say)


def rank_by_metric(run: Path, mode: str, until: int | None = None) -> list[tuple[Path, float]]:
    """Checkpoints up to step `until` and the `best_metric` recorded in each, the best first: "min"
    or "max"."""
    scored = []
    for folder, meta in _own_checkpoints(run, until):
        value = meta.get("best_metric")
        if value is not None:
            scored.append((value if mode == "min" else -value, folder, value))
    return [(folder, value) for _, folder, value in sorted(scored)]


# --- writing them, off the training thread


class Saver:
    """Writes checkpoints in a thread. The training thread waits only while the state is copied.

    The copy goes into buffers that live as long as the run, so a save allocates nothing after the
    first one.
    """

    def __init__(
        self,
        run: Path,
        export: Callable[[dict[str, Tensor], Path], None],
        done: Callable[..., None],
        say: Callable[[str], None] = _silent,
    ):
        """`export(model_tensors, folder)` writes the model in its public layout; `done(**facts)`
        hears of the end.

        `say` is told what of the user's was moved aside.
        """
        self.run, self.export, self.done, self.say = run, export, done, say
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], after: Callable[[], None]
    ) -> None:
        """Copy `tensors` and write them, `meta` and the exported model as the checkpoint of
        meta["step"].

        `tensors` are named `model.*`, `optimizer.*`, `loss_scale.*`; `after()` runs in the thread
        once it stands.
        """
        began = time.perf_counter()
        self.join()
        self._copy(tensors)
        blocked = time.perf_counter() - began
        self.thread = threading.Thread(
            target=self._write, args=(dict(self.buffers), meta, blocked, after)
        )
        self.thread.start()

    def join(self) -> None:
        """Wait for the save under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _copy(self, tensors: dict[str, Tensor]) -> None:
        self.buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self.buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        old = self.buffers.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            return old
        return torch.empty(
            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
        )

    def _write(
        self,
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        blocked: float,
        after: Callable[[], None],
    ) -> None:
        began = time.perf_counter()
        folder = step_folder(self.run, meta["step"])
        try:
            size = write_folder(
                folder, lambda temporary: self._fill(temporary, tensors, meta), self.say
            )
            after()
        except Exception as error:
            # a full disk, most likely: training goes on, older checkpoints stand
            self.error = error
            self.done(
                step=meta["step"], folder=str(folder), error=f"{type(error).__name__}: {error}"
            )
            return
        self.error = None
        write = time.perf_counter() - began
        self.done(
            step=meta["step"],
            folder=str(folder),
            bytes=size,
            blocked_ms=1e3 * blocked,
            write_ms=1e3 * write,
        )

    def _fill(self, folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        self.export(without_prefix(tensors, "model"), folder)
        weights.save_tensors(tensors, folder / STATE)
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{prefix.name: tensor}; the inverse is `without_prefix`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix.*`, without the prefix."""
    return {
        n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")
    }
