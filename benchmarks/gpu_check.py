"""Run everything that needs a CUDA GPU, the most valuable parts first:

make gpu-check  [WHEELS=FOLDER] [ARGS="--only correctness"]

Each part is a command with a time limit, so a part that hangs or fails does not stop the others. A
call lasts --minutes. The next call continues where it stopped, even on another machine of the same
kind if --out is copied there. Tests run several at a time, measurements run alone. `--rehearse`
runs every part tiny on a CPU, which shows that the commands work but measures nothing. The
trade-off: every part starts a new Python, which takes some ten seconds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.commands import GRACE, REPO, Failed, TimeUp, execute, side_by_side
from base.files import read_json, write_json
from benchmarks.harness import Results
from benchmarks.runs import make_folders
from benchmarks.table import markdown
from config import PathOrName, Positive
from kernels import TRITON

SHORTEST = 60.0  # with fewer seconds left, a part that later calls can continue does not start
PATIENCE = 2.5  # a part that takes this many times its expected seconds hangs, and is ended
CALLS = 3  # the forecast shows this many calls
TAIL = 4000  # characters of a part's output to keep in the JSON file
CORES_EACH = 3  # for a test beside others, which mostly waits for compilers
AT_ONCE = 5  # largest number of tests at a time, because they share the GPU's memory
REHEARSAL = (
    "a rehearsal on a CPU with tiny sizes: it shows that the commands work, and measures nothing"
)


NEEDED = ("numpy", "psutil", "safetensors")
OF_PROGRAMS = ("tokenizers", "tiktoken", "rich")
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Options:
    """Options of the check."""

    only: str | None = None
    """Parts or groups of parts to run, comma-separated. Default: all."""
    minutes: Positive = 9.0
    """Length of this call. The next call continues."""
    again: bool = False
    """Run parts again that are done, from their beginning."""
    rehearse: bool = False
    """Run every part's command tiny on the CPU, to check that it works. Measures nothing."""
    out: PathOrName = "benchmarks/results/gpu"
    """Folder for gpu-check.json, gpu-check.md and gpu-check.log."""
    cache: PathOrName | None = None
    """Folder for compiled code and the parts' output, several gigabytes. Default: cache in
    --out."""


@dataclass(frozen=True)
class Part:
    """A command: the words after `python`. Its result is the JSON files that it writes.

    In the words, {out} stands for a folder of the part's own, {minutes} for the time it has, and
    {engine} for a hash of the engine's source.
    """

    group: str
    name: str
    words: tuple[str, ...]
    packages: tuple[str, ...] = NEEDED  # needed besides torch and triton
    seconds: float = 60.0  # expected with an H100 and 16 cores
    # may run beside other parts, because it measures nothing and needs little GPU memory
    beside: bool = False
    # None: the part cannot be continued. Else text in its output that says that it stopped early;
    # "" if it never stops itself.
    unfinished: str | None = None
    rehearsal: tuple[str, ...] = ()  # words that make it run tiny, on a CPU

    @property
    def least(self) -> float:
        """With fewer seconds than this left, the part does not start."""
        return min(self.seconds, self.seconds if self.unfinished is None else SHORTEST)


# --- the parts


def peers(shape: str, *against: str) -> tuple[str, ...]:
    """The words of benchmarks.peers at one shape. It resumes an interrupted comparison."""
    words = ("-m", "benchmarks.peers", "--device", "cuda", "--shape", shape, "--seconds", "8")
    return (*words, "--against", ",".join(against), "--resume", "--out", "{out}")


