"""FineWeb, or any text, to token shards: the first for validation, the others for training.

    python fineweb_prep.py --dataset HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb
    python fineweb_prep.py --input "texts/*.parquet" --out data/mine
    python fineweb_prep.py --dataset kjj0/fineweb10B-gpt2 --pretokenized --max-shards 9 --out data/fineweb

Killed and started again, it goes on after the last whole shard; the bytes are those of an
uninterrupted run, with any number of workers.
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
from config import Count, Few, Tokens, UserError, Where, Wheres
from engine import data
from storage import cache, shards
from storage.foreign import read_value
from storage.shards import token_dtype
from text import corpus
from text.tokenizer import Tokenizer, load_tokenizer

TEXT_PER_TOKEN = 4.0  # bytes of English behind a GPT-2 token, a little less than it is
STATES = ("manifest.json", "progress.json")  # of a finished folder, and of one begun
# some that both hold in every version
OWN_SETTINGS = {"text_column", "tokenizer", "shard_tokens", "pretokenized"}
PACKED = 2  # text bytes behind each byte of a parquet or gzip file, other columns counted in


@dataclass(frozen=True)
class PrepConfig:
    """What to tokenize, and where the shards go."""

    out: Where | None = None
    """Folder of the shards."""
    dataset: str | None = None
    """Hub id of a dataset to stream: HuggingFaceFW/fineweb-edu."""
    name: str | None = None
    """The dataset's configuration: sample-10BT."""
    split: str = "train"
    """The dataset's split."""
    input: Wheres | None = None
    """Local text in place of a dataset: files, folders or globs, separated by commas."""
    text_column: str = "text"
    """Column that holds the text."""
    tokenizer: Where = "gpt2"
    """gpt2, a folder, or a tokenizer.json."""
    shard_tokens: Tokens = 100_000_000
    """Tokens in a shard."""
    max_tokens: Tokens | None = None
    """Stop after so many tokens. Default: all there are."""
    workers: Few | None = None
    """Tokenizing processes. Default: one for each core."""
    pretokenized: bool = False
    """The dataset is a repository of ready .bin shards: fetch them."""
    max_shards: Count | None = None
    """Of a pretokenized dataset, fetch so many training shards. Default: all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Raises UserError for bad options, bad input, a folder made with other settings, or too little
    disk."""
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
        raise UserError(
            "give one of --dataset HUB_ID (HuggingFaceFW/fineweb-edu) and --input FILES"
        )
    if cfg.pretokenized and cfg.dataset is None:
        raise UserError("--pretokenized needs --dataset HUB_ID (kjj0/fineweb10B-gpt2)")
    return Path(cfg.out)


def _check_out(cfg: PrepConfig, out: Path) -> None:
    """UserError where the folder holds files of other programs under the names of ours: they would
    be lost."""
    begun = [name for name in STATES if _state(out / name)]
    if not begun and any(not corpus.is_hidden(file.name) for file in out.glob("*.bin")):
        raise UserError(f"{out} holds shards that this program did not make; give another --out")
    beside, given = (out / "tokenizer").resolve(), Path(cfg.tokenizer).resolve()
    if (
        not begun
        and cfg.tokenizer != "gpt2"
        and beside.exists()
        and beside not in (given, given.parent)
    ):
        raise UserError(
            f"{out / 'tokenizer'} would be replaced by --tokenizer {cfg.tokenizer}; give another "
            "--out"
        )


