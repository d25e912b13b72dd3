"""The real command, killed and signalled while it trains: --resume makes of it what a run is that nobody stopped."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

RECIPE = """
name: tiny
data: {{source: "{source}", size: 16, workers: 0, augment: {{hflip: true}}}}
teacher: {{model: cifar/resnet8, training: {{epochs: 4}}}}
student: {{model: cifar/resnet8}}
method: {{name: kd, temperature: 2.0, alpha: 0.5}}
store: {{views: 2}}
training: {{epochs: 8, batch_size: 16, lr: 0.003, precision: float32, checkpoint_seconds: 0.001, threads: 1}}
"""
STAGES = ("teacher", "baseline", "distilled")
LONG = 120  # seconds after which a process counts as hanging


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images and a recipe."""
    folder = tmp_path_factory.mktemp("kills")
    random_pixels = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 180)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(60):
            pixels = np.clip(random_pixels.normal(level, 50, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:02d}.png")
    (folder / "tiny.yaml").write_text(RECIPE.format(source=folder / "images"))
    return folder


def start(place, name, *flags):
    environment = os.environ | {"POTSTILL_CACHE": str(place / f"cache-{name}"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "potstill", "run", str(place / "tiny.yaml"), "--root", str(place / "runs")]
    return subprocess.Popen(
        [*command, "--name", name, *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def weights(place, name):
    return [(place / "runs" / name / stage / "model.safetensors").read_bytes() for stage in STAGES]


@pytest.fixture(scope="module")
def whole(place):
    done = start(place, "whole")
    _, errors = done.communicate(timeout=LONG)
    assert done.returncode == 0, errors
    return weights(place, "whole")


def checkpoints(place, name):
    """(stage, when) of the checkpoints that are there."""
    found = []
    for path in (place / "runs" / name).glob("*/checkpoints/last.checkpoint"):
        try:
            found.append((path.parts[-3], path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return sorted(found)


def wait_for_more(process, place, name, count):
    """Until so many more checkpoints have been seen, or the process is over."""
    seen, since = checkpoints(place, name), time.monotonic()
    while count and process.poll() is None:
        assert time.monotonic() - since < LONG
        now = checkpoints(place, name)
        count -= now != seen
        seen = now


def stopped(place, name, count, number, *flags):
    """The exit status and the errors of a run that got a signal after so many checkpoints."""
    process = start(place, name, *flags)
    wait_for_more(process, place, name, count)
    process.send_signal(number)
    _, errors = process.communicate(timeout=LONG)
    return process.returncode, errors


def resumed(place, name):
    process = start(place, name, "--resume")
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 0, errors
    return weights(place, name)


def test_a_signal_loses_nothing(place, whole):
    code, errors = stopped(place, "signal", 9, signal.SIGTERM)
    assert code == 143
    assert errors.endswith("error: interrupted; a run goes on from its last checkpoint with --resume\n")
    assert "Traceback" not in errors
    assert resumed(place, "signal") == whole


def test_killed(place, whole):
    kill_again_and_again(place, "once", 1, seed=0)
    assert resumed(place, "once") == whole


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_ten_times(place, whole, seed):
    name = f"ten-{seed}"
    kill_again_and_again(place, name, 10, seed)
    assert resumed(place, name) == whole


def kill_again_and_again(place, name, times, seed):
    chance = random.Random(seed)
    for i in range(times):
        code, errors = stopped(place, name, chance.randint(1, 12), signal.SIGKILL, *(["--resume"] if i else []))
        assert code in (-signal.SIGKILL, 0), errors
