"""The contract of every task of finetune/, found by itself; every method; what a user gets
wrong."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from adapters import layers, peft
from adapters.options import ADAPTERS, Form, Method, Pooling
from config import GPTConfig, UserError, resolve, resolve_steps
from decoding.loading import open_model
from decoding.options import Decode
from engine.evaluation import evaluate
from engine.loader import Loader
from engine.processes import World
from engine.shape import open_pretrained
from engine.step import TrainStep
from finetune import task_of_labels
from launch import Ended, checkpoint_steps, die, launch, log_of, trace
from model import GPT
from storage import hub
from support import REPO, own_lines
from tasks.classification.command import as_lstm, fit_words, tasks_along
from tasks.classification.description import Labels
from tasks.classification.labels import find_labels
from tasks.classification.options import ClassificationConfig
from tasks.classification.task import Classification
from tasks.command import rehearse
from tasks.description import plain
from tasks.finetuning import Finetuning
from tasks.generation.description import Answer, Texts
from tasks.generation.task import Generation
from tasks.options import FinetuneConfig
from tasks.source import Source
from text.tokenizer import load_tokenizer
from text.tokenizer_training import train_bpe
from toy import capture_gradients, expected_gradients

CPU = torch.device("cpu")
SHARED = REPO.parent / "shared" / "data"
ALONE = World(0, 0, 1, 1, CPU)
METHODS = get_args(Method)
OPTIONS = {  # of a run on the toy rows, all of them in each step
    "preset": "micro",
    "init": "scratch",
    "tokenizer": "tokenizer",
    "precision": "fp32",
    "device": "cpu",
    "out": "run",
    "batch-size": 4,
    "micro-batch": 4,
    "schedule": "linear",
    "warmup-steps": 0,
    "weight-decay": 0,
    "sample-every": 0,
    "show-rows": 0,
    "log-every": 1000,
    "keep": 5,
}


def kind(name: str) -> Any:
    """The description of a module's task."""
    return importlib.import_module(f"finetune.{name}").TASK


def family(name: str) -> Any:
    """What trains it."""
    task = kind(name)
    return Classification(task) if isinstance(task, Labels) else Generation(task)


TASKS = sorted(file.stem for file in (REPO / "finetune").glob("*.py") if file.stem != "__init__")
GENERATION = [name for name in TASKS if isinstance(kind(name), Texts)]
CLASSIFICATION = [name for name in TASKS if isinstance(kind(name), Labels)]
# Whole runs of these take no path that a run of another task does not; tests in this process have
# what is their own.
ALIKE = ("lyrics", "paraphrase", "summarize", "text", "topics")


def words(name: str, *more: Any) -> list[str]:
    """The options of a tiny run of a task, then `more`; of an option that is there twice the later
    one counts."""
    chosen = {
        name: value for name, value in OPTIONS.items() if name != "preset" or "--init" not in more
    }
    chosen |= {"eval-rows": 0} if name in GENERATION else {}
    return [
        *(str(word) for name, value in chosen.items() for word in (f"--{name}", value)),
        *map(str, more),
    ]


def run_task(name: str, folder: Path, *more: Any, **how: Any) -> list[Ended]:
    return launch(folder, words(name, *more), program=f"finetune.{name}", **how)


def finished(name: str, folder: Path, *more: Any, **how: Any) -> Ended:
    """The first rank of a run that ends well."""
    ends = run_task(name, folder, *more, **how)
    assert [end.code for end in ends] == [0] * len(ends), ends
    return ends[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/, trained on all toy rows, and base/, a model of that vocabulary."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [text for name in TASKS for row in kind(name).toy for text in row.values()]
    tokenizer = train_bpe(texts, 400, folder / "tokenizer")
    torch.manual_seed(0)
    base = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, block_size=160, n_layer=2, n_head=2, n_embd=64)
    )
    base.save_pretrained(folder / "base", eot=tokenizer.eot)
    tokenizer.save(folder / "base")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """The same inputs and no run."""
    for name in ("tokenizer", "base"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


def set_up(
    name: str, inputs: Path, say: Callable[[str], None] = lambda text: None, **options: Any
) -> Any:
    """A task on its toy rows, in this process; without dropout, unless the test says so."""
    task = kind(name)
    fixed: dict[str, Any] = dict(
        init="scratch", preset="micro", tokenizer=str(inputs / "tokenizer"), precision="fp32"
    )
    fixed |= task.defaults | dict(
        data="toy", warmup_steps=0, lr=1e-3, steps=3, batch_size=4, dropout=0.0
    )
    fixed |= {"head_dropout": 0.0} if name in CLASSIFICATION else {}
    cfg = task.config(**fixed | options)
    trained = family(name)
    if isinstance(cfg, ClassificationConfig):
        cfg = as_lstm(cfg) if cfg.model == "lstm" else cfg
        trained = Classification(task, tasks_along(cfg, task_of_labels))
    cfg = resolve(cfg, "cpu")
    facts = trained.setup(cfg, say)
    assert facts.length
    trained.cfg = resolve_steps(cfg, *facts.length)
    return trained


def step_of(task: Finetuning, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    return TrainStep(task, task.build_model(task.cfg), task.cfg, ALONE)


# --- every task


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_one_thin_file(name: str) -> None:
    task, file = kind(name), REPO / "finetune" / f"{name}.py"
    assert task.name == name and task.toy
    assert len(file.read_text().splitlines()) <= 120
    assert f"python -m finetune.{name} " in (
        importlib.import_module(f"finetune.{name}").__doc__ or ""
    )
    options = {field.name for field in dataclasses.fields(task.config)}
    assert task.defaults.keys() <= options
    assert all(row.keys() <= task.columns.keys() for row in task.toy)


@pytest.mark.parametrize("name", TASKS)
def test_a_step_does_not_depend_on_how_its_batch_is_cut(name: str, inputs: Path) -> None:
    """Accumulation over single rows equals one batch: the loss, and every gradient, those of
    fp64."""
    task = set_up(name, inputs, clip=0.0)
    train = step_of(task)
    loss, _, expected = expected_gradients(task, train.model, 0)
    for micro_batch in (1, 3, 4):
        found = capture_gradients(train)
        result = train(0, Loader(task, ALONE, micro_batch, 1, ahead=0)(0))
        assert result is not None and result.loss.item() == pytest.approx(loss, rel=1e-5)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key].double(), gradient, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", GENERATION)
def test_every_way_of_decoding_answers_and_a_batch_as_its_rows_alone(
    name: str, inputs: Path
) -> None:
    task = set_up(name, inputs, eval_rows=2, max_new_tokens=3, beams=2, candidates=4, seq_len=128)
    model = step_of(task).model.eval()
    prompts = [task.prompt(i) for i in task.decoded]
    for decode in get_args(Decode):
        task.cfg = dataclasses.replace(task.cfg, decode=decode)
        together = task.answerer(model, prompts, task.decoded)
        alone = [
            task.answerer(model, [p], [i])[0] for p, i in zip(prompts, task.decoded, strict=True)
        ]
        assert together == alone, decode
        assert all(
            prompt == task.trunk.tokenizer.decode(ids, skip_special=True)
            for (prompt, _), ids in zip(together, prompts)
        )


@pytest.mark.parametrize("name", GENERATION)
def test_the_first_batch_is_shown_with_what_is_learned_marked(name: str, inputs: Path) -> None:
    said: list[str] = []
    task = set_up(name, inputs, said.append, show_rows=2)
    assert len(said) == 2
    for text, i in zip(said, task.order(0).reshape(-1), strict=False):
        tokens, learned = task.train.tokens[i].tolist(), task.train.learned[i]
        read, answer = (
            task.trunk.tokenizer.decode(tokens[:learned]),
            task.trunk.tokenizer.decode(tokens[learned:]),
        )
        assert text.endswith(f":\n{read}⟦{answer}⟧\n") and answer.endswith("<|endoftext|>")
        assert text.startswith(
            f"row {i} ({len(tokens)} tokens, {len(tokens) - learned} of them learned)"
        )
        assert all(str(token) in text for token in task.trunk.special)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_the_first_rows_are_shown_with_the_label_or_its_word_marked(
    name: str, inputs: Path
) -> None:
    for form in get_args(Form):
        said: list[str] = []
        other = {"words": ("alpha", "beta", "gamma")} if (name, form) == ("topics", "word") else {}
        task = set_up(name, inputs, said.append, show_rows=2, form=form, **other)
        names = (
            (other.get("words") or task.description.words(task.info.labels))
            if form == "word"
            else task.info.labels
        )
        assert len(said) == 2 and len(set(names)) == len(task.info.labels)
        for text, i in zip(said, task.rows("train", 0).reshape(-1), strict=False):
            ids, row = task.train.tokens[i].tolist(), task.train.rows[i]
            read, answer = (
                task.trunk.tokenizer.decode(ids),
                names[task.info.labels.index(row["label"])],
            )
            assert text == f"row {i} ({len(ids)} tokens):\n{read}⟦{answer}⟧\n"
            assert all(part in read for part in task.description.texts(row))
            assert form != "plain" or "".join(
                task.description.texts(row)
            ) == task.trunk.tokenizer.decode(ids, skip_special=True)
            assert all(str(token) in text for token in task.trunk.special)
    assert bool(task.trunk.special) == (name == "nli")


@pytest.mark.parametrize("name", GENERATION)
def test_figures_of_an_evaluation(name: str, inputs: Path) -> None:
    """The loss by a loop over rows and positions, the scores from all answers at once, at any
    micro-batch."""
    task = set_up(name, inputs, decode="greedy", max_new_tokens=5, eval_rows=2)
    step = step_of(task)
    exact, nll, tokens = step.model.double().eval(), 0.0, 0
    for ids, learned in zip(task.val.tokens, task.val.learned, strict=True):
        log_p = torch.log_softmax(exact(torch.from_numpy(ids[None, :-1]))[0].double(), -1)
        nll -= sum(float(log_p[t - 1, ids[t]].detach()) for t in range(learned, len(ids)))
        tokens += len(ids) - learned
    model = step.model.float()
    answers = task.answerer(model, [task.prompt(i) for i in task.decoded], task.decoded)
    found = [Answer(*a, task.val.references[i]) for a, i in zip(answers, task.decoded, strict=True)]
    expected = {
        "val_loss": nll / tokens,
        "val_perplexity": math.exp(nll / tokens),
    } | task.description.scores(found, task.train.rows)
    for micro_batch in (1, 4):
        assert evaluate(step, micro_batch) == pytest.approx(expected, rel=1e-4)
    assert task.best[0] in expected


LINE = "and on the night the sun will stay"
HAND: dict[str, tuple[list[Answer], dict[str, float]]] = {
    "lyrics": (
        [Answer("p", "la la la la la", ""), Answer("p", "one two three", "")],
        {
            "distinct_1": (1 / 5 + 1) / 2,
            "distinct_2": (1 / 4 + 1) / 2,
            "repetition": (1 / 2 + 0) / 2,
        },
    ),
    "sonnets": (  # the same end in all eleven lines: a word does not rhyme with itself
        [Answer(f"{LINE}\n" * 3, f"{LINE}\n" * 11, f"{LINE}\n" * 11)],
        {
            "chrf": 100,
            "chrf_poem": 100,
            "distinct_1": 7 / 88,
            "distinct_2": 8 / 87,
            "repetition": 77 / 85,
            "rhyming_accuracy": 0,
            "rhyming_coverage": 1,
            "lines_right": 1,
        },
    ),
    "summarize": (
        [Answer("p", "sat the cat", "the cat sat"), Answer("p", "", "a")],
        {"rouge_1": 100 / 2, "rouge_2": 50 / 2, "rouge_l": 200 / 3 / 2},
    ),
    "qa": (
        [Answer("p", "The red house.", "a house\nred house"), Answer("p", "in May 1871", "1871")],
        {"exact_match": 50, "f1": (100 + 50) / 2},
    ),
    "text": ([Answer("p", "any", "")], {}),
}


@pytest.mark.parametrize("name", HAND)
def test_scores_are_those_worked_out_by_hand(name: str) -> None:
    answers, expected = HAND[name]
    assert kind(name).scores(answers, []) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in GENERATION if name not in ALIKE])
