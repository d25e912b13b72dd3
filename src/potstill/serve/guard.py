"""The gate before the application: who may ask, how much, how long, how many at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from potstill.serve.limits import HEADER, Limits
from potstill.serve.replies import HEADERS, Message, Receive, Send, refuse

App = Callable[[Any, Receive, Send], Awaitable[None]]
_LINGER = 1.0  # seconds for which the rest of a refused body is read: a client that is still sending sees the answer


class Guard:
    """ASGI middleware.

    Args:
        app: what answers.
        hosts: values of the Host header that are answered: any other is a name that somebody else controls.
        limits: see there.
    """

    def __init__(self, app: App, hosts: Iterable[str], limits: Limits) -> None:
        self.app, self.hosts, self.limits = app, frozenset(hosts), limits
        self.busy = 0

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here: the server answers 403
        wrong = self._stranger(scope)
        if wrong is not None:
            await self._refuse(receive, send, *wrong)
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

    def _stranger(self, scope: Any) -> tuple[int, str] | None:
        """Why this request is none of ours."""
        hosts, origins = _values(scope, b"host"), _values(scope, b"origin")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421, "this server does not answer to that Host; open it by the address that it printed"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "GET and POST are answered here"
        if origins != [f"http://{hosts[0]}"]:
            return 403, f"a POST needs the header Origin: http://{hosts[0]}"
        if _values(scope, HEADER) != ["1"]:
            return 403, "a POST needs the header X-Potstill: 1"
        return None

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        declared = _values(scope, b"content-length")
        if declared and (not declared[0].isdigit() or int(declared[0][:20]) > self.limits.body_bytes):
            await self._refuse(receive, send, 413, self._too_large())
            return
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                body = await self._body(receive)
        except TimeoutError:
            await refuse(send, 408, f"the request did not arrive within {self.limits.send_seconds:g} seconds")
            return
        except ConnectionResetError:
            return
        if body is None:
            await self._refuse(receive, send, 413, self._too_large())
            return
        await self._run(scope, body, receive, send)

    async def _run(self, scope: Any, body: bytes, receive: Receive, send: Send) -> None:
        begun, given = False, False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # nothing but the news that the client has gone
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def dressed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name.lower() for name, _ in message.get("headers", [])}
                message["headers"] = [*message.get("headers", []), *(h for h in HEADERS if h[0] not in own)]
            await send(message)

        try:
            async with asyncio.timeout(self.limits.answer_seconds + 1):  # the application has its own, shorter one
                await self.app(scope, replay, dressed)
        except TimeoutError:
            if not begun:
                await refuse(send, 503, f"no answer within {self.limits.answer_seconds:g} seconds; try again")

    async def _body(self, receive: Receive) -> bytes | None:
        """All of it; None where it is too large."""
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
        await refuse(send, status, message, more=True)
        try:
            async with asyncio.timeout(_LINGER):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b""})


def _values(scope: Any, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
