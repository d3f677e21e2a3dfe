"""Fixtures for every test: the `repo` folder, and `run` for whole programs. Also the rule that
skips `gpu` tests."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import setuptools  # noqa: F401  importing pip first, as benchmarks.wheels does, would break it
import torch

from launch import fork_python
from support import OFFLINE, ONE_THREAD, OWN_MODULES, REPO, python_path

os.environ.update(OFFLINE)
# Without a GPU, Triton's kernels run in its interpreter. The variable must be set before Triton is
# imported. Two test processes share two cores, where threads that wait for each other cost more
# than the work of these small models.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)

# A shell's background jobs ignore Ctrl-C. The programs that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", f"error:::{OWN_MODULES}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "GPU_TESTS_DEVICE" in os.environ:  # a rehearsal runs one case of each test
        cases = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(items=[item for item in items if item not in cases.values()])
        items[:] = reversed(cases.values())
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    rehearsed = "GPU_TESTS_DEVICE" in os.environ
    for item in gpu if not torch.cuda.is_available() else ():
        if not rehearsed or item.path.parent.name == "kernels":  # these tests cannot run on a CPU
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU (make gpu-check)"))


def pytest_collection_finish() -> None:
    forget_collected()


def forget_collected() -> None:
    """Exclude the loaded libraries and tests from every later garbage collection. Collections in
    training runs would walk a million objects each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="module")
def untouched() -> Iterator[None]:
    """For tests that run whole runs in their own process. The runs freeze their objects, and this
    frees them afterwards."""
    yield
    gc.unfreeze()
    forget_collected()


@pytest.fixture(autouse=True)
def restore_process() -> Iterator[None]:
    """Restore the threads, the precision of fp32 products and the signal handlers, which a command
    in the tests' own process changes."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    for number, handler in signals.items():
        if handler is not None:  # None: the handler was not set from Python
            signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(*words, cwd=, env=, timeout=, fresh=)` runs this Python with `words`, offline, in a
    folder of its own. Unless `fresh`, the process and its children are forked with torch already
    loaded."""

    def run(
        *words: str | Path,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        timeout: float = 240,
        fresh: bool = torch.cuda.is_available(),
    ) -> subprocess.CompletedProcess[str]:
        # Triton is not interpreted, as for a user, unless a test sets the variable.
        base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | ONE_THREAD
        base |= {"PYTHONPATH": python_path(REPO), **(env or {})}
        if not fresh:
            output = tmp_path_factory.mktemp("output")
            return fork_python([*map(str, words)], cwd, base, output, timeout)
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=base,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            # end torchrun's workers too, because they hold the pipes open
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            print(out, err, sep="\n")
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
