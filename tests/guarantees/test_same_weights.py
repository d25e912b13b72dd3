"""G5 and G6: weights follow from recipe, images and seed; workers, order of files, time zone and clock do not matter.

Teacher, baseline and distilled student are trained with random views, a random split and a random order, which is all
that chance decides; what is compared is SHA-256 over every tensor of the three.
"""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from potstill.config.recipe import load_recipe
from potstill.data.workers import DecodeWorkers
from potstill.experiment import pipeline

STAGES = ("teacher", "baseline", "distilled")
SETTINGS = (
    "training.epochs=1", "training.batch_size=4", "data.augment={hflip: true, pad_crop: 0.2, erasing: 0.3}",
    "data.cache_fraction=1.0e-12", "data.workers=0", "teacher_cache=off",
)  # fmt: skip
FAR = 253402300000.0  # seconds since 1970: the last day of the year 9999


RUN = """
import sys
from pathlib import Path
from potstill.experiment.pipeline import run
from potstill.config.recipe import load_recipe
run(load_recipe(sys.argv[1], sys.argv[3:]), output_dir=Path(sys.argv[2]))
"""


def learnt(root):
    """SHA-256 over names, types, shapes and bytes of all tensors, by stage."""
    found = {}
    for stage in STAGES:
        sums = hashlib.sha256()
        for name, tensor in sorted(load_file(root / "tiny" / stage / "model.safetensors").items()):
            sums.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
        found[stage] = sums.hexdigest()
    return found


@pytest.fixture
def train(tiny_recipe, tmp_path, monkeypatch):
    """Runs it with further settings, in this process and with no pixels kept from before; SHA-256 by stage."""

    def run(*settings, recipe=tiny_recipe):
        number = sum(1 for each in tmp_path.iterdir() if each.name.startswith("runs"))
        root = tmp_path / f"runs {number}"
        monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / f"cache {number}"))
        pipeline.run(load_recipe(recipe, [*SETTINGS, *settings]), output_dir=root)  # the last setting of a key counts
        return learnt(root)

    return run


@pytest.fixture(scope="module")
def once():
    """Filled by the first test that wants it."""
    return {}


@pytest.fixture
def expected(train, once):
    """SHA-256 by stage where nothing is out of the ordinary."""
    if not once:
        once.update(train())
    return once


@pytest.fixture
def elsewhere(tiny_recipe, tmp_path):
    """The same run in a process of its own, with other variables and behind another program."""

    def run(*before, **variables):
        environment = os.environ | {"POTSTILL_CACHE": str(tmp_path / "cache"), **variables}
        command = [*before, sys.executable, "-c", RUN, str(tiny_recipe), str(tmp_path / "runs"), *SETTINGS]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        return learnt(tmp_path / "runs")

    return run


def test_the_seed_matters(train, expected):
    """All that is below would be empty where the seed decided nothing."""
    others = {setting: train(setting) for setting in ("seed=1", "data.augmentation_seed=1", "data.split_seed=1")}
    for stage in STAGES:
        assert len({expected[stage], *(found[stage] for found in others.values())}) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_workers(workers, train, expected, monkeypatch):
    started, begin = [], DecodeWorkers.__init__

    def counted(self, images, side, how, processes, **more):
        started.append(processes)
        begin(self, images, side, how, processes, **more)

    monkeypatch.setattr(DecodeWorkers, "__init__", counted)
    assert train(f"data.workers={workers}") == expected
    assert set(started) == {workers}


def test_order_of_the_file_system(train, expected, tiny_recipe, tmp_path, monkeypatch):
    """The same images, written last name first, in a folder that lists itself in another order each time."""
    text = tiny_recipe.read_text()
    source = next(line.split("source: ")[1].split(",")[0] for line in text.splitlines() if "source: " in line)
    copies = tmp_path / "photographs"
    files = sorted((name, inside) for name in os.listdir(source) for inside in os.listdir(f"{source}/{name}"))
    for name, inside in reversed(files):
        (copies / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(f"{source}/{name}/{inside}", copies / name / inside)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(text.replace(source, str(copies)))

    shuffled, asked = random.Random(1), []
    scan, names = os.scandir, os.listdir

    class Scan:
        def __init__(self, path="."):
            with scan(path) as entries:
                self.entries = list(entries)
            shuffled.shuffle(self.entries)
            asked.append(str(path))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

        def __iter__(self):
            return iter(self.entries)

        def close(self):
            self.entries = []

    def listed(path="."):
        found = names(path)
        shuffled.shuffle(found)
        return found

    monkeypatch.setattr(os, "scandir", Scan)
    monkeypatch.setattr(os, "listdir", listed)
    assert train(recipe=recipe) == expected
    assert any(path.startswith(str(copies)) for path in asked)


@pytest.mark.parametrize(("zone", "clock"), [("Pacific/Kiritimati", 1e9), ("XYZ+11:37", FAR)])
def test_time_zone_and_clock(zone, clock, train, expected, monkeypatch):
    """A clock that stands, too: waits and durations have their own."""
    monkeypatch.setenv("TZ", zone)
    monkeypatch.setattr(time, "time", lambda: clock)
    monkeypatch.setattr(time, "time_ns", lambda: int(clock) * 10**9)
    time.tzset()
    try:
        assert train() == expected
    finally:
        monkeypatch.undo()
        time.tzset()


def test_another_process_in_another_place(elsewhere, expected):
    """Another order of sets and dicts' keys by hash, another language, time zone and working directory."""
    assert elsewhere(PYTHONHASHSEED="4242", TZ="America/St_Johns", LC_ALL="C", LANG="C") == expected


@pytest.mark.skipif(shutil.which("faketime") is None, reason="there is no program faketime")
def test_faketime(elsewhere, expected):
    assert elsewhere("faketime", "-m", "--exclude-monotonic", "2001-02-03 04:05:06") == expected
