"""Generation tasks: encoding rows as sequences, batches, losses, evaluation and --predict."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import UserError, resolve, resolve_steps
from given import GivenTexts, rows_are_given
from model import GPT
from moods import WORDS
from tasks.description import SpecialToken, Truncatable, plain
from tasks.generation.description import Answer, Example
from tasks.generation.options import GenerationConfig
from tasks.generation.task import IGNORE, Generation
from tasks.source import Source
from text.rows import Row
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe

GO = SpecialToken("<go>")


@pytest.fixture(scope="module", autouse=True)
def given_rows() -> Iterator[None]:
    with rows_are_given():
        yield


def example(row: Row, cfg: GenerationConfig) -> Example:
    long = (Truncatable(row["long"]),) if row["long"] else ()
    fixed = (row["fixed"], GO) if row["fixed"] else ()
    return Example((*long, *fixed), (row["answer"],))


def scores(answers: Sequence[Answer], train_rows: Sequence[Row]) -> dict[str, float]:
    return {"answered": len(answers)}


class Echo(Generation):
    """A task on given rows: a text that may be truncated, one that may not, and an answer."""

    def __init__(
        self,
        train: list[dict[str, str]],
        val: list[dict[str, str]] | None = None,
        best: tuple[str, str] = ("val_loss", "min"),
    ):
        super().__init__(
            GivenTexts(
                name="echo",
                config=GenerationConfig,
                columns={"long": ("long",), "fixed": ("fixed",), "answer": ("answer",)},
                optional=("long", "fixed"),
                toy=({"fixed": "go", "answer": "yes"},),
                example=example,
                scores=scores,
                best=best,
                given={"train": train, "validation": val or train, "test": val or train},
            )
        )
        self.given = train

    def predict(self, cfg: Any, where: str, path: Path, say: Any) -> dict[str, float]:
        return self.open_predictor(cfg, where, say).write(path, say)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe([" ".join(WORDS * 3)], 300, tmp_path_factory.mktemp("echo") / "tokenizer")


def set_up(
    task: Echo, tokenizer: Tokenizer, say: Callable[[str], None] = lambda text: None, **options: Any
) -> Echo:
    """The task after `setup`, for a model from scratch."""
    fixed: dict[str, Any] = dict(
        init="scratch", preset="micro", tokenizer=tokenizer.source, precision="fp32"
    )
    fixed |= dict(data="rows", warmup_steps=0)
    cfg = resolve(GenerationConfig(**fixed | options), "cpu")
    assert isinstance(cfg, GenerationConfig)
    facts = task.setup(cfg, say)
    assert facts.length
    task.cfg = resolve_steps(cfg, *facts.length)
    return task


def echo(
    tokenizer: Tokenizer, train: list[dict[str, str]], val: Any = None, **options: Any
) -> Echo:
    """A task that trains on `train` and validates on `val`. None holds out some of `train`."""
    return set_up(
        Echo(train, val), tokenizer, **dict[str, Any](val_data="val" if val else None) | options
    )


def row(answer: str, fixed: str = "", long: str = "") -> dict[str, str]:
    return {"answer": answer, "fixed": fixed, "long": long}


def first(learned: np.ndarray) -> int:
    """The index of the first token that is learned. All others after it are learned too."""
    start = int(learned.argmax())
    assert learned[start:].all()
    return start


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=25).map(" ".join)
quick = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- rows to sequences


@given(
    rows=st.lists(st.builds(row, texts, st.just("") | texts, st.just("") | texts), max_size=6),
    seq_len=st.integers(8, 40),
)
@quick
def test_long_rows_are_truncated_split_or_dropped(tokenizer, rows, seq_len):
    rows = [row("the end"), *rows]
    task = echo(tokenizer, rows, rows, seq_len=seq_len)
    go, eot, encode = (
        task.trunk.tokenizer.special_id(GO),
        task.trunk.tokenizer.eot,
        tokenizer.encode,
    )
    counts = dict.fromkeys(("are truncated", "cannot be truncated", "are split"), 0)
    expected: list[tuple[list[int], int]] = []
    for r in rows:
        long, fixed, answer = (
            encode(r["long"]),
            [*encode(r["fixed"]), go] if r["fixed"] else [],
            encode(r["answer"]),
        )
        rest = [*fixed, *answer, eot]  # a text that cannot be truncated
        whole = [eot, *long, *rest]
        over = len(whole) - (seq_len + 1)
        if over <= 0:
            expected.append((whole, 1 + len(long) + len(fixed)))
        elif long and over <= len(long):
            counts["are truncated"] += 1
            expected.append(
                ([eot, *long[: len(long) - over], *rest], seq_len + 1 - len(answer) - 1)
            )
        elif not long and 1 + len(fixed) < seq_len + 1:
            counts["are split"] += 1
            expected.append((whole[: seq_len + 1], 1 + len(fixed)))
            expected += [
                (whole[i : i + seq_len + 1], 1) for i in range(seq_len, len(whole) - 1, seq_len)
            ]
        else:
            counts["cannot be truncated"] += 1
    for split in (task.train, task.val):
        assert [
            (t.tolist(), first(on)) for t, on in zip(split.tokens, split.learned, strict=True)
        ] == expected
        assert split.lengths.max() <= seq_len
    told = [
        f"{n} of {len(rows)} {what}"
        for n in counts.values()
        if n
        for what in ("training", "validation")
    ]
    (known,) = [w for w in task.source.warnings if "also validation rows" in w]  # here all are
    assert known.startswith(f"{len(rows)} of {len(rows)} ")
    others = [w for w in task.source.warnings if "lose their answer" not in w]
    assert len(others) == len(told) + 1
    for what, n in counts.items():
        assert sum(
            what in w and w.startswith(f"{n} of {len(rows)} ") for w in task.source.warnings
        ) == (2 if n else 0)


@given(answer=texts, fixed=st.just("") | texts, seq_len=st.integers(8, 20))
@quick
def test_every_token_of_a_split_text_is_learned_once(tokenizer, answer, fixed, seq_len):
    task = echo(tokenizer, [row("the end"), row(answer, fixed)], [row("a")], seq_len=seq_len)
    sequences = list(zip(task.train.tokens[1:], task.train.learned[1:], strict=True))
    learned = [token for tokens, on in sequences for token in tokens[on].tolist()]
    assert learned == ([*tokenizer.encode(answer), tokenizer.eot] if sequences else [])
    assert bool(sequences) == (not fixed or len(tokenizer.encode(fixed)) + 2 < seq_len + 1)


def test_strict_refuses_a_row_that_is_too_long(tokenizer):
    long = " ".join(WORDS)
    for bad in (row("stone", "a", long), row(long, "a", "the")):
        with pytest.raises(
            UserError, match=r"rows row 1: \d+ tokens too long for --seq-len 12 \(--strict\)"
        ):
            echo(tokenizer, [row("rain"), bad], [row("a")], seq_len=12, strict=True)
    # The answer is not lost.
    task = echo(tokenizer, [row("rain"), row(long)], [row("a")], seq_len=12, strict=True)
    assert len(task.train.rows) > 2
    with pytest.raises(UserError, match="no training row fits into 12 tokens"):
        echo(tokenizer, [row(long, "a", "the")], [row("a")], seq_len=12)


def test_only_a_special_token_itself_is_one_token(tokenizer):
    task = echo(tokenizer, [row("<go> and <|endoftext|>", "a <go>")], [row("a")])
    go, tokens = task.trunk.tokenizer.special_id(GO), task.train.tokens[0].tolist()
    assert go == tokenizer.vocab_size and tokens.count(go) == 1 and tokens.count(tokenizer.eot) == 2
    assert tokens[first(task.train.learned[0]) - 1] == go
    assert task.trunk.tokenizer.decode(tokens, skip_special=True) == "a <go><go> and <|endoftext|>"
    assert plain(("a", GO, Truncatable("b"))) == "ab"


def test_show_rows_marks_the_learned_text(tokenizer):
    said: list[str] = []
    rows = [row("stone", "bridge of"), row("rain", "slept in")]
    task = set_up(Echo(rows), tokenizer, said.append, val_data="val", show_rows=1)
    i = int(task.order(0).reshape(-1)[0])
    answer, fixed = task.given[i]["answer"], task.given[i]["fixed"]
    learned = len(tokenizer.encode(answer)) + 1
    assert said == [
        f"row {i} ({len(task.train.tokens[i])} tokens, {learned} of them learned):\n"
        f"<|endoftext|>{fixed}<go>⟦{answer}<|endoftext|>⟧\n"
    ]


# --- holding out


def test_a_group_of_rows_is_held_out_together(tokenizer):
    rows = [row(f"{a} {n}", a) for a in WORDS[:8] for n in range(5)]
    task = Echo(rows)
    task.description = dataclasses.replace(task.description, group=lambda row: row["fixed"])
    set_up(task, tokenizer)
    train, val = ({r["fixed"] for r in split.rows} for split in (task.train, task.val))
    assert train | val == set(WORDS[:8]) and not train & val and len(val) == 1
    other = echo(tokenizer, rows)
    assert len(other.val.rows) == 4 and len(other.train.rows) == 36
    assert [r.where for r in echo(tokenizer, rows).val.rows] == [r.where for r in other.val.rows]
    assert [r.where for r in echo(tokenizer, rows, [row("a")]).val.rows] == ["val row 0"]


# --- batches and losses

ROWS = [
    row("slept on", "the town"),
    row(" ".join(WORDS), "a", "of"),
    row("stone"),
    row("rain in the rain", "", "the river ran"),
    row("bridge", " ".join(WORDS)),
    row("a bridge of stone " * 9),
]


@pytest.fixture(scope="module", params=["likelihood", "unlikelihood"])
def trained(request, tokenizer) -> tuple[Echo, GPT]:
    """A task and a model with random weights, whose losses differ from row to row."""
    objective = ("unlikelihood",) if request.param == "unlikelihood" else ()
    task = echo(tokenizer, ROWS, objective=objective, unlikelihood=0.7, batch_size=4)
    torch.manual_seed(1)
    model = task.build_model(task.cfg)
    assert isinstance(model, GPT)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * (p.dim() > 1)
    return task, model.train()


ids = st.lists(st.integers(0, 4), min_size=1, max_size=8)  # One of the six rows is held out.


@given(ids=ids)
@quick
def test_a_batch_has_each_row_and_its_targets(trained, ids):
    task, _ = trained
    made = task.batch("train", np.array(ids))
    batch = made.tensors
    assert batch["idx"].shape == batch["targets"].shape and batch["idx"].shape[1] in task.buckets
    # the smallest bucket that holds them
    assert (
        task.buckets[task.buckets < batch["idx"].shape[1]] < task.train.lengths[ids].max()
    ).all()
    for i, idx, targets in zip(ids, batch["idx"].tolist(), batch["targets"].tolist(), strict=True):
        tokens, learned = task.train.tokens[i].tolist(), first(task.train.learned[i])
        for t in range(len(idx)):
            assert idx[t] == (tokens[t] if t < len(tokens) - 1 else task.trunk.tokenizer.eot)
            assert targets[t] == (tokens[t + 1] if learned - 1 <= t < len(tokens) - 1 else IGNORE)
    n_learned = sum(task.train.learned[i].sum() for i in ids)
    assert made.weights == dict.fromkeys(task.terms, n_learned)
    n_tokens = sum(len(task.train.tokens[i]) - 1 for i in ids)
    assert made.amounts == {
        "tokens": n_tokens,
        "padded_tokens": batch["idx"].numel(),
        "rows": len(ids),
    }


def plain_loss(task: Echo, model: GPT, i: int) -> dict[str, float]:
    """The loss of training row `i` alone and unpadded, position by position in fp64."""
    exact, tokens = copy.deepcopy(model).double(), task.train.tokens[i]
    with torch.no_grad():
        log_p = F.log_softmax(exact(torch.from_numpy(tokens[None, :-1]))[0], -1)
    sums = dict.fromkeys(task.terms, 0.0)
    for t in range(first(task.train.learned[i]) - 1, len(tokens) - 1):
        sums["nll"] -= float(log_p[t, tokens[t + 1]])
        if "unlikelihood" in sums:
            candidates = set(tokens[: t + 1].tolist()) - {int(tokens[t + 1])}
            sums["unlikelihood"] -= sum(
                math.log1p(-math.exp(float(log_p[t, c]))) for c in candidates
            )
    return sums


def test_the_loss_of_a_batch_is_the_sum_over_its_rows(trained):
    task, model = trained
    alone = [plain_loss(task, model, i) for i in range(len(task.train.rows))]
    draw = np.random.default_rng(0)
    for size in (1, 2, 5, 7):
        ids = draw.integers(0, len(alone), size)
        found = {
            name: float(value.detach())
            for name, value in task.loss(model, task.batch("train", ids).tensors).items()
        }
        assert found == pytest.approx(
            {name: sum(alone[i][name] for i in ids) for name in task.terms}, rel=1e-5
        )


def test_padding_does_not_change_gradients(trained):
    task, model = trained

    def gradients(ids: list[int]) -> list[Tensor]:
        model.zero_grad()
        sum(
            task.terms[k] * v
            for k, v in task.loss(model, task.batch("train", np.array(ids)).tensors).items()
        ).backward()
        return [p.grad.clone() for p in model.parameters()]

    together = gradients([0, 1, 4])
    for one, parts in zip(
        together, zip(*(gradients([i]) for i in (0, 1, 4)), strict=True), strict=True
    ):
        torch.testing.assert_close(one, sum(parts), rtol=1e-4, atol=1e-4 * float(one.abs().max()))


# --- evaluation


def test_evaluation_does_not_depend_on_the_batches(tokenizer):
    rows = [ROWS[5], *ROWS[:5]]  # The first row continues in a second sequence.
    task = echo(tokenizer, ROWS, rows, seq_len=24, eval_rows=3, max_new_tokens=6, temperature=1.0)
    torch.manual_seed(1)
    model = task.build_model(task.cfg).eval()
    order = task.rows("val", 0).reshape(-1)
    assert sorted(order) == list(range(len(task.val.rows)))
    begins = [i for i, tokens in enumerate(task.val.tokens) if tokens[0] == tokenizer.eot]
    assert 1 not in begins and task.decoded == begins[:3]
    assert sorted(order[:3]) == task.decoded  # These are together in the first batch.
    results = []
    for size in (len(order), 2, 1):
        sums: dict[str, float] = {}
        outputs: dict[int, Any] = {}
        with torch.no_grad():
            for at in range(0, len(order), size):
                batch = task.batch("val", order[at : at + size])
                counts, found = task.evaluate(model, batch.tensors)
                for name, value in counts.items():
                    sums[name] = sums.get(name, 0.0) + float(value)
                outputs |= found
        results.append((task.metrics(sums, outputs), outputs))
    for metrics, outputs in results[1:]:
        assert outputs == results[0][1]
        assert metrics == pytest.approx(results[0][0], rel=1e-5)
    metrics, outputs = results[0]
    exact = [plain_loss(on_validation(task), model, i)["nll"] for i in range(len(order))]
    learned = sum(int(on.sum()) for on in task.val.learned)
    assert metrics["val_loss"] == pytest.approx(sum(exact) / learned, rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(sum(exact) / learned), rel=1e-4)
    assert metrics["answered"] == 3
    assert [outputs[i].reference for i in task.decoded] == [r["answer"] for r in rows[:3]]
    assert all(isinstance(a, Answer) and a.text for a in outputs.values())


def on_validation(task: Echo) -> Echo:
    """The task with its validation rows as training rows."""
    other = copy.copy(task)
    other.train = task.val
    return other


def test_without_decoded_rows_the_loss_chooses_the_best(tokenizer):
    sums = {"nll": 1.0, "tokens": 2.0, "shared_nll": 0.0, "shared_tokens": 0.0}
    for eval_rows, best in ((2, ("answered", "max")), (0, ("val_loss", "min"))):
        task = set_up(
            Echo(ROWS, ROWS, ("answered", "max")), tokenizer, val_data="val", eval_rows=eval_rows
        )
        assert task.best == best and len(task.decoded) == eval_rows
        assert best[0] in task.metrics(sums, dict.fromkeys(range(eval_rows)))


def test_a_prompt_leaves_the_answer_a_quarter_of_the_context(tokenizer):
    long, words = " ".join(WORDS * 4), tokenizer.encode(" ".join(WORDS * 4))
    task = echo(
        tokenizer, [row("rain")], [row("stone", "of a", long), row("stone", long[:60])], seq_len=32
    )
    fixed, go = tokenizer.encode("of a"), task.trunk.tokenizer.special_id(GO)
    kept = 24 - 2 - len(fixed)
    assert task.prompt(0) == [tokenizer.eot, *words[:kept], *fixed, go]
    # In training, the text fills all the room that the answer leaves.
    assert first(task.val.learned[0]) > 24
    assert task.prompt(1) == [tokenizer.eot, *tokenizer.encode(long[:60]), go]


def test_every_predict_row_is_answered_in_order(tokenizer, tmp_path):
    rows = [row("stone", "the town slept"), row("rain", "a"), row("bridge", "of stone and")]
    task = echo(tokenizer, ROWS, rows, seq_len=32, decode="greedy", max_new_tokens=4, batch_size=2)
    model = task.build_model(task.cfg)
    task.export(model, tmp_path / "model")
    cfg = dataclasses.replace(task.cfg, predict="rows", device="cpu")
    scores = Echo(rows).predict(cfg, str(tmp_path / "model"), tmp_path / "answers.jsonl", print)
    assert scores == {"answered": 3}
    alone = [text for i in range(3) for _, text in task.answerer(model, [task.prompt(i)], [i])]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines == [r | {"prediction": text} for r, text in zip(rows, alone, strict=True)]
    long, said = [row("a", " ".join(WORDS * 3)), *rows], []
    assert Echo(long).predict(
        cfg, str(tmp_path / "model"), tmp_path / "long.jsonl", said.append
    ) == {"answered": 4}
    assert said == [
        "1 of 4 prompts are longer than the model's context of 32, the first in rows row 0: only "
        "their last 24 tokens are read"
    ]
    strict = dataclasses.replace(cfg, strict=True)
    with pytest.raises(
        UserError, match=r"rows row 0: a prompt of \d+ tokens is too long for a context of 32"
    ):
        Echo(long).predict(strict, str(tmp_path / "model"), tmp_path / "other.jsonl", print)
    assert not (tmp_path / "other.jsonl").exists()
    some = Echo([*rows, row("", "the town")])  # Only the first three have a true answer.
    assert some.predict(cfg, str(tmp_path / "model"), tmp_path / "some.jsonl", said.append) == {
        "answered": 3
    }
    assert said[1:] == ["3 of 4 rows have a true answer. Only these are scored"]
    broken = Echo(rows)
    torn = Row(dict(row("")), "a line 1", "is torn")
    broken.predict_rows = [torn, *Source(broken.description, cfg, print).read("rows", "test")]
    assert broken.predict(cfg, str(tmp_path / "model"), tmp_path / "broken.jsonl", said.append) == {
        "answered": 3
    }
    first, *others = [
        json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()
    ]
    assert (first["prediction"], first["unreadable"]) == (None, "is torn") and len(others) == 3
    unknown = Echo([row("", "the town")])
    assert unknown.predict(cfg, str(tmp_path / "model"), tmp_path / "unknown.jsonl", print) == {}


def test_samples_answer_the_prompts_option(tokenizer):
    task = echo(tokenizer, ROWS, ROWS, max_new_tokens=3)
    model = task.build_model(task.cfg)
    assert [prompt for prompt, _ in task.samples(model)] == ["the town<go>", "ofa<go>"]
    task.cfg = dataclasses.replace(task.cfg, prompts=("rain", "", "stone"))
    assert [prompt for prompt, _ in task.samples(model)] == ["rain", "", "stone"]


# --- the identity of a run


def test_the_identity_names_what_changes_the_result(tokenizer):
    def identity(rows: Any = ROWS, val: Any = ROWS, **options: Any) -> dict[str, Any]:
        return echo(tokenizer, rows, val, **options).identity()

    first = identity()
    assert first == identity(lr=0.5, eval_rows=7, decode="greedy", micro_batch=2, show_rows=0)
    changed = {
        "batch_size": identity(batch_size=3),
        "data": identity(rows=ROWS[1:]),
        "seq_len": identity(seq_len=64),
        "objective": identity(objective=("unlikelihood",)),
        "n_layer": identity(n_layer=3),
    }
    for name, other in changed.items():
        assert first[name] != other[name], name
    assert identity(val=ROWS[1:])["data"] != first["data"]


def test_a_seq_len_beyond_the_context_is_refused(tokenizer, tmp_path):
    model = GPT(echo(tokenizer, ROWS, seq_len=32).trunk.shape)
    model.save_pretrained(tmp_path)
    options: dict[str, Any] = dict(init=str(tmp_path), preset=None)
    assert echo(tokenizer, ROWS, **options).trunk.seq_len == 32
    assert echo(tokenizer, ROWS, method="prefix", prefix_tokens=5, **options).trunk.seq_len == 27
    with pytest.raises(UserError, match="--seq-len 28 is longer than the 27 tokens"):
        echo(tokenizer, ROWS, seq_len=28, method="soft-prompt", prefix_tokens=5, **options)
    with pytest.raises(UserError, match="--seq-len 33 is longer than the 32 positions"):
        echo(tokenizer, ROWS, seq_len=33, **options)
