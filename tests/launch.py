"""Run programs as forks of a server that has torch loaded, so that they start at once.

Training runs for the tests of faults start this way, and so does any program that would start as
`python`. A run may get a `patch`, a function that is called before the run begins. With it a test
kills, stops, slows or breaks a run at an exact point, and the engine needs no hooks for tests.

`python launch.py MODULE:FUNCTION ...` does the same for a rank under torchrun.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from support import REPO, python_path

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Patch = Callable[[], None]
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "one",
    "two",
    "three",
    "of",
    "the",
    "model",
    "reads",
    "text",
    "learns",
]
# A step has 8 rows of 16 tokens, two at a time: accumulation 4 on one process, 2 on two.
OPTIONS = {
    "preset": "micro",
    "n-layer": 1,
    "data": "text.txt",
    "val-data": "val.txt",
    "tokenizer": "tokenizer",
    "cache": "cache",
    "seq-len": 16,
    "batch-tokens": 128,
    "micro-batch": 2,
    "precision": "fp32",
    "device": "cpu",
    "dropout": 0.1,
    "steps": 12,
    "lr": 1e-3,
    "eval-every": 3,
    "save-every": 3,
    "sample-every": 6,
    "keep": 2,
    "out": "run",
}


def typed(*words: Any) -> list[str]:
    """The words of a command line. A string that begins with an option is split as a shell does."""
    texts = list(map(str, words))
    split = (shlex.split(text) if text.startswith("--") else [text] for text in texts)
    return list(itertools.chain.from_iterable(split))


def small(*words: Any) -> list[str]:
    """The options of a tiny run, then `words`: see `typed`. The last value of a repeated option
    counts."""
    more = typed(*words)
    chosen = {
        name: value
        for name, value in OPTIONS.items()
        if name not in ("preset", "n-layer") or "--init" not in more
    }
    return [str(word) for name, value in chosen.items() for word in (f"--{name}", value)] + more


def write_inputs(folder: Path) -> None:
    """Write text.txt, val.txt and tokenizer/, which the options of `small` read."""
    from text.tokenizer_training import train_bpe

    draw = random.Random(1)
    text, val = ("\n".join(" ".join(draw.choices(WORDS, k=30)) for _ in range(n)) for n in (60, 8))
    (folder / "text.txt").write_text(text)
    (folder / "val.txt").write_text(val)
    train_bpe([text], 300, folder / "tokenizer")


@dataclass
class Ended:
    """How a process ended: its exit code (minus the number of the signal that killed it) and its
    output."""

    code: int | None
    out: str
    err: str


class Launch:
    """One running process of a run."""

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        env: dict[str, str],
        patch: Patch | None,
        name: str,
        program: str = "train_gpt2",
    ):
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        target = functools.partial(
            _child, folder, list(words), env, patch, self.out, self.err, program
        )
        self.process: ForkServerProcess = _server().Process(target=target)
        self.process.start()
        assert self.process.pid
        self.pid = self.process.pid

    def end(self, timeout: float = 120) -> Ended:
        self.process.join(timeout)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
            raise TimeoutError(
                f"no end within {timeout} s:\n{self.out.read_text()}\n{self.err.read_text()}"
            )
        return Ended(self.process.exitcode, self.out.read_text(), self.err.read_text())


def start(
    folder: Path,
    words: Sequence[str],
    patch: Patch | None = None,
    ranks: int = 1,
    program: str = "train_gpt2",
) -> list[Launch]:
    """Start a module with `words` in `folder`, on `ranks` processes with the same `patch`."""
    if ranks == 1:
        return [Launch(folder, words, {}, patch, "rank0", program)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    env = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [
        Launch(folder, words, env[rank], patch, f"rank{rank}", program) for rank in range(ranks)
    ]


def launch(
    folder: Path,
    words: Sequence[str],
    patch: Patch | None = None,
    ranks: int = 1,
    program: str = "train_gpt2",
) -> list[Ended]:
    """`start`, then wait. Returns how each rank ended."""
    return [process.end() for process in start(folder, words, patch, ranks, program)]


def fork_python(
    words: Sequence[str], cwd: Path, env: dict[str, str], output: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run `python *words` as a fork of the server. Its output goes to files in the folder `output`.
    Python processes that it starts are forked too."""
    out, err = output / "out", output / "err"
    process = _server().Process(target=_python, args=(list(words), cwd, env, out, err))
    process.start()
    try:
        process.join(timeout)
        if process.exitcode is None:
            raise subprocess.TimeoutExpired(list(words), timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        print(out.read_text(), err.read_text(), sep="\n")
        raise
    said = (file.read_bytes().decode() for file in (out, err))
    return subprocess.CompletedProcess(list(words), process.exitcode, *said)


def _python(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    opened = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in (out, err)]
    for number, file in enumerate([nowhere, *opened]):
        os.dup2(file, number)
    fork_children()
    _be_python(words, env)


def _be_python(words: Sequence[str], env: dict[str, str]) -> None:
    """Run in this process what `python *words` would run, with its environment."""
    os.environ.clear()
    os.environ.update(env)
    if words[0] == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(words[1], vars(sys.modules["__main__"]))
    else:
        sys.path[0] = str(Path(words[0]).parent)
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def fork_children() -> None:
    """From now on, Python processes that this process starts are forks of it."""
    forking = multiprocessing.get_context("fork")
    mock.patch.object(multiprocessing, "get_context", lambda method=None: forking).start()
    # torchrun imports Popen under a name of its own
    mock.patch.object(subprocess_handler, "Popen", ForkedPopen).start()
    mock.patch.object(subprocess, "Popen", ForkedPopen).start()


class ForkedPopen(subprocess.Popen):
    """A Popen that forks this process for Python commands and starts all other commands as
    usual."""

    def __init__(self, args: Any, *more: Any, env: Any = None, **how: Any):
        words = [""] if isinstance(args, str) else [os.fsdecode(word) for word in args]
        if words[1:2] == ["-u"]:
            words.pop(1)
        if words[0] == sys.executable and (words[1] in ("-m", "-c") or words[1][0] != "-"):
            variables = dict(os.environ if env is None else env)
            open_before = set(os.listdir("/dev/fd"))
            how["preexec_fn"] = functools.partial(_fork, words[1:], variables, open_before)
        super().__init__(args, *more, env=env, **how)


def _fork(words: list[str], env: dict[str, str], open_before: set[str]) -> None:
    """Called in the child instead of starting another program."""
    for file in set(os.listdir("/dev/fd")) - open_before:
        with contextlib.suppress(OSError):
            os.close(int(file))  # the parent waits until its pipe is closed here too
    code: Any = 1
    try:
        _be_python(words, env)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    path = {"PYTHONPATH": python_path(REPO, REPO / "tests")}
    # One thread: a forked process must not inherit a pool whose threads were left behind.
    with mock.patch.dict(os.environ, path, TRITON_INTERPRET="0", **dict.fromkeys(THREADS, "1")):
        forkserver.ensure_running()
    return context


def _child(
    folder: Path,
    words: list[str],
    env: dict[str, str],
    patch: Patch | None,
    out: Path,
    err: Path,
    program: str,
) -> None:
    os.setsid()
    os.environ.update(env, OMP_NUM_THREADS="1")
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [f"{program}.py", *words]
    _run(patch, program)


def _run(patch: Patch | None, program: str = "train_gpt2") -> None:
    if patch:
        patch()
    runpy.run_module(program, run_name="__main__", alter_sys=True)


# --- patches: what happens to a run, and at which point


def at_call(owner: Any, name: str, nth: int, act: Callable[[], Any], before: bool = True) -> None:
    """Make the nth call of owner.name also do `act()`, before or after its own work."""
    original, count = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        now = next(count) == nth
        if now and before:
            act()
        result = original(*args, **kwargs)
        if now and not before:
            act()
        return result

    setattr(owner, name, patched)


def point(where: str) -> tuple[Any, str]:
    """The (owner, function) that runs at a named point of a training run."""
    import safetensors.torch

    from base import files
    from engine.log import RunLog
    from engine.pretraining import LanguageModelling
    from engine.step import TrainStep
    from storage import checkpoint
    from tasks.preferences import reference

    return {
        "micro-batch": (TrainStep, "_backward"),
        "evaluation": (LanguageModelling, "evaluate"),
        "sample": (LanguageModelling, "samples"),
        "start": (LanguageModelling, "build_model"),
        "save": (checkpoint.Saver, "_fill"),
        "file of a save": (safetensors.torch, "save_file"),
        "flush": (checkpoint, "flush"),
        "removal": (checkpoint, "_remove"),
        "retention": (checkpoint, "prune"),
        "log": (RunLog, "record"),
        "batch of the reference": (reference, "to_device"),
        "whole file": (files, "write_json"),
    }[where]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def die(where: str, nth: int, before: bool = True, on: int = 0) -> None:
    if rank() == on:
        at_call(*point(where), nth, lambda: os.kill(os.getpid(), signal.SIGKILL), before)


def receive(where: str, nth: int, numbers: tuple[signal.Signals, ...], on: int = 0) -> None:
    """Make one rank send itself signals from the nth call on. The running function then takes a
    moment longer."""

    def act() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
        time.sleep(0.3)

    if rank() == on:
        at_call(*point(where), nth, act)


def slow_steps() -> None:
    for nth in range(1, 50):
        at_call(*point("micro-batch"), nth, lambda: time.sleep(0.1))


# --- the files of a run


def log_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def trace(run: Path) -> dict[str, Any]:
    """Everything that must be equal, bit for bit, in two runs with the same options."""
    train = [
        [x[k] for k in ("step", "loss", "grad_norm", "lr", "tokens")] for x in log_of(run, "train")
    ]
    evals = [
        {k: v for k, v in x.items() if k not in ("time", "seconds")} for x in log_of(run, "eval")
    ]
    samples = [[x["step"], x["text"]] for x in log_of(run, "sample")]
    last = max((run / "checkpoints").glob("step-*"))
    files = [run / "final" / "model.safetensors", last / "training_state.safetensors"]
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "train": train,
        "eval": evals,
        "sample": samples,
        "train_loss": metrics["train_loss"],
        "last": last.name,
        "final_is_step": metrics["final_is_step"],
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
    }


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(
        int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")
    )


if __name__ == "__main__":
    module, _, function = sys.argv.pop(1).partition(":")
    try:
        _run(getattr(importlib.import_module(module), function))
    except SystemExit as end:
        with contextlib.suppress(KeyError):
            Path(f"code-of-rank{os.environ['RANK']}").write_text(str(end.code))
        raise
