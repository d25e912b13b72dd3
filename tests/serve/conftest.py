"""A run of small untrained networks with hostile class names, and a server that answers for it."""

import json
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs fastapi: potstill[serve]")
pytest.importorskip("uvicorn", reason="needs uvicorn: potstill[serve]")

import torch
from PIL import Image

from potstill.input_spec import InputSpec
from potstill.io import write_checksummed_text
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, save_model

HOSTILE = "<img src=x onerror=document.title='owned'>"
CLASSES = ("cat", HOSTILE, "=1+1\u202e")
SERVE = """
import sys
from pathlib import Path
from potstill.serve.middleware import ServerLimits
from potstill.serve.server import serve

if __name__ == "__main__":
    limits = ServerLimits(**eval(sys.argv[3], {}))
    say = lambda text: print(text, flush=True)
    serve(Path(sys.argv[1]), host="127.0.0.1", port=0, output_dir=Path(sys.argv[2]), on_start=say, limits=limits)
"""


def png(width=40, height=30, seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Server:
    """A running one."""

    port: int
    pid: int

    @property
    def headers(self) -> dict[str, str]:
        origin = f"http://127.0.0.1:{self.port}"
        return {"Origin": origin, "X-Potstill": "1", "Content-Type": "application/octet-stream"}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, sent: bytes, *, wait: float = 60.0) -> bytes:
        """All that comes back for these bytes until the server closes."""
        with self.connect(wait) as link:
            link.sendall(sent)
            return read_all(link)

    def connect(self, wait: float = 60.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=wait)


def read_all(link: socket.socket) -> bytes:
    got = b""
    try:
        while piece := link.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


@pytest.fixture(scope="session")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``made``, with three models, and ``live``, which is training."""
    root = tmp_path_factory.mktemp("root")
    spec = InputSpec(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for seed, stage in enumerate(("teacher", "baseline", "distilled")):
        torch.manual_seed(seed)
        network = create_model("cifar/resnet8", 3, size=16).eval()
        save_model(Classifier(network, "cifar/resnet8", CLASSES, spec), root / "made" / stage)
    recipe = "training: {epochs: 10}\nteacher: {training: {epochs: 4}}\n"
    write_checksummed_text(root / "made" / "recipe.yaml", recipe)
    (root / "made" / "report.html").write_text("<!doctype html><title>report</title><script>1</script>")
    write_checksummed_text(root / "live" / "recipe.yaml", recipe)
    for stage, count in (("teacher", 4), ("distilled", 3)):
        (root / "live" / stage).mkdir()
        lines = [json.dumps(epoch(number + 1)) for number in range(count)]
        (root / "live" / stage / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 9, "sec']))
    (root / "live" / "teacher" / "model.json").write_text("{}")
    an_hour_from_now = time.time() + 3600  # without a new epoch for two minutes it would have stopped
    os.utime(root / "live" / "recipe.yaml", (an_hour_from_now, an_hour_from_now))
    return root


def epoch(number: int) -> dict[str, object]:
    figures = {"loss": 1 / number, "top1": 1 - 1 / (1 + number)}
    return {"epoch": number, "seconds": 2.0, "train": figures, "val": figures}


def start(root: Path, log: Path, **limits: float) -> tuple[subprocess.Popen[bytes], Server]:
    script = log.with_suffix(".py")
    script.write_text(SERVE)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), str(root / "made"), str(root), repr(limits)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ)
        assert waiting.select(timeout=600), "the server did not start"
    line = process.stdout.readline().decode()
    found = re.search(r":(\d+)/", line)
    assert found, log.read_text()
    return process, Server(int(found[1]), process.pid)


@pytest.fixture(scope="session")
def server(runs_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """With short times, so that the tests are short."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    process, found = start(runs_folder, log, send_seconds=1.5, answer_seconds=6.0, parallel=8)
    yield found
    process.terminate()
    process.wait(120)
    process.stdout.close()
    assert "Traceback" not in log.read_text(), log.read_text()
