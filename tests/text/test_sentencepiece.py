"""SentencePiece's models in the hub's layout, KoGPT-2's layout, and a new vocabulary end to end."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import UserError
from decoding.loading import open_model
from hub_tokenizers import AWKWARD, SENTENCES, hub_ids, hub_tokenizer
from model import GPT, GPTConfig
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import sentencepiece_model, sentencepiece_pipeline, train_sentencepiece

pytest.importorskip("sentencepiece")

SIZE = 400
SYLLABLES = [
    "the",
    "ba",
    "ko",
    "ing",
    "st",
    "er",
    "1,",
    "02",
    "'s",
    "학",
    "교",
    "에서",
    "를",
    "고양",
    "이",
    "ㅋㅋ",
]
WORDS = [a + b for a in SYLLABLES for b in SYLLABLES]
SPELT = ["<0x41>", "<0x0A>", "<unk>", "<|endoftext|>", "<answer>"]  # names of tokens, as text
# "▁" is decoded as a space
TEXTS = st.lists(
    st.one_of(st.sampled_from([*WORDS, *SPELT, " ", "  ", "\n", "ㅋ"]), st.text())
).map(lambda parts: "".join(parts).replace("▁", ""))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=12)) + draw.choice(".!") for _ in range(600)]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def kind(request) -> Any:
    return request.param


@pytest.fixture(scope="module")
def made(lines, kind, tmp_path_factory) -> Tokenizer:
    out = tmp_path_factory.mktemp("sentencepiece") / kind
    return train_sentencepiece(lines, SIZE, out, kind, ["<answer>", "<질문>"])


@pytest.fixture(scope="module")
def reference(lines, kind) -> tuple[Any, Any]:
    """SentencePiece's own model, and the same model in `tokenizers`."""
    processor = sentencepiece_model(lines, SIZE, [], kind)
    pipeline = sentencepiece_pipeline(processor, kind)
    pipeline.encode_special_tokens = True
    return processor, pipeline


