"""The hub's real clients against a hub on loopback: downloads, streamed data, faults, uploads."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import Hub
from launch import small, write_inputs
from support import ONE_THREAD, python_path

FULL = "org/tiny"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Path:
    """A folder with a trained model in run/final, its inputs, and data/, a data set of three
    parquet files."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("hub")
    write_inputs(folder)
    done = start(repo, folder, {}, "train_gpt2.py", *small("--steps", 1, "--out", "run"))
    assert done.wait() == 0, done.communicate()[1]
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


def start(repo: Path, folder: Path, env: dict[str, str], script: str, *words: Any) -> Any:
    """Start a script of the repository in `folder`."""
    command = [sys.executable, repo / script, *map(str, words)]
    env = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path(repo), **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def write(repo: Path, folder: Path, env: dict[str, str], model: str = FULL) -> tuple[int, str, str]:
    """The exit code, output and errors of generate.py."""
    options = ("--decode", "greedy", "--max-new-tokens", 8, "--device", "cpu")
    process = start(repo, folder, env, "generate.py", model, "the man", *options)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_a_model_is_downloaded_once(hub, world, repo, tmp_path):
    """Through redirects to another host, which never sees the token. A download that breaks off is
    continued, and without a network the cache serves."""
    model = Path(shutil.copytree(world / "run" / "final", tmp_path / "model"))
    (model / "notes.json").write_text("{}" + " " * (24 << 20))  # the client writes 10 MiB at once
    hub.repositories["models"][FULL] = model
    hub.token, hub.drop_after = "secret", {"notes.json": 22 << 20, "model.safetensors": 1000}
    env = hub.environment(tmp_path)
    plain = write(repo, world, {}, "run/final")
    assert write(repo, tmp_path, env)[:2] == plain[:2] and plain[0] == 0
    content = [headers for _, path, headers in hub.requests if path.startswith("/cdn/")]
    assert content and not any("Authorization" in headers for headers in content)
    assert any(headers.get("Range") == f"bytes={20 << 20}-" for headers in content)
    assert not hub.drop_after
    asked = len(hub.requests)
    assert write(repo, tmp_path, {**env, "HF_HUB_OFFLINE": "1"})[:2] == plain[:2]
    assert len(hub.requests) == asked


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_a_refused_download_is_one_line(hub, repo, tmp_path, status):
    hub.fault = lambda method, path: status
    code, out, err = write(repo, tmp_path, hub.environment(tmp_path / "home"))
    (line,) = err.splitlines()
    assert (code, out) == (2, "") and line.startswith("error: ") and FULL in line


def test_a_model_that_is_not_there_is_one_line(hub, repo, tmp_path):
    code, _, err = write(repo, tmp_path, hub.environment(tmp_path / "home"), "org/typo")
    (line,) = err.splitlines()
    assert code == 2 and "org/typo" in line and "check the name" in line


def test_streamed_data_resumes_after_a_kill(hub, world, repo, tmp_path):
    """fineweb_prep reads parquet files from the hub. It is killed while the third one loads."""

    def prepare(out: str, **how: Any) -> Any:
        options = ("--tokenizer", world / "tokenizer", "--shard-tokens", 400, "--workers", 1)
        source = ("--dataset", "org/web", "--name", "sample", "--out", out)
        env = hub.environment(tmp_path / "home")
        return start(repo, tmp_path, env, "fineweb_prep.py", *source, *options)

    whole = prepare("whole")
    assert whole.wait(200) == 0, whole.communicate()[1]
    reached, release = threading.Event(), threading.Event()

    def hold(method: str, path: str) -> None:
        if path.startswith("/cdn/") and "002_" in path:
            reached.set()
            release.wait(100)

    hub.fault = hold
    killed = prepare("killed")
    assert reached.wait(100)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    release.set()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    again = prepare("killed")
    assert again.wait(200) == 0, again.communicate()[1]
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")


def shards(folder: Path) -> dict[str, bytes]:
    """The shards of a folder by name; at least two."""
    found = {file.name: file.read_bytes() for file in folder.glob("*.bin")}
    assert len(found) >= 2
    return found


def test_data_that_is_not_there_is_one_line(hub, world, repo, tmp_path):
    words = ("--dataset", "org/typo", "--tokenizer", world / "tokenizer", "--out", "out")
    process = start(repo, tmp_path, hub.environment(tmp_path / "h"), "fineweb_prep.py", *words)
    _, err = process.communicate(timeout=200)
    (line,) = err.splitlines()
    assert process.returncode == 2 and "org/typo" in line


def test_a_model_is_uploaded_and_comes_back(hub, world, repo, tmp_path):
    """What was uploaded writes the same text when it is downloaded."""
    pytest.importorskip("gguf", reason="needs the gguf package")
    hub.token = "secret"
    env = hub.environment(tmp_path / "home")
    words = ("run/final", "--to", "gguf", "--out", tmp_path / "m.gguf", "--push", "me/new")
    pushed = start(repo, world, env, "tools/export.py", *words)
    out, err = pushed.communicate(timeout=200)
    assert pushed.returncode == 0 and "/me/new/commit/" in out, err
    assert "m.gguf" in hub.uploaded and b"read back" in hub.uploaded["README.md"]
    (tmp_path / "copy").mkdir()
    for name, content in hub.uploaded.items():
        (tmp_path / "copy" / name).write_bytes(content)
    hub.repositories["models"]["me/new"] = tmp_path / "copy"
    assert write(repo, tmp_path, env, "me/new")[:2] == write(repo, world, {}, "run/final")[:2]


def test_a_refused_upload_is_one_line(hub, world, repo, tmp_path):
    hub.token = "secret"
    env = {**hub.environment(tmp_path), "HF_TOKEN": "wrong"}
    pushed = start(repo, world, env, "tools/export.py", "run/final", "--push", "me/new")
    _, err = pushed.communicate(timeout=200)
    (line,) = err.splitlines()
    assert pushed.returncode == 2 and "--push me/new" in line and not hub.uploaded
