"""A tokenizer's folder in any layout is opened as by transformers. Bad ones give short errors."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from launch import launch, log_of, small, write_inputs
from text.tokenizer import load_tokenizer
from text.tokenizer_files import END_TOKENS, NAMED
from text.tokenizer_training import train_bpe

TEXT = "The quick brown fox doesn't jump over the lazy dog; 12 34.\n"
TOKENS = ("<|endoftext|>", "<|end|>", "<x>", "fox", "[PAD]", "<새>")
PROBES = [
    "the fox <x>  fox<|end|> dogs",
    " <|endoftext|> [PAD]\nfoxes <새>.",
    *(f"a{t} {t}b  {t}  c" for t in TOKENS),
]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> dict[str, Any]:
    """tokenizer.json of a small tokenizer without any special token."""
    folder = tmp_path_factory.mktemp("tokenizers") / "base"
    train_bpe([TEXT] * 20, 300, folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    spec["model"]["vocab"].pop("<|endoftext|>", None)
    return spec


def write(folder: Path, files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def older(
    spec: dict[str, Any], tokens: tuple[str, ...] = (), first: bool = False
) -> dict[str, Any]:
    """vocab.json and merges.txt, with `tokens` after or before the vocabulary."""
    plain = list(spec["model"]["vocab"])
    names = [*tokens, *plain] if first else [*plain, *tokens]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in spec["model"]["merges"])
    return {"vocab.json": {token: id for id, token in enumerate(names)}, "merges.txt": merges}


flags = st.fixed_dictionaries(dict.fromkeys(FLAGS, st.booleans()))
token = st.sampled_from(TOKENS)


def written(content: str, form: str, own: dict[str, bool]) -> Any:
    """A token in the form of the hub's files."""
    kinds = {"text": content, "object": own | {"content": content}}
    return kinds.get(form, own | {"content": content, "__type": "AddedToken"})


