r"""Runs a training command with every combination of some options, and compares the runs.

python -m tools.sweep "--lr 1e-4,3e-4,1e-3 --seed 1,2" -- train_gpt2.py --preset micro
python -m tools.sweep "--method full,lora" --out sweeps/methods -- -m finetune.sentiment --data train.csv

Values are separated by commas. `\,` is a comma within a value, and quotes keep spaces in one. Each
run is a process with a folder of its own in --out. The same command again skips finished runs and
resumes the others.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import itertools
import math
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from base.arguments import CONFIG, Option, options_of, read_words
from base.cli import entry_point, parse
from base.commands import end, start, why_it_failed
from base.console import outlive, time_text
from base.files import read_json, writing_to
from base.signals import note_signal
from config import PathOrName, Positional, Positive, RunConfig, SmallCount, UserError
from engine.log import finite_values, read_log
from tools.comparison import compare_runs
from tools.runs import read_run, run_names

# Options that a sweep sets itself or that would let its runs do something else.
RESERVED = ("out", "resume", "extend_to", "reschedule", "dry_run")
LAUNCHERS = {"torchrun": ("-m", "torch.distributed.run"), "python": (), "python3": ()}
SAVING = 120.0  # seconds that an interrupted run gets to save its last step
EVERY = 60.0  # seconds between two lines of progress where standard output is no terminal
TAIL = 16384  # bytes of a log that hold its newest steps
LONGEST = 120  # characters of a folder's name


@dataclass(frozen=True)
class SweepConfig:
    """Train with every combination of some options, one process a run, and compare the runs.

    A finished run is skipped, and an unfinished one is resumed: type the same command again."""

    grid: Annotated[str, Positional("GRID")] = ""
    """Options, each with its values, separated by commas: "--lr 1e-4,3e-4 --seed 1,2". A comma
    within a value is written as \\,, a value with spaces in quotes, and a flag as true,false."""
    entry: Annotated[tuple[str, ...], Positional("COMMAND ...")] = ()
    """The command that trains, with the options that all runs share: a script, -m and a module, or
    torchrun with its options."""
    out: PathOrName = "sweep"
    """Folder of the sweep: a folder for each run, its output in a .txt beside, and the comparison
    in compare.png and compare.json."""
    jobs: SmallCount = 1
    """Runs at a time."""
    minutes: Positive | None = None
    """Begin no run after this many minutes. Default: no limit."""


@dataclass
class Trial:
    """One run of the sweep."""

    name: str
    folder: Path
    words: list[str]  # the whole command
    options: list[str]  # the part of it that the program reads
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    seconds: float | None = None  # that it took in this sweep
    failure: str = ""  # why it ended early, with its exit code

    @property
    def output(self) -> Path:
        """The file that holds what the run prints."""
        return self.folder.with_name(f"{self.name}.txt")

    def is_finished(self) -> bool:
        """Whether the run has ended, and was begun with the same options. With others the engine
        must decide whether they belong to the run."""
        record, results = read_json(self.folder / "run.json"), self.folder / "metrics.json"
        begun = record.get("command") if isinstance(record, dict) else None
        same = begun is None or (isinstance(begun, list) and begun[1:] == self.options)
        return results.is_file() and same


def main() -> int:
    """Run the command. Returns 0, or 1 if a run failed."""
    cfg = read_command(sys.argv[1:])
    grid, trials = plan(cfg)
    outlive()
    with writing_to("--out", Path(cfg.out)):
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    sizes = " x ".join(f"{len(values)} {option}" for option, values in grid.items())
    print(f"{len(trials)} runs in {cfg.out}: {sizes}")
    _end_with_the_terminal()
    sweep = Sweep(trials, cfg.jobs, 60 * cfg.minutes if cfg.minutes else math.inf)
    try:
        sweep.run()
    finally:
        sweep.stop()
    return report(sweep, Path(cfg.out))


def _end_with_the_terminal() -> None:
    """Let a closed terminal end the sweep, and with it the runs, unless nohup forbids it."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:

        def received(number: int, frame: Any) -> None:
            note_signal(number)
            raise SystemExit(128 + number)

        signal.signal(hangup, received)