def test_a_run_learns_its_rows_answers_them_and_resumes(name: str, folder: Path) -> None:
    more = (
        "--steps",
        60,
        "--lr",
        "5e-3",
        "--eval-every",
        100,
        "--save-every",
        30,
        "--decode",
        "greedy",
        "--micro-batch",
        "auto",
    )
    end = finished(name, folder, *more, "--predict", "toy", "--answers", "answers")
    run = folder / "run"
    losses = [line["loss"] for line in log_of(run, "train")]
    assert len(losses) == 60 and losses[0] > 4 and losses[-1] < 0.1, (name, losses[-1])
    (evaluation,) = log_of(run, "eval")
    assert evaluation["step"] == 60 and evaluation["val_loss"] < 0.1
    left_by_a_run(run, [30, 60])
    agrees_with_transformers(
        run / "final", load_tokenizer(str(run / "final")).encode("the town council met")
    )
    gives_back_the_toy_answers(
        set_up(name, folder, decode="greedy", max_new_tokens=150), run / "final"
    )
    assert "answers to toy: answers" in end.out
    more = (*more, "--data", "toy")
    finished(
        name,
        folder,
        "--init",
        "run",
        "--epochs",
        0,
        *more[4:],
        "--predict",
        "toy",
        "--answers",
        "again",
    )
    assert (folder / "answers").read_bytes() == (folder / "again").read_bytes()
    finished(
        name, folder, *more, "--resume", run / "checkpoints" / "step-00000030", "--out", "branch"
    )
    same_second_half(run, folder / "branch", 30)


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION if name not in ALIKE])
def test_a_run_learns_its_labels_predicts_them_and_resumes(name: str, folder: Path) -> None:
    more = (
        "--steps",
        40,
        "--lr",
        "5e-3",
        "--eval-every",
        100,
        "--save-every",
        20,
        "--micro-batch",
        4,
    )
    finished(name, folder, *more, "--predict", "toy", "--answers", "answers.jsonl")
    run = folder / "run"
    losses = [line["loss"] for line in log_of(run, "train")]
    (evaluation,) = log_of(run, "eval")
    assert len(losses) == 40 and losses[0] > 0.5 and losses[-1] < 0.1, (name, losses[-1])
    assert evaluation["step"] == 40 and evaluation["accuracy"] == evaluation["macro_f1"] == 1
    assert 0 < evaluation["val_loss"] < 0.1 and 0 < evaluation["calibration_error"] < 0.1
    left_by_a_run(run, [20, 40])
    task = set_up(name, folder)
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["prediction"] for answer in answers] == [answer["label"] for answer in answers]
    assert [
        {k: answer[k] for k in row}
        for answer, row in zip(answers, task.description.toy, strict=True)
    ] == list(task.description.toy)
    for suffix in (".jsonl", ".csv"):  # the toy rows are those to validate on, too
        assert (folder / f"answers{suffix}").read_bytes() == (
            run / f"validation{suffix}"
        ).read_bytes()
    answered, validated = (
        json.loads((at / f"{what}.report.json").read_text())
        for at, what in ((folder, "answers"), (run, "validation"))
    )
    assert validated == answered | {"step": 40}
    scores = json.loads((folder / "answers.scores.json").read_text())
    assert scores["accuracy"] == 1 and scores["calibration_error"] == pytest.approx(
        evaluation["calibration_error"], rel=1e-4
    )
    finished(
        name, folder, *more, "--resume", run / "checkpoints" / "step-00000020", "--out", "branch"
    )
    same_second_half(run, folder / "branch", 20)


def left_by_a_run(run: Path, steps: list[int]) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["batch_size"] == 4 and config["steps"] == steps[-1] and config["micro_batch"] == 4
    assert checkpoint_steps(run) == steps
    figures = json.loads((run / "metrics.json").read_text())
    assert (
        figures["steps"] == steps[-1]
        and figures["final_is_step"] in steps
        and "val_loss" in figures
    )
    assert (run / "final" / "README.md").exists() and (run / "final" / "tokenizer.json").exists()