def names(forms: tuple[str, ...], extra: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    one = st.builds(written, token, st.sampled_from(forms), flags)
    named = {key: st.none() | one if key == "pad_token" else one for key in NAMED[:5]}
    lists = {key: st.lists(token, max_size=2, unique=True) for key in extra}
    return st.fixed_dictionaries({}, optional=named | lists | {"image_token": token})


@st.composite
def folders(draw: st.DrawFn, spec: dict[str, Any]) -> dict[str, Any]:
    """The files of a folder that transformers can open."""
    inside = tuple(draw(st.lists(token, unique=True, max_size=3)))
    files = older(spec, inside, draw(st.booleans()))
    layout = draw(st.sampled_from(["older", "GPT2Tokenizer", "PreTrainedTokenizerFast"]))
    config: dict[str, Any] = draw(
        names(("text", "typed"), ("additional_special_tokens", "extra_special_tokens"))
    )
    config |= draw(
        st.fixed_dictionaries(
            {}, optional={"add_prefix_space": st.booleans(), "add_bos_token": st.booleans()}
        )
    )
    beyond = [t for t in TOKENS if t not in inside]
    added = draw(st.lists(st.sampled_from(beyond), unique=True, max_size=3)) if beyond else []
    start = len(files["vocab.json"])
    if layout != "older":
        whole = dict(spec, model=spec["model"] | {"vocab": files["vocab.json"]})
        listed = [t for t in TOKENS if t in added or (t in inside and draw(st.booleans()))]
        ids = files["vocab.json"] | {
            t: start + i for i, t in enumerate(t for t in listed if t in added)
        }
        entries = [
            draw(flags) | {"id": ids[t], "content": t} for t in sorted(listed, key=ids.__getitem__)
        ]
        files = {"tokenizer.json": whole | {"added_tokens": entries}}
        added = []
    if layout == "older" and draw(st.booleans()):
        files["config.json"] = {"model_type": "gpt2"}
    else:
        config["tokenizer_class"] = "GPT2Tokenizer" if layout == "older" else layout
    if draw(st.booleans()):
        files["special_tokens_map.json"] = draw(
            names(("text", "object"), ("additional_special_tokens",))
        )
    if added and draw(st.booleans()):
        files["added_tokens.json"] = {
            t: start + i for i, t in enumerate(draw(st.permutations(added)))
        }
    elif added and draw(st.booleans()):
        config["added_tokens_decoder"] = {
            str(start + i): draw(flags) | {"content": t} for i, t in enumerate(added)
        }
    return files | {"tokenizer_config.json": config}


def opened_by_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def held(files: dict[str, Any]) -> set[str]:
    """The tokens that a folder's files hold, without those that are only named."""
    whole, config = files.get("tokenizer.json"), files["tokenizer_config.json"]
    tokens = set(files["vocab.json"] if whole is None else whole["model"]["vocab"])
    tokens |= {entry["content"] for entry in config.get("added_tokens_decoder", {}).values()}
    if "added_tokens_decoder" not in config:
        tokens |= set(files.get("added_tokens.json", {}))
    return tokens | {entry["content"] for entry in (whole or {}).get("added_tokens", ())}


@given(data=st.data())
@settings(max_examples=int(os.environ.get("FOLDERS", 40)), deadline=None)
def test_any_folder_is_opened_as_by_transformers(spec, data):
    files = data.draw(folders(spec))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary) / "t", files)
        hub = opened_by_transformers(folder)
        sources = [files["tokenizer_config.json"]]
        if "added_tokens_decoder" not in sources[0]:
            sources.append(files.get("special_tokens_map.json", {}))
        if any(source.get("eos_token") for source in sources) and hub.eos_token not in held(files):
            with pytest.raises(
                UserError, match="as the end token, and the vocabulary has no such token"
            ):
                load_tokenizer(str(folder))
            return
        if hub.eos_token is None and not set(END_TOKENS) & hub.get_vocab().keys():
            with pytest.raises(UserError, match="no end token"):
                load_tokenizer(str(folder))
            return
        ours = load_tokenizer(str(folder))
        assert hub.eos_token is None or ours.eot == hub.eos_token_id
        same(ours, hub)
        ours.save(Path(temporary) / "saved")
        again, of_saved = (
            load_tokenizer(str(Path(temporary) / "saved")),
            opened_by_transformers(Path(temporary) / "saved"),
        )
        assert again.sha256 == ours.sha256 and of_saved.eos_token_id == ours.eot
        same(again, of_saved)


