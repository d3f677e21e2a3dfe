"""Everything that needs a CUDA GPU, in order of worth:  make gpu-check  [ARGS="--only correctness --minutes 9"]

Each part is a command of its own with a time limit, so that one that hangs or fails costs the others nothing; what
torch.compile and Triton make is kept under --out from one to the next. A second call goes on where the first ended.
The trade-off: every part starts Python anew, some ten seconds each.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import markdown
from config import Positive, Where
from files import write_json

REPO = Path(__file__).resolve().parent.parent
LIMIT = 170.0  # seconds of a command
SHORTEST = 20.0  # with less time than this left, no part is begun
GRACE = 10.0  # seconds for a command to end when it is interrupted
TAIL = 4000  # characters of a part's output that are kept


@dataclass
class Options:
    """Options of the check."""

    only: str | None = None
    """Parts or groups of parts, comma-separated. Default: all."""
    minutes: Positive = 25.0
    """Time for all of them."""
    again: bool = False
    """Run also what was done before."""
    out: Where = "benchmarks/results/gpu"
    """Folder for gpu-check.json, gpu-check.md and a folder of each part."""


@dataclass(frozen=True)
class Part:
    """A command: words after `python`, {out} for a folder of its own, whose JSON files are its result."""

    group: str
    name: str
    words: tuple[str, ...]
    packages: tuple[str, ...] = ("tyro", "safetensors")  # beside torch, triton and numpy
    tries: int = 1  # of a part that goes on where its time ran out, or finds compiled what took the time
    sliced: bool = False  # it ends in time by itself, and all of its tries are needed


# --- what is run


def all_parts() -> list[Part]:
    slices = ("--preset", "gpt2", "--minutes", "2.6")
    of_training = ("tokenizers", "rich", "matplotlib")
    return [
        *correctness(),
        measured("peers", "peers-124M", "peers", "--shape", "124M", "--resume", tries=4),
        measured("ladder", "ladder", "stages", *slices, packages=of_training, tries=4, sliced=True),
        measured("kernels", "kernels", "kernels", tries=2),
        *(
            measured("sizes", f"peers-{name}", "peers", "--shape", name, "--resume", tries=3)
            for name in ("350M", "774M", "1.5B")
        ),
        measured("decoding", "decoding", "decoding", packages=("transformers",)),
    ]


def measured(group: str, name: str, module: str, *words: str, packages: tuple[str, ...] = (), **more: Any) -> Part:
    """A benchmark that writes its figures."""
    command = ("-m", f"benchmarks.{module}", "--device", "cuda", *words, "--out", "{out}")
    return Part(group, name, command, ("tyro", "safetensors", *packages), **more)


def correctness() -> list[Part]:
    """The tests for a GPU, then the kernels' own tests, which are not interpreted there."""
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    packages = ("pytest", "tyro", "safetensors")
    programs = program_tests()
    steps = (*pytest, "-m", "gpu", "tests/test_gpu.py", "-k", f"not ({' or '.join(programs)})")
    kernels = sorted(file.stem for file in (REPO / "kernels").glob("[!_]*.py"))
    return [
        Part("correctness", "steps", steps, packages, tries=2),
        *(Part("correctness", f"test_{stem}", (*pytest, f"tests/test_{stem}.py"), packages) for stem in kernels),
        *(
            Part("correctness", name, (*pytest, f"tests/test_gpu.py::{name}"), (*packages, "tokenizers", "rich"), 2)
            for name in programs
        ),
    ]


