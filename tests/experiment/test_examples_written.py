"""examples.json, as a run leaves it."""

import json

import pytest

from potstill.config.recipe import load_recipe
from potstill.experiment import pipeline
from potstill.io import file_sha256

WHOLE_RUNS = True


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    recipe = load_recipe(
        {
            "name": "tiny",
            "data": {"source": str(photographs), "size": 16, "workers": 0},
            "teacher": {"model": "cifar/resnet14"},
            "student": {"model": "cifar/resnet8"},
            "training": {"epochs": 1, "batch_size": 16, "precision": "float32"},
        }
    )
    return pipeline.run(recipe, output_dir=tmp_path_factory.mktemp("runs"))


def test_examples_are_written_and_listed(run):
    results = json.loads((run / "results.json").read_text())
    assert results["files"]["examples.json"] == file_sha256(run / "examples.json")
    found = json.loads((run / "examples.json").read_text())
    comparison = results["comparison"]
    assert found["groups"]["repaired"]["count"] == comparison["fixed"]
    assert found["groups"]["broken"]["count"] == comparison["broken"]
    distilled = results["stages"]["distilled"]["test"]
    assert found["groups"]["mistakes"]["count"] == round(distilled["count"] * (1 - distilled["top1"]))
    assert found["groups"]["disagreements"]["count"] == round(distilled["count"] * (1 - distilled["agreement"]))
    assert all(image["thumbnail"] for image in found["images"].values())
