"""Mistakes of users give one line that says what to type."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from config import UserError
from engine.shape import open_pretrained
from launch import launch
from model import GPT
from tasks.options import FinetuneConfig
from toy_runs import run_task

MISTAKES = {  # a task and options, with fragments of the error line
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
    "sonnets --init base --preset micro": ["--init base already determines", "leave out --preset"],
    "sonnets --init lora/checkpoints/step-00000001": [
        "is an adapter, not a whole model; name ",
        "/base to start without the adapter, or ",
        "/lora/final, which holds both",
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
        "use one of 0, 1",
    ],
    "sentiment --val-data word.csv": [
        "word.csv line 3: the label 'good' is not a number, but those of the training rows are"
    ],
    "sentiment --data mixed.csv": [
        "mixed.csv line 4: the label 'one' is not a number, but most others are"
    ],
    "sentiment --data one.csv": ["all 3 training rows have the label '1'"],
    "sentiment --data ids.csv": ["30 training rows have 30 labels", "--label-column"],
    "sentiment --val-data none.csv": ["none.csv holds no row that can be read"],
    "sentiment --data cells.csv --strict": [
        "cells.csv line 3 has 3 cells where the first line names 2 columns",
        "--strict",
    ],
    "sentiment --data known.csv --val-data known.csv": [
        "99 of 99 training rows (100.0%) are also validation rows",
        "--allow-overlap",
    ],
    "topics --seq-len 8 --strict": ["toy row 1: ", "tokens too long for --seq-len 8 (--strict)"],
    "nli --form prompt --seq-len 8": [
        "toy row 1: nothing of its text fits into 8 tokens; raise --seq-len"
    ],
    "sentiment --init base --epochs 0 --predict toy": [
        "base is not a classifier; train one first",
        "finetune.sentiment",
    ],
    # options of classification
    "sentiment --also sonnets": ["--also sonnets: sonnets is not a task with labels"],
    "sentiment --also topic:1": [
        "--also topic:1: topic is not a task with labels (did you mean topics?)"
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
    "sentiment --form word --words bad": [
        "--form word: name 2 words with --words, one for each of 0, 1"
    ],
    "sentiment --form word --words good good": [
        "two of the words good, good begin with the same token",
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
    # neither dropout in the head nor an adapter without dropout is enough for SimCSE
    "sentiment --objective rdrop simcse --dropout 0 --init base --method lora": [
        "--objective simcse compares two passes"
    ],
    "sentiment --objective rdrop --form word --dropout 0": [
        "--objective rdrop compares two passes"
    ],
    "sentiment --objective simcse --batch-size 12": [
        "--batch-size 12 is not a multiple of groups of 8 rows; use 16"
    ],
    "sentiment --augment-weight 2": ["--augment-weight belongs to --augment FILE"],
    "sentiment --label-smoothing 1": ["--label-smoothing is 1.0; it must be below 1"],
    "sentiment --model lstm --method lora": ["--model lstm", "leave out", "--method"],
    "sentiment --model lstm --form word": ["--model lstm", "leave out", "--form word"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_error_line(mistake: str, mistakes: Path) -> None:
    name, *options = mistake.split()
    (end,) = run_task(name, mistakes, "--out new --epochs 1", *options)
    assert end.code == 2 and end.err.startswith("error: ") and end.err.count("\n") == 1, end
    assert "Traceback" not in end.out
    # Nothing was trained or written.
    assert {file.name for file in (mistakes / "new").glob("*")} <= {"run.json"}
    for part in MISTAKES[mistake]:
        assert part in end.err, end.err


PREDICT_MISTAKES = {  # a task and options, with fragments of the error before the first step
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
    "sentiment --predict word.csv --answers word.csv": ["--answers word.csv is also an input file"],
    "sentiment --predict word.csv --answers word.jsonl": ["word.csv is also an input file"],
    "sentiment --predict toy --answers x.parquet": [
        "--answers x.parquet: answers are written as .jsonl and .csv"
    ],
    "sentiment --predict toy --answers new/validation.csv": ["is a file of the run itself"],
    "sentiment --answers x.jsonl": ["--answers x.jsonl belongs to --predict"],
}


@pytest.mark.parametrize("mistake", PREDICT_MISTAKES)
def test_predict_options_are_checked_before_training(mistake: str, mistakes: Path) -> None:
    name, *options = mistake.split()
    (end,) = run_task(name, mistakes, "--out new --epochs 1", *options)
    assert end.code == 2 and end.err.startswith("error: ") and end.err.count("\n") == 1, end
    assert {file.name for file in (mistakes / "new").glob("*")} <= {"run.json"}
    for part in PREDICT_MISTAKES[mistake]:
        assert part in end.err, end.err


def test_the_advice_for_an_adapter_as_init_works(mistakes: Path, tmp_path: Path) -> None:
    adapter = mistakes / "lora" / "checkpoints" / "step-00000001"
    asked = FinetuneConfig(init=str(adapter))
    with pytest.raises(UserError) as refused:
        open_pretrained(asked)
    base, final = re.findall(
        r"name (\S+) to start without the adapter, or (\S+),", str(refused.value)
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
