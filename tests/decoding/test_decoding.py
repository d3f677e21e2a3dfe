"""Ways of decoding against transformers, against plain loops without a cache, and a batch against
its rows."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from adapters.layers import PrefixPast
from benchmarks.decoding import contrastive_reference
from config import UserError
from decoding import batched, sampling
from decoding.batched import generate, least_risk
from decoding.cache import new_cache
from decoding.options import DecodeConfig
from decoding.sampling import draw_tokens, truncate
from decoding.window import Stop, Window, kept_tokens, penalize
from model import GPT, GPTConfig

BLOCK = 64
VOCAB = 331  # so the embedding is padded
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [(17 * i) % 330 for i in range(20)]]


def random_model() -> GPT:
    """It does not repeat itself."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=VOCAB, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


def trained_model() -> GPT:
    """After some steps on sentences of a few words, each ended by token 0."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(vocab_size=40, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 40, (12, 4), generator=generator)
    words[:, 3] = 0
    for _ in range(30):
        text = words[torch.randint(12, (8, 9), generator=generator)].flatten(1)
        model(text[:, :-1], text[:, 1:], reduction="sum").div(8 * 35).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


def in_transformers(model: GPT, folder: Path):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def reference(model: GPT, tmp_path_factory: pytest.TempPathFactory):
    return in_transformers(model, tmp_path_factory.mktemp("random"))


def of_transformers(
    reference, prompts: list[list[int]], count: int, eot: int | None = None, **how
) -> list[list[int]]:
    """Its continuations of prompts of one length, cut before the end token."""
    idx = torch.tensor(prompts)
    how = {
        "do_sample": False,
        "max_new_tokens": count,
        "eos_token_id": eot,
        "pad_token_id": 0,
    } | how
    out = reference.generate(idx, attention_mask=torch.ones_like(idx), **how)
    rows = out[:, idx.shape[1] :].tolist()
    return [row[: row.index(eot)] if eot in row else row for row in rows]


class Letters:
    """A tokenizer whose every token is a letter or two, some of them a newline, a blank or a line's
    end."""

    eot = 3
    vocab_size = VOCAB
    odd = (b"\n", b"\n\n", b" ", b" \n", b"x\n", b"")

    def token_bytes(self, id: int) -> bytes:
        return self.odd[id // 7 % 6] if id % 7 == 0 else bytes([97 + id % 26, 97 + id % 17])

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return b"".join(map(self.token_bytes, ids)).decode()


LETTERS: Any = Letters()

WAYS = {
    "greedy": DecodeConfig(decode="greedy"),
    "sample": DecodeConfig(temperature=1.0),
    "top-k": DecodeConfig(temperature=0.7, top_k=20),
    "top-p": DecodeConfig(temperature=1.2, top_p=0.8),
    "all": DecodeConfig(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.2),
    "beam": DecodeConfig(
        decode="beam", beams=3, no_repeat_ngram=2, repetition_penalty=1.1, length_penalty=0.6
    ),
    "contrastive": DecodeConfig(
        decode="contrastive", contrastive_growth=True, repetition_penalty=1.2
    ),
    "mean": DecodeConfig(decode="contrastive", contrastive_k=6, contrastive_similarity="mean"),
    "mbr": DecodeConfig(decode="mbr", candidates=3, temperature=1.0),
    "mbr by beam": DecodeConfig(decode="mbr", candidates=3, candidates_by="beam"),
    "ensemble": DecodeConfig(decode="ensemble", candidates=6, beams=2, temperature=1.0),
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


# --- what holds for every way


@every_way
def test_a_row_of_a_batch_is_the_row_alone(model: GPT, options: DecodeConfig) -> None:
    for count, lines in ((20, [0, 0, 0]), (BLOCK + 10, [4, 0, 2])):  # the second slides
        options = dataclasses.replace(options, max_new_tokens=count)
        batch = generate(model, PROMPTS, options, 3, tokenizer=LETTERS, stop_lines=lines)
        assert max(map(len, batch)) > count // 3
        for i, prompt in enumerate(PROMPTS):
            alone = generate(
                model,
                [prompt],
                options,
                3,
                rows=[i],
                tokenizer=LETTERS,
                stop_lines=lines[i : i + 1],
            )
            assert alone == [batch[i]]


@every_way
def test_the_listener_hears_the_text(model: GPT, options: DecodeConfig) -> None:
    options = dataclasses.replace(options, max_new_tokens=40, stop_lines=3)
    heard: list[list[int]] = [[], [], []]
    texts = generate(
        model,
        PROMPTS,
        options,
        eot=3,
        tokenizer=LETTERS,
        on_token=lambda row, token: heard[row].append(token),
    )
    assert heard == texts


@every_way
def test_no_text_has_more_lines_or_the_end_token(model: GPT, options: DecodeConfig) -> None:
    options = dataclasses.replace(options, max_new_tokens=60, stop_lines=9)
    limits = [1, 2, 3]
    for text, limit in zip(
        generate(model, PROMPTS, options, 3, tokenizer=LETTERS, stop_lines=limits), limits
    ):
        lines = [line for line in LETTERS.decode(text).split("\n") if line.strip()]
        assert len(lines) == limit if len(text) < 60 else len(lines) <= limit
        assert 3 not in text


@pytest.mark.parametrize(
    "options", [WAYS[way] for way in ("greedy", "sample", "beam", "mbr")], ids=lambda o: o.decode
)
def test_a_prefix_is_the_tokens_it_was_made_of(model: GPT, options: DecodeConfig) -> None:
    """Contrastive search (below) and the repetition penalty look at the text alone, and a prefix is
    none of it."""
    options = dataclasses.replace(
        options, max_new_tokens=30, repetition_penalty=1.0, no_repeat_ngram=0
    )
    first = [300, 12, 45, 7, 160]
    expected = generate(
        model, [first + prompt for prompt in PROMPTS], options, 3, tokenizer=LETTERS
    )
    prefixed = with_prefix(first)
    assert generate(prefixed, PROMPTS, options, 3, tokenizer=LETTERS) == expected
    # With a prefix the window slides sooner; alone or not.
    longer = dataclasses.replace(options, max_new_tokens=BLOCK)
    batch = generate(prefixed, PROMPTS, longer, 3, tokenizer=LETTERS)
    assert [
        generate(prefixed, [p], longer, 3, rows=[i], tokenizer=LETTERS)[0]
        for i, p in enumerate(PROMPTS)
    ] == batch


class Prefix(torch.nn.Module):
    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], length: int):
        super().__init__()
        self.given, self.length = layers, length

    def layers(self, model: GPT) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self.given

    def past(self, model: GPT) -> PrefixPast:
        return PrefixPast(self.given)


@torch.no_grad()
def with_prefix(tokens: list[int]) -> GPT:
    """The random model with the keys and values of these tokens before every text."""
    model = random_model()
    cache = new_cache(model, 1, len(tokens))
    model(torch.tensor([tokens]), past=cache)
    model.prefix = Prefix(cache.layers, len(tokens))
    return model


@pytest.mark.parametrize("decode", ["sample", "mbr", "ensemble"])
def test_the_seed_and_the_row_make_the_draws(model: GPT, decode: Any) -> None:
    options = DecodeConfig(decode=decode, max_new_tokens=30, temperature=1.0, candidates=4, beams=1)
    first, second = generate(model, [PROMPTS[0]] * 2, options, eot=None, tokenizer=LETTERS)
    again = [
        generate(model, [PROMPTS[0]], options, None, seed=seed, tokenizer=LETTERS)[0]
        for seed in (1337, 1, 2)
    ]
    assert again[0] == first
    assert len({tuple(text) for text in (first, second, *again[1:])}) > (
        3 if decode == "sample" else 1
    )
    longer = dataclasses.replace(options, max_new_tokens=35)
    assert decode != "sample" or generate(model, [PROMPTS[0]], longer, eot=None)[0][:30] == first


def test_nothing_is_compiled_for_its_lengths() -> None:
    def refuse(graph, inputs):
        raise AssertionError("compiled")

    model = random_model()
    for block in model.transformer.h:
        block.compile(backend=refuse)
    assert len(generate(model, PROMPTS, DecodeConfig(max_new_tokens=3), eot=None)) == 3


def test_training_mode_comes_back(model: GPT) -> None:
    model.train()
    generate(model, [[1]], DecodeConfig(max_new_tokens=1), eot=None)
    assert model.training
    model.eval()
    generate(model, [[1]], DecodeConfig(max_new_tokens=1), eot=None)
    assert not model.training


BAD = [
    dict(temperature=0.0),
    dict(temperature=-1.0),
    dict(temperature=math.nan),
    dict(top_p=0.0),
    dict(top_p=1.1),
    dict(top_k=-1),
    dict(repetition_penalty=0.0),
    dict(max_new_tokens=0),
    dict(beams=0, decode="beam"),
    dict(contrastive_alpha=1.5, decode="contrastive"),
    dict(candidates=0, decode="mbr"),
    dict(candidates=6, decode="ensemble"),
    dict(stop_lines=-1),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_options_are_refused_by_name(model: GPT, bad: dict) -> None:
    with pytest.raises(UserError, match="^--" + next(iter(bad)).replace("_", "-")) as raised:
        generate(model, [[1]], DecodeConfig(**bad), None, tokenizer=LETTERS)
    assert "\n" not in str(raised.value)


def test_greedy_needs_no_temperature(model: GPT) -> None:
    generate(model, [[1]], DecodeConfig(decode="greedy", temperature=0.0, max_new_tokens=1), None)


@every_way
def test_an_empty_prompt_is_refused(model: GPT, options: DecodeConfig) -> None:
    assert generate(model, [], options, eot=None, tokenizer=LETTERS) == []
    with pytest.raises(UserError, match="no token"):
        generate(model, [[1], []], options, eot=None, tokenizer=LETTERS)


def test_a_missing_tokenizer_is_reported(model: GPT) -> None:
    for options in (DecodeConfig(decode="mbr"), DecodeConfig(stop_lines=1)):
        with pytest.raises(ValueError, match="needs the tokenizer"):
            generate(model, [[1]], options, None)


# --- the window and the stop


def greedy_without_cache(
    reference, prompt: list[int], count: int, context: int = BLOCK
) -> list[int]:
    """What sliding means: a window that outgrows the context keeps its newest three quarters."""
    window, out = list(prompt), []
    for _ in range(count):
        if len(window) > context:
            window = window[-kept_tokens(context) :]
        with torch.no_grad():
            token = int(reference(torch.tensor([window])).logits[0, -1].argmax())
        window.append(token)
        out.append(token)
    return out


SLIDING = {
    "greedy": (DecodeConfig(decode="greedy"), BLOCK),
    "beam": (DecodeConfig(decode="beam", beams=1), BLOCK),
    # a candidate must fit as well
    "contrastive": (DecodeConfig(decode="contrastive", contrastive_k=1), BLOCK - 1),
}


@pytest.mark.parametrize(("options", "context"), SLIDING.values(), ids=SLIDING)
def test_sliding_past_the_context(
    model: GPT, reference, options: DecodeConfig, context: int
) -> None:
    lengths = range(BLOCK - 1), range(BLOCK), range(100, 100 + BLOCK + 30)
    prompts = [PROMPTS[0], *map(list, lengths)]
    ours = generate(model, prompts, dataclasses.replace(options, max_new_tokens=BLOCK), eot=None)
    for prompt, continuation in zip(prompts, ours, strict=True):
        assert continuation == greedy_without_cache(reference, prompt, BLOCK, context)


def test_alternatives_are_each_the_next_token(model: GPT) -> None:
    """Read in one pass, padded or not, after a prefix or not; and the one that is kept stands in
    the cache."""
    candidates = torch.tensor([[1, 2, 3], [200, 5, 2], [9, 8, 300]])
    for gpt in (model, with_prefix([300, 12, 45])):
        window = Window(gpt, PROMPTS, max_new_tokens=3, alternatives=3)
        with torch.no_grad():
            window.read()
            x = window.read_alternatives(candidates)
            chosen = torch.tensor([2, 0, 1])
            window.keep(chosen)
            after = gpt.hidden(torch.tensor([[4], [5], [6]]), past=window.cache)
            for row, prompt in enumerate(PROMPTS):
                for i, token in enumerate(candidates[row].tolist()):
                    torch.testing.assert_close(
                        x[row, i], gpt.hidden(torch.tensor([[*prompt, token]]))[0, -1]
                    )
                text = [*prompt, int(candidates[row, chosen[row]]), row + 4]
                torch.testing.assert_close(after[row, 0], gpt.hidden(torch.tensor([text]))[0, -1])


def test_prompts_alike_are_read_once(model: GPT, monkeypatch) -> None:
    read = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, idx, **more: read.append(len(idx)) or hidden(self, idx, **more)
    )
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    texts = generate(model, prompts, DecodeConfig(max_new_tokens=9), eot=None)
    assert read == [2] + [4] * 8
    assert texts == [
        generate(model, [p], DecodeConfig(max_new_tokens=9), None, rows=[i])[0]
        for i, p in enumerate(prompts)
    ]


def test_ids_past_the_vocabulary_are_never_chosen(model: GPT) -> None:
    options = DecodeConfig(max_new_tokens=60, temperature=1e4)  # every token as likely as another
    drawn = {t for row in generate(model, [[1]] * 32, options, eot=None) for t in row}
    assert max(drawn) < VOCAB and len(drawn) > 300
    drawn = {
        t for row in generate(model, [[1]] * 32, options, eot=None, vocab_size=200) for t in row
    }
    assert max(drawn) < 200
    for way in ("beam", "contrastive"):
        options = DecodeConfig(decode=way, max_new_tokens=40, repetition_penalty=1.2)
        assert (
            max(t for row in generate(model, PROMPTS, options, None, vocab_size=20) for t in row)
            < 20
        )


def test_a_row_ends_before_end_of_text_and_its_neighbours_go_on(model: GPT) -> None:
    options = DecodeConfig(decode="greedy", max_new_tokens=30)
    whole = generate(model, PROMPTS, options, eot=None)
    eot = next(token for token in whole[2] if not all(token in row for row in whole))
    cut = generate(model, PROMPTS, options, eot)
    assert cut == [row[: row.index(eot)] if eot in row else row for row in whole]
    assert len(cut[2]) < 30 and max(map(len, cut)) == 30


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(0, 4))
@settings(max_examples=200, deadline=None)
def test_a_text_ends_with_its_last_line(ids: list[int], lines: int) -> None:
    """Token by token: the end comes at the first newline after so many lines of text, at the end
    token if sooner."""
    stop, text, ended = Stop(3, [lines], LETTERS), [], None
    for id in ids:
        text.append(id)
        if ended := stop(0, text):
            break
    whole = LETTERS.decode(text)
    complete = [line for line in whole.split("\n")[:-1] if line.strip()]
    if ended is None:
        assert 3 not in text and (not lines or len(complete) < lines)
    elif text[-1] == 3:
        assert ended == "before" and (not lines or len(complete) < lines)
    else:
        assert len(complete) == lines and "\n" in LETTERS.decode(text[-1:])
        # text before the newline is kept
        assert (ended == "after") == bool(LETTERS.decode(text[-1:]).strip())


# --- greedy and sampling


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_transformers_token_for_token(model: GPT, reference, penalty: float) -> None:
    options = DecodeConfig(decode="greedy", max_new_tokens=40, repetition_penalty=penalty)
    ours = generate(model, PROMPTS, options, eot=None)
    assert len({token for row in ours for token in row}) > 10
    for prompt, continuation in zip(PROMPTS, ours, strict=True):
        assert [continuation] == of_transformers(
            reference, [prompt], 40, repetition_penalty=penalty
        )


@pytest.mark.parametrize(
    "narrow", [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-4)], ids=str
)
def test_the_narrowest_sampling_is_greedy(model: GPT, narrow: dict) -> None:
    greedy = generate(model, PROMPTS, DecodeConfig(decode="greedy", max_new_tokens=30), eot=None)
    assert generate(model, PROMPTS, DecodeConfig(max_new_tokens=30, **narrow), eot=None) == greedy


def test_penalty_and_truncation_are_transformers() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    prompt = torch.randint(0, VOCAB, (3, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(3, VOCAB, dtype=torch.bool).scatter_(1, prompt, True)
    torch.testing.assert_close(
        penalize(logits, seen, 1.7), RepetitionPenaltyLogitsProcessor(1.7)(prompt, logits)
    )
    for top_k, top_p in ((5, 1.0), (0, 0.6), (40, 0.7), (1000, 0.3)):
        expected = TopKLogitsWarper(top_k)(prompt, logits) if top_k else logits
        expected = TopPLogitsWarper(top_p)(prompt, expected) if top_p < 1 else expected
        assert torch.equal(truncate(logits, top_k, top_p), expected)


def test_draws_are_made_a_block_at_a_time(model: GPT, monkeypatch) -> None:
    options = DecodeConfig(max_new_tokens=20, temperature=1.5)
    prompts = [[1, 2], [3]]
    texts = generate(model, prompts, options, None, seed=5)
    monkeypatch.setattr(sampling, "DRAWS", 3)
    assert generate(model, prompts, options, None, seed=5) == texts

    def stop(row: int, token: int) -> None:
        raise KeyboardInterrupt

    peak = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda n, **kw: peak.append(n) or rand(n, **kw))
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts, DecodeConfig(max_new_tokens=2**31 - 1), None, stop)
    assert peak == [3, 3], "as many numbers as the text may have tokens would fill the memory"


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -torch.inf]])
    n = 10_000
    uniform = torch.arange(n) / n  # from 0 up
    drawn = draw_tokens(logits.expand(n, -1), uniform).bincount(minlength=5) / n
    torch.testing.assert_close(drawn, logits.softmax(-1)[0], atol=2 / n, rtol=0)
    assert drawn[1] == drawn[4] == 0
    assert draw_tokens(logits, torch.tensor([1 - 2**-24])).tolist() == [3]


# --- beam search


@pytest.mark.parametrize(
    ("make", "length_penalty"),
    [(random_model, 0.6), (trained_model, 0.0), (trained_model, 1.0), (trained_model, 2.0)],
)
def test_beam_search_is_transformers_token_for_token(
    make, length_penalty: float, tmp_path: Path
) -> None:
    model = make()
    reference = in_transformers(model, tmp_path)
    generator = torch.Generator().manual_seed(2)
    lengths = set()
    for beams, blocked, penalty, n in ((4, 0, 1.0, 1), (5, 2, 1.3, 7), (3, 1, 1.0, 3)):
        prompts = torch.randint(1, model.config.vocab_size, (3, n), generator=generator).tolist()
        options = DecodeConfig(
            decode="beam", beams=beams, length_penalty=length_penalty, no_repeat_ngram=blocked,
            repetition_penalty=penalty, max_new_tokens=16,
        )  # fmt: skip
        how: dict[str, Any] = dict(
            num_beams=beams, length_penalty=length_penalty, no_repeat_ngram_size=blocked
        )
        how |= dict(repetition_penalty=penalty, early_stopping=False)
        whole = generate(model, prompts, options, eot=None)
        assert whole == of_transformers(reference, prompts, 16, **how)
        for eot in {0, whole[0][5], whole[1][3]}:
            ours = generate(model, prompts, options, eot)
            assert ours == of_transformers(reference, prompts, 16, eot, **how)
            lengths |= set(map(len, ours))
    # they ended at different times; long ones are best by the square
    assert len(lengths) > 2 or length_penalty == 2


@torch.no_grad()
def plain_beam_search(reference, prompt: list[int], beams: int, count: int) -> list[int]:
    """Every beam read from its beginning, or from where its window has slid to."""
    texts = [(0.0, list(prompt), list(prompt))]  # log-probability, text, window
    for _ in range(count):
        grown = []
        for score, text, window in texts:
            window = window if len(window) <= BLOCK else window[-kept_tokens(BLOCK) :]
            top = reference(torch.tensor([window])).logits[0, -1].log_softmax(-1).topk(2 * beams)
            grown += [
                (score + s, [*text, i], [*window, i])
                for s, i in zip(top.values.tolist(), top.indices.tolist())
            ]
        texts = sorted(grown, key=lambda t: -t[0])[:beams]
    return texts[0][1][len(prompt) :]


def test_beams_slide_past_the_context(model: GPT, reference) -> None:
    options = DecodeConfig(decode="beam", beams=3, max_new_tokens=BLOCK + 5)
    ours = generate(model, PROMPTS, options, eot=None)
    for prompt, continuation in zip(PROMPTS, ours, strict=True):
        assert continuation == plain_beam_search(reference, prompt, 3, BLOCK + 5)


def test_a_text_that_blocking_leaves_no_token_ends() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=6, block_size=BLOCK, n_layer=1, n_head=1, n_embd=8)).eval()
    options = DecodeConfig(decode="beam", no_repeat_ngram=1, max_new_tokens=20)
    (text,) = generate(model, [[4]], options, eot=None)
    assert sorted(text) == [0, 1, 2, 3, 5]


# --- contrastive search


def states(model: GPT):
    """What the reference reads with: the last hidden states and logits of whole texts."""

    def read(idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            x = model.hidden(idx)
            return x, model.logits(x)

    return read


CONTRASTIVE = {
    "plain": {},
    "few": dict(contrastive_k=2, contrastive_alpha=0.3),
    "growth": dict(contrastive_growth=True),
    "mean": dict(contrastive_similarity="mean"),
    "both": dict(
        contrastive_growth=True,
        contrastive_similarity="mean",
        contrastive_alpha=0.9,
        contrastive_k=8,
    ),
    "penalty": dict(repetition_penalty=1.5),
}


@pytest.mark.parametrize("options", CONTRASTIVE.values(), ids=CONTRASTIVE)
def test_contrastive_search_is_its_definition(model: GPT, reference, options: dict) -> None:
    config = DecodeConfig(decode="contrastive", max_new_tokens=16, **options)
    greedy = generate(model, PROMPTS, dataclasses.replace(config, decode="greedy"), eot=None)
    ours = generate(model, PROMPTS, config, eot=None)
    assert ours != greedy

    def read(idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            out = reference(idx, output_hidden_states=True)
        return out.hidden_states[-1], out.logits

    assert ours == [contrastive_reference(read, prompt, config) for prompt in PROMPTS]
    prefixed = with_prefix([300, 12, 45])
    ours = generate(prefixed, PROMPTS, config, eot=None)
    assert ours == [contrastive_reference(states(prefixed), prompt, config) for prompt in PROMPTS]


@pytest.mark.parametrize("without", [dict(contrastive_k=1), dict(contrastive_alpha=0.0)], ids=str)
def test_contrastive_search_with_k_1_or_alpha_0_is_greedy(model: GPT, without: dict) -> None:
    greedy = generate(model, PROMPTS, DecodeConfig(decode="greedy", max_new_tokens=40), eot=None)
    assert (
        generate(
            model, PROMPTS, DecodeConfig(decode="contrastive", max_new_tokens=40, **without), None
        )
        == greedy
    )


def test_contrastive_search_of_one_token(model: GPT) -> None:
    options = DecodeConfig(
        decode="contrastive", contrastive_growth=True, max_new_tokens=1, contrastive_k=VOCAB + 9
    )
    greedy = generate(model, PROMPTS, DecodeConfig(decode="greedy", max_new_tokens=1), None)
    assert generate(model, PROMPTS, options, None) == greedy  # the weight begins at 0


# --- minimum Bayes risk


def mean_chrf(texts: list[str]) -> list[float]:
    from sacrebleu import sentence_chrf

    return [
        sum(sentence_chrf(text, [other]).score for j, other in enumerate(texts) if j != i)
        / max(1, len(texts) - 1)
        for i, text in enumerate(texts)
    ]


@given(st.lists(st.lists(st.integers(8, 40), min_size=1, max_size=12), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_least_risk_is_the_greatest_mean_chrf(texts: list[list[int]]) -> None:
    means = mean_chrf([LETTERS.decode(text) for text in texts])
    chosen = texts.index(least_risk(texts, LETTERS))
    assert means[chosen] == pytest.approx(max(means))


def test_minimum_bayes_risk_over_beams(model: GPT, reference) -> None:
    prompt, n = PROMPTS[1], 6
    options = DecodeConfig(decode="mbr", candidates_by="beam", candidates=n, max_new_tokens=20)
    beams = of_transformers(
        reference, [prompt], 20, num_beams=n, num_return_sequences=n, early_stopping=False
    )
    means = mean_chrf([LETTERS.decode(beam) for beam in beams])
    assert len(set(map(tuple, beams))) == n and means.index(max(means)) > 0
    assert generate(model, [prompt], options, None, tokenizer=LETTERS) == [
        beams[means.index(max(means))]
    ]


def test_an_ensemble_holds_texts_of_each_kind(model: GPT, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        batched, "least_risk", lambda texts, tokenizer: seen.append(texts) or texts[0]
    )
    options = DecodeConfig(
        decode="ensemble", candidates=7, beams=2, max_new_tokens=20, temperature=1.0
    )
    generate(model, PROMPTS * 5, options, None, tokenizer=LETTERS)
    assert len(seen) == 15
    for decode in ("beam", "contrastive"):
        alone = generate(model, PROMPTS, dataclasses.replace(options, decode=decode), None)
        assert all(text in texts for text, texts in zip(alone, seen))
    samples = [tuple(text) for texts in seen for text in texts[:4]]
    assert len(set(samples)) == len(samples) and all(len(texts) == 7 for texts in seen)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-39, 1e-20, 1e30])
@pytest.mark.parametrize("top_p", [5e-324, 1.0])
def test_an_extreme_temperature_is_greedy_or_uniform(temperature: float, top_p: float) -> None:
    from decoding.sampling import apply_temperature

    logits = torch.tensor([[-50.0, 3.0, -torch.inf, 2.9999, 0.0]])
    probs = truncate(apply_temperature(logits, temperature), 0, top_p).softmax(-1)[0]
    assert probs.isfinite().all() and probs[2] == 0
    greedy = [0.0, 1.0, 0.0, 0.0, 0.0]
    if temperature < 1 or top_p < 1:
        greedy = [0.0, 1.0, 0.0, 0.0, 0.0] if temperature < 1 else [1.0, 0.0, 0.0, 0.0, 0.0]
        assert probs.tolist() == greedy or probs.amax() == 1
    else:
        assert probs.tolist() == pytest.approx([0.25, 0.25, 0, 0.25, 0.25])


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.0])
def test_length_penalty_orders_as_the_quotient_does(penalty: float) -> None:
    from decoding.search import length_score

    draw = random.Random(0)
    texts = [(-draw.uniform(0.01, 300), draw.randint(1, 200)) for _ in range(300)]
    by_quotient = sorted(texts, key=lambda text: text[0] / text[1] ** penalty)
    assert sorted(texts, key=lambda text: length_score(*text, penalty)) == by_quotient


@pytest.mark.parametrize("penalty", [1000.0, 1e6])
def test_a_huge_length_penalty_prefers_the_longest(penalty: float) -> None:
    from decoding.search import length_score

    assert (
        length_score(-500.0, 90, penalty)
        > length_score(-0.1, 89, penalty)
        > length_score(-0.2, 89, penalty)
    )
    assert length_score(0.0, 1, penalty) > length_score(-1e-9, 1000, penalty)
