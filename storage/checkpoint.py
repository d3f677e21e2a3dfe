"""Writes, verifies, finds and prunes checkpoints. Their folders are complete or do not exist.

A checkpoint is written into a temporary folder. Every file is flushed, the manifest with sizes and
sha256 comes last, then the folder is renamed and its parent flushed. A kill at any moment leaves
the finished folder, or a temporary one that the next start removes.

Nothing is pickled. A file that the manifest does not list belongs to the user and is never deleted.
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
RESULTS = "metrics.json"  # a run writes it last, so a run that has it is finished
WRITTEN = ("config.json", "log.jsonl", "checkpoints", "final", RESULTS)  # what else a run writes
RECORD = "run.json"  # a run writes it before anything else
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")  # name of a checkpoint's folder
# Prefixes of a folder's name during its removal: while it may hold files of the user, and after
# these have been moved out.
REMOVING = f"{TEMPORARY}old-"
DISCARDED = f"{TEMPORARY}gone-"


# --- whole folders


def _silent(text: str) -> None:
    pass


def write_folder(
    folder: Path, fill: Callable[[Path], None], say: Callable[[str], None] = _silent
) -> int:
    """Create `folder` atomically with the files that `fill` writes. Returns its size in bytes.

    An OSError leaves no unfinished folder. An older folder of that name is deleted. The user's
    files in it are moved to a folder next to it, which `say` names.
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
        _remove(folder, say)  # left by an earlier attempt at the same step, or an older final/
        temporary.rename(folder)
        flush(folder.parent)
    return sum(sizes)


def _remove(folder: Path, say: Callable[[str], None] = _silent) -> None:
    """Delete a folder that a run wrote, if it exists. A kill leaves no part of it under its name.

    Files that its manifest does not list are moved aside. Without a valid manifest, all files are.
    """
    _finish_removal(folder, say)
    if os.path.lexists(folder):
        folder.rename(folder.with_name(REMOVING + folder.name))
        _finish_removal(folder, say)


