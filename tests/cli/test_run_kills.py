"""The real command, killed and signalled while it trains: --resume makes of it what a run is that nobody stopped."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = """
name: tiny
data: {{source: "{source}", size: 16, workers: 0, augment: {{hflip: true}}}}
teacher: {{model: cifar/resnet8, training: {{epochs: 2}}}}
student: {{model: cifar/resnet8}}
method: {{name: kd, temperature: 2.0, alpha: 0.5}}
teacher_cache: {{views: 2}}
training: {{epochs: 3, batch_size: 16, lr: 0.003, precision: float32, checkpoint_seconds: 0.001, threads: 1}}
"""
SIGNALLED = Path(__file__).parents[1] / "guarantees" / "signalled.py"
STAGES = ("teacher", "baseline", "distilled")
LONG = 1200  # seconds after which a process counts as hanging


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


def run(place, name, *flags, through=("-m", "potstill")):
    """The exit status and the errors."""
    environment = os.environ | {"POTSTILL_CACHE": str(place / f"cache-{name}"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *through,
        "run",
        str(place / "tiny.yaml"),
        "--output-dir",
        str(place / "runs"),
        "--name",
        name,
    ]
    done = subprocess.run(
        [*command, *flags], capture_output=True, text=True, env=environment, timeout=LONG, check=False
    )
    return done.returncode, done.stderr


def weights(place, name):
    return [(place / "runs" / name / stage / "model.safetensors").read_bytes() for stage in STAGES]


@pytest.fixture(scope="module")
def whole(place):
    code, errors = run(place, "whole")
    assert code == 0, errors
    return weights(place, "whole")


def stopped(place, name, count, number, *flags):
    """The same of a run that gets a signal before its next checkpoint after so many."""
    through = (str(SIGNALLED), "potstill.training.checkpointing:save_checkpoint", number, str(count))
    return run(place, name, *flags, through=through)


def resumed(place, name):
    code, errors = run(place, name, "--resume")
    assert code == 0, errors
    return weights(place, name)


@pytest.mark.slow  # quick: tests/guarantees/test_signals.py, tests/training/test_trainer_stopping.py
def test_a_signal_loses_nothing(place, whole):
    code, errors = stopped(place, "signal", 9, "SIGTERM")
    assert code == 143
    assert errors.endswith("error: interrupted; --resume continues a run from its last checkpoint\n")
    assert "Traceback" not in errors
    assert resumed(place, "signal") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("times", "seed"), [(1, 0), (10, 1), (10, 2)])
def test_killed(place, whole, times, seed):
    name, chance = f"killed-{seed}", random.Random(seed)
    for i in range(times):
        code, errors = stopped(place, name, chance.randint(1, 12), "SIGKILL", *(["--resume"] if i else []))
        assert code in (-signal.SIGKILL, 0), errors  # 0: it was done before
    assert resumed(place, name) == whole
