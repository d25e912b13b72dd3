"""Two teachers of different families and image sizes: the packaged recipe, and what comparing with each alone costs."""

import json

import pytest

from potstill.config.recipe import load_recipe
from potstill.experiment import pipeline


def test_the_recipe_of_the_package_has_different_families_and_sizes():
    found = load_recipe("ensemble")
    assert [each.model for each in found.teacher_list] == ["cifar/vgg8", "cifar/resnet20"]
    assert [each.size or found.data.size for each in found.teacher_list] == [32, 16]


@pytest.fixture
def both(recipe, tmp_path, monkeypatch):
    """A run of two teachers, and how to make another run from one of them."""
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    teachers = [{"model": "cifar/resnet14"}, {"model": "cifar/wrn_16_1", "size": 24}]
    path = pipeline.run(recipe(teacher=json.dumps(teachers)), output_dir=tmp_path, name="both")

    def alone(stage):
        made = recipe(teacher=json.dumps({"weights": str(path / stage)}))
        return pipeline.run(made, output_dir=tmp_path, name=f"from-{stage}")

    return path, alone


def stages(path):
    return json.loads((path / "results.json").read_text())["stages"]


def test_each_teacher_alone_is_read_from_the_store_of_both(both):
    path, alone = both
    found = json.loads((path / "results.json").read_text())
    assert found["stages"]["distilled"]["teaching"]["computed"] > 0
    figures = found["together"]["teachers"]["test"]
    assert found["comparison"]["teachers_top1"] == figures["top1"]
    assert f"the teachers together {100 * figures['top1']:.1f} %" in found["comparison"]["verdict"]
    other = stages(alone("teacher-2"))
    assert other["distilled"]["teaching"]["computed"] == 0
    assert other["distilled"]["teaching"]["read"] > 0
    assert other["teacher"]["model"]["architecture"] == "cifar/wrn_16_1"
    assert other["teacher"]["test"]["top1"] == pytest.approx(found["stages"]["teacher-2"]["test"]["top1"])
    assert other["baseline"]["test"] == found["stages"]["baseline"]["test"]  # the same start and the same views