def agrees_with_transformers(final: Path, ids: list[int]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(
            GPT.from_pretrained(final).eval()(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4
        )
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert (
        tokenizer.encode(tokenizer.decode(ids)) == ids
        and len(tokenizer) == theirs.config.vocab_size
    )


def gives_back_the_toy_answers(task: Any, final: Path) -> None:
    """Greedy decoding from each toy prompt; where several rows have one prompt, one of their
    answers."""
    model, _ = open_model(str(final), None, CPU, torch.float32)
    rows = range(len(task.description.toy))
    prompts = [task.prompt(i) for i in rows]
    true: dict[tuple[int, ...], set[str]] = {}
    for i in rows:
        true.setdefault(tuple(prompts[i]), set()).add(
            plain(task.description.ask(task.val.rows[i], task.cfg).answer)
        )
    for prompt, (_, text) in zip(prompts, task.answerer(model, prompts, rows), strict=True):
        assert text in true[tuple(prompt)], text


def same_second_half(run: Path, branch: Path, step: int) -> None:
    """Every figure after `step`, and the bits of the last checkpoint and of final/."""
    whole, second = log_of(run, "train"), log_of(branch, "train")
    for key in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert [line[key] for line in second] == [
            line[key] for line in whole if line["step"] > step
        ]
    last = max((run / "checkpoints").glob("step-*")) / "training_state.safetensors"
    files = [file.relative_to(run) for file in (last, *(run / "final").glob("*.safetensors"))]
    assert len(files) > 1
    for file in files:
        assert (branch / file).read_bytes() == (run / file).read_bytes(), file


def test_ranks_kills_and_warnings(folder: Path) -> None:
    """On rows that are broken, cut and left out: two ranks as one, and killed as not; all is told
    in the log."""
    rows = [{"context": f"{n} " * 5 * n, "question": "?", "answer": f"{n}"} for n in range(1, 9)]
    rows += [
        {"context": "", "question": "?", "answer": "."},
        {"context": "a", "question": "?", "answer": "so " * 60},
    ]
    (folder / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "{not json"]))
    more = (
        "--data",
        "rows.jsonl",
        "--val-data",
        "rows.jsonl",
        "--seq-len",
        48,
        "--steps",
        6,
        "--save-every",
        2,
    )
    more += (
        "--eval-every",
        3,
        "--eval-rows",
        3,
        "--max-new-tokens",
        4,
        "--batch-size",
        5,
        "--micro-batch",
        1,
    )
    finished("qa", folder, *more)
    finished("qa", folder, *more, "--out", "on2", ranks=2)
    (end,) = run_task(
        "qa", folder, *more, "--out", "killed", patch=functools.partial(die, "micro-batch", 17)
    )
    assert end.code == -signal.SIGKILL
    finished("qa", folder, *more, "--out", "killed")
    assert trace(folder / "killed") == trace(folder / "run")
    for what, keys in (("train", ("loss", "tokens")), ("eval", ("val_loss", "f1"))):
        one, two = log_of(folder / "run", what), log_of(folder / "on2", what)
        for key in keys:
            assert [x[key] for x in two] == pytest.approx([x[key] for x in one], rel=1e-5), key
    weights = [load_file(folder / name / "final" / "model.safetensors") for name in ("run", "on2")]
    for key in ("transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"):
        torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-3, atol=1e-5)
    told = [line["text"] for line in log_of(folder / "on2", "warning")]
    assert (
        sum(text == "rows.jsonl: 2 rows could not be read and are left out" for text in told) == 2
    )
    for what in ("training", "validation"):
        assert (
            f"1 of 9 {what} rows are longer than 48 tokens and cannot be cut to fit and are left "
            "out" in told
        )
        assert any(
            f"{what} rows are longer than 48 tokens and are cut at the end" in text for text in told
        )


ALIKE = ("--steps", 5, "--eval-every", 2, "--save-every", 0, "--lr", "1e-3", "--micro-batch", 2)
# tasks and options; a share of dropout that is nothing lets two passes be, and be the same
ON_TWO_RANKS = {
    "sentiment": (
        "--also",
        "topics:0.5",
        "--objective",
        "rdrop",
        "simcse",
        "--simcse-group",
        2,
        "--batch-size",
        6,
        "--class-weights",
        1,
        2,
        "--dropout",
        "1e-12",
        "--head-dropout",
        0,
    ),
    "nli": (
        "--form",
        "word",
        "--batch-size",
        5,
        "--label-smoothing",
        "0.1",
        "--dropout",
        0,
        "--head-dropout",
        0,
    ),
}

COMPARED = {
    "train": ("loss", "tokens", "nll", "topics", "rdrop", "simcse"),
    "eval": (
        "val_loss",
        "accuracy",
        "macro_f1",
        "calibration_error",
        "topics_val_loss",
        "topics_accuracy",
    ),
}


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_classify_as_one(name: str, folder: Path) -> None:
    for out, ranks in (("run", 1), ("on2", 2)):
        finished(name, folder, *ALIKE, *ON_TWO_RANKS[name], "--out", out, ranks=ranks)
    one, two = folder / "run", folder / "on2"
    for what, keys in COMPARED.items():
        first, second = (
            [{k: v for k, v in line.items() if k in keys} for line in log_of(run, what)]
            for run in (one, two)
        )
        for expected, found in zip(first, second, strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert name != "sentiment" or {key for line in first for key in line} == set(keys)
    for file in (file.name for file in (one / "final").glob("*.safetensors")):
        expected = load_file(one / "final" / file)
        for key, tensor in load_file(two / "final" / file).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-5, msg=key)
    predicted = [
        [json.loads(line)["prediction"] for line in (run / "validation.jsonl").open()]
        for run in (one, two)
    ]
    assert predicted[0] == predicted[1] and len(predicted[0]) == len(kind(name).toy)


def test_a_program_of_its_own(run: Any, folder: Path) -> None:
    """As a user starts it; and --help names the task's own options."""
    done = run("-m", "finetune.qa", *words("qa", "--steps", 2, "--eval-every", 0), cwd=folder)
    assert done.returncode == 0 and (folder / "run" / "final" / "model.safetensors").exists(), (
        done.stderr
    )
    (end,) = launch(folder, ["--help"], program="finetune.lyrics")
    assert end.code == 0 and "--with-title" in end.out and "--text-column" in end.out, end


# --- what each task makes of its files


def rows_of(
    name: str, inputs: Path, file: Path, text: str, **options: Any
) -> tuple[Any, list[dict[str, str]]]:
    """A task set up on a file of this text, and all of its rows."""
    file.write_text(text)
    task = set_up(name, inputs, data=str(file), **options)
    return task, [row.fields for row in task.source.read(str(file), "validation")]


def test_questions_are_read_nested_or_flat(inputs: Path, tmp_path: Path) -> None:
    answers = [{"text": text, "answer_start": 0} for text in ("two men", "men", "two men")]
    asked: list[dict[str, Any]] = [
        {"id": "a", "question": "who", "answers": answers},
        {"id": "b", "question": "why", "answers": answers[1:2]},
        {"id": "c", "question": "what", "answers": [], "is_impossible": True},
    ]
    data = {"data": [{"paragraphs": [{"context": f"{n} two men", "qas": asked} for n in range(5)]}]}
    task, rows = rows_of("qa", inputs, tmp_path / "squad.json", json.dumps(data))
    told = f"{tmp_path / 'squad.json'}: 5 rows could not be read and are left out"
    first = {
        "context": "0 two men",
        "question": "who",
        "answer": "two men",
        "answers": "two men\nmen",
        "id": "a",
    }
    assert rows[0] == first and len(rows) == 10 and rows[1]["answers"] == "men"
    assert task.source.warnings[0] == told
    assert {row["context"] for row in task.train.rows}.isdisjoint(
        row["context"] for row in task.val.rows
    )
    assert task.val.references[0] == "two men\nmen"
    flat = "passage,question,answer\n" + "".join(f"p{n},q,a\n" for n in range(3))
    _, rows = rows_of("qa", inputs, tmp_path / "flat.csv", flat)
    assert rows[0] == {"context": "p0", "question": "q", "answer": "a", "answers": "", "id": ""}
    _, rows = rows_of(
        "qa", inputs, tmp_path / "list.json", json.dumps([first, first | {"context": "1"}])
    )
    assert rows[0] == first


