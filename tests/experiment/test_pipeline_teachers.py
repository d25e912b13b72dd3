"""More than one teacher, assistants, generations, or no teacher at all: whole runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.config.recipe import load_recipe
from potstill.experiment import builders, pipeline
from potstill.models.model_file import load_model
from potstill.report.render import render
from potstill.report.run_reader import read_run
from potstill.training.callbacks import SilentObserver


def weights(path, stage):
    return load_model(path / stage).module.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def results(path):
    return json.loads((path / "results.json").read_text())


def probabilities(path, stage, split="test"):
    lines = (path / stage / f"predictions_{split}.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    labels = np.array([["blue", "green", "red"].index(row[1]) for row in rows])
    return labels, np.array([[float(cell) for cell in row[3:]] for row in rows])


class Recorder:
    """Stands in for the Distiller's class and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, student, teacher, method, **options):
        states = [{k: v.clone() for k, v in each.state_dict().items()} for each in teacher or []]
        self.calls.append({"teachers": states, "student": student, **options})
        return joining_distiller(student, teacher, method, **options)


joining_distiller = builders.Distiller


@pytest.fixture(scope="module")
def chain(photographs, tmp_path_factory):
    """Two teachers of different sizes -> assistant -> two generations; and what each Distiller was given."""
    recipe = load_recipe(
        {
            "name": "chain",
            "data": {"source": str(photographs), "size": 16, "workers": 0, "augment": {}},
            "teacher": [
                {"model": "cifar/resnet14", "training": {"epochs": 2}},
                {"model": "cifar/resnet14", "size": 24, "training": {"epochs": 2}},
            ],
            "teachers": {"weights": [1, 3]},
            "assistants": [{"model": "cifar/resnet14", "training": {"epochs": 1}}],
            "student": {"model": "cifar/resnet8"},
            "born_again_generations": 2,
            # With alpha = 1 teachers count for nothing: the last generation must be the baseline.
            "method": {"name": "kd", "alpha": 1.0},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.003, "precision": "float32"},
        }
    )
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "Distiller", recorder)
        path = pipeline.run(recipe, output_dir=tmp_path_factory.mktemp("runs"))
    trained = recorder.calls[3:]  # the first three are the rehearsal's
    names = ("teacher", "teacher-2", "baseline", "assistant-1", "generation-1", "distilled")
    return path, dict(zip(names, trained, strict=True))


def test_each_network_learns_from_the_one_before(chain):
    path, given = chain
    assert [same(state, weights(path, name)) for state, name in zip(
        given["assistant-1"]["teachers"], ("teacher", "teacher-2"), strict=True
    )] == [True, True]  # fmt: skip
    for learner, teacher in (("generation-1", "assistant-1"), ("distilled", "generation-1")):
        (state,) = given[learner]["teachers"]
        assert same(state, weights(path, teacher))
    assert given["teacher"]["teachers"] == given["baseline"]["teachers"] == []


def test_each_teacher_gets_images_of_its_own_size_and_its_own_weight(chain):
    path, given = chain
    assert [spec.size for spec in given["assistant-1"]["teacher_input"]] == [16, 24]
    assert given["assistant-1"]["teacher_weights"] == [1, 3]
    assert given["distilled"]["teacher_weights"] is None  # one teacher now
    assert load_model(path / "teacher-2").input.size == 24
    assert results(path)["stages"]["teacher-2"]["model"]["size"] == 24


def test_networks_start_differently_but_for_the_two_that_are_compared(chain):
    path, _ = chain
    assert not same(weights(path, "teacher"), weights(path, "teacher-2"))
    assert not same(weights(path, "generation-1"), weights(path, "distilled"))
    assert same(weights(path, "distilled"), weights(path, "baseline"))


def test_several_as_one_are_measured_on_the_predictions(chain):
    path, _ = chain
    found = results(path)["together"]
    labels, first = probabilities(path, "teacher")
    _, second = probabilities(path, "teacher-2")
    mean = np.exp(0.25 * np.log(first) + 0.75 * np.log(second))  # logits are averaged
    assert found["teachers"]["of"] == ["teacher", "teacher-2"]
    assert found["teachers"]["test"]["top1"] == pytest.approx((mean.argmax(1) == labels).mean())
    mean /= mean.sum(1, keepdims=True)
    nll = -np.log(mean[np.arange(len(labels)), labels]).mean()
    assert found["teachers"]["test"]["nll"] == pytest.approx(nll, rel=1e-4)
    half = (probabilities(path, "generation-1")[1] + probabilities(path, "distilled")[1]) / 2
    assert found["generations"]["of"] == ["generation-1", "distilled"]
    assert found["generations"]["test"]["top1"] == pytest.approx((half.argmax(1) == labels).mean())
    agree = (mean.argmax(1) == probabilities(path, "distilled")[1].argmax(1)).mean()
    assert results(path)["stages"]["distilled"]["test"]["agreement"] == pytest.approx(agree)


def test_the_price_of_several_teachers_is_stated(chain):
    path, _ = chain
    stages = results(path)["stages"]
    one = stages["teacher"]["model"]["parameters"]
    teaching = stages["assistant-1"]["teaching"]
    assert teaching["by"] == ["teacher", "teacher-2"]
    assert (teaching["parameters"], teaching["bytes"], teaching["batch_size"]) == (2 * one, 8 * one, 16)
    assert teaching["ms_per_step"] > 0
    assert "teaching" not in stages["baseline"]
    comparison = results(path)["comparison"]
    assert comparison["teachers"] == 2
    assert comparison["parameter_ratio"] == pytest.approx(2 * one / stages["distilled"]["model"]["parameters"])