COMPILED = ("plain compiled", "transformers compiled", "litgpt compiled", "liger compiled")
COMPILED += ("this engine fp8",)
EAGER = ("plain", "transformers", "liger")
QUICK = ("--device", "cpu", "--quick")
TINY_PEERS = (*QUICK, "--shape", "micro", "--against")
KERNELS = ("-m", "benchmarks.kernels", "--device", "cuda", "--out", "{out}", "--only")
FIRST = ("product_qkv", "product_projection", "product_up", "product_down")
FIRST += ("attention", "cross_entropy", "bias_gelu")
REST = ("linear_cross_entropy", "attention_documents", "fp8_linear")
REST += tuple(name for name in TRITON if name not in FIRST)
CANDIDATES = ("mlp", "mlp_fp8")  # what the engine may take once a GPU has measured it
LADDER = ("-m", "benchmarks.stages", "--device", "cuda", "--preset", "gpt2", "--rounds", "1")
LADDER += ("--minutes", "{minutes}", "--out", "{out}/{engine}")
TINY_LADDER = (*QUICK, "--preset", "micro", "--only", "baseline,compile", "--steps", "4")
DECODING = ("-m", "benchmarks.decoding", "--device", "cuda", "--out", "{out}")
COMPILED_STEPS = ("--compile", "--decode", "greedy,sample", "--shape", "124M")
# First figures that replace assumptions, then comparisons. A rehearsal compiles one peer, which
# takes a minute on a CPU.
MEASUREMENTS = (
    Part("kernels", "kernels-first", (*KERNELS, *FIRST), seconds=110, rehearsal=QUICK),
    Part("kernels", "kernels-rest", (*KERNELS, *REST), seconds=100, rehearsal=QUICK),
    Part("kernels", "candidates", (*KERNELS, *CANDIDATES), seconds=120, rehearsal=QUICK),
    Part(
        "peers", "peers-124M", peers("124M", *COMPILED), seconds=430, unfinished="",
        rehearsal=(*TINY_PEERS, "litgpt compiled"),
    ),
    Part(
        "ladder", "ladder", LADDER, (*NEEDED, *OF_PROGRAMS), seconds=520,
        unfinished="the time was up", rehearsal=TINY_LADDER,
    ),
    Part(
        "sizes", "peers-124M-eager", peers("124M", *EAGER), seconds=200, unfinished="",
        rehearsal=(*TINY_PEERS, ",".join(EAGER)),
    ),
    *(
        Part(
            "sizes", f"peers-{shape}", peers(shape, *COMPILED), seconds=seconds, unfinished="",
            rehearsal=(*TINY_PEERS, "plain"),
        )
        for shape, seconds in (("350M", 480), ("774M", 600), ("1.5B", 700))
    ),
    Part(
        "decoding", "decoding-compiled", (*DECODING, *COMPILED_STEPS), (*NEEDED, "transformers"),
        seconds=200, rehearsal=(*QUICK, "--batch", "1", "--decode", "greedy"),
    ),
    Part(
        "decoding", "decoding", DECODING, (*NEEDED, "transformers"), seconds=240, rehearsal=QUICK
    ),
)  # fmt: skip
# Seconds of tests that run whole programs several times, or compile little. The others take 70.
EXPECTED = {
    "test_dropout": 40,
    "test_ops": 40,
    "test_split_heads": 50,
    "test_losses_of_classifiers_match_the_cpu": 350,
    "test_losses_of_every_fine_tuning_method_match_the_cpu": 310,
    "test_options_run_under_torchrun": 190,
}


def all_parts() -> list[Part]:
    """The correctness parts, then the measurements. Their seconds are estimates where nothing was
    measured yet."""
    return [*correctness(), *MEASUREMENTS]


