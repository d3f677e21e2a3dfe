"""evaluate.py against plain transformers loops, one row at a time."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate as script
from config import UserError
from decoding.benchmarks import Benchmark, HellaSwag, Lambada, file_rows, hellaswag_row, read_rows
from decoding.scoring import bits_per_byte, make_span, perplexity
from model import GPT, GPTConfig
from storage.shards import byte_lengths
from text.prepare import tokenize_to_folder
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe

BLOCK = 48
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
source = random.Random(0)
WORDS = ["".join(source.choices("abcdefgé", k=source.randint(2, 6))) for _ in range(60)]


@pytest.fixture(autouse=True)
def commands_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def text(seed: int, n_words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hub"
    tokenizer = train_bpe([text(i, 12) for i in range(200)], 331, folder)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=331, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder, eot=tokenizer.eot)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return load_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GPT:
    return GPT.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def reference(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def figures(monkeypatch, capsys, checkpoint: Path, *words: str | Path) -> dict:
    """The output of `evaluate.py CHECKPOINT WORDS --json -`."""
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *map(str, (checkpoint, *words)), "--json", "-"]
    )
    script.main()
    return json.loads(capsys.readouterr().out)


def evaluated(
    kind: type[Benchmark], model: GPT, tokenizer: Tokenizer, rows: Iterable[Any], batch_tokens: int
) -> dict[str, Any]:
    benchmark = kind(tokenizer, list(rows), model.config.block_size)
    return script.evaluate_benchmark(model, benchmark, batch_tokens)


def log_probs(reference, ids: list[int]) -> torch.Tensor:
    """Logits (len(ids) - 1, vocab_size) fp32."""
    with torch.no_grad():
        return reference(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)


def of_continuation(
    reference, before: list[int], after: list[int], block: int
) -> tuple[torch.Tensor, bool]:
    """The log-probability of each token of `after`, and whether each token is the argmax."""
    ids = (before + after)[-(block + 1) :]
    scores = log_probs(reference, ids)[-len(after) :]
    return scores[torch.arange(len(after)), after], scores.argmax(-1).tolist() == after


def plain_hellaswag(
    reference, tokenizer, rows: list[dict], block: int
) -> tuple[dict[str, float], list[float]]:
    """The four accuracies of rows on which both harnesses agree, and the mean of each ending."""
    right = dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_tokens"), 0)
    means: list[float] = []
    for row in rows:
        before = tokenizer.encode(row["ctx"] if "ctx" in row else row["ctx_a"] + " " + row["ctx_b"])
        scored = [
            of_continuation(reference, before, tokenizer.encode(" " + e), block)[0]
            for e in row["endings"]
        ]
        total = torch.stack([s.double().sum() for s in scored])
        by = {
            "acc": [1] * len(scored),
            "acc_norm": [len(e) for e in row["endings"]],
            "acc_bytes": [len(e.encode()) for e in row["endings"]],
            "acc_tokens": [len(s) for s in scored],
        }
        for name, lengths in by.items():
            right[name] += int((total / torch.tensor(lengths)).argmax()) == int(row["label"])
        means += (total / torch.tensor(by["acc_tokens"])).tolist()
    return {name: count / len(rows) for name, count in right.items()}, means


def plain_lambada(reference, tokenizer, rows: list[dict], block: int) -> tuple[float, float, float]:
    """Accuracy, perplexity per word, and perplexity per token."""
    hits, nll, tokens = 0, 0.0, 0
    for row in rows:
        context, word = row["text"].rsplit(" ", 1)
        scored, greedy = of_continuation(
            reference, tokenizer.encode(context), tokenizer.encode(" " + word), block
        )
        hits, nll, tokens = hits + greedy, nll - float(scored.sum()), tokens + len(scored)
    return hits / len(rows), math.exp(nll / len(rows)), math.exp(nll / tokens)


HELLASWAG: list[dict[str, Any]] = [
    {
        "ind": i,
        "ctx": text(i, 4 + 3 * i),
        "label": i % 4,
        "endings": [text(100 * i + j, 2 + j) for j in range(4)],
    }
    for i in range(12)  # The longest contexts exceed block_size.
]
OFFICIAL = [
    {
        "ctx_a": text(i, 5),
        "ctx_b": text(50 + i, 3),
        "label": str(row["label"]),
        "endings": row["endings"],
    }
    for i, row in enumerate(HELLASWAG)
]
LAMBADA = [{"text": text(i, 3 + 3 * i)} for i in range(12)]


@pytest.mark.parametrize("rows", [HELLASWAG, OFFICIAL], ids=["ctx", "official"])
@pytest.mark.parametrize("batch_size", ["1", "8"])
def test_hellaswag(
    checkpoint, tokenizer, reference, tmp_path, monkeypatch, capsys, rows, batch_size
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    ours = figures(
        monkeypatch, capsys, checkpoint, "--hellaswag", file, "--batch-size", batch_size
    )["hellaswag"]
    expected, _ = plain_hellaswag(reference, tokenizer, rows, BLOCK)
    assert {name: ours[name] for name in expected} == expected and ours["rows"] == 12


ends = st.lists(st.sampled_from([*WORDS, "é", "ö à", "한국"]), min_size=1, max_size=5).map(" ".join)
swag = st.fixed_dictionaries(
    {"ctx": ends, "endings": st.lists(ends, min_size=4, max_size=4), "label": st.integers(0, 3)}
)


@given(rows=st.lists(swag, min_size=1, max_size=6), batch_tokens=st.sampled_from([1, 60, 1000]))
@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_hellaswag_accuracies_match_a_loop(model, tokenizer, reference, rows, batch_tokens) -> None:
    """These words differ in characters, bytes and tokens. The first of equal endings is chosen."""
    ours = evaluated(HellaSwag, model, tokenizer, map(hellaswag_row, rows), batch_tokens)
    expected, _ = plain_hellaswag(reference, tokenizer, rows, BLOCK)
    assert {name: ours[name] for name in expected} == expected


def test_official_hellaswag_rows_match_the_harness() -> None:
    official = {
        "activity_label": "Health",
        "ctx_a": "How to nap [title] Find a bed [step] Lie down.",
        "ctx_b": "then CLOSE",
        "ctx": "How to nap [title] Find a bed",
        "endings": ["[step] your eyes.  ", "a  door [title] Now"],
        "label": "1",
    }
    row = hellaswag_row(official)
    assert row.harness.context == "Health: How to nap. Find a bed Lie down. Then close"
    assert row.harness.endings == (" your eyes.", "a door. Now") and row.label == 1
    assert (row.plain.context, row.plain.endings) == (official["ctx"], tuple(official["endings"]))


def test_rows_without_a_label_are_not_scored(model, tokenizer) -> None:
    rows = [hellaswag_row(HELLASWAG[0] | {"label": label}) for label in ("", -1, "-1", None, 0)]
    ours = evaluated(HellaSwag, model, tokenizer, rows, 256)
    assert (ours["rows"], ours["rows_without_label"]) == (1, 4)
    with pytest.raises(UserError, match="no row of HellaSwag has a label"):
        evaluated(HellaSwag, model, tokenizer, rows[:4], 256)


@pytest.mark.parametrize("target", ["folder", "rows.jsonl", "/proc/none/figures.json"])
def test_an_unwritable_json_is_refused_before_the_work(target, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "rows.jsonl", LAMBADA)
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", "nowhere", "--lambada", "rows.jsonl", "--json", target]
    )
    # The model does not exist, and nothing looks for it.
    with pytest.raises(UserError, match="--json"):
        script.main()


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_do_not_depend_on_the_batch(model, tokenizer, reference, batch_tokens: int) -> None:
    spans = [
        make_span(tokenizer, r["ctx"], " " + e, BLOCK) for r in HELLASWAG for e in r["endings"]
    ]
    scores = script.score(model, spans, batch_tokens, "")
    _, expected = plain_hellaswag(reference, tokenizer, HELLASWAG, BLOCK)
    assert [-s.nll / s.tokens for s in scores] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch_size", ["1", "8"])
def test_lambada(
    checkpoint, tokenizer, reference, tmp_path, monkeypatch, capsys, batch_size
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", LAMBADA)
    ours = figures(monkeypatch, capsys, checkpoint, "--lambada", file, "--batch-size", batch_size)[
        "lambada"
    ]
    expected = plain_lambada(reference, tokenizer, LAMBADA, BLOCK)
    assert (ours["accuracy"], ours["perplexity"], ours["token_perplexity"]) == pytest.approx(
        expected, rel=1e-4
    )


def test_lambada_counts_an_expected_word(model, tokenizer, reference) -> None:
    """The last word of each row is the reference's own continuation, so all of them are right."""
    rows = []
    for seed in range(200):
        context = text(seed, 6)
        ids = tokenizer.encode(context)
        word = tokenizer.decode([int(log_probs(reference, [*ids, 0])[-1].argmax())])
        if word.startswith(" ") and word.strip() and tokenizer.encode(word) and " " not in word[1:]:
            rows.append((context, word))
    expected = [of_continuation(reference, *map(tokenizer.encode, row), BLOCK)[1] for row in rows]
    ours = evaluated(Lambada, model, tokenizer, rows, 256)
    assert ours["accuracy"] == sum(expected) / len(rows) > 0


