"""Classification tasks: encoding, labels, losses, evaluation, auxiliary tasks, and the files of a
run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from adapters import heads
from adapters.options import ADAPTERS, Pooling
from config import Resolved, UserError, resolve, resolve_steps, resolved
from engine.compiling import compile_model
from engine.evaluation import evaluate
from engine.loader import Loader, partition
from engine.precision import set_products
from engine.processes import World
from engine.step import TrainStep
from given import GivenLabels, rows_are_given
from model import GPT
from tasks.classification.labels import find_labels, label_name, word_ids
from tasks.classification.options import ClassificationConfig
from tasks.classification.predictions import probabilities, write_predictions
from tasks.classification.rows import row_encoder
from tasks.classification.task import AuxiliaryTask, Classification
from tasks.description import Parts, SpecialToken, Truncatable
from tasks.encoder import pad_rows
from tasks.order import Order
from text.rows import Row
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe
from toy import capture_gradients, expected_gradients

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


@pytest.fixture(scope="module", autouse=True)
def given_rows() -> Iterator[None]:
    with rows_are_given():
        yield


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = " ".join([*WORDS, *LABELS]) + " "
    return train_bpe([text * 3], 320, tmp_path_factory.mktemp("mood") / "tokenizer")


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """A stand-in for an LSTM that takes no time."""
    with mock.patch.object(heads, "LSTM_WIDTH", 16):
        yield


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
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
READS: dict[str, dict[str, Any]] = {name: dict(pooling=name) for name in get_args(Pooling)}
READS |= {"prompt": dict(form="prompt"), "word": dict(form="word")}


# --- rows to scores


@pytest.fixture(scope="module", params=READS)
def scorer(request: Any, tokenizer: Tokenizer) -> tuple[Mood, GPT]:
    task = mood(tokenizer, **READS[request.param])
    return task, model_of(task)


@given(
    ids=st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=8),
    more=st.integers(0, 30),
    filler=st.integers(0, 300),
)
@quick
def test_scores_do_not_depend_on_batch_or_padding(scorer, ids, more, filler):
    task, model = scorer
    set_products("fp32", ALONE.device)  # as in a run

    def scores(ids: list[int], filler: int, more: int) -> torch.Tensor:
        rows = [task.train.tokens[i] for i in ids]
        batch = pad_rows(rows, filler, np.array([max(map(len, rows)) + more]))
        return task.objective.scorer.log_p(
            model, *task.objective.scorer.states(model, batch["idx"], batch["lengths"]), 0
        )

    with torch.no_grad():
        together = scores(ids, filler, more)
        assert together.shape == (len(ids), len(LABELS)) and together.dtype == torch.float32
        for i, found in zip(ids, together, strict=True):
            torch.testing.assert_close(found, scores([i], 0, 0)[0], rtol=1e-5, atol=1e-5)
    assert task.cfg.form == "word" or together.exp().sum(1).tolist() == pytest.approx(
        [1] * len(ids)
    )
    assert task.cfg.form != "word" or (together.exp().sum(1) < 0.9).all()  # of the whole vocabulary


def test_a_batch_is_padded_to_the_smallest_bucket(tokenizer):
    task = mood(tokenizer)
    for ids in ([0], [4, 0], [3, 1], [5, 2, 0]):
        batch = task.batch("train", np.array(ids)).tensors
        longest = max(len(task.train.tokens[i]) for i in ids)
        assert batch["idx"].shape == (
            len(ids),
            min(size for size in task.buckets if size >= longest),
        )
        assert batch["lengths"].tolist() == [len(task.train.tokens[i]) for i in ids]
        for i, tokens, n in zip(ids, batch["idx"].tolist(), batch["lengths"], strict=True):
            assert tokens == [*task.train.tokens[i].tolist(), *[tokenizer.eot] * (len(tokens) - n)]
        assert [LABELS[i] for i in batch["labels"]] == [ROWS[i]["label"] for i in ids]


# --- rows to tokens


def test_tokens_of_a_row_under_each_form(tokenizer):
    plain, prompt = mood(tokenizer), mood(tokenizer, form="prompt")
    encode, ask = tokenizer.encode, prompt.trunk.tokenizer.special_id(ASK)
    for i, given_row in enumerate(ROWS):
        pair = [tokenizer.eot, *encode(given_row["second"])] if given_row["second"] else []
        assert plain.train.tokens[i].tolist() == [*encode(given_row["first"]), *pair]
        asked = [*encode(given_row["second"]), ask] if given_row["second"] else []
        expected = [*encode("of"), *encode(given_row["first"]), ask, *asked]
        assert prompt.train.tokens[i].tolist() == expected
    assert mood(tokenizer, [row(""), row("a", "bad")]).train.tokens[0].tolist() == [tokenizer.eot]


@given(
    first=texts,
    second=st.just("") | texts,
    seq_len=st.integers(6, 30),
    form=st.sampled_from(["plain", "prompt"]),
)
@quick
def test_truncation_shortens_the_longer_text(tokenizer, first, second, seq_len, form):
    whole = [tokenizer.encode(text) for text in (first, second) if text]
    fixed = len(whole) - 1 if form == "plain" else len(whole) + len(tokenizer.encode("of"))
    over = fixed + sum(map(len, whole)) - seq_len
    for cut in ("end", "start", "middle"):
        task = mood(
            tokenizer,
            [row(first, second=second), row("a", "bad")],
            seq_len=seq_len,
            cut=cut,
            form=form,
        )
        tokens = task.train.tokens[0].tolist()
        assert len(tokens) == min(seq_len, seq_len + over)
        what = f"1 of 2 {{}} rows are longer than {seq_len} tokens and are truncated at the {cut} of their text"
        told = [text for text in task.source.warnings if "longer than" in text]
        assert told == ([what.format("training"), what.format("validation")] if over > 0 else [])
        kept = parts_of(
            tokens if form == "plain" else tokens[len(tokenizer.encode("of")) : -1], task
        )
        lost = [len(text) - len(part) for text, part in zip(whole, kept, strict=True)]
        assert sum(lost) == max(0, over)
        if len(whole) > 1:  # No text that was truncated is shorter than the other.
            a, b = map(len, kept)
            assert (not lost[0] or a >= b - 1) and (not lost[1] or b >= a - 1)
        for part, text in zip(kept, whole, strict=True):
            n = len(part)
            head = {"end": n, "start": 0, "middle": n // 2}[cut]
            assert part == text[:head] + text[len(text) - (n - head) :]


def parts_of(tokens: list[int], task: Mood) -> list[list[int]]:
    """The tokens of a row as lists, split at its special tokens."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token in task.trunk.tokenizer.special_ids.values():
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_rows_that_cannot_be_truncated_are_refused(tokenizer):
    with pytest.raises(
        UserError, match=r"rows row 3: \d+ tokens too long for --seq-len 14 \(--strict\)"
    ):
        mood(tokenizer, seq_len=14, strict=True)
    with pytest.raises(
        UserError, match=r"rows row \d: nothing of its text fits into 2 tokens; raise --seq-len"
    ):
        mood(tokenizer, seq_len=2, form="prompt")


