"""Second images, mixed images, unlabeled images and passes before training: from the recipe to the stage."""

import json

import pytest
import torch
from torch import nn

from potstill.config.recipe import load_recipe
from potstill.data import image_io
from potstill.data.datasets import load_data
from potstill.data.settings import AugmentSettings
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.experiment.builders import network_spec, split_loader, train_loader
from potstill.experiment.plan import PlannedStage, plan_stages
from potstill.experiment.preflight import (
    check_all,
    check_data_requirements,
    create_stage_method,
    load_and_stage,
    training_squares,
)
from potstill.experiment.stage import label_loss, train_stage
from potstill.input_spec import InputSpec
from potstill.methods.base import Method
from potstill.methods.requirements import Requirements
from potstill.models.model_file import Classifier
from potstill.training.callbacks import SilentObserver
from potstill.training.devices import create_compute


def metrics(path, stage):
    return [json.loads(line) for line in (path / stage / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_unlabeled_images(recipe, unlabeled, tmp_path):
    changes = {"data.unlabeled": unlabeled, "data.unlabeled_share": 0.25, "training.epochs": 1}
    path = pipeline.run(recipe(**changes, **{"teacher.training.epochs": 1}), output_dir=tmp_path)
    found = json.loads((path / "results.json").read_text())
    assert found["data"]["origin"].endswith(f"; 10 unlabeled from {unlabeled}")
    train = sum(found["data"]["counts"]["train"].values())
    for stage in ("teacher", "baseline", "distilled"):
        assert metrics(path, stage)[0]["train"]["count"] == train
        assert found["stages"][stage]["train"]["count"] == train


def test_a_run_with_mixed_images(recipe, tmp_path):
    changes = {"data.augment": "{hflip: true, mixup: 0.8, cutmix: 1}", "training.epochs": 1}
    path = pipeline.run(recipe(**changes, **{"teacher.training.epochs": 1}), output_dir=tmp_path)
    figures = metrics(path, "distilled")[0]["train"]
    assert set(figures["terms"]) == {"ce", "kd"}


def test_class_weights_and_smoothing_skip_unlabeled_images(recipe):
    made = recipe(**{"data.class_balance": "weights", "training.label_smoothing": 0.1})
    data = load_data(made.data)
    loss = label_loss(made, made.training, data)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, -100, 1, -100, 2])
    known = labels != -100
    weight, smoothing = loss.weight.double(), 0.1
    log_p = logits.double().log_softmax(dim=1)[known]
    given = weight[labels[known]]
    expected = 0.9 * (-given * log_p[torch.arange(4), labels[known]]).sum() / given.sum()
    expected += smoothing * (-(log_p * weight).sum(dim=1) / 3).sum() / given.sum()
    assert loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(logits, labels).item() == pytest.approx(loss(logits[known], labels[known]).item(), rel=1e-6)


class Plain(Method):
    def __init__(self, **needs):
        super().__init__()
        self.needs = Requirements(**needs)


NOTHING = {"mixes": False, "unlabeled": False}


@pytest.mark.parametrize(
    ("needs", "data", "message"),
    [
        ({"second": "strong"}, {"mixes": True}, "Plain needs a second view of each image"),
        ({"index": True}, {"mixes": True}, "Plain has a memory by sample, and a mixed image is no sample"),
        ({"labels": True}, {"unlabeled": True}, "Plain needs the label of every image: leave data.unlabeled out"),
        ({"index": True}, {"unlabeled": True}, "Plain has a memory of the labeled samples"),
        ({"second": "same class"}, {"unlabeled": True}, "Plain compares images of the same class"),
        ({"batch_size": True}, {"unlabeled": True}, "Plain has layers for the labeled images of a batch alone"),
        ({"teacher": False}, {"unlabeled": True}, "Plain has no teacher"),
    ],
)
def test_what_cannot_work_is_refused(needs, data, message):
    with pytest.raises(UsageError, match=message):
        check_data_requirements(Plain(**needs), **(NOTHING | data))
    check_data_requirements(Plain(**needs), **NOTHING)


def test_what_can_work_is_not_refused():
    check_data_requirements(Plain(), **(NOTHING | {"mixes": True}))
    check_data_requirements(Plain(second="strong"), **(NOTHING | {"unlabeled": True}))
    check_data_requirements(Plain(teacher=False, peers=True), **(NOTHING | {"unlabeled": True}))


def test_preflight_looks_at_the_method_and_the_data_together(recipe, unlabeled):
    made = recipe(**{"method": "{name: supervised}", "data.unlabeled": unlabeled})
    with pytest.raises(UsageError, match="supervised has no teacher or peer"):
        check_all(made, None)


