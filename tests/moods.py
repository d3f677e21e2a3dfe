"""A classification task on given rows, with one or two texts in a row and their mood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adapters.options import Pooling
from config import resolve, resolve_steps
from engine.processes import World
from given import GivenLabels
from model import GPT
from tasks.classification.options import ClassificationConfig
from tasks.classification.task import AuxiliaryTask, Classification
from tasks.description import Parts, SpecialToken, Truncatable
from text.rows import Row
from text.tokenizer import Tokenizer

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
ASK = SpecialToken("<ask>")
WORDS = [
    "the",
    "river",
    "ran",
    "under",
    "a",
    "bridge",
    "of",
    "stone",
    "and",
    "the",
    "town",
    "slept",
    "on",
    "in",
    "the",
    "rain",
]
LABELS = ("bad", "good", "so-so")


def texts_of(row: Row) -> tuple[str, ...]:
    return (row["first"], row["second"]) if row["second"] else (row["first"],)


def prompt(row: Row, form: str) -> Parts:
    return ("of", *(part for text in texts_of(row) for part in (Truncatable(text), ASK)))


def mood_task(rows: list[dict[str, str]], val: list[dict[str, str]] | None = None) -> GivenLabels:
    """The description of a task with one or two texts in a row, and their mood."""
    return GivenLabels(
        name="mood",
        config=ClassificationConfig,
        columns={"first": ("first",), "second": ("second",), "label": ("label",)},
        optional=("second",),
        toy=({"first": "a text", "label": "good"},),
        texts=texts_of,
        prompt=prompt,
        csv_header="Predicted_Mood",
        given={"rows": rows, "val": val or rows, "more": MORE},
    )


class Mood(Classification):
    """A task on given rows, with auxiliary tasks on other given rows."""

    def __init__(
        self,
        train: list[dict[str, str]],
        val: list[dict[str, str]] | None = None,
        others: Sequence[tuple[list[dict[str, str]], float]] = (),
    ):
        cfg = ClassificationConfig(data="rows", val_data="val", dropout=0.0, allow_overlap=True)
        super().__init__(
            mood_task(train, val), [AuxiliaryTask(mood_task(rows), w, cfg) for rows, w in others]
        )

    def predict(self, cfg: Any, where: str, path: Path, say: Any) -> dict[str, float]:
        return self.open_predictor(cfg, where, say).write(path, say)


def row(first: str, label: str = "good", second: str = "") -> dict[str, str]:
    return {"first": first, "second": second, "label": label}


ROWS = [
    row("stone", "bad"),
    row("the river ran under a bridge of stone", "good", "rain"),
    row("slept in the rain", "so-so"),
    row(" ".join(WORDS), "bad", " ".join(WORDS[:9])),
    row("a bridge", "good"),
    row("and on and on", "so-so", "the town slept"),
    row("town", "good", "rain"),
]
MORE = [row("rain rain", "bad"), row("stone stone", "good")]
OTHERS = [row(f"{a} {b} {a}", "yes" if a < b else "no") for a in WORDS[:4] for b in WORDS[3:6]]


def set_up(task: Mood, tokenizer: Tokenizer, /, **options: Any) -> Mood:
    """The task after `setup`, for a model from scratch without dropout."""
    fixed: dict[str, Any] = dict(
        init="scratch", preset="micro", tokenizer=tokenizer.source, precision="fp32"
    )
    fixed |= dict(
        data="rows", val_data="val", warmup_steps=0, dropout=0.0, head_dropout=0.0, show_rows=0
    )
    fixed |= dict(batch_size=4, lr=1e-3, clip=0.0, allow_overlap=True) | options
    cfg = resolve(ClassificationConfig(**fixed), "cpu")
    facts = task.setup(cfg, lambda text: None)
    assert facts.length
    task.cfg = resolve_steps(cfg, *facts.length)
    return task


def mood(tokenizer: Tokenizer, train: Any = None, val: Any = None, /, **options: Any) -> Mood:
    return set_up(Mood(train or ROWS, val), tokenizer, **options)


def of_two(tokenizer: Tokenizer, train: Any = None, others: Any = None, /, **options: Any) -> Mood:
    """A task with an auxiliary task."""
    return set_up(Mood(train or ROWS, others=[(others or OTHERS, 0.5)]), tokenizer, **options)


def model_of(task: Mood) -> GPT:
    """A model with random weights, at a scale where scores differ from row to row."""
    torch.manual_seed(1)
    model = task.build_model(task.cfg)
    assert isinstance(model, GPT)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.zero_padding()
    return model.eval()


quick = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
READS: dict[str, dict[str, Any]] = {name: dict(pooling=name) for name in get_args(Pooling)}
READS |= {"prompt": dict(form="prompt"), "word": dict(form="word")}


@torch.no_grad()
def log_p_of(task: Mood, model: GPT, tokens: np.ndarray, head: int = 0) -> np.ndarray:
    """The scores of one row alone."""
    hidden = model.hidden(torch.from_numpy(tokens)[None])
    return task.objective.scorer.log_p(model, hidden, torch.tensor([len(tokens)]), head)[0].numpy()


def exported(task: Mood, folder: Path) -> GPT:
    model = model_of(task)
    task.export(model, folder)
    return model
