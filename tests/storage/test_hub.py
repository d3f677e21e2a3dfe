"""The hub's real clients against a hub on loopback: downloads, streamed data, faults, uploads."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub
from launch import Ended, Launch, small, write_inputs

FULL = "org/tiny"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model in run/final, its inputs, and data/, a data set of three
    parquet files."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("hub")
    write_inputs(folder)
    done = ask(folder, {}, "train_gpt2", *small("--steps 1 --out run"))
    assert done.code == 0, done.err
    lines = (folder / "text.txt").read_text().splitlines()
    (folder / "data" / "sample").mkdir(parents=True)
    for i in range(3):
        table = pyarrow.table({"text": lines[20 * i : 20 * i + 20]})
        parquet.write_table(table, folder / "data" / "sample" / f"{i:03}_00000.parquet")
    (folder / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample\n  data_files: sample/*\n---\n"
    )
    return folder


@pytest.fixture
def hub(world: Path) -> Iterator[Hub]:
    with Hub({FULL: world / "run" / "final"}, {"org/web": world / "data"}) as hub:
        yield hub


def ask(folder: Path, env: dict[str, str], program: str, *words: Any) -> Ended:
    """How a program of the project ended that ran in `folder`."""
    return start(folder, env, program, *words).end()


def start(folder: Path, env: dict[str, str], program: str, *words: Any) -> Launch:
    return Launch(folder, [str(word) for word in words], env, None, f"{program}-out", program)


def write(folder: Path, env: dict[str, str], model: str = FULL) -> tuple[int | None, str]:
    """The exit code and the output of generate.py."""
    options = ("--decode", "greedy", "--max-new-tokens", 8, "--device", "cpu")
    done = ask(folder, env, "generate", model, "the man", *options)
    return done.code, done.out


def test_a_model_is_downloaded_once(hub, world, tmp_path):
    """Through redirects to another host, which never sees the token. A download that breaks off is
    continued, and without a network the cache serves."""
    model = Path(shutil.copytree(world / "run" / "final", tmp_path / "model"))
    (model / "notes.json").write_text("{}" + " " * (24 << 20))  # the client writes 10 MiB at once
    hub.repositories["models"][FULL] = model
    hub.token, hub.drop_after = "secret", {"notes.json": 22 << 20, "model.safetensors": 1000}
    env = hub.environment(tmp_path)
    plain = write(world, {}, "run/final")
    assert write(tmp_path, env) == plain and plain[0] == 0
    content = [headers for _, path, headers in hub.requests if path.startswith("/cdn/")]
    assert content and not any("Authorization" in headers for headers in content)
    assert any(headers.get("Range") == f"bytes={20 << 20}-" for headers in content)
    assert not hub.drop_after
    asked = len(hub.requests)
    assert write(tmp_path, {**env, "HF_HUB_OFFLINE": "1"}) == plain
    assert len(hub.requests) == asked


def test_a_refused_download_is_one_line(hub, run, tmp_path):
    """One program asks for a model that is not there, and for models whose download is refused."""
    hub.fault = lambda method, path: next(
        (status for status in (401, 403, 404, 429, 500) if f"/refused-{status}" in path), None
    )
    names = ["org/typo", *(f"org/refused-{status}" for status in (401, 403, 404, 429, 500))]
    (tmp_path / "asking.py").write_text(
        "from base.cli import entry_point\nfrom storage.checkpoint import locate\n"
        f"for name in {names}:\n"
        "    try:\n        entry_point(lambda: locate(name))\n"
        "    except SystemExit as end:\n        print(end.code)\n"
    )
    done = run("asking.py", env=hub.environment(tmp_path))
    assert done.stdout.split() == ["2"] * 6, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 6
    for name, line in zip(names, lines, strict=True):
        assert line.startswith("error: ") and name in line and "check the name" in line


def test_streamed_data_resumes_after_a_kill(hub, world, tmp_path):
    """fineweb_prep reads parquet files from the hub. It is killed while the third one loads."""

    def prepare(out: str) -> Launch:
        options = ("--tokenizer", world / "tokenizer", "--shard-tokens", 400, "--workers", 1)
        source = ("--dataset", "org/web", "--name", "sample", "--out", out)
        env = hub.environment(tmp_path / "home")
        return start(tmp_path, env, "fineweb_prep", *source, *options)

    whole = prepare("whole").end()
    assert whole.code == 0, whole.err
    reached, release = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if path.startswith("/cdn/") and "002_" in path:
            reached.set()
            release.wait(100)

    hub.fault = hold
    killed = prepare("killed")
    assert reached.wait(100)
    os.kill(killed.pid, signal.SIGKILL)
    killed.end()
    release.set()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = prepare("killed").end()
    assert again.code == 0, again.err
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


def shards(folder: Path) -> dict[str, bytes]:
    """The shards of a folder by name; at least two."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.bin")}
    assert len(found) >= 2
    return found


def test_data_that_is_not_there_is_one_line(hub, world, tmp_path):
    words = ("--dataset", "org/typo", "--tokenizer", world / "tokenizer", "--out", "out")
    done = ask(tmp_path, hub.environment(tmp_path / "h"), "fineweb_prep", *words)
    (line,) = done.err.splitlines()
    assert done.code == 2 and "org/typo" in line


def test_a_model_is_uploaded_and_comes_back(hub, world, tmp_path):
    """What was uploaded writes the same text when it is downloaded."""
    pytest.importorskip("gguf", reason="needs the gguf package")
    hub.token = "secret"
    env = hub.environment(tmp_path / "home")
    words = ("run/final", "--to", "gguf", "--out", tmp_path / "m.gguf", "--push", "me/new")
    pushed = ask(world, env, "tools.export", *words)
    assert pushed.code == 0 and "/me/new/commit/" in pushed.out, pushed.err
    assert "m.gguf" in hub.uploaded and b"read back" in hub.uploaded["README.md"]
    (tmp_path / "copy").mkdir()
    for name, content in hub.uploaded.items():
        (tmp_path / "copy" / name).write_bytes(content)
    hub.repositories["models"]["me/new"] = tmp_path / "copy"
    assert write(tmp_path, env, "me/new") == write(world, {}, "run/final")


def test_a_refused_upload_is_one_line(hub, world, tmp_path):
    hub.token = "secret"
    env = {**hub.environment(tmp_path), "HF_TOKEN": "wrong"}
    pushed = ask(world, env, "tools.export", "run/final", "--push", "me/new")
    (line,) = pushed.err.splitlines()
    assert pushed.code == 2 and "--push me/new" in line and not hub.uploaded