# --- labels


@given(
    numbers=st.lists(st.integers(-20, 20), min_size=2, unique=True),
    words=st.lists(st.sampled_from(WORDS), min_size=3),
)
@quick
def test_labels_are_sorted_as_numbers_or_as_words(numbers, words):
    def labels(cells: list[str]) -> tuple[str, ...]:
        return find_labels([Row({"label": cell}, "") for cell in cells])

    ordered = tuple(map(str, sorted(numbers)))
    assert labels([*map(str, numbers)] * 3) == labels([f" {n}.0 " for n in numbers] * 3) == ordered
    if len(set(words)) > 1:
        assert labels([f"{word} " for word in words] * 3) == tuple(sorted(set(words)))


def test_label_names_are_normalised():
    names = {
        "1.0": "1",
        " 2 ": "2",
        "-1": "-1",
        "0.5": "0.5",
        "1e3": "1000",
        "nan": "nan",
        "inf": "inf",
        "so so": "so so",
        "1_1": "1_1",
        "+3": "3",
        "9007199254740993": "9007199254740993",
        "1e300": "1e300",
    }
    assert {cell: label_name(cell) for cell in names} == names


def test_labels_that_are_no_classes_are_refused():
    def rows(*cells: str) -> list[Row]:
        return [Row({"label": cell}, f"a.csv line {n}") for n, cell in enumerate(cells, 2)]

    with pytest.raises(
        UserError, match="all 3 training rows have the label '2'; give rows with two labels"
    ):
        find_labels(rows("2", "2.0", " 2"))
    with pytest.raises(
        UserError, match=r"a.csv line 3: the label 'two' is not a number, but most others are"
    ):
        find_labels(rows("1", "two", "2", "1"))
    assert find_labels(rows("1", "one", "two", "one")) == ("1", "one", "two")
    many = [f"{n}" for n in range(21)]
    with pytest.raises(
        UserError, match=r"22 training rows have 21 labels, too many .* with --label-column"
    ):
        find_labels(rows(*many, "1"))
    assert len(find_labels(rows(*many, *many, *many))) == 21


def test_an_unseen_label_is_refused_with_the_known_ones(tokenizer):
    for known, found, why in (
        (
            ("bad", "good"),
            "goood",
            r"'goood' is none of the training rows' labels \(did you mean good\?\); use one of bad, "
            r"good",
        ),
        (
            ("0", "1"),
            "good",
            r"'good' is not a number, but those of the training rows are; use one of 0, 1",
        ),
        (
            ("0", "1"),
            "-1",
            r"'-1' is none of the training rows' labels \(did you mean 1\?\); use one of 0, 1",
        ),
        (("0", "0.5"), "1.5", r"'1.5' is none of the training rows' labels"),
    ):
        train = [row("a", label) for label in known]
        with pytest.raises(UserError, match=f"val row 1: the label {why}"):
            mood(tokenizer, train, [row("b", known[0]), row("c", found)])
        assert mood(tokenizer, train, [row("b", f"{known[0]} ")]).val.labels.tolist() == [0]


def test_an_overlap_above_one_percent_is_refused(tokenizer):
    train = [row(f"stone {n} of", LABELS[n % 2]) for n in range(200)]
    for both, told in ((2, "2 of 200 training rows (1.0%)"), (3, "3 of 200 training rows (1.5%)")):
        val = [row(f"Stone  {n} OF ") for n in range(both)] + [row("rain")]
        if both == 3:
            with pytest.raises(
                UserError,
                match=re.escape(told)
                + " are also validation rows; remove them, or .*--allow-overlap",
            ):
                mood(tokenizer, train, val, allow_overlap=False)
        task = mood(tokenizer, train, val, allow_overlap=both == 3)
        assert task.source.warnings == [f"{told} are also validation rows"]


