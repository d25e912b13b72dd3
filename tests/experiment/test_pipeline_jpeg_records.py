"""A run whose training images are kept as JPEG records: chosen when it begins, recorded, and kept when it goes on."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from potstill.config.recipe import load_recipe
from potstill.data import decoded_cache
from potstill.errors import Stopped, UsageError
from potstill.experiment import pipeline
from potstill.models.model_file import load_model
from potstill.training.callbacks import SilentObserver

pytestmark = pytest.mark.skipif(not hasattr(os, "preadv"), reason="without preadv, pixels are kept in memory")


class Heard(SilentObserver):
    """Records notes, and may stop at a stage."""

    def __init__(self, stop_at=""):
        self.notes, self.stop_at = [], stop_at

    def note(self, message):
        self.notes.append(message)

    def stage(self, name, detail):
        if name == self.stop_at:
            raise Stopped(15)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("smooth"), np.random.default_rng(0)
    for name, colour in {"blue": (30, 60, 200), "red": (210, 40, 30)}.items():
        (root / name).mkdir()
        for i in range(15):
            coarse = np.clip(random.normal(colour, 60, (4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC).save(root / name / f"{i:02d}.png")

    def make(*changes):
        value = {
            "name": "large",
            "data": {"source": str(root), "size": 32, "workers": 0, "augment": {"crop_scale": [0.5, 1]}},
            "teacher": {"model": "cifar/resnet8", "training": {"epochs": 1}},
            "student": {"model": "cifar/resnet8"},
            "method": {"name": "kd"},
            "training": {"epochs": 2, "min_steps": 0, "batch_size": 8, "lr": 0.003, "precision": "float32"},
        }
        return load_recipe(value, list(changes))

    return make


def weights(path):
    return load_model(path / "distilled").module.state_dict()


def test_it_is_chosen_recorded_and_kept(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_cache, "SMALLEST", 1)
    with monkeypatch.context() as patch:
        # 22 images of 37 x 38 x 3 are 93 kB as raw pixels, and about 19 kB as records.
        patch.setattr(decoded_cache, "free_bytes", lambda device: 0)
        patch.setattr(decoded_cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 160_000))
        heard = Heard("distilled")
        with pytest.raises(Stopped):
            pipeline.run(recipe(), output_dir=tmp_path, observer=heard)
    assert any(note.startswith("training images are kept as JPEG records of 37 px") for note in heard.notes)
    assert any(note.startswith("storing 22 images as JPEG of 37 px") for note in heard.notes)
    # There is room for raw pixels now, but the run goes on with what it began with.
    path = pipeline.run(recipe(), output_dir=tmp_path, resume=True)
    assert load_recipe(path / "recipe.yaml").data.cache == "jpeg"
    data = json.loads((path / "results.json").read_text())["data"]
    assert data["training_images"] == decoded_cache.JPEG_RECORDS

    alone = {"output_dir": tmp_path, "stages": ("teacher", "distilled")}
    forced = pipeline.run(recipe("data.cache=jpeg", "data.cache_fraction=1e-9"), name="forced", **alone)
    assert all(map(torch.equal, weights(path).values(), weights(forced).values()))  # no room for records: the same
    heard = Heard()
    exact = pipeline.run(recipe(), name="exact", observer=heard, **alone)
    assert load_recipe(exact / "recipe.yaml").data.cache == "raw"
    assert "training_images" not in json.loads((exact / "results.json").read_text())["data"]
    assert not any("JPEG" in note for note in heard.notes)
    assert not all(map(torch.equal, weights(path).values(), weights(exact).values()))
    with pytest.raises(UsageError, match=r"data\.cache: 'jpeg' there, 'raw' here"):
        pipeline.run(recipe(), output_dir=tmp_path, name="mixed", baseline=path)
