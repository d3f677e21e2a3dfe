"""The one training loop. It never looks inside a batch, a model or a loss: the Task does.

A run begins (afresh or from a checkpoint), makes optimizer steps (engine/step.py), does what is due
between them (evaluation, samples, checkpoints), and ends: finished, or stopped by a signal with its
last step saved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from base import files
from base.console import bytes_text, printable, time_text
from config import RunConfig, UserError
from engine import processes
from engine.lengths import Extension, as_json, spans
from engine.log import RunLog, finite
from engine.memory import Heap, keeps_freed
from engine.plan import (
    Choices,
    Disk,
    compiler_error,
    device_peak,
    disk_of,
    dry_run,
    estimate_fits,
    is_out_of_memory,
    largest_micro_batch,
    settle,
)
from engine.processes import StopSignal, World
from engine.resume import BY_MACHINE, Earlier, changes, earlier_start, own_options
from engine.start import Start, claimed, open_run
from engine.step import (
    Loader,
    StepResult,
    TrainStep,
    check_replicas,
    compile_model,
    compile_unit,
    load_weights,
    partition,
)
from engine.task import Task
from storage import checkpoint
from storage.checkpoint import Saver
from text import tokenizer_files

MAX_SKIPPED = 10  # non-finite updates in a row that end a run
HEAP_SLACK = 1.25  # of what a run is estimated to take: so much more may its process hold
CHECK_EVERY = 100  # steps between comparisons of the ranks' parameters


def train(task: Task, cfg: RunConfig, typed: Collection[str] | None = None) -> int:
    """Train `task` as `cfg` says; returns the exit code of the contract (0, 130, 143). UserError
    for bad input.

    `typed`: the options that the user named. A run that goes on keeps its own value of the others;
    None: of none.
    """
    cfg = own_options(cfg, typed)
    asked = {name: getattr(cfg, name) for name in (*BY_MACHINE, "device")}
    world = processes.start(cfg.device)
    cfg = processes.gather(world, cfg)[0]  # only rank 0 may see the run's folder
    stop = StopSignal(world)
    stop.install()
    log = RunLog(speaks=world.main)
    if advice := processes.restart_advice():
        log.say(advice)
    defaulted = cfg.data is None
    cfg, choices = settle(cfg, world)
    task.rows_per_rank(cfg, world.size)
    if defaulted and (note := task.without_data(cfg)):
        log.say(note)
    if cfg.dry_run:
        task.plan(cfg)
        dry_run(task, task.set_length(cfg), world, log)
        processes.finish(world)
        return 0
    with processes.main_first(world):
        task.setup(cfg, log.say)
    cfg = task.set_length(cfg)
    run = Run(task, cfg, world, stop, log, asked)
    try:
        with sdpa_kernel(choices.backends, set_priority=True), run.held:
            code = run.train(choices)
    finally:
        log.close()
        stop.remove()
    processes.finish(world)
    return code


@dataclass
class Progress:
    """Where a run stands, beside its tensors: what a checkpoint's JSON holds."""

    step: int = 0  # optimizer steps done
    tokens: float = 0
    skipped: int = 0  # updates that were not finite
    skipped_in_a_row: int = 0
    done: list[str] = field(default_factory=list)  # of this step's evaluation and sample
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    best_metric: float | None = None  # of this very step, where it was evaluated
    best_so_far: float | None = None  # of the metrics of all evaluations
    not_better: int = 0  # evaluations since that one, none of them better
    # of the last steps, whose mean is the run's result
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0  # spent in optimizer steps