def test_class_weights_and_augment_weight(tokenizer):
    def weights(**options: Any) -> list[float]:
        task = mood(tokenizer, **options)
        assert task.val.weights.tolist() == [1.0] * len(ROWS)
        return task.train.weights.tolist()

    of = [LABELS.index(r["label"]) for r in ROWS]
    assert weights() == [1.0] * 7
    assert weights(class_weights=("1", "2.5", "0")) == [(1.0, 2.5, 0.0)[label] for label in of]
    assert weights(class_weights=("balanced",)) == pytest.approx(
        [7 / (3 * of.count(label)) for label in of]
    )
    assert weights(augment="more", augment_weight=0.25) == [1.0] * 7 + [0.25] * 2
    both = weights(augment="more", augment_weight=0.5, class_weights=("2", "1", "1"))
    assert both == [2.0 if label == 0 else 1.0 for label in of] + [1.0, 0.5]
    with pytest.raises(
        UserError,
        match="--class-weights 1 2: give balanced, or 3 numbers, for the labels bad, good, so-so",
    ):
        weights(class_weights=("1", "2"))


def test_label_words_are_scored_by_their_first_token(tokenizer):
    task = mood(tokenizer, form="word")
    assert task.info.words == LABELS  # the word is the label's name
    assert (
        task.objective.scorer.word_ids == [tokenizer.encode(f" {word}")[0] for word in LABELS]
        and len(set(task.objective.scorer.word_ids)) == 3
    )
    assert word_ids(tokenizer, ["rain ", " town"]) == [
        tokenizer.encode(" rain")[0],
        tokenizer.encode(" town")[0],
    ]
    assert mood(tokenizer, form="word", words=("rain", "town", "stone")).info.words == (
        "rain",
        "town",
        "stone",
    )
    numbers = [row("a", "0"), row("b", "1")]
    with pytest.raises(
        UserError, match="--form word: name 2 words with --words, one for each of 0, 1"
    ):
        mood(tokenizer, numbers, form="word")
    with pytest.raises(UserError, match="two of the words rain, rain begin with the same token"):
        mood(tokenizer, numbers, form="word", words=("rain", "rain"))


# --- the loss


class Passes(nn.Module):
    """Replaces dropout: it changes the second pass of each row, and always in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, pattern = len(x) // 2, torch.arange(x.shape[-1], dtype=x.dtype) % 3
        return torch.cat([x[:n], x[n:] * (1 + 0.2 * pattern)])


LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights and smoothing": dict(class_weights=("1", "2", "0.5"), label_smoothing=0.1),
    "word": dict(form="word", label_smoothing=0.2),
    "attention": dict(pooling="attention"),
    "lstm": dict(pooling="lstm"),
    "rdrop": dict(objective=("rdrop",), rdrop=0.7, class_weights=("balanced",)),
    "simcse": dict(objective=("simcse",), simcse=0.3, simcse_group=2, simcse_temperature=0.5),
    "both, mean": dict(
        objective=("simcse", "rdrop"),
        simcse_group=2,
        class_weights=("1", "0.5", "3"),
        pooling="mean",
    ),
    "both, word": dict(objective=("simcse", "rdrop"), simcse_group=2, form="word"),
}


@pytest.fixture(params=LOSSES)
def learner(request: Any, tokenizer: Tokenizer) -> tuple[Mood, GPT]:
    """A task and its model, with an auxiliary task unless under --form word. The two passes of a
    row differ without random draws."""
    options: dict[str, Any] = LOSSES[request.param] | (
        dict(dropout=0.1) if "objective" in LOSSES[request.param] else {}
    )
    task = (mood if options.get("form") == "word" else of_two)(tokenizer, **options)
    task.trunk.shape = dataclasses.replace(task.trunk.shape, dropout=0.0)
    model = model_of(task)
    if task.objective.passes == 2:
        model.transformer.drop = Passes()
    return task, model.train()


def own_steps(task: Mood) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of each step of an epoch."""
    for step in range(task.order.steps_per_epoch):
        yield step, task.rows("train", step)


