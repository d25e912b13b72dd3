"""Limits of the server on origin, size, time and number of requests.

An ASGI middleware, and Uvicorn's HTTP protocol with a time-out for the head of a request and a cap on connections.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUIRED_HEADER = b"x-potstill"  # scripts of other sites cannot send it without a CORS preflight, which is refused


@dataclass(frozen=True)
class ServerLimits:
    """Seconds, bytes and counts; ``/healthz`` is exempt from the parallel ones."""

    body_bytes: int = 10_000_000
    send_seconds: float = 10.0  # for a request's head, and again for its body
    answer_seconds: float = 10.0  # from the end of the body to the first byte of the response
    parallel: int = 32  # requests at a time
    connections: int = 512  # open sockets
    load_seconds: float = 120.0  # for the worker to load the models


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
)


def error_body(message: str) -> bytes:
    """Return the JSON of an error."""
    return json.dumps({"error": message}, ensure_ascii=False).encode()


async def send_error(send: Send, status: int, message: str, *, more: bool = False) -> None:
    """Send an error response, and close the connection (unless ``more``) without reading the rest of the request."""
    body = error_body(message)
    headers = [*SECURITY_HEADERS, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))
    if status in (429, 503):
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})


ASGIApp = Callable[[Any, Receive, Send], Awaitable[None]]
_DRAIN_SECONDS = 1.0  # for reading the rest of a refused body, so that a client still sending gets the response


class RequestGuardMiddleware:
    """ASGI middleware that enforces the limits; ``hosts``: allowed Host headers, against DNS rebinding."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], limits: ServerLimits) -> None:
        self.app, self.hosts, self.limits = app, frozenset(hosts), limits
        self.busy = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here: the server answers 403
        rejection = self._rejection(scope)
        if rejection is not None:
            await self._refuse(receive, send, *rejection)
        elif scope["path"] == "/healthz":
            await self._answer(scope, receive, send)
        elif self.busy >= self.limits.parallel:
            await self._refuse(receive, send, 429, f"{self.busy} requests are being answered; try again in a moment")
        else:
            self.busy += 1
            try:
                await self._answer(scope, receive, send)
            finally:
                self.busy -= 1

    def _rejection(self, scope: Any) -> tuple[int, str] | None:
        hosts, origins = _header_values(scope, b"host"), _header_values(scope, b"origin")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "this server does not answer to that Host; open it by the address that it printed"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "GET and POST are answered here"
        if origins != [f"http://{hosts[0]}"]:
            return 403, f"a POST needs the header Origin: http://{hosts[0]}"
        if _header_values(scope, REQUIRED_HEADER) != ["1"]:
            return 403, "a POST needs the header X-Potstill: 1"
        return None

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        declared = _header_values(scope, b"content-length")
        if declared and (not declared[0].isdigit() or int(declared[0][:20]) > self.limits.body_bytes):
            await self._refuse(receive, send, 413, self._too_large())
            return
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                body = await self._body(receive)
        except TimeoutError:
            await send_error(send, 408, f"the request did not arrive within {self.limits.send_seconds:g} seconds")
            return
        except ConnectionResetError:
            return
        if body is None:
            await self._refuse(receive, send, 413, self._too_large())
            return
        await self._run(scope, body, receive, send)

    async def _run(self, scope: Any, body: bytes, receive: Receive, send: Send) -> None:
        started, delivered = False, False

        async def replay() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()  # only a disconnect can follow
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = {name.lower() for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(h for h in SECURITY_HEADERS if h[0] not in own)]
            await send(message)

        try:
            async with asyncio.timeout(self.limits.answer_seconds + 1):  # the application has a shorter time-out
                await self.app(scope, replay, send_with_headers)
        except TimeoutError:
            if not started:
                await send_error(send, 503, f"no answer within {self.limits.answer_seconds:g} seconds; try again")

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body; None if it is too large."""
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.limits.body_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(chunks)

    def _too_large(self) -> str:
        return f"an image may have {self.limits.body_bytes // 1_000_000} MB"

    async def _refuse(self, receive: Receive, send: Send, status: int, message: str) -> None:
        await send_error(send, status, message, more=True)
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def _header_values(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def limited_protocol(limits: ServerLimits) -> type[asyncio.Protocol]:
    """Return the protocol class for ``uvicorn.Config(http=...)``."""

    class LimitedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(
                    _raw_response(503, "Service Unavailable", "too many connections; try again in a moment")
                )
                transport.close()
            else:
                self._update_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_timer()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._update_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _update_timer(self) -> None:
            if self.conn.their_state is not h11.IDLE:
                self._stop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(limits.send_seconds, self._time_out)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _time_out(self) -> None:
            self._timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                message = f"the request's head did not arrive within {limits.send_seconds:g} seconds"
                self.transport.write(_raw_response(408, "Request Timeout", message))
                self.transport.close()

    return LimitedProtocol


def _raw_response(status: int, reason: str, message: str) -> bytes:
    body = error_body(message)
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