def same(ours: Any, hub: Any) -> None:
    assert ours.vocab_size == len(hub)
    special = {id for id, token in hub.added_tokens_decoder.items() if token.special} | {ours.eot}
    assert set(ours.special_ids.values()) == special
    for text in PROBES:
        ids = hub(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        # an end token that its file marks as ordinary text: here it is never found in a text
        if ours.eot in ids:
            continue
        assert ours.encode(text) == ids and ours.encode_batch([text])[0] == ids
        assert ours.decode(ids) == hub.decode(ids)
    every = list(range(ours.vocab_size))
    assert ours.decode(every) == hub.decode(every)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_added_tokens_of_a_sentencepiece_folder(tmp_path, kind):
    from text.tokenizer_training import train_sentencepiece

    train_sentencepiece([TEXT] * 20, 308, tmp_path / "t", kind)
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    named = {
        "eos_token": {"content": "<|end|>", "lstrip": True},
        "additional_special_tokens": ["<x>"],
    }
    write(
        tmp_path / "t",
        {"added_tokens.json": {"<|end|>": 308, "<새>": 309}, "special_tokens_map.json": named},
    )
    write(
        tmp_path / "t",
        {"tokenizer_config.json": {key: v for key, v in config.items() if key != "eos_token"}},
    )
    ours, hub = load_tokenizer(str(tmp_path / "t")), opened_by_transformers(tmp_path / "t")
    assert (ours.eot, ours.vocab_size) == (hub.eos_token_id, len(hub)) == (308, 311)
    for text in PROBES[:2]:
        ids = hub(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        # The library's unigram model recognizes special tokens in a text. Here they are text.
        assert ours.encode(text) == ids or not set(ids).isdisjoint(ours.special_ids.values())
        assert ours.decode(ours.encode(text)) == hub.decode(ours.encode(text))


def test_an_older_folder_keeps_its_end_token(spec, tmp_path):
    files = older(spec) | {
        "added_tokens.json": {"<|end|>": 296},
        "special_tokens_map.json": {"eos_token": "<|end|>"},
    }
    ours = load_tokenizer(str(write(tmp_path, files)))
    # transformers appends the unknown and the first token, which no file names, after all others.
    assert (ours.eot, ours.vocab_size, ours.rows) == (296, 298, 297)
    assert ours.with_special(["<answer>"]).special_id("<answer>") == 298


def test_one_id_for_two_tokens_is_refused(spec, tmp_path):
    files = older(spec, ("<|endoftext|>",))
    # it leaves a gap and takes the id of the next added token
    files["vocab.json"]["Ġdoesn"] = len(files["vocab.json"])
    files |= {"added_tokens.json": {"<x>": 5}}
    with pytest.raises(
        UserError, match="'<x>' and 'Ġdoesn' both have the id 297; give each its own"
    ):
        load_tokenizer(str(write(tmp_path, files)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", ["older", "tokenizer.json"])
def test_json_in_any_unicode_encoding_is_read(spec, tmp_path, encoding, layout):
    files = older(spec, ("<|endoftext|>",)) | {"tokenizer_config.json": {"eos_token": "<새>"}}
    files |= {"added_tokens.json": {"<새>": 297}}
    if layout == "tokenizer.json":
        files = {
            "tokenizer.json": spec,
            "tokenizer_config.json": {"eos_token": "<새>"},
            "added_tokens.json": {"<새>": 297},
        }
    plain = load_tokenizer(str(write(tmp_path / "plain", files)))
    other = write(tmp_path / "other", files)
    for name in files:
        if name.endswith(".json"):
            (other / name).write_text(
                json.dumps(files[name], ensure_ascii=False), encoding=encoding
            )
    assert load_tokenizer(str(other)).sha256 == plain.sha256


BAD = {
    "latin-1": b'{"a": "\xe9"}',
    "cut off": b'{"eos_token": "<',
    "a list": b"[1]",
    "a number": b"5",
    "empty": b"",
    "zeros": bytes(40),
    "deep": b'{"a":' * 100_000,
}
JSON_FILES = (
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_file_is_named_in_one_line(spec, tmp_path, name, bad):
    (write(tmp_path, older(spec, ("<|endoftext|>",))) / name).write_bytes(BAD[bad])
    refused(tmp_path, name)


def refused(folder: Path, *says: str) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(str(folder))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in says), message


WRONG = [
    ("tokenizer_config.json", {"eos_token": 5}, "eos_token"),
    ("tokenizer_config.json", {"eos_token": ["<|endoftext|>"]}, "eos_token"),
    ("tokenizer_config.json", {"eos_token": {"content": None}}, "eos_token"),
    (
        "tokenizer_config.json",
        {"pad_token": {"content": "[PAD]", "lstrip": "no"}},
        "pad_token.lstrip",
    ),
    ("tokenizer_config.json", {"additional_special_tokens": "<x>"}, "additional_special_tokens"),
    ("tokenizer_config.json", {"additional_special_tokens": [3]}, "additional_special_tokens"),
    ("tokenizer_config.json", {"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"one": {"content": "<x>"}}}, "one"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"300": "<x>"}}, "300"),
    ("tokenizer_config.json", {"add_prefix_space": "false"}, "add_prefix_space"),
    ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class"),
    ("tokenizer_config.json", {"eos_token": "<\ud800>"}, "end token"),
    ("tokenizer_config.json", {"pad_token": "<\ud800>"}, "not valid text"),
    ("special_tokens_map.json", {"eos_token": "<nowhere>"}, "'<nowhere>'"),
    ("added_tokens.json", {"<x>": None}, "<x>"),
    ("added_tokens.json", {"<x>": -1}, "<x>"),
    ("added_tokens.json", {"<x>": 300.5}, "<x>"),
    ("config.json", {"tokenizer_class": []}, "tokenizer_class"),
    ("vocab.json", {"a": "first"}, "vocab.json"),
    ("vocab.json", {"a": 1 << 40}, "vocab.json"),
    ("vocab.json", {}, "vocabulary"),
    ("merges.txt", "a b c\n", "merges.txt, line 1"),
    ("merges.txt", "#version: 0.2\nnothere toobad\n", "not a tokenizer"),
    ("tokenizer.json", {"added_tokens": 5}, "added_tokens"),
    ("tokenizer.json", {"added_tokens": [5]}, "added_tokens"),
    ("tokenizer.json", {"added_tokens": [{"content": "<x>"}]}, "id"),
    ("tokenizer.json", {"model": 5}, "not a tokenizer"),
    ("tokenizer.json", {"model": {"vocab": [1]}}, "not a tokenizer"),
    ("tokenizer.json", {"model": {"vocab": {"a": 1}, "merges": [5]}}, "not a tokenizer"),
    ("tokenizer.json", {"decoder": {"type": "ByteLevel"}, "model": {"vocab": [1]}}, "model.vocab"),
]


@pytest.mark.parametrize(("name", "content", "says"), WRONG)
def test_a_value_of_the_wrong_kind_is_named(spec, tmp_path, name, content, says):
    files = older(spec, ("<|endoftext|>",)) | {"config.json": {"model_type": "gpt2"}}
    refused(write(tmp_path, files | {name: content}), says)


# --- BPE dropout


@pytest.fixture
def dropping(spec, tmp_path) -> Path:
    files = older(spec, ("<|endoftext|>",))
    whole = spec | {"model": spec["model"] | {"vocab": files["vocab.json"], "dropout": 0.5}}
    return write(tmp_path / "dropping", {"tokenizer.json": whole})


def test_bpe_dropout_is_left_out(spec, dropping, tmp_path):
    plain = load_tokenizer(str(write(tmp_path / "plain", older(spec, ("<|endoftext|>",)))))
    ours, text = load_tokenizer(str(dropping)), TEXT * 20
    extended = ours.with_special(["<answer>"])
    restored = pickle.loads(pickle.dumps(extended))
    for one in (ours, extended, restored):
        assert one.encode(text) == one.encode_batch([text, text])[1] == plain.encode(text)
    assert ours.sha256 == plain.sha256


def test_saved_tokenizers_have_no_bpe_dropout(dropping, tmp_path):
    """A model that was trained without dropout must get ids without dropout everywhere."""
    ours = load_tokenizer(str(dropping))
    ours.save(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["model"]["dropout"] is None
    )
    assert opened_by_transformers(tmp_path / "saved")(TEXT)["input_ids"] == ours.encode(TEXT)


def test_bpe_dropout_is_warned_about_once(dropping, repo):
    script = (
        "import pickle, sys; from text.tokenizer import load_tokenizer\n"
        "t = [load_tokenizer(sys.argv[1]) for _ in range(3)][0]; pickle.loads(pickle.dumps(t))"
    )
    for rank, times in (("0", 1), ("1", 0)):
        env = {**os.environ, "RANK": rank}
        result = subprocess.run(
            [sys.executable, "-c", script, dropping],
            cwd=repo,
            env=env,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0 and result.stderr.count("BPE dropout 0.5") == times, (
            result.stderr
        )


def test_a_run_logs_that_bpe_dropout_is_left_out(dropping, tmp_path):
    write_inputs(tmp_path)
    words = small("--steps 1 --eval-every 0 --sample-every 0 --save-every 0 --tokenizer", dropping)
    (end,) = launch(tmp_path, words)
    assert (
        end.code == 0 and end.err.count("BPE dropout 0.5") == 1 and "BPE dropout" not in end.out
    ), end
    (record,) = [
        line for line in log_of(tmp_path / "run", "warning") if "BPE dropout" in line["text"]
    ]
    assert f"warning: {record['text']}\n" in end.err


def test_a_worker_does_not_warn_about_bpe_dropout(dropping, repo):
    script = "import sys; from text.tokenizer import _restore; _restore(sys.argv[1], None, ())"
    result = subprocess.run(
        [sys.executable, "-c", script, dropping], cwd=repo, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
