"""The training loop, one for all tasks. It never looks inside a batch, a model or a loss.

A run starts from scratch or from a checkpoint and makes optimizer steps (engine/step.py). Between
steps it evaluates, samples and saves checkpoints when these are due. It ends when it is finished,
or when a signal stops it; the last completed step is then saved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.nn.attention import sdpa_kernel

from base import files
from base.console import printable
from config import Resolved, RunConfig, UserError, resolve_steps, resolved
from engine import processes
from engine.compiling import compile_model
from engine.evaluation import evaluate
from engine.failures import compiler_error, is_out_of_memory, release_frames
from engine.fit import choose_micro_batch, heap_limit, largest_divisor, out_of_memory, too_large
from engine.lengths import as_json, spans
from engine.loader import Loader
from engine.log import RunLog
from engine.loggers import TensorBoard, Wandb
from engine.memory import Heap
from engine.opening import OpenedRun, identity, open_folder, set_up
from engine.plan import Choices, banner, device_peak, disk_of, dry_run, resolve_for_machine
from engine.processes import StopSignal, World, on_main
from engine.profiler import profiled
from engine.progress import Progress
from engine.rates import Rates, per_second
from engine.results import Results
from engine.resume import MACHINE_OPTIONS, restore_options
from engine.saving import Checkpoints
from engine.start import Start
from engine.step import StepResult, TrainStep, check_replicas
from engine.step_digest import start_digests
from engine.task import Facts, Task
from storage import checkpoint
from text import tokenizer_files

MAX_SKIPPED = 10  # non-finite updates in a row that end a run
CHECK_EVERY = 100  # steps between two comparisons of the ranks' parameters


def train(task: Task, cfg: RunConfig, typed: Collection[str] | None = None) -> int:
    """Train `task` with the options `cfg`. Returns the exit code: 0, or 128 plus the number of the
    signal that stopped the run. Raises UserError for bad input.

    `typed`: the options that the user typed. A resumed run keeps its previous values of the others.
    None: all options count as typed.
    """
    cfg = restore_options(cfg, typed)
    asked = {name: getattr(cfg, name) for name in (*MACHINE_OPTIONS, "device")}
    world = processes.start(cfg.device)
    cfg = processes.gather(world, cfg)[0]  # other ranks may not see the run's folder
    log = RunLog(enabled=world.main)
    stop = StopSignal(world)
    stop.install()
    if advice := processes.restart_advice():
        log.say(advice)
    cfg, choices = resolve_for_machine(cfg, world)
    if not (facts := set_up(task, cfg, world, log.say)):
        return 0
    cfg = resolved(resolve_steps(cfg, *facts.length) if facts.length else cfg, Resolved)
    if cfg.dry_run:
        dry_run(task, facts, cfg, world, log)
        return 0
    try:
        with sdpa_kernel(choices.backends, set_priority=True), contextlib.ExitStack() as held:
            take = functools.partial(open_folder, task, facts, cfg, world, asked, held, log.say)
            opened = on_main(world, take)
            code = 0
            if not opened.start.finished:
                code = Run(RunContext(task, facts, cfg, world, stop, log), opened).train(choices)
    finally:
        log.close()
        stop.remove()
    processes.finish(world)
    return code


@dataclass(frozen=True)
class RunContext:
    """The objects that stay the same during a run."""

    task: Task
    facts: Facts
    cfg: Resolved
    world: World
    stop: StopSignal
    log: RunLog


class Run:
    """One start of a run, from the banner to the results, in a folder that it has claimed."""

    def __init__(self, context: RunContext, opened: OpenedRun):
        self.task, self.facts, self.cfg = context.task, context.facts, context.cfg
        self.world, self.stop, self.log = context.world, context.stop, context.log
        self.context, self.opened = context, opened
        self.loop = Loop(context, opened.start)
        self.folder = self.loop.folder

    def train(self, choices: Choices) -> int:
        """Run the loop and write the results. Returns the exit code."""
        self._begin(choices)
        may_shrink = self.cfg.micro_batch == "auto" and self.world.size == 1
        try:
            self.stop.defer()
            while not self._loop_fits(may_shrink):
                self._shrink_micro_batch()
            self.log.stop_progress()
            if self.loop.signal:
                return self._stopped()
            self._finish()
            return 0
        except Exception as error:
            # The signal went to the whole process group. It may have killed a child of this
            # process, a compiler for example, and so caused the error.
            if self.stop.flag:
                release_frames(error)
                raise SystemExit(self._stopped_in_error(error)) from None
            if is_out_of_memory(error) and not isinstance(error, UserError):
                release_frames(error)
                loop = self.loop
                raise out_of_memory(
                    self.task, self.facts, loop.model, self.cfg, self.world, loop.micro_batch
                ) from None
            if self.cfg.compile and (line := compiler_error(error)):
                raise line from None
            raise
        finally:
            self.loop.close()

    # --- start

    def _begin(self, choices: Choices) -> None:
        """Open the log, print the banner and the warnings, and write config.json."""
        cfg, world, log, loop, start = self.cfg, self.world, self.log, self.loop, self.opened.start
        on_main(world, self._open_log)
        log.banner(
            banner(
                self.task,
                self.facts,
                cfg,
                world,
                choices,
                loop.micro_batch,
                loop.progress.step,
                start.folder,
            )
        )
        for warning in (*((choices.fallback,) if choices.fallback else ()), *self.facts.warnings):
            log.warn(warning)
        for warning in tokenizer_files.dropout_warnings.values():  # printed already, but not logged
            log.record("warning", {"step": loop.progress.step, "text": warning})
        for note in start.notes:
            log.warn(note, loop.progress.step)
        if changed := self.opened.changes(self._options()):
            text = f"options changed since the last start: {', '.join(changed)}"
            log.warn(text, loop.progress.step)
        # Written only now that the changes are logged: the next start compares with this file.
        on_main(world, self._write_options)
        if world.main:
            final = sum(4 * p.numel() for p in loop.model.parameters())
            if shortage := disk_of(self.task, self.facts, cfg, final).shortage(self.folder):
                log.warn(shortage, loop.progress.step)
        log.start_progress(loop.steps, loop.progress.step)

    def _options(self) -> dict[str, Any]:
        """The resolved options, with the micro-batch that `auto` found."""
        return dataclasses.asdict(self.cfg) | {"micro_batch": self.loop.micro_batch}

    def _open_log(self) -> None:
        progress = self.loop.progress
        resumed_at = progress.step if self.opened.start.folder else None
        with files.writing_to("--out", self.folder):
            self.log.open(self.folder, resumed_at, tuple(progress.done))
        about = (self.folder, self._options(), self.log.warn)
        if self.cfg.wandb:
            self.log.start_logger("wandb", lambda: Wandb(*about))
        if self.cfg.tensorboard:
            self.log.start_logger("tensorboard", lambda: TensorBoard(*about, resumed_at or 0))

    def _write_options(self) -> None:
        with files.writing_to("--out", self.folder):
            files.write_json(self.folder / "config.json", self._options())

    # --- out of memory in the first step

    def _loop_fits(self, may_shrink: bool) -> bool:
        """Run the loop. Returns False if its first step ran out of memory and a smaller micro-batch
        may be tried."""
        first = self.loop.progress.step
        try:
            self.loop.run()
        except (RuntimeError, MemoryError) as error:
            in_first_step = self.loop.progress.step == first and is_out_of_memory(error)
            if not (may_shrink and in_first_step) or self.loop.micro_batch == 1:
                raise
            release_frames(error)
            return False
        return True

    def _shrink_micro_batch(self) -> None:
        """Start again with the next smaller micro-batch. A compiled step may need more memory than
        the trial that chose the first one."""
        old, rows = self.loop, self.facts.rows_per_rank(self.world.size)
        smaller = largest_divisor(rows, lambda n: n < old.micro_batch)
        old.release()
        if self.cfg.compile:
            torch.compiler.reset()  # compiled code refers to the old model
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            self.loop = Loop(self.context, self.opened.start, smaller)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_frames(error)
            raise too_large(smaller) from None
        self.loop.progress, self.loop.signal = old.progress, old.signal
        self._write_options()
        text = (
            f"the first step ran out of memory with --micro-batch {old.micro_batch}; continuing "
            f"with {smaller}"
        )
        self.log.warn(text, self.loop.progress.step)

    # --- end

    def _stopped(self) -> int:
        """Save the last completed step and return the exit code of the signal."""
        self.loop.save_last()
        # Wait for all ranks: once one exits, torchrun soon kills the others.
        processes.gather(self.world, None)
        return self._say_stopped(self.loop.signal)

    def _stopped_in_error(self, error: Exception) -> int:
        """Like `_stopped`, but on this rank only, for an error that a signal probably caused."""
        self.log.stop_progress()
        if self.loop.step.weights_step == self.loop.progress.step:
            self.loop.save_last()
        message = next(iter(str(error).splitlines()), "")[:200]
        return self._say_stopped(self.stop.flag, f" ({type(error).__name__}: {printable(message)})")

    def _say_stopped(self, number: int, why: str = "") -> int:
        step, saved = self.loop.progress.step, self.loop.checkpoints.saved
        name = signal.Signals(number).name
        self.log.record("warning", {"step": step, "text": f"stopped by {name}{why}"})
        outcome = "its checkpoint is saved" if saved == step else "nothing new was saved"
        self.log.say(
            f"stopped by {name} after step {step}{why}; {outcome}; the same command resumes"
        )
        return 128 + number

    def _finish(self) -> None:
        """Write the results on rank 0 while the other ranks wait, and print them."""
        loop = self.loop
        loop.checkpoints.join()
        results = Results(
            self.facts,
            loop.step,
            loop.micro_batch,
            loop.progress,
            loop.checkpoints,
            loop.rates,
            self.log,
        )
        rows = on_main(self.world, results.write)
        self.log.say("\ndone")
        self.log.banner(rows)


class Loop:
    """Makes the steps of a run, and what is due between them, from where the run starts."""

    def __init__(self, context: RunContext, start: Start, micro_batch: int | None = None):
        """`micro_batch`: None to choose it."""
        task, facts, cfg, world = context.task, context.facts, context.cfg, context.world
        self.task, self.facts, self.cfg = task, facts, cfg
        self.world, self.stop, self.log = world, context.stop, context.log
        self.folder, self.steps, self.lengths = Path(cfg.out), cfg.steps, start.lengths
        self.signal = 0  # the signal that all ranks agreed to stop for
        tensors, meta = checkpoint.read_state(start.folder) if start.folder else ({}, {})
        torch.manual_seed(cfg.seed)
        self.model = task.build_model(cfg)
        # A copy of the model without weights. The checkpoint writer gives it copied weights to
        # export, while training goes on changing the model's own.
        export_model = copy.deepcopy(
            self.model, {id(p): nn.Parameter(p.to("meta")) for p in self.model.parameters()}
        )
        self.model.to(world.device)
        self.micro_batch = micro_batch or choose_micro_batch(
            task, facts, self.model, cfg, world, start.micro_batch
        )
        self.heap = Heap(heap_limit(facts, cfg, world, self.micro_batch))
        if cfg.compile:
            compile_model(self.model, cfg, world, facts.cost.loss is None)
        self.step = TrainStep(task, self.model, cfg, world, facts.exact_evaluation)
        self.step.spans = spans(start.lengths)
        # The training state holds more than the progress, and an older version's holds less.
        known = {field.name for field in dataclasses.fields(Progress)}
        self.progress = Progress(**{name: value for name, value in meta.items() if name in known})
        saved = None
        if start.folder:
            saved = self.progress.step if start.folder.parent.parent.samefile(self.folder) else None
            self.step.load_state(tensors, self.progress.step)
        self.loader = Loader(task, world, self.micro_batch, self.steps)
        self.checkpoints = Checkpoints(self.folder, task, export_model, cfg, self.log, saved)
        peak = device_peak(world, cfg.precision)
        self.rates = Rates(facts.cost.flops_per_token, peak and peak * world.size)

    def close(self) -> None:
        """Stop the loader's thread and wait for the checkpoint that is being written."""
        self.loader.close()
        self.checkpoints.join()

    def release(self) -> None:
        """Free the model and the optimizer, whose memory the next loop needs."""
        self.loader.close()
        del self.model, self.step

    # --- steps

    def run(self) -> None:
        """Run the remaining steps, or stop early at a signal."""
        self._after_step()  # what an interruption left undone after the last step
        self.rates.restart_clock()
        first = self.progress.step
        unread: Callable[[], None] | None = None
        with self._profiled() as profile_step:
            while not self._ends() and not self.signal:
                began = time.perf_counter()
                data = self.loader(self.progress.step)
                waited = time.perf_counter() - began
                result = self.step(self.progress.step, data, self.stopping)
                if unread:  # on a GPU, read a step's figures while the next step runs
                    unread()
                    unread = None
                if result is None:
                    break
                if self.progress.step == first:
                    gc.collect()
                    gc.freeze()  # collections now skip everything that has been built
                self.progress.completed()
                self.heap.after_step()
                unread = functools.partial(
                    self._log_step,
                    self.progress.step,
                    result,
                    result.copy_to_host(),
                    start_digests(self.step, result, self._is_anything_due()),
                    waited,
                )
                if self.world.device.type != "cuda" or self._is_anything_due():
                    unread()
                    unread = None
                    self._after_step()
                profile_step()

    def _profiled(self) -> contextlib.AbstractContextManager[Callable[[], None]]:
        if self.cfg.profile and self.world.main:
            return profiled(self.folder, self.world.device, self.log, self.rates)
        return contextlib.nullcontext(lambda: None)

    def stopping(self) -> int:
        """The signal that all ranks agree to stop for, or 0. Every rank must ask before each
        micro-batch, of training and of evaluation."""
        self.signal = self.signal or self.stop.agreed()
        return self.signal

    def _log_step(
        self,
        step: int,
        result: StepResult,
        figures: Callable[[], list[float]],
        digests: Callable[[], dict[str, str]],
        waited: float,
    ) -> None:
        loss, grad_norm, ok, *terms = figures()
        seconds, rates = self.rates.step(result.amounts)
        tokens = result.amounts["tokens"]
        self.progress.measured(loss, tokens, seconds)
        record = {
            "step": step,
            "loss": loss,
            "lr": result.lr,
            "grad_norm": grad_norm,
            "tokens": int(self.progress.tokens),
            **per_second(rates),
            "mfu": self.rates.mfu(rates["tokens"]),
            "step_ms": 1e3 * seconds,
            "data_ms": 1e3 * waited,
            "memory_bytes": processes.memory_bytes(self.world.device),
            **digests(),
        }
        if len(terms) > 1:
            record |= dict(zip(result.terms, terms, strict=True))
        eta = self.rates.eta(self.steps - step, tokens)
        self.log.step(record, self.steps, eta, self.cfg.log_every)
        self.progress.updated(bool(ok))
        if not ok:
            self._warn_of_skipped(step)

    def _warn_of_skipped(self, step: int) -> None:
        self.log.warn(
            f"step {step}: loss or gradient is not finite; update skipped "
            f"({self.progress.skipped} so far)",
            step,
        )
        if self.progress.skipped_in_a_row == MAX_SKIPPED:
            raise RuntimeError(
                f"{MAX_SKIPPED} updates in a row were not finite, the last at step {step}; lower "
                "--lr or raise --warmup-steps, and start again from an earlier checkpoint with "
                "--resume FOLDER --out ANOTHER"
            )

    # --- between steps

    def _ends(self) -> bool:
        """Whether the last completed step ends the run, as planned or because of --patience."""
        return self.progress.step == self.steps or 0 < self.cfg.patience <= self.progress.not_better

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return bool(every) and step > 0 and (step % every == 0 or self._ends())

    def _is_anything_due(self) -> bool:
        cfg = self.cfg
        periods = (cfg.eval_every, cfg.sample_every, cfg.save_every, CHECK_EVERY)
        return self._ends() or any(self._due(every) for every in periods)

    def _after_step(self) -> None:
        """Do what is due after the completed step, except what an interrupted run had done."""
        if self._due(CHECK_EVERY):
            check_replicas(self.model, self.world)
        for kind, every, act in (
            ("eval", self.cfg.eval_every, self._evaluate),
            ("sample", self.cfg.sample_every, self._sample),
        ):
            if self._due(every) and kind not in self.progress.done:
                act()
                if self.signal:
                    return
                self.progress.done.append(kind)
                # A checkpoint that a signal had saved in the middle of this does not count it as
                # done: save this step again.
                self.checkpoints.saved = None
        if self._due(self.cfg.save_every) and self.checkpoints.saved != self.progress.step:
            self._save()
        self.rates.restart_clock()

    def _evaluate(self) -> None:
        """Evaluate, on every rank, and log the metrics and whether --patience now ends the run."""
        began = time.perf_counter()
        metrics = evaluate(self.step, self.micro_batch, self.stopping)
        if metrics is None:
            return
        progress, (name, mode) = self.progress, self.task.best
        progress.evaluated(metrics, name, mode)
        seconds = time.perf_counter() - began
        self.log.record("eval", {"step": progress.step, **metrics, "seconds": seconds})
        figures = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.log.say(f"evaluation at step {progress.step}: {figures} ({seconds:.1f} s)")
        if self._ends() and progress.step < self.steps:
            best = {"metric": name, "best": progress.best_so_far}
            self.log.record("stopped_early", {"step": progress.step} | best)
            than = "" if progress.best_so_far is None else f" than {progress.best_so_far:.4f}"
            self.log.say(
                f"stopped early at step {progress.step}: {progress.not_better} evaluations "
                f"without a better {name}{than}"
            )

    def _sample(self) -> None:
        if not self.world.main:
            return
        for prompt, text in self.task.samples(self.model):
            self.log.record("sample", {"step": self.progress.step, "prompt": prompt, "text": text})
            self.log.say(
                f"--- sample at step {self.progress.step}\n{printable(prompt + text)}\n---"
            )

    def _save(self) -> None:
        if not self.world.main:
            return
        facts = dataclasses.asdict(self.progress) | {
            "identity": identity(self.task, self.facts, self.cfg),
            "lengths": as_json(self.lengths),
            "micro_batch": self.micro_batch,
            "world_size": self.world.size,
        }
        if not self._due(self.cfg.save_every):
            # Saved only because of a signal, which must not affect the choice of the best model.
            facts["best_metric"] = None
        self.checkpoints.save(self.step.state(), facts)

    def save_last(self) -> None:
        """Save the last completed step if it is not saved yet, and wait until it is written."""
        self.checkpoints.join()
        if self.world.main and self.progress.step and self.checkpoints.saved != self.progress.step:
            self._save()
            self.checkpoints.join()
