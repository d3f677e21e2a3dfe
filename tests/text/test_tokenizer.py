"""Tokenizers round-trip, agree with the hub's library, and give one-line errors."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from hub_tokenizers import AWKWARD, SENTENCES, hub_ids, hub_tokenizer
from text import tokenizer, tokenizer_training
from text.tokenizer import Tokenizer, load_tokenizer
from text.tokenizer_training import train_bpe

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    return train_bpe(SENTENCES * 20, 400, tmp_path_factory.mktemp("tokenizers") / "small")


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", SHARED / "tiktoken_cache"))
    if not cache.is_dir():
        pytest.skip("needs tiktoken's two gpt2 files: set TIKTOKEN_CACHE_DIR to their folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def gpt2_folder(gpt2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "gpt2-saved"
    gpt2.save(folder)
    return folder


class TestTrained:
    @given(st.text())
    @settings(max_examples=300, deadline=None)
    def test_round_trip(self, trained, text):
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert b"".join(map(trained.token_bytes, ids)) == text.encode()
        assert trained.eot not in ids

    @given(
        st.text(
            alphabet=st.one_of(st.sampled_from("the dog's 12 \n\t\r'고양이🙂"), st.characters())
        )
    )
    @settings(max_examples=300, deadline=None)
    def test_batch_through_tiktoken_equals_tokenizers(self, trained, text):
        assert trained._encoding is not None
        assert trained.encode_batch([text]) == trained._encode([text])

    def test_long_white_space_round_trips(self, trained):
        text = "a" + " \n" * 600_000 + "x"
        assert trained.encode(text) == trained._encode([text])[0]

    def test_ids_are_bytes_then_merges_then_eot(self, trained):
        assert trained.vocab_size == 400 and trained.eot == 399
        assert sorted(trained.token_bytes(i) for i in range(256)) == [
            bytes([b]) for b in range(256)
        ]
        assert all(len(trained.token_bytes(i)) > 1 for i in range(256, 399))
        assert trained.token_bytes(trained.eot) == b""

    def test_training_shortens_the_text(self, trained):
        text = "".join(SENTENCES)
        assert len(trained.encode(text)) < len(text.encode()) / 2

    def test_transformers_agrees(self, trained):
        texts = SENTENCES + AWKWARD
        assert hub_ids(Path(trained.source), texts) == trained.encode_batch(texts)
        hub = hub_tokenizer(Path(trained.source))
        assert len(hub) == trained.vocab_size and hub.eos_token_id == trained.eot

    def test_transformers_agrees_beside_a_gpt2_model(self, trained, tmp_path):
        trained.save(tmp_path)
        (tmp_path / "config.json").write_text(
            '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
        )
        assert hub_ids(tmp_path, SENTENCES) == trained.encode_batch(SENTENCES)

    def test_is_deterministic(self, trained, tmp_path):
        again = train_bpe(iter(SENTENCES * 20), 400, tmp_path / "again")
        for name in FILES:
            assert (tmp_path / "again" / name).read_bytes() == (
                Path(trained.source) / name
            ).read_bytes()
        assert again.sha256 == trained.sha256

    def test_writes_only_its_own_new_folder(self, trained):
        folder = Path(trained.source)
        assert [path.name for path in folder.parent.iterdir()] == ["small"]
        with pytest.raises(UserError, match="is not empty; name a new folder"):
            train_bpe(SENTENCES, 300, folder)

    def test_little_text_gives_fewer_tokens(self, tmp_path):
        small = train_bpe(["ab ab"], 10_000, tmp_path / "t")
        assert (
            small.vocab_size == 258 and small.eot == 257
        )  # "ab" is the only pair that occurs twice
        assert small.decode(small.encode("abba")) == "abba"

    def test_special_tokens_are_last_and_not_learned(self, trained, tmp_path):
        texts = [f"<question>{sentence}<question>" for sentence in SENTENCES * 20]
        made = train_bpe(texts, 402, tmp_path / "t", ["<question>", "<답>"])
        assert (made.eot, made.special_id("<question>"), made.special_id("<답>")) == (399, 400, 401)
        assert [made.token_bytes(id) for id in range(399)] == [
            trained.token_bytes(id) for id in range(399)
        ]
        assert made.sha256 == trained.with_special(["<question>", "<답>"]).sha256

    def test_long_runs_are_trained_on(self, tmp_path):
        long = train_bpe(["a" * 300_000 + " " * 300_000, "ab" * 50_000], 400, tmp_path / "t")
        assert (
            max(len(long.token_bytes(i)) for i in range(long.vocab_size))
            <= tokenizer_training.LONGEST_WORD
        )

    def test_bad_arguments_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="257"):
            train_bpe(SENTENCES, 256, tmp_path / "t")
        with pytest.raises(UserError, match="no text"):
            train_bpe(["", ""], 300, tmp_path / "t")
        (tmp_path / "file").write_text("x")
        with pytest.raises(UserError, match="is a file; name a new folder"):
            train_bpe(SENTENCES, 300, tmp_path / "file" / "t")
        assert not (tmp_path / "t").exists()


class TestAny:
    """Properties of both implementations."""

    @pytest.fixture(params=["trained", "gpt2"])
    def either(self, request) -> Tokenizer:
        return request.getfixturevalue(request.param)

    @pytest.mark.parametrize("text", AWKWARD)
    def test_awkward_texts_survive(self, either, text):
        ids = either.encode(text)
        assert either.decode(ids) == text and either.eot not in ids
        assert either.encode_batch([text, "x", text]) == [ids, either.encode("x"), ids]

    def test_one_thread_gives_the_same_ids(self, either):
        one = load_tokenizer(either.source, num_threads=1)
        assert one.encode_batch(SENTENCES) == either.encode_batch(SENTENCES)

    def test_lone_surrogates_are_replaced(self, either):
        assert either.decode(either.encode("a\ud800b")) == "a\ufffdb"
        assert either.decode(either.encode_batch(["\udfff", "\ud83d\ude42"])[0]) == "\ufffd"
        assert either.encode("\ud83d\ude42") == either.encode(
            "🙂"
        )  # a surrogate pair is read as its character

    def test_partial_utf8_decodes(self, either):
        ids = either.encode("🙂")
        assert len(ids) > 1 or either.token_bytes(ids[0]) == "🙂".encode()
        first_byte = next(
            i for i in range(either.vocab_size) if either.token_bytes(i) == "🙂".encode()[:1]
        )
        assert either.decode([first_byte]) == "\ufffd"
        assert either.decode([]) == ""
        assert either.decode([either.eot]) == "<|endoftext|>"

    @pytest.mark.parametrize("id", [-1, 10**6, 2**40])
    def test_ids_outside_the_vocabulary_are_refused(self, either, id):
        with pytest.raises(UserError, match="outside the vocabulary"):
            either.decode([1, id])
        with pytest.raises(UserError, match="outside the vocabulary"):
            either.token_bytes(id)

    def test_a_pickle_is_small_and_complete(self, either):
        pickled = pickle.dumps(either)
        again = pickle.loads(pickled)
        assert len(pickled) < 500
        assert (again.name, again.source, again.sha256) == (
            either.name,
            either.source,
            either.sha256,
        )
        assert again.encode(SENTENCES[0]) == either.encode(SENTENCES[0])

    @pytest.mark.parametrize("name", ["own", "run/final", "run/checkpoints/step-00000010"])
    def test_the_name_of_a_run_is_in_its_tokenizers_name(self, either, tmp_path, name):
        either.save(tmp_path / name)
        assert load_tokenizer(str(tmp_path / name)).name == name

    def test_saving_keeps_the_ids(self, either, tmp_path):
        either.save(tmp_path / "copy")
        copy = load_tokenizer(str(tmp_path / "copy"))
        assert copy.name == "copy" and copy.source == str(tmp_path / "copy")
        assert (copy.sha256, copy.vocab_size, copy.eot) == (
            either.sha256,
            either.vocab_size,
            either.eot,
        )
        assert copy.encode_batch(AWKWARD) == either.encode_batch(AWKWARD)


class TestSpecialTokens:
    """with_special, on either implementation."""

    NEW = ("<question>", "<답>", "<end of it>")

    @pytest.fixture(params=["trained", "gpt2"])
    def plain(self, request) -> Tokenizer:
        return request.getfixturevalue(request.param)

    @pytest.fixture
    def extended(self, plain) -> Tokenizer:
        return plain.with_special(["<|endoftext|>", *self.NEW])

    def test_new_ids_follow_the_old(self, plain, extended):
        ids = [extended.special_id(token) for token in self.NEW]
        assert ids == list(range(plain.vocab_size, plain.vocab_size + 3))
        assert extended.vocab_size == plain.vocab_size + 3
        assert extended.eot == plain.eot == extended.special_id("<|endoftext|>")
        assert extended.special == self.NEW and plain.special == ()

    @given(st.text(alphabet=st.one_of(st.sampled_from("<answer>question답 the"), st.characters())))
    @settings(max_examples=100, deadline=None)
    def test_ids_of_text_do_not_change(self, trained, text):
        extended = trained.with_special(["<answer>"])
        text = text + "<answer>"
        assert extended.encode(text) == extended.encode_batch([text])[0] == trained.encode(text)

    def test_ids_of_awkward_texts_do_not_change(self, plain, extended):
        assert extended.encode_batch(AWKWARD) == plain.encode_batch(AWKWARD)

    def test_decode_spells_or_skips(self, extended):
        ids = [
            *extended.encode("it is"),
            extended.special_id("<답>"),
            *extended.encode(" so"),
            extended.eot,
        ]
        assert extended.decode(ids) == "it is<답> so<|endoftext|>"
        assert extended.decode(ids, skip_special=True) == "it is so"
        assert extended.token_bytes(extended.special_id("<답>")) == b""

    def test_transformers_reads_them_as_special(self, extended, tmp_path):
        extended.save(tmp_path)
        hub, ids = hub_tokenizer(tmp_path), [extended.special_id(token) for token in self.NEW]
        expected = [*extended.encode("the dog"), ids[1], *extended.encode(" runs\n"), ids[2]]
        assert hub("the dog<답> runs\n<end of it>")["input_ids"] == expected
        assert len(hub) == extended.vocab_size and set(ids) <= set(hub.all_special_ids)
        assert hub.decode(expected, skip_special_tokens=True) == extended.decode(
            expected, skip_special=True
        )

    def test_saving_and_pickling_keep_special_tokens(self, plain, extended, tmp_path):
        extended.save(tmp_path)
        saved, pickled = load_tokenizer(str(tmp_path)), pickle.loads(pickle.dumps(extended))
        assert saved.sha256 == extended.sha256 != plain.sha256
        for again in (saved, pickled):
            assert again.special_ids == extended.special_ids
            assert again.with_special(self.NEW) is again
            assert again.with_special(["<more>"]).special_id("<more>") == plain.vocab_size + 3

    def test_a_second_addition_is_saved_with_the_first(self, trained, tmp_path):
        trained.with_special(self.NEW).save(tmp_path / "once")
        load_tokenizer(str(tmp_path / "once")).with_special(["<more>"]).save(tmp_path / "twice")
        assert set(hub_tokenizer(tmp_path / "twice").extra_special_tokens) == {*self.NEW, "<more>"}
        assert load_tokenizer(str(tmp_path / "twice")).vocab_size == trained.vocab_size + 4

    @pytest.mark.parametrize(
        "tokens, says",
        [
            (["the"], "already is an ordinary one"),
            ([" the"], "already is an ordinary one"),
            (["Ġthe"], "plain characters"),  # the vocabulary's spelling of " the"
            (["t"], "already is an ordinary one"),
            (["<a>", "<b>", "<a>"], "'<a>' is given twice"),
            ([""], "plain characters"),
            ([" \n"], "plain characters"),
            (["<\ud800>"], "plain characters"),
            (["<é>"], "plain characters"),
        ],
    )
    def test_bad_special_tokens_are_refused(self, plain, tokens, says):
        with pytest.raises(UserError, match=says):
            plain.with_special(tokens)

    def test_unknown_names_are_refused(self, extended):
        with pytest.raises(UserError, match=r"no special token '<anser>'; it has .*<question>"):
            extended.special_id("<anser>")

    def test_ids_without_a_token_leave_no_room(self, trained, tmp_path):
        spec = json.loads((Path(trained.source) / "tokenizer.json").read_text())
        spec["model"]["vocab"]["fox"] = 500
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(UserError, match="have no token"):
            load_tokenizer(str(tmp_path)).with_special(["<answer>"])

    def test_the_model_grows_with_the_tokenizer(self, trained, tmp_path):
        import torch
        from transformers import AutoModelForCausalLM

        from adapters.layers import add_tokens
        from model import GPT, GPTConfig

        extended = trained.with_special(self.NEW)
        torch.manual_seed(0)
        model = GPT(
            GPTConfig(vocab_size=trained.vocab_size, block_size=32, n_layer=2, n_head=2, n_embd=32)
        ).eval()
        idx = torch.tensor([trained.encode("The quick brown fox")])
        before, table = (
            model(idx),
            model.transformer.wte.weight.detach()[: trained.vocab_size].clone(),
        )
        add_tokens(model, range(trained.vocab_size, extended.vocab_size))
        after = model(idx)
        torch.testing.assert_close(after[..., : trained.vocab_size], before, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            model.transformer.wte.weight[trained.vocab_size : extended.vocab_size],
            table.mean(0).expand(3, -1),
        )

        model.save_pretrained(tmp_path, eot=extended.eot)
        extended.save(tmp_path)
        hub, words = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), hub_tokenizer(tmp_path)
        assert len(words) == hub.config.vocab_size == load_tokenizer(str(tmp_path)).vocab_size
        idx = torch.tensor([words("The fox<question> quick")["input_ids"]])
        torch.testing.assert_close(hub(idx).logits, model(idx), rtol=1e-5, atol=1e-5)


class TestGPT2:
    def test_known_ids(self, gpt2):
        assert gpt2.encode("hello world") == [31373, 995]
        assert (gpt2.name, gpt2.source, gpt2.vocab_size, gpt2.eot) == ("gpt2", "gpt2", 50257, 50256)
        assert gpt2.token_bytes(995) == b" world"

    def test_transformers_agrees(self, gpt2, gpt2_folder):
        texts = SENTENCES + AWKWARD
        assert hub_ids(gpt2_folder, texts) == gpt2.encode_batch(texts)

    def test_sha256_is_the_same_for_every_layout(self, gpt2, gpt2_folder, tmp_path):
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
        stored = [tmp_path, gpt2_folder, gpt2_folder / "tokenizer.json"]
        assert {load_tokenizer(str(where)).sha256 for where in stored} == {gpt2.sha256}

    def test_rebuilds_the_released_files(self, gpt2_folder):
        released = SHARED / "gpt2_bpe"
        if not released.is_dir():
            pytest.skip("needs ../shared/data/gpt2_bpe: GPT-2's released vocabulary")
        assert (gpt2_folder / "merges.txt").read_text() == (released / "vocab.bpe").read_text()
        vocab = json.loads((gpt2_folder / "vocab.json").read_text())
        assert vocab == json.loads((released / "encoder.json").read_text())

    @given(text=st.text(alphabet="a' \n\r\x1c\x85\u00a0\u30001é고🙂.", max_size=60))
    @settings(max_examples=500, deadline=None)
    def test_cutting_long_text_keeps_the_ids(self, gpt2, text):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer, "PIECE_CHARS", 3)
            patch.setattr(tokenizer, "PIECE_CHARS", 3)
            assert gpt2.encode(text) == gpt2._encoding.encode_ordinary(text)

    def test_very_long_runs_are_encoded(self, gpt2):
        assert gpt2.encode(" " * 500_000 + "x") == [220] * 499_999 + gpt2.encode(" x")
        for run in ("a" * 300_000, "\n" * 300_000, "가" * 100_000, "x!" * 100_000):
            assert gpt2.decode(gpt2.encode(run)) == run

    def test_without_network_or_cache_says_what_to_do(self, monkeypatch):
        import tiktoken

        def unreachable(name: str):
            raise ConnectionError("no route")

        monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
        with pytest.raises(UserError, match=r"TIKTOKEN_CACHE_DIR.*tokenizer.py train"):
            load_tokenizer("gpt2")


class TestOtherTokenizers:
    def test_word_piece(self, tmp_path):
        from tokenizers import Tokenizer as HubTokenizer
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        words = ["[UNK]", "[SEP]", "un", "##do", "##ne", "work", ".", "[", "]", "sep"]
        hub = HubTokenizer(
            models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]")
        )
        hub.normalizer = normalizers.Lowercase()
        hub.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        hub.decoder = decoders.WordPiece()
        hub.enable_truncation(2)
        hub.enable_padding(length=8)
        hub.save(str(tmp_path / "words.json"))

        words = load_tokenizer(str(tmp_path / "words.json"))
        assert words.name == "words" and words.eot == 1
        assert words.encode("Undone work. [SEP]") == [2, 3, 4, 5, 6, 7, 9, 8]
        assert words.encode("xyz") == [0]
        assert words.decode([5, 2, 3, 4]) == "work undone"
        assert [words.token_bytes(i) for i in (1, 2, 3, 5)] == [b"", b" un", b"do", b" work"]
        words.save(tmp_path / "saved")
        assert load_tokenizer(str(tmp_path / "saved")).sha256 == words.sha256
        assert not (tmp_path / "saved" / "merges.txt").exists()

    def test_a_unigram_model_finds_no_special_token(self, tmp_path):
        from tokenizers import Tokenizer as HubTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        pieces = ["<unk>", "</s>", "▁", "a", "b", "<", "/", "s", ">", "<0xF0>"]
        hub = HubTokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
        hub.pre_tokenizer = pre_tokenizers.Metaspace()
        hub.decoder = decoders.Metaspace()
        hub.add_special_tokens(["<unk>", "</s>"])
        hub.save(str(tmp_path / "tokenizer.json"))

        unigram = load_tokenizer(str(tmp_path))
        assert unigram.eot == 1
        assert unigram.decode(unigram.encode("a</s> b")) == "a</s> b" and 1 not in unigram.encode(
            "</s>"
        )
        assert 0 in unigram.encode("z")
        assert [unigram.token_bytes(i) for i in (1, 2, 3, 9)] == [b"", b" ", b"a", b"\xf0"]

    def test_a_folders_own_end_token_and_settings(self, trained, tmp_path):
        file = tmp_path / "tokenizer.json"
        file.write_text(
            (Path(trained.source) / "tokenizer.json").read_text().replace("<|endoftext|>", "<stop>")
        )
        with pytest.raises(UserError, match="no end token"):
            load_tokenizer(str(file))
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps({"eos_token": {"content": "<stop>"}, "model_max_length": 77}))
        own = load_tokenizer(str(tmp_path))
        assert own.eot == 399 and own.decode([399]) == "<stop>" and own.sha256 != trained.sha256
        own.save(tmp_path / "copy")
        assert (
            json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())[
                "model_max_length"
            ]
            == 77
        )

    def test_an_end_token_marked_ordinary_is_not_found_in_text(self, trained, tmp_path):
        spec = json.loads((Path(trained.source) / "tokenizer.json").read_text())
        spec["added_tokens"][0]["special"] = False
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        assert 399 not in load_tokenizer(str(tmp_path)).encode("a<|endoftext|>b")

    @pytest.mark.parametrize("change", ["split", "merge order", "added token"])
    def test_tiktoken_is_not_used_if_ids_could_differ(self, trained, tmp_path, change):
        spec = json.loads((Path(trained.source) / "tokenizer.json").read_text())
        if change == "split":
            spec["pre_tokenizer"]["add_prefix_space"] = True
        elif change == "merge order":
            spec["model"]["merges"].reverse()
        else:
            spec["added_tokens"].append(
                spec["added_tokens"][0] | {"id": 400, "content": "fox", "special": False}
            )
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        other: Any = load_tokenizer(str(tmp_path))
        assert other._encoding is None and other.sha256 != trained.sha256
        assert other.encode_batch(SENTENCES) == hub_ids(tmp_path, SENTENCES)

    @pytest.mark.parametrize("content", ["{", "{}", "[]", "\x00"])
    def test_an_unreadable_file_is_refused(self, tmp_path, content):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json (is not|must hold)"):
            load_tokenizer(str(tmp_path))

    def test_a_missing_tokenizer_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no tokenizer at"):
            load_tokenizer(str(tmp_path))
        with pytest.raises(UserError, match="no tokenizer at"):
            load_tokenizer(str(tmp_path / "missing"))


def command(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    run = [sys.executable, str(ROOT / "tokenizer.py"), *words]
    return subprocess.run(run, input=stdin, capture_output=True, timeout=60)


class TestCommandLine:
    def test_train_encode_decode(self, tmp_path):
        text = "".join(SENTENCES * 20)
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n<|endoftext|>\n")
        (tmp_path / "b.txt").write_bytes(b"bad \xff\xfe bytes\n" + "\ufffd \n".encode())
        out = str(tmp_path / "made" / "here")
        train = command(
            "train", "--input", str(tmp_path / "*.txt"), "--vocab-size", "400", "--out", out
        )
        assert train.returncode == 0, train.stderr
        assert b"vocabulary 400" in train.stdout and b"replaced 2 bytes" in train.stdout
        assert sorted(path.name for path in Path(out).iterdir()) == sorted(FILES)
        pieces = {load_tokenizer(out).token_bytes(i) for i in range(400)}
        assert not any(b"<|" in piece for piece in pieces)  # the separator of documents is not text

        ids = command("encode", "--tokenizer", out, stdin=text.encode()).stdout
        assert [int(id) for id in ids.split()] == load_tokenizer(out).encode(text)
        assert command("decode", "--tokenizer", out, stdin=ids).stdout == text.encode()
        ids = command("encode", "--tokenizer", out, "the dog").stdout.split()
        assert (
            command("decode", "--tokenizer", out, *(id.decode() for id in ids)).stdout == b"the dog"
        )

    def test_encode_warns_about_bytes_that_are_not_utf8(self, trained):
        done = command("encode", "--tokenizer", trained.source, "caf\udce9")
        assert [int(id) for id in done.stdout.split()] == trained.encode("caf\ufffd")
        assert (
            done.stderr.decode()
            == "warning: TEXT holds bytes that are not UTF-8; each is read as U+FFFD\n"
        )

    @pytest.mark.parametrize(
        "words, says",
        [
            ("", "required"),
            ("tran", "train"),
            ("train --input nothing*.txt --vocab-size 300 --out OUT", "no such file"),
            ("train --input BARE --vocab-size 300 --out OUT", "folder without text"),
            ("train --input EMPTY --vocab-size 300 --out OUT", "no text"),
            ("train --input EMPTY --vocab-size 12 --out OUT", "257"),
            ("train --input EMPTY --vocab-size many --out OUT", "invalid int"),
            ("train --input EMPTY --vocab-size 2147483647 --out OUT", "at most"),
            (
                "train --input EMPTY --vocab-size 1%s --out OUT --model unigram" % ("0" * 400),
                "at most",
            ),
            ("train --input EMPTY --vocab-size 300 --out OUT --fast", "--fast"),
            ("train --input EMPTY --vocab-size 300 --out OUT --special <a> <b> <a>", "given twice"),
            ("train --input EMPTY --vocab-size 258 --out OUT --special <a> <b>", "259"),
            (
                "train --input EMPTY --vocab-size 300 --out OUT --model wordpiece",
                "sentencepiece-bpe",
            ),
            ("train --input '' --vocab-size 300 --out OUT", "--input: it is empty"),
            ("train --input TEXT '' --vocab-size 300 --out OUT", "--input: it is empty"),
            ("train --input TEXT --vocab-size 300 --out ''", "--out: it is empty"),
            ("train --input TEXT --vocab-size 300 --out TEXT", "a file; name a new folder"),
            ("train --input TEXT --vocab-size 300 --out TEXT/x", "a file; name a new folder"),
            ("train --input TEXT --vocab-size 300 --out FULL", "not empty; name a new folder"),
            ("encode --tokenizer '' hello", "--tokenizer: it is empty"),
            ("encode --tokenizer OUT hello", "no tokenizer at"),
            ("decode --tokenizer SMALL 3 five", "'five'"),
            ("decode --tokenizer SMALL 400", "outside the vocabulary"),
        ],
    )
    def test_mistakes_are_one_line(self, trained, tmp_path, run, words, says):
        (tmp_path / "empty.txt").touch()
        (tmp_path / "bare").mkdir()
        (tmp_path / "full").mkdir()
        text, kept = tmp_path / "text.txt", tmp_path / "full" / "kept"
        text.write_text("some text\n")
        kept.write_text("kept")
        places = {
            "''": "",
            "TEXT": text,
            "TEXT/x": text / "x",
            "FULL": kept.parent,
            "BARE": tmp_path / "bare",
            "OUT": tmp_path / "out",
            "EMPTY": tmp_path / "empty.txt",
            "SMALL": trained.source,
        }
        result = run(
            ROOT / "tokenizer.py", *(str(places.get(word, word)) for word in words.split())
        )
        message = result.stderr
        assert result.returncode == 2 and message.count("\n") == 1 and message.startswith("error: ")
        assert says in message
        assert not (tmp_path / "out").exists()
        assert (text.read_text(), kept.read_text()) == ("some text\n", "kept")
        if "name a new folder" in says:
            assert result.stdout == "", "it is told before the work"

    def test_importing_is_light(self):
        heavy = "{'torch', 'tiktoken', 'tokenizers', 'transformers', 'numpy'}"
        check = f"import sys, tokenizer; sys.exit(' '.join({heavy} & sys.modules.keys()))"
        result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True)
        assert result.stderr.split() == []