def correctness() -> list[Part]:
    """The tests that need a GPU, and the kernels' own tests, which a GPU compiles instead of
    interpreting.

    Tests of tests/test_gpu.py that run whole programs are one part each. Tests that fill the GPU's
    memory have "memory" in their name and run alone, last. The longest come first, so that no test
    still runs long after the others have ended.
    """
    text = (REPO / "tests" / "test_gpu.py").read_text(encoding="utf-8")
    programs = re.findall(r"^def (test_\w+)\([^)]*\brun\b", text, re.MULTILINE)
    rest = ("-m", "gpu", "tests/test_gpu.py", "-k", f"not ({' or '.join(programs)})")
    tests: list[tuple[str, tuple[str, ...], tuple[str, ...], float]] = [
        ("steps", rest, (), 300),
        ("test_contract", ("tests/kernels/test_contract.py",), (), 100),
        *(
            (name, (f"tests/kernels/{name}.py",), (), EXPECTED.get(name, 70))
            for name in sorted(f"test_{file.stem}" for file in (REPO / "kernels").glob("[!_]*.py"))
        ),
        *(
            (name, (f"tests/test_gpu.py::{name}",), OF_PROGRAMS, EXPECTED.get(name, 70))
            for name in programs
        ),
    ]
    parts = [
        Part(
            "correctness", name, (*PYTEST, *words), (*NEEDED, "pytest", *packages), seconds,
            beside="memory" not in name,
        )
        for name, words, packages, seconds in tests
    ]  # fmt: skip
    return sorted(parts, key=lambda part: (not part.beside, -part.seconds))


# --- the schedule


def begun_in(parts: Sequence[Part], seconds: float, at_once: int) -> Iterator[tuple[Part, float]]:
    """The parts that a call of `seconds` starts, each with the seconds that are left for it.

    Parts start in order. A part that does not fit into the remaining time lets the next one try.
    Parts that can start at once always do.
    """
    free = [0.0] * at_once  # the time at which each slot becomes free
    for part in parts:
        start = min(free) if part.beside else max(free)
        if start and seconds - start < part.least:
            continue
        took = min(part.seconds, seconds - start)
        yield part, took
        if part.beside:
            free[free.index(start)] = start + took
        else:
            free = [start + took] * at_once


def forecast(parts: Sequence[Part], seconds: float, at_once: int, calls: int = CALLS) -> list[str]:
    """One line for each of the next `calls` calls with the parts that it runs, and one line for the
    parts after them."""
    import dataclasses

    todo, lines = list(parts), []
    for call in range(1, calls + 1):
        took = dict(begun_in(todo, seconds, at_once))
        if took:
            lines.append(
                f"call {call}: "
                + ", ".join(f"{part.name} {length:.0f} s" for part, length in took.items())
            )
        rest = [
            dataclasses.replace(part, seconds=part.seconds - took.get(part, 0.0)) for part in todo
        ]
        todo = [part for part in rest if part.seconds > 1]
    if todo:
        lines.append("later: " + ", ".join(part.name for part in todo))
    return lines


# --- running