def test_limit(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    file = write_rows(tmp_path / "rows.jsonl", LAMBADA)
    assert (
        figures(monkeypatch, capsys, checkpoint, "--lambada", file, "--limit", "5")["lambada"][
            "rows"
        ]
        == 5
    )


# ---- --data


def plain_nll(reference, ids: list[int], seq_len: int) -> float:
    """Nats of every token but the first, in windows that do not overlap."""
    total = 0.0
    for begin in range(0, len(ids) - 1, seq_len):
        window = ids[begin : begin + seq_len + 1]
        scores = log_probs(reference, window)
        total -= float(scores[torch.arange(len(window) - 1), window[1:]].sum())
    return total


@pytest.mark.parametrize(("seq_len", "batch_size"), [(BLOCK, 4), (BLOCK, 1), (17, 3), (1, 500)])
def test_data(
    checkpoint, tokenizer, reference, tmp_path, monkeypatch, capsys, seq_len: int, batch_size: int
) -> None:
    documents = [text(i, 20) for i in range(7)]
    (tmp_path / "books.jsonl").write_text("\n".join(json.dumps({"body": d}) for d in documents))
    words = (
        "--data",
        tmp_path / "books.jsonl",
        "--text-column",
        "body",
        "--cache",
        tmp_path / "cache",
    )
    options = ("--seq-len", str(seq_len), "--batch-size", str(batch_size))
    ours = figures(monkeypatch, capsys, checkpoint, *words, *options)["data"]
    ids = [id for d in documents for id in (tokenizer.eot, *tokenizer.encode(d))]
    n_bytes = sum(len(d.encode()) for d in documents)
    nll = plain_nll(reference, ids, seq_len)
    assert (ours["tokens"], ours["bytes"]) == (len(ids) - 1, n_bytes)
    assert ours["loss"] == pytest.approx(nll / (len(ids) - 1), abs=1e-4)
    assert ours["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-4)
    assert ours["bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, abs=1e-4)


def test_a_corpus_shorter_than_a_window(
    checkpoint, tokenizer, reference, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "short.txt").write_text("abc de")
    words = ("--data", tmp_path / "short.txt", "--cache", tmp_path / "cache")
    ours = figures(monkeypatch, capsys, checkpoint, *words)["data"]
    ids = [tokenizer.eot, *tokenizer.encode("abc de")]
    assert ours["loss"] == pytest.approx(
        plain_nll(reference, ids, BLOCK) / (len(ids) - 1), abs=1e-4
    )


def test_only_validation_shards_are_scored(
    checkpoint, tokenizer, tmp_path, monkeypatch, capsys
) -> None:
    """A folder's val shards are scored and its others are not. A single val shard can be named
    too."""
    from text import corpus

    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(text(i, 10) for i in range(200)))
    folder = tmp_path / "shards"
    folder.mkdir()
    tokenize_to_folder(
        corpus.TextFiles([tmp_path / "text.txt"]),
        tokenizer,
        folder,
        "text",
        True,
        lambda line: None,
    )
    shard = next(folder.glob("val_*.bin"))

    def found(where: Path) -> dict[str, Any]:
        words = ("--data", where, "--cache", tmp_path / "cache")
        data = figures(monkeypatch, capsys, checkpoint, *words)["data"]
        return {name: value for name, value in data.items() if name != "seconds"}

    one = found(folder)
    assert one == found(shard) and one["tokens"] < 200 and byte_lengths(tokenizer).max() > 1
    (folder / "manifest.json").unlink()
    assert found(shard) == one  # the tokenizer tells the bytes


def test_metrics() -> None:
    assert perplexity(2 * math.log(8), 2) == pytest.approx(8)
    assert perplexity(1e6, 1) == math.inf
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)


# ---- the command


def test_table_and_json_file(checkpoint: Path, tmp_path: Path, repo: Path, run) -> None:
    file = write_rows(tmp_path / "rows.jsonl", LAMBADA)
    done = run(
        repo / "evaluate.py", checkpoint, "--lambada", file, "--json", tmp_path / "figures.json"
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "figures.json").read_text())
    assert f"{written['lambada']['perplexity']:,.4f}" in done.stdout
    assert written["config"]["lambada"] == str(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no checkpoint is named"),
        (["here"], "nothing to evaluate on"),
        (["here", "--hellaswagg", "x"], "did you mean --hellaswag"),
        (["here", "--lambada", "missing.jsonl"], "missing.jsonl: No such file"),
        (["here", "--lambada", "text"], "line 1 is not valid JSON"),
        (["here", "--lambada", "empty"], "holds no rows"),
        (["here", "--hellaswag", "foreign"], "row 2 is not a row of this benchmark"),
        (["here", "--lambada", "word"], "row 1 is not a row of this benchmark"),
        (["here", "--data", "stdlib", "--batch-size", "0"], "--batch-size is 0"),
        (
            ["{checkpoint}", "--data", "stdlib", "--seq-len", "99"],
            "longer than the model's block_size 48",
        ),
        (["here", "--data", "text", "--json", "no/where"], "there is no folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(
    words: list[str], message: str, checkpoint, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    write_rows(tmp_path / "foreign", [HELLASWAG[0], {**HELLASWAG[0], "label": "9"}])
    write_rows(tmp_path / "word", [{"text": "abc"}])
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", *(w.format(checkpoint=checkpoint) for w in words)]
    )
    with pytest.raises(UserError, match=message) as raised:
        script.main()
    assert "\n" not in str(raised.value)


# ---- lm-evaluation-harness


def harness_task(name: str, file: Path, metrics: str, **fields: Any) -> dict[str, Any]:
    """A task of the harness with the rows of a local file."""
    files = {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "datasets")}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "metric_list": [{"metric": metric} for metric in metrics.split()],
        **fields,
    }


