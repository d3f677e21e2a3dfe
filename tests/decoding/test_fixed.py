"""Decoding with fixed shapes: the tokens of the ordinary path, and no wait for the device."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from config import GPTConfig, UserError
from decoding import fixed
from decoding.batched import generate
from decoding.fixed import FixedDecoder, State, next_token
from decoding.options import DecodeConfig
from kernels.attention import explicit_attention
from model import GPT

CONTEXT = 32
SHAPE = GPTConfig(vocab_size=331, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=32)
WAYS = {
    "greedy": DecodeConfig(decode="greedy"),
    "sample": DecodeConfig(temperature=0.9),
    "truncated": DecodeConfig(temperature=1.1, top_k=50, top_p=0.9),
    "penalty": DecodeConfig(decode="greedy", repetition_penalty=1.3),
}


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(1)
    lengths = [1, longest, *(draw.randint(1, longest) for _ in range(count - 2))]
    return [[draw.randrange(331) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_tokens_are_those_of_the_ordinary_path(model: GPT, options: DecodeConfig) -> None:
    """Rows of several lengths, also past the context, and with a token that ends a text."""
    decoder = FixedDecoder(model, backend=None)
    for rows, new, end in (
        (prompts(5, 20), 90, None),
        (prompts(3, 50), 7, None),
        (prompts(5, 20), 60, 7),
    ):
        options = dataclasses.replace(options, max_new_tokens=new)
        heard: list[tuple[int, int]] = []
        hear = functools.partial(lambda heard, *pair: heard.append(pair), heard)
        made = generate(model, rows, options, end, hear, seed=3, fixed=decoder)
        assert made == generate(model, rows, options, end, seed=3)
        assert [[token for row, token in heard if row == i] for i in range(len(rows))] == made


@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_host_looks_every_few_tokens_and_stops_early(
    model: GPT, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    looks: list[int] = []
    look = fixed._Reader.__call__

    def count(reader: Any, made: int) -> bool:
        looks.append(made)
        return look(reader, made)

    monkeypatch.setattr(fixed._Reader, "__call__", count)
    monkeypatch.setitem(fixed.CHECK_EVERY, "cpu", every)
    options = DecodeConfig(decode="greedy", max_new_tokens=40)
    decoder, rows = FixedDecoder(model, backend=None), prompts(3, 9)
    whole = generate(model, rows, options, None)
    assert generate(model, rows, options, None, fixed=decoder) == whole
    assert len(looks) == math.ceil(40 / every)
    looks.clear()
    end = whole[0][10]  # the only row ends here
    expected = whole[0][: whole[0].index(end)]
    assert generate(model, rows[:1], options, end, fixed=decoder) == [expected]
    assert looks[-1] < len(expected) + 1 + every


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_step_reads_no_value_on_the_host(options: DecodeConfig) -> None:
    """On a GPU each such read would wait for it. Fake tensors have no values, so a read raises."""
    with FakeTensorMode(), torch.no_grad():
        state = State(model := GPT(SHAPE).eval(), 3, 64, CONTEXT, 331)
        for _ in range(2):
            next_token(model, options, state)
        with pytest.raises(DataDependentOutputException):
            state.newest.tolist()


class Counting(TorchDispatchMode):
    """Counts operations that are more than a view."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not view and func is not torch.ops.prim.device.default
        return func(*args, **(kwargs or {}))


def test_a_layer_costs_16_operations() -> None:
    """On a GPU without the compiler each is a kernel or two. Growth here would slow every token."""
    counts = []
    for n_layer in (1, 2):
        with FakeTensorMode(), torch.no_grad():
            model = GPT(dataclasses.replace(SHAPE, n_layer=n_layer)).eval()
            state = State(model, 1, 64, CONTEXT, 331)
            with Counting() as counting:
                next_token(model, WAYS["greedy"], state)
        counts.append(counting.count)
    assert counts[1] - counts[0] <= 16 and counts[0] <= 32


def test_a_gpu_replays_one_graph_of_a_shape(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fakes record what would be captured and replayed."""
    calls: list[str] = []

    def capture(step: fixed.Step, state: State) -> fixed.Step:
        calls.append("capture")

        def replay(given: State) -> None:
            assert given is state  # the graph works on this memory
            calls.append("replay")
            step(given)

        return replay

    monkeypatch.setattr(fixed, "captured", capture)
    decoder = FixedDecoder(model, backend=None)
    decoder.device = torch.device("cuda")
    options = DecodeConfig(decode="greedy", max_new_tokens=20)
    for rows in (prompts(3, 9), prompts(3, 20)):
        expected = generate(model, rows, options, None)
        assert generate(model, rows, options, None, fixed=decoder) == expected
    assert calls == ["capture", *["replay"] * 40]


def test_a_step_is_one_graph_and_is_traced_once(model: GPT) -> None:
    """Inductor takes what this backend takes; here it would need most of a minute."""
    decoder, graphs = FixedDecoder(model, backend="count"), []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.register_backend(count, name="count")
    options = DecodeConfig(temperature=0.9, max_new_tokens=40)
    for seed in (1, 2):
        rows = prompts(2, 12)
        made = generate(model, rows, options, None, seed=seed, fixed=decoder)
        assert made == generate(model, rows, options, None, seed=seed)
    assert len(graphs) == 1
    # It computes with operations of its own, on the model's weights.
    assert decoder.stepped.ops.attention is explicit_attention is not model.ops.attention
    assert all(map(operator.is_, decoder.stepped.parameters(), model.parameters()))
    for count_of_rows in (3, 4, 5):  # old shapes make room
        generate(model, prompts(count_of_rows, 12), options, None, fixed=decoder)
        assert len(decoder.steps) <= fixed.KEPT_STEPS
    torch.compiler.reset()


def test_other_methods_are_refused(model: GPT) -> None:
    with pytest.raises(UserError, match="--compile goes with --decode sample or greedy, not beam"):
        generate(model, [[1]], DecodeConfig(decode="beam"), None, fixed=FixedDecoder(model))
