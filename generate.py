"""Generate text from a checkpoint. Prompts come from the command line, from standard input, or
from a dialogue.

python generate.py CHECKPOINT "prompt" ["another prompt" ...]
python generate.py CHECKPOINT --chat
"""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from base.cli import entry_point, parse
from config import Count, PathOrName, Positional, Range, Seed, UserError
from decoding.options import DecodeConfig, check_decode
from text.encodings import HEAD, decode_input, wide_encoding

if TYPE_CHECKING:
    from decoding.fixed import FixedDecoder
    from model import GPT
    from text.tokenizer import Tokenizer

RULE = "-" * 72  # between two texts


@dataclass(frozen=True)
class GenerateConfig(DecodeConfig):
    """Continue each prompt with the model of CHECKPOINT. Without a prompt, continue each line of
    standard input, or start a dialogue at a terminal.

    Put a prompt that begins with a dash after a bare --.
    """

    checkpoint: Annotated[PathOrName, Positional("CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id."""
    prompts: Annotated[tuple[str, ...], Positional("PROMPT ...")] = ()
    """Texts to continue, batched together. An empty prompt starts a new document."""

    chat: bool = False
    """Hold a conversation with a model that finetune.chat trained. Each prompt or line is the next
    message, and the model has read those before it."""
    system: str | None = None
    """With --chat, the message that says how to answer. It stays when older turns are left out."""
    seed: Seed = 1337
    """The random draws of a text depend only on this and the text's number."""
    num_samples: Annotated[int, Range(1, 100_000)] = 1
    """Number of texts for each prompt."""
    batch: Count = 16
    """Number of texts that are generated together."""

    tokenizer: PathOrName | None = None
    """gpt2, a folder, a tokenizer.json, or nanoGPT's meta.pkl. Default: the checkpoint's own."""
    compile: bool = False
    """Compile the step of sampling and greedy decoding, and replay it from a CUDA graph on a GPU.
    The first text of a shape waits for the compiler."""
    stream: bool = True
    """Print a single text while it is generated, if its method chooses token by token."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the weights. auto: bf16 on a CUDA GPU with native bf16, else fp32."""

    def __post_init__(self) -> None:
        check_decode(self)
        if self.num_samples > 1 and not self.draws:
            raise UserError(
                f"--num-samples {self.num_samples} would be one text repeated, because --decode "
                f"{self.decode} draws nothing; use --decode sample"
            )
        if self.compile and self.decode not in ("sample", "greedy"):
            raise UserError(
                f"--compile goes with --decode sample or greedy, not {self.decode}; leave one out"
            )
        if self.chat and self.num_samples > 1:
            raise UserError(
                f"--num-samples {self.num_samples}: a conversation has one answer to each message; "
                "leave it or --chat out"
            )


class Writer:
    """Prints continuations by a checkpoint's model and tokenizer, under the given options.

    It imports torch when it is made, so that `--help` and mistyped options answer fast.
    """

    def __init__(self, config: GenerateConfig):
        from decoding.loading import open_model
        from engine import processes
        from engine.precision import inference_dtype
        from storage.checkpoint import locate

        self.config = config
        device = processes.start(config.device).device
        dtype = inference_dtype(config.precision, device)
        self.model, self.tokenizer = open_model(
            locate(config.checkpoint), config.tokenizer, device, dtype
        )
        self.fixed = compiled_decoder(self.model) if config.compile else None
        self.written = 0  # texts so far, and so the number of the next one

    def write(self, prompts: Sequence[str]) -> None:
        """Print `num_samples` continued texts for each prompt, with a rule between two."""
        texts = [prompt for prompt in prompts for _ in range(self.config.num_samples)]
        if self.config.stream and len(texts) == 1:
            stream = TextStream(self.tokenizer, texts[0])
            self._continue(self._encode(texts), on_token=lambda row, token: stream.add(token))
            stream.close()
            return
        for begin in range(0, len(texts), self.config.batch):
            batch = texts[begin : begin + self.config.batch]
            continued = self._continue(self._encode(batch))
            for i, (prompt, ids) in enumerate(zip(batch, continued, strict=True), begin):
                added = b"".join(map(self.tokenizer.token_bytes, ids)).decode(errors="replace")
                print(*[RULE] * (i > 0), prompt + added, sep="\n", flush=True)

    def reply(self, prompt: list[int], end: int) -> str:
        """Print and return the text that continues the prompt (token ids) up to the token `end`."""
        stream = TextStream(self.tokenizer, "")
        live = self.config.stream
        (ids,) = self._continue(
            [prompt], end, lambda row, token: stream.add(token) if live else None
        )
        for token in () if live else ids:
            stream.add(token)
        stream.close()
        return self.tokenizer.decode(ids, skip_special=True)

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        from decoding.loading import check_known, opening

        tokenizer, size = self.tokenizer, self.model.config.vocab_size
        ids = [tokenizer.encode(prompt) or opening(tokenizer, size) for prompt in prompts]
        check_known(tokenizer, size, itertools.chain(*ids), "the prompt")
        self._warn_of_long(ids)
        return ids

    def _continue(
        self,
        prompts: list[list[int]],
        end: int | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        from decoding.batched import generate

        rows = range(self.written, self.written + len(prompts))
        self.written += len(prompts)
        return generate(
            self.model,
            prompts,
            self.config,
            self.tokenizer.eot if end is None else end,
            on_token,
            seed=self.config.seed,
            rows=rows,
            tokenizer=self.tokenizer,
            fixed=self.fixed,
        )

    def _warn_of_long(self, prompts: list[list[int]]) -> None:
        from decoding.window import kept_tokens

        block, longest = self.model.context, max(map(len, prompts))
        if longest > block:
            print(
                f"warning: a prompt of {longest} tokens is longer than the model's context of "
                f"{block}: only its last {kept_tokens(block)} are read",
                file=sys.stderr,
            )


def compiled_decoder(model: GPT) -> FixedDecoder:
    """A decoder of compiled steps. Raises UserError if nothing can be compiled here."""
    from decoding.fixed import FixedDecoder
    from engine.compiling import compiler_problem

    if problem := compiler_problem(model.head_weight.device.type):
        raise UserError(f"--compile {problem}; or leave it out")
    return FixedDecoder(model)


class TextStream:
    """Prints a text token by token. A character is printed when the last of its bytes arrives."""

    def __init__(self, tokenizer: Tokenizer, prompt: str):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt, end="", flush=True)

    def add(self, token: int) -> None:
        """Print the characters that this token completes."""
        print(self.decoder.decode(self.tokenizer.token_bytes(token)), end="", flush=True)

    def close(self) -> None:
        """Print what is left, with U+FFFD for an incomplete character, and end the line."""
        print(self.decoder.decode(b"", final=True), flush=True)


class Conversation:
    """Answers one message after another. A model reads as many of the newest turns as fit."""

    def __init__(self, writer: Writer):
        """Raises UserError if the model was not trained on conversations."""
        from tasks.generation.sequences import SequenceEncoder
        from text.chat import END, Message, has_template

        config = writer.config
        if not has_template(writer.tokenizer.special_ids):
            raise UserError(
                f"{config.checkpoint} has no chat template of this project; train it on "
                f"conversations with python -m finetune.chat --init {config.checkpoint}"
            )
        self.writer, self.context = writer, writer.model.context
        self.encoder = SequenceEncoder(writer.tokenizer, self.context, False, END)
        self.messages: list[Message] = []
        if config.system:
            self.messages.append({"role": "system", "content": config.system})
        self.is_shortened = False  # whether that was said

    def answer(self, text: str) -> None:
        """Print the answer to the user's next message."""
        from decoding.window import kept_tokens
        from tasks.generation import chat

        self.messages.append({"role": "user", "content": text})
        prompt = self.encoder.fit(chat.prompt(self.messages), kept_tokens(self.context))
        if "shortened" in prompt.lost and not self.is_shortened:
            self._warn("the oldest turns are left out from now on")
            self.is_shortened = True
        if "truncated" in prompt.lost:
            self._warn("the end of this message is not read")
        reply = self.writer.reply(prompt.ids, self.encoder.end)
        self.messages.append({"role": "assistant", "content": reply})

    def _warn(self, text: str) -> None:
        print(f"warning: the context of {self.context} tokens is full: {text}", file=sys.stderr)


def interact(write: Callable[[str], None]) -> int:
    """Call `write` for each typed line. Returns the exit code: 0 after an empty line or the end of
    input, 130 after Ctrl-C."""
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401  importing it gives input() editing and history
    print("Type a prompt. An empty line ends the dialogue.", file=sys.stderr)
    try:
        while prompt := input("> "):
            write(prompt)
    except EOFError:
        print()
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def main() -> int:
    """Run the command. Returns the exit code; raises UserError for the user's mistakes."""
    config = parse(GenerateConfig, sys.argv[1:])
    if not config.checkpoint:
        raise UserError('no checkpoint is named; type python generate.py CHECKPOINT "prompt"')
    if config.system is not None and not config.chat:
        raise UserError("--system belongs to --chat; add it, or leave --system out")
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 must not stop a dialogue
        sys.stdin.reconfigure(errors="replace")
    prompts = config.prompts
    if not prompts and not sys.stdin.isatty():
        prompts = [line.rstrip("\r") for line in _read_stdin().split("\n") if line.strip()]
        if not prompts:
            raise UserError(
                "no prompt is given; type one after the checkpoint, or one per line on standard "
                "input"
            )
    writer = Writer(config)
    conversation = Conversation(writer) if config.chat else None
    if not prompts:
        return interact(conversation.answer if conversation else lambda text: writer.write([text]))
    if not conversation:
        writer.write(prompts)
        return 0
    for i, prompt in enumerate(prompts):
        if i:
            print(RULE)
        conversation.answer(prompt)
    return 0


def _read_stdin() -> str:
    """Standard input as text. Single bytes that are not UTF-8 become U+FFFD.

    Raises UserError for UTF-16 and UTF-32, which would give wrong prompts if read as UTF-8.
    """
    if not isinstance(sys.stdin, io.TextIOWrapper):
        return sys.stdin.read()
    raw = sys.stdin.buffer.read()
    whole = wide_encoding(raw[:HEAD]) or raw[:2] == b"\x1f\x8b"
    return decode_input(raw, "standard input") if whole else raw.decode("utf-8-sig", "replace")


if __name__ == "__main__":
    entry_point(main)