def by_hand(task: Mood, model: GPT, groups: np.ndarray) -> dict[str, float]:
    """The loss terms of a step's rows, by plain loops in fp64."""
    exact, cfg = copy.deepcopy(model).double(), task.cfg
    sums: dict[str, float] = defaultdict(float)
    for group in groups:
        seen = [passes_of(task, exact, i) for i in group]
        for i, (log_ps, _) in zip(group, seen, strict=True):
            label, weight = task.train.labels[i], task.train.weights[i]
            term = task.head_names[1] if task.train.heads[i] else "nll"
            for log_p in log_ps:
                nll = -(1 - cfg.label_smoothing) * log_p[label] - cfg.label_smoothing * sum(
                    log_p
                ) / len(log_p)
                sums[term] += weight * nll / len(log_ps)
            if "rdrop" in cfg.objective:
                p, q = (
                    [math.exp(x) / sum(map(math.exp, log_p)) for x in log_p] for log_p in log_ps
                )
                sums["rdrop"] += (
                    weight
                    * sum((a - b) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
                    / 2
                )
        if "simcse" in cfg.objective:
            for n, (_, (first, _)) in enumerate(seen):
                alike = [
                    float(F.cosine_similarity(first, second, dim=0)) / cfg.simcse_temperature
                    for _, (_, second) in seen
                ]
                sums["simcse"] -= alike[n] - math.log(sum(map(math.exp, alike)))
    return dict(sums)


@torch.no_grad()
def passes_of(task: Mood, exact: GPT, i: int) -> tuple[list[list[float]], list[torch.Tensor]]:
    """The log-probabilities and the pooled states of one unpadded row, in each pass."""
    tokens, head = torch.from_numpy(task.train.tokens[i])[None], int(task.train.heads[i])
    hidden, n = (
        exact.hidden(tokens.repeat(task.objective.passes, 1)),
        torch.tensor([len(tokens[0])] * task.objective.passes),
    )
    if task.cfg.form == "word":
        log_p, pooled = (
            F.log_softmax(exact.logits(hidden[:, -1]), -1)[:, task.objective.scorer.word_ids],
            hidden[:, -1],
        )
    else:
        pooled = exact.heads[task.head_names[head]].pool(hidden, n)
        log_p = F.log_softmax(pooled @ exact.heads[task.head_names[head]].weight.T, -1)
    return log_p.tolist(), list(pooled)


def test_loss_terms_match_a_loop_over_rows(learner):
    task, model = learner
    assert task.objective.passes == (2 if task.cfg.objective else 1)
    for _, groups in own_steps(task):
        batch = task.batch("train", groups.reshape(-1))
        terms = task.loss(model, batch.tensors)
        found = {name: float(value.detach()) for name, value in terms.items()}
        assert found == pytest.approx(by_hand(task, model, groups), rel=1e-4, abs=1e-6)
        ids = groups.reshape(-1)
        weight = float(task.train.weights[ids].sum())
        of = {"simcse": len(ids), "rdrop": weight}
        expected = {task.head_names[1] if task.train.heads[ids[0]] else "nll": weight}
        assert batch.weights == pytest.approx(
            expected | {name: of[name] for name in task.cfg.objective}
        )


def test_a_block_compiles_few_graphs_for_all_lengths(tokenizer, monkeypatch):
    """Training and evaluation compile nothing more once they have seen two lengths, and graphs do
    not break."""
    # Everything but code generation, which takes long and is not tested here.
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **options: compile(m, backend="eager", fullgraph=True)
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    rows = [row(" ".join((WORDS * 8)[: 1 + 7 * n % 120]), LABELS[n % 3]) for n in range(60)]
    options: dict[str, Any] = dict(precision="bf16", dropout=0.1, micro_batch=4, seq_len=128)
    task = mood(tokenizer, rows, rows[:12], n_layer=3, compile=True, **options)
    model = model_of(task).train()
    compile_model(model, task.cfg, ALONE, task.cost().loss is None)
    step = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE, True)
    loader = Loader(task, ALONE, 4, 40)
    for s in range(12):
        step(s, loader(s))
    evaluate(step, 4)
    # There are three kinds of blocks: the first, those after it, and the last, which computes one
    # position. Each is compiled for one length, for any length, and for evaluation.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    assert len({loader(s).batches[0]["idx"].shape[1] for s in range(12, 30)}) > 4
    with torch._dynamo.config.patch(error_on_recompile=True):
        for s in range(30, 40):
            step(s, loader(s))
        evaluate(step, 4)
    loader.close()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_flops_match_the_matrix_products(tokenizer, pooling):
    """torch counts FLOPs, including those of attention in plain form: forward, and twice as many
    backward."""
    rows = [row(" ".join(WORDS * 8), label) for label in LABELS]
    task = mood(
        tokenizer,
        rows,
        pooling=pooling,
        n_layer=2,
        n_head=2,
        n_embd=128,
        seq_len=96,
        without=("flash-attention",),
    )
    model, length = model_of(task), int(task.train.lengths.max())
    batch = task.batch("train", np.array([0])).tensors
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task.objective.scorer.states(model, batch["idx"][:, :length], batch["lengths"])
    # The formula counts biases and norms as weights, and leaves out the few products of the one
    # position.
    flops = task.cost().flops_per_token
    assert flops == pytest.approx(3 * counter.get_total_flops() / length, rel=0.03)


def test_the_weights_of_the_terms(learner):
    task, _ = learner
    cfg = task.cfg
    of = {"rdrop": cfg.rdrop / 2, "simcse": cfg.simcse}
    others = {"mood-2": 0.5} if task.auxiliary else {}
    assert task.terms == {"nll": 1.0} | others | {name: of[name] for name in cfg.objective}


def test_gradients_do_not_depend_on_the_micro_batch(learner):
    """Steps are split into micro-batches, groups stay whole, and the replaced dropout does not
    draw."""
    task, model = learner
    train = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE)
    for step, groups in own_steps(task):
        loss, terms, expected = expected_gradients(task, model, step)
        for micro_batch in (1, 3, groups.size):
            found = capture_gradients(train)
            result = train(step, Loader(task, ALONE, micro_batch, step + 1, ahead=0)(step))
            assert result is not None and result.loss.item() == pytest.approx(loss, rel=1e-5)
            assert {k: v.item() for k, v in result.terms.items()} == pytest.approx(
                terms, rel=1e-4, abs=1e-6
            )
            for name, gradient in expected.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(
                    found[name].double(), gradient, rtol=1e-3, atol=1e-4 * scale + 1e-9, msg=name
                )


