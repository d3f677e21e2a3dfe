"""Tokenizes FineWeb or any other text into token shards. The first one is for validation.

    python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb
    python fineweb_prep.py --input "texts/*.parquet" --out data/mine
    python fineweb_prep.py --dataset kjj0/fineweb10B-gpt2 --pretokenized --max-shards 9 \
        --out data/fineweb

After a kill, the same command continues after the last complete shard. The shards have the same
bytes as those of an uninterrupted run, with any number of workers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from base.cli import entry_point, parse
from base.console import outlive
from base.files import sha256, write_json
from base.locks import locked
from base.machine import cores
from config import Count, PathOrName, PathsOrNames, SmallCount, Tokens, UserError
from engine import data
from storage import cache, shards
from storage.foreign import read_value
from storage.shards import token_dtype
from text import corpus, tokenizing
from text.files import find_files, is_hidden
from text.tokenizer import Tokenizer, load_tokenizer

TEXT_PER_TOKEN = 4.0  # bytes of English text per GPT-2 token, rounded down
STATES = ("manifest.json", "progress.json")  # of a finished folder, and of an unfinished one
# Settings that both files have in every version of this program.
OWN_SETTINGS = {"text_column", "tokenizer", "shard_tokens", "pretokenized"}
PACKED = 2  # text bytes per byte of a parquet or gzip file, whose other columns count too


@dataclass(frozen=True)
class PrepConfig:
    """What to tokenize, and where the shards go."""

    out: PathOrName | None = None
    """Folder of the shards."""
    dataset: str | None = None
    """Hub id of a dataset to stream: HuggingFaceFW/fineweb-edu."""
    name: str | None = None
    """The dataset's configuration: sample-10BT."""
    split: str = "train"
    """The dataset's split."""
    input: PathsOrNames | None = None
    """Local text instead of a dataset: files, folders or globs, separated by commas."""
    text_column: str = "text"
    """Column that holds the text."""
    tokenizer: PathOrName = "gpt2"
    """gpt2, a folder, or a tokenizer.json."""
    shard_tokens: Tokens = 100_000_000
    """Tokens in a shard."""
    max_tokens: Tokens | None = None
    """Stop after this many tokens. Default: tokenize all text."""
    workers: SmallCount | None = None
    """Tokenizing processes. Default: one per core."""
    pretokenized: bool = False
    """The dataset is a repository of ready .bin shards: download them."""
    max_shards: Count | None = None
    """Number of training shards to download with --pretokenized. Default: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Raises UserError for bad options, bad input, a folder made with other settings, or too little
    disk space.
    """
    cfg = parse(PrepConfig, sys.argv[1:] if argv is None else argv)
    outlive()
    out = _check(cfg)
    _check_out(cfg, out)
    with cache.writing_tokens("--out", out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "prep.lock").touch()
    with locked(out / "prep.lock", lambda: _say(f"waiting for another process that writes {out}")):
        if cfg.pretokenized:
            _fetch(cfg, out)
        else:
            _prepare(cfg, out)
    return 0


def _check(cfg: PrepConfig) -> Path:
    if cfg.out is None:
        raise UserError(
            "--out is missing: name the folder of the shards, for example --out data/fineweb"
        )
    if (cfg.dataset is None) == (cfg.input is None):
        raise UserError("give either --dataset HUB_ID (HuggingFaceFW/fineweb-edu) or --input FILES")
    if cfg.pretokenized and cfg.dataset is None:
        raise UserError("--pretokenized needs --dataset HUB_ID (kjj0/fineweb10B-gpt2)")
    return Path(cfg.out)