def test_the_harness_finds_the_same_scores(
    checkpoint, tokenizer, tmp_path, monkeypatch, capsys
) -> None:
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface")
    # typepy, which lm-eval needs, wants python-dateutil<3, and the lock has 4.0.0
    why = "needs lm-eval, whose packages do not fit the lock: make harness-check"
    lm_eval, tasks_of, models = (pytest.importorskip(n, reason=why) for n in names)
    # The harness gives more context to a window that is not full. These windows are full.
    stream = tokenizer.decode(tokenizer.encode(text(0, 200))[: 3 * BLOCK])
    more = [
        {
            "ctx": text(i, 4),
            "endings": [text(100 * i + j, 3) + " 한" * j for j in range(4)],
            "label": i % 4,
        }
        for i in range(20)  # The three accuracies of these rows differ.
    ]
    rows = {"data": [{"text": stream}], "hellaswag": HELLASWAG + more, "lambada": LAMBADA}
    file = {name: write_rows(tmp_path / f"{name}.jsonl", rows[name]) for name in rows}
    choices = {"doc_to_text": "ctx", "doc_to_choice": "endings", "doc_to_target": "label"}
    words = "text.rsplit(' ', 1)"
    word = {"doc_to_text": f"{{{{{words}[0]}}}}", "doc_to_target": f"{{{{' ' + {words}[1]}}}}"}
    whole = {"doc_to_text": "", "doc_to_target": "text"}
    tasks = [
        harness_task("hellaswag", file["hellaswag"], "acc acc_norm acc_bytes", **choices),
        harness_task("lambada", file["lambada"], "acc perplexity", **word),
        harness_task("data", file["data"], "bits_per_byte", **whole),
    ]
    kinds = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = models.HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(checkpoint))
    found = lm_eval.simple_evaluate(
        model,
        tasks=[task | {"output_type": kind} for task, kind in zip(tasks, kinds, strict=True)],
        task_manager=tasks_of.TaskManager(include_defaults=False),  # does not read 14,000 files
        bootstrap_iters=0,
    )["results"]
    capsys.readouterr()
    options = [word for name in file for word in (f"--{name}", file[name])]
    ours = figures(monkeypatch, capsys, checkpoint, *options, "--cache", tmp_path / "cache")
    ours["lambada"]["acc"] = ours["lambada"]["accuracy"]
    for task in tasks:
        for metric in (each["metric"] for each in task["metric_list"]):
            theirs = found[task["task"]][f"{metric},none"]
            assert ours[task["task"]][metric] == pytest.approx(theirs, rel=1e-6), metric
    assert len({ours["hellaswag"][name] for name in ("acc", "acc_norm", "acc_bytes")}) == 3


