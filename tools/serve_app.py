"""The HTTP side of the server: routes, limits, streams, and the thread that runs the batch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import json
import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from decoding.continuous import Batcher, Progress, Text
from decoding.sampling import inference
from tools.serve_requests import Answer, Ask, Body, Refused, RequestReader

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send

MOST_BYTES = 1 << 20  # of a body
DISCARDED = 64 << 20  # bytes of a larger body that are read, so that its sender hears why
# Seconds that a reader may take nothing of a stream, and in which the head of a request, and then
# its body, must arrive.
STALL = 60.0
PAGE = Path(__file__).with_name("serve_page.html")
# What a waiting request is told: steps of its texts, an error, or None when its reader has left.
Told = Progress | Refused | None


class Worker:
    """Runs the batch in a thread of its own. `deliver` is called there with what each step made,
    and with the texts that an error ended."""

    def __init__(
        self, batcher: Batcher, deliver: Callable[[list[tuple[Text, Progress | Refused]]], None]
    ):
        self.batcher, self.deliver = batcher, deliver
        self.inbox: queue.SimpleQueue[Sequence[Text] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="batch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its present step."""
        self.inbox.put(None)
        self.thread.join()

    def _run(self) -> None:
        with inference(self.batcher.model):
            while self._receive():
                try:
                    made = self.batcher.step()
                except Exception as error:  # a request must not end the server
                    traceback.print_exc()
                    sys.stderr.flush()
                    failed = Refused(f"the model failed: {type(error).__name__}", status=500)
                    self.deliver([(text, failed) for text in self.batcher.clear()])
                else:
                    self.deliver([(progress.text, progress) for progress in made])

    def _receive(self) -> bool:
        """Take what has come in, and wait if there is nothing to do. False: stop."""
        while self.batcher.idle or not self.inbox.empty():
            texts = self.inbox.get()
            if texts is None:
                return False
            self.batcher.add(texts)
        return True