def _check_out(cfg: PrepConfig, out: Path) -> None:
    """Raises UserError if this program would overwrite files of other programs in the folder."""
    is_ours = any(_state(out / name) for name in STATES)
    if not is_ours and any(not is_hidden(file.name) for file in out.glob("*.bin")):
        raise UserError(f"{out} holds shards that this program did not make; give another --out")
    saved, given = (out / "tokenizer").resolve(), Path(cfg.tokenizer).resolve()
    if (
        not is_ours
        and cfg.tokenizer != "gpt2"
        and saved.exists()
        and saved not in (given, given.parent)
    ):
        raise UserError(
            f"{out / 'tokenizer'} would be replaced by --tokenizer {cfg.tokenizer}; give another "
            "--out"
        )


def _state(file: Path) -> dict[str, Any]:
    """The content of one of the STATES; empty if there is no such file.

    Raises UserError for a file that another program wrote.
    """
    if not os.path.lexists(file):
        return {}
    value = read_value(file)
    state = value if isinstance(value, dict) else {}
    settings, shards = state.get("settings"), state.get("shards", [])
    entries = isinstance(shards, list) and all(
        isinstance(shard, dict)
        and isinstance(shard.get("name"), str)
        and isinstance(shard.get("tokens"), int)
        for shard in shards
    )
    if not isinstance(settings, dict) or OWN_SETTINGS - settings.keys() or not entries:
        raise UserError(f"{file} was not written by this program; give another --out")
    return state


def _say(line: str) -> None:
    print(line, flush=True)


# ---- tokenizing


def _prepare(cfg: PrepConfig, out: Path) -> None:
    files = find_files(cfg.input) if cfg.input else []
    tokenizer = load_tokenizer(cfg.tokenizer, 1)
    settings = _settings(cfg, tokenizer, files)
    if _is_finished(out, settings):
        return
    run = _Run(out, settings)
    source = _source(cfg, files, run)
    _check_disk(cfg, out, tokenizer, files, run)
    if run.shards:
        _say(f"continuing after {run.shards[-1]['name']}: {run.tokens:,} tokens are done")
    workers = cfg.workers or cores()
    _say(
        f"tokenizing {cfg.input or cfg.dataset} with {tokenizer.name}, {workers} workers, to {out}"
    )
    run.save(run.skip)  # progress.json marks the folder as unfinished, and as this program's
    _tokenize(cfg, out, source, tokenizer, run, workers)
    if len(run.shards) < 2:
        run.remove()
        raise UserError(
            f"{cfg.input or cfg.dataset} holds {run.tokens:,} tokens, so the validation shard "
            "leaves none for training; "
            f"type --shard-tokens {max(1, run.tokens // 10)}, or give more text"
        )
    shards.write_manifest(out, tokenizer, run.shards, settings=settings)
    (out / "progress.json").unlink(missing_ok=True)
    _say(f"done: {len(run.shards)} shards, {run.tokens:,} tokens in {out}")