def _finish_removal(folder: Path, say: Callable[[str], None]) -> None:
    """Continue the removal of a folder that has been renamed already."""
    old, gone = folder.with_name(REMOVING + folder.name), folder.with_name(DISCARDED + folder.name)
    if os.path.lexists(old):
        _keep_files_of_user(old, folder, say)
    if os.path.lexists(old):
        shutil.rmtree(gone, ignore_errors=True)
        old.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _keep_files_of_user(old: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Move the files that the manifest of `old` does not list into a folder next to `folder`."""
    listed = None if old.is_symlink() else _read_manifest(old)
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
    say(f"{folder} held files that this run did not write; they are now in {kept}")


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    )
    return next(name for name in names if not os.path.lexists(name))


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size in bytes and sha256 of each file that a folder's manifest lists.

    None if there is no manifest, or one with another content. Raises OSError if it cannot be read.
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
    """What is wrong with a checkpoint's folder, or None if all files match its manifest."""
    if not (folder / MANIFEST).is_file():
        return "it has no manifest.json"
    try:
        listed = _read_manifest(folder)
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
    """Where a run writes the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path, until: int | None = None) -> list[Path]:
    """The folders that are named like checkpoints of a run up to step `until`, newest first.

    Their content is not checked.
    """
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
    """The folders of `checkpoints` that the run itself wrote, each with its META.

    Links and copies that the user made are left out.
    """
    metas = [
        (folder, _read_meta(folder))
        for folder in checkpoints(run, until)
        if not folder.is_symlink()
    ]
    return [
        (folder, meta) for folder, meta in metas if meta and meta.get("step") == _step_named(folder)
    ]


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """The content of a checkpoint's META, or None if its manifest does not list this file."""
    try:
        if META not in (_read_manifest(folder) or {}):
            return None
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def newest_sound(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, or None. `say` is told which ones are skipped and why."""
    for folder in checkpoints(run):
        reason = find_damage(folder) or _other_step(folder)
        if reason is None:
            return folder
        say(f"skipping {folder}: {reason}")
    return None


def _other_step(folder: Path) -> str | None:
    """The error of an undamaged folder that does not hold the step of its name, else None."""
    meta = _read_meta(folder)
    if meta is None:
        return f"its manifest.json lists no {META}"
    step = meta.get("step")
    return None if step == _step_named(folder) else f"it is a copy of the checkpoint of step {step}"


def locate(where: str) -> str:
    """Turn a CHECKPOINT argument into a path for GPT.from_pretrained and load_tokenizer.

    A run's folder becomes its final/, or else its newest undamaged checkpoint. A checkpoint is
    verified. Any other path is returned without changes. A name that is no path is downloaded from
    the hub. Raises UserError for a run without checkpoints, a damaged checkpoint, and a name that
    the hub does not know.
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
                f"{where} has no undamaged checkpoint yet"
                + (f" ({'; '.join(bad)})" if bad else "")
                + "; give another run"
            )
        folder = sound
    written_here = folder.parent.name == "checkpoints" or (folder / MANIFEST).exists()
    reason = find_damage(folder) if folder.is_dir() and written_here else None
    if reason is not None:
        raise UserError(
            f"the checkpoint {folder} is damaged: {reason}; give another one of that run"
        )
    return str(folder)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training state of a verified checkpoint: its tensors by name, and the content of META.

    META holds the step, the run's identity and more. Raises UserError if there is no such state.
    """
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        raise UserError(
            f"{folder} holds a model but no training state; start from it with --init {folder}"
        )
    return load_file(folder / STATE), json.loads((folder / META).read_text(encoding="utf-8"))


def remove_leftovers(run: Path, say: Callable[[str], None] = _silent) -> None:
    """Remove what a kill during a save left behind."""
    for name in (RECORD, *WRITTEN):
        _remove_leftover(run / name, say)
    checkpoints = run / "checkpoints"
    for path in _entries(checkpoints):
        name = re.sub(rf"^{re.escape(TEMPORARY)}(old-|gone-)?", "", path.name)
        if path.name.startswith(TEMPORARY) and STEP_NAME.fullmatch(name):
            _remove_leftover(checkpoints / name, say)


def _remove_leftover(path: Path, say: Callable[[str], None]) -> None:
    """Remove the unfinished new version of `path`, and finish the removal of an older one."""
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
    """Delete checkpoints up to `step`, except the newest `keep` and the best `keep_best`.

    At least one of each is kept. Checkpoints after `step` do not count: a resumed run skipped them
    as damaged, so they must not displace a sound one.
    """
    best = [folder for folder, _ in rank_by_metric(run, mode, step)[: max(1, keep_best)]]
    for folder, _ in _own_checkpoints(run, step)[max(1, keep) :]:
        if folder not in best:
            _remove(folder, say)


def rank_by_metric(run: Path, mode: str, until: int | None = None) -> list[tuple[Path, float]]:
    """The checkpoints up to step `until`, each with its `best_metric`, the best one first.

    mode: whether the smallest or the largest value is the best, "min" or "max".
    """
    scored = []
    for folder, meta in _own_checkpoints(run, until):
        value = meta.get("best_metric")
        if value is not None:
            scored.append((value if mode == "min" else -value, folder, value))
    return [(folder, value) for _, folder, value in sorted(scored)]


# --- writing them in a thread


class Saver:
    """Writes checkpoints in a thread. Training waits only while the state is copied.

    The copy goes into buffers that are kept for the whole run, so only the first save allocates
    them.
    """

    def __init__(
        self,
        run: Path,
        export: Callable[[dict[str, Tensor], Path], None],
        done: Callable[..., None],
        say: Callable[[str], None] = _silent,
    ):
        """export(model_tensors, folder): writes the model in its public layout.

        done(**facts): is called in the thread after each save, with its figures or its `error`.
        say: is told where files of the user were moved.
        """
        self.run, self.export, self.done, self.say = run, export, done, say
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], after: Callable[[], None]
    ) -> None:
        """Copy `tensors`, then write them with `meta` and the exported model in the thread.

        The checkpoint is that of meta["step"]. An unfinished save is waited for first. tensors:
        named `model.*`, `optimizer.*` and `loss_scale.*`. after(): runs in the thread when the
        checkpoint is complete.
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
        """Wait for the save in progress, if there is one."""
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
            # Most likely the disk is full. Training continues, and older checkpoints are kept.
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
    """The tensors under the names `prefix.name`. The inverse is `without_prefix`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix.*`, with the prefix removed from their names."""
    return {
        n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")
    }
