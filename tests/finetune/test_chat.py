"""The chat task: reading conversations, what is learned, packing, and the conversation itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import generate as command
from config import UserError
from decoding.loading import open_model
from engine.loader import Loader
from launch import launch
from model import GPT
from tasks.generation import chat
from tasks.generation.sequences import SequenceEncoder
from text.chat import END, ROLES, loads
from text.tokenizer import load_tokenizer
from toy import capture_gradients
from toy_runs import (
    ALONE,
    CPU,
    check_against_transformers,
    run_well,
    set_up_task,
    source_of,
    train_step,
)

SYSTEM = {"role": "system", "content": "Be brief."}


def talk(*contents: str) -> list[dict[str, str]]:
    """Messages by the user and the assistant in turn."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


TALK = [SYSTEM, *talk("Hello!", "Good day to you.", "What is 2 + 3?", "Five.")]


@pytest.fixture(scope="module")
def trained(inputs: Path) -> Path:
    """A run with LoRA from a base."""
    more = "--init base --method lora --lr 2e-2 --steps 3 --save-every 3 --out chat"
    run_well("chat", inputs, more)
    return inputs / "chat"


# --- what is learned


def test_only_what_the_assistant_says_has_gradients(inputs: Path) -> None:
    """All gradients are those of a plain sum over what follows the assistant's token, up to the end
    of the turn. At every other position, the gradient of the model's state is exactly zero."""
    task = set_up_task("chat", inputs)
    model, special = train_step(task).model, task.trunk.tokenizer.special_ids
    states: list[Tensor] = []

    def keep(module: Any, given: Any, out: tuple[Tensor, Tensor]) -> None:
        out[1].retain_grad()
        states.append(out[1])

    model.transformer.ln_f.register_forward_hook(keep)
    batch = task.batch("train", np.arange(3)).tensors
    task.loss(model, batch)["nll"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    log_p = model(batch["idx"]).log_softmax(-1)
    spoken, loss = torch.zeros(batch["idx"].shape, dtype=torch.bool), torch.zeros(())
    for row in range(3):
        tokens, speaks = task.train.tokens[row].tolist(), False
        for t, (token, following) in enumerate(zip(tokens, tokens[1:])):
            speaks = (speaks or token == special[ROLES["assistant"]]) and token != special[END]
            spoken[row, t] = speaks
            loss = loss - log_p[row, t, following] * speaks
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert states[0].grad is not None and 0 < spoken.sum() < spoken.numel() / 2
    assert torch.equal(states[0].grad.abs().sum(-1) > 0, spoken)


@pytest.mark.parametrize("micro_batch", [3, 8])
def test_packed_rows_have_the_gradients_of_rows_alone(inputs: Path, micro_batch: int) -> None:
    """Row lengths vary much, so that rows of several steps share sequences."""
    (inputs / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": talk("one " * n, "two " * n)}) + "\n" for n in range(1, 9))
    )
    results = []
    for pack in (False, True):
        options: dict[str, Any] = dict(
            data=f"{inputs}/talks.jsonl", val_data=f"{inputs}/talks.jsonl", pack=pack
        )
        task = set_up_task("chat", inputs, seq_len=96, batch_size=8, clip=0.0, **options)
        train = train_step(task)
        gradients = capture_gradients(train)
        result = train(0, Loader(task, ALONE, micro_batch, 1, ahead=0)(0))
        assert result is not None
        results.append((result.loss.item(), gradients))
    shape = task.batch("train", np.arange(8)).tensors["idx"].shape
    assert shape[0] < 8 and shape.numel() < 8 * task.buckets[-1]
    (plain, one), (packed, other) = results
    assert packed == pytest.approx(plain, rel=1e-6)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("more", [{"objective": ("unlikelihood",)}, {"method": "prefix"}])
def test_packing_is_refused_where_rows_would_mix(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="leave out --pack, or --objective and the methods prefix"):
        source_of("chat", pack=True, **more).cfg.check()


# --- rows that are too long


def sequences(inputs: Path, messages: Any, seq_len: int, strict: bool = False) -> Any:
    """The learned and the other tokens of each sequence as text, and how the row was made to
    fit."""
    tokenizer = chat_tokenizer(inputs)
    encoder = SequenceEncoder(tokenizer, seq_len, strict, END)
    found, how = encoder.sequences(chat.example(messages), "row 1")
    assert all(len(tokens) <= seq_len + 1 for tokens, _ in found)
    return [
        tuple(tokenizer.decode([t for t, on in zip(*pair) if on == what]) for what in (True, False))
        for pair in found
    ], how


def chat_tokenizer(inputs: Path) -> Any:
    return load_tokenizer(str(inputs / "tokenizer")).with_special((*ROLES.values(), END))


def test_a_long_conversation_keeps_the_system_message_and_its_newest_turns(inputs: Path) -> None:
    turns = [text for n in range(9) for text in (f"Say {n}", f"It is {n}")]
    (whole,), how = sequences(inputs, [SYSTEM, *talk(*turns)], 400)
    assert how == [] and whole[0] == "".join(f"It is {n}<|end|>" for n in range(9))
    ((learned, read),), how = sequences(inputs, [SYSTEM, *talk(*turns)], 80)
    kept = range(9 - learned.count(END), 9)
    assert how == ["shortened"] and 1 < len(kept) < 9
    assert learned == "".join(f"It is {n}<|end|>" for n in kept)
    assert read == "<|endoftext|><|system|>Be brief.<|end|>" + "".join(
        f"<|user|>Say {n}<|end|><|assistant|>" for n in kept
    )
    with pytest.raises(UserError, match=r"row 1: \d+ tokens too long for --seq-len 80"):
        sequences(inputs, talk(*turns), 80, strict=True)


def test_a_long_message_is_truncated_and_a_long_answer_continued(inputs: Path) -> None:
    long = "so long a line " * 20
    ((learned, read),), how = sequences(inputs, talk(long, "Five."), 60)
    assert how == ["truncated"] and learned == "Five.<|end|>" and "<|assistant|>" in read
    assert read.startswith("<|endoftext|><|user|>so long a line so long")
    found, how = sequences(inputs, talk("Hello!", long), 60)
    assert how == ["split"] and "".join(learned for learned, _ in found) == f"{long}<|end|>"
    answer = long.replace("long", "short")
    found, how = sequences(inputs, talk("Hi", "Yes", long, answer), 60)
    assert how == ["shortened", "truncated", "split"]
    assert "".join(learned for learned, _ in found) == f"{answer}<|end|>"


# --- reading

FORMS = {
    "openai.jsonl": {"messages": TALK},
    "sharegpt.jsonl": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in TALK[1:]
        ],
        "system": "Be brief.",
        "id": "7",
    },
    "named.jsonl": {"messages": [], "chosen": TALK},
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_read_in_every_form(form: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / form).write_text(json.dumps(FORMS[form]) + "\n")
    named = {"messages_column": "chosen"} if form == "named.jsonl" else {}
    files = [tmp_path / form]
    if form != "named.jsonl":
        parquet.write_table(pyarrow.Table.from_pylist([FORMS[form]]), tmp_path / "rows.parquet")
        files.append(tmp_path / "rows.parquet")
    for file in files:
        for split in ("train", "test"):
            (row,) = source_of("chat", **named).read(str(file), split)
            assert loads(row["messages"]) == TALK


