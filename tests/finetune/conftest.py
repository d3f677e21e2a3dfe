"""A tokenizer and a base model for tiny runs, and files with the mistakes of users."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from config import GPTConfig
from model import GPT
from text.tokenizer import load_tokenizer
from text.tokenizer_training import train_bpe
from toy_runs import TASKS, description_of, run_well


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer/, trained on all toy rows, and base/, a model with that vocabulary."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [text for name in TASKS for row in description_of(name).toy for text in row.values()]
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
    """A folder with the same inputs and no run."""
    for name in ("tokenizer", "base"):
        (tmp_path / name).symlink_to(inputs / name)
    return tmp_path


@pytest.fixture(scope="module")
def mistakes(inputs: Path) -> Path:
    """The inputs with files that tasks refuse, an adapter, and a model with other weights."""
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
    run_well("sonnets", inputs, "--init base --method lora --steps 1 --eval-every 0 --out lora")
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
