"""Every test reads given rows with a small tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from adapters import heads
from given import rows_are_given
from moods import LABELS, WORDS
from text.tokenizer import Tokenizer
from text.tokenizer_training import train_bpe


@pytest.fixture(scope="module", autouse=True)
def given_rows() -> Iterator[None]:
    with rows_are_given():
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = " ".join([*WORDS, *LABELS]) + " "
    return train_bpe([text * 3], 320, tmp_path_factory.mktemp("mood") / "tokenizer")


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """A stand-in for an LSTM that takes no time."""
    with mock.patch.object(heads, "LSTM_WIDTH", 16):
        yield