def test_two_ranks_have_the_same_terms_as_one(learner):
    task, model = learner
    for _, groups in own_steps(task):
        whole = task.batch("train", groups.reshape(-1))
        for micro_batch in (1, 3):
            parts = [
                part
                for rank in (0, 1)
                for part in partition(groups, rank, 2, micro_batch)
                if part is not None
            ]
            assert sorted(np.concatenate(parts)) == sorted(groups.reshape(-1))
            for of in (
                lambda batch: batch.weights,
                lambda batch: {k: v.detach() for k, v in task.loss(model, batch.tensors).items()},
            ):
                total: dict[str, float] = defaultdict(float)
                for part in parts:
                    for k, v in of(task.batch("train", part)).items():
                        total[k] += float(v)
                assert dict(total) == pytest.approx(
                    {k: float(v) for k, v in of(whole).items()}, rel=1e-5, abs=1e-6
                )


# --- evaluation


def test_metrics_match_scikit_learn_at_any_micro_batch(tokenizer):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    draw = np.random.default_rng(0)
    val = [
        row(" ".join(draw.choice(WORDS, draw.integers(1, 20))), LABELS[n % 5 % 3])
        for n in range(40)
    ]
    task = set_up(Mood(ROWS, val, [(OTHERS, 1.0)]), tokenizer)
    model = model_of(task)
    expected: dict[str, float] = {}
    for head, (prefix, rows) in enumerate((("", val), ("mood-2_", OTHERS))):
        labels = [task.rows_of[head].labels.index(r["label"]) for r in rows]
        ids = np.flatnonzero(task.val.heads == head)
        alone = [
            log_p_of(task, copy.deepcopy(model).double(), task.val.tokens[i], head) for i in ids
        ]
        p = np.exp(alone)
        predicted = p.argmax(1)
        assert len(set(predicted)) > 1, "a figure of one label says little"
        expected |= {
            f"{prefix}val_loss": log_loss(labels, p, labels=range(p.shape[1])),
            f"{prefix}accuracy": accuracy_score(labels, predicted),
            f"{prefix}macro_f1": f1_score(labels, predicted, average="macro"),
            f"{prefix}calibration_error": calibration_by_hand(labels, p),
        }
    step = TrainStep(task, model, resolved(task.cfg, Resolved), ALONE)
    for micro_batch in (1, 7, 64):
        assert evaluate(step, micro_batch) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def log_p_of(task: Mood, model: GPT, tokens: np.ndarray, head: int = 0) -> np.ndarray:
    """The scores of one row alone."""
    hidden = model.hidden(torch.from_numpy(tokens)[None])
    return task.objective.scorer.log_p(model, hidden, torch.tensor([len(tokens)]), head)[0].numpy()


def calibration_by_hand(labels: list[int], p: np.ndarray, bins: int = 15) -> float:
    error = 0.0
    for low in range(bins):
        inside = [n for n in range(len(labels)) if low / bins < p[n].max() <= (low + 1) / bins]
        if inside:
            right = sum(p[n].argmax() == labels[n] for n in inside) / len(inside)
            error += (
                len(inside)
                / len(labels)
                * abs(right - float(np.mean([p[n].max() for n in inside])))
            )
    return error


# --- auxiliary tasks


sizes = st.integers(2, 12)


@given(
    own=sizes,
    other=sizes,
    batch=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
    grouped=st.booleans(),
)
@quick
def test_an_epoch_visits_each_row_of_the_main_task_once(
    tokenizer, own, other, batch, seed, grouped
):
    group: dict[str, Any] = (
        dict(objective=("simcse",), simcse_group=2, dropout=0.1, batch_size=2 * batch)
        if grouped
        else {}
    )
    train = [row(" ".join(WORDS[: n + 1]), LABELS[n % 2]) for n in range(own)]
    others = [row(" ".join(WORDS[n:]), LABELS[n % 2]) for n in range(other)]
    task = of_two(tokenizer, train, others, **dict(batch_size=batch, seed=seed) | group)
    epochs = 4
    n = task.order.steps_per_epoch
    steps = [task.rows("train", step) for step in range(epochs * n)]
    heads_of = [set(task.train.heads[groups.reshape(-1)].tolist()) for groups in steps]
    assert all(len(found) == 1 for found in heads_of)  # All rows of a step belong to one task.
    whole = [[g for g, of in zip(steps, heads_of, strict=True) if of == {head}] for head in (0, 1)]
    own_steps = len(whole[0]) // epochs
    for epoch in range(epochs):
        mine = [
            g
            for g, of in zip(steps[epoch * n :][:n], heads_of[epoch * n :][:n], strict=True)
            if of == {0}
        ]
        assert sorted(np.concatenate([g.reshape(-1) for g in mine])) == list(range(own))
    per_pass = task.order.orders[1].steps_per_epoch
    assert n - own_steps == min(own_steps, per_pass) and len(whole[1]) == epochs * (n - own_steps)
    # The next epoch continues where this one stopped.
    for begin in range(0, len(whole[1]) - per_pass + 1, per_pass):
        found = np.concatenate([g.reshape(-1) for g in whole[1][begin : begin + per_pass]])
        assert sorted(found) == list(range(own, own + other))
    again = copy.deepcopy(task)
    for step in np.random.default_rng(seed).permutation(epochs * n):
        assert np.array_equal(again.rows("train", int(step)), steps[step])