class Check:
    """Runs parts, and writes gpu-check.json, .md and .log, which a later call continues from."""

    def __init__(self, options: Options, facts: dict[str, Any], at_once: int = 1):
        self.out, self.rehearse, self.at_once = Path(options.out), options.rehearse, at_once
        self.cache = Path(options.cache or self.out / "cache").resolve()
        make_folders(self.cache, (".",))
        stem = "gpu-check-rehearsal" if self.rehearse else "gpu-check"
        self.engine = str(facts.get("engine", "engine"))
        self.log = self.out / f"{stem}.log"
        self.results = Results(self.out / f"{stem}.json", facts, options, report)
        # a copy, because --out may be emptied between two calls
        self.copy = self.cache / f"{stem}.json"
        if self.copy.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.copy, self.out / f"{stem}.json")
        self.results.resume()
        self.lock = threading.Lock()

    def run(self, parts: Sequence[Part], minutes: float, again: bool = False) -> bool:
        """Run the `parts` that are not done, in order, for `minutes`. Returns whether all are
        done."""
        ends = time.monotonic() + 60 * minutes
        todo = [part for part in parts if again or not self.done(part)]
        for part in todo:
            if again:
                shutil.rmtree(self._folder(part), ignore_errors=True)
            if again or not self.results.find({"part": part.name}):
                self._put(part, NOT_RUN | {"output": lack(part)})
        self.results.write()  # the date of this call
        todo = [part for part in todo if not lack(part)]
        for batch in batches(todo):
            side_by_side(
                lambda part: self._take(part, ends, part == todo[0]),
                batch,
                self.at_once if batch[0].beside else 1,
            )
        return all(map(self.done, parts))

    def done(self, part: Part) -> bool:
        """Whether the part has run to its end without a failure."""
        return self._record(part)["result"] == "done"

    def _record(self, part: Part) -> dict[str, Any]:
        return self.results.find({"part": part.name}) or NOT_RUN

    def _put(self, part: Part, figures: dict[str, Any]) -> None:
        with self.lock:
            self.results.put({"part": part.name, "group": part.group}, figures)
            write_json(self.copy, self.results.record)

    def _folder(self, part: Part) -> Path:
        return self.cache / "parts" / part.name

    def _take(self, part: Part, ends: float, first: bool) -> None:
        """Run a part if there is enough time for it. The first part of a call runs in any case."""
        left = ends - time.monotonic()
        if left < part.least and not (first and left > 0):
            return
        limit = left if part.unfinished is not None else min(left, PATIENCE * part.seconds)
        self._put(part, self._attempt(part, limit))

    def _attempt(self, part: Part, limit: float) -> dict[str, Any]:
        """Run a part once. Returns its record, in which seconds and tries include earlier
        attempts."""
        folder, before = self._folder(part), self._record(part)
        folder.mkdir(parents=True, exist_ok=True)
        restore(folder, before["files"])
        words = (*part.words, *(part.rehearsal if self.rehearse else ()))
        minutes = f"{max(1.0, (limit - 15) / 60):.2f}"
        values = {"{out}": str(folder), "{minutes}": minutes, "{engine}": self.engine}
        command = [sys.executable, *(filled(word, values) for word in words)]
        print(f"{part.name}: {shlex.join(['python', *command[1:]])}", flush=True)
        began, log = time.monotonic(), folder / "log.txt"
        result, code = "done", 0
        try:
            execute(
                command,
                log,
                began + limit,
                environment=self._environment(part),
                first=signal.SIGINT,
                grace=GRACE,
            )
        except Failed as error:
            result, code = "failed", error.code
        except TimeUp:
            result, code = "timed out", None
        seconds = round(time.monotonic() - began, 1)
        output = log.read_text(errors="replace", encoding="utf-8")
        if result == "done" and part.unfinished and part.unfinished in output:
            result = "timed out"
        tail = output[-TAIL:]
        went = f"{part.name}: {result} after {seconds:.0f} s"
        print(went + ("" if result == "done" else f"\n{tail}"), flush=True)
        with self.lock, self.log.open("a", encoding="utf-8") as everything:
            everything.write(f"==== {went}: {shlex.join(command)}\n{output}\n")
        return {
            "result": result,
            "command": shlex.join(command),
            "exit_code": code,
            "seconds": round(before["seconds"] + seconds, 1),
            "tries": before["tries"] + 1,
            "engine": self.engine,
            "output": tail,
            "files": json_files(folder),
        }

    def _environment(self, part: Part) -> dict[str, str]:
        """The environment of a part. Parts share the compilers' caches, and a test beside others
        compiles on few cores."""
        more = {
            "TORCHINDUCTOR_CACHE_DIR": f"{self.cache}/inductor",
            "TRITON_CACHE_DIR": f"{self.cache}/triton",
            "PYTHONUNBUFFERED": "1",
        }
        if part.beside and self.at_once > 1:
            more["TORCHINDUCTOR_COMPILE_THREADS"] = str(CORES_EACH)
        if self.rehearse:
            more |= {"CUDA_VISIBLE_DEVICES": "", "GPU_TESTS_DEVICE": "cpu"}
        return os.environ | more


# The record of a part that has not run. Its other results are done, failed and timed out.
NOT_RUN: dict[str, Any] = {
    "result": "not run",
    "command": "",
    "exit_code": None,
    "seconds": 0.0,
    "tries": 0,
    "output": "",
    "files": {},
}


