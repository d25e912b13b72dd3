"""G13, G14: a run of several processes ends as a whole, shows why, and goes on where it was.

Two gloo processes, started as torchrun starts them, without its seconds; torchrun itself, and the rarer mishaps, are
``slow``.  What happens to a rank happens at a step of its training (``faulty.py``), so that no test depends on how far
a process has come in a given time.  What needs no run is tried in ``tests/distributed/test_group_watchdog.py``.
"""

import contextlib
import json
import os
import re
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

from potstill.errors import RankLost
from potstill.export.evaluate import evaluate

from ..forked import forked_ranks

RECIPE = """
name: tiny
data: {{source: "{source}", size: 16, workers: 0, augment: {{hflip: true}}}}
teacher: {{model: cifar/resnet8, training: {{epochs: 2}}}}
student: {{model: cifar/resnet8}}
method: {{name: kd, temperature: 2.0, alpha: 0.5}}
teacher_cache: {{views: 2}}
training: {{epochs: 3, batch_size: 16, lr: 0.003, precision: float32, checkpoint_seconds: 0.001, threads: 1}}
"""
STAGES = ("teacher", "baseline", "distilled")
LONG = 1200  # seconds after which a process counts as hanging
LATE = 14  # steps: the teacher's 8 are done, the baseline is in its second epoch
GO_ON = "What was saved is intact: start all again, with --resume"
INTERRUPTED = "interrupted; --resume continues a run from its last checkpoint"
FAULTY = Path(__file__).with_name("faulty.py")


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


def command(place, name, *flags, mishap=("none", 0)):
    run = ["run", str(place / "tiny.yaml"), "--output-dir", str(place / "runs"), "--name", name, *flags]
    return [str(FAULTY), *map(str, mishap), *run]