def test_auxiliary_steps_are_shuffled_by_seed_and_epoch(tokenizer):
    def turns(seed: int) -> list[list[int]]:
        task = of_two(
            tokenizer,
            [row(f"{n} stone", LABELS[n % 2]) for n in range(12)],
            batch_size=1,
            seed=seed,
        )
        n = task.order.steps_per_epoch
        assert n == 24
        found = [
            int(task.train.heads[task.rows("train", step).reshape(-1)[0]]) for step in range(2 * n)
        ]
        return [found[:n], found[n:]]

    first = turns(1)
    assert first == turns(1) and first[0] != first[1] and first[0] != turns(2)[0]
    assert sum(first[0]) == sum(first[1]) == 12


def test_a_single_task_keeps_the_order_of_its_rows(tokenizer):
    task = mood(tokenizer, seed=5)
    alone = Order(task.train.lengths, 4, seed=5)
    assert alone.steps_per_epoch == task.order.steps_per_epoch == 2
    assert all(np.array_equal(task.rows("train", step), alone(step)) for step in range(6))
    val = task.rows("val", 0)
    assert val.shape == (7, 1) and sorted(val.reshape(-1)) == list(range(7))
    assert (np.diff(task.val.lengths[val.reshape(-1)]) >= 0).all()


def test_ulmfit_unfreezes_by_epochs_of_all_tasks(tokenizer):
    task = of_two(tokenizer, method="ulmfit")
    model, n = task.build_model(task.cfg), task.order.steps_per_epoch
    assert n == 4 > task.order.orders[0].steps_per_epoch

    def trained(step: int) -> set[str]:
        """The heads or blocks (h.0, h.1, ...) that train in a step."""
        names = [name for group in task.groups(model, step) for name in group.params]
        return {
            re.sub(r"^transformer\.|(?<=h\.\d)\..*$|\.weight$|\.bias$", "", name) for name in names
        }

    assert trained(0) == trained(n - 1) == {"heads.mood", "heads.mood-2"}
    assert trained(n) == trained(2 * n - 1) == trained(0) | {"h.1", "ln_f"}
    assert trained(2 * n) == trained(n) | {"h.0"} and trained(3 * n) == trained(2 * n) | {
        "wte",
        "wpe",
    }


def test_an_auxiliary_task_has_its_own_labels_and_options(tokenizer):
    task = of_two(
        tokenizer,
        ROWS,
        [*OTHERS, row(" ".join(WORDS), "yes")],
        seq_len=12,
        class_weights=("1", "2", "3"),
    )
    assert task.head_names == ["mood", "mood-2"] and [rows.labels for rows in task.rows_of] == [
        LABELS,
        ("no", "yes"),
    ]
    assert task.train.heads.tolist() == [0] * len(ROWS) + [1] * (len(OTHERS) + 1)
    assert (task.train.weights[task.train.heads == 1] == 1).all()
    assert sum("1 of 13 training rows are longer" in text for text in task.source.warnings) == 1
    shapes = {
        name: tuple(p.shape)
        for name, p in task.build_model(task.cfg).named_parameters()
        if "heads" in name
    }
    assert shapes == {"heads.mood.weight": (3, 64), "heads.mood-2.weight": (2, 64)}
    alone = mood(tokenizer, seq_len=12)
    assert alone.identity()["data"] != task.identity()["data"]


# --- files


def exported(task: Mood, folder: Path) -> GPT:
    model = model_of(task)
    task.export(model, folder)
    return model


