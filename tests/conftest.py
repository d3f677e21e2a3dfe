"""What every test may use: the `repo` folder, `run` for whole scripts, and the rule that skips
`gpu` tests."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch import fork_python
from support import OFFLINE, ONE_THREAD, OWN_MODULES, REPO, python_path

os.environ.update(OFFLINE)
# Where there is no GPU, Triton's kernels run in its interpreter, which has to be said before Triton
# is imported; and two processes of tests share two cores, where threads that wait for each other
# cost more than these models' work.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.update(ONE_THREAD)
    torch.set_num_threads(1)

# A shell's background jobs begin with Ctrl-C ignored, and so would the programs that tests
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", f"error:::{OWN_MODULES}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "GPU_TESTS_DEVICE" in os.environ:  # a rehearsal: one case of each test shows that it works
        cases = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(items=[item for item in items if item not in cases.values()])
        items[:] = reversed(cases.values())
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    rehearsed = "GPU_TESTS_DEVICE" in os.environ
    for item in gpu if not torch.cuda.is_available() else ():
        if not rehearsed or item.path.parent.name == "kernels":  # those have no form for a CPU
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU (make gpu-check)"))


def pytest_collection_finish() -> None:
    forget_collected()


def forget_collected() -> None:
    """Take the libraries and tests that are loaded out of every garbage collection from here on:
    those of training runs would walk a million objects each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    return REPO


@pytest.fixture(scope="module")
def untouched() -> Iterator[None]:
    """Whole runs in a test's own process freeze what it has built."""
    yield
    gc.unfreeze()
    forget_collected()


@pytest.fixture(autouse=True)
def the_process_is_as_it_was() -> Iterator[None]:
    """A command in a test's own process sets its threads and who multiplies fp32 matrices, and
    takes its signals."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    for number, handler in signals.items():
        if handler is not None:  # of Python's own kind
            signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run(*words, cwd=, env=, timeout=, fresh=)`: this Python on `words`, offline, in a folder of
    its own. Unless it has to be `fresh`, it is forked with torch loaded, and so is what it
    starts."""

    def run(
        *words: str | Path,
        cwd: Path = tmp_path,
        env: dict[str, str] | None = None,
        timeout: float = 240,
        fresh: bool = torch.cuda.is_available(),
    ) -> subprocess.CompletedProcess[str]:
        # As for a user Triton is not interpreted, unless a test says so.
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
            # torchrun's workers too: they hold the pipes open
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            print(out, err, sep="\n")
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
