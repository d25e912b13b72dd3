"""Uvicorn's HTTP protocol with what it lacks: a time-out for the head of a request, and a cap on connections."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from potstill.serve.limits import Limits
from potstill.serve.replies import body_of


def bounded(limits: Limits) -> type[asyncio.Protocol]:
    """The protocol class for ``uvicorn.Config(http=...)``."""

    class Bounded(H11Protocol):
        """One connection."""

        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            """Refuse the connection where there are too many."""
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_raw(503, "Service Unavailable", "too many connections; try again in a moment"))
                transport.close()
            else:
                self._watch()

        def data_received(self, data: bytes) -> None:
            """Some bytes came."""
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            """The connection may be used for another request."""
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            """The connection is closed."""
            self._stop()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._clock is None:
                self._clock = self.loop.call_later(limits.send_seconds, self._too_slow)

        def _stop(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _too_slow(self) -> None:
            self._clock = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                said = f"the request's head did not arrive within {limits.send_seconds:g} seconds"
                self.transport.write(_raw(408, "Request Timeout", said))
                self.transport.close()

    return Bounded


def _raw(status: int, reason: str, message: str) -> bytes:
    body = body_of(message)
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
