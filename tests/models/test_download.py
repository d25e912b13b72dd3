"""Published weights: fetched once from a server that answers, kept only if whole, and no hub is asked twice."""

import hashlib
import http.server
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from potstill.errors import UsageError
from potstill.models import pretrained

CONTENT = b"weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()[:8]


class Server(http.server.BaseHTTPRequestHandler):
    requests: list[str]

    def do_HEAD(self):  # what `reachable` asks; any answer will do
        self.send_error(405)

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    handler = type("Handler", (Server,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        handler.address = f"http://127.0.0.1:{running.server_port}"
        yield handler
        running.shutdown()


def test_a_file_is_fetched_once(server, tmp_path):
    for _ in range(2):
        path = pretrained.download_from_url(f"{server.address}/net-{HASH}.pth", "the weights of 'net'")
        assert path == tmp_path / "hub" / "checkpoints" / f"net-{HASH}.pth"
        assert path.read_bytes() == CONTENT
    assert server.requests == [f"/net-{HASH}.pth"]


def test_a_file_with_another_hash_is_not_kept(server, tmp_path):
    with pytest.raises(UsageError, match="the download failed: invalid hash"):
        pretrained.download_from_url(f"{server.address}/net-00000000.pth", "the weights of 'net'")
    assert list(tmp_path.rglob("*.pth")) == []


def test_the_hub_is_asked_for_each_file_in_turn(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: True)
    asked = []

    def fetch(repository, file):
        asked.append((repository, file))
        if file == "b":
            return str(tmp_path / file)
        raise EntryNotFoundError("404") if file in "ac" else OSError("connection reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert pretrained.download_from_hub("owner/net", ["a", "b"], "the weights") == Path(tmp_path / "b")
    assert asked == [("owner/net", "a"), ("owner/net", "b")]
    with pytest.raises(UsageError, match="owner/net has none of the files a, c"):
        pretrained.download_from_hub("owner/net", ["a", "c"], "the weights")
    with pytest.raises(UsageError, match=r"the download failed: connection reset\.\n"):
        pretrained.download_from_hub("owner/net", ["d"], "the weights")


def test_importing_the_names_imports_neither_timm_nor_torchvision():
    program = (
        "import sys, potstill.models.factory as c, potstill.models.registry as n, potstill.models.model_file\n"
        "n.check_model('cifar/vgg8'); c.create_model('cifar/resnet8', 2, size=32)\n"
        "print([m for m in ('timm', 'torchvision', 'huggingface_hub') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