# --- the grid


def read_command(argv: Sequence[str]) -> SweepConfig:
    """The options of a command line. The grid, which the parser would take for an option, gets a
    space before it."""
    words = list(argv)
    own = words.index("--") if "--" in words else len(words)
    protected = [
        f" {word}" if number < own and re.match(r"--[^\s=]+\s", word) else word
        for number, word in enumerate(words)
    ]
    return parse(SweepConfig, protected)


def plan(cfg: SweepConfig) -> tuple[dict[str, list[str]], list[Trial]]:
    """The grid and its runs. Raises UserError for a mistake in any of them."""
    example = 'python -m tools.sweep "--lr 1e-4,3e-4 --seed 1,2" -- train_gpt2.py --preset micro'
    if not cfg.entry or not cfg.grid.strip():
        raise UserError(f"a grid and a command are needed; type {example}")
    grid = read_grid(cfg.grid)
    command, shared = split_entry(cfg.entry)
    program = find_program(command)
    known = {typed: option for option in options_of(program.kind) for typed in option.typed}
    check_shared(program, grid, shared, known)
    trials = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values))
        name = folder_name(chosen)
        folder = Path(cfg.out) / name
        varied = [word for item in chosen.items() for word in typed_words(*item, known)]
        options = [*shared, *varied, "--out", str(folder)]
        parse(program.kind, options, program.defaults)
        trials.append(Trial(name, folder, [*command, *options], options))
    return grid, trials


def read_grid(text: str) -> dict[str, list[str]]:
    """The values of each option of a grid. Raises UserError for a text that is none."""
    try:
        words = shlex.split(text.replace("\\,", "\0"))
    except ValueError as error:
        raise UserError(f"the grid {text.strip()!r} cannot be read: {error}") from None
    grid: dict[str, list[str]] = {}
    for option, values in itertools.zip_longest(words[::2], words[1::2]):
        if not option.startswith("--") or values is None or values.startswith("--"):
            raise UserError(
                f"the grid {text.strip()!r} must be options, each with its values, like --lr "
                "1e-4,3e-4 --seed 1,2"
            )
        found = [value.replace("\0", ",") for value in values.split(",")]
        name = "--" + option[2:].replace("_", "-")
        grid[name] = list(dict.fromkeys([*grid.get(name, ()), *found]))
    return grid


