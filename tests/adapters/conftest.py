"""The base of every adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adapted import SHAPE, VOCAB
from model import GPT


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's layout."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = GPT(SHAPE)
    for parameter in model.parameters():  # biases and gains that are not all 0 and 1
        parameter.data[:VOCAB] += 0.1 * torch.randn_like(parameter)[:VOCAB]
    model.save_pretrained(folder)
    return folder