def _settings(cfg: PrepConfig, tokenizer: Tokenizer, files: list[Path]) -> dict[str, Any]:
    """All settings that decide the bytes of the shards.

    Files are identified by name, size and a few blocks, because hashing terabytes would double the
    work.
    """
    names = [[path.name, path.stat().st_size] for path in files]
    return {
        "dataset": cfg.dataset,
        "name": cfg.name,
        "split": cfg.split,
        "input": hashlib.sha256(json.dumps(names).encode()).hexdigest() if files else None,
        "input_blocks": hashlib.sha256(
            "".join(cache.stamp(path)[-1] for path in files).encode()
        ).hexdigest()
        if files
        else None,
        "text_column": cfg.text_column,
        "tokenizer": tokenizer.sha256,
        "shard_tokens": cfg.shard_tokens,
        "max_tokens": cfg.max_tokens,
        "pretokenized": cfg.pretokenized,
        "max_shards": cfg.max_shards,
    }


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is complete. Raises UserError if it was made or begun with other settings."""
    finished = (out / "manifest.json").exists()
    for saved in (_state(out / name) for name in STATES):
        made_with = saved.get("settings", {})
        for name, value in settings.items() if saved.get("shards") else ():
            if name in made_with and made_with[name] != value:  # older versions saved fewer names
                option, before, now = (
                    "--" + name.replace("_", "-"),
                    str(made_with.get(name))[:40],
                    str(value)[:40],
                )
                raise UserError(
                    f"{out} was made with another {option} ({before}, now {now}); give another "
                    "--out"
                )
    if finished:
        (out / "progress.json").unlink(missing_ok=True)
        _say(f"{out} is already finished: nothing to do")
    return finished


class _Run:
    """The content of progress.json: the finished shards, and where in the input the next begins."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, settings
        self.file = out / "progress.json"
        saved = _state(self.file)
        self.shards: list[dict[str, Any]] = saved.get("shards", [])
        saved = saved if self.shards else {}
        # state of the source before the chunk in which the next shard begins
        self.state: Any = saved.get("state")
        self.skip: int = saved.get("skip", 0)  # tokens of that chunk that are on disk already
        self.revision: str | None = saved.get("revision")  # commit of the dataset on the hub

    @property
    def tokens(self) -> int:
        """Number of tokens in the finished shards."""
        return sum(shard["tokens"] for shard in self.shards)

    def begin(self, state: Any, skip: int) -> None:
        """Note that the writer gets the tokens of the chunk at `state` next, from `skip` on."""
        self.state, self.skip = state, skip

    def finished(self, shard: dict[str, Any], consumed: int) -> None:
        """Record a finished shard. consumed: tokens of the current part that are on disk."""
        self.shards.append(shard)
        self.save(self.skip + consumed)

    def save(self, skip: int) -> None:
        """Write progress.json. skip: tokens of the current chunk that are on disk."""
        saved = dict(settings=self.settings, shards=self.shards, revision=self.revision)
        write_json(self.file, saved | dict(state=self.state, skip=skip))

    def remove(self) -> None:
        """Delete the shards and progress.json."""
        for shard in self.shards:
            (self.out / shard["name"]).unlink()
        self.file.unlink(missing_ok=True)


def _source(cfg: PrepConfig, files: list[Path], run: _Run) -> corpus.Source:
    if cfg.dataset is None:
        return corpus.TextFiles(files, cfg.text_column, _say)
    source = corpus.HubDataset(
        cfg.dataset, cfg.name, cfg.split, cfg.text_column, run.revision, _say
    )
    run.revision = source.revision
    return source


def _shard_name(number: int) -> str:
    return f"fineweb_{'train' if number else 'val'}_{number:06d}.bin"


def _tokenize(
    cfg: PrepConfig, out: Path, source: corpus.Source, tokenizer: Tokenizer, run: _Run, workers: int
) -> None:
    writer = shards.ShardWriter(
        out, _shard_name, tokenizer, cfg.shard_tokens, run.finished, first=len(run.shards)
    )
    skip, written, limit = run.skip, run.tokens, cfg.max_tokens or sys.maxsize
    results = tokenizing.tokenize(tokenizing.chunks(source, run.state), tokenizer, workers)
    with (
        contextlib.closing(results),
        tokenizing.Progress("tokenizing", source.total, _say) as progress,
    ):
        for chunk, tokens, _ in results:
            part = tokens[skip : skip + limit - written]
            run.begin(chunk.state, skip)
            with cache.writing_tokens("--out", out):
                writer.add(part)
            skip, written = 0, written + len(part)
            progress.update(chunk.position, written)
            if written == limit:
                break
    with cache.writing_tokens("--out", out):
        writer.close()


