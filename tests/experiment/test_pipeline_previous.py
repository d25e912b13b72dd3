"""A run with the model in use: it is heard in training, and flips against it are counted on test."""

import csv
import json

import numpy as np
import pytest
import torch

from potstill.config.recipe import load_recipe
from potstill.errors import ArtifactError, UsageError
from potstill.evaluation.significance import wilson_interval
from potstill.experiment import curriculum, pipeline
from potstill.experiment.comparison import count_flips
from potstill.experiment.plan import plan_stages
from potstill.input_spec import InputSpec
from potstill.models.factory import create_model
from potstill.models.model_file import Classifier, save_model

CLASSES = ("blue", "green", "red")


def deployed(folder, classes=CLASSES, size=20):
    torch.manual_seed(5)
    network = create_model("cifar/resnet8", len(classes), size=size).eval()
    save_model(Classifier(network, "cifar/resnet8", classes, InputSpec(size)), folder)
    return folder


def settings(photographs, **changes):
    return {
        "name": "tiny",
        "data": {"source": str(photographs), "size": 16, "workers": 0},
        "teacher": {"model": "cifar/resnet14", "training": {"epochs": 1}},
        "student": {"model": "cifar/resnet8"},
        "method": {"name": "kd", "temperature": 3.0},
        "training": {"epochs": 1, "batch_size": 16, "lr": 0.003, "precision": "float32", "threads": 1},
        **changes,
    }


def correct(run, stage):
    with (run / stage / "predictions_test.csv").open(newline="") as file:
        return np.array([row["label"] == row["prediction"] for row in csv.DictReader(file)])


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    root = tmp_path_factory.mktemp("previous")
    recipe = load_recipe(settings(photographs), flags={"--previous": deployed(root / "old")})
    return pipeline.run(recipe, output_dir=root)


def test_flips_are_counted_on_test(run):
    results = json.loads((run / "results.json").read_text())
    assert results["planned"] == ["teacher", "previous", "baseline", "distilled"]
    found, before = results["flips"], correct(run, "previous")
    assert (found["images"], found["previous_correct"]) == (len(before), before.sum())
    for name in ("baseline", "distilled"):
        after, row = correct(run, name), found["students"][name]
        assert (row["negative"], row["positive"]) == ((before & ~after).sum(), (~before & after).sum())
    assert "not trained on these images in this split" in " ".join(results["warnings"])


def test_the_previous_model_is_taken_as_it_is_and_heard_beside_the_teacher(run):
    results = json.loads((run / "results.json").read_text())
    assert results["method"]["name"] == "pct"
    assert results["method"]["base_method"] == {"name": "kd", "temperature": 3.0}
    assert results["stages"]["previous"]["training"] is None
    assert results["stages"]["distilled"]["teaching"]["by"] == ["teacher", "previous"]
    assert results["stages"]["previous"]["model"]["size"] == 20  # its own views
    line = json.loads((run / "distilled" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"ce", "kd", "flips"} <= line["train"]["terms"].keys()
    # The teacher's lead is that of the teacher, and the cascade asks no previous model.
    assert results["comparison"]["teachers"] == 1
    assert results["cascade"]["teachers"] == ["teacher"]


def test_teachers_with_weights_teach_and_order_images_without_the_previous_model(photographs, tmp_path, monkeypatch):
    asked, predict = [], curriculum.predict_images

    def note(model, loader, compute, what):
        asked.append(what)
        return predict(model, loader, compute, what)

    monkeypatch.setattr(curriculum, "predict_images", note)
    one = {"model": "cifar/resnet8", "training": {"epochs": 1}}
    changes = {"teacher": [one, one], "teachers": {"weights": [1, 2]}, "born_again_generations": 2, "curriculum": {}}
    recipe = load_recipe(settings(photographs, **changes), flags={"--previous": deployed(tmp_path / "old")})
    pipeline.run(recipe, output_dir=tmp_path, stages=("teacher", "distilled"), evaluate=False)
    assert asked == ["the teacher on train", "the teacher-2 on train", "the generation-1 on train"]


def test_a_method_without_teacher_has_the_previous_model_alone(photographs, tmp_path):
    flags = {"--previous": deployed(tmp_path / "old")}
    recipe = load_recipe(settings(photographs, teacher=None, method={"name": "supervised"}), flags=flags)
    assert [(stage.name, stage.teachers) for stage in plan_stages(recipe)] == [
        ("previous", ()), ("baseline", ()), ("distilled", ("previous",)),
    ]  # fmt: skip


def test_flags_are_for_the_inner_method_and_settings_for_the_outer(photographs, tmp_path):
    flags = {"--previous": deployed(tmp_path / "old"), "--method": "kd", "--alpha": 0.25}
    recipe = load_recipe(settings(photographs), ["method.weight=3", "method.base_method.temperature=2"], flags=flags)
    assert recipe.method == {
        "name": "pct", "base_method": {"name": "kd", "temperature": 2, "alpha": 0.25}, "weight": 3,
    }  # fmt: skip
    again = load_recipe(recipe.model_dump(mode="json"), recorded=True)
    assert again.method == recipe.method
    with pytest.raises(UsageError, match="no option 'alpha'"):
        load_recipe(settings(photographs), ["method.alpha=0.5"], flags=flags)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("blue", "green", "yellow"), "only it has yellow; only the data has red"),
        (("green", "blue", "red"), "has them in another order: green, blue, red"),
    ],
)
def test_classes_must_agree_by_name(photographs, tmp_path, classes, message):
    recipe = load_recipe(settings(photographs), flags={"--previous": deployed(tmp_path / "old", classes)})
    with pytest.raises(ArtifactError, match=message):
        pipeline.run(recipe, output_dir=tmp_path)


def test_what_cannot_be_combined_is_said_before_anything_is_loaded(photographs, tmp_path):
    old = deployed(tmp_path / "old")
    for changes, flags, message in (
        ({"assistants": [{"model": "cifar/resnet8"}]}, {"--previous": old}, "leave them or previous out"),
        ({}, {"--previous": tmp_path / "nowhere"}, "no such file or folder"),
        ({"previous": {"model": "resnet18", "weights": "pretrained"}}, {}, "is a run or model folder"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(settings(photographs, **changes), flags=flags)


def test_the_method_alone_asks_for_the_model_in_use(photographs):
    with pytest.raises(UsageError, match="give that model with --previous RUN"):
        plan_stages(load_recipe(settings(photographs, method={"name": "pct"})))


def test_flips_by_hand():
    correct = {
        "previous": np.array([True, True, True, False, False]),
        "baseline": np.array([True, False, False, True, False]),
        "distilled": np.array([True, True, False, True, True]),
        "teacher": np.array([True, True, True, True, True]),
    }
    found = count_flips(correct)
    assert (found["images"], found["previous_correct"]) == (5, 3)
    assert list(found["students"]) == ["baseline", "distilled"]
    assert [found["students"][name]["negative"] for name in ("baseline", "distilled")] == [2, 1]
    assert [found["students"][name]["positive"] for name in ("baseline", "distilled")] == [1, 2]
    assert found["students"]["distilled"]["rate"] == 0.2
    assert found["students"]["distilled"]["rate_high"] == wilson_interval(1, 5).high
    assert found["difference"] == pytest.approx(-0.2)
    assert found["difference_low"] < -0.2 < found["difference_high"]
