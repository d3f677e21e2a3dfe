"""Fine-tuning on rows whose answers are texts: the family of tasks that a language model's own head can do.

A row becomes one sequence: end-of-text, the prompt, the answer, end-of-text. Only the answer and the end after it are
learned. Sequences are padded at the right, where causal attention sees nothing of it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import adapter_files
import adapters
from checkpoint import locate
from config import GenerationConfig, GPTConfig, UserError, resolve_steps
from decoding import generate, open_model
from distributed import choose_device
from kernels.linear_cross_entropy import IGNORE
from memory import Memory, checkpoint_bytes, estimate, keeps_freed
from metrics import longest_copied, perplexity
from model import GPT
from objectives import nll_and_unlikelihood
from optim import Group
from order import Order, pad_to, padded_lengths, padding_share
from precision import casts_once
from rows import Reader, Row, Rows, hold_out, overlap, read_rows
from task import Batch, Task, model_config, open_pretrained
from tokenizer import Tokenizer, load_tokenizer


class Special(str):
    """A token of its own between the texts of a sequence."""


class Long(str):
    """A text that may be cut at its end where its row is longer than the context."""


SCRATCH_CONTEXT = 256  # tokens, of a model from scratch without --seq-len
Parts = tuple[str, ...]  # texts, special tokens and at most one long text


@dataclass(frozen=True)
class Example:
    """A row as the model sees it: what it reads, and what it learns to write after that."""

    prompt: Parts
    answer: Parts


@dataclass(frozen=True)
class Answer:
    """What the model wrote after a prompt, and what is true."""

    prompt: str
    text: str
    reference: str


@dataclass
class Split:
    """Sequences of a split, by row id. A long text is several sequences."""

    rows: list[Row]
    tokens: list[np.ndarray]  # end-of-text at both ends, int64
    learned: list[int]  # place of the first token that is learned
    references: list[str]
    sha256: str

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that the model reads of each."""
        return np.array([len(tokens) - 1 for tokens in self.tokens])


