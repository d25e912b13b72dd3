"""Settings that are right by themselves and have no effect in a training of this length, on this data."""

import pytest
import torch

from potstill.data.datasets import load_data
from potstill.errors import UsageError
from potstill.experiment.pipeline import run
from potstill.experiment.plan import plan_stages
from potstill.experiment.preflight import check_all, warn_about_settings
from potstill.models.factory import create_model
from potstill.training.callbacks import SilentObserver

IMAGES = 42  # of training: 60, less 15 % for val and for test


def warnings(recipe):
    heard = []

    class Listening(SilentObserver):
        def warn(self, message):
            heard.append(message)

    data = load_data(recipe.data)
    assert len(data.train) == IMAGES
    found = warn_about_settings(recipe, plan_stages(recipe), data, Listening())
    assert heard == found
    return found


def test_settings_that_all_have_their_effect_are_not_doubted(recipe):
    assert warnings(recipe()) == []


ALL, STUDENTS = ["teacher", "baseline", "distilled"], ["baseline", "distilled"]  # the teacher has three epochs


@pytest.mark.parametrize(
    ("changes", "roles", "message"),
    [
        ({"training.batch_size": 43}, ALL, "training.batch_size 43 is more than the 42 training images"),
        (
            {"training.gradient_accumulation_steps": 4},
            ALL,
            "training.gradient_accumulation_steps 4 is more than the 3 batches of an epoch: a step averag",
        ),
        (
            {"training.early_stopping_patience": 2},
            STUDENTS,
            "training.early_stopping_patience 2 has no effect with training.epochs 2",
        ),
        (
            {"training.warmup_epochs": 2, "training.schedule": "cosine"},
            STUDENTS,
            "training.warmup_epochs 2 is the whole training, so the learning rate reaches training.lr in the last step "
            "only, and its schedule has no effect",
        ),
    ],
)
def test_a_setting_without_effect_is_said_of_each_network(recipe, changes, roles, message):
    found = warnings(recipe(**changes))
    assert [text.split(": ", 1)[0] for text in found] == roles
    assert all(text.split(": ", 1)[1].startswith(message) for text in found)


def test_a_teacher_without_weight_is_said(recipe):
    two = "[{model: cifar/resnet8}, {model: cifar/resnet8}]"
    assert warnings(recipe(teacher=two, **{"teachers.weights": [0.5, 2]})) == []
    (found,) = warnings(recipe(teacher=two, **{"teachers.weights": [1, 0]}))
    assert found.startswith("teacher-2 has the weight 0")


@pytest.mark.parametrize(("setting", "value"), [("data.class_balance", "weights"), ("training.label_smoothing", 0.1)])
def test_what_changes_the_label_term_is_doubted_where_there_is_none(recipe, setting, value):
    for method in ("{name: kd, alpha: 0.0}", "{name: dist, ce_weight: 0.0}"):
        (found,) = warnings(recipe(method=method, **{setting: value}))
        assert found.startswith(f"distilled: {setting}")
        assert "the baseline is trained with it, this student without" in found
    assert warnings(recipe(method="{name: kd, alpha: 0.3}", **{setting: value})) == []


def test_of_a_ready_teacher_nothing_is_said(recipe, tmp_path):
    path = tmp_path / "ready.pth"
    torch.save(create_model("cifar/resnet8", 3, size=16).state_dict(), path)
    given = {"training.batch_size": 43, "teacher.model": "cifar/resnet8", "teacher.weights": path}
    assert [text.split(": ", 1)[0] for text in warnings(recipe(**given))] == STUDENTS
    assert [text.split(": ", 1)[0] for text in warnings(recipe(**given, **{"teacher.head": "finetune"}))] == ALL


def test_of_several_teachers_the_one_that_is_trained_is_named(recipe, tmp_path):
    (tmp_path / "ready.safetensors").touch()
    teachers = f"[{{model: cifar/resnet8, weights: {tmp_path}/ready.safetensors}}, {{model: cifar/resnet8}}]"
    found = warnings(recipe(teacher=teachers, seeds=2, **{"training.batch_size": 43}))
    assert [text.split(": ", 1)[0] for text in found] == ["teacher-2", *STUDENTS]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{name: dkd}", None),  # the paper's 20 of 240 epochs are a share of a shorter training
        ("{name: dkd, warmup_epochs: 100%}", None),
        (
            "{name: dkd, warmup_epochs: 20}",
            "method dkd reaches its full weight after 20 epochs, and training ends at 10% of it",
        ),
        ("[{name: kd}, {name: dkd, warmup_epochs: 4}]", "method kd + dkd reaches its full weight after 4 epochs, and"),
        (
            "{name: eskd, base_method: {name: reviewkd, warmup_epochs: 5}}",
            "method eskd around reviewkd reaches its full",
        ),
        ("{name: nd, warmup_epochs: 1}", None),
        (
            "{name: nd, warmup_epochs: 2}",
            "method nd reaches its full weight after 3 epochs, and training ends at 67% of it",
        ),
        ("{name: dkd, warmup_epochs: 2}", None),
    ],
)
def test_a_methods_warm_up_that_is_longer_than_the_training(recipe, method, message):
    found = warnings(recipe(method=method))
    if message is None:
        assert found == []
    else:
        (text,) = found
        assert text.startswith(f"distilled: {message}")


def test_a_methods_schedule_in_a_training_of_one_epoch(recipe):
    method = "[{name: kd, schedule: {kd: {shape: linear, start: 1, end: 0}}}, {name: logit_mse}]"
    (text,) = warnings(recipe(method=method, **{"training.epochs": 1}))
    assert text == "distilled: the method's schedule stays at its start value in one epoch"
    assert warnings(recipe(method=method)) == []


def test_a_metric_that_is_always_one_is_refused(recipe):
    with pytest.raises(UsageError, match=r"top3 is always 1 with 3 classes.*use top1 or nll"):
        check_all(recipe(**{"training.selection_metric": "top3"}), None)


def test_doubts_stand_in_the_results(recipe, tmp_path):
    folder = run(recipe(**{"training.early_stopping_patience": 2}), output_dir=tmp_path, stages=("baseline",))
    assert "baseline: training.early_stopping_patience 2 has no effect" in (folder / "results.json").read_text(
        encoding="utf-8"
    )
