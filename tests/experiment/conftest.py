"""Real files in class folders, small enough to train on in a second."""

from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from potstill.config.recipe import load_recipe

from ..conftest import short_runs

COLOURS = {"blue": (30, 60, 200), "green": (40, 180, 60), "red": (210, 40, 30)}


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """Short runs, but for modules that say WHOLE_RUNS = True."""
    with nullcontext() if getattr(request.module, "WHOLE_RUNS", False) else short_runs():
        yield


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """One folder of three classes, twenty noisy 20 x 16 images each."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(20):
            pixels = np.clip(random.normal(colour, 60, (16, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def recipe(photographs):
    """A recipe on these photographs; keywords are changes as after --set."""

    def make(**changes):
        value = {
            "name": "tiny",
            "data": {"source": str(photographs), "size": 8, "workers": 0, "augment": {"hflip": True, "pad_crop": 0.2}},
            "teacher": {"model": "cifar/resnet8", "training": {"epochs": 3}},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32", "checkpoint_seconds": 0},
        }
        return load_recipe(value, [f"{key}={text}" for key, text in changes.items()])

    return make


@pytest.fixture
def unlabeled(tmp_path):
    for i in range(10):
        path = tmp_path / "unlabeled" / f"deep/{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    return tmp_path / "unlabeled"