def split_entry(entry: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that start the program, by this Python, and the program's options. Raises
    UserError if there is no program."""
    launcher = LAUNCHERS.get(entry[0])
    words = list(entry[1:] if launcher is not None else entry)
    if entry[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        try:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                options = get_args_parser().parse_args(words).training_script_args
        except SystemExit:
            reason = told.getvalue().strip().rpartition("error: ")[2]
            raise UserError(f"torchrun: {reason}; see torchrun --help") from None
    else:
        module = words[:1] == ["-m"]
        options = words[1 + module :]
        if len(words) <= module:
            raise UserError("no script or module is named after --; type -- train_gpt2.py ...")
    program = words[: len(words) - len(options)]
    return [sys.executable, *(launcher or ()), *program], list(options)


class Program(NamedTuple):
    """A program that trains with this engine."""

    kind: type  # the dataclass of its options
    defaults: dict[str, Any]  # the task's own


def find_program(command: Sequence[str]) -> Program:
    """The program that a command starts. Raises UserError for one that does not train with this
    engine."""
    name = command[-1]
    try:
        module: Any = (
            importlib.import_module(name) if command[-2] in ("-m", "--module") else _load(name)
        )
    except (ImportError, OSError) as error:
        raise UserError(f"{name} cannot be run: {error}") from None
    if (task := getattr(module, "TASK", None)) is not None:
        return Program(task.config, dict(task.defaults))
    kinds = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RunConfig)
    ]
    if not kinds:
        raise UserError(
            f"{name} does not train with this engine; name train_gpt2.py, -m finetune.TASK, or a "
            "script with a TASK or a RunConfig"
        )
    return Program(max(kinds, key=lambda kind: len(kind.__mro__)), {})


def _load(script: str) -> Any:
    """The module of a script, without running it as a command."""
    spec = importlib.util.spec_from_file_location("swept_script", script)
    if spec is None or spec.loader is None:
        raise UserError(f"{script} is no Python script; name train_gpt2.py or -m finetune.TASK")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks up its types there
    sys.path.append(str(Path(script).resolve().parent))  # as Python does for a script that it runs
    spec.loader.exec_module(module)
    return module


def check_shared(
    program: Program, grid: dict[str, list[str]], shared: Sequence[str], known: dict[str, Option]
) -> None:
    """Raise UserError for options that a sweep may not set, or that are set twice."""
    given = read_words([CONFIG, *options_of(program.kind)], shared)
    varied = {known[name].name for name in grid if name in known}
    for name in given | dict.fromkeys(varied):
        shown = f"--{name.replace('_', '-')}"
        if name in RESERVED:
            raise UserError(f"{shown} cannot be given to the runs of a sweep; leave it out")
        if name in given and name in varied:
            raise UserError(f"{shown} is in the grid and in the command; leave one of them out")


def typed_words(option: str, value: str, known: dict[str, Option]) -> list[str]:
    """How an option with a value is typed. A flag that is false is typed as --no-NAME."""
    if option in known and known[option].most == 0:
        if value not in ("true", "false"):
            raise UserError(f"{option} is a flag; its values in a grid are true,false")
        return [known[option].typed[value == "false"]]
    return [option, value]


def folder_name(chosen: dict[str, str]) -> str:
    """A safe name of a folder for a run's options. Where characters had to be left out, a hash of
    the options keeps the names of two runs apart."""
    import hashlib

    whole = "_".join(f"{option[2:]}={value}" for option, value in chosen.items())
    safe = re.sub(r"[^\w.=+-]+", "-", whole, flags=re.ASCII)
    if safe == whole and len(safe) <= LONGEST:
        return safe
    return f"{safe[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


# --- the runs


@dataclass
class Sweep:
    """Runs the trials, `jobs` at a time, and shows how far they are."""

    trials: Sequence[Trial]
    jobs: int
    seconds: float  # after which no run begins
    began: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)  # when progress was last shown

    def __post_init__(self) -> None:
        self.waiting = [trial for trial in self.trials if not trial.is_finished()]
        self.running: list[Trial] = []
        if done := len(self.trials) - len(self.waiting):
            print(f"{done} finished before and are skipped")

    def run(self) -> None:
        """Run the trials. A failure of one does not stop the others."""
        while self.running or (self.waiting and not self._is_time_up()):
            while self.waiting and len(self.running) < self.jobs and not self._is_time_up():
                self._begin(self.waiting.pop(0))
            time.sleep(0.1)
            for trial in list(self.running):
                if trial.process is not None and trial.process.poll() is not None:
                    self._ended(trial, trial.process.returncode)
            self._show()

    def _is_time_up(self) -> bool:
        return time.monotonic() - self.began >= self.seconds

    def _begin(self, trial: Trial) -> None:
        resumes = (trial.folder / "run.json").is_file()
        print(f"{self._place(trial)} {'resumes' if resumes else 'begins'}", flush=True)
        trial.began = time.monotonic()
        self.running.append(trial)  # first, so that an interruption ends it too
        trial.process = start(trial.words, trial.output)

    def _place(self, trial: Trial) -> str:
        return f"[{1 + list(self.trials).index(trial)}/{len(self.trials)}] {trial.name}"

    def _ended(self, trial: Trial, code: int) -> None:
        self._clear()
        end([trial.process] if trial.process else [], signal.SIGTERM, 0.0)  # leftover workers
        self.running.remove(trial)
        trial.seconds = time.monotonic() - trial.began
        if code:
            trial.failure = f"{why_it_failed(code, trial.output)} (exit code {code})"
            print(f"{self._place(trial)} failed: {trial.failure}", flush=True)
        else:
            left = self._eta()
            then = f"; about {time_text(left)} for the others" if left else ""
            print(f"{self._place(trial)} finished in {time_text(trial.seconds)}{then}", flush=True)

    def _eta(self) -> float:
        """Seconds until all runs are finished, from the times of those that are."""
        times = [t.seconds for t in self.trials if t.seconds is not None and not t.failure]
        rest = [time.monotonic() - trial.began for trial in self.running]
        if not times:
            return 0.0
        each = statistics.fmean(times)
        work = each * len(self.waiting) + sum(max(0.0, each - spent) for spent in rest)
        return work / self.jobs

    def _show(self) -> None:
        """Show the steps of the running trials: often on a terminal, else once a minute."""
        terminal = sys.stdout.isatty()
        if not self.running or time.monotonic() - self.shown < (1.0 if terminal else EVERY):
            return
        self.shown = time.monotonic()
        lines = [f"{self._place(trial)} {progress(trial)}" for trial in self.running]
        if terminal:
            import shutil

            text = " | ".join(lines)[: shutil.get_terminal_size().columns - 1]
            print(f"\r\033[K{text}", end="", flush=True)
        else:
            print("\n".join(lines), flush=True)

    def _clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")

    def stop(self) -> None:
        """End the runs that are still going, after they have saved their last step."""
        if not self.running:
            return
        self._clear()
        print("stopping; the runs save their last step", flush=True)
        end([t.process for t in self.running if t.process], signal.SIGTERM, SAVING)
        names = ", ".join(trial.name for trial in self.running)
        print(
            f"stopped {names}; {len(self.waiting)} runs have not begun; the same command goes on",
            flush=True,
        )


def progress(trial: Trial) -> str:
    """How far a run is, from the end of its log."""
    log = trial.folder / "log.jsonl"
    options = read_json(trial.folder / "config.json")
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    steps = [record for _, record in read_log(text) if record["kind"] == "train"]
    planned = options.get("steps") if isinstance(options, dict) else None
    times = finite_values(steps, "step_ms")
    if not steps or not planned or not times:
        return "starts"
    last, left = steps[-1], (planned - steps[-1]["step"]) * statistics.median(times) / 1e3
    loss = finite_values([last], "loss")
    parts = [f"step {last['step']:,}/{planned:,}", *(f"loss {value:.4f}" for value in loss)]
    return ", ".join([*parts, f"eta {time_text(left)}"])


# --- the end


def report(sweep: Sweep, out: Path) -> int:
    """Say what is left and what failed, and compare the runs. Returns the exit code."""
    if sweep.waiting:
        names = ", ".join(trial.name for trial in sweep.waiting)
        print(
            f"\nthe time is over: {len(sweep.waiting)} runs have not begun ({names}); the same "
            "command goes on"
        )
    runs = []
    folders = [trial.folder for trial in sweep.trials if (trial.folder / "log.jsonl").is_file()]
    for folder, name in zip(folders, run_names(folders)):
        try:
            runs.append(read_run(folder, name))
        except UserError as error:
            print(f"not compared: {error}")
    if len(runs) > 1:
        print()
        picture = out / "compare.png" if any(run.train for run in runs) else None
        with writing_to("--out", out):
            compare_runs(runs, out / "compare.json", picture)
    failed = [trial for trial in sweep.trials if trial.failure]
    if failed:
        print(f"\n{len(failed)} of {len(sweep.trials)} runs failed; the same command tries again:")
        for trial in failed:
            print(f"  {trial.name}: {trial.failure}; see {trial.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    entry_point(main)
