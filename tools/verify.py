"""Replays some steps of a run from one of its checkpoints and says whether they give the same bits
again, or where they first differ.

python -m tools.verify runs/demo
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from base import machine
from base.cli import entry_point, parse
from base.console import counted
from base.files import read_json
from config import Count, CountOrNone, PathOrName, Positional, UserError

FIGURES = ("batch", "lr", "loss", "grad_norm", "parameters")  # in the order of a step's work
DEFAULT_STEPS = 10  # replayed if the log has no digest of the parameters after the checkpoint
# Relative difference of loss and gradient norm that rounding may cause within some steps.
TOLERANCES = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 5e-2, "fp8": 1e-1}
# Facts in run.json whose change may change the order of sums, and so the last bits.
ROUNDING = ("hardware", "device", "threads", "world_size", "cuda", "driver", "torch")
GRACE = 10.0  # seconds that processes get to end by themselves when one has failed


@dataclass(frozen=True)
class VerifyConfig:
    """Replay steps of a run from a checkpoint, and compare data, loss, gradient norm and parameters
    with its log. Exit code 0: the same; 1: different."""

    run: Annotated[PathOrName, Positional("RUN")] = ""
    """Folder of the run. Nothing is written into it."""
    from_step: CountOrNone | None = None
    """Step of the checkpoint to start from; 0: the start of the run. Default: the newest checkpoint
    with logged steps after it."""
    steps: Count | None = None
    """Steps to replay. Default: up to the next digest of the parameters in the log."""
    device: Literal["auto", "cpu", "cuda", "mps"] | None = None
    """Where to replay. Default: the run's device."""


class ReplayEnded(Exception):
    """All steps are replayed."""


def main() -> int:
    """Run the command. Returns the exit code."""
    words = [re.sub(r"^--from(?=$|=)", "--from-step", word) for word in sys.argv[1:]]
    cfg = parse(VerifyConfig, words)
    run = Path(cfg.run)
    if not cfg.run or not (run / "run.json").is_file():
        raise UserError(f"{cfg.run or 'RUN'} holds no run; type python -m tools.verify RUN")
    record = read_record(run)
    if (ranks := ranks_to_start(record, cfg.device)) > 1:
        return start_ranks(ranks, record.get("threads"))
    return verify(run, record, cfg)


def is_main() -> bool:
    """Whether this is rank 0, which prints and compares."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line, on rank 0."""
    if is_main():
        print(text, flush=True)


def ranks_to_start(record: dict[str, Any], device: str | None) -> int:
    """The processes to replay on: as many as the run had, if this machine has a core or a GPU for
    each. 1 for a rank that torchrun has started, and where bits cannot be compared anyway."""
    size, then = record.get("world_size", 1), record.get("device")
    if size == 1 or "RANK" in os.environ or device not in (None, then):
        return 1
    import torch

    here, unit = (torch.cuda.device_count(), "GPU") if then == "cuda" else (machine.cores(), "core")
    if size <= here:
        return size
    print(f"the run had {size} processes, this machine has {counted(here, unit)}: replaying on one")
    return 1


def start_ranks(size: int, threads: int | None) -> int:
    """Run this command again on `size` processes, with the run's `threads` unless OMP_NUM_THREADS
    says otherwise. Returns the exit code of the first that fails, or 0."""
    import torch.distributed as dist

    # The ranks meet in a store of this process, so that no other program can take their port.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    address |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    env = os.environ | address | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    if threads:
        env.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, "-m", "tools.verify", *sys.argv[1:]]
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        return wait_for(started)
    finally:
        for process in started:
            process.terminate()  # and not kill, so that it removes its scratch folder
        wait_for(started, GRACE)
        for process in started:
            process.kill()
            process.wait()