def test_an_answer_that_is_cut_off_is_counted(inputs: Path, tmp_path: Path) -> None:
    rows = [
        {"context": "far " * 40 + end, "question": "?", "answer": "here"}
        for end in ("here", "there", "")
    ]
    text = "\n".join(json.dumps(row) for row in rows)
    for seq_len, lost in ((30, 2), (150, 0)):
        task, _ = rows_of(
            "qa", inputs, tmp_path / "cut.jsonl", text, val_data="toy", seq_len=seq_len
        )
        assert any(
            "rows lose their answer where it is cut off" in text for text in task.source.warnings
        ) == bool(lost)
        assert not lost or task.source.warnings[1].startswith("2 of 3 ")


def test_a_song_begins_with_its_title_or_its_first_line(inputs: Path, tmp_path: Path) -> None:
    songs = 'artist,song,text\nAda,Ferry,"\none\ntwo\n"\n,Tide,only\nBob,,three\n'
    parts = {
        False: [("one", "\ntwo"), ("only", ""), ("three", "")],
        True: [("Ferry, by Ada", "\n\none\ntwo"), ("Tide", "\n\nonly"), ("three", "")],
    }
    for with_title, expected in parts.items():
        task, _ = rows_of("lyrics", inputs, tmp_path / "songs.csv", songs, with_title=with_title)
        about, cfg = task.description, task.cfg
        rows = task.source.read(str(tmp_path / "songs.csv"), "train")
        found = [about.ask(row, cfg) for row in rows]
        assert [("".join(q.prompt), "".join(q.answer)) for q in found] == expected
        assert ["".join(about.example(row, cfg).answer) for row in rows] == [
            a + b for a, b in expected
        ]
    (tmp_path / "titles.csv").write_text("song,artist\nDawn,Cy\n")
    (row,) = task.source.read(str(tmp_path / "titles.csv"), "test")
    assert task.description.predict(row, task.cfg).prompt == ("Dawn, by Cy",)


def test_a_text_is_documents_lines_or_parts_of_one(inputs: Path, tmp_path: Path) -> None:
    lines = [f"line {n} of it\n" for n in range(25)]
    task, (document,) = rows_of("text", inputs, tmp_path / "one.txt", "".join(lines))
    assert document == {"text": "".join(lines)}
    assert "".join(
        row["text"] for row in task.source.read(str(tmp_path / "one.txt"), "train")
    ) == "".join(lines)
    assert {row["text"] for row in task.val.rows}.isdisjoint(row["text"] for row in task.train.rows)
    _, rows = rows_of("text", inputs, tmp_path / "one.txt", "".join(lines), lines=True)
    assert [row["text"] + "\n" for row in rows] == lines
    _, rows = rows_of(
        "text", inputs, tmp_path / "reviews.tsv", "id\tdocument\tlabel\n1\t좋아요\t1\n2\t별로\t0\n"
    )
    assert [row["text"] for row in rows] == ["좋아요", "별로"]


def test_rows_to_predict_need_no_answer(inputs: Path, tmp_path: Path) -> None:
    for name, text in (("summarize", "article\nsome news\n"), ("qa", "context,question\na,b\n")):
        (tmp_path / "asked.csv").write_text(text)
        source, about = reader(name), kind(name)
        (row,) = source.read(str(tmp_path / "asked.csv"), "test")
        asked = about.predict(row, source.cfg)
        assert not asked.true_answer and asked.prompt == about.example(row, source.cfg).prompt
        with pytest.raises(UserError, match=r"has no column '(summary|answer)'"):
            source.read(str(tmp_path / "asked.csv"), "train")


def test_sonnets_are_read_and_written_in_the_format_of_the_course(
    inputs: Path, tmp_path: Path
) -> None:
    poems = [
        [f"{n} the line {i}" for i in range(lines)] for n, lines in ((7, 14), (99, 15), (126, 12))
    ]
    text = "A header\r\nof an edition\r\n\r\n"
    text += "".join(
        f"\r\n{n}\r\n\r\n" + "\r\n".join(poem) + "\r\n\r\n"
        for n, poem in zip((7, 99, 126), poems, strict=True)
    )
    task, rows = rows_of("sonnets", inputs, tmp_path / "poems.txt", text)
    assert [row["number"] for row in rows] == ["7", "99", "126"]
    assert [row["text"].split("\n") for row in rows] == poems
    asked = task.source.read(str(tmp_path / "poems.txt"), "test")
    examples = [task.description.predict(row, task.cfg) for row in asked]
    assert ["".join(each.prompt) for each in examples] == [
        "\n".join(poem[:3]) + "\n" for poem in poems
    ]
    assert task.description.stop_lines == 11
    answers = [Answer("".join(each.prompt), each.true_answer, "") for each in examples]
    task.description.write(tmp_path / "written.txt", asked, answers)
    _, again = rows_of(
        "sonnets", inputs, tmp_path / "again.txt", (tmp_path / "written.txt").read_text()
    )
    assert again == rows


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_an_adapter_and_its_head_resume_and_predict_from_a_checkpoint(
    method: str, folder: Path
) -> None:
    more = (
        "--init",
        "base",
        "--method",
        method,
        "--pooling",
        "attention",
        "--steps",
        4,
        "--save-every",
        2,
        "--lr",
        "1e-2",
    )
    more += ("--eval-every", 0, "--micro-batch", 4)
    finished("topics", folder, *more)
    run, newest = folder / "run", folder / "run" / "checkpoints" / "step-00000004"
    finished(
        "topics",
        folder,
        *more,
        "--resume",
        run / "checkpoints" / "step-00000002",
        "--out",
        "branch",
    )
    same_second_half(run, folder / "branch", 2)
    assert hub.is_adapter(newest) and not (newest / "model.safetensors").exists()
    state = load_file(newest / "training_state.safetensors")
    stored = {key for key in state if key.startswith("model.")}
    assert {"model.heads.topics.weight", "model.heads.topics.query"} < stored
    assert all(".lora_" in key or "prefix." in key for key in stored if "heads." not in key)
    (folder / "asked.csv").write_text(
        "title,text\n" + "".join(f"{row['title']},{row['text']}\n" for row in kind("topics").toy)
    )
    finished(
        "topics",
        folder,
        "--init",
        newest,
        "--epochs",
        0,
        "--predict",
        "asked.csv",
        "--answers",
        "answers.jsonl",
    )
    files = (run / "validation.jsonl", folder / "answers.jsonl")
    expected, found = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in files
    )
    for one, other in zip(expected, found, strict=True):
        assert other["text"] == one["text"] and not other["label"]
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-5)
    assert not (folder / "answers.scores.json").exists()


def test_an_lstm_of_a_finished_run_answers_rows_as_the_run_itself_does(
    inputs: Path, folder: Path
) -> None:
    """Its own --model names no file to read: --init alone says what it is."""
    words = (
        "--model",
        "lstm",
        "--init",
        "base",
        "--steps",
        3,
        "--lr",
        "1e-2",
        "--micro-batch",
        4,
        "--predict",
        "toy",
    )
    finished("sentiment", folder, *words, "--answers", "answers.jsonl")
    for model in (("--model", "lstm"), ()):
        again = (
            "--init",
            "run",
            *model,
            "--epochs",
            0,
            "--predict",
            "toy",
            "--answers",
            "again.jsonl",
            "--out",
            "other",
        )
        finished("sentiment", folder, *again)
        one, other = (
            [json.loads(line) for line in (folder / name).read_text().splitlines()]
            for name in ("answers.jsonl", "again.jsonl")
        )
        assert [row["prediction"] for row in one] == [row["prediction"] for row in other] and len(
            one
        ) == 8
        for a, b in zip(one, other, strict=True):
            assert b["probabilities"] == pytest.approx(a["probabilities"], abs=1e-5)


def reader(name: str, say: Any = print, **options: Any) -> Source:
    """Reads the files of a task."""
    task = kind(name)
    return Source(task, task.config(init="scratch", **options), say)


