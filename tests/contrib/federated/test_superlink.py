"""Server and clients as processes of their own, through a real SuperLink on loopback; one of them is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.contrib.federated.federation import RESULTS_FILE
from potstill.contrib.federated.flower import write_app
from potstill.errors import ArtifactError
from potstill.io import read_checksummed_json

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (210, 40, 30)}
PATIENCE = 400  # seconds for anything that is waited for


@pytest.fixture
def flower(tmp_path):
    """SuperLink and SuperNodes; everything that was started is ended."""
    pytest.importorskip("flwr", reason="needs the extra federated")
    places = Places(tmp_path)
    yield places
    places.end()


class Places:
    def __init__(self, root: Path) -> None:
        self.root, self.started, self.killed = root, {}, []
        self.port = free_port()
        home = root / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.environment = os.environ | {
            "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "POTSTILL_CACHE": str(root / "cache"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip

    def start(self, name: str, *command: str) -> None:
        with (self.root / f"{name}.log").open("wb") as log:
            self.started[name] = subprocess.Popen(
                command, cwd=self.root, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def superlink(self, *flags: str) -> None:
        self.start(
            "superlink", "flower-superlink", "--insecure", "--port", str(self.port),
            "--disable-runtime-dependency-installation", *flags,
        )  # fmt: skip
        self.until(lambda: "running on" in self.log("superlink"))

    def supernode(self, name: str) -> None:
        config = f'folder="{self.root / name}"'
        self.start(
            name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(free_port()), "--node-config", config,
        )  # fmt: skip

    def run(self, *flags: str, **config: object) -> None:
        settings = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in config.items())
        self.start(str(config["name"]), "flwr", "run", "app", "here", "--run-config", settings, "--stream", *flags)

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def until(self, there) -> None:
        end = time.monotonic() + PATIENCE
        while not there():
            failed = any(process.poll() for process in self.started.values() if process not in self.killed)
            logs = "\n".join(f"{name}\n{self.log(name)[-3000:]}" for name in self.started)
            assert not failed, logs
            assert time.monotonic() < end, logs
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """The machine is gone: the node and what it has started."""
        self.killed.append(self.started[name])
        os.killpg(self.started[name].pid, signal.SIGKILL)

    def end(self) -> None:
        for process in self.started.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            finally:
                process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def write_images(folder: Path, each: int, seed: int, *, classes: bool = True) -> None:
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        place = folder / name if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = random.normal(colour, 60, (16, 16, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{name}-{seed}-{i}.png")


def record(root: Path, name: str):
    try:
        return read_checksummed_json(root / "runs" / name / RESULTS_FILE)
    except ArtifactError:  # not written yet
        return {}


def test_two_clients_and_then_one_that_is_killed(flower) -> None:
    for at, name in enumerate(("server", "one", "two")):
        write_images(flower.root / name, 12, at)
    write_images(flower.root / "public", 4, 9, classes=False)
    write_app(flower.root / "app", "quickstart")
    flower.superlink()
    flower.supernode("one")
    flower.supernode("two")
    asked = {
        "data": str(flower.root / "server"), "output_dir": str(flower.root / "runs"), "rounds": 2,
        "settings": f"data.size=8 data.unlabeled={flower.root / 'public'} training.threads=1 training.batch_size=8",
    }  # fmt: skip

    flower.run(**asked, name="both", algorithms="feddf")
    flower.until(lambda: "feddf" in record(flower.root, "both").get("trained", {}))
    found = record(flower.root, "both")
    assert [each["images"] for each in found["clients"]] == [36, 36]
    rounds = found["trained"]["feddf"]["rounds"]
    assert [each["failed"] for each in rounds] == [{}, {}]
    assert [each["clients"] for each in rounds] == [[0, 1], [0, 1]]

    many = asked | {"rounds": 2, "timeout": 90.0}
    flower.run(**many, name="one-dies", algorithms="fedavg")
    rounds_of = flower.root / "runs" / "one-dies" / "fedavg" / "rounds.checkpoint"
    flower.until(rounds_of.exists)  # the first round is done
    flower.kill("two")
    flower.until(lambda: "fedavg" in record(flower.root, "one-dies").get("trained", {}))
    rounds = record(flower.root, "one-dies")["trained"]["fedavg"]["rounds"]
    assert len(rounds) == 2
    assert len(rounds[0]["clients"]) == 2
    assert len(rounds[-1]["clients"]) == 1
    assert any(each["failed"] for each in rounds)
    assert (flower.root / "runs" / "one-dies" / "fedavg" / "model.safetensors").exists()


def test_flowers_simulation_on_one_machine(flower) -> None:
    pytest.importorskip("ray", reason="needs flwr[simulation]")
    for at, name in enumerate(("server", "clients/one", "clients/two")):
        write_images(flower.root / name, 12, at)
    write_app(flower.root / "app", "quickstart")
    flower.superlink("--simulation")
    flower.run(
        "--federation-config", "num-supernodes=2",
        name="simulated", algorithms="fedavg", rounds=2, data=str(flower.root / "server"),
        output_dir=str(flower.root / "runs"), settings="data.size=8 training.threads=1 training.batch_size=8",
        simulated_clients=str(flower.root / "clients"),
    )  # fmt: skip
    flower.until(lambda: "fedavg" in record(flower.root, "simulated").get("trained", {}))
    found = record(flower.root, "simulated")
    assert [each["images"] for each in found["clients"]] == [36, 36]
    assert [each["clients"] for each in found["trained"]["fedavg"]["rounds"]] == [[0, 1], [0, 1]]