class TestSentencePiece:
    @given(TEXTS)
    @settings(max_examples=200, deadline=None)
    def test_round_trip(self, made, text):
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert b"".join(map(made.token_bytes, ids)) == text.encode()
        assert not set(ids) & set(made.special_ids.values())
        assert made.encode_batch([text]) == [ids]

    @pytest.mark.parametrize("text", AWKWARD)
    def test_awkward_texts_survive(self, made, text):
        assert made.decode(made.encode(text)) == text

    @given(TEXTS)
    @example(" theing  ko ")
    @settings(max_examples=200, deadline=None)
    def test_ids_are_sentencepieces_own(self, reference, kind, text):
        processor, pipeline = reference
        own, ids = processor.encode(text), pipeline.encode(text).ids
        if kind == "bpe":
            assert ids == own
        else:  # of two splits that are equally likely, either may be chosen
            scores = [sum(processor.get_score(id) for id in way) for way in (ids, own)]
            assert processor.decode(ids) == text and scores[0] == pytest.approx(scores[1], rel=1e-5)

    def test_ids_are_unknown_bytes_pieces_end_special(self, made):
        assert made.vocab_size == SIZE and made.eot == SIZE - 3
        assert [made.special_id(token) for token in ("<unk>", "<answer>", "<질문>")] == [
            0,
            SIZE - 2,
            SIZE - 1,
        ]
        assert [made.token_bytes(id) for id in range(1, 257)] == [bytes([b]) for b in range(256)]
        assert len(made.encode("theing 학교 1,02")) < 10

    def test_transformers_agrees(self, made):
        texts = [*SENTENCES, *AWKWARD, *SPELT, "ㅋㅋㅋ theing 학교  ko\n"]
        assert hub_ids(Path(made.source), texts) == made.encode_batch(texts)
        hub = hub_tokenizer(Path(made.source))
        ids = [*made.encode("bako"), made.special_id("<질문>"), *made.encode(" 학교를\n"), made.eot]
        assert hub("bako<질문> 학교를\n<|endoftext|>")["input_ids"] == ids
        assert hub.decode(ids) == made.decode(ids) == "bako<질문> 학교를\n<|endoftext|>"
        assert (
            hub.decode(ids, skip_special_tokens=True)
            == made.decode(ids, skip_special=True)
            == "bako 학교를\n"
        )
        assert (len(hub), hub.eos_token_id, hub.unk_token_id) == (SIZE, made.eot, 0)

    def test_is_deterministic_and_saved_whole(self, made, lines, kind, tmp_path):
        again = train_sentencepiece(iter(lines), SIZE, tmp_path / "a", kind, ["<answer>", "<질문>"])
        assert (again.sha256, again.special_ids) == (made.sha256, made.special_ids)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "a" / name).read_bytes() == (Path(made.source) / name).read_bytes()

    def test_special_tokens_are_not_learned(self, lines, kind, tmp_path):
        texts = [f"{line}<answer>{line}" for line in lines]
        made = train_sentencepiece(texts, SIZE, tmp_path / "t", kind, ["<answer>"])
        assert not any(b"sw" in made.token_bytes(id) for id in range(made.vocab_size))

    def test_long_lines_and_runs_are_trained_on(self, kind, tmp_path):
        texts = ["a" * 100_000 + " ", "ab " * 50_000, "\ud83d\ude42\ud800"]
        made = train_sentencepiece(texts, {"unigram": 285, "bpe": 265}[kind], tmp_path / "t", kind)
        assert made.decode(made.encode("aab 🙂\ud800")) == "aab 🙂\ufffd"

    @pytest.mark.parametrize(
        "texts, vocab_size, special, says",
        [
            (None, 270, (), "270 is too small"),
            (None, -5, (), "-5 is too small"),
            (None, 9_000, (), "9000 is too large"),
            ([], SIZE, (), "no text"),
            (["\n", ""], SIZE, (), "no text"),
            (None, SIZE, ("<a>", "<a>"), "given twice"),
            (None, SIZE, (" ",), "plain characters"),
        ],
    )
    def test_bad_arguments_are_refused(
        self, lines, kind, tmp_path, texts, vocab_size, special, says
    ):
        with pytest.raises(UserError, match=says) as raised:
            train_sentencepiece(
                lines if texts is None else texts, vocab_size, tmp_path / "t", kind, special
            )
        assert "\n" not in str(raised.value) and not (tmp_path / "t").exists()

    @pytest.mark.parametrize("vocab_size", [258, 9_000])
    def test_the_suggested_size_works(self, lines, kind, tmp_path, vocab_size):
        special = ["<a>", "<b>"]
        with pytest.raises(UserError, match=r"make \d+|gives \d+") as raised:
            train_sentencepiece(lines, vocab_size, tmp_path / "t", kind, special)
        limit = int(re.findall(r"(?:make|gives) (\d+)", str(raised.value))[0])
        assert train_sentencepiece(lines, limit, tmp_path / "t", kind, special).vocab_size == limit