def test_predictions_are_written_as_jsonl_and_csv(tmp_path):
    found = np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    rows = [Row({"text": "one", "id": "x9"}, ""), Row({"text": "둘", "id": ""}, "")]
    write_predictions(tmp_path / "answers.jsonl", rows, found, LABELS, "Predicted_Sentiment")
    assert (
        tmp_path / "answers.csv"
    ).read_bytes() == b"id \t Predicted_Sentiment \nx9 , good \n1 , bad \n"
    first, second = (
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert first == {
        "text": "one",
        "id": "x9",
        "prediction": "good",
        "probabilities": {"bad": 0.1, "good": 0.7, "so-so": 0.2},
    }
    assert second["text"] == "둘" and second["prediction"] == "bad"


@given(log_p=st.lists(st.lists(st.floats(-700, 0), min_size=2, max_size=4), min_size=1, max_size=1))
@quick
def test_probabilities_add_up_to_one(log_p):
    found = probabilities(np.array(log_p))
    assert found.sum(1) == pytest.approx([1.0]) and (found >= 0).all()
    assert (
        found.argmax() == np.array(log_p).argmax() or max(log_p[0]) - sorted(log_p[0])[-2] < 1e-12
    )


@pytest.mark.parametrize("reads", READS)
def test_predict_uses_the_settings_of_the_run(reads, tokenizer, tmp_path):
    asked = [row(" ".join(WORDS[n:][:7]), LABELS[n % 3] if n else "", WORDS[n]) for n in range(9)]
    task = mood(tokenizer, **READS[reads])
    model = exported(task, tmp_path / "model")
    # nothing about --form
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu", allow_overlap=True)
    other, said = Mood(asked), []
    scores = other.predict(cfg, str(tmp_path / "model"), tmp_path / "answers.jsonl", said.append)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [{k: answer[k] for k in row("")} for answer in answers] == asked
    p = np.array([[answer["probabilities"][label] for label in LABELS] for answer in answers])
    assert p.sum(1) == pytest.approx([1] * 9) and [answer["prediction"] for answer in answers] == [
        LABELS[i] for i in p.argmax(1)
    ]
    for answer, given_row in zip(p, asked, strict=True):
        tokens, _ = row_encoder(task.source, task.trunk)(Row(given_row, ""))
        np.testing.assert_allclose(
            answer,
            probabilities(log_p_of(task, model, tokens)[None].astype(np.float64))[0],
            atol=1e-5,
        )
    # The first row has no label.
    right = [answer["prediction"] == answer["label"] for answer in answers[1:]]
    assert scores.keys() == {"accuracy", "macro_f1", "calibration_error"} and scores[
        "accuracy"
    ] == pytest.approx(sum(right) / 8)
    report = json.loads((tmp_path / "answers.report.json").read_text())
    assert report["rows"] == 8 and (tmp_path / "answers.csv").read_text().startswith(
        "id \t Predicted_Mood \n0 , "
    )


def test_predict_rows_may_lack_a_label_or_be_too_long(tokenizer, tmp_path):
    exported(mood(tokenizer, seq_len=8), tmp_path / "model")
    asked, said = Mood([row(" ".join(WORDS), ""), row("stone", "")]), []
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu", cut="start")
    assert (
        asked.predict(cfg, str(tmp_path / "model"), tmp_path / "answers.jsonl", said.append) == {}
    )
    assert said == [
        "1 of 2 rows are longer than 8 tokens and are truncated at the start of their text"
    ]
    assert {file.name for file in tmp_path.glob("answers*")} == {"answers.jsonl", "answers.csv"}
    with pytest.raises(UserError, match="too long for --seq-len 8"):
        asked.predict(
            dataclasses.replace(cfg, strict=True),
            str(tmp_path / "model"),
            tmp_path / "no.jsonl",
            print,
        )
    unknown = Mood([row("stone", "awful")])
    with pytest.raises(
        UserError, match="rows row 0: the label 'awful' is none of the training rows' labels"
    ):
        unknown.predict(cfg, str(tmp_path / "model"), tmp_path / "no.jsonl", print)
    assert not list(tmp_path.glob("no*"))


def test_predict_refuses_a_model_without_a_classifier(tokenizer, tmp_path):
    GPT(mood(tokenizer).trunk.shape).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"is not a classifier; train one first, or name a run of finetune.mood"
    ):
        Mood(ROWS).predict(
            ClassificationConfig(predict="rows"), str(tmp_path), tmp_path / "answers.jsonl", print
        )


def test_the_identity_names_what_changes_the_result(tokenizer):
    def identity(rows: Any = ROWS, val: Any = ROWS, **options: Any) -> dict[str, Any]:
        return mood(tokenizer, rows, val, **options).identity()

    first = identity()
    assert first == identity(lr=0.5, micro_batch=2, show_rows=0, keep_best=1)
    relabelled = [*ROWS[:-1], ROWS[-1] | {"label": "bad"}]
    changed = {
        "data": (
            identity(relabelled),
            identity(val=ROWS[1:]),
            identity(class_weights=("balanced",)),
        ),
        "pooling": (identity(pooling="mean"),),
        "form": (identity(form="prompt"),),
        "cut": (identity(cut="start"),),
        "label_smoothing": (identity(label_smoothing=0.1),),
        "head_dropout": (identity(head_dropout=0.1),),
        "objective": (identity(objective=("rdrop",), dropout=0.1),),
        "dropout": (identity(dropout=0.2),),
    }
    for name, others in changed.items():
        assert all(first[name] != other[name] for other in others), name


# --- training from a trained model


def test_init_keeps_the_head_if_its_labels_match(tokenizer, tmp_path):
    model = exported(mood(tokenizer), tmp_path)
    start: dict[str, Any] = dict(init=str(tmp_path), preset=None, tokenizer=None)
    other = [r | {"label": f"not {r['label']}"} for r in ROWS]  # the same number of labels
    for rows, options, taken in (
        (ROWS, {}, True),
        (other, {}, False),
        (ROWS, dict(pooling="mean"), False),
        (ROWS, dict(form="word"), None),
    ):
        task = mood(tokenizer, rows, **start | options)
        torch.manual_seed(3)
        found = dict(task.build_model(task.cfg).named_parameters())
        told = [text for text in task.source.warnings if "has a head for" in text]
        assert told == (
            []
            if taken is not False
            else [
                f"--init {tmp_path} has a head for bad, good, so-so (last), which does not fit; "
                "this run starts with a new head"
            ]
        )
        known = tokenizer.vocab_size  # The prompts of --form word add a token.
        for name, p in model.named_parameters():
            cut = slice(known if name == "transformer.wte.weight" else None)
            same = name in found and torch.equal(found[name][cut], p[cut])
            assert same == (bool(taken) if name.startswith("heads.") else True), name