def wait_for(started: Sequence[subprocess.Popen[bytes]], seconds: float = float("inf")) -> int:
    """Wait until all processes have ended, `seconds` are over, or one has failed and the others had
    time to end. Returns the exit code of the first that failed, or 0."""
    failed, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in started]
        if not failed and (failed := next(filter(None, codes), 0)):
            deadline = time.monotonic() + GRACE
        if None not in codes:
            break
        time.sleep(0.05)
    return failed if failed >= 0 else 128 - failed


def verify(run: Path, record: dict[str, Any], cfg: VerifyConfig) -> int:
    """Replay and compare. Returns the exit code."""
    logged = logged_steps(run)
    start = choose_start(run, logged, cfg.from_step)
    if is_main():
        check_files(run, start)
    first = start + 1
    last = start + (cfg.steps or default_steps(logged, start))
    steps = [step for step in range(first, last + 1) if step in logged]
    if len(steps) < last - start:
        say(f"the log of {run} has {len(steps)} of the {last - start} steps after {start}")
    say(f"replaying steps {first} to {steps[-1]} of {run}")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        replay = Replay(run, record, Path(folder), cfg.device)
        differing = replay.differing_facts()
        for line in differing.values():
            say(f"differs: {line}")
        found = replay.first_difference_of_weights(start, logged)
        if not found:
            replay.run(start, steps[-1])
        if not is_main():
            return 0
        if not found:
            tolerance = replay.tolerance(differing)
            if "world_size" in differing:  # the checksum depends on how ranks divide a batch
                for step in steps:
                    logged[step].pop("batch", None)
            found = compare(logged, logged_steps(replay.out), steps, tolerance)
    if found:
        print(f"different: {found}")
    elif tolerance:
        print(
            f"the same within {tolerance:g} for {len(steps)} steps ({first} to {steps[-1]}); not "
            "compared bit for bit, because of what differs above"
        )
    else:
        print(
            f"bit for bit the same for {len(steps)} steps ({first} to {steps[-1]}): "
            f"{what_was_compared(logged, steps)}"
        )
    return 1 if found else 0


def read_record(run: Path) -> dict[str, Any]:
    """A run's run.json. Raises UserError if it is damaged."""
    record = read_json(run / "run.json")
    if not isinstance(record, dict):
        raise UserError(f"{run}/run.json cannot be read; name another run")
    return record


def logged_steps(run: Path) -> dict[int, dict[str, Any]]:
    """The records of the steps in a run's log, by step."""
    from engine.log import records

    return {
        record["step"]: record
        for record in records(run)
        if record["kind"] == "train" and record.get("step")
    }


def choose_start(run: Path, logged: dict[int, Any], asked: int | None) -> int:
    """The step to replay from. Raises UserError if there is no checkpoint with logged steps."""
    from storage.checkpoint import checkpoints

    held = [int(folder.name.removeprefix("step-")) for folder in checkpoints(run)]
    usable = [step for step in held if step + 1 in logged]
    if asked is None and not usable:
        raise UserError(
            f"{run} has no checkpoint with logged steps after it; keep more with --keep, or replay "
            "from the start with --from 0"
        )
    if asked is not None and asked not in (*usable, 0):
        listed = ", ".join(map(str, sorted(usable))) or "none"
        raise UserError(
            f"--from {asked}: {run} has no such checkpoint with logged steps after it (it has "
            f"{listed}; 0 is the start of the run)"
        )
    if asked == 0 and 1 not in logged:
        raise UserError(f"--from 0: the log of {run} does not have step 1")
    return usable[0] if asked is None else asked


def check_files(run: Path, start: int) -> None:
    """Raise UserError if the checkpoint's files do not match its manifest."""
    from storage.checkpoint import find_damage, step_folder

    folder = step_folder(run, start)
    if start and (reason := find_damage(folder)):
        raise UserError(f"the checkpoint {folder} is damaged: {reason}; give another --from")


def default_steps(logged: dict[int, dict[str, Any]], start: int) -> int:
    """Steps up to the next logged digest of the parameters."""
    later = [step for step, record in logged.items() if step > start and "parameters" in record]
    return min(later, default=min(max(logged), start + DEFAULT_STEPS)) - start