class TestKoGPT2:
    """A folder like KoGPT-2's: Metaspace BPE without bytes, NFKC, special tokens first, no
    tokenizer_config.json."""

    SPECIAL = (
        "<s>",
        "</s>",
        "<usr>",
        "<pad>",
        "<sys>",
        "<unk>",
        "<mask>",
        "<d>",
        "</d>",
        "<unused0>",
    )
    TEXTS = (
        "학교에서 고양이를",
        "  두  칸 ",
        "a</s> the<usr>ko",
        "",
        "ﾊ 漢字 ① ㅋㅋ",
        "줄\n바꿈 1,02 ",
        "🙂 학교",
    )

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, lines, tmp_path_factory) -> Path:
        from tokenizers import SentencePieceBPETokenizer

        folder = tmp_path_factory.mktemp("kogpt2")
        words = SentencePieceBPETokenizer(unk_token="<unk>")
        words.train_from_iterator(
            lines, vocab_size=300, special_tokens=list(cls.SPECIAL), show_progress=False
        )
        spec = json.loads(words.to_str())
        # the format of the library in 2021
        for part in ("pre_tokenizer", "decoder"):
            spec[part] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        torch.manual_seed(0)
        shape = GPTConfig(
            vocab_size=len(spec["model"]["vocab"]), block_size=64, n_layer=2, n_head=2, n_embd=64
        )
        GPT(shape).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 3,
            "author": "a person",
            "n_ctx": 64,
        }
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def test_ids_equal_those_of_transformers(self, folder, tmp_path):
        from transformers import PreTrainedTokenizerFast

        ours, theirs = load_tokenizer(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
        ids = ours.encode_batch(list(self.TEXTS))
        assert [theirs(text, split_special_tokens=True)["input_ids"] for text in self.TEXTS] == ids
        assert [theirs.decode(row) for row in ids] == [ours.decode(row) for row in ids]
        assert (ours.eot, ours.vocab_size, ours.special_id("<usr>")) == (1, len(theirs), 2)
        assert ours.decode(ids[0]) == "학교에서 고양이를" and ours.special_id("<unk>") in ids[6]
        # names the class, which AutoTokenizer cannot infer from KoGPT-2's folder
        ours.save(tmp_path)
        assert hub_ids(tmp_path, list(self.TEXTS)) == ids

    def test_special_tokens_can_be_added(self, folder, tmp_path):
        plain = load_tokenizer(str(folder))
        extended = plain.with_special(["<d>", "<요약>"])
        assert (extended.special_id("<d>"), extended.special_id("<요약>")) == (7, plain.vocab_size)
        ids = [*plain.encode("학교에서"), plain.vocab_size, *plain.encode("고양이")]
        assert extended.decode(ids) == "학교에서<요약> 고양이"
        extended.save(tmp_path)
        assert hub_tokenizer(tmp_path)("학교에서<요약> 고양이")["input_ids"] == ids
        with pytest.raises(UserError, match="already is an ordinary one"):
            plain.with_special(["학"])

    def test_generates(self, folder, run, repo):
        words = ("학교에서", "--max-new-tokens", "5", "--device", "cpu")
        done = run(repo / "generate.py", folder, *words, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("학교에서") and len(done.stdout) > len("학교에서\n")


def test_a_new_vocabulary_works_end_to_end(lines, run, repo, tmp_path):
    """A tokenizer with a task's tokens, a new GPT-2 of its size, training, and loading both in
    transformers."""
    from transformers import AutoModelForCausalLM

    text = "".join(f"{line}\n<|endoftext|>\n" for line in lines)
    (tmp_path / "text.txt").write_text(text)
    out, one = tmp_path / "run", {"OMP_NUM_THREADS": "1"}
    words = [
        "--model",
        "unigram",
        "--special",
        "<question>",
        "<답>",
        "--input",
        "text.txt",
        "--vocab-size",
        SIZE,
    ]
    made = run(repo / "tokenizer.py", "train", *words, "--out", "words", env=one)
    assert made.returncode == 0 and f"vocabulary {SIZE}" in made.stdout, made.stderr
    words = [
        "--tokenizer",
        "words",
        "--init",
        "scratch",
        "--preset",
        "micro",
        "--steps",
        3,
        "--data",
        "text.txt",
    ]
    words += [
        "--seq-len",
        32,
        "--batch-tokens",
        128,
        "--eval-tokens",
        256,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    trained = run(repo / "train_gpt2.py", *words, env=one)
    assert trained.returncode == 0, trained.stderr

    hub, hub_model = (
        hub_tokenizer(out / "final"),
        AutoModelForCausalLM.from_pretrained(out / "final").eval(),
    )
    model, ours = open_model(str(out / "final"), None, torch.device("cpu"), torch.float32)
    ids = [*ours.encode("theing 학교"), ours.special_id("<답>"), *ours.encode(" kober"), ours.eot]
    assert hub("theing 학교<답> kober<|endoftext|>")["input_ids"] == ids
    assert (
        SIZE
        == ours.vocab_size
        == model.config.vocab_size
        == hub_model.config.vocab_size
        == len(hub)
    )
    assert hub_model.config.eos_token_id == hub.eos_token_id == ours.eot
    idx = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(idx), hub_model(idx).logits, rtol=1e-5, atol=1e-5)
