"""The server's connections: uvicorn's, with a limit on the time that a request may take to arrive.

uvicorn limits only the pause between two requests. Without more, senders that give a byte now and
then would hold all connections that the server allows.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tools import serve_app


class PromptConnection(H11Protocol):
    """Closes the connection if the head of a request, or its body, takes too long to arrive."""

    timer: asyncio.TimerHandle | None = None
    waits_for: Any = None  # the state of the sender that the timer limits

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Called by asyncio."""
        super().connection_made(transport)
        self._limit()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        self._limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        super().connection_lost(exc)
        self._stop()

    def _limit(self) -> None:
        """Start the time of what the sender owes, unless it runs already."""
        state = self.conn.their_state
        if state is self.waits_for:
            return
        self._stop()
        self.waits_for = state
        # A body that is read is refused first, by read_body. This is for those that nobody reads.
        seconds = {h11.IDLE: serve_app.STALL, h11.SEND_BODY: 2 * serve_app.STALL}.get(state)
        if seconds:
            self.timer = self.loop.call_later(seconds, self.transport.close)

    def _stop(self) -> None:
        if self.timer:
            self.timer.cancel()