class Replay:
    """A replay of a run in a scratch folder, by the loop that made the run."""

    def __init__(self, run: Path, record: dict[str, Any], scratch: Path, device: str | None):
        self.run_folder, self.record, self.scratch = run, record, scratch
        self.out = scratch / "run"
        self.task = task_of(record)
        self.cfg = self._options(device)
        self.identity = self._identity_now()

    def _options(self, device: str | None) -> Any:
        from config import resolve

        asked = self.record.get("asked", {})
        cfg: Any = parse(self.task.config, ["--config", str(self.run_folder / "config.json")])
        here = {name: value for name, value in asked.items() if value is not None}
        if device and device != self.record.get("device"):
            # These were resolved for the run's device.
            cfg = dataclasses.replace(cfg, **(here | {"device": device, "compile": None}))
        cfg = dataclasses.replace(
            cfg, out=str(self.out), eval_every=0, save_every=0, sample_every=0, patience=0,
            digest_every=1, wandb=False, tensorboard=False, profile=False, extend_to=None, reschedule=False,
            resume="never",
        )  # fmt: skip
        if self.task.name == "pretrain":  # files of a benchmark need not be here
            cfg = dataclasses.replace(cfg, eval_hellaswag=None, eval_lambada=None)
        from engine.processes import choose_device, start

        self.world = start(cfg.device)
        if self.world.local_size < self.world.size:
            raise UserError(
                "tools.verify replays on one machine, whose processes share a folder; type "
                f"torchrun --standalone --nproc_per_node={self.world.size} -m tools.verify "
                f"{self.run_folder}"
            )
        return resolve(cfg, choose_device(cfg.device).type)

    def _identity_now(self) -> dict[str, Any]:
        """The identity that a run with these options and this data would have today."""
        from config import Resolved, resolve_steps, resolved
        from engine.opening import identity
        from engine.processes import main_first

        task = task_of(self.record, self.cfg)
        with main_first(self.world):
            facts = task.setup(self.cfg, lambda text: None)
        cfg = resolve_steps(self.cfg, *facts.length) if facts.length else self.cfg
        return json.loads(json.dumps(identity(task, facts, resolved(cfg, Resolved))))

    def differing_facts(self) -> dict[str, str]:
        """A line for each fact of the run that is not so here: data, options, versions,
        hardware."""
        from engine.opening import environment

        now = environment(self.world.device) | {
            "world_size": self.world.size,
            "device": self.world.device.type,
        }
        now, then = now | self.identity, self.record | self.record["identity"]
        return {
            name: f"{name} was {_short(then[name])}, is {_short(value)}"
            for name, value in now.items()
            if name in then and then[name] != value
        }

    def tolerance(self, differing: dict[str, str]) -> float:
        """The relative difference that is no finding; 0: every bit must be the same."""
        repeats = self.world.device.type == "cpu" or self.cfg.deterministic
        if not repeats:
            print("differs: a run on a GPU repeats its bits only under --deterministic")
        if repeats and not any(name in differing for name in ROUNDING):
            return 0.0
        return TOLERANCES.get(self.cfg.precision, TOLERANCES["bf16"])

    def first_difference_of_weights(self, start: int, logged: dict[int, Any]) -> str:
        """What is wrong with the checkpoint to start from, or nothing."""
        from engine.digest import start_digest
        from storage.checkpoint import read_state, step_folder, without_prefix

        if start == 0:
            return ""
        folder = step_folder(self.run_folder, start)
        tensors, self.meta = read_state(folder)
        wanted = logged.get(start, {}).get("parameters")
        found = start_digest(without_prefix(tensors, "model"))()
        if wanted in (None, found):
            return ""
        return (
            f"the parameters in {folder} have the digest {found}, and the log has {wanted} at step "
            f"{start}: the checkpoint was changed, or a disk or memory is bad"
        )

    def run(self, start: int, last: int) -> None:
        """Run the loop from step `start` to step `last`, or further where it must."""
        from engine.processes import finish
        from engine.trainer import train

        cfg = self.cfg
        if start:
            cfg = dataclasses.replace(cfg, resume=str(self._source(start)))
        task, rows = task_of(self.record, cfg), None
        rows = task.rows
        # On a GPU a step is logged only once the next one runs.
        end = last + (self.world.device.type == "cuda")

        def rows_until_end(split: str, step: int) -> Any:
            if split == "train" and step >= end:
                raise ReplayEnded
            return rows(split, step)

        task.rows = rows_until_end
        try:
            if stopped := train(task, cfg):
                raise SystemExit(stopped)
        except ReplayEnded:
            finish(self.world)

    def _source(self, start: int) -> Path:
        """A checkpoint of links to the run's own files. It has the identity of today, so that the
        loop starts from it even if the data or an option has changed."""
        from base.files import sha256
        from storage.checkpoint import MANIFEST, META, step_folder

        folder = step_folder(self.run_folder, start)
        source = step_folder(self.scratch / "source", start)
        source.mkdir(parents=True)
        for path in folder.iterdir():
            if path.name not in (META, MANIFEST):
                (source / path.name).symlink_to(path.resolve())
        lengths = self.record.get("lengths") or self.meta.get("lengths")
        meta = self.meta | {"identity": self.identity} | ({"lengths": lengths} if lengths else {})
        (source / META).write_text(json.dumps(meta), encoding="utf-8")
        entry = {"bytes": (source / META).stat().st_size, "sha256": sha256(source / META)}
        (source / MANIFEST).write_text(json.dumps({"files": {META: entry}}), encoding="utf-8")
        return source


