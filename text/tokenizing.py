"""Tokenizes documents with several processes.

Results come back in the order of the documents, so the output never depends on the number of
processes. The price is that one slow chunk delays those behind it. At most CHUNKS_PER_WORKER chunks
per process wait, so memory use is bounded.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np

from storage.shards import token_dtype
from text import corpus

JOIN_TIMEOUT = 5.0  # seconds that a tokenizing process has to end after SIGTERM
CHUNKS_PER_WORKER = 4  # chunks in memory between reading and writing, for each process


class Encoder(Protocol):
    """The part of a tokenizer that is used here."""

    vocab_size: int
    eot: int
    num_threads: int | None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-text token."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Some segments that one process tokenizes together."""

    texts: list[str]
    starts: list[bool]  # whether each text begins a document
    empty: int  # documents without text, which are left out
    state: Any  # state of the source before the first segment
    position: int  # position of the source after the last segment


def chunks(source: corpus.Source, state: Any = None) -> Iterator[Chunk]:
    """Group the segments of `source` from `state` on into chunks of about CHUNK_CHARS characters.

    Documents without text are left out and counted.
    """
    texts, starts, empty, size = [], [], 0, 0
    before = state if state is not None else source.state()
    for text, start in source.segments(state):
        if text.strip():
            texts.append(text)
            starts.append(start)
            size += len(text)
        else:
            empty += start
        if size >= corpus.CHUNK_CHARS:
            yield Chunk(texts, starts, empty, before, source.position)
            texts, starts, empty, size, before = [], [], 0, 0, source.state()
    if texts or empty:
        yield Chunk(texts, starts, empty, before, source.position)


