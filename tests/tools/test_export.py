"""tools.export: the files are read back by the formats' own libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from config import UserError
from launch import small, write_inputs
from model import GPT
from storage.foreign import read_object
from text.tokenizer import load_tokenizer
from tools.export import ExportConfig, check_gguf, check_plain, gguf_tensors, unlike_gpt2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    from launch import launch

    folder = tmp_path_factory.mktemp("export")
    write_inputs(folder)
    (ended,) = launch(folder, small("--steps 1 --out run"))
    assert ended.code == 0, ended.err
    return folder


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_a_gguf_file_has_the_tensors_and_the_tokenizer(run, repo, trained, dtype):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    words = ("--to", "gguf", "--dtype", dtype, "--out", f"{dtype}.gguf")
    done = run("-m", "tools.export", trained / "run", *words, cwd=trained)
    assert done.returncode == 0, done.stderr
    assert "tensors read back" in done.stdout and not done.stderr
    assert "% of 32 positions" in (trained / f"{dtype}.gguf.md").read_text()
    reader = gguf.GGUFReader(trained / f"{dtype}.gguf")
    tokens = [str(bytes(reader.fields["tokenizer.ggml.tokens"].parts[i]), "utf-8")
              for i in reader.fields["tokenizer.ggml.tokens"].data]  # fmt: skip
    tokenizer = load_tokenizer(str(trained / "run" / "final"))
    vocabulary = read_object(trained / "run" / "final" / "tokenizer.json").values["model"]["vocab"]
    assert all(tokens[id] == text for text, id in vocabulary.items())
    assert tokens[tokenizer.eot] == "<|endoftext|>"
    model = GPT.from_pretrained(trained / "run" / "final")
    assert len(tokens) == model.config.vocab_size
    if dtype == "f32":
        ours = dict(gguf_tensors(model))
        for tensor in reader.tensors:
            assert np.array_equal(tensor.data.reshape(-1), ours[tensor.name].numpy().reshape(-1))


def test_a_damaged_gguf_file_is_found(trained):
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    from tools import export

    model = GPT.from_pretrained(trained / "run" / "final")
    file, cfg = trained / "damaged.gguf", ExportConfig(dtype="f32")
    export.write_gguf(model, str(trained / "run" / "final"), file, cfg)
    offset = next(t.data_offset for t in gguf.GGUFReader(file).tensors if "ffn_up" in t.name)
    content = bytearray(file.read_bytes())
    content[offset : offset + 4] = np.float32(9).tobytes()
    file.write_bytes(content)
    with pytest.raises(UserError, match="ffn_up"):
        check_gguf(model, file)


def test_an_onnx_file_runs_at_any_batch_and_length(run, trained):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"needs the {package} package")
    runtime = pytest.importorskip("onnxruntime", reason="needs the onnxruntime package")
    words = ("--to", "onnx", "--out", "model.onnx")
    done = run("-m", "tools.export", trained / "run", *words, cwd=trained)
    assert done.returncode == 0, done.stderr
    model = GPT.from_pretrained(trained / "run" / "final").eval()
    session = runtime.InferenceSession(str(trained / "model.onnx"))
    for shape in ((1, 3), (4, model.context)):
        ids = torch.randint(model.config.vocab_size, shape)
        (logits,) = session.run(None, {"input_ids": ids.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(ids).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run",), "nothing to do"),
        (("nowhere/at/all", "--to", "gguf"), "nowhere/at/all"),
        (("run", "--to", "gguf", "--out", "no/folder/x.gguf"), "no folder"),
        (("run", "--to", "gguf", "--dtype", "q4_0"), "q4_0"),
    ],
)
def test_a_mistake_is_one_line(run, trained, words, told):
    done = run("-m", "tools.export", *words, cwd=trained)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and told in line


def test_a_prefix_is_refused(trained):
    model = GPT.from_pretrained(trained / "run" / "final")
    check_plain(model, "run")
    model.prefix = torch.nn.Identity()
    with pytest.raises(UserError, match="export its base model"):
        check_plain(model, "run")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"model": {"type": "Unigram", "vocab": []}},
    ],
)
def test_a_tokenizer_that_gguf_cannot_hold_is_named(trained, change):
    whole = read_object(trained / "run" / "final" / "tokenizer.json")
    assert unlike_gpt2(whole) is None
    whole.values.update(change)
    assert unlike_gpt2(whole)
