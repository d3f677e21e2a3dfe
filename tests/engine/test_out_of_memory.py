"""Out of memory: every message of it is recognized, and the micro-batch of `auto` shrinks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from config import TrainConfig, UserError
from engine.failures import is_out_of_memory
from engine.trainer import train
from launch import log_of
from toy import Counter, Scripted, whole_run

pytestmark = pytest.mark.usefixtures("untouched")


WORDINGS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
]
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("out of resource: shared memory, Required: 132096, Hardware limit: 101376"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ValueError("memory"),
]


def wrapped(error: BaseException, explicitly: bool) -> BaseException:
    """Wrap `error` as a compiler does: as the cause or as the context of another error."""
    try:
        try:
            raise error
        except BaseException as inner:
            if explicitly:
                raise RuntimeError("backend='inductor' raised") from inner
            raise RuntimeError("backend='inductor' raised")  # noqa: B904
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize("error", WORDINGS, ids=lambda e: str(e)[:30])
def test_every_out_of_memory_message_is_recognized(error):
    assert is_out_of_memory(error)
    assert is_out_of_memory(wrapped(error, True)) and is_out_of_memory(wrapped(error, False))


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: str(e)[:30])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)
    assert not is_out_of_memory(wrapped(error, True))


class Small(Scripted):
    """A task on a device that holds only `room` rows from step `since` on."""

    def __init__(self, room: int, since: int = 0, error: type[Exception] = RuntimeError):
        super().__init__([1.0] * 6)
        self.room, self.since, self.error = room, since, error
        self.tried: list[int] = []

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, Counter)
        rows = len(batch["ids"])
        self.tried.append(rows)
        if rows > self.room and int(model.steps) >= self.since:
            raise self.error("CUDA error: out of memory")
        return super().loss(model, batch)

    def metrics(self, sums: dict[str, float], records: dict[int, Any]) -> dict[str, float]:
        return {"score": 1.0}


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log_of(run, "train")]


def options(out: Path, **more: Any) -> TrainConfig:
    return whole_run(out, 4, eval_every=2, save_every=2, sample_every=0, **more)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_auto_takes_the_next_divisor_if_step_1_does_not_fit(tmp_path, capsys, error):
    task = Small(room=1, error=error)
    assert train(task, options(tmp_path / "a")) == 0
    assert task.tried[:3] == [4, 2, 1]
    assert "warning: the first step ran out of memory with --micro-batch 4; continuing with 2" in (
        capsys.readouterr().out
    )
    assert train(Small(room=4), options(tmp_path / "b", micro_batch=1)) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")  # the failed attempts left no trace
    assert json.loads((tmp_path / "a/config.json").read_text())["micro_batch"] == 1
    assert len(log_of(tmp_path / "a", "warning")) == 2


def test_auto_takes_the_next_divisor_after_a_resume(tmp_path):
    first = Small(room=4)
    cfg = options(tmp_path / "a")
    first.during = lambda what, step: signal.raise_signal(signal.SIGTERM) if step == 3 else None
    assert train(first, cfg) == 143
    second = Small(room=2)
    assert train(second, cfg) == 0
    assert second.tried[:2] == [4, 2]
    assert [line["step"] for line in log_of(tmp_path / "a", "train")] == [1, 2, 3, 4]
    assert [line["step"] for line in log_of(tmp_path / "a", "eval")] == [2, 4]


def test_a_typed_micro_batch_is_never_changed(tmp_path):
    task = Small(room=2)
    with pytest.raises(UserError, match="out of memory with --micro-batch 4; lower --micro-batch"):
        train(task, options(tmp_path / "a", micro_batch=4))
    assert task.tried == [4]


def test_a_later_step_out_of_memory_names_a_micro_batch(tmp_path):
    task = Small(room=2, since=1)
    with pytest.raises(UserError, match="out of memory with --micro-batch 4"):
        train(task, options(tmp_path / "a"))
    assert task.tried == [4, 4]


def test_a_micro_batch_of_one_row_cannot_shrink(tmp_path):
    with pytest.raises(UserError, match="out of memory with --micro-batch 1; add --recompute"):
        train(Small(room=0), options(tmp_path / "a"))


def test_an_error_of_another_kind_passes_through(tmp_path):
    task = Small(room=0)
    task.error = lambda text: KeyError("elsewhere")  # ty: ignore[invalid-assignment]
    with pytest.raises(KeyError, match="elsewhere"):
        train(task, options(tmp_path / "a"))


def test_no_memory_for_the_next_smaller_micro_batch_is_an_error(tmp_path, monkeypatch):
    task, build = Small(room=2), Small.build_model

    def build_once(cfg: Any) -> nn.Module:
        if task.tried:
            raise RuntimeError("CUDA error: out of memory")
        return build(task, cfg)

    monkeypatch.setattr(task, "build_model", build_once)
    with pytest.raises(UserError, match="out of memory with --micro-batch 2; add --recompute"):
        train(task, options(tmp_path / "a"))