def _state(file: Path) -> dict[str, Any]:
    """What this program wrote of its work, empty where there is no such file. Raises UserError for
    a foreign file."""
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
    files = corpus.find_files(cfg.input) if cfg.input else []
    tokenizer = load_tokenizer(cfg.tokenizer, 1)
    settings = _settings(cfg, tokenizer, files)
    if _is_finished(out, settings):
        return
    run = _Run(out, settings)
    source = _source(cfg, files, run)
    _check_disk(cfg, out, tokenizer, files, run)
    if run.shards:
        _say(f"going on after {run.shards[-1]['name']}: {run.tokens:,} tokens are done")
    workers = cfg.workers or cores()
    _say(
        f"tokenizing {cfg.input or cfg.dataset} with {tokenizer.name}, {workers} workers, to {out}"
    )
    run.save(run.skip)  # from here on the folder is known as ours, and as unfinished
    _tokenize(cfg, out, source, tokenizer, run, workers)
    if len(run.shards) < 2:
        run.remove()
        raise UserError(
            f"{cfg.input or cfg.dataset} holds {run.tokens:,} tokens, which leaves nothing beside "
            "the validation shard; "
            f"type --shard-tokens {max(1, run.tokens // 10)}, or give more text"
        )
    shards.write_manifest(out, tokenizer, run.shards, settings=settings)
    (out / "progress.json").unlink(missing_ok=True)
    _say(f"done: {len(run.shards)} shards, {run.tokens:,} tokens in {out}")


def _settings(cfg: PrepConfig, tokenizer: Tokenizer, files: list[Path]) -> dict[str, Any]:
    """All that decides the bytes. Files count by name, size and a few blocks: hashing terabytes
    would double the work."""
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
    """Whether `out` is complete. Raises UserError where it was made, or begun, with other
    settings."""
    finished = (out / "manifest.json").exists()
    for saved in (_state(out / name) for name in STATES):
        made_with = saved.get("settings", {})
        for name, value in settings.items() if saved.get("shards") else ():
            if name in made_with and made_with[name] != value:  # older versions knew fewer
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
        _say(f"{out} is finished already: nothing to do")
    return finished


class _Run:
    """Which shards are finished, and where in the input the next one begins: progress.json."""

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.settings = out, settings
        self.file = out / "progress.json"
        saved = _state(self.file)
        self.shards: list[dict[str, Any]] = saved.get("shards", [])
        saved = saved if self.shards else {}
        # of the source, before the chunk in which the next shard begins
        self.state: Any = saved.get("state")
        self.skip: int = saved.get("skip", 0)  # tokens of that chunk that are on disk already
        self.revision: str | None = saved.get("revision")  # of the dataset on the hub

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def begin(self, state: Any, skip: int) -> None:
        """The tokens given to the writer from now on are those of the chunk at `state`, from `skip`
        on."""
        self.state, self.skip = state, skip

    def finished(self, shard: dict[str, Any], consumed: int) -> None:
        self.shards.append(shard)
        self.save(self.skip + consumed)

    def save(self, skip: int) -> None:
        saved = dict(settings=self.settings, shards=self.shards, revision=self.revision)
        write_json(self.file, saved | dict(state=self.state, skip=skip))

    def remove(self) -> None:
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
    results = corpus.tokenize(corpus.chunks(source, run.state), tokenizer, workers)
    with contextlib.closing(results), corpus.Progress("tokenizing", source.total, _say) as progress:
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
    """Before anything is written: is there room for the tokens that the input should give?"""
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
            f"free some, give another --out, or fewer tokens (--max-tokens N, or --max-shards N)"
        )


# ---- shards that someone else made


def _fetch(cfg: PrepConfig, out: Path) -> None:
    """Download the .bin files of a repository, check each, and write the manifest that they
    lack."""
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
        _say(f"fetching {name} ({i} of {len(sizes)})")
        huggingface_hub.hf_hub_download(
            cfg.dataset, name, repo_type="dataset", revision=revision, local_dir=out
        )
        records.append(_record(shards.read_shard(out / name), tokenizer))
    shards.write_manifest(out, tokenizer, records, settings=settings, revision=revision)
    (out / "progress.json").unlink()
    _say(f"done: {len(records)} shards, {sum(r['tokens'] for r in records):,} tokens in {out}")


def _list_shards(cfg: PrepConfig) -> tuple[str | None, dict[str, int]]:
    """The repository's revision, and the size of each shard that is wanted."""
    import huggingface_hub

    assert cfg.dataset is not None
    try:
        info = huggingface_hub.dataset_info(cfg.dataset, files_metadata=True, timeout=10)
    except Exception as error:
        # whatever HTTP client the library has today; the line says what it said
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
    """The manifest's entry of a finished shard. Raises UserError for ids beyond the vocabulary."""
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