def _check_disk(
    cfg: PrepConfig, out: Path, tokenizer: Tokenizer, files: list[Path], run: _Run
) -> None:
    """Raises UserError if the disk has too little room for the tokens that the input should give.

    This runs before anything is written. The size of a hub dataset without --max-tokens is unknown.
    """
    tokens = cfg.max_tokens or sys.maxsize
    if files:
        packed = [path.suffix in (".gz", ".parquet") for path in files]
        text = sum(
            path.stat().st_size * (PACKED if p else 1)
            for path, p in zip(files, packed, strict=True)
        )
        tokens = min(tokens, int(text / TEXT_PER_TOKEN))
    if tokens < sys.maxsize:
        itemsize = token_dtype(tokenizer.vocab_size).itemsize
        _require(out, max(0, tokens - run.tokens) * itemsize)


def _require(out: Path, size: int) -> None:
    free = shutil.disk_usage(out).free
    if size > free:
        raise UserError(
            f"the shards will take about {size / 1e9:,.1f} GB and {out} has {free / 1e9:,.1f} GB "
            "free; "
            "free some space, give another --out, or fewer tokens (--max-tokens N, --max-shards N)"
        )


# ---- shards that someone else made


def _fetch(cfg: PrepConfig, out: Path) -> None:
    """Download the .bin files of a repository, check each one, and write a manifest for them."""
    import huggingface_hub

    assert cfg.dataset is not None
    tokenizer = load_tokenizer(cfg.tokenizer)
    settings = _settings(cfg, tokenizer, [])
    if _is_finished(out, settings):
        return
    write_json(out / "progress.json", {"settings": settings})
    revision, sizes = _list_shards(cfg)
    _require(out, sum(size for name, size in sizes.items() if not (out / name).exists()))
    records = []
    for i, name in enumerate(sizes, 1):
        _say(f"downloading {name} ({i} of {len(sizes)})")
        huggingface_hub.hf_hub_download(
            cfg.dataset, name, repo_type="dataset", revision=revision, local_dir=out
        )
        records.append(_record(shards.read_shard(out / name), tokenizer))
    shards.write_manifest(out, tokenizer, records, settings=settings, revision=revision)
    (out / "progress.json").unlink()
    _say(f"done: {len(records)} shards, {sum(r['tokens'] for r in records):,} tokens in {out}")


def _list_shards(cfg: PrepConfig) -> tuple[str | None, dict[str, int]]:
    """The repository's commit, and the size in bytes of each wanted shard by its name."""
    import huggingface_hub

    assert cfg.dataset is not None
    try:
        info = huggingface_hub.dataset_info(cfg.dataset, files_metadata=True, timeout=10)
    except Exception as error:
        # The kind of error depends on the library's HTTP client, which changes.
        raise corpus.no_hub_data(cfg.dataset, error) from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    shards = sorted(name for name in sizes if name.endswith(".bin") and "/" not in name)
    train = [name for name in shards if not data.is_validation(name)][: cfg.max_shards]
    if not train:
        raise UserError(
            f"{cfg.dataset} has no .bin shards; leave --pretokenized out to tokenize its text"
        )
    return info.sha, {
        name: sizes[name] for name in shards if data.is_validation(name) or name in train
    }


def _record(shard: shards.Shard, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's entry for a shard. Raises UserError for ids outside the vocabulary."""
    lengths, counts = shards.byte_lengths(tokenizer), np.zeros(0, np.int64)
    tokens = shard.map()
    for begin in range(0, len(tokens), 1 << 24):
        part = np.bincount(
            tokens[begin : begin + (1 << 24)], minlength=max(len(lengths), len(counts))
        )
        counts = part + np.pad(counts, (0, len(part) - len(counts)))
    max_id = int(np.flatnonzero(counts)[-1])
    if max_id >= tokenizer.vocab_size:
        raise UserError(
            data.beyond_vocabulary(shard.path, max_id, tokenizer.vocab_size, tokenizer.name)
        )
    record = dict(name=shard.path.name, tokens=len(tokens), documents=int(counts[tokenizer.eot]))
    return record | dict(bytes=int(counts @ lengths), max_id=max_id, sha256=sha256(shard.path))


if __name__ == "__main__":
    entry_point(main)