def program_tests() -> list[str]:
    """Those of tests/test_gpu.py that run whole programs, and take as long: each is a part of its own."""
    tree = ast.parse((REPO / "tests" / "test_gpu.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [function.name for function in functions if any(arg.arg == "run" for arg in function.args.args)]


# --- running


class Check:
    """Runs parts and keeps gpu-check.json and gpu-check.md, which a later call reads again."""

    def __init__(self, out: Path, facts: dict[str, Any], limit: float = LIMIT):
        self.out, self.facts, self.limit = out.resolve(), facts, limit
        self.records = self._earlier()

    def _earlier(self) -> dict[str, Any]:
        """What an earlier call did on this machine with these versions, by part."""
        before = read_json(self.out / "gpu-check.json")
        if before is None:
            return {}
        same = all(before.get(key) == value for key, value in self.facts.items() if key != "date")
        return {record["part"]: record for record in before["parts"]} if same else {}

    def run(self, parts: Sequence[Part], minutes: float, again: bool = False) -> bool:
        """Run `parts` that are not done, in turn, for `minutes`; whether all are done."""
        ends = time.monotonic() + 60 * minutes
        self._keep_cache_out_of_git()
        todo = [part for part in parts if again or not self.done(part)]
        for part in todo:
            if again or part.name not in self.records:
                self.records[part.name] = record_of(part, "not run", output=lack(part))
        for part in todo:
            for _ in range(0 if lack(part) else part.tries):
                left = ends - time.monotonic()
                if left < min(SHORTEST, self.limit):
                    break
                self.records[part.name] = self._attempt(part, min(self.limit, left))
                self.write()
                if self.done(part) or (self.records[part.name]["result"] == "failed" and not part.sliced):
                    break
        return all(map(self.done, parts))

    def done(self, part: Part) -> bool:
        record = self.records.get(part.name, record_of(part, "not run"))
        return record["result"] == "done" and (not part.sliced or record["tries"] >= part.tries)

    def _attempt(self, part: Part, seconds: float) -> dict[str, Any]:
        """Run a part once; its record, with what its tries before have cost."""
        folder = self.out / part.name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, *(word.replace("{out}", str(folder)) for word in part.words)]
        print(f"{part.name}: {shlex.join(['python', *command[1:]])}", flush=True)
        began = time.monotonic()
        code = run_command(command, self._environment(), folder / "log.txt", seconds)
        seconds = round(time.monotonic() - began, 1)
        output = (folder / "log.txt").read_text(errors="replace", encoding="utf-8")[-TAIL:]
        result = "timed out" if code is None else "failed" if code else "done"
        print(f"  {result} after {seconds:.0f} s" + ("" if result == "done" else f"\n{output}"), flush=True)
        files = {file.name: read_json(file) for file in sorted(folder.glob("*.json"))}
        before = self.records[part.name]
        return record_of(part, result, output, files) | {
            "command": shlex.join(command),
            "exit_code": code,
            "seconds": before["seconds"] + seconds,
            "tries": before["tries"] + 1,
        }

    def _keep_cache_out_of_git(self) -> None:
        (self.out / "cache").mkdir(parents=True, exist_ok=True)
        (self.out / "cache" / ".gitignore").write_text("*\n", encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        cache = self.out / "cache"
        return os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}

    def write(self) -> None:
        write_json(self.out / "gpu-check.json", self.facts | {"parts": list(self.records.values())})
        (self.out / "gpu-check.md").write_text(self.table(), encoding="utf-8")

    def table(self) -> str:
        """One row a part, with the last line of what it printed."""
        rows = [["part", "result", "seconds", "its last line"]]
        for of in self.records.values():
            lines = [line.strip(" =|") for line in of["output"].splitlines() if line.strip(" =|")]
            rows.append(
                [of["part"], of["result"], f"{of['seconds']:.0f}", lines[-1].replace("|", ",") if lines else ""]
            )
        return markdown(rows[0], rows[1:], words=(0, 1, 3)) + "\n"


def record_of(part: Part, result: str, output: str = "", files: dict[str, Any] | None = None) -> dict[str, Any]:
    """A part's entry in gpu-check.json; `result`: done, failed, timed out, not run."""
    return {
        "part": part.name, "group": part.group, "result": result, "command": "", "exit_code": None, "seconds": 0.0,
        "tries": 0, "output": output, "files": files or {},
    }  # fmt: skip


def read_json(path: Path) -> Any:
    """None where there is none that is whole: who writes it may have been killed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def run_command(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """Run a command with its output in `log`; its exit code, or None where its time was up and it was ended."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=REPO, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a command's session. Interrupted first, pytest ends the programs that it started itself."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


# --- before it begins


def lack(part: Part) -> str:
    """What of its packages is not installed, in words; nothing where all are."""
    lacking = [package for package in part.packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def asked_for(only: str | None, parts: Sequence[Part]) -> list[Part]:
    """The parts that --only names, by themselves or by their group. Raises UserError."""
    from config import UserError, nearest

    if only is None:
        return list(parts)
    known = list(dict.fromkeys([*(part.group for part in parts), *(part.name for part in parts)]))
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--only {name} is none of {', '.join(known)}{nearest(name, known)}")
    return [part for part in parts if part.name in names or part.group in names]


def main() -> int:
    import torch

    from benchmarks.machine import elsewhere, facts
    from cli import parse
    from config import UserError
    from console import outlive

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would its children
    options = parse(Options, sys.argv[1:])
    outlive()
    parts = asked_for(options.only, all_parts())
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU on this machine; nothing was run")
    for part in parts:
        if reason := lack(part):
            print(f"{part.name} will not run; {reason}", flush=True)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    check = Check(Path(options.out), elsewhere(facts, "cuda") | {"date": now})
    done = check.run(parts, options.minutes, options.again)
    print(check.table())
    return int(not done)


if __name__ == "__main__":
    if importlib.util.find_spec("tyro") is None:
        print("error: tyro is not installed and every part needs it; pip install tyro", file=sys.stderr)
        sys.exit(2)
    from cli import entry_point

    entry_point(main)