def test_training_continues_from_a_hub_classifier(tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    task = mood(tokenizer)
    names = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: n for n, label in enumerate(LABELS)},
    }
    shape = dict(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    torch.manual_seed(0)
    theirs = GPT2ForSequenceClassification(
        GPT2Config(**shape, **names, pad_token_id=tokenizer.eot)
    ).eval()
    theirs.save_pretrained(tmp_path)
    task.trunk.tokenizer.save(tmp_path)
    tokenizer.save(tmp_path)
    task = mood(tokenizer, init=str(tmp_path), preset=None, tokenizer=None)
    model = task.build_model(task.cfg).eval()
    assert not any("has a head for" in text for text in task.source.warnings)
    for tokens in task.train.tokens:
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)[None]).logits.log_softmax(-1)[0].numpy()
        np.testing.assert_allclose(log_p_of(task, model, tokens), expected, atol=1e-4)
    scores = Mood(ROWS).predict(
        ClassificationConfig(predict="rows", device="cpu"),
        str(tmp_path),
        tmp_path / "a.jsonl",
        print,
    )
    assert 0 <= scores["accuracy"] <= 1  # It also predicts without training.
    task = mood(
        tokenizer,
        [row("a", "no"), row("b", "yes")],
        init=str(tmp_path),
        preset=None,
        tokenizer=None,
    )
    task.build_model(task.cfg)
    assert any(
        "has a head for bad, good, so-so (last), which does not fit; this run starts with a new head"
        in text
        for text in task.source.warnings
    )


# --- what other programs read


def test_transformers_gives_the_same_scores(tokenizer, tmp_path):
    from transformers import AutoTokenizer, GPT2ForSequenceClassification, pipeline

    task = mood(tokenizer)
    model = exported(task, tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(LABELS)) and theirs.config.label2id["good"] == 1
    own = [log_p_of(task, model, tokens) for tokens in task.train.tokens]
    with torch.no_grad():
        for ids in ([0], [3], [1, 0, 3], [*range(7)]):
            batch = pad_rows([task.train.tokens[i] for i in ids], tokenizer.eot)
            found = theirs(batch["idx"]).logits
            hidden = model.hidden(batch["idx"])
            torch.testing.assert_close(
                found, model.heads["mood"](hidden, batch["lengths"]), rtol=1e-4, atol=1e-4
            )
            np.testing.assert_allclose(
                found.log_softmax(-1), np.stack([own[i] for i in ids]), atol=1e-4
            )
    singles = [n for n, r in enumerate(ROWS) if not r["second"]]
    classify = pipeline(
        "text-classification",
        model=str(tmp_path),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    )
    for batch_size in (1, 3):
        answers = classify([ROWS[n]["first"] for n in singles], batch_size=batch_size)
        assert [answer["label"] for answer in answers] == [LABELS[own[n].argmax()] for n in singles]
        assert [answer["score"] for answer in answers] == pytest.approx(
            [float(np.exp(own[n].max())) for n in singles], abs=1e-4
        )


def test_final_names_its_padding_token(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path / "given")  # another filler would be taken for a row's last token
    file = tmp_path / "given" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "rain"}))
    exported(mood(tokenizer, tokenizer=str(tmp_path / "given")), tmp_path / "model")
    filler = AutoTokenizer.from_pretrained(tmp_path / "model").pad_token_id
    assert (
        filler
        == tokenizer.eot
        == json.loads((tmp_path / "model" / "config.json").read_text())["pad_token_id"]
    )


@pytest.mark.parametrize("reads", ["mean", "attention", "lstm", "word"])
def test_other_poolings_export_a_language_model_and_a_head(reads, tokenizer, tmp_path):
    from transformers import GPT2LMHeadModel

    task = mood(tokenizer, **READS[reads])
    exported(task, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "id2label" not in config
    theirs, idx = (
        GPT2LMHeadModel.from_pretrained(tmp_path).eval(),
        torch.from_numpy(task.train.tokens[3])[None],
    )
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(idx).logits, GPT.from_pretrained(tmp_path).eval()(idx), rtol=1e-4, atol=1e-4
        )
    assert (heads.find(tmp_path) is None) == (reads == "word") and heads.read_info(
        tmp_path
    ) == task.info


@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("reads", ["last", "attention", "word"])
def test_an_adapter_checkpoint_has_its_head_and_predicts(method, reads, tokenizer, tmp_path):
    GPT(mood(tokenizer).trunk.shape).save_pretrained(tmp_path / "base", eot=tokenizer.eot)
    tokenizer.save(tmp_path / "base")
    options: dict[str, Any] = dict(
        init=str(tmp_path / "base"), preset=None, tokenizer=None, method=method
    )
    task = mood(tokenizer, **options | READS[reads])
    torch.manual_seed(0)
    model = task.build_model(task.cfg)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if task.stored(name):
                p += 0.3 * torch.randn_like(p)
    task.export(model, tmp_path / "checkpoint", stored_only=True)
    files = {file.name: file.stat().st_size for file in (tmp_path / "checkpoint").iterdir()}
    assert (
        "adapter_model.safetensors" in files
        and "model.safetensors" not in files
        and "classifier.json" in files
    )
    assert ("heads.safetensors" in files) == (reads != "word")
    base = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert sum(size for name, size in files.items() if name.endswith("safetensors")) < base / 2
    cfg = ClassificationConfig(init="other", predict="rows", device="cpu")
    Mood(ROWS).predict(
        cfg, str(tmp_path / "checkpoint"), tmp_path / "answers.jsonl", lambda text: None
    )
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for answer, tokens in zip(answers, task.train.tokens, strict=True):
        expected = probabilities(log_p_of(task, model.eval(), tokens)[None].astype(np.float64))[0]
        np.testing.assert_allclose([*answer["probabilities"].values()], expected, atol=1e-5)
