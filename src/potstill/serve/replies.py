"""Answers that the guard gives itself: JSON with one sentence."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", _CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"cache-control", b"no-store"),
)


def body_of(message: str) -> bytes:
    """The JSON of an error."""
    return json.dumps({"error": message}, ensure_ascii=False).encode()


async def refuse(send: Send, status: int, message: str, *, closing: bool = True, more: bool = False) -> None:
    """Answer with an error.

    Args:
        send: of the ASGI server.
        status: of HTTP.
        message: one sentence.
        closing: end the connection afterwards: whatever still comes of the request is not read.
        more: leave the answer open, so that the caller can read on for a moment.
    """
    body = body_of(message)
    headers = [*HEADERS, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if closing:
        headers.append((b"connection", b"close"))
    if status in (429, 503):
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": more})