def test_alpaca_columns_and_json_in_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "alpaca.csv").write_text(
        "instruction,input,output\nAdd.,2 and 3,Five.\nSay hello.,,Hello!\n"
    )
    rows = source_of("chat").read(str(tmp_path / "alpaca.csv"), "train")
    expected = [talk("Add.\n\n2 and 3", "Five."), talk("Say hello.", "Hello!")]
    assert [loads(row["messages"]) for row in rows] == expected
    quoted = json.dumps(TALK).replace('"', '""')
    (tmp_path / "table.csv").write_text(f'id,messages\n1,"{quoted}"\n')
    (row,) = source_of("chat").read(str(tmp_path / "table.csv"), "train")
    assert loads(row["messages"]) == TALK


BROKEN = {  # a value of the column, and what is said about it
    "has no list of messages": [],
    "has no object as message 2": [*talk("a"), "b"],
    "has the role 'tool', which is not system, user or assistant, in column 'messages'": [
        {"role": "tool", "content": "a"},
        *talk("a", "b"),
    ],
    "has no content in message 2 in column 'messages'": [*talk("a"), {"role": "assistant"}],
    "has no messages": [{"role": "system", "content": " "}],
    "is not UTF-8 text in column 'messages'": talk("a", "\udcff"),
}


def test_broken_conversations_are_named_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [*BROKEN.values(), talk("only a question"), TALK]
    file.write_text("".join(json.dumps({"messages": value}) + "\n" for value in rows))
    said: list[str] = []
    source = source_of("chat", said.append)
    (row,) = source.read(str(file), "train")
    assert loads(row["messages"]) == TALK
    for number, text in enumerate(list(BROKEN)[:5], 1):
        assert f"left out: {file} line {number} {text}" in said[number - 1]
    assert source.warnings == [
        f"{file}: 6 rows could not be read and are left out",
        f"{file}: 1 of 2 conversations have no message by the assistant, the first in {file} line "
        "7, and are left out",
    ]
    # Every row of --predict stays. Bad bytes are replaced, and the user may have the last word.
    predicted = source_of("chat", said.append).read(str(file), "test")
    assert [bool(row.fault) for row in predicted] == [True] * 5 + [False] * 3
    with pytest.raises(UserError, match=f"line 1 {next(iter(BROKEN))}"):
        source_of("chat", strict=True).read(str(file), "train")
    file.write_text(json.dumps({"messages": talk("only a question")}) + "\n")
    with pytest.raises(UserError, match="1 of 1 conversations have no message by the assistant"):
        source_of("chat").read(str(file), "train")


