"""Folders that are whole or are not there: writing, verifying, finding and pruning checkpoints.

A checkpoint is written under a temporary name, every file flushed, its manifest (sizes and sha256) last, then
renamed, then the parent flushed. A kill at any instant leaves either the finished folder or a temporary one
that the next start removes. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import files
from config import UserError
from files import TEMPORARY, flush, sha256
from model import download

STATE = "training_state.safetensors"
META = "training_state.json"
RECORD = "run.json"  # of a run: written before anything else
RESULTS = "metrics.json"  # of a run: written last of all, so a run that has it is finished
WRITTEN = ("config.json", "log.jsonl", "checkpoints", "final", RESULTS)  # what else a run writes


# --- whole folders


def write_folder(folder: Path, fill: Callable[[Path], None]) -> int:
    """Create `folder` with what `fill` writes into it, atomically; returns its bytes. An OSError leaves nothing."""
    temporary = folder.with_name(TEMPORARY + folder.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        fill(temporary)
        paths = sorted(p for p in temporary.rglob("*") if p.is_file())
        sizes = [path.stat().st_size for path in paths]
        manifest = {
            str(path.relative_to(temporary)): {"bytes": size, "sha256": sha256(path)}
            for path, size in zip(paths, sizes, strict=True)
        }
        (temporary / "manifest.json").write_text(json.dumps({"files": manifest}, indent=1) + "\n", encoding="utf-8")
        for path in [*paths, temporary / "manifest.json", temporary]:
            flush(path)
        _remove(folder)  # of an earlier attempt at the same step, or an older final/
        temporary.rename(folder)
        flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(sizes)


def _remove(folder: Path) -> None:
    """Delete a folder, if it is there; a kill half-way leaves no half of it under its name."""
    if folder.exists():
        gone = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Why a written folder cannot be trusted, or None where its manifest verifies."""
    try:
        entries = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        facts = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()]
    except (FileNotFoundError, NotADirectoryError):
        return "it has no manifest.json"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OverflowError, RecursionError):
        return "its manifest.json is not that of a checkpoint"
    for name, size, digest in facts:
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
    """Finished checkpoint folders of a run up to step `until`, newest first; leftovers of a kill do not count."""
    found = (run / "checkpoints").glob("step-*") if (run / "checkpoints").is_dir() else iter(())
    last = step_folder(run, until).name if until is not None else "~"
    return sorted((p for p in found if p.is_dir() and p.name <= last), key=lambda p: p.name, reverse=True)


def newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; says which ones it passed over and why."""
    for folder in checkpoints(run):
        reason = fault(folder)
        if reason is None:
            return folder
        say(f"passing over {folder}: {reason}")
    return None


def locate(where: str) -> str:
    """CHECKPOINT of the command line to a path that GPT.from_pretrained and load_tokenizer take.

    A run gives its final/ or newest sound checkpoint, a checkpoint is verified first, any other path is returned
    as it is, and what is no path is fetched from the hub. Raises UserError for a run without checkpoints, for a
    damaged one, and for a name that the hub does not know.
    """
    folder = Path(where)
    if not folder.exists():
        return str(download(where))
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif (folder / "checkpoints").is_dir():
        sound = newest(folder, say=lambda text: None)
        if sound is None:
            bad = [f"{p.name}: {fault(p)}" for p in checkpoints(folder)]
            raise UserError(f"{where} has no sound checkpoint yet" + (f" ({'; '.join(bad)})" if bad else ""))
        folder = sound
    written_here = folder.parent.name == "checkpoints" or (folder / "manifest.json").exists()
    reason = fault(folder) if folder.is_dir() and written_here else None
    if reason is not None:
        raise UserError(f"{folder} is not a sound checkpoint: {reason}; take another one of that run")
    return str(folder)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Training state of a verified checkpoint: its tensors, by name, and its facts (step, identity, ...)."""
    from safetensors.torch import load_file

    if not (folder / STATE).is_file():
        raise UserError(f"{folder} holds a model but no training state; start from it with --init {folder}")
    return load_file(folder / STATE), json.loads((folder / META).read_text(encoding="utf-8"))


def clean(run: Path) -> None:
    """Remove what a kill in the middle of a save left behind."""
    for parent in (run, run / "checkpoints"):
        for leftover in parent.glob(TEMPORARY + "*"):
            leftover.unlink() if leftover.is_file() else shutil.rmtree(leftover, ignore_errors=True)


def prune(run: Path, step: int, keep: int, mode: str, keep_best: int = 1) -> None:
    """Of the checkpoints up to `step`, delete all but the newest `keep` and the best `keep_best`.

    Later ones are those that a resumed run passed over: they may not push out a sound one.
    """
    best = [folder for folder, _ in ranked(run, mode, step)[: max(1, keep_best)]]
    for folder in checkpoints(run, step)[max(1, keep) :]:
        if folder not in best:
            _remove(folder)


def ranked(run: Path, mode: str, until: int | None = None) -> list[tuple[Path, float]]:
    """Checkpoints up to step `until` and the `best_metric` recorded in each, the best first: "min" or "max"."""
    scored = []
    for folder in checkpoints(run, until):
        try:
            value = json.loads((folder / META).read_text(encoding="utf-8"))["best_metric"]
        except (OSError, ValueError, KeyError):
            continue
        if value is not None:
            scored.append((value if mode == "min" else -value, folder, value))
    return [(folder, value) for _, folder, value in sorted(scored)]


@dataclass
class Start:
    """How a run begins: afresh (no folder), from a checkpoint, or not at all."""

    folder: Path | None = None
    finished: bool = False
    micro_batch: int | None = None  # of the interrupted run: the same one gives the same bits