def test_everybody_is_compared_with_the_baseline(chain):
    path, _ = chain
    found = results(path)
    assert found["planned"] == list(found["stages"])
    others = found["comparison"]["others"]
    assert list(others) == ["assistant-1", "generation-1", "generations"]
    base = found["stages"]["baseline"]["test"]["top1"]
    for name in ("assistant-1", "generation-1"):
        assert others[name]["top1_gain"] == pytest.approx(found["stages"][name]["test"]["top1"] - base)
    assert others["generations"]["top1_gain"] == pytest.approx(found["together"]["generations"]["test"]["top1"] - base)


def test_the_report_shows_them_all(chain):
    path, _ = chain
    text = render(path).read_text()
    assert list(read_run(path).stages) == [
        "teacher", "teacher-2", "baseline", "assistant-1", "generation-1", "distilled",
    ]  # fmt: skip
    for phrase in ("teachers together", "(teacher, teacher-2)", "generations together", "(generation-1, distilled)"):
        assert phrase in text
    assert "Learns from teacher, teacher-2: 350 k parameters (1.40 MB)" in text
    assert "Learns from   assistant-1: 175 k parameters" in (path / "generation-1" / "metrics.txt").read_text()
    assert (path / "assistant-1" / "accuracy_curve.png").exists()


def test_a_chain_goes_on_where_it_was_killed(chain, tmp_path):
    class Killed(Exception):
        pass

    class Killer(SilentObserver):
        def stage(self, name, detail):
            if name == "generation-1":
                assert "learns from cifar/resnet14 (assistant-1)" in detail
                raise Killed

    path, _ = chain
    recipe = load_recipe(path / "recipe.yaml")
    with pytest.raises(Killed):
        pipeline.run(recipe, output_dir=tmp_path, observer=Killer())
    again = pipeline.run(recipe, output_dir=tmp_path, resume=True)
    for stage in results(path)["stages"]:
        assert same(weights(again, stage), weights(path, stage)), stage


def test_a_method_without_teacher_trains_none(recipe, tmp_path):
    said = []

    class Listening(SilentObserver):
        def note(self, message):
            said.append(message)

    made = recipe(**{"method": "{name: tfkd_reg}", "training.epochs": 1})
    path = pipeline.run(made, output_dir=tmp_path, observer=Listening())
    assert said[0] == "method tfkd_reg needs no teacher: none is trained"
    assert not any("teacher" in note for note in said[1:])
    found = results(path)
    assert list(found["stages"]) == found["planned"] == ["baseline", "distilled"]
    assert not (path / "teacher").exists()
    assert found["comparison"]["gap"] is None
    assert "teacher" not in found["comparison"]["verdict"]
    assert "Not part of this run" not in render(path).read_text()


def test_a_student_may_be_its_own_teacher(chain, recipe, tmp_path):
    path, _ = chain
    changes = {"teacher": f"{{weights: '{path / 'baseline'}'}}", "method": "{name: tfkd_self}", "training.epochs": 1}
    again = pipeline.run(recipe(**changes), output_dir=tmp_path)
    assert same(weights(again, "teacher"), weights(path, "baseline"))
    assert results(again)["stages"]["teacher"]["model"]["architecture"] == "cifar/resnet8"


def test_layers_and_adapters_are_written_and_shown(recipe, tmp_path):
    said = []

    class Listening(SilentObserver):
        def note(self, message):
            said.append(message)

    changes = {
        "teacher": "{model: cifar/resnet14, training: {epochs: 1}}",
        "method": "{name: fitnet}",
        "feature_pairs": "[[stage2, stage3]]",
        "training.epochs": 1,
    }
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, observer=Listening())
    text = (path / "distilled" / "layers.txt").read_text()
    assert said[0] == f"distilled: {text}"
    assert "stage2 [32,4,4]" in text
    assert "stage3 [64,2,2]" in text
    counts = {
        line.split()[0]: int(line.split()[-1].replace(",", "")) for line in text.split("\n\n")[-1].splitlines()[1:]
    }
    total = counts.pop("total")
    assert total == sum(counts.values())
    assert total >= 32 * 64
    assert not (path / "baseline" / "layers.txt").exists()


def test_a_teacher_that_was_trained_on_images_that_are_test_now_is_named(recipe, tmp_path):
    class Listener(SilentObserver):
        def warn(self, message):
            heard.append(message)

    def train(name, observer=None, **changes):
        changes |= {"teacher.training.epochs": 1, "data.keep_splits": "none"}
        options = {"output_dir": tmp_path, "name": name, "stages": ("teacher",), "evaluate": False}
        return pipeline.run(recipe(**changes), observer=observer, **options)

    teacher = train("one") / "teacher"
    for seed, warned in ((0, False), (1, True)):
        heard = []
        train(f"two-{seed}", Listener(), **{"data.split_seed": seed, "teacher.weights": str(teacher)})
        assert any("test images" in each and "in another split" in each for each in heard) == warned
    copy = tmp_path / "copy"  # whose images have other names
    for image in sorted(Path(recipe().data.source).glob("*/*.png")):
        (copy / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy / image.parent.name / f"x{image.name}")
    heard = []
    train("copied", Listener(), **{"data.source": str(copy), "teacher.weights": str(teacher)})
    assert any("test images" in each and "blue/x" in each for each in heard)
    (teacher.parent / "recipe.yaml").write_text("no: [recipe")  # is a reason to say nothing, and none to end a run
    train("three", Listener(), **{"data.split_seed": 1, "teacher.weights": str(teacher)})