def test_a_recipe_says_what_is_wrong_with_it(photographs, tmp_path):
    value = {
        "data": {"source": str(photographs), "size": 16},
        "teacher": {"model": "cifar/resnet14"},
        "student": {"model": "cifar/resnet8"},
    }
    with pytest.raises(UsageError, match=r"data\.unlabeled: no folder '/nowhere'"):
        load_recipe(value, ["data.unlabeled=/nowhere"])
    with pytest.raises(UsageError, match=r"training\.dot_delta: momentum - dot_delta must be at least 0"):
        load_recipe(value, ["training.optimizer=dot", "training.momentum=0.95", "training.dot_delta=0.1"])
    assert load_recipe(value, ["training.optimizer=dot"]).training.dot_delta == 0.075


class Learning(Method):
    """Keeps the mean of the teacher's logits over the training images, and counts the passes."""

    def __init__(self, second="none"):
        super().__init__()
        self.needs = Requirements(prepare=True, second=second)
        self.register_buffer("mean", torch.zeros(3))
        self.index, self.images, self.seconds = [], [], []

    def prepare(self, passes):
        for _ in range(2):
            logits = []
            for outputs, batch in passes():
                logits.append(outputs.logits)
                self.index.append(batch.index)
                self.images.append(batch.images)
            self.mean.copy_(torch.cat(logits).mean(dim=0))

    def distill(self, student, teacher, batch):
        self.seconds.append((batch.index, batch.second))
        return {"mean": (student.logits - self.mean).square().mean()}


def stage(recipe, method, folder, *, resume=False, observer=None):
    made = recipe()
    data = load_data(made.data)
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)) for _ in range(2)]
    student, teacher = (Classifier(net, "linear", data.class_names, InputSpec(16)) for net in networks)
    planned, compute = PlannedStage("distilled", ("teacher",), distils=True), create_compute(made.training)
    train = train_loader(planned, method.needs, student.input, recipe=made, data=data, compute=compute)
    train_stage(
        planned, student, method, [teacher], train, recipe=made, data=data,
        compute=compute, folder=folder, observer=observer or SilentObserver(), resume=resume,
    )  # fmt: skip
    return data, teacher


def test_a_method_may_learn_from_the_teacher_before_training(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.experiment.stage.save_model", lambda *_: None)
    method = Learning(second="same class")
    data, teacher = stage(recipe, method, tmp_path)
    count = len(data.train)
    assert torch.cat(method.index).tolist() == [*range(count), *range(count)]
    images = torch.cat(method.images)
    assert torch.equal(images[:count], images[count:])  # no augmentation
    torch.testing.assert_close(method.mean, teacher.module(images[:count]).mean(dim=0))
    assert len(method.seconds) == 2 * -(-count // 16)
    assert all(second.shape == (len(index), 3, 16, 16) for index, second in method.seconds)


def test_what_was_learned_before_comes_back_on_resuming(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("potstill.experiment.stage.save_model", lambda *_: None)

    class Changing(Learning):
        def distill(self, student, teacher, batch):
            if self.training:
                self.mean += 1
            return super().distill(student, teacher, batch)

    class Died(Exception):
        pass

    class Mortal(SilentObserver):
        def epoch_start(self, epoch, *_):
            if epoch == 2:
                raise Died

    whole, cut, resumed = Changing(), Changing(), Changing()
    stage(recipe, whole, tmp_path / "whole")
    with pytest.raises(Died):
        stage(recipe, cut, tmp_path / "cut", observer=Mortal())
    stage(recipe, resumed, tmp_path / "cut", resume=True)
    assert torch.equal(resumed.mean, whole.mean)
    assert not torch.equal(resumed.mean, cut.mean)


@pytest.mark.parametrize("folds", [{}, {"data.folds": 2, "data.fold": 1}])
def test_each_file_is_decoded_once_until_all_loaders_of_a_run_have_their_pixels(
    recipe, tmp_path, monkeypatch, unlabeled, folds
):
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    decoded, own = [], image_io._decode
    monkeypatch.setattr(image_io, "_decode", lambda *arguments: decoded.append(1) or own(*arguments))
    made = recipe(**{"data.augment": "{crop_scale: [0.3, 1], hflip: true}", "data.unlabeled": unlabeled} | folds)
    planned, compute = plan_stages(made), create_compute(made.training)
    data = load_and_stage(made, planned)
    for stage in reversed(planned):  # the distilled student, with the images without labels, comes first
        spec, needs = network_spec(made, made.network(stage.name)), create_stage_method(made).needs
        if stage.distils:
            train_loader(stage, needs, spec, recipe=made, data=data, compute=compute)
        for split in ("val", "test"):
            split_loader(data, split, spec, made, made.training, compute)
    assert len(decoded) == 60 + 10


def test_training_images_are_cut_only_for_networks_that_train_on_them(recipe):
    given = recipe(**{"teacher.weights": "pretrained", "teacher.head": "probe", "teacher.size": 24})
    augment = AugmentSettings(crop_scale=(0.3, 1.0))
    assert training_squares(given, plan_stages(given, ("teacher",)), augment) == set()
    sides = {side for side, _ in training_squares(given, plan_stages(given), augment)}
    assert len(sides) == 2  # of the student, and of the teacher that it learns from
