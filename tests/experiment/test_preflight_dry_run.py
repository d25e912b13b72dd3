"""What a method cannot do is said before any training, and saying it leaves no trace."""

import shutil

import pytest
import torch
from torch import nn

from potstill.data.datasets import load_data
from potstill.distillation import distiller
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.experiment.plan import plan_stages
from potstill.experiment.preflight import dry_run
from potstill.models.factory import create_model
from potstill.models.families.own_models import given_networks
from potstill.training.callbacks import SilentObserver


class Refusing(SilentObserver):
    """Fails as soon as any stage begins."""

    def stage(self, name, detail):
        raise AssertionError(f"{name} began")


REFUSED = {
    "one image at a time": (
        {"method": "{name: dist}", "training.batch_size": 1},
        "method dist compares images with each other, and distilled has a batch size of 1",
    ),
    "BatchNorm of one image": (
        {"student": "{model: cifar/mobilenetv2}", "training.batch_size": 1},
        "distilled cannot be trained on batches of one image: its BatchNorm needs several",
    ),
    "layers for a method that joins none": (
        {"feature_pairs": "[[stage1, stage1]]"},
        "feature_pairs: method kd compares no feature maps of student and teacher",
    ),
    "unknown layer": ({"method": "{name: fitnet}", "feature_pairs": "[[stage1, stage9]]"}, "stage9"),
    "normalisation that is not there": (
        {"method": "{name: ofd}", "teacher": "{model: convnext_atto}", "data.size": 32},
        "BatchNorm",
    ),
    "a wrong combination": (
        {"method": "{name: ls, base_method: {name: at}}"},
        "ls standardises logits, and at compares other things",
    ),
    "a schedule of nothing": (
        {"method": "{name: kd, schedule: {hint: {shape: linear}}}"},
        "the schedule of kd names 'hint', which is neither",
    ),
    "an assistant that cannot be joined": (
        {"method": "{name: ofd}", "assistants": "[{model: convnext_atto}]", "data.size": 32},
        "BatchNorm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_training(case, recipe, tmp_path):
    changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        pipeline.run(recipe(**changes), output_dir=tmp_path, observer=Refusing())
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layer_decay_of_a_network_without_known_blocks(side, recipe, tmp_path):
    torch.save(create_model("cifar/resnet8", 7, size=32).state_dict(), tmp_path / "weights.pth")
    network = f"{{model: cifar/resnet8, weights: '{tmp_path / 'weights.pth'}', head: finetune"
    changes = {side: network + ", training: {epochs: 1, layer_decay: 0.5}}"}
    with pytest.raises(UsageError, match="layer_decay takes the blocks of a network from timm, and ResNet"):
        pipeline.run(recipe(**changes), output_dir=tmp_path, observer=Refusing())


def test_two_classes_are_refused_where_they_mean_nothing(photographs, recipe, tmp_path):
    for name in ("blue", "red"):
        shutil.copytree(photographs / name, tmp_path / "two" / name)
    changes = {"data.source": f"'{tmp_path / 'two'}'", "method": "{name: dkd}"}
    with pytest.raises(UsageError, match="of 2 classes only one is left"):
        pipeline.run(recipe(**changes), output_dir=tmp_path, observer=Refusing())


def test_stages_without_the_method_are_not_held_to_it(recipe, tmp_path):
    changes = {"method": "{name: dist}", "training.batch_size": 1, "training.epochs": 1, "data.val": 0.05}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, stages=("baseline",))
    assert (path / "baseline" / "model.json").exists()


@pytest.mark.parametrize("method", ["{name: kd}", "{name: ft}", "{name: simkd}", "{name: crd}"])
def test_a_rehearsal_draws_nothing_from_the_random_stream(method, recipe):
    made = recipe(method=method, born_again_generations=2)
    data = load_data(made.data)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    texts = dry_run(made, plan_stages(made), data)
    assert torch.equal(torch.randn(4), expected)
    assert list(texts) == ["generation-1", "distilled"]


def test_its_images_have_the_layout_that_the_student_is_trained_in(recipe, monkeypatch):
    """In channels last, the backward pass of its narrow strided layer is written out of bounds."""

    def narrow(num_classes):
        layers = (nn.Conv2d(3, 7, 3), nn.Conv2d(7, 12, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(12, num_classes))

    seen = []
    original = distiller._freeze_unused_parameters
    monkeypatch.setattr(
        distiller,
        "_freeze_unused_parameters",
        lambda network, example: seen.append(example) or original(network, example),
    )
    for student in ("python/narrow", "cifar/resnet8"):
        made = recipe(method="{name: simkd}")
        made = made.model_copy(update={"student": made.student.model_copy(update={"model": student})})
        with given_networks({"python/narrow": (narrow, None)}):
            dry_run(made, plan_stages(made), load_data(made.data))
    assert [each.is_contiguous() for each in seen] == [True, False]


def test_the_last_image_of_an_epoch_is_not_left_alone(recipe, tmp_path):
    # 39 images to train on and 9 for val: with batches of 2 either ends with one image.
    changes = {"student": "{model: cifar/mobilenetv2}", "method": "{name: dist}", "training.epochs": 1}
    changes |= {"training.batch_size": 2, "data.test": 0.2, "teacher.training.epochs": 1}
    made = recipe(**changes)
    data = load_data(made.data)
    assert (len(data.train), len(data.val)) == (39, 9)
    path = pipeline.run(made, output_dir=tmp_path)
    assert (path / "distilled" / "model.json").exists()