def task_of(record: dict[str, Any], cfg: Any = None) -> Any:
    """The Task of a run. `cfg`: its options; needed for the tasks that --also names."""
    name = record.get("identity", {}).get("task", "pretrain")
    if name == "pretrain":
        from engine.pretraining import LanguageModelling

        return LanguageModelling()
    from finetune import find_classification_task
    from tasks.classification.command import auxiliary_tasks
    from tasks.classification.description import ClassificationDescription
    from tasks.classification.task import Classification
    from tasks.generation.task import Generation
    from tasks.preferences.description import PreferenceDescription
    from tasks.preferences.task import Preferences

    try:
        description = importlib.import_module(f"finetune.{name}").TASK
    except ImportError:
        raise UserError(
            f"the run's task {name} is not in finetune/; verify it where it is"
        ) from None
    if isinstance(description, PreferenceDescription):
        return Preferences(description)
    if not isinstance(description, ClassificationDescription):
        return Generation(description)
    also = auxiliary_tasks(cfg, find_classification_task) if cfg else []
    return Classification(description, also)


def compare(
    logged: dict[int, dict[str, Any]],
    replayed: dict[int, dict[str, Any]],
    steps: Sequence[int],
    tolerance: float,
) -> str:
    """The first difference between the log and the replay, or nothing."""
    differences = (
        line for step in steps for line in differences_of(logged[step], replayed[step], tolerance)
    )
    return next(differences, "")


def differences_of(was: dict[str, Any], now: dict[str, Any], tolerance: float) -> Iterator[str]:
    """The figures of a step that differ, and by how much."""
    for name in FIGURES:
        if name not in was or was[name] == now[name] or (tolerance and name == "parameters"):
            continue
        old, new = was[name], now[name]
        where = f"step {was['step']}: {name} was {old}, is {new}"
        if isinstance(old, str) or old is None or new is None:
            yield f"{where}"
        elif abs(new - old) > tolerance * abs(old):
            yield f"{where} (by {abs(new - old):.3g}, {abs(new - old) / (abs(old) or 1):.2g} of it)"


def what_was_compared(logged: dict[int, dict[str, Any]], steps: Sequence[int]) -> str:
    """How many steps had each figure in the log."""
    counts = {name: sum(name in logged[step] for step in steps) for name in FIGURES}
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


if __name__ == "__main__":
    entry_point(main)