LABELLED = [  # a task, a file, its first lines; what is read of the first row: texts, label, id
    (
        "sentiment",
        "sst.csv",
        "\tid\tsentence\tsentiment\n0\tf4a\t It 's a \"film .\t3\n",
        ("It 's a \"film .",),
        "3",
        "f4a",
    ),
    (
        "sentiment",
        "nsmc.txt",
        "id\tdocument\tlabel\n97\t좋아요, 또\t1\n",
        ("좋아요, 또",),
        "1",
        "97",
    ),
    ("sentiment", "stars.jsonl", '{"review": "fine", "stars": 4.0}\n', ("fine",), "4.0", ""),
    (
        "paraphrase",
        "quora.csv",
        '\tid\tsentence1\tsentence2\tis_duplicate\n1\ta\tWhy?\t"How, so?"\t1.0\n',
        ("Why?", "How, so?"),
        "1.0",
        "a",
    ),
    (
        "paraphrase",
        "mrpc.tsv",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t7\t8\t"A" said so\tSo "A\n',
        ('"A" said so', 'So "A'),
        "0",
        "",
    ),
    (
        "nli",
        "rte.tsv",
        "sentence1\tsentence2\tlabel\tidx\nIt rained.\tIt is wet.\t1\t5\n",
        ("It rained.", "It is wet."),
        "1",
        "5",
    ),
    (
        "nli",
        "sick.tsv",
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n2\tA b\tA "
        "c\t3.6\tNEUTRAL\n",
        ("A b", "A c"),
        "NEUTRAL",
        "2",
    ),
    (
        "nli",
        "xnli.tsv",
        "sentence1\tsentence2\tgold_label\n눈이 왔다.\t춥다.\tneutral\n",
        ("눈이 왔다.", "춥다."),
        "neutral",
        "",
    ),
    (
        "topics",
        "ag.csv",
        'label,title,description\n3,"Cup, won","A ""late"" goal."\n',
        ('Cup, won\nA "late" goal.',),
        "3",
        "",
    ),
    (
        "topics",
        "news.json",
        '{"category": "WELLNESS", "headline": "Sleep", "short_description": "", "authors": "A"}\n',
        ("Sleep",),
        "WELLNESS",
        "",
    ),
]


@pytest.mark.parametrize("case", LABELLED, ids=lambda case: case[1])
def test_labelled_files_are_read_as_they_come(case: Any, tmp_path: Path) -> None:
    name, file, text, texts, label, id = case
    (tmp_path / file).write_text(text)
    (row,) = reader(name).read(str(tmp_path / file), "train")
    assert kind(name).texts(row) == texts and (row["label"], row["id"]) == (label, id)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_a_label_of_minus_one_is_unknown_in_every_task(name: str, tmp_path: Path) -> None:
    fields = {field: names[0] for field, names in kind(name).columns.items() if field != "id"}
    cells = ["0", "1", "-1", " -1.0 ", "?", "-", "NaN", "1"]
    lines = ["\t".join(fields.values())]
    lines += [
        "\t".join(cell if field == "label" else f"{field} {n}" for field in fields)
        for n, cell in enumerate(cells)
    ]
    (tmp_path / "rows.tsv").write_text("\n".join(lines) + "\n")
    for split in ("train", "validation"):
        source = reader(name)
        found = [row["label"] for row in source.read(str(tmp_path / "rows.tsv"), split)]
        assert found == ["0", "1", "1"]
        (warning,) = source.warnings
        assert warning.startswith(
            f"5 of 8 rows of {tmp_path}/rows.tsv have no known label ('-', '-1', '-1.0', '?', "
            "'NaN')"
        )
    asked = reader(name).read(str(tmp_path / "rows.tsv"), "test")
    assert [row["label"] for row in asked] == ["0", "1", "", "", "", "", "", "1"]
    (tmp_path / "none.tsv").write_text("\n".join([lines[0], lines[3]]) + "\n")
    with pytest.raises(UserError, match=r"1 of 1 rows of .* have no known label"):
        reader(name).read(str(tmp_path / "none.tsv"), "validation")


def test_one_checkpoint_has_one_accuracy_on_every_path(folder: Path) -> None:
    """Training in bf16 with the best step not the last: the loop, the report and --predict agree to
    the last bit."""
    rows = "".join(
        f"{i},{a} {b} {i % 7},{(i * 7) % 3}\n"
        for i, (a, b) in enumerate([("good", "film"), ("dull", "play")] * 20)
    )
    (folder / "rows.csv").write_text("id,text,label\n" + rows)
    (folder / "val.csv").write_text("id,text,label\n" + rows.replace("film", "song"))
    finished(
        "sentiment",
        folder,
        "--data",
        "rows.csv",
        "--val-data",
        "val.csv",
        "--predict",
        "val.csv",
        "--epochs",
        4,
        "--precision",
        "bf16",
        "--lr",
        3e-3,
        "--allow-overlap",
        "--seq-len",
        5,
    )
    run = folder / "run"
    metrics, report, scores = (
        json.loads((run / name).read_text())
        for name in ("metrics.json", "validation.report.json", "predictions.scores.json")
    )
    names = ("accuracy", "macro_f1", "calibration_error")
    assert [metrics[n] for n in names] == [report[n] for n in names] == [scores[n] for n in names]
    assert {file["eval_precision"] for file in (metrics, report, scores)} == {"fp32"}
    assert json.loads((run / "config.json").read_text())["precision"] == "bf16"
    assert report["step"] == metrics["final_is_step"]
    (line,) = [line for line in log_of(run, "eval") if line["step"] == report["step"]]
    assert [line[n] for n in names] == pytest.approx([report[n] for n in names], abs=1e-5)
    assert metrics["val_loss"] == line["val_loss"]
    # A later command, which says nothing of --seq-len, answers as the run itself did.
    finished(
        "sentiment",
        folder,
        "--init",
        "run",
        "--epochs",
        0,
        "--predict",
        "val.csv",
        "--answers",
        "again.csv",
        "--out",
        "other",
    )
    assert (folder / "again.jsonl").read_bytes() == (run / "predictions.jsonl").read_bytes()


TORN = {  # rows of which some cannot be read: the ids and whether each is answered
    "rows.csv": (
        "id,text\n7,good\n8,\n9\n9,dull, and long\n,fine\n",
        ["7", "8", "9", "9", ""],
        [1, 1, 1, 0, 1],
    ),
    "rows.tsv": ("text\tid\ngood\tx\na\tb\ty\n\tz\n", ["x", "y", "z"], [1, 0, 1]),
    "rows.jsonl": (
        '{"id": 1, "text": "a"}\n{"id": 2, "te\n{"id": 3, "text": ["a"]}\n{"id": 4, '
        '"text": null}\n{"id": 5}\n',
        ["1", "", "3", "4", "5"],
        [1, 0, 0, 1, 1],
    ),
    "rows.json": ('[{"text": "a"}, 3, {"text": ""}]', ["", "", ""], [1, 0, 1]),
}


@pytest.mark.parametrize("file", TORN)
def test_every_row_to_predict_keeps_its_place(file: str, tmp_path: Path) -> None:
    text, ids, answered = TORN[file]
    (tmp_path / file).write_text(text)
    said: list[str] = []
    source = reader("sentiment", said.append)
    rows = source.read(str(tmp_path / file), "test")
    assert [row["id"] for row in rows] == ids
    assert [int(not row.fault) for row in rows] == answered
    assert all(f"{tmp_path / file} " in line for line in said) and len(said) >= answered.count(0)
    assert source.warnings == [
        f"{tmp_path / file}: {answered.count(0)} rows could not be read and their answers are empty"
    ]


def test_bytes_that_are_no_text_cost_no_row_its_answer(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"id,text\n1,caf\xe9 good\n2,fine\n")
    first, second = reader("sentiment").read(str(tmp_path / "rows.csv"), "test")
    assert first["text"] == "caf\ufffd good" and not first.fault and second["text"] == "fine"