class Generation(Task):
    """Fill in `columns`, `example` and, where answers are scored, `scores`."""

    config = GenerationConfig
    ragged = True
    cfg: GenerationConfig
    columns: ClassVar[dict[str, tuple[str, ...]]] = {"text": ("text",)}  # fields and the columns they may come from
    optional: ClassVar[tuple[str, ...]] = ()  # fields that a row may lack
    truth: ClassVar[tuple[str, ...]] = ()  # fields that a row of --predict may lack
    readers: ClassVar[dict[str, Reader]] = {}  # of files that only this task knows, by suffix
    predictions: ClassVar[str] = "predictions.jsonl"  # the file of answers
    special: ClassVar[tuple[str, ...]] = ()  # tokens that the task adds to the vocabulary
    toy: ClassVar[Sequence[dict[str, str]]]  # a few rows to try the task with
    learned_rows: Sequence[Row] = ()  # where `setup` has read them

    # --- what a task says

    def example(self, row: Row) -> Example:
        """What is learned of a row."""
        raise NotImplementedError

    def question(self, row: Row) -> Example:
        """What is asked of a validation row, and its true answer."""
        return self.example(row)

    def asked(self, row: Row) -> Parts:
        """What a row of `--predict` gives the model to go on from."""
        return self.question(row).prompt

    def reference(self, row: Row) -> str:
        """The true answer to a row, as `scores` compares it."""
        return plain(self.question(row).answer)

    def kin(self, row: Row) -> str:
        """Equal for rows that are held out together."""
        return "".join(row.fields.values())

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Metrics of the decoded answers to validation rows."""
        return {}

    def copied(self, texts: Sequence[str], field: str = "text") -> dict[str, float]:
        """Most words in a row that a text has from the training rows; nothing where none were read."""
        if not self.learned_rows:
            return {}
        copied = longest_copied(texts, [row[field] for row in self.learned_rows])
        return {"longest_copied": float(copied.max(initial=0))}

    def stop_lines(self, prompt: str) -> int:
        """Lines after which the answer to a prompt ends; 0: as many as it has."""
        return self.cfg.stop_lines

    def write_answers(self, path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
        """The answers to the rows of `--predict`."""
        records = [row.fields | {"prediction": a.text} for row, a in zip(rows, answers, strict=True)]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # --- rows

    def without_data(self, cfg: GenerationConfig) -> str:
        return f"no --data: training on the {len(self.toy)} toy rows of the task"

    def setup(self, cfg: GenerationConfig, say: Callable[[str], None]) -> None:
        self.cfg = cfg
        adapters.check(cfg)
        assert cfg.data
        self.warnings = ()
        if not cfg.eval_rows:
            self.best = Task.best  # nothing is decoded, so there is no other figure
        if "unlikelihood" in cfg.objective:
            self.terms = {"nll": 1.0, "unlikelihood": cfg.unlikelihood}
        self._open_vocabulary()
        limit = self.shape.block_size - (cfg.prefix_tokens if cfg.method in ("prefix", "soft-prompt") else 0)
        if limit < 1:
            raise UserError(
                f"--prefix-tokens {cfg.prefix_tokens} leaves the text none of the model's {self.shape.block_size} positions; "
                f"use fewer"
            )
        if cfg.seq_len and cfg.seq_len > limit:
            raise UserError(f"--seq-len {cfg.seq_len} is longer than the {limit} tokens that the model has room for")
        self.seq_len = cfg.seq_len or limit
        train = self.read(cfg.data, "train", say)
        if cfg.val_data:
            val = self.read(cfg.val_data, "validation", say)
        elif cfg.data == "toy":
            val = train
        else:
            parts = hold_out([self.kin(row) for row in train])
            train, val = ([train[i] for i in ids] for ids in parts)
        self.train = self._split(train, self.example, "training")
        self.val = self._split(val, self.question, "validation")
        self.learned_rows = self.train.rows
        self._warn_of_known(train, val)
        # A sequence that goes on with a text does not begin with the end-of-text token.
        begins = [i for i, tokens in enumerate(self.val.tokens) if tokens[0] == self.tokenizer.eot]
        self.shown, self.decoded = begins[:2], begins[: cfg.eval_rows]
        self.padded = padded_lengths(np.concatenate((self.train.lengths, self.val.lengths)), self.seq_len)
        self.order = Order(self.train.lengths, cfg.batch_size, cfg.seed)
        for text in self._first_rows():
            say(text)

    def _warn_of_known(self, train: Sequence[Row], val: Sequence[Row]) -> None:
        texts = (["".join(row.fields.values()) for row in rows] for rows in (train, val))
        if self.cfg.val_data and (known := overlap(*texts)):
            self.warnings += (f"{known} of {len(train)} training rows also stand among the validation rows",)

    def _open_vocabulary(self) -> None:
        cfg = self.cfg
        where = cfg.init if cfg.init == "scratch" else locate(cfg.init)
        given = cfg.tokenizer or ("gpt2" if cfg.init == "scratch" else where)
        base = load_tokenizer(given if given == "gpt2" else locate(given))
        self.tokenizer: Tokenizer = base.with_special(self.special) if self.special else base
        self.base: GPT | None = None if cfg.init == "scratch" else open_pretrained(cfg)  # until `build_model` takes it
        self.base_sha256 = adapter_files.weights_sha256(self.base) if self.base else ""
        self.new_tokens = range(base.vocab_size, self.tokenizer.vocab_size if self.base else base.vocab_size)
        scratch = dataclasses.replace(cfg, seq_len=cfg.seq_len or SCRATCH_CONTEXT)
        self.shape: GPTConfig = self.base.config if self.base else model_config(scratch, self.tokenizer.vocab_size)
        if base.vocab_size > self.shape.vocab_size:
            raise UserError(
                f"the tokenizer has {base.vocab_size} ids and the model of --init {cfg.init} only "
                f"{self.shape.vocab_size}; leave --tokenizer out or name the model's own"
            )
        size = max(self.shape.vocab_size, self.tokenizer.vocab_size)
        self.shape = dataclasses.replace(self.shape, vocab_size=size)

    def read(self, spec: str, split: str, say: Callable[[str], None]) -> list[Row]:
        """Rows of `--data` ("train"), `--val-data` ("validation") or `--predict` ("test")."""
        if spec == "toy":
            return [Row(dict.fromkeys(self.columns, "") | row, f"toy row {n}") for n, row in enumerate(self.toy, 1)]
        # `--FIELD-column` names the column of a field, `--lines` makes a row of each line of a text file.
        columns = {field: getattr(self.cfg, f"{field}_column", None) or names for field, names in self.columns.items()}
        optional = self.optional + (self.truth if split == "test" else ())
        found = read_rows(
            spec, columns, optional=optional, strict=self.cfg.strict, split=split,
            lines=getattr(self.cfg, "lines", False), readers=self.readers, say=say,
        )  # fmt: skip
        if found.skipped:
            self.warnings += (f"{spec}: {found.skipped:,} rows could not be read and are left out",)
        return found.rows

    def _split(self, rows: Sequence[Row], example: Callable[[Row], Example], what: str) -> Split:
        split = Split([], [], [], [], Rows(list(rows)).sha256)
        counts = {"cut": 0, "dropped": 0, "continued": 0}
        for row in rows:
            sequences, happened = self._sequences(example(row), row)
            if happened:
                counts[happened] += 1
            for tokens, learned in sequences:
                split.rows.append(row)
                split.tokens.append(np.array(tokens))
                split.learned.append(learned)
                split.references.append(self.reference(row))
        said = {
            "cut": "are cut at the end of their text",
            "dropped": "cannot be cut to fit and are left out",
            "continued": "go on in further sequences",
        }
        for name, count in counts.items():
            if count:
                text = f"{count} of {len(rows)} {what} rows are longer than {self.seq_len} tokens and {said[name]}"
                self.warnings += (text,)
        if not split.rows:
            raise UserError(f"there is no {what} row that fits into {self.seq_len} tokens; raise --seq-len")
        return split

    def _sequences(self, example: Example, row: Row) -> tuple[list[tuple[list[int], int]], str]:
        """(tokens, place of the first that is learned) of a row, and what had to be done to make it fit."""
        eot = self.tokenizer.eot
        room = self.seq_len + 1  # the last token is not read
        prompt, answer = self._encode(example.prompt), self._encode(example.answer)
        over = 2 + len(prompt) + len(answer) - room
        tokens = [eot, *prompt, *answer, eot]
        if over <= 0:
            return [(tokens, 1 + len(prompt))], ""
        long = sum(len(self.tokenizer.encode(part)) for part in example.prompt if isinstance(part, Long))
        if not long and 1 + len(prompt) < room:
            # Each piece begins with the last token of the one before, which it reads and does not learn.
            pieces = [(tokens[i : i + room], 1) for i in range(0, len(tokens) - 1, room - 1)]
            return [(pieces[0][0], 1 + len(prompt)), *pieces[1:]], "continued"
        if self.cfg.strict:
            raise UserError(f"{row.where}: {over} tokens too long for --seq-len {self.seq_len} (--strict)")
        if over > long:
            return [], "dropped"
        prompt = self._encode(example.prompt, keep=long - over)
        return [([eot, *prompt, *answer, eot], 1 + len(prompt))], "cut"

    def _encode(self, parts: Parts, keep: int | None = None) -> list[int]:
        """Token ids of the parts, the first `keep` of a long text."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Special):
                ids.append(self.tokenizer.special_id(part))
            elif isinstance(part, Long):
                ids += self.tokenizer.encode(part)[:keep]
            else:
                ids += self.tokenizer.encode(part)
        return ids

    def prompt(self, i: int) -> list[int]:
        """What validation row `i` gives the model to go on from."""
        row = self.val.rows[i]
        return self._question_ids(self.question(row).prompt, self.seq_len, row)

    def _first_rows(self) -> list[str]:
        """The first rows of the first batch, what is learned between the marks."""
        texts = []
        for i in self.order(0).reshape(-1)[: self.cfg.show_rows]:
            tokens, learned = self.train.tokens[i].tolist(), self.train.learned[i]
            read, answer = self.tokenizer.decode(tokens[:learned]), self.tokenizer.decode(tokens[learned:])
            texts.append(
                f"row {i} ({len(tokens)} tokens, {len(tokens) - learned} of them learned):\n{read}⟦{answer}⟧\n"
            )
        return texts

    # --- the run

    def set_length(self, cfg: GenerationConfig) -> GenerationConfig:
        epoch = self.order.steps_per_epoch
        self.cfg = resolve_steps(cfg, cfg.steps or cfg.epochs * epoch, epoch)
        return self.cfg

    def rows_per_rank(self, cfg: GenerationConfig, world_size: int) -> int:
        return -(-cfg.batch_size // world_size)

    def tokens_per_step(self) -> float:
        return float(self.train.lengths.mean()) * min(self.cfg.batch_size, len(self.train.rows))

    def describe_step(self, micro_batch: int, world_size: int) -> str:
        return f"{self.cfg.batch_size} rows, up to {micro_batch} in a forward pass, on {world_size} ranks"

    def longest_rows(self, n: int) -> np.ndarray:
        return np.resize(np.argsort(-self.train.lengths, kind="stable"), n)

    def identity(self) -> dict[str, Any]:
        names = ["batch_size", "method", "llrd", "unlikelihood"]
        names += [name for name, methods in adapters.OPTIONS.items() if self.cfg.method in methods]
        config = {name: getattr(self.cfg, name) for name in names}
        return config | {
            "objective": list(self.cfg.objective),
            "seq_len": self.seq_len,
            "n_layer": self.shape.n_layer,
            "n_head": self.shape.n_head,
            "n_embd": self.shape.n_embd,
            "vocabulary": self.shape.vocab_size,
            "base": self.base_sha256,
            "data": hashlib.sha256(f"{self.train.sha256} {self.val.sha256}".encode()).hexdigest(),
            "tokenizer": self.tokenizer.sha256,
        }

    def describe(self) -> dict[str, str]:
        shape, train = self.shape, self.train
        with torch.device("meta"):
            model = self._dressed(GPT(shape))
        trained, total = adapters.counts(model, self.groups(model, 0))
        padding = padding_share(self.order.epoch(0), train.lengths, self.padded, self.cfg.batch_size)
        return {
            "task": f"{self.name}, {self.cfg.method}: {trained:,} of {total:,} parameters train "
            f"({trained / total:.2%})",
            "model": f"{shape.n_layer} layers x {shape.n_embd} wide, {shape.n_head} heads, context {self.seq_len}, "
            f"start: {self.cfg.init}",
            "tokenizer": f"{self.tokenizer.name}, {self.tokenizer.vocab_size:,} ids"
            + (f", of them {' '.join(self.special)}" if self.special else ""),
            "data": f"{self.cfg.data}: {len(train.rows):,} rows to train on ({train.lengths.sum():,} tokens, "
            f"padding {padding:.0%} of a step), {len(self.val.rows):,} to validate on",
        }

    def flops_per_token(self) -> int:
        with torch.device("meta"):
            return GPT(self.shape).flops_per_token(int(self.train.lengths.max()))

    def estimate(self, cfg: GenerationConfig, micro_batch: int, device_type: str, world_size: int) -> Memory:
        shape = dataclasses.replace(self.shape, chunked_head=self.shape.chunked_head and not cfg.objective)
        return estimate(
            shape, micro_batch, int(self.padded[-1]), cfg.precision, cfg.optimizer, device_type, world_size,
            accumulate=micro_batch < self.rows_per_rank(cfg, world_size), saves=bool(cfg.save_every),
            keep_freed=keeps_freed(cfg), cast_once=casts_once(cfg.precision, cfg.without), dress=self._dressed,
        )  # fmt: skip

    def checkpoint_bytes(self) -> int:
        whole = self.cfg.method not in adapters.ADAPTERS
        return checkpoint_bytes(self.shape, self.cfg.optimizer, self._dressed, whole)

    # --- the model

    def build_model(self, cfg: GenerationConfig) -> nn.Module:
        model, self.base = self.base or GPT(self.shape), None
        if self.new_tokens:
            model.add_tokens(self.new_tokens)
        self._dressed(model)
        self.stored = adapters.stored(model, cfg)
        return model

    def _dressed(self, model: GPT) -> GPT:
        """The model with what its method adds to it."""
        adapters.add_adapter(model, self.cfg, self.new_tokens)
        return model

    def groups(self, model: nn.Module, step: int) -> list[Group]:
        return adapters.groups(model, self.cfg, step, self.order.steps_per_epoch)

    def is_stored(self, parameter: str) -> bool:
        return parameter in self.stored

    def rows(self, split: str, step: int) -> np.ndarray:
        if split == "train":
            return self.order(step)
        # Rows of like length in a batch; those to decode first, that they are decoded together.
        others = ~np.isin(np.arange(len(self.val.rows)), self.decoded)
        return np.lexsort((self.val.lengths, others))[:, None]

    def collate(self, split: str, ids: np.ndarray) -> Batch:
        data = self.train if split == "train" else self.val
        length = pad_to(int(data.lengths[ids].max()), self.padded)
        idx = torch.full((len(ids), length), self.tokenizer.eot)
        targets = torch.full_like(idx, IGNORE)
        for row, i in enumerate(ids):
            tokens, learned = torch.from_numpy(data.tokens[i]), data.learned[i]
            idx[row, : len(tokens) - 1] = tokens[:-1]
            targets[row, learned - 1 : len(tokens) - 1] = tokens[learned:]
        return {"idx": idx, "targets": targets, "ids": torch.from_numpy(np.asarray(ids))}

    def weights(self, batch: Batch) -> dict[str, float]:
        return dict.fromkeys(self.terms, float((batch["targets"] != IGNORE).sum()))

    def tokens(self, batch: Batch) -> float:
        return float(self.train.lengths[batch["ids"].numpy()].sum())

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if "unlikelihood" not in self.terms:
            return {"nll": model(batch["idx"], batch["targets"], reduction="sum")}
        nll, unlikelihood = nll_and_unlikelihood(model(batch["idx"]), batch["idx"], batch["targets"])
        return {"nll": nll, "unlikelihood": unlikelihood}

    # --- evaluation

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | float]:
        targets = batch["targets"]
        return {"nll": model(batch["idx"], targets, reduction="sum"), "tokens": (targets != IGNORE).sum()}

    def outputs(self, model: nn.Module, batch: Batch) -> dict[int, Any]:
        ids = [i for i in batch["ids"].tolist() if i in self.decoded]
        answers = self.answers(model, [self.prompt(i) for i in ids], ids)
        return {i: Answer(*texts, self.val.references[i]) for i, texts in zip(ids, answers, strict=True)}

    def answers(self, model: nn.Module, prompts: Sequence[list[int]], rows: Sequence[int]) -> list[tuple[str, str]]:
        """Each prompt and its decoded continuation; `rows` number them for their draws."""
        assert isinstance(model, GPT)
        texts = [self.tokenizer.decode(prompt, skip_special=True) for prompt in prompts]
        outs = generate(
            model, prompts, self.cfg, self.tokenizer.eot, seed=self.cfg.seed, rows=rows, tokenizer=self.tokenizer,
            stop_lines=[self.stop_lines(text) for text in texts],
        )  # fmt: skip
        answers = [self.tokenizer.decode(out, skip_special=True) for out in outs]
        return list(zip(texts, answers, strict=True))

    def metrics(self, sums: dict[str, float], outputs: dict[int, Any]) -> dict[str, float]:
        nll, tokens = sums["nll"], sums["tokens"]
        metrics = {"val_loss": nll / tokens, "val_perplexity": perplexity(nll, tokens)}
        if not outputs:
            return metrics
        return metrics | self.scores([outputs[i] for i in sorted(outputs)])

    def samples(self, model: nn.Module) -> list[tuple[str, str]]:
        if self.cfg.prompts:
            prompts = [[self.tokenizer.eot, *self.tokenizer.encode(text)] for text in self.cfg.prompts]
        else:
            prompts = [self.prompt(i) for i in self.shown]
        answers = self.answers(model, prompts, range(len(prompts)))
        # Special tokens spelled out, unlike in an answer that is scored.
        return [(self.tokenizer.decode(p[1:]), text) for p, (_, text) in zip(prompts, answers, strict=True)]

    def predict(self, cfg: GenerationConfig, where: str, path: Path, say: Callable[[str], None]) -> dict[str, float]:
        """Write the answers that the model of a checkpoint gives to the rows of `--predict`.

        Returns their scores where the file has the true ones.
        """
        assert cfg.predict
        self.cfg = cfg
        device = choose_device(cfg.device)
        model, self.tokenizer = open_model(where, None, device, torch.float32)
        rows = self.read(cfg.predict, "test", say)
        prompts = [self._question_ids(self.asked(row), model.context, row) for row in rows]
        answers: list[tuple[str, str]] = []
        for begin in range(0, len(rows), cfg.batch_size):
            some = prompts[begin : begin + cfg.batch_size]
            answers += self.answers(model, some, range(begin, begin + len(some)))
        references = [self.reference(row) for row in rows]
        found = [Answer(*texts, reference) for texts, reference in zip(answers, references, strict=True)]
        self.write_answers(path, rows, found)
        return self.scores(found) if all(references) else {}

    def _question_ids(self, parts: Parts, context: int, row: Row) -> list[int]:
        """What a row gives the model to go on from: a long text is cut to leave the answer a quarter of the context.

        Raises UserError for a prompt that is longer than the context all the same.
        """
        ids = [self.tokenizer.eot, *self._encode(parts)]
        over = len(ids) - (context - context // 4)
        long = sum(len(self.tokenizer.encode(part)) for part in parts if isinstance(part, Long))
        if over > 0 and long:
            ids = [self.tokenizer.eot, *self._encode(parts, keep=max(0, long - over))]
        if len(ids) > context:
            raise UserError(f"{row.where}: a prompt of {len(ids)} tokens is too long for a context of {context}")
        return ids

    # --- what is written

    def export(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, GPT)
        if adapters.can_merge(model):
            self._export_whole(model, folder)
        else:
            self._export_adapter(model, folder)

    def export_checkpoint(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, GPT)
        if self.cfg.method in adapters.ADAPTERS:
            self._export_adapter(model, folder)
        else:
            self._export_whole(model, folder)

    def _export_adapter(self, model: GPT, folder: Path) -> None:
        init = self.cfg.init
        base = str(Path(locate(init)).resolve()) if Path(init).exists() else init  # else a hub id
        adapter_files.save_adapter(model, folder, base, self.base_sha256)
        self.tokenizer.save(folder)

    def _export_whole(self, model: GPT, folder: Path) -> None:
        if adapters.added(model):
            model = copy.deepcopy(model)  # the loop goes on with this one
            adapters.merge(model)
        model.save_pretrained(folder, eot=self.tokenizer.eot)
        self.tokenizer.save(folder)


def plain(parts: Parts) -> str:
    """The texts of some parts, special tokens left out."""
    return "".join(part for part in parts if not isinstance(part, Special))
