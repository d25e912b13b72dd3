"""Guarantee G16 against a real server on loopback."""

import json
import os
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .conftest import png, read_all

httpx = pytest.importorskip("httpx", reason="needs httpx")


def post(server, body, **more):
    return httpx.post(f"{server.url}/predict", content=body, headers={**server.headers, **more}, timeout=20)


def healthy(server):
    """Answers while others are slow: less than ``answer_seconds``, and enough for a busy machine."""
    return httpx.get(f"{server.url}/healthz", timeout=5).json() == {"status": "ok"}


def status(answer: bytes) -> int:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]
    return int(head.split()[1])


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST:{port}", 200),
        ("[::1]:{port}", 200),
        ("127.0.0.1", 421),
        ("127.0.0.1:1", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example:{port}", 421),
        ("localhost:{port}@evil.example", 421),
        ("0.0.0.0:{port}", 421),
        ("", 421),
    ],
)
def test_hosts(server, host, expected):
    answer = httpx.get(f"{server.url}/models", headers={"Host": host.format(port=server.port)})
    assert answer.status_code == expected
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("origin", "custom", "expected"),
    [
        ("http://127.0.0.1:{port}", "1", 200),
        ("http://localhost:{port}", "1", 403),  # not the Host that was asked
        ("https://127.0.0.1:{port}", "1", 403),
        ("http://127.0.0.1", "1", 403),
        ("http://evil.example", "1", 403),
        ("null", "1", 403),
        (None, "1", 403),
        ("http://127.0.0.1:{port}", None, 403),
        ("http://127.0.0.1:{port}", "2", 403),
    ],
)
def test_origins(server, origin, custom, expected):
    headers = {"Content-Type": "image/png"}
    if origin is not None:
        headers["Origin"] = origin.format(port=server.port)
    if custom is not None:
        headers["X-Potstill"] = custom
    assert httpx.post(f"{server.url}/predict", content=png(), headers=headers, timeout=20).status_code == expected


def test_two_hosts_are_none(server):
    answer = server.raw(f"GET /models HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil\r\n\r\n".encode())
    assert b" 400 " in answer.partition(b"\r\n")[0]  # h11 knows


def test_too_large(server):
    assert post(server, bytes(10_000_001)).status_code == 413
    assert post(server, iter([bytes(1_000_000)] * 11)).status_code == 413  # chunked: nothing was declared
    assert post(server, bytes(9_999_999)).status_code == 415  # as large as may be, but no image
    assert healthy(server)


def test_too_many_pixels(server):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 1_001, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    answer = post(server, bomb)
    assert answer.status_code == 413
    assert "megapixels" in answer.json()["error"]


def head(server, more: str) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
    return f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n{lines}{more}\r\n\r\n".encode()


def test_slow_bodies_and_heads(server):
    sent = (
        head(server, "Content-Length: 1000") + b"abc",  # says more than it sends
        head(server, "Transfer-Encoding: chunked") + b"3\r\nabc\r\n",  # never ends
        b"GET / HTTP/1.1\r\nHost: 127",
        b"",
    )
    links = [server.connect() for _ in sent]
    for link, first in zip(links, sent, strict=True):
        link.sendall(first)
    assert healthy(server)
    answers = [read_all(link) for link in links]
    for link in links:
        link.close()
    assert [status(answer) for answer in answers] == [408] * 4


def test_a_trickle_is_slow_as_well(server):
    with server.connect() as link:
        link.sendall(head(server, "Content-Length: 1000"))
        for _ in range(12):
            try:
                link.sendall(b"x")
            except OSError:
                break
            time.sleep(0.2)
        assert status(read_all(link)) == 408


def test_a_silent_connection_after_an_answer_is_closed(server):
    with server.connect() as link:
        link.sendall(f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert b" 200 " in link.recv(65536)
        link.sendall(b"GET /")
        read_all(link)  # ends, rather than times out


def test_too_many_at_a_time(server):
    for _ in range(20):  # on a busy machine the first of them may be too slow before the last has arrived
        links = [server.connect() for _ in range(8)]
        for link in links:
            link.sendall(head(server, "Content-Length: 1000"))
        time.sleep(0.3)
        code = post(server, png()).status_code
        assert healthy(server)
        for link in links:
            link.close()
        if code == 429:
            break
        assert code in (200, 503)
    assert code == 429


def children(pid: int) -> list[int]:
    path = f"/proc/{pid}/task/{pid}/children"
    if not os.path.exists(path):
        pytest.skip("needs /proc to find the child")
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += [int(each) for each in file.read().split()]
    return [each for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_child_is_replaced(server, how):
    (child,) = children(server.pid)
    os.kill(child, how)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, server, png())
        assert healthy(server)
        assert waiting.result().status_code == 503
    for _ in range(600):  # the new one imports torch
        answer = post(server, png())
        if answer.status_code == 200:
            break
        assert answer.status_code == 503
        time.sleep(0.5)
    assert answer.status_code == 200
    assert children(server.pid) != [child]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/static/page.js",
        "/runs/..%2f..%2fetc",
        "/runs/../made/recipe.yaml",
        "/runs/made%2f..%2flive",
        "/page.js/..",
        "/runs/%00",
        "/docs",
        "/redoc",
        "//etc/passwd",
    ],
)
def test_no_path_from_a_request(server, path):
    answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
    assert status(answer) == 404


@pytest.mark.slow
def test_a_hundred_slow_sockets_and_two_hundred_requests(server):
    links = [server.connect() for _ in range(100)]
    for link in links:
        link.sendall(b"POST /predict HTTP/1.1\r\n")
    with ThreadPoolExecutor(200) as pool:
        found = [pool.submit(post, server, png(seed=i)) for i in range(200)]
        while not all(each.done() for each in found):
            assert healthy(server)  # within its one second
            time.sleep(0.1)
    counts = {each.result().status_code for each in found}
    assert 200 in counts
    assert counts <= {200, 429, 503}
    for link in links:
        assert status(read_all(link)) == 408
        link.close()


def test_it_listens_on_loopback_alone(server):
    try:
        outside = socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip("this machine has no name")
    if outside.startswith("127."):
        pytest.skip("this machine has no other address")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((outside, server.port), timeout=2)
