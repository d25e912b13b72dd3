"""G14: a run of several processes ends as a whole, says which of them was lost, and goes on where it was.

Real commands under torchrun, two gloo processes; time-outs are 6 seconds in place of ten minutes.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from potstill.deploy.evaluate import evaluate

RECIPE = """
name: tiny
data: {{source: "{source}", size: 16, workers: 0, augment: {{hflip: true}}}}
teacher: {{model: cifar/resnet8, training: {{epochs: 3}}}}
student: {{model: cifar/resnet8}}
method: {{name: kd, temperature: 2.0, alpha: 0.5}}
store: {{views: 2}}
training: {{epochs: 6, batch_size: 16, lr: 0.003, precision: float32, checkpoint_seconds: 0.001, threads: 1}}
"""
STAGES = ("teacher", "baseline", "distilled")
LONG, SOON = 120, 15  # seconds: to whatever end; until all are gone
GO_ON = "What was saved is intact: start all again, with --resume"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a recipe."""
    folder = tmp_path_factory.mktemp("several")
    random = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.clip(random.normal(level, 50, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:02d}.png")
    (folder / "tiny.yaml").write_text(RECIPE.format(source=folder / "images"))
    return folder


class Started:
    """torchrun and its processes, in a session of their own."""

    def __init__(self, place, name, *flags, options=(), what=("-m", "potstill"), verb="run", before=()):
        self.folder = place / "runs" / name
        environment = os.environ | {
            "POTSTILL_CACHE": str(place / f"cache-{name}"), "OMP_NUM_THREADS": "1", "POTSTILL_TIMEOUT": "6",

        }  # fmt: skip
        run = [verb, str(place / "tiny.yaml"), "--root", str(place / "runs"), "--name", name, *flags]
        launcher = [sys.executable, "-m", "torch.distributed.run", *(options or ("--nproc-per-node", "2"))]
        self.process = subprocess.Popen(
            [*before, *launcher, *what, *run],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    @property
    def ranks(self):
        """Process ids, in the order of their start."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def wait_for_checkpoint(self):
        """Until some training has been saved; the processes that train."""
        since = time.monotonic()
        while not list(self.folder.glob("*/checkpoints/last.checkpoint")):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() - since < LONG
            time.sleep(0.02)
        return self.ranks

    def end(self, ranks=()):
        """The status, the errors that potstill has said, and how many seconds it took until all were gone."""
        since = time.monotonic()
        _, errors = self.process.communicate(timeout=LONG)
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() - since < LONG, "a process was left behind"
            time.sleep(0.05)
        said = errors.split("error: ")[1:]
        return self.process.returncode, ["\n".join(text.splitlines()[:2]) for text in said], time.monotonic() - since


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def weights(place, name):
    return [(place / "runs" / name / stage / "model.safetensors").read_bytes() for stage in STAGES]


@pytest.fixture(scope="module")
def whole(place):
    """The weights of a run that nothing happened to."""
    started = Started(place, "whole")
    status, errors, _ = started.end()
    assert (status, errors) == (0, [])
    return weights(place, "whole")


def go_on(place, name, whole):
    status, errors, _ = Started(place, name, "--resume").end()
    assert (status, errors) == (0, [])
    assert weights(place, name) == whole


def test_figures_are_those_of_a_single_process(place, whole):
    """The same weights, asked by one process: every figure on test."""
    results = json.loads((place / "runs" / "whole" / "results.json").read_text())["stages"]
    for stage in STAGES:
        single = evaluate(place / "runs" / "whole" / stage, str(place / "images"), device="cpu")
        for name, value in results[stage]["test"].items():
            if name in single:
                assert value == pytest.approx(single[name], rel=1e-4), (stage, name)
    environment = json.loads((place / "runs" / "whole" / "environment.json").read_text())
    assert environment["processes"] == 2


def test_told_to_stop_all_save_and_go_on(place, whole):
    started = Started(place, "told")
    ranks = started.wait_for_checkpoint()
    started.process.terminate()
    status, errors, seconds = started.end(ranks)
    assert status != 0
    assert seconds < SOON
    assert errors[0].startswith("interrupted; a run goes on from its last checkpoint with --resume")
    assert len(errors) == 1
    go_on(place, "told", whole)


def test_a_killed_process_is_named(place, whole):
    started = Started(place, "killed")
    ranks = started.wait_for_checkpoint()
    os.kill(ranks[1], signal.SIGKILL)
    status, errors, seconds = started.end(ranks)
    assert status != 0
    assert seconds < SOON
    said = f"rank 1 of 2 (process {ranks[1]} on {socket.gethostname()}) does not answer: it has died, or is stopped."
    assert errors == [f"{said}\n{GO_ON}"]
    go_on(place, "killed", whole)


@pytest.mark.slow
def test_a_stopped_process_is_named_and_ended(place):
    """SIGSTOP: nothing of it runs, so the other one ends it."""
    started = Started(place, "stopped")
    ranks = started.wait_for_checkpoint()
    os.kill(ranks[0], signal.SIGSTOP)
    status, errors, seconds = started.end(ranks)
    assert status != 0
    assert seconds < SOON
    who = f"rank 0 of 2 (process {ranks[0]} on {socket.gethostname()})"
    assert errors == [f"{who} does not answer: it has died, or is stopped.\n{GO_ON}"]


def test_a_hanging_process_is_named_and_ended(place):
    """It lives, but does not get on."""
    started = Started(place, "hangs", what=(Path(__file__).parent / "faulty.py", "hang", "4"))
    ranks = started.wait_for_checkpoint()
    status, errors, seconds = started.end(ranks)
    assert status != 0
    assert seconds < 6 + SOON
    assert len(errors) == 1
    assert errors[0].startswith("rank 1 of 2 (process ")
    assert "does not answer: it stands still after " in errors[0]


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        pytest.param(
            "bug",
            "this is a bug in potstill; please report it with the lines above and the command",
            marks=pytest.mark.slow,
        ),
        ("data", "rank 1 of 2: photographs/cat.png can no longer be read"),
    ],
)
def test_an_error_of_one_process_ends_all(place, mistake, said):
    started = Started(place, mistake, what=(Path(__file__).parent / "faulty.py", mistake, "4"))
    ranks = started.wait_for_checkpoint()
    status, errors, seconds = started.end(ranks)
    assert status != 0
    assert seconds < SOON
    assert said in [text.splitlines()[0] for text in errors]


def test_nobody_outlives_the_launcher(place, whole):
    started = Started(place, "orphans")
    ranks = started.wait_for_checkpoint()
    os.kill(started.process.pid, signal.SIGKILL)
    _, _, seconds = started.end(ranks)
    assert seconds < SOON
    go_on(place, "orphans", whole)


@pytest.mark.slow
def test_torchrun_starts_a_lost_run_again(place, whole):
    """With --max-restarts it goes on by itself, from the last checkpoint."""
    started = Started(place, "restarted", options=("--nproc-per-node", "2", "--max-restarts", "1"))
    ranks = started.wait_for_checkpoint()
    os.kill(ranks[1], signal.SIGKILL)
    status, _, _ = started.end(ranks)
    assert status == 0
    assert weights(place, "restarted") == whole


def test_a_mistake_of_all_is_said_once(place):
    started = Started(place, "mistaken", "--set", "method.name=kid")
    status, errors, _ = started.end()
    assert status != 0
    assert len(errors) == 1
    assert "kid" in errors[0]
    assert not started.folder.exists()


def test_what_several_processes_cannot_share_is_refused(place):
    for changes, said in [
        (["method={name: crd}"], "CRD remembers every training image"),
        (["training.batch_size=3"], "a batch of 3 is too small"),
    ]:
        flags = [part for change in changes for part in ("--set", change)]
        started = Started(place, "refused", *flags)
        _, errors, _ = started.end()
        assert len(errors) == 1
        assert said in errors[0], errors


def test_only_trainings_are_shared(place):
    started = Started(place, "verb", verb="report")
    _, errors, _ = started.end()
    assert "torchrun has started `potstill report` 2 times; only run and train share their work" in errors[0]


@pytest.fixture
def two_machines():
    """Two network namespaces joined by a cable: what each prefixes its commands with, and its interface."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the program ip")
    names, made = [f"potstill-{os.getpid()}-{i}" for i in range(2)], []
    links = [f"ps{os.getpid() % 100000}{i}" for i in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("network namespaces cannot be made here")
            made.append(name)
        commands = [["link", "add", links[0], "type", "veth", "peer", "name", links[1]]]
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            commands += [
                ["link", "set", link, "netns", name],
                ["-n", name, "addr", "add", f"10.87.65.{i + 1}/24", "dev", link],
                ["-n", name, "link", "set", link, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ]
        for command in commands:
            done = subprocess.run(["ip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"virtual cables cannot be made here: {done.stderr.strip()}")
        yield [
            ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={link}"]
            for name, link in zip(names, links, strict=True)
        ]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_two_machines_are_as_two_processes(place, whole, two_machines):
    """Of the same kind, with a root that both see: the same weights."""
    ends = []
    for node, before in enumerate(two_machines):
        options = ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1")
        where = ("--master-addr", "10.87.65.1", "--master-port", "29511")
        ends.append(Started(place, "far", options=(*options, *where), before=before))
    for started in ends:
        status, errors, _ = started.end()
        assert (status, errors) == (0, [])
    assert weights(place, "far") == whole