def environment(cache, timeout="60"):
    return os.environ | {"POTSTILL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "POTSTILL_TIMEOUT": timeout}


class Launch:
    """torchrun and its processes.

    Args:
        place: with images and a recipe.
        name: of the run.
        flags: of the verb.
        mishap: of rank 1, and the step at which it happens.
        before, options: of torchrun.
    """

    def __init__(self, place, name, *flags, mishap=("none", 0), options=("--nproc-per-node", "2"), before=()):
        self.cache = place / f"cache-{name}"
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        self.process = subprocess.Popen(
            [*before, *launcher, *command(place, name, *flags, mishap=mishap)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(self.cache, "6" if mishap[0] == "hangs" else "60"),
        )  # fmt: skip

    def end(self):
        """The exit status, and the errors that potstill has shown, when all processes are gone."""
        _, errors = self.process.communicate(timeout=LONG)
        until = time.monotonic() + LONG
        while any(alive(int(path.read_text())) for path in (self.cache / "pids").glob("*")):
            assert time.monotonic() < until, "a process was left behind"
            time.sleep(0.05)
        self.errors = errors
        return self.process.returncode, shown(errors)

    def code(self, rank):
        """The exit code of a rank, as torchrun reports it."""
        found = re.search(rf"rank +: {rank} .*\n +exitcode +: (-?\d+)", self.errors)
        return found and int(found[1])


def shown(errors):
    """The first two lines of each error that potstill has shown."""
    return ["\n".join(text.splitlines()[:2]) for text in errors.split("error: ")[1:]]


def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def weights(place, name):
    return [(place / "runs" / name / stage / "model.safetensors").read_bytes() for stage in STAGES]


@pytest.fixture(scope="module")
def whole(place):
    """The weights of a run to which nothing happened."""
    (ranks,) = forked_ranks(command(place, "whole"), environment=environment(place / "cache-whole"))
    for each in ranks:
        assert each.returncode == 0, each.errors
        assert shown(each.errors) == []
    return weights(place, "whole")


def lost(rank, how):
    who = re.escape(f"rank {rank} of 2 (process ") + r"\d+" + re.escape(f" on {socket.gethostname()})")
    return f"{who} does not answer: it {how}\\.\n{re.escape(GO_ON)}"


def test_figures_are_those_of_a_single_process(place, whole):
    """The same weights in one process: every figure on test."""
    results = json.loads((place / "runs" / "whole" / "results.json").read_text())["stages"]
    for stage in STAGES:
        single = evaluate(place / "runs" / "whole" / stage, str(place / "images"), device="cpu")
        for name, value in results[stage]["test"].items():
            if name in single:
                assert value == pytest.approx(single[name], rel=1e-4), (stage, name)
    environment = json.loads((place / "runs" / "whole" / "environment.json").read_text())
    assert environment["processes"] == 2


@pytest.fixture(scope="module")
def unlucky(place):
    """The attempts of a run of which a process is killed, and which starts again.

    A run has 8 steps of the teacher, 12 of the baseline and 12 of the distilled student.
    """
    killed = command(place, "unlucky", mishap=("killed", 10))
    return forked_ranks(killed, environment=environment(place / "cache-unlucky"), restarts=1)


@pytest.mark.slow  # quick, without torchrun: tests/distributed/test_group_watchdog.py, a rank that hangs
def test_a_process_that_hangs_in_a_step_is_named_and_ended(place, whole):
    """It lives, but does not get on."""
    status, errors = Launch(place, "hanging", mishap=("hangs", 3)).end()
    assert status != 0
    assert len(errors) == 1
    assert re.fullmatch(lost(1, r"makes no progress after \d+ exchanges with the others"), errors[0])
    assert Launch(place, "hanging", "--resume").end() == (0, [])
    assert weights(place, "hanging") == whole


@pytest.mark.slow  # quick, without torchrun: tests/distributed/test_group_watchdog.py, a signal to all
def test_a_run_whose_launcher_was_sent_sigterm_is_interrupted(place):
    status, errors = Launch(place, "told", mishap=("told", 6)).end()
    assert status != 0
    assert [text.splitlines()[0] for text in errors] == [INTERRUPTED]


def test_a_killed_process_is_named_by_the_other(unlucky):
    first = unlucky[0]
    assert [each.returncode for each in first] == [RankLost.exit_code, -signal.SIGKILL]
    errors = shown("".join(each.errors for each in first))
    assert len(errors) == 1
    assert re.fullmatch(lost(1, "has died, or is stopped"), errors[0])


def test_a_run_that_starts_again_goes_on_to_the_same_weights(unlucky, place, whole):
    assert [each.returncode for each in unlucky[1]] == [0, 0], "".join(each.errors for each in unlucky[1])
    assert weights(place, "unlucky") == whole


@pytest.mark.slow  # quick, without torchrun: the two tests above
def test_torchrun_starts_the_run_of_a_killed_process_again(place, whole):
    options = ("--nproc-per-node", "2", "--max-restarts", "1")
    status, errors = Launch(place, "restarted", mishap=("killed", 10), options=options).end()
    assert status == 0
    assert len(errors) == 1
    assert re.fullmatch(lost(1, "has died, or is stopped"), errors[0])
    assert weights(place, "restarted") == whole


@pytest.mark.slow  # quick, without torchrun: tests/distributed/test_group_watchdog.py, an error shown by its rank
@pytest.mark.parametrize(
    ("mishap", "code", "shown"),
    [
        ("memory", 5, "rank 1 of 2: out of memory; a smaller training.batch_size or data.cache_fraction needs less"),
        ("data", 3, "rank 1 of 2: photographs/cat.png can no longer be read"),
        ("bug", 1, "this is a bug in potstill; please report it with the lines above and the command"),
        ("wrong device", 1, "this is a bug in potstill; please report it with the lines above and the command"),
    ],
)
def test_any_error_of_one_process_is_shown_as_what_it_is(place, mishap, code, shown):
    launch = Launch(place, mishap.replace(" ", "-"), mishap=(mishap, 4))
    status, errors = launch.end()
    assert status != 0
    assert [text.splitlines()[0] for text in errors] == [shown]
    assert launch.code(1) == code
    assert launch.code(0) in (code, None)
    assert "does not answer" not in launch.errors


@pytest.mark.slow
def test_a_stopped_process_is_named_and_ended(place):
    """SIGSTOP: nothing of it runs, so the other one ends it."""
    status, errors = Launch(place, "stopped", mishap=("stopped", 4)).end()
    assert status != 0
    assert len(errors) == 1
    assert re.fullmatch(lost(1, "has died, or is stopped"), errors[0])


@pytest.mark.slow
def test_no_process_outlives_the_launcher(place, whole):
    Launch(place, "orphans", mishap=("orphaned", LATE)).end()
    assert Launch(place, "orphans", "--resume").end() == (0, [])
    assert weights(place, "orphans") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("method.name=kid", "kid"),
        ("method={name: crd}", "crd remembers every training image"),
        ("training.batch_size=3", "a batch of 3 is too small"),
    ],
)
def test_a_mistake_of_all_is_shown_once(place, change, shown):
    status, errors = Launch(place, "mistaken", "--set", change).end()
    assert status != 0
    assert len(errors) == 1
    assert shown in errors[0]
    assert not (place / "runs" / "mistaken").exists()


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


@pytest.mark.slow
def test_two_machines_are_as_two_processes(place, whole, two_machines):
    """Of the same kind, with a root that both see: the same weights."""
    ends = []
    for node, before in enumerate(two_machines):
        options = ("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1")
        where = ("--master-addr", "10.87.65.1", "--master-port", "29511")
        ends.append(Launch(place, "far", options=(*options, *where), before=before))
    for launch in ends:
        assert launch.end() == (0, [])
    assert weights(place, "far") == whole