class Service:
    """Admits requests, and passes on what the worker makes of them. Its methods run in the event
    loop.

    `told` has the texts of all requests that are not answered to the end. Their number is limited,
    which bounds the memory, however slowly readers read.
    """

    def __init__(self, batcher: Batcher, reader: RequestReader, most_waiting: int):
        self.batcher, self.reader = batcher, reader
        self.most_open = batcher.rows + most_waiting
        self.worker = Worker(batcher, self._deliver)
        self.told: dict[Text, asyncio.Queue[Told]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self.ending = False

    def facts(self) -> str:
        """A line about the sizes."""
        rows, waiting = self.batcher.rows, self.most_open - self.batcher.rows
        size = sum(t.nbytes for pair in self.batcher.slots.layers for t in pair) / 1e6
        return (
            f"up to {rows} texts at once, with a KV cache of {size:,.0f} MB, and {waiting} that "
            "wait; Ctrl-C ends"
        )

    def admit(self, ask: Ask) -> asyncio.Queue[Told]:
        """Let an ask's texts wait for the batch. Returns the queue that hears of them. Raises
        Refused if too many wait."""
        if self.ending:
            raise Refused("the server is stopping", status=503)
        if len(self.told) + len(ask.texts) > self.most_open:
            raise Refused("too many requests wait; try again soon", status=429)
        self.loop = asyncio.get_running_loop()
        told: asyncio.Queue[Told] = asyncio.Queue()
        self.told |= dict.fromkeys(ask.texts, told)
        self.worker.inbox.put(ask.texts)
        return told

    def release(self, ask: Ask) -> None:
        """Forget an ask. Texts that have not ended leave the batch."""
        for text in ask.texts:
            text.dropped = True
            self.told.pop(text, None)

    def end(self) -> None:
        """End all requests with an error."""
        for told in self.told.values():
            told.put_nowait(Refused("the server is stopping", status=503))

    def _deliver(self, made: list[tuple[Text, Progress | Refused]]) -> None:
        """Called in the worker's thread."""
        if made and self.loop:
            with contextlib.suppress(RuntimeError):  # the loop is closed when the server has ended
                self.loop.call_soon_threadsafe(self._tell, made)

    def _tell(self, made: list[tuple[Text, Progress | Refused]]) -> None:
        for text, what in made:
            if text in self.told:
                self.told[text].put_nowait(what)


async def watch(receive: Receive, told: asyncio.Queue[Told]) -> None:
    """Tell a request's queue when its reader has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    told.put_nowait(None)


async def whole_answer(service: Service, ask: Ask, receive: Receive) -> Body | None:
    """The body of the answer when all texts have ended; None if the reader has left."""
    told = service.admit(ask)
    answer = Answer(ask, service.reader.name, service.reader.tokenizer)
    watcher = asyncio.create_task(watch(receive, told))
    try:
        while not answer.complete:
            what = await told.get()
            if what is None:
                return None
            if isinstance(what, Refused):
                raise what
            answer.add(what)
    finally:
        watcher.cancel()
        service.release(ask)
    return answer.whole()


class Stream:
    """A response of server-sent events. What has come while the reader was slow is sent at
    once."""

    def __init__(self, service: Service, ask: Ask):
        self.service, self.ask = service, ask
        self.told = service.admit(ask)
        self.answer = Answer(ask, service.reader.name, service.reader.tokenizer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call."""
        watcher = asyncio.create_task(watch(receive, self.told))
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            events, more = events_of(self.answer.first_chunks()), True
            while more:
                if events:
                    await self._send(send, events, True)
                events, more = await self._next()
            await self._send(send, events, False)
        except (TimeoutError, OSError):
            pass  # the reader stalled or left
        finally:
            watcher.cancel()
            self.service.release(self.ask)

    async def _next(self) -> tuple[bytes, bool]:
        """The events of what has come, and whether more will."""
        chunks: list[Body | None] = []
        what = await self.told.get()
        while True:
            if what is None:
                raise TimeoutError
            if isinstance(what, Refused):
                return events_of([*chunks, what.body()]), False
            chunks.append(self.answer.chunk(what))
            if self.answer.complete:
                return events_of([*chunks, *self.answer.last_chunks()]) + b"data: [DONE]\n\n", False
            if self.told.empty():
                return events_of(chunks), True
            what = self.told.get_nowait()

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await asyncio.wait_for(send(message), STALL)


def events_of(chunks: Sequence[Body | None]) -> bytes:
    """Server-sent events."""
    return b"".join(b"data: " + json_of(chunk) + b"\n\n" for chunk in chunks if chunk)


def json_of(body: Any) -> bytes:
    """JSON in ASCII, so that a lone surrogate that a client sent cannot break it."""
    return json.dumps(body, separators=(",", ":")).encode()


async def read_body(request: Request) -> bytes:
    """The body. Raises Refused if it is too large or too slow."""
    try:
        async with asyncio.timeout(STALL):
            return await _read_body(request)
    except TimeoutError:
        raise Refused(f"the body did not arrive in {STALL:g} seconds", status=408) from None


async def _read_body(request: Request) -> bytes:
    refused = Refused(f"the body is larger than {MOST_BYTES:,} bytes", status=413)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > DISCARDED:
        raise refused
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            parts.append(part)
        elif size > DISCARDED:
            raise refused
    if size > MOST_BYTES:
        raise refused
    return b"".join(parts)


def check_origin(request: Request, host: str) -> None:
    """Raise Refused for a request that another site's page makes the browser send. On the loopback
    interface the name in the request must be a loopback name too."""
    named = request.headers.get("host", "")
    origin = request.headers.get("origin")
    try:
        page, name = urlsplit(origin or "").netloc, urlsplit(f"//{named}").hostname or ""
    except ValueError:
        raise Refused("the header Host or Origin is no address", status=403) from None
    if origin is not None and page != named:
        raise Refused("this server answers no pages of other sites", status=403)
    if is_loopback(host) and not is_loopback(name):
        raise Refused(f"this server is not called {named[:60]!r}", status=403)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def application(service: Service, host: str, created: int) -> Starlette:
    """The ASGI application. `host` is the address that it is bound to."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    reader = service.reader
    model = {"id": reader.name, "object": "model", "created": created, "owned_by": "local"}

    def answered(body: Body, status: int = 200, **headers: str) -> Response:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return Response(json_of(body), status, more, "application/json")

    def refusal(error: Refused) -> Response:
        more = {"retry_after": "1"} if error.status in (429, 503) else {}
        more |= {"connection": "close"} if error.status == 408 else {}  # its body may still come
        return answered(error.body(), error.status, **more)

    def guarded(
        endpoint: Callable[[Request], Awaitable[Any]],
    ) -> Callable[[Request], Awaitable[Any]]:
        @functools.wraps(endpoint)
        async def call(request: Request) -> Any:
            try:
                check_origin(request, host)
                return await endpoint(request)
            except Refused as error:
                return refusal(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                print(f"{request.url.path}: {error!r}", file=sys.stderr, flush=True)
                return refusal(Refused("the server failed", status=500))

        return call

    async def generate(request: Request) -> Any:
        raw = await read_body(request)
        is_chat = request.url.path.endswith("/chat/completions")
        ask = await asyncio.to_thread(reader.read, raw, is_chat)
        if ask.stream:
            return Stream(service, ask)
        body = await whole_answer(service, ask, request.receive)
        return Response(status_code=499) if body is None else answered(body)

    async def models(request: Request) -> Response:
        return answered({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        if (name := request.path_params["name"]) != reader.name:
            raise Refused(f"there is no model {name[:60]} here", "model", "model_not_found", 404)
        return answered(model)

    async def health(request: Request) -> Response:
        state = {"status": "stopping" if service.ending else "ok", "open": len(service.told)}
        rows = {"batch": len(service.batcher.batch), "chat": reader.can_chat}
        return answered({**state, **rows, "model": reader.name})

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_bytes())

    async def no_route(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = f"{request.method} {request.url.path[:100]} is not served here"
        return refusal(Refused(text, status=status))

    post, get = ["POST"], ["GET"]
    routes = [
        Route("/v1/completions", guarded(generate), methods=post),
        Route("/v1/chat/completions", guarded(generate), methods=post),
        Route("/v1/models", guarded(models), methods=get),
        Route("/v1/models/{name:path}", guarded(one_model), methods=get),
        Route("/health", guarded(health), methods=get),
        Route("/", guarded(page), methods=get),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: no_route})
