"""A data set in memory that a network learns in a second: squares of three colours."""

import json

import numpy as np
import pytest

from potstill.config.recipe import load_recipe
from potstill.data import AugmentSettings
from potstill.data.image_sets import ArraySet
from potstill.data.splits import DataSplits
from potstill.models.factory import create_model
from potstill.models.model_file import save_model

CLASSES = ("blue", "green", "red")
_COLOURS = np.array([(30, 60, 200), (40, 180, 60), (210, 40, 30)])


def coloured(count, split, seed):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = random.normal(_COLOURS[labels][:, None, None, :], 70, (count, 16, 16, 3)).clip(0, 255).astype(np.uint8)
    return ArraySet(images, labels, [f"{split}/{each:03d}" for each in range(count)])


@pytest.fixture(scope="session")
def data():
    parts = [
        coloured(count, split, seed) for seed, (split, count) in enumerate([("train", 60), ("val", 18), ("test", 18)])
    ]
    return DataSplits(
        CLASSES, *parts, source="colours", origin="made up", fingerprint="0" * 64, augment=AugmentSettings()
    )


@pytest.fixture(scope="session")
def public():
    return coloured(21, "public", 9)


@pytest.fixture
def recipe():
    """A recipe on these images; keywords are changes as after --set."""

    def make(**changes):
        value = {
            "name": "tiny",
            "data": {"source": "python", "size": 16, "workers": 0, "augment": {"hflip": True, "pad_crop": 0.1}},
            "teacher": {"model": "cifar/resnet8"},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd", "temperature": 2.0, "alpha": 0.5},
            "training": {"epochs": 1, "batch_size": 16, "lr": 0.003, "precision": "float32", "threads": 1},
        }
        sets = [f"{key}={text if isinstance(text, str) else json.dumps(text)}" for key, text in changes.items()]
        return load_recipe(value, sets, data_needed=False)

    return make


@pytest.fixture
def teacher_folder(tmp_path):
    """A model file of a teacher that knows the three classes (but nothing about them)."""
    from potstill.input_spec import InputSpec
    from potstill.models.model_file import Classifier

    module = create_model("cifar/resnet8", 3, size=16)
    save_model(Classifier(module, "cifar/resnet8", CLASSES, InputSpec(16)), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def parts():
    """Server, student and clients put together by hand."""
    return Parts


class Parts:
    @staticmethod
    def server(name, recipe, data, clients, *, public=None, rounds=1, local_epochs=1, teacher=None, **limits):
        import torch

        from potstill.contrib.federated import ALGORITHMS
        from potstill.contrib.federated.client import PublicDataset
        from potstill.contrib.federated.server import Schedule, Server
        from potstill.experiment.builders import build_network, split_loader
        from potstill.models.model_file import Classifier
        from potstill.training.devices import create_compute

        torch.manual_seed(5)
        settings = recipe.stage_training("student")
        compute = create_compute(settings)
        start = build_network(recipe, recipe.student, data.class_names)
        student = Classifier(start.module, start.architecture, data.class_names, start.input)
        val = split_loader(data, "val", student.input, recipe, settings, compute)
        images = None if public is None else PublicDataset(public, student.input, settings, compute, 0)
        schedule = Schedule(rounds, local_epochs, 1, 1.0, **limits)
        return Server(
            ALGORITHMS[name], student, recipe, schedule, clients, val, compute, public=images, teacher=teacher
        )