@pytest.mark.skipif(not (SHARED / "lm_eval").is_dir(), reason="needs ../shared/data/lm_eval")
def test_real_benchmark_rows_are_read(tmp_path, monkeypatch) -> None:
    """Twenty rows of each benchmark with GPT-2's tokenizer and a small random model."""
    monkeypatch.setenv(
        "TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    )
    tokenizer = load_tokenizer("gpt2")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257, block_size=256, n_layer=2, n_head=2, n_embd=16)).eval()
    model.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    kinds: dict[str, Any] = {"hellaswag_val": HellaSwag, "lambada_test": Lambada}
    raw, parsed = {}, {}
    for name, kind in kinds.items():
        file = SHARED / "lm_eval" / f"{name}.jsonl"
        raw[name] = file_rows(file, name)[:20]
        parsed[name] = read_rows(kind, "--option", str(file), 20)
    ours = evaluated(HellaSwag, model, tokenizer, parsed["hellaswag_val"], 1024)
    expected, _ = plain_hellaswag(reference, tokenizer, raw["hellaswag_val"], 256)
    assert {name: ours[name] for name in expected} == expected
    ours = evaluated(Lambada, model, tokenizer, parsed["lambada_test"], 1024)
    expected = plain_lambada(reference, tokenizer, raw["lambada_test"], 256)
    assert (ours["accuracy"], ours["token_perplexity"]) == pytest.approx(
        (expected[0], expected[2]), rel=1e-4
    )
