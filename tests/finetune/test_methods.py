"""Every method and every variant of a classifier learns, and trains the parameters it should."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from adapters import layers, peft
from adapters.options import ADAPTERS, Method, Pooling
from decoding.loading import open_model
from engine.evaluation import evaluate
from engine.loader import Loader
from engine.step import TrainStep
from launch import launch, log_of
from model import GPT
from storage import hub
from support import own_lines
from tasks.finetuning import Finetuning
from text.tokenizer import load_tokenizer
from toy_runs import (
    ALONE,
    CPU,
    check_against_transformers,
    check_same_second_half,
    description_of,
    run_well,
    set_up_task,
    train_step,
)

METHODS = get_args(Method)


ONE_TERM = ("full", "soft-prompt")  # methods that train here without unlikelihood


# The other methods are stored like full or lora.
@pytest.mark.parametrize("method", ["full", "ulmfit", "lora", "prefix", "soft-prompt"])
def test_a_method_learns_stores_its_parameters_and_resumes(method: str, folder: Path) -> None:
    more = f"--init base --method {method} --steps 8 --save-every 4 --eval-every 0 --dropout 0.1"
    more += f" --lr {'2e-2' if method in ADAPTERS else '3e-3'} --schedule constant"
    more += "" if method in ONE_TERM else " --objective unlikelihood"
    more += " --prefix-width 32" if method == "prefix" else ""
    run_well("sonnets", folder, more)
    run = folder / "run"
    train = log_of(run, "train")
    nll = [line.get("nll", line["loss"]) for line in train]
    assert min(nll[-2:]) < nll[0] - 0.02, nll
    assert ("unlikelihood" in train[0]) == (method not in ONE_TERM)
    run_well("sonnets", folder, more, f"--resume {run}/checkpoints/step-00000004 --out branch")
    check_same_second_half(run, folder / "branch", 4)
    newest = run / "checkpoints" / "step-00000008"
    stored = {
        key for key in load_file(newest / "training_state.safetensors") if key.startswith("model.")
    }
    if method in ADAPTERS:
        assert hub.is_adapter(newest) and not (newest / "model.safetensors").exists()
        assert stored and not any(
            key.endswith(("c_fc.bias", "wte.weight", "ln_f.weight")) for key in stored
        )
        assert newest.joinpath("training_state.safetensors").stat().st_size < 3 * (1 << 20)
        assert hub.adapter_base(newest) == (
            str((folder / "base").resolve()),
            weights_of(folder / "base"),
        )
    else:
        assert "model.transformer.wte.weight" in stored
    unchanged = weights_of(folder / "base")
    ids = load_tokenizer(str(folder / "base")).encode("The winter wood is white")
    if method in ("prefix", "soft-prompt"):
        assert hub.is_adapter(run / "final")
        typed = ["run", "The winter", "--decode", "greedy", "--max-new-tokens", "4"]
        (end,) = launch(folder, typed, program="generate")
        assert end.code == 0 and end.out.startswith("The winter") and not own_lines(end.err), end
    else:
        check_against_transformers(run / "final", ids)
        assert weights_of(run / "final") != unchanged
    model, _ = open_model(str(newest), None, CPU, torch.float32)
    final, _ = open_model(str(run / "final"), None, CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])), final(torch.tensor([ids])), rtol=1e-4, atol=1e-4
        )


VARIANT_DEFAULTS: dict[str, Any] = dict(
    preset=None, tokenizer=None, steps=30, batch_size=8, lr=3e-3, schedule="constant"
)


TRAINED = {  # a pattern of the names that train, by method; without one, all train
    "last-layer": r"heads\..*",
    "last-k": r"heads\..*|transformer\.(h\.1|ln_f)\..*",
    "bitfit": r"heads\..*|.*\.bias",
    **dict.fromkeys(("lora", "dora"), r"heads\..*|.*\.lora_.*"),
    **dict.fromkeys(("prefix", "soft-prompt"), r"heads\..*|prefix\..*"),
}


VARIANTS: dict[str, dict[str, Any]] = {  # options, by method or by what they vary
    "full": {},
    "last-layer": dict(lr=2e-2),
    "last-k": dict(last_k=1),
    "ulmfit": dict(lr=2e-2),
    "bitfit": dict(lr=1e-2, steps=90),
    "lora": dict(lr=2e-2),
    "dora": dict(lr=2e-2),
    "prefix": dict(lr=5e-2, prefix_width=32),
    "soft-prompt": dict(lr=5e-2, steps=60),
    "llrd": dict(llrd=0.7),
    "slanted triangular": dict(schedule="slanted-triangular"),
    "prompt": dict(form="prompt"),
    "word": dict(form="word"),
    "words": dict(form="word", words=("no", "yes")),
    **{name: dict(pooling=name) for name in get_args(Pooling)},
    "an LSTM over frozen states": dict(pooling="lstm", method="last-layer"),
    "an LSTM on embeddings": dict(model="lstm", preset="micro"),
    "rdrop": dict(objective=("rdrop",), dropout=0.1),
    "simcse": dict(objective=("simcse",), dropout=0.1),
    "both": dict(objective=("rdrop", "simcse"), simcse_group=4, dropout=0.1, head_dropout=0.1),
    "rdrop of a head": dict(objective=("rdrop",), head_dropout=0.1),
    "simcse of an adapter": dict(
        objective=("simcse",), method="lora", lora_dropout=0.1, lr=1e-2, steps=60
    ),
    "two tasks": dict(also=("topics:0.5",), steps=60),
    "three": dict(also=("nli", "sentiment:2"), steps=90),
    "more rows": dict(augment="toy", augment_weight=0.5),
    "weights": dict(class_weights=("1", "3")),
    "balanced": dict(class_weights=("balanced",)),
    "smoothing": dict(label_smoothing=0.1),
}


@pytest.mark.parametrize("way", VARIANTS)
def test_a_classifier_variant_solves_the_toy_rows(way: str, inputs: Path) -> None:
    """It must also change the right parameters: the heads train under every method and could solve
    the rows without the rest."""
    options: dict[str, Any] = VARIANT_DEFAULTS | dict(init=str(inputs / "base")) | VARIANTS[way]
    if way in METHODS:
        options["method"] = way
    elif options.get("model") == "lstm":
        options |= dict(init="scratch", tokenizer=str(inputs / "tokenizer"))
    task = set_up_task("sentiment", inputs, **options)
    step = train_step(task)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    losses = train_all(step, task)
    figures = evaluate(step, 3)
    assert figures is not None and figures["val_loss"] < 0.25 < losses[0], (losses[0], figures)
    # In a model of random weights, training only biases need not separate all eight rows.
    least = 7 / 8 if way == "bitfit" else 1.0
    assert min(v for k, v in figures.items() if k.endswith("accuracy")) >= least
    assert (
        len([k for k in figures if k.endswith("accuracy")])
        == len(task.head_names)
        == 1 + len(task.cfg.also)
    )
    moved = {name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        name for name in before if re.fullmatch(TRAINED.get(task.cfg.method, ".*"), name)
    }
    assert len(step.model.heads) == (len(task.head_names) if task.cfg.form != "word" else 0)


def test_every_method_has_a_variant() -> None:
    assert {*METHODS, *get_args(Pooling)} <= VARIANTS.keys()


def train_all(step: TrainStep, task: Finetuning) -> list[float]:
    """Run all steps in this process. Returns the loss of each."""
    data = Loader(task, ALONE, 8, task.cfg.steps)
    results = [step(n, data(n)) for n in range(task.cfg.steps)]
    data.close()
    return [result.loss.item() for result in results if result is not None]


def test_a_model_that_is_built_again_starts_from_the_same_weights(inputs: Path) -> None:
    """The loop builds a second one if the first step ran out of memory."""
    task = set_up_task("sonnets", inputs, init=str(inputs / "base"), preset=None, tokenizer=None)
    first, second = (train_step(task, seed=1).model.state_dict() for _ in range(2))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def weights_of(folder: Path) -> str:
    return peft.weights_sha256(GPT.from_pretrained(folder))


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_special_tokens_train_with_an_adapter(method: str, folder: Path) -> None:
    more = f"--init base --method {method} --steps 3 --lr 1e-2 --predict toy --save-every 3"
    run_well("qa", folder, more, "--decode", "greedy")
    base = GPT.from_pretrained(folder / "base").head_weight.detach()
    model, tokenizer = open_model(str(folder / "run" / "final"), None, CPU, torch.float32)
    vocab_size = load_tokenizer(str(folder / "base")).vocab_size
    assert tokenizer.vocab_size == vocab_size + 2 == model.config.vocab_size
    assert [tokenizer.special_id(token) for token in description_of("qa").special_tokens(None)] == [
        vocab_size,
        vocab_size + 1,
    ]
    assert torch.equal(model.head_weight[:vocab_size], base[:vocab_size])
    rows = model.head_weight[vocab_size : vocab_size + 2].detach()
    # New rows start at the mean of the table, and training changed them.
    assert (rows - base[:vocab_size].mean(0)).abs().min(1).values.gt(0).all()
    assert (
        json.loads((folder / "run" / "predictions.jsonl").read_text().splitlines()[0])["prediction"]
        is not None
    )


def test_new_tokens_use_spare_rows_of_the_base(folder: Path) -> None:
    model = GPT.from_pretrained(folder / "base")
    known = load_tokenizer(str(folder / "base")).vocab_size
    layers.add_tokens(model, range(known, known + 40))  # rows without a token
    model.save_pretrained(folder / "wide")
    load_tokenizer(str(folder / "base")).save(folder / "wide")
    run_well("qa", folder, "--init wide --method lora --steps 3 --eval-rows 0 --out run")
    rows = load_file(folder / "run/checkpoints/step-00000003/adapter_model.safetensors")
    trained = next(tensor for name, tensor in rows.items() if "trainable_tokens" in name)
    both = ("wide", "run/final")
    old, new = (
        load_file(folder / name / "model.safetensors")["transformer.wte.weight"] for name in both
    )
    assert trained.shape[0] == 2 and len(new) == len(old) == known + 40
    assert (new != old).any(1).nonzero().flatten().tolist() == [known, known + 1]