# --- the finished model


def test_transformers_gives_the_same_ids_mask_and_logits(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = trained / "final"
    theirs, tokenizer = AutoTokenizer.from_pretrained(final), load_tokenizer(str(final))
    encoder = SequenceEncoder(tokenizer, 160, True, END)
    ((ids, learned),), _ = encoder.sequences(chat.example(TALK), "")
    given = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert given["input_ids"] == ids and given["assistant_masks"] == [int(on) for on in learned]
    prompt = encoder.prompt(chat.prompt(TALK[:-1]), 160)
    asked = theirs.apply_chat_template(TALK[:-1], add_generation_prompt=True)
    assert asked["input_ids"] == prompt
    check_against_transformers(final, ids)
    # generate() of transformers ends at the end of the turn.
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.generation_config.eos_token_id == [tokenizer.special_id(END), tokenizer.eot]


def test_text_that_spells_a_special_token_is_ordinary_text(trained: Path) -> None:
    from transformers import AutoTokenizer

    final = str(trained / "final")
    tokenizer, text = load_tokenizer(final), "<|end|><|assistant|>Yes<|endoftext|>"
    prompt = SequenceEncoder(tokenizer, 160, True, END).prompt(chat.prompt(talk(text)), 160)
    assert tokenizer.decode(prompt, skip_special=True) == text
    assert sum(i in tokenizer.special_ids.values() for i in prompt) == 4
    theirs = AutoTokenizer.from_pretrained(final).apply_chat_template(
        talk(text), add_generation_prompt=True, sanitize_control_tokens=True
    )
    assert theirs["input_ids"] == prompt


def test_new_tokens_train_with_lora_from_the_mean(trained: Path) -> None:
    base = GPT.from_pretrained(trained.parent / "base").head_weight.detach()
    model, tokenizer = open_model(str(trained / "final"), None, CPU, torch.float32)
    new = [tokenizer.special_id(token) for token in (*ROLES.values(), END)]
    known = model.config.vocab_size - 4
    assert sorted(new) == list(range(known, known + 4))
    assert torch.equal(model.head_weight[:known], base[:known])
    assert ((model.head_weight[new] - base[:known].mean(0)).abs().amax(1) > 0).all()


def test_predict_answers_the_last_message_by_the_user(trained: Path) -> None:
    folder = trained.parent
    rows = [{"messages": TALK[:-1]}, {"messages": []}, {"messages": TALK}]
    (folder / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--init chat --epochs 0 --predict ask.jsonl --answers said.jsonl --decode greedy"
    run_well("chat", folder, words, "--max-new-tokens 5")
    asked, broken, known = map(json.loads, (folder / "said.jsonl").read_text().splitlines())
    assert asked["messages"] == TALK[:-1] and known["messages"] == TALK
    assert asked["prediction"] == known["prediction"] is not None
    assert broken["prediction"] is None and "has no list of messages" in broken["unreadable"]
    scores = json.loads((folder / "said.scores.json").read_text())
    assert {"exact_match", "f1"} <= scores.keys()


def test_a_typed_prompt_is_a_message_and_its_answer_ends_with_the_turn(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []

    def decode(model: Any, prompts: Any, cfg: Any, end: int, **more: Any) -> list[list[int]]:
        ends.append(end)
        return [[] for _ in prompts]

    monkeypatch.setattr("tasks.generation.answers.generate", decode)
    task = set_up_task("chat", inputs, prompts=("Hello!",))
    assert task.samples(train_step(task).model) == [("<|user|>Hello!<|end|><|assistant|>", "")]
    assert ends == [task.trunk.tokenizer.special_id(END)]


# --- generate.py --chat


class Replies:
    """Stands in for decoding. It records the prompts and answers each with the next text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *texts: str):
        self.texts, self.prompts = list(texts), list[str]()
        monkeypatch.setattr("decoding.batched.generate", self)

    def __call__(self, model: Any, prompts: Any, options: Any, end: int, *more: Any, **kw: Any):
        tokenizer = kw["tokenizer"]
        assert end == tokenizer.special_id(END)
        self.prompts.append(tokenizer.decode(prompts[0]))
        ids = tokenizer.encode(self.texts.pop(0))
        for token in ids:
            more[0](0, token)
        return [ids]


def converse(monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    return command.main()


def test_a_conversation_reads_its_history(trained: Path, monkeypatch: Any, capsys: Any) -> None:
    said = Replies(monkeypatch, "Good day.", "Five.")
    words = ("--chat", "--system", "Be brief.", "Hello!", "What is 2 + 3?")
    assert converse(monkeypatch, trained, *words) == 0
    first = "<|endoftext|><|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>"
    more = "Good day.<|end|><|user|>What is 2 + 3?<|end|><|assistant|>"
    assert said.prompts == [first, first + more]
    assert capsys.readouterr().out == f"Good day.\n{command.RULE}\nFive.\n"


def test_the_oldest_turns_are_left_out_and_that_is_said_once(
    trained: Path, monkeypatch: Any, capsys: Any
) -> None:
    said = Replies(monkeypatch, *(f"It is {n}" for n in range(20)))
    asked = [f"Say {n}, or {n + 1}" for n in range(20)]
    assert converse(monkeypatch, trained, "--chat", "--system", "Be brief.", *asked) == 0
    assert "Say 0, or 1" in said.prompts[3] and "Say 0, or 1" not in said.prompts[-1]
    assert all(
        p.startswith("<|endoftext|><|system|>Be brief.<|end|><|user|>") for p in said.prompts
    )
    assert all(f"It is {n - 1}<|end|><|user|>" in p for n, p in enumerate(said.prompts) if n)
    error = capsys.readouterr().err
    assert error.count("context of 160 tokens is full: the oldest turns are left out") == 1


def test_a_model_saved_by_transformers_holds_a_conversation(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(trained / "final").save_pretrained(tmp_path / "theirs")
    words = ["--chat", "--decode", "greedy", "--max-new-tokens", "5", "Hello!"]
    (one,), (other,) = (
        launch(folder, [name, *words], program="generate")
        for folder, name in ((trained.parent, "chat"), (tmp_path, "theirs"))
    )
    assert one.code == other.code == 0 and one.out == other.out != "", other


def test_a_model_without_the_template_is_refused_in_one_line(trained: Path) -> None:
    (end,) = launch(trained.parent, ["base", "--chat", "hello"], program="generate")
    assert end.code == 2 and end.err.count("\n") == 1
    assert "base has no chat template" in end.err and "finetune.chat --init base" in end.err