AHEAD = {  # found before the first step: options, and what the line must hold
    "sentiment --predict gone.csv": ["no such data: gone.csv"],
    "sentiment --predict typo.csv": ["typo.csv has no column"],
    "sentiment --predict seven.csv": ["seven.csv line 3: the label '7' is none of"],
    "sentiment --model naive-bayes --predict seven.csv": [
        "seven.csv line 3: the label '7' is none of"
    ],
    "sonnets --predict prose.txt": ["prose.txt holds no poems"],
    "sonnets --predict long.txt --strict --seq-len 20": ["too long"],
    "sentiment --predict toy --answers base": ["--answers base is a folder"],
    "sentiment --predict toy --answers seven.csv/x.jsonl": [
        "--answers seven.csv/x.jsonl cannot be written"
    ],
    "sentiment --predict word.csv --answers word.csv": ["--answers word.csv is also what is read"],
    "sentiment --predict word.csv --answers word.jsonl": ["word.csv is also what is read"],
    "sentiment --predict toy --answers x.parquet": [
        "--answers x.parquet: answers are written as .jsonl and .csv"
    ],
    "sentiment --predict toy --answers new/validation.csv": ["is a file of the run itself"],
    "sentiment --answers x.jsonl": ["--answers x.jsonl belongs to --predict"],
}


@pytest.mark.parametrize("mistake", AHEAD)
def test_what_runs_after_training_is_checked_before_it(mistake: str, mistakes: Path) -> None:
    name, *options = mistake.split()
    (end,) = run_task(name, mistakes, "--out", "new", "--epochs", 1, *options)
    assert end.code == 2 and end.err.startswith("error: ") and end.err.count("\n") == 1, end
    assert {file.name for file in (mistakes / "new").glob("*")} <= {"run.json"}
    for part in AHEAD[mistake]:
        assert part in end.err, end.err


@pytest.mark.parametrize("model", ["naive-bayes", "tf-idf"])
def test_a_dry_run_of_a_model_of_words_writes_nothing(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dry(**options: Any) -> int:
        return fit_words(
            kind("sentiment"), ClassificationConfig(out=str(out), dry_run=True, **options), model
        )

    out, answers = tmp_path / "new" / "run", tmp_path / "deep" / "answers.csv"
    assert dry(predict="toy", answers=str(answers)) == 0
    assert "dry run: nothing is started or written" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no such data: .*nowhere"):
        dry(predict=f"{tmp_path}/nowhere.csv")
    with pytest.raises(UserError, match=r"no such data: .*nowhere"):
        dry(data=f"{tmp_path}/nowhere.csv")
    assert not list(tmp_path.iterdir())


def test_a_model_of_words_needs_an_out_that_it_can_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(**options: Any) -> int:
        return fit_words(kind("sentiment"), ClassificationConfig(**options), "naive-bayes")

    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "run")
    for out, said in (
        ("file", "cannot be written"),
        ("file/run", "cannot be written"),
        ("link", "link to a folder that is not there"),
    ):
        with pytest.raises(UserError, match=rf"--out .*{said}"):
            fit(out=str(tmp_path / out))

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.classification.command.write_json", full)
    with pytest.raises(
        UserError, match=r"cannot write to --out .*/run: No space left on device; name a folder"
    ):
        fit(out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"cannot write to --out"):
        fit(out=str(tmp_path / "run"), predict="toy", answers=str(tmp_path / "answers" / "a.csv"))


def test_a_dry_run_of_answers_alone_checks_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished("sentiment", folder, "--epochs", 1, "--out", "made")
    before = {path for path in folder.rglob("*") if not path.name.startswith("rank0.")}
    words = ("--epochs", 0, "--init", "made", "--out", "new", "--dry-run")
    (end,) = run_task("sentiment", folder, *words, "--predict", "nowhere")
    assert (
        end.code == 2
        and end.err.startswith("error: no such data: nowhere")
        and end.err.count("\n") == 1
    ), end

    def dry(init: str) -> int:
        cfg = ClassificationConfig(init=str(folder / init), predict="toy", epochs=0, dry_run=True)
        return rehearse(family("sentiment"), cfg)

    assert dry("made") == 0
    assert (
        "dry run: nothing is written (8 rows of toy would be answered by" in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="base is no classifier"):
        dry("base")
    assert {path for path in folder.rglob("*") if not path.name.startswith("rank0.")} == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_labelled_files_are_read_whole() -> None:
    three = ("contradiction", "entailment", "neutral")
    expected = {
        ("sentiment", "cs224n/ids-sst-dev.csv"): (881, ("0", "1", "2", "3", "4")),
        ("sentiment", "cs224n/ids-cfimdb-dev.csv"): (196, ("0", "1")),
        ("sentiment", "korean/nsmc_dev.txt"): (2000, ("0", "1")),
        ("paraphrase", "paraphrase/quora-dev.csv"): (2914, ("0", "1")),
        ("paraphrase", "paraphrase/mrpc_test.tsv"): (1380, ("0", "1")),
        ("nli", "nli/rte_dev.tsv"): (222, ("0", "1")),
        ("nli", "nli/sick_dev.tsv"): (500, tuple(word.upper() for word in three)),
        ("nli", "nli/mnli_sample_dev.csv"): (828, ("0", "1", "2")),
        ("nli", "korean/kornli_xnli_dev.tsv"): (2490, three),
        ("topics", "topic/ag_news_dev.csv"): (1000, ("1", "2", "3", "4")),
        ("topics", "topic/bbc_news_dev.jsonl"): (
            300,
            ("business", "entertainment", "politics", "sport", "tech"),
        ),
    }
    for (name, file), (count, labels) in expected.items():
        source = reader(name)
        rows = source.read(str(SHARED / file), "validation")
        assert (len(rows), find_labels(rows)) == (count, labels) and not source.warnings, file
    student = SHARED / "cs224n/ids-sst-test-student.csv"
    (first, *_) = reader("sentiment").read(str(student), "test")
    assert first.fields == {
        "text": " Effective but too-tepid biopic",
        "label": "",
        "id": "b7573736a6ddf7be102b7fee0",
    }


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_files_are_read_whole() -> None:
    counts = {
        ("sonnets", "cs224n/sonnets.txt"): 131,
        ("sonnets", "cs224n/TRUE_sonnets_held_out_dev.txt"): 12,
        ("sonnets", "cs224n/sonnets_held_out.txt"): 12,
        ("qa", "qa/xquad_en.json"): 934,
        ("lyrics", "lyrics/sacred_harp.csv"): 468,
        ("lyrics", "lyrics/pop_lyrics.csv"): 867,
        ("summarize", "summarization/scitldr_dev.jsonl"): 619,
        ("summarize", "summarization/dialogsum_dev.jsonl"): 500,
        ("text", "korean/nsmc_dev.txt"): 2000,
    }
    for (name, file), count in counts.items():
        source = reader(name)
        assert len(source.read(str(SHARED / file), "validation")) == count, file
        assert not source.warnings


# --- every method

ONE_TERM = ("full", "last-layer", "dora", "soft-prompt")  # the others also by unlikelihood


# the others are stored as full or lora is
@pytest.mark.parametrize("method", ["full", "ulmfit", "lora", "prefix", "soft-prompt"])
def test_a_method_learns_stores_its_own_and_resumes(method: str, folder: Path) -> None:
    more = [
        "--init",
        "base",
        "--method",
        method,
        "--steps",
        8,
        "--save-every",
        4,
        "--eval-every",
        0,
        "--dropout",
        "0.1",
    ]
    more += [
        "--lr",
        "2e-2" if method in ("bitfit", *ADAPTERS) else "3e-3",
        "--schedule",
        "constant",
    ]
    more += [] if method in ONE_TERM else ["--objective", "unlikelihood"]
    more += {"prefix": ["--prefix-width", 32], "last-k": ["--last-k", 1]}.get(method, [])
    finished("sonnets", folder, *more)
    run = folder / "run"
    train = log_of(run, "train")
    nll = [line.get("nll", line["loss"]) for line in train]
    assert min(nll[-2:]) < nll[0] - 0.02, nll
    assert ("unlikelihood" in train[0]) == (method not in ONE_TERM)
    finished(
        "sonnets",
        folder,
        *more,
        "--resume",
        run / "checkpoints" / "step-00000004",
        "--out",
        "branch",
    )
    same_second_half(run, folder / "branch", 4)
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
        assert hub.base_of(newest) == (
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
        agrees_with_transformers(run / "final", ids)
        assert weights_of(run / "final") != unchanged
    model, _ = open_model(str(newest), None, CPU, torch.float32)
    final, _ = open_model(str(run / "final"), None, CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])), final(torch.tensor([ids])), rtol=1e-4, atol=1e-4
        )