class Run:
    def __init__(
        self,
        task: Task,
        cfg: RunConfig,
        world: World,
        stop: StopSignal,
        log: RunLog,
        asked: dict[str, Any],
    ):
        """`asked`: options that are chosen for the machine, as they were before that."""
        self.task, self.cfg, self.world, self.stop, self.log = task, cfg, world, stop, log
        self.asked = asked
        self.changes: Callable[[], list[str]] = list  # since the run's last start; rank 0 knows
        assert cfg.out and cfg.steps
        self.folder = Path(cfg.out)
        self.steps = cfg.steps
        # what this process holds while it trains: the run's folder
        self.held = contextlib.ExitStack()
        self.at = Progress()
        self.final_metrics: dict[str, float] = {}  # of the step that final/ is of
        self.saved: int | None = None  # step of the newest checkpoint
        self.signal = 0  # what all ranks agreed to stop for
        self.rates: dict[str, list[float]] = {}  # by amount, of each step, per second
        self.clock = time.perf_counter()  # when the last step's figures were read
        self.flops = task.flops_per_token()
        self.peak = device_peak(world, cfg.precision)

    # --- beginning

    def train(self, choices: Choices) -> int:
        start = self._on_main(self._open)
        if start.finished:
            return 0
        searched = self.cfg.micro_batch == "auto"
        self._build(start)
        self._on_main(lambda: self._open_log(self.at.step if start.folder else None))
        self._banner(choices, start.folder)
        for warning in (*((choices.lost,) if choices.lost else ()), *self.task.warnings):
            self.log.warn(warning)
        for said in tokenizer_files.told.values():
            self.log.record("warning", {"step": self.at.step, "text": said})
        for note in start.notes:
            self.log.warn(note, self.at.step)
        if changed := self.changes():
            self.log.warn(f"the run goes on with other options: {', '.join(changed)}", self.at.step)
        self._on_main(self._write_options)
        if self.world.main and (shortage := self._disk().shortage(self.folder)):
            self.log.warn(shortage, self.at.step)
        self.log.start_progress(self.steps, self.at.step)
        try:
            self.stop.defer()
            while not self._loop_fits(searched and self.world.size == 1):
                self._shrink_micro_batch(start)
            self.log.stop_progress()
            if self.signal:
                return self._stopped()
            self._finish()
            return 0
        except Exception as error:
            # it reached the whole group: a compiler, say, that this process then missed
            if self.stop.flag:
                release_frames(error)
                raise SystemExit(self._stopped_in_error(error)) from None
            if is_out_of_memory(error):
                release_frames(error)
                raise self._out_of_memory() from None
            if self.cfg.compile and (line := compiler_error(error)):
                raise line from None
            raise
        finally:
            self.loader.close()
            self.saver.join()

    def _disk(self) -> Disk:
        return disk_of(self.task, self.cfg, sum(4 * p.numel() for p in self.model.parameters()))

    def _on_main(self, function: Callable[[], Any]) -> Any:
        """What rank 0's `function` returns, on every rank; its UserError is every rank's."""
        result: Any = None
        if self.world.main:
            try:
                result = function()
            except UserError as error:
                result = error
        result = processes.gather(self.world, result)[0]
        if isinstance(result, UserError):
            raise result
        return result

    def identity(self) -> dict[str, Any]:
        names = ("seed", "optimizer", "schedule", "steps")
        return (
            {"task": self.task.name}
            | {name: getattr(self.cfg, name) for name in names}
            | self.task.identity()
        )

    def _open(self) -> Start:
        cfg = self.cfg
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.platform(),
            "command": sys.argv,
            "world_size": self.world.size,
            "device": self.world.device.type,
            "launcher": processes.launcher(),
            "asked": self.asked,
        }
        extension = None
        if cfg.extend_to:
            assert cfg.warmup_steps is not None
            extension = Extension(
                cfg.extend_to,
                cfg.reschedule,
                cfg.schedule,
                cfg.warmup_steps,
                cfg.min_lr,
                cfg.patience,
            )
        self.held.enter_context(claimed(self.folder))
        earlier = earlier_start(cfg)
        resume = "auto" if self._is_restart(earlier) else cfg.resume
        start = open_run(self.folder, resume, self.identity(), facts, self.log.say, extension)
        self.changes = lambda: list(changes(cfg, facts, earlier, start)) if earlier else []
        if start.finished:
            steps = json.loads((self.folder / checkpoint.RESULTS).read_text(encoding="utf-8"))[
                "steps"
            ]
            self.log.say(
                f"{self.folder} is finished ({steps} steps): its model is {self.folder}/final"
            )
        return start

    def _is_restart(self, earlier: Earlier | None) -> bool:
        """Whether torchrun starts this run again, which it began itself: then --resume has been
        obeyed."""
        launcher = processes.launcher()
        begun_here = (
            earlier is not None
            and launcher is not None
            and earlier.record.get("launcher") == launcher
        )
        return begun_here and (
            self.cfg.resume == "never" or bool(checkpoint.checkpoints(self.folder))
        )

    def _build(self, start: Start, micro_batch: int | None = None) -> None:
        """Build the model and what trains it, as of the checkpoint; `micro_batch` None: as it must
        be found."""
        cfg, world, resume_from = self.cfg, self.world, start.folder
        tensors, meta = checkpoint.read_state(resume_from) if resume_from else ({}, {})
        torch.manual_seed(cfg.seed)
        self.model = self.task.build_model(cfg)
        # The checkpoint writer exports from a double of the model whose weights are the copied
        # ones.
        self.double = copy.deepcopy(
            self.model, {id(p): nn.Parameter(p.to("meta")) for p in self.model.parameters()}
        )
        self.model.to(world.device)
        cfg.micro_batch = micro_batch or self._micro_batch(start.micro_batch)
        self.heap = Heap(self._heap_limit(cfg.micro_batch))
        if cfg.compile:
            compile_model(self.model, cfg, world, self.task.compiles_whole)
        self.step = TrainStep(self.task, self.model, cfg, world)
        self.lengths = start.lengths
        self.step.spans = spans(start.lengths)
        if resume_from:
            # A checkpoint that an older version wrote lacks some.
            facts = {f.name: meta[f.name] for f in dataclasses.fields(Progress) if f.name in meta}
            self.at = Progress(**facts)
            self.saved = self.at.step if resume_from.parent.parent.samefile(self.folder) else None
            self.step.load_state(tensors, self.at.step)
        self.loader = Loader(self.task, world, cfg.micro_batch, self.steps)
        self.saver = Saver(self.folder, self._export_checkpoint, self._saved, self.log.say)

    def _open_log(self, resumed_at: int | None) -> None:
        try:
            self.log.open(self.folder, resumed_at, tuple(self.at.done))
        except OSError as error:
            raise UserError(f"cannot write to --out {self.folder}: {error.strerror}") from None
        if self.cfg.wandb:
            self.log.start_wandb(self.folder, dataclasses.asdict(self.cfg))

    def _write_options(self) -> None:
        """config.json: only when the log holds how it differs from the one before."""
        try:
            files.write_json(self.folder / "config.json", dataclasses.asdict(self.cfg))
        except OSError as error:
            raise UserError(f"cannot write to --out {self.folder}: {error.strerror}") from None

    def _micro_batch(self, before: int | None) -> int:
        """As asked, as it was before the run was interrupted, or the largest that fits."""
        rows = self.task.rows_per_rank(self.cfg, self.world.size)
        if self.cfg.micro_batch != "auto":
            if self.world.device.type != "cuda" and not estimate_fits(
                self.task, self.cfg, self.world
            )(self.cfg.micro_batch):
                raise self._out_of_memory()
            return self.cfg.micro_batch
        if before and rows % before == 0:
            return before
        found = largest_micro_batch(self.task, self.model, self.cfg, self.world, rows)
        if not found:
            raise UserError(
                "not even --micro-batch 1 fits in memory; add --recompute or lower --seq-len or "
                "--preset"
            )
        return found

    def _heap_limit(self, micro_batch: int) -> float:
        """Bytes of a CPU process from which on it is worth to look for holes in its heap."""
        if not self.task.ragged or self.world.device.type != "cpu" or not keeps_freed(self.cfg):
            return math.inf
        return HEAP_SLACK * self.task.estimate(self.cfg, micro_batch, "cpu", self.world.size).total

    def _out_of_memory(self) -> UserError:
        rows = self.task.rows_per_rank(
            dataclasses.replace(self.cfg, micro_batch="auto"), self.world.size
        )
        asked = self.cfg.micro_batch if isinstance(self.cfg.micro_batch, int) else rows
        alone = dataclasses.replace(self.world, size=1)  # the other ranks may be anywhere
        with torch.compiler.set_stance("force_eager"):
            fits = largest_micro_batch(self.task, self.model, self.cfg, alone, rows)
        fits = max((n for n in range(1, min(fits, asked - 1) + 1) if rows % n == 0), default=0)
        way = (
            f"lower --micro-batch to {fits}"
            if 0 < fits < asked
            else "add --recompute or lower --seq-len or --preset"
        )
        return UserError(f"out of memory with --micro-batch {asked}; {way}", local=True)

    def _banner(self, choices: Choices, resume_from: Path | None) -> None:
        cfg, world = self.cfg, self.world
        assert isinstance(cfg.micro_batch, int)
        device = processes.device_name(world.device)
        threads = (
            f", threads a rank: {torch.get_num_threads()}" if world.device.type == "cpu" else ""
        )
        compiled = (
            f"compiled by the {compile_unit(cfg, world, self.task.compiles_whole)}"
            if cfg.compile
            else "not compiled"
        )
        first = {
            "run": f"{self.folder}" + (f", resumed from {resume_from.name}" if resume_from else ""),
            "device": f"{world.size} x {world.device.type} ({device}){threads}",
            "precision": f"{cfg.precision} ({choices.precision})",
            "attention": f"{choices.attention}, {choices.repeatability}",
            "kernels": f"{cfg.kernels.replace(',', ', ')}, {compiled}"
            + (f", without {', '.join(cfg.without)}" if cfg.without else ""),
        }
        last = {
            "step": self.task.describe_step(cfg.micro_batch, world.size),
            "plan": f"steps {self.at.step} to {self.steps}, {cfg.optimizer}, {cfg.schedule} "
            f"schedule, peak lr {cfg.lr:g}"
            + (
                f", ends after {cfg.patience} evaluations without a better {self.task.best[0]}"
                if cfg.patience
                else ""
            )
            + (f", {self.flops / 1e6:,.1f} MFLOP a token" if self.flops else ""),
        }
        self.log.banner(first | self.task.describe() | last)

    # --- the loop

    def _loop_fits(self, may_shrink: bool) -> bool:
        """Run the loop; False where memory ran out in its first step and a smaller micro-batch may
        be tried."""
        first = self.at.step
        try:
            self._loop()
        except (RuntimeError, MemoryError) as error:
            in_first_step = self.at.step == first and is_out_of_memory(error)
            if not (may_shrink and in_first_step) or self.cfg.micro_batch == 1:
                raise
            release_frames(error)
            return False
        return True

    def _shrink_micro_batch(self, start: Start) -> None:
        """Begin again with the next smaller micro-batch: a compiled step may take more than the
        trial did."""
        too_large, at = self.cfg.micro_batch, self.at
        assert isinstance(too_large, int)
        whole = dataclasses.replace(self.cfg, micro_batch="auto")
        rows = self.task.rows_per_rank(whole, self.world.size)
        smaller = max(n for n in range(1, too_large) if rows % n == 0)
        self.loader.close()
        del self.model, self.double, self.step
        if self.cfg.compile:
            torch.compiler.reset()  # compiled code holds the model
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        self._build(start, smaller)
        self.at = at
        self._write_options()
        text = (
            f"the first step ran out of memory with --micro-batch {too_large}; going on with "
            f"{smaller}"
        )
        self.log.warn(text, self.at.step)

    def _loop(self) -> None:
        """Run the remaining steps, or as many as a signal leaves."""
        self._after_step()  # what an interrupted run still owed at its last step
        self.clock = time.perf_counter()
        first = self.at.step
        unread: Callable[[], None] | None = None
        with self._profiler() as profile_step:
            while not self._ends() and not self.signal:
                began = time.perf_counter()
                data = self.loader(self.at.step)
                waited = time.perf_counter() - began
                result = self.step(self.at.step, data, self._stopping)
                if unread:  # on a GPU the figures of a step are read while the next one runs
                    unread()
                    unread = None
                if result is None:
                    break
                if self.at.step == first:
                    gc.collect()
                    gc.freeze()  # what has been built stays: no collection walks it again
                self._completed()
                self.heap.after_step()
                unread = self._reader(self.at.step, result, waited)
                if self.world.device.type != "cuda" or self._is_anything_due():
                    unread()
                    unread = None
                    self._after_step()
                profile_step()

    def _stopping(self) -> int:
        """The signal that all ranks agree to stop for, 0 for none; asked before each (evaluation)
        micro-batch."""
        self.signal = self.signal or self.stop.agreed()
        return self.signal

    def _completed(self) -> None:
        self.at.step += 1
        self.at.done, self.at.best_metric = [], None

    def _reader(self, step: int, result: StepResult, waited: float) -> Callable[[], None]:
        """Start copying a step's figures to the host; the function returned waits for them and logs
        them."""
        figures = torch.stack(
            [result.loss, result.grad_norm, result.ok, *result.terms.values()]
        ).float()
        if not figures.is_cuda:
            return lambda: self._log_step(step, result, figures.tolist(), waited)
        host = torch.empty(figures.shape, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> None:
            copied.synchronize()
            self._log_step(step, result, host.tolist(), waited)

        return read

    def _log_step(self, step: int, result: StepResult, figures: list[float], waited: float) -> None:
        loss, norm, ok, *terms = figures
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        rates = {name: amount / seconds for name, amount in result.amounts.items()}
        for name, rate in rates.items():
            self.rates.setdefault(name, []).append(rate)
        self.at.tokens += result.amounts["tokens"]
        self.at.seconds += seconds
        self.at.losses = [*self.at.losses, loss][-10:]
        record = {
            "step": step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": norm,
            "tokens": int(self.at.tokens),
            **per_second(rates),
            "mfu": self._mfu(rates["tokens"]),
            "step_ms": 1e3 * seconds,
            "data_ms": 1e3 * waited,
            "memory_bytes": processes.memory_bytes(self.world.device),
        }
        if len(terms) > 1:
            record |= dict(zip(result.terms, terms, strict=True))
        a_token = statistics.median(1 / rate for rate in self.rates["tokens"][-50:])
        eta = (self.steps - step) * a_token * result.amounts["tokens"]
        shown = bool(self.cfg.log_every) and (step % self.cfg.log_every == 0 or step == self.steps)
        self.log.step(record, self.steps, eta, shown)
        self._count_skipped(step, bool(ok))

    def _count_skipped(self, step: int, ok: bool) -> None:
        self.at.skipped_in_a_row = 0 if ok else self.at.skipped_in_a_row + 1
        if ok:
            return
        self.at.skipped += 1
        self.log.warn(
            f"step {step}: loss or gradient is not finite; update skipped ({self.at.skipped} so "
            "far)",
            step,
        )
        if self.at.skipped_in_a_row == MAX_SKIPPED:
            raise RuntimeError(
                f"{MAX_SKIPPED} updates in a row were not finite, the last at step {step}; lower "
                "--lr or raise --warmup-steps, and start again from an earlier checkpoint with "
                "--resume FOLDER --out ANOTHER"
            )

    def _mfu(self, rate: float) -> float | None:
        return (
            rate * self.flops / (self.peak * self.world.size) if self.flops and self.peak else None
        )

    # --- between steps

    def _ends(self) -> bool:
        """Whether the step just done is the run's last: as planned, or because nothing got better
        for too long."""
        return self.at.step == self.steps or 0 < self.cfg.patience <= self.at.not_better

    def _due(self, every: int | None) -> bool:
        step = self.at.step
        return bool(every) and step > 0 and (step % every == 0 or self._ends())

    def _is_anything_due(self) -> bool:
        cfg = self.cfg
        periods = (cfg.eval_every, cfg.sample_every, cfg.save_every, CHECK_EVERY)
        return self._ends() or any(self._due(every) for every in periods)

    def _after_step(self) -> None:
        """Whatever is due after the step just done, unless it was done before an interruption."""
        if self._due(CHECK_EVERY):
            check_replicas(self.model, self.world)
        for kind, every, act in (
            ("eval", self.cfg.eval_every, self._evaluate),
            ("sample", self.cfg.sample_every, self._sample),
        ):
            if self._due(every) and kind not in self.at.done:
                act()
                if self.signal:
                    return
                self.at.done.append(kind)
                self.saved = (
                    None  # a checkpoint of this step, saved when a signal cut this off, lacks it
                )
        if self._due(self.cfg.save_every) and self.saved != self.at.step:
            self._save()
        self.clock = time.perf_counter()

    def _evaluate(self) -> None:
        began = time.perf_counter()
        metrics = evaluate(self.step, self._stopping)
        if metrics is None:
            return
        self.at.metrics = metrics
        best = metrics[self.task.best[0]]
        self.at.best_metric = best if math.isfinite(best) else None
        seconds = time.perf_counter() - began
        self.log.record("eval", {"step": self.at.step, **metrics, "seconds": seconds})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.log.say(f"evaluation at step {self.at.step}: {figures} ({seconds:.1f} s)")
        self._count_evaluation()

    def _count_evaluation(self) -> None:
        """Whether the evaluation just made is the best so far, and so whether the run goes on;
        alike on every rank."""
        now, (name, mode) = self.at.best_metric, self.task.best
        if now is not None and (
            self.at.best_so_far is None or is_better(now, self.at.best_so_far, mode)
        ):
            self.at.best_so_far, self.at.not_better = now, 0
            return
        self.at.not_better += 1
        if self._ends() and self.at.step < self.steps:
            self.log.record(
                "stopped_early", {"step": self.at.step, "metric": name, "best": self.at.best_so_far}
            )
            best = "" if self.at.best_so_far is None else f" than {self.at.best_so_far:.4f}"
            self.log.say(
                f"stopped early at step {self.at.step}: {self.at.not_better} evaluations without a "
                f"better {name}{best}"
            )

    def _sample(self) -> None:
        if not self.world.main:
            return
        samples = self.task.samples(self.model)
        for prompt, text in samples:
            self.log.record("sample", {"step": self.at.step, "prompt": prompt, "text": text})
            self.log.say(f"--- sample at step {self.at.step}\n{printable(prompt + text)}\n---")

    def _save(self) -> None:
        """Hand the state to the writer; rank 0 alone."""
        if not self.world.main:
            return
        meta = dataclasses.asdict(self.at) | {
            "identity": self.identity(),
            "lengths": as_json(self.lengths),
            "micro_batch": self.cfg.micro_batch,
            "world_size": self.world.size,
        }
        if not self._due(self.cfg.save_every):
            meta["best_metric"] = (
                None  # saved for a signal's sake: which model is the best may not depend on it
            )

        step = self.at.step

        def prune() -> None:
            checkpoint.prune(
                self.folder,
                step,
                self.cfg.keep,
                self.task.best[1],
                self.cfg.keep_best,
                self.log.say,
            )

        self.saver.save(self.step.state(), meta, prune)

    def _saved(self, step: int, folder: str, error: str | None = None, **facts: float) -> None:
        """Called by the writer's thread when a checkpoint stands or has failed."""
        if error:
            self.log.warn(
                f"the checkpoint of step {step} could not be written ({error}); older ones stand",
                step,
            )
            return
        self.saved = step
        self.log.record("checkpoint", {"step": step, "folder": folder, **facts})
        size, blocked, write = bytes_text(facts["bytes"]), facts["blocked_ms"], facts["write_ms"]
        self.log.say(
            f"saved {folder}: {size}, training blocked {blocked:.0f} ms, written in {write:.0f} ms"
        )

    def _export_checkpoint(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Of the copied weights, in the writer's thread."""
        load_weights(self.double, weights, self.task.is_stored, assign=True)
        self.task.export_checkpoint(self.double, folder)

    @contextlib.contextmanager
    def _profiler(self) -> Generator[Callable[[], None]]:
        """With --profile: a trace and a memory snapshot of three steps after two to warm up."""
        if not self.cfg.profile or not self.world.main:
            yield lambda: None
            return
        # else the profiler announces itself on stderr
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        cuda = self.world.device.type == "cuda"
        folder = self.folder / "profile"
        folder.mkdir(exist_ok=True)

        def write(profile: torch.profiler.profile) -> None:
            profile.export_chrome_trace(str(folder / "trace.json"))
            if cuda:
                torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            by_memory = "self_cuda_memory_usage" if cuda else "self_cpu_memory_usage"
            table = profile.key_averages(group_by_input_shape=True).table(
                sort_by=by_memory, row_limit=50
            )
            (folder / "memory.txt").write_text(table + "\n", encoding="utf-8")
            snapshot = "memory.pickle (pytorch.org/memory_viz)" if cuda else "memory.txt"
            self.log.say(
                f"profile of three steps: {folder}/trace.json (chrome://tracing), "
                f"{folder}/{snapshot}"
            )
            self.clock = time.perf_counter()  # the writing is no part of a step

        if cuda:
            torch.cuda.memory._record_memory_history()
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
        options: dict[str, Any] = dict(profile_memory=True, record_shapes=True, schedule=schedule)
        with torch.profiler.profile(on_trace_ready=write, **options) as profile:
            yield profile.step
        if profile.step_num < 5:
            self.log.warn("--profile needs five steps: two to warm up and three to record")

    # --- ending

    def _stopped(self) -> int:
        """Save the last completed step and return the exit code of the signal."""
        self._save_last()
        # torchrun kills the others soon after the first of them has left
        processes.gather(self.world, None)
        return self._say_stopped(self.signal)

    def _stopped_in_error(self, error: Exception) -> int:
        """The same, on this rank alone, where a signal came and then an error that is likely to be
        its effect."""
        self.log.stop_progress()
        if self.step.stands_at == self.at.step:
            self._save_last()
        said = next(iter(str(error).splitlines()), "")[:200]
        return self._say_stopped(self.stop.flag, f" ({type(error).__name__}: {printable(said)})")

    def _save_last(self) -> None:
        self.saver.join()
        if self.world.main and self.at.step and self.saved != self.at.step:
            self._save()
            self.saver.join()

    def _say_stopped(self, number: int, why: str = "") -> int:
        self.log.record(
            "warning", {"step": self.at.step, "text": f"stopped by signal {number}{why}"}
        )
        saved = "its checkpoint is saved" if self.saved == self.at.step else "nothing new was saved"
        self.log.say(
            f"stopped by signal {number} after step {self.at.step}{why}; {saved}; the same command "
            "resumes"
        )
        return 128 + number

    def _finish(self) -> None:
        """Write final/ and metrics.json, and say how it went; nobody leaves before rank 0 has
        written."""
        self.saver.join()
        figures = self._on_main(self._write_results)
        speeds = [
            f"{rate:,.0f} {name.replace('_', ' ')}/s" for name, rate in self._speeds().items()
        ]
        rows = {
            "validation": ", ".join(f"{k} {figures[k]:.4f}" for k in self.final_metrics)
            or "not evaluated",
            "training loss": f"{figures['train_loss']:.4f} (mean of the last {len(self.at.losses)} "
            "steps)",
            "speed": f"{', '.join(speeds)} (median)"
            if speeds
            else "not measured",  # all steps were done before
            "time": f"{time_text(self.at.seconds)} of training, {figures['tokens']:,} tokens",
            "skipped": f"{self.at.skipped} updates",
            "model": f"{self.folder}/final (step {figures['final_is_step']})",
        }
        self.log.say("\ndone")
        self.log.banner(rows)

    def _write_results(self) -> dict[str, Any]:
        """Write final/, then metrics.json, which says that the run is finished; returns what is in
        it."""
        try:
            if self.saver.error:
                raise self.saver.error
            step = self._write_final()
            figures = self._figures() | {"final_is_step": step}
            files.write_json(self.folder / checkpoint.RESULTS, finite(figures))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the end of the run could not be written ({error}); free space under "
                f"{self.folder} and type the same command again"
            ) from None
        return figures

    def _best_or_last(self) -> tuple[dict[str, Tensor], int]:
        """Weights of the best checkpoint, where it is better than the last step, else of the last;
        and their step."""
        last = dict(self.model.state_dict()), self.at.step
        self.final_metrics = self.at.metrics
        best, now = (
            next(iter(checkpoint.ranked(self.folder, self.task.best[1])), None),
            self.at.best_metric,
        )
        if best is None or (now is not None and not is_better(best[1], now, self.task.best[1])):
            return last
        reason = checkpoint.fault(best[0])
        if reason is not None:
            self.log.warn(
                f"the best checkpoint, {best[0]}, is not sound ({reason}); final/ is of the last "
                "step"
            )
            return last
        tensors, meta = checkpoint.read_state(best[0])
        self.final_metrics = meta["metrics"]
        return checkpoint.part(tensors, "model"), meta["step"]

    def _write_final(self) -> int:
        """Write final/; returns the step whose model it is."""
        weights, step = self._best_or_last()

        def fill(folder: Path) -> None:
            load_weights(self.double, dict(self.model.state_dict()) | weights, assign=True)
            self.task.export(self.double, folder)
            (folder / "README.md").write_text(
                self._card(step), encoding="utf-8", errors="backslashreplace"
            )

        checkpoint.write_folder(self.folder / "final", fill, self.log.say)
        return step

    def _figures(self) -> dict[str, Any]:
        return {
            "steps": self.at.step,
            "planned_steps": self.steps,
            "tokens": int(self.at.tokens),
            "train_loss": statistics.fmean(self.at.losses),
            **self.final_metrics,
            "eval_precision": self.step.eval_precision,
            **(per_second(self._speeds()) or {"tokens_per_second": None}),
            "seconds": self.at.seconds,
            "skipped": self.at.skipped,
            "memory_bytes": processes.memory_bytes(self.world.device),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(
                p.numel() for p in self.model.parameters() if p.requires_grad
            ),
        }

    def _speeds(self) -> dict[str, float]:
        """Median rate of each amount over the steps since this start."""
        return {name: statistics.median(rates) for name, rates in self.rates.items()}

    def _card(self, step: int) -> str:
        lines = "\n".join(f"- {name}: {value}" for name, value in self.task.describe().items())
        metrics = "\n".join(f"- {name}: {value:.4f}" for name, value in self.final_metrics.items())
        cfg, (hub_class, pipeline) = self.cfg, self.task.hub_class
        assert isinstance(cfg.micro_batch, int)
        return (
            f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags: [gpt2]\n---\n"
            f"# {self.folder.name}\n\nA GPT-2 trained by the task `{self.task.name}`, step {step} "
            f"of {self.steps}.\n\n"
            f"{lines}\n- training: {self.task.describe_step(cfg.micro_batch, self.world.size)}, "
            f"{cfg.optimizer}, {cfg.schedule} schedule, peak "
            f"rate {cfg.lr:g}, precision {cfg.precision}, seed {cfg.seed}\n\n"
            f"Evaluation of this step, in {self.step.eval_precision}:\n{metrics or '- none'}\n\n"
            f'```python\n{hub_class}.from_pretrained("{self.folder}/final")\n```\n'
        )


def release_frames(error: BaseException | None) -> None:
    """Let go of the tensors that an error's frames hold, and those of the errors that led to it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def is_better(value: float, than: float, mode: str) -> bool:
    """Of two figures of a metric whose best is its "min" or its "max"."""
    return value < than if mode == "min" else value > than


def per_second(rates: dict[str, float]) -> dict[str, float]:
    return {f"{name}_per_second": rate for name, rate in rates.items()}


@torch.no_grad()
def evaluate(step: TrainStep, stop: Callable[[], int] = lambda: 0) -> dict[str, float] | None:
    """The task's metrics over its whole validation split, exact over ranks; None where `stop()`
    said so."""
    task, model, world = step.task, step.model, step.world
    assert isinstance(step.cfg.micro_batch, int)
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    outputs: dict[int, Any] = {}
    try:
        for ids in partition(task.rows("val", 0), world.rank, world.size, step.cfg.micro_batch):
            if stop():
                return None
            if ids is None:
                continue
            counts, records = step.evaluate(task.collate("val", ids))
            outputs |= records
            # fp64 on the host's side of MPS; on the device elsewhere
            for key, value in counts.items():
                count = torch.as_tensor(
                    value, device="cpu" if world.device.type == "mps" else world.device
                )
                sums[key] = sums.get(key, 0) + count.double()
    finally:
        model.train(was_training)
    total = processes.sum_over_ranks(world, {key: float(value) for key, value in sums.items()})
    gathered = {
        row: record for part in processes.gather(world, outputs) for row, record in part.items()
    }
    return task.metrics(total, gathered)