def report(record: dict[str, Any]) -> str:
    """The table of parts, as Markdown, with the last line that each part printed."""
    rows = []
    for case in record["cases"]:
        lines = [line.strip(" =|") for line in case["output"].splitlines() if line.strip(" =|")]
        last = lines[-1].replace("|", ",") if lines else ""
        rows.append([case["part"], case["result"], f"{case['seconds']:.0f}", last])
    head = ("part", "result", "seconds", "its last line")
    title = f"This was {REHEARSAL}.\n\n" if record["options"]["rehearse"] else ""
    return title + markdown(head, rows, words=(0, 1, 3))


def batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Groups of consecutive parts that may run side by side. Every other part is a group of its
    own."""
    batch: list[Part] = []
    for part in parts:
        if batch and not (part.beside and batch[-1].beside):
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def filled(word: str, values: dict[str, str]) -> str:
    """The word with the placeholders replaced by their values."""
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def json_files(folder: Path) -> dict[str, Any]:
    """The JSON files in a part's folder by path, including those of a ladder's runs, but not caches
    and models."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.json"))]
    return {
        str(path): read_json(folder / path)
        for path in paths
        if len(path.parts) <= 3 and "cache" not in path.parts
    }


def restore(folder: Path, files: dict[str, Any]) -> None:
    """Write the JSON files that an earlier call recorded, maybe on another machine, so that the
    part continues from them."""
    for name, value in files.items():
        path = folder / name
        if value is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, value)


# --- the command


def lack(part: Part) -> str:
    """Which of the part's packages are not installed, as text. Empty if all are."""
    lacking = [package for package in part.packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def asked_for(only: str | None, parts: Sequence[Part]) -> list[Part]:
    """The parts that --only names, by part or by group. Raises UserError for an unknown name."""
    from config import known_names

    if only is None:
        return list(parts)
    known = list(dict.fromkeys([*(part.group for part in parts), *(part.name for part in parts)]))
    names = known_names("--only", only, known)
    return [part for part in parts if part.name in names or part.group in names]


def main() -> int:
    """Run the parts of this call and print the table. The exit code is 1 if parts are still to be
    done."""
    import torch

    from base.cli import parse
    from base.console import outlive
    from base.machine import cores
    from benchmarks.machine import engine_hash, facts, in_own_process
    from config import UserError

    # a background job ignores SIGINT, and its children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = parse(Options, sys.argv[1:])
    outlive()
    parts = asked_for(options.only, all_parts())
    if not options.rehearse and not torch.cuda.is_available():
        raise UserError(
            "torch sees no CUDA GPU on this machine; --rehearse tries every part tiny on the CPU"
        )
    if options.rehearse:
        print(f"This is {REHEARSAL}.", flush=True)
    known = in_own_process(facts, "cpu" if options.rehearse else "cuda")
    known |= {"engine": engine_hash()}
    at_once = max(1, min(AT_ONCE, cores() // CORES_EACH))
    check = Check(options, known, at_once)
    for part in parts:
        if reason := lack(part):
            print(f"{part.name} will not run; {reason}", flush=True)
    todo = [part for part in parts if not lack(part) and (options.again or not check.done(part))]
    print(
        f"calls of {options.minutes:g} minutes, {at_once} tests at a time; seconds as expected "
        "with an H100 and 16 cores:"
    )
    print(
        "\n".join(forecast(todo, 60 * options.minutes, at_once)) or "everything is done", flush=True
    )
    done = check.run(parts, options.minutes, options.again)
    print(check.results.text())
    if not done:
        print("repeat the command to run the parts that are not done")
    return int(not done)


if __name__ == "__main__":
    if importlib.util.find_spec("numpy") is None:
        print(
            "error: numpy is not installed and every part needs it; run `make wheels` on a machine "
            "with a network and `make gpu-check WHEELS=FOLDER` here",
            file=sys.stderr,
        )
        sys.exit(2)
    from base.cli import entry_point

    entry_point(main)
