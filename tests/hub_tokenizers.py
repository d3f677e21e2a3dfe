"""Texts that are hard to tokenize, and the ids that transformers gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SENTENCES = [
    "The quick brown fox doesn't jump over the lazy dog; it's the dog's 1,024th day.\n",
    "def add(a, b):\r\n    return a + b  # sums\r\n\r\n",
    "학교에 가는 길에 고양이를 만났다. 고양이는 학교를 좋아한다.\n",
    "Ünïcödé, naïve café, 東京 🙂🙃 👩‍👩‍👧\t\tend   \n",
]
AWKWARD = [
    "",
    " ",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>",
    "line\r\nline\r\n\r\n  x",
    "고양이 🙂 e\u0301 \u200d \u00a0\u3000 \x00\x1c\x85",
    "it's I'LL we've 12ab34 ___ \n \n  \t x   ",
    "a" * 5000,
    " " * 5000 + "x",
]


def hub_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def hub_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids by transformers. Special tokens in the text are read as text."""
    hub = hub_tokenizer(folder)
    return [hub(text, split_special_tokens=True)["input_ids"] for text in texts]