def encode(
    tokenizer: Encoder, texts: list[str], starts: list[bool]
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all texts in one array, and each text's number of tokens, (n_texts,) int64.

    An end-of-text token precedes each text that begins a document, and counts as a token of it. The
    dtype is that of `token_dtype`.
    """
    # one by one: the worker processes already provide the parallelism of encode_batch
    ids = [tokenizer.encode(text) for text in texts]
    lengths = np.array([len(row) + start for row, start in zip(ids, starts, strict=True)], np.int64)
    tokens = np.full(lengths.sum(), tokenizer.eot, token_dtype(tokenizer.vocab_size))
    for row, end in zip(ids, np.cumsum(lengths), strict=True):
        tokens[end - len(row) : end] = row
    return tokens, lengths


def tokenize(
    source: Iterator[Chunk], tokenizer: Encoder, workers: int
) -> Generator[tuple[Chunk, np.ndarray, np.ndarray]]:
    """Each chunk with its tokens and lengths as `encode` returns them, in the order of the source.

    workers: number of processes; 1 tokenizes in this process. At most CHUNKS_PER_WORKER * workers
    chunks are in memory at any time.
    """
    if workers <= 1:
        for chunk in source:
            yield chunk, *encode(tokenizer, chunk.texts, chunk.starts)
        return
    with _WorkerPool(tokenizer, workers) as encoders:
        numbered = enumerate(source)
        held: dict[int, Chunk] = {}  # chunks that were read and not yet yielded
        unsent: deque[tuple[int, Chunk]] = deque()
        done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number in itertools.count():
            while number not in done:
                # one chunk is read ahead for each process, so that none waits for the disk
                room = len(held) < CHUNKS_PER_WORKER * workers and len(unsent) < workers
                if read := next(numbered, None) if room else None:
                    unsent.append(read)
                    held[read[0]] = read[1]
                elif not held:
                    return
                done.update(encoders.receive(block=read is None))
                while encoders.idle and unsent:
                    encoders.send(*unsent.popleft())
            yield held.pop(number), *done.pop(number)


class _WorkerPool:
    """Processes that tokenize one chunk at a time each. They also end if this process is killed."""

    def __init__(self, tokenizer: Encoder, n: int):
        # Forking is fast, but unsafe in a process with other threads. A spawned interpreter has to
        # import the tokenizer first.
        fork = sys.platform == "linux" and threading.active_count() == 1
        context = (
            multiprocessing.get_context("fork") if fork else multiprocessing.get_context("spawn")
        )
        self.idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}
        self._processes = []
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_worker, args=(theirs, ours, tokenizer), daemon=True
            )
            process.start()
            theirs.close()  # so that either side sees the end of file when the other one dies
            self._processes.append(process)
            self.idle.append(ours)

    def __enter__(self) -> _WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(JOIN_TIMEOUT)
            if process.is_alive():  # forked in a state in which it does not handle signals
                process.kill()
                process.join()
        for connection in [*self.idle, *self._busy]:
            connection.close()

    def send(self, number: int, chunk: Chunk) -> None:
        """Give chunk `number` to an idle process. Raises RuntimeError if that process has died."""
        connection = self.idle.pop()
        self._busy[connection] = number
        try:
            connection.send((chunk.texts, chunk.starts))
        except OSError:
            raise _worker_died() from None

    def receive(self, block: bool) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """The results that are ready, each as (number, (tokens, lengths)).

        block: wait for at least one. Raises RuntimeError if a process failed.
        """
        for connection in wait(list(self._busy), None if block else 0):
            assert isinstance(connection, Connection)
            try:
                result = connection.recv()
            except (EOFError, OSError):
                raise _worker_died() from None
            if isinstance(result, str):
                raise RuntimeError(f"a tokenizing process failed:\n{result}")
            number = self._busy.pop(connection)
            self.idle.append(connection)
            yield number, result


def _worker_died() -> RuntimeError:
    return RuntimeError("a tokenizing process died; did the machine run out of memory?")


def _run_worker(connection: Connection, parents: Connection, tokenizer: Encoder) -> None:
    """The main loop of a tokenizing process.

    Ctrl-C reaches the whole process group. Only the parent acts on it.
    """
    parents.close()  # a fork inherits the other end too, and would never see it close
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.num_threads = 1
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            texts, starts = connection.recv()
            try:
                result: Any = encode(tokenizer, texts, starts)
            except Exception:
                result = traceback.format_exc()
            connection.send(result)


class Progress:
    """Shows MB/s and the time left: as a bar on a terminal, else as a line every few seconds."""

    EVERY = 5.0  # seconds between lines

    def __init__(self, label: str, total: int | None, say: Callable[[str], None]):
        """total: bytes of input, or None if unknown."""
        self.label, self.total, self.say = label, total, say
        self._last_line = time.monotonic()
        # Position and time of the first update. The rate counts from there, because a resumed run
        # begins in the middle of the input.
        self._first: tuple[int, float] | None = None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            # auto_refresh would start a thread, and then the worker processes could not be forked
            self._bar = Bar(
                *columns, console=Console(stderr=True), auto_refresh=False, transient=True
            )
            self._bar.start()
            self._bar.add_task(self.label, total=self.total, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, position: int, tokens: int) -> None:
        """position: bytes of input done. tokens: tokens written so far."""
        figures = self._figures(position, tokens)
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=position, figures=figures, refresh=True
            )
        elif time.monotonic() - self._last_line >= self.EVERY:
            self._last_line = time.monotonic()
            share = f"{position / self.total:4.0%} " if self.total else ""
            self.say(f"{self.label}: {share}{figures}")

    def _figures(self, position: int, tokens: int) -> str:
        now = time.monotonic()
        self._first = self._first or (position, now)
        rate = (position - self._first[0]) / max(1e-9, now - self._first[1])
        figures = f"{position / 1e6:,.0f} MB, {tokens / 1e6:,.1f}M tokens"
        figures += f", {rate / 1e6:.1f} MB/s" if rate else ""
        if self.total and rate:
            minutes, seconds = divmod(round(max(0, self.total - position) / rate), 60)
            figures += f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        return figures
