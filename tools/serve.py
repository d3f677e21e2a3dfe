"""Serves a checkpoint over HTTP, with the API of OpenAI's completions and chat completions.

python -m tools.serve runs/base
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from base.cli import entry_point, parse
from config import Count, CountOrNone, PathOrName, Positional, Range, SmallCount, UserError

if TYPE_CHECKING:
    from model import GPT
    from tools.serve_app import Service

GRACE = 2  # seconds that requests get to end after Ctrl-C
SPARE_CONNECTIONS = 256  # besides those whose texts are open; each may send a body


@dataclass(frozen=True)
class ServeConfig:
    """Answer requests for texts of the model of CHECKPOINT over HTTP. A page to try it is at /."""

    checkpoint: Annotated[PathOrName, Positional("CHECKPOINT")] = ""
    """A folder that a run wrote, a folder in the hub's GPT-2 layout, or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in, without a password."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: any free one."""
    name: str = ""
    """The model's id in requests. Default: the checkpoint's folder or hub id."""
    max_batch: SmallCount = 16
    """Texts that are generated together. Each takes the KV cache of a whole context."""
    max_waiting: CountOrNone = 256
    """Texts that may wait for a place in the batch. Further requests get status 429."""
    max_new_tokens: Count = 1024
    """Most tokens that a request may ask for."""
    tokenizer: PathOrName | None = None
    """gpt2, a folder, a tokenizer.json, or nanoGPT's meta.pkl. Default: the checkpoint's own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the weights. auto: bf16 on a CUDA GPU with native bf16, else fp32."""


def open_service(config: ServeConfig) -> Service:
    """The model, ready to answer."""

    from adapters.heads import is_classifier
    from decoding.continuous import Batcher
    from decoding.loading import open_model
    from engine import processes
    from engine.precision import inference_dtype
    from storage.checkpoint import locate
    from tools.serve_app import Service
    from tools.serve_requests import RequestReader

    device = processes.start(config.device).device
    dtype = inference_dtype(config.precision, device)
    where = locate(config.checkpoint)
    if is_classifier(where):
        raise UserError(
            f"{config.checkpoint} is a classifier, which gives labels and writes no text; type "
            f"python -m finetune.TASK --init {config.checkpoint} --epochs 0 --predict FILE"
        )
    model, tokenizer = open_model(where, config.tokenizer, device, dtype)
    check_finite(model, config.checkpoint)
    batcher = Batcher(model, tokenizer, config.max_batch)
    rows = config.max_batch + config.max_waiting
    name = config.name or model_name(config.checkpoint)
    reader = RequestReader(model, tokenizer, name, config.max_new_tokens, rows)
    return Service(batcher, reader, config.max_waiting)


def check_finite(model: GPT, checkpoint: str) -> None:
    """Raise UserError if a weight is NaN or infinite: every text would be nonsense."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"{checkpoint} has weights that are NaN or infinite, in {name}; name an earlier "
                "checkpoint of the run, or another model"
            )


def model_name(checkpoint: str) -> str:
    """The model's id: the folder's name, or the hub's id."""
    folder = Path(checkpoint)
    if not folder.exists():
        return checkpoint
    folder = folder.resolve()
    return folder.parent.name if folder.name == "final" else folder.name


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError if it cannot."""
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "it is no name of a host"
        why = why.partition(" (while")[0]  # Python repeats the address there
        raise UserError(
            f"cannot listen on {host}, port {port}: {why}; give another --port or --host"
        ) from None


def run(service: Service, host: str, bound: socket.socket) -> None:
    """Serve until a signal comes. It is raised again when requests have ended."""
    import uvicorn

    from tools.serve_app import application
    from tools.serve_connection import PromptConnection

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            service.ending = True
            asyncio.get_running_loop().call_later(GRACE, service.end)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        application(service, host, int(time.time())),
        http=PromptConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        timeout_graceful_shutdown=GRACE + 2,
        limit_concurrency=service.most_open + SPARE_CONNECTIONS,
    )
    service.worker.start()
    try:
        Server(config).run(sockets=[bound])
    finally:
        service.worker.stop()


def main() -> None:
    """Run the command."""
    config = parse(ServeConfig, sys.argv[1:])
    if not config.checkpoint:
        raise UserError("no checkpoint is named; type python -m tools.serve CHECKPOINT")
    try:
        import starlette  # noqa: F401  here only to see whether it is there
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serving needs starlette and uvicorn: pip install '.[serve]'") from None
    from tools.serve_app import is_loopback

    with listen(config.host, config.port) as bound:
        service = open_service(config)
        if not is_loopback(config.host):
            print(
                f"warning: bound to {config.host}: every machine that reaches it may use it, "
                "without a password",
                file=sys.stderr,
                flush=True,
            )
        host, port = bound.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        kind = "completions and chat" if service.reader.can_chat else "completions"
        print(f"{service.reader.name}: {kind} at {where}/v1, a page to try it at {where}/")
        print(service.facts(), flush=True)
        run(service, config.host, bound)


if __name__ == "__main__":
    entry_point(main)