A_BASE: dict[str, Any] = dict(
    preset=None, tokenizer=None, steps=30, batch_size=8, lr=3e-3, schedule="constant"
)
MOVES = {  # by method, the parameters that train
    "last-layer": r"heads\..*",
    "last-k": r"heads\..*|transformer\.(h\.1|ln_f)\..*",
    "bitfit": r"heads\..*|.*\.bias",
    **dict.fromkeys(("lora", "dora"), r"heads\..*|.*\.lora_.*"),
    **dict.fromkeys(("prefix", "soft-prompt"), r"heads\..*|prefix\..*"),
}
WAYS: dict[str, dict[str, Any]] = {  # to train a classifier
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


@pytest.mark.parametrize("way", WAYS)
def test_a_way_to_train_a_classifier_solves_the_toy_rows(way: str, inputs: Path) -> None:
    """And moves what it should: heads train under every method, and might well do without the
    rest."""
    options: dict[str, Any] = A_BASE | dict(init=str(inputs / "base")) | WAYS[way]
    if way in METHODS:
        options["method"] = way
    elif options.get("model") == "lstm":
        options |= dict(init="scratch", tokenizer=str(inputs / "tokenizer"))
    task = set_up("sentiment", inputs, **options)
    step = step_of(task)
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    losses = train_all(step, task)
    figures = evaluate(step, 3)
    assert figures is not None and figures["val_loss"] < 0.25 < losses[0], (losses[0], figures)
    # Biases alone, in a model of random weights, cannot part all eight rows.
    right = 7 / 8 if way == "bitfit" else 1.0
    assert {v for k, v in figures.items() if k.endswith("accuracy")} == {right}
    assert (
        len([k for k in figures if k.endswith("accuracy")])
        == len(task.keys)
        == 1 + len(task.cfg.also)
    )
    moved = {name for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        name for name in before if re.fullmatch(MOVES.get(task.cfg.method, ".*"), name)
    }
    assert len(step.model.heads) == (len(task.keys) if task.cfg.form != "word" else 0)


def test_every_method_is_among_the_ways() -> None:
    assert {*METHODS, *get_args(Pooling)} <= WAYS.keys()


def train_all(step: TrainStep, task: Finetuning) -> list[float]:
    """All steps of a run, in this process; the loss of each."""
    data = Loader(task, ALONE, 8, task.cfg.steps)
    results = [step(n, data(n)) for n in range(task.cfg.steps)]
    data.close()
    return [result.loss.item() for result in results if result is not None]


def weights_of(folder: Path) -> str:
    return peft.weights_sha256(GPT.from_pretrained(folder))


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_special_tokens_of_a_task_train_beside_an_adapter(method: str, folder: Path) -> None:
    more = [
        "--init",
        "base",
        "--method",
        method,
        "--steps",
        3,
        "--lr",
        "1e-2",
        "--predict",
        "toy",
        "--save-every",
        3,
    ]
    finished("qa", folder, *more, "--decode", "greedy")
    base = GPT.from_pretrained(folder / "base").head_weight.detach()
    model, tokenizer = open_model(str(folder / "run" / "final"), None, CPU, torch.float32)
    vocab_size = load_tokenizer(str(folder / "base")).vocab_size
    assert tokenizer.vocab_size == vocab_size + 2 == model.config.vocab_size
    assert [tokenizer.special_id(token) for token in kind("qa").special(None)] == [
        vocab_size,
        vocab_size + 1,
    ]
    assert torch.equal(model.head_weight[:vocab_size], base[:vocab_size])
    rows = model.head_weight[vocab_size : vocab_size + 2].detach()
    # they started at the mean, and moved
    assert (rows - base[:vocab_size].mean(0)).abs().min(1).values.gt(0).all()
    assert (
        json.loads((folder / "run" / "predictions.jsonl").read_text().splitlines()[0])["prediction"]
        is not None
    )


# --- what a user gets wrong


@pytest.fixture(scope="module")
def mistakes(inputs: Path) -> Path:
    """Beside the inputs: files that are not what a task wants, an adapter, and a model of other
    weights."""
    write = {
        "prose.txt": "No number stands over these lines.\nNor over these.\n",
        "songs.csv": "singer,words\nA,la la\n",
        "broken.jsonl": '{"text": "one"}\n{"text": 3\n{"text": "two"}\n',
        "long.txt": "1\n\n" + "so long a line " * 90 + "\n",
        "typo.csv": "sentense,lable\nfine,1\n",
        "one.csv": "text,label\na,1\nb,1.0\nc,1\n",
        "none.csv": "text,label\n",
        "seven.csv": "text,label\nfine,1\nfiner,7\n",
        "word.csv": "text,label\nfine,1\nfiner,good\n",
        "mixed.csv": "text,label\na,1\nb,2\nc,one\nd,1\n",
        "ids.csv": "text,label\n" + "".join(f"t{n},x{n}\n" for n in range(30)),
        "cells.csv": "text,label\na,1\nb,0,1\n",
        "known.csv": "text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(99)),
        "no_answer.json": json.dumps(
            {
                "data": [
                    {"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}
                ]
            }
        ),
    }
    for name, text in write.items():
        (inputs / name).write_text(text)
    finished(
        "sonnets",
        inputs,
        "--init",
        "base",
        "--method",
        "lora",
        "--steps",
        1,
        "--eval-every",
        0,
        "--out",
        "lora",
    )
    odd = json.loads((inputs / "tokenizer" / "tokenizer.json").read_text())
    odd["model"]["vocab"]["<generate>"] = load_tokenizer(str(inputs / "tokenizer")).vocab_size
    (inputs / "odd").mkdir()
    (inputs / "odd" / "tokenizer.json").write_text(json.dumps(odd))
    other = GPT(
        GPTConfig(
            vocab_size=load_tokenizer(str(inputs / "base")).vocab_size,
            block_size=32,
            n_layer=2,
            n_head=2,
            n_embd=64,
        )
    )
    other.save_pretrained(inputs / "other")
    (inputs / "moved").mkdir()
    for file in (inputs / "lora" / "checkpoints" / "step-00000001").iterdir():
        if file.name != "manifest.json":
            shutil.copy(file, inputs / "moved")
    settings = inputs / "moved" / "adapter_config.json"
    settings.write_text(
        settings.read_text().replace(str((inputs / "base").resolve()), str(inputs / "other"))
    )
    return inputs


MISTAKES = {  # a task and options: what the line must hold
    "sonnets --data prose.txt": ["prose.txt holds no poems", "line with its number"],
    "sonnets --data nowhere.txt": ["no such data: nowhere.txt"],
    "lyrics --data songs.csv": [
        "songs.csv has no column 'text' or 'lyrics'",
        "singer, words",
        "--text-column NAME",
    ],
    "lyrics --data songs.csv --text-column word": ["no column 'word' (did you mean words?)"],
    "lyrics --data songs.csv --text-column words --with-title": [
        "--with-title",
        "--song-column NAME",
    ],
    "qa --data no_answer.json": [
        "holds no row that can be read",
        "no_answer.json row 1 paragraph 1 has nothing in column 'answer'",
    ],
    "text --data broken.jsonl --strict": ["broken.jsonl line 2 is not valid JSON", "--strict"],
    "text --data prose.txt --lines --seq-len 3 --strict --epochs 0": [
        "--epochs 0 trains nothing",
        "--predict FILE",
    ],
    "sonnets --init base --epochs 0 --predict long.txt --strict": [
        "long.txt line 1: a prompt of",
        "context of 160",
    ],
    "summarize --tokenizer odd": ["'<generate>'"],
    "sonnets --with-title": ["unknown option --with-title"],
    "lyrics --with-titel": ["unknown option --with-titel", "did you mean --with-title?"],
    "qa --decode gredy": ["gredy"],
    "sonnets --method lora": ["--method lora adds to trained weights", "--init"],
    "sonnets --init base --method prefix --llrd 0.9": ["--llrd", "--method prefix does not train"],
    "sonnets --init base --method last-k --last-k 3": ["--last-k 3", "2 blocks", "--method full"],
    "sonnets --init base --lora-rank 4": [
        "--lora-rank belongs to --method lora or dora, not to full"
    ],
    "sonnets --init base --method prefix --prefix-tokens 160": ["--prefix-tokens"],
    "sonnets --init base --seq-len 161": ["--seq-len 161 is longer than the 160 positions"],
    "sonnets --init base --preset micro": ["--preset cannot go with --init base"],
    "sonnets --init lora/checkpoints/step-00000001": [
        "is an adapter, not a whole model; name ",
        "/base to begin without the adapter, or ",
        "/lora/final, where both are",
    ],
    # rows with labels
    "sentiment --data typo.csv": [
        "no column 'sentence' or 'text'",
        "(did you mean sentense?)",
        "sentense, lable",
        "--text-column NAME",
    ],
    "sentiment --data typo.csv --text-column sentense --label-column labl": [
        "no column 'labl' (did you mean lable?)",
        "--label-column",
    ],
    "sentiment --val-data seven.csv": [
        "seven.csv line 3: the label '7' is none of the training rows' labels",
        "they are 0, 1",
    ],
    "sentiment --val-data word.csv": [
        "word.csv line 3: the label 'good' is not a number, as those of the training rows are"
    ],
    "sentiment --data mixed.csv": [
        "mixed.csv line 4: the label 'one' is not a number, as most others are"
    ],
    "sentiment --data one.csv": ["all 3 training rows have the label '1'"],
    "sentiment --data ids.csv": ["30 training rows have 30 labels", "--label-column"],
    "sentiment --val-data none.csv": ["none.csv holds no row that can be read"],
    "sentiment --data cells.csv --strict": [
        "cells.csv line 3 has 3 cells where the first line names 2 columns",
        "--strict",
    ],
    "sentiment --data known.csv --val-data known.csv": [
        "99 of 99 training rows (100.0%) also stand",
        "--allow-overlap",
    ],
    "topics --seq-len 8 --strict": ["toy row 1: ", "tokens too long for --seq-len 8 (--strict)"],
    "nli --form prompt --seq-len 8": [
        "toy row 1: nothing of its text fits into 8 tokens; raise --seq-len"
    ],
    "sentiment --init base --epochs 0 --predict toy": [
        "base is no classifier; train one first",
        "finetune.sentiment",
    ],
    # options of classification
    "sentiment --also sonnets": ["--also sonnets: sonnets is no task with labels"],
    "sentiment --also topic:1": [
        "--also topic:1: topic is no task with labels (did you mean topics?)"
    ],
    "sentiment --also topics:much": [
        "--also topics:much: the weight must be a number above 0",
        "topics:0.5",
    ],
    "sentiment --also topics:-1": ["the weight must be a number above 0"],
    "sentiment --also topics nli --also-data toy": ["--also names 2 tasks and --also-data 1 files"],
    "sentiment --also topics --also-data nowhere.csv": ["no such data: nowhere.csv"],
    "sentiment --class-weights 1 2 3": [
        "--class-weights 1 2 3: give balanced, or 2 numbers, for the labels 0, 1"
    ],
    "sentiment --class-weights even": ["--class-weights even: give balanced, or 2 numbers"],
    "sentiment --class-weights 0 0": ["all training rows have the weight 0", "--class-weights"],
    "sentiment --words bad": ["--words belongs to --form word"],
    "sentiment --form word --words bad": ["--form word: name 2 words with --words, for 0, 1"],
    "sentiment --form word --words good good": [
        "of the words good, good two begin with the same token",
        "--words",
    ],
    "sentiment --form word --pooling mean": ["--pooling mean", "--form word", "leave it out"],
    "sentiment --form word --also topics": [
        "--also trains heads",
        "--form word",
        "leave --also out",
    ],
    "sentiment --form cloze": ["cloze"],
    "sentiment --objective simcse --dropout 0 --head-dropout 0": [
        "--objective simcse compares two passes",
        "set --dropout",
    ],
    # the head's is not its
    "sentiment --objective rdrop simcse --dropout 0": ["--objective simcse compares two passes"],
    "sentiment --objective rdrop --form word --dropout 0": [
        "--objective rdrop compares two passes"
    ],
    "sentiment --objective simcse --batch-size 12": [
        "--batch-size 12 is no multiple of groups of 8 rows; use 16"
    ],
    "sentiment --augment-weight 2": ["--augment-weight belongs to --augment FILE"],
    "sentiment --label-smoothing 1": ["--label-smoothing is 1.0; it must be below 1"],
    "sentiment --model lstm --method lora": ["--model lstm", "leave out", "--method"],
    "sentiment --model lstm --form word": ["--model lstm", "leave out", "--form word"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(mistake: str, mistakes: Path) -> None:
    name, *options = mistake.split()
    (end,) = run_task(name, mistakes, "--out", "new", "--epochs", 1, *options)
    assert end.code == 2 and end.err.startswith("error: ") and end.err.count("\n") == 1, end
    assert "Traceback" not in end.out
    # nothing was trained or written
    assert {file.name for file in (mistakes / "new").glob("*")} <= {"run.json"}
    for part in MISTAKES[mistake]:
        assert part in end.err, end.err


def test_what_is_said_in_the_place_of_an_adapter_works(mistakes: Path, tmp_path: Path) -> None:
    adapter = mistakes / "lora" / "checkpoints" / "step-00000001"
    asked = FinetuneConfig(init=str(adapter))
    with pytest.raises(UserError) as refused:
        open_pretrained(asked)
    base, final = re.findall(
        r"name (\S+) to begin without the adapter, or (\S+),", str(refused.value)
    )[0]
    for named in (base, final):
        assert isinstance(open_pretrained(dataclasses.replace(asked, init=named)), GPT)
    loose = shutil.copytree(adapter, tmp_path / "loose")
    (loose / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"name \S+/base to .* PEFT's merge_and_unload\(\)"):
        open_pretrained(dataclasses.replace(asked, init=str(loose)))


def test_an_adapter_over_another_base_is_refused(mistakes: Path) -> None:
    (end,) = launch(mistakes, ["moved", "a prompt"], program="generate")
    assert (
        end.code == 2
        and end.err.startswith("error: moved is an adapter for ")
        and end.err.count("\n") == 1
    ), end
    assert str(mistakes / "other") in end.err and "the weights found are others" in end.err


def test_new_tokens_of_a_base_with_more_rows_than_its_tokenizer(folder: Path) -> None:
    model = GPT.from_pretrained(folder / "base")
    known = load_tokenizer(str(folder / "base")).vocab_size
    layers.add_tokens(model, range(known, known + 40))  # rows that no token has
    model.save_pretrained(folder / "wide")
    load_tokenizer(str(folder / "base")).save(folder / "wide")
    finished(
        "qa",
        folder,
        "--init",
        "wide",
        "--method",
        "lora",
        "--steps",
        3,
        "--eval-rows",
        0,
        "--out",
        "run",
    )
    rows = load_file(folder / "run/checkpoints/step-00000003/adapter_model.safetensors")
    trained = next(tensor for name, tensor in rows.items() if "trainable_tokens" in name)
    both = ("wide", "run/final")
    old, new = (
        load_file(folder / name / "model.safetensors")["transformer.wte.weight"] for name in both
    )
    assert trained.shape[0] == 2 and len(new) == len(old) == known + 40
    assert (new != old).any(1).nonzero().flatten().tolist() == [known, known + 1]


def test_a_missing_column_is_named_with_an_option_only_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id,body\n1,a text\n")
    for name, advice in (("text", "Use --text-column NAME"), ("sonnets", "Rename the one that")):
        with pytest.raises(UserError, match=f"has no column .* {advice}"):
            reader(name).read(str(tmp_path / "rows.csv"), "train")
