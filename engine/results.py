"""Writes the results of a finished run: metrics.json, and final/ with the model and its card."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from base import files
from base.console import time_text
from config import UserError
from engine import processes
from engine.log import RunLog, json_safe
from engine.plan import describe_step
from engine.progress import Progress, is_better
from engine.rates import Rates, per_second
from engine.saving import Checkpoints
from engine.step import TrainStep, load_weights
from engine.task import Facts
from storage import checkpoint


@dataclass
class Final:
    """The model that final/ will hold."""

    weights: dict[str, Tensor]
    step: int  # the step after which the model had these weights
    metrics: dict[str, float]  # from the evaluation after that step


class Results:
    """Writes the results of a run from the final state of its loop."""

    def __init__(
        self,
        facts: Facts,
        step: TrainStep,
        micro_batch: int,
        progress: Progress,
        checkpoints: Checkpoints,
        rates: Rates,
        log: RunLog,
    ):
        self.facts, self.step, self.micro_batch, self.progress = facts, step, micro_batch, progress
        self.checkpoints, self.rates, self.log = checkpoints, rates, log
        self.cfg, self.task, self.model, self.folder = (
            step.cfg,
            step.task,
            step.model,
            checkpoints.run,
        )

    def write(self) -> dict[str, str]:
        """Write final/, then metrics.json, whose existence marks the run as finished. Returns the
        lines of the closing banner."""
        try:
            if self.checkpoints.error:
                raise self.checkpoints.error
            final = self._best_or_last()
            self._write_final(final)
            figures = self._figures(final)
            files.write_json(self.folder / checkpoint.RESULTS, json_safe(figures))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the results of the run could not be written ({error}); free space under "
                f"{self.folder} and type the same command again"
            ) from None
        return self._banner(final, figures)

    def _best_or_last(self) -> Final:
        """The best checkpoint's model if it is better than the last step's, else the latter."""
        last = Final(dict(self.model.state_dict()), self.progress.step, self.progress.metrics)
        mode, now = self.task.best[1], self.progress.best_metric
        best = next(iter(checkpoint.rank_by_metric(self.folder, mode)), None)
        if best is None or (now is not None and not is_better(best[1], now, mode)):
            return last
        reason = checkpoint.find_damage(best[0])
        if reason is not None:
            self.log.warn(
                f"the best checkpoint, {best[0]}, is damaged ({reason}); final/ holds the model of "
                "the last step"
            )
            return last
        tensors, meta = checkpoint.read_state(best[0])
        return Final(checkpoint.without_prefix(tensors, "model"), meta["step"], meta["metrics"])

    def _write_final(self, final: Final) -> None:
        export_model = self.checkpoints.export_model

        def fill(folder: Path) -> None:
            load_weights(export_model, dict(self.model.state_dict()) | final.weights, assign=True)
            self.task.export(export_model, folder)
            (folder / "README.md").write_text(
                self._card(final), encoding="utf-8", errors="backslashreplace"
            )

        checkpoint.write_folder(self.folder / "final", fill, self.log.say)

    def _figures(self, final: Final) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        return {
            "steps": self.progress.step,
            "planned_steps": self.cfg.steps,
            "tokens": int(self.progress.tokens),
            "train_loss": statistics.fmean(self.progress.losses),
            **final.metrics,
            "eval_precision": self.step.eval_precision,
            **(per_second(self.rates.medians()) or {"tokens_per_second": None}),
            "seconds": self.progress.seconds,
            "skipped": self.progress.skipped,
            "memory_bytes": processes.memory_bytes(self.step.world.device),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "final_is_step": final.step,
        }

    def _banner(self, final: Final, figures: dict[str, Any]) -> dict[str, str]:
        progress, medians = self.progress, self.rates.medians()
        metrics = [f"{name} {figures[name]:.4f}" for name in final.metrics]
        speeds = [f"{rate:,.0f} {name.replace('_', ' ')}/s" for name, rate in medians.items()]
        loss = f"{figures['train_loss']:.4f} (mean of the last {len(progress.losses)} steps)"
        return {
            "validation": ", ".join(metrics) or "not evaluated",
            "training loss": loss,
            # If an earlier start had done all steps, this one has measured none.
            "speed": f"{', '.join(speeds)} (median)" if speeds else "not measured",
            "time": f"{time_text(progress.seconds)} of training, {figures['tokens']:,} tokens",
            "skipped": f"{progress.skipped} updates",
            "model": f"{self.folder}/final (step {final.step})",
        }

    def _card(self, final: Final) -> str:
        """The model card: YAML for the hub, then what the model is and how to load it."""
        cfg, (hub_class, pipeline) = self.cfg, self.facts.hub_class
        lines = "\n".join(f"- {name}: {value}" for name, value in self.facts.banner.items())
        metrics = "\n".join(f"- {name}: {value:.4f}" for name, value in final.metrics.items())
        step = describe_step(self.facts, self.micro_batch, self.step.world.size)
        return (
            f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags: [gpt2]\n---\n"
            f"# {self.folder.name}\n\n"
            f"A GPT-2 trained by the task `{self.task.name}`, step {final.step} of {cfg.steps}.\n\n"
            f"{lines}\n- training: {step}, {cfg.optimizer}, {cfg.schedule} schedule, peak "
            f"rate {cfg.lr:g}, precision {cfg.precision}, seed {cfg.seed}\n\n"
            f"Evaluation of this step, in {self.step.eval_precision}:\n{metrics or '- none'}\n\n"
            f'```python\n{hub_class}.from_pretrained("{self.folder}/final")\n```\n'
        )