@contextlib.contextmanager
def claimed(run: Path) -> Generator[None]:
    """Make a run's folder and keep other processes out of it, the ranks that a killed torchrun left behind too."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        folder = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write to --out {run}: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UserError(f"{run} is in use by a run that still goes on; end it, or choose another --out") from None
    except OSError:  # a network file system without locks
        pass
    try:
        yield
    finally:
        os.close(folder)


def open_run(
    run: Path, resume: str, identity: dict[str, Any], facts: dict[str, Any], say: Callable[[str], None]
) -> Start:
    """Find where a run begins and say whose its folder is. Raises UserError where that would lose or mix anything.

    `identity` holds, by option name, what a resumed run must have in common with the checkpoint; `facts` (config,
    versions) are stored beside it in run.json.
    """
    start = Start()
    before = _identity_of(run)
    if before is not None:
        if resume == "never":
            raise UserError(f"{run} already holds a run; choose another --out, or continue it with --resume auto")
        _same_run(identity, before, run)
    if resume not in ("auto", "never"):
        start.folder = _resume_from(Path(resume), run, say)
    if before is not None:
        if (run / RESULTS).exists() and (run / "final" / "manifest.json").exists():
            return Start(finished=True)
        clean(run)
        start.micro_batch = _micro_batch_of(run)
    if start.folder is None:
        start.folder = newest(run, say)
        if start.folder is None and checkpoints(run):
            raise UserError(f"no checkpoint of {run} is sound; begin again with another --out")
    if start.folder is not None:
        meta = json.loads((start.folder / META).read_text(encoding="utf-8"))
        _same_run(identity, meta["identity"], start.folder)
        start.micro_batch = meta["micro_batch"]
    try:
        files.write_json(run / RECORD, {"identity": identity} | facts)
    except OSError as error:
        raise UserError(f"cannot write to --out {run}: {error.strerror}") from None
    return start


def _identity_of(run: Path) -> dict[str, Any] | None:
    """What the run in a folder has in common with its continuation; None where there is no run."""
    try:
        return json.loads((run / RECORD).read_text(encoding="utf-8"))["identity"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{run / RECORD} is not of a run; choose another --out") from None
    except OSError:
        foreign = [name for name in WRITTEN if (run / name).exists()]
        if foreign:
            raise UserError(f"{run} holds a {foreign[0]} that is not of a run; choose another --out") from None
        return None


def _micro_batch_of(run: Path) -> int | None:
    """The micro-batch that a run without a checkpoint had already settled on."""
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8"))["micro_batch"]
    except (OSError, ValueError, KeyError):
        return None


def _resume_from(where: Path, run: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint that --resume FOLDER means: itself, or the newest of a run."""
    folder = newest(where, say) if (where / "checkpoints").is_dir() else where
    if folder is None or not folder.is_dir():
        raise UserError(f"--resume {where}: no sound checkpoint there")
    reason = fault(folder)
    if reason is not None:
        raise UserError(f"--resume {folder}: {reason}")
    if not (folder / META).exists():
        raise UserError(f"--resume {folder}: a model without training state; start from it with --init {folder}")
    if any(later.name > folder.name for later in checkpoints(run)):
        raise UserError(f"{run} holds later checkpoints than {folder.name}; choose another --out to branch off there")
    return folder


def _same_run(now: dict[str, Any], then: dict[str, Any], folder: Path) -> None:
    differ = [
        f"{name} (was {_short(then.get(name))}, is {_short(now.get(name))})"
        for name in now | then
        if now.get(name) != then.get(name)
    ]
    if differ:
        raise UserError(f"{folder} is of another run: {', '.join(differ)}; give the same options or another --out")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


# --- writing them, off the training thread


class Saver:
    """Writes checkpoints in a thread. The training thread waits only while the state is copied.

    The copy goes into buffers that live as long as the run, so a save allocates nothing after the first one.
    """

    def __init__(self, run: Path, export: Callable[[dict[str, Tensor], Path], None], done: Callable[..., None]):
        """`export(model_tensors, folder)` writes the model in its public layout; `done(**facts)` hears of the end."""
        self.run, self.export, self.done = run, export, done
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, tensors: dict[str, Tensor], meta: dict[str, Any], after: Callable[[], None]) -> None:
        """Copy `tensors` and write them, `meta` and the exported model as the checkpoint of meta["step"].

        `tensors` are named `model.*`, `optimizer.*`, `loss_scale.*`; `after()` runs in the thread once it stands.
        """
        began = time.perf_counter()
        self.join()
        self._copy(tensors)
        blocked = time.perf_counter() - began
        self.thread = threading.Thread(target=self._write, args=(dict(self.buffers), meta, blocked, after))
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
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)

    def _write(
        self, tensors: dict[str, Tensor], meta: dict[str, Any], blocked: float, after: Callable[[], None]
    ) -> None:
        began = time.perf_counter()
        folder = step_folder(self.run, meta["step"])
        try:
            size = write_folder(folder, lambda temporary: self._fill(temporary, tensors, meta))
            after()
        except Exception as error:  # a full disk, most likely: training goes on, older checkpoints stand
            self.error = error
            self.done(step=meta["step"], folder=str(folder), error=f"{type(error).__name__}: {error}")
            return
        self.error = None
        write = time.perf_counter() - began
        self.done(step=meta["step"], folder=str(folder), bytes=size, blocked_ms=1e3 * blocked, write_ms=1e3 * write)

    def _fill(self, folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        self.export(part(tensors, "model"), folder)
        save_file(tensors, folder / STATE)
        (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """{prefix.name: tensor}; the inverse is `part`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named `prefix.*`, without the prefix."""
    return {n.removeprefix(prefix + "."): t for n, t in tensors.items() if n.startswith(prefix + ".")}
