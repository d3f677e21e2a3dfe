"""What a finished run leaves: final/ with the best or the last model and its card, and
metrics.json."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from base import files
from base.console import time_text
from config import Resolved, UserError
from engine import processes
from engine.log import RunLog, finite
from engine.plan import describe_step
from engine.progress import Progress, is_better
from engine.rates import Rates, per_second
from engine.saving import Checkpoints
from engine.step import TrainStep, load_weights
from engine.task import Facts
from storage import checkpoint


@dataclass
class Final:
    """The model that final/ is to hold."""

    weights: dict[str, Tensor]
    step: int  # after which the model had them
    metrics: dict[str, float]  # of that step's evaluation


class Results:
    """Writes the results of a run from what the loop holds at its end."""

    def __init__(
        self,
        cfg: Resolved,
        facts: Facts,
        step: TrainStep,
        micro_batch: int,
        at: Progress,
        checkpoints: Checkpoints,
        rates: Rates,
        log: RunLog,
    ):
        self.cfg, self.facts, self.step, self.micro_batch, self.at = (
            cfg,
            facts,
            step,
            micro_batch,
            at,
        )
        self.checkpoints, self.rates, self.log = checkpoints, rates, log
        self.task, self.model, self.folder = step.task, step.model, checkpoints.run

    def write(self) -> dict[str, str]:
        """Write final/, then metrics.json, which says that the run is finished. Returns the lines
        of the closing banner."""
        try:
            if self.checkpoints.error:
                raise self.checkpoints.error
            final = self._best_or_last()
            self._write_final(final)
            figures = self._figures(final)
            files.write_json(self.folder / checkpoint.RESULTS, finite(figures))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the end of the run could not be written ({error}); free space under "
                f"{self.folder} and type the same command again"
            ) from None
        return self._banner(final, figures)

    def _best_or_last(self) -> Final:
        """The best checkpoint's model, where that is better than the last step's."""
        last = Final(dict(self.model.state_dict()), self.at.step, self.at.metrics)
        mode, now = self.task.best[1], self.at.best_metric
        best = next(iter(checkpoint.rank_by_metric(self.folder, mode)), None)
        if best is None or (now is not None and not is_better(best[1], now, mode)):
            return last
        reason = checkpoint.find_damage(best[0])
        if reason is not None:
            self.log.warn(
                f"the best checkpoint, {best[0]}, is not sound ({reason}); final/ is of the last "
                "step"
            )
            return last
        tensors, meta = checkpoint.read_state(best[0])
        return Final(checkpoint.without_prefix(tensors, "model"), meta["step"], meta["metrics"])

    def _write_final(self, final: Final) -> None:
        double = self.checkpoints.double

        def fill(folder: Path) -> None:
            load_weights(double, dict(self.model.state_dict()) | final.weights, assign=True)
            self.task.export(double, folder)
            (folder / "README.md").write_text(
                self._card(final), encoding="utf-8", errors="backslashreplace"
            )

        checkpoint.write_folder(self.folder / "final", fill, self.log.say)

    def _figures(self, final: Final) -> dict[str, Any]:
        parameters = list(self.model.parameters())
        return {
            "steps": self.at.step,
            "planned_steps": self.cfg.steps,
            "tokens": int(self.at.tokens),
            "train_loss": statistics.fmean(self.at.losses),
            **final.metrics,
            "eval_precision": self.step.eval_precision,
            **(per_second(self.rates.medians()) or {"tokens_per_second": None}),
            "seconds": self.at.seconds,
            "skipped": self.at.skipped,
            "memory_bytes": processes.memory_bytes(self.step.world.device),
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "final_is_step": final.step,
        }

    def _banner(self, final: Final, figures: dict[str, Any]) -> dict[str, str]:
        at, medians = self.at, self.rates.medians()
        metrics = [f"{name} {figures[name]:.4f}" for name in final.metrics]
        speeds = [f"{rate:,.0f} {name.replace('_', ' ')}/s" for name, rate in medians.items()]
        loss = f"{figures['train_loss']:.4f} (mean of the last {len(at.losses)} steps)"
        return {
            "validation": ", ".join(metrics) or "not evaluated",
            "training loss": loss,
            # no step was left to measure where all were done before this start
            "speed": f"{', '.join(speeds)} (median)" if speeds else "not measured",
            "time": f"{time_text(at.seconds)} of training, {figures['tokens']:,} tokens",
            "skipped": f"{at.skipped} updates",
            "model": f"{self.folder}/final (step {final.step})",
        }

    def _card(self, final: Final) -> str:
        """The model card: YAML that the hub reads, then what the model is and how to load it."""
        cfg, (hub_class, pipeline) = self.cfg, self.facts.hub_class
        lines = "\n".join(f"- {name}: {value}" for name, value in self.facts.banner.items())
        metrics = "\n".join(f"- {name}: {value:.4f}" for name, value in final.metrics.items())
        step = describe_step(self.facts, self.micro_batch, self.step.world.size)
        return (
            f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\ntags: [gpt2]\n---\n"
            f"# {self.folder.name}\n\nA GPT-2 trained by the task `{self.task.name}`, step {final.step} "
            f"of {cfg.steps}.\n\n"
            f"{lines}\n- training: {step}, {cfg.optimizer}, {cfg.schedule} schedule, peak "
            f"rate {cfg.lr:g}, precision {cfg.precision}, seed {cfg.seed}\n\n"
            f"Evaluation of this step, in {self.step.eval_precision}:\n{metrics or '- none'}\n\n"
            f'```python\n{hub_class}.from_pretrained("{self.folder}/final")\n```\n'
        )
